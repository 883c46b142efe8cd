"""Gathers the runs of 02_entropy_sgd at the scale of the paper into the tables that its page is drawn from.

    python results/entropy_sgd.py runs/mnistfc-* runs/lenet-*

Diverged runs are rows too. Two runs of one experiment and method that differ in more than the seed are refused, and so is a seed that comes twice: a mean over
them would mean nothing.
"""

import sys
from pathlib import Path

import pandas as pd
from fastcore.script import Param, call_parse

from flatmin_nb.lab.results import histories, load, written_whole

HERE = Path(__file__).parent
KEY = ["experiment", "method", "seed"]
PROTOCOL = ["model", "epochs", "batch_size", "L", "gamma", "scoping", "schedule", "noise", "noise_convention", "averaging", "inner_momentum", "inner_lr", "lr",
            "lr_milestones", "lr_decay", "outer_momentum", "l2", "dropout", "baseline_dropout", "sgd_lr", "adam_lr", "ema", "reestimate_batchnorm", "validation"]  # fmt: skip
CURVES = ["step", "epoch", "gradient_evaluations", "seconds", "lr", "train_loss", "test_loss", "test_error"]
FACTS = ["status", "test_error", "test_loss", "gradient_evaluations", "train_seconds", "seconds", "device_name", "threads", "python", "torch", "flatmin_nb",
         "commit", "started", "ended", "resumed"]  # fmt: skip


def refuse_a_mixture(table: pd.DataFrame) -> None:
    "Exit in one line where the rows of one experiment and method are not one protocol with different seeds."
    for name, rows in table.groupby(["experiment", "method"]):
        for column in PROTOCOL:
            if rows[column].nunique(dropna=False) > 1:
                sys.exit(f"{' '.join(name)}: runs with {column} = {' and '.join(map(str, rows[column].unique()))}; gather one protocol at a time")
        if rows["seed"].duplicated().any():
            sys.exit(f"{' '.join(name)}: seed {rows['seed'][rows['seed'].duplicated()].iloc[0]} comes twice; name each run once")


@call_parse
def main(
    runs: Param("folders with the records, at any depth", Path, nargs="+"),
):
    "Write entropy_sgd.csv, one row a run, and entropy_sgd_curves.csv, one row an evaluation."
    table = load(runs)
    table = table[table["status"].isin(["fitted", "finished", "diverged"])]  # fitted: trained to the end, its notebook not
    refuse_a_mixture(table)
    curves = histories(runs).merge(table[["run", *KEY]], on="run")
    frames = {"entropy_sgd": table[[*KEY, *FACTS, *PROTOCOL]].sort_values(KEY), "entropy_sgd_curves": curves[[*KEY, *CURVES]].sort_values([*KEY, "step"])}
    for name, frame in frames.items():
        with written_whole(HERE / f"{name}.csv") as file:
            frame.round(6).to_csv(file, index=False)
        print(f"results/{name}.csv: {len(frame)} rows")

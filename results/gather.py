"""Gathers the runs of a notebook into the tables that its page is drawn from: NAME.csv, one row a run, and NAME_curves.csv, one row an evaluation.

    python results/gather.py entropy_sgd runs/mnistfc-* runs/lenet-*
    python results/gather.py smoothout runs/smoothout-f1 runs/smoothout-digits

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
CURVES = ["step", "epoch", "gradient_evaluations", "seconds", "lr", "train_loss", "test_loss", "test_error"]
FACTS = ["status", "test_error", "test_loss", "gradient_evaluations", "train_seconds", "seconds", "device_name", "threads", "python", "torch", "flatmin_nb",
         "commit", "started", "ended", "resumed"]  # fmt: skip
PROTOCOL = {  # what must be the same in all runs of an experiment and method
    "entropy_sgd": ["model", "epochs", "batch_size", "L", "gamma", "scoping", "schedule", "noise", "noise_convention", "averaging", "inner_momentum", "inner_lr", "lr",
                    "lr_milestones", "lr_decay", "outer_momentum", "l2", "dropout", "baseline_dropout", "sgd_lr", "adam_lr", "ema", "reestimate_batchnorm", "validation"],
    "smoothout": ["model", "epochs", "train_batch_size", "batch_size", "lr_rule", "stretch", "a", "s", "noise", "schedule", "antithetic", "denoise", "rho", "asam_rho",
                  "clip", "validation", "sharpness_examples"],
}  # fmt: skip
MEASURED = {  # what a run came to, beyond the facts
    "entropy_sgd": [],
    "smoothout": ["val_error", "train_error", "last_test_error", "best_test_error", "validated_test_error", "distance", "passes", "keskar_1e3", "keskar_5e4", "sam_sharpness",
                  "uniform_sharpness", "filter_sharpness", "top_eigenvalue", "trace", "trace_error", "train_loss_there"],
}  # fmt: skip


def refuse_a_mixture(table: pd.DataFrame, protocol: list[str]) -> None:
    "Exit in one line where the rows of one experiment and method are not one protocol with different seeds."
    for name, rows in table.groupby(["experiment", "method"]):
        for column in protocol:
            if rows[column].nunique(dropna=False) > 1:
                sys.exit(f"{' '.join(name)}: runs with {column} = {' and '.join(map(str, rows[column].unique()))}; gather one protocol at a time")
        if rows["seed"].duplicated().any():
            sys.exit(f"{' '.join(name)}: seed {rows['seed'][rows['seed'].duplicated()].iloc[0]} comes twice; name each run once")


@call_parse
def main(
    name: str,  # of the notebook's tables, entropy_sgd or smoothout
    runs: Param("folders with the records, at any depth", Path, nargs="+"),
):
    "Write both tables."
    if name not in PROTOCOL:
        sys.exit(f"no tables {name!r}; choose one of {', '.join(PROTOCOL)}")
    table = load(runs)
    if table.empty:
        sys.exit(f"there is no run in {' '.join(map(str, runs))}; give folders that papermill wrote with -p out")
    table = table[table["status"].isin(["fitted", "finished", "diverged"])]  # fitted: trained to the end, its notebook not
    refuse_a_mixture(table, PROTOCOL[name])
    curves = histories(runs).merge(table[["run", *KEY]], on="run")
    columns = [*KEY, *FACTS, *MEASURED[name], *PROTOCOL[name]]
    frames = {name: table.reindex(columns=columns).sort_values(KEY), f"{name}_curves": curves[[*KEY, *CURVES]].sort_values([*KEY, "step"])}
    for title, frame in frames.items():
        with written_whole(HERE / f"{title}.csv") as file:
            frame.round(6).to_csv(file, index=False)
        print(f"results/{title}.csv: {len(frame)} rows")

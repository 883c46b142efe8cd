"""Gathers the runs of a notebook into the tables that its page is drawn from: NAME.csv, one row a run, and NAME_curves.csv, one row an evaluation.

    python results/gather.py entropy_sgd runs/mnistfc-* runs/lenet-*
    python results/gather.py smoothout runs/smoothout-f1 runs/smoothout-digits
    python results/gather.py sharpest_directions runs/cifar10_small runs/fashion_small runs/digits
    python results/gather.py bayesian_compression runs/bayes_digits runs/lenet_300_100 runs/lenet5_caffe
    python results/gather.py sgd_regimes runs/mnist runs/digits_map runs/perceptron

A run of sgd_regimes is a sweep: sgd_regimes.csv has a row for each, sgd_regimes_EXPERIMENT.csv a row for each of its lanes, sgd_regimes_curves.csv the states on the way of the first seed of digits_map.

Some have a third table: NAME_overshoots.csv, what steps along single directions did; NAME_scores.csv, the scores of all groups along the first run of a method.

Diverged runs are rows too. Two runs of one experiment and method that differ in more than the seed are refused, and so is a seed that comes twice: a mean over
them would mean nothing.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from fastcore.script import Param, call_parse

from flatmin_nb.lab.files import written_whole

from flatmin_nb.lab.results import load, run_folders

SWEPT = ["dataset", "arch", "act", "L", "h", "d", "loss", "dynamics", "bs", "pte", "sizes", "log2_temps", "log2_alphas", "chis", "seeds", "max_step", "grad_stats", "precision"]  # parameters of a sweep
HERE = Path(__file__).parent
KEY = ["experiment", "method", "seed"]
WATCHED = ["val_loss", "val_error", *(f"{kind}_{i}" for kind in ("lambda", "cos_batch", "cos_full") for i in range(1, 6)), "lambda_residual", "overlap", "distance", "edge",
           "cos_batch_full", "cos_random", "watch_products"]  # fmt: skip
CURVES = ["step", "epoch", "gradient_evaluations", "seconds", "lr", "train_loss", "test_loss", "test_error"]
FACTS = ["status", "test_error", "test_loss", "gradient_evaluations", "train_seconds", "seconds", "device_name", "threads", "python", "torch", "flatmin_nb",
         "commit", "started", "ended", "resumed"]  # fmt: skip
PROTOCOL = {  # what must be the same in all runs of an experiment and method
    "entropy_sgd": ["model", "epochs", "batch_size", "L", "gamma", "scoping", "schedule", "noise", "noise_convention", "averaging", "inner_momentum", "inner_lr", "lr",
                    "lr_milestones", "lr_decay", "outer_momentum", "l2", "dropout", "baseline_dropout", "sgd_lr", "adam_lr", "ema", "reestimate_batchnorm", "validation"],
    "smoothout": ["model", "epochs", "train_batch_size", "batch_size", "lr_rule", "stretch", "a", "s", "noise", "schedule", "antithetic", "denoise", "rho", "asam_rho",
                  "clip", "validation", "sharpness_examples"],
    "sharpest_directions": ["model", "data_seed", "epochs", "batch_size", "lr", "lr_schedule", "momentum", "nesterov", "weight_decay", "gamma", "outside", "nudge_from", "k", "every",
                            "sample", "mode", "directions", "refresh", "normalised", "statistics", "augment", "examples", "plateau", "stop", "look", "look_k", "look_every", "look_steps"],
    "bayesian_compression": ["prior", "tau", "group", "logvar", "max_std", "kl_weight", "warm_up", "pretrain", "epochs", "batch_size", "lr", "logvar_lr", "scale_lr", "clip", "keep", "penalty",
                             "widths", "augment", "dataset", "thresholds", "rounding"],
}  # fmt: skip
MEASURED = {  # what a run came to, beyond the facts
    "entropy_sgd": [],
    "smoothout": ["val_error", "train_error", "last_test_error", "best_test_error", "validated_test_error", "distance", "passes", "keskar_1e3", "keskar_5e4", "sam_sharpness",
                  "uniform_sharpness", "filter_sharpness", "top_eigenvalue", "trace", "trace_error", "train_loss_there"],
    "sharpest_directions": ["val_error", "val_loss", "best_test_error", "best_val_error", "clean_train_loss", "clean_train_error", "peak", "last_lambda_1", "distance", "frobenius",
                            "frobenius_error", "frobenius_root", "best_frobenius", "best_frobenius_error", "best_frobenius_root"],
    "bayesian_compression": ["means_error", "pruned_error", "kl", "kept_widths", "layer_bits", "fractions", "structured_factor", "unstructured_factor", "bits_factor", "file_bytes", "deflated_bytes",
                             "other_rounding_error", "other_rounding_bits", "published_error", "published_architecture", "published_bits"],
}  # fmt: skip
ALONG = {  # what a run wrote on its way: file, and the columns that are kept
    "entropy_sgd": {"history": CURVES},
    "smoothout": {"history": CURVES},
    "bayesian_compression": {"history": [*CURVES, "kl"], "scores": ["epoch", "layer", "group", "score"]},
    "sharpest_directions": {
        "history": [column for column in CURVES if not column.startswith("test")] + WATCHED,
        "overshoots": ["at_step", "epoch", "direction", "gradient", "factor", "loss", "change", "predicted_change"],
    },
}


def refuse_a_mixture(table: pd.DataFrame, protocol: list[str]) -> None:
    "Exit in one line where the rows of one experiment and method are not one protocol with different seeds."
    for name, rows in table.groupby(["experiment", "method"]):
        for column in protocol:
            if rows[column].nunique(dropna=False) > 1:
                sys.exit(f"{' '.join(name)}: runs with {column} = {' and '.join(map(str, rows[column].unique()))}; gather one protocol at a time")
        if rows["seed"].duplicated().any():
            sys.exit(f"{' '.join(name)}: seed {rows['seed'][rows['seed'].duplicated()].iloc[0]} comes twice; name each run once")


def few(rows: pd.DataFrame) -> pd.DataFrame:
    "Of the scores those that the page draws: of the first layer, along the first run of each method without changes, at six epochs."
    rows = rows[~rows["method"].str.contains("+", regex=False)]
    rows = rows[rows["seed"] == rows.groupby(KEY[:2])["seed"].transform("min")]
    rows = rows[rows["layer"] == rows.groupby(KEY[:2])["layer"].transform("first")]
    place = rows.groupby(KEY[:2])["epoch"].rank("dense") - 1
    last = place.groupby([rows[key] for key in KEY[:2]]).transform("max")
    return rows[[at in {round(part * end / 5) for part in range(6)} for at, end in zip(place, last)]]


def sweeps(runs: list[Path]) -> dict[str, pd.DataFrame]:
    "The tables of sgd_regimes. Exit in one line where a lane comes twice."
    folders, records = run_folders(runs), load(runs)
    records = records[records["status"] == "finished"].sort_values(["experiment", "L", "d", "sizes", "log2_temps", "chis"])
    facts = [name for name in FACTS if name in records]
    frames = {"sgd_regimes": records[["experiment", *SWEPT, "runs", "fitted", "unconverged", "diverged", "model_steps", *facts]].drop(columns=["resumed"])}
    for experiment, group in records.groupby("experiment"):
        lanes = pd.concat(pd.read_csv(folders[row["run"]] / "lanes.csv").assign(L=row["L"], d=row["d"]) for _, row in group.iterrows()).dropna(axis=1, how="all")
        names = ["L", "d", "data_chi", "ptr", "alpha", "temp", "seed"]
        if len(twice := lanes[lanes.duplicated(names)]):
            sys.exit(f"{experiment}: a lane comes twice, {', '.join(f'{name} = {twice[name].iloc[0]}' for name in names)}; name each sweep once")
        constant = [name for name in ("data_chi", "alpha", "ptr") if lanes[name].nunique() == 1]
        frames[f"sgd_regimes_{experiment}"] = lanes[[*names, *lanes.columns.drop(names)]].sort_values(names).drop(columns=constant)
    drawn = [row["run"] for _, row in records.iterrows() if row["experiment"] == "digits_map" and (folders[row["run"]] / "history.csv").exists()]
    if drawn:
        states = pd.concat(pd.read_csv(folders[name] / "history.csv") for name in drawn)
        whole = (np.log2(states["temp"]) % 1 == 0) & (states["seed"] == states["seed"].min())
        frames["sgd_regimes_curves"] = states[whole][["seed", "alpha", "temp", "step", "alpha_loss", "test_err", "weight_change"]]
    return frames


def rows_of(runs: list[Path], file: str) -> pd.DataFrame:
    "The rows of this file of every run that has it, with the name of the run."
    return pd.concat(pd.read_csv(folder / file).assign(run=name) for name, folder in run_folders(runs).items() if (folder / file).exists())


def write(frames: dict[str, pd.DataFrame], five_digits) -> None:
    "Write each table; where `five_digits` of its name, a little more is enough to draw."
    for title, frame in frames.items():
        with written_whole(HERE / f"{title}.csv") as file:
            frame.to_csv(file, index=False, float_format="%.6g") if five_digits(title) else frame.round(6).to_csv(file, index=False)
        print(f"results/{title}.csv: {len(frame)} rows")


@call_parse
def main(
    name: str,  # of the notebook's tables: a key of PROTOCOL
    runs: Param("folders with the records, at any depth", Path, nargs="+"),
):
    "Write the tables."
    if name not in [*PROTOCOL, "sgd_regimes"]:
        sys.exit(f"no tables {name!r}; choose one of {', '.join([*PROTOCOL, 'sgd_regimes'])}")
    table = load(runs)
    if table.empty:
        sys.exit(f"there is no run in {' '.join(map(str, runs))}; give folders that papermill wrote with -p out")
    if name == "sgd_regimes":
        return write(sweeps(runs), five_digits=lambda title: title != name)
    if "run_" in table:  # the word that called the run; its own column `method` is a parameter
        table["method"] = table["run_"]
    table = table[table["status"].isin(["fitted", "finished", "diverged"])]  # fitted: trained to the end, its notebook not
    refuse_a_mixture(table, PROTOCOL[name])
    columns = [*KEY, *FACTS, *MEASURED[name], *PROTOCOL[name]]
    frames = {name: table.reindex(columns=columns).sort_values(KEY)}
    for part, kept in ALONG[name].items():
        rows = rows_of(runs, f"{part}.csv").merge(table[["run", *KEY]], on="run")
        rows = few(rows) if part == "scores" else rows
        frames[f"{name}_{'curves' if part == 'history' else part}"] = rows.reindex(columns=[*KEY, *kept]).sort_values([*KEY, kept[0]], kind="stable")
    write(frames, five_digits=lambda title: title != name)

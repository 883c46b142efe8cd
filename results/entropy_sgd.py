"""Gathers the finished runs of 02_entropy_sgd below RUNS into the tables that its page is drawn from.

    python results/entropy_sgd.py runs
"""

from pathlib import Path

from fastcore.script import call_parse

from flatmin_nb.lab.results import histories, load, written_whole

HERE = Path(__file__).parent
KEY = ["experiment", "method", "seed"]
UNTOLD = ["run", "status", "tag", "reason", "wandb_id", "step", "epoch", "train_loss", "device"]  # of the folder, or the same in every row, or in the curves


@call_parse
def main(
    runs: Path,  # the folder with the records, at any depth
):
    "Write entropy_sgd.csv, one row a run, and entropy_sgd_curves.csv, one row an evaluation."
    table = load(runs)
    table = table[table["status"].isin(["fitted", "finished"])]
    curves = histories(runs).merge(table[["run", *KEY]], on="run")
    curves = curves[[*KEY, *curves.columns.drop(["run", *KEY])]]
    for name, frame in {"entropy_sgd": table.drop(columns=UNTOLD, errors="ignore"), "entropy_sgd_curves": curves}.items():
        frame = frame.sort_values([*KEY] + (["step"] if "step" in frame else [])).round(6)
        with written_whole(HERE / f"{name}.csv") as file:
            frame.to_csv(file, index=False)
        print(f"results/{name}.csv: {len(frame)} rows")

"""What `make run` prints at its end: python house/summary.py RUNS NOTEBOOK, read from the records of the runs."""
import sys

from flatmin_nb.lab.results import load

COLUMNS = {"method": "method", "status": "status", "test_error": "test error, %",
           "gradient_evaluations": "gradient evaluations", "train_seconds": "seconds of training"}


def main(
    runs: str,  # the folder of the runs' folders
    notebook: str,  # where the executed notebook is
) -> None:
    "Print one line a run, and where to look."
    table = load(runs)[list(COLUMNS)].rename(columns=COLUMNS)
    print(table.to_string(index=False, formatters={COLUMNS["test_error"]: "{:.2f}".format, COLUMNS["train_seconds"]: "{:.1f}".format}))
    if len(table) == table["method"].nunique():
        print("\none seed says little: what more of them came to stands in README.md, under 'What was claimed, and what came out'")
    print(f"\nthe executed notebook: {notebook}\nthe records of the runs: {runs}/")


if __name__ == "__main__":
    main(*sys.argv[1:])

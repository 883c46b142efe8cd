"""Every check of `make test`, one after another, each timed; exit 1 if any failed. `check.py ruff pytest` runs these two.

The notebooks are cleaned, exported and run in a copy of the project, so nothing is written into nbs/ and work in
progress is checked as it lies in the folder, committed or not. Only pytest runs in the project itself.
"""
import filecmp
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_COPIED = shutil.ignore_patterns(".git", ".venv", "runs", "sweeps", "wandb", "_proc", "_docs", "build", "__pycache__",
                                    ".ipynb_checkpoints", "*.egg-info", ".pytest_cache", ".ruff_cache", "nbdev.yml")


def differences(
    here: Path,  # one folder
    there: Path,  # the other
) -> list[str]:  # the files that are in one alone, or in both and unlike, relative to the folders
    "What differs between two folders, Python's caches and nbdev's generated settings left aside."
    def files(folder):
        return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()
                and "__pycache__" not in path.parts and ".ipynb_checkpoints" not in path.parts and path.name != "nbdev.yml"}
    both = files(here) & files(there)
    unlike = {path for path in both if not filecmp.cmp(here / path, there / path, shallow=False)}
    return sorted(map(str, unlike | (files(here) ^ files(there))))


def main(
    wanted: list[str],  # the names of the checks to run; empty: all
) -> int:  # the exit status
    "Run the checks."
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(cores, 8)
    failed = []

    with tempfile.TemporaryDirectory(prefix="flatmin_nb_") as scratch:
        before, copy = Path(scratch) / "before", Path(scratch) / "project"
        shutil.copytree(ROOT, before, symlinks=True, ignore=NOT_COPIED)
        shutil.copytree(before, copy, symlinks=True)
        tools = Path(sys.executable).parent
        environment = {
            # as many threads in all as there are cores; the copy is what is imported; the user's data folder is not touched
            **os.environ, "OMP_NUM_THREADS": str(max(1, cores // workers)), "PYTHONPATH": str(copy),
            "FLATMIN_DATA": os.environ.get("FLATMIN_DATA") or str(Path(scratch) / "data"),
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "WANDB_MODE": "disabled"}

        def check(name, *command, unchanged="", folder=copy):
            "Run one command; afterwards the folder `unchanged` must be as it was before."
            if wanted and name not in wanted:
                return
            print(f"---- {name}", flush=True)
            started, spent = time.monotonic(), sum(os.times()[2:4])
            status = subprocess.run(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL).returncode
            changed = differences(before / unchanged, copy / unchanged) if unchanged else []
            for path in changed:
                print(f"     {name} would change {unchanged}/{path}: run nbdev_clean and nbdev_export, and commit what they make")
            if status or changed:
                failed.append(name)
            if name != "pytest":  # says it itself, and has the last word
                print(f"     {'failed' if status or changed else 'passed'} in {time.monotonic() - started:.1f} s, "
                      f"{sum(os.times()[2:4]) - spent:.1f} s of processor time", flush=True)

        check("ruff", tools / "ruff", "check", "--quiet", "--output-format", "concise", ".")
        check("nbdev_clean", tools / "nbdev_clean", unchanged="nbs")
        check("nbdev_export", tools / "nbdev_export", unchanged="flatmin_nb")
        check("nbdev_test", tools / "nbdev_test", "--n_workers", str(workers), "--timing", unchanged="nbs")
        environment["PYTHONPATH"] = str(ROOT)
        check("pytest", sys.executable, "-m", "pytest", "--quiet", "tests", folder=ROOT)

    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

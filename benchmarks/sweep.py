"""What a sweep costs beside its runs: 32 empty notebooks beside papermill in a pool, the resume of 1,000 finished points, a table of 10,000 records; paired repetitions, medians.

    python benchmarks/sweep.py                              # all three
    python benchmarks/sweep.py --parts runs --repeats 9
    python benchmarks/sweep.py --parts resume,load

Every measurement is a fresh process, so that imports are in it; the start of the interpreter is not. The clock on the wall is what is asked for, as two cores work at once; beside it stand
the CPU seconds of the process with all that it started, which neighbours disturb less.

*runs*: the sweep and the pool run the same notebook, of a parameters cell and an empty one, with the same parameters, each run into a folder of its own for the executed notebook and its log. The
sweep writes its records besides. Ray's start and end, the time in `Cluster.__enter__` and `Cluster.__exit__`, are measured apart. The pool is `multiprocessing.Pool(2)`, forked once
papermill is imported; it is run with several settings of papermill, and the fastest that lets kernels end by themselves, as the sweep does, is what we are compared with. Killing them is
faster and is printed too; what a notebook leaves to its kernel's exit would be lost.

*resume*, *load*: the tasks and records are written beforehand by the functions of the package, without waiting for the disk. Leaves with status 1 if a bound is missed.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from fastcore.script import call_parse

RUNS, CORES, POINTS, RECORDS = 32, 2, 1000, 10_000
AT_MOST = {"runs": 1.15, "resume": 5.0, "load": 10.0}  # times papermill's pool, seconds, seconds
SETTINGS = {  # of papermill.execute_notebook, in the pool
    "as it is": {},
    "no bar": dict(progress_bar=False),
    "no bar, saved once": dict(progress_bar=False, request_save_on_cell_execute=False),
    "no bar, saved once, no autosave": dict(progress_bar=False, request_save_on_cell_execute=False, autosave_cell_every=0),
    "no bar, saved once, kernels killed": dict(progress_bar=False, request_save_on_cell_execute=False, shutdown_kernel="immediate"),
}


def notebook(folder: Path) -> Path:
    "A notebook whose body is empty."
    cell = lambda source, *tags: dict(cell_type="code", execution_count=None, id=f"cell{len(tags)}", metadata={"tags": list(tags)}, outputs=[], source=source)
    kernel = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"), language_info=dict(name="python"))
    content = dict(cells=[cell('seed: int = 0\ngamma: float = 0.0\nout: str = ""\n', "parameters"), cell("")], metadata=kernel, nbformat=4, nbformat_minor=5)
    path = folder / "empty.ipynb"
    path.write_text(json.dumps(content))
    return path


def cpu_of_all() -> float:
    "CPU seconds of this process and of all below it, with those that have ended and were waited for."
    spent = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            spent += sum(process.cpu_times()[:4])
        except psutil.Error:
            pass
    return spent


def moment() -> dict[str, float]:
    return {"wall": time.monotonic(), "cpu": cpu_of_all()}


def ours(folder: Path) -> dict[str, float]:
    "A sweep of empty notebooks."
    moments = [moment()]
    from flatmin_nb.lab.sweep import Cluster, sweep

    def noted(method: Callable) -> Callable:
        def between(*arguments):
            moments.append(moment())
            result = method(*arguments)
            moments.append(moment())
            return result

        return between

    Cluster.__enter__, Cluster.__exit__ = noted(Cluster.__enter__), noted(Cluster.__exit__)
    runs = sweep(folder / "empty.ipynb", folder / "sweep", {"seed": range(RUNS)}, at_once=CORES)
    began, start, started, end, ended = moments  # after the end nothing is left to be counted: what Ray's processes spent went with them
    done = time.monotonic()
    assert len(runs) == RUNS and all((run["folder"] / "notebook.ipynb").exists() for run in runs)
    return {
        "wall": start["wall"] - began["wall"] + end["wall"] - started["wall"] + done - ended["wall"],
        "cpu": start["cpu"] - began["cpu"] + end["cpu"] - started["cpu"],
        "ray": started["wall"] - start["wall"] + ended["wall"] - end["wall"],
    }


def one(source: str, folder: str, number: int, settings: dict) -> None:
    "One run of the pool."
    import papermill

    os.mkdir(folder)
    with open(f"{folder}/log.txt", "w", encoding="utf-8") as log:
        papermill.execute_notebook(source, f"{folder}/notebook.ipynb", {"seed": number, "out": f"{folder}/out"}, stdout_file=log, stderr_file=log, **settings)


def pool(folder: Path, settings: dict) -> dict[str, float]:
    "The same notebooks by papermill in a pool of processes."
    began = moment()
    from multiprocessing import Pool

    import papermill  # noqa: F401, before the fork, so that it is imported once

    with Pool(CORES) as workers:
        workers.starmap(one, [(str(folder / "empty.ipynb"), str(folder / f"{number}"), number, settings) for number in range(RUNS)], chunksize=1)
        workers.close()
        workers.join()
    ended = moment()
    assert all((folder / f"{number}" / "notebook.ipynb").exists() for number in range(RUNS))
    return {key: ended[key] - began[key] for key in ended}


def loaded(folder: Path) -> dict[str, float]:
    "The table of a folder of records, once with imports and once more without."
    began = moment()
    from flatmin_nb.lab.tasks import load

    table, first = load(folder / "sweep").table, moment()
    again, second = load(folder / "sweep").table, moment()
    assert len(table) == len(again) == RECORDS and table["test_error"].nunique() == RECORDS
    return {"wall": first["wall"] - began["wall"], "cpu": first["cpu"] - began["cpu"], "again": second["cpu"] - first["cpu"]}


def fresh(name: str, folder: Path) -> dict[str, float]:
    "What a measurement of this file says in a process of its own."
    command = [sys.executable, __file__, "--measure", name, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def runs_once(name: str) -> dict[str, float]:
    "One measurement of empty notebooks in a folder that is made for it."
    with tempfile.TemporaryDirectory(prefix="flatmin-") as folder:
        notebook(Path(folder))
        return fresh(name, Path(folder))


def command_seconds(command: list[str], says: str = "") -> dict[str, float]:
    "Seconds of a command, with the CPU seconds of all that it waits for."
    before, began = sum(os.times()[2:4]), time.monotonic()
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    assert says in done.stdout + done.stderr, done.stderr
    return {"wall": time.monotonic() - began, "cpu": sum(os.times()[2:4]) - before}


def finished_points(folder: Path, count: int, records: bool) -> None:
    "A sweep of the empty notebook that has finished at so many points, with the records of its runs."
    from flatmin_nb.lab import results
    from flatmin_nb.lab.grids import combinations
    from flatmin_nb.lab.notebooks import read_notebook
    from flatmin_nb.lab.sweep import run, plan
    from flatmin_nb.lab.tasks import Sweep, task_of

    axes, sweep = {"seed": list(range(count // 10)), "gamma": [number / 10 for number in range(10)]}, Sweep(folder / "sweep")
    read, kept = read_notebook(notebook(folder)), os.fsync
    model = dict(dataset="mnist", model="mnistfc", optimizer="entropy_sgd", L=20, lr=0.1, momentum=0.9, noise=1e-4, scope=1e-3, epochs=5, batch_size=128, device="cpu", augment=None)
    record = results.new_record(model, tag="") | dict(status="finished", seconds=1.0, device_name=results.device_name())
    os.fsync = lambda descriptor: None  # thousands of files: the disk is not what is measured
    try:
        for number, point in enumerate(combinations(axes)):
            task = task_of(read, point)
            attempt = dict(host="host", pid=1, began=results.now(), ended=results.now(), seconds=1.0, outcome="finished")
            sweep.write(dict(task=task.name, status="finished", notebook=read.name, code=read.code, args=task.args, swept=list(axes), points=list(task.points), attempts=[attempt], seconds=1.0, error=""))
            if records:
                (out := sweep.folder(task.name) / "out").mkdir()
                numbers = dict(test_error=number / count, test_loss=0.1, train_error=0.0, train_loss=0.01, gradients=1000, gradient_norm=0.5, weights=100_000)
                results.write_record(out, record | dict(parameters=model | point, summary=numbers))
    finally:
        os.fsync = kept
    run(plan(folder / "empty.ipynb", folder / "sweep", axes))


def words(values: list[float], unit: str = "") -> str:
    return f"{statistics.median(values):.2f}{unit} [{min(values):.2f}, {max(values):.2f}]"


def part_runs(repeats: int, trials: int) -> float:
    "32 empty notebooks."
    from paired import ratio, table

    rivals = {name: [runs_once(f"pool {name}") for _ in range(trials)] for name in SETTINGS}
    best = min((name for name in SETTINGS if "shutdown_kernel" not in SETTINGS[name]), key=lambda name: statistics.median(seconds["wall"] for seconds in rivals[name]))
    table([[name, *(words([seconds[key] for seconds in measured]) for key in ("wall", "cpu"))] for name, measured in rivals.items()], f"papermill in a pool, {RUNS} runs | s | CPU s")
    found = {"ours": [], "pool": []}
    for _ in range(repeats):
        for name in random.sample(list(found), len(found)):
            found[name].append(runs_once(name if name == "ours" else f"pool {best}"))
    column = lambda name, key: [seconds[key] for seconds in found[name]]
    rows = [
        [f"papermill, {best}", words(column("pool", "wall")), "1", words(column("pool", "cpu")), "1"],
        ["the sweep", words(column("ours", "wall")), ratio(column("ours", "wall"), column("pool", "wall"))[1], words(column("ours", "cpu")), ratio(column("ours", "cpu"), column("pool", "cpu"))[1]],
        ["Ray's start and end", words(column("ours", "ray")), "", "", ""],
    ]
    table(rows, f"{RUNS} empty runs on {CORES} cores, {repeats} pairs | s | ÷ papermill | CPU s | ÷ papermill")
    return ratio(column("ours", "wall"), column("pool", "wall"))[0]


def part_resume(repeats: int) -> float:
    "`flatmin sweep` where all has finished."
    from paired import table

    with tempfile.TemporaryDirectory(prefix="flatmin-") as name:
        folder = Path(name)
        finished_points(folder, POINTS, records=False)
        ours = [sys.executable, "-c", "from flatmin_nb.lab.commands import app; app()", "sweep", f"{folder}/empty.ipynb", f"{folder}/sweep"]
        ours += ["-p", "seed", f"range({POINTS // 10})", "-p", "gamma", "[k / 10 for k in range(10)]"]
        calls = {"the command": (ours, f"{POINTS} ended, 0 to be run"), "the interpreter": ([sys.executable, "-c", "pass"],)}
        found = {name: [] for name in calls}
        for _ in range(repeats):
            for name in random.sample(list(calls), len(calls)):
                found[name].append(command_seconds(*calls[name]))
    less = {key: [one[key] - two[key] for one, two in zip(*found.values(), strict=True)] for key in ("wall", "cpu")}
    table([[words(less["wall"]), words(less["cpu"])]], f"resume of {POINTS} finished points, {repeats} times: s | CPU s")
    return statistics.median(less["wall"])


def part_load(repeats: int) -> float:
    "A table of many records."
    from paired import table

    with tempfile.TemporaryDirectory(prefix="flatmin-") as name:
        finished_points(Path(name), RECORDS, records=True)
        found = [fresh("load", Path(name)) for _ in range(repeats)]
    table([[words([seconds[key] for seconds in found]) for key in ("wall", "cpu", "again")]], f"a table of {RECORDS} records, {repeats} times: s | CPU s | CPU s without imports")
    return statistics.median(seconds["wall"] for seconds in found)


@call_parse
def main(
    parts: str = "runs,resume,load",  # separated by commas
    repeats: int = 5,  # paired repetitions
    trials: int = 2,  # of each setting of papermill, to find the fastest
    measure: str = "",  # what this file calls itself with
    folder: str = "",  # the same
):
    measures = {"ours": ours, "load": loaded} | {f"pool {name}": lambda folder, settings=settings: pool(folder, settings) for name, settings in SETTINGS.items()}
    if measure:
        print("\n" + json.dumps(measures[measure](Path(folder))))
        return
    load = lambda: f"load {', '.join(f'{number:.1f}' for number in os.getloadavg())}"
    calls = {"runs": lambda: part_runs(repeats, trials), "resume": lambda: part_resume(repeats), "load": lambda: part_load(repeats)}
    missed = False
    if unknown := [part for part in parts.split(",") if part not in calls]:
        sys.exit(f"--parts {parts}: no part {unknown[0]!r}; choose of {', '.join(calls)}")
    for part in parts.split(","):
        print(f"{part}: {load()} before", flush=True)
        measured = calls[part]()
        missed |= measured > AT_MOST[part]
        print(f"{part}: {measured:.2f}, wanted at most {AT_MOST[part]}; {load()} after\n", flush=True)
    sys.exit(missed)

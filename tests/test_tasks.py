"The folder of a sweep: what counts is what was asked for last, and nothing is hidden."

import json
import os
from pathlib import Path

import pytest
from filelock import FileLock
from flatmin_nb.lab.commands import app
from flatmin_nb.lab.sweep import plan, run
from flatmin_nb.lab.sweep_views import filling, states_of
from flatmin_nb.lab.tasks import Sweep, driven, is_driven, load, results_of, standing
from typer.testing import CliRunner


def notebook_in(folder: Path, parameters: str, *sources: str) -> Path:
    cell = lambda source, *tags: dict(cell_type="code", id=f"c{len(source)}", metadata={"tags": tags}, source=source, outputs=[], execution_count=None)
    cells = [cell(parameters + "\nout: str = ''", "parameters"), *map(cell, sources)]
    (folder / "n.ipynb").write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
    return folder / "n.ipynb"


def written(folder: Path, notebook: Path, axes: dict, *statuses: str) -> list[str]:
    "A sweep in which the first tasks that are left to do have come to these statuses; their names."
    planned = plan(notebook, folder, axes)
    attempt = dict(host="host", pid=1, began="", outcome="running")
    for task, status in zip(planned.tasks, statuses):
        facts = dict(task=task.name, status=status, code=planned.notebook.code, args=task.args, swept=[*axes], points=list(task.points))
        planned.sweep.write(facts | dict(attempts=[attempt], seconds=1.0, error="so it was" * (status == "failed")))
    return [task.name for task in planned.tasks]


def flatmin(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.output


# ---- what was asked for last ----

@pytest.mark.parametrize("status", ["running", "failed"])
def test_a_grid_that_was_narrowed_has_ended(tmp_path, status):
    "The third seed was interrupted, or failed, and is not asked for any more."
    notebook = notebook_in(tmp_path, "seed: int = 0")
    written(tmp_path / "s", notebook, {"seed": range(3)}, "finished", "finished", status)
    runs = run(plan(notebook, tmp_path / "s", {"seed": range(2)}))
    assert standing(runs) == {"finished": 2} and runs.older == 1 and repr(runs) == "2 of 2 runs ended, over seed (2)"
    assert flatmin("status", tmp_path / "s") == "2 finished\nolder runs in the folder, not asked for any more: 1\n"
    view = filling(tmp_path / "s", seconds=0)
    assert view.update() and "2 finished of 2" in view.children[1].value
    assert set(states_of(runs).values()) == {"finished"}


def test_what_ended_stays_in_the_table_whether_it_is_asked_for_or_not(tmp_path):
    notebook = notebook_in(tmp_path, "seed: int = 0")
    written(tmp_path / "s", notebook, {"seed": range(3)}, "finished", "diverged", "finished")
    runs = run(plan(notebook, tmp_path / "s", {"seed": [1]}))
    seeds = [one["args"]["seed"] for one in runs]
    assert seeds[0] == 1 and sorted(seeds) == [0, 1, 2]  # what was asked for comes first
    assert len(runs.table) == 3 and len(runs.tasks) == 1 and repr(runs) == "1 of 1 runs ended, over seed (1)"
    assert flatmin("load", tmp_path / "s").splitlines()[-1] == "2 of these runs were not asked for last"
    assert "not asked for" not in flatmin("load", tmp_path / "s", "--all")


def test_a_slice_that_was_interrupted_and_grew_is_one_run(tmp_path):
    notebook = notebook_in(tmp_path, 'seeds: str = "0"', 'SLICES = ("seeds",)')
    written(tmp_path / "s", notebook, {"seeds": range(3)}, "running")
    written(tmp_path / "s", notebook, {"seeds": range(4)}, "finished")
    run(plan(notebook, tmp_path / "s", {"seeds": range(4)}))
    assert flatmin("status", tmp_path / "s").splitlines()[0] == "1 finished"


def test_what_is_asked_for_and_was_interrupted_goes_on(tmp_path):
    notebook = notebook_in(tmp_path, "seed: int = 0")
    names = written(tmp_path / "s", notebook, {"seed": range(3)}, "finished", "finished", "running")
    run(plan(notebook, tmp_path / "s", {"seed": range(2)}))
    asked = json.loads((tmp_path / "s" / "sweep.json").read_text())
    (tmp_path / "s" / "sweep.json").write_text(json.dumps(asked | {"tasks": names}))
    assert flatmin("status", tmp_path / "s") == "2 finished, 1 interrupted\nnobody sweeps into it now; the same flatmin sweep command goes on\n"


# ---- rows ----

def row_of(folder: Path, parameters: str, axes: dict, recorded: dict) -> tuple[str, dict]:
    "The task and its row, of a run that recorded these parameters."
    (name,) = written(folder / "s", notebook_in(folder, parameters), axes, "finished")
    sweep = Sweep(folder / "s")
    (sweep.folder(name) / "out").mkdir()
    (sweep.folder(name) / "out" / "run.json").write_text(json.dumps(dict(status="finished", parameters=recorded, summary={"test_error": 2.5})))
    (row,) = results_of(sweep, sweep.record(name))
    return name, row


def test_a_parameter_called_task_hides_no_task(tmp_path):
    name, row = row_of(tmp_path, 'task: str = "sort"\nL: int = 1', {"L": [5]}, {"task": "sort", "L": 5})
    assert row["task"] == name and row["task_"] == "sort" and row["L"] == 5 and row["test_error"] == 2.5


def test_a_swept_parameter_called_task_has_its_own_name(tmp_path):
    name, row = row_of(tmp_path, 'task: str = "sort"', {"task": ["copy"]}, {"task": "copy"})
    assert row["task"] == "copy" and row["task_"] == name


# ---- a folder that may only be read ----

def test_where_the_lock_cannot_be_tried_what_the_driver_wrote_is_quoted(tmp_path, monkeypatch):
    notebook = notebook_in(tmp_path, "seed: int = 0")
    written(tmp_path / "s", notebook, {"seed": range(2)}, "finished", "finished")
    run(plan(notebook, tmp_path / "s", {"seed": range(2)}))
    written(tmp_path / "s", notebook, {"seed": range(2)}, "finished")
    path = next((tmp_path / "s" / "tasks").glob("*/task.json"))
    path.write_text(path.read_text().replace('"status": "finished"', '"status": "running"'))

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    with driven(Sweep(tmp_path / "s")):
        monkeypatch.setattr(FileLock, "acquire", refused)
        said = flatmin("status", tmp_path / "s")
        assert "1 running" in said and f"swept by process {os.getpid()} on " in said and "as driver.json says; the lock cannot be tried" in said
        assert "interrupted" not in said and "nobody sweeps" not in said
        monkeypatch.undo()
    monkeypatch.setattr(FileLock, "acquire", refused)
    assert not is_driven(Sweep(tmp_path / "s"))  # who sweeps writes driver.json, and takes it away
    assert standing(load(tmp_path / "s")) == {"finished": 1, "interrupted": 1}

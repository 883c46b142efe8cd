"What a sweep plans, reads and refuses, without Ray; what it survives stands in test_sweep_survival.py."

import json
from pathlib import Path

import pandas as pd
import pytest
from flatmin_nb.lab.commands import app
from flatmin_nb.lab.grids import SweepError
from flatmin_nb.lab.results import Run, start_wandb
from flatmin_nb.lab.sweep import plan, run
from flatmin_nb.lab.tasks import Sweep, load, write_json
from typer.testing import CliRunner

NOTEBOOKS = Path(__file__).parent.parent / "nbs"
ENTROPY, REGIMES = NOTEBOOKS / "02_entropy_sgd.ipynb", NOTEBOOKS / "06_sgd_regimes.ipynb"
ISSUE = {"L": "[5, 10, 20]", "gamma": "[3*10**-k for k in range(1, 6)]", "seed": "range(3)"}


def flatmin(*words: object):
    "The command, in this process."
    return CliRunner().invoke(app, [str(word) for word in words])


def ended(folder: Path, axes: dict, notebook: Path = ENTROPY, **options) -> list:
    "A sweep whose tasks are written down as finished, each with a record; the tasks."
    planned = plan(notebook, folder, axes, **options)
    tasks = {task.name: {name: task.args[name] for name in planned.axes} for task in planned.tasks}
    for number, task in enumerate(planned.tasks):
        planned.sweep.write(dict(task=task.name, status="finished", code=planned.notebook.code, args=task.args, swept=list(planned.axes), points=list(task.points), attempts=[], seconds=2.0, error=""))
        Run(planned.sweep.folder(task.name) / "out" / "sgd", {"method": "sgd", **task.asked}).finish(None, None, test_error=float(number))
    write_json(planned.sweep.path / "sweep.json", dict(notebook=notebook.name, code=planned.notebook.code, axes=planned.axes, points=len(planned.points), tasks=list(tasks), values=tasks))
    return planned.tasks


def test_the_command_of_the_readme_has_45_points(tmp_path):
    result = flatmin("sweep", ENTROPY, tmp_path / "s", *(word for name, text in ISSUE.items() for word in ("-p", name, text)), "--dry-run")
    assert result.exit_code == 0 and result.output.startswith("45 points in 45 runs: 0 ended, 45 to be run")
    assert not (tmp_path / "s").exists()


def test_a_finished_sweep_has_nothing_to_do_and_tells_how_long_more_would_take(tmp_path):
    ended(tmp_path, ISSUE)
    again = plan(ENTROPY, tmp_path, ISSUE)
    assert not again.tasks and len(again.there) == 45 and again.seconds == 2.0
    grown = flatmin("sweep", ENTROPY, tmp_path, "-p", "L", "[5, 10, 20, 40]", "-p", "gamma", ISSUE["gamma"], "-p", "seed", "range(3)", "--dry-run", "--runs-at-once", "2")
    assert "60 points in 60 runs: 45 ended, 15 to be run; about 16 s, 2 at a time, 2.0 s each" in grown.output


def test_load_reads_as_grid_did(tmp_path):
    ended(tmp_path, {"L": [5, 10], "seed": range(2)})
    runs = load(tmp_path)
    assert len(runs) == 4 and [run["args"]["L"] for run in runs] == [5, 5, 10, 10] and [run["args"]["seed"] for run in runs] == [0, 1, 0, 1]
    assert runs[0]["args"].keys() == plan(ENTROPY, tmp_path, {}).notebook.parameters.keys() - {"out", "overwrite", "progress"}
    assert list(runs.table["test_error"]) == [0, 1, 2, 3] and runs.swept == ["L", "seed"]
    assert flatmin("load", tmp_path, "--out", tmp_path / "t.csv").exit_code == 0
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "t.csv")[["L", "seed", "test_error"]], runs.table[["L", "seed", "test_error"]])


def test_a_notebook_that_vectorises_is_handed_slices(tmp_path):
    axes = {"log2_alphas": "range(-4, 5, 4)", "log2_temps": "[-8, -6.5]", "seeds": "range(2)", "h": "[8, 16]"}
    planned = plan(REGIMES, tmp_path, axes)
    assert len(planned.points) == 24 and [task.asked["h"] for task in planned.tasks] == [8, 16]
    assert planned.tasks[0].asked == {"log2_alphas": "-4 0 4", "log2_temps": "-8 -6.5", "seeds": "0 1", "h": 8}
    by_seed = plan(REGIMES, tmp_path, axes, longest={"seeds": 1})
    assert sorted((task.asked["h"], task.asked["seeds"]) for task in by_seed.tasks) == [(8, "0"), (8, "1"), (16, "0"), (16, "1")]
    ended(tmp_path, axes, REGIMES)
    grown = plan(REGIMES, tmp_path, axes | {"seeds": "range(3)"})
    assert [task.asked["seeds"] for task in grown.tasks] == ["2", "2"]


def test_a_table_names_values_of_a_slice(tmp_path):
    "Of a parameter that takes a list, as of one that takes words."
    cells = [dict(cell_type="code", id=name, metadata={"tags": [name]}, source=source, outputs=[], execution_count=None)
             for name, source in dict(parameters="seeds: list[int] = [0]\nwords: str = 'a'\nh: int = 3\nout: str = ''", code="SLICES = ('seeds', 'words')").items()]  # fmt: skip
    (tmp_path / "any.ipynb").write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
    (tmp_path / "points.csv").write_text("seeds,words,h\n0,a,1\n1,a,1\n")
    [task] = plan(tmp_path / "any.ipynb", tmp_path / "s", {}, table=tmp_path / "points.csv").tasks
    assert task.asked == {"seeds": [0, 1], "words": "a", "h": 1}


def test_lanes_of_a_slice_are_rows(tmp_path):
    (task,) = ended(tmp_path, {"seeds": "range(2)"}, REGIMES)
    folder = Sweep(tmp_path).folder(task.name) / "out" / "sgd"
    pd.DataFrame({"seed": [0, 1], "status": ["fitted", "diverged"], "test_err": [0.1, 0.2]}).to_csv(folder / "lanes.csv", index=False)
    table = load(tmp_path).table
    assert list(table["test_err"]) == [0.1, 0.2] and list(table["status"]) == ["fitted", "diverged"]


def test_zip_and_table(tmp_path):
    (tmp_path / "points.csv").write_text("L,gamma\n5,0.1\n10,0.01\n")
    assert [(point["L"], point["gamma"], point["seed"]) for point in plan(ENTROPY, tmp_path / "s", {"seed": [0, 1]}, table=tmp_path / "points.csv").points] == [
        (5, 0.1, 0), (5, 0.1, 1), (10, 0.01, 0), (10, 0.01, 1)]  # fmt: skip
    zipped = plan(ENTROPY, tmp_path / "s", {"L": [5, 10], "gamma": [0.1, 0.01], "seed": [0, 1]}, zipped=[["L", "gamma"]])
    assert [(point["L"], point["gamma"]) for point in zipped.points] == [(5, 0.1), (5, 0.1), (10, 0.01), (10, 0.01)]


@pytest.mark.parametrize(
    "words, said",
    [
        (["-p", "LL", "[1]"], "no parameter 'LL'; did you mean 'L'?"),
        (["-p", "L", "[1.5]"], "parameter 'L' = 1.5: should be a valid integer"),
        (["-p", "L", "__import__('os')"], "no function '__import__'"),
        (["-p", "out", "x"], "is the sweep's"),
        (["-p", "L", "[1]", "-p", "L", "[2]"], "-p L is given twice"),
        (["-p", "L"], "-p"),
        (["-p", "L", "[1, 2]", "--zip", "L gama"], "zipped 'L gama'"),
        (["-p", "L", "[1, 2]", "--slice", "L=1"], "no slices are made of it"),
        (["-p", "L", "[1, 2]", "--table", "nowhere.csv"], "the table 'nowhere.csv' cannot be read"),
        (["-p", "device", "cuda"], "give --gpus-per-run 1"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_before_anything_starts(words, said, tmp_path):
    result = flatmin("sweep", ENTROPY, tmp_path / "s", *words)
    lines = [line for line in result.stderr.splitlines() if not line.endswith("how long one takes")]
    assert result.exit_code and len(lines) == 1 and said in lines[0]
    assert not (tmp_path / "s" / "tasks").exists()


def test_another_notebook_needs_another_folder(tmp_path):
    ended(tmp_path, {"L": [5]})
    with pytest.raises(SweepError, match="holds a sweep of 02_entropy_sgd.ipynb"):
        plan(REGIMES, tmp_path, {"h": [8]})


def test_a_finished_sweep_does_not_start_ray(tmp_path, monkeypatch):
    ended(tmp_path, {"L": [5, 10]})
    monkeypatch.setattr("flatmin_nb.lab.sweep.Cluster.__enter__", lambda self: pytest.fail("Ray was started"))
    assert len(run(plan(ENTROPY, tmp_path, {"L": [5, 10]}))) == 2


def test_names_in_a_foreign_folder_write_nothing_outside(tmp_path):
    folder = tmp_path / "a" / "b"
    tasks = ended(folder, {"L": [5, 10], "gamma": [0.1, 0.01]})
    evil = "../../../evil"
    for task in tasks:
        record = json.loads((folder / "tasks" / task.name / "task.json").read_text())
        record["args"][evil] = record["args"]["gamma"]
        write_json(folder / "tasks" / task.name / "task.json", record | {"swept": ["L", evil]})
    asked = json.loads((folder / "sweep.json").read_text())
    write_json(folder / "sweep.json", asked | {"axes": {"L": [5, 10], evil: [0.1, 0.01]}, "tasks": ["../../evil", *asked["tasks"]]})
    before = {path for path in tmp_path.rglob("*") if folder not in path.parents}
    assert flatmin("plot", folder, "--metric", "test_error").exit_code == 0
    assert {path for path in tmp_path.rglob("*") if folder not in path.parents} == before
    assert list((folder / "figures").glob("*.png"))


def test_wandb_takes_its_group_from_the_environment(tmp_path, monkeypatch):
    "Which a sweep sets; see test_sweep_survival.py for what its runs see."
    monkeypatch.setenv("WANDB_RUN_GROUP", "gamma")
    logged = start_wandb("offline", tmp_path, dict(tag="", parameters={}))
    assert logged.group == "gamma"
    logged.finish()

"""The page of the regimes as a tool: a sweep through papermill, read back, killed and gone on with, refused in one line; and its widget."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

NOTEBOOK = Path(__file__).parent.parent / "nbs/06_sgd_regimes.ipynb"
SMALL = ("sizes=64", "log2_alphas=0 4", "log2_temps=-6:-4", "seeds=0 1", "h=16", "L=2", "curves=False")


@pytest.fixture
def page(tmp_path, monkeypatch):
    "The cells up to the sweep, in this process: parameters in, table out."
    monkeypatch.chdir(tmp_path)
    sources = ["".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    imports = [source for source in sources if source.startswith(("#| export\nfrom", "#| hide"))]
    wanted = ("#| echo: false\nplt.rcParams", "experiment: str", "SLICES =", "NUMBERS =", "def numbers_of", "def settings_of", "KEPT =", "def draw_point")

    assert all(any(source.startswith(start) for source in sources) for start in wanted), "a cell that the page no longer has"

    def run(**parameters) -> dict:
        scope: dict = {"__annotations__": {}}
        for source in [*imports, *(source for start in wanted for source in sources if source.startswith(start))]:
            exec(source, scope)
            if source.startswith("experiment: str"):
                assert parameters.keys() <= scope["__annotations__"].keys()
                scope |= parameters
        return scope | (dict(zip(("table", "history"), scope["trained"]())) if "trained" in scope else {})

    return run


def options(*parameters: str) -> dict:
    "The small sweep as keywords."
    words = dict(parameter.split("=", 1) for parameter in (*SMALL, *parameters))
    return {name: {"False": False, "True": True}.get(value, int(value) if name in ("h", "L") else value) for name, value in words.items()}


def test_a_sweep_is_read_back_and_replaced(page):
    first = page(**options(), out="out")
    assert len(first["table"]) == 12 and set(first["table"]["status"]) <= {"fitted", "unconverged", "diverged"}
    record, written = json.loads(Path("out/run.json").read_text()), Path("out/lanes.csv").stat().st_mtime_ns
    assert record["status"] == "finished" and record["summary"]["model_steps"] == first["table"]["steps"].sum()
    again = page(**options(), out="out")
    pd.testing.assert_frame_equal(again["table"], first["table"], check_dtype=False)
    assert Path("out/lanes.csv").stat().st_mtime_ns == written  # nothing was trained
    from flatmin_nb.lab.files import FolderError

    with pytest.raises(FolderError, match="finished, with sizes = 64, not 65; give overwrite"):
        page(**options("sizes=65"), out="out")
    assert len(page(**options("sizes=65"), out="out", overwrite=True)["table"]) == 12


@pytest.mark.parametrize("wrong", ["seeds=0.5", "seeds=0:1:0.5", "sizes=64.5", "sizes=-64"])
def test_seeds_and_sizes_are_whole(page, wrong):
    from flatmin_nb.lab.parameters import ParameterError

    with pytest.raises(ParameterError, match=f"'{wrong.split('=')[0]}'"):
        page(**options(wrong))


def test_curves_hold_the_table_at_their_ends(page):
    found = page(**options() | {"curves": True})
    ends = found["history"].query("event == 'end'")
    assert sorted(ends["test_err"]) == sorted(found["table"]["test_err"]) and (found["history"].query("event == 'start'")["alpha_loss"] == 1).all()


def test_the_explorer_draws_the_point_that_is_asked_for(page):
    found = page(**options() | {"curves": True})
    view = found["explorer"](found["table"], found["history"])
    sliders, picture = view.children[0].children, view.children[1]
    before = picture.value
    sliders[1].value = found["table"]["temp"].max()
    assert before[:4] == picture.value[:4] == b"\x89PNG" and before != picture.value


@pytest.mark.parametrize("parameters, words", [
    ({"sizes": "1x"}, "sizes"), ({"log2_temps": "-2:-4"}, "has no numbers"), ({"sizes": "2000"}, "is beyond dataset"), ({"act": "rellu"}, "did you mean 'relu'"), ({"dynamics": "sdg"}, "dynamics"),
    ({"bs": 100}, "bs = 100"), ({"log2_alphas": "30"}, "needs more digits than float32 has"), ({"d": 3}, "d = 3 means nothing"), ({"grad_stats": 100}, "ckpt_grad_stats = 100"),
])  # fmt: skip
def test_a_wrong_parameter_is_one_line(page, parameters, words):
    from flatmin_nb.lab.errors import OneLineError

    with pytest.raises(OneLineError, match=words) as caught:
        page(**options() | parameters, out="out")
    assert "\n" not in str(caught.value)
    record = Path("out/run.json")
    assert not record.exists() or json.loads(record.read_text())["status"] == "running"


def test_large_alpha_in_both_other_ways(page):
    tables = [page(**options("log2_alphas=24") | change)["table"] for change in ({"precision": "f64"}, {"centred": True})]
    assert (tables[0]["status"] == tables[1]["status"]).all() and np.allclose(tables[0]["t"], tables[1]["t"], rtol=0.2)


CHILD = """
import json, sys
sys.path.insert(0, {folder!r})
cells = ["".join(cell["source"]) for cell in json.loads(open({notebook!r}).read())["cells"] if cell["cell_type"] == "code"]
scope = {{"__annotations__": {{}}}}
import flatmin_nb.lab.results as results
for source in cells:
    if source.startswith(("#| export\\nfrom", "#| hide", "experiment: str", "SLICES =", "NUMBERS =", "def numbers_of", "def settings_of", "KEPT =")):
        source = source.partition("table, history = trained()")[0]
        exec(source, scope)
        if source.startswith("experiment: str"):
            scope |= {parameters!r}
from flatmin_nb.lab.ensemble import Ensemble
plain = Ensemble.run
Ensemble.run = lambda self, *arguments, **keywords: plain(self, *arguments, **keywords | dict(every=0.0))  # a checkpoint at each look
scope["trained"]()
"""


def test_a_sweep_that_is_killed_goes_on(page, tmp_path):
    parameters = options("log2_temps=-9:-4", "seeds=0:2") | {"at_once": 6}
    whole = page(**parameters)["table"]
    code = CHILD.format(folder=str(tmp_path), notebook=str(NOTEBOOK), parameters=parameters | {"out": "out"})
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=(tmp_path / "said.txt").open("w"))
    checkpoint, deadline = tmp_path / "out/checkpoint.pt", time.monotonic() + 60
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert checkpoint.exists() and process.poll() is None, (tmp_path / "said.txt").read_text()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert json.loads((tmp_path / "out/run.json").read_text())["status"] == "running" and not (tmp_path / "out/lanes.csv").exists()
    resumed = page(**parameters, out="out")["table"]
    pd.testing.assert_frame_equal(resumed, whole)
    assert not checkpoint.exists() and json.loads((tmp_path / "out/run.json").read_text())["resumed"]


def test_through_papermill(papermill, tmp_path):
    result = papermill(*SMALL, notebook="06_sgd_regimes", OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr[-2000:]
    assert len(pd.read_csv(tmp_path / "out/lanes.csv")) == 12
    refused = papermill(*SMALL, "LL=3", notebook="06_sgd_regimes")
    assert refused.returncode != 0 and "no parameter 'LL'; did you mean 'L'?" in refused.stderr

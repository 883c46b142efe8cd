"""The flatness notebook through papermill: its presets on a tiny set of the real form, its records, and parameters that make no sense."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

NOTEBOOK = Path(__file__).parent.parent / "nbs" / "01_flatness.ipynb"
SMALL = ("seeds=1", "look_every=1", "images_used=0", "measured=0", "small_batch=8", "large_batch=0", "products=12", "trail_every=1")


def papermill(folder: Path, *parameters: str, **environment: str) -> subprocess.CompletedProcess:
    "The notebook with parameters as on the command line, 'seeds=2', and its records in `folder`/out."
    options = [word for parameter in ("out=" + str(folder / "out"), *parameters) for word in ("-p", *parameter.split("=", 1))]
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", str(NOTEBOOK), str(folder / "executed.ipynb"), *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "options", "weights"),
    [("mnistfc", ("model=mlp", "hidden=16"), 12_730), ("small_lenet", (), 47_658)],  # 784-1024-1024-10 would take minutes
)
def test_a_preset_on_mnist(small_mnist, tmp_path, experiment, options, weights):
    # noise is not learned: the target is a loss just below that of the start
    result = papermill(tmp_path, f"experiment={experiment}", *options, "target_loss=2.285", "lr=0.01", "block=output.bias", *SMALL, FLATMIN_DATA=str(small_mnist.parent))
    assert result.returncode == 0, result.stderr
    records = {path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "out").rglob("run.json")}
    assert {name: record["status"] for name, record in records.items()} == {"small_0": "finished", "large_0": "finished"}
    assert {record["parameters"]["experiment"] for record in records.values()} == {experiment}
    table = pd.read_csv(tmp_path / "out" / f"flatness_{experiment}.csv")
    assert set(table["batch"]) == {"small", "large"} and set(table["batch_size"]) == {8, 64}
    assert f"{weights:,} weights" in (tmp_path / "executed.ipynb").read_text()


@pytest.mark.parametrize(
    ("parameters", "complaint"),
    [
        (("small_batch=1297",), "parameter 'small_batch' = 1297: not smaller than the large batch of 1297; pass a smaller one"),
        (("epochs=1", "seeds=1"), "parameter 'target_loss' = 0.01: not reached in 1 epochs with the small batch"),
        (("seed_=1",), "no parameter 'seed_'; did you mean 'seed'?"),
        (("model=small_lenet",), "parameter 'model' = 'small_lenet' does not take the images of experiment 'digits'; choose another"),
    ],
)
def test_a_parameter_that_makes_no_sense_is_refused_in_one_line(tmp_path, parameters, complaint):
    result = papermill(tmp_path, *parameters)
    assert result.returncode != 0 and "ParameterError: " + complaint in result.stderr, result.stderr
    assert not list((tmp_path / "out").rglob("run.json"))


def test_the_committed_page_needs_no_kernel():
    "The slider is a picture there: a widget without a kernel is an empty frame."
    outputs = [output for cell in json.loads(NOTEBOOK.read_text())["cells"] for output in cell.get("outputs", [])]
    assert not [output for output in outputs if "application/vnd.jupyter.widget-view+json" in output.get("data", {})]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 10

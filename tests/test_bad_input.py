"""What a user can get wrong when running the notebook ends in one clear line, a non-zero exit, and nothing that looks finished."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

NOTEBOOK = Path(__file__).parent.parent / "nbs" / "02_entropy_sgd.ipynb"


def papermill(folder: Path, *parameters: str, **environment: str) -> subprocess.CompletedProcess:
    "papermill on the notebook, records in folder/out; `parameters` as on the command line: 'L=20'."
    options = [word for parameter in parameters for word in ("-p", *parameter.split("=", 1))]
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", str(NOTEBOOK), str(folder / "executed.ipynb"), "-p", "out", str(folder / "out"), *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ | environment)


def refused(result: subprocess.CompletedProcess, *words: str) -> None:
    "The run failed, and its last line holds all of `words`."
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode != 0
    assert all(word in last for word in words), last
    assert "flatmin_nb/" not in result.stderr  # a line, not a stack


def nothing_looks_finished(folder: Path) -> None:
    records = [json.loads(path.read_text()) for path in (folder / "out").rglob("run.json")]
    assert all(record["status"] in ("running", "fitted") for record in records)


@pytest.mark.parametrize(
    "parameter, words",
    [
        ("LL=20", ["no parameter 'LL'", "did you mean 'L'?"]),
        ("L=twenty", ["parameter 'L' = 'twenty'", "valid integer", "-p L"]),
        ("L=-1", ["parameter 'L' = -1", "greater than or equal to 0"]),
        ("gamma=nan", ["parameter 'gamma' = nan", "finite number"]),
        ("experiment=foo", ["parameter 'experiment' = 'foo'", "'digits'", "'mnistfc'", "'lenet'", "'allcnn'"]),
        pytest.param("device=cuda", ["parameter 'device' = 'cuda'", "-p device cpu"], marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
    ],
)
def test_a_wrong_parameter(tmp_path, parameter, words):
    refused(papermill(tmp_path, parameter), *words)
    assert not (tmp_path / "out").exists()


def small_mnist(path: Path) -> None:
    "A file of the right form with a few images of noise."
    random = np.random.default_rng(0)
    save_file(
        {
            f"{split}_{part}": random.integers(0, 10, (64, 1, 28, 28) if part == "images" else (64,), dtype=np.uint8)
            for split in ("train", "test") for part in ("images", "labels")
        },
        path,
    )  # fmt: skip


@pytest.mark.parametrize("damage", ["truncated", "one byte flipped"])
def test_a_damaged_data_file(tmp_path, damage):
    path = tmp_path / "mnist.safetensors"
    small_mnist(path)
    whole = path.read_bytes()
    if shutil.which("sha256sum"):
        (tmp_path / "mnist.safetensors.sha256").write_text(subprocess.run(["sha256sum", path.name], cwd=tmp_path, capture_output=True, text=True).stdout)
    flipped = bytearray(whole)
    flipped[-100] ^= 1
    path.write_bytes(whole[:-1000] if damage == "truncated" else bytes(flipped))
    refused(papermill(tmp_path, "experiment=mnistfc", FLATMIN_DATA=str(tmp_path)), "mnist.safetensors", "delete ")
    nothing_looks_finished(tmp_path)


def test_no_data_and_no_network(tmp_path):
    nowhere = "http://127.0.0.1:9"  # the discard port: refused at once
    proxies = {name: nowhere for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
    refused(papermill(tmp_path, "experiment=mnistfc", FLATMIN_DATA=str(tmp_path / "data"), **proxies), "mnist.safetensors", "FLATMIN_DATA")
    nothing_looks_finished(tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_folder_that_cannot_be_written(tmp_path):
    "A folder below a regular file: refused to root as well."
    (tmp_path / "file").write_text("not a folder")
    refused(papermill(tmp_path, f"out={tmp_path / 'file' / 'out'}"), str(tmp_path / "file"), "another folder")


def test_a_finished_run_is_not_overwritten_in_silence(tmp_path):
    small = ["epochs=1", "L=2", "methods=entropy_sgd"]
    assert papermill(tmp_path, *small).returncode == 0
    record = tmp_path / "out" / "entropy_sgd" / "run.json"
    before = record.read_bytes()
    assert json.loads(before)["status"] == "finished"
    refused(papermill(tmp_path, *small), "finished", "overwrite")
    assert record.read_bytes() == before
    assert papermill(tmp_path, *small, "overwrite=True").returncode == 0
    assert record.read_bytes() != before

"""What a user can get wrong when running the notebook ends in one clear line, a non-zero exit, and nothing that looks finished."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

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
def test_a_wrong_parameter(papermill, tmp_path, parameter, words):
    refused(papermill(parameter), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["truncated", "one byte flipped"])
def test_a_damaged_data_file(papermill, small_mnist, tmp_path, damage):
    path, whole = small_mnist, small_mnist.read_bytes()
    if shutil.which("sha256sum"):
        (tmp_path / "mnist.safetensors.sha256").write_text(subprocess.run(["sha256sum", path.name], cwd=tmp_path, capture_output=True, text=True).stdout)
    flipped = bytearray(whole)
    flipped[-100] ^= 1
    path.write_bytes(whole[:-1000] if damage == "truncated" else bytes(flipped))
    refused(papermill("experiment=mnistfc", FLATMIN_DATA=str(tmp_path)), "mnist.safetensors", "delete ")
    nothing_looks_finished(tmp_path)


def test_no_data_and_no_network(papermill, tmp_path):
    nowhere = "http://127.0.0.1:9"  # the discard port: refused at once
    proxies = {name: nowhere for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
    refused(papermill("experiment=mnistfc", FLATMIN_DATA=str(tmp_path / "data"), **proxies), "mnist.safetensors", "FLATMIN_DATA")
    nothing_looks_finished(tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_folder_that_cannot_be_written(papermill, tmp_path):
    "A folder below a regular file: refused to root as well."
    (tmp_path / "file").write_text("not a folder")
    refused(papermill(f"out={tmp_path / 'file' / 'out'}"), str(tmp_path / "file"), "another folder")


def test_a_finished_run_is_not_overwritten_in_silence(papermill, tmp_path):
    small = ["epochs=1", "L=2", "methods=entropy_sgd"]
    assert papermill(*small).returncode == 0
    record = tmp_path / "out" / "entropy_sgd" / "run.json"
    before = record.read_bytes()
    assert json.loads(before)["status"] == "finished"
    refused(papermill(*small), "finished", "overwrite")
    assert record.read_bytes() == before
    assert papermill(*small, "overwrite=True").returncode == 0
    assert record.read_bytes() != before

"""The presets of the notebook really run: a tiny set of the real form through papermill, and a step of the net that needs CIFAR-10."""

import json
from pathlib import Path

import pytest
import torch

from flatmin_nb.entropy_sgd import EntropySGD
from flatmin_nb.lab.data import ImageSet
from flatmin_nb.lab.models import build
from flatmin_nb.lab.train import fit

NOTEBOOKS = Path(__file__).parent.parent / "nbs"


@pytest.mark.parametrize("experiment", ["mnistfc", "lenet"])
def test_a_preset_on_mnist(papermill, small_mnist, tmp_path, experiment):
    small = ("epochs=1", "L=1", "batch_size=32", "lr_milestones=2", "tag=7", "methods=entropy_sgd adam")
    result = papermill(f"experiment={experiment}", *small, FLATMIN_DATA=str(small_mnist.parent))
    assert result.returncode == 0, result.stderr
    records = {path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*/run.json")}
    assert {method: record["status"] for method, record in records.items()} == {"entropy_sgd": "finished", "adam": "finished"}
    for record in records.values():
        assert record["parameters"]["model"] == experiment
        assert record["summary"]["gradient_evaluations"] == 2  # 64 images in batches of 32
        assert record["tag"] == "7"  # text, though papermill passes a number


@pytest.mark.parametrize("experiment", ["lenet_300_100", "lenet5_caffe", "tiny_allcnn", "channel_mean_mlp"])
def test_a_preset_of_bayesian_compression(papermill, small_mnist, small_cifar10, tmp_path, experiment):
    result = papermill(f"experiment={experiment}", "epochs=2", "batch_size=32", "look=1", "runs=bayes dense", "pretrain=1", notebook="05_bayesian_compression", FLATMIN_DATA=str(tmp_path))
    assert result.returncode == 0, result.stderr[-2000:]
    records = {path.parent.parent.name: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*/0/run.json")}
    assert {method: record["status"] for method, record in records.items()} == {"bayes": "finished", "dense": "finished"}
    assert records["bayes"]["summary"]["structured_factor"] == 1 and records["bayes"]["summary"]["file_bytes"] > 1000
    assert records["bayes"]["parameters"]["experiment"] == experiment and records["bayes"]["summary"]["gradient_evaluations"] == 6  # an epoch before the conversion, two after it, of two batches each


def test_one_step_of_allcnn():
    x, y = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 10
    images = ImageSet("noise", x, y, x[:0], y[:0], x, y, num_classes=10)
    net = build("allcnn", seed=0)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    result = fit(net, EntropySGD(net.parameters(), L=1), images, epochs=1, batch_size=16, splits=("test",), progress=False)
    assert (result.steps, result.gradient_evaluations) == (1, 1)
    assert not any(torch.equal(old, new) for old, new in zip(before, net.parameters(), strict=True))
    assert result.history[["train_loss", "test_loss"]].notna().all(axis=None)


@pytest.mark.parametrize("name", ["01_flatness", "02_entropy_sgd", "03_smoothout", "04_sharpest_directions", "05_bayesian_compression", "06_sgd_regimes"])
def test_the_parameters_cell_shows_the_first_preset(name):
    "`check` tells by it what the user left alone, so the two must not drift apart."
    sources = ["".join(cell["source"]) for cell in json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]]
    shown, told = {}, {}
    exec(next(source for source in sources if source.startswith("experiment: str")), shown)
    exec(next(source for source in sources if "EXPERIMENTS = {" in source), told)
    preset, first = next(iter(told["EXPERIMENTS"].items()))
    assert preset == shown["experiment"]
    assert first == {parameter: shown[parameter] for parameter in first}
    assert all(preset.keys() <= first.keys() for preset in told["EXPERIMENTS"].values())  # else a preset's value would be ignored

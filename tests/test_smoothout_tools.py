"""The four tools and their commands where a notebook would be too slow or too tidy: other nets, damaged runs, everything that can be typed wrongly."""

import copy
import io
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import same, state
from PIL import Image
from safetensors.torch import load_file, save, save_file
from sklearn.metrics import top_k_accuracy_score
from torch import nn
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

from flatmin_nb import smoothout
from flatmin_nb.lab import data, models, results, train
from flatmin_nb.lab.errors import OneLineError
from flatmin_nb.lab.landscape import load_table, random_directions
from flatmin_nb.lab.objective import Objective
from flatmin_nb.lab.results import Run
from flatmin_nb.lab.sharpness import displacements, keskar
from flatmin_nb.smoothout import (
    ToolError, alpha_grid, app, evaluate_minimum, examples_of, interpolate_minima, measure_sharpness, open_run, parameters_with_noise, slice_minimum,
)  # fmt: skip

RECORD = dict(model="mlp", model_options=dict(hidden=[12], batchnorm=True), dataset="digits", validation=0.2)


@pytest.fixture(scope="session")
def images() -> data.ImageSet:
    return data.scaled(data.load("digits", validation=0.2, seed=0), 127.5, 127.5)


def trained(images: data.ImageSet, seed: int) -> nn.Module:
    net = models.build("mlp", seed=seed, hidden=(12,), batchnorm=True)
    train.fit(net, torch.optim.SGD(net.parameters(), lr=0.2), images, epochs=2, batch_size=64, seed=seed, splits=("test",))
    return net.eval()


@pytest.fixture(scope="session")
def nets(images) -> list[nn.Module]:
    return [trained(images, seed) for seed in (0, 1)]


@pytest.fixture(scope="session")
def shelf(nets, tmp_path_factory) -> Path:
    "A folder with two finished runs, `a` and `b`."
    folder = tmp_path_factory.mktemp("runs")
    for seed, (name, net) in enumerate(zip("ab", nets)):
        Run(folder / name, RECORD | dict(method=f"method {name}", seed=seed)).finish(net, None)
    return folder


@pytest.fixture
def run(shelf, tmp_path) -> Path:
    "A copy of a run, to be damaged."
    return Path(shutil.copytree(shelf / "a", tmp_path / "run"))


def change(run: Path, **facts) -> None:
    record = json.loads((run / "run.json").read_text())
    record["parameters"] |= facts.pop("parameters", {})
    (run / "run.json").write_text(json.dumps(record | facts))


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def refused(result, status: int, *words: str) -> None:
    "One line on stderr that holds all of `words`."
    assert result.exit_code == status, result.output
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1 and result.stderr.endswith("\n")
    assert all(word in result.stderr for word in words), result.stderr


# ---- from a run to its net ----

def test_a_run_is_opened_as_it_was(shelf, images, nets):
    net, opened, record = open_run(shelf / "a")
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in nets[0].state_dict().items())
    assert not any(module.training for module in net.modules()) and record["parameters"]["method"] == "method a"
    for part in ("train_images", "train_labels", "val_images", "val_labels", "test_images", "test_labels"):
        assert torch.equal(getattr(opened, part), getattr(images, part))
    assert torch.equal(net(opened.test_images), nets[0](images.test_images))


def test_a_run_may_say_how_it_was_split(run):
    change(run, parameters=dict(split_seed=3))
    _, opened, _ = open_run(str(run))
    assert torch.equal(opened.val_labels, data.load("digits", validation=0.2, seed=3).val_labels)


def test_a_net_that_carries_its_preprocessing_gets_it(small_mnist, tmp_path, monkeypatch):
    monkeypatch.setenv("FLATMIN_DATA", str(tmp_path / "nowhere"))
    net = models.build("mnist_f1", seed=0)
    net.register_buffer("extra", None)
    Run(tmp_path / "run", dict(model="mnist_f1", model_options={}, dataset="mnist", validation=0.0)).finish(net, None)
    monkeypatch.setattr(data, "scaled", lambda *arguments, **options: pytest.fail("not the net's own"))
    _, opened, _ = open_run(tmp_path / "run", data_folder=small_mnist.parent)
    assert torch.equal(opened.test_images, net.prepare(data.load("mnist", folder=small_mnist.parent)).test_images)
    assert not len(opened.val_labels)


def test_a_run_on_an_image_folder(tmp_path, monkeypatch):
    for place in ("train/cat", "train/dog", "val/cat", "val/dog"):
        (tmp_path / "imagenet" / place).mkdir(parents=True)
        for number in range(3):
            pixels = np.random.default_rng(number).integers(256, size=(30, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "imagenet" / place / f"{number}.png")
    monkeypatch.setitem(models.MODELS, "pooled", lambda: nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 2)))
    record = dict(model="pooled", model_options={}, dataset="imagenet", validation=0.0, image_folder=str(tmp_path / "imagenet"))
    Run(tmp_path / "run", record).finish(models.build("pooled", seed=0), None)
    net, opened, _ = open_run(tmp_path / "run")
    assert (len(opened.train_labels), len(opened.test_labels)) == (6, 6)
    expected = cross_entropy(net(opened.test_images[:]), opened.test_labels).item()
    assert evaluate_minimum(net, opened).value[0] == pytest.approx(expected, rel=1e-5)
    (tmp_path / "imagenet").rename(tmp_path / "elsewhere")
    refused(call("evaluate", tmp_path / "run"), 1, "imagenet")
    assert f"{expected:.5g}" in call("evaluate", tmp_path / "run", "--data", tmp_path / "elsewhere").stdout


def test_trained_and_not_yet_measured_is_final(run, nets):
    change(run, status="fitted")
    assert torch.equal(open_run(run)[0].output.weight, nets[0].output.weight)


def pickled(run):
    torch.save(nn.Linear(2, 2).state_dict(), run / "model.safetensors")


def cut(length):
    def damage(run):
        (run / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes()[:length])

    return damage


def weights(function):
    def damage(run):
        changed = function(load_file(run / "model.safetensors"))
        (run / "model.safetensors").write_bytes(save(changed))

    return damage


def without_record(run):
    (run / "run.json").unlink()


def only_pickles(run):
    shutil.rmtree(run)
    run.mkdir()
    (run / "model_best.pth.tar").write_bytes(b"\x80\x02")


DAMAGES = {
    "not there": (shutil.rmtree, ["does not exist", "give the folder of a run"]),
    "without a record": (without_record, ["holds no run.json"]),
    "empty": (lambda run: (shutil.rmtree(run), run.mkdir()), ["holds no run.json"]),
    "pickles": (only_pickles, ["model_best.pth.tar", "pickles are not loaded"]),
    "no JSON": (lambda run: (run / "run.json").write_text("{"), ["not a record of a run"]),
    "a list": (lambda run: (run / "run.json").write_text("[1]"), ["of no known status"]),
    "no parameters": (lambda run: (run / "run.json").write_text('{"status": "finished"}'), ["'model'"]),
    "still running": (lambda run: change(run, status="running"), ["is running", "not final"]),
    "diverged": (lambda run: change(run, status="diverged"), ["is diverged"]),
    "being replaced": (lambda run: change(run, status="replaced"), ["is replaced"]),
    "no weights": (lambda run: (run / "model.safetensors").unlink(), ["there is no", "model.safetensors", "kept no weights"]),
    "a folder of weights": (lambda run: ((run / "model.safetensors").unlink(), (run / "model.safetensors").mkdir()), ["model.safetensors"]),
    "a pickle of another name": (pickled, ["model.safetensors", "no safetensors file"]),
    "no byte": (cut(0), ["truncated"]),
    "7 bytes": (cut(7), ["truncated"]),
    "half a header": (cut(100), ["truncated"]),
    "half the weights": (cut(3000), ["truncated"]),
    "all but a byte": (cut(-1), ["truncated"]),
    "a weight too few": (weights(lambda state: {name: value for name, value in state.items() if name != "output.bias"}), ["another net", "'output.bias' is nothing in place of (10,) float32"]),
    "a weight too many": (weights(lambda state: state | {"more": torch.zeros(2)}), ["'more' is (2,) float32 in place of nothing"]),
    "another shape": (weights(lambda state: state | {"output.bias": torch.zeros(9)}), ["'output.bias' is (9,) float32 in place of (10,) float32"]),
    "another precision": (weights(lambda state: state | {"output.bias": torch.zeros(10).double()}), ["'output.bias' is (10,) float64 in place of (10,) float32"]),
    "no numbers": (weights(lambda state: state | {"output.bias": torch.full((10,), torch.nan)}), ["'output.bias' holds numbers that are not finite"]),
    "another net": (lambda run: change(run, parameters=dict(model="lenet", model_options={})), ["another net"]),
    "no such net": (lambda run: change(run, parameters=dict(model="mpl")), ["no model 'mpl'", "'mlp'"]),
    "no such option": (lambda run: change(run, parameters=dict(model_options=dict(hiden=[12]))), ["'hiden'", "'hidden'"]),
    "no such images": (lambda run: change(run, parameters=dict(dataset="digit")), ["no image set 'digit'", "'digits'"]),
}


@pytest.mark.parametrize("damage, words", DAMAGES.values(), ids=DAMAGES)
def test_a_run_that_cannot_be_used_is_said_in_one_line(run, damage, words):
    damage(run)
    with pytest.raises(OneLineError) as refusal:
        evaluate_minimum(*open_run(run)[:2])
    assert "\n" not in str(refusal.value) and all(word in str(refusal.value) for word in words), refusal.value
    refused(call("evaluate", run), 1, *words)


@pytest.mark.parametrize("name", ["model_best.pth.tar", "checkpoint.pt", "net.pkl"])
def test_a_pickle_is_not_loaded(tmp_path, name):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "went off"),))

    torch.save(Bomb(), tmp_path / name)
    refused(call("evaluate", tmp_path / name), 1, name, "pickles are not loaded")
    refused(call("interpolate", tmp_path, tmp_path), 1, name, "pickles are not loaded") if name != "checkpoint.pt" else None
    assert not (tmp_path / "went off").exists()


def test_the_weights_alone_are_no_run(shelf):
    refused(call("evaluate", shelf / "a" / "model.safetensors"), 1, "is a file; give the folder of a run")


def test_images_that_the_net_does_not_take(small_mnist, run):
    change(run, parameters=dict(dataset="mnist", validation=0.0))
    refused(call("evaluate", run, "--data", small_mnist.parent), 1, "'mlp'", "does not take the images of 'mnist'")


# ---- evaluate ----

@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_without_noise_it_is_the_plain_evaluation(nets, images, split):
    net, x, y = nets[0], getattr(images, f"{split}_images"), getattr(images, f"{split}_labels")
    before = state(net)
    loss, error, error_of_five = evaluate_minimum(net, images, split, batch_size=100).value
    assert (loss, error) == pytest.approx(train.evaluate(net, x, y), rel=1e-6)
    assert error_of_five == pytest.approx(100 - 100 * top_k_accuracy_score(y, net(x).detach(), k=5), abs=1e-9)
    assert same(state(net), before)


@pytest.mark.parametrize("kind", ["uniform", "gaussian", "filter", "weight"])
@pytest.mark.parametrize("exclude", [True, False])
def test_every_batch_has_noise_of_its_own(nets, images, kind, exclude):
    net, before = nets[0], state(nets[0])
    table = evaluate_minimum(net, images, noise=0.05, kind=kind, repeats=3, batch_size=170, exclude_batchnorm=exclude, seed=4)
    assert same(state(net), before)
    chosen = {name: value for name, value in net.named_parameters() if not (exclude and ".norm." in name)}
    assert len(chosen) == (4 if exclude else 6)
    draws = displacements(Objective(net, cross_entropy, (images.test_images, images.test_labels), parameters=list(chosen)), kind, seed=4)
    passes = []
    for _ in range(3):
        total = np.zeros(2)
        for x, y in zip(images.test_images.tensor_split([166, 333]), images.test_labels.tensor_split([166, 333])):
            noisy = copy.deepcopy(net)
            moved = nn.utils.parameters_to_vector(chosen.values()) + 0.05 * next(draws)
            nn.utils.vector_to_parameters(moved, [dict(noisy.named_parameters())[name] for name in chosen])
            total += len(y) / 500 * np.array(train.evaluate(noisy, x, y))
        passes.append(total)
    np.testing.assert_allclose(table.noisy[:2], np.mean(passes, 0), rtol=1e-5)
    np.testing.assert_allclose(table.standard_error[:2], np.std(passes, 0, ddof=1) / math.sqrt(3), rtol=1e-3)
    np.testing.assert_allclose(table.rise, table.noisy - table.value)
    assert table.standard_error[0] > 0


def test_the_seed_settles_the_noise(nets, images):
    tables = [evaluate_minimum(nets[0], images, noise=0.1, seed=seed) for seed in (0, 0, 1)]
    pd.testing.assert_frame_equal(tables[0], tables[1], check_exact=True)
    assert tables[0].noisy[0] != tables[2].noisy[0] and tables[0].value[0] == tables[2].value[0]


def test_quiet_parameters_have_no_noise(nets, images):
    net = copy.deepcopy(nets[0])
    object.__setattr__(net, "quiet", ["hidden1.*", "output.bias"])
    chosen = parameters_with_noise(net, exclude_batchnorm=False)
    assert [name for name, value in net.named_parameters() if chosen(name, value)] == ["output.weight"]
    object.__setattr__(net, "quiet", ["*"])
    with pytest.raises(OneLineError, match="picks none"):
        evaluate_minimum(net, images, noise=0.1)


def test_the_loss_is_that_of_the_net(nets, images):
    net = copy.deepcopy(nets[0])
    object.__setattr__(net, "criterion", lambda outputs, labels: nn.functional.multi_margin_loss(outputs, labels))
    expected = nn.functional.multi_margin_loss(net(images.test_images), images.test_labels).item()
    assert evaluate_minimum(net, images).value[0] == pytest.approx(expected, rel=1e-6)
    assert slice_minimum(net, images, alphas=[0.0]).test_loss[0] == pytest.approx(expected, rel=1e-6)
    assert interpolate_minima(net, net, images, alphas=[0.0], reestimate=False).table.test_loss[0] == pytest.approx(expected, rel=1e-6)


def test_few_classes_are_all_among_five(images):
    few = {f"{split}_labels": getattr(images, f"{split}_labels") % 3 for split in ("train", "val", "test")}
    assert evaluate_minimum(models.build("mlp", seed=0, hidden=(), classes=3), replace(images, **few)).value[2] == 0


class Files:
    "Images that are decoded when they are asked for, of which only these parts are known."

    def __init__(self, images):
        self._images, self.shape, self.device, self.decoded = images, images.shape, images.device, 0

    def __len__(self):
        return len(self._images)

    def __getitem__(self, rows):
        self.decoded += len(self._images[rows])
        return self._images[rows]

    def split(self, size):
        return (self[first : first + size] for first in range(0, len(self), size))


def test_images_in_files_are_decoded_some_at_a_time(nets, images):
    lazily = replace(images, **{f"{split}_images": Files(getattr(images, f"{split}_images")) for split in ("train", "val", "test")})
    for found, expected in (
        (evaluate_minimum(nets[0], lazily), evaluate_minimum(nets[0], images)),
        (slice_minimum(nets[0], lazily, alphas=[-0.1, 0.2]), slice_minimum(nets[0], images, alphas=[-0.1, 0.2])),
        (interpolate_minima(*nets, lazily, alphas=[0.5]).table, interpolate_minima(*nets, images, alphas=[0.5]).table),
    ):
        pd.testing.assert_frame_equal(found, expected, rtol=1e-5)
    x, y = examples_of(replace(images, train_images=(files := Files(images.train_images))), "train", 30)
    assert files.decoded == len(y) == 30 and torch.equal(x, examples_of(images, "train", 30)[0])


# ---- sharpness ----

def test_sharpness_is_keskars_on_fixed_examples(nets, images):
    table = measure_sharpness(nets[0], images, epsilons=[1e-3, 5e-3], subspaces=[0, 7], examples=100, repeats=2, restarts=3, seed=5)
    assert table.space.tolist() == ["full", "full", "7 random dimensions", "7 random dimensions"] and table.epsilon.tolist() == [1e-3, 5e-3] * 2
    assert (table.examples == 100).all() and table.attrs["examples"] == 100 and table.attrs["split"] == "train"
    x, y = examples_of(images, "train", 100)
    assert len(y.unique()) == 10 and torch.equal(x, examples_of(images, "train", 100)[0])
    objective = Objective(nets[0], cross_entropy, (x, y))
    for row, (dimensions, epsilon) in zip(table.itertuples(), [(None, 1e-3), (None, 5e-3), (7, 1e-3), (7, 5e-3)]):
        values = [keskar(objective, epsilon=epsilon, subspace=dimensions, restarts=3, seed=seed).value for seed in (5, 6)]
        assert (row.sharpness, row.largest) == pytest.approx((np.mean(values), max(values)), rel=1e-9)
        assert row.standard_error == pytest.approx(np.std(values, ddof=1) / math.sqrt(2), abs=1e-12)
    assert table.standard_error[2] > 0  # two subspaces


def test_more_examples_than_there_are_is_all_of_them(nets, images):
    assert measure_sharpness(nets[0], images, split="val", epsilons=[1e-3], subspaces=[3], repeats=2, restarts=1).examples.tolist() == [259]


# ---- grids ----

def test_grids_are_numpys():
    random = np.random.default_rng(0)
    for _ in range(300):
        start, stop = random.uniform(-3, 3, 2).round(random.integers(4))
        step = round(random.uniform(0.01, 0.5), 2) * np.sign(stop - start)
        if start != stop:
            expected = np.arange(start, stop, step)
            np.testing.assert_allclose(alpha_grid(f"{start}:{step}:{stop}"), expected, atol=1e-12)
    assert alpha_grid("-0.3:0.02:0.31") == [round(-0.3 + 0.02 * place, 2) for place in range(31)]
    assert len(alpha_grid("-1:0.1:1.01")) == 21 and len(alpha_grid("-1.0:0.1:2.01")) == 31
    assert alpha_grid(" -1 : 1e0 : 1.5 ") == [-1, 0, 1] and alpha_grid([0.5, 2]) == [0.5, 2]


GRIDS = {
    "": "is not start:step:stop", "0.5": "is not start:step:stop", "0:1": "is not start:step:stop", "0:1:2:3": "is not start:step:stop", "a:b:c": "is not start:step:stop",
    "::": "is not start:step:stop", "0::1": "is not start:step:stop", "0,0.1,1": "is not start:step:stop", "0:snan:1": "is not start:step:stop",
    "0:0:1": "step must not be 0", "0:-0.0:1": "step must not be 0", "nan:0.1:1": "must lie between", "0:nan:1": "must lie between", "0:0.1:nan": "must lie between",
    "0:inf:1": "must lie between", "-inf:1:0": "must lie between", "0:1:1e300": "must lie between", "1:0.1:0": "holds no point", "0:-0.1:1": "holds no point", "1:0.1:1": "holds no point",
    "0:1e-9:1": "more than 1,001 points", "0:1e-400:1": "step must not be 0", "-1e6:1:1e6": "more than 1,001 points",
}  # fmt: skip


@pytest.mark.parametrize("grid, words", GRIDS.items(), ids=map(repr, GRIDS))
def test_grids_that_are_none(shelf, grid, words):
    with pytest.raises(ToolError, match=words):
        alpha_grid(grid)
    refused(call("slice", shelf / "a", f"--alpha={grid}"), 1, words)
    refused(call("interpolate", shelf / "a", shelf / "b", "--alpha", grid), 1, words)


# ---- between two minima, and along directions ----

def test_both_paths_join_the_ends(nets, images):
    ways = {path: interpolate_minima(*nets, images, alphas="0:0.25:1.3", path=path, names=("x", "y")) for path in ("linear", "curved")}
    for path, way in ways.items():
        assert way.ends == ("x", "y") and way.table.attrs["ends"] == ["x", "y"] and way.table.attrs["path"] == path
        assert way.table.alpha.tolist() == [0, 0.25, 0.5, 0.75, 1, 1.25]
    linear, curved = (way.table for way in ways.values())
    assert linear.test_loss[[0, 4]].tolist() == curved.test_loss[[0, 4]].tolist() and linear.test_loss[2] != curved.test_loss[2]
    plain = interpolate_minima(*nets, images, alphas=[0.0], reestimate=False).table  # as the nets are
    assert plain.test_loss.tolist() == pytest.approx([evaluate_minimum(net, images).value[0] for net in nets], rel=1e-5)
    fewer = interpolate_minima(*nets, images, alphas=[0.5], examples=50).table
    assert fewer.train_loss[1] != linear.train_loss[2]


def test_slices_are_along_filter_normalised_directions(nets, images):
    table = slice_minimum(nets[0], images, alphas=[-0.2, 0, 0.3], directions=2, seed=3)
    assert table.direction.tolist() == [0] * 3 + [1] * 3 and table.columns.tolist() == ["direction", "alpha", "train_loss", "train_error", "test_loss", "test_error"]
    objective = Objective(nets[0], cross_entropy, (images.train_images, images.train_labels))
    assert table.train_loss[1] == table.train_loss[4] == pytest.approx(objective.value, rel=1e-6)
    for number, direction in enumerate(random_directions(objective, 2, seed=3).T):
        for row in table.query("direction == @number").itertuples():
            assert row.train_loss == pytest.approx(objective.loss(objective.weights + row.alpha * direction), rel=1e-5)
    first = slice_minimum(nets[0], images, alphas=[-0.2, 0, 0.3], seed=3)
    pd.testing.assert_frame_equal(first, table.iloc[:3])
    assert first.train_loss[0] != slice_minimum(nets[0], images, alphas=[-0.2], seed=4).train_loss[0]
    assert first.train_loss[0] != slice_minimum(nets[0], images, alphas=[-0.2], seed=3, biases="as weights").train_loss[0]


@pytest.mark.parametrize("tool, options, words", [
    (evaluate_minimum, dict(split="tests"), "did you mean 'test'"),
    (evaluate_minimum, dict(noise=-0.1), "noise must be a number"),
    (evaluate_minimum, dict(noise=math.nan), "noise must be a number"),
    (evaluate_minimum, dict(noise="0.1"), "noise must be a number"),
    (evaluate_minimum, dict(kind="normal"), "no kind of noise 'normal'"),
    (evaluate_minimum, dict(noise=0.1, repeats=1), "repeats must be"),
    (evaluate_minimum, dict(noise=0.1, seed=-1), "seed must be"),
    (evaluate_minimum, dict(batch_size=0), "batch_size must be"),
    (evaluate_minimum, dict(examples=0), "examples must be"),
    (measure_sharpness, dict(epsilons=[]), "nothing to measure"),
    (measure_sharpness, dict(epsilons=[0.0]), "epsilon must be"),
    (measure_sharpness, dict(epsilons=[1e-3, math.nan]), "epsilon must be"),
    (measure_sharpness, dict(subspaces=[]), "nothing to measure"),
    (measure_sharpness, dict(subspaces=[10**6]), "would not fit"),
    (measure_sharpness, dict(subspaces=[-1]), "subspace must be"),
    (measure_sharpness, dict(repeats=0), "repeats must be"),
    (measure_sharpness, dict(seed=-1), "seed must be"),
    (measure_sharpness, dict(restarts=0), "restarts must be"),
    (measure_sharpness, dict(examples=0), "examples must be"),
    (slice_minimum, dict(alphas=[]), "alphas must be"),
    (slice_minimum, dict(alphas=[0, math.inf]), "alphas must be"),
    (slice_minimum, dict(directions=0), "n must be"),
    (slice_minimum, dict(biases="move"), "treatment of biases"),
    (slice_minimum, dict(seed=2**64), "seed must be"),
    (interpolate_minima, dict(path="sin"), "no path 'sin'"),
    (interpolate_minima, dict(alphas=["x"]), "alphas must be"),
    (interpolate_minima, dict(path="curved", reestimate=False), "curved path is for weights alone"),
    (interpolate_minima, dict(names=("a", "a")), "two different names"),
])  # fmt: skip
def test_options_that_mean_nothing(nets, images, tool, options, words):
    ends = nets if tool is interpolate_minima else nets[:1]
    with pytest.raises(OneLineError, match=words) as refusal:
        tool(*ends, images, **options)
    assert "\n" not in str(refusal.value)


def test_images_that_were_not_held_out(nets):
    with pytest.raises(ToolError, match="no images were held out for 'val'"):
        evaluate_minimum(nets[0], data.scaled(data.load("digits"), 127.5, 127.5), "val")


# ---- commands ----

def printed(text: str, header: str) -> pd.DataFrame:
    "The table in what a command printed, whose first column is `header`."
    lines = text.splitlines()
    first = next(number for number, line in enumerate(lines) if line.split()[:1] == [header])
    return pd.read_csv(io.StringIO("\n".join(lines[first:])), sep=r"\s+")


def agree(result, file: Path, header: str) -> pd.DataFrame:
    "What was printed is what was written, but for digits; the written table."
    assert result.exit_code == 0 and result.stderr == "", result.output
    written = load_table(file)
    columns = written.select_dtypes("number").columns
    shown = printed(result.stdout, header)
    np.testing.assert_allclose(shown[columns], written[columns], rtol=1e-4, atol=1e-9)
    return written


def test_evaluate(shelf, nets, images, tmp_path):
    words = ["evaluate", shelf / "a", "--noise", 0.05, "--kind", "filter", "--split", "train", "--repeats", 3, "--batch-size", 100, "--seed", 2, "--no-exclude-bn"]
    result = call(*words, "--out", tmp_path / "out")
    assert result.exit_code == 0 and result.stderr == "", result.output
    expected = evaluate_minimum(nets[0], images, "train", noise=0.05, kind="filter", repeats=3, batch_size=100, seed=2, exclude_batchnorm=False)
    written = load_table(tmp_path / "out" / "evaluate.csv")
    pd.testing.assert_frame_equal(written, expected)
    kept = dict(split="train", examples=1038, noise=0.05, kind="filter", repeats=3, exclude_batchnorm=False, batch_size=100, seed=2)
    assert {name: written.attrs[name] for name in kept} == kept
    assert written.attrs["run"]["parameters"]["method"] == "method a" and written.attrs["run"]["folder"] == str(shelf / "a")
    assert "1,038 train images; filter noise of strength 0.05, mean of 3 passes" in result.stdout and f"{expected.noisy[0]:.5g}" in result.stdout
    assert os.listdir(tmp_path / "out") == ["evaluate.csv"]
    plain = call("evaluate", shelf / "a")
    assert plain.exit_code == 0 and "500 test images\n" in plain.stdout and "noisy" not in plain.stdout


def test_sharpness(shelf, nets, images, tmp_path):
    words = ["--epsilon", 1e-3, "--epsilon", 2e-3, "--subspace", 0, "--subspace", 5, "--examples", 60, "--repeats", 2, "--restarts", 3]
    result = call("sharpness", shelf / "a", *words, "--out", tmp_path / "new" / "out")
    assert result.exit_code == 0 and result.stderr == "", result.output
    expected = measure_sharpness(nets[0], images, epsilons=[1e-3, 2e-3], subspaces=[0, 5], examples=60, repeats=2, restarts=3)
    written = load_table(tmp_path / "new" / "out" / "sharpness.csv")
    pd.testing.assert_frame_equal(written, expected)
    assert "60 train images" in result.stdout and f"{expected.sharpness[0]:.5g}" in result.stdout and "5 random dimensions" in result.stdout


def test_interpolate(shelf, tmp_path):
    result = call("interpolate", shelf / "a", shelf / "b", "--path", "curved", "--alpha=-0.5:0.5:1.6", "--examples", 200, "--out", tmp_path)
    written = agree(result, tmp_path / "interpolate.csv", "alpha")
    assert written.alpha.tolist() == [-0.5, 0, 0.5, 1, 1.5]
    assert written.attrs["ends"] == [str(shelf / "a"), str(shelf / "b")] and written.attrs["path"] == "curved"
    assert [run["parameters"]["method"] for run in written.attrs["runs"]] == ["method a", "method b"]
    assert f"alpha = 0 is {shelf / 'a'}, alpha = 1 is {shelf / 'b'}" in result.stdout and "barrier" in result.stdout
    assert (tmp_path / "interpolate.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["interpolate.csv", "interpolate.png"]


def test_slice(shelf, tmp_path):
    result = call("slice", shelf / "b", "--alpha", "-0.3:0.02:0.31", "--directions", 2, "--biases", "as-weights", "--seed", 1, "--out", tmp_path)
    written = agree(result, tmp_path / "slice.csv", "direction")
    assert len(written) == 2 * 31 and (written.alpha == 0).sum() == 2 and written.attrs["biases"] == "as weights"
    assert (tmp_path / "slice.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_written_unless_asked_and_nothing_is_replaced_unless_asked(shelf, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(path.relative_to(shelf) for path in shelf.rglob("*"))
    short = ["slice", shelf / "a", "--alpha=0:1:2"]
    assert call(*short).exit_code == 0 and not list(tmp_path.iterdir())
    assert call(*short, "--out", "out").exit_code == 0
    (tmp_path / "out" / "slice.csv").unlink()
    (tmp_path / "out" / "slice.png").write_bytes(b"mine")
    refused(call(*short, "--out", "out"), 1, "out/slice.png", "--overwrite")
    assert os.listdir("out") == ["slice.png"] and Path("out/slice.png").read_bytes() == b"mine"
    assert call(*short, "--out", "out", "--overwrite").exit_code == 0
    assert sorted(os.listdir("out")) == ["slice.csv", "slice.png"] and Path("out/slice.png").read_bytes() != b"mine"
    assert sorted(path.relative_to(shelf) for path in shelf.rglob("*")) == before


def test_what_cannot_be_written_is_said_and_leaves_nothing(shelf, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        refused(call("evaluate", shelf / "a", "--out", out), 1, str(out), "--out")
    monkeypatch.setattr(results.os, "fsync", lambda number: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    refused(call("evaluate", shelf / "a", "--out", tmp_path / "full"), 1, "No space left")
    assert not list((tmp_path / "full").iterdir())


def test_a_refused_run_makes_no_folder(shelf, tmp_path):
    refused(call("evaluate", tmp_path / "nowhere", "--out", tmp_path / "out"), 1, "does not exist")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("status, words, said", [
    (2, ["evaluate"], ["Missing argument 'RUN'"]),
    (2, [], ["Missing command"]),
    (2, ["evalute", "a"], ["evalute", "evaluate"]),
    (2, ["evaluate", "a", "--nosie", "0.1"], ["--nosie", "--noise"]),
    (2, ["evaluate", "a", "b"], ["b"]),
    (2, ["interpolate", "a"], ["RUN_B"]),
    (2, ["evaluate", "a", "--noise", "much"], ["--noise"]),
    (2, ["evaluate", "a", "--repeats", "2.5"], ["--repeats"]),
    (2, ["sharpness", "a", "--epsilon", "small"], ["--epsilon"]),
    (2, ["slice", "a", "--alpha"], ["--alpha"]),
    (1, ["evaluate", "a", "--noise", "-1"], ["noise must be a number in [0, inf)"]),
    (1, ["evaluate", "a", "--noise", "nan"], ["noise must be a number in [0, inf)"]),
    (1, ["evaluate", "a", "--noise", "inf"], ["noise must be a number in [0, inf)"]),
    (1, ["evaluate", "a", "--kind", "normal"], ["no kind of noise 'normal'", "gaussian"]),
    (1, ["evaluate", "a", "--split", "valid"], ["no split 'valid'", "'val'"]),
    (1, ["evaluate", "a", "--noise", "0.1", "--repeats", "1"], ["repeats must be an integer from 2"]),
    (1, ["evaluate", "a", "--batch-size", "0"], ["batch_size must be"]),
    (1, ["evaluate", "a", "--device", "gpu"], ["not a device", "use cpu"]),
    pytest.param(1, ["evaluate", "a", "--device", "cuda"], ["--device cpu"], marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
    (1, ["sharpness", "a", "--epsilon", "0"], ["epsilon must be"]),
    (1, ["sharpness", "a", "--subspace", "1000000"], ["would not fit"]),
    (1, ["sharpness", "a", "--split", "all"], ["no split 'all'"]),
    (1, ["interpolate", "a", "a"], ["two different names"]),
    (1, ["interpolate", "a", "b", "--path", "sin"], ["no path 'sin'"]),
    (1, ["interpolate", "a", "b", "--path", "curved", "--no-reestimate"], ["curved path is for weights alone"]),
    (1, ["slice", "a", "--directions", "0"], ["n must be"]),
    (1, ["slice", "a", "--biases", "all"], ["treatment of biases"]),
    (1, ["slice", "a", "--seed", "-1"], ["seed must be"]),
])  # fmt: skip
def test_what_is_typed_wrongly_is_said_in_one_line(shelf, monkeypatch, status, words, said):
    monkeypatch.chdir(shelf)
    refused(call(*words), status, *said)


def test_two_runs_must_be_of_the_same_images_and_net(shelf, small_mnist, tmp_path):
    Run(tmp_path / "mnist", dict(model="mnist_f1", model_options={}, dataset="mnist", validation=0.0)).finish(models.build("mnist_f1", seed=0), None)
    refused(call("interpolate", shelf / "a", tmp_path / "mnist", "--data", tmp_path), 1, "on digits", "on mnist", "the same images")
    Run(tmp_path / "wide", RECORD | dict(model_options=dict(hidden=[13], batchnorm=True))).finish(models.build("mlp", seed=0, hidden=(13,), batchnorm=True), None)
    refused(call("interpolate", shelf / "a", tmp_path / "wide"), 1, "different architectures")


@pytest.mark.parametrize("name", ["evaluate", "sharpness", "interpolate", "slice"])
def test_help(name):
    overview, result = call("--help"), call(name, "--help")
    assert overview.exit_code == result.exit_code == 0 and name in overview.stdout and "..." not in overview.stdout.partition("Commands:")[2]
    options = [option for option in result.stdout.split() if option.startswith("--") and "/" not in option]
    assert {"--out", "--overwrite", "--device", "--data", "--help"} <= set(options)
    lines = [line for line in result.stdout.splitlines() if line.startswith("  --")]
    assert all(len(line.split()) > 1 for line in lines)


ROOT = Path(smoothout.__file__).parent.parent


def module(*words, folder):
    command = [sys.executable, "-m", "flatmin_nb.smoothout", *map(str, words)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_the_module_is_a_program(shelf, tmp_path):
    result = module("slice", shelf / "a", "--alpha=-0.3:0.02:0.31", "--out", "out", folder=tmp_path)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert len(printed(result.stdout, "direction")) == len(load_table(tmp_path / "out" / "slice.csv")) == 31


def test_the_program_says_what_is_wrong_in_one_line(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "run.json").write_text('{"status": "finished", "parameters": {}}')
    result = module("evaluate", tmp_path, folder=tmp_path)
    assert result.returncode == 1 and result.stdout == "" and result.stderr.count("\n") == 1 and "'model'" in result.stderr


def test_importing_it_runs_nothing_and_loads_no_instrument():
    code = "import sys; sys.argv[1:] = ['nonsense']; import flatmin_nb.smoothout; print(*(name for name in ('pandas', 'matplotlib', 'flatmin_nb.lab.objective') if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert result.returncode == 0 and result.stdout.strip() == "" and result.stderr == ""

"""The runs of the SGD regimes before they begin: what may be asked for, which data they get, and what the earlier code's files say of them."""
import copy
import hashlib
import json
import math
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import special, stats
from sklearn.datasets import load_digits
from typer.testing import CliRunner

from flatmin_nb import sgd_regimes_runs as sgd_regimes
from flatmin_nb.lab import data
from flatmin_nb.lab.errors import OneLineError
from flatmin_nb.lab.streams import key
from flatmin_nb.sgd_regimes_runs import RegimeError, Setting, app, depleted, examples, import_old, read_old, read_split, split, write_split

SPLITS = Path(__file__).parent.parent / "results/sgd_regimes_splits"
README = dict(dataset="mnist_parity", ptr=1024, pte=2048, arch="mlp", act="gelu", h=64, L=8, dynamics="sgd", alpha=1.0, dt=0.1, bs=64, max_wall=120.0)
DIGITS = dict(dataset="digits_parity", ptr=1024, pte=500, arch="mlp", h=64, L=5, dynamics="sgd", alpha=1.0, temp=2.0**-8, bs=16)
PERCEPTRON = dict(dataset="depleted_sign", d=16, data_chi=1.0, ptr=256, pte=512, arch="linear", dynamics="sgd", alpha=1.0, temp=0.5, bs=2)
FIRST = {
    "digits": ([1328, 453, 717, 1566, 606, 815], [1671, 56, 1117, 740, 472, 180]),
    "mnist": ([65052, 4093, 36555, 54645, 11359, 63712], [34705, 26632, 52248, 60929, 7270, 56943]),
    "depleted": [-0.41690370440483093, -0.5192312002182007, -0.8605758547782898, 1.3270679712295532],
}


def refused(action, *parts: str) -> str:
    "The one line of the RegimeError that `action()` must raise, with all these parts in it."
    with pytest.raises(RegimeError) as caught:
        action()
    message = str(caught.value)
    assert isinstance(caught.value, OneLineError) and isinstance(caught.value, ValueError) and len(message.splitlines()) == 1
    assert all(part in message for part in parts), message
    return message


# ---- settings


def test_the_options_and_defaults_of_the_earlier_command():
    "All of them but the two that did nothing; max_wall had no default, and None stands for what follows from the others."
    theirs = dict(
        seed_init=0, seed_batch=0, seed_trainset=None, seed_testset=-1, d=None, act="relu", L=None, h=1, loss="hinge", bs=None, dt=None, temp=None, gf_tol=1e-5, gf_maxdt=1.0,
        regularizer=None, regu_scale=0.0, data_chi=0.0, max_step=math.inf, mind_stop=1.0, ckpt_save_parameters=0, ckpt_grad_stats=0, ckpt_drift=0, ckpt_drift_n0=16, ckpt_kernels=0,
        ckpt_save_pred=0, ckpt_modulo=1, ckpt_save_gradoverlap=0, ckpt_delta_pred=0, ckpt_save_mult=0, dtype="f32",
    )  # fmt: skip
    required = {"dataset", "ptr", "pte", "arch", "alpha", "dynamics"}
    ours = {name: field.default for name, field in Setting.model_fields.items() if not field.is_required()}
    assert ours == theirs | {"max_wall": math.inf} and Setting.model_fields.keys() == ours.keys() | required


def test_what_follows_from_what():
    setting = Setting(**README)
    assert (setting.bs, setting.dt, setting.temp, setting.seed_trainset) == (64, 0.1, 0.1 / (64 * 64), -2)
    assert Setting(**DIGITS).dt == 2.0**-8 * 64 * 16 and Setting(**DIGITS | {"bs": None}).bs == 1024
    assert Setting(**DIGITS | {"seed_init": 5}).seed_trainset == -7 and Setting(**DIGITS, ckpt_grad_stats=-1).ckpt_grad_stats == 1024
    assert Setting(**DIGITS | {"arch": "diagonal_linear", "h": 1}) == Setting(**DIGITS | {"arch": "simple_diagonal_linear", "h": 1})
    flow = Setting(**DIGITS | {"dynamics": "gf", "temp": None, "bs": None}, gf_tol=1e-6)
    assert (flow.bs, flow.dt, flow.temp) == (1024, None, None)
    assert Setting(**README | {"ptr": np.int64(1024), "alpha": np.float32(1)}) == setting
    assert Setting(**README | {"arch": "mnas", "L": 1, "temp": None}).L == 1  # as the published commands have it


def test_a_setting_is_frozen_hashable_and_survives_a_pickle():
    setting = Setting(**README | {"seed_init": "time7"})
    for again in (pickle.loads(pickle.dumps(setting)), copy.deepcopy(setting)):
        assert again == setting and hash(again) == hash(setting) and again.but() == setting
    with pytest.raises(ValueError):
        setting.ptr = 3


def test_seeds_that_are_words():
    now = time.time()
    setting = Setting(**README | {"seed_init": "time1000", "seed_batch": "seed_init"})
    assert abs(setting.seed_init - 1000 * now) < 60_000 and setting.seed_batch == setting.seed_init and setting.seed_trainset == -setting.seed_init - 2
    assert setting.but(alpha=2.0).seed_init == setting.seed_init  # the time is not taken again
    setting = Setting(**README, seed_init="seed_trainset", seed_trainset=9, seed_batch="seed_init")
    assert (setting.seed_init, setting.seed_batch, setting.seed_trainset) == (9, 9, 9)
    assert Setting(**README, seed_init="-3", seed_testset="+4").seed_testset == 4
    assert Setting(**README, seed_trainset="time2").seed_trainset >= round(2 * now)


def test_but_lets_what_was_not_given_follow_anew():
    setting = Setting(**README)
    assert setting.but(h=128).temp == 0.1 / (128 * 64) and setting.but(h=128).dt == 0.1
    assert setting.but(temp=1e-3).dt == 1e-3 * 64 * 64 and setting.but(temp=1e-3).but(h=128).temp == 1e-3
    assert setting.but(bs=None).bs == 1024 and setting.but(bs=None, ptr=2000).bs == 2000
    assert setting.but(seed_init=3).seed_trainset == -5 and setting.but(seed_trainset=1).but(seed_init=3).seed_trainset == 1


@pytest.mark.parametrize("changes, parts", [
    (dict(dt=0.1, temp=0.1), ["either dt or temp", "dt = 0.1 and temp = 0.1"]), (dict(dt=None), ["either dt or temp", "got neither"]),
    (dict(ptr=68_000), ["70,000 images", "67,952 are left", "pte = 2048"]), (dict(pte=70_000), ["70,000 images", "pte = 70000"]), (dict(ptr=0), ["ptr = 0"]), (dict(pte=-5), ["pte = -5"]),
    (dict(act="rellu"), ["no act 'rellu'", "did you mean 'relu'"]), (dict(act="softplus2"), ["no act"]), (dict(dataset="mnist"), ["did you mean 'mnist_parity'"]), (dict(arch="mpl"), ["'mlp'"]),
    (dict(loss="hing"), ["did you mean 'hinge'"]), (dict(dynamics="sdg"), ["no dynamics 'sdg'"]), (dict(dynamics="gd_sde_only_unfit"), ["could not run", "gd_sde"]), (dict(dtype="f16"), ["no dtype"]),
    (dict(regularizer="l3"), ["no regularizer"]), (dict(regu_scale=0.1), ["without a regularizer", "norm_grad_net"]), (dict(regularizer="l2", regu_scale=-1.0), ["regu_scale = -1.0"]),
    (dict(bs=2000), ["bs = 2000", "ptr = 1024"]), (dict(bs=0), ["bs = 0"]), (dict(d=3), ["d = 3", "leave it out"]), (dict(data_chi=1.0), ["data_chi = 1", "depleted_sign"]),
    (dict(L=None), ["needs L", "hidden layers"]), (dict(L=0), ["L = 0"]), (dict(arch="vgg11"), ["L = 8", "fixed"]), (dict(arch="linear", L=None), ["h = 64", "leave it out"]),
    (dict(arch="linear", L=None, h=1), ["act = 'gelu'"]), (dict(arch="diagonal_linear", L=None, h=1, act="relu"), ["exponent"]), (dict(alpha=0.0), ["alpha = 0.0"]),
    (dict(alpha=math.nan), ["alpha = nan"]), (dict(alpha=math.inf), ["alpha = inf"]), (dict(dt=-0.1), ["dt = -0.1"]), (dict(dt=math.nan), ["dt = nan"]), (dict(max_wall=math.nan), ["max_wall = nan"]),
    (dict(max_step=-1.0), ["max_step = -1.0"]), (dict(mind_stop=math.nan), ["mind_stop = nan"]), (dict(data_chi=math.nan), ["data_chi = nan"]), (dict(h=-64), ["h = -64"]), (dict(h=64.0), ["h = 64.0", "integer"]),
    (dict(ptr="1024"), ["ptr = '1024'"]), (dict(alpha="1"), ["alpha = '1'"]), (dict(h=True), ["h = True"]), (dict(act=3), ["act = 3"]), (dict(act_beta=1.0), ["no option 'act_beta'"]),
    (dict(gf_mindt=1e-10), ["no option 'gf_mindt'", "gf_maxdt"]), (dict(temp_=1.0), ["did you mean 'temp'"]), (dict(dynamics="gf"), ["bs = 64", "means nothing", "leave it out"]),
    (dict(dynamics="gf", bs=None), ["dt = 0.1"]), (dict(gf_tol=1e-3), ["gf_tol = 0.001", "means nothing", "ckpt_drift = 1"]), (dict(gf_maxdt=2.0), ["gf_maxdt = 2"]),
    (dict(ckpt_drift_n0=4), ["ckpt_drift_n0 = 4", "ckpt_drift = 1"]), (dict(ckpt_kernels=1), ["ckpt_grad_stats"]), (dict(ckpt_save_gradoverlap=1), ["ckpt_grad_stats"]),
    (dict(ckpt_grad_stats=2000), ["ckpt_grad_stats = 2000", "ptr = 1024"]), (dict(ckpt_grad_stats=-2), ["ckpt_grad_stats = -2"]), (dict(ckpt_kernels=2), ["ckpt_kernels = 2"]),
    (dict(dynamics="gf", bs=None, dt=None, ckpt_drift=1), ["ckpt_drift = 1", "gf"]), (dict(dynamics="gf", bs=None, dt=None, ckpt_delta_pred=1), ["ckpt_delta_pred = 1"]),
    (dict(seed_init="tim1"), ["seed_init = 'tim1'", "timeN", "seed_trainset"]), (dict(seed_init="seed_trainset"), ["needs a seed_trainset"]), (dict(seed_batch="seed_trainset"), ["seed_init"]),
    (dict(seed_init=2**70), ["between"]), (dict(seed_init=1.5), ["seed_init = 1.5"]), (dict(seed_init=True), ["seed_init = True"]), (dict(seed_init="time"), ["timeN"]), (dict(seed_testset="seed_init"), ["seed_testset"]),
    (dict(seed_init="9" * 10_000), ["seed_init"]), (dict(dt=1e-320, h=2**40), ["above 0"]), (dict(ptr=2**50), ["ptr"]),
])  # fmt: skip
def test_what_cannot_be_asked_for(changes, parts):
    refused(lambda: Setting(**README | changes), *parts)


@pytest.mark.parametrize("changes, parts", [
    (dict(d=None), ["needs d"]), (dict(d=0), ["d = 0"]), (dict(arch="mnas"), ["is for images", "mnist_parity"]), (dict(h=2), ["h = 2"]), (dict(data_chi=-0.9), ["data_chi = -0.9"]),
    (dict(dataset="sign"), ["data_chi = 1", "means nothing"]), (dict(dataset="random_sign"), ["data_chi = 1"]), (dict(temp=1e308, bs=200), ["inf"]), (dict(data_chi=math.inf), ["data_chi = inf"]),
])  # fmt: skip
def test_what_synthetic_data_cannot_do(changes, parts):
    refused(lambda: Setting(**PERCEPTRON | changes), *parts)


@pytest.mark.parametrize("name", ["dataset", "ptr", "pte", "arch", "alpha", "dynamics"])
def test_what_is_needed(name):
    refused(lambda: Setting(**{option: value for option, value in README.items() if option != name}), f"{name} is missing", "alpha")


# ---- which images train and test


def test_the_rule_is_the_same_for_ever():
    "The first places of some splits, as they were when the rule was made."
    train, test = split(Setting(**DIGITS))
    assert (train[:6].tolist(), test[:6].tolist()) == FIRST["digits"]
    train, test = split(Setting(**README | {"pte": 8192, "ptr": 8192}))
    assert (train[:6].tolist(), test[:6].tolist()) == FIRST["mnist"]


@pytest.mark.parametrize("setting", [Setting(**DIGITS), Setting(**README), Setting(**DIGITS | {"ptr": 1, "pte": 1796, "bs": 1}), Setting(**README | {"ptr": 69_999, "pte": 1})])
def test_a_split_is_two_sets_of_different_images(setting):
    train, test = split(setting)
    count = {"digits_parity": 1797, "mnist_parity": 70_000}[setting.dataset]
    assert len(train) == setting.ptr and len(test) == setting.pte and len(torch.cat([train, test]).unique()) == setting.ptr + setting.pte
    assert 0 <= int(torch.cat([train, test]).min()) and int(torch.cat([train, test]).max()) < count


def test_what_of_a_split_depends_on_what():
    setting = Setting(**DIGITS)
    train, test = split(setting)
    for change in (dict(seed_batch=3), dict(alpha=2.0), dict(arch="mlp_bias"), dict(seed_init=4, seed_trainset=-2)):
        assert all(torch.equal(a, b) for a, b in zip(split(setting.but(**change)), (train, test)))
    other, same = split(setting.but(seed_trainset=5))
    assert torch.equal(same, test) and not torch.equal(other, train)
    other, new = split(setting.but(seed_testset=5))
    assert not torch.equal(new.sort().values, test.sort().values)
    assert torch.equal(split(setting.but(pte=200))[1], test[:200])
    test[:] = 0  # whoever changes what he was given changes nothing for the next
    assert not torch.equal(split(setting)[1], test)


def test_every_image_is_as_likely_as_any_other():
    trained = torch.zeros(1797)
    for seed in range(200):
        train, test = split(Setting(**DIGITS, seed_trainset=seed, seed_testset=1000 + seed))
        trained[train] += 1
    expected = 200 * 1024 / 1797
    assert stats.chisquare(trained.view(-1, 3).sum(1), [3 * expected] * 599).statistic < 599 * 1.2  # drawn without replacement: smaller than chi squared


@pytest.mark.parametrize("name, setting, initial", [("digits_parity", Setting(**DIGITS), range(5)), ("mnist_parity", Setting(**README | {"ptr": 8192, "pte": 8192}), range(3))])
def test_the_published_files_are_what_the_rule_gives(name, setting, initial, tmp_path):
    file = SPLITS / f"{name}.json"
    settings = [setting.but(seed_init=seed) for seed in initial]
    write_split(tmp_path / "again.json", settings)
    assert (tmp_path / "again.json").read_bytes() == file.read_bytes()
    found = read_split(file)
    assert found.dataset == name and found.seed_testset == -1 and list(found.train) == [-2 - seed for seed in initial]
    for one in settings:
        train, test = split(one)
        assert torch.equal(found.train[one.seed_trainset], train) and torch.equal(found.test, test)
    facts = json.loads(file.read_text())  # as somebody would check it who has no torch
    places = [*facts["test"], *(place for train in facts["train"].values() for place in train)]
    assert hashlib.sha256(np.array(places, "<i4").tobytes()).hexdigest() == facts["sha256"]


def test_the_published_files_are_small():
    assert sum(file.stat().st_size for file in SPLITS.iterdir()) < 400_000


@pytest.mark.parametrize("damage", [
    lambda text: text[:1000], lambda text: "", lambda text: "[]", lambda text: text.replace("-2", "-3", 1).replace(", 1", ", 2", 1), lambda text: text.replace('"pte": 500', '"pte": 499'),
    lambda text: text.replace('"test": [', '"test": ["a", '), lambda text: text.replace('"test": [', '"test": [[1], '), lambda text: text.replace('"train"', '"trains"'),
    lambda text: text.replace('"test": [', '"test": [99999999999999999999, '), lambda text: "\x00\xff" + text,
])  # fmt: skip
def test_a_damaged_index_file_is_refused(damage, tmp_path):
    file = tmp_path / "split.json"
    file.write_text(damage((SPLITS / "digits_parity.json").read_text()), encoding="latin1")
    refused(lambda: read_split(file), str(file), "write_split")


def test_index_files_that_cannot_be(tmp_path):
    refused(lambda: read_split(tmp_path / "none.json"), "cannot be read")
    refused(lambda: write_split(tmp_path / "a.json", [Setting(**DIGITS), Setting(**DIGITS | {"ptr": 100})]), "one ptr")
    refused(lambda: write_split(tmp_path / "a.json", Setting(**PERCEPTRON)), "images")
    refused(lambda: write_split(tmp_path / "a.json", []), "nothing")
    assert not list(tmp_path.iterdir())


# ---- images


def test_digits_are_scikit_learns_in_its_order():
    setting = Setting(**DIGITS)
    found, bunch = examples(setting), load_digits()
    assert found.inputs.shape == (1024 + 500, 1, 8, 8) and found.inputs.dtype == found.labels.dtype == torch.float32
    for places, chosen in zip(split(setting), (found.train[0], found.test[0])):
        assert torch.equal(found.rows[chosen], places)
        pixels = (bunch.images[places] - bunch.images.mean()) / bunch.images.std()
        assert np.abs(found.inputs[chosen, 0].numpy() - pixels).max() < 1e-5
        assert found.labels[chosen].tolist() == [1.0 if digit % 2 == 0 else -1.0 for digit in bunch.target[places]]


def same_data(settings: list[Setting]) -> sgd_regimes.Examples:
    "What `examples` makes of several is what it makes of each."
    together = examples(settings)
    for setting, train, test in zip(settings, together.train, together.test, strict=True):
        alone = examples(setting)
        assert len(train) == setting.ptr and len(test) == setting.pte and train.dtype == torch.int64
        for ours, theirs in ((train, alone.train[0]), (test, alone.test[0])):
            assert torch.equal(together.inputs[ours], alone.inputs[theirs]) and torch.equal(together.labels[ours], alone.labels[theirs])
    return together


def test_runs_share_their_images():
    digits = Setting(**DIGITS)
    runs = [digits, digits.but(ptr=100, bs=4), digits.but(seed_init=1), digits.but(alpha=3.0), digits.but(pte=100), digits.but(seed_testset=7), digits.but(seed_init=1, ptr=50)]
    together = same_data(runs)
    assert len(together.rows.unique()) == len(together.rows) == len(together.inputs) <= 1797
    assert together.train[0] is together.train[3] and together.test[0] is together.test[1] is together.test[2]
    assert torch.equal(together.train[1], together.train[0][:100]) and torch.equal(together.train[6], together.train[2][:50])
    assert set(together.rows.tolist()) == {place for run in runs for part in split(run) for place in part.tolist()}


@pytest.mark.parametrize("others, parts", [
    ([], ["no run"]), ([Setting(**DIGITS), Setting(**README)], ["one dataset", "digits_parity, mnist_parity"]), ([Setting(**PERCEPTRON), Setting(**PERCEPTRON | {"d": 3})], ["one d;", "16, 3"]),
])  # fmt: skip
def test_runs_that_cannot_share(others, parts):
    refused(lambda: examples(others), *parts)


def test_another_file_in_place_of_mnist(small_mnist, monkeypatch):
    monkeypatch.setenv("FLATMIN_DATA", str(small_mnist.parent))
    refused(lambda: examples(Setting(**README)), "64 train", "70,000 images")


def real(dataset: str, name: str):
    there = "FLATMIN_DATA" in os.environ and (data.data_folder() / f"{name}.safetensors").exists()
    skip = pytest.mark.skipif(not there, reason=f"no {name}.safetensors under $FLATMIN_DATA")
    return pytest.param(dataset, name, marks=[pytest.mark.real_data, skip])


@pytest.mark.parametrize("dataset, name", [real("mnist_parity", "mnist"), real("cifar_animal", "cifar10")])
def test_real_images(dataset, name):
    count = {"mnist": 70_000, "cifar10": 60_000}[name]
    setting = Setting(dataset=dataset, ptr=3000, pte=count - 3000, arch="mnas", h=4, dynamics="sgd", alpha=1.0, temp=0.1, bs=16)  # between them all images
    found, images = examples(setting), data.load(name)
    assert found.inputs.shape == (count, *images.image_shape) and found.rows.tolist() == list(range(count))
    centre, scale = {"mnist": (33.31002426147461, 78.56748962402344), "cifar10": (120.93118286132812, 64.14186096191406)}[name]
    for place, image, label in ((0, images.train_images[0], images.train_labels[0]), (count - 1, images.test_images[-1], images.test_labels[-1])):
        assert torch.allclose(found.inputs[place], (image.float() - centre) / scale, rtol=0, atol=1e-6)
        assert found.labels[place] == (1 if int(label) in ((0, 2, 4, 6, 8) if name == "mnist" else (2, 3, 4, 5, 6, 7)) else -1)
    assert found.inputs.mean() == pytest.approx(0, abs=0.02)
    if name == "mnist":
        assert found.inputs.square().mean() == pytest.approx(1.0022, abs=5e-4) and (found.labels > 0).float().mean() == pytest.approx(0.4917, abs=5e-5)
    else:
        assert (found.labels > 0).float().mean() == pytest.approx(0.6, abs=1e-6)


# ---- synthetic data


def law(chi: float):
    "The exact distribution function of x_1: half of it on each side, and a Gamma distribution in x^2 / 2."
    return lambda x: 0.5 * (1 + np.sign(x) * special.gammainc((chi + 1) / 2, np.square(x) / 2))


@pytest.mark.parametrize("chi", [-0.5, 0.0, 0.3, 1.0, 2.0, 3.0, 10.0, 500.0])
def test_the_density_of_depleted_data(chi):
    x = depleted(chi, key(3), torch.arange(200_000)).numpy()
    assert np.isfinite(x).all() and (x != 0).all() and stats.kstest(x, law(chi)).pvalue > 0.01
    near = np.sort(np.abs(x))[:2000]  # what lies near the boundary decides the exponents: |x|^(chi+1) is uniform there
    if chi <= 3:
        assert stats.kstest((near / near[-1])[:-1] ** (chi + 1), "uniform").pvalue > 0.01


def test_depleted_data_without_depletion_are_gaussian():
    x = depleted(0.0, key(4), torch.arange(200_000)).numpy()
    assert stats.kstest(x, "norm").pvalue > 0.01
    for chi, known in ((1, stats.rayleigh), (2, stats.maxwell), (4, stats.chi(5))):
        assert stats.kstest(np.abs(depleted(chi, key(4), torch.arange(200_000)).numpy()), known.cdf).pvalue > 0.01


def test_the_extremes_of_the_inverse(monkeypatch):
    "The smallest and the largest words give numbers, and small ones are resolved."
    for word in (0, 2**32 - 1):
        monkeypatch.setattr(sgd_regimes, "words", lambda key, rows, count: torch.full((len(rows), count), word))
        for chi in (-0.5, 0.0, 1.0, 1000.0):
            value = abs(float(depleted(chi, key(0), torch.arange(1))[0]))
            assert 0 < np.float32(value) < 100
            if word == 0 and chi <= 1:
                a = (chi + 1) / 2  # P(a, g) = g^a / Gamma(a + 1) for small g
                assert value == pytest.approx(math.sqrt(2 * (2.0**-53 * math.gamma(a + 1)) ** (1 / a)), rel=1e-6)


@pytest.mark.parametrize("dataset", ["sign", "random_sign", "depleted_sign"])
def test_synthetic_sets(dataset):
    chi = {"data_chi": 2.0} if dataset == "depleted_sign" else {"data_chi": 0.0}
    setting = Setting(**PERCEPTRON | chi | dict(dataset=dataset, ptr=4000, pte=3000, seed_trainset=5))
    found = examples(setting)
    train, test = found.inputs[found.train[0]], found.inputs[found.test[0]]
    assert found.inputs.dtype == torch.float32 and train.shape == (4000, 16) and found.rows is None and set(found.labels.unique().tolist()) == {-1.0, 1.0}
    normal = torch.eye(16)[0].double() if dataset != "random_sign" else sgd_regimes.teacher(5, 16)
    assert float(normal.norm()) == pytest.approx(1)
    for x, y in ((train, found.labels[found.train[0]]), (test, found.labels[found.test[0]])):
        assert torch.equal(torch.sign(x.double() @ normal).float(), y)
        assert stats.kstest(x[:, 1:].flatten().numpy(), "norm").pvalue > 0.01
        assert stats.kstest(x[:, 0].double().numpy(), law(chi["data_chi"])).pvalue > 0.01
        assert np.abs(np.corrcoef(x.T.numpy()) - np.eye(16)).max() < 5 / math.sqrt(3000)
    same_seed = examples(setting.but(seed_testset=5))  # and yet no row of both
    assert not torch.equal(same_seed.inputs[same_seed.train[0]][:3000], same_seed.inputs[same_seed.test[0]])


@pytest.mark.parametrize("dataset", ["sign", "random_sign", "depleted_sign"])
def test_runs_share_their_synthetic_data(dataset):
    chi = {} if dataset == "depleted_sign" else {"data_chi": 0.0}
    one = Setting(**PERCEPTRON | chi | {"dataset": dataset})
    runs = [one, one.but(ptr=100), one.but(seed_init=1), one.but(seed_init=1, ptr=1000), one.but(alpha=2.0), one.but(pte=10)] 
    runs += [] if chi else [one.but(data_chi=value) for value in (0.0, 3.0)]
    together = same_data(runs)
    assert together.train[0] is together.train[4] and torch.equal(together.train[1], together.train[0][:100]) and torch.equal(together.train[2], together.train[3][:256])
    tests = 2 if dataset == "random_sign" else 1  # another teacher gives the test set other labels
    assert len(together.inputs) == 256 + 1000 + 512 * tests + 2 * (256 + 512) * (not chi)
    if not chi:  # a larger chi moves each example away from the boundary, on its side
        free, near, far = (together.inputs[together.train[place]] for place in (6, 0, 7))
        assert torch.equal(near[:, 1:], far[:, 1:]) and torch.equal(near[:, 0] > 0, far[:, 0] > 0) and (far[:, 0].abs() > near[:, 0].abs()).all() and (near[:, 0].abs() > free[:, 0].abs()).all()


def test_nothing_depends_on_how_much_is_drawn_at_once(monkeypatch):
    whole = examples(Setting(**PERCEPTRON))
    monkeypatch.setattr(sgd_regimes, "AT_ONCE", 100)
    assert torch.equal(examples(Setting(**PERCEPTRON)).inputs, whole.inputs)


def test_the_rows_are_the_same_for_ever():
    found = examples(Setting(**PERCEPTRON))
    assert found.inputs[found.train[0]][0, :4].tolist() == pytest.approx(FIRST["depleted"], rel=1e-6)


# ---- results of the earlier code


def leaf(value) -> np.ndarray:
    "What jax.tree_map(np.asarray, ...) makes of a number."
    return np.asarray(np.float32(value))


def part(loss: float, err: float, pred=None, label=None) -> dict:
    kept = dict(pred=None if pred is None else np.asarray(pred, "f4"), label=None if label is None else np.asarray(label, "f4"))
    return dict(loss=leaf(loss), aloss=leaf(2 * loss), err=leaf(err), mind=leaf(0), nd=np.asarray(0), kernel=None, delta_pred_abs=None, **kept)


def state(step: int, train: dict, test: dict | None = None) -> dict:
    return dict(t=leaf(0.5 * step), step=np.asarray(step), wall=np.asarray(1.5 * step), weights_norm=[leaf(3), leaf(1)], delta_weights_norm=[leaf(step), leaf(0)],
                drift=None, train=train, test=test or train, parameters=None, linear=None, train_test={"grad_l_overlap": None})  # fmt: skip


def content(*states: dict, finished: bool | None = True, dynamics: str = "sgd", **args) -> bytes:
    args = dict(dataset="sign", ptr=256, dynamics=dynamics, loss="hinge", alpha=2.0, seed_init=0, temp=0.5) | args
    git = {"log": "", "status": "fatal: not a git repository"}
    results = {"arch": {"params_shapes": [(16, 1)], "params_sizes": [16]}, dynamics: {"dynamics": list(states)}} if states else {}
    return pickle.dumps(args) + (pickle.dumps(results | {"finished": finished, "git": git, "args": args}) if finished is not None else b"")


START = state(0, part(0.5, 1.0))
GOOD, NOT_A_NUMBER = part(0.0, 0.25, [1, -1, 2, -3], [1, -1, 1, 1]), part(math.nan, 0.0, [math.nan, math.inf, 1, -1], [1, 1, 1, 1])


@pytest.mark.parametrize("file, status, row", [
    (content(START, state(9, GOOD)), "fitted", dict(t=4.5, step=9, train_loss=0.0, test_err=0.25, weight_change=1.5, err_trusted=True, states=2, wall=13.5)),
    (content(START, state(4, part(0.01, 0.1))), "unconverged", dict(train_err=pytest.approx(0.1), err_trusted=True, weight_change=1.0)),
    (content(START, state(4, NOT_A_NUMBER)), "diverged", dict(train_err=0.75, test_err=0.75, err_trusted=True)),
    (content(START, state(4, part(math.nan, 0.0))), "diverged", dict(train_err=0.0, err_trusted=False)),
    (content(START, state(4, part(math.inf, 0.5))), "diverged", dict(err_trusted=False)),
    (content(START, state(4, GOOD, part(math.inf, 0.5))), "fitted", dict(train_err=0.25, test_err=0.5, err_trusted=False)),
    (content(START, state(4, part(4e-10, 0)), loss="mse"), "fitted", {}),
    (content(START, state(4, part(6e-10, 0)), loss="mse"), "unconverged", {}),
    (content(START, state(4, part(4e-10, 0)), loss="quadhinge"), "unconverged", {}),
    (content(START, state(4, GOOD), finished=False), "unfinished", dict(train_loss=0.0)),
    (content(START, finished=False), "unfinished", dict(train_err=1.0, weight_change=0.0)),
    (content(finished=False), "unfinished", dict(reason="there are options and no states")),
    (content(finished=None), "unfinished", dict(reason="there are only options")),
    (content(START, state(9, GOOD), dynamics="gd_sde"), "fitted", dict(dynamics="gd_sde")),
    (content(START, state(9, GOOD))[:-40], "unreadable", dict(ptr=256, temp=0.5)),
    (content()[:30], "unreadable", {}), (b"", "unreadable", {}), (b"not a pickle", "unreadable", {}), (pickle.dumps([1, 2]), "unreadable", {}), (pickle.dumps(1) * 2, "unreadable", {}),
    (content(START, {"t": 1}), "unreadable", dict(dataset="sign")), (pickle.dumps({"dynamics": []}) + pickle.dumps({}), "unreadable", {}),
    (content(START, state(9, GOOD), status="x", t=3), "fitted", {"status_": "x", "t_": 3, "t": 4.5}),
    (pickle.dumps({"a": os.getcwd}), "unreadable", {}),
])  # fmt: skip
def test_what_became_of_an_old_run(tmp_path, file, status, row):
    (tmp_path / "000017.pk").write_bytes(file)
    table = import_old(tmp_path)
    assert len(table) == 1 and table.file[0] == "000017.pk" and table.status[0] == status, table.reason[0]
    assert {name: table[name][0] for name in row} == row
    assert len(table.reason[0].splitlines()) == (status == "unreadable" or bool(row.get("reason"))) and not isinstance(table.status[0], float)


def test_a_folder_of_grid(tmp_path):
    for number in range(5):
        (tmp_path / f"{number:06}.pk").write_bytes(content(START, state(9, GOOD), seed_init=number))
    (tmp_path / "info").write_bytes(pickle.dumps({"cmd": "python -m edm", "params": [("seed_init", list(range(5)))], "git": {"log": ""}}))
    (tmp_path / "stderr").write_text("2022-10-27 12:00 [x] oops\n")
    (tmp_path / "folder.pk").mkdir()
    table = import_old(tmp_path)
    assert table.seed_init.tolist() == list(range(5)) and table.attrs["grid"]["params"] == [("seed_init", [0, 1, 2, 3, 4])]
    assert table.columns[:3].tolist() == ["file", "status", "reason"] and table.err_trusted.all()
    (tmp_path / "info").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert "os.system" in import_old(tmp_path).attrs["grid"]


def test_folders_without_runs(tmp_path):
    refused(lambda: import_old(tmp_path / "none"), "no folder")
    table = import_old(tmp_path)
    assert len(table) == 0 and {"file", "status", "test_err"} <= set(table.columns) and table.attrs["grid"] is None


def test_reading_one_old_file(tmp_path):
    path = tmp_path / "test.pk"
    path.write_bytes(content(START, state(9, GOOD)))
    args, results = read_old(path)
    assert args["ptr"] == 256 and results["sgd"]["dynamics"][-1]["test"]["err"] == 0.25  # as the earlier README shows it
    path.write_bytes(content(finished=None))
    assert read_old(path)[1] == {}
    path.write_bytes(pickle.dumps([1]))
    refused(lambda: read_old(path), str(path), "options and results")
    with pytest.raises(OneLineError, match="cannot be read"):
        read_old(tmp_path / "none.pk")


# ---- the command

LINE = "--dataset mnist_parity --ptr 1024 --pte 2048 --arch mlp --act gelu --h 64 --L 8 --dynamics sgd --alpha 1 --dt 0.1 --bs 64 --max_wall 120".split()


@pytest.fixture
def called(monkeypatch) -> list:
    "What the command asks to be run."
    calls: list = []
    monkeypatch.setattr(sgd_regimes, "run_to_file", lambda setting, output, say: calls.append((setting, output)), raising=False)
    return calls


def invoke(*line) -> tuple[int, str]:
    "Exit status and what was said on stderr, at most one line."
    result = CliRunner().invoke(app, [str(word) for word in line])
    assert result.stdout == "" and len(result.stderr.splitlines()) <= 1, result.output
    return result.exit_code, result.stderr


def test_the_command_of_the_earlier_readme(called, tmp_path):
    assert invoke(*LINE, "--output", tmp_path / "test.pk") == (0, "")
    assert called == [(Setting(**README), tmp_path / "test.pk")] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("dataset", ["mnist_parity", "cifar_animal"])
@pytest.mark.parametrize("net", ["--arch mlp --act relu --L 5 --h 128", "--arch mnas --act relu --L 1 --h 64"])
@pytest.mark.parametrize("ptr", [1024, 16384])
def test_the_published_sweeps(called, tmp_path, dataset, net, ptr):
    line = f"{net} --dataset {dataset} --alpha 32768 --pte 32768 --loss hinge --dynamics sgd --bs 16 --ckpt_grad_stats 128 --max_wall 10000 --seed_init 4 --ptr {ptr} --temp 0.0001220703125"
    assert invoke(*line.split(), "--output", tmp_path / "a.pk") == (0, "")
    setting, _ = called[0]
    assert setting.dt == 2.0**-13 * setting.h * 16 and setting.seed_trainset == -6 and setting.ckpt_grad_stats == 128


def test_every_option_reaches_the_setting(called, tmp_path):
    options = dict(
        seed_init=3, seed_batch="seed_init", seed_trainset=-9, seed_testset=4, dataset="depleted_sign", ptr=100, pte=50, d=7, arch="mlp", act="tanh", L=2, h=5, loss="mse", alpha=0.5, dynamics="gd_sde",
        bs=10, temp=0.25, gf_tol=1e-6, gf_maxdt=0.5, regularizer="l1", regu_scale=0.1, data_chi=1.5, max_wall=9.5, max_step=1e6, mind_stop=2.0, ckpt_save_parameters=1, ckpt_grad_stats=-1,
        ckpt_drift=1, ckpt_drift_n0=3, ckpt_kernels=1, ckpt_save_pred=1, ckpt_modulo=2, ckpt_save_gradoverlap=1, ckpt_delta_pred=1, ckpt_save_mult=64, dtype="f64",
    )  # fmt: skip
    assert set(options) == set(Setting.model_fields) - {"dt"}
    assert invoke(*(word for name, value in options.items() for word in (f"--{name}", value)), "--output", tmp_path / "a.pk") == (0, "")
    assert called[0][0] == Setting(**options)
    assert all(value == getattr(called[0][0], name) for name, value in options.items() if name not in ("seed_batch", "ckpt_grad_stats"))


@pytest.mark.parametrize("words, status, parts", [
    (["--temp", "0.1"], 1, ["either dt or temp"]), (["--ptr", "68000"], 1, ["67,952"]), (["--act", "rellu"], 1, ["'relu'"]), (["--bs", "2000"], 1, ["ptr = 1024"]), (["--alpha", "nan"], 1, ["alpha = nan"]),
    (["--act_beta", "1"], 2, ["No such option", "--act_beta", "--help"]), (["--max-wall", "1"], 2, ["No such option"]), (["--h", "wide"], 2, ["--h"]), (["--h", "1.5"], 2, ["--h"]), (["--seed_init", "tim1"], 1, ["timeN"]),
    (["extra"], 2, ["extra"]), (["--alpha"], 2, ["--alpha"]), (["--output", "nowhere/test.pk"], 1, ["no folder 'nowhere'"]), (["--output", "."], 1, ["is a folder"]), (["--output", "x" * 300], 1, ["cannot be written", "File name too long"]),
    (["--output", "run.pk/x.pk"], 1, ["no folder 'run.pk'"]), (["--output", "there.pk"], 1, ["exists", "--overwrite"]), (["--output", ""], 1, ["is a folder"]),
])  # fmt: skip
def test_a_wrong_command_line_runs_nothing(called, tmp_path, monkeypatch, words, status, parts):
    monkeypatch.chdir(tmp_path)
    Path("there.pk").write_text("precious")
    found, said = invoke(*LINE, "--output", "run.pk", *words)
    assert found == status and said.startswith("Error: ") and all(part in said for part in parts), said
    assert not called and [path.name for path in tmp_path.iterdir()] == ["there.pk"] and Path("there.pk").read_text() == "precious"


@pytest.mark.parametrize("name", ["dataset", "ptr", "pte", "arch", "alpha", "dynamics", "output"])
def test_a_missing_option_is_named(called, name, tmp_path):
    line = [*LINE, "--output", str(tmp_path / "a.pk")]
    place = line.index(f"--{name}")
    status, said = invoke(*line[:place], *line[place + 2 :])
    assert status == 2 and f"Missing option '--{name}'" in said and not called


def test_overwrite(called, tmp_path):
    path = tmp_path / "test.pk"
    path.write_text("old")
    assert invoke(*LINE, "--output", path)[0] == 1 and not called
    assert invoke(*LINE, "--output", path, "--overwrite") == (0, "") and path.read_text() == "old" and len(called) == 1  # it is replaced by what writes the results
    assert [file.name for file in tmp_path.iterdir()] == ["test.pk"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(called, tmp_path):
    tmp_path.chmod(0o500)
    status, said = invoke(*LINE, "--output", tmp_path / "test.pk")
    assert status == 1 and "Permission denied" in said and not called


@pytest.mark.parametrize("error, status, said", [(KeyboardInterrupt(), 130, "stopped"), (RegimeError("two\nlines"), 1, "two lines"), (OSError(28, "No space left on device"), 1, "No space")])
def test_what_goes_wrong_in_a_run_is_one_line(monkeypatch, tmp_path, error, status, said):
    def run(setting, output, say):
        raise error

    monkeypatch.setattr(sgd_regimes, "run_to_file", run, raising=False)
    found, message = invoke(*LINE, "--output", tmp_path / "a.pk")
    assert found == status and said in message


def test_help_names_every_option():
    result = CliRunner().invoke(app, ["--help"], terminal_width=200)
    assert result.exit_code == 0 and all(f"--{name} " in result.stdout and field.description for name, field in Setting.model_fields.items())


def test_as_a_module(tmp_path):
    result = subprocess.run([sys.executable, "-m", "flatmin_nb.sgd_regimes", *LINE, "--temp", "1", "--output", "a.pk"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == "" and "either dt or temp" in result.stderr and len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())

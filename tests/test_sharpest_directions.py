"""What of Nudged-SGD is no story: kinds of nets and precisions, groups, schedules, states, divergence, and the notebook's runs. The mathematics is told there."""

import copy
import io
import itertools
import json
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import NOTEBOOKS, same, state
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from flatmin_nb.lab import models
from flatmin_nb.lab.data import load, scaled, write
from flatmin_nb.lab.errors import OneLineError
from flatmin_nb.lab.results import Run, load_weights
from flatmin_nb.lab.results import load as load_runs
from flatmin_nb.lab.train import Callback, Diverged, Regime, fit
from flatmin_nb.lab.watch import fresh_sample
from flatmin_nb.sharpest_directions import NudgedSGD, NudgeError

digits = scaled(load("digits", validation=0.2), centre=127.5, scale=127.5)
some = torch.Generator().manual_seed(0)
X, Y = torch.randn(48, 6, generator=some, dtype=torch.float64), torch.randint(3, (48,), generator=some)


def flat(net):
    return nn.utils.parameters_to_vector(net.parameters()).detach().clone()


def backward(net, optimizer, x=X, y=Y):
    optimizer.zero_grad()
    loss = cross_entropy(net(x), y)
    loss.backward()
    return loss


def nudged(net, sample=(X, Y), **options):
    return NudgedSGD(net.parameters(), net, cross_entropy, sample, **{"lr": 0.2, "gamma": 0.1, "k": 3, "every": 2, "tolerance": 1e-9} | options)


def trained(net, optimizer, steps=5, closure=False):
    "The weights after steps on all of the data, with the dropout of the step's number."
    net.train()
    for step in range(steps):
        torch.manual_seed(step)
        if closure:
            optimizer.step(lambda: backward(net, optimizer))
        else:
            backward(net, optimizer)
            optimizer.step()
    return flat(net)


# ---- against dense algebra, on every kind of net


class Tied(nn.Module):
    "Two layers that share a weight."

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Idle(nn.Module):
    "A layer that nothing goes through, and one that is frozen."

    def __init__(self):
        super().__init__()
        self.used, self.unused, self.frozen = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(6, 4).requires_grad_(False)

    def forward(self, x):
        return self.used(torch.tanh(self.frozen(x)))


NETS = {
    "plain": lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)),
    "tied": Tied,
    "idle": Idle,
    "batchnorm": lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)),
    "dropout": lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)),
    "images": lambda: nn.Sequential(nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3)).to(memory_format=torch.channels_last),
}


def net_of(name="plain", seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NETS[name]().double()


def dense_directions(net, k):
    "The top eigenvectors [D, k] of the Hessian over all that is trained, without dropout and with running statistics: every second derivative, and LAPACK."
    calm = copy.deepcopy(net).eval()
    free = {name: p.detach() for name, p in calm.named_parameters() if p.requires_grad}

    def loss(w):
        parts = w.split([p.numel() for p in free.values()])
        return cross_entropy(torch.func.functional_call(calm, {name: part.view(p.shape) for (name, p), part in zip(free.items(), parts)}, (X,)), Y)

    hessian = torch.autograd.functional.hessian(loss, torch.cat([p.reshape(-1) for p in free.values()]))
    return torch.linalg.eigh(hessian).eigenvectors[:, -k:]


def by_dense_algebra(net, *, lr, gamma, k=3, every=2, outside=1.0, momentum=0.0, weight_decay=0.0, steps=5, closure=False):
    "What `trained` comes to, told slowly; `lr` and `gamma` by parameter. With a closure the forward pass, which moves running statistics, comes after the refresh."
    free = [p for p in net.parameters() if p.requires_grad]
    spread = lambda value: torch.cat([torch.full((p.numel(),), value(p) if callable(value) else value, dtype=torch.float64) for p in free])
    rates, factors, velocity = spread(lr), spread(gamma), torch.zeros(sum(p.numel() for p in free), dtype=torch.float64)
    net.train()
    for step in range(steps):
        if closure and step % every == 0:
            V = dense_directions(net, k)
        torch.manual_seed(step)
        slopes = torch.autograd.grad(cross_entropy(net(X), Y), free, allow_unused=True)
        if not closure and step % every == 0:
            V = dense_directions(net, k)
        w = torch.cat([p.detach().reshape(-1) for p in free])
        slope = torch.cat([torch.zeros(p.numel()) if s is None else (s + weight_decay * p.detach()).reshape(-1) for s, p in zip(slopes, free)])
        velocity = momentum * velocity + slope
        inside = V @ (V.T @ (rates * velocity))
        w = w - outside * (rates * velocity) - (factors - outside) * inside
        with torch.no_grad():
            for p, part in zip(free, w.split([p.numel() for p in free])):
                p.copy_(part.view(p.shape))
    return flat(net)


@pytest.mark.parametrize("closure", [False, True], ids=["backward and step", "closure"])
@pytest.mark.parametrize("name", NETS)
def test_a_step_is_that_of_dense_algebra(name, closure):
    net = net_of(name)
    ours = trained(net, nudged(net, momentum=0.9), closure=closure)
    torch.testing.assert_close(ours, by_dense_algebra(net_of(name), lr=0.2, gamma=0.1, momentum=0.9, closure=closure), atol=1e-7, rtol=0)
    plain = net_of(name)
    assert (ours - trained(plain, torch.optim.SGD(plain.parameters(), lr=0.2, momentum=0.9))).abs().max() > 1e-3  # so the nudge is seen


@pytest.mark.parametrize("options", [dict(gamma=0.0), dict(gamma=1.0, outside=0.0), dict(gamma=5.0), dict(gamma=0.3, outside=0.7, weight_decay=0.1)], ids=str)
def test_factors_inside_and_outside(options):
    net = net_of()
    ours = trained(net, nudged(net, **options))
    torch.testing.assert_close(ours, by_dense_algebra(net_of(), **{"lr": 0.2} | options), atol=1e-7, rtol=0)


@pytest.mark.parametrize("gamma", [0.6, 1.0])
def test_groups_have_their_own_rate_and_factor(gamma):
    net, other = net_of("tied"), net_of("tied")
    groups = [dict(params=net.last.parameters(), lr=0.5, gamma=gamma), dict(params=[*net.first.parameters(), net.second.bias])]
    ours = trained(net, NudgedSGD(groups, net, cross_entropy, (X, Y), lr=0.1, gamma=0.0, k=3, every=2, tolerance=1e-9))
    last = set(other.last.parameters())
    expected = by_dense_algebra(other, lr=lambda p: 0.5 if p in last else 0.1, gamma=lambda p: gamma if p in last else 0.0)
    torch.testing.assert_close(ours, expected, atol=1e-7, rtol=0)


def test_a_net_in_data_parallel_is_the_net():
    net, other = net_of(), net_of()
    wrapped = NudgedSGD(net.parameters(), nn.DataParallel(net), cross_entropy, (X, Y), lr=0.2, gamma=0.1, k=3, every=2, tolerance=1e-9)
    assert torch.equal(trained(net, wrapped), trained(other, nudged(other)))


def test_a_late_group_takes_part():
    net = net_of()
    optimizer = NudgedSGD(net[0].parameters(), net, cross_entropy, (X, Y), lr=0.2, gamma=0.0, k=3, every=100, tolerance=1e-9)
    before = [p.detach().clone() for p in net[2].parameters()]
    trained(net, optimizer, 3)
    assert all(torch.equal(a, b) for a, b in zip(before, net[2].parameters()))
    optimizer.add_param_group(dict(params=net[2].parameters()))
    twin = copy.deepcopy(net)
    backward(net, optimizer)
    optimizer.step()
    torch.testing.assert_close(flat(net), by_dense_algebra(twin, lr=0.2, gamma=0.0, steps=1), atol=1e-7, rtol=0)


def test_what_is_frozen_on_the_way_leaves_the_hessian_and_comes_back():
    net = net_of()
    optimizer = nudged(net, every=100)
    trained(net, optimizer, 3)
    for free in (False, True):
        net[0].weight.requires_grad_(free)
        twin, before = copy.deepcopy(net), net[0].weight.detach().clone()
        backward(net, optimizer)
        optimizer.step()
        torch.testing.assert_close(flat(net), by_dense_algebra(twin, lr=0.2, gamma=0.1, steps=1), atol=1e-7, rtol=0)
        assert torch.equal(net[0].weight, before) != free


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(gamma=-1), "gamma must be a number"),
        (dict(gamma="small"), "gamma must be a number"),
        (dict(outside=float("nan")), "outside must be a number"),
        (dict(lr=-0.1), "lr must be a number"),
        (dict(momentum=1.0), "momentum must be a number"),
        (dict(nesterov=True), "needs momentum"),
    ],
    ids=str,
)
def test_a_group_with_an_option_that_means_nothing_is_refused(options, words):
    net = net_of()
    good = NudgedSGD(net[0].parameters(), net, cross_entropy, (X, Y))
    for make in (
        lambda: NudgedSGD([dict(params=net.parameters()) | options], net, cross_entropy, (X, Y)),
        lambda: good.add_param_group(dict(params=net[2].parameters()) | options),
    ):
        with pytest.raises(NudgeError, match=words) as refusal:
            make()
        assert len(str(refusal.value).splitlines()) == 1
    good.add_param_group(dict(params=net[2].parameters()))  # what was refused has left no trace
    assert len(good.param_groups) == 2


def test_what_cannot_be_trained_is_refused():
    net, frozen = net_of(), net_of().requires_grad_(False)
    for make, words in (
        (lambda: NudgedSGD(net.parameters(), net.parameters(), cross_entropy, (X, Y)), "must be the net itself"),
        (lambda: NudgedSGD(net_of().parameters(), net, cross_entropy, (X, Y)), "a parameter that the model does not have"),
        (lambda: NudgedSGD(frozen.parameters(), frozen, cross_entropy, (X, Y)), "requires a gradient"),
        (lambda: nudged(net, k=44), "at most the number of weights, 43"),
        (lambda: nudged(net, batchnorm="runing"), "did you mean 'running'"),
        (lambda: NudgedSGD(net.parameters(), net, (X, Y), cross_entropy), "loss must be a function"),
    ):
        with pytest.raises(NudgeError, match=words):
            make()


# ---- closed forms

LAMBDAS = np.array([9.0, 6.0, 4.0, 2.5, 1.0, 0.3])
AXES = torch.linalg.qr(torch.randn(6, 6, generator=some, dtype=torch.float64)).Q


def quadratic(dtype=torch.float64):
    "A linear model without a bias whose mean squared error is half the sum of lambda_i z_i^2, and its data; z are its coordinates along AXES."
    inputs = torch.diag(torch.from_numpy(LAMBDAS * 6 / 2).sqrt()) @ AXES.T  # mean over 6 examples, and mse has no half
    net = nn.Linear(6, 1, bias=False).double()
    with torch.no_grad():
        net.weight.copy_((AXES @ torch.ones(6, dtype=torch.float64))[None])
    return net.to(dtype), inputs.to(dtype), torch.zeros(6, 1, dtype=dtype)


def heavy_ball(lam, lr, inside, momentum, nesterov, mode):
    "One step in (z, velocity) along an eigenvector, as a matrix; `inside` is the factor there."
    of_gradient, of_velocity = {"velocity": (1, inside), "gradient": (inside, 1), "both": (inside, inside)}[mode]
    velocity = np.array([of_gradient * lam, momentum])
    moved = velocity if not nesterov else np.array([of_gradient * lam, 0]) + momentum * velocity
    return np.array([np.array([1.0, 0.0]) - lr * of_velocity * moved, velocity])


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.8, False), (0.8, True)], ids=["plain", "momentum", "nesterov"])
@pytest.mark.parametrize("mode", ["velocity", "gradient", "both"])
def test_each_direction_of_a_quadratic_decays_by_its_own_factor(mode, momentum, nesterov):
    "Also where gamma changes on the way, by which the modes differ once there is momentum."
    net, x, y = quadratic()
    optimizer = NudgedSGD(net.parameters(), net, mse_loss, (x, y), lr=0.05, gamma=0.1, k=2, every=3, momentum=momentum, nesterov=nesterov, mode=mode, tolerance=1e-9)
    expected = np.ones((6, 2)) * [1, 0]
    for step in range(10):
        optimizer.param_groups[0]["gamma"] = gamma = 0.1 if step < 5 else 3.0
        optimizer.zero_grad()
        mse_loss(net(x), y).backward()
        optimizer.step()
        expected = np.array([heavy_ball(lam, 0.05, gamma if i < 2 else 1.0, momentum, nesterov, mode) @ z for i, (lam, z) in enumerate(zip(LAMBDAS, expected))])
    np.testing.assert_allclose((AXES.T @ net.weight[0].detach()).numpy(), expected[:, 0], atol=1e-9)


@pytest.mark.parametrize("refresh", ["lanczos", "track"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5), (torch.bfloat16, 0.04)], ids=str)
def test_precisions(dtype, tolerance, refresh):
    net, x, y = quadratic(dtype)
    optimizer = NudgedSGD(net.parameters(), net, mse_loss, (x, y), lr=0.1, gamma=0.0, k=2, every=1, refresh=refresh, tolerance=max(tolerance, 1e-6))
    for _ in range(2):
        optimizer.zero_grad()
        mse_loss(net(x), y).backward()
        optimizer.step()
    expected = np.where(np.arange(6) < 2, 1.0, (1 - 0.1 * LAMBDAS) ** 2)
    np.testing.assert_allclose((AXES.T @ net.weight[0].detach().double()).numpy(), expected, atol=tolerance)
    assert optimizer.V.dtype == dtype and not optimizer.V.requires_grad


# ---- SGD at gamma = 1, and what a refresh leaves alone


@pytest.mark.parametrize("options", [dict(), dict(weight_decay=0.1), dict(momentum=0.9), dict(momentum=0.9, nesterov=True, weight_decay=0.1)], ids=str)
@pytest.mark.parametrize("name", NETS)
def test_gamma_1_is_sgd_bit_for_bit(name, options):
    "Of parameters without a gradient too, and of such as no longer get one."
    ours, theirs = net_of(name).float(), net_of(name).float()
    pair = [(ours, nudged(ours, gamma=1, lr=0.1, **options)), (theirs, torch.optim.SGD(theirs.parameters(), lr=0.1, **options))]
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10) for _, optimizer in pair]
    for step in range(6):
        for (net, optimizer), schedule in zip(pair, schedules):
            torch.manual_seed(step)
            backward(net, optimizer, X.float())
            if step == 4:
                next(p for p in net.parameters() if p.requires_grad).grad = None
            optimizer.step()
            schedule.step()
        assert torch.equal(flat(ours), flat(theirs)), step
    assert (pair[0][1].products, pair[0][1].examples_spent, pair[0][1].V) == (0, 0, None)


def test_what_has_no_gradient_stays_where_it_is():
    "Though the directions have a part there."
    net = net_of()
    optimizer = nudged(net, momentum=0.9)
    trained(net, optimizer, 1)
    backward(net, optimizer)
    net[0].weight.grad = None
    before, others = net[0].weight.detach().clone(), net[2].weight.detach().clone()
    optimizer.step()
    assert torch.equal(net[0].weight, before) and not torch.equal(net[2].weight, others)


@pytest.mark.parametrize("batchnorm", ["running", "frozen", "batch"])
@pytest.mark.parametrize("options", [dict(refresh="lanczos"), dict(refresh="track"), dict(directions="random"), dict(directions="norm")], ids=str)
def test_a_refresh_leaves_training_alone(options, batchnorm):
    net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 3)).double()
    net[3].eval()
    net[0].bias.requires_grad_(False)
    optimizer = nudged(net, momentum=0.9, batchnorm=batchnorm, **options)
    for _ in range(2):
        backward(net, optimizer)
        before = [*state(net), *(value["momentum_buffer"].clone() for value in optimizer.state.values())]
        data = X.clone(), Y.clone()
        optimizer.refresh()
        assert same(before, [*state(net), *(value["momentum_buffer"] for value in optimizer.state.values())])
        assert torch.equal(X, data[0]) and torch.equal(Y, data[1])
        optimizer.step()
    assert optimizer.refreshes == 2  # those that were asked for serve the steps


def test_a_refresh_is_of_the_weights_before_the_closure_and_of_its_own_sample():
    net, seen = net_of(), []

    def sample(n):
        seen.append((n, flat(net)))
        return X[: 10 + n], Y[: 10 + n]

    optimizer = nudged(net, sample=sample, every=3)
    before = [flat(net)] + [trained(net, optimizer, 1) for _ in range(7)]
    assert [n for n, _ in seen] == [0, 1, 2] and all(torch.equal(w, before[3 * n]) for n, w in seen)
    assert optimizer.products > 0 and (optimizer.examples_spent - (10 + 11 + 12)) % 2 == 0


def test_a_sample_may_draw_random_numbers_of_its_own():
    "Those of training, dropout's say, stay what they were."

    def sample(n):
        chosen = torch.randperm(48)[:20]
        return X[chosen], Y[chosen]

    net = net_of("dropout")
    optimizer = nudged(net, sample=sample)
    before = torch.get_rng_state()
    optimizer.refresh()
    assert torch.equal(torch.get_rng_state(), before)


def test_under_autocast_the_directions_and_the_step_keep_their_precision():
    net, other = (net_of().float() for _ in range(2))
    ours, theirs = (nudged(each, sample=(X.float(), Y), gamma=0.0, tolerance=1e-5) for each in (net, other))
    for each, optimizer in ((net, ours), (other, theirs)):
        backward(each, optimizer, X.float())
    with torch.autocast("cpu", torch.bfloat16):
        ours.step()
    theirs.step()
    assert torch.equal(flat(net), flat(other))


# ---- schedules


def test_after_an_idle_spell_old_directions_are_not_used():
    net, looked = net_of(), []
    optimizer = nudged(net, sample=lambda n: looked.append(optimizer.steps) or (X, Y), every=4)
    for step in range(16):
        optimizer.param_groups[0]["gamma"] = 1.0 if 2 <= step < 7 else 0.1
        backward(net, optimizer)
        optimizer.step()
    assert looked == [0, 7, 11, 15]


def test_directions_that_are_looked_up_by_hand_alone():
    net = net_of()
    optimizer = nudged(net, every=None)
    backward(net, optimizer)
    with pytest.raises(NudgeError, match=r"call refresh\(\) before the step"):
        optimizer.step()
    optimizer.refresh()
    trained(net, optimizer, 5)
    assert (optimizer.refreshes, optimizer.steps) == (1, 5)


def test_a_regime_begins_and_ends_the_nudge():
    "SGD until then, and nothing is looked at; the learning rate has a schedule of its own."

    def run(make, settings, epochs):
        net = models.build("mlp", seed=0, hidden=(8,))
        optimizer = make(net)
        return fit(net, optimizer, digits, epochs=epochs, batch_size=128, schedule=Regime(optimizer, settings), splits=(), progress=False), flat(net), optimizer

    plain = lambda net: torch.optim.SGD(net.parameters(), lr=0.1)
    ours = lambda net: NudgedSGD(net.parameters(), net, cross_entropy, (digits.train_images[:100], digits.train_labels[:100]), gamma=0.1, k=2, every=4)
    rates = {0: dict(lr=0.2), 1: dict(lr=0.05)}
    _, weights, optimizer = run(ours, {0: dict(lr=0.2, gamma=1), 1: dict(lr=0.05), 2: dict(gamma=0.1)}, 2)
    assert torch.equal(weights, run(plain, rates, 2)[1]) and optimizer.refreshes == 0
    result, weights, optimizer = run(ours, {0: dict(lr=0.2, gamma=1), 1: dict(lr=0.05), 2: dict(gamma=0.1)}, 3)
    assert not torch.equal(weights, run(plain, rates, 3)[1]) and optimizer.refreshes > 0
    spent = 100 * (optimizer.refreshes + 2 * optimizer.products)
    assert optimizer.examples_spent == spent and result.gradient_evaluations == pytest.approx(result.steps + spent / 128, rel=1e-12)


@pytest.mark.parametrize(
    "make",
    [partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.5), partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: 1 / (1 + step))],
    ids=["StepLR", "LambdaLR"],
)
def test_a_schedule_of_torch_sets_the_rate(make):
    net, x, y = quadratic()
    optimizer = NudgedSGD(net.parameters(), net, mse_loss, (x, y), lr=0.1, gamma=0.2, k=2, every=1, tolerance=1e-9)
    schedule, expected = make(optimizer), np.ones(6)
    for step in range(5):
        rate = 0.1 * (0.5 ** (step // 2) if isinstance(schedule, torch.optim.lr_scheduler.StepLR) else 1 / (1 + step))
        expected = expected * (1 - rate * np.where(np.arange(6) < 2, 0.2, 1.0) * LAMBDAS)
        optimizer.zero_grad()
        mse_loss(net(x), y).backward()
        optimizer.step()
        schedule.step()
    np.testing.assert_allclose((AXES.T @ net.weight[0].detach()).numpy(), expected, atol=1e-9)


# ---- states and copies

OPTIONS = {
    "velocity": dict(momentum=0.9),
    "both": dict(momentum=0.9, nesterov=True, mode="both"),
    "track": dict(refresh="track"),
    "random": dict(directions="random"),
    "norm": dict(directions="norm", momentum=0.9),
}


def on_batches(net, optimizer, first, last):
    "The weights after steps on these batches of 12."
    for number in range(first, last):
        start = 12 * (number % 4)
        backward(net, optimizer, X[start : start + 12], Y[start : start + 12])
        optimizer.step()
    return flat(net)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_state_is_gone_on_with_bit_for_bit(name):
    "Through a file without pickles, between two refreshes and right before one."
    make = partial(nudged, every=4, **OPTIONS[name])
    whole = net_of()
    expected = on_batches(whole, make(whole), 0, 10)
    for stop in (6, 8):
        net, file = net_of(), io.BytesIO()
        optimizer = make(net)
        on_batches(net, optimizer, 0, stop)
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        again = make(net)
        again.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(on_batches(net, again, stop, 10), expected), stop
        assert (again.steps, again.refreshes, again.products) == (10, 3, optimizer.products if name == "random" else again.products)
    plain = net_of()
    assert not torch.equal(on_batches(plain, nudged(plain, **OPTIONS[name] | dict(gamma=1)), 0, 10), expected)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_copy_of_net_and_optimizer_goes_its_own_way(name):
    net = net_of()
    optimizer = nudged(net, **OPTIONS[name])
    torch.optim.lr_scheduler.StepLR(optimizer, 100)
    on_batches(net, optimizer, 0, 3)
    for twin, twins in (copy.deepcopy((net, optimizer)), pickle.loads(pickle.dumps((net, optimizer)))):
        before = flat(net)
        assert torch.equal(flat(twin), before)
        after = on_batches(twin, twins, 3, 6)
        assert torch.equal(flat(net), before) and not torch.equal(after, before)
    assert torch.equal(on_batches(net, optimizer, 3, 6), after)


def test_a_state_of_another_optimizer_is_refused_and_nothing_is_changed():
    net, other = net_of(), net_of()
    optimizer, more, control = nudged(net), nudged(other, k=5), nudged(other, directions="random")
    on_batches(net, optimizer, 0, 3)
    on_batches(other, more, 0, 3)
    on_batches(other, control, 0, 3)
    before = copy.deepcopy(optimizer.state_dict())
    for wrong, words in ((torch.optim.SGD(net.parameters(), lr=1.0).state_dict(), "not the state of NudgedSGD"), (more.state_dict(), "of another optimizer"), (control.state_dict(), "of another optimizer")):
        with pytest.raises(NudgeError, match=words) as refusal:
            optimizer.load_state_dict(wrong)
        assert len(str(refusal.value).splitlines()) == 1
    assert optimizer.steps == 3 and torch.equal(optimizer.V, before["nudge"]["V"])


# ---- in the loop of the lab, killed and resumed

LOOPS = {"gamma = 1": dict(gamma=1.0), "velocity": dict(), "track": dict(refresh="track"), "random": dict(directions="random")}
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch._dynamo", "sklearn.datasets", "flatmin_nb.lab.watch"])
LAST_SAVED, LAST_STEP = 10, 12  # before a kill; refreshes are at the steps 0, 7, 14, so the directions of step 7 must have been kept


class Death(Callback):
    "SIGKILL to oneself, in a run that is to be killed."

    def __init__(self, comes):
        self.comes = comes

    def after_step(self, loop):
        if self.comes and loop.step == LAST_STEP:
            os.kill(os.getpid(), signal.SIGKILL)


def in_a_loop(folder, name, dies=False):
    "Two epochs of 8 steps, with dropout, momentum and a schedule, by an optimizer of LOOPS or by that of torch."
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 10))
    if name == "torch":
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    else:
        sample = fresh_sample(digits.train_images, digits.train_labels, 64)
        optimizer = NudgedSGD(net.parameters(), net, cross_entropy, sample, **dict(lr=0.1, gamma=0.1, momentum=0.9, k=2, every=7) | LOOPS[name])
    run = Run(folder, {"name": name})
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    result = fit(net, optimizer, digits, epochs=2, seed=3, schedule=schedule, callbacks=[Death(dies)], run=run, save_every=0, save_every_steps=LAST_SAVED, progress=False)
    run.finish(net, result.history)


def all_in_loops(folder):
    "Each without being killed."
    for name in ("torch", *LOOPS):
        in_a_loop(Path(folder, "whole", name), name)


def in_a_process(function, *arguments):
    "Its exit code."
    process = PROCESSES.Process(target=function, args=arguments)
    process.start()
    process.join(120)
    return process.exitcode


def outcome(folder):
    "What must not depend on kills."
    return pd.read_csv(folder / "history.csv").drop(columns="seconds"), (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loops")
    assert in_a_process(all_in_loops, str(folder)) == 0
    return folder / "whole"


@pytest.mark.parametrize("name", LOOPS)
def test_killed_between_two_refreshes_and_resumed(name, whole, tmp_path):
    "The same bits at the end; and SGD's at gamma = 1, its bill too."
    assert in_a_process(in_a_loop, tmp_path, name, True) == -signal.SIGKILL
    assert load_runs(tmp_path)["status"].tolist() == ["running"]
    assert in_a_process(in_a_loop, tmp_path, name) == 0
    (history, weights), (expected, expected_weights), (plain, plain_weights) = outcome(tmp_path), outcome(whole / name), outcome(whole / "torch")
    pd.testing.assert_frame_equal(history, expected, check_exact=True)
    assert weights == expected_weights and len(load_runs(tmp_path)) == 1 and load_runs(tmp_path)["resumed"].tolist() == [1]
    assert (weights == plain_weights) == history.equals(plain) == (name == "gamma = 1")


@pytest.mark.parametrize("every", [1, 1000], ids=["named at a refresh", "named at a step"])
def test_divergence_is_recorded(tmp_path, every):
    net = models.build("mlp", seed=0, hidden=(8,))
    optimizer = NudgedSGD(net.parameters(), net, cross_entropy, (digits.train_images[:50], digits.train_labels[:50]), lr=1e38, gamma=0.1, k=1, every=every)
    with pytest.raises(Diverged, match="the sample for the Hessian.* is not finite at step" if every == 1 else "is not finite at step") as trouble:
        fit(net, optimizer, digits, epochs=1, run=Run(tmp_path, {}), progress=False)
    record = json.loads((tmp_path / "run.json").read_text())
    assert (record["status"], record["summary"]["diverged_at_step"]) == ("diverged", trouble.value.step) and record["summary"]["reason"] == str(trouble.value)
    assert len(str(trouble.value).splitlines()) == 1 and not (tmp_path / "model.safetensors").exists()


def test_second_derivatives_too_large_for_the_precision_are_a_divergence():
    net = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    with torch.no_grad():
        net[2].weight.fill_(1e18)  # its square, in the loss, is a number of float32; the Hessian has no finite norm there
    optimizer = NudgedSGD(net.parameters(), net, mse_loss, (X.float(), torch.zeros(48, 3)), k=2)
    with pytest.raises(Diverged) as trouble:
        optimizer.step()
    assert len(str(trouble.value).splitlines()) == 1


# ---- the notebook: its cells in this process, without figures, the method's tests and the opening


@cache
def cells():
    "The code, by section."
    found, section = [], ""
    for cell in json.loads((NOTEBOOKS / "04_sharpest_directions.ipynb").read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            section = source[3:].splitlines()[0] if source.startswith("## ") else section
        elif section in ("Parameters", "Data and net", "Training") or "| export" in source or re.match(r"(#.*\n)*(import|from) ", source):
            found.append((compile(source, section, "exec"), source.startswith("experiment: str"), source.startswith("histories, summaries")))
    return found


@pytest.fixture
def page(tmp_path, monkeypatch, capsys):
    "The namespace after training (or right before), with parameters as papermill gives them; runs are kept in tmp_path/out."
    monkeypatch.chdir(tmp_path)

    def call(train=True, **parameters):
        parameters = dict(out="out") | parameters
        namespace = {"In": ["# Parameters\n" + "\n".join(f"{name} = {value!r}" for name, value in parameters.items())], "__name__": "page"}
        for code, holds_parameters, trains in cells():
            if train or not trains:
                exec(code, namespace)
            namespace |= parameters if holds_parameters else {}
        return namespace

    return call


def records():
    return {str(path.parent.relative_to("out")): json.loads(path.read_text()) for path in Path("out").rglob("run.json")}


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        (dict(gama=1), "no parameter 'gama'; did you mean 'gamma'?"),
        (dict(gamma=float("nan")), "parameter 'gamma' = nan"),
        (dict(k=0), "parameter 'k' = 0"),
        (dict(every=-1), "parameter 'every' = -1"),
        (dict(sample=0), "parameter 'sample' = 0"),
        (dict(mode="velocty"), "'velocity', 'gradient' or 'both'"),
        (dict(directions="flattest"), "'sharpest', 'random' or 'norm'"),
        (dict(refresh="lancsoz"), "'lanczos' or 'track'"),
        (dict(experiment="digit"), "'cifar10_small'"),
        (dict(lr_schedule="3:1e"), "parameter 'lr_schedule' = '3:1e'"),
        (dict(lr_schedule="1:0.1", plateau="val_loss"), "lr_schedule sets the learning rate too; give one of the two"),
        (dict(runs="lr_schedule=1:0.1+plateau=val_loss"), "lr_schedule sets the learning rate too; give one of the two"),
        (dict(runs="gama=0.1"), "did you mean 'gamma'?"),
        (dict(runs="nudges"), "did you mean 'nudge'?"),
        (dict(runs="gamma=0.1+k=2.5"), "'k=2.5' needs a value of type int"),
        (dict(runs="normalised=yes"), "needs a value of type bool"),
        (dict(runs="gamma=-1"), "has gamma = -1.0"),
        (dict(runs="gamma=0.1+seeds=1"), "'seeds'"),
        (dict(runs="mode=velocty"), "'velocity', 'gradient' or 'both'"),
        (dict(runs="gamma=0.1+k=4000"), "k must be at most the number of weights, 3466"),
        (dict(runs="sgd", nesterov=True), "needs momentum"),
        (dict(runs="sgd", warm_start="nowhere.safetensors"), "'nowhere.safetensors'"),
    ],
    ids=str,
)
def test_a_wrong_parameter_of_the_notebook(page, parameters, words):
    with pytest.raises(OneLineError) as refusal:
        page(**parameters)
    assert words in str(refusal.value) and len(str(refusal.value).splitlines()) == 1
    assert not Path("out").exists()


def test_runs_of_the_notebook_are_read_back_and_replaced(page):
    "gamma=1 is the baseline by another name. What is read back is what was told at first; what is replaced is the same again."
    first = page(runs="sgd gamma=1 gamma=0.1", seeds="0 1", epochs=1)
    kept = {name: (json.dumps(record), Path("out", name, "run.json").stat().st_mtime_ns) for name, record in records().items()}
    assert sorted(kept) == sorted(f"{word}/{seed}" for word in ("sgd", "gamma=1", "gamma=0.1") for seed in (0, 1))
    again = page(runs="sgd gamma=1 gamma=0.1", seeds="0 1", epochs=1)
    assert {name: (json.dumps(record), Path("out", name, "run.json").stat().st_mtime_ns) for name, record in records().items()} == kept
    pd.testing.assert_frame_equal(first["summaries"], again["summaries"])
    for name in ("histories", "overshoots"):
        pd.testing.assert_frame_equal(first[name], again[name], check_exact=False, rtol=1e-12)
    replaced = page(runs="sgd gamma=0.1", seeds="0 1", epochs=1, overwrite=True)
    weights = {name: Path("out", name, "model.safetensors").read_bytes() for name in kept}
    told = lambda table: table.drop(columns=[name for name in table if "seconds" in name])
    for word in ("sgd", "gamma=0.1"):
        old, new = (told(table[table["method"] == word]).reset_index(drop=True) for table in (first["summaries"], replaced["summaries"]))
        pd.testing.assert_frame_equal(old, new)
        assert all(records()[f"{word}/{seed}"]["started"] >= json.loads(kept[f"{word}/{seed}"][0])["ended"] for seed in (0, 1))
    assert all(weights[f"sgd/{seed}"] == weights[f"gamma=1/{seed}"] != weights[f"gamma=0.1/{seed}"] for seed in (0, 1)) and weights["sgd/0"] != weights["sgd/1"]
    spent = {name: record["summary"]["gradient_evaluations"] for name, record in records().items()}
    assert spent["sgd/0"] == spent["gamma=1/0"] == 16 < spent["gamma=0.1/0"]  # 1038 images in batches of 64
    with pytest.raises(OneLineError, match="finished, with lr = 0.3, not 0.1; give overwrite"):
        page(runs="sgd", epochs=1, lr=0.1)


def test_a_run_that_diverges_is_recorded_and_the_others_go_on(page):
    first = page(runs="lr=1e30 sgd", epochs=1)
    assert first["summaries"]["method"].tolist() == ["sgd"]
    record = records()["lr=1e30/0"]
    assert record["status"] == "diverged" and record["summary"]["diverged_at_step"] >= 1 and records()["sgd/0"]["status"] == "finished"
    assert page(runs="lr=1e30 sgd", epochs=1)["summaries"]["method"].tolist() == ["sgd"] and records()["lr=1e30/0"] == record
    with pytest.raises(OneLineError, match="every run diverged"):
        page(runs="lr=1e30", epochs=1)


def test_a_warm_start_goes_on_from_the_weights_of_a_run(page):
    cold = page(runs="sgd", epochs=1)["histories"]
    weights = Path("out/sgd/0/model.safetensors").resolve()
    warm = page(runs="gamma=0.1", epochs=1, warm_start=str(weights), out="warm")["histories"]
    assert warm["val_loss"].iloc[0] == pytest.approx(cold["val_loss"].iloc[-1], rel=1e-6) and warm["distance"].iloc[0] == 0
    assert cold["val_loss"].iloc[0] != pytest.approx(warm["val_loss"].iloc[0], rel=1e-3)
    with pytest.raises(OneLineError, match="weights of another net"):
        page(runs="normalised=True", epochs=1, warm_start=str(weights), out="other")
    assert not Path("other").exists()


@pytest.mark.parametrize("parameters", [dict(plateau="val_los"), dict(stop="val_err")], ids=str)
def test_a_monitor_that_no_row_has(page, parameters):
    "It can be mended by the right name in the same folder."
    (name, value), = parameters.items()
    with pytest.raises(OneLineError, match=f"no column of the history '{value}'; did you mean"):
        page(runs="sgd", epochs=2, **parameters)
    assert records()["sgd/0"]["status"] == "running"
    page(runs="sgd", epochs=2, **{name: {"val_los": "val_loss", "val_err": "val_error"}[value]})
    assert records()["sgd/0"]["status"] == "finished"


def test_plateaus_stops_schedules_and_snapshots_are_as_asked_for(page):
    rows = page(runs="plateau=lambda_2+plateau_patience=0+gamma=0.1 stop=lambda_1+stop_patience=1 lr_schedule=2:0.01 snapshots=2", epochs=4)["histories"]
    by = dict(list(rows.groupby("method")))
    rates = by["lr_schedule=2:0.01"]["lr"].tolist()
    assert rates == [0.3, 0.3, 0.3, 0.01, 0.01]
    plateau, stop = by["plateau=lambda_2+plateau_patience=0+gamma=0.1"], by["stop=lambda_1+stop_patience=1"]
    values, rate, best, expected = plateau["lambda_2"].tolist(), 0.3, np.inf, []
    for value in values:  # the rate in a row is that of the steps before it
        expected.append(rate)
        rate, best = (rate, value) if value < best - 1e-4 else (rate * 0.1, best)
    np.testing.assert_allclose(plateau["lr"], expected)
    assert len(set(expected)) > 1
    assert stop["lambda_1"].iloc[-1] >= stop["lambda_1"].iloc[:-1].min() and len(stop) < 5 and records()["stop=lambda_1+stop_patience=1/0"]["summary"]["stopped"]
    assert sorted(path.name for path in Path("out/snapshots=2/0").glob("epoch-*")) == ["epoch-0000.safetensors", "epoch-0002.safetensors", "epoch-0004.safetensors"]
    net = models.build("mlp", seed=0, hidden=(32, 32))
    before = flat(net)
    load_weights(net, Path("out/snapshots=2/0/epoch-0000.safetensors"))
    assert torch.equal(flat(net), before)


# ---- the presets

SHAPES = {"cifar10": (3, 32, 32, 10), "cifar100": (3, 32, 32, 100), "fashion_mnist": (1, 28, 28, 10)}


@pytest.fixture
def noise(tmp_path, monkeypatch):
    "The image sets of the presets, in the real form, with 96 images of noise; FLATMIN_DATA says where."
    random = torch.Generator().manual_seed(0)
    for name, (*shape, classes) in SHAPES.items():
        drawn = itertools.product(("train", "test"), (("images", (96, *shape), 256), ("labels", (96,), classes)))
        write(tmp_path / f"{name}.safetensors", {f"{split}_{part}": torch.randint(top, size, dtype=torch.uint8, generator=random) for split, (part, size, top) in drawn})
    monkeypatch.setenv("FLATMIN_DATA", str(tmp_path))
    return tmp_path


SMALL = dict(epochs=1, examples=0, batch_size=16, sample=16, look=16, look_k=1, k=1, runs="gamma=0.1")


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [("simple_cnn", 2_399_518), ("fashion", 2_164_118), ("cifar100", 373_508), ("resnet32", 465_674), ("vgg11", 9_758_480)],
)
def test_a_step_of_a_preset_at_the_scale_of_the_paper(page, noise, preset, parameters):
    "The net that its name promises, by the published count of its trained weights, and a step; if it is not too large, with a refresh on two images."
    names = page(train=False, experiment=preset, **SMALL)
    net, images = names["build"](0, names["p"]), names["images"]
    assert (names["p"].momentum, names["p"].lr, names["p"].plateau, names["p"].stop, names["p"].epochs) == (0.0, 0.01, "val_loss", "val_error", 1)
    assert sum(p.numel() for p in net.parameters()) == parameters
    small = parameters < 1_000_000
    optimizer = names["optimizer_of"](net, names["plan"]["gamma=0.1"].model_copy(update=dict(sample=2) if small else dict(gamma=1.0)), 0, 1)
    before = flat(net)
    optimizer.step(lambda: backward(net, optimizer, images.train_images[:4], images.train_labels[:4]))
    assert optimizer.refreshes == small and torch.isfinite(flat(net)).all() and not torch.equal(flat(net), before)


@pytest.mark.slow
def test_a_preset_on_real_images_killed_and_given_again(page, noise, tmp_path):
    "papermill as a user calls it: a finished run is left as it is, the killed one goes on, and it comes to what it would have come to."
    small = SMALL | dict(epochs=8, runs="gamma=0.1 gamma=0.1+k=2", experiment="fashion_small")
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", str(NOTEBOOKS / "04_sharpest_directions.ipynb"), "executed.ipynb"]
    command += [word for name, value in (small | dict(out="out")).items() for word in ("-p", name, str(value))]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    rows = Path("out/gamma=0.1+k=2/0/history.csv")
    try:
        until = time.monotonic() + 300
        while not (rows.exists() and len(rows.read_text().splitlines()) > 6) and first.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        assert first.poll() is None
    finally:
        os.killpg(first.pid, signal.SIGKILL)  # its kernel too
        first.wait()
    before = records()
    assert {name: record["status"] for name, record in before.items()} == {"gamma=0.1/0": "finished", "gamma=0.1+k=2/0": "running"}
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    after = records()
    assert {name: record["status"] for name, record in after.items()} == dict.fromkeys(before, "finished")
    assert after["gamma=0.1/0"] == before["gamma=0.1/0"] and len(after["gamma=0.1+k=2/0"]["resumed"]) == 1
    page(**small | dict(runs="gamma=0.1+k=2", out="whole"))
    for ours, theirs in zip(outcome(Path("out/gamma=0.1+k=2/0")), outcome(Path("whole/gamma=0.1+k=2/0"))):
        assert ours.drop(columns="watch_seconds").equals(theirs.drop(columns="watch_seconds")) if isinstance(ours, pd.DataFrame) else ours == theirs


@pytest.mark.slow
def test_a_refusal_through_papermill(papermill, tmp_path):
    result = papermill("plateau=val_los", "runs=sgd", notebook="04_sharpest_directions", OMP_NUM_THREADS="1")
    assert result.returncode != 0 and "no column of the history 'val_los'; did you mean 'val_loss'?" in result.stderr.strip().splitlines()[-1], result.stderr
    assert "flatmin_nb/" not in result.stderr  # a line, not a stack
    assert [json.loads(path.read_text())["status"] for path in (tmp_path / "out").rglob("run.json")] == ["running"]

"""What of Nudged-SGD is no story: kinds of nets and precisions, groups, schedules, states, divergence, and the notebook's runs. The mathematics is told there."""

import copy
import io
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from conftest import same, state
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from flatmin_nb.lab import models
from flatmin_nb.lab.data import load, scaled
from flatmin_nb.lab.train import Regime, fit
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


def test_groups_have_their_own_rate_and_factor():
    net, other = net_of("tied"), net_of("tied")
    groups = [dict(params=net.last.parameters(), lr=0.5, gamma=0.6), dict(params=[*net.first.parameters(), net.second.bias])]
    ours = trained(net, NudgedSGD(groups, net, cross_entropy, (X, Y), lr=0.1, gamma=0.0, k=3, every=2, tolerance=1e-9))
    last = set(other.last.parameters())
    expected = by_dense_algebra(other, lr=lambda p: 0.5 if p in last else 0.1, gamma=lambda p: 0.6 if p in last else 0.0)
    torch.testing.assert_close(ours, expected, atol=1e-7, rtol=0)


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


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("mode", ["velocity", "gradient", "both"])
def test_each_direction_of_a_quadratic_decays_by_its_own_factor(mode, momentum, nesterov):
    "Also where gamma changes on the way, by which the modes differ once there is momentum."
    if nesterov and not momentum:
        pytest.skip("Nesterov's form needs momentum")
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
    assert optimizer.refreshes == 3  # two asked for, and that before the first step


def test_a_refresh_is_of_the_weights_before_the_closure_and_of_its_own_sample():
    net, seen = net_of(), []

    def sample(n):
        seen.append((n, flat(net)))
        return X[: 10 + n], Y[: 10 + n]

    optimizer = nudged(net, sample=sample, every=3)
    before = [flat(net)] + [trained(net, optimizer, 1) for _ in range(7)]
    assert [n for n, _ in seen] == [0, 1, 2] and all(torch.equal(w, before[3 * n]) for n, w in seen)
    assert optimizer.products > 0 and (optimizer.examples_spent - (10 + 11 + 12)) % 2 == 0


# ---- schedules


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
    optimizer, more = nudged(net), nudged(other, k=5)
    on_batches(net, optimizer, 0, 3)
    on_batches(other, more, 0, 3)
    before = copy.deepcopy(optimizer.state_dict())
    for wrong, words in ((torch.optim.SGD(net.parameters(), lr=1.0).state_dict(), "not the state of NudgedSGD"), (more.state_dict(), "k and D of another optimizer")):
        with pytest.raises(NudgeError, match=words) as refusal:
            optimizer.load_state_dict(wrong)
        assert len(str(refusal.value).splitlines()) == 1
    assert optimizer.steps == 3 and torch.equal(optimizer.V, before["nudge"]["V"])

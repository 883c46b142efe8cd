"""Slices, surfaces and ways between minima, on nets of every kind; and what interrupts them."""

import copy
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from flatmin_nb.lab.errors import OneLineError
from flatmin_nb.lab.landscape import (
    LandscapeError, Shared, Span, barrier, held, interpolate, line, load_table, normalised, orthogonalised, plot_contour, plot_line, plot_surface,
    plot_trajectory, random_directions, read_table, save_table, surface, trajectory,
)  # fmt: skip
from flatmin_nb.lab.objective import Objective
from flatmin_nb.lab.state import reestimate

ALPHAS = [-1.0, -0.3, 0.0, 0.2, 1.0]
random = torch.Generator().manual_seed(0)
x, y = torch.randn(70, 5, generator=random, dtype=torch.float64), torch.randint(3, (70,), generator=random)
x_test, y_test = torch.randn(33, 5, generator=random, dtype=torch.float64), torch.randint(3, (33,), generator=random)


def net_with(*layers, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(5, 8), *(layer() for layer in layers), nn.Linear(8, 3)).double()
    for layer in net:
        if isinstance(layer, nn.BatchNorm1d):
            layer.running_mean.normal_(generator=random)
            layer.running_var.uniform_(0.5, 2, generator=random)
    return net


def direction_of(objective, seed=0):
    return random_directions(objective, biases="as weights", seed=seed)[:, 0]


def state_of(model):
    return [value.clone() for value in model.state_dict().values()] + [torch.get_rng_state()], [module.training for module in model.modules()]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True)) and first[1] == second[1]


def interrupting(after, function, error=KeyboardInterrupt):
    "`function`, which raises after so many calls."
    def wrapper(*arguments):
        wrapper.calls += 1
        if wrapper.calls > after:
            raise error
        return function(*arguments)

    wrapper.calls = 0
    return wrapper


# ---- values ----

@pytest.mark.parametrize("data", [(x, y), [(x[:64], y[:64]), (x[64:], y[64:])], DataLoader(TensorDataset(x, y), batch_size=32)], ids=["one", "ragged", "loader"])
@pytest.mark.parametrize("options", [{}, {"batchnorm": "frozen"}, {"batchnorm": "batch"}, {"dropout": 3}, {"weight_decay": 0.1}, {"parameters": "0.*"},
                                     {"parameters": "0.weight"}, {"batch_size": 9}, {"dropout": 3, "batchnorm": "batch"}], ids=str)  # fmt: skip
def test_a_shared_first_layer_gives_the_values_of_the_objective(data, options):
    if "batch_size" in options and isinstance(data, DataLoader):
        data = DataLoader(TensorDataset(x, y), batch_size=32, num_workers=0)
    net = net_with(lambda: nn.BatchNorm1d(8), lambda: nn.ReLU(inplace=True), lambda: nn.Dropout(0.3))
    objective = Objective(net, F.cross_entropy, data, **({"dropout": "off"} | options))
    test = objective.over((x_test, y_test))
    direction = direction_of(objective)
    before = state_of(objective.model)
    table = line(objective, direction, ALPHAS, test=test)
    assert "the first layer, '0'" in table.attrs["plan"]
    assert same(before, state_of(objective.model))
    for row in table.itertuples():
        place = objective.weights + row.alpha * direction
        assert row.train_loss == pytest.approx(objective.loss(place), rel=1e-12)
        assert row.test_loss == pytest.approx(test.loss(place), rel=1e-12)
        assert (row.train_error, row.test_error) == (objective.evaluate(place)[1], test.evaluate(place)[1])
    assert table.train_loss[2] == objective.loss() and table.test_loss[2] == test.loss()


class Called(nn.Module):
    "A net of which `forward` says how its layers are used."

    def __init__(self, forward):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(5, 5), nn.Linear(5, 3)
            self.shift, self.norm = nn.Parameter(torch.randn(5)), nn.BatchNorm1d(5)
        self.function = forward
        self.double().eval()

    def forward(self, x):
        return self.function(self, x)


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) ** 2


INSIDE = "called inside a transformation"
LATER = "the products of the first layer, 'first', serve {} calls, as the others have another input"


def slope_of(net, x):
    "How the last layer's outputs change along an input of ones."
    return torch.func.jvp(lambda x: net.last(torch.tanh(net.first(x))), (x,), (torch.ones_like(x),))[1]


@pytest.mark.parametrize(("reason", "forward"), [
    (INSIDE, slope_of),
    (INSIDE, lambda net, x: torch.func.vmap(lambda x: net.last(torch.tanh(net.first(x))))(x)),
    ("called more than once", lambda net, x: net.last(net.first(net.first(x)))),
    ("input of the first linear layer, 'first', depends", lambda net, x: net.last(net.first(x + net.shift))),
    ("input of the first linear layer, 'first', depends", lambda net, x: net.last(net.first(x + net.shift.detach()))),
    ("input of the first linear layer, 'first', depends", lambda net, x: net.last(net.first(net.norm(x)))),
    ("no linear layer that moves is called", lambda net, x: (x @ net.first.weight.T + net.shift) @ net.last.weight.T),
])  # fmt: skip
def test_what_cannot_be_shared_is_measured_point_by_point_and_says_so(reason, forward):
    objective = Objective(Called(forward), F.cross_entropy, (x, y))
    direction = direction_of(objective)
    table = line(objective, direction, ALPHAS)
    assert table.attrs["plan"].startswith("point by point") and reason in table.attrs["plan"]
    assert table.train_loss.tolist() == pytest.approx([objective.loss(objective.weights + alpha * direction) for alpha in ALPHAS], rel=1e-12)


@pytest.mark.parametrize("forward", [
    lambda net, x: net.last(torch.tanh(net.first(x)) + x @ net.first.weight),  # the weight is used elsewhere too
    lambda net, x: net.last(net.first(x.cos()) * net.shift),
    lambda net, x: net.last(F.relu(net.first(x.view(-1, 1, 5))).flatten(1)),
    lambda net, x: net.last(torch.tanh(net.first(input=x))),
])  # fmt: skip
def test_sharing_does_not_mind_what_else_a_weight_is_for(forward):
    objective = Objective(Called(forward), F.cross_entropy, (x, y))
    direction = direction_of(objective)
    table = line(objective, direction, ALPHAS)
    assert "'first'" in table.attrs["plan"]
    assert table.train_loss.tolist() == pytest.approx([objective.loss(objective.weights + alpha * direction) for alpha in ALPHAS], rel=1e-12)


def looped(net, x):
    return net.last(sum(torch.tanh(net.first(step)) for step in x.unbind(1)))


PARTS = [(torch.randn(10, steps, 5, generator=random, dtype=torch.float64), torch.randint(3, (10,), generator=random)) for steps in (1, 3)]


@pytest.mark.parametrize(("served", "forward", "data"), [
    ("5 of 25", lambda net, x: net.last(torch.tanh(torch.cat([net.first(part) for part in x.split(14)]))), (x, y)),  # equal parts
    ("5 of 25", lambda net, x: net.last(torch.tanh(torch.cat([net.first(part) for part in x.split(16)]))), (x, y)),  # unequal ones
    ("10 of 20", looped, PARTS),  # a later batch is longer
    ("4 of 5", lambda net, x: net.last(net.first((x + net.shift.detach() > 0).to(x))), (torch.where(torch.arange(70)[:, None] < 2, 9, -0.5 * torch.ones_like(x)), y)),
])  # fmt: skip
def test_a_first_layer_serves_only_the_input_of_its_products(served, forward, data):
    net = Called(forward)
    nn.init.zeros_(net.shift)
    objective = Objective(net, F.cross_entropy, data)
    direction = direction_of(objective)
    objective.split(direction)["shift"].fill_(1)
    table = line(objective, direction, ALPHAS)
    assert table.train_loss.tolist() == pytest.approx([objective.loss(objective.weights + alpha * direction) for alpha in ALPHAS], rel=1e-12)
    assert table.attrs["plan"] == LATER.format(served)


@pytest.mark.parametrize("what", ["weight", "bias"])
@pytest.mark.parametrize("chained", [True, False])
def test_a_layer_that_is_tied_to_a_later_one_moves_with_it(what, chained):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.last = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
            setattr(self.two, what, getattr(self.one, what))

        def forward(self, x):  # the second first
            hidden = torch.tanh(self.two(x))
            return self.last(torch.tanh(self.one(hidden) if chained else hidden + self.one(x)))

    objective = Objective(Tied().double(), F.cross_entropy, (x, y))
    direction = direction_of(objective)
    table = line(objective, direction, ALPHAS)
    assert table.attrs["plan"] == "the products of the first layer, 'two', serve all points of a line"
    assert table.train_loss.tolist() == pytest.approx([objective.loss(objective.weights + alpha * direction) for alpha in ALPHAS], rel=1e-12)


def test_products_serve_the_memory_and_the_numbers_of_which_they_were_made():
    layer, input = nn.Linear(5, 3).double(), x.clone()
    step = {name: torch.ones_like(value) for name, value in layer.named_parameters()}
    shared = Shared(layer, layer, Span(dict(layer.named_parameters()), step))
    with torch.no_grad():
        for given, served in [
            (lambda: input, 1), (lambda: input, 2), (lambda: input.view(70, 5), 3), (input.clone, 4), (lambda: input[:9], 4), (lambda: x.flip(0), 4),
            (lambda: x.clone().requires_grad_(), 4), (lambda: input.mul_(2), 4), (input.clone, 4),
        ]:  # fmt: skip
            now = given()
            assert torch.equal(shared(now), F.linear(now, layer.weight, layer.bias)) and shared.served == served
        shared.forget()
        assert torch.equal(shared(input), F.linear(input, layer.weight, layer.bias)) and shared.served == 5


def test_a_bias_that_is_computed_is_not_taken_for_a_constant():
    net = nn.Sequential(nn.utils.weight_norm(nn.Linear(5, 8), "bias", dim=None), nn.Tanh(), nn.Linear(8, 3)).double()
    objective = Objective(net, F.cross_entropy, (x, y))
    direction = direction_of(objective)
    table = line(objective, direction, ALPHAS)
    assert table.train_loss.tolist() == pytest.approx([objective.loss(objective.weights + alpha * direction) for alpha in ALPHAS], rel=1e-12)


def test_a_model_that_keeps_its_activations_can_be_walked():
    class Keeps(nn.Sequential):
        def forward(self, x):
            self.seen = super().forward(x)
            return self.seen

    net = Keeps(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    net(x)
    objective = Objective(net, F.cross_entropy, (x, y))
    objective.gradient()
    assert line(objective, direction_of(objective), ALPHAS).train_loss[2] == objective.loss()
    assert abs(interpolate(net, net, F.cross_entropy, (x, y)).barrier) < 1e-14


def test_a_layer_with_a_forward_of_its_own_is_not_shared():
    net = nn.Sequential(Scaled(5, 8), nn.Linear(8, 3)).double()
    assert "input of the first linear layer, '1', depends" in line(objective := Objective(net, F.cross_entropy, (x, y)), direction_of(objective), ALPHAS).attrs["plan"]


def test_only_the_chosen_weights_move():
    net = net_with(nn.Tanh)
    objective = Objective(net, F.cross_entropy, (x, y), parameters="2.*")
    table = line(objective, direction_of(objective), ALPHAS)
    assert "'2', serve all points" in table.attrs["plan"] and table.train_loss[2] == objective.loss()
    assert objective.model[0].weight.equal(net[0].weight)
    whole = Objective(net, F.cross_entropy, (x, y))
    step = whole.join(whole.split(torch.zeros(whole.size, dtype=torch.float64)) | objective.split(direction_of(objective)))
    assert table.train_loss.tolist() == pytest.approx(line(whole, step, ALPHAS).train_loss.tolist(), rel=1e-12)


def test_an_objective_at_other_weights_is_measured_there():
    objective = Objective(net_with(lambda: nn.BatchNorm1d(8), nn.ReLU), F.cross_entropy, (x, y), batchnorm="frozen")
    direction = direction_of(objective)
    there = objective.at(objective.weights + 0.5 * direction)
    table = line(there, direction, ALPHAS, test=(x, y))
    assert table.train_loss[2] == there.loss() == table.test_loss[2] != objective.loss()


def test_inputs_of_several_tensors_and_tied_weights():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.last = nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(4, 3)
            self.two.weight = self.one.weight

        def forward(self, a, b):
            return self.last(F.relu(self.one(a) + self.two(b)))

    objective = Objective(Two().double(), F.cross_entropy, ({"a": x, "b": x.flip(0)}, y))
    direction = direction_of(objective)
    table = line(objective, direction, ALPHAS)
    assert "'one'" in table.attrs["plan"]
    assert table.train_loss.tolist() == pytest.approx([objective.loss(objective.weights + alpha * direction) for alpha in ALPHAS], rel=1e-12)


def test_forwards_are_counted():
    objective = Objective(net_with(nn.Tanh), F.cross_entropy, (x, y))
    line(objective, direction_of(objective), ALPHAS)
    assert (objective.forwards, objective.evaluations) == (len(ALPHAS), 0)


# ---- directions ----

@pytest.mark.parametrize("kind", ["filter", "layer"])
def test_orthogonal_directions_keep_the_norms_of_the_blocks(kind):
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 9, 1)).double()
    nn.init.uniform_(net[1].weight, 0.5, 2)
    nn.init.uniform_(net[1].bias, 0.5, 2)
    with torch.no_grad():
        net[0].weight[1] = 0  # a dead filter
    images, targets = torch.randn(8, 1, 5, 5, dtype=torch.float64), torch.randn(8, 1, dtype=torch.float64)
    objective = Objective(net.eval(), F.mse_loss, (images, targets))
    directions = random_directions(objective, 3, normalise=kind, biases="as weights", seed=4)
    products = directions.T @ directions
    assert (products - products.diag().diag()).abs().max() < 1e-12
    for name, weights in objective.split(objective.weights).items():
        for j in range(3):
            part = objective.split(directions[:, j].contiguous())[name]
            rows = (part, weights) if kind == "layer" or weights.dim() == 1 else (part.flatten(1), weights.flatten(1))
            norms = [row.norm(dim=-1) if row.dim() > 1 else row.norm() for row in (rows if kind == "filter" else [row.flatten() for row in rows])]
            if weights.numel() == 1:  # the bias of the one output: a block with room for one direction
                assert norms[0] == pytest.approx(norms[1] if j == 0 else 0)
            else:
                torch.testing.assert_close(*norms)
    assert objective.split(directions[:, 0].contiguous())["0.weight"][1].abs().max() == (0 if kind == "filter" else pytest.approx(0, abs=10))


def test_orthogonalising_keeps_the_first_direction():
    objective = Objective(net_with(nn.Tanh), F.cross_entropy, (x, y))
    given = torch.randn(objective.size, 2, generator=random, dtype=torch.float64)
    kept = orthogonalised(objective, given, None)
    assert torch.equal(kept[:, 0], given[:, 0])
    assert kept[:, 1].norm().item() == pytest.approx(given[:, 1].norm().item())
    assert kept[:, 0].dot(kept[:, 1]).abs() < 1e-12


def test_directions_depend_on_the_seed_alone():
    objective = Objective(net_with(nn.Tanh), F.cross_entropy, (x, y))
    before = torch.get_rng_state()
    first, again, other = (random_directions(objective, 2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_weight_normalised_directions_are_relative():
    objective = Objective(net_with(nn.Tanh), F.cross_entropy, (x, y))
    drawn = torch.randn(objective.size, generator=random, dtype=torch.float64)
    torch.testing.assert_close(normalised(objective, drawn, "weight", "as weights"), drawn * objective.weights.abs())


def rescaled(net, factors):
    "`net`, computing the same: the outputs of its first layer times `factors`, undone by the second."
    net = copy.deepcopy(net)
    with torch.no_grad():
        net[0].weight.mul_(factors[:, None])
        net[0].bias.mul_(factors)
        net[-1].weight.div_(factors)
    return net


@pytest.mark.parametrize(("normalise", "by_layer", "by_unit"), [("filter", True, False), ("layer", True, False), ("weight", True, True), (None, False, False)])
def test_what_a_rescaling_of_relus_does_to_a_slice(normalise, by_layer, by_unit):
    net = net_with(nn.ReLU)
    objective = Objective(net, F.cross_entropy, (x, y))
    expected = line(objective, random_directions(objective, normalise=normalise), ALPHAS).train_loss
    for factors, stays in ((torch.full((8,), 10.0), by_layer), (torch.logspace(-1, 1, 8), by_unit)):
        other = Objective(rescaled(net, factors), F.cross_entropy, (x, y))
        assert other.value == pytest.approx(objective.value, rel=1e-12)
        difference = (line(other, random_directions(other, normalise=normalise), ALPHAS).train_loss - expected).abs().max()
        assert difference < 1e-12 if stays else difference > 0.1


def test_in_front_of_batchnorm_a_factor_per_filter_changes_nothing():
    net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8, eps=1e-12), nn.ReLU(), nn.Linear(8, 3)).double()
    other = copy.deepcopy(net)
    with torch.no_grad():
        other[0].weight.mul_(torch.logspace(-1, 1, 8)[:, None])
        other[0].bias.mul_(torch.logspace(-1, 1, 8))
    tables = [line(one, random_directions(one), ALPHAS) for one in (Objective(net, F.cross_entropy, (x, y), batchnorm="batch") for net in (net, other))]
    pd.testing.assert_series_equal(tables[0].train_loss, tables[1].train_loss, rtol=1e-9)


def test_the_filters_of_a_transposed_convolution_are_its_input_channels():
    net = nn.Sequential(nn.Unflatten(1, (5, 1)), nn.ConvTranspose1d(5, 3, 2), nn.Flatten(), nn.Linear(6, 3)).double()
    objective = Objective(net, F.cross_entropy, (x, y))
    direction, weights = (objective.split(vector)["1.weight"] for vector in (random_directions(objective)[:, 0], objective.weights))
    torch.testing.assert_close(direction.norm(dim=(1, 2)), weights.norm(dim=(1, 2)))
    assert not torch.allclose(direction.norm(dim=(0, 2)), weights.norm(dim=(0, 2)), rtol=1e-3)


def test_the_gains_of_weight_norm_are_blocks_of_one():
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 8)), nn.Tanh(), nn.Linear(8, 3)).double()
    objective = Objective(net, F.cross_entropy, (x, y))
    name = "0.parametrizations.weight.original0"
    direction, gains = (objective.split(vector)[name] for vector in (random_directions(objective)[:, 0], objective.weights))
    torch.testing.assert_close(direction.abs(), gains)


def test_a_model_of_biases_alone_needs_them_as_weights():
    objective = Objective(net_with(nn.Tanh), F.cross_entropy, (x, y), parameters="*bias")
    with pytest.raises(LandscapeError, match="give biases='as weights'") as refusal:
        random_directions(objective)
    assert "\n" not in str(refusal.value)
    assert np.isfinite(line(objective, random_directions(objective, biases="as weights"), ALPHAS).train_loss).all()


def test_a_place_on_an_axis_is_given_once():
    objective = Objective(net_with(nn.Tanh), F.cross_entropy, (x, y))
    directions = random_directions(objective, 2).T
    for axes, name in ((([0, 0.5, 0], [0, 1]), "xs"), (([0, 1], [-0.0, 0.0]), "ys")):
        with pytest.raises(LandscapeError, match=f"{name} must be different numbers; got -?0 twice"):
            surface(objective, *directions, *axes, progress=False)
    assert line(objective, directions[0], [0.5, 0.5]).train_loss.nunique() == 1


# ---- interruptions ----

def test_an_interrupted_surface_leaves_the_objective_and_the_model_as_they_were():
    net = net_with(lambda: nn.BatchNorm1d(8), nn.ReLU, lambda: nn.Dropout(0.2)).train()
    objective = Objective(net, F.cross_entropy, DataLoader(TensorDataset(x, y), batch_size=32), dropout=1)
    directions = random_directions(objective, 2).T
    grid = [-0.5, 0.0, 0.5]
    expected = surface(objective, *directions, grid, grid, progress=False)
    model, own, loss = state_of(net), state_of(objective.model), objective.loss_function
    for error in (KeyboardInterrupt, RuntimeError):
        for calls in (1, 5, 16):
            objective.loss_function = interrupting(calls, loss, error)
            with pytest.raises(error):
                surface(objective, *directions, grid, grid, progress=False)
            objective.loss_function = loss
            assert same(own, state_of(objective.model)) and same(model, state_of(net))
            assert [p.grad for p in net.parameters()] == [None] * 6
    pd.testing.assert_frame_equal(surface(objective, *directions, grid, grid, progress=False), expected, check_exact=True)
    assert not [module for module in objective.model.modules() if "forward" in vars(module)]


KILLED = """
import sys, time, torch, torch.nn.functional as F
from torch import nn
from flatmin_nb.lab.landscape import random_directions, surface
from flatmin_nb.lab.objective import Objective
torch.manual_seed(0)
net, x, y = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(70, 5), torch.arange(70) % 3
def slow(outputs, targets):
    time.sleep(float(sys.argv[2]))
    return F.cross_entropy(outputs, targets)
objective = Objective(net, slow, (x, y))
grid = torch.linspace(-1, 1, 8)
print(surface(objective, *random_directions(objective, 2).T, grid, grid, file=sys.argv[1], progress=False).train_loss.sum())
"""


@pytest.mark.slow
def test_a_surface_that_is_killed_goes_on_where_it_was(tmp_path):
    def start(file, delay):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / file), str(delay)], env=environment, stdout=subprocess.PIPE, text=True)

    assert start("whole.csv", 0).wait() == 0
    for rows in (1, 4):
        process = start("killed.csv", 0.02)
        while not (tmp_path / "killed.csv").exists() or len(read_table(tmp_path / "killed.csv")) < 8 * rows:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with pytest.raises(LandscapeError, match="not finished"):
            load_table(tmp_path / "killed.csv")
    with held(tmp_path / "killed.csv"):  # by somebody else
        second = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "killed.csv"), "0"], capture_output=True, text=True)
        assert "LandscapeError: another process is writing" in second.stderr.splitlines()[-1]
    assert start("killed.csv", 0).wait() == 0
    assert (tmp_path / "killed.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert len(load_table(tmp_path / "killed.csv")) == 64


def test_a_finished_surface_is_read_and_not_measured(tmp_path):
    objective = Objective(net_with(nn.Tanh), F.cross_entropy, (x, y))
    directions, grid = random_directions(objective, 2).T, [-0.5, 0.0, 0.5]
    expected = surface(objective, *directions, grid, grid, file=tmp_path / "s.csv", progress=False)
    objective.forwards = 0
    pd.testing.assert_frame_equal(surface(objective, *directions, grid, grid, file=tmp_path / "s.csv", progress=False), expected, check_exact=True)
    assert objective.forwards == 0


def test_a_file_of_another_question_is_refused(tmp_path):
    net, file = net_with(lambda: nn.BatchNorm1d(8), nn.Tanh), tmp_path / "s.csv"
    objective = Objective(net, F.cross_entropy, (x, y))
    directions, grid = random_directions(objective, 2).T, [-0.5, 0.0, 0.5]
    surface(objective, *directions, grid, grid, file=file, progress=False)
    kept = file.read_bytes()
    moved = copy.deepcopy(net)
    moved[1].running_mean += 0.1
    for name, other in {
        "directions": dict(directions=random_directions(objective, 2, seed=1).T),
        "xs": dict(xs=[-0.5, 0.0]),
        "weights": dict(objective=objective.at(objective.weights + 1e-6)),
        "train data": dict(objective=Objective(net, F.cross_entropy, (x + 1e-9, y))),
        "test data": dict(test=(x_test, y_test)),
        "train data or batch size": dict(objective=Objective(net, F.cross_entropy, (x, y), batch_size=8)),
        "weight_decay (0.0, not 0.1)": dict(objective=Objective(net, F.cross_entropy, (x, y), weight_decay=0.1)),
        "train loss": dict(objective=Objective(net, nn.CrossEntropyLoss(label_smoothing=0.1), (x, y))),
        "other weights and buffers": dict(objective=Objective(moved, F.cross_entropy, (x, y))),
        "parameters": dict(objective=Objective(net, F.cross_entropy, (x, y), parameters=["0.*", "3.*", "1.*"])),
    }.items():
        asked = {"objective": objective, "directions": directions, "xs": grid, "test": None} | other
        if name == "parameters":  # the same parameters by another pattern: the same question
            surface(asked["objective"], *asked["directions"], grid, grid, file=file, progress=False)
            continue
        with pytest.raises(LandscapeError, match="holds a surface with other") as refusal:
            surface(asked["objective"], *asked["directions"], asked["xs"], grid, test=asked["test"], file=file, progress=False)
        assert f"other {name}" in str(refusal.value) and "\n" not in str(refusal.value)
    assert file.read_bytes() == kept


@pytest.mark.parametrize("content", [b"", b"x,y\n1,2\n", b"\x93NUMPY", b"# {\n", b"# []\n1\n"], ids=repr)
def test_a_file_that_is_no_table_is_refused_and_kept(tmp_path, content):
    (tmp_path / "s.csv").write_bytes(content)
    objective = Objective(net_with(nn.Tanh), F.cross_entropy, (x, y))
    with pytest.raises(LandscapeError, match="give another file"):
        surface(objective, *random_directions(objective, 2).T, [0.0, 1.0], [0.0, 1.0], file=tmp_path / "s.csv", progress=False)
    assert (tmp_path / "s.csv").read_bytes() == content


def test_a_place_that_cannot_be_written_is_said_at_once(tmp_path):
    (tmp_path / "no").write_text("a file")
    objective = Objective(net_with(nn.Tanh), F.cross_entropy, (x, y))
    with pytest.raises(LandscapeError, match="cannot be written"):
        surface(objective, *random_directions(objective, 2).T, [0.0, 1.0], [0.0, 1.0], file=tmp_path / "no" / "s.csv", progress=False)


def test_the_bar_is_off_when_asked(capfd):
    objective = Objective(net_with(nn.Tanh), F.cross_entropy, (x, y))
    directions = random_directions(objective, 2).T
    surface(objective, *directions, [0.0, 1.0], [0.0, 1.0], progress=False)
    line(objective, directions[0], [0.0, 1.0])
    assert capfd.readouterr().err == ""
    surface(objective, *directions, [0.0, 1.0], [0.0, 1.0])
    line(objective, directions[0], [0.0, 1.0], progress=True)
    assert "2/2" in capfd.readouterr().err


def test_tables_are_read_back_exactly(tmp_path):
    table = pd.DataFrame({"alpha": np.linspace(-1, 1, 7), "train_loss": np.random.default_rng(0).standard_normal(7) / 3, "train_error": np.nan})
    table.attrs = {"plan": "none, # or so", "barrier": float("nan")}
    save_table(table, tmp_path / "t.csv")
    pd.testing.assert_frame_equal(load_table(tmp_path / "t.csv"), table, check_exact=True)


# ---- between two minima ----

def blended(first, second, alpha):
    "The model at (1 - alpha) * first + alpha * second, by hand."
    model = copy.deepcopy(first)
    state = {name: (1 - alpha) * value + alpha * second.state_dict()[name] if value.is_floating_point() else value for name, value in first.state_dict().items()}
    model.load_state_dict(state)
    return model.eval()


@pytest.mark.parametrize("again", [True, False], ids=["re-estimated", "interpolated"])
def test_interpolation_is_that_of_state_dictionaries(again):
    first, second = (net_with(lambda: nn.BatchNorm1d(8), nn.ReLU, lambda: nn.Dropout(0.5), seed=seed) for seed in (0, 1))
    before = [state_of(model) for model in (first, second)]
    found = interpolate(first, second, F.cross_entropy, (x, y), [0.25, 0.5, 0.75], names=("left", "right"), test=(x_test, y_test), reestimate=again, dropout="off")
    assert found.table.alpha.tolist() == [0, 0.25, 0.5, 0.75, 1]
    for row in found.table.itertuples():
        model = blended(first, second, row.alpha)
        if again:
            reestimate(model, x)
        with torch.no_grad():
            assert row.train_loss == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-10)
            assert row.test_loss == pytest.approx(F.cross_entropy(model(x_test), y_test).item(), rel=1e-10)
            assert row.test_error == pytest.approx(100 * (model(x_test).argmax(1) != y_test).double().mean().item())
    assert found.ends == ("left", "right") and found.table.attrs["ends"] == ["left", "right"]
    assert found.barrier == barrier(found.table) and found.test_barrier == barrier(found.table, "test_loss")
    assert all(same(then, state_of(model)) for then, model in zip(before, (first, second)))
    if not again:
        assert found.table.test_loss.iloc[-1] == Objective(second, F.cross_entropy, (x_test, y_test), dropout="off").value


def test_the_curved_path_is_that_of_sine_and_cosine():
    first, second = (net_with(lambda: nn.BatchNorm1d(8), nn.ReLU, seed=seed) for seed in (0, 1))
    found = interpolate(first, second, F.cross_entropy, (x, y), [-0.5, 0.25, 1.5], path="curved", test=(x_test, y_test))
    assert found.table.alpha.tolist() == [-0.5, 0, 0.25, 1, 1.5] and found.table.attrs["path"] == "curved"
    for row in found.table.itertuples():
        model = copy.deepcopy(first)
        with torch.no_grad():
            for value, other in zip(model.parameters(), second.parameters()):
                value.copy_(np.cos(np.pi / 2 * row.alpha) * value + np.sin(np.pi / 2 * row.alpha) * other)
        reestimate(model, x)
        for inputs, targets, loss in ((x, y, row.train_loss), (x_test, y_test, row.test_loss)):
            assert loss == pytest.approx(F.cross_entropy(model.eval()(inputs), targets).item(), rel=1e-10)
    straight = interpolate(first, second, F.cross_entropy, (x, y), [0.5], test=(x_test, y_test)).table
    for column in ("train_loss", "test_loss"):  # the ends are the ends, to the bit
        assert straight[column].iloc[[0, -1]].tolist() == found.table.query("alpha in (0, 1)")[column].tolist()


def test_statistics_have_no_place_on_a_curve():
    first, second = (net_with(lambda: nn.BatchNorm1d(8), nn.ReLU, seed=seed) for seed in (0, 1))
    for ends, options in (((first, second), {"reestimate": False}), ([Buffered(torch.full((3,), float(seed)).double(), seed=0).double() for seed in (1, 3)], {})):
        with pytest.raises(LandscapeError, match="curved path is for weights alone"):
            interpolate(*ends, F.cross_entropy, (x, y), path="curved", **options)
    shared = [Buffered(torch.ones(3), seed=seed).double() for seed in (0, 1)]
    assert np.isfinite(interpolate(*shared, F.cross_entropy, (x, y), path="curved").table.train_loss).all()


def test_variances_do_not_become_negative_outside():
    first, second = (net_with(lambda: nn.BatchNorm1d(8), nn.ReLU, seed=seed) for seed in (0, 1))
    found = interpolate(first, second, F.cross_entropy, (x, y), np.linspace(-3, 4, 15), reestimate=False)
    assert (blended(first, second, 4.0)[1].running_var < 0).any()
    assert np.isfinite(found.table.train_loss).all()


def test_the_barrier_is_between_the_ends_alone():
    table = pd.DataFrame({"alpha": [-1, 0, 0.5, 1, 2], "train_loss": [9, 1, 2.5, 2, 9]})
    assert barrier(table) == 1.0
    assert barrier(table.iloc[[1, 3]]) == 0.0
    with pytest.raises(LandscapeError, match="alpha = 0 and alpha = 1"):
        barrier(table.iloc[2:])


def test_a_barrier_that_cannot_be_seen_is_not_none():
    assert np.isnan(barrier(pd.DataFrame({"alpha": [0, 0.5, 1], "train_loss": [1, np.nan, 1]})))
    assert barrier(pd.DataFrame({"alpha": [0, 0.5, 1], "train_loss": [1, np.inf, 1]})) == np.inf


class Buffered(nn.Module):
    "A net with a buffer, which `use` joins to the outputs of the layer."

    def __init__(self, buffer, use=torch.add, seed=0, persistent=True):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layer, self.use = nn.Linear(5, 3), use
        self.register_buffer("buffer", buffer, persistent)

    def forward(self, x):
        return self.use(self.layer(x), self.buffer)


def masked(outputs, mask):
    return (outputs[:, :, None] + mask).softmax(-1)[:, :, 0]  # as attention does


@pytest.mark.parametrize("reestimated", [True, False])
def test_buffers_that_both_ends_share_do_not_move(reestimated):
    mask = torch.tensor([0, 0, -torch.inf])
    ends = [Buffered(mask.clone(), masked, seed) for seed in (0, 1)]
    found = interpolate(*ends, F.cross_entropy, (x.float(), y), [-0.5, 0.3, 1.5], reestimate=reestimated)
    assert np.isfinite(found.table.train_loss).all() and np.isfinite(found.barrier)
    seen = []
    ends = [Buffered(torch.tensor(0.1), lambda outputs, buffer: seen.append(buffer.item()) or outputs, seed) for seed in (0, 1)]
    interpolate(*ends, F.cross_entropy, (x.float(), y), np.linspace(0, 1, 25))
    assert len(set(seen)) == 1


def test_buffers_that_differ_move_and_must_be_finite():
    ends = [Buffered(torch.full((3,), float(seed), dtype=torch.float64), torch.mul, 0, persistent=False).double() for seed in (1, 3)]
    found = interpolate(*ends, F.cross_entropy, (x, y), [0.5])
    assert found.table.train_loss[1] == pytest.approx(F.cross_entropy(2 * ends[0].layer(x), y).item(), rel=1e-12)
    ends[1].buffer[0] = torch.inf
    with pytest.raises(LandscapeError, match="'buffer' differs between the two models and holds numbers that are not finite"):
        interpolate(*ends, F.cross_entropy, (x, y))


def test_parameters_and_buffers_of_other_precision_keep_theirs():
    def scaled(outputs, buffer):
        assert (outputs.dtype, buffer.dtype) == (torch.bfloat16, torch.float32)
        return outputs.float() * buffer

    ends = [Buffered(torch.full((3,), 1.0 + seed), scaled, seed) for seed in (0, 1)]
    for end in ends:
        end.layer.bfloat16()
    found = interpolate(*ends, F.cross_entropy, (x, y), [0.5])
    with torch.no_grad():
        assert found.table.train_loss.iloc[-1] == pytest.approx(F.cross_entropy(ends[1](x.bfloat16()), y).item(), rel=1e-6)
        assert found.table.train_loss.iloc[0] == pytest.approx(F.cross_entropy(ends[0](x.bfloat16()), y).item(), rel=1e-6)


def tied(*places):
    "Three square layers, of which those at `places` have one weight."
    net = nn.Sequential(*(nn.Linear(5, 5) for _ in range(3))).double()
    for place in places[1:]:
        net[place].weight = net[places[0]].weight
    return net


def test_a_model_and_itself_have_no_barrier():
    net = net_with(lambda: nn.BatchNorm1d(8), nn.ReLU)
    assert abs(interpolate(net, net, F.cross_entropy, (x, y)).barrier) < 1e-14


def test_frozen_parameters_are_interpolated_too():
    first, second = net_with(nn.Tanh, seed=0), net_with(nn.Tanh, seed=1)
    first[0].requires_grad_(False)
    found = interpolate(first, second, F.cross_entropy, (x, y))
    assert found.table.train_loss.iloc[-1] == Objective(second, F.cross_entropy, (x, y)).value
    assert not first[0].weight.requires_grad


@pytest.mark.parametrize(("other", "options", "message"), [
    (net_with(nn.Tanh, nn.Tanh), {}, "'b' has no '2.weight'"),
    (nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3)).double(), {}, r"'0.weight' has the shape \(8, 5\) in 'a', \(9, 5\) in 'b'"),
    (Buffered(torch.zeros(2), persistent=False), {"first": Buffered(torch.zeros(3), persistent=False)}, r"'buffer' has the shape \(3,\) in 'a', \(2,\) in 'b'"),
    (Buffered(None), {"first": Buffered(torch.zeros(3), persistent=False)}, "'b' has no 'buffer'"),
    (Buffered(torch.arange(3), persistent=False), {"first": Buffered(torch.ones(3).long(), persistent=False)}, "other whole numbers"),
    (tied(), {"first": tied(0, 1)}, "'1.weight' is tied to '0.weight' in 'a' and not tied in 'b'"),
    (tied(0, 1), {"first": tied()}, "'1.weight' is not tied in 'a' and tied to '0.weight' in 'b'"),
    (tied(1, 2), {"first": tied(0, 2)}, "'2.weight' is tied to '0.weight' in 'a' and tied to '1.weight' in 'b'"),
    (net_with(nn.Tanh), {"alphas": []}, "alphas must be"),
    (net_with(nn.Tanh), {"alphas": [0, float("inf")]}, "alphas must be"),
    (net_with(nn.Tanh), {"names": ("a", "a")}, "two different names"),
    (net_with(nn.Tanh), {"path": "sin"}, "no path 'sin'"),
    (net_with(nn.Tanh), {"batchnorm": "frozen"}, "statistics of one end"),
])  # fmt: skip
def test_ends_that_cannot_be_joined(other, options, message):
    options = {"first": net_with(nn.Tanh)} | options
    first = options.pop("first")
    with pytest.raises(LandscapeError, match=message) as refusal:
        interpolate(first, other, F.cross_entropy, (x, y), **options)
    assert isinstance(refusal.value, OneLineError) and "\n" not in str(refusal.value)


# ---- the way of a run ----

@pytest.mark.parametrize("count", [5, 80])  # fewer points than weights, and more
def test_the_plane_of_a_run_is_that_of_numpy(count):
    objective = Objective(net_with(nn.Tanh), F.cross_entropy, (x, y))
    run = objective.weights + torch.randn(count, objective.size, generator=random, dtype=torch.float64).cumsum(0).flip(0)
    found = trajectory(objective, run)
    _, values, axes = np.linalg.svd((run - objective.weights).numpy(), full_matrices=False)
    assert found.explained == pytest.approx((values**2 / (values**2).sum())[:2])
    for ours, theirs in zip((found.x, found.y), axes):
        assert abs(ours.numpy() @ theirs) == pytest.approx(1)
    assert found.points == pytest.approx(((run - objective.weights) @ torch.stack([found.x, found.y], 1)).numpy())
    assert (found.points[0] >= 0).all()


def test_runs_without_a_plane():
    objective = Objective(net_with(nn.Tanh), F.cross_entropy, (x, y))
    for run in (objective.weights[None], objective.weights[None] + torch.zeros(4, 1), objective.weights + torch.arange(4.0)[:, None]):
        with pytest.raises(LandscapeError, match="spans no plane"):
            trajectory(objective, run)
    for run in (torch.zeros(0, objective.size), [], objective.weights[:-1][None], objective.weights[None] * float("nan")):
        with pytest.raises(LandscapeError):
            trajectory(objective, run)


def test_models_tied_alike_are_joined():
    first, second = tied(0, 2), tied(0, 2)
    found = interpolate(first, second, F.cross_entropy, (x, y), [0.5])
    assert found.table.train_loss.iloc[-1] == Objective(second, F.cross_entropy, (x, y)).value


@pytest.mark.parametrize("accumulated", [False, True])
def test_a_straight_run_is_straight_up_to_the_rounding_of_its_numbers(accumulated):
    wide, data = nn.Linear(50, 400), (torch.randn(9, 50, generator=random), torch.arange(9))
    objective = Objective(wide, F.cross_entropy, data)
    step = 2e-5 * torch.randn(objective.size, generator=random)
    bend = 3e-6 * torch.randn(objective.size, generator=random)
    run = [objective.weights]
    for k in range(1, 40):
        run.append(run[-1] + step if accumulated else objective.weights + k * step)
    run = torch.stack(run[::-1])
    with pytest.raises(LandscapeError, match="spans no plane"):
        trajectory(objective, run)
    with pytest.raises(LandscapeError, match="spans no plane"):  # recorded in float32, looked at in float64
        trajectory(Objective(copy.deepcopy(wide).double(), F.cross_entropy, data), run)
    assert sum(trajectory(objective, run + torch.arange(40)[:, None] ** 2 % 7 * bend).explained) > 0.99


def test_a_run_may_come_one_by_one():
    net = net_with(nn.Tanh)
    objective = Objective(net, F.cross_entropy, (x, y))
    states = [{name: value + torch.randn(value.shape, generator=random) for name, value in net.state_dict().items()} for _ in range(5)]
    assert np.array_equal(trajectory(objective, (state for state in states)).points, trajectory(objective, states).points)
    for wrong, message in ((states[0], "got one dict"), ("run.safetensors", "got one str"), (7, "got one int"), ([objective.weights], "got Tensor in it"), ((one for one in ()), "spans no plane")):
        with pytest.raises(LandscapeError, match=message) as refusal:
            trajectory(objective, wrong)
        assert "\n" not in str(refusal.value)


# ---- pictures ----

def test_pictures_draw_on_the_axes_they_are_given():
    plt = pytest.importorskip("matplotlib.pyplot")
    objective = Objective(net_with(nn.Tanh), F.cross_entropy, (x, y))
    directions, grid = random_directions(objective, 2).T, np.linspace(-1, 1, 5)
    table, one = surface(objective, *directions, grid, grid, test=(x_test, y_test), progress=False), line(objective, directions[0], grid, test=(x_test, y_test))
    figure = plt.figure()
    flat, deep = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2, projection="3d")
    assert plot_line(one, flat) is flat and len(flat.lines) == 2
    assert plot_line(one, flat, what="error", log=True) is flat
    assert plot_contour(table, flat, filled=True) is flat and plot_contour(table, flat, what="error", levels=[5, 20, 60]) is flat
    assert plot_surface(table, deep) is deep
    plot_trajectory(trajectory(objective, objective.weights + torch.randn(5, objective.size, dtype=torch.float64)), flat)
    broken = table.copy()
    broken.loc[0, "train_loss"] = np.inf
    plot_contour(broken, flat), plot_surface(broken, deep)
    with pytest.raises(LandscapeError, match="3-D axes"):
        plot_surface(table, flat)
    with pytest.raises(LandscapeError, match="did you mean 'loss'"):
        plot_contour(table, flat, what="los")
    with pytest.raises(LandscapeError, match="two points on each axis"):
        plot_contour(table.query("y == 0"), flat)
    plt.close(figure)


# ---- on a GPU ----

@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_gpu_gives_the_numbers_of_the_cpu(tmp_path):
    nets = [net_with(lambda: nn.BatchNorm1d(8), nn.ReLU, seed=seed) for seed in (0, 1)]
    here, there = (Objective(copy.deepcopy(nets[0]).to(device), F.cross_entropy, (x, y)) for device in ("cpu", "cuda"))
    planes = [random_directions(one, 2).T for one in (here, there)]
    torch.testing.assert_close(planes[1].cpu(), planes[0])
    tables = [surface(one, *plane, ALPHAS, ALPHAS, test=(x_test, y_test), file=tmp_path / f"{one.device.type}.csv", progress=False)
              for one, plane in zip((here, there), planes)]  # fmt: skip
    pd.testing.assert_frame_equal(*tables)
    between = [interpolate(*(copy.deepcopy(net).to(device) for net in nets), F.cross_entropy, (x, y)).table for device in ("cpu", "cuda")]
    pd.testing.assert_frame_equal(*between)
    ways = [trajectory(one, one.weights + torch.arange(6.0)[:, None].to(plane) * plane[0] + torch.arange(6.0)[:, None].to(plane) ** 2 * plane[1])
            for one, plane in zip((here, there), planes)]  # fmt: skip
    np.testing.assert_allclose(ways[1].points, ways[0].points, rtol=1e-8)

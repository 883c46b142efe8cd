"""What a notebook cell is the wrong place for: models and loaders of every kind, and measurements that are interrupted."""
import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from flatmin_nb.lab.objective import Objective, ObjectiveError

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(50, 6, generator=GENERATOR), torch.randint(3, (50,), generator=GENERATOR)


def net(*layers: nn.Module) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), *layers, nn.Linear(8, 3))


def state(model: nn.Module) -> list:
    "Everything of the model and of the generators that a measurement could change."
    return [
        *(value.clone() for value in model.state_dict().values()),
        *(None if value.grad is None else value.grad.clone() for value in model.parameters()),
        *(value.requires_grad for value in model.parameters()),
        *(module.training for module in model.modules()),
        torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2:],
    ]  # fmt: skip


def same(first: list, second: list) -> bool:
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(first, second, strict=True))


class Interrupting:
    "A loss that is interrupted at its n-th call."

    def __init__(self, error: BaseException, calls: int):
        self.error, self.calls = error, calls

    def __call__(self, outputs, targets):
        self.calls -= 1
        if self.calls < 0:
            raise self.error
        return F.cross_entropy(outputs, targets)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("broken")], ids=["interrupted", "raised"])
@pytest.mark.parametrize("calls", [0, 1, 3, 9, 14])
@pytest.mark.parametrize("batchnorm", ["running", "frozen", "batch"])
def test_no_trace_of_a_measurement_that_does_not_end(error, calls, batchnorm):
    model = net(nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3))
    F.cross_entropy(model(X), Y).backward()
    model[1].eval()
    before = state(model)
    with pytest.raises(type(error)):
        loader = DataLoader(TensorDataset(X, Y), batch_size=16)
        measured = Objective(model, Interrupting(error, calls), loader, batchnorm=batchnorm, dropout=5)
        measured.gradient()
        measured.reestimate(2 * measured.weights)
        measured.loss(2 * measured.weights)
        measured.gradient()
    assert same(state(model), before)


@pytest.mark.parametrize("generator", [None, torch.Generator().manual_seed(3)], ids=["global", "its own"])
def test_a_shuffling_loader_is_refused_and_its_generator_left_alone(generator):
    loader = DataLoader(TensorDataset(X, Y), batch_size=16, shuffle=True, generator=generator)
    before = torch.get_rng_state(), generator and generator.get_state()
    with pytest.raises(ObjectiveError, match="it shuffles"):
        Objective(net(), F.cross_entropy, loader)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert generator is None or torch.equal(generator.get_state(), before[1])


class Augmented(Dataset):
    "Adds noise of one of three libraries to each example."

    def __init__(self, draw):
        self.draw = draw

    def __len__(self):
        return len(Y)

    def __getitem__(self, index):
        return X[index] + float(self.draw()), Y[index]


@pytest.mark.parametrize("draw", [lambda: torch.randn(()), np.random.randn, random.random], ids=["torch", "numpy", "python"])
def test_an_augmenting_loader_is_refused(draw):
    before = state(net())
    with pytest.raises(ObjectiveError, match="it augments"):
        Objective(net(), F.cross_entropy, DataLoader(Augmented(draw), batch_size=16))
    assert same(state(net()), before)


def test_a_loader_gives_what_the_tensors_give():
    model = net(nn.Tanh())
    whole = Objective(model, F.cross_entropy, (X, Y))
    for loader in (DataLoader(TensorDataset(X, Y), batch_size=16), DataLoader(TensorDataset(X, Y), batch_size=16, num_workers=1),
                   list(zip(X.split(7), Y.split(7)))):  # fmt: skip
        streamed = Objective(model, F.cross_entropy, loader)
        assert streamed.count == 50
        assert streamed.value == pytest.approx(whole.value, rel=1e-6)
        torch.testing.assert_close(streamed.gradient()[1], whole.gradient()[1], atol=1e-7, rtol=1e-5)


class FunctionalDropout(nn.Module):
    "Drops whatever mode it is in, so no layer tells."

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        return self.layer(F.dropout(x, 0.5, training=True))


def test_a_model_that_draws_in_evaluation_mode_is_refused():
    with pytest.raises(ObjectiveError, match="draws random numbers"):
        Objective(FunctionalDropout(), F.cross_entropy, (X, Y))
    fixed = Objective(FunctionalDropout(), F.cross_entropy, (X, Y), dropout=1)  # unless its masks are fixed
    assert fixed.loss() == fixed.loss()


def test_dropout_inside_attention_is_seen():
    with pytest.raises(ObjectiveError, match="dropout of '0'"):
        Objective(nn.Sequential(nn.MultiheadAttention(4, 2, dropout=0.1)), F.cross_entropy, (X, Y))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, a, b):
        return self.first(a) + self.second(b)


@pytest.mark.parametrize("inputs", [(X, 2 * X), {"a": X, "b": 2 * X}], ids=["positional", "by name"])
def test_models_of_several_inputs(inputs):
    model = TwoInputs()
    measured = Objective(model, F.cross_entropy, (inputs, Y), batch_size=16)
    assert measured.value == pytest.approx(F.cross_entropy(model(X, 2 * X), Y).item(), rel=1e-6)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(6, 6, bias=False)
        self.two = nn.Linear(6, 6, bias=False)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(self.one(x).tanh())


def test_tied_weights_are_one_parameter():
    model = Tied()
    measured = Objective(model, F.cross_entropy, (X, Y))
    assert measured.names == ["one.weight"]
    F.cross_entropy(model(X), Y).backward()
    torch.testing.assert_close(measured.gradient()[1], model.one.weight.grad.flatten())


def test_the_rest_of_the_parameters_stays_where_it_is():
    model = net(nn.Tanh())
    model[2].requires_grad_(False)
    measured = Objective(model, F.cross_entropy, (X, Y))
    assert measured.names == ["0.weight", "0.bias"]
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved[0].weight.zero_(), moved[0].bias.zero_()
    assert measured.loss(torch.zeros(measured.size)) == pytest.approx(F.cross_entropy(moved(X), Y).item(), rel=1e-6)


def test_the_weights_are_those_of_the_moment():
    "A model that trains on does not move what was measured."
    model = net(nn.Tanh())
    measured = Objective(model, F.cross_entropy, (X, Y))
    with torch.no_grad():
        for value in model.parameters():
            value.add_(1)
    assert measured.loss() == measured.value


def test_doubles_measure_floats():
    "Inputs in single precision go with a model in double."
    assert Objective(net().double(), F.cross_entropy, (X, Y)).dtype == torch.float64


def test_regression_has_no_error():
    measured = Objective(nn.Linear(6, 1), F.mse_loss, (X, torch.randn(50, 1, generator=GENERATOR)))
    assert np.isnan(measured.evaluate()[1])


def test_classification_error():
    model = net(nn.Tanh())
    loss, error = Objective(model, F.cross_entropy, (X, Y), batch_size=7).evaluate()
    assert error == pytest.approx(100 * (model(X).argmax(1) != Y).double().mean().item())


def test_class_weights_are_refused():
    "Their mean is over weights, not examples, so it would change with the size of the batches."
    with pytest.raises(ObjectiveError, match="not a mean over examples"):
        Objective(net(), nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.1])), (X, Y))


def test_other_weights_and_other_data():
    measured = Objective(net(nn.BatchNorm1d(8), nn.ReLU()), F.cross_entropy, (X, Y), batchnorm="frozen")
    there, elsewhere = measured.at(3 * measured.weights), measured.over((X[:20], Y[:20]))
    assert there.count == 50 and elsewhere.count == 20
    assert measured.loss() == measured.value, "neither moved it"
    assert there.value == there.loss() != measured.loss(3 * measured.weights), "its own statistics, not those of the old place"
    with pytest.raises(ObjectiveError, match="vector of"):
        measured.at(torch.zeros(3))

"""What a notebook cell is the wrong place for: models and loaders of every kind, and measurements that are interrupted."""
import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import same, state
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, Dataset, TensorDataset

from flatmin_nb.lab.curvature import GGN, Hessian, spectral_density, top_eigenpairs, trace, track_eigenpairs
from flatmin_nb.lab.objective import Objective, ObjectiveError, chosen_parameters

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(50, 6, generator=GENERATOR), torch.randint(3, (50,), generator=GENERATOR)


def net(*layers: nn.Module) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), *layers, nn.Linear(8, 3))


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


class Attention(nn.Module):
    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(6, 2, dropout=dropout, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        x = x[:, None].repeat(1, 4, 1)
        padding = torch.tensor([[False, False, True, True]]).expand(len(x), 4)
        return self.out(self.attention(x, x, x, key_padding_mask=padding)[0].mean(1))


class DropPath(nn.Module):
    "Drops without being a layer of torch that does."

    def forward(self, x):
        return x * (torch.rand(len(x), 1) > 0.5) if self.training else x


@pytest.mark.parametrize("model", [Attention(0.5), net(DropPath()), net(nn.RReLU()), net(nn.Dropout(0.2))], ids=["attention", "path", "rrelu", "layer"])
def test_noise_of_training_mode_is_seen_wherever_it_is(model):
    before = state(model)
    with pytest.raises(ObjectiveError, match="in training mode"):
        Objective(model, F.cross_entropy, (X, Y))
    assert same(state(model), before)
    assert Objective(model, F.cross_entropy, (X, Y), dropout="off").value == Objective(model.eval(), F.cross_entropy, (X, Y)).value


def test_dropout_that_never_drops_is_no_noise():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            with pytest.warns(UserWarning):
                self.recurrent, self.out = nn.LSTM(6, 4, dropout=0.2), nn.Linear(4, 3)

        def forward(self, x):
            return self.out(self.recurrent(x[None])[0][0])

    Objective(Recurrent(), F.cross_entropy, (X, Y))


def test_padding_means_the_same_with_gradients_and_without():
    "torch has a faster path without gradients, which zeroes what is padded."
    fast = torch.backends.mha.get_fastpath_enabled()
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
    out = nn.Linear(6, 3)

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.out = layer, out

        def forward(self, x):
            return self.out(self.layer(x[:, None].repeat(1, 4, 1), src_key_padding_mask=torch.tensor([[False, False, True, True]]).expand(len(x), 4)).mean(1))

    measured = Objective(Encoder().eval(), F.cross_entropy, (X, Y))
    assert measured.loss() == pytest.approx(measured.gradient()[0], rel=1e-6)
    assert torch.backends.mha.get_fastpath_enabled() == fast


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


def test_the_data_of_the_caller_stay_as_they_are():
    before = X.clone()
    for first in (nn.ReLU(inplace=True), nn.Hardtanh(inplace=True)):
        with pytest.raises(ObjectiveError, match="changes its inputs in place"):
            Objective(nn.Sequential(first, net()), F.cross_entropy, (X, Y))
    assert torch.equal(X, before)


class Drifting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        return self.layer(x)


def test_a_model_that_keeps_count_is_refused():
    with pytest.raises(ObjectiveError, match="changes its buffer 'seen'"):
        Objective(Drifting(), F.cross_entropy, (X, Y))


class Dictionary(nn.Module):
    "Outputs that are no tensor, drawn or not."

    def __init__(self, noise: float):
        super().__init__()
        self.layer, self.noise = nn.Linear(6, 3), noise

    def forward(self, x):
        return {"logits": self.layer(x) + self.noise * torch.randn(len(x), 3)}


def test_outputs_of_any_kind():
    loss = lambda outputs, targets: F.cross_entropy(outputs["logits"], targets)
    random_model, model = Dictionary(0.1).eval(), Dictionary(0.0)
    before = torch.get_rng_state()
    with pytest.raises(ObjectiveError, match="draws random ones"):
        Objective(random_model, loss, (X, Y))
    measured = Objective(model, loss, (X, Y))  # draws, but to no effect
    assert measured.loss() == measured.value and np.isnan(measured.evaluate()[1])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loss_that_draws_is_refused():
    with pytest.raises(ObjectiveError, match="draws random ones"):
        Objective(net(), lambda outputs, targets: F.cross_entropy(outputs + 1e-3 * torch.randn_like(outputs), targets), (X, Y))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_sum(dtype):
    for seed in range(8):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            Objective(nn.Linear(6, 3).to(dtype), F.cross_entropy, (X, Y), batch_size=16).gradient()


@pytest.mark.parametrize("first", [1, 20])
def test_a_sum_hides_nowhere(first):
    batches = [(X[:first], Y[:first]), (X[first:], Y[first:])]
    with pytest.raises(ObjectiveError, match="not a mean over examples"):
        Objective(net(), nn.CrossEntropyLoss(reduction="sum"), batches)


def test_class_weights_are_seen_in_sorted_data():
    order = Y.sort().indices
    with pytest.raises(ObjectiveError, match="not a mean over examples"):
        Objective(net(), nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.1])), [(X[part], Y[part]) for part in order.split(10)])


def test_a_fitted_net_is_no_sum():
    "Where the loss is nearly zero, its rounding is not."
    model = nn.Linear(6, 3)
    with torch.no_grad():
        model.weight.zero_(), model.bias.copy_(torch.tensor([18.0, 0.0, 0.0]))
    assert Objective(model, F.cross_entropy, (X, torch.zeros_like(Y)), batch_size=7).value < 1e-6


def test_computed_weights_and_kept_activations_are_copied():
    with pytest.warns(FutureWarning):
        old = nn.utils.weight_norm(nn.Linear(6, 3))
    pruned = nn.Linear(6, 3)
    prune.random_unstructured(pruned, "weight", 0.5)
    keeping = net(nn.Tanh())
    keeping.features = keeping(X)
    for model in (old, pruned, keeping):
        model(X)
        measured = Objective(model, F.cross_entropy, (X, Y))
        assert measured.value == pytest.approx(F.cross_entropy(model(X), Y).item(), rel=1e-6)
        assert measured.at(measured.weights).value == measured.value


def test_a_model_that_differentiates_inside():
    class Energy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = net(nn.Tanh())

        def forward(self, x):
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.layer(x).sum(), x, create_graph=True)[0]

    with torch.no_grad():
        measured = Objective(Energy(), F.mse_loss, (X, X))
    assert measured.loss() == measured.value == pytest.approx(measured.gradient()[0], rel=1e-6)


def test_data_parallel_is_the_model_in_it():
    assert Objective(nn.DataParallel(net()), F.cross_entropy, (X, Y)).names == Objective(net(), F.cross_entropy, (X, Y)).names


def test_batch_statistics_are_those_of_all_tensors_given():
    "Whatever the largest activation is."
    images, labels = torch.randn(16, 3, 96, 96, generator=GENERATOR), torch.randint(3, (16,), generator=GENERATOR)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 3))
    measured = Objective(model, F.cross_entropy, (images, labels), batchnorm="batch")
    assert measured.value == pytest.approx(F.cross_entropy(model.train()(images), labels).item(), rel=1e-6)
    assert Objective(model, F.cross_entropy, (images, labels)).batch_size < 16


def test_frozen_statistics_do_not_depend_on_the_batches():
    order = Y.sort().indices
    values = [Objective(net(nn.BatchNorm1d(8), nn.ReLU()), F.cross_entropy, (X[order], Y[order]), batchnorm="frozen", batch_size=size).value for size in (50, 20, 10)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-6)


def test_test_data_are_looked_at_too():
    measured = Objective(net(), F.cross_entropy, (X, Y))
    for data, said in [((X * float("nan"), Y), "loss over the data is nan"), ((X[:3], Y), "3 and 50 rows")]:
        with pytest.raises(ObjectiveError, match=said):
            measured.over(data)


@pytest.mark.parametrize(
    ("data", "said"),
    [((X.numpy(), Y.numpy()), "torch.from_numpy"), ([{"x": X, "y": Y}], "got dict"), ([(X, Y, Y)], "got tuple"), ("mnist", "got str"), (TensorDataset(X, Y), "a DataLoader")],
    ids=["arrays", "dictionaries", "triples", "a name", "a dataset"],
)
def test_data_of_another_kind(data, said):
    with pytest.raises(ObjectiveError, match=said):
        Objective(net(), F.cross_entropy, data)


def test_a_loader_is_read_twice_to_begin_with_and_once_a_pass():
    class Counted(TensorDataset):
        read = 0

        def __getitem__(self, index):
            self.read += 1
            return super().__getitem__(index)

    counted = Counted(X, Y)
    measured = Objective(net(), F.cross_entropy, DataLoader(counted, batch_size=10))
    assert counted.read == 10 + 2 * 50, "the first batch to try the model, then two passes that must be the same"
    measured.loss()
    assert counted.read == 160


def test_a_lazy_layer_wants_a_batch_first():
    with pytest.raises(ObjectiveError, match="run one batch through the model first"):
        Objective(nn.Sequential(nn.LazyLinear(3)), F.cross_entropy, (X, Y))


# ---- names, kept activations, autocast ----

class Named(nn.Module):
    "Parameters whose names look like patterns."

    def __init__(self, *names):
        super().__init__()
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.ones(2)))


@pytest.mark.parametrize(
    "which, found", [("w[1]", ["w[1]"]), (["w[1]"], ["w[1]"]), ("w*", ["w*"]), ("w[12]", ["w1"]), (["w?", "w[1]"], ["w1", "w[1]", "w*"])]
)
def test_a_name_is_a_name_before_it_is_a_pattern(which, found):
    assert list(chosen_parameters(Named("w1", "w[1]", "w*"), which)) == found


class Keeps(nn.Module):
    "A net that keeps what it computed, where one likes to look at it."

    def __init__(self, put):
        super().__init__()
        self.layer, self.put = nn.Linear(6, 3), put
        self.kept = self.same = None

    def forward(self, x):
        out = self.layer(x)
        self.kept = self.same = self.put(out)
        return out


class Holder:
    def __init__(self, tensor):
        self.tensor = tensor


@pytest.mark.parametrize("put", [lambda a: {"out": a}, lambda a: [a], lambda a: (a, {"deep": [a]}), lambda a: {"mapped": {1: (a, a)}}], ids=["dict", "list", "tuple", "deep"])
def test_a_model_that_keeps_activations_in_a_collection_is_measured(put):
    model = Keeps(put)
    model(X)
    kept = model.kept
    objective = Objective(model, F.cross_entropy, (X, Y))
    assert objective.value == pytest.approx(F.cross_entropy(model.layer(X), Y).item(), rel=1e-5)
    assert model.kept is kept and objective.at(2 * objective.weights).value != objective.value
    assert Hessian(objective).dense().isfinite().all()


def test_a_model_that_keeps_activations_in_an_object_is_refused_in_one_line():
    model = Keeps(Holder)
    model(X)
    with pytest.raises(ObjectiveError, match="cannot be copied, since an object in its attributes keeps a tensor"):
        Objective(model, F.cross_entropy, (X, Y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_measurements_inside_autocast_are_those_outside(dtype):
    model = net(nn.BatchNorm1d(8), nn.Tanh()).to(dtype)

    def measurements():
        one = Objective(model, F.cross_entropy, (X.to(dtype), Y), batchnorm="frozen", weight_decay=1e-3)
        hessian, pairs = Hessian(one), None
        yield from (one.value, one.loss(2 * one.weights), *one.evaluate(), *one.gradient(), one.at(2 * one.weights).value, one.over((X[:9].to(dtype), Y[:9])).value)
        yield from (hessian.dense(), hessian.gradient, GGN(one).dense(), Hessian(one, plan="streamed") @ one.weights)
        pairs = top_eigenpairs(hessian, 2)
        tracked = track_eigenpairs(hessian, pairs.vectors + 0.1, max_products=9)
        yield from (pairs.values, pairs.vectors, tracked.values, trace(hessian, products=9).value, spectral_density(hessian, steps=8, vectors=2).nodes)

    outside = list(measurements())
    with torch.autocast("cpu", torch.bfloat16):
        assert (X @ X.T).dtype == torch.bfloat16
        inside = list(measurements())
    for one, two in zip(outside, inside, strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(two))

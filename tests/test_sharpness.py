"""Measures of sharpness where a notebook would be too slow or too tidy: many random functions, measurements that do not end, losses that do not exist."""

import copy
import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import same, state
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from flatmin_nb.lab import sharpness
from flatmin_nb.lab.curvature import Dense
from flatmin_nb.lab.objective import Objective
from flatmin_nb.lab.sharpness import average_case, keskar, local_entropy, pac_bayes_sigma, random_subspace, sharpness_report, worst_case

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(50, 6, generator=GENERATOR), torch.randint(3, (50,), generator=GENERATOR)


def net(*layers: nn.Module) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), *layers, nn.Linear(8, 3))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Function(nn.Module):
    "Any function of one vector of weights, as a model."

    def __init__(self, function, at):
        super().__init__()
        self.function, self.w = function, nn.Parameter(at.clone())

    def forward(self, x):
        return self.function(self.w).expand(len(x))


def objective_of(function, at) -> Objective:
    return Objective(Function(function, at), lambda outputs, targets: outputs.mean(), (torch.zeros(1, 1), torch.zeros(1)))


class Interrupting:
    "A loss that is interrupted at its n-th call; it counts them."

    def __init__(self, error: BaseException | None = None, at: int = 0):
        self.error, self.at, self.calls = error, at, 0

    def __call__(self, outputs, targets):
        self.calls += 1
        if self.error is not None and self.calls > self.at:
            raise self.error
        return F.cross_entropy(outputs, targets)


def full(model, loss, batchnorm):
    batches = list(zip(X.split(30), Y.split(30)))
    return sharpness_report(model, loss, batches, batchnorm=batchnorm, dropout=5, test=(X[:20], Y[:20]), lr=0.1, points=3, directions=1)


@pytest.mark.parametrize("batchnorm", ["running", "frozen", "batch"])
def test_a_report_leaves_no_trace(batchnorm):
    model = net(nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3))
    F.cross_entropy(model(X), Y).backward()
    model[1].eval()
    before, counted = state(model), Interrupting()
    report = full(model, counted, batchnorm)
    assert same(state(model), before)
    assert np.isfinite(report.table.value[:20]).all()
    for part in (1, 2, 3):  # and wherever it is interrupted
        with pytest.raises(KeyboardInterrupt):
            full(model, Interrupting(KeyboardInterrupt(), part * counted.calls // 4), batchnorm)
        assert same(state(model), before)


def test_an_objective_that_was_measured_is_as_it_was():
    measured = Objective(net(nn.BatchNorm1d(8), nn.ReLU()), F.cross_entropy, (X, Y), batchnorm="frozen")
    before, weights, value = state(measured.model), measured.weights.clone(), measured.value
    sharpness_report(measured, points=3, directions=1)
    assert same(state(measured.model), before)
    assert torch.equal(measured.weights, weights) and measured.loss() == value


def test_the_seed_settles_everything():
    values = [sharpness_report(net(nn.ReLU()), F.cross_entropy, (X, Y), seed=seed, points=3, directions=1).table.value for seed in (0, 0, 1)]
    pd.testing.assert_series_equal(values[0], values[1], check_exact=True)
    assert not values[0].equals(values[2])


def test_batches_do_not_matter():
    model = net(nn.Tanh()).double()
    whole = sharpness_report(model, F.cross_entropy, (X, Y), points=3, directions=1).table
    parts = sharpness_report(model, F.cross_entropy, DataLoader(TensorDataset(X, Y), batch_size=16), points=3, directions=1).table
    np.testing.assert_allclose(parts.value, whole.value, rtol=1e-3)
    assert parts.forwards.tolist() == whole.forwards.tolist()


def test_single_precision_suffices_for_what_is_not_tiny():
    model = net(nn.Tanh())
    single, double = (sharpness_report(one, F.cross_entropy, (X, Y), points=3, directions=1).table for one in (model, copy.deepcopy(model).double()))
    np.testing.assert_allclose(single.value, double.value, rtol=0.02)


# ---- maxima


@pytest.mark.parametrize("seed", range(8))
def test_keskar_against_a_grid(seed):
    H, g, at = normal(2, 2, seed=seed), normal(2, seed=seed + 100), 2 * normal(2, seed=seed + 200)
    function = lambda w: 1 + torch.sin(30 * g @ (w - at)) / 4 + 100 * (w - at) @ (H + H.T) @ (w - at) + 0.1 * torch.cos(20 * (w - at)).sum()
    side = 0.02 * (at.abs() + 1)
    grid = at + side * torch.cartesian_prod(*torch.linspace(-1, 1, 101, dtype=torch.float64).expand(2, -1))
    values = torch.stack([function(w) for w in grid])
    exact = 100 * (values.max() - function(at)).item() / (1 + function(at).item())
    found = keskar(objective_of(function, at), epsilon=0.02, restarts=20)
    assert 0.99 * exact <= found.value <= 1.01 * exact
    assert found.value == max(found.starts)
    assert (found.displacement.abs() <= side * (1 + 1e-12)).all()


def test_keskar_takes_the_best_it_saw_and_not_the_last():
    function = lambda w: 1 + torch.exp(-((w - 0.3) ** 2).sum() / 1e-4)  # a peak that line searches jump over
    seen = []

    def watched(w):
        value = function(w)
        seen.append(value.item())
        return value

    found = keskar(objective_of(watched, torch.full((2,), 0.29, dtype=torch.float64)), epsilon=0.02)
    seen_best = max(seen)
    assert found.value == pytest.approx(100 * (seen_best - seen[0]) / (1 + seen[0]), rel=1e-9)


def test_keskar_repeats_differ_by_seed_in_a_subspace():
    H = torch.diag(torch.logspace(0, 3, 40, dtype=torch.float64))
    measured = objective_of(lambda w: 0.5 * w @ H @ w, torch.zeros(40, dtype=torch.float64))
    values = [keskar(measured, subspace=5, seed=seed).value for seed in range(4)]
    assert len(set(values)) == 4
    basis = random_subspace(measured, 5, 0)
    torch.testing.assert_close(basis.norm(dim=0), torch.ones(5, dtype=torch.float64))
    full_space = keskar(measured).value
    assert full_space == pytest.approx(100 * 0.5 * 1e-6 * H.trace().item(), rel=1e-9)


def trust_region(H, g, rho):
    "The maximum of g d + d H d / 2 over |d| <= rho where g has no gap to hide in: (mu - H) d = g, |d| = rho, by bisection."
    eigenvalues, Q = torch.linalg.eigh(H)
    b = Q.T @ g
    length = lambda mu: (b / (mu - eigenvalues)).norm().item()
    low, high = eigenvalues[-1].item(), eigenvalues[-1].item() + b.norm().item() / rho
    if high <= 0 or low < 0 and length(0.0) <= rho:
        low, high = 0.0, 0.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if middle > eigenvalues[-1] and length(middle) > rho else (low, middle)
    d = Q @ (b / (high - eigenvalues))
    return (g @ d + 0.5 * d @ H @ d).item()


@pytest.mark.parametrize("seed", range(10))
def test_worst_case_against_the_trust_region(seed):
    H, g = normal(8, 8, seed=seed), 0.3 * normal(8, seed=seed + 50)
    H = H + H.T
    exact = trust_region(H, g, 0.7)
    measured = objective_of(lambda w: g @ w + 0.5 * w @ H @ w, torch.zeros(8, dtype=torch.float64))
    found = worst_case(measured, rho=0.7, steps=60, restarts=3)
    assert 0.995 * exact <= found.value <= exact * (1 + 1e-9)
    assert worst_case(measured, rho=0.7).value <= found.value
    assert found.displacement.norm() <= 0.7 * (1 + 1e-9)


def test_one_step_is_sam_on_a_net():
    model = net(nn.Tanh()).double()
    loss = F.cross_entropy(model(X.double()), Y)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for weights, g in zip(moved.parameters(), gradients):
            weights += 0.1 * g / norm
        expected = (F.cross_entropy(moved(X.double()), Y) - loss).item()
    assert worst_case(model, F.cross_entropy, (X, Y), rho=0.1).value == pytest.approx(expected, rel=1e-9)


def test_groups():
    measured = Objective(net(nn.Tanh()).double(), F.cross_entropy, (X, Y))
    whole, one, five = worst_case(measured), worst_case(measured, group=50), worst_case(measured, group=10)
    assert one.value == pytest.approx(whole.value, rel=1e-12) and math.isnan(one.standard_error)
    assert five.value > whole.value  # each group has its own worst case
    assert five.gradient_evaluations == 1 and len(five.starts) == 5 and five.standard_error > 0
    ragged = worst_case(measured, group=20)
    assert len(ragged.starts) == 3
    assert ragged.value == pytest.approx(np.average(ragged.starts, weights=[20, 20, 10]), rel=1e-12)


# ---- averages, and where there is nothing to average


def test_averages_belong_to_the_chosen_parameters():
    model = net(nn.BatchNorm1d(8), nn.ReLU()).eval()
    chosen = Objective(model, F.cross_entropy, (X, Y), parameters="*.weight")
    assert average_case(chosen, noise="filter", scale=0.1).value != average_case(chosen, noise="filter", scale=0.1, biases="ignore").value
    matrices = Objective(model, F.cross_entropy, (X, Y), parameters=lambda name, value: value.dim() > 1)
    assert average_case(matrices, scale=0.1).value == average_case(matrices, scale=0.1, biases="ignore").value


def test_a_loss_that_ends_somewhere():
    function = lambda w: -torch.log(1 - w @ w)  # not a number beyond the unit ball
    measured = objective_of(function, torch.zeros(3, dtype=torch.float64))
    sigma = pac_bayes_sigma(measured, samples=20)
    assert 0 < sigma.value < 0.5
    assert math.isnan(average_case(measured, scale=10.0).value)
    entropy = local_entropy(measured, gamma=4.0, samples=4000)  # the mass outside counts for nothing
    draws = normal(400_000, 3, seed=1) / 2
    inside = (1 - draws.square().sum(1)).clamp_min(0)
    assert entropy.value == pytest.approx(-inside.mean().log().item(), abs=4 * entropy.standard_error)
    assert worst_case(measured, rho=0.5, steps=10).value == pytest.approx(-math.log(0.75), rel=1e-6)


def test_few_draws_that_count_are_said_to_be_few():
    H = torch.diag(torch.full((60,), 50.0, dtype=torch.float64))
    measured = objective_of(lambda w: 0.5 * w @ H @ w, torch.zeros(60, dtype=torch.float64))
    assert "says nothing" in local_entropy(measured, gamma=1.0).note
    assert local_entropy(measured, gamma=1e4).note == ""


def test_sigma_of_the_error():
    model = net(nn.Tanh())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    measured = Objective(model, F.cross_entropy, (X, model(X).argmax(1)))
    sigma = pac_bayes_sigma(measured, of="error", samples=10)
    tried = dict(sigma.tried)
    assert measured.evaluate()[1] == 0 and tried[sigma.value] <= 0.1 < min(rise for other, rise in tried.items() if sigma.value < other < 1.02 * sigma.value)


# ---- the report


@pytest.fixture(scope="module")
def report():
    return sharpness_report(net(nn.ReLU()), F.cross_entropy, (X, Y), lr=0.1, points=5, directions=2)


def test_a_report_of_a_regression_has_no_error():
    found = sharpness_report(nn.Linear(6, 3), F.mse_loss, (X, F.one_hot(Y, 3).float()), points=3, directions=1, measures=["loss", "curvature"])
    assert found.table.measure.tolist() == ["train loss", "lambda max", "Tr H", "Tr H^2"]
    found.figure()


def test_the_table_is_written_whole_or_not_at_all(report, tmp_path, monkeypatch):
    file = tmp_path / "sharpness.csv"
    report.to_csv(file)
    read = pd.read_csv(file)
    np.testing.assert_array_equal(read.value, report.table.value)
    before = file.read_bytes()
    monkeypatch.setattr(pd.DataFrame, "to_csv", lambda self, opened, **options: opened.write(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.to_csv(file)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["sharpness.csv"]


def test_the_page_shows_every_measure(report):
    page = report._repr_html_()
    assert "data:image/png;base64," in page and "gradient evaluations" in page
    for one in report.measures:
        assert one.measure.replace("'", "&#x27;") in page or one.measure in page
    assert "arXiv 1609.04836" in page


def test_every_row_has_a_source_and_a_price(report):
    table = report.table
    assert (table.definition.str.len() > 20).all()
    assert (table[["gradient_evaluations", "forwards", "products"]].sum(axis=1) >= 0).all()
    paid = table[~table.measure.str.contains("error|lr / 2")]
    assert (paid[["gradient_evaluations", "forwards", "products"]].sum(axis=1) > 0).all()


def test_a_measure_that_fails_does_not_take_the_others_with_it(monkeypatch):
    def broken(bench):
        raise sharpness.SharpnessError("no such luck")

    monkeypatch.setitem(sharpness.MEASURES, "sam", broken)
    table = sharpness_report(net(nn.ReLU()), F.cross_entropy, (X, Y), points=3, directions=1, measures=["sam", "asam"]).table
    assert table.note[0] == "no such luck" and math.isnan(table.value[0])
    assert len(table) == 3 and np.isfinite(table.value[1:]).all()


class Once(torch.autograd.Function):
    "tanh with a first derivative only."

    @staticmethod
    def forward(context, x):
        y = x.tanh()
        context.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, slope):
        (y,) = context.saved_tensors
        return slope * (1 - y * y)


class OnceLayer(nn.Module):
    def forward(self, x):
        return Once.apply(x)


def test_a_model_without_second_derivatives_keeps_its_other_measures(tmp_path):
    report = sharpness_report(net(OnceLayer()), F.cross_entropy, (X, Y), points=3, directions=2, measures=["keskar", "curvature", "sam"])
    assert report["Keskar"].value > 0 and report["worst case"].value > 0
    assert report.top is None and report.density is None
    assert report.table.note.str.contains("second derivative").any()
    report.figure()
    assert "Keskar" in report._repr_html_()


@pytest.mark.parametrize(
    ("change", "said"),
    [(dict(measures=[]), "measures is empty"), (dict(model=net().bfloat16()), "too coarse")],
    ids=["no measures", "half precision"],
)
def test_reports_that_are_not_made(change, said):
    with pytest.raises(sharpness.SharpnessError, match=said):
        sharpness_report(**(dict(model=net(), loss=F.cross_entropy, data=(X, Y)) | change))


def test_an_inverse_that_does_not_converge_is_no_number():
    eigenvalues = torch.logspace(-6, 3, 600, dtype=torch.float64)
    g = normal(600)
    with pytest.raises(sharpness.SharpnessError, match="a residual of .* after 60 products"):
        sharpness.inverse_form(Dense(torch.diag(eigenvalues)), g, 1e-6, steps=60)
    exact = float((g.square() / (eigenvalues + 1)).sum())
    assert sharpness.inverse_form(Dense(torch.diag(eigenvalues)), g, 1.0) == pytest.approx(exact, rel=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_the_numbers_of_a_gpu():
    model = net(nn.BatchNorm1d(8), nn.Tanh()).double().eval()
    measures = ["loss", "keskar", "keskar subspace", "sam", "asam", "average", "pac-bayes", "local entropy"]
    cpu, gpu = (sharpness_report(one, F.cross_entropy, (X.to(device), Y.to(device)), measures=measures, points=3, directions=1).table
                for one, device in ((model, "cpu"), (copy.deepcopy(model).cuda(), "cuda")))  # fmt: skip
    np.testing.assert_allclose(gpu.value, cpu.value, rtol=1e-4)

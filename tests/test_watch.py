"""Curvature watched along runs of every kind: training does not feel it, a resumed run has the columns of one that was not interrupted, and what is refused."""

import numpy as np
import pandas as pd
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from conftest import same, state
from torch import nn

from flatmin_nb.lab.curvature import GGN, Dense, Hessian, top_eigenpairs
from flatmin_nb.lab.data import CropFlip, load, scaled
from flatmin_nb.lab.errors import OneLineError
from flatmin_nb.lab.objective import Objective
from flatmin_nb.lab.results import Run
from flatmin_nb.lab.train import Callback, ColumnError, Diverged, fit
from flatmin_nb.lab.watch import (
    CurvatureWatch, WatchError, cross_sections, fresh_sample, overlap, plot_alignment, plot_eigenvalues, plot_overlap, plot_overshoot, plot_overshoots,
    plot_sections, principal_angles, quadratic_model, spectrum_columns, step_overshoot, widths,
)  # fmt: skip


@pytest.fixture(scope="module")
def digits():
    return scaled(load("digits", validation=0.2), centre=0, scale=255)


def net_of(*layers, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), *layers, nn.ReLU(), nn.Linear(8, 10))


def noisy():
    return net_of(nn.BatchNorm1d(8), nn.Dropout(0.3))


def train(net, digits, watches=(), epochs=2, lr=0.1, **options):
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    options = dict(batch_size=128, progress=False, evaluate_first=True) | options
    return fit(net, optimizer, digits, epochs=epochs, callbacks=watches, **options)


def sample_of(digits, count=60):
    return digits.train_images[:count], digits.train_labels[:count]


# ---- the callback ----

@pytest.mark.parametrize("batchnorm", ["running", "frozen", "batch"])
def test_training_does_not_feel_a_watch(digits, batchnorm):
    watch = CurvatureWatch(sample_of(digits), k=2, batchnorm=batchnorm, batches=2, norm_products=6, overshoots=1, sections=2, factors=(1.0,))
    nets = noisy(), noisy()
    histories = [train(net, digits, watches, augment=CropFlip(padding=1)).history for net, watches in zip(nets, ([watch], []))]
    shared = [column for column in histories[1] if column != "seconds"]
    pd.testing.assert_frame_equal(histories[0][shared], histories[1][shared])
    assert all(torch.equal(a, b) for a, b in zip(nets[0].state_dict().values(), nets[1].state_dict().values()))
    assert histories[0].lambda_1.notna().all() and histories[0].columns.is_unique


def test_a_sample_that_draws_from_the_global_generators_leaves_them_alone(digits):
    def sample(n):
        np.random.rand(), torch.rand(())
        return sample_of(digits)

    nets = noisy(), noisy()
    for net, watches in zip(nets, ([CurvatureWatch(sample, k=1, batches=1)], [])):
        train(net, digits, watches)
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters()))


class Stop(Exception):
    pass


class StopAt(Callback):
    def __init__(self, step):
        self.at = step

    def after_step(self, loop):
        if loop.step == self.at:
            raise Stop


@pytest.mark.parametrize("at", [1, 9, 15])
def test_a_resumed_run_has_the_columns_of_one_that_was_not_interrupted(digits, tmp_path, at):
    def watched(folder, step):
        run = Run(folder, {})
        sample = fresh_sample(digits.train_images, digits.train_labels, 50, augment=CropFlip(padding=1), seed=2)
        watch = CurvatureWatch(sample, k=2, batches=2, every=2, overshoots=1, sections=2, factors=(1.0,))
        train(noisy(), digits, [watch, StopAt(step)], run=run, evaluate_every_steps=3, save_every_steps=5)
        return watch, run.folder

    whole, folder = watched(tmp_path / "whole", 0)
    with pytest.raises(Stop):
        watched(tmp_path / "broken", at)
    again, resumed = watched(tmp_path / "broken", 0)
    drop = ["seconds", "watch_seconds"]
    first, second = (pd.read_csv(path / "history.csv").drop(columns=drop) for path in (folder, resumed))
    pd.testing.assert_frame_equal(first, second)
    for table in ("overshoots", "sections"):
        pd.testing.assert_frame_equal(getattr(whole, table), getattr(again, table))
    assert first.overlap.notna().sum() == first.lambda_1.notna().sum() - 1


def test_rows_between_looks_stay_empty(digits):
    history = train(net_of(), digits, [CurvatureWatch(sample_of(digits), k=1, batches=0, every=3)], epochs=4).history
    assert history.lambda_1.notna().tolist() == [True, False, False, True, False]
    assert not history.filter(like="cos").columns.size
    plot_eigenvalues(history)


def test_the_distance_is_from_before_the_first_step(digits):
    net, begin = net_of(), nn.utils.parameters_to_vector(net_of().parameters())
    history = train(net, digits, [CurvatureWatch(sample_of(digits), k=1, batches=0)], evaluate_first=False).history
    end = nn.utils.parameters_to_vector(net.parameters())
    assert history.distance.iloc[-1] == pytest.approx(float((end - begin).detach().norm()), rel=1e-5) and history.distance.iloc[0] > 0


def test_a_fresh_sample_is_another_at_each_look_and_the_edge_follows_the_schedule(digits):
    seen = []
    watch = CurvatureWatch(lambda n: seen.append(n) or sample_of(digits), k=1, batches=0)
    net = net_of()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    history = fit(net, optimizer, digits, epochs=3, batch_size=128, callbacks=[watch], schedule=schedule, progress=False).history
    assert seen == [0, 1, 2]
    assert history.edge.tolist() == pytest.approx((history.lambda_1 * history.lr / 2).tolist()) and history.lr.nunique() == 3


def test_weights_that_are_not_trained_are_not_watched_and_weight_decay_is_added(digits):
    columns = []
    for decay in (0.0, 0.5):
        net = net_of().double()
        net[1].requires_grad_(False)
        images = digits.with_images(lambda x: x.double())
        history = train(net, images, [CurvatureWatch(sample_of(images), k=3, weight_decay=decay, batches=1, tolerance=1e-6)], lr=1e-9, epochs=1).history
        columns.append(history.filter(like="lambda_").iloc[0, :3])
    assert (columns[1] - columns[0]).tolist() == pytest.approx([0.5] * 3, rel=1e-5)
    assert history.cos_random.iloc[0] == pytest.approx((2 / (np.pi * 90)) ** 0.5, rel=1e-2)


def test_minibatch_gradients_are_those_of_training(digits):
    "The batch size, the images and the augmentation of training; the means of many are the full gradient."
    class Look(CurvatureWatch):
        def gradients(self, loop, objective):
            self.seen = super().gradients(loop, objective)
            self.full = objective.over((digits.train_images, digits.train_labels)).gradient()[1]
            return self.seen

    watch = Look(sample_of(digits), k=1, batches=200)
    train(net_of(), digits, [watch], epochs=0)
    spread = watch.seen.std(1).norm() / 200**0.5
    assert (watch.seen.mean(1) - watch.full).norm() < 1.5 * spread < 0.1 * watch.full.norm()


def test_the_columns_are_those_of_dense_algebra_in_every_batchnorm_mode(digits):
    for batchnorm in ("running", "frozen", "batch"):
        net = noisy()
        net[1].requires_grad_(False)
        row = train(net, digits, [watch := CurvatureWatch(sample_of(digits), k=2, batchnorm=batchnorm, batches=3, tolerance=1e-4)]).history.iloc[-1]
        objective = Objective(net, F.cross_entropy, sample_of(digits), batchnorm=batchnorm, dropout="off")
        values, vectors = torch.linalg.eigh(Hessian(objective).dense())
        assert [row.lambda_1, row.lambda_2] == pytest.approx(values[[-1, -2]].tolist(), rel=1e-4)
        full = objective.gradient()[1]
        assert row.cos_full_2 == pytest.approx(float((vectors[:, -2] @ full).abs() / full.norm()), abs=1e-2)
        assert row.lambda_residual < 1.1e-4 and row.watch_products == watch.pairs.products


def test_a_loss_that_is_not_finite_is_a_divergence(digits, tmp_path):
    images = sample_of(digits)[0].clone()
    images[0] = float("inf")
    run = Run(tmp_path, {})
    with pytest.raises(Diverged, match="the loss that the watch measures is not finite at step 0"):
        train(net_of(), digits, [CurvatureWatch((images, sample_of(digits)[1]), k=1)], run=run)
    assert "diverged" in (run.folder / "run.json").read_text()


def test_what_is_refused_is_refused_in_one_line(digits):
    for options in (dict(k=1.5), dict(batches=-1), dict(norm_products=3), dict(tolerance=0), dict(overshoots=1, batches=0), dict(factors=(1.0, -1.0)),
                    dict(norm_products=6.5), dict(norm_products="many"), dict(weight_decay=-1.0), dict(batchnorm="run"), dict(prefix=1)):  # fmt: skip
        with pytest.raises(WatchError) as trouble:
            CurvatureWatch(sample_of(digits), **options)
        assert "\n" not in str(trouble.value)
    with pytest.raises(WatchError, match="no BatchNorm mode 'run'; did you mean 'running'"):
        CurvatureWatch(sample_of(digits), batchnorm="run")
    few = net_of()
    few[1].requires_grad_(False)
    with pytest.raises(OneLineError, match="k must be at most the size of the operator; got 100"):
        train(few, digits, [CurvatureWatch(sample_of(digits), k=100)])


def test_products_that_overflow_are_a_divergence(digits, tmp_path):
    "The loss is 1e30 and finite in float32; the products with the Hessian have no squares."
    net, run = net_of(), Run(tmp_path, {})
    net[-1].weight.data.fill_(1e15)
    with pytest.raises(Diverged, match="the curvature that the watch measures is not finite at step 0"):
        train(net, digits, [CurvatureWatch(sample_of(digits), k=1, loss=lambda outputs, targets: outputs.square().mean())], run=run)
    assert "diverged" in (run.folder / "run.json").read_text()


@pytest.mark.parametrize(("pixels", "what"), [(float("inf"), "the loss"), (1e30, "the norm of a gradient")])
def test_minibatches_that_overflow_are_a_divergence(digits, tmp_path, pixels, what):
    run, images = Run(tmp_path, {}), digits.with_images(lambda x: torch.full_like(x, pixels))
    with pytest.raises(Diverged, match=f"{what} that the watch measures is not finite at step 0"):
        train(net_of(), images, [CurvatureWatch(sample_of(digits), k=1, loss=lambda outputs, targets: outputs.mean(), batches=2)], splits=(), run=run)
    assert "diverged" in (run.folder / "run.json").read_text()


def test_two_watches_of_one_run_have_a_prefix_each(digits):
    with pytest.raises(ColumnError, match="two callbacks write the column 'lambda_1'.*CurvatureWatch has a prefix") as trouble:
        train(net_of(), digits, [CurvatureWatch(sample_of(digits), k=1, batches=1) for _ in range(2)])
    assert isinstance(trouble.value, ValueError) and "\n" not in str(trouble.value)
    watches = [CurvatureWatch(sample_of(digits, count), k=2, batches=1, prefix=prefix) for prefix, count in (("", 60), ("more_", 200))]
    history = train(net_of(), digits, watches).history
    alone = train(net_of(), digits, [CurvatureWatch(sample_of(digits, 200), k=2, batches=1)]).history
    for column in ("lambda_1", "lambda_2", "cos_batch_2", "overlap", "distance", "edge", "watch_products"):
        pd.testing.assert_series_equal(history[f"more_{column}"], alone[column], check_names=False)
    assert (history.more_lambda_1 != history.lambda_1).all()
    for plot in (plot_eigenvalues, plot_alignment, plot_overlap):
        lines = [plot(table, prefix=prefix).lines for table, prefix in ((history, "more_"), (alone, ""))]
        assert [line.get_ydata().tolist() for line in lines[0][1:]] == [line.get_ydata().tolist() for line in lines[1][1:]]
        assert lines[0][0].get_ydata().tolist() == pytest.approx(lines[1][0].get_ydata().tolist())


def test_a_gradient_of_zero_and_a_learning_rate_of_zero_end_no_run(digits):
    loss = lambda outputs, targets: 1 + 0 * outputs.mean()
    watch = CurvatureWatch(sample_of(digits), k=2, batches=2, norm_products=6, overshoots=1, sections=1)
    history = train(net_of(), digits, [watch], loss=loss, epochs=1).history
    assert history.lambda_1.tolist() == [0, 0] and history.lambda_residual.tolist() == [0, 0] and (history.cos_batch_1 == 0).all()
    for table in (watch.overshoots, watch.sections):
        assert (table.step == 0).all() and (table.change == 0).all() and (table.predicted_change == 0).all()
    watch = CurvatureWatch(sample_of(digits), k=1, batches=1, overshoots=1, sections=1)
    train(net_of(), digits, [watch], lr=0.0, epochs=1)
    assert (watch.overshoots.step == 0).all() and (watch.overshoots.change == 0).all()


class Unfreeze(Callback):
    "The first layer is trained too, from a step on."

    def __init__(self, step, layer):
        self.at, self.layer = step, layer

    def before_step(self, loop):
        self.layer.requires_grad_(loop.step >= self.at)


def test_where_other_parameters_are_trained_overlap_and_distance_start_anew(digits):
    net = net_of()
    net[1].requires_grad_(False)
    history = train(net, digits, [Unfreeze(16, net[1]), CurvatureWatch(sample_of(digits), k=2, batches=1, overshoots=1)], epochs=4).history
    assert history.overlap.isna().tolist() == [True, False, False, True, False]
    assert (history.distance == 0).tolist() == [True, False, False, True, False]
    assert history.cos_random.nunique() == 2


def test_a_watch_that_is_given_to_another_run_begins_anew(digits):
    used, fresh = (CurvatureWatch(sample_of(digits), k=2, batches=1, overshoots=1, factors=(1.0,)) for _ in range(2))
    for first in (True, False):
        train(net_of(seed=1), digits, [used], evaluate_first=first)
        for evaluate_first in (True, False):
            histories = [train(net_of(), digits, [watch], evaluate_first=evaluate_first).history.drop(columns=["seconds", "watch_seconds"]) for watch in (used, fresh)]
            pd.testing.assert_frame_equal(*histories)
            pd.testing.assert_frame_equal(used.overshoots, fresh.overshoots)
    unused = CurvatureWatch(sample_of(digits), k=2, batches=1, overshoots=1, factors=(1.0,))
    last = train(net_of(), digits, [unused], evaluate_first=False).history.drop(columns=["seconds", "watch_seconds"])
    pd.testing.assert_frame_equal(histories[0], last)


def test_a_look_inside_autocast_is_one_outside(digits):
    histories, watches = [], []
    for inside in (False, True):
        watches.append(CurvatureWatch(sample_of(digits), k=2, batches=2, norm_products=6, overshoots=1, sections=1, factors=(1.0,)))
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            histories.append(train(net_of(nn.BatchNorm1d(8), nn.Tanh()).eval(), digits, watches[-1:], lr=1e-30, epochs=0).history)
    columns = [column for column in histories[0] if "loss" not in column and "error" not in column and "seconds" not in column]
    pd.testing.assert_frame_equal(histories[0][[*columns, "frobenius_error"]], histories[1][[*columns, "frobenius_error"]])
    pd.testing.assert_frame_equal(watches[0].sections, watches[1].sections)
    V, W = (torch.linalg.qr(torch.randn(30, 2, generator=torch.Generator().manual_seed(seed)))[0] for seed in (0, 1))
    with torch.autocast("cpu", torch.bfloat16):
        within = overlap(V, W), principal_angles(V, W)
    assert within[0] == overlap(V, W) and torch.equal(within[1], principal_angles(V, W))


def test_the_residual_beside_an_eigenvalue_of_nothing():
    "What has converged is at most the tolerance; what has not is not hidden."
    for dtype in (torch.float32, torch.float64):
        basis = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
        values = torch.cat([torch.tensor([8.0, 4.0, 2.0, 1e-9, 0.0]), torch.linspace(-0.1, -1, 35)]).double()
        matrix = (basis * values) @ basis.T
        pairs = top_eigenpairs(Dense(((matrix + matrix.T) / 2).to(dtype)), k=5, tolerance=1e-2)
        assert pairs.converged.all() and spectrum_columns(pairs, 0.1)["lambda_residual"] <= 1e-2
    poor = top_eigenpairs(Dense(torch.linspace(1, 2, 200).diag().double()), k=2, tolerance=1e-2, max_products=4)
    assert spectrum_columns(poor, 0.1)["lambda_residual"] == pytest.approx(float((poor.residuals / poor.values).max()))


# ---- the tools ----

@pytest.mark.parametrize("look", [widths, plot_sections, plot_overshoot, plot_overshoots])
def test_a_table_of_nothing_is_said_in_one_line(digits, look):
    with pytest.raises(WatchError, match="the table is empty; give that of a CurvatureWatch"):
        look(CurvatureWatch(sample_of(digits)).overshoots)


@pytest.fixture
def objective(digits):
    net = noisy().eval()
    return Objective(net, F.cross_entropy, sample_of(digits), weight_decay=1e-2), net


def gradients_of(objective, digits, count=3):
    draw = fresh_sample(digits.train_images, digits.train_labels, 32, seed=4)
    return torch.stack([objective.over(draw(i)).gradient()[1] for i in range(count)], 1)


def test_the_tools_leave_no_trace(objective, digits):
    one, net = objective
    pairs = top_eigenpairs(Hessian(one), 2)
    before, weights = state(net), one.weights.clone()
    gradients = gradients_of(one, digits)
    for _ in range(2):
        tables = step_overshoot(one, pairs.vectors, gradients, 0.1), cross_sections(one, pairs.vectors, gradients, 0.1)
    assert same(before, state(net)) and torch.equal(weights, one.weights)
    again = step_overshoot(one, pairs.vectors, gradients, 0.1), cross_sections(one, pairs.vectors, gradients, 0.1)
    for table, other in zip(tables, again):
        pd.testing.assert_frame_equal(table, other)


def test_overshoot_step_by_step(objective, digits):
    "Every number of the table, by hand."
    one, _ = objective
    vectors, gradients = top_eigenpairs(Hessian(one), 2).vectors, gradients_of(one, digits)
    table = step_overshoot(one, vectors, gradients, 0.1, factors=(0.5, 2.0))
    assert len(table) == 2 * 3 * (2 + 1 + 1) and table.notna().all().all()
    for row in table.itertuples():
        g = gradients[:, row.gradient]
        if row.direction != "random":
            step = g if row.direction == "gradient" else vectors[:, int(row.direction[1]) - 1] * (g @ vectors[:, int(row.direction[1]) - 1])
            assert row.loss == pytest.approx(one.loss(one.weights - row.factor * 0.1 * step), rel=1e-6)
            assert abs(row.step) == pytest.approx(float(row.factor * 0.1 * step.norm()), rel=1e-4)
        assert row.change == pytest.approx(100 * (row.loss - one.value) / one.value, abs=1e-9)


def test_the_quadratic_model_is_right_to_second_order(digits):
    "Half the step, an eighth of what it misses."
    images = digits.with_images(lambda x: x.double())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        smooth = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10)).double()
    one = Objective(smooth, F.cross_entropy, sample_of(images))
    vectors, gradients = top_eigenpairs(Hessian(one), 1).vectors, gradients_of(one, images)
    missed = []
    for lr in (0.002, 0.001):
        table = cross_sections(one, vectors, gradients, lr, steps=(4.0,))
        missed.append((table.loss - table.predicted).abs().max())
    assert missed[0] / missed[1] == pytest.approx(8, rel=0.05)


def test_slopes_and_curvatures_of_another_matrix(objective):
    one, _ = objective
    directions = torch.linalg.qr(torch.randn(one.size, 2, generator=torch.Generator().manual_seed(0)))[0]
    model = quadratic_model(one, directions, GGN(one))
    assert model.curvature.tolist() == pytest.approx((directions * (GGN(one) @ directions)).sum(0).tolist())
    assert model.slope.tolist() == pytest.approx((directions.T @ one.gradient()[1]).tolist(), abs=1e-6)


def test_widths_of_each_look(digits):
    watch = CurvatureWatch(sample_of(digits), k=2, batches=3, sections=1, overshoots=1, factors=(0.5, 1.0, 2.0))
    train(net_of(), digits, [watch])
    table = widths(watch.sections, levels=(1.01, 2.0))
    assert len(table) == 3 * 2 * 2 and set(table.at_step) == {0, 8, 16}
    assert (table.width.dropna() == (table.left + table.right).dropna()).all()
    levels = table.pivot(index=["at_step", "direction"], columns="level", values="width").dropna()
    assert (levels[2.0] > levels[1.01]).all()
    with pytest.raises(WatchError, match="draw one of them"):
        plot_sections(watch.sections)
    assert len(plot_overshoots(watch.overshoots).containers) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_angles_and_overlap_against_scipy(dtype):
    random = torch.Generator().manual_seed(0)
    for k, m, D in ((1, 1, 2), (3, 3, 40), (5, 2, 9), (4, 4, 4), (2, 7, 8)):
        V, W = (torch.linalg.qr(torch.randn(D, columns, generator=random, dtype=dtype))[0] for columns in (k, m))
        expected = np.sort(scipy.linalg.subspace_angles(V.double().numpy(), W.double().numpy()))
        tight = 20 * torch.finfo(dtype).eps**0.5 if dtype == torch.float32 else 1e-7
        assert principal_angles(V, W).tolist() == pytest.approx(expected.tolist(), abs=tight)
        assert overlap(V, W) == pytest.approx(np.square(np.cos(expected)).sum() / k, rel=1e-5)
        assert overlap(V, W) * k == pytest.approx(overlap(W, V) * m, rel=1e-5)

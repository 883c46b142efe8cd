"""The corners of `fit` that the notebook does not walk into."""

import dataclasses
import math
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.swa_utils import AveragedModel

from flatmin_nb.entropy_sgd import EntropySGD
from flatmin_nb.lab.data import load, scaled
from flatmin_nb.lab.errors import OneLineError
from flatmin_nb.lab.results import Run, histories, load_weights
from flatmin_nb.lab.results import load as load_runs
from flatmin_nb.lab.train import Best, Callback, ColumnError, Diverged, EarlyStopping, MonitorError, Plateau, Regime, Snapshots, evaluate, fit
from flatmin_nb.smoothout import SmoothOut


@pytest.fixture(scope="module")
def digits():
    return scaled(load("digits"), centre=0, scale=255)


def small_net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 10))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def train(images, make=lambda p: SGD(p, lr=0.05, momentum=0.9), net=None, **options):
    net = net or small_net()
    return net, fit(net, make(net.parameters()), images, **{"epochs": 2, "splits": ("test",), "progress": False} | options)


@pytest.mark.parametrize(("L", "extra", "evaluations"), [(0, False, 1), (1, False, 1), (5, False, 5), (5, True, 6)])
def test_entropy_sgd_pays_for_every_call_of_its_closure(digits, L, extra, evaluations):
    _, result = train(digits, lambda p: EntropySGD(p, lr=0.5, L=L, extra_evaluation=extra))
    assert result.steps == 2 * (len(digits.train_images) // 128)
    assert result.gradient_evaluations == evaluations * result.steps
    assert result.history.gradient_evaluations.tolist() == [evaluations * step for step in result.history.step]


def test_train_loss_is_the_mean_of_what_the_steps_returned(digits):
    class Told(SGD):
        losses = []

        def step(self, closure):
            value = super().step(closure)
            self.losses.append(value.item())
            return value

    _, result = train(digits, lambda p: Told(p, lr=0.05))
    per_epoch = len(digits.train_images) // 128
    means = [sum(Told.losses[i : i + per_epoch]) / per_epoch for i in (0, per_epoch)]
    assert result.history.train_loss.tolist() == pytest.approx(means, rel=1e-12)


def test_an_optimizer_that_returns_nothing(digits):
    class Silent(SGD):
        def step(self, closure):
            super().step(closure)

    net, silent = train(digits, lambda p: Silent(p, lr=0.05))
    other, told = train(digits, lambda p: SGD(p, lr=0.05))
    assert same(net, other)
    assert silent.history.train_loss.tolist() == pytest.approx(told.history.train_loss.tolist())


def test_no_validation_images_are_nan_and_not_zero(digits):
    _, result = train(digits, splits=("val", "test"))
    assert result.history.val_error.isna().all() and result.history.test_error.notna().all()


def test_modes_are_left_as_they_were(digits):
    net = small_net().eval()
    net[4].train()
    train(digits, net=net)
    assert [module.training for module in net] == [False, False, False, False, True, False]


def test_the_last_step_is_always_evaluated_and_others_when_asked(digits):
    per_epoch = len(digits.train_images) // 128
    assert train(digits, evaluate_every=0)[1].history.step.tolist() == [2 * per_epoch]
    steps = train(digits, evaluate_every=0, evaluate_every_steps=7)[1].history.step.tolist()
    assert steps == sorted({*range(7, 2 * per_epoch, 7), 2 * per_epoch})


def test_a_bar_goes_to_stderr_or_nowhere(digits, capsys):
    train(digits, epochs=1)
    assert capsys.readouterr() == ("", "")
    train(digits, epochs=1, progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "test_error=" in err


class Spoil(Callback):
    "Make something that is not a number, after so many steps."

    def __init__(self, step, spoil):
        self.at, self.spoil = step, spoil

    def before_step(self, loop):
        if loop.step == self.at:
            self.spoil(loop.model)


def overflow_gradient(model):
    model[5].bias.register_hook(lambda gradient: gradient * math.inf)


def test_a_gradient_that_overflows_is_named_and_the_last_good_checkpoint_kept(digits, tmp_path):
    run = Run(tmp_path, {})
    with pytest.raises(Diverged) as error:
        train(digits, run=run, callbacks=[Spoil(12, overflow_gradient)], save_every_steps=5)
    assert isinstance(error.value, OneLineError) and error.value.step == 13
    assert str(error.value) == "the gradient of '5.bias' is not finite at step 13; try a smaller learning rate"
    (row,) = load_runs(tmp_path).to_dict("records")
    assert (row["status"], row["reason"], row["diverged_at_step"]) == ("diverged", str(error.value), 13)
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["parts"]
    assert kept["loop"]["step"] == 10
    assert all(tensor.isfinite().all() for tensor in kept["model"].values())
    assert pd.read_csv(tmp_path / "history.csv").step.tolist() == [len(digits.train_images) // 128]
    assert not (tmp_path / "model.safetensors").exists()
    with pytest.raises(OSError, match="holds a run that is diverged"):
        Run(tmp_path, {})


def test_the_patience_of_a_gpu_names_the_same_step_and_saves_nothing_bad(digits, tmp_path, monkeypatch):
    from flatmin_nb.lab import train as module

    class Patient(module.Guard):
        def __init__(self, model, device):
            super().__init__(model, device)
            self.patience = 50

    monkeypatch.setattr(module, "Guard", Patient)
    with pytest.raises(Diverged, match="the gradient of '5.bias' is not finite at step 6;"):
        train(digits, run=Run(tmp_path, {}), callbacks=[Spoil(5, overflow_gradient)])
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["parts"]["loop"]["step"] == 0
    assert histories(tmp_path).empty  # no row before step 6


def test_a_gradient_that_is_large_but_finite_is_no_divergence(digits):
    net = small_net()
    net[5].weight.register_hook(lambda gradient: gradient.sign() * 1e20)  # its square is no float32 any more
    net.register_parameter("nothing", nn.Parameter(torch.empty(0)))  # it has no largest entry
    train(digits, lambda p: SGD(p, lr=1e-30), net=net, epochs=1, loss=lambda *a: nn.functional.cross_entropy(*a) + net.nothing.sum())
    assert net[5].weight.grad.abs().max() == 1e20


@torch.no_grad()
def overflow_statistics(model):
    model[2].running_mean.fill_(math.nan)  # no gradient ever meets it


def test_what_no_gradient_shows_is_not_saved(digits, tmp_path):
    with pytest.raises(Diverged, match="'model.2.running_mean' is not finite at step 20;"):
        train(digits, run=Run(tmp_path, {}), callbacks=[Spoil(13, overflow_statistics)])
    assert load_runs(tmp_path).status.tolist() == ["diverged"]


def test_numbers_that_are_large_but_finite_are_no_divergence(digits):
    class Large(Callback):
        def before_step(self, loop):
            loop.model[2].running_mean.fill_(3e38)

    train(digits, callbacks=[Large()])


def test_a_run_that_was_refused_before_its_first_step_can_be_corrected(digits, tmp_path):
    with pytest.raises(OneLineError, match="batch_size 5000 is larger"):
        train(digits, run=Run(tmp_path, {"batch_size": 5000}), batch_size=5000)
    train(digits, run=Run(tmp_path, {"batch_size": 500}), batch_size=500)
    assert load_runs(tmp_path)[["batch_size", "status"]].values.tolist() == [[500, "fitted"]]


def test_a_checkpoint_of_another_call_is_refused(digits, tmp_path):
    run = Run(tmp_path, {})
    train(digits, run=run)
    net = small_net()
    with pytest.raises(ValueError, match="only one of the two has 'average'"):
        train(digits, net=net, run=run, average=AveragedModel(net))


def test_a_fitted_run_is_not_trained_again(digits, tmp_path):
    net, first = train(digits, run=Run(tmp_path, {}), reestimate_batchnorm=True)
    other, again = train(digits, run=Run(tmp_path, {}), reestimate_batchnorm=True, callbacks=())
    assert same(net, other)
    pd.testing.assert_frame_equal(first.history, again.history)
    assert load_runs(tmp_path).status.tolist() == ["fitted"]


def test_evaluation_in_double_precision_and_on_a_net_of_one_layer(digits):
    double = dataclasses.replace(digits, train_images=digits.train_images.double(), test_images=digits.test_images.double())
    net, result = train(double, net=nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double())
    loss, error = evaluate(net, double.test_images, double.test_labels, batch_size=7)
    assert loss == pytest.approx(result.history.test_loss.iloc[-1], rel=1e-12)
    assert error == result.history.test_error.iloc[-1]


class Stop(Callback):
    "Has enough after so many steps, or at so many."

    def __init__(self, step, when="after_step"):
        self.at, self.when = step, when

    def after_step(self, loop):
        if self.when == "after_step" and loop.step == self.at:
            loop.stopped = "enough"

    def after_row(self, loop, row):
        if self.when == "after_row" and loop.step >= self.at:
            loop.stopped = "enough"


@pytest.mark.parametrize(("when", "at", "rows"), [("after_step", 9, [0, 5, 9]), ("after_row", 6, [0, 5, 10]), ("after_row", 0, [0])])
def test_a_stop_is_a_last_step(digits, tmp_path, when, at, rows):
    run = Run(tmp_path, {})
    net, result = train(digits, run=run, callbacks=[Stop(at, when)], evaluate_first=True, evaluate_every_steps=5, save_every=0)
    assert (result.history.step.tolist(), result.steps, result.stopped, result.status) == (rows, rows[-1], "enough", "fitted")
    assert run.checkpoint()["parts"]["loop"]["step"] == rows[-1] and run.record["summary"]["stopped"] == "enough"
    run.close()
    other, again = train(digits, run=Run(tmp_path, {}), callbacks=[Stop(None)], evaluate_first=True, evaluate_every_steps=5, save_every=0)
    assert same(net, other) and again.stopped == "enough"
    pd.testing.assert_frame_equal(again.history, result.history)


def test_nothing_is_said_of_a_stop_where_there_is_none(digits, tmp_path):
    _, result = train(digits, run=Run(tmp_path, {}))
    assert result.stopped == "" and "stopped" not in load_runs(tmp_path)


def test_a_first_row_is_taken_once(digits, tmp_path):
    class Killed(Callback):
        def after_step(self, loop):
            if loop.step == 20:
                raise KeyboardInterrupt

    whole, expected = train(digits, evaluate_first=True)
    with pytest.raises(KeyboardInterrupt):
        train(digits, run=Run(tmp_path, {}), callbacks=[Killed()], evaluate_first=True)
    net, resumed = train(digits, run=Run(tmp_path, {}), callbacks=[Callback()], evaluate_first=True)
    assert same(net, whole) and math.isnan(resumed.history.train_loss[0]) and resumed.history.step[0] == 0
    pd.testing.assert_frame_equal(resumed.history.drop(columns="seconds"), expected.history.drop(columns="seconds"))


def test_no_epochs_and_a_first_row(digits):
    assert train(digits, epochs=0, evaluate_first=True)[1].history.step.tolist() == [0]


def test_a_checkpoint_from_before_runs_could_be_stopped(digits, tmp_path):
    run = Run(tmp_path, {})
    net, _ = train(digits, run=run)
    state = run.checkpoint()
    del state["parts"]["loop"]["stopped"]
    run.save_checkpoint(state)
    other, again = train(digits, run=run)
    assert same(net, other) and again.stopped == ""


def test_examples_that_an_optimizer_takes_by_itself_are_paid_for(digits):
    class Spends(SGD):
        examples_spent = 1000  # before training

        def step(self, closure):
            self.examples_spent += 64
            return super().step(closure)

    net, result = train(digits, lambda p: Spends(p, lr=0.05, momentum=0.9))
    assert same(net, train(digits)[0])
    assert result.history.gradient_evaluations.tolist() == [1.5 * step for step in result.history.step]
    assert isinstance(train(digits)[1].gradient_evaluations, int)


class Numbers(Callback):
    "Rows with made-up numbers."

    def __init__(self, numbers):
        self.numbers = numbers

    def row(self, loop):
        return {"told": self.numbers[loop.step // 5]}


def watched(images, folder, net, optimizer, *others, epochs=10):
    "Everything that watches a column of the history, in one call of fit; the callbacks."
    callbacks = [Best(file=True), Plateau(optimizer, "told", patience=1, reload=True), EarlyStopping("told", patience=7), Snapshots(every=1)]
    options = dict(epochs=epochs, evaluate_every_steps=5, evaluate_every=0, save_every_steps=7, splits=("val", "test"), evaluate_first=True)
    numbers = [9, 8, 8, 8, 7, math.nan, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6]
    result = fit(net, optimizer, images, callbacks=[Numbers(numbers), *callbacks, *others], run=Run(folder, {}), progress=False, **options)
    return result, callbacks


@pytest.mark.parametrize("at", [1, 17, 21, 34, 41, 48, 63])  # the checkpoint of step 40 is of a row that goes back to the best weights
def test_what_watches_the_history_survives_a_kill(digits, tmp_path, at):
    class Killed(Callback):
        def after_step(self, loop):
            if loop.step == at:
                raise KeyboardInterrupt

    images, ends = scaled(load("digits", validation=0.2), centre=0, scale=255), []
    for name in ("whole", "killed"):
        if name == "killed":
            net = small_net()
            with pytest.raises(KeyboardInterrupt):
                watched(images, tmp_path / name, net, SGD(net.parameters(), lr=0.05, momentum=0.9), Killed())
        net = small_net()
        result, callbacks = watched(images, tmp_path / name, net, SGD(net.parameters(), lr=0.05, momentum=0.9), Callback())
        files = {file.name: file.read_bytes() for file in (tmp_path / name).glob("*.safetensors")}
        ends.append((result.history.drop(columns="seconds"), files, result.stopped, callbacks[0].best_row | {"seconds": 0}, callbacks[1].state_dict()["rule"]))
    pd.testing.assert_frame_equal(ends[0][0], ends[1][0], check_exact=True)
    assert ends[0][1:] == ends[1][1:]
    assert ends[0][2] == "told is no better than the 6 of step 30 for 7 rows" and ends[0][0].step.iloc[-1] == 65
    assert sorted(ends[0][1]) == ["best.safetensors", *(f"epoch-{epoch:04d}.safetensors" for epoch in range(65 // 8 + 1)), "model.safetensors"]
    assert ends[0][0].lr.round(12).tolist() == [0.05] * 4 + [0.005] * 5 + [5e-4] * 2 + [5e-5] * 2 + [5e-6]


def test_a_column_that_never_has_a_number_is_said_at_the_first_row(digits):
    for callback in (EarlyStopping(), Best(), Plateau(SGD(small_net().parameters(), lr=0.1))):
        with pytest.raises(MonitorError, match="is never a number, as there are no val images; hold some out"):
            train(digits, splits=("val", "test"), callbacks=[callback], evaluate_first=True)
        with pytest.raises(MonitorError, match="no column of the history 'val_"):
            train(digits, callbacks=[callback])


def test_the_best_of_an_average_is_the_average(digits):
    net, best = small_net(), Best("test_error")
    average = AveragedModel(net)
    _, result = train(digits, net=net, average=average, callbacks=[best])
    best.restore(net)
    assert evaluate(net, digits.test_images, digits.test_labels)[1] == result.history.test_error.min() == best.best_row["test_error"]


def test_more_may_be_better(digits):
    best, early = Best("told", mode="max"), EarlyStopping("told", patience=2, mode="max")
    _, result = train(digits, callbacks=[Numbers([1, 5, 5, 2, 7]), best, early], evaluate_every_steps=5)
    assert best.best_row["told"] == 5 and result.steps == 15


def test_the_learning_rate_of_an_optimizer_inside_another(digits):
    net = small_net()
    optimizer = SmoothOut(SGD(net.parameters(), lr=0.1), net, a=0.01)
    plateau = Plateau(optimizer, "told", patience=0, factor=0.5, min_lr=0.03)
    _, result = train(digits, lambda parameters: optimizer, net=net, callbacks=[Numbers([4] * 5), plateau], evaluate_every_steps=5)
    assert result.history.lr.tolist() == [0.1, 0.1, 0.05, 0.03]
    assert optimizer.base.param_groups[0]["lr"] == 0.03


def test_snapshots_need_a_run_and_epochs(digits):
    with pytest.raises(MonitorError, match="no folder for 'epoch-0000.safetensors'; give fit a run"):
        train(digits, callbacks=[Snapshots()])
    with pytest.raises(MonitorError, match="every must be an integer"):
        Snapshots(every=0.5)


@pytest.mark.parametrize("column", ["told", "test_loss"])
def test_a_column_is_written_once(digits, column):
    class Tells(Callback):
        def row(self, loop):
            return {column: 0.0}

    with pytest.raises(ColumnError, match=f"write the column '{column}'") as trouble:
        train(digits, callbacks=[Numbers([1] * 99), Tells()], evaluate_first=True)
    assert "\n" not in str(trouble.value)


# ---- Plateau beside others, and its rule by hand


class KilledAt(Callback):
    "Raises KeyboardInterrupt after a step."

    def __init__(self, step):
        self.at = step

    def after_step(self, loop):
        if loop.step == self.at:
            raise KeyboardInterrupt


def scheduled(images, folder, *others, settings, numbers):
    "A Regime and a Plateau on one optimizer, ten rows of one epoch each."
    net = small_net()
    optimizer = SGD(net.parameters(), lr=0.5, momentum=0.9)
    regime, plateau = Regime(optimizer, settings), Plateau(optimizer, "told", patience=0, factor=0.5)

    class Told(Callback):
        def row(self, loop):
            return {"told": numbers[round(loop.epoch)]}

    result = fit(net, optimizer, images, epochs=10, schedule=regime, callbacks=[Told(), plateau, *others], splits=("test",), run=Run(folder, {}), progress=False)
    return net, result.history.drop(columns="seconds")


@pytest.mark.parametrize("at", [25, 35, 45, 72])
def test_a_plateau_beside_a_regime_and_after_a_kill(digits, tmp_path, at):
    "The regime sets the learning rate where its settings begin, and in between it is the plateau's."
    options = dict(settings={0: dict(lr=0.1), 4: dict(lr=0.2), 6: dict(momentum=0.5)}, numbers=[9, 8, 8, 7, 6, 5, 5, 4, 4, 3, 2])
    net, history = scheduled(digits, tmp_path / "whole", Callback(), **options)
    assert history.lr.tolist() == [0.1, 0.1, 0.05, 0.05, 0.2, 0.2, 0.1, 0.1, 0.05, 0.05]
    with pytest.raises(KeyboardInterrupt):
        scheduled(digits, tmp_path / "killed", KilledAt(at), **options)
    other, resumed = scheduled(digits, tmp_path / "killed", KilledAt(None), **options)
    assert same(net, other)
    pd.testing.assert_frame_equal(resumed, history, check_exact=True)


def test_a_regime_changes_what_begins_and_nothing_else():
    optimizer = SGD(small_net().parameters(), lr=1.0, momentum=0.1)
    regime = Regime(optimizer, {0: dict(lr=0.5), 1: dict(momentum=0.2), 2: dict(lr=0.25), 3: dict(lr=0.125)}, stretch=0.75)
    (group,) = optimizer.param_groups
    seen = []
    for _ in range(4):
        seen.append((group["lr"], group["momentum"]))
        group["lr"] *= 0.9
        regime.step()
    assert seen == [(0.5, 0.1), (0.5 * 0.9, 0.2), (0.25, 0.2), (0.125, 0.2)]  # epochs 0.75, 1.5 and 2.25
    again = Regime(optimizer, {0: dict(lr=0.5), 2: dict(lr=0.25)})
    group["lr"] = 0.3
    again.load_state_dict({"epoch": 2})
    assert (again.epoch, group["lr"]) == (2, 0.3)


def rates(numbers, lr=0.1, **options):
    "The learning rates with which the rows were taken that have these numbers."
    optimizer = SGD(small_net().parameters(), lr=lr)
    plateau, found = Plateau(optimizer, "told", factor=0.5, **options), []
    for number in numbers:
        found.append(float(optimizer.param_groups[0]["lr"]))
        plateau.after_row(SimpleNamespace(optimizer=optimizer, step=0), {"told": number})
    return found


def test_the_rule_of_a_plateau_by_hand():
    assert rates([3, 3, 3, 3, 3, 3, 3], patience=0, cooldown=2) == [0.1, 0.1, 0.05, 0.05, 0.05, 0.025, 0.025]
    assert rates([10, 9.5, 9, 8.9], patience=0, threshold=0.6) == [0.1, 0.1, 0.05, 0.05]  # 9.5 gains less than 0.6, 9 gains 1; relative, none would be a gain
    assert rates([100, 99, 98], patience=0, threshold=0.6) == [0.1] * 3  # relative, neither would be a gain
    assert rates([3] * 4, lr=4e-9, patience=0) == [4e-9, 4e-9, 2e-9, 1e-9]  # however small


def test_a_plateau_goes_back_where_the_learning_rate_is_a_tensor(digits):
    net = small_net()
    optimizer = SGD(net.parameters(), lr=torch.tensor(0.05))
    went = []

    class Looks(Callback):
        def before_step(self, loop):
            went.append(plateau._back)

    plateau = Plateau(optimizer, "told", patience=0, reload=True)
    fit(net, optimizer, digits, epochs=1, callbacks=[Numbers([3, 4, 2]), Looks(), plateau], evaluate_every_steps=5, evaluate_first=True, splits=(), progress=False)
    assert [step for step, back in enumerate(went) if back] == [5]


def test_a_plateau_goes_back_to_the_weights_that_are_trained_and_not_to_their_average(digits):
    net, kept = small_net(), {}

    class Looks(Callback):
        def after_row(self, loop, row):
            kept[loop.step] = {name: value.clone() for name, value in loop.model.state_dict().items()}

        def before_step(self, loop):
            kept[loop.step, "next"] = {name: value.clone() for name, value in loop.model.state_dict().items()}

    optimizer = SGD(net.parameters(), lr=0.05)
    plateau = Plateau(optimizer, "told", patience=0, reload=True)
    options = dict(average=AveragedModel(net), evaluate_every_steps=5, evaluate_first=True, splits=(), progress=False)
    fit(net, optimizer, digits, epochs=2, callbacks=[Numbers([3, 2, 5, 1, 1]), plateau, Looks()], **options)
    assert all(torch.equal(kept[10, "next"][name], value) for name, value in kept[5].items())
    assert not all(torch.equal(kept[10][name], value) for name, value in kept[5].items())


def test_a_plateau_of_another_optimizer_is_refused(digits):
    net = small_net()
    with pytest.raises(MonitorError, match="the optimizer of Plateau is not the one that trains"):
        train(digits, net=net, callbacks=[Plateau(SGD(net.parameters(), lr=0.1), "test_loss")], evaluate_first=True, epochs=0)
    base = SGD(net.parameters(), lr=0.1)
    train(digits, lambda parameters: SmoothOut(base, net, a=0.01), net=net, callbacks=[Plateau(base, "test_loss")], epochs=1)


# ---- columns that come and go


class Sometimes(Callback):
    "A column in some rows only."

    def __init__(self, rows):
        self.rows = rows

    def row(self, loop):
        return self.rows[loop.step // 5]


def test_a_column_may_be_missing_after_the_first_row(digits, tmp_path):
    "A look every other row; the run is killed, and goes on with a row that has none."
    def run(*others):
        rows = [{"told": 5}, {}, {"told": 4}, {}, {}, {"told": 6}, {}]
        callbacks = [Sometimes(rows), best, EarlyStopping("told", patience=2), *others]
        return train(digits, callbacks=callbacks, run=Run(tmp_path, {}), epochs=3, evaluate_every=0, evaluate_every_steps=5, evaluate_first=True, save_every_steps=6)

    best = Best("told")
    with pytest.raises(KeyboardInterrupt):
        run(KilledAt(14))
    best = Best("told")
    _, result = run(KilledAt(None))
    assert (best.best_row["step"], best.best_row["told"], result.stopped) == (10, 4, "")
    for callback in (Best("told"), EarlyStopping("told")):
        with pytest.raises(MonitorError, match="no column of the history 'told'"):
            train(digits, callbacks=[Sometimes([{}, {"told": 1}]), callback], evaluate_first=True)


def test_only_what_is_measured_on_an_empty_split_is_never_a_number(digits):
    best = Best("val_like")
    train(digits, callbacks=[Sometimes([{"val_like": math.nan}, {"val_like": 2.0}, {"val_like": 1.0}, {}, {}]), best], evaluate_every_steps=5, evaluate_first=True)
    assert best.best_row["val_like"] == 1
    own = Best("val_error")  # measured by a callback, on images of its own
    train(digits, callbacks=[Sometimes([{"val_error": 3.0}] * 9), own], evaluate_first=True)
    assert own.best_row["val_error"] == 3


@pytest.mark.parametrize("value", ["3.5", None])
def test_a_column_of_text_is_refused(digits, value):
    with pytest.raises(MonitorError, match=f"told is {value!r} at step 0, which is no number; follow another column"):
        train(digits, callbacks=[Sometimes([{"told": value}]), Best("told")], evaluate_first=True)


# ---- stopping


def test_rows_without_a_number_do_not_count_as_waiting(digits):
    _, result = train(digits, callbacks=[Numbers([4, 3, math.nan, 3, math.nan, math.nan, 4, 4]), EarlyStopping("told", patience=3)], epochs=5, evaluate_every=0, evaluate_every_steps=5, evaluate_first=True)
    assert result.steps == 35


def test_a_stop_at_the_last_step_stops_nothing(digits, tmp_path):
    steps = 2 * (len(digits.train_images) // 128)
    for when in ("after_step", "after_row"):
        for _ in range(2):  # made again, it is the same
            _, result = train(digits, run=Run(tmp_path / when, {}), callbacks=[Stop(steps, when)])
            assert (result.steps, result.stopped) == (steps, "")
    assert "stopped" not in load_runs(tmp_path)


def test_the_first_reason_is_kept(digits):
    early = EarlyStopping("told", patience=1)
    _, result = train(digits, callbacks=[Numbers([3, 3, 3]), Stop(5), early], evaluate_every_steps=5, evaluate_first=True)
    assert (result.steps, result.stopped) == (5, "enough")


# ---- files


@pytest.mark.parametrize("first", [9.0, math.nan])
def test_the_best_file_after_a_kill_is_of_a_row_of_the_history(digits, tmp_path, first):
    "The row of step 5 was the best, and is not of the checkpoint: while it is taken again, the file is of the row before, or there is none."
    def run(*others):
        best = Best("told", file=True)
        callbacks = [Numbers([first, 1.0, 2.0, 2.0]), best, *others]
        return train(digits, callbacks=callbacks, run=Run(tmp_path, {}), epochs=1, evaluate_first=True, evaluate_every=0, evaluate_every_steps=5)

    with pytest.raises(KeyboardInterrupt):
        run(KilledAt(7))
    assert not same(weights_in(tmp_path / "best.safetensors"), small_net())
    with pytest.raises(KeyboardInterrupt):
        run(KilledAt(3))
    file = tmp_path / "best.safetensors"
    assert not file.exists() if math.isnan(first) else same(weights_in(file), small_net())


def weights_in(file):
    net = small_net()
    load_weights(net, file)
    return net


def test_the_clock_stands_still_while_snapshots_are_written(digits, tmp_path, monkeypatch):
    "By a clock on which nothing takes time but the writing of a snapshot."
    from flatmin_nb.lab import train as module

    write, now = Run.save_weights, [0.0]

    def slow(self, weights, name="model.safetensors"):
        now[0] += 1000 * name.startswith("epoch")
        write(self, weights, name)

    monkeypatch.setattr(Run, "save_weights", slow)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    _, result = train(digits, callbacks=[Snapshots(every=1)], run=Run(tmp_path, {}))
    assert (now[0], result.seconds, result.history.seconds.tolist()) == (3000, 0, [0, 0])

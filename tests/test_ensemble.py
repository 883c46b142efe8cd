"""The stack of lab.ensemble against runs that are written out one by one, and what takes too long or breaks too much for the notebook."""

import io
import math
import shutil
import signal
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flatmin_nb.lab import ensemble as ensemble_module
from flatmin_nb.lab.ensemble import DYNAMICS, LOSSES, PENALTIES, Ensemble, EnsembleError, Lanes, full_precision, gradient_flow, lanes_at_once, refuse_rounding, sde_weights
from flatmin_nb.lab.errors import OneLineError
from flatmin_nb.lab.scaled_nets import scaled_net
from flatmin_nb.lab.streams import key, normal, subsets, words

WAYS = {"sgd": dict(), "sgd_only_unfit": dict(dynamics="sgd_only_unfit"), "gd_sde": dict(dynamics="gd_sde"), "whole": dict(batch_size=None)}
B = 4
ways = pytest.mark.parametrize("way", WAYS)
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]


def pool(dtype=torch.float64, count: int = 300, d: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    "Inputs, and the labels of a product of two coordinates."
    x = normal(key(0, 99), torch.arange(count), d, torch.float64)
    return x.to(dtype), torch.where(x[:, 0] * x[:, 1] > 0, 1.0, -1.0).to(dtype)


X, Y = pool()
NET = scaled_net("mlp", (10,), width=16, depth=2, activation="relu")
SMOOTH = scaled_net("mlp", (10,), width=8, depth=1, activation="gelu")


def lanes_of(seeds, temperatures, alphas, sizes, shuffled: bool = True) -> Lanes:
    "Lanes that differ in all; each has rows of its own, in its own order."
    seeds = torch.tensor(seeds)
    rows = [torch.randperm(len(X), generator=torch.Generator().manual_seed(int(seed)))[:size] if shuffled else torch.arange(size) for seed, size in zip(seeds, sizes)]
    as_double = lambda values: torch.tensor(values, dtype=torch.float64)
    return Lanes(key(0, seeds), key(1, seeds), as_double(temperatures) * NET.width * B, as_double(alphas), rows)


def some() -> Lanes:
    return lanes_of([0, 1, 2, 3, 4], [0.02, 0.05, 0.01, 0.03, 0.04], [1.0, 0.3, 100.0, 10.0, 2.0], [12, 30, 20, 8, 25])


def chosen(lanes: Lanes, order) -> Lanes:
    return Lanes(lanes.weights[order], lanes.batches[order], lanes.dt[order], lanes.alpha[order], [lanes.rows[lane] for lane in order])


def stack(lanes: Lanes, net=NET, loss: str = "hinge", data=(X, Y), **options) -> Ensemble:
    return Ensemble(net, loss, *data, lanes, **dict(batch_size=B, max_step=4000, chunk=50) | options)


def bare(rows) -> list[tuple]:
    return [(row["status"], row["stopped"], row["steps"]) for row in rows]


class Last:
    "The weights and outputs of every lane at its end."

    def __init__(self):
        self.weights, self.outputs = {}, {}

    def __call__(self, view) -> list[dict]:
        for place, lane in enumerate(view.lanes):
            self.weights[lane] = {name: part[place].clone() for name, part in view.weights.items()}
            self.outputs[lane] = view.outputs[place].clone()
        return [{} for _ in view.lanes]


def first_weights(lanes: Lanes, lane: int, net=NET) -> dict[str, torch.Tensor]:
    return {name: part[0].requires_grad_() for name, part in net.init(lanes.weights[[lane]], dtype=torch.float64).items()}


def factors_of(way: str, lanes: Lanes, lane: int, step: int, u: torch.Tensor) -> torch.Tensor:
    "What each training example weighs in the mean of a step, [P]; `u` are the margins before it."
    P, where, at = len(u), lanes.batches[[lane]], torch.tensor([[step]])
    if way == "whole":
        return torch.full((P,), 1 / P, dtype=torch.float64)
    if way == "gd_sde":
        noise = normal(where, at[0], P, torch.float64)[0]
        return (1 + (P * (P - B) / (B * (P - 1))) ** 0.5 * (noise - noise.mean())) / P
    if way == "sgd":
        places = subsets(where, at, B, torch.tensor([P]))[0, 0]
    else:
        drawn = words(where, at[0], P)[0].tolist()
        places = sorted(range(P), key=lambda place: (bool(u[place] >= 1), drawn[place]))[:B]
    factors = torch.zeros(P, dtype=torch.float64)
    factors[places] = 1 / B
    return factors


def alone(way: str, lanes: Lanes, lane: int, net=NET, loss: str = "hinge", max_step: int = 4000, regular=None):
    "One lane by autograd, all its examples looked at after every step: t*/dt, or None, and its weights."
    weights, rows, alpha, dt = first_weights(lanes, lane, net), lanes.rows[lane], float(lanes.alpha[lane]), float(lanes.dt[lane])
    x, y, rule = X[rows], Y[rows], LOSSES[loss]
    f = lambda: net.function(weights, x)
    before = f().detach()
    for step in range(max_step):
        F = f() - before
        u = alpha * F * y
        if (u >= 1).all():
            return step, weights
        factors = factors_of(way, lanes, lane, step, u.detach())
        total = (factors * rule.value(u)).sum() / alpha
        if regular is not None:
            total = total + regular(weights, f(), before, y, alpha, (factors != 0).double() / (factors != 0).sum())
        gradients = torch.autograd.grad(total, list(weights.values()))
        with torch.no_grad():
            for part, gradient in zip(weights.values(), gradients):
                part -= dt * gradient
    return None, weights


def close(ours: dict, theirs: dict, **tolerance) -> None:
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name].detach(), **dict(rtol=1e-8, atol=1e-10) | tolerance)


# ---- a lane is what it would be alone


@ways
def test_a_lane_is_the_run_that_is_written_out(way):
    lanes, last = some(), Last()
    rows = stack(lanes, **WAYS[way]).run(last)
    assert {row["status"] for row in rows} == {"fitted"}
    for lane, row in enumerate(rows):
        steps, weights = alone(way, lanes, lane)
        assert (row["lane"], row["steps"], row["unfit"], row["alpha_loss"]) == (lane, steps, 0, 0)
        assert row["t"] == steps * float(lanes.dt[lane]) and row["margin"] >= 1
        close(last.weights[lane], weights)


@ways
def test_neither_company_nor_order_nor_their_number_matters(way):
    lanes = some()
    together, order = stack(lanes, **WAYS[way]).run(), [3, 0, 4, 2, 1]
    mixed = stack(chosen(lanes, order), at_once=2, chunk=7, **WAYS[way]).run()
    for place, lane in enumerate(order):
        (single,) = stack(chosen(lanes, [lane]), chunk=50, **WAYS[way]).run()
        assert bare([single]) == bare([mixed[place]]) == bare([together[lane]])
        assert single["margin"] == pytest.approx(together[lane]["margin"], rel=1e-9)


def test_the_time_to_fit_is_exact_on_many_problems():
    "Perceptrons, with everything looked at after every step."
    count, d = 40, 10
    labels = torch.where(X[:, 0] > 0, 1.0, -1.0).double()
    sizes, seeds = [5 + lane for lane in range(count)], list(range(count))
    lanes = lanes_of(seeds, [0.01 * (1 + lane % 7) for lane in seeds], [4.0 ** (lane % 3 - 1) for lane in seeds], sizes)
    rows = stack(lanes, scaled_net("linear", (d,)), data=(X, labels), max_step=20_000, chunk=64).run()
    assert {row["status"] for row in rows} == {"fitted"} and len({row["steps"] for row in rows}) > 25
    for lane, row in enumerate(rows):
        x, y, alpha = X[lanes.rows[lane]], labels[lanes.rows[lane]], float(lanes.alpha[lane])
        change = torch.zeros(d, dtype=torch.float64)
        drawn = subsets(lanes.batches[[lane]], torch.arange(row["steps"] + 1)[None], B, torch.tensor([sizes[lane]]))[0]
        step = 0
        while ((u := alpha * y * (x @ change) / d**0.5) < 1).any():
            batch = drawn[step]
            change += float(lanes.dt[lane]) / B * ((u[batch] < 1) * y[batch]) @ x[batch] / d**0.5
            step += 1
        assert row["steps"] == step


@pytest.mark.parametrize("loss", ["hinge", "quadhinge", "softhinge"])
@pytest.mark.parametrize("name", ["mlp", "mlp_bias", "linear", "diagonal_pair"])
def test_the_fast_path_equals_the_generic_one_in_float32(name, loss):
    options = {"mlp": (16, 2), "mlp_bias": (16, 2), "linear": (1, None), "diagonal_pair": (1, 2)}[name]
    lanes, ends = some(), {}
    lanes = lanes if loss == "hinge" else Lanes(lanes.weights, lanes.batches, lanes.dt / 40 / lanes.alpha.clamp_min(1), lanes.alpha, lanes.rows)
    for generic in (False, True):
        net = scaled_net(name, (10,), *options, activation="relu", generic=generic)
        last = Last()
        ends[generic] = bare(stack(lanes, net, loss, pool(torch.float32), max_step=60).run(last)), last.weights
    assert ends[False][0] == ends[True][0]
    for lane in range(len(lanes)):
        close(ends[False][1][lane], ends[True][1][lane], rtol=1e-4, atol=1e-4)


def test_every_lane_has_its_own_limit():
    limits = [3, 0, 17, 4000, 4000]
    rows = stack(some(), max_step=limits, levels=[0.5, 0.9]).run()
    assert [row["steps"] for row in rows[:3]] == limits[:3] and bare(rows)[3:] == bare(stack(some()).run())[3:]
    assert bare(rows)[:3] == [("unconverged", "steps", limit) for limit in limits[:3]]


def test_a_margin_below_one_ends_a_run_at_the_first_look_that_finds_it():
    lanes, last = some(), Last()
    rows = stack(lanes, margin=0.25, chunk=10).run(last)
    full = stack(lanes).run()
    for lane, (row, whole) in enumerate(zip(rows, full)):
        assert row["status"] == "fitted" and row["steps"] <= whole["steps"] and row["steps"] % 10 == 0 or row["stopped"] == "zero loss"
        u = float(lanes.alpha[lane]) * Y[lanes.rows[lane]] * last.outputs[lane][: len(lanes.rows[lane])]
        assert u.min() >= 0.25 and row["margin"] == pytest.approx(u.min().item()) and row["unfit"] == (u < 1).sum()
    assert "margin" in {row["stopped"] for row in rows}
    assert bare(stack(lanes, margin=3.0).run()) == bare(full)  # there is nothing to be had beyond 1


def test_squared_errors_end_at_a_billionth():
    lanes = lanes_of([0, 1, 2], [0.02, 0.004, 0.03], [1.0, 8.0, 0.5], [6, 5, 4])
    rows = stack(lanes, scaled_net("linear", (10,)), "mse", max_step=20_000, chunk=20).run()
    assert all(row["status"] == "fitted" and row["alpha_loss"] <= 1e-9 for row in rows)
    for row in rows:
        (before,) = stack(chosen(lanes, [row["lane"]]), scaled_net("linear", (10,)), "mse", max_step=row["steps"] - 20, chunk=20).run()
        assert before["status"] == "unconverged" and before["alpha_loss"] > 1e-9


def test_a_dead_net_is_told_from_one_that_fits_and_harms_nobody():
    quiet = lanes_of([0, 1, 4, 7, 3], [0.02, 30.0, 30.0, 60.0, 0.03], [1.0, 1.0, 1.0, 1.0, 10.0], [12, 30, 50, 40, 8])
    rows = stack(quiet).run()
    assert [row["status"] for row in rows] == ["fitted", "diverged", "diverged", "diverged", "fitted"]
    assert bare([rows[0], rows[4]]) == bare(stack(chosen(quiet, [0, 4])).run())
    for lane in (1, 2, 3):
        assert rows[lane]["stopped"] == "dead"
        _, weights = alone("sgd", quiet, lane, max_step=rows[lane]["steps"])
        batch = quiet.rows[lane][subsets(quiet.batches[[lane]], torch.tensor([[rows[lane]["steps"]]]), B, torch.tensor([len(quiet.rows[lane])]))[0, 0]]
        assert (NET.function(weights, X[batch]) == 0).all()


def test_the_step_of_the_first_numbers_that_are_none():
    wild, net = lanes_of([4, 5], [30.0, 0.02], [1.0, 1.0], [50, 12]), scaled_net("linear", (10,))
    rows = stack(wild, net, "quadhinge", max_step=5000).run()
    assert bare(rows)[0][:2] == ("diverged", "not finite") and bare(rows)[1] == bare(stack(chosen(wild, [1]), net, "quadhinge", max_step=5000).run())[0]
    limit = rows[0]["steps"]
    last = Last()
    stack(wild, net, "quadhinge", max_step=[limit, 1]).run(last)
    assert last.weights[0]["output"].abs().max() > 1e100


def test_a_loss_beyond_float32_is_the_end_though_the_outputs_are_numbers():
    "The square of a margin of 1e20 is one in float64, in which looks are made, and none in float32, in which steps are."
    lanes = chosen(some(), [2])
    rows = [stack(lanes, scaled_net("linear", (10,)), "quadhinge", pool(dtype), max_step=60_000).run(max_wall=5)[0] for dtype in (torch.float32, torch.float64)]
    assert [row["status"] for row in rows] == ["diverged", "diverged"] and rows[0]["steps"] < rows[1]["steps"] < 2000


# ---- what a step does


def test_a_step_asks_the_device_for_nothing(monkeypatch):
    reads = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            masks = function.overloadpacket is torch.ops.aten.index and any(part is not None and part.dtype == torch.bool for part in args[1])
            if masks or function.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal, torch.ops.aten.masked_select):
                reads.append(str(function))
            return function(*args, **kwargs or {})

    tolist, inside = torch.Tensor.tolist, []
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: reads.append("tolist") or tolist(tensor))
    for method in ("_step", "_advance"):
        plain = getattr(Ensemble, method)

        def watched(self, *args, plain=plain, method=method):
            had = len(reads)
            with Watch():
                plain(self, *args)
            inside.append((method, len(reads) - had))

        monkeypatch.setattr(Ensemble, method, watched)
    for options in (*WAYS.values(), dict(penalty="l2", strength=1e-3), dict(centred=True)):
        stack(some(), max_step=100, levels=[0.5], marks=[7], **options).run()
    assert {count for method, count in inside if method == "_step"} == {0}
    assert max(count for method, count in inside if method == "_advance") <= 2 * 51  # on a CPU one `.any()` a step, which two watches see


@pytest.mark.parametrize("way", ["sgd", "whole"])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_penalties_by_another_derivation(penalty, way):
    "Double backward passes of plain autograd; the whole batches of lanes are of different lengths."
    lanes, strength, last = lanes_of([0, 1, 2, 3], [0.002, 0.005, 0.001, 0.003], [1.0, 0.3, 4.0, 2.0], [12, 30, 20, 8]), 0.05, Last()

    def regular(weights, f, before, y, alpha, share):
        parts = list(weights.values())
        squared = lambda mean: sum(part.square().sum() for part in torch.autograd.grad(mean, parts, create_graph=True))
        return strength * {
            "l2": lambda: sum(part.square().sum() for part in parts) / 2,
            "l1": lambda: sum(part.abs().sum() for part in parts),
            "norm_grad_loss": lambda: squared((share * LOSSES["quadhinge"].value(alpha * (f - before) * y)).sum() / alpha),
            "norm_grad_net": lambda: squared((share * f).sum()),
        }[penalty]()

    stack(lanes, SMOOTH, "quadhinge", penalty=penalty, strength=strength, max_step=6, **WAYS[way]).run(last)
    for lane in range(len(lanes)):
        _, weights = alone(way, lanes, lane, SMOOTH, "quadhinge", 6, regular)
        close(last.weights[lane], weights)
    plain = Last()
    stack(lanes, SMOOTH, "quadhinge", max_step=6, **WAYS[way]).run(plain)
    assert all((last.weights[lane]["output"] - plain.weights[lane]["output"]).abs().max() > 1e-9 for lane in range(len(lanes)))


def test_the_noise_of_gd_sde_has_the_covariance_of_that_of_sgd():
    "One step of many lanes that begin alike."
    count, P, d, b = 20_000, 7, 3, 2
    x, y = pool(count=P, d=d)
    seeds = torch.arange(count)
    same = torch.ones(count, dtype=torch.float64)
    lanes = Lanes(key(0, torch.zeros_like(seeds)), key(1, seeds), same, same, [torch.arange(P)] * count)
    moved = {}
    for dynamics in ("sgd", "gd_sde"):
        found = []
        ensemble = Ensemble(scaled_net("linear", (d,)), "hinge", x, y, lanes, batch_size=b, max_step=1, dynamics=dynamics, at_once=count)
        ensemble.run(lambda view: found.append((view.weights["output"] - view.initial["output"]).clone()) or [{}] * len(view.lanes))
        moved[dynamics] = torch.cat(found)
    gradients = y[:, None] * x / d**0.5
    pairs = torch.combinations(torch.arange(P), b)
    means = gradients[pairs].mean(1)
    exact = (means - means.mean(0)).T @ (means - means.mean(0)) / len(means)
    scale = exact.diagonal().sqrt()
    for change in moved.values():
        off = change.mean(0) - gradients.mean(0)
        assert (off.abs() < 5 * scale / count**0.5).all()
        assert ((change.T.cov() - exact).abs() < 5 * 2**0.5 * scale * scale[:, None] / count**0.5).all()
    assert (sde_weights(torch.randn(2, P), torch.ones(2, P, dtype=torch.bool), torch.tensor([P, P]), P) == 1).all()


def test_precision_is_what_it_was_after_an_exception():
    kept = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    settings = lambda: (torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    seen = []

    def broken(view):
        seen.append(settings())
        raise KeyboardInterrupt

    try:
        torch.set_float32_matmul_precision("medium")
        torch.backends.cudnn.allow_tf32 = True
        before = settings()
        with pytest.raises(KeyboardInterrupt):
            stack(some(), max_step=3).run(broken)
        with pytest.raises(ZeroDivisionError), full_precision():
            seen.append(settings())
            1 / 0
        assert seen == [("highest", False, False)] * 2 and settings() == before
    finally:
        torch.set_float32_matmul_precision(kept[0])
        torch.backends.cudnn.allow_tf32 = kept[1]


# ---- refusals


def refused(action, *parts: str) -> None:
    with pytest.raises(EnsembleError) as caught:
        action()
    message = str(caught.value)
    assert isinstance(caught.value, OneLineError) and len(message.splitlines()) == 1 and all(part in message for part in parts), message


def test_an_output_scale_that_float32_cannot_carry():
    "The worst lane is named; the remedies work."
    lanes = lanes_of([0, 1, 2], [0.02] * 3, [1.0, 2.0**24, 2.0**22], [12] * 3)
    refused(lambda: stack(lanes, data=pool(torch.float32)).run(), "alpha = 1.67772e+07", "float32", "float64, the centred form, or a smaller alpha")
    assert {row["status"] for row in stack(lanes).run() + stack(lanes, data=pool(torch.float32), centred=True).run()} == {"fitted"}
    refuse_rounding(torch.tensor([1.0]), torch.zeros(1, 3))


@pytest.mark.parametrize(
    "options, parts",
    [
        (dict(loss="hinges"), ("no loss 'hinges'", "did you mean 'hinge'")),
        (dict(dynamics="gf"), ("gf", "gd_sde")),
        (dict(penalty="l3"), ("no penalty 'l3'",)),
        (dict(penalty="l2", centred=True), ("centred form has no penalty",)),
        (dict(batch_size=9), ("batch_size 9", "8 training examples")),
        (dict(batch_size=0), ("batch_size",)),
        (dict(batch_size=2.5), ("batch_size",)),
        (dict(chunk=0), ("chunk",)),
        (dict(margin=math.nan), ("margin",)),
    ],
)
def test_options_that_mean_nothing(options, parts):
    refused(lambda: stack(some(), **options), *parts)


def test_lanes_that_are_none():
    one = chosen(some(), [0])
    refused(lambda: Lanes(one.weights, one.batches, one.dt, one.alpha, []), "0 rows")
    refused(lambda: Lanes(one.weights[:0], one.batches[:0], one.dt[:0], one.alpha[:0], []), "0 weights")
    refused(lambda: Lanes(one.weights, one.batches, torch.tensor([0.0]), one.alpha, one.rows), "dt must be a positive number", "got 0.0")
    refused(lambda: Lanes(one.weights, one.batches, one.dt, torch.tensor([math.nan]), one.rows), "alpha must be a positive number", "got nan")


def test_how_many_step_together():
    big = scaled_net("mlp", (784,), width=128, depth=5, activation="relu")
    small = scaled_net("linear", (10,))
    assert lanes_at_once(big, torch.float32, torch.device("cpu")) == 2 * lanes_at_once(big, torch.float64, torch.device("cpu"))
    assert lanes_at_once(small, torch.float32, torch.device("cpu")) == 512 and lanes_at_once(small, torch.float32, torch.device("cuda")) == 4096


# ---- looks, checkpoints


@ways
def test_a_run_goes_on_bit_for_bit(way):
    "From a checkpoint in the middle, between levels and marks, with lanes that have ended and lanes that wait."
    options = dict(at_once=3, chunk=16, levels=[2.0**-k for k in range(12)], marks=[2**k for k in range(8)], **WAYS[way])
    saved = []

    def keep(state):
        saved.append(io.BytesIO())
        torch.save(state, saved[-1])

    whole = stack(some(), **options)
    rows = whole.run(save=keep, every=0)
    assert len(saved) > 5
    for place in (0, len(saved) // 2, len(saved) - 1):
        saved[place].seek(0)
        again = stack(some(), **options)
        again.load_state_dict(torch.load(saved[place], weights_only=True))
        assert again.run() == rows and again.history == whole.history
    assert bare(rows) == bare(stack(some(), **WAYS[way]).run())
    refused(lambda: stack(some(), **options | dict(chunk=17)).load_state_dict(whole.state_dict()), "state of other runs")


@ways
def test_every_level_is_seen_once_and_every_mark_at_its_step(way):
    marks = [1, 3, 10, 30]
    watched = stack(some(), levels=[0.75, 0.5, 0.25], marks=marks, chunk=9, **WAYS[way])
    rows = watched.run()
    for lane, row in enumerate(rows):
        states = [state for state in watched.history if state["lane"] == lane]
        assert [states[0]["event"], states[-1]["event"]] == ["start", "end"] and states[-1]["alpha_loss"] == row["alpha_loss"] == 0
        steps = [state["step"] for state in states]
        assert steps == sorted(steps) and {mark for mark in marks if mark < row["steps"]} <= set(steps)
        assert len(states) <= 2 + 3 + len(marks)


# ---- compiled


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")), reason="there is no C++ compiler")
@pytest.mark.parametrize("few", [0, 10**6])
def test_a_compiled_stack_shrinks_and_equals_the_plain_one(few, monkeypatch):
    "Where the whole step is compiled, and where only what lies between the products is."
    monkeypatch.setattr(ensemble_module, "FEW", few)
    torch._dynamo.reset()
    seeds = list(range(6))
    lanes = lanes_of(seeds, [0.02] * 6, [1.0, 1.0, 1.0, 100.0, 100.0, 100.0], [8, 8, 20, 12, 16, 30])
    widths, plain_step = set(), Ensemble._step

    class Watched(Ensemble):
        def _step(self, stack, *rest):
            widths.add(len(stack.lane))
            plain_step(self, stack, *rest)

    lasts, rows = {}, {}
    for compiled in (False, True):
        lasts[compiled] = Last()
        ensemble = Watched(NET, "hinge", X, Y, lanes, batch_size=B, max_step=4000, chunk=50, compiled=compiled)
        widths.clear()
        rows[compiled] = ensemble.run(lasts[compiled])
    assert widths == {6, 4, 2, 1} or widths <= {6, 4, 2, 1} and len(widths) > 2, widths
    assert bare(rows[True]) == bare(rows[False]) and {row["status"] for row in rows[True]} == {"fitted"}
    for lane in seeds:
        close(lasts[True].weights[lane], lasts[False].weights[lane])


# ---- gradient flow


@contextmanager
def within(seconds: int):
    "TimeoutError instead of waiting for ever."

    def late(*_):
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def weights_and_flow(factor: float = 1.0):
    "The states of the gradient flow of a small net from the start, which may be zero."
    weights = {name: factor * part[0] for name, part in SMOOTH.init(key(0, torch.tensor([0])), dtype=torch.float64).items()}
    return lambda loss, **options: list(gradient_flow(SMOOTH, loss, X[:8], Y[:8], weights, alpha=1.0, **options))


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="there is no SIGALRM")
@pytest.mark.parametrize("factor, loss, margin", [(0.0, "hinge", 1.0), (1.0, "softhinge", 1.5)])
def test_a_flow_that_cannot_go_on_says_so(factor, loss, margin):
    "A net that says nothing has no gradient, and beyond the margin of 1 there is none."
    with within(20):
        refused(lambda: weights_and_flow(factor)(loss, margin=margin), "has stopped moving", "smaller margin")


def test_a_flow_ends_at_the_margin_or_in_time():
    flow = weights_and_flow()
    states = flow("quadhinge", margin=0.9)
    u = states[-1].outputs * Y[:8]
    assert u.min() == pytest.approx(0.9, abs=1e-9) and [state.t for state in states] == sorted(state.t for state in states)
    assert states[-1].loss == pytest.approx(LOSSES["quadhinge"].value(u).mean().item())
    *_, cut = flow("quadhinge", until=states[-1].t / 2)
    assert cut.t == states[-1].t / 2 and states[-1].loss < cut.loss < 1


# ---- what only a CUDA device can show


@contextmanager
def no_waiting():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("way", [pytest.param(way, marks=gpu) for way in WAYS])
def test_on_a_gpu_the_numbers_are_those_of_the_cpu(way):
    lanes, here, there = some(), Last(), Last()
    rows = stack(lanes, **WAYS[way]).run(here)
    assert bare(stack(lanes, data=(X.cuda(), Y.cuda()), **WAYS[way]).run(there)) == bare(rows)
    for lane in range(len(lanes)):
        close({name: part.cpu() for name, part in there.weights[lane].items()}, here.weights[lane])


@pytest.mark.parametrize("way", [pytest.param(way, marks=gpu) for way in WAYS])
def test_on_a_gpu_a_step_does_not_wait(way, monkeypatch):
    plain, waited = Ensemble._advance, []

    def advance(self):
        if not waited:  # libraries start and buffers are made
            plain(self)
            waited.append(True)
            return
        with no_waiting():
            plain(self)

    monkeypatch.setattr(Ensemble, "_advance", advance)
    stack(some(), data=(X.float().cuda(), Y.float().cuda()), max_step=300, levels=[0.5], **WAYS[way]).run()


@pytest.mark.parametrize("way", [pytest.param(way, marks=gpu) for way in WAYS])
def test_on_a_gpu_a_run_goes_on_bit_for_bit(way):
    saved, data = [], (X.cuda(), Y.cuda())

    def keep(state):
        saved.append(io.BytesIO())
        torch.save(state, saved[-1])

    rows = stack(some(), data=data, chunk=16, levels=[0.5, 0.25], **WAYS[way]).run(save=keep, every=0)
    saved[len(saved) // 2].seek(0)
    again = stack(some(), data=data, chunk=16, levels=[0.5, 0.25], **WAYS[way])
    again.load_state_dict(torch.load(saved[len(saved) // 2], map_location="cpu", weights_only=True))
    assert again.run() == rows


def test_all_ways_are_here():
    assert set(DYNAMICS) == set(WAYS) - {"whole"}

"""The runs of the SGD regimes: a stack of them and a file of one say the same, what is measured is what plain autograd measures, and a run that was broken off does not look finished."""

import math
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from flatmin_nb import sgd_regimes_runs as runs
from flatmin_nb.lab import pickles
from flatmin_nb.lab.ensemble import LOSSES, EnsembleError, View
from flatmin_nb.lab.results import Run
from flatmin_nb.lab.scaled_nets import scaled_net
from flatmin_nb.lab.streams import key, normal, permutation
from flatmin_nb.sgd_regimes_runs import RegimeError, Setting, drift, ensemble_of, examples, gradient_statistics, grid, import_old, kernel_statistics, losses, run_to_file, sweep

PERCEPTRON = Setting(dataset="depleted_sign", d=16, data_chi=1.0, ptr=64, pte=128, arch="linear", dynamics="sgd", alpha=1.0, temp=0.5, bs=2)
NET = Setting(dataset="digits_parity", ptr=48, pte=100, arch="mlp", act="gelu", h=8, L=2, dynamics="sgd", alpha=1.0, temp=0.02, bs=4, max_step=1500)


def written(setting: Setting, path: Path) -> tuple[dict, dict, dict]:
    "What became of the run, and the two parts of its file by plain pickle."
    outcome = run_to_file(setting, path)
    with open(path, "rb") as file:
        return outcome, pickle.load(file), pickle.load(file)


def states_of(data: dict) -> list[dict]:
    return data[data["args"]["dynamics"]]["dynamics"]


# ---- a sweep and a file


@pytest.mark.parametrize("changes", [{}, dict(dynamics="gd_sde"), dict(dynamics="sgd_only_unfit"), dict(loss="quadhinge", temp=0.002), dict(dtype="f64", mind_stop=0.5), dict(regularizer="l2", regu_scale=1e-4)])
def test_a_sweep_says_what_the_files_say(changes, tmp_path):
    base = NET.but(**dict(max_step=800, ckpt_modulo=40) | changes)
    settings = grid(base, alpha=[0.5, 4.0], seed_init=[0, 1], ptr=[24, 48])
    assert [(s.alpha, s.seed_init, s.ptr) for s in settings[:3]] == [(0.5, 0, 24), (0.5, 0, 48), (0.5, 1, 24)]
    table = sweep(settings).table
    assert len(table) == 8 and table.status.isin(["fitted", "unconverged"]).all() and ((table.status == "fitted").any() or base.loss == "quadhinge")
    for place in (0, 3, 6):
        row, (outcome, _, data) = table.iloc[place], written(settings[place], tmp_path / f"{place}.pk")
        last = states_of(data)[-1]
        assert row.status == outcome["status"]
        if base.regularizer is None and base.mind_stop == 1:  # the others end when they are looked at, which is more often in a file
            assert (row.stopped, row.steps, row.t) == (outcome["stopped"], outcome["steps"], outcome["t"])
            assert (row.train_err, row.test_err, row.weight_change) == (last["train"]["err"], last["test"]["err"], pytest.approx(last["weight_change"], rel=1e-4))


def test_a_state_does_not_depend_on_who_shares_the_stack():
    settings = grid(NET.but(ckpt_grad_stats=12), seed_init=[0, 1, 2], alpha=[1.0, 16.0], ptr=[32, 48])
    together, few = sweep(settings).table, sweep(settings[::-1], at_once=5, chunk=32).table.iloc[::-1].reset_index(drop=True)
    alone = sweep(settings[7:8]).table
    for name in ("status", "steps", "test_err", "unfit"):
        assert together[name].tolist() == few[name].tolist() and together[name][7] == alone[name][0]
    for name in ("test_loss", "weight_change", "train_kernel_relative_change", "test_kernel_alignment", "train_grad_l_norm", "change_hidden1", "change_output"):
        assert np.allclose(together[name], few[name], rtol=1e-3, atol=1e-7) and np.allclose(together[name][7], alone[name][0], rtol=1e-3, atol=1e-7), name


def test_a_sweep_goes_on_where_it_was_killed(tmp_path):
    settings = grid(PERCEPTRON, seed_init=range(6), temp=[0.5, 2.0])
    whole = sweep(settings, at_once=4, chunk=20).table

    class Killed(Exception): ...

    def kill(rows):
        if len(rows) >= 4:
            raise Killed

    run = Run(tmp_path / "run", {})
    ensemble, _ = ensemble_of(settings, at_once=4, chunk=20)
    with pytest.raises(Killed):
        ensemble.run(save=run.save_checkpoint, every=0, on_end=kill)
    assert run.checkpoint()["rows"]
    again = sweep(settings, run=run, at_once=4, chunk=20).table
    assert again[["lane", "status", "steps", "margin"]].equals(whole[["lane", "status", "steps", "margin"]])


def test_what_a_stack_may_differ_in():
    with pytest.raises(RegimeError, match="may differ in seed_init"):
        ensemble_of([NET, NET.but(h=16)])
    with pytest.raises(RegimeError, match="run by run"):
        ensemble_of([Setting(**PERCEPTRON.model_dump(include=PERCEPTRON.model_fields_set - {"temp", "bs"}) | dict(dynamics="gf"))])
    with pytest.raises(RegimeError, match="no run"):
        examples([])


# ---- what must hold


@pytest.mark.parametrize("loss", ["hinge", "quadhinge"])
def test_the_linear_model_knows_only_alpha_times_temperature(loss):
    "(α w, α t | α T): powers of two are exact in float32, so all is equal bit for bit."
    alphas = [1.0, 2.0**-5, 2.0**7]
    temperature = 0.5 if loss == "hinge" else 2.0**-6
    settings = [PERCEPTRON.but(alpha=alpha, temp=temperature / alpha, loss=loss, max_step=5000) for alpha in alphas]
    ensemble, _ = ensemble_of(settings)
    change = {}

    def observe(view: View) -> list[dict]:
        for place, lane in enumerate(view.lanes):
            change[lane] = view.weights["output"][place] - view.initial["output"][place], view.outputs[place]
        return [{}] * len(view.lanes)

    centred, _ = ensemble_of(settings, centred=True)  # w - w_0 itself, which the sum with w_0 would round
    rows = centred.run(observe)
    assert len({row["steps"] for row in rows}) == len({row["margin"] for row in rows}) == len({row["status"] for row in rows}) == 1 and rows[0]["steps"] > 20
    for lane, alpha in enumerate(alphas):
        assert torch.equal(alpha * change[lane][1], change[0][1])
        torch.testing.assert_close(alpha * change[lane][0], change[0][0], rtol=0, atol=4e-6 * max(alpha, 1))
        assert rows[lane]["t"] * alpha == rows[0]["t"]


def test_numbers_that_are_none_are_errors():
    y = torch.tensor([1.0, -1.0, 1.0, -1.0])
    for value in (math.nan, math.inf, -math.inf):
        found = losses(LOSSES["hinge"], 1.0, torch.tensor([2.0, -2.0, value, -2.0]), y)
        assert found["err"] == 0.25
    assert losses(LOSSES["hinge"], 1.0, torch.zeros(4), y)["err"] == 1 and losses(LOSSES["hinge"], 1.0, torch.full((4,), math.nan), y)["nd"] == 4


def test_a_run_that_diverges_is_told_as_such(tmp_path):
    wild = PERCEPTRON.but(loss="quadhinge", temp=100.0, max_step=20_000, max_wall=20.0)
    outcome, _, data = written(wild.but(dtype="f64"), tmp_path / "wild.pk")
    assert (outcome["status"], data["status"], data["finished"]) == ("diverged", "diverged", True)
    assert states_of(data)[-1]["train"]["err"] > 0 and (import_old(tmp_path).status == "diverged").all()


# ---- measurements


def tiny():
    net = scaled_net("mlp", (5,), width=6, depth=2, activation="gelu")
    weights, initial = (net.init(key(seed), dtype=torch.float64) for seed in (0, 1))
    x = normal(key(2), torch.arange(9), 5, torch.float64)
    return net, {name: initial[name] + 0.1 * weights[name] for name in initial}, initial, x, torch.where(x[:, 0] > 0, 1.0, -1.0).double()


def rows_of_gradients(net, weights, x, of=lambda f: f):
    leaves = {name: part.clone().requires_grad_() for name, part in weights.items()}
    found = []
    for example in x:
        parts = torch.autograd.grad(of(net.function(leaves, example[None])[0]), list(leaves.values()))
        found.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(found)


def test_statistics_of_gradients_by_plain_autograd():
    net, weights, initial, x, y = tiny()
    alpha, loss = 3.0, LOSSES["quadhinge"]
    numbers, tensors = gradient_statistics(net, loss, alpha, weights, initial, x, y)
    J, J0 = rows_of_gradients(net, weights, x), rows_of_gradients(net, initial, x)
    before = net.function(initial, x)
    L = torch.stack([rows_of_gradients(net, weights, x[[i]], lambda f, i=i: loss.value(alpha * (f - before[i]) * y[i]) / alpha)[0] for i in range(9)])
    K, K0 = J @ J.T, J0 @ J0.T
    torch.testing.assert_close(tensors["kernel"], K)
    torch.testing.assert_close(tensors["l"], L.mean(0))
    expected = dict(
        grad_f_norm=J.mean(0).norm() ** 2, grad_f_var=((J - J.mean(0)) ** 2).sum(1).mean(), grad_l_norm=L.mean(0).norm() ** 2, grad_l_var=((L - L.mean(0)) ** 2).sum(1).mean(),
        kernel_change=((K - K0) ** 2).mean(), kernel_norm=(K**2).mean(), kernel_yky=y @ K @ y, kernel_relative_change=(K - K0).norm() / K0.norm(),
        kernel_alignment=y @ K @ y / (K.norm() * 9), kernel_y_norm=(y / 9) @ torch.linalg.solve(K, y / 9),
    )  # fmt: skip
    assert numbers.keys() == expected.keys()
    for name, value in expected.items():
        assert numbers[name] == pytest.approx(float(value), rel=1e-6), name
    assert math.isnan(kernel_statistics(torch.full((3, 3), math.nan), K0[:3, :3], y[:3])["kernel_y_norm"])


def test_drift_by_small_steps_of_descent():
    "Gradient flow by 4,000 small steps; SGD and GD by hand."
    net, weights, initial, x, y = tiny()
    setting = Setting(dataset="sign", d=5, ptr=9, pte=1, arch="mlp", act="gelu", h=6, L=2, loss="softhinge", alpha=2.0, dynamics="sgd", dt=0.5, bs=3, ckpt_drift=1, ckpt_drift_n0=2, gf_tol=1e-8)
    before, loss, order = net.function(initial, x), LOSSES["softhinge"], torch.tensor([4, 2, 8, 1, 0, 3, 5, 6, 7])

    def stepped(w, rows, dt):
        leaves = {name: part.clone().requires_grad_() for name, part in w.items()}
        mean = loss.value(2.0 * (net.function(leaves, x[rows]) - before[rows]) * y[rows]).mean() / 2.0
        return {name: leaves[name].detach() - dt * part for name, part in zip(leaves, torch.autograd.grad(mean, list(leaves.values())))}

    everything = torch.arange(9)
    gd = stepped(stepped(weights, everything, 0.5), everything, 0.5)
    each = [stepped(stepped(weights, order[first : first + 3], 0.5), everything, 0.5) for first in (0, 3)]
    flow = weights
    for _ in range(4000):
        flow = stepped(flow, everything, 1 / 4000)
    sgd = {name: (each[0][name] + each[1][name]) / 2 for name in weights}
    apart = lambda a, b: [((a[name] - b[name]) ** 2).sum().item() for name in weights]
    found = drift(net, setting, weights, initial, x, y, order)
    assert found["gd_sgd"] == pytest.approx(apart(gd, sgd), rel=1e-9)
    assert found["gd_gf"] == pytest.approx(apart(gd, flow), rel=0.02) and found["sgd_gf"] == pytest.approx(apart(sgd, flow), rel=0.02)


# ---- what is kept


def test_each_option_of_a_checkpoint_changes_what_it_should(tmp_path):
    base = NET.but(ckpt_grad_stats=6, max_step=300)

    def states(name: str, setting: Setting) -> list[dict]:
        return states_of(written(setting, tmp_path / f"{name}.pk")[2])

    plain = states("plain", base)
    assert plain[0]["step"] == 0 and plain[0]["train"]["loss"] == 1 and "pred" in plain[-1]["train"]
    assert all(state["parameters"] is None and state["drift"] is None for state in plain) and all(state["train"]["g_norm"] == 0 for state in plain)
    slow = [place for place, state in enumerate(plain) if "kernel_norm" in state["train"]]
    assert 2 < len(slow) < len(plain) and not any("kernel" in state["train"] for state in plain)

    with_weights = states("weights", base.but(ckpt_save_parameters=1))
    assert [state["parameters"] is not None for state in with_weights] == [True, *[False] * (len(plain) - 2), True]
    moved = sum(((with_weights[-1]["parameters"][name] - part).astype(float) ** 2).sum() for name, part in with_weights[0]["parameters"].items())
    assert moved == pytest.approx(sum(with_weights[-1]["delta_weights_norm"])) and list(with_weights[0]["parameters"]) == ["hidden1", "hidden2", "output"]

    kernels = states("kernels", base.but(ckpt_kernels=1))
    for place, state in enumerate(kernels):
        assert ("kernel" in state["train"]) == ("kernel" in state["test"]) == (place in slow)
    K = kernels[-1]["train"]["kernel"]
    assert K.shape == (6, 6) and (K.astype(float) ** 2).mean() == pytest.approx(kernels[-1]["train"]["kernel_norm"], rel=1e-5)

    predicted = states("pred", base.but(ckpt_save_pred=1))
    assert [place for place, state in enumerate(predicted) if "pred" in state["train"]] == slow
    for place in slow:
        pred, label = (predicted[place]["test"][name] for name in ("pred", "label"))
        assert pred.shape == (100,) and 1 - (pred * label > 0).mean() == pytest.approx(predicted[place]["test"]["err"])

    step = states("delta", base.but(ckpt_delta_pred=1))
    for half in ("train", "test"):
        small, median, large = (step[0][half][f"delta_pred_abs_{name}"] for name in ("min", "median", "max"))
        assert 0 < small <= median <= large < 1
        assert step[-1][half]["delta_pred_abs_max"] >= 0 and "delta_pred_abs_min" not in plain[0][half]

    overlap = states("overlap", base.but(ckpt_save_gradoverlap=1))
    assert overlap[0]["train"]["g_norm"] == 0 and overlap[3]["train"]["g_norm"] < 0  # steps go down the gradient

    marked = {state["step"] for state in states("mult", base.but(ckpt_save_mult=20))}
    assert {1, 2, 4, 8, 16} <= marked

    coarse = states("coarse", base.but(ckpt_modulo=50))
    assert len(coarse) < len(plain) / 2
    drifted = states("drift", base.but(ckpt_drift=1, max_step=30))
    assert drifted[0]["drift"].keys() == {"gd_gf", "sgd_gf", "gd_sgd"} and all(value >= 0 for values in drifted[0]["drift"].values() for value in values)
    for other in (with_weights, kernels, predicted, step, overlap):  # nothing else has changed
        assert [(state["step"], state["test"]["loss"]) for state in other] == [(state["step"], state["test"]["loss"]) for state in plain]


def test_one_more_step_is_the_step_that_comes(tmp_path):
    "delta_pred at the start against the state after one step."
    x = written(NET.but(ckpt_delta_pred=1, ckpt_save_pred=1, max_step=1), tmp_path / "one.pk")[2]
    first, last = states_of(x)[0], states_of(x)[-1]
    for half in ("train", "test"):
        change = np.abs(last[half]["pred"] - first[half]["pred"])
        assert (last["step"], first[half]["delta_pred_abs_max"]) == (1, pytest.approx(change.max(), rel=1e-3))


def test_a_file_is_read_without_running_code(tmp_path):
    setting = PERCEPTRON.but(seed_init=5)
    outcome, args, data = written(setting, tmp_path / "run.pk")
    again_args, again = pickles.read(tmp_path / "run.pk")
    assert again_args == args == data["args"] and args["output"] == "run.pk" and args["seed_trainset"] == -7
    assert data["finished"] and again["finished"] and again["status"] == outcome["status"] == "fitted"
    ours, theirs = states_of(data)[-1], states_of(again)[-1]
    assert ours["test"]["err"] == theirs["test"]["err"] and (np.asarray(ours["test"]["pred"]) == np.asarray(theirs["test"]["pred"])).all()
    assert (ours["step"], ours["t"]) == (outcome["steps"], outcome["t"]) and data["arch"]["params_sizes"] == {"output": 16}
    (row,) = import_old(tmp_path).to_dict("records")
    assert (row["status"], row["step"], row["test_err"], row["seed_init"]) == ("fitted", outcome["steps"], ours["test"]["err"], 5)
    assert Setting(**{name: value for name, value in args.items() if name not in ("output", "temp")}) == setting.but(dt=setting.dt)


def test_gradient_flow_ends_at_the_margin(tmp_path):
    given = NET.model_dump(include=NET.model_fields_set - {"temp", "bs"})
    flow = Setting(**given | dict(dynamics="gf", loss="softhinge", mind_stop=0.5, ptr=20))
    outcome, _, data = written(flow, tmp_path / "gf.pk")
    last = states_of(data)[-1]
    assert (outcome["status"], outcome["stopped"]) == ("fitted", "margin") and last["train"]["mind"] == pytest.approx(0.5, abs=1e-6) and outcome["gradient_evaluations"] > outcome["steps"]
    cut, _, data = written(flow.but(max_step=5), tmp_path / "cut.pk")
    assert (cut["status"], cut["stopped"], cut["steps"], data["finished"]) == ("unconverged", "steps", 5, True)


# ---- a run that is broken off


@pytest.mark.parametrize("error, status", [(KeyboardInterrupt, "interrupted"), (MemoryError, "failed")])
def test_a_run_that_is_broken_off_does_not_look_finished(error, status, tmp_path, monkeypatch):
    plain, calls = runs.state_of, []

    def breaks(*args, **options):
        calls.append(args)
        if len(calls) == 6:
            raise error
        return plain(*args, **options)

    monkeypatch.setattr(runs, "state_of", breaks)
    with pytest.raises(error):
        run_to_file(NET, tmp_path / "run.pk")
    args, data = pickles.read(tmp_path / "run.pk")
    assert (data["finished"], data["status"], len(states_of(data))) == (False, status, 5) and args["h"] == 8
    assert import_old(tmp_path).status.tolist() == ["unfinished"] and os.listdir(tmp_path) == ["run.pk"]


def test_a_run_that_is_killed_leaves_its_states(tmp_path):
    line = "--dataset digits_parity --ptr 512 --pte 200 --arch mlp --h 32 --L 3 --dynamics sgd --alpha 1 --temp 1e-4 --bs 4 --output run.pk"
    code = "import flatmin_nb.sgd_regimes_runs as runs; runs.EVERY = 0.0; runs.app()"
    process = subprocess.Popen([sys.executable, "-c", code, *line.split()], cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(runs.__file__).parent.parent)})
    try:
        deadline, found = time.monotonic() + 60, []
        while len(found) < 4 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.2)
            found = states_of(pickles.read(tmp_path / "run.pk")[1]) if (tmp_path / "run.pk").exists() else []
        assert len(found) >= 4 and process.poll() is None
        process.send_signal(signal.SIGKILL)
        assert process.wait(10) == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()
    _, data = pickles.read(tmp_path / "run.pk")
    assert (data["finished"], data["status"]) == (False, "running") and len(states_of(data)) >= 4
    assert import_old(tmp_path).status.tolist() == ["unfinished"]


def test_a_crash_while_writing_leaves_the_file_of_before(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "EVERY", 0.0)
    plain, calls = pickle.dump, []

    def breaks(value, file):
        calls.append(None)
        if len(calls) >= 8:  # the second part of the fourth version, and of all that follow
            file.write(b"half of it")
            raise OSError(28, "No space left on device")
        plain(value, file)

    monkeypatch.setattr(runs.pickle, "dump", breaks)
    with pytest.raises(OSError, match="No space"):
        run_to_file(NET, tmp_path / "run.pk")
    _, data = pickles.read(tmp_path / "run.pk")
    assert (data["finished"], data["status"]) == (False, "running") and os.listdir(tmp_path) == ["run.pk"]


# ---- the command


def test_the_command_says_in_one_line_what_is_wrong(tmp_path):
    line = f"--dataset sign --d 8 --ptr 32 --pte 32 --arch linear --dynamics sgd --alpha 1e8 --temp 0.1 --bs 2 --output {tmp_path}/run.pk"
    result = CliRunner().invoke(runs.app, line.split())
    assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1 and "alpha = 1e+08 needs more digits than float32 has" in result.stderr
    assert not (tmp_path / "run.pk").exists() or not pickles.read(tmp_path / "run.pk")[1]["finished"]
    result = CliRunner().invoke(runs.app, [*line.split(), "--dtype", "f64", "--overwrite"])
    assert result.exit_code == 0, result.stderr
    assert pickles.read(tmp_path / "run.pk")[1]["status"] == "fitted"
    with pytest.raises(EnsembleError):
        run_to_file(PERCEPTRON.but(alpha=1e8), tmp_path / "other.pk")


def test_a_run_that_is_refused_leaves_the_finished_one_that_it_would_have_replaced(tmp_path):
    run_to_file(PERCEPTRON, tmp_path / "run.pk")
    with pytest.raises(EnsembleError):
        run_to_file(PERCEPTRON.but(alpha=1e8), tmp_path / "run.pk")
    assert pickles.read(tmp_path / "run.pk")[1]["finished"]


def test_the_order_of_the_drift_is_a_permutation():
    assert permutation(key(0, runs.BATCHES, 3), 40).sort().values.tolist() == list(range(40))

"""Training in processes that are really killed (SIGKILL), at any moment, and resumed in new ones: the same bits at the end.

A forkserver that has torch loaded makes a process cost a fraction of a second; each is a process of its own all the same.
"""

import itertools
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import MultiStepLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from flatmin_nb.entropy_sgd import EntropySGD
from flatmin_nb.lab.data import CropFlip, load, scaled
from flatmin_nb.lab.results import Run
from flatmin_nb.lab.results import load as load_runs
from flatmin_nb.lab.train import Callback, fit

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch._dynamo", "sklearn.datasets", "flatmin_nb.lab.train", "flatmin_nb.entropy_sgd"])
EPOCHS = 3

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
    "entropy_sgd": lambda parameters: EntropySGD(parameters, lr=0.5, L=4),
}


class RunningNorm(Callback):
    "A callback with a state that the history depends on, which draws random numbers besides."

    def __init__(self, after_step):
        self.total, self.tell = 0.0, after_step

    def after_step(self, loop):
        self.total += sum(parameter.norm().item() for parameter in loop.model.parameters())
        self.tell(loop.step)

    def row(self, loop):
        return {"total_norm": self.total, "noise": torch.rand(()).item()}

    def state_dict(self):
        return {"total": self.total}

    def load_state_dict(self, state):
        self.total = state["total"]


def train(folder, method, after_step=lambda step: None, prepare=lambda: None):
    "Dropout, BatchNorm, augmentation or replacement, a schedule and an average: everything that has a state."
    torch.set_num_threads(1)
    prepare()
    images = scaled(load("digits", validation=0.2), centre=0, scale=255)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(),
            nn.Linear(144, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 10),
        )  # fmt: skip
    optimizer = OPTIMIZERS[method](net.parameters())
    run = Run(folder, {"method": method, "epochs": EPOCHS})
    result = fit(
        net, optimizer, images, epochs=EPOCHS, batch_size=128, seed=3, run=run, progress=False,
        schedule=MultiStepLR(optimizer, [1, 2], 0.5), callbacks=[RunningNorm(after_step)],
        augment=CropFlip(padding=1) if method == "sgd" else None, replacement=method == "adam",
        average=AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9)) if method == "sgd" else None,
        reestimate_batchnorm=method == "entropy_sgd", evaluate_every_steps=3, save_every_steps=5,
    )  # fmt: skip
    run.finish(result.model, result.history, total=result.history.total_norm.iloc[-1])


def dies_at_replacement(number, moment):
    "SIGKILL to oneself at the `number`-th file that takes its name: 'before' (it is written, but not there) or 'after'."
    count, replace = itertools.count(1), os.replace

    def replace_or_die(source, target):
        here = next(count) == number
        if here and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if here:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace_or_die


def dies_in_write(number):
    "SIGKILL to oneself when half of the `number`-th checkpoint is in its file."
    count, save = itertools.count(1), torch.save

    def save_half(state, file):
        save(state, file)
        if next(count) == number:
            file.truncate(file.tell() // 2)
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save_half


def tell(connection, step):
    connection.send(step)


def child(folder, method, death=None, arguments=(), connection=None):
    "What a process does."
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs the tests in the background has it ignored
    train(folder, method,
          after_step=(lambda step: None) if connection is None else (lambda step: tell(connection, step)),
          prepare=(lambda: None) if death is None else (lambda: death(*arguments)))  # fmt: skip


def run_process(*arguments, timeout=60):
    "Its exit code."
    process = PROCESSES.Process(target=child, args=arguments)
    process.start()
    process.join(timeout)
    return process.exitcode


def outcome(folder):
    "Everything that must not depend on how often a run was killed."
    folder = Path(folder)
    record = json.loads((folder / "run.json").read_text())
    summary = {name: value for name, value in record["summary"].items() if "seconds" not in name}
    history = pd.read_csv(folder / "history.csv").drop(columns="seconds")
    return record["status"], summary, history.to_csv(index=False), (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    "The outcome of each method when nothing happens, once per session."
    cache = {}

    def get(method):
        if method not in cache:
            folder = tmp_path_factory.mktemp(method)
            assert run_process(str(folder), method) == 0
            cache[method] = outcome(folder)
        return cache[method]

    return get


@pytest.mark.parametrize("method", OPTIMIZERS)
def test_killed_from_outside_in_the_middle_of_a_step(method, tmp_path, uninterrupted):
    for step in (2, 11, 20):  # whatever the process is doing a moment after it has told of this step
        ours, theirs = PROCESSES.Pipe(duplex=False)
        process = PROCESSES.Process(target=child, args=(str(tmp_path), method, None, (), theirs))
        process.start()
        theirs.close()
        while ours.recv() < step:
            pass
        time.sleep(0.002)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert load_runs(tmp_path).status.tolist() == ["running"]
    assert run_process(str(tmp_path), method) == 0
    assert outcome(tmp_path) == uninterrupted(method)
    assert load_runs(tmp_path).resumed.tolist() == [3]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_at_every_file_in_turn(moment, tmp_path, uninterrupted):
    "Each session gets one file further than the one before it, until one gets through; never is anything there that is not whole."
    for number in itertools.count(1):
        code = run_process(str(tmp_path), "entropy_sgd", dies_at_replacement, (number, moment))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        table = load_runs(tmp_path)
        finished = table.status.tolist() == ["finished"]
        assert "unreadable" not in table.status.tolist()
        if finished:  # killed right after the last word
            break
    assert number >= 8
    assert outcome(tmp_path) == uninterrupted("entropy_sgd")


@pytest.mark.parametrize("number", [1, 2, 4])
def test_killed_while_a_checkpoint_is_written(number, tmp_path, uninterrupted):
    assert run_process(str(tmp_path), "sgd", dies_in_write, (number,)) == -signal.SIGKILL
    assert (tmp_path / "checkpoint.pt.part").exists()
    assert (tmp_path / "checkpoint.pt").exists() == (number > 1)
    assert run_process(str(tmp_path), "sgd") == 0
    assert outcome(tmp_path) == uninterrupted("sgd")
    assert not list(tmp_path.glob("*.part"))


def test_control_c_leaves_a_folder_that_goes_on(tmp_path, uninterrupted):
    ours, theirs = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=child, args=(str(tmp_path), "sgd", None, (), theirs))
    process.start()
    while ours.recv() < 12:
        pass
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 1
    assert load_runs(tmp_path).status.tolist() == ["running"]
    assert run_process(str(tmp_path), "sgd") == 0
    assert outcome(tmp_path) == uninterrupted("sgd")


def test_a_folder_in_use_is_refused(tmp_path):
    ours, theirs = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=child, args=(str(tmp_path), "sgd", None, (), theirs))
    process.start()
    ours.recv()
    os.kill(process.pid, signal.SIGSTOP)  # alive, and holding the folder
    try:
        with pytest.raises(OSError, match="another process is writing to the run folder"):
            Run(tmp_path, {"method": "sgd", "epochs": EPOCHS})
    finally:
        process.kill()
        process.join()
    Run(tmp_path, {"method": "sgd", "epochs": EPOCHS}).close()  # a lock does not outlive its process

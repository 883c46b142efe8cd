"""What only a CUDA device can show: no step waits for the device, the numbers are those of the CPU, and a run resumes."""

import itertools
import math
from functools import partial

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from flatmin_nb.bayesian_compression import ELBO, Caps, ScoreTrail, bayesian, compress, load_compressed, parameter_groups, posterior_mean
from flatmin_nb.entropy_sgd import EntropySGD
from flatmin_nb.lab.data import load, scaled
from flatmin_nb.lab.results import Run
from flatmin_nb.lab.train import Callback, fit, largest
from flatmin_nb.smoothout import SAM, SmoothOut

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]


def small_net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 10))


def closure_for(net, optimizer, x, y):
    "A closure that goes round the batches of `x` [batches, B, ...] and never asks the device for a number."
    batches = itertools.cycle(zip(x.unbind(), y.unbind()))

    def closure():
        images, labels = next(batches)
        optimizer.zero_grad()
        loss = cross_entropy(net(images), labels)
        loss.backward()
        return loss

    return closure


def noise_images(device, dtype):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(7, 32, 1, 8, 8, generator=generator, dtype=torch.float64), torch.randint(10, (7, 32), generator=generator)
    return x.to(device, dtype), y.to(device)


@pytest.mark.parametrize("extra", [False, True])
def test_a_step_does_not_wait_for_the_device(extra):
    net = small_net().cuda()
    optimizer = EntropySGD(net.parameters(), lr=0.5, L=3, noise=1e-3, extra_evaluation=extra, momentum=0.9, nesterov=True)
    closure = closure_for(net, optimizer, *noise_images("cuda", torch.float32))
    optimizer.step(closure)  # libraries start and buffers are made
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            loss = optimizer.step(closure)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(loss.item())


def test_steps_agree_with_the_cpu():
    here, there = small_net().double(), small_net().double().cuda()
    for net in (here, there):
        net[4].p = 0.0  # the two devices draw different random numbers
        optimizer = EntropySGD(net.parameters(), lr=0.5, L=4, noise=0.0, momentum=0.9, nesterov=True, inner_weight_decay=1e-3)
        closure = closure_for(net, optimizer, *noise_images(net[1].weight.device, torch.float64))
        for _ in range(5):
            optimizer.step(closure)
    for name, tensor in here.state_dict().items():
        torch.testing.assert_close(there.state_dict()[name].cpu(), tensor, rtol=1e-9, atol=1e-11)


class Stop(Callback):
    def __init__(self, step):
        self.at = step

    def after_step(self, loop):
        if loop.step == self.at:
            raise KeyboardInterrupt


def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path):
    digits = scaled(load("digits")).to("cuda")

    def train(name, stop=None):
        net = small_net().cuda()
        run = Run(tmp_path / name, {"method": "entropy_sgd"})
        optimizer = EntropySGD(net.parameters(), lr=0.5, L=2)
        return net, fit(
            net, optimizer, digits, epochs=2, seed=1, run=run, save_every_steps=4, splits=("test",), callbacks=[Stop(stop)], progress=False
        )

    whole, expected = train("whole")
    with pytest.raises(KeyboardInterrupt):
        train("cut", stop=7)
    run = Run(tmp_path / "cut", {"method": "entropy_sgd"})
    assert run.checkpoint()["parts"]["loop"]["step"] == 4 and run.checkpoint()["random_cuda"] is not None
    net, resumed = train("cut")
    # the same dropout and noise to the bit; sums on a GPU may differ in their last ones, other random numbers would in the first
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    columns = [column for column in expected.history if column not in ("seconds", "test_error")]
    pd.testing.assert_frame_equal(resumed.history[columns], expected.history[columns], check_exact=False, rtol=1e-4)


def test_what_is_not_finite_shows_in_the_largest_entries():
    huge, wrong = torch.full((3,), 1e20, device="cuda"), torch.tensor([[1.0, math.nan]], device="cuda")
    seen = torch.stack(list(largest([huge, wrong, -huge / 0, huge.double()]))).isfinite()
    assert seen.tolist() == [True, False, False, True]


@pytest.mark.parametrize(
    "wrap", [partial(SmoothOut, a=0.05), partial(SmoothOut, a=0.05, relative="filter"), partial(SmoothOut, a=0.05, noise="gaussian", copies=2), partial(SAM, rho=0.1), partial(SAM, rho=1.0, adaptive=True)]
)
def test_a_perturbed_step_does_not_wait_and_gives_the_weights_back(wrap):
    net = small_net().cuda()
    optimizer = wrap(torch.optim.SGD(net.parameters(), lr=0.0), net)
    before = [p.detach().clone() for p in net.parameters()]
    closure = closure_for(net, optimizer, *noise_images("cuda", torch.float32))
    optimizer.step(closure)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            optimizer.step(closure)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(p, w) for p, w in zip(net.parameters(), before))


@pytest.mark.parametrize("prior", ["normal_jeffreys", "horseshoe", "gaussian"])
def test_a_net_is_compressed_there_and_read_back_here(prior, tmp_path):
    digits = scaled(load("digits"), centre=127.5, scale=127.5).to("cuda")
    net = bayesian(small_net().cuda(), prior=prior, max_std=0.5)
    elbo = ELBO(net, len(digits.train_labels), warm_up=5)
    fit(net, torch.optim.Adam(parameter_groups(net, 1e-2, 1e-2)), digits, epochs=2, loss=elbo, callbacks=[elbo, Caps(), ScoreTrail()], progress=False)
    made = compress(net, digits.test_images, digits.test_labels)
    assert next(made.model.parameters()).is_cuda and math.isfinite(made.factors["bits"])
    here = compress(net.cpu(), digits.test_images.cpu(), digits.test_labels.cpu())
    assert here.factors == made.factors
    made.save(tmp_path / "net.safetensors")
    again = load_compressed(tmp_path / "net.safetensors", posterior_mean(net), digits.test_images[:1].cpu())
    torch.testing.assert_close(again(digits.test_images.cpu()), made.model(digits.test_images).cpu(), rtol=1e-4, atol=1e-4)

"""What a step of Entropy-SGD costs beyond its gradients: one thread, CPU time, batch 128, paired repetitions, medians.

    python benchmarks/entropy_sgd.py                        # mnistfc, L = 20
    python benchmarks/entropy_sgd.py --model allcnn --L 2   # three seconds a gradient on one core

Each repetition times, in shuffled order, L + 1 plain gradients (clear, forward, backward) and one step of each variant, and takes the ratio inside the
repetition. The earlier codes evaluate L + 1 gradients a step, so L + 1 is the unit; ours evaluates L, and its floor is L / (L + 1).

`--compiled` adds the whole update as one function under torch.compile. It is an experiment that lives here alone, and it takes the same steps (checked first). The
update of the package is five operators, the largest of them PyTorch's fused kernel, and is no slower; so the package has no such option.
"""

import math
import random
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from fastcore.script import call_parse
from torch import Tensor, nn

from flatmin_nb import entropy_sgd
from flatmin_nb.entropy_sgd import EntropySGD
from flatmin_nb.lab import models


def fused_update(x_prime, gradients, x, mu, velocity, noise, eta_gamma: Tensor, eta: Tensor, momentum: Tensor, std: Tensor, alpha: Tensor) -> None:
    "The whole Langevin update as one function for torch.compile; scalars are tensors so that a new gamma needs no new code."
    for w, g, x0, m, v, xi in zip(x_prime, gradients, x, mu, velocity, noise):
        v.mul_(momentum).add_(g)
        w.add_(eta_gamma * (x0 - w) - eta * (g + momentum * v) + std * xi)
        m.lerp_(w, alpha)


class CompiledWalk(entropy_sgd._Walk):
    "The walk with its update compiled; the noise is drawn outside, where it is faster."

    update = staticmethod(torch.compile(fused_update))

    def move(self) -> None:
        self.touched.update(self.params)
        if self.std:
            self.noise.normal_(generator=self.generator)
        group = self.group
        numbers = (group["inner_lr"] * self.gamma, group["inner_lr"], group["inner_momentum"], self.std, group["averaging"])
        gradients = [p.grad for p in self.params]
        self.update(self.params, gradients, self.x, self.mu, self.velocity, self.noise_by_parameter, *(torch.tensor(float(n)) for n in numbers))


def closure_of(net: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor):
    "Clear, forward, backward."

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(images), labels)
        loss.backward()
        return loss.detach()

    return closure


def cpu_seconds(call) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def check_that_compiled_steps_are_the_same() -> None:
    "Three steps of both walks on a small net from one seed: equal to rounding."
    weights = []
    for walk in (entropy_sgd._Walk, CompiledWalk):
        net = models.build("mlp", seed=0)
        images, labels = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 10
        kept, entropy_sgd._Walk = entropy_sgd._Walk, walk
        optimizer = EntropySGD(net.parameters(), lr=0.5, gamma=1.0, noise=1e-2, L=3)
        for _ in range(3):
            optimizer.step(closure_of(net, optimizer, images, labels))
        entropy_sgd._Walk = kept
        weights.append(nn.utils.parameters_to_vector(net.parameters()).detach())
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


@call_parse
def main(
    model: str = "mnistfc",  # mnistfc (the variant with BatchNorm and dropout), lenet or allcnn
    L: int = 20,  # Langevin steps
    repeats: int = 7,  # paired repetitions
    compiled: bool = False,  # also the compiled update, which needs a C++ compiler
    at_most: float = math.inf,  # exit with 1 if the median ratio of the default step is larger
):
    torch.set_num_threads(1)
    if compiled:
        check_that_compiled_steps_are_the_same()
    generator = torch.Generator().manual_seed(0)
    net = models.build(model, seed=0, **({"variant": "lua"} if model in ("mnistfc", "lenet") else {}))
    shape = (128, 3, 32, 32) if model == "allcnn" else (128, 1, 28, 28)
    images, labels = torch.randn(shape, generator=generator), torch.randint(10, (128,), generator=generator)
    variants = {"entropy_sgd": {}, "noise 0": {"noise": 0.0}} | ({"compiled": {}} if compiled else {})
    calls = {}
    for name, options in variants.items():
        optimizer = EntropySGD(net.parameters(), lr=0.0, L=L, **options)
        closure = closure_of(net, optimizer, images, labels)
        calls[name] = lambda optimizer=optimizer, closure=closure: optimizer.step(closure)
        entropy_sgd._Walk, kept = (CompiledWalk if name == "compiled" else entropy_sgd._Walk), entropy_sgd._Walk
        calls[name]()  # builds the buffers, and compiles
        entropy_sgd._Walk = kept
    gradient = closure_of(net, torch.optim.SGD(net.parameters(), lr=0.0), images, labels)
    calls["gradients"] = lambda: [gradient() for _ in range(L + 1)]
    calls["gradients"]()

    seconds = {name: [] for name in calls}
    for _ in range(repeats):
        for name in random.sample(list(calls), len(calls)):
            seconds[name].append(cpu_seconds(calls[name]))
    unit = statistics.median(seconds["gradients"]) / (L + 1)
    print(f"{model}, L = {L}, batch 128, torch {torch.__version__}, one thread, {repeats} paired repetitions")
    print(f"one gradient: {1000 * unit:.1f} ms of CPU time; floor of the ratio: {L / (L + 1):.3f}")
    medians = {}
    for name in variants:
        ratios = [step / gradients for step, gradients in zip(seconds[name], seconds["gradients"])]
        medians[name] = statistics.median(ratios)
        update = statistics.median(seconds[name]) / L - unit
        print(f"{name:12} step / (L + 1) gradients: {medians[name]:.3f} [{min(ratios):.3f}, {max(ratios):.3f}], update {1000 * update:.1f} ms")
    sys.exit(medians["entropy_sgd"] > at_most)

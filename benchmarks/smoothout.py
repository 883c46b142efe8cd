"""What a step of SmoothOut and of SAM costs beside a plain step of SGD with momentum: one thread, CPU time, batch 128, paired repetitions, medians.

    python benchmarks/smoothout.py                                    # mnist_f1, 1.46 million weights in five layers: the hardest, for its gradient is the cheapest
    python benchmarks/smoothout.py --model cifar10_shallow --repeats 7
    python benchmarks/smoothout.py --model resnet --repeats 5

Each repetition times one step of every method in shuffled order and takes ratios inside the repetition. "as published" adds fresh uniform noise to each tensor in place and
subtracts it again, as the released code does; it leaves a rounding error behind. If pytorch_optimizer is installed, its SAM is timed too.
"""

import gc
import statistics
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from fastcore.script import call_parse
from paired import heading, paired, ratio, table
from torch import nn

from flatmin_nb.lab import models
from flatmin_nb.smoothout import SAM, SmoothOut

SHAPES = {"mnist_f1": (1, 28, 28), "cifar10_shallow": (3, 32, 32), "resnet": (3, 32, 32)}
BOUNDS = {"SmoothOut": 1.10, "AdaSmoothOut": 1.15}


class AsPublished:
    "Noise in place, one tensor after another, and subtracted again."

    def __init__(self, base: torch.optim.Optimizer, net: nn.Module, a: float = 0.01):
        self.base, self.a = base, a
        self.params = [p for layer in net.modules() if not isinstance(layer, nn.modules.batchnorm._BatchNorm) for p in layer.parameters(recurse=False)]

    def zero_grad(self) -> None:
        self.base.zero_grad()

    def step(self, closure: Callable) -> torch.Tensor:
        with torch.no_grad():
            noises = [torch.empty_like(p).uniform_(-self.a, self.a) for p in self.params]
            for p, noise in zip(self.params, noises):
                p.add_(noise)
        loss = closure()
        with torch.no_grad():
            for p, noise in zip(self.params, noises):
                p.sub_(noise)
        self.base.step()
        return loss


class PeerSAM:
    "pytorch_optimizer's SAM with the same base; its step wants the first gradient to be there already."

    def __init__(self, base: torch.optim.Optimizer, net: nn.Module):
        from pytorch_optimizer import SAM as Peer

        self.peer = Peer(net.parameters(), base_optimizer=torch.optim.SGD, rho=0.05, **{name: base.defaults[name] for name in ("lr", "momentum", "weight_decay")})
        self.zero_grad = self.peer.zero_grad

    def step(self, closure: Callable) -> torch.Tensor:
        closure()
        return self.peer.step(closure)


METHODS = {
    "plain SGD": lambda base, net: base,
    "SmoothOut": partial(SmoothOut, a=0.01),
    "SmoothOut, Gaussian": partial(SmoothOut, a=0.01, noise="gaussian"),
    "SmoothOut, as published": AsPublished,
    "AdaSmoothOut": partial(SmoothOut, a=0.1, relative="filter"),
    "SmoothOut, relative to weights": partial(SmoothOut, a=0.1, relative="weight"),
    "SAM": SAM,
    "ASAM": partial(SAM, rho=0.5, adaptive=True),
    "SAM of pytorch_optimizer": PeerSAM,
}


def step_of(make: Callable, model: str, batch_size: int) -> Callable:
    "A call that takes one step on a batch of noise."
    net = models.build(model, seed=0)
    optimizer = make(torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4), net)
    random = torch.Generator().manual_seed(0)
    x, y = torch.randn(batch_size, *SHAPES[model], generator=random), torch.randint(10, (batch_size,), generator=random)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss

    return lambda: optimizer.step(closure)


@call_parse
def main(
    model: str = "mnist_f1",  # a net of SHAPES
    batch_size: int = 128,
    repeats: int = 30,
    steps: int = 4,  # that are timed together, so that a net finds its weights in the cache as it does in training
):
    "Print the cost of each method's step in plain steps."
    torch.set_num_threads(1)
    gc.disable()
    print(f"{model}, batch {batch_size}, {steps} steps at a time; {heading(repeats)}\n")
    rows = []
    for name, make in METHODS.items():
        plain = step_of(METHODS["plain SGD"], model, batch_size)
        try:
            other = step_of(make, model, batch_size)
        except ImportError as missing:
            print(f"without {name}: {missing}\n")
            continue
        several = lambda call: [call() for _ in range(steps)]
        calls = {"plain": partial(several, plain), "other": partial(several, other)}
        for call in calls.values():
            call()
        seconds = paired(calls, repeats)
        median, words = ratio(seconds["other"], seconds["plain"])
        bound = BOUNDS.get(name)
        milliseconds = 1e3 * statistics.median(seconds["other"]) / steps
        rows.append([name, f"{milliseconds:.1f}", words, "" if bound is None else f"{bound:.2f}, {'met' if median <= bound else 'NOT met'}"])
    table(rows, "method | ms | of a plain step | bound")

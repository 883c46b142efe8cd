"""How curvature.py and landscape.py measure: the nets, CPU seconds of one thread in paired and shuffled order, and peak memory in a forked child.

Inputs are noise around weak class means, so no data need be downloaded, and the nets have taken a hundred steps of SGD, so that the Hessian has the outliers of a trained net's.
How many products an eigenpair takes depends on that: near initialisation the outliers lie closer together. BatchNorm and dropout are in evaluation mode.
"""

import ctypes
import os
import platform
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatmin_nb.lab import models

INPUTS = {"mlp": (2000, 1, 28, 28), "resnet20": (512, 3, 32, 32), "allcnn": (64, 3, 32, 32)}
STEPS, STEP_SIZE, STEP_BATCH, CLASS_MEAN = 100, 0.05, 64, 0.3


class Residual(nn.Module):
    "A basic block of two convolutions; the shortcut is a 1x1 convolution where the shape changes."

    def __init__(self, channels: int, following: int, stride: int):
        super().__init__()
        convolution = lambda inputs, size, stride: nn.Conv2d(inputs, following, size, stride, padding=size // 2, bias=False)
        self.conv1, self.norm1 = convolution(channels, 3, stride), nn.BatchNorm2d(following)
        self.conv2, self.norm2 = convolution(following, 3, 1), nn.BatchNorm2d(following)
        same = stride == 1 and channels == following
        self.shortcut = nn.Identity() if same else nn.Sequential(convolution(channels, 1, stride), nn.BatchNorm2d(following))

    def forward(self, x: Tensor) -> Tensor:
        inside = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(inside)) + self.shortcut(x))


def resnet20() -> nn.Sequential:
    "ResNet-20 for CIFAR (He et al. 2016, section 4.2): three blocks each of 16, 32 and 64 channels."
    widths = (16, 16, 16, 16, 32, 32, 32, 64, 64, 64)
    blocks = [Residual(before, after, 1 if before == after else 2) for before, after in pairwise(widths)]
    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def problem(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    "A net after a few steps, its inputs and its targets: a function of the name alone."
    generator = torch.Generator().manual_seed(0)
    count, *shape = INPUTS[name]
    targets = torch.randint(10, (count,), generator=generator)
    means = CLASS_MEAN * torch.randn(10, *shape, generator=generator)
    inputs = torch.randn(count, *shape, generator=generator) + means[targets]
    torch.manual_seed(0)
    if name == "mlp":
        net = models.build("mlp", seed=0, inputs=784, hidden=(1024, 1024))
    else:
        net = resnet20() if name == "resnet20" else models.build("allcnn", seed=0, width=48)
    optimizer = torch.optim.SGD(net.train().parameters(), lr=STEP_SIZE)
    for _ in range(STEPS):
        drawn = torch.randint(count, (STEP_BATCH,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(net(inputs[drawn]), targets[drawn]).backward()
        optimizer.step()
    optimizer.zero_grad()
    return net.eval(), inputs, targets


def cpu_seconds(call: Callable) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def paired(calls: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
    "CPU seconds of each call, by name, `repeats` times, each time in another order. A call with a parameter gets the number of the repetition."
    seconds = {name: [] for name in calls}
    for _ in range(repeats):
        for name in random.sample(list(calls), len(calls)):
            seconds[name].append(cpu_seconds(calls[name]))
    return seconds


def ratio(above: list[float], below: list[float]) -> tuple[float, str]:
    "The median of the ratios inside the repetitions, and the same in words with the range."
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    median = statistics.median(ratios)
    return median, f"{median:.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"


def peak_megabytes(call: Callable) -> float:
    "By how many MB the memory of a forked child grows at most while it makes the call; nan where that cannot be told (not Linux)."
    if sys.platform != "linux":
        return float("nan")
    ctypes.CDLL(None).malloc_trim(0)  # else the child would live on what this process has freed
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        grown = float("nan")
        try:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            call()
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000
        finally:
            os.write(writing, str(grown).encode())
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        grown = float(pipe.read())
    os.waitpid(child, 0)
    return grown


def heading(repeats: int) -> str:
    return f"torch {torch.__version__}, Python {platform.python_version()}, one thread of {platform.machine()}, CPU seconds, medians of {repeats} pairs [range]"


def table(rows: list[list], columns: str) -> None:
    "Print rows below the columns named in `columns`, separated by |, as Markdown."
    cells = [columns.split(" | "), *[[str(cell) for cell in row] for row in rows]]
    widths = [max(len(row[number]) for row in cells) for number in range(len(cells[0]))]
    cells.insert(1, ["-" * width for width in widths])
    for row in cells:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
    print(flush=True)

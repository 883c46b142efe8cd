"""A slice of the loss of 25 points, against the loops that others use: one thread, CPU time, paired repetitions.

    python benchmarks/landscape.py [--repeats 9]

The net has 784-1024-1024-10 units and 2,000 inputs, the direction is Gaussian and filter-normalised. The peers are scripts and not packages, so their loops are written here anew, as they are when
nothing but the slice is left of them (no files, no printing, no worker processes):

    loss-landscape   github.com/tomgoldstein/loss-landscape at 64ef4d5 (plot_surface.py, evaluation.py): the step as NumPy arrays, new weights
                     for each parameter, then a DataLoader of 128 at once, loss and accuracy
    SmoothOut        github.com/wenwei202/smoothout at 25b5643 (visualize_sharpness.py): a mix of two state dictionaries as NumPy arrays, loaded, then
                     a DataLoader of 2,048 at once, loss, top-1 and top-5 accuracy
    in memory        the plainest loop: the step as tensors, then one forward pass over all inputs

Ours is timed with an Objective at hand, which serves any number of slices, and again with its construction (some passes over the data, which check that there is a function to measure).
Memory is what the process grows by at most, in a forked child. The exit status is 1 if a bound is missed.
"""

import copy
import statistics
import sys

import numpy as np
import torch
import torch.nn.functional as F
from fastcore.script import call_parse
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from flatmin_nb.lab.landscape import line, random_directions
from flatmin_nb.lab.objective import Objective
from paired import heading, paired, peak_megabytes, problem, ratio, table

FASTER_AT_LEAST = 1.8  # than the loops of the two peers
AGREES = 1e-4  # relative, of losses
POINTS = 25


def parts_of(vector: Tensor, net: nn.Module) -> list[Tensor]:
    parameters = list(net.parameters())
    return [part.view(p.shape) for part, p in zip(vector.split([p.numel() for p in parameters]), parameters)]


def by_loss_landscape(net: nn.Module, inputs: Tensor, targets: Tensor, direction: Tensor, alphas: list[float]) -> list[float]:
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=128)
    start = [p.data for p in net.parameters()]
    arrays = [part.numpy() for part in parts_of(direction, net)]
    losses = []
    for alpha in alphas:
        changes = [array * alpha for array in arrays]
        for p, w, change in zip(net.parameters(), start, changes):
            p.data = w + torch.Tensor(change)
        total = correct = 0
        with torch.no_grad():
            for x, y in loader:
                outputs = net(x)
                total += F.cross_entropy(outputs, y).item() * len(x)
                correct += outputs.max(1)[1].eq(y).sum()
        losses.append(total / len(inputs))
    return losses


def by_smoothout(net: nn.Module, inputs: Tensor, targets: Tensor, direction: Tensor, alphas: list[float]) -> list[float]:
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=2048)
    master = copy.deepcopy(net.state_dict())
    slave = {name: value + part for (name, value), part in zip(master.items(), parts_of(direction, net))}
    losses = []
    for alpha in alphas:
        net.load_state_dict({name: torch.from_numpy(slave[name].numpy() * alpha + (1 - alpha) * master[name].numpy()) for name in master})
        total = 0.0
        with torch.no_grad():
            for x, y in loader:
                outputs = net(x)
                total += F.cross_entropy(outputs, y).item() * len(x)
                right = outputs.topk(5)[1].eq(y[:, None])
                right[:, :1].sum().item(), right.sum().item()  # what the script logs
        losses.append(total / len(inputs))
    return losses


def in_memory(net: nn.Module, inputs: Tensor, targets: Tensor, direction: Tensor, alphas: list[float]) -> list[float]:
    start = [p.detach().clone() for p in net.parameters()]
    losses = []
    with torch.no_grad():
        for alpha in alphas:
            for p, w, part in zip(net.parameters(), start, parts_of(direction, net)):
                torch.add(w, part, alpha=alpha, out=p)
            outputs = net(inputs)
            losses.append(F.cross_entropy(outputs, targets).item())
            (outputs.argmax(1) != targets).sum().item()
    return losses


def ours(net: nn.Module, inputs: Tensor, targets: Tensor, direction: Tensor, alphas: list[float]) -> list[float]:
    return line(Objective(net, F.cross_entropy, (inputs, targets)), direction, alphas).train_loss.tolist()


METHODS = {"ours, with the Objective's construction": ours, "loss-landscape": by_loss_landscape, "SmoothOut": by_smoothout, "in memory": in_memory}


@call_parse
def main(
    repeats: int = 5,  # paired repetitions
):
    torch.set_num_threads(1)
    net, inputs, targets = problem("mlp")
    objective = Objective(net, F.cross_entropy, (inputs, targets))
    direction = random_directions(objective, normalise="filter", seed=0).flatten()
    alphas = np.linspace(-1, 1, POINTS).tolist()
    calls = {"ours": lambda: line(objective, direction, alphas).train_loss.tolist()}
    calls |= {what: lambda what=what: METHODS[what](copy.deepcopy(net), inputs, targets, direction, alphas) for what in METHODS}
    memory = {what: peak_megabytes(call) for what, call in calls.items()}
    expected = np.array(calls["in memory"]())
    for what, call in calls.items():  # also the first, which warms up
        if not np.allclose(call(), expected, rtol=AGREES):
            sys.exit(f"the losses of {what} are others than those of the plain loop")
    seconds = paired(calls, repeats)
    rows, missed = [], []
    for what in calls:
        slower, words = ratio(seconds[what], seconds["ours"])
        rows.append([what, f"{statistics.median(seconds[what]):.2f}", words, f"{memory[what]:.0f}"])
        missed += [what] * (what in ("loss-landscape", "SmoothOut") and slower < FASTER_AT_LEAST)
    print(heading(repeats))
    print(f"{POINTS} points, {len(inputs):,} inputs: wanted {FASTER_AT_LEAST} times faster than both scripts: {'MISSED: ' + ', '.join(missed) if missed else 'kept'}")
    table(rows, "a slice | s | ÷ ours | peak, MB")
    sys.exit(bool(missed))

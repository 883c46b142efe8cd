"""What Nudged-SGD costs, and which refresh of its directions is good enough: simple_cnn on CIFAR-10, one thread, CPU time.

    python benchmarks/sharpest_directions.py                                                # what a refresh and a step cost, with 8 and 32 filters
    python benchmarks/sharpest_directions.py --tracking_table results/sharpest_tracking.csv       # how good a refresh is after so many products
    python benchmarks/sharpest_directions.py --tracking_table results/sharpest_tracking.csv --seeds 1

A refresh is `NudgedSGD.refresh`: the loss on a sample, the record of its Hessian, Lanczos. Its time is divided by that of the products in it. A step at K directions is timed in pairs with one of
torch.optim.SGD. Neither counts what the other does. The exit status is 1 if a bound is missed.

The tracking table is about seconds nowhere: a row is one subspace, with the products that it took, and how near it lies to the top K eigenvectors, which Lanczos finds to 1e-4. After an epoch of SGD,

- study "refresh": 1, 10, 100 and 351 steps later, each method starts from the eigenvectors of the epoch's end, on the same sample and on a fresh one. Products that two methods both ask for are computed
  once and counted twice;
- study "run": for another epoch each method refreshes every so many steps from what it last had, always on a fresh sample. Before each refresh its directions are held against the eigenvectors of one
  more sample, and so are those of a fresh sample.

Rows replace those in the file with the same seed, net, K and number of examples.
"""

import hashlib
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from fastcore.script import call_parse
from paired import cpu_seconds, heading, paired, ratio, table
from scipy.sparse.linalg import lobpcg
from torch import Tensor, nn

import flatmin_nb
from flatmin_nb.lab.curvature import Eigenpairs, Hessian, Operator, top_eigenpairs, track_eigenpairs
from flatmin_nb.lab.data import Batches, ImageSet, centred, load
from flatmin_nb.lab.models import build
from flatmin_nb.lab.files import written_whole
from flatmin_nb.lab.results import commit, device_name, versions
from flatmin_nb.lab.watch import fresh_sample, overlap, principal_angles
from flatmin_nb.sharpest_directions import NudgedSGD

REFRESH_AT_MOST, STEP_AT_MOST = 1.15, 1.05
EPOCH, BATCH_SIZE, LR = 351, 128, 0.01
LATER = (1, 10, 100, 351)  # steps after the last refresh
BUDGETS = (2, 3, 5, 8, 11, 15, 20, 26)  # products beyond K
STEPS_A_REFRESH = 12  # repetitions of the cheaper measurement
TRUE = 1e-4  # the residual of what counts as the eigenvectors


def images() -> ImageSet:
    "CIFAR-10 as the published code splits and centres it."
    return centred(load("cifar10", validation=0.1, seed=777, split="permuted"))


# ---- seconds


@contextmanager
def products_timed() -> Iterator[list[float]]:
    "Inside, the CPU seconds of each product are appended to the list."
    plain, seconds = Operator.__matmul__, []

    def timed(operator: Operator, other: Tensor) -> Tensor:
        start = time.process_time()
        product = plain(operator, other)
        seconds.append(time.process_time() - start)
        return product

    Operator.__matmul__ = timed
    try:
        yield seconds
    finally:
        Operator.__matmul__ = plain


def trained(net: nn.Module, data: ImageSet, steps: int, seed: int) -> Batches:
    "Take steps of plain SGD; the batches, to go on with."
    batches = Batches(data.train_images, data.train_labels, BATCH_SIZE, seed=seed)
    further(net, batches, steps)
    return batches


def further(net: nn.Module, batches: Batches, steps: int) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    for _ in range(steps):
        optimizer.zero_grad()
        x, y = batches.draw()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()


def refresh_row(data: ImageSet, filters: int, k: int, examples: int, repeats: int) -> list:
    "The time of a refresh in that of its products."
    net = build("simple_cnn", seed=0, filters=filters)
    trained(net, data, steps=50, seed=0)
    sample = fresh_sample(data.train_images, data.train_labels, examples)
    whole, inside, counts = [], [], []
    for _ in range(repeats):
        optimizer = NudgedSGD(net.parameters(), net, F.cross_entropy, sample, lr=LR, k=k)
        with products_timed() as seconds:
            whole.append(cpu_seconds(optimizer.refresh))
        inside.append(sum(seconds))
        counts.append(len(seconds))
    median, words = ratio(whole, inside)
    return [f"a refresh ÷ its {counts[0]} products, {examples} images, {filters} filters", words, REFRESH_AT_MOST, "met" if median <= REFRESH_AT_MOST else "NOT met"]


def step_row(data: ImageSet, filters: int, k: int, repeats: int, steps: int = 4) -> list:
    "The time of a step in that of a step of torch's SGD, on the same batch."
    x, y = data.train_images[:BATCH_SIZE], data.train_labels[:BATCH_SIZE]
    calls = {}
    for name in ("plain", "nudged"):
        net = build("simple_cnn", seed=0, filters=filters)
        if name == "plain":
            optimizer = torch.optim.SGD(net.parameters(), lr=LR)
        else:
            optimizer = NudgedSGD(net.parameters(), net, F.cross_entropy, (x, y), lr=LR, k=k, every=None, directions="random")
            optimizer.refresh()

        def several(net=net, optimizer=optimizer) -> None:
            for _ in range(steps):
                optimizer.zero_grad()
                F.cross_entropy(net(x), y).backward()
                optimizer.step()

        several()
        calls[name] = several
    seconds = paired(calls, repeats)
    median, words = ratio(seconds["nudged"], seconds["plain"])
    return [f"a step at K = {k} ÷ one of SGD, {filters} filters", words, STEP_AT_MOST, "met" if median <= STEP_AT_MOST else "NOT met"]


# ---- subspaces


class Remembered(Operator):
    "The products of an operator, each computed once, so that a method may be asked again with more of them."

    def __init__(self, A: Operator):
        super().__init__(A.size, A.dtype, A.device)
        self.A, self.gradient, self.known = A, A.gradient, {}

    def _multiply(self, vectors: list[Tensor]) -> list[Tensor]:
        keys = [hashlib.blake2b(vector.numpy()).digest() for vector in vectors]
        self.known |= {key: self.A @ vector for key, vector in zip(keys, vectors) if key not in self.known}
        return [self.known[key].clone() for key in keys]


def orthonormal(vectors: Tensor) -> Tensor:
    return torch.linalg.qr(vectors).Q


def by_lobpcg(A: Operator, old: Tensor, steps: int) -> tuple[int, Tensor]:
    "SciPy's block method: its products, and what it finds."
    before = A.products
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it has not converged
        _, vectors = lobpcg(A.to_scipy(), old.numpy(), tol=1e-6, maxiter=steps, largest=True)
    return A.products - before, orthonormal(torch.from_numpy(vectors).to(old))


def subspaces(A: Operator, old: Tensor) -> Iterator[tuple[str, int, Eigenpairs]]:
    "From the last eigenvectors [D, k]: the method, its products, and what it finds."
    k = old.shape[1]
    judged = lambda V: track_eigenpairs(A, V, max_products=k + 1)  # these products are the judge's, not the method's
    yield "nothing", 0, judged(old)
    yield "one power step", k, judged(orthonormal(A @ old))
    block = track_eigenpairs(A, torch.cat([old, A @ old], 1), max_products=2 * k + 1)
    yield "block: [V, AV]", 2 * k + 1, replace(block, values=block.values[:k], vectors=block.vectors[:, :k], residuals=block.residuals[:k])
    for steps in (1, 3):
        products, V = by_lobpcg(A, old, steps)
        yield "LOBPCG (SciPy)", products, judged(V)
    starts = {"random": torch.randn(A.size, generator=torch.Generator().manual_seed(0)), "gradient": None, "last vectors": old}
    for budget in (k + beyond for beyond in BUDGETS):
        yield "tracked", budget, track_eigenpairs(A, old, tolerance=0, max_products=budget)
        for name, start in starts.items():
            yield f"Lanczos from {name}", budget, top_eigenpairs(A, k, start=start, tolerance=0, max_products=budget)


def nearness(pairs: Eigenpairs, true: Eigenpairs) -> dict[str, float]:
    "The worst relative residual, how near the span lies to that of the eigenvectors, and its share of their eigenvalues' sum."
    angle = torch.rad2deg(principal_angles(pairs.vectors, true.vectors)[-1])
    residual = (pairs.residuals / pairs.values.abs()).max()
    captured = pairs.values.sum() / true.values.sum()
    return dict(residual=residual.item(), overlap=overlap(pairs.vectors, true.vectors), angle=angle.item(), captured=captured.item())


def refreshes(net: nn.Module, batches: Batches, sample: Callable, k: int) -> Iterator[dict]:
    "The rows of the study \"refresh\"."
    hessian = lambda n: Remembered(Hessian(net, F.cross_entropy, sample(n)))
    old, taken = top_eigenpairs(hessian(0), k, tolerance=TRUE).vectors, 0
    for later in LATER:
        further(net, batches, later - taken)
        taken = later
        for name, n in (("same", 0), ("fresh", later)):
            A = hessian(n)
            true = top_eigenpairs(A, k, tolerance=TRUE)
            for method, products, pairs in subspaces(A, old):
                yield dict(study="refresh", method=method, sample=name, steps=later, products=products, **nearness(pairs, true))


POLICIES = {  # how directions are refreshed, from the last ones, and after how many steps
    "Lanczos to 1e-2": (lambda A, old: top_eigenpairs(A, old.shape[1], start=old, tolerance=1e-2), (351, 117, 39)),
    "tracked, 2 K + 1 products": (lambda A, old: track_eigenpairs(A, old), (117, 39)),
    "one power step": (lambda A, old: orthonormal(A @ old), (117, 39)),
}


def along_a_run(net: nn.Module, batches: Batches, sample: Callable, k: int, apart: int = 39) -> Iterator[dict]:
    "The rows of the study \"run\"."
    start = top_eigenpairs(Hessian(net, F.cross_entropy, sample(0)), k, tolerance=TRUE).vectors
    held = {(method, every): start for method, (_, intervals) in POLICIES.items() for every in intervals}
    spent = dict.fromkeys(held, 0)
    for steps in range(0, EPOCH + 1, apart):
        if steps:
            further(net, batches, apart)
        A, judge = Hessian(net, F.cross_entropy, sample(2 * steps + 2)), Hessian(net, F.cross_entropy, sample(2 * steps + 1))
        true = top_eigenpairs(judge, k, tolerance=TRUE).vectors
        row = lambda method, every, products, V: dict(study="run", method=method, sample="fresh", steps=steps, every=every, products=products, overlap=overlap(V, true))
        yield row("eigenvectors of a fresh sample", 0, 0, top_eigenpairs(A, k, tolerance=TRUE).vectors)
        for (method, every), V in held.items():
            if steps and steps % every == 0:
                before = A.products
                found = POLICIES[method][0](A, V)
                held[method, every] = getattr(found, "vectors", found)
                spent[method, every] += A.products - before
            yield row(method, every, spent[method, every], V)  # as old as they get


def tracking(data: ImageSet, seed: int, filters: int, k: int, examples: int) -> pd.DataFrame:
    "Both studies with one seed, and where they come from."
    facts = dict(seed=seed, filters=filters, k=k, examples=examples, lr=LR, batch_size=BATCH_SIZE, device_name=device_name(), threads=1, commit=commit(Path(flatmin_nb.__file__)), **versions())
    rows = []
    for study in (refreshes, along_a_run):
        net = build("simple_cnn", seed=seed, filters=filters)
        batches = trained(net, data, EPOCH, seed)
        sample = fresh_sample(data.train_images, data.train_labels, examples, seed=seed)
        rows += study(net, batches, sample, k)
    return pd.DataFrame(rows).assign(**facts).round(5)


@call_parse
def main(
    tracking_table: str = "",  # a file: write the rows of the seeds to it, and time nothing
    seeds: str = "0 1 2",
    filters: str = "8 32",  # of the nets that are timed; the first is the one that is tracked
    k: int = 10,
    examples: int = 512,  # in the sample of the Hessian
    repeats: int = 5,  # paired repetitions
):
    "Print what a refresh and a step cost, or write the tracking table."
    torch.set_num_threads(1)
    data, widths = images(), [int(width) for width in filters.split()]
    if tracking_table:
        for seed in map(int, seeds.split()):
            frame = tracking(data, seed, widths[0], k, examples)
            if Path(tracking_table).exists():
                before = pd.read_csv(tracking_table)
                setting = dict(seed=seed, filters=widths[0], k=k, examples=examples)
                others = (before[list(setting)] != pd.Series(setting)).any(axis=1)
                frame = pd.concat([before[others], frame]).sort_values(["k", "seed"], kind="stable")
            with written_whole(Path(tracking_table)) as file:
                frame.to_csv(file, index=False)
        return
    print(heading(repeats), flush=True)
    rows = [refresh_row(data, width, k, examples, repeats) for width in widths] + [step_row(data, width, k, STEPS_A_REFRESH * repeats) for width in widths]
    table(rows, "what | ratio | wanted | ")
    sys.exit(any(row[-1] != "met" for row in rows))

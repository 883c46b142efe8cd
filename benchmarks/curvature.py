"""What a Hessian-vector product and five eigenpairs cost, against PyHessian, curvlinops and hessian-eigenthings: one thread, CPU time, paired repetitions.

    pip install -r benchmarks/requirements.txt       # the peers
    python benchmarks/curvature.py                   # all of it: a quarter of an hour of an idle core, and 6 GB for ResNet-20
    python benchmarks/curvature.py --nets mlp --repeats 9
    python benchmarks/curvature.py --eigenpairs_of ''  # products alone

Products: the unit is one plain forward and backward pass over all inputs at once. Every implementation gets the data as one batch (ours cuts it as it
likes); on ResNet-20 curvlinops, hessian-eigenthings and the gradient itself also run on batches of 64, which suits them better. All products are compared with a plain double backward first.

Eigenpairs: the five largest of the net of 1.9 million weights, to a relative residual |Hv - lv| / l of 1e-3 where a method takes a tolerance. Set-up is part of the time. Residuals are
those of a plain double backward, whatever a method claims. "outside" is the share of the time that was not spent in products; "of it set-up" the part of that before the first of them,
for ours and PyHessian the recorded gradient above all.

Memory is what the process grows by at most, in a forked child, for the first product or for the eigenpairs. The exit status is 1 if a bound is missed.
"""

import copy
import statistics
import sys
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from fastcore.script import call_parse
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

from flatmin_nb.lab.curvature import Hessian, top_eigenpairs
from paired import cpu_seconds, heading, paired, peak_megabytes, problem, ratio, table

warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")  # at the import of BackPACK, which curvlinops needs
try:
    import hessian_eigenthings
    import pyhessian
    from curvlinops import HessianLinearOperator
except ImportError as error:
    sys.exit(f"{error}; the peers are needed: pip install -r benchmarks/requirements.txt")

SMALL_BATCH = 64
PRODUCT_AT_MOST = {"mlp": 1.75, "resnet20": 2.3, "allcnn": 2.3}  # gradients
AGREES = 2e-3  # relative: in float32 a few rectifiers may fall on the other side
EIGENPAIRS, TOLERANCE = 5, 1e-3
PRODUCTS_AT_MOST, OUTSIDE_AT_MOST = 20, 0.12
FASTER_AT_LEAST = {"PyHessian": 4.0, "curvlinops + eigsh": 1.8, "eigsh on our products": 1.0}

warnings.filterwarnings("ignore", message="Using backward\\(\\) with create_graph=True")  # PyHessian's reference cycle


def flat(parts) -> Tensor:
    return torch.cat([part.detach().reshape(-1) for part in parts])


def parts_of(vector: Tensor, net: nn.Module) -> list[Tensor]:
    parameters = list(net.parameters())
    return [part.view(p.shape) for part, p in zip(vector.split([p.numel() for p in parameters]), parameters)]


def plain_product(net: nn.Module, inputs: Tensor, targets: Tensor) -> Callable[[Tensor], Tensor]:
    "v -> H v, by double backward and nothing else: the judge of all others."
    parameters = list(net.parameters())

    def product(v: Tensor) -> Tensor:
        total = torch.zeros_like(v)
        for x, y in zip(inputs.split(500), targets.split(500)):
            slopes = torch.autograd.grad(F.cross_entropy(net(x), y), parameters, create_graph=True)
            total += flat(torch.autograd.grad(slopes, parameters, parts_of(v, net))) * (len(x) / len(inputs))
        return total

    return product


# ---- one product


def gradient(net: nn.Module, inputs: Tensor, targets: Tensor, at_once: int) -> Callable:
    "Clear, forward, backward."

    def call(v: Tensor) -> None:
        net.zero_grad()
        for x, y in zip(inputs.split(at_once), targets.split(at_once)):
            (F.cross_entropy(net(x), y) * (len(x) / len(inputs))).backward()

    return call


def ours(net: nn.Module, inputs: Tensor, targets: Tensor, at_once: int) -> Callable[[Tensor], Tensor]:
    operator = Hessian(net, F.cross_entropy, (inputs, targets))
    return lambda v: operator @ v


def of_pyhessian(net: nn.Module, inputs: Tensor, targets: Tensor, at_once: int) -> Callable[[Tensor], Tensor]:
    known = pyhessian.hessian(net, F.cross_entropy, data=(inputs, targets), cuda=False)
    return lambda v: flat(sys.modules["pyhessian.utils"].hessian_vector_product(known.gradsH, known.params, parts_of(v, net)))


def of_curvlinops(net: nn.Module, inputs: Tensor, targets: Tensor, at_once: int) -> Callable[[Tensor], Tensor]:
    data = list(zip(inputs.split(at_once), targets.split(at_once)))
    operator = HessianLinearOperator(net, nn.CrossEntropyLoss(), list(net.parameters()), data, check_deterministic=False)
    return lambda v: operator @ v


def of_eigenthings(net: nn.Module, inputs: Tensor, targets: Tensor, at_once: int) -> Callable[[Tensor], Tensor]:
    data = list(zip(inputs.split(at_once), targets.split(at_once)))
    return hessian_eigenthings.HessianOperator(net, data, hessian_eigenthings.supervised_loss(F.cross_entropy)).matvec


MAKERS = {"gradient": gradient, "ours": ours, "PyHessian": of_pyhessian, "curvlinops": of_curvlinops, "hessian-eigenthings": of_eigenthings}


def products(name: str, repeats: int) -> bool:
    "Measure one product on one net; whether the bound holds."
    net, inputs, targets = problem(name)
    v = torch.randn(sum(p.numel() for p in net.parameters()), generator=torch.Generator().manual_seed(1))
    v /= v.norm()
    makers = {what: (make, len(inputs)) for what, make in MAKERS.items()}
    if len(inputs) > SMALL_BATCH and name != "mlp":
        makers |= {f"{what}, {SMALL_BATCH} at once": (MAKERS[what], SMALL_BATCH) for what in ("gradient", "curvlinops", "hessian-eigenthings")}
    make = lambda what: makers[what][0](copy.deepcopy(net), inputs, targets, makers[what][1])
    memory = {what: peak_megabytes(lambda: make(what)(v)) for what in makers}
    expected = plain_product(net, inputs, targets)(v)
    calls, setup = {}, {}
    for what in makers:
        setup[what] = cpu_seconds(lambda: calls.__setitem__(what, make(what)))
        product = calls[what](v)  # the first
        if product is not None and (product - expected).norm() > AGREES * expected.norm():
            sys.exit(f"{name}: the product of {what} is not the Hessian's")
    seconds = paired({what: lambda call=call: call(v) for what, call in calls.items()}, repeats)
    rows, at_most = [], PRODUCT_AT_MOST[name]
    for what in makers:
        median, words = ratio(seconds[what], seconds["gradient"])
        rows.append([what, f"{1000 * statistics.median(seconds[what]):.0f}", words, f"{setup[what]:.2f}", f"{memory[what]:.0f}"])
        if what == "ours":
            kept = median <= at_most
    print(f"{name}, {len(inputs):,} inputs, {len(v):,} weights: wanted at most {at_most} gradients a product: {'kept' if kept else 'MISSED'}")
    table(rows, "one product | ms | ÷ gradient | set-up, s | peak, MB")
    return kept


# ---- five eigenpairs


class Timed:
    "An operator that adds up the time and the number of its products."

    def __init__(self, operator):
        self.operator, self.seconds, self.count = operator, 0.0, 0
        self.ready = time.process_time()  # set-up is over

    def __getattr__(self, name: str):
        return getattr(self.operator, name)

    def timed(self, product: Callable, v):
        held = []
        self.seconds += cpu_seconds(lambda: held.append(product(v)))
        self.count += 1
        return held[0]

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.timed(self.operator.__matmul__, v)

    def eigsh(self, start: Tensor) -> tuple[Tensor, Tensor]:
        "SciPy's answer from these products."
        matrix = self.operator if isinstance(self.operator, LinearOperator) else self.operator.to_scipy()
        counted = LinearOperator(matrix.shape, matvec=lambda v: self.timed(matrix.matvec, v), dtype="float32")
        values, vectors = eigsh(counted, k=EIGENPAIRS, which="LA", tol=TOLERANCE, v0=start.numpy())
        return torch.from_numpy(values), torch.from_numpy(vectors)


Answer = tuple[Tensor, Tensor, Timed]  # values [5], vectors [D, 5], and what was timed


def pairs_of_ours(net: nn.Module, inputs: Tensor, targets: Tensor, seed: int) -> Answer:
    operator = Timed(Hessian(net, F.cross_entropy, (inputs, targets)))
    pairs = top_eigenpairs(operator, EIGENPAIRS, tolerance=TOLERANCE, seed=seed)
    if not pairs.converged.all():
        sys.exit("our eigenpairs did not converge")
    return pairs.values, pairs.vectors, operator


def start_of(size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def eigsh_on_ours(net: nn.Module, inputs: Tensor, targets: Tensor, seed: int) -> Answer:
    operator = Timed(Hessian(net, F.cross_entropy, (inputs, targets)))
    return *operator.eigsh(start_of(operator.size, seed)), operator


def eigsh_on_curvlinops(net: nn.Module, inputs: Tensor, targets: Tensor, seed: int) -> Answer:
    operator = HessianLinearOperator(net, nn.CrossEntropyLoss(), list(net.parameters()), [(inputs, targets)], check_deterministic=False)
    operator = Timed(operator.to_scipy())
    return *operator.eigsh(start_of(operator.shape[0], seed)), operator


def pairs_of_pyhessian(net: nn.Module, inputs: Tensor, targets: Tensor, seed: int) -> Answer:
    torch.manual_seed(seed)
    module = sys.modules["pyhessian.hessian"]
    plain = module.hessian_vector_product
    known = pyhessian.hessian(net, F.cross_entropy, data=(inputs, targets), cuda=False)
    counter = Timed(None)
    module.hessian_vector_product = lambda *arguments: counter.timed(lambda given: plain(*given), arguments)
    try:
        values, vectors = known.eigenvalues(top_n=EIGENPAIRS)
    finally:
        module.hessian_vector_product = plain
    return torch.tensor(values), torch.stack([flat(vector) for vector in vectors], 1), counter


METHODS = {
    "ours": pairs_of_ours,
    "eigsh on our products": eigsh_on_ours,
    "curvlinops + eigsh": eigsh_on_curvlinops,
    "PyHessian": pairs_of_pyhessian,
}


def eigenpairs(name: str, repeats: int) -> bool:
    "Measure five eigenpairs on one net; whether all bounds hold."
    net, inputs, targets = problem(name)
    answers, setups = {what: [] for what in METHODS}, {what: [] for what in METHODS}

    def call(what: str) -> None:
        start = time.process_time()
        values, vectors, timed = METHODS[what](copy.deepcopy(net), inputs, targets, seed=len(answers[what]))
        timed.operator = None  # or the next would be measured beside the records of this one
        answers[what].append((values, vectors, timed))
        setups[what].append(timed.ready - start)

    memory = {what: peak_megabytes(lambda: call(what)) for what in METHODS}  # in a child: no answer of it is kept here
    judge = plain_product(net, inputs, targets)
    seconds = paired({what: lambda what=what: call(what) for what in METHODS}, repeats)
    rows, missed = [], []
    for what, found in answers.items():
        counts, outside, before, worst = [], [], [], []
        for total, setup, (values, vectors, timed) in zip(seconds[what], setups[what], found, strict=True):
            counts.append(timed.count)
            outside.append(1 - timed.seconds / total)
            before.append(setup / total)
            worst.append(max(((judge(v) - value * v).norm() / (abs(value) * v.norm())).item() for value, v in zip(values, vectors.T)))
        slower, words = ratio(seconds[what], seconds["ours"])
        rows.append([what, f"{statistics.median(seconds[what]):.1f}", words, statistics.median(counts), f"{max(worst):.1e}",
                     f"{100 * statistics.median(outside):.1f} %", f"{100 * statistics.median(before):.1f} %", f"{memory[what]:.0f}"])  # fmt: skip
        if what == "ours":
            missed += [f"{max(counts)} products"] * (statistics.median(counts) > PRODUCTS_AT_MOST)
            missed += [f"{100 * statistics.median(outside):.1f} % outside"] * (statistics.median(outside) > OUTSIDE_AT_MOST)
            missed += [f"residual {max(worst):.1e}"] * (max(worst) > TOLERANCE)
        elif slower < FASTER_AT_LEAST[what]:
            missed.append(f"{what} takes only {slower:.2f} times as long, not {FASTER_AT_LEAST[what]}")
    print(f"{name}, {len(inputs):,} inputs: {', '.join(f'{value:.3f}' for value in sorted(answers['ours'][0][0].tolist(), reverse=True))}")
    faster = ", ".join(f"{times:g} times faster than {what}" for what, times in FASTER_AT_LEAST.items())
    print(f"wanted at most {PRODUCTS_AT_MOST} products, {100 * OUTSIDE_AT_MOST:.0f} % outside, {faster}: {'MISSED: ' + '; '.join(missed) if missed else 'kept'}")
    table(rows, "five eigenpairs | s | ÷ ours | products | worst residual | outside | of it set-up | peak, MB")
    return not missed


@call_parse
def main(
    nets: str = "mlp,resnet20,allcnn",  # whose products are timed; '' for none
    eigenpairs_of: str = "mlp",  # whose eigenpairs; '' for none
    repeats: int = 5,  # paired repetitions
):
    torch.set_num_threads(1)
    print(heading(repeats), flush=True)
    kept = [products(name, repeats) for name in nets.split(",") if name]
    kept += [eigenpairs(name, repeats) for name in eigenpairs_of.split(",") if name]
    sys.exit(not all(kept))

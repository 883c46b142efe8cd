"""What a step of a run costs when runs are trained as a stack, beside one run after the other: `nn.Module` and `torch.optim.SGD`; one thread, CPU time, paired repetitions, medians.

    python benchmarks/sgd_regimes.py                        # both nets
    python benchmarks/sgd_regimes.py --parts perceptron --repeats 9

Everything that a run does is in it, on both sides: initial weights, f(w_0) of the training examples, the draw of every batch, the last step that had a gradient, and a look at all training
examples at the end. The batches are noise with random labels, so that no run ends early. Leaves with status 1 if a bound is missed.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
from fastcore.script import call_parse
from paired import heading, paired, ratio, table
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

from flatmin_nb.lab.ensemble import Ensemble, Lanes
from flatmin_nb.lab.scaled_nets import ScaledNet, scaled_net
from flatmin_nb.lab.streams import key, subsets

EXAMPLES = 128  # P
EAGER, COMPILED = 2.2, 2.5  # wanted of 32 lanes of the five-layer net


class Scaled(nn.Module):
    "One lane of a mlp of lab.scaled_nets as anyone would write it; without hidden layers the linear net."

    def __init__(self, net: ScaledNet):
        super().__init__()
        *hidden, (last,) = net.shapes.values()
        self.hidden = nn.ModuleList(nn.Linear(*shape, bias=False) for shape in hidden)
        self.output = nn.Linear(last, 1, bias=False)
        self.scale = last if hidden else last**0.5
        for part in self.parameters():
            nn.init.normal_(part)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.hidden:
            x = torch.relu(layer(x) / layer.in_features**0.5) * 2**0.5
        return self.output(x)[:, 0] / self.scale


class Problem:
    "A net, examples, a batch size and a step."

    def __init__(self, net: ScaledNet, batch: int, alpha: float, temperature: float):
        self.net, self.batch, self.alpha, self.dt = net, batch, alpha, temperature * net.width * batch
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(EXAMPLES, *net.input_shape, generator=generator)
        self.y = torch.where(torch.rand(EXAMPLES, generator=generator) < 0.5, 1.0, -1.0)

    def loop(self, lanes: int, steps: int, **options) -> Callable[[], None]:
        "One run after the other."

        def run() -> None:
            for _ in range(lanes):
                model, moved = Scaled(self.net), 0
                optimizer = torch.optim.SGD(model.parameters(), lr=self.dt, **options)
                with torch.no_grad():
                    before = model(self.x)
                for step in range(steps):
                    rows = torch.randperm(EXAMPLES)[: self.batch]
                    optimizer.zero_grad()
                    F = model(self.x[rows]) - before[rows]
                    loss = (1 - self.alpha * F * self.y[rows]).clamp_min(0).mean() / self.alpha
                    loss.backward()
                    optimizer.step()
                    moved = step + 1 if loss.item() else moved
                with torch.no_grad():
                    assert ((1 - self.alpha * (model(self.x) - before) * self.y) > 0).any()

        return run

    def stack(self, lanes: int, steps: int, device: str = "cpu", generic: bool = False, **options) -> Callable[[], None]:
        "All of them at once; each call begins anew, with the same object, which may be compiled."
        net, seeds = self.net, torch.arange(lanes)
        if generic:
            net = ScaledNet(net.name, net.input_shape, net.width, net.shapes, net.function)
        same = lambda value: torch.full((lanes,), value, dtype=torch.float64)
        runs = Lanes(key(seeds, torch.ones_like(seeds)), key(seeds, torch.full_like(seeds, 2)), same(self.dt), same(self.alpha), [torch.arange(EXAMPLES)] * lanes)
        options = dict(batch_size=self.batch, max_step=steps, at_once=lanes) | options
        ensemble = Ensemble(net, "hinge", self.x.to(device), self.y.to(device), runs, **options)
        start = ensemble.state_dict()

        def run() -> None:
            ensemble.load_state_dict(start)
            assert {row["stopped"] for row in ensemble.run()} == {"steps"}

        return run

    def draws(self, lanes: int, steps: int) -> Callable[[], None]:
        "The batches alone."
        keys, sizes = key(torch.arange(lanes), torch.full((lanes,), 2)), torch.full((lanes,), EXAMPLES)
        return lambda: subsets(keys, torch.arange(steps).expand(lanes, steps), self.batch, sizes)


def on_gpu(problem: Problem, lanes: int, steps: int) -> str:
    "Thousands of model-steps a second; blank without a GPU."
    if not torch.cuda.is_available():
        return ""
    run = problem.stack(lanes, steps, device="cuda")
    run()  # libraries start
    start = time.perf_counter()
    run()  # which ends with numbers on the host
    return f"{lanes * steps / (time.perf_counter() - start) / 1000:.0f}"


def measured(title: str, calls: dict[str, tuple[Callable, int]], repeats: int) -> dict[str, float]:
    "Print the table of these calls, each with its number of model-steps; how many times the first takes, a model-step, of each."
    seconds = paired({name: call for name, (call, _) in calls.items()}, repeats)
    each = {name: [value / calls[name][1] for value in values] for name, values in seconds.items()}
    base = next(iter(each.values()))
    ratios = {name: ratio(base, values) for name, values in each.items()}
    print(f"{title}: {heading(repeats)}\n")
    table([[name, f"{1e6 * statistics.median(values):.1f}", ratios[name][1]] for name, values in each.items()], "way | µs a model-step | loop ÷ this")
    return {name: median for name, (median, _) in ratios.items()}


def five_layers(repeats: int, steps: int) -> bool:
    "Whether both bounds are met."
    problem = Problem(scaled_net("mlp", (784,), width=128, depth=5, activation="relu"), batch=16, alpha=32768.0, temperature=2.0**-24)
    compiled = problem.stack(32, steps, compiled=True)
    with fresh_cache():  # what the last call of this command has compiled would be taken
        began = time.perf_counter()
        compiled()
        first = time.perf_counter() - began
    calls = {
        "loop": (problem.loop(4, steps), 4 * steps),
        "loop, SGD(fused=True)": (problem.loop(4, steps, fused=True), 4 * steps),
        **{f"stack of {K}": (problem.stack(K, steps), K * steps) for K in (1, 8, 32, 64)},
        "stack of 32, compiled": (compiled, 32 * steps),
        "stack of 32, torch.func": (problem.stack(32, steps, generic=True), 32 * steps),
        "the batches of 32": (problem.draws(32, steps), 32 * steps),
    }
    for call, _ in calls.values():
        call()  # memory is there
    found = measured(f"784-128x5-1, B = 16, α = 32768, P = {EXAMPLES}, {steps} steps", calls, repeats)
    print(f"the draw is {100 * found['stack of 32'] / found['the batches of 32']:.1f} % of a stack of 32; the first call of the compiled stack took {first:.0f} s by the clock")
    print(f"thousands of model-steps a second on a GPU, 512 lanes: {on_gpu(problem, 512, 10 * steps)}\n")
    return found["stack of 32"] >= EAGER and found["stack of 32, compiled"] >= COMPILED


def perceptron(repeats: int, steps: int) -> None:
    problem = Problem(scaled_net("linear", (32,)), batch=2, alpha=1.0, temperature=2.0**-6)
    calls = {
        "loop": (problem.loop(8, steps), 8 * steps),
        "stack of 512": (problem.stack(512, steps), 512 * steps),
        "stack of 512, torch.func": (problem.stack(512, steps, generic=True), 512 * steps),
        "the batches of 512": (problem.draws(512, steps), 512 * steps),
    }
    for call, _ in calls.values():
        call()
    found = measured(f"linear, d = 32, B = 2, P = {EXAMPLES}, {steps} steps", calls, repeats)
    print(f"the draw is {100 * found['stack of 512'] / found['the batches of 512']:.1f} % of a stack of 512")
    print(f"thousands of model-steps a second on a GPU, 4096 lanes: {on_gpu(problem, 4096, 10 * steps)}\n")


@call_parse
def main(
    parts: str = "five_layers,perceptron",
    repeats: int = 5,
    steps: int = 64,  # of each lane
):
    "Print the tables."
    torch.set_num_threads(1)
    torch.manual_seed(0)
    met = True
    if "five_layers" in parts:
        met = five_layers(repeats, steps)
    if "perceptron" in parts:
        perceptron(repeats, steps)
    sys.exit(not met)

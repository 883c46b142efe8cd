"""What a training step of a Bayesian net costs beside one of the plain net: forward, loss, backward and Adam on a batch of 128; one thread, CPU time, paired repetitions, medians.

    python benchmarks/bayesian_compression.py                        # LeNet-300-100
    python benchmarks/bayesian_compression.py --model lenet5_caffe --repeats 5

A Bayesian layer computes a mean and a variance, so twice the products of the plain one are to be expected, and Adam has twice the parameters. bayesian-torch, if it is installed
(pip install -r benchmarks/requirements.txt), draws one noise a batch, or signs for each example (flipout), and has no groups, which is less work and a noisier gradient; it is timed as its own conversion makes it.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from fastcore.script import call_parse
from paired import heading, paired, ratio, table
from torch import nn

from flatmin_nb.bayesian_compression import ELBO, bayesian, parameter_groups
from flatmin_nb.lab import models

BATCH, EXAMPLES = 128, 60000


def stepper(net: nn.Module, loss: Callable, groups: list) -> Callable[[], None]:
    "One training step on noise."
    optimizer = torch.optim.Adam(groups, lr=1e-3, fused=True)
    x, y = torch.randn(BATCH, 1, 28, 28), torch.randint(10, (BATCH,))

    def step() -> None:
        optimizer.zero_grad()
        loss(net(x), y).backward()
        optimizer.step()

    return step


def ours(prior: str, plain: nn.Module) -> Callable[[], None]:
    net = bayesian(plain, prior=prior)
    return stepper(net, ELBO(net, EXAMPLES), parameter_groups(net, 1e-3, 1e-3))


def peer(kind: str, model: str) -> Callable[[], None]:
    "bayesian-torch; its KL of a tensor is a mean, so the factor differs, and the work does not."
    from bayesian_torch.models.dnn_to_bnn import dnn_to_bnn, get_kl_loss

    net = models.build(model, seed=0)
    dnn_to_bnn(net, {"prior_mu": 0.0, "prior_sigma": 1.0, "posterior_mu_init": 0.0, "posterior_rho_init": -4.5, "type": kind, "moped_enable": False})
    return stepper(net, lambda outputs, y: F.cross_entropy(outputs, y) + get_kl_loss(net) / EXAMPLES, net.parameters())


@call_parse
def main(
    model: str = "lenet_300_100",  # of lab.models, for images of 28x28
    repeats: int = 9,
    steps: int = 5,  # in a repetition
):
    "Print the table."
    torch.set_num_threads(1)
    torch.manual_seed(0)
    plain = models.build(model, seed=0)
    makers = {
        "plain": lambda: stepper(plain, F.cross_entropy, plain.parameters()),
        "normal-Jeffreys": lambda: ours("normal_jeffreys", plain),
        "horseshoe": lambda: ours("horseshoe", plain),
        "no scales": lambda: ours("gaussian", plain),
        "bayesian-torch, reparameterization": lambda: peer("Reparameterization", model),
        "bayesian-torch, flipout": lambda: peer("Flipout", model),
    }
    calls = {}
    for name, make in makers.items():
        try:
            step = make()
            step()
        except ImportError as error:
            print(f"{name} is left out: {error}")
            continue
        calls[name] = lambda step=step: [step() for _ in range(steps)]
    seconds = paired(calls, repeats)
    print(f"{model}: {heading(repeats)}\n")
    table([[name, f"{1000 * sorted(times)[repeats // 2] / steps:.1f}", ratio(times, seconds["plain"])[1]] for name, times in seconds.items()], "net | ms a step | ÷ plain")

"""Write golden_scaled_nets.safetensors: outputs of the published nets, with their weights. Not run by the tests.

    python3 -m venv scratch; scratch/bin/pip install jax==0.4.13 jaxlib==0.4.13 dm-haiku==0.0.10 "numpy<1.25" "scipy<1.12" safetensors
    scratch/bin/python golden_scaled_nets.py CHECKOUT golden_scaled_nets.safetensors

CHECKOUT is a copy of https://github.com/AntonioScl/SGD_learning_regimes, whose edm/architecture.py is imported as it is: the forward passes are the published ones.
They are run in float64 on weights and images in float32, and with activations divided by the exact sqrt(E phi**2) where the published code divides by a
Monte-Carlo estimate of it; those estimates, made as `normalize_act` in edm/train.py makes them, are stored beside. Images are [height, width, channels] here.
"""

import math
import re
import sys

import jax
import numpy as np
from safetensors.numpy import save_file
from scipy.integrate import quad

checkout, out = sys.argv[1:]
sys.path.insert(0, checkout)
import haiku as hk  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from edm import architecture as published  # noqa: E402

ACTIVATIONS = {"relu": jax.nn.relu, "gelu": jax.nn.gelu, "silu": jax.nn.silu, "tanh": jnp.tanh}
found = {}
normal = jax.random.normal(jax.random.PRNGKey(0), (1_000_000,))  # float32, before the switch below
for name, phi in ACTIVATIONS.items():
    found[f"published_rms.{name}"] = np.array([jnp.mean(phi(normal) ** 2) ** 0.5])

jax.config.update("jax_enable_x64", True)


def exact(phi):
    square = lambda z: float(phi(jnp.float64(z))) ** 2 * math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    rms = (quad(square, -30, 0, epsabs=1e-15)[0] + quad(square, 0, 30, epsabs=1e-15)[0]) ** 0.5
    return lambda a: phi(a) / rms


# name: the published function, the image, and whether all four activations are tried
NETS = {
    "mlp": (lambda act, x: published.mlp([4, 4, 4], act, x), (5, 4, 2), list(ACTIVATIONS)),
    "mlp_bias": (lambda act, x: published.mlp_bias([4, 4, 4], act, x), (5, 4, 2), list(ACTIVATIONS)),
    "linear": (lambda act, x: published.linear_model(x), (5, 4, 2), ["relu"]),
    "diagonal_linear": (lambda act, x: published.simple_diagonal_linear(3, x), (5, 4, 2), ["relu"]),
    "diagonal_pair": (lambda act, x: published.diagonal_linear(3, x), (5, 4, 2), ["relu"]),
    "mnas": (lambda act, x: published.mnas(2, act, x), (14, 11, 2), list(ACTIVATIONS)),
    "simple_cnn": (lambda act, x: published.simple_cnn(2, act, x), (14, 11, 2), list(ACTIVATIONS)),
    "vgg11": (lambda act, x: published.vgg11(1, act, x), (35, 20, 2), list(ACTIVATIONS)),
}


def made(module):  # conv2_d, conv2_d_1, ..., linear, linear_1: the order in which they were made
    kind, number = re.fullmatch(r"(.*?)_?(\d*)", module).groups() if module != "conv2_d" else ("conv2_d", "")
    return kind, int(number or 0)


for place, (name, (function, image, activations)) in enumerate(NETS.items()):
    key, key_x = jax.random.split(jax.random.PRNGKey(place))
    x = jax.random.normal(key_x, (4, *image), jnp.float32)
    found[f"{name}.x"] = np.array(x)
    weights = None
    for activation in activations:
        net = hk.without_apply_rng(hk.transform(lambda x: function(exact(ACTIVATIONS[activation]), x)))
        weights = weights or net.init(key, x)  # float32, the same for all activations
        if name == "diagonal_linear":  # which is published as ones
            weights = {module: {"w": jax.random.normal(key, own["w"].shape, jnp.float32)} for module, own in weights.items()}
        double = jax.tree_util.tree_map(lambda w: w.astype(jnp.float64), weights)
        found[f"{name}.outputs.{activation}"] = np.array(net.apply(double, x.astype(jnp.float64)))
    number = 0
    for module in sorted(weights, key=made):
        for tensor in sorted(weights[module], reverse=True):  # w, then b
            found[f"{name}.weights.{number:02d}.{module}.{tensor}"] = np.array(weights[module][tensor], np.float32)
            number += 1
cases = [(size, kernel, stride) for size in range(1, 34) for kernel in (1, 2, 3, 5) for stride in (1, 2, 3)]
found["same_pad"] = np.array([(*case, *jax.lax.padtype_to_pads(case[:1], case[1:2], case[2:], "SAME")[0]) for case in cases], np.uint8)
save_file(found, out)

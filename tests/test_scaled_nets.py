"""The nets of lab.scaled_nets against outputs of the published JAX code, which `golden_scaled_nets.py` made (see there), and what takes too long for the notebook."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flatmin_nb.lab import streams
from flatmin_nb.lab.errors import OneLineError
from flatmin_nb.lab.scaled_nets import ACTIVATIONS, DEEP, NETS, same_pad, scaled_net

GOLDEN = load_file(Path(__file__).parent / "golden_scaled_nets.safetensors")
SIZES = {  # width and depth of the golden nets
    "mlp": (4, 3),
    "mlp_bias": (4, 3),
    "linear": (1, None),
    "diagonal_linear": (1, 3),
    "diagonal_pair": (1, 3),
    "mnas": (2, None),
    "simple_cnn": (2, None),
    "vgg11": (1, None),
}
CONV_NETS = ("mnas", "simple_cnn", "vgg11")


def lanes(net, count: int, seed: int = 0, dtype=torch.float64):
    return net.init(streams.key(torch.arange(count), seed), dtype)


def numbers(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return streams.normal(streams.key(seed, 99), 0, torch.Size(shape).numel(), dtype).reshape(shape)


def golden_images(name: str) -> torch.Tensor:
    x = GOLDEN[f"{name}.x"].double()
    return x.permute(0, 3, 1, 2) if name in CONV_NETS else x


def golden_weights(name: str, shapes: dict) -> dict:
    "The published weights in our layout: kernels [out, in, k, k], a 1x1 kernel a matrix, rows after a flattening in the order of channels."
    published = [GOLDEN[key].double() for key in sorted(GOLDEN) if key.startswith(f"{name}.weights.")]
    assert len(published) == len(shapes)
    weights = {}
    for (ours, shape), w in zip(shapes.items(), published):
        if w.dim() == 4:
            w = w.permute(3, 2, 0, 1)
        elif name in CONV_NETS and ours in ("linear", "linear1"):
            pixels = (4, 3) if name == "simple_cnn" else (2, 1)
            w = w.unflatten(0, (*pixels, -1)).permute(2, 0, 1, 3).flatten(0, 2)
        weights[ours] = w.reshape(shape)
    return weights


@pytest.mark.parametrize("name", NETS)
def test_the_outputs_are_those_of_the_published_code(name):
    x, tried = golden_images(name), [key.split(".")[-1] for key in GOLDEN if key.startswith(f"{name}.outputs.")]
    assert len(tried) == (4 if name in ("mlp", "mlp_bias", *CONV_NETS) else 1)
    for activation in tried:
        net = scaled_net(name, tuple(x.shape[1:]), *SIZES[name], activation)
        outputs = net.outputs(golden_weights(name, net.shapes), x)
        torch.testing.assert_close(outputs, GOLDEN[f"{name}.outputs.{activation}"], rtol=1e-12, atol=1e-13)


def test_the_published_normalisation_is_ours_to_its_monte_carlo_error():
    for name, activation in ACTIVATIONS.items():
        assert abs(GOLDEN[f"published_rms.{name}"].item() / activation.rms - 1) < 2e-3
    assert round(1 / GOLDEN["published_rms.relu"].item(), 5) == 1.41285


def test_same_pad_is_that_of_jax():
    for size, kernel, stride, before, after in GOLDEN["same_pad"].tolist():
        assert same_pad(size, kernel, stride) == (before, after), (size, kernel, stride)


def one_step(net, weights, x, y, dt=0.1):
    f, kept = net.forward(weights, x)
    net.descend(weights, kept, torch.where(f * y < 1, -dt * y, 0))
    return f


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("name", ["mlp", "mlp_bias", "linear", "diagonal_linear", "diagonal_pair"])
def test_many_fast_steps_are_many_generic_ones(name, dtype, tolerance):
    for activation in ACTIVATIONS:
        fast, generic = (scaled_net(name, (3, 4), 8, 3 if name in DEEP else None, activation, generic=generic) for generic in (False, True))
        first, second = lanes(fast, 3, dtype=dtype), lanes(generic, 3, dtype=dtype)
        for step in range(10):
            x, y = numbers(3, 5, 3, 4, seed=step, dtype=dtype), numbers(3, 5, seed=step + 50, dtype=dtype).sign()
            torch.testing.assert_close(one_step(fast, first, x, y), one_step(generic, second, x, y), rtol=tolerance, atol=tolerance)
        for weight in first:
            torch.testing.assert_close(first[weight], second[weight], rtol=tolerance, atol=tolerance)
            assert (first[weight] - lanes(fast, 3, dtype=dtype)[weight]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_a_big_stack_is_its_lanes(dtype, tolerance):
    net = scaled_net("mlp", (1, 28, 28), 128, 5, "gelu")
    weights, x, y = lanes(net, 4, dtype=dtype), numbers(4, 16, 1, 28, 28, dtype=dtype), numbers(4, 16, seed=1, dtype=dtype).sign()
    alone = {name: weight[2:3].clone() for name, weight in weights.items()}
    one_step(net, weights, x, y)
    one_step(net, alone, x[2:3], y[2:3])
    for name in net.shapes:
        torch.testing.assert_close(weights[name][2:3], alone[name], rtol=tolerance, atol=tolerance)


def test_no_step_is_no_change_and_the_images_are_left_alone():
    for name in NETS:
        net = scaled_net(name, (1, 8, 8), 2, 2 if name in DEEP else None)
        weights, x = lanes(net, 2), numbers(2, 3, 1, 8, 8)
        before, same = {name: weight.clone() for name, weight in weights.items()}, x.clone()
        _, kept = net.forward(weights, x)
        net.descend(weights, kept, torch.zeros(2, 3, dtype=x.dtype))
        assert torch.equal(x, same) and all(torch.equal(weights[name], before[name]) for name in before)


@pytest.mark.parametrize("name", NETS)
def test_nets_work_under_torch_func(name):
    net = scaled_net(name, (2, 6, 5), 2, 2 if name in DEEP else None, "silu")
    weights, x = {n: w[0] for n, w in lanes(net, 1).items()}, numbers(4, 2, 6, 5)
    tangent = {n: numbers(*w.shape, seed=5) for n, w in weights.items()}
    f, slope = torch.func.jvp(lambda w: net.outputs(w, x), (weights,), (tangent,))
    gradients = torch.func.vmap(torch.func.grad(lambda w, one: net.outputs(w, one[None])[0]), (None, 0))(weights, x)
    torch.testing.assert_close(slope, sum((g * tangent[n]).reshape(len(x), -1).sum(1) for n, g in gradients.items()))
    torch.testing.assert_close(f, net.stacked({n: w[None] for n, w in weights.items()}, x[None])[0])


def test_a_lane_drawn_alone_is_the_lane_of_the_stack():
    for name in NETS:
        net = scaled_net(name, (1, 8, 8), 2, 2 if name in DEEP else None)
        alone, stack = net.init(streams.key(2, 0)), lanes(net, 4, dtype=torch.float32)
        assert {n: w.shape for n, w in alone.items()} == net.shapes and list(alone) == list(net.shapes)
        assert all(torch.equal(alone[n], stack[n][2]) for n in alone)
        assert net.parameters == sum(w.numel() for w in alone.values())


def test_a_step_compiles_without_a_break():
    "Traced and functionalised; code is generated only where someone runs it so: on a CPU that is slower than the step as it stands."
    for name in ("mlp", "mlp_bias", "diagonal_pair"):
        net = scaled_net(name, (12,), 8, 2, "gelu")
        plain, compiled = lanes(net, 3), lanes(net, 3)
        x, y = numbers(3, 4, 12), numbers(3, 4, seed=1).sign()
        f = torch.compile(lambda weights, x, y: one_step(net, weights, x, y), backend="aot_eager", fullgraph=True)(compiled, x, y)
        torch.testing.assert_close(f, one_step(net, plain, x, y), rtol=1e-12, atol=1e-12)
        for weight in plain:
            torch.testing.assert_close(compiled[weight], plain[weight], rtol=1e-12, atol=1e-12)


def test_lanes_of_a_centred_net_stack():
    net = scaled_net("mlp", (12,), 8, 3, "silu")
    initial, change = lanes(net, 3), {name: 1e-3 * weight for name, weight in lanes(net, 3, seed=1).items()}
    x = numbers(3, 4, 12)
    moved = {name: initial[name] + change[name] for name in initial}
    together = torch.func.vmap(net.centred)(change, initial, x)
    torch.testing.assert_close(together, net.stacked(moved, x) - net.stacked(initial, x), rtol=1e-9, atol=1e-12)


def test_centred_training_by_autograd_is_the_fast_step():
    net = scaled_net("mlp_bias", (12,), 8, 3)
    weights = lanes(net, 1)
    initial = {name: weight[0].clone() for name, weight in weights.items()}
    change = {name: torch.zeros_like(weight, requires_grad=True) for name, weight in initial.items()}
    for step in range(5):
        x, c = numbers(6, 12, seed=step), numbers(6, seed=step + 20) / 50
        _, kept = net.forward(weights, x[None])
        net.descend(weights, kept, c[None])
        gradients = torch.autograd.grad((c * net.centred(change, initial, x)).sum(), list(change.values()))
        with torch.no_grad():
            for d, gradient in zip(change.values(), gradients):
                d -= gradient
    for name in initial:
        torch.testing.assert_close(weights[name][0] - initial[name], change[name].detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("mlpp", (4,), 8, 2), "did you mean 'mlp'"),
        (("mlp", (4,), 8, 2, "geluu"), "did you mean 'gelu'"),
        (("mlp", (4,), -1, 2), "width"),
        (("mlp", (4,), 8, 0), "depth"),
        (("mlp", (4,), 8.0, 2), "width"),
        (("mlp", (4,), 8), "needs a depth"),
        (("linear", (4,), 1, 2), "fixed depth"),
        (("mlp", (), 8, 2), "image_shape"),
        (("mlp", (4, 0), 8, 2), "image_shape"),
        (("mnas", (28, 28), 8), "channels, height, width"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(arguments, words):
    with pytest.raises(OneLineError, match=words) as caught:
        scaled_net(*arguments)
    assert isinstance(caught.value, ValueError) and "\n" not in str(caught.value)


def test_the_module_needs_neither_matplotlib_nor_jax_nor_fastcore():
    code = "import sys, flatmin_nb.lab.scaled_nets; print([name for name in ('matplotlib', 'jax', 'fastcore') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"

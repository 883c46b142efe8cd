"""What a notebook cell is the wrong place for: names that checkpoints depend on, devices, and every mistake."""
import pytest
import torch
import torch.nn.functional as F

from flatmin_nb.lab.errors import OneLineError
from flatmin_nb.lab.models import MODELS, build

INPUTS = {"mlp": (1, 8, 8), "mnistfc": (1, 28, 28), "lenet": (1, 28, 28), "small_lenet": (1, 28, 28), "allcnn": (3, 32, 32), "mnist_f1": (1, 28, 28)}


def test_names_of_parameters_stay():
    "A model.safetensors of an old run must load: a renamed layer would break it."
    names = [name for name, _ in build("lenet", seed=0).named_parameters()]
    assert names == [
        "conv1.layer.weight", "conv1.layer.bias", "conv1.norm.weight", "conv1.norm.bias",
        "conv2.layer.weight", "conv2.layer.bias", "conv2.norm.weight", "conv2.norm.bias",
        "hidden.layer.weight", "hidden.layer.bias", "output.weight", "output.bias",
    ]  # fmt: skip


def test_initial_weights_stay():
    "The net of a seed is the same on every machine and in every later version."
    assert build("mlp", seed=0).hidden1.layer.weight.double().sum().item() == pytest.approx(-2.036250, abs=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_differentiable_twice(name):
    "Curvature needs the gradient of a gradient; an in-place layer would forbid it."
    net = build(name, seed=0).train()
    x = torch.randn(2, *INPUTS[name], generator=torch.Generator().manual_seed(0))
    weights = list(net.parameters())
    with torch.random.fork_rng(devices=[]):
        loss = F.cross_entropy(net(x), torch.tensor([1, 2]))
    gradient = torch.autograd.grad(loss, weights, create_graph=True)
    product = torch.autograd.grad(sum((g * g).sum() for g in gradient), weights)
    assert all(torch.isfinite(p).all() for p in product)


@pytest.mark.parametrize("name", MODELS)
def test_other_numbers_of_classes(name):
    assert build(name, seed=0, classes=7).eval()(torch.zeros(2, *INPUTS[name])).shape == (2, 7)


def test_built_on_the_cpu_whatever_the_default():
    with torch.device("meta"):
        net = build("mlp", seed=3)
    assert torch.equal(net.output.weight, build("mlp", seed=3).output.weight)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_random_state_of_the_gpu_is_left_alone():
    before = torch.cuda.get_rng_state()
    build("lenet", seed=1)
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("lennet", {}, "lenet"),
        (None, {}, "model None"),
        ("mnistfc", {"variant": "torch"}, "pytorch"),
        ("mnistfc", {"dropuot": 0.1}, "dropout"),
        ("mnistfc", {"dropout": float("nan")}, "dropout"),
        ("mnistfc", {"dropout": -0.1}, "dropout"),
        ("lenet", {"dropout": "0.1"}, "dropout"),
        ("lenet", {"dropout": True}, "dropout"),
        ("allcnn", {"input_dropout": 1}, "input_dropout"),
        ("allcnn", {"classes": 0}, "classes"),
        ("mlp", {"hidden": (3.5,)}, "hidden"),
        ("mlp", {"inputs": 0}, "inputs"),
        ("mlp", {"seed": 1.5}, "seed"),
        ("mlp", {"seed": 2**32}, "seed"),
    ],
)
def test_one_line_for_each_mistake(name, options, said):
    with pytest.raises(OneLineError, match=said) as caught:
        build(name, **{"seed": 0, **options})
    assert isinstance(caught.value, ValueError) and "\n" not in str(caught.value)

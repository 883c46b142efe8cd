"""What a notebook cell is the wrong place for: names that checkpoints depend on, devices, and every mistake."""
import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from flatmin_nb.lab.data import CropFlip, ImageSet, ResizedCrop, ScaledCrop, centred
from flatmin_nb.lab.errors import OneLineError
from flatmin_nb.lab.models import ALEXNET, IMAGENET_RESNETS, MODELS, ModelError, NoisyReLU, build, preactivation, registered, with_recipe

INPUTS = {
    "mlp": (1, 8, 8), "mnistfc": (1, 28, 28), "lenet": (1, 28, 28), "small_lenet": (1, 28, 28), "allcnn": (3, 32, 32), "mnist_f1": (1, 28, 28),
    "cifar10_shallow": (3, 32, 32), "cifar100_shallow": (3, 32, 32), "resnet": (3, 32, 32), "wide_resnet": (3, 32, 32), "alexnet": (3, 224, 224),
    "simple_cnn": (3, 32, 32), "preactivation_resnet": (3, 32, 32), "resnet32": (3, 32, 32), "vgg11": (3, 32, 32),
    "lenet_300_100": (1, 28, 28), "lenet5_caffe": (1, 28, 28), "vgg16": (3, 32, 32), "resnet50": (3, 32, 32), "tiny_allcnn": (3, 32, 32),
    "channel_mean_mlp": (3, 32, 32),
}  # fmt: skip
WITH_RECIPE = ["mnist_f1", "cifar10_shallow", "cifar100_shallow", "resnet", "wide_resnet", "alexnet"]


def test_names_of_parameters_stay():
    "A model.safetensors of an old run must load: a renamed layer would break it."
    names = [name for name, _ in build("lenet", seed=0).named_parameters()]
    assert names == [
        "conv1.layer.weight", "conv1.layer.bias", "conv1.norm.weight", "conv1.norm.bias",
        "conv2.layer.weight", "conv2.layer.bias", "conv2.norm.weight", "conv2.norm.bias",
        "hidden.layer.weight", "hidden.layer.bias", "output.weight", "output.bias",
    ]  # fmt: skip


def test_names_of_residual_parameters_stay():
    names = [name for name, _ in build("resnet", seed=0, depth=8).named_parameters()]
    assert names[:3] == ["stem.layer.weight", "stem.norm.weight", "stem.norm.bias"]
    assert names[3:9] == [f"stage1.0.path.{conv}.{part}" for conv in ("conv1", "conv2") for part in ("layer.weight", "norm.weight", "norm.bias")]
    assert names[15:18] == [f"stage2.0.shortcut.{part}" for part in ("layer.weight", "norm.weight", "norm.bias")]
    assert names[-2:] == ["output.weight", "output.bias"]


def test_names_of_preactivation_parameters_stay():
    names = [name for name, _ in build("resnet32", seed=0, batchnorm=True).named_parameters()]
    assert names[:4] == ["stem.weight", "stem.bias", "stage1.0.path.norm1.weight", "stage1.0.path.norm1.bias"]
    assert [name for name in names if name.startswith("stage2.0")] == [
        f"stage2.0.{part}.{kind}" for part in ("path.norm1", "path.conv1", "path.norm2", "path.conv2", "shortcut") for kind in ("weight", "bias")
    ]
    assert names[-4:] == ["norm.weight", "norm.bias", "output.weight", "output.bias"]
    plain = [name for name, _ in build("resnet32", seed=0).named_parameters()]
    assert plain == [name for name in names if "norm" not in name]


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("lenet_300_100", ["hidden1.layer", "hidden2.layer", "output"]),
        ("channel_mean_mlp", ["hidden1.layer", "hidden2.layer", "output"]),
        ("lenet5_caffe", ["conv1.layer", "conv2.layer", "hidden.layer", "output"]),
        ("vgg16", [*[f"conv{number}.layer" for number in range(1, 14)], "hidden.layer", "output"]),
        ("tiny_allcnn", [*[f"conv{number}.layer" for number in range(1, 10)], "output"]),
    ],
)
def test_names_of_weight_layers_stay(name, layers):
    "Kept groups and bits are recorded by layer."
    assert [key for key, part in build(name, seed=0).named_modules() if isinstance(part, (nn.Conv2d, nn.Linear))] == layers


@pytest.mark.parametrize(
    ("name", "first", "total"),
    [
        ("mlp", "hidden1.layer.weight", -2.036250), ("mnist_f1", "hidden1.layer.weight", 15.429131), ("resnet", "stem.layer.weight", 1.936412),
        ("simple_cnn", "conv1.layer.weight", 0.983965), ("resnet32", "stem.weight", 0.136218),
    ],  # fmt: skip
)
def test_initial_weights_stay(name, first, total):
    "The net of a seed is the same on every machine and in every later version."
    assert build(name, seed=0).get_parameter(first).double().sum().item() == pytest.approx(total, abs=1e-4)


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


# ---- the recipes ----

@pytest.mark.parametrize("name", WITH_RECIPE)
def test_a_recipe_is_no_part_of_the_net(name):
    net = build(name, seed=0, **({"classes": 2} if name != "alexnet" else {}))
    shapes = {key: value.shape for key, value in net.state_dict().items()}
    twin = copy.deepcopy(net) if name != "alexnet" else net
    assert twin.regime == net.regime and twin.quiet == net.quiet == []
    assert {key: value.shape for key, value in twin.state_dict().items()} == shapes
    assert list(net.regime)[0] == 0 and net.regime[0]["optimizer"] == "SGD" and sorted(net.regime) == list(net.regime)
    pickle.loads(pickle.dumps((net.regime, getattr(net, "prepare", None), net.augment)))  # a sweep sends them to other processes


@pytest.mark.parametrize("name", ["simple_cnn", "resnet32", "vgg11"])
def test_the_nets_of_the_sharpest_directions_carry_their_images(name):
    net = pickle.loads(pickle.dumps(build(name, seed=0)))
    assert net.prepare is centred and (net.augment.shift, net.augment.flip) == (4.0, True) and not hasattr(net, "regime")
    assert all(norm.eps == 1e-3 and norm.momentum == 0.01 for norm in net.modules() if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)))
    assert not any(part.bias.any() for part in net.modules() if isinstance(part, (nn.Conv2d, nn.Linear)))


def test_images_are_shifted_by_an_eighth_of_their_side():
    "Keras multiplies the published range, 0.125, by the side: 3.5 pixels of Fashion-MNIST's 28."
    assert build("simple_cnn", seed=0, channels=1, size=28).augment.shift == 3.5
    assert build("simple_cnn", seed=0, channels=1, size=8, kernel_size=2).augment.shift == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(before=4, width=6), "got 4 and 6; make them equal, or give stride=2"),
        (dict(before=4, width=4, stride=3), "must be 1 or 2; got 3"),
        (dict(before=4, width=4, stride="2"), "must be 1 or 2; got '2'"),
        (dict(before=4, width=4, batchnorm="no"), "batchnorm must be True or False; got 'no'"),
    ],
)
def test_preactivation_blocks_that_cannot_be(options, said):
    with pytest.raises(ModelError, match=said):
        preactivation(**options)


def test_a_recipe_of_one_net_is_not_that_of_another():
    one, other = (build("mnist_f1", seed=0) for _ in range(2))
    one.augment.flip, one.regime[0]["lr"] = True, 1.0
    one.quiet.append("output.*")
    assert (other.augment.flip, other.regime[0]["lr"], other.quiet) == (False, 0.1, [])


@pytest.mark.parametrize(("name", "shape"), [("mnist_f1", (1, 28, 28)), ("cifar100_shallow", (3, 32, 32)), ("resnet", (3, 32, 32)), ("wide_resnet", (3, 32, 32))])
def test_augmented_images_are_those_of_torchvision(name, shape):
    "Pad the bytes, cut, convert and normalise, against normalise, pad, cut."
    rng, net = torch.Generator().manual_seed(0), build(name, seed=0)
    images = torch.randint(256, (5, *shape), dtype=torch.uint8, generator=rng)
    prepared = net.prepare(ImageSet("noise", *[images, torch.zeros(5, dtype=torch.int64)] * 3, num_classes=10)).test_images
    mean, deviation = ((0.5,), (0.5,)) if name == "mnist_f1" else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    padding, fill = (2, 0) if name == "mnist_f1" else (4, 127)
    padded = torchvision.transforms.functional.pad(images, padding, fill=fill)
    choices = torch.tensor([[0, 0, 0], [2 * padding, 0, 0], [0, 2 * padding, 1], [1, 3, 1], [padding, padding, 0]])
    for window, image, (top, left, mirrored) in zip(net.augment(prepared, choices), padded, choices.tolist()):
        cut = torchvision.transforms.functional.crop(image, top, left, *shape[1:])
        cut = torchvision.transforms.functional.hflip(cut) if mirrored else cut
        expected = torchvision.transforms.functional.normalize(cut / 255, mean, deviation)
        torch.testing.assert_close(window, expected, rtol=1e-5, atol=1e-6)


def test_augmentations_of_files_for_imagenet():
    with torch.device("meta"):
        residual, alexnet = MODELS["resnet"]("imagenet"), MODELS["alexnet"]()
    assert isinstance(residual.augment, ResizedCrop) and residual.augment.size == 224
    assert isinstance(alexnet.augment, ScaledCrop) and (alexnet.augment.resize, alexnet.augment.size) == (256, 224)
    assert not hasattr(residual, "prepare") and not hasattr(alexnet, "prepare")  # files are normalised as they are read


def test_a_model_of_ones_own():
    @registered
    def one_layer(width: int = 4) -> nn.Module:
        return with_recipe(nn.Sequential(nn.Flatten(), nn.Linear(64, width)), augment=CropFlip(padding=1), criterion=nn.MultiMarginLoss())

    try:
        net = build("one_layer", seed=0, width=3)
        assert net(torch.zeros(2, 1, 8, 8)).shape == (2, 3) and isinstance(net.criterion, nn.MultiMarginLoss) and len(net) == 2
        with pytest.raises(ModelError, match="no option of one_layer called 'widht'; did you mean 'width'"):
            build("one_layer", seed=0, widht=3)
    finally:
        del MODELS["one_layer"]


def test_a_name_that_is_taken():
    def resnet():
        return nn.Linear(1, 1)

    ours = MODELS["resnet"]
    with pytest.raises(ModelError, match="flatmin_nb.lab.models has a model 'resnet'; give the one of .* another name"):
        registered(resnet)
    assert MODELS["resnet"] is ours


@pytest.mark.parametrize("regime", [{}, {0: {}}, {1: {"optimizer": "SGD"}}, {0: {"optimizer": "SGD"}, 1.5: {}}, {-1: {"optimizer": "SGD"}}])
def test_regimes_that_are_none(regime):
    with pytest.raises(ModelError, match="regime") as caught:
        with_recipe(nn.Linear(1, 1), regime=regime)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["mnist_f1", "cifar10_shallow"])
def test_other_scales_and_nothing_else(name):
    ones, uniform = (build(name, seed=0, scales=scales).state_dict() for scales in ("ones", "uniform"))
    changed = {key for key in ones if not torch.equal(ones[key], uniform[key])}
    assert changed == {key for key in ones if key.endswith("norm.weight")}


# ---- the same functions as other people's ----

@pytest.mark.parametrize("depth", IMAGENET_RESNETS)
def test_residual_nets_of_torchvision(depth):
    ours = build("resnet", seed=depth, dataset="imagenet", depth=depth, classes=7)
    with torch.device("meta"):
        peer = getattr(torchvision.models, f"resnet{depth}")(num_classes=7)
    copies = (value.clone() for value in ours.state_dict().values())
    peer.load_state_dict(dict(zip(peer.state_dict(), copies, strict=True)), assign=True)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(images), peer(images))
        torch.testing.assert_close(ours.eval()(images), peer.eval()(images))


def test_alexnet_of_torchvision():
    "Without normalisation and biases they are one function: a maximum and a ReLU may change places."
    ours = build("alexnet", seed=0, classes=9).eval()
    for part in ours.modules():
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
            part.eps = 0.0  # untrained: (x - 0) / 1 * 1 + 0
    with torch.device("meta"):
        peer = torchvision.models.alexnet(num_classes=9).eval()
    weights = [part.weight for part in ours.modules() if isinstance(part, (nn.Conv2d, nn.Linear))]
    copies = dict(zip([name for name in peer.state_dict() if name.endswith("weight")], weights, strict=True))
    zeros = {name: torch.zeros(value.shape) for name, value in peer.state_dict().items() if name.endswith("bias")}
    peer.load_state_dict(copies | zeros | {"classifier.6.bias": ours.output.bias}, assign=True)
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(images), peer(images))


@pytest.mark.parametrize("variant", ALEXNET)
def test_dropout_of_every_variant_of_alexnet(variant):
    with torch.device("meta"):
        net = MODELS["alexnet"](variant)
    expected = {"v1": 0.5, "v2": 0.2, "v3": 0.0, "vlr": 0.0}[variant]
    assert [part.p for part in net.modules() if isinstance(part, nn.Dropout)] == [expected] * 2


def test_resnet50_of_torchvision():
    "With its stem of 3x3 and without its pooling it is the same function."
    ours = build("resnet50", seed=0)
    with torch.device("meta"):
        peer = torchvision.models.resnet50(num_classes=10)
        peer.conv1, peer.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    copies = (value.clone() for value in ours.state_dict().values())
    peer.load_state_dict(dict(zip(peer.state_dict(), copies, strict=True)), assign=True)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(images), peer(images))
        torch.testing.assert_close(ours.eval()(images), peer.eval()(images))


def test_vgg16_without_hidden_layer_is_the_convolutions_of_torchvision():
    ours = build("vgg16", seed=0, hidden=0).eval()
    with torch.device("meta"):
        peer = torchvision.models.vgg16_bn(num_classes=10).features.eval()
    for part in peer.modules():
        if isinstance(part, nn.Conv2d):
            part.bias = None
    weights = [value for name, value in ours.state_dict().items() if not name.startswith("output")]
    peer.load_state_dict(dict(zip(peer.state_dict(), weights, strict=True)), assign=True)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(images), ours.output(peer(images).flatten(1)))


# ---- noise ----

def test_noise_is_drawn_by_the_global_generator():
    "As dropout's: kept, set and resumed with it."
    noisy, x = NoisyReLU(0.9, 1.1), torch.ones(5)
    with torch.random.fork_rng(devices=[]):
        state = torch.get_rng_state()
        one = noisy(x)
        other = noisy(x)
        torch.set_rng_state(state)
        assert torch.equal(noisy(x), one) and not torch.equal(one, other)


@pytest.mark.parametrize("options", [dict(depth=8), dict(dataset="imagenet", depth=50)])
def test_a_noisy_net_takes_any_batch_and_a_plain_checkpoint(options):
    noisy, plain = (build("resnet", seed=0, noise=noise, **options) for noise in (0.1, 0.0))
    noisy.load_state_dict(plain.state_dict())
    for count in (3, 3, 2):
        images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        noisy(images).sum().backward()  # every module is used and differentiated anew
    noisy.load_state_dict(plain.state_dict())
    assert torch.equal(noisy.eval()(images), plain.eval()(images))


def test_noise_under_vmap():
    each = torch.func.vmap(NoisyReLU(0.5, 1.5), randomness="different")
    with torch.random.fork_rng(devices=[]):
        outputs = each(torch.ones(4, 3))
    assert len(outputs.unique()) == 12


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
        ("resnet", {"depth": 45}, "44 or 50"),
        ("resnet", {"depth": 2}, "8 or 14"),
        ("resnet", {"depth": 44.5}, "depth"),
        ("resnet", {"depth": True}, "depth"),
        ("resnet", {"dataset": "imagenet", "depth": 44}, "18, 34, 50, 101, 152"),
        ("resnet", {"dataset": "imagenet", "depth": [18]}, "18, 34, 50, 101, 152"),
        ("resnet", {"dataset": "cifar"}, "cifar10"),
        ("resnet", {"dataset": 10}, "dataset of resnet 10"),
        ("resnet", {"noise": 1.5}, r"noise must be a number in \[0, 1\]"),
        ("resnet", {"noise": True}, "noise"),
        ("resnet", {"classes": 0}, "classes"),
        ("wide_resnet", {"dataset": "imagenet"}, "cifar10, cifar100"),
        ("wide_resnet", {"depth": 18}, "16 or 22"),
        ("wide_resnet", {"width": 0}, "width"),
        ("alexnet", {"variant": "v4"}, "v3"),
        ("alexnet", {"variant": 2}, "variant of alexnet 2"),
        ("alexnet", {"dropout": 1}, "dropout"),
        ("mnist_f1", {"scales": "one"}, "ones"),
        ("mnist_f1", {"classes": 1.5}, "classes"),
        ("cifar10_shallow", {"dropout": -1}, "dropout"),
        ("cifar100_shallow", {"scales": None}, "None"),
        ("simple_cnn", {"size": 8}, "smaller kernel_size"),
        ("simple_cnn", {"size": 2, "kernel_size": 1}, "or larger images"),
        ("simple_cnn", {"batchnorm": "no"}, "batchnorm must be True or False"),
        ("resnet32", {"batchnorm": 1}, "batchnorm must be True or False"),
        ("vgg11", {"batchnorm": None}, "batchnorm must be True or False"),
        ("simple_cnn", {"filters": 0}, "filters"),
        ("simple_cnn", {"dropout": 1}, "dropout"),
        ("resnet32", {"scale": 0}, "scale"),
        ("resnet32", {"depth": 20}, "no option of resnet32 called 'depth'"),
        ("resnet32", {"dropout": -0.5}, "dropout"),
        ("preactivation_resnet", {"depth": 33}, "32 or 38"),
        ("vgg11", {"dropout": (0.0, 1.0)}, "the dropout of the hidden layers"),
        ("vgg11", {"dropout": 0.5}, "dropout"),
        ("vgg11", {"classes": 0}, "classes"),
        ("lenet_300_100", {"classes": 0}, "classes"),
        ("lenet5_caffe", {"relu": 1}, "relu must be True or False; got 1"),
        ("lenet5_caffe", {"classes": 0}, "classes"),
        ("vgg16", {"hidden": -1}, "hidden must be an integer from 0"),
        ("vgg16", {"width": 0.5}, "width"),
        ("resnet50", {"width": 0}, "width"),
        ("resnet50", {"classes": True}, "classes"),
        ("tiny_allcnn", {"filters": "24"}, "filters"),
        ("channel_mean_mlp", {"classes": 0}, "classes"),
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

"""The smaller network against the masked one and against weights zeroed by hand, on nets of every kind, and each refusal."""
import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import same, state
from torch import nn
from torch.nn.utils import prune

from flatmin_nb.lab.errors import OneLineError
from flatmin_nb.lab.models import NoisyReLU, Residual, build
from flatmin_nb.lab.pruning import (
    CHANNELWISE, LAYERS, NORMS, Cut, PruningError, Select, cut, cuts, masks_of, propagated, prune_, shrunk, sparsity,
)  # fmt: skip


def seeded(make, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return make()


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole(*shape):
    return torch.ones(*shape, dtype=torch.bool)


def settled(net: nn.Module) -> nn.Module:
    "The net with normalisations whose weights and statistics are all different, as after training."
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, NORMS):
                for tensor in (module.running_mean, *module.parameters()):
                    tensor.copy_(torch.randn(tensor.shape, generator=draw))
                module.running_var.copy_(torch.rand(module.running_var.shape, generator=draw) + 0.5)
    return net


def random_masks(net, seed, units=0.7, inputs=0.9, weights=0.6, biases=True, last=()):
    "Random masks of single weights, of whole outputs (with their biases) and of whole inputs, of the layers that are not in `last`."
    draw, masks = torch.Generator().manual_seed(seed), {}
    for name, module in net.named_modules():
        if type(module) not in LAYERS or name in last:
            continue
        shape = module.weight.shape
        rows, columns = torch.rand(shape[0], generator=draw) < units, torch.rand(shape[1], generator=draw) < inputs
        rows[0] = columns[0] = True
        single = torch.rand(shape, generator=draw) < weights
        single[0, 0] = True
        masks[f"{name}.weight"] = single & (rows[:, None] & columns).reshape(*shape[:2], *[1] * (len(shape) - 2))
        if module.bias is not None and biases:
            masks[f"{name}.bias"] = rows
    return masks


def by_hand(net, masks):
    "A copy in which the masked weights are zero."
    made = copy.deepcopy(net)
    with torch.no_grad():
        for name, value in made.named_parameters():
            if name in masks:
                value[~masks[name]] = 0
    return made


def size(net):
    return sum(module.weight.numel() for module in net.modules() if type(module) in LAYERS)


def check(net, masks, x, train=False):
    "The smaller net against the masked one, in evaluation and, without dropout, in training; its size against the table."
    before, attributes, eps = state(net), set(vars(net)), 1e-12 if x.dtype == torch.float64 else 1e-5
    carried, small, table = propagated(net, masks, x[:1]), shrunk(net, masks, x[:1]), sparsity(net, masks, x[:1])
    assert same(before, state(net)) and attributes == set(vars(net))
    assert all((carried[name] <= mask).all() for name, mask in masks.items())
    assert all(torch.equal(mask, carried[name]) for name, mask in propagated(net, carried, x[:1]).items())
    masked, zeroed = prune_(copy.deepcopy(net), carried), [by_hand(net, carried)]
    if not any(module.affine for module in net.modules() if isinstance(module, NORMS)):  # then what follows from the masks changes nothing
        zeroed.append(by_hand(net, masks))
    assert prune.is_pruned(masked) and not prune.is_pruned(small)
    with torch.no_grad():
        for training in (True, False) if train else (False,):
            outputs = [model.train(training)(x) for model in (small, masked, *zeroed)]
            for other in outputs[1:]:
                scale = max(1.0, other.abs().max().item())
                torch.testing.assert_close(outputs[0] / scale, other / scale, rtol=0, atol=eps)
    assert table.loc["total", "structured"] == size(small) <= table.loc["total", "weights"] == size(net)
    layers = {name: module for name, module in net.named_modules() if type(module) in LAYERS}
    nonzero = [carried.get(f"{name}.weight", torch.ones_like(layer.weight)).sum() for name, layer in layers.items()]
    assert table.loc["total", "nonzero"] == sum(nonzero)
    return small, table


# ---- the nets of the papers ----

NETS = {  # name: options, shape of an input, the layers that are left alone
    "mlp": (dict(), (1, 8, 8), ["output"]),
    "mlp with norm": (dict(batchnorm=True), (1, 8, 8), ["output"]),
    "lenet": (dict(dropout=0.0), (1, 28, 28), ["output"]),
    "small_lenet": (dict(), (1, 28, 28), ["output"]),
    "allcnn": (dict(width=8, dropout=0.0, input_dropout=0.0), (3, 32, 32), []),
    "simple_cnn": (dict(filters=8), (3, 32, 32), ["output"]),
    "vgg11": (dict(dropout=(0.0, 0.0)), (3, 32, 32), ["output"]),
    "resnet": (dict(depth=8), (3, 32, 32), ["output"]),
    "resnet with noise": (dict(depth=8, noise=0.1), (3, 32, 32), ["output"]),
    "preactivation_resnet": (dict(depth=8), (3, 32, 32), ["output"]),
    "cifar10_shallow": (dict(dropout=0.0), (3, 32, 32), ["output"]),
}


@pytest.mark.parametrize("kind", ["structured", "single", "both"])
@pytest.mark.parametrize("name", NETS)
def test_nets_of_the_papers(name, kind):
    options, shape, last = NETS[name]
    net = settled(build(name.split(" ")[0], seed=0, **options))
    shares = {"structured": dict(weights=2.0), "single": dict(units=2.0, inputs=2.0), "both": {}}  # a share above 1 is all
    masks = random_masks(net, seed=1, last=last, **shares[kind])
    small, table = check(net, masks, normal(3, *shape), train="noise" not in name)
    if kind != "single":
        assert size(small) < 0.9 * size(net)


@pytest.mark.parametrize("name", ["mlp", "small_lenet", "lenet", "allcnn"])
def test_structured_masks_leave_no_zeros(name):
    "Where whole units go and nothing is summed, the smaller net has as many weights as the mask."
    options, shape, last = NETS[name]
    net = build(name, seed=0, **options)
    _, table = check(net, random_masks(net, seed=2, units=0.5, inputs=2.0, weights=2.0, last=[*last, "conv9.layer"]), normal(2, *shape))
    assert (table["nonzero"] == table["structured"]).all()


@pytest.mark.parametrize("seed", range(12))
def test_a_perceptron_of_random_widths(seed):
    draw = torch.Generator().manual_seed(seed)
    widths = torch.randint(3, 30, (4,), generator=draw).tolist()
    net = seeded(lambda: build("mlp", seed=seed, inputs=widths[0], hidden=tuple(widths[1:]), batchnorm=seed % 3 == 0), seed).double()
    units, weights = 0.4 + 0.6 * torch.rand(2, generator=draw)
    x = normal(5, widths[0], seed=seed).double()
    masks = random_masks(net, seed, units=units, weights=weights, biases=seed % 2 == 0, last=["output"])
    try:
        check(settled(net), masks, x, train=True)
    except PruningError as error:
        assert "nothing is left" in str(error)


def test_dense_linear_algebra():
    "A perceptron as products of matrices in float64, the masked weights zero."
    net = build("mlp", seed=0, hidden=(40, 30)).double()
    masks = random_masks(net, seed=3, units=0.5, weights=0.3, last=["output"])
    W = {name: value.detach() * masks.get(name, torch.tensor(True)) for name, value in net.named_parameters()}
    x = normal(10, 64).double()
    first = (x @ W["hidden1.layer.weight"].T + W["hidden1.layer.bias"]).clamp(min=0)
    second = (first @ W["hidden2.layer.weight"].T + W["hidden2.layer.bias"]).clamp(min=0)
    small = shrunk(net, masks, x[:1])
    torch.testing.assert_close(small(x).detach(), second @ W["output.weight"].T + W["output.bias"], rtol=0, atol=1e-12)


# ---- nets of other kinds ----

class Written(nn.Module):
    "Functions and methods instead of modules, as torchvision writes nets."

    def __init__(self):
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.conv3 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 6, 1)
        self.relu, self.hidden, self.output = nn.ReLU(inplace=True), nn.Linear(6 * 9, 12), nn.Linear(12, 3)

    def forward(self, x):
        identity = self.relu(self.norm(self.conv1(x)))
        out = F.relu(self.conv2(identity))
        out += identity
        out = F.max_pool2d(self.relu(out), 2)
        out = F.dropout(F.adaptive_avg_pool2d(F.gelu(self.conv3(out)), 3), training=self.training, p=0.0)
        return self.output(torch.tanh(self.hidden(out.view(out.size(0), -1))))


class Twice(nn.Module):
    "Two consumers of one sum, and a join."

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(6, 9), nn.Linear(6, 9)
        self.first, self.second, self.output = nn.Linear(9, 7), nn.Linear(9, 8), nn.Linear(15, 3)

    def forward(self, x):
        total = torch.relu(self.left(x)) + self.right(x)
        return self.output(torch.cat([self.first(total).relu(), torch.sigmoid(self.second(total))], dim=1))


class Outsider(nn.Module):
    "A module of a class that nobody knows: neighbouring channels are mixed, and zero becomes something else."

    def forward(self, x):
        return x.roll(1, dims=1).cos() + x


class Squeezed(nn.Module):
    "A gate made of the mean over the image, a mean as a method, and tensors made within forward."

    def __init__(self):
        super().__init__()
        self.conv, self.down, self.up, self.output = nn.Conv2d(2, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), nn.Linear(8, 3)
        self.shift = nn.Parameter(torch.randn(8, 1, 1))

    def forward(self, x):
        x = self.conv(x).relu() * 2
        gate = torch.sigmoid(self.up(self.down(x.mean((2, 3), keepdim=True)).relu()))
        batch, channels, height, width = x.shape
        return self.output((x * gate + self.shift + torch.ones(8, 1, 1)).mean(dim=(2, 3)).reshape(batch, channels))


class ReadsItsInput(nn.Module):
    "The sum is written into a tensor that is read again."

    def __init__(self):
        super().__init__()
        self.first, self.path, self.output = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        x = self.first(x)
        y = self.path(x)
        z = x.view(x.size(0), -1)
        z += y
        x.add_(1.0)
        return self.output(x)


class WritesItsSum(ReadsItsInput):
    "The sum is written into a view of a tensor that is read again."

    def forward(self, x):
        x = self.first(x)
        y = self.path(x)
        z = x.view(x.size(0), -1)
        z += y
        return self.output(x)


class Counts(nn.Module):
    "The numbers of channels are part of the result, and one layer is called for nothing."

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third, self.output = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(24, 2)

    def forward(self, x):
        first, second = self.first(x).relu(), self.second(x).relu()
        self.third(second)
        return self.output(torch.cat([first, second, x.new_full((x.size(0), 8), 1.0) * first.size(1) * second.shape[1]], 1))


class Fixed(nn.Module):
    "A shape with a number in it, a shape that is asked for channels, and a weight that is read without its layer."

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third, self.output = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 5), nn.Linear(29, 2)

    def forward(self, x):
        first, second = self.first(x).relu(), self.second(x).relu()
        seen = F.linear(x, self.third.weight.T) * second.shape[1]
        return self.output(torch.cat([first.view(first.size(0), 8), seen, self.third(first), second], 1))


class TwoInputs(nn.Module):
    "Two inputs and two outputs; attention, which fx would not follow, stays closed; a shortcut that is an empty Sequential."

    def __init__(self):
        super().__init__()
        self.left, self.right, self.attention = nn.Linear(6, 8), nn.Linear(5, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.inner, self.shortcut, self.output = nn.Linear(8, 8), nn.Sequential(), nn.Linear(8, 3)

    def forward(self, x, y):
        hidden = torch.relu(self.left(x)) + self.right(y)
        hidden = self.shortcut(hidden) + self.inner(hidden).relu()
        attended, _ = self.attention(hidden[:, None], hidden[:, None], hidden[:, None])
        return self.output(attended.squeeze(1)), self.output.weight.sum() + hidden.mean()


def sequential(*modules):
    return nn.Sequential(*modules)


def mixed(*middle, bias=True):
    "A convolution, something, and a second convolution and linear layer."
    return sequential(
        nn.Conv2d(2, 8, 3, bias=bias), *middle, nn.Conv2d(8, 6, 3, bias=bias), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(24, 9, bias=bias), nn.ReLU(), nn.Linear(9, 3, bias=bias),
    )  # fmt: skip


def doubly_residual():
    block = lambda: Residual(sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)), nn.Conv2d(6, 6, 1, bias=False), nn.ReLU())
    return sequential(nn.Conv2d(2, 6, 3, bias=False), block(), block(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(6, 3))


def conv1d():
    last = [nn.LeakyReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(18, 4)]
    first = nn.Conv1d(3, 8, 5, stride=2, padding=2, padding_mode="circular")
    second = nn.Conv1d(8, 6, 3, dilation=2)
    return sequential(first, nn.BatchNorm1d(8), nn.ELU(), nn.ZeroPad1d(1), second, *last)


def conv3d():
    first, second = nn.Conv3d(2, 6, 3, padding="same"), nn.Conv3d(6, 5, 2)
    return sequential(first, nn.BatchNorm3d(6), nn.SiLU(), nn.AvgPool3d(2), second, nn.GELU(), nn.Flatten(), nn.Linear(40, 4))


OTHERS = {  # name: what makes the net, shape of an input
    "conv1d": (conv1d, (3, 16)),
    "conv3d": (conv3d, (2, 6, 6, 6)),
    "without biases": (lambda: mixed(nn.ReLU(), bias=False), (2, 9, 9)),
    "sigmoid": (lambda: mixed(nn.Sigmoid()), (2, 9, 9)),
    "hardtanh above zero": (lambda: mixed(nn.Hardtanh(0.5, 1.0)), (2, 9, 9)),
    "constant padding": (lambda: mixed(nn.ConstantPad2d(1, 0.7)), (2, 9, 9)),
    "grouped": (lambda: mixed(nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4)), (2, 9, 9)),
    "depthwise": (lambda: mixed(nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8)), (2, 9, 9)),
    "transposed": (lambda: mixed(nn.ConvTranspose2d(8, 8, 3)), (2, 9, 9)),
    "layer norm": (lambda: mixed(nn.LayerNorm([8, 7, 7])), (2, 9, 9)),
    "outsider": (lambda: mixed(Outsider()), (2, 9, 9)),
    "norm without weights": (lambda: mixed(nn.BatchNorm2d(8, affine=False)), (2, 9, 9)),
    "norm of batches alone": (lambda: mixed(nn.BatchNorm2d(8, track_running_stats=False)), (2, 9, 9)),
    "softmax": (lambda: mixed(nn.Softmax(dim=1)), (2, 9, 9)),
    "residual": (doubly_residual, (2, 8, 8)),
    "written": (Written, (2, 8, 8)),
    "twice": (Twice, (6,)),
    "squeezed": (Squeezed, (2, 7, 7)),
    "reads its input": (ReadsItsInput, (5,)),
    "writes its sum": (WritesItsSum, (5,)),
    "counts": (Counts, (5,)),
    "fixed": (Fixed, (5,)),
    "pools over channels": (lambda: sequential(nn.Linear(6, 9), nn.MaxPool1d(3, 1, 1), nn.Linear(9, 3)), (6,)),
    "sequence": (lambda: sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 6), nn.Flatten(), nn.Linear(24, 3)), (4, 6)),
}  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", OTHERS)
def test_other_nets(name, seed):
    make, shape = OTHERS[name]
    net = seeded(make, seed).double()
    for module in net.modules():
        if getattr(module, "track_running_stats", False) and module.affine:
            settled(module)
    masks = random_masks(net, seed, units=0.6, biases=seed != 1, weights=(0.5, 2.0, 0.5)[seed])
    check(net, masks, normal(4, *shape, seed=seed).double(), train=True)


@pytest.mark.parametrize("seed", range(3))
def test_two_inputs_and_two_outputs(seed):
    net = seeded(TwoInputs, seed).double().eval()
    x, y = normal(3, 6).double(), normal(3, 5).double()
    masks = random_masks(net, seed, units=0.5, inputs=2.0, weights=0.9, last=["attention.out_proj", "output"])
    small, zeroed = shrunk(net, masks, (x[:1], y[:1])), by_hand(net, masks)
    for ours, theirs in zip(small(x, y), zeroed(x, y), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert small.left.out_features == 8  # attention mixes the channels, so all stay


def test_an_empty_sequential_passes_its_input():
    block = lambda: Residual(nn.Linear(6, 6), nn.Sequential(), nn.ReLU())
    net = seeded(lambda: sequential(nn.Linear(4, 6), nn.Sequential(), block(), nn.Linear(6, 2)))
    masks = random_masks(net, seed=0, units=0.4, inputs=0.5, last=["3"])
    _, table = check(net, masks, normal(3, 4))
    assert table.loc["0", "outputs_kept"] < 6


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1"])
def test_nets_that_others_wrote(name):
    net = settled(seeded(lambda: getattr(torchvision.models, name)(num_classes=7)))
    small, table = check(net, random_masks(net, seed=0, units=0.5, last=["fc", "classifier.1"]), normal(2, 3, 32, 32))
    assert size(small) < 0.6 * size(net)


def test_what_is_not_followed_is_whole():
    net = seeded(OTHERS["grouped"][0])
    x = normal(2, 2, 9, 9)
    small, table = check(net, random_masks(net, seed=0, units=0.5), x)
    assert (small[2].in_channels, small[2].groups, small[0].out_channels) == (8, 4, 8)
    assert table.loc["2", "structured"] == table.loc["2", "weights"] == 8 * 2 * 9


def test_a_sigmoid_is_read_where_it_is_constant():
    "A unit that is gone leaves 1/2 behind a sigmoid: whoever reads it must go on; if nobody does, it goes."
    net = seeded(lambda: sequential(nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 2)))
    masks = {"0.weight": whole(3, 4), "0.bias": torch.tensor([True, False, True]), "2.weight": whole(2, 3)}
    masks["0.weight"][1] = False
    assert cuts(net, masks, normal(1, 4))["2"].inputs.tolist() == [True] * 3
    masks["2.weight"][:, 1] = False
    masks["0.bias"][1] = True
    assert propagated(net, masks, normal(1, 4))["0.bias"].tolist() == [True, False, True]
    assert cuts(net, masks, normal(1, 4))["0"].outputs.tolist() == [True, False, True]


def test_a_bias_that_is_kept_keeps_its_unit():
    net = seeded(lambda: sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
    masks = {"0.weight": whole(3, 4)}
    masks["0.weight"][1] = False
    x = normal(5, 4)
    check(net, masks, x)
    assert cuts(net, masks, x)["0"].outputs.all()
    assert cuts(net, masks | {"0.bias": torch.tensor([True, False, True])}, x)["0"].outputs.tolist() == [True, False, True]


def test_a_summand_without_a_channel_keeps_a_row_of_zeros():
    net = seeded(Twice)
    masks = {f"{side}.weight": whole(9, 6) for side in ("left", "right")}
    masks["left.weight"][[1, 2]] = masks["right.weight"][[2, 3]] = False
    masks |= {f"{side}.bias": masks[f"{side}.weight"].any(1) for side in ("left", "right")}
    small, table = check(net, masks, normal(4, 6), train=True)
    keeps = cuts(net, masks, normal(4, 6))
    assert keeps["left"].outputs.nonzero()[:, 0].tolist() == keeps["right"].outputs.nonzero()[:, 0].tolist() == [0, 1, 3, 4, 5, 6, 7, 8]
    assert (small.left.weight[1] == 0).all() and (small.right.weight[2] == 0).all()
    assert table.loc["left", ["nonzero", "structured"]].tolist() == [7 * 6, 8 * 6]


def test_two_readers_of_a_sum_read_different_channels():
    net = seeded(Twice)
    masks = {"first.weight": whole(7, 9), "second.weight": whole(8, 9)}
    masks["first.weight"][:, [0, 4]] = masks["second.weight"][:, [4, 5]] = False
    small, _ = check(net, masks, normal(4, 6), train=True)
    assert small.left.out_features == small.right.out_features == 8
    assert [small.first.select.indices.tolist(), small.second.select.indices.tolist()] == [[1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 5, 6, 7]]
    assert [name for name, _ in small.named_parameters() if "first" in name] == ["first.layer.weight", "first.layer.bias"]


def test_unread_pixels_and_single_features():
    "A perceptron selects the pixels that it reads; behind a flattening, single features of a channel go, the channel when all of them do."
    net = build("mlp", seed=0)
    masks = {"hidden1.layer.weight": whole(128, 64)}
    masks["hidden1.layer.weight"][:, ::2] = False
    small, _ = check(net, masks, normal(4, 1, 8, 8))
    assert small.hidden1.layer.select.indices.tolist() == list(range(1, 64, 2)) and small.hidden1.layer.layer.in_features == 32

    net = build("small_lenet", seed=0)
    masks = {"hidden.layer.weight": whole(128, 320)}
    masks["hidden.layer.weight"][:, 16:32] = masks["hidden.layer.weight"][:, 5] = False
    small, _ = check(net, masks, normal(4, 1, 28, 28))
    assert small.conv2.layer.out_channels == 19 and small.hidden.layer.layer.in_features == 320 - 16 - 1


def test_a_norm_on_nothing_gives_nothing():
    "Its bias and mean would make a constant of a channel that is gone: they are masked, in the masked net and in the smaller one."
    net = settled(seeded(lambda: sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3))))
    masks = {"0.weight": whole(4, 2, 3, 3)}
    masks["0.weight"][2] = False
    carried = propagated(net, masks, normal(1, 2, 8, 8))
    assert carried["1.weight"].tolist() == carried["1.bias"].tolist() == [True, True, False, True]
    assert not carried["2.weight"][:, 2].any()
    masked = prune_(copy.deepcopy(net), carried).eval()
    assert (masked[1](masked[0](normal(2, 2, 8, 8)))[:, 2] == 0).all()
    small, _ = check(net, masks, normal(4, 2, 8, 8), train=True)
    assert (small[1].num_features, len(small[1].running_var)) == (3, 3)


def test_a_norm_with_masks_of_its_own():
    net = settled(seeded(OTHERS["conv3d"][0]))
    off = torch.tensor([True, False, True, True, False, True])
    _, table = check(net, {"1.weight": off, "1.bias": off}, normal(3, 2, 6, 6, 6), train=True)
    assert table.loc["0", "outputs_kept"] == 4
    check(net, {"1.weight": off}, normal(3, 2, 6, 6, 6), train=True)  # the bias stays: a constant


def test_a_class_of_ones_own_can_be_declared_channelwise(monkeypatch):
    net = build("resnet", seed=0, depth=8, noise=0.1)
    masks, x = random_masks(net, seed=4, units=0.5, last=["output"]), normal(3, 3, 32, 32)
    before = size(shrunk(net, masks, x[:1]))
    monkeypatch.setattr("flatmin_nb.lab.pruning.CHANNELWISE", CHANNELWISE | {NoisyReLU})
    small, _ = check(net, masks, x)
    assert size(small) < 0.8 * before


# ---- what the smaller net is ----

def test_layers_keep_their_settings():
    first = nn.Conv2d(2, 8, 3, stride=2, padding=2, dilation=2, padding_mode="reflect", bias=False)
    net = sequential(first, nn.BatchNorm2d(8, eps=0.1, momentum=None), nn.Conv2d(8, 4, 3)).double()
    net[2].requires_grad_(False)
    net[1].eval()
    masks = {"0.weight": whole(8, 2, 3, 3)}
    masks["0.weight"][::2] = False
    small = shrunk(net, masks, normal(1, 2, 12, 12).double())
    conv = small[0]
    assert (conv.out_channels, conv.padding_mode, conv.bias) == (4, "reflect", None)
    assert conv.stride == conv.padding == conv.dilation == (2, 2)
    assert (small[1].eps, small[1].momentum, small[1].training, small[2].training) == (0.1, None, False, True)
    assert {value.dtype for value in small.parameters()} == {torch.float64}
    assert [value.requires_grad for value in small.parameters()] == [True, True, True, False, False]


def test_it_trains_and_its_state_loads():
    net, x, labels = build("lenet", seed=0), normal(16, 1, 28, 28), torch.arange(16) % 10
    masks = random_masks(net, seed=0, last=["output"])
    keeps, small = cuts(net, masks, x[:1]), shrunk(net, masks, x[:1])
    optimizer = torch.optim.SGD(small.parameters(), lr=0.05)
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(small(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    stored = {name: Cut(one.outputs.clone(), one.inputs.clone()) for name, one in keeps.items()}
    other = cut(build("lenet", seed=1), stored, x[:1])
    assert other.load_state_dict(small.state_dict()).missing_keys == []
    assert torch.equal(other.eval()(x), small.eval()(x))
    names = [name for name, _ in small.named_modules() if "select" not in name and not name.endswith("layer.layer")]
    assert names == [name for name, _ in net.named_modules()]


def test_the_smaller_net_can_be_pruned_again():
    net, x = build("small_lenet", seed=0), normal(4, 1, 28, 28)
    first = shrunk(net, random_masks(net, seed=0, units=0.6, last=["output"]), x[:1])
    assert any(isinstance(module, Select) for module in first.modules())
    second, _ = check(first, random_masks(first, seed=1, units=0.6, last=["output"]), x)
    assert size(second) < size(first) < size(net)


def test_masks_put_on_by_torch():
    "A net that torch has pruned is asked for its masks, and cut."
    net, x = build("small_lenet", seed=0), normal(4, 1, 28, 28)
    prune.ln_structured(net.conv1.layer, "weight", amount=0.5, n=2, dim=0)
    prune.l1_unstructured(net.hidden.layer, "weight", amount=0.9)
    masks = masks_of(net)
    assert sorted(masks) == ["conv1.layer.weight", "hidden.layer.weight"]
    masks["conv1.layer.bias"] = masks["conv1.layer.weight"].flatten(1).any(1)
    small, before = shrunk(net, masks, x[:1]), net(x)
    assert small.conv1.layer.out_channels == 5 and prune.is_pruned(net) and torch.equal(net(x), before)
    torch.testing.assert_close(small(x), prune_(net, {"conv1.layer.bias": masks["conv1.layer.bias"]})(x), rtol=0, atol=1e-5)
    for layer in (net.conv1.layer, net.hidden.layer):
        prune.remove(layer, "weight")
    assert not (net.conv1.layer.weight == 0).all() and (net.conv1.layer.weight == 0).any()


class Named(nn.Module):
    "One convolution under two names, and called by the second."

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3)
        self.body = sequential(self.conv, nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 3))

    def forward(self, x):
        return self.body(x)


def test_a_module_under_two_names_is_narrowed_under_both():
    net = seeded(Named)
    masks = random_masks(net, seed=0, units=0.5, inputs=0.1, last=["body.3"])
    small, _ = check(net, masks, normal(3, 2, 8, 8))
    assert small.conv is small.body[0] and isinstance(small.conv.select, Select) and small.conv.layer.in_channels == 1


# ---- the table ----

def test_multiplications_of_perceptrons_and_convolutions():
    net = build("mlp", seed=0, inputs=784, hidden=(300, 100))
    half = torch.zeros(300, 784, dtype=torch.bool)
    half[:150, :392] = True
    table = sparsity(net, {"hidden1.layer.weight": half, "hidden1.layer.bias": half.any(1)}, torch.zeros(7, 784))
    assert table.loc["total", ["weights", "multiply_accumulates"]].tolist() == [266_200, 266_200]
    kept = 150 * 392 + 150 * 100 + 1000
    assert table.loc["total", ["nonzero", "structured", "multiply_accumulates_kept"]].tolist() == [kept] * 3
    assert table.loc["hidden1.layer", ["inputs", "inputs_kept", "outputs", "outputs_kept"]].tolist() == [784, 392, 300, 150]
    assert table.loc["total", ["inputs", "inputs_kept", "outputs", "outputs_kept"]].isna().all() and table.index.name == "layer"

    table = sparsity(build("small_lenet", seed=0), {}, torch.zeros(3, 1, 28, 28))
    by_hand = [24 * 24 * 10 * 25, 8 * 8 * 20 * 10 * 25, 320 * 128, 128 * 10]
    assert table["multiply_accumulates"].tolist() == table["multiply_accumulates_kept"].tolist() == [*by_hand, sum(by_hand)]
    assert table["weights"].tolist()[:-1] == [250, 5000, 320 * 128, 1280]

    net = sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Flatten(), nn.Linear(8 * 36, 2))
    assert sparsity(net, {}, torch.zeros(1, 4, 8, 8)).loc["0", "multiply_accumulates"] == 36 * 8 * 2 * 9


# ---- refusals ----

class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else x


class Repeated(Branching):
    def forward(self, x):
        return self.layer(self.layer(x))


class Shared(Branching):
    def __init__(self):
        super().__init__()
        self.other = nn.Linear(4, 4)
        self.other.weight = self.layer.weight

    def forward(self, x):
        return self.other(self.layer(x))


EXAMPLE = torch.zeros(1, 4)
PAIR = sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
KEEPS = {"0": Cut(whole(3), whole(4)), "2": Cut(whole(2), whole(3))}
TWO = torch.tensor([True, False, True])
REFUSED = {  # what is refused: the call, a part of the line
    "an unknown name": (lambda: propagated(PAIR, {"0.weigth": whole(3, 4)}, EXAMPLE), "no parameter '0.weigth'; did you mean '0.weight'?"),
    "a wrong shape": (lambda: propagated(PAIR, {"0.weight": whole(4, 3)}, EXAMPLE), "the shape of the parameter, (3, 4); got (4, 3)"),
    "numbers": (lambda: prune_(PAIR, {"0.weight": torch.ones(3, 4)}), "must be a bool tensor, True for what is kept"),
    "a list": (lambda: cuts(PAIR, {"0.bias": [True] * 3}, EXAMPLE), "compare, for example weight != 0; got list"),
    "nothing left": (lambda: cuts(PAIR, {"2.weight": ~whole(2, 3)}, EXAMPLE), "nothing is left of the 3 outputs of '0'"),
    "nothing read": (lambda: shrunk(PAIR, {"0.weight": ~whole(3, 4)}, EXAMPLE), "nothing is left of the 4 inputs of '0'"),
    "a branch": (lambda: propagated(Branching(), {}, EXAMPLE), "torch.fx cannot follow Branching"),
    "a layer called twice": (lambda: propagated(Repeated(), {}, EXAMPLE), "the layer 'layer' is called twice"),
    "a shared weight": (lambda: propagated(Shared(), {}, EXAMPLE), "'layer.weight' and 'other.weight' are one parameter"),
    "a wrong example": (lambda: propagated(PAIR, {}, torch.zeros(1, 5)), "does not take the example of shape (1, 5)"),
    "no example": (lambda: propagated(PAIR, {}, [1, 2]), "the example must be a tensor of inputs"),
    "no layers": (lambda: sparsity(sequential(nn.ReLU()), {}, EXAMPLE), "calls no Linear or Conv layer"),
    "a cut of nothing": (lambda: cut(PAIR, {"1": KEEPS["0"]}, EXAMPLE), "no layer to cut '1'"),
    "a cut of another layer": (lambda: cut(PAIR, {"0": KEEPS["2"]}, EXAMPLE), "the outputs of the cut of '0' must be 3 booleans"),
    "a cut to nothing": (lambda: cut(PAIR, {"0": Cut(whole(3), ~whole(4))}, EXAMPLE), "the inputs of the cut of '0' must be 4 booleans"),
    "a reader of what is gone": (lambda: cut(PAIR, KEEPS | {"0": Cut(TWO, whole(4))}, EXAMPLE), "the cut of '2' does not fit"),
    "fewer logits": (lambda: cut(PAIR, {"2": Cut(whole(2) & TWO[:2], whole(3))}, EXAMPLE), "the cut of '2' does not fit"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refused_in_one_line(what):
    call, words = REFUSED[what]
    with pytest.raises(PruningError) as caught:
        call()
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert isinstance(caught.value, OneLineError) and isinstance(caught.value, ValueError)


def test_cuts_of_summands_agree():
    net = seeded(Twice)
    keeps = cuts(net, {}, torch.zeros(1, 6))
    other = whole(9)
    other[3] = False
    with pytest.raises(PruningError, match="does not fit the layers around it"):
        cut(net, keeps | {"left": Cut(other, whole(6))}, torch.zeros(1, 6))


def test_a_refusal_changes_nothing():
    net = Repeated()
    before = state(net)
    with pytest.raises(PruningError):
        propagated(net, {}, EXAMPLE)
    assert same(before, state(net)) and net(EXAMPLE).isfinite().all()


def test_no_masks_change_nothing():
    "Without masks all is kept, and the smaller net has the tensors of the first."
    net = build("resnet", seed=0, depth=8)
    small = shrunk(net, {}, torch.zeros(1, 3, 32, 32))
    assert list(small.state_dict()) == list(net.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(small.state_dict().values(), net.state_dict().values(), strict=True))

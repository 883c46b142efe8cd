"""Bayesian compression against torch.distributions, quadrature and brute force; and the twenty kinds of bugs that earlier codes had, a test each."""

import json
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import integrate, stats
from torch import nn

from flatmin_nb.bayesian_compression import (
    ELBO,
    KINDS,
    BayesError,
    BayesianConv1d,
    BayesianConv2d,
    BayesianConv3d,
    BayesianLinear,
    Caps,
    Horseshoe,
    LiveUnits,
    ScoreTrail,
    bayesian,
    bayesian_layers,
    cap_variances,
    compress,
    deviation,
    fraction_bits,
    gap,
    jeffreys_kl,
    kl,
    load_compressed,
    masks,
    noisy,
    parameter_groups,
    posterior_mean,
    scores,
    thresholds_of,
)
from flatmin_nb.lab.data import load, scaled
from flatmin_nb.lab.models import build
from flatmin_nb.lab.packing import PackingError, load_packed, packed_bits, save_packed
from flatmin_nb.lab.pruning import PruningError, propagated, prune_
from flatmin_nb.lab.files import FolderError
from flatmin_nb.lab.results import Run
from flatmin_nb.lab.train import Diverged, fit
from test_bad_input import nothing_looks_finished, refused

PRIORS = ("normal_jeffreys", "horseshoe", "gaussian")
LAYERS = {
    "linear": (lambda **o: BayesianLinear(6, 4, **o), (3, 6)),
    "conv1d": (lambda **o: BayesianConv1d(6, 4, 3, stride=2, padding=1, **o), (3, 6, 9)),
    "conv2d": (lambda **o: BayesianConv2d(6, 4, 3, stride=2, padding=1, **o), (3, 6, 9, 8)),
    "conv3d": (lambda **o: BayesianConv3d(6, 4, 3, padding=1, **o), (3, 6, 5, 4, 3)),
    "grouped": (lambda **o: BayesianConv2d(6, 4, 3, groups=2, **o), (3, 6, 9, 8)),
    "dilated": (lambda **o: BayesianConv2d(6, 4, 3, dilation=2, padding=2, padding_mode="circular", **o), (3, 6, 9, 8)),
}


def some(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="module")
def digits():
    return scaled(load("digits"), centre=127.5, scale=127.5)


@pytest.fixture(scope="module")
def trained(digits):
    "A perceptron on the digits, far enough for some inputs to be pruned."
    with torch.random.fork_rng(devices=[]):
        net = bayesian(build("mlp", seed=0, hidden=(60, 40)), max_std={"hidden1*": 0.2})
        elbo = ELBO(net, len(digits.train_labels))
        fit(net, torch.optim.Adam(parameter_groups(net, 3e-3, 3e-3), fused=True), digits, epochs=150, loss=elbo, callbacks=[Caps()], evaluate_every=150, progress=False)
        return net


# ---- the twenty, by their numbers in the list of the earlier codes' bugs ----


def test_1_the_divergence_is_counted_per_example(digits):
    for name, examples, each in (("lenet_300_100", 60000, 17.88), ("channel_mean_mlp", 40000, 34.05)):
        assert kl(bayesian(build(name, seed=0))).item() / examples == pytest.approx(each, rel=2e-3)
    errors = {}
    for examples in (1297, 1297 / 128):  # the number of batches in place of that of examples, as a weight of the divergence
        net = bayesian(build("mlp", seed=0, hidden=(60, 40)))
        elbo = ELBO(net, 1297, kl_weight=1297 / examples)
        fitted = fit(net, torch.optim.Adam(parameter_groups(net, 3e-3, 3e-3)), digits, epochs=40, loss=elbo, evaluate_every=40, splits=("test",), progress=False)
        errors[examples] = fitted.history["test_error"].iloc[-1]
    assert errors[1297] < 5 and errors[1297 / 128] > 50
    with pytest.raises(BayesError, match="give the number of training examples, not of batches"):
        ELBO(net, 11)(torch.zeros(128, 10), torch.zeros(128, dtype=torch.long))
    with pytest.raises(BayesError, match="examples = 200, but there are 1297 training examples"):  # more than a batch: `fit` knows all the same
        fit(net, torch.optim.Adam(net.parameters()), digits, epochs=1, loss=ELBO(net, 200), progress=False)


def test_1_steps_are_counted_as_steps(digits):
    "With ghost batches, and with an average that is evaluated in place of the net."
    for options in (dict(ghosts=32), dict(average=True), {}):
        net = bayesian(build("mlp", seed=0, hidden=(8,)))
        elbo = ELBO(net, 1297, warm_up=20)
        if "average" in options:
            options = dict(average=torch.optim.swa_utils.AveragedModel(net))
        fitted = fit(net, torch.optim.SGD(net.parameters(), lr=0.0), digits, epochs=1, loss=elbo, splits=("test",), progress=False, **options)
        row = fitted.history.iloc[-1]
        assert (elbo.step, row["kl_weight"]) == (10, 0.5)
        assert row["test_loss"] < 3 and row["kl"] > 1000  # without the divergence


@pytest.mark.parametrize("examples, right", [(1297, True), (1408, False), (1280, False), (11, False)])
def test_2_a_ragged_last_batch_does_not_change_n(digits, examples, right):
    net = bayesian(build("mlp", seed=0, hidden=(8,)))
    elbo = ELBO(net, examples)
    train = lambda: fit(net, torch.optim.Adam(net.parameters()), digits, epochs=1, last="keep", loss=elbo, splits=(), progress=False)
    if right:
        assert train().steps == 11
    else:
        with pytest.raises(BayesError, match="there are 1297 training examples"):
            train()


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("layer", LAYERS)
def test_3_the_divergence_of_weights_is_that_of_torch(layer, prior):
    made = LAYERS[layer][0](prior=prior, dtype=torch.float64)
    with torch.no_grad():
        made.weight_logvar.normal_(), made.bias_logvar.normal_()
    standard = lambda x: torch.distributions.Normal(torch.zeros_like(x), torch.ones_like(x))
    pairs = [(made.weight, made.weight_logvar), (made.bias, made.bias_logvar)]
    exact = sum(torch.distributions.kl_divergence(torch.distributions.Normal(m, (v / 2).exp()), standard(m)).sum() for m, v in pairs)
    torch.testing.assert_close(made.kl() - made.scale.kl(), exact, rtol=1e-10, atol=0)
    assert made.kl() > 0


def test_3_the_divergence_of_a_scale_is_that_of_quadrature():
    "At random points the fit is good to a hundredth of a nat, falls with alpha and is never negative."
    grid = np.random.default_rng(0).uniform(-9, 8, 12)
    for log_alpha in grid:
        root = math.exp(log_alpha / 2)
        low, high = -1 / root, 40.0
        f = lambda e: stats.norm.pdf(e) * math.log(abs(1 + root * e))
        value = sum(integrate.quad(f, *pair, limit=500)[0] for pair in ((min(-40.0, low - 1), low), (low, low + 1), (low + 1, max(high, low + 2))))
        assert jeffreys_kl(torch.tensor(log_alpha)).item() == pytest.approx(value - log_alpha / 2 + 0.5 * (np.euler_gamma + math.log(2)), abs=0.01)
    fine = torch.linspace(-30, 30, 500).double()
    values = torch.stack([jeffreys_kl(x) for x in fine])
    assert (values.diff() < 0).all() and (values >= 0).all()


def test_3_the_divergence_of_the_horseshoe_is_that_of_a_sample():
    "Monte Carlo with the densities of torch, the factors drawn one by one."
    scale = Horseshoe(4, logvar=-1.0, tau=0.1).double()
    with torch.no_grad():
        for value in scale.parameters():
            value.add_(0.3 * torch.randn_like(value))
    half, one = torch.tensor(0.5).double(), torch.tensor(1.0).double()
    gamma = lambda rate: torch.distributions.Gamma(half, one * rate)
    total = torch.zeros(400000).double()
    for place, mean, logvar, prior in (
        (0, scale.layer_mean[:1], scale.layer_logvar[:1], gamma(1 / 0.1**2)),
        (1, scale.layer_mean[1:], scale.layer_logvar[1:], torch.distributions.InverseGamma(half, one)),
        (0, scale.mean[0], scale.logvar[0], gamma(1)),
        (1, scale.mean[1], scale.logvar[1], torch.distributions.InverseGamma(half, one)),
    ):  # fmt: skip
        q = torch.distributions.LogNormal(mean.detach(), (logvar.detach() / 2).exp())
        x = q.sample((400000,))
        total += (q.log_prob(x) - prior.log_prob(x)).sum(-1)
    assert scale.kl().item() == pytest.approx(total.mean().item(), abs=5 * total.std().item() / 400000**0.5)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("group", ["inputs", "outputs"])
@pytest.mark.parametrize("bias", [True, False])
def test_4_gradients_are_finite_where_a_scale_is_zero(layer, group, bias):
    make, shape = LAYERS[layer]
    made = make(group=group, bias=bias)
    drawn = made.scale.sample
    made.scale.sample = lambda count: drawn(count) * 0
    x = some(*shape).requires_grad_()
    made(x).square().sum().backward()
    assert x.grad.isfinite().all() and all(value.grad.isfinite().all() for value in made.parameters() if value.grad is not None)


def test_4_the_published_order_makes_nan_of_it():
    "What the layers guard against: the same draw through the logarithm of the variance."
    mean, eps = torch.tensor([-6.723e-05], requires_grad=True), 1.0
    z = mean + eps * torch.tensor(6.723e-05)
    assert z.item() == 0
    variance = torch.tensor([0.1])
    torch.exp(0.5 * torch.log(variance * z.square())).backward()
    assert mean.grad.isnan().all()
    mean.grad = None
    ((mean + eps * torch.tensor(6.723e-05)) * deviation(variance)).backward()
    assert mean.grad.isfinite().all()


def test_5_a_number_that_is_not_finite_is_named_before_any_clip(digits):
    for clip in (None, lambda parameters: nn.utils.clip_grad_value_(parameters, 0.2), lambda parameters: nn.utils.clip_grad_norm_(parameters, 1.0)):
        net = bayesian(build("mlp", seed=0, hidden=(8,)))
        net.hidden1.layer.scale.mean.register_hook(lambda gradient: gradient * math.nan)
        before = net.output.weight.clone()
        elbo = ELBO(net, 1297)
        with pytest.raises(Diverged, match=r"the gradient of 'hidden1.layer.scale.mean' is not finite at step 1;"):
            fit(net, torch.optim.Adam(net.parameters()), digits, epochs=1, loss=elbo, clip=clip, progress=False)
        if clip:
            assert torch.equal(net.output.weight, before)  # found before the step
            clip(list(net.parameters()))
            assert net.hidden1.layer.scale.mean.grad.isnan().any()  # and a clip is no cure


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("group", ["inputs", "outputs"])
@pytest.mark.parametrize("bias", [True, False])
def test_6_a_linear_layer_is_a_pointwise_convolution(prior, group, bias):
    linear = BayesianLinear(7, 5, bias, prior=prior, group=group, logvar=-2.0, dtype=torch.float64)
    conv = BayesianConv2d(7, 5, 1, bias=bias, prior=prior, group=group, logvar=-2.0, dtype=torch.float64)
    conv.load_state_dict({name: value.reshape(conv.state_dict()[name].shape) for name, value in linear.state_dict().items()})
    x, outputs = some(6, 7, dtype=torch.float64), []
    for layer, inputs in ((linear, x), (conv, x[:, :, None, None])):
        torch.manual_seed(3)
        outputs.append(layer(inputs).flatten(1))
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(linear.variance(), conv.variance().flatten(1), rtol=1e-12, atol=0)
    assert (BayesianLinear(2, 2).group, BayesianConv2d(2, 2, 1).group) == ("inputs", "outputs")  # the paper's


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("group", ["inputs", "outputs"])
@pytest.mark.parametrize("layer", LAYERS)
def test_7_evaluation_is_the_net_of_the_posterior_means(layer, group, prior):
    make, shape = LAYERS[layer]
    made = make(group=group, prior=prior, dtype=torch.float64)
    with torch.no_grad():
        for value in made.parameters():
            value.add_(0.3 * torch.randn_like(value))
    x = some(*shape, dtype=torch.float64)
    plain = posterior_mean(nn.Sequential(made).eval())
    assert type(plain[0]) in KINDS and not hasattr(plain[0], "scale") and set(plain.state_dict()) == {"0.weight", "0.bias"}
    torch.testing.assert_close(made.eval()(x), plain(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(5, 3, 3), (3, 3, 3), (8, 3, 3), (3, 5, 3)])  # out, in, kernel: where out == kernel a wrong axis passes unseen
@pytest.mark.parametrize("group", ["inputs", "outputs"])
@pytest.mark.parametrize("prior", ["normal_jeffreys", "horseshoe"])
def test_8_the_moments_are_those_of_drawn_weights(shape, group, prior):
    outputs, inputs, side = shape
    layer = BayesianConv2d(inputs, outputs, side, group=group, prior=prior, logvar=-2.0)
    with torch.no_grad():
        layer.scale.mean.add_(0.3 * torch.randn_like(layer.scale.mean))
        z = layer.scale.sample(100000)
        z = z[:, :, None, None, None] if group == "outputs" else z[:, None, :, None, None]
        drawn = z * (layer.weight + math.exp(-1.0) * torch.randn(100000, *layer.weight.shape))
        assert layer.variance().shape == layer.means()[0].shape == layer.weight.shape
        torch.testing.assert_close(drawn.mean(0), layer.means()[0], rtol=0, atol=0.02)
        torch.testing.assert_close(drawn.var(0), layer.variance(), rtol=0.06, atol=0)


NETS = {  # name in lab.models, options, the shape of an image
    "lenet_300_100": ({}, (1, 28, 28)), "lenet5_caffe": ({}, (1, 28, 28)), "vgg16": (dict(width=8), (3, 32, 32)), "tiny_allcnn": (dict(filters=8), (3, 32, 32)),
    "resnet50": (dict(width=4), (3, 32, 32)), "channel_mean_mlp": ({}, (3, 32, 32)),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_9_nothing_is_pruned_at_first(name):
    options, shape = NETS[name]
    net, x = bayesian(build(name, seed=0, **options)), some(8, *shape)
    given = masks(net, thresholds_of(net, "gap"))
    parameters = dict(net.named_parameters())
    assert all(mask.shape == parameters[key].shape and mask.all() for key, mask in given.items())
    made = compress(net, x, torch.arange(8))
    assert made.factors["architecture"] == 1 and made.factors["nonzero"] > 99 and made.table["weights"].sum() == sum(w.numel() for w in build(name, seed=0, **options).parameters() if w.dim() > 1)
    assert math.isfinite(made.factors["bits"]) and made.factors["bits"] > 1


@pytest.mark.parametrize("name", NETS)
def test_10_the_smaller_net_is_the_masked_net(name, tmp_path):
    "Half of the groups of each layer cut at random: strides, paddings, poolings, sums and normalisations are all on the way. And back from a file."
    options, shape = NETS[name]
    net, x = bayesian(build(name, seed=0, **options)), some(8, *shape)
    with torch.no_grad():
        for layer in bayesian_layers(net).values():
            chosen = torch.rand(len(layer.scale.mean)) < 0.5
            chosen[0] = False
            layer.scale.logvar[chosen] = 5.0
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(), module.bias.normal_()
    made = compress(net, x, torch.arange(8))
    plain = posterior_mean(net).eval()
    slow = prune_(plain, propagated(plain, masks(net, made.thresholds), x[:1]))
    for row, layer in made.table.iterrows():  # rounded as the small one is
        weight, grid = dict(plain.get_submodule(row).named_parameters())["weight_orig"], 2.0 ** -int(layer["fraction"])
        weight.data = torch.floor(weight / grid + 0.5) * grid
    torch.testing.assert_close(made.model(x), slow(x), rtol=1e-4, atol=1e-4)
    assert made.factors["architecture"] > 1.3
    made.save(tmp_path / "net.safetensors")
    again = load_compressed(tmp_path / "net.safetensors", build(name, seed=1, **options), x[:1])
    assert torch.equal(again(x), made.model(x))
    assert (tmp_path / "net.safetensors").stat().st_size < sum(4 * value.numel() for value in posterior_mean(net).state_dict().values()) / 1.5


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_11_every_layer_works(layer, prior, bias, dtype):
    make, shape = LAYERS[layer]
    made = make(prior=prior, bias=bias).to(dtype)
    x = some(*shape, dtype=dtype)
    for y in (made(x), made.eval()(x)):
        assert y.dtype == dtype and y.isfinite().all() and y.shape[:2] == (3, 4)
    made.train()(x).sum().backward()
    made.kl().backward()
    other = make(prior=prior, bias=bias, dtype=dtype)
    other.load_state_dict(made.state_dict())
    assert torch.equal(other.eval()(x), made.eval()(x))
    assert "group=" in repr(made) and (made.bias is None) == (not bias) and ("bias_logvar" in dict(made.named_parameters())) == bias


@pytest.mark.parametrize("classes", [2, 7, 10, 100])
def test_12_the_last_layer_may_have_any_width(classes):
    net = bayesian(build("mlp", seed=0, hidden=(20,), classes=classes))
    with torch.no_grad():
        net.output.scale.logvar[::2] = 5.0
    made = compress(net, some(4, 1, 8, 8), torch.zeros(4, dtype=torch.long))
    assert made.widths == [64, 10] and made.model(some(4, 1, 8, 8)).shape == (4, classes)
    assert made.table.loc["output", "structured"] == 10 * classes


@pytest.mark.parametrize("largest", [0.0, 0.3, 0.5, 1.0, 10.0, 1e4])
def test_13_bits_before_the_point_are_defined_for_every_range(largest):
    net = bayesian(nn.Sequential(nn.Flatten(), nn.Linear(6, 3)))
    with torch.no_grad():
        net[1].weight.clamp_(-0.01, 0.01)
        net[1].weight[0, 0] = largest
        net[1].weight_logvar.fill_(math.log(1e-3))
        net[1].scale.logvar.fill_(-30)
    row = compress(net, some(4, 6), torch.zeros(4, dtype=torch.long)).table.loc["1"]
    before = row["bits"] - row["fraction"] - 1
    assert row["fraction"] == 8 and before == max(1, math.floor(math.log2(largest)) + 1 if largest else 1)


def test_14_what_is_drawn_is_what_is_counted(trained, digits):
    made = compress(trained, digits.test_images, digits.test_labels)
    assert [int(mask.sum()) for name, mask in made.masks.items() if name.endswith("weight")] == made.table["structured"].tolist()
    matrices = [w for w in made.model.parameters() if w.dim() > 1]
    assert sum(w.numel() for w in matrices) == made.table["structured"].sum() < made.table["weights"].sum()
    assert [int(w.count_nonzero()) for w in matrices] == made.table["nonzero"].tolist()  # rounding makes zeros too
    assert made.factors["nonzero"] == pytest.approx(100 * made.table["nonzero"].sum() / made.table["weights"].sum())


def test_15_the_score_does_not_know_the_weight_of_the_divergence(digits):
    histories = []
    for weight in (0.0, 1.0):
        net = bayesian(build("mlp", seed=0, hidden=(8,)))
        elbo = ELBO(net, 1297, kl_weight=weight)
        fitted = fit(net, torch.optim.SGD(net.parameters(), lr=0.0), digits, epochs=1, loss=elbo, splits=("test",), progress=False)
        histories.append(fitted.history.iloc[-1])
    assert histories[0]["test_loss"] == histories[1]["test_loss"] and histories[0]["train_loss"] < histories[1]["train_loss"] - 1


def test_16_no_two_configurations_share_a_folder(tmp_path):
    for changed in (dict(lr=2e-3), dict(kl_weight=0.1), dict(method="l1")):
        Run(tmp_path / "a", dict(lr=1e-3, kl_weight=1.0, method="bayes"), overwrite=True).save_checkpoint({"w": torch.zeros(1)})
        with pytest.raises(FolderError, match=f"{next(iter(changed))} = "):
            Run(tmp_path / "a", dict(lr=1e-3, kl_weight=1.0, method="bayes") | changed)


CHANGES = ("lr=0.002", "logvar_lr=0.002", "kl_weight=0.1", "warm_up=1", "logvar=-8", "max_std=hidden1*:0.01", "group=outputs", "clip=0.001", "batch_size=64", "pretrain=1",
           "augment=crop", "widths=30x20", "prior=gaussian", "prior=horseshoe", "prior=horseshoe+tau=0.1", "prior=horseshoe+scale_lr=0.1")  # fmt: skip
OTHERS = ("magnitude", "magnitude+keep=0.5", "l1", "l1+penalty=0.001", "dense")


@pytest.mark.slow
def test_17_every_parameter_changes_the_run(papermill, tmp_path):
    words = ["bayes", *(f"bayes+{change}" for change in CHANGES), *OTHERS]
    result = papermill("epochs=2", "look=2", f"runs={' '.join(words)}", notebook="05_bayesian_compression")
    assert result.returncode == 0, result.stderr[-2000:]
    ends = {word: (tmp_path / "out" / word / "0" / "model.safetensors").read_bytes() for word in words}
    alike = [(a, b) for a in words for b in words if a < b and ends[a] == ends[b]]
    assert alike == []
    records = [json.loads((tmp_path / "out" / word / "0" / "run.json").read_text())["parameters"] for word in words]
    assert len({json.dumps(record, sort_keys=True) for record in records}) == len(words)


# 18 and 19, the surrogate that equalled its data and the processes that were killed and stayed, are tests of the diary


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("layer", LAYERS)
def test_20_a_batch_of_one_keeps_its_axis(layer, prior):
    make, shape = LAYERS[layer]
    made = make(prior=prior)
    whole = made.eval()(some(*shape))
    for x in some(*shape).split(1):
        assert made.train()(x).shape == (1, *whole.shape[1:])
    torch.testing.assert_close(made.eval()(some(*shape)[:1]), whole[:1], rtol=1e-5, atol=1e-6)


# ---- layers ----


@pytest.mark.parametrize("group", ["inputs", "outputs"])
@pytest.mark.parametrize("layer", [name for name in LAYERS if name != "linear"])
def test_noise_of_a_convolution_is_that_of_drawn_weights_and_scales(layer, group):
    "Mean and variance of one output, against a convolution with weights, scales and biases drawn one by one."
    make, shape = LAYERS[layer]
    made = make(group=group, logvar=-2.0)
    x, count = some(*shape)[:1], 4000
    with torch.no_grad():
        fast = made(x.expand(20000, *x.shape[1:])).flatten(1)
        slow = []
        for z in made.scale.sample(count):
            weight = made.weight + math.exp(-1.0) * torch.randn_like(made.weight)
            bias = made.bias + math.exp(-1.0) * torch.randn_like(made.bias)
            seen = x * z.reshape(1, -1, *[1] * (x.dim() - 2)) if group == "inputs" else x
            y = made._linear(seen, weight, bias)
            slow.append((y if group == "inputs" else y * z.reshape(1, -1, *[1] * (x.dim() - 2))).flatten())
        slow = torch.stack(slow)
    error = slow.std(0) / count**0.5
    assert ((fast.mean(0) - slow.mean(0)).abs() < 6 * error).all()
    torch.testing.assert_close(fast.var(0), slow.var(0), rtol=0.25, atol=0)


def test_features_of_sequences_are_the_last_axis():
    layer = BayesianLinear(6, 4, logvar=-30.0)
    x = some(3, 5, 6)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=1e-4, atol=1e-4)
    with pytest.raises(BayesError, match="its input is a batch"):
        layer(x[0, 0])


def test_noise_is_drawn_in_training_and_on_request_alone():
    net = bayesian(build("mlp", seed=0, hidden=(8,)))
    x = some(4, 1, 8, 8)
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))
    with noisy(net):
        assert not torch.equal(net(x), net(x))
    assert torch.equal(net(x), net(x))


def test_without_noise_training_is_plain_training(digits):
    "In the limit of no variance and no divergence: the same weights as the plain net, to rounding."
    plain = build("mlp", seed=0, hidden=(16,)).double()
    net = bayesian(plain, prior="gaussian", logvar=-200.0)
    images = digits.with_images(lambda x: x.double())
    run = lambda model, loss, parameters: fit(model, torch.optim.SGD(parameters, lr=0.1, momentum=0.9), images, epochs=2, loss=loss, splits=(), progress=False)
    run(net, ELBO(net, 1297, kl_weight=0.0), [value for name, value in net.named_parameters() if not name.endswith("logvar")])
    run(plain, F.cross_entropy, plain.parameters())
    for name, value in plain.named_parameters():
        torch.testing.assert_close(dict(net.named_parameters())[name], value, rtol=1e-9, atol=1e-12)


def test_a_trained_net_is_converted_without_a_change(digits):
    plain = build("tiny_allcnn", seed=0, filters=8)
    fit(plain, torch.optim.Adam(plain.parameters()), few(digits), epochs=1, batch_size=16, splits=(), progress=False)
    x = some(4, 3, 32, 32)
    for prior in PRIORS:
        net = bayesian(plain, prior=prior)
        torch.testing.assert_close(net.eval()(x), plain.eval()(x), rtol=1e-4, atol=1e-4)
    assert not any(hasattr(module, "scale") for module in plain.modules())
    part = bayesian(plain, layers="conv*", group={"conv1*": "inputs"})
    assert type(part.output) is nn.Linear and part.conv1.layer.group == "inputs" and part.conv2.layer.group == "outputs"
    assert compress(part, x, torch.zeros(4, dtype=torch.long)).table.loc["output", "bits"] == 32


def few(digits):
    "64 digits in the size and colours of CIFAR-10."
    large = F.interpolate(digits.train_images[:64], 32).expand(-1, 3, -1, -1).contiguous()
    return replace(digits, train_images=large, train_labels=digits.train_labels[:64])


def test_caps_hold_in_the_layers_that_have_one():
    net = bayesian(build("mlp", seed=0), max_std={"hidden1*": 0.2}, logvar=1.0)
    cap_variances(net)
    assert net.hidden1.layer.weight_logvar.exp().sqrt().max().item() == pytest.approx(0.2)
    assert (net.hidden2.layer.weight_logvar == 1).all()


def test_step_sizes_go_to_their_groups():
    net = bayesian(build("mlp", seed=0, hidden=(8,)), prior="horseshoe")
    groups = parameter_groups(net, 1.0, 2.0, 3.0)
    rates = {id(value): group["lr"] for group in groups for value in group["params"]}
    named = {name: rates[id(value)] for name, value in net.named_parameters()}
    assert {name: rate for name, rate in named.items() if name.startswith("hidden1.layer.")} == {
        "hidden1.layer.weight": 1.0, "hidden1.layer.bias": 1.0, "hidden1.layer.weight_logvar": 2.0, "hidden1.layer.bias_logvar": 2.0, "hidden1.layer.scale.mean": 3.0,
        "hidden1.layer.scale.logvar": 2.0, "hidden1.layer.scale.layer_mean": 3.0, "hidden1.layer.scale.layer_logvar": 2.0,
    }  # fmt: skip
    assert sum(len(group["params"]) for group in groups) == len(list(net.parameters()))


def test_a_run_that_is_killed_goes_on_with_its_warm_up_and_scores(digits, tmp_path):
    def train(epochs, folder):
        net = bayesian(build("mlp", seed=0, hidden=(8,)))
        elbo, trail = ELBO(net, 1297, warm_up=25), ScoreTrail()
        run = Run(folder, {"a": 1})
        fitted = fit(net, torch.optim.Adam(parameter_groups(net, 1e-3, 1e-2)), digits, epochs=epochs, loss=elbo, callbacks=[Caps(), trail], run=run, splits=("test",), progress=False)
        run.close()
        return net, fitted.history, trail.table

    whole = train(4, tmp_path / "whole")
    train(2, tmp_path / "parts")
    parts = train(4, tmp_path / "parts")
    assert all(torch.equal(a, b) for a, b in zip(whole[0].state_dict().values(), parts[0].state_dict().values()))
    assert whole[1].drop(columns="seconds").equals(parts[1].drop(columns="seconds"))
    assert whole[2].equals(parts[2]) and len(whole[2]) == 4 * (64 + 8)
    assert whole[1]["kl_weight"].tolist() == [10 / 25, 20 / 25, 1, 1]


# ---- compression ----


def test_thresholds_by_layer_and_their_errors(trained):
    names = list(scores(trained))
    assert list(thresholds_of(trained, [1, 2, 3]).values()) == [1.0, 2.0, 3.0] == list(thresholds_of(trained, dict(zip(names, (1, 2, 3)))).values())
    for wrong, words in (("gaps", "did you mean 'gap'"), ([1, 2], "2 numbers for 3 Bayesian layers"), ({"hidden1.layer": 1.0}, "there is none for the layer"), ({"hidden": 1.0} | dict.fromkeys(names, 1.0), "no Bayesian layer 'hidden'")):
        with pytest.raises(BayesError, match=words):
            thresholds_of(trained, wrong)


def test_a_cut_through_the_live_heap_warns(trained):
    live = {name: score.sort().values[4].item() for name, score in scores(trained).items()}
    with pytest.warns(LiveUnits, match="groups that are alive"):
        masks(trained, live)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masks(trained, thresholds_of(trained, "gap"))


def test_gap_against_a_slow_search():
    "Every pair of groups, a stretch between neighbours as far as it lies between -4 and 4."
    for seed in range(30):
        score = torch.cat([some(20, seed=seed) - 4, (1 + seed / 10) * some(20, seed=seed + 100) + seed / 3])
        ordered = sorted(score.tolist())
        inside = [(max(a, -4.0), min(b, 4.0)) for a, b in zip(ordered, ordered[1:])]
        best = max(inside, key=lambda stretch: stretch[1] - stretch[0])
        threshold, width = gap(score)
        if best[1] - best[0] >= 1:
            assert threshold == pytest.approx(sum(best) / 2, abs=1e-5) and width == pytest.approx(best[1] - best[0], abs=1e-5)
        else:
            assert (threshold, width) == (0, 0)


@pytest.mark.parametrize("heap", [(-9.0, -5.0), (-1.0, 3.0), (5.0, 9.0), (-8.0, 8.0), (-9.0, -3.5), (3.0, 6.0)])
def test_one_heap_has_no_gap(heap):
    assert gap(torch.linspace(*heap, 60)) == (0.0, 0.0)
    assert gap(torch.tensor([heap[0]])) == (0.0, 0.0)


def test_bits_as_published():
    for seed in range(5):
        variance = torch.exp(4 * some(50, seed=seed) - 4)
        slow = math.ceil(np.mean([sum(2 * float(v) < 2.0**-i for i in range(1, 24)) for v in variance]))
        assert fraction_bits(variance) == slow
        assert fraction_bits(variance.square(), "deviation") == slow
    with pytest.raises(BayesError, match="no rounding 'std'"):
        fraction_bits(variance, "std")


def test_the_error_is_measured_after_each_step(trained, digits):
    made = compress(trained, digits.test_images, digits.test_labels)
    error = lambda model: 100 * (model(digits.test_images).argmax(1) != digits.test_labels).float().mean().item()
    assert made.errors["means"] == pytest.approx(error(trained.eval())) and made.errors["rounded"] == pytest.approx(error(made.model))
    assert made.errors["rounded"] < 10 and made.factors["architecture"] > 1.5
    trained.train()
    for row, layer in made.table.iterrows():
        weight = next(value for name, value in made.model.named_parameters() if name.startswith(row) and name.endswith("weight"))
        codes = weight * 2.0 ** int(layer["fraction"])
        assert torch.equal(codes, codes.round()) and codes.abs().max() <= 2.0 ** (layer["bits"] - 1)


def test_the_file_backs_the_factor(trained, digits, tmp_path):
    made = compress(trained, digits.test_images, digits.test_labels)
    made.save(tmp_path / "a.safetensors")
    made.save(tmp_path / "b.safetensors", deflate=True)
    accounts = packed_bits(tmp_path / "a.safetensors")
    codes = sum(row.bytes for row in accounts.tensors if row.form == "packed" and row.bits > 1)
    claimed = 4 * made.table["weights"].sum() / made.factors["bits"]
    assert claimed <= codes < claimed + len(made.table)  # each tensor ends with a byte
    assert accounts.bytes == (tmp_path / "a.safetensors").stat().st_size and (tmp_path / "b.safetensors").stat().st_size <= accounts.bytes
    for file in ("a", "b"):
        again = load_compressed(tmp_path / f"{file}.safetensors", build("mlp", seed=5, hidden=(60, 40)), digits.test_images[:1])
        assert torch.equal(again(digits.test_images), made.model(digits.test_images))
    data = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(PackingError):
        load_compressed(tmp_path / "a.safetensors", build("mlp", seed=5, hidden=(60, 40)), digits.test_images[:1])


def test_a_file_of_another_net_is_refused(trained, digits, tmp_path):
    made = compress(trained, digits.test_images, digits.test_labels)
    made.save(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="hidden"):
        load_compressed(tmp_path / "a.safetensors", build("mlp", seed=5, hidden=(60, 41)), digits.test_images[:1])
    with pytest.raises(ValueError, match="hidden2"):
        load_compressed(tmp_path / "a.safetensors", build("mlp", seed=5, hidden=(60,)), digits.test_images[:1])


def test_files_that_lack_something_are_refused(digits, tmp_path):
    net = bayesian(build("lenet5_caffe", seed=0))
    made = compress(net, some(2, 1, 28, 28), torch.zeros(2, dtype=torch.long))
    made.save(tmp_path / "a.safetensors")
    tensors, _ = load_packed(tmp_path / "a.safetensors")
    plain = build("lenet5_caffe", seed=0)
    for damaged in (
        {name: value for name, value in tensors.items() if name != "output.kept_inputs"},
        {name: value for name, value in tensors.items() if name != "conv1.layer.weight"},
        tensors | {"conv1.layer.weight": torch.zeros(20, 1, 3, 3)},
        tensors | {"conv1.layer.kept_outputs": torch.zeros(20, dtype=torch.bool)},
        tensors | {"more": torch.zeros(2)},
    ):
        save_packed(tmp_path / "b.safetensors", damaged, {})
        with pytest.raises((BayesError, PruningError)) as caught:
            load_compressed(tmp_path / "b.safetensors", plain, some(1, 1, 28, 28))
        assert "\n" not in str(caught.value)


def test_buffers_of_the_users_own_are_kept(tmp_path):
    class Shuffle(nn.Module):
        def __init__(self):
            super().__init__()
            self.select = nn.Module()
            self.select.register_buffer("indices", torch.tensor([2, 0, 1]))
            self.linear = nn.Linear(3, 2)

        def forward(self, x):
            return self.linear(x[:, self.select.indices])

    net = bayesian(Shuffle())
    x = some(4, 3)
    made = compress(net, x, torch.zeros(4, dtype=torch.long))
    made.save(tmp_path / "a.safetensors")
    other = Shuffle()
    other.select.indices = torch.tensor([0, 1, 2])
    assert torch.equal(load_compressed(tmp_path / "a.safetensors", other, x[:1])(x), made.model(x))


# ---- nets of strangers ----


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x))


class Idle(nn.Module):
    "A layer that forward does not call."

    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.used(x)


@pytest.mark.parametrize(
    "make, words",
    [
        (Tied, "are one parameter"),
        (lambda: nn.Linear(3, 2), "give a net that holds it"),
        (lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8)), "reads the weights of"),
        (lambda: nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), nn.Linear(2, 2)), "is computed"),
        (lambda: nn.Sequential(prune_(nn.Sequential(nn.Linear(3, 2)), {"0.weight": torch.ones(2, 3, dtype=torch.bool)})), "make it permanent first"),
        (lambda: nn.Sequential(nn.ReLU()), "no Linear or convolution"),
    ],
)
def test_what_cannot_be_converted_is_refused(make, words):
    with pytest.raises(BayesError, match=words):
        bayesian(make())


def test_a_layer_that_is_not_called_is_left_out():
    made = compress(bayesian(Idle()), some(4, 4), torch.zeros(4, dtype=torch.long))
    assert list(made.table.index) == ["used"] and made.factors["architecture"] == 1


def test_a_net_on_several_devices_is_refused():
    with pytest.raises(BayesError, match="give net.module"):
        compress(nn.DataParallel(bayesian(nn.Sequential(nn.Linear(3, 2)))), some(2, 3), torch.zeros(2, dtype=torch.long))


def test_a_single_image_is_no_batch():
    with pytest.raises(BayesError, match="its input is a batch of 4 axes"):
        BayesianConv2d(1, 5, 3)(some(1, 5, 6))


def test_the_divergence_is_finite_in_half_precision():
    layer = BayesianLinear(784, 300).half()
    assert layer.kl().item() == pytest.approx(BayesianLinear(784, 300).kl().item(), rel=1e-2)


def test_caps_of_the_vgg_preset_are_on_the_layers_that_they_name():
    net = bayesian(build("vgg16", seed=0, width=8), max_std={"conv1.*": 0.1, "conv5.*": 0.2})
    assert {name: layer.max_std for name, layer in bayesian_layers(net).items() if layer.max_std < math.inf} == {"conv1.layer": 0.1, "conv5.layer": 0.2}


def test_compressing_leaves_no_trace(trained, digits):
    before = {name: value.clone() for name, value in trained.state_dict().items()}, torch.get_rng_state(), [module.training for module in trained.modules()]
    compress(trained, digits.test_images, digits.test_labels)
    after = trained.state_dict(), torch.get_rng_state(), [module.training for module in trained.modules()]
    assert all(torch.equal(before[0][name], value) for name, value in after[0].items()) and torch.equal(before[1], after[1]) and before[2] == after[2]


def test_a_plain_net_has_no_posterior():
    for call in (kl, scores, noisy(build("mlp", seed=0)).__enter__, cap_variances, posterior_mean):
        with pytest.raises(BayesError, match=r"convert it first: bayesian\(model\)"):
            call() if call.__name__ == "__enter__" else call(build("mlp", seed=0))


# ---- curvature ----


def test_the_posterior_of_a_linear_model_is_its_curvature():
    "Least squares with noise: sigma^2 = 1 / (1 + N h) exactly, h the mean square of each input."
    x = some(500, 5, dtype=torch.float64) * torch.tensor([0.03, 0.1, 0.3, 1.0, 3.0])
    y = x @ some(5, 1, seed=1, dtype=torch.float64)
    net = bayesian(nn.Sequential(nn.Linear(5, 1, bias=False)).double(), prior="gaussian")
    elbo = ELBO(net, 500, loss=lambda outputs, targets: 0.5 * (outputs - targets).square().mean())
    optimizer = torch.optim.Adam(parameter_groups(net, 1e-2, 3e-2))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.999)
    for _ in range(4000):
        optimizer.zero_grad()
        elbo(net(x), y).backward()
        optimizer.step(), schedule.step()
    exact = 1 / (1 + 500 * x.square().mean(0))
    torch.testing.assert_close(net[0].weight_logvar.exp()[0], exact, rtol=0.1, atol=0)


# ---- the page ----


def test_the_page_without_a_bayesian_run_and_with_one_of_which_nothing_is_left(papermill, tmp_path):
    result = papermill("epochs=1", "look=1", "runs=dense bayes", "thresholds=-20", notebook="05_bayesian_compression")
    assert result.returncode == 0, result.stderr[-2000:]
    records = {path.parent.parent.name: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*/0/run.json")}
    assert {method: record["status"] for method, record in records.items()} == {"bayes": "finished", "dense": "finished"}
    assert "the thresholds were hidden1.layer -20" in records["bayes"]["summary"]["reason"] and records["bayes"]["summary"]["test_error"] is None
    assert papermill("epochs=1", "look=1", "runs=dense", "overwrite=True", notebook="05_bayesian_compression").returncode == 0


@pytest.mark.parametrize(
    "parameters, words",
    [
        (["prior=jeffreys"], ["parameter 'prior' = 'jeffreys'", "'normal_jeffreys'"]),
        (["runs=bayes+kl_wight=0.1"], ["did you mean 'kl_weight'?"]),
        (["runs=bays"], ["did you mean 'bayes'?"]),
        (["max_std=hidden1"], ["parameter 'max_std' = 'hidden1'"]),
        (["max_std=hidden1*:e"], ["parameter 'max_std' = 'hidden1*:e'"]),
        (["max_std=fc1*:0.2", "runs=bayes", "epochs=1"], ["max_std: no layer 'fc1*'"]),
        (["batch_size=5000"], ["more than the 1297 training images"]),
        (["thresholds=gaps"], ["parameter 'thresholds' = 'gaps'"]),
        (["thresholds=-2.8 -3"], ["parameter 'thresholds' = '-2.8 -3'", "2 numbers for 3 Bayesian layers"]),
    ],
)
def test_bad_input_is_refused_in_one_line(papermill, tmp_path, parameters, words):
    refused(papermill(*parameters, notebook="05_bayesian_compression"), *words)
    nothing_looks_finished(tmp_path)

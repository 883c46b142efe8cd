"""What of SmoothOut and SAM is no story: states, copies, layouts, precisions, groups, refusals, and the notebook's presets. The mathematics is tested there."""

import copy
import json
import math
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from flatmin_nb.lab import models
from flatmin_nb.lab.data import Batches, ImageSet, load, scaled
from flatmin_nb.lab.train import Loop, Regime, fit, ghost_batches, regime_optimizer
from flatmin_nb.smoothout import SAM, SmoothOut, SmoothOutError, lr_factor, strength_factor

digits = scaled(load("digits", validation=0.2), centre=127.5, scale=127.5)


def net_of(seed=0, batchnorm=True):
    return models.build("mlp", seed=seed, hidden=(16, 16), batchnorm=batchnorm)


def sgd(net, **options):
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, **options)


def flat(net):
    return nn.utils.parameters_to_vector(net.parameters()).detach().clone()


def closure_of(net, optimizer, x, y):
    "Clear, forward, backward."

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(net(x), y)
        loss.backward()
        return loss

    return closure


def trained(net, optimizer, steps, start=0):
    "The weights after steps on batches of 32 digits, in order."
    for x, y in list(zip(digits.train_images.split(32), digits.train_labels.split(32)))[start : start + steps]:
        optimizer.step(closure_of(net, optimizer, x, y))
    return flat(net)


WRAPPERS = {
    "uniform": partial(SmoothOut, a=0.05),
    "gaussian": partial(SmoothOut, a=0.05, noise="gaussian"),
    "filter": partial(SmoothOut, a=0.2, relative="filter"),
    "weight": partial(SmoothOut, a=0.2, relative="weight"),
    "annealed": partial(SmoothOut, a=0.05, schedule="anneal"),
    "rising": partial(SmoothOut, a=0.05, schedule="tanh", total=20),
    "copies": partial(SmoothOut, a=0.05, copies=4, antithetic=True),
    "not denoised": partial(SmoothOut, a=0.01, denoise=False),
    "sam": partial(SAM, rho=0.1),
    "asam": partial(SAM, rho=1.0, adaptive=True),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_state_is_gone_on_with_bit_for_bit(name):
    whole, first, second = net_of(), net_of(), net_of(seed=1)
    expected = trained(whole, WRAPPERS[name](sgd(whole), whole, clip=1.0), 10)
    optimizer = WRAPPERS[name](sgd(first), first, clip=1.0)
    trained(first, optimizer, 6)
    second.load_state_dict(first.state_dict())
    resumed = WRAPPERS[name](sgd(second), second, clip=1.0)
    resumed.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    assert torch.equal(trained(second, resumed, 4, start=6), expected)
    plain = net_of()
    assert not torch.equal(expected, trained(plain, sgd(plain), 10))


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_copy_of_net_and_optimizer_goes_its_own_way(name):
    net = net_of()
    optimizer = WRAPPERS[name](sgd(net), net)
    trained(net, optimizer, 3)
    twin, twins = copy.deepcopy((net, optimizer))
    before = flat(net)
    assert not torch.equal(trained(twin, twins, 3, start=3), before)
    assert torch.equal(flat(net), before)
    assert torch.equal(trained(net, optimizer, 3, start=3), flat(twin))


def test_noise_is_of_the_seed_the_update_and_the_draw_alone():
    def noises(updates, draws, seed):
        net = net_of()
        optimizer, seen = SmoothOut(sgd(net), net, a=0.1, seed=seed), {}
        for update in range(updates):
            for draw in range(draws):
                before = flat(net)
                with optimizer.noise():
                    seen[update, draw] = flat(net) - before
            optimizer.step()
        return seen

    one, other, same_seed = noises(2, 2, 0), noises(2, 2, 1), noises(2, 3, 0)
    assert all(torch.equal(one[key], same_seed[key]) for key in one)
    everything = [*one.values(), *other.values()]
    assert not any(torch.equal(everything[i], everything[j]) for i in range(8) for j in range(i))


def test_uniform_noise_is_uniform():
    net = nn.Linear(1000, 200, bias=False)
    optimizer, before = SmoothOut(sgd(net), net, a=0.5), flat(net).double()
    with optimizer.noise():
        noise = nn.utils.parameters_to_vector(net.parameters()).double().detach() - before
    n = noise.numel()
    assert noise.abs().max() < 0.5 and abs(noise.mean()) < 4 * 0.5 / math.sqrt(3 * n)
    assert abs(noise.var() / (0.25 / 3) - 1) < 4 * math.sqrt(0.8 / n)  # the fourth moment of a uniform number gives 4 / 5
    quarters = torch.histc(noise, 4, -0.5, 0.5) / n
    assert (quarters - 0.25).abs().max() < 4 * math.sqrt(0.25 * 0.75 / n)
    neighbours = (noise[1:] * noise[:-1]).mean() / (0.25 / 3)
    assert abs(neighbours) < 4 / math.sqrt(n)


def test_antithetic_noises_are_opposite():
    net = net_of()
    optimizer, seen = SmoothOut(sgd(net), net, a=0.1, copies=None, antithetic=True, relative="filter"), []
    before = flat(net).double()
    for _ in range(4):
        with optimizer.noise():
            seen.append(flat(net).double() - before)
    torch.testing.assert_close(seen[0], -seen[1], atol=1e-7, rtol=0)
    torch.testing.assert_close(seen[2], -seen[3], atol=1e-7, rtol=0)
    assert not torch.equal(seen[0], seen[2])


def test_what_is_excluded_gets_no_noise():
    def moved(**options):
        net = net_of()
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        with SmoothOut(sgd(net), net, a=0.1, **options).noise():
            return {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}

    everything = {name for name, _ in net_of().named_parameters()}
    norms = {name for name in everything if ".norm." in name}
    assert norms and moved() == everything - norms
    assert moved(exclude_batchnorm=False) == everything
    assert moved(exclude=["output.*", "*bias"]) == {name for name in everything - norms if not name.endswith("bias")} - {"output.weight"}
    assert moved(exclude="*") == set()


def test_frozen_parameters_are_left_alone():
    net = net_of()
    net.output.weight.requires_grad_(False)
    before = net.output.weight.clone()
    with SmoothOut(sgd(net), net, a=0.1, copies=2).noise():
        assert torch.equal(net.output.weight, before)
    assert torch.isfinite(trained(net, SmoothOut(sgd(net), net, a=0.1, copies=2), 2)).all()


@pytest.mark.parametrize("name", ["uniform", "filter", "sam", "asam"])
def test_channels_last_and_mixed_precision_take_the_right_step(name):
    "The same noise does not fall on the same weights in another layout, so what is compared is that the weights come back and that a step is taken."
    for dtype, memory in ((torch.float32, torch.channels_last), (torch.bfloat16, torch.contiguous_format), (torch.float64, torch.channels_last)):
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10)).to(dtype=dtype, memory_format=memory)
        layouts, optimizer = [p.stride() for p in net.parameters()], WRAPPERS[name](sgd(net), net)
        x, y = digits.train_images[:16].to(dtype), digits.train_labels[:16]
        before = flat(net)
        with optimizer.noise() if isinstance(optimizer, SmoothOut) else torch.no_grad():
            assert [p.stride() for p in net.parameters()] == layouts
        assert torch.equal(flat(net), before)
        optimizer.step(closure_of(net, optimizer, x, y))
        assert torch.isfinite(flat(net)).all() and not torch.equal(flat(net), before)
        assert [p.stride() for p in net.parameters()] == layouts


def test_autocast():
    net = net_of()
    optimizer, before = SmoothOut(sgd(net), net, a=0.05), flat(net)
    with optimizer.noise(), torch.autocast("cpu", torch.bfloat16):
        loss = cross_entropy(net(digits.train_images[:32]), digits.train_labels[:32])
        loss.backward()
    assert torch.equal(flat(net), before) and next(net.parameters()).grad.dtype == torch.float32
    optimizer.step()
    assert not torch.equal(flat(net), before)


def test_a_scheduler_and_hooks_work_on_the_wrapper():
    net, calls = net_of(), []
    optimizer = SmoothOut(sgd(net), net, a=0.05)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    trained(net, optimizer, 2)
    schedule.step()
    assert optimizer.base.param_groups[0]["lr"] == 0.05
    assert calls == ["before", "after"] * 2


def test_groups_keep_their_own_options_and_a_late_one_takes_part():
    net = net_of()
    optimizer = SmoothOut(torch.optim.SGD([dict(params=net.hidden1.parameters(), lr=0.0), dict(params=net.hidden2.parameters())], lr=0.1), net, a=0.05)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer.add_param_group(dict(params=list(net.output.parameters())))
    with optimizer.noise():
        assert not torch.equal(net.output.weight, before["output.weight"])
    trained(net, optimizer, 1)
    changed = {name.split(".")[0] for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"hidden2", "output"}


def test_the_gradient_is_clipped_once_for_all_copies():
    net = net_of()
    optimizer = SmoothOut(torch.optim.SGD(net.parameters(), lr=1.0), net, a=0.05, copies=3, clip=1e-3)
    before = flat(net)
    trained(net, optimizer, 1)
    torch.testing.assert_close((flat(net) - before).norm(), torch.tensor(1e-3), rtol=1e-3, atol=0)


def test_without_denoising_the_weights_keep_the_noise():
    net = net_of()
    optimizer, before = SmoothOut(torch.optim.SGD(net.parameters(), lr=0.0), net, a=0.05, denoise=False), flat(net)
    with optimizer.noise():
        inside = flat(net)
    assert torch.equal(flat(net), inside) and not torch.equal(inside, before)


def test_the_statistics_of_batchnorm_see_one_pass_of_sam():
    ends = []
    for wrap in (lambda base, net: base, partial(SAM, rho=0.1)):
        net = net_of()
        trained(net, wrap(torch.optim.SGD(net.parameters(), lr=0.0), net), 3)
        ends.append({name: value for name, value in net.state_dict().items() if "running" in name or "tracked" in name})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_sam_stays_where_the_gradient_is_zero():
    net = nn.Linear(3, 2)
    nn.init.zeros_(net.weight), nn.init.zeros_(net.bias)
    optimizer = SAM(torch.optim.SGD(net.parameters(), lr=1.0), net, rho=0.1)

    def closure():
        optimizer.zero_grad()
        loss = net(torch.ones(1, 3)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert (flat(net) == 0).all()


def test_ghost_batches_under_noise_are_copies():
    "fit with ghosts takes the step that copies take with a closure that draws the ghosts one after another."
    images = digits.with_images(torch.Tensor.double)
    by_fit, by_hand = (net_of(batchnorm=False).double() for _ in range(2))
    optimizer = SmoothOut(sgd(by_fit), by_fit, a=0.05, copies=None, seed=3)
    steps = fit(by_fit, optimizer, images, epochs=2, batch_size=256, seed=5, ghosts=64, around_ghost=optimizer.noise, splits=(), progress=False).steps

    optimizer = SmoothOut(sgd(by_hand), by_hand, a=0.05, copies=4, seed=3)
    batches = Batches(images.train_images, images.train_labels, 64, seed=5)
    loop = Loop(by_hand, optimizer, batches, images, cross_entropy)
    for _ in range(steps):
        loop.take_step()
    torch.testing.assert_close(flat(by_fit), flat(by_hand), rtol=1e-12, atol=1e-14)


def test_sam_sees_the_same_ghosts_twice():
    seen = []

    class Seen(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net_of(batchnorm=False)

        def forward(self, x):
            seen.append(x)
            return self.net(x)

    net = Seen()
    fit(net, SAM(sgd(net), net, rho=0.1), digits, epochs=1, batch_size=500, ghosts=250, splits=(), progress=False)
    assert len(seen) == 8 and all(torch.equal(seen[i], seen[i + 2]) for i in (0, 1, 4, 5))
    assert not torch.equal(seen[0], seen[4])


def test_a_ragged_last_batch_has_ghosts_of_full_size():
    assert [count for count, _ in ghost_batches(752, 128)] == [126, 126, 125, 125, 125, 125]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (dict(a=-0.1), "a must be a number in [0, inf)"),
        (dict(a=math.nan), "a must be a number in [0, inf)"),
        (dict(a="0.1"), "a must be a number"),
        (dict(noise="unifrom"), "noise = 'unifrom': choose one of 'uniform', 'gaussian'"),
        (dict(relative="layer"), "relative = 'layer': choose one of None, 'filter', 'weight'"),
        (dict(schedule="cosine"), "schedule = 'cosine': choose one of 'constant', 'anneal', 'tanh'"),
        (dict(schedule="tanh"), "needs total"),
        (dict(schedule="tanh", total=0), "total must be an integer from 1"),
        (dict(copies=0), "copies must be an integer from 1"),
        (dict(copies=3, antithetic=True), "copies must be even"),
        (dict(exclude=["fc9.*"]), "no parameter like 'fc9.*'"),
        (dict(clip=0), "clip must be a number in (0, inf]"),
        (dict(seed=-1), "seed must be an integer from 0"),
        (dict(exponent=-1), "exponent must be a number in [0, inf)"),
    ],
)
def test_an_option_that_means_nothing_is_refused_in_one_line(options, complaint):
    net = net_of()
    with pytest.raises(SmoothOutError) as refusal:
        SmoothOut(sgd(net), net, **options)
    assert complaint in str(refusal.value) and len(str(refusal.value).splitlines()) == 1


def test_noise_on_noise_is_refused():
    net = net_of()
    optimizer, before = SmoothOut(sgd(net), net, a=0.1), flat(net)
    with pytest.raises(SmoothOutError, match="noise on the weights already; .* copies=None"):
        fit(net, optimizer, digits, epochs=1, ghosts=32, around_ghost=optimizer.noise, splits=(), progress=False)
    assert torch.equal(flat(net), before)
    with optimizer.noise():
        pass


def test_a_wrong_pair_of_optimizer_and_net_is_refused():
    net = net_of()
    for make, complaint in (
        (lambda: SmoothOut(torch.optim.SGD, net), "an optimizer that is made already"),
        (lambda: SAM(sgd(net), net_of()), "a parameter that the model does not have"),
        (lambda: SAM(sgd(net), net, rho=-1), "rho must be a number"),
        (lambda: SmoothOut(sgd(net), net).load_state_dict(sgd(net).state_dict()), "not the state of SmoothOut"),
    ):
        with pytest.raises(SmoothOutError, match=complaint):
            make()


def test_f1_on_mnist_through_papermill(papermill, small_mnist, tmp_path):
    small = ("epochs=2", "batch_size=8", "large_batch_size=32", "methods=small large+momentum+ghosts+flip adasmoothout", "seeds=0", "validation=0.25", "measure=False")
    result = papermill("experiment=f1", *small, notebook="03_smoothout", FLATMIN_DATA=str(small_mnist.parent), OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    records = {path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*/run.json")}
    assert {name: record["status"] for name, record in records.items()} == dict.fromkeys(("small-0", "large+momentum+ghosts+flip-0", "adasmoothout-0"), "finished")
    for record in records.values():
        assert (record["parameters"]["model"], record["parameters"]["dataset"]) == ("mnist_f1", "mnist")
        assert record["summary"]["passes"] == pytest.approx(2)


@pytest.mark.parametrize(
    ("parameter", "words"),
    [
        ("methods=smal", "parameter 'methods' = 'smal'"),
        ("a=-1", "parameter 'a' = -1"),
        ("noise=cauchy", "parameter 'noise' = 'cauchy'"),
        ("seeds=one", "parameter 'seeds' = 'one'"),
        ("large_batch_size=5000", "more than the 1038 training images"),
        ("large_batch_size=8", "smaller than batch_size = 16"),
    ],
)
def test_a_wrong_parameter_of_the_notebook(papermill, tmp_path, parameter, words):
    result = papermill(parameter, notebook="03_smoothout", OMP_NUM_THREADS="1")
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode != 0 and words in last and not (tmp_path / "out").exists(), result.stderr


@pytest.mark.parametrize("name", ["copies", "sam"])
def test_autocast_around_the_step_does_not_hide_the_noise(name):
    "Autocast keeps the casts of the weights, by parameter."
    net, seen = net_of(batchnorm=False), []
    optimizer = WRAPPERS[name](sgd(net), net)

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(net(digits.train_images[:32]), digits.train_labels[:32])
        loss.backward()
        seen.append(loss.item())
        return loss

    with torch.autocast("cpu", torch.bfloat16):
        optimizer.step(closure)
    assert len(set(seen)) == len(seen) > 1


def test_a_copy_under_a_scheduler_goes_its_own_way():
    net = net_of()
    optimizer = SmoothOut(sgd(net), net, a=0.05)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    twin, twins = copy.deepcopy((net, optimizer))
    before = flat(net)
    trained(twin, twins, 1)
    assert torch.equal(flat(net), before) and not torch.equal(flat(twin), before)
    assert pickle.loads(pickle.dumps(optimizer)).a == 0.05


def test_a_parameter_that_one_copy_alone_uses_gets_its_share():
    net = nn.ParameterDict({"u": nn.Parameter(torch.ones(1)), "v": nn.Parameter(torch.ones(1))})
    optimizer, calls = SmoothOut(torch.optim.SGD(net.parameters(), lr=1.0), net, a=1e-6, copies=2), []

    def closure():
        optimizer.zero_grad()
        calls.append(1)
        loss = (net["u"] + (net["v"] if len(calls) == 1 else 0)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert (net["u"].item(), net["v"].item()) == (0.0, 0.5)


def test_noise_in_half_precision_has_the_length_of_its_filter():
    net = nn.Linear(2**20, 1, bias=False).half()
    nn.init.constant_(net.weight, 0.01)
    before = net.weight.detach().float()
    with SmoothOut(sgd(net), net, a=0.5, relative="filter").noise():
        assert ((net.weight.float() - before).norm() / before.norm()).item() == pytest.approx(0.5, rel=0.02)


def test_looking_at_noise_leaves_the_pairs_paired():
    net, seen = net_of(), []
    optimizer, before = SmoothOut(torch.optim.SGD(net.parameters(), lr=0.0), net, a=0.1, copies=2, antithetic=True), flat(net).double()
    with optimizer.noise():
        pass
    optimizer.step(lambda: seen.append(flat(net).double() - before) or torch.zeros(()))
    torch.testing.assert_close(seen[0], -seen[1], atol=1e-7, rtol=0)


def test_what_would_be_silently_wrong_is_refused():
    net = net_of()
    smooth, worst = SmoothOut(sgd(net), net, a=0.1), SAM(sgd(net), net)

    def step_inside():
        with smooth.noise():
            smooth.step()

    for act, complaint in (
        (step_inside, "inside noise"),
        (lambda: SmoothOut(sgd(net), net, a=0.1, copies=None).step(lambda: torch.zeros(())), "did not enter noise"),
        (lambda: SAM(smooth, net), "cannot go around SmoothOut"),
        (lambda: SmoothOut(torch.optim.LBFGS(net.parameters()), net), "cannot go around LBFGS"),
        (lambda: SmoothOut(sgd(net), net.parameters()), "must be the net itself"),
        (lambda: smooth.load_state_dict(worst.state_dict()), "not the state of SmoothOut"),
        (lambda: worst.load_state_dict(smooth.state_dict()), "not the state of SAM"),
        (lambda: worst.step(lambda: torch.zeros(())), "left no gradient"),
        (lambda: SmoothOut(sgd(net), net, copies=2).step(lambda: None), "must return its loss"),
        (lambda: strength_factor(3, "tanh"), "needs total"),
        (lambda: lr_factor(-4, 128), "batch_size must be an integer"),
    ):
        with pytest.raises(SmoothOutError, match=complaint):
            act()


@pytest.mark.parametrize("name", ["cifar10_shallow", "cifar100_shallow", "resnet"])
def test_a_step_of_the_nets_that_need_cifar(name):
    "With the regime, the preprocessing and the augmentation that they carry."
    net, random = models.build(name, seed=0), torch.Generator().manual_seed(0)
    x, y = torch.randint(256, (24, 3, 32, 32), generator=random, dtype=torch.uint8), torch.arange(24) % 10
    images = net.prepare(ImageSet("noise", x, y, x[:0], y[:0], x, y, num_classes=10))
    before = flat(net)
    optimizer = SmoothOut(regime_optimizer(net.parameters(), net.regime), net, a=0.01, copies=None, exclude=net.quiet)
    options = dict(ghosts=8, around_ghost=optimizer.noise, augment=net.augment, schedule=Regime(optimizer, net.regime, lr_factor=2**0.5))
    result = fit(net, optimizer, images, epochs=1, batch_size=16, last="keep", splits=("test",), progress=False, **options)
    assert (result.steps, result.gradient_evaluations) == (2, 2) and math.isfinite(result.history["test_loss"].iloc[-1])
    assert not torch.equal(flat(net), before)

"""What of Entropy-SGD is no story: counts of operators, synchronisation, copies, groups, layouts. The mathematics is tested in the notebook."""

import copy
import itertools
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from flatmin_nb.entropy_sgd import PRESETS, EntropyAdam, EntropySGD
from flatmin_nb.lab import models


class Operators(TorchDispatchMode):
    "Counts the operators dispatched while it is on."

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.counts[str(operator)] += 1
        return operator(*args, **(kwargs or {}))


def with_random_gradients(net: nn.Module) -> None:
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)


def operators_of_a_step(net: nn.Module, L: int, **options) -> Counter:
    "The operators of one step, those of the closure left out: it computes nothing."
    optimizer = EntropySGD(net.parameters(), lr=0.1, L=L, **options)
    with_random_gradients(net)
    closure = lambda: None
    optimizer.step(closure)  # builds the buffers
    with_random_gradients(net)
    with Operators() as operators:
        optimizer.step(closure)
    return operators.counts


NETS = {"mnistfc": (10, models.mnistfc("lua")), "allcnn": (36, models.allcnn())}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("options", [{}, {"inner_weight_decay": 1e-3}, {"inner_weight_decay": 1e-3, "decay_in_momentum": False}, {"noise": 0.0}])
def test_operators_of_a_langevin_update_do_not_grow_with_the_layers(name, options):
    net = NETS[name][1]
    update = operators_of_a_step(net, L=3, **options) - operators_of_a_step(net, L=2, **options)
    assert 0 < sum(update.values()) <= 6, update


@pytest.mark.parametrize("name", NETS)
def test_a_step_stays_under_twenty_operators_per_update_in_all(name):
    assert sum(operators_of_a_step(NETS[name][1], L=20).values()) / 20 <= 20


def test_nothing_is_read_back_from_the_device():
    counts = operators_of_a_step(NETS["mnistfc"][1], L=2)
    reads = [operator for operator in counts if any(word in operator for word in ("_local_scalar_dense", "is_nonzero", "item", "_to_copy", "nonzero"))]
    assert reads == []


def quadratic(parameters) -> torch.Tensor:
    return sum((parameter**2).sum() for parameter in parameters)


def take(optimizer, parameters, steps: int = 1) -> None:
    def closure():
        optimizer.zero_grad()
        value = quadratic(parameters)
        value.backward()
        return value.detach()

    for _ in range(steps):
        optimizer.step(closure)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("L", [1, 3])
def test_the_closure_is_called_as_often_as_the_preset_says(preset, L):
    w, calls = torch.ones(3, requires_grad=True), itertools.count()

    def closure():
        next(calls)
        w.grad = torch.ones(3)
        return torch.zeros(())

    EntropySGD([w], L=L, **PRESETS[preset]).step(closure)
    assert next(calls) == L + PRESETS[preset]["extra_evaluation"]


def test_weight_decay_of_the_walk_in_either_place_is_what_the_formula_says():
    "One step from x with no gradient of the loss: x' = x - eta' (1 + m) wd x inside Nesterov's momentum, x - eta' wd x beside it."
    for decay_in_momentum, factor in [(True, 1.9), (False, 1.0)]:
        w = torch.ones(4, dtype=torch.float64, requires_grad=True)
        optimizer = EntropySGD([w], lr=0.0, L=1, noise=0.0, averaging=1.0, inner_weight_decay=0.01, decay_in_momentum=decay_in_momentum)

        def closure():
            w.grad = torch.zeros_like(w)
            return torch.zeros(())

        optimizer.step(closure)
        torch.testing.assert_close(w.grad, torch.full_like(w, 0.1 * factor * 0.01))


def test_parameter_groups_keep_their_own_options():
    a, b = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    optimizer = EntropySGD([{"params": [a], "inner_lr": 0.01}, {"params": [b], "lr": 0.0}], lr=0.5, noise=0.0)
    take(optimizer, [a, b])
    assert torch.equal(b.detach(), torch.ones(3)) and (a < 1).all()
    alone = torch.ones(3, requires_grad=True)
    take(EntropySGD([alone], lr=0.5, inner_lr=0.01, gamma_max=10.0, noise=0.0), [alone])
    assert torch.equal(a, alone)


def test_groups_that_disagree_on_L_are_refused():
    with pytest.raises(ValueError, match="share one closure"):
        EntropySGD([{"params": [torch.ones(1, requires_grad=True)]}, {"params": [torch.ones(1, requires_grad=True)], "L": 3}], L=2)


def test_a_group_added_later_takes_part():
    a, b = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    optimizer = EntropySGD([a])
    take(optimizer, [a])
    optimizer.add_param_group({"params": [b]})
    take(optimizer, [a, b])
    assert (b < 1).all()


def test_a_parameter_without_gradient_is_left_alone():
    used, unused = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    take(EntropySGD([used, unused], noise=1.0), [used], steps=3)
    assert torch.equal(unused.detach(), torch.ones(3)) and unused.grad is None


def test_mixed_precisions_in_one_group():
    a, b = torch.ones(3, requires_grad=True), torch.ones(3, dtype=torch.float64, requires_grad=True)
    take(EntropySGD([a, b], lr=0.1, noise=0.0), [a, b], steps=3)
    torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=0)


def test_channels_last_weights_take_the_same_steps():
    "The fused kernel walks over memory, so momentum must lie in memory as the weights do."
    weights = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        w = weights.clone(memory_format=layout).requires_grad_()
        optimizer = EntropySGD([w], lr=0.5, L=5, seed=1)
        scale = torch.arange(300.0).view(4, 3, 5, 5) / 300

        def closure():
            optimizer.zero_grad()
            value = (scale * w**2).sum()
            value.backward()
            return value.detach()

        for _ in range(3):
            optimizer.step(closure)
        results.append(w.detach().contiguous())
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


def test_hooks_run_once_a_step_also_when_the_base_class_is_hooked():
    w = torch.ones(3, requires_grad=True)
    torch.optim.SGD([w], lr=0.1)  # makes torch wrap SGD.step
    optimizer, calls = EntropySGD([w]), []
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    take(optimizer, [w])
    optimizer.param_groups[0]["L"] = 0
    take(optimizer, [w])
    assert calls == ["after", "after"]


def test_a_scheduler_changes_the_outer_step_alone():
    w = torch.ones(3, requires_grad=True)
    optimizer = EntropySGD([w], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
    take(optimizer, [w])
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1) and optimizer.param_groups[0]["inner_lr"] == 0.1


@pytest.mark.parametrize("kind", [EntropySGD, EntropyAdam])
def test_a_copy_of_net_and_optimizer_goes_its_own_way(kind):
    net = nn.Linear(3, 1)
    optimizer = kind(net.parameters(), lr=0.1, noise=0.1)
    take(optimizer, list(net.parameters()))
    twin, twin_optimizer = copy.deepcopy((net, optimizer))
    before = [parameter.detach().clone() for parameter in net.parameters()]
    take(twin_optimizer, list(twin.parameters()), 2)
    assert all(torch.equal(*pair) for pair in zip(before, net.parameters()))
    take(optimizer, list(net.parameters()), 2)
    assert all(torch.equal(*pair) for pair in zip(twin.parameters(), net.parameters()))


def test_gradients_kept_with_set_to_none_false_change_nothing():
    results = []
    for set_to_none in (True, False):
        w = torch.linspace(-1, 1, 5).requires_grad_()
        optimizer = EntropySGD([w], lr=0.5, noise=0.1, L=4)

        def closure():
            optimizer.zero_grad(set_to_none=set_to_none)
            value = (w**2).sum()
            value.backward()
            return value.detach()

        for _ in range(3):
            optimizer.step(closure)
        results.append(w.detach())
    assert torch.equal(*results)


def test_a_step_without_closure_says_what_is_missing():
    with pytest.raises(ValueError, match="needs a closure"):
        EntropySGD([torch.ones(1, requires_grad=True)]).step()


def test_walks_of_different_seeds_and_steps_draw_different_noise():
    displacements = []
    for seed in (0, 1):
        w = torch.zeros(100, requires_grad=True)
        optimizer = EntropySGD([w], lr=0.0, L=1, noise=1.0, seed=seed)
        for _ in range(2):
            take(optimizer, [w])
            displacements.append(w.grad.clone())
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(displacements, 2))


@pytest.mark.parametrize("layout", ["sliced weights", "gradient laid out differently"])
def test_weights_and_gradients_that_lie_in_memory_unlike_take_the_right_step(layout):
    "The fused kernel walks over memory and would pair the wrong numbers, without a word."
    base = torch.ones(3, 6)
    w = nn.Parameter(base[:, ::2] if layout == "sliced weights" else torch.ones(3, 3))
    gradient = torch.arange(9.0).view(3, 3)
    optimizer = EntropySGD([w], lr=1.0, L=1, noise=0.0, gamma=0.0, averaging=1.0, inner_momentum=0.0, inner_lr=0.1)

    def closure():
        w.grad = gradient if layout == "sliced weights" else gradient.t().contiguous().t()
        return torch.zeros(())

    optimizer.step(closure)
    torch.testing.assert_close(w.detach(), 1 - 0.1 * gradient)
    assert (base[:, 1::2] == 1).all()  # the other columns belong to somebody else


@pytest.mark.parametrize("foreach", [False, True])
def test_grad_holds_x_minus_mu_after_the_step_whatever_torch_does_with_it(foreach):
    w = torch.full((3,), 1.0, requires_grad=True)
    optimizer = EntropySGD([w], lr=0.1, L=1, noise=0.0, gamma=0.0, averaging=1.0, inner_momentum=0.0, momentum=0.9, nesterov=True, foreach=foreach)
    take(optimizer, [w])
    torch.testing.assert_close(w.grad, torch.full((3,), 0.2))  # x - x' = eta' grad f


def test_a_parameter_that_joins_late_walks_with_the_others():
    early, late, calls = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True), itertools.count()

    def closure():
        early.grad, late.grad = torch.ones(2), torch.full((2,), 100.0) if next(calls) % 2 else None
        return torch.zeros(())

    EntropySGD([early, late], lr=1.0, L=2, noise=0.0, gamma=0.0, averaging=1.0, inner_momentum=0.0, inner_lr=0.001).step(closure)
    torch.testing.assert_close(late.detach(), torch.full((2,), 0.9))  # one inner step of 0.001 * 100, not an outer one of 100


@pytest.mark.parametrize("option", ["maximize", "differentiable"])
def test_options_that_the_walk_cannot_follow_are_refused(option):
    w = torch.ones(1, requires_grad=True)
    with pytest.raises(ValueError, match=option):
        EntropySGD([w], **{option: True})
    EntropySGD([w], L=0, **{option: True})


def test_the_state_of_plain_sgd_can_be_gone_on_with():
    w = torch.ones(3, requires_grad=True)
    plain = torch.optim.SGD([w], lr=0.1, momentum=0.9)
    take(plain, [w])
    optimizer = EntropySGD([w], lr=0.1, momentum=0.9, L=3)
    optimizer.load_state_dict(plain.state_dict())
    take(optimizer, [w])
    assert optimizer.param_groups[0]["L"] == 3 and optimizer.param_groups[0]["outer_steps"] == 1

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from barlow.training.optim import LARS, build, warmup_cosine


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3, bias=False))


def train(model, optimizer, steps=5, scale=1.0):
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(1)).to(next(model.parameters()).dtype)
    for _ in range(steps):
        optimizer.zero_grad()
        (scale * model(x).square().mean()).backward()
        optimizer.step()
    return list(model.parameters())


class NaiveLARS(torch.optim.Optimizer):
    """One parameter at a time, as the official code has it; with `clip` the rate of a parameter is lr at most."""

    def __init__(self, params, lr, momentum, weight_decay, trust_coefficient, clip=False):
        super().__init__(params, {"lr": lr})
        self.settings = (momentum, weight_decay, trust_coefficient, clip)
        self.bounded = []  # for each scaling: whether lr was the bound

    @torch.no_grad()
    def step(self):
        lr, (momentum, weight_decay, trust_coefficient, clip) = self.param_groups[0]["lr"], self.settings
        for w in self.param_groups[0]["params"]:
            d = w.grad.clone()
            if w.ndim > 1:
                d = d + weight_decay * w
                if w.norm() > 0 and d.norm() > 0:
                    trust = (trust_coefficient * w.norm() / d.norm()).item()
                    self.bounded.append(trust >= lr)
                    d = d * (min(trust, lr) / lr if clip else trust)
            m = self.state[w].get("m", torch.zeros_like(w)) * momentum + d
            self.state[w]["m"] = m
            w -= lr * m


class SoloLARS(torch.optim.Optimizer):
    """solo-learn's rule (solo/utils/lars.py), with clip_lr and exclude_bias_n_norm."""

    def __init__(self, params, lr, momentum, weight_decay, trust_coefficient):
        super().__init__(params, {"lr": lr})
        self.settings = (momentum, weight_decay, trust_coefficient)
        self.bounded = []  # for each scaling: whether lr was the bound

    @torch.no_grad()
    def step(self):
        lr, (momentum, weight_decay, eta) = self.param_groups[0]["lr"], self.settings
        for p in self.param_groups[0]["params"]:
            g = p.grad.clone()
            if p.ndim != 1 and p.norm() != 0 and g.norm() != 0:
                rate = (eta * p.norm() / (g.norm() + p.norm() * weight_decay + 1e-8)).item()
                self.bounded.append(rate >= lr)
                g = min(rate / lr, 1) * (g + weight_decay * p)
            m = self.state[p].get("m", torch.zeros_like(p)) * momentum + g
            self.state[p]["m"] = m
            p -= lr * m


def assert_close(a, b, rtol=1e-5):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=1e-7)


def test_equals_the_naive_loop():
    ours, theirs = network(), network()
    settings = {"lr": 0.3, "momentum": 0.9, "weight_decay": 1e-2, "trust_coefficient": 0.05}
    assert_close(
        train(ours, LARS(ours.parameters(), **settings)), train(theirs, NaiveLARS(theirs.parameters(), **settings))
    )


@pytest.mark.parametrize(("lr", "bounded"), [(1e-4, {True}), (0.1, {True, False}), (10.0, {False})])
def test_clip_equals_the_naive_loop(lr, bounded):
    """Where trust_coefficient * |w| / |d| is above lr, where it is on one side and the other, and where it is below."""
    ours, theirs = network(), network()
    settings = {"lr": lr, "momentum": 0.9, "weight_decay": 1e-2, "trust_coefficient": 0.02, "clip": True}
    naive = NaiveLARS(theirs.parameters(), **settings)
    assert_close(train(ours, LARS(ours.parameters(), **settings)), train(theirs, naive))
    assert set(naive.bounded) == bounded


@pytest.mark.parametrize(("w", "g"), [(1e-3, 5.0), (5.0, 1e-3), (1e-20, 1e-15), (1e15, 1e-15)])
def test_a_clipped_step_is_the_smaller_of_two_rates(w, g):
    weight = nn.Parameter(torch.full((2, 2), w))
    weight.grad = torch.full((2, 2), g)
    optimizer = LARS([weight], lr=0.1, momentum=0, weight_decay=0, trust_coefficient=0.02, clip=True)
    optimizer.step()
    moved = torch.full((2, 2), w - min(0.02 * w / g, 0.1) * g)
    torch.testing.assert_close(weight.detach(), moved, rtol=1e-6, atol=0)


@pytest.mark.parametrize("trust_coefficient", [0.0, 0.02])
def test_clip_at_a_rate_of_zero_moves_no_weight_and_keeps_momentum_finite(trust_coefficient):
    """The first step of a warm-up. At any rate that small the scaling would be 1, so that is what momentum takes up."""
    w = nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([w], lr=0.0, weight_decay=0.5, trust_coefficient=trust_coefficient, clip=True)
    w.grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(w, torch.ones(2, 2))
    assert torch.equal(optimizer.state[w]["momentum_buffer"], torch.full((2, 2), 1.5))


@pytest.mark.parametrize(
    ("size", "lr", "trust_coefficient", "weight_decay", "bounded", "rtol"),
    [
        (1, 0.1, 1.0, 0.5, {True}, 1e-5),  # lr is the bound, and what d is divided by does not matter
        (1, 0.1, 1e-4, 0.0, {False}, 1e-5),  # |d| is solo-learn's |g| + weight_decay * |w| without decay only
        (6, 0.3, 0.02, 1e-4, {True, False}, 3e-3),  # the recipe for CIFAR-10
    ],
)
def test_clip_is_solo_learns_rule_on_a_scaled_loss(size, lr, trust_coefficient, weight_decay, bounded, rtol):
    """A loss scaled by 0.1 is the loss as it is at 0.1 * lr, for biases too, and weight_decay / 0.1."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double()
    theirs, scale = copy.deepcopy(ours), 0.1
    a = LARS(ours.parameters(), 0.0, 0.9, weight_decay / scale, trust_coefficient, clip=True)
    b = SoloLARS(theirs.parameters(), 0.0, 0.9, weight_decay, trust_coefficient)
    before = [w.detach().clone() for w in ours.parameters()]
    for step in range(1, 9):  # the rate changes, so that momentum carries steps from one rate to another
        a.param_groups[0]["lr"], b.param_groups[0]["lr"] = scale * lr * step / 8, lr * step / 8
        train(ours, a, steps=1, scale=size)
        train(theirs, b, steps=1, scale=scale * size)
    moved = [[w.detach() - w0 for w, w0 in zip(m.parameters(), before, strict=True)] for m in (ours, theirs)]
    assert set(b.bounded) == bounded
    assert all(y.any() for y in moved[1])
    for x, y in zip(*moved, strict=True):
        assert (x - y).norm() <= rtol * y.norm()


def test_excluded_parameters_follow_sgd():
    ours, theirs = (nn.ParameterList([torch.linspace(-1, 1, 5), torch.tensor(2.0)]) for _ in range(2))
    a = LARS(ours.parameters(), lr=0.1, momentum=0.9, weight_decay=0.5)
    b = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)  # neither decay nor scaling
    for _ in range(4):
        for parameters, optimizer in ((ours, a), (theirs, b)):
            optimizer.zero_grad()
            sum((w - 3).square().sum() for w in parameters).backward()
            optimizer.step()
    assert_close(ours, theirs)


def test_equals_sgd_where_adaptation_has_no_effect():
    """With trust_coefficient = |d| / |w| the ratio is 1, and LARS is SGD with momentum and decay."""
    ours, theirs = (nn.Parameter(torch.tensor([[3.0, 4.0]])) for _ in range(2))
    d = torch.tensor([[1.0, 2.0]]) + 0.1 * theirs.detach()
    a = LARS([ours], lr=0.1, momentum=0.9, weight_decay=0.1, trust_coefficient=(d.norm() / theirs.norm()).item())
    b = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, weight_decay=0.1)
    for w, optimizer in ((ours, a), (theirs, b)):
        w.grad = torch.tensor([[1.0, 2.0]])
        optimizer.step()
    assert_close([ours], [theirs])


@pytest.mark.parametrize(("weight", "gradient"), [(0.0, 1.0), (1.0, 0.0)])
def test_trust_ratio_is_one_where_a_norm_is_zero(weight, gradient):
    w = nn.Parameter(torch.full((2, 2), weight))
    w.grad = torch.full((2, 2), gradient)
    LARS([w], lr=0.1, momentum=0, weight_decay=0, trust_coefficient=0.001).step()
    torch.testing.assert_close(w.detach(), torch.full((2, 2), weight - 0.1 * gradient))


def test_settings_differ_by_group():
    frozen, moving = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([{"params": [frozen], "lr": 0.0}, {"params": [moving]}], lr=1.0)
    frozen.grad, moving.grad = torch.ones(2, 2), torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(frozen, torch.ones(2, 2))
    assert not torch.equal(moving, torch.ones(2, 2))


def test_state_dict_round_trip():
    whole, parts = network(), network()
    settings = {"lr": 0.3, "weight_decay": 1e-2, "trust_coefficient": 0.05}
    train(whole, LARS(whole.parameters(), **settings), steps=6)
    first = LARS(parts.parameters(), **settings)
    train(parts, first, steps=3)
    second = LARS(parts.parameters(), lr=9.0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(parts, second, steps=3)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(a, b)


def test_parameters_without_gradient_stay():
    w = nn.Parameter(torch.ones(2, 2))
    LARS([w], lr=1.0).step()
    assert torch.equal(w, torch.ones(2, 2))


def test_negative_setting_is_refused():
    with pytest.raises(ValueError, match=r"momentum=-0\.1 is negative"):
        LARS([nn.Parameter(torch.ones(1))], lr=1.0, momentum=-0.1)


def by_hand(name, weights, biases, gradients, rates, p):
    """SGD (Sutskever's momentum, as torch has it) and AdamW (arXiv 1711.05101, algorithm 2), one number at a time."""
    for w in [*weights, *biases]:
        decay = p.weight_decay if any(w is each for each in weights) else 0.0
        m, v, flat = np.zeros(w.size), np.zeros(w.size), w.reshape(-1)  # a view of w
        for step, (gradient, lr) in enumerate(zip(gradients[id(w)], rates, strict=True), 1):
            for i, g in enumerate(gradient.reshape(-1)):
                if name == "sgd":
                    m[i] = p.momentum * m[i] + g + decay * flat[i]
                    flat[i] -= lr * m[i]
                else:
                    m[i] = p.momentum * m[i] + (1 - p.momentum) * g
                    v[i] = 0.999 * v[i] + 0.001 * g**2
                    unbiased = m[i] / (1 - p.momentum**step), v[i] / (1 - 0.999**step)
                    flat[i] -= lr * (unbiased[0] / (unbiased[1] ** 0.5 + 1e-8) + decay * flat[i])


@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_sgd_and_adamw_equal_a_loop_by_hand(smoke, change, name, momentum):
    """In float64; the weights of the convolution lie in memory as channels_last; the rate begins at 0."""
    p = change(smoke, "pretrain", optimizer=name, momentum=momentum, weight_decay=0.3).pretrain
    generator = torch.Generator().manual_seed(0)
    shapes, rates = [(4, 3, 3, 3), (5, 4), (4,), (1, 1)], [0.0, 0.05, 0.1, 0.02]
    ours = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    ours[0] = ours[0].contiguous(memory_format=torch.channels_last)
    theirs = [w.numpy().copy(order="C") for w in ours]
    gradients = {
        id(copied): [torch.randn(w.shape, dtype=torch.float64, generator=generator) for _ in rates]
        for w, copied in zip(ours, theirs, strict=True)
    }
    optimizer = build(p, [ours[0], ours[1], ours[3]], [ours[2]])
    for step, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for w, copied in zip(ours, theirs, strict=True):
            w.grad = torch.empty_like(w).copy_(gradients[id(copied)][step])
        optimizer.step()
    arrays = {key: [g.numpy() for g in each] for key, each in gradients.items()}
    by_hand(name, [theirs[0], theirs[1], theirs[3]], [theirs[2]], arrays, rates, p)
    for w, copied in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(w, copied, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["lars", "larc"])
def test_lars_and_larc_are_the_official_and_the_clipped_rule(smoke, change, name):
    settings = {"momentum": 0.8, "weight_decay": 1e-2, "trust_coefficient": 0.05}
    p = change(smoke, "pretrain", optimizer=name, **settings).pretrain
    ours, theirs = network(), network()
    groups = ([w for w in ours.parameters() if (w.ndim > 1) == wide] for wide in (True, False))
    optimizer = build(p, *groups)
    for group in optimizer.param_groups:
        group["lr"] = 0.3
    naive = NaiveLARS(theirs.parameters(), 0.3, **settings, clip=name == "larc")
    assert_close(train(ours, optimizer), train(theirs, naive))
    assert set(naive.bounded) == {True, False}


@pytest.mark.parametrize("name", ["lars", "larc", "sgd", "adamw"])
def test_the_whole_state_is_there_before_the_first_step(smoke, change, name):
    """With the names and the layout in memory that it has after a step."""
    weights, biases = [torch.ones(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)], [torch.ones(4)]
    optimizer = build(change(smoke, "pretrain", optimizer=name).pretrain, weights, biases)

    def state():
        return [
            {key: (value.shape, value.stride(), value.dtype) for key, value in optimizer.state[w].items()}
            for w in weights + biases
        ]

    before = state()
    assert all(not value.any() for w in weights + biases for value in optimizer.state[w].values())
    for w in weights + biases:
        w.grad = torch.ones_like(w)
    optimizer.step()
    assert state() == before
    assert all(value.any() for w in weights + biases for value in optimizer.state[w].values())


def official(step, total, warmup, base):
    """adjust_learning_rate of facebookresearch/barlowtwins, in steps; its final rate is base * 0.001."""
    if step < warmup:
        return base * step / warmup
    step, total = step - warmup, total - warmup
    q = 0.5 * (1 + math.cos(math.pi * step / total))
    return base * q + base * 0.001 * (1 - q)


@pytest.mark.parametrize("step", [0, 1, 9, 10, 11, 55, 99, 100])
def test_equals_the_official_code(step):
    assert warmup_cosine(step, 100, 10, 0.8, 0.0008) == pytest.approx(official(step, 100, 10, 0.8))


def test_endpoints():
    assert warmup_cosine(0, 100, 10, 2.0, 0.1) == 0
    assert warmup_cosine(10, 100, 10, 2.0, 0.1) == 2.0
    assert warmup_cosine(55, 100, 10, 2.0, 0.1) == pytest.approx(1.05)
    assert warmup_cosine(100, 100, 10, 2.0, 0.1) == pytest.approx(0.1)


def test_without_warmup_it_starts_at_the_base():
    assert warmup_cosine(0, 10, 0, 2.0, 0.1) == 2.0


def test_warmup_may_last_to_the_end():
    assert warmup_cosine(9, 10, 10, 2.0, 0.1) == pytest.approx(1.8)

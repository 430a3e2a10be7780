import copy

import pytest
import torch
from torch import nn

from barlow.lars import LARS


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3, bias=False))


def train(model, optimizer, steps=5):
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return list(model.parameters())


class NaiveLARS(torch.optim.Optimizer):
    """One parameter at a time, as the official code has it."""

    def __init__(self, params, lr, momentum, weight_decay, trust_coefficient):
        super().__init__(params, {})
        self.settings = (lr, momentum, weight_decay, trust_coefficient)

    @torch.no_grad()
    def step(self):
        lr, momentum, weight_decay, trust_coefficient = self.settings
        for w in self.param_groups[0]["params"]:
            d = w.grad.clone()
            if w.ndim > 1:
                d = d + weight_decay * w
                if w.norm() > 0 and d.norm() > 0:
                    d = d * (trust_coefficient * w.norm() / d.norm()).item()
            m = self.state[w].get("m", torch.zeros_like(w)) * momentum + d
            self.state[w]["m"] = m
            w -= lr * m


def assert_close(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)


def test_equals_the_naive_loop():
    ours, theirs = network(), network()
    settings = {"lr": 0.3, "momentum": 0.9, "weight_decay": 1e-2, "trust_coefficient": 0.05}
    assert_close(
        train(ours, LARS(ours.parameters(), **settings)), train(theirs, NaiveLARS(theirs.parameters(), **settings))
    )


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

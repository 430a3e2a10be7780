import inspect

import pytest
import torch

from barlow.training import loss
from barlow.training.loss import ablated_loss, barlow_twins_loss, cross_correlation

SIZES = [(8, 16), (8, 128), (64, 16), (64, 512), (256, 16), (256, 1024)]
GRID = [(n, dim) for n in (8, 64, 256, 1024) for dim in (16, 128, 2048, 8192)]


def paper_loss(z_a, z_b, lambd):
    """The paper's pseudo-code (algorithm 1), with batch norm's normalisation."""
    n, dim = z_a.shape
    z_a_norm, z_b_norm = ((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in (z_a, z_b))
    c = z_a_norm.T @ z_b_norm / n
    c_diff = (c - torch.eye(dim, dtype=c.dtype)).square()
    weights = torch.where(torch.eye(dim, dtype=torch.bool), 1.0, lambd)
    return (weights * c_diff).sum()


def embeddings(n, dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(n, dim, generator=generator)
    return [(shared + 0.5 * torch.randn(n, dim, generator=generator)) * 3 + 1 for _ in range(2)]


def gradients(function, *views):
    views = [view.detach().clone().requires_grad_() for view in views]
    total = function(*views)
    total.backward()
    return total.detach(), torch.cat([view.grad for view in views])


def paper_gradient_of(columns, z_a, z_b, lambd):
    """The gradient of `paper_loss` by hand, but only that of some columns, so that D may be large."""
    found = []
    for z, other in ((z_a, z_b), (z_b, z_a)):  # the loss is the same with the views exchanged: C is transposed
        z = z[:, columns].requires_grad_()
        a, b = ((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in (z, other))
        grad_c = 2 * lambd * (a.detach().T @ b) / len(a)
        rows = torch.arange(len(columns))
        grad_c[rows, columns] = (grad_c[rows, columns] - 2 * lambd) / lambd
        a.backward(b @ grad_c.T / len(a))
        found.append(z.grad)
    return torch.cat(found)


def test_the_oracles_agree():
    views = [z.double() for z in embeddings(32, 50)]
    _, gradient = gradients(lambda a, b: paper_loss(a, b, 0.1), *views)
    columns = torch.tensor([0, 7, 31, 49])
    torch.testing.assert_close(paper_gradient_of(columns, *views, 0.1), gradient[:, columns])


@pytest.mark.parametrize(("n", "dim"), GRID)
def test_float32_gradient_equals_float64(n, dim):
    z_a, z_b = embeddings(n, dim)
    _, gradient = gradients(lambda a, b: barlow_twins_loss(a, b, 0.0051).total, z_a, z_b)
    columns = torch.arange(0, dim, max(dim // 512, 1))
    expected = paper_gradient_of(columns, z_a.double(), z_b.double(), 0.0051)
    assert (gradient[:, columns] - expected).norm() / expected.norm() <= 2e-6


def test_two_samples_are_finite():
    total, gradient = gradients(lambda a, b: barlow_twins_loss(a, b, 0.0051).total, *embeddings(2, 64))
    assert total.isfinite()
    assert gradient.isfinite().all()


def test_the_dual_forms_own_backward_pass():
    views = [torch.randn(5, 7, dtype=torch.double, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda a, b: barlow_twins_loss(a, b, 0.1).total, views)


@pytest.mark.parametrize("form", ["direct", "dual"])
@pytest.mark.parametrize(("n", "dim"), SIZES)
def test_both_forms_equal_the_paper_in_float64(monkeypatch, form, n, dim):
    monkeypatch.setattr(loss, "form", lambda *_: form)
    z_a, z_b = embeddings(n, dim)
    expected, expected_gradient = gradients(lambda a, b: paper_loss(a, b, 0.0051), z_a.double(), z_b.double())
    total, gradient = gradients(lambda a, b: barlow_twins_loss(a, b, 0.0051).total, z_a, z_b)
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (gradient - expected_gradient).norm() / expected_gradient.norm() < 2e-6


def test_terms_add_up_and_are_those_of_the_matrix():
    z_a, z_b = embeddings(32, 64)
    total, invariance, redundancy = barlow_twins_loss(z_a, z_b, 0.1)
    c = cross_correlation(z_a, z_b)
    assert invariance.item() == pytest.approx((1 - c.diagonal()).square().sum().item(), rel=1e-4)
    assert redundancy.item() == pytest.approx((c - c.diagonal().diag()).square().sum().item(), rel=1e-4)
    assert total.item() == pytest.approx((invariance + 0.1 * redundancy).item())


def test_cross_correlation_equals_numpy():
    import numpy as np

    z_a, z_b = embeddings(200, 5)
    expected = np.corrcoef(z_a.T, z_b.T)[:5, 5:]
    assert np.allclose(cross_correlation(z_a, z_b), expected, atol=1e-4)


def test_each_view_is_normalised_by_itself():
    z, _ = embeddings(16, 32)
    assert barlow_twins_loss(z, 2 * z + 4, 0.0051).total.item() == pytest.approx(
        barlow_twins_loss(z, z, 0.0051).total.item(), rel=1e-4
    )


@pytest.mark.parametrize("n", [2, 8, 64])
def test_constant_feature_is_finite(n):
    z_a, z_b = embeddings(n, 32)
    z_a[:, 0] = z_b[:, 3] = 7.0
    total, gradient = gradients(lambda a, b: barlow_twins_loss(a, b, 0.0051).total, z_a, z_b)
    assert total.isfinite()
    assert gradient.isfinite().all()


def test_float32_under_autocast():
    z_a, z_b = embeddings(64, 128)
    expected = barlow_twins_loss(z_a, z_b, 0.0051).total
    with torch.autocast("cpu", torch.bfloat16):
        total = barlow_twins_loss(z_a, z_b, 0.0051).total
    assert total.dtype == torch.float32
    assert total.item() == expected.item()


@pytest.mark.parametrize(("n", "dim", "wanted"), [(8, 16, "dual"), (16, 8, "direct"), (8, 8, "direct")])
def test_form_is_chosen_by_the_smaller_of_batch_and_dimension(n, dim, wanted):
    """Seen in what is kept for the backward pass: C, or Gram matrices."""
    assert loss.form(n, dim) == wanted
    views, kept = [z.requires_grad_() for z in embeddings(n, dim)], []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda t: t):
        barlow_twins_loss(*views, 0.1)
    assert ((dim, dim) in kept, (n, n) in kept) == (
        (wanted == "direct", wanted == "dual") if n != dim else (True, True)
    )


@pytest.mark.parametrize(("shape_a", "shape_b"), [((4, 3), (4, 2)), ((4, 3), (5, 3)), ((4,), (4,))])
def test_shapes_must_agree(shape_a, shape_b):
    unchecked = inspect.unwrap(barlow_twins_loss)  # without the annotations' check, which only tests have
    with pytest.raises(ValueError, match=r"both must be \(batch, dim\)"):
        unchecked(torch.zeros(shape_a), torch.zeros(shape_b), 0.1)


def test_one_sample_cannot_be_normalised():
    with pytest.raises(ValueError, match="at least 2"):
        barlow_twins_loss(torch.zeros(1, 3), torch.zeros(1, 3), 0.1)


SIZES = [(24, 40), (40, 24)]  # the dual and the direct form


def wide_embeddings(n, dim):
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(n, dim, generator=generator, dtype=torch.double)
    views = [(shared + 0.5 * torch.randn(n, dim, generator=generator, dtype=torch.double)) * 3 + 1 for _ in range(2)]
    return [view.requires_grad_() for view in views]


def terms(z_a, z_b):
    """The two sums of equation 1 for C = z_a^T z_b / N, entry by entry."""
    c = torch.einsum("na,nb->ab", z_a, z_b) / len(z_a)
    own = torch.eye(len(c), dtype=torch.bool)
    return (1 - c[own]).square().sum(), c[~own].square().sum()


def standardised(z):
    return (z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt()


def gradients_of(total, views):
    return torch.autograd.grad(total, views, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize(("n", "dim"), SIZES)
def test_without_normalisation_the_matrix_is_of_the_raw_embeddings(n, dim):
    views = wide_embeddings(n, dim)
    loss = ablated_loss(*views, 0.1, "normalisation")
    invariance, redundancy = terms(*views)
    torch.testing.assert_close(loss, (invariance + 0.1 * redundancy, invariance, redundancy), check_dtype=False)
    torch.testing.assert_close(gradients_of(loss.total, views), gradients_of(invariance + 0.1 * redundancy, views))


@pytest.mark.parametrize(("n", "dim"), SIZES)
def test_without_invariance_redundancy_reduction_alone_is_left(n, dim):
    views = wide_embeddings(n, dim)
    loss = ablated_loss(*views, 0.1, "invariance")
    invariance, redundancy = terms(*map(standardised, views))
    torch.testing.assert_close(loss, (0.1 * redundancy, invariance, redundancy), check_dtype=False)
    torch.testing.assert_close(gradients_of(loss.total, views), gradients_of(0.1 * redundancy, views))


@pytest.mark.parametrize(("n", "dim"), SIZES)
def test_stop_gradient_leaves_view_a_its_gradient_and_view_b_none(n, dim):
    views = wide_embeddings(n, dim)
    whole = barlow_twins_loss(*views, 0.1)
    loss = ablated_loss(*views, 0.1, "stop-gradient")
    torch.testing.assert_close(loss, whole)
    of_a, of_b = gradients_of(loss.total, views)
    torch.testing.assert_close(of_a, gradients_of(whole.total, views)[0])
    assert not of_b.any()


@pytest.mark.parametrize(("n", "dim"), SIZES)
def test_a_symmetrised_stop_gradient_is_half_of_the_whole_gradient(n, dim):
    """So it would be no other method under LARS, which a factor does not change."""
    z_a, z_b = views = wide_embeddings(n, dim)
    halves = [ablated_loss(*pair, 0.1, "stop-gradient").total / 2 for pair in ((z_a, z_b), (z_b, z_a))]
    whole = gradients_of(barlow_twins_loss(*views, 0.1).total, views)
    torch.testing.assert_close(gradients_of(sum(halves), views), tuple(gradient / 2 for gradient in whole))


@pytest.mark.parametrize(("n", "dim"), SIZES)
def test_nothing_left_out_is_the_loss_bit_for_bit(n, dim):
    views = [view.float() for view in wide_embeddings(n, dim)]
    ours, theirs = ablated_loss(*views, 0.1, None), barlow_twins_loss(*views, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

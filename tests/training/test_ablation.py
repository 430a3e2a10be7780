import pytest
import torch

from barlow.training.ablation import ablated_loss
from barlow.training.loss import barlow_twins_loss

SIZES = [(24, 40), (40, 24)]  # the dual and the direct form


def embeddings(n, dim):
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


def gradients(total, views):
    return torch.autograd.grad(total, views, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize(("n", "dim"), SIZES)
def test_without_normalisation_the_matrix_is_of_the_raw_embeddings(n, dim):
    views = embeddings(n, dim)
    loss = ablated_loss(*views, 0.1, "normalisation")
    on_diagonal, off_diagonal = terms(*views)
    torch.testing.assert_close(loss, (on_diagonal + 0.1 * off_diagonal, on_diagonal, off_diagonal), check_dtype=False)
    torch.testing.assert_close(gradients(loss.total, views), gradients(on_diagonal + 0.1 * off_diagonal, views))


@pytest.mark.parametrize(("n", "dim"), SIZES)
def test_without_invariance_redundancy_reduction_alone_is_left(n, dim):
    views = embeddings(n, dim)
    loss = ablated_loss(*views, 0.1, "invariance")
    on_diagonal, off_diagonal = terms(*map(standardised, views))
    torch.testing.assert_close(loss, (0.1 * off_diagonal, on_diagonal, off_diagonal), check_dtype=False)
    torch.testing.assert_close(gradients(loss.total, views), gradients(0.1 * off_diagonal, views))


@pytest.mark.parametrize(("n", "dim"), SIZES)
def test_stop_gradient_leaves_view_a_its_gradient_and_view_b_none(n, dim):
    views = embeddings(n, dim)
    whole = barlow_twins_loss(*views, 0.1)
    loss = ablated_loss(*views, 0.1, "stop-gradient")
    torch.testing.assert_close(loss, whole)
    of_a, of_b = gradients(loss.total, views)
    torch.testing.assert_close(of_a, gradients(whole.total, views)[0])
    assert not of_b.any()


@pytest.mark.parametrize(("n", "dim"), SIZES)
def test_a_symmetrised_stop_gradient_is_half_of_the_whole_gradient(n, dim):
    """So it would be no other method under LARS, which a factor does not change."""
    z_a, z_b = views = embeddings(n, dim)
    halves = [ablated_loss(*pair, 0.1, "stop-gradient").total / 2 for pair in ((z_a, z_b), (z_b, z_a))]
    whole = gradients(barlow_twins_loss(*views, 0.1).total, views)
    torch.testing.assert_close(gradients(sum(halves), views), tuple(gradient / 2 for gradient in whole))


@pytest.mark.parametrize(("n", "dim"), SIZES)
def test_nothing_left_out_is_the_loss_bit_for_bit(n, dim):
    views = [view.float() for view in embeddings(n, dim)]
    ours, theirs = ablated_loss(*views, 0.1, None), barlow_twins_loss(*views, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

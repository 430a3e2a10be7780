"""`python benchmarks/loss.py`: the loss, forward and backward, against the paper's pseudo-code at the same size."""

import rounds
import torch

from barlow.loss import barlow_twins_loss


def paper_loss(z_a, z_b, lambd):
    """Algorithm 1 of the paper, in PyTorch, as a user would write it down."""
    n, dim = z_a.shape
    z_a_norm = (z_a - z_a.mean(0)) / z_a.std(0)
    z_b_norm = (z_b - z_b.mean(0)) / z_b.std(0)
    c = z_a_norm.T @ z_b_norm / n
    c_diff = (c - torch.eye(dim)).pow(2)
    off_diagonal = ~torch.eye(dim, dtype=torch.bool)
    return torch.where(off_diagonal, lambd * c_diff, c_diff).sum()


def step(loss, *views):
    views = [view.clone().requires_grad_() for view in views]
    loss(*views, 0.0051).backward()


if __name__ == "__main__":
    print(rounds.hardware())
    torch.manual_seed(0)
    for n, dim in [(64, 512), (256, 2048), (256, 8192), (1024, 2048)]:
        views = torch.randn(2, n, dim)
        rounds.compare(
            f"loss N={n} D={dim}",
            lambda views=views: step(lambda a, b, lambd: barlow_twins_loss(a, b, lambd).total, *views),
            lambda views=views: step(paper_loss, *views),
        )

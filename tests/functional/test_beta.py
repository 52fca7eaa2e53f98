import math

import numpy as np
import pytest
import torch
from torch.distributions import Beta, kl_divergence

from lit_align.functional.beta import (
    beta_around,
    beta_entropy,
    beta_kl,
    beta_log_prob,
    beta_mode,
    sample_beta,
)
from lit_align.functional.noise import keyed_generator, sample_generators

RTOL, ATOL = 1e-5, 1e-5
GRID = torch.cartesian_prod(
    torch.tensor([1.01, 1.5, 3.718, 13.18, 60.0]), torch.tensor([1.02, 2.649, 9.0, 40.0])
)
ALPHA, BETA = GRID.unbind(dim=1)


def test_log_prob_and_entropy_are_those_of_torch():
    x = torch.tensor([1e-3, 0.2, 0.5, 0.8, 1 - 1e-3])[:, None]
    found = beta_log_prob(x, ALPHA, BETA)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, Beta(ALPHA, BETA).log_prob(x), rtol=RTOL, atol=10 * ATOL)
    torch.testing.assert_close(
        beta_entropy(ALPHA, BETA), Beta(ALPHA, BETA).entropy(), rtol=RTOL, atol=10 * ATOL
    )


def test_divergence_is_that_of_torch_and_not_symmetric():
    other = (ALPHA.flip(0), BETA.flip(0))
    expected = kl_divergence(Beta(ALPHA, BETA), Beta(*other))
    torch.testing.assert_close(beta_kl(ALPHA, BETA, *other), expected, rtol=1e-4, atol=10 * ATOL)
    assert not torch.allclose(expected, kl_divergence(Beta(*other), Beta(ALPHA, BETA)))
    assert beta_kl(ALPHA, BETA, ALPHA, BETA).abs().max() < 10 * ATOL


# (a, b) as the head gives them at the start, and alpha = 1 + e^a, beta = 1 + e^b, mode, mean.
STARTS = [
    ((2.5, 1.0), 13.18, 3.718, 0.8176, 0.780),
    ((1.5, 0.5), 5.482, 2.649, 0.7311, 0.674),
    ((1.5, -0.7), 5.482, 1.497, 0.9002, 0.786),
]


@pytest.mark.parametrize(("logits", "alpha", "beta", "mode", "mean"), STARTS)
def test_mode_is_the_sigmoid_of_the_difference_and_the_peak_of_the_density(
    logits, alpha, beta, mode, mean
):
    shapes = 1 + torch.tensor(logits, dtype=torch.float64).exp()
    assert shapes.tolist() == pytest.approx([alpha, beta], abs=5e-3)
    found = beta_mode(*shapes)
    assert found.item() == pytest.approx(mode, abs=5e-5)
    assert found.item() == pytest.approx(1 / (1 + math.exp(logits[1] - logits[0])), abs=1e-12)
    grid = torch.linspace(0, 1, 2001, dtype=torch.float64)[1:-1]
    assert abs(grid[beta_log_prob(grid, *shapes).argmax()] - found) <= 1e-3
    assert (shapes[0] / shapes.sum()).item() == pytest.approx(mean, abs=1e-3)


def test_a_distribution_around_a_mode():
    modes = torch.tensor([0.1, 0.5, 0.97])
    alpha, beta = beta_around(modes, 20.0)
    torch.testing.assert_close(alpha + beta, torch.full_like(modes, 20.0))
    torch.testing.assert_close(beta_mode(alpha, beta), modes)


def test_draws_have_the_moments_of_the_distribution():
    count = 4000
    for alpha, beta in [(13.18, 3.718), (1.5, 9.0)]:
        shapes = torch.tensor([alpha, beta]).repeat(count, 1).T
        draws = sample_beta(*shapes, sample_generators("beta", 0, 0, range(count)))
        assert draws.dtype == torch.float32
        expected = Beta(alpha, beta)
        assert abs(draws.mean() - expected.mean) < 4 * (expected.variance / count).sqrt()
        assert draws.var().item() == pytest.approx(expected.variance.item(), rel=0.1)


def test_draws_belong_to_the_sample():
    """Not to its place in the batch, to the other samples, or to global generators."""

    def draw(positions):
        generators = sample_generators("beta", 0, 0, positions)
        alpha = 2.0 + torch.tensor(positions)
        return sample_beta(alpha, torch.full_like(alpha, 3.0), generators)

    whole = draw([0, 1, 2, 3])
    assert len(set(whole.tolist())) == 4
    torch.manual_seed(5)
    np.random.seed(5)
    assert torch.equal(draw([3, 1]), whole[[3, 1]])


def test_a_generator_goes_on_from_draw_to_draw():
    generator, ones = keyed_generator("beta"), torch.full((1,), 2.0)
    assert sample_beta(ones, ones, [generator]) != sample_beta(ones, ones, [generator])

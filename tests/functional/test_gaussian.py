import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from lit_align.functional.gaussian import gaussian_kl, gaussian_log_prob, sample_gaussian

RTOL = 1e-5


def test_log_prob_is_the_mean_density_of_torch():
    x, mean = torch.randn(2, 3, 4, 5, 5)
    std = torch.tensor([0.1, 1.0, 3.0])
    expected = Normal(mean, std.view(3, 1, 1, 1)).log_prob(x).mean(dim=(1, 2, 3))
    torch.testing.assert_close(gaussian_log_prob(x, mean, std), expected, rtol=RTOL, atol=0)


def test_log_prob_of_samples_has_the_expected_mean():
    # E[mean log p] = -1/2 - ln std - ln(2 pi) / 2, with standard error 1 / sqrt(2 D) per draw.
    draws, size, std = 400, 256, 0.3
    mean = torch.zeros(draws, size)
    x = sample_gaussian(mean, torch.full((draws,), std), torch.randn(draws, size))
    expected = -0.5 - math.log(std) - 0.5 * math.log(2 * math.pi)
    error = 1 / math.sqrt(2 * size * draws)
    measured = float(gaussian_log_prob(x, mean, torch.full((draws,), std)).mean())
    assert abs(measured - expected) < 4 * error


def test_no_gradient_flows_into_the_point():
    x = torch.randn(2, 3, requires_grad=True)
    mean = torch.zeros(2, 3, requires_grad=True)
    gaussian_log_prob(x, mean, torch.ones(2)).sum().backward()
    assert x.grad is None
    torch.testing.assert_close(mean.grad, x.detach() / 3)


def test_float64_is_kept():
    x = torch.randn(2, 3, dtype=torch.float64)
    std = torch.ones(2, dtype=torch.float64)
    assert gaussian_log_prob(x, x + 1, std).dtype == torch.float64


def test_kl_is_that_of_torch():
    mean, other = torch.randn(2, 3, 4, 5)
    std = torch.tensor([0.1, 1.0, 3.0])
    scale = std.view(3, 1, 1)
    expected = kl_divergence(Normal(mean, scale), Normal(other, scale)).mean(dim=(1, 2))
    torch.testing.assert_close(gaussian_kl(mean, other, std), expected, rtol=RTOL, atol=0)


@pytest.mark.parametrize("shape", [(4,), (4, 2), (4, 2, 3, 3)])
def test_std_broadcasts_over_any_shape(shape):
    mean, std = torch.zeros(shape), torch.arange(1.0, 5.0)
    sampled = sample_gaussian(mean, std, torch.ones(shape))
    assert torch.equal(sampled.flatten(1)[:, 0] if len(shape) > 1 else sampled, std)

import math

import pytest
import torch

from lit_align.functional.gaussian import gaussian_log_prob
from lit_align.functional.policy_gradient import (
    approx_kl,
    clip_fraction,
    clipped_surrogate,
    leaves_trust_region,
    normalised_log_ratio,
)

ATOL = 1e-6


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "gradient"),
    [
        (1.0, 1.0002, -1.0001, 0.0),  # already improved beyond the range: no gradient
        (1.0, 0.9, -0.9, -1.0),
        (-1.0, 1.0002, 1.0002, 1.0),
        (-1.0, 0.9, 0.9999, 0.0),
    ],
)
def test_four_clip_cases(advantage, ratio, loss, gradient):
    rho = torch.tensor([ratio], dtype=torch.float64, requires_grad=True)
    value = clipped_surrogate(rho, torch.tensor([advantage], dtype=torch.float64), 1e-4)
    value.sum().backward()
    assert value.item() == pytest.approx(loss, abs=1e-12)
    assert rho.grad.item() == gradient


def test_approx_kl_is_exact_for_known_ratios():
    log_ratio = torch.tensor([0.0, math.log(2.0), -math.log(2.0)])
    expected = torch.tensor([0.0, 1 - math.log(2.0), math.log(2.0) - 0.5])
    torch.testing.assert_close(approx_kl(log_ratio), expected, atol=ATOL, rtol=0)


def test_clip_fraction_counts_both_sides():
    ratio = torch.tensor([0.5, 0.99, 1.0, 1.01, 1.5])
    assert clip_fraction(ratio, 0.1).tolist() == [1, 0, 0, 0, 1]


def test_normalised_log_ratio_is_the_corrected_and_scaled_one():
    # log r = mean(z D / S - D^2 / (2 S^2)), so S (log r + mean(D^2) / (2 S^2)) = mean(z D)
    old, mean, noise = torch.randn(3, 5, 4, 8, 8, dtype=torch.float64)
    std = torch.tensor([0.01, 0.1, 0.3, 1.0, 2.0], dtype=torch.float64)
    x = old + std.view(-1, 1, 1, 1) * noise
    log_ratio = gaussian_log_prob(x, mean, std) - gaussian_log_prob(x, old, std)
    gap = mean - old
    expected = std * (log_ratio + gap.square().flatten(1).mean(1) / (2 * std.square()))
    found = normalised_log_ratio(x, mean, old, std)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(found, (noise * gap).flatten(1).mean(1), atol=1e-12, rtol=1e-10)


def test_normalised_log_ratios_average_to_zero_and_plain_ones_below():
    draws, size, std = 4000, 16, torch.tensor(0.1, dtype=torch.float64)
    old, gap = torch.zeros(draws, size).double(), 0.02 * torch.randn(size).double()
    noise, spread = torch.randn(draws, size).double(), std.expand(draws)
    x = old + std * noise
    plain = gaussian_log_prob(x, old + gap, spread) - gaussian_log_prob(x, old, spread)
    norm = normalised_log_ratio(x, old + gap, old, spread)
    size_of_gap = gap.square().mean()
    error = 4 * (size_of_gap / size / draws).sqrt()  # four standard errors of mean(z D)
    assert norm.mean().abs() < error
    shift = -size_of_gap / (2 * std.square())
    assert (plain.mean() - shift).abs() < error / std
    assert shift.abs() > error / std
    spread_of = norm.std() / (size_of_gap / size).sqrt()
    assert spread_of.item() == pytest.approx(1, abs=0.05)  # without S


def test_a_trust_region_is_left_only_in_the_direction_that_is_asked_for():
    cases = {  # advantage, ratio: whether beyond the threshold it is masked
        (1.0, 1.1): True,
        (1.0, 0.9): False,  # on its way back
        (-1.0, 1.1): False,
        (-1.0, 0.9): True,
        (1.0, 1.0): False,
        (0.0, 1.1): False,
    }
    advantages, ratios = torch.tensor(list(cases)).T
    beyond = leaves_trust_region(torch.full((6,), 2e-5), ratios, advantages, 1e-5)
    assert beyond.tolist() == list(cases.values())
    for divergence in (0.9e-5, 1e-5):
        assert not leaves_trust_region(torch.full((6,), divergence), ratios, advantages, 1e-5).any()

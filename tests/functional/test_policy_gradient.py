import math

import pytest
import torch

from lit_align.functional.policy_gradient import approx_kl, clip_fraction, clipped_surrogate

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

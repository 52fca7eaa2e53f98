import math

import pytest
import torch

from lit_align.functional.penalty import AdaptiveCoefficient, divergence_penalty

D = torch.tensor([-0.5, 0.0, 0.2])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("kl", [-0.5, 0, 0.2]),
        ("abs", [0.5, 0, 0.2]),
        ("square", [0.125, 0, 0.02]),
        ("clip", [0, 0, 0.2]),
        ("approx", [math.exp(0.5) - 1.5, 0, math.exp(-0.2) - 0.8]),
    ],
)
def test_penalties_by_hand(kind, expected):
    torch.testing.assert_close(divergence_penalty(D, kind), torch.tensor(expected))


@pytest.mark.parametrize("kind", ["kl", "approx", "js"])
def test_estimates_are_unbiased_at_samples_of_the_policy(kind):
    """p = N(0, 1), reference N(m, 1): KL = m^2 / 2; the Jensen-Shannon divergence by quadrature."""
    m = 0.8
    samples = torch.randn(400_000, generator=torch.Generator().manual_seed(0)).double()
    d = m**2 / 2 - m * samples
    x = torch.linspace(-9, 10, 20_001).double()
    p, q = (torch.exp(-((x - c) ** 2) / 2) / math.sqrt(2 * math.pi) for c in (0, m))
    mean = (p + q) / 2
    shannon = torch.trapezoid(p * (p / mean).log() / 2 + q * (q / mean).log() / 2, x).item()
    expected = {"kl": m**2 / 2, "approx": m**2 / 2, "js": shannon}[kind]
    assert divergence_penalty(d, kind).mean().item() == pytest.approx(expected, rel=0.01)


def test_penalties_that_cannot_be_negative():
    d = torch.linspace(-5, 5, 101)
    for kind in ("abs", "square", "clip", "approx"):
        assert divergence_penalty(d, kind).min() >= 0
    with pytest.raises(ValueError, match="`kl_kind` must be kl, abs, .* got 'k3'"):
        divergence_penalty(d, "k3")


def test_the_coefficient_steers_to_its_target():
    coefficient = AdaptiveCoefficient(0.2, target=0.1, horizon=2000)
    coefficient.update(0.11, 256)  # 10 % above
    assert coefficient.value == pytest.approx(0.2 * (1 + 0.1 * 256 / 2000))
    coefficient = AdaptiveCoefficient(0.2, target=0.1, horizon=2000)
    coefficient.update(5.0, 256)  # an error counts 20 % at most
    assert coefficient.value == pytest.approx(0.2 * (1 + 0.2 * 256 / 2000))
    coefficient.update(0.0, 256)
    assert coefficient.value == pytest.approx(0.2 * (1 + 0.0256) * (1 - 0.0256))
    restored = AdaptiveCoefficient(0.2)
    restored.load_state_dict(coefficient.state_dict())
    assert restored.value == coefficient.value
    restored.update(7.0, 256)  # without a target it is constant
    assert restored.value == coefficient.value
    with pytest.raises(ValueError, match="must be positive, got 0.1, 0 and 2000"):
        AdaptiveCoefficient(0.1, target=0)

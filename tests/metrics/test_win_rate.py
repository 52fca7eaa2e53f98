import math

import pytest
import torch

from lit_align.metrics import WinRate
from lit_align.metrics.win_rate import cluster_bootstrap, sign_test


def test_prompts_weigh_equally_and_ties_half():
    # Prompt 5: win, tie, loss: 1/2. Prompt 9: win: 1. NaN pairs do not count.
    metric = WinRate(replicates=200)
    nan = math.nan
    metric.update(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 1.0]), torch.tensor([5, 5]))
    metric.update(
        torch.tensor([0.0, 3.0, nan, 4.0]),
        torch.tensor([1.0, 2.0, 0.0, nan]),
        torch.tensor([5, 9, 9, 11]),
    )
    result = metric.compute()
    assert result["rate"].item() == pytest.approx(0.75)
    assert result["count"].item() == 4
    # Two of the four equally likely resamples are (5, 9) and (9, 5); the others give 1/2 and 1.
    assert (result["low"].item(), result["high"].item()) == (0.5, 1)
    # 2 wins, 1 loss: 2 * (C(3, 0) + C(3, 1)) / 8 = 1
    assert result["p_value"].item() == 1


def test_nothing_to_compare_is_nan():
    metric = WinRate()
    metric.update(torch.tensor([math.nan]), torch.tensor([0.0]), torch.tensor([0]))
    result = metric.compute()
    assert result.pop("count").item() == 0
    assert all(value.isnan() for value in result.values())


@pytest.mark.parametrize(
    ("wins", "losses", "expected"),
    [
        (5, 0, 2 / 32),
        (0, 5, 2 / 32),
        (8, 2, 2 * (1 + 10 + 45) / 1024),
        (3, 3, 1.0),
        (0, 0, 1.0),
    ],
)
def test_sign_test_by_counting(wins, losses, expected):
    assert sign_test(wins, losses) == pytest.approx(expected)


def test_the_normal_approximation_continues_the_exact_test():
    # One more comparison crosses from the exact test to the approximation.
    assert sign_test(541, 460) == pytest.approx(sign_test(540, 460), rel=0.1)
    assert sign_test(540, 461) == pytest.approx(sign_test(540, 460), rel=0.1)
    # z = (600 - 1) / sqrt(10000) = 5.99
    assert sign_test(5300, 4700) == pytest.approx(math.erfc(5.99 / 2**0.5))


def test_the_interval_covers_the_truth_as_often_as_it_says():
    # A prompt's chance of a win is uniform in (0.4, 0.8), its 4 images share it: the truth is 0.6.
    generator = torch.Generator().manual_seed(0)
    chances = 0.4 + 0.4 * torch.rand(200, 60, 1, generator=generator)
    wins = (torch.rand(200, 60, 4, generator=generator) < chances).double()
    covered = 0
    for means in wins.mean(2):
        low, high = cluster_bootstrap(means, replicates=300)
        covered += low <= 0.6 <= high
    assert 0.90 <= covered / 200 <= 0.99


def test_the_interval_follows_prompts_not_samples():
    # All 50 images of a prompt agree: 8 independent outcomes, not 400.
    ids = torch.arange(400) // 50
    aligned = (ids % 2).float()
    whole, split = WinRate(replicates=1000), WinRate(replicates=1000)
    whole.update(aligned, torch.full_like(aligned, 0.5), ids)
    split.update(aligned, torch.full_like(aligned, 0.5), torch.arange(400))
    wide, narrow = (r["high"] - r["low"] for r in (whole.compute(), split.compute()))
    # Standard errors 0.5 / sqrt(8) and 0.5 / sqrt(400), a ratio of sqrt(50) = 7.1
    assert 5 < wide / narrow < 9


def test_confidence_widens_the_interval_and_chunks_do_not_matter(monkeypatch):
    means = torch.rand(30, dtype=torch.float64)
    low, high = cluster_bootstrap(means, replicates=500, confidence=0.5)
    wider = cluster_bootstrap(means, replicates=500, confidence=0.99)
    assert wider[0] < low < means.mean() < high < wider[1]
    monkeypatch.setattr("lit_align.metrics.win_rate._CHUNK", 64)
    assert cluster_bootstrap(means, replicates=500, confidence=0.5) == (low, high)


def test_the_bootstrap_has_its_own_generator():
    means, state = torch.rand(10), torch.get_rng_state()
    intervals = [cluster_bootstrap(means, replicates=50, seed=seed) for seed in (0, 0, 1)]
    assert intervals[0] == intervals[1] != intervals[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"must all be \[B\]"):
        WinRate().update(torch.zeros(2), torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match="`replicates` must be at least 1"):
        WinRate(replicates=0)
    with pytest.raises(ValueError, match=r"`confidence` must lie in \(0, 1\), got 95"):
        WinRate(confidence=95)

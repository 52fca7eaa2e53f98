import math

import numpy as np
import pytest
import torch

from lit_align.metrics import RewardMoments

ATOL = 1e-12


def test_two_rewards_by_hand():
    # a = (1, 2, 3): mean 2, std 1. b = (1, 3, 2): mean 2, std 1; covariance
    # ((-1)(-1) + 0*1 + 1*0) / 2 = 1/2, hence correlation 1/2.
    metric = RewardMoments(["a", "b"])
    metric.update(torch.tensor([[1.0, 1.0], [2.0, 3.0]]))
    metric.update(torch.tensor([[3.0, 2.0]]))
    result = metric.compute()
    assert result["mean"].tolist() == [2, 2]
    assert result["std"].tolist() == pytest.approx([1, 1])
    assert result["count"].tolist() == [3, 3]
    expected = torch.tensor([[1, 0.5], [0.5, 1]], dtype=torch.float64)
    torch.testing.assert_close(result["correlation"], expected)


def test_missing_scores_are_left_out_pair_by_pair():
    rewards = torch.randn(200, 3, dtype=torch.float64)
    rewards[:, 1] += 0.7 * rewards[:, 0]
    rewards[torch.rand(200, 3) < 0.3] = torch.nan
    metric = RewardMoments(["a", "b", "c"])
    metric.update(rewards)
    result, values = metric.compute(), rewards.numpy()
    np.testing.assert_allclose(result["mean"], np.nanmean(values, 0), atol=ATOL)
    np.testing.assert_allclose(result["std"], np.nanstd(values, 0, ddof=1), atol=ATOL)
    for i in range(3):
        for j in range(3):
            both = values[~np.isnan(values[:, [i, j]]).any(1)]
            expected = np.corrcoef(both[:, i], both[:, j])[0, 1]
            assert result["correlation"][i, j].item() == pytest.approx(expected, abs=ATOL)


def test_a_small_spread_on_a_large_mean_keeps_its_digits():
    values = 1000 + 0.01 * torch.randn(500, 2, dtype=torch.float64)
    metric = RewardMoments(["a", "b"])
    metric.update(values)
    torch.testing.assert_close(metric.compute()["std"], values.std(0), rtol=1e-4, atol=0)


def test_undefined_moments_are_nan():
    metric = RewardMoments(["constant", "once", "never", "fine"])
    nan = math.nan
    metric.update(torch.tensor([[0.7, 5.0, nan, 1.0]], dtype=torch.float64))
    for _ in range(299):  # sums of 0.7 are rounded: without a threshold it would seem to vary
        metric.update(torch.tensor([[0.7, nan, nan, 2.0]], dtype=torch.float64))
    result = metric.compute()
    assert result["count"].tolist() == [300, 1, 0, 300]
    assert result["std"].isnan().tolist() == [False, True, True, False]
    assert result["std"][0] == 0
    assert result["mean"].isnan().tolist() == [False, False, True, False]
    defined = ~result["correlation"].isnan()
    assert defined.nonzero().tolist() == [[3, 3]]


def test_bad_shapes_and_names_are_told():
    with pytest.raises(ValueError, match=r"must be \[B, 2\].*got \[4, 3\]"):
        RewardMoments(["a", "b"]).update(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="`names` must be distinct"):
        RewardMoments(["a", "a"])

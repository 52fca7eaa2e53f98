"""Accuracy with ties and calibration, kept over batches."""

import math

import pytest
import torch

from lit_align.functional.reward_modeling import reliability, tie_threshold
from lit_align.metrics import Calibration, TieAwareAccuracy

DELTA = torch.tensor([0.1, 0.2, 0.3, -1.0, 2.0])
LABELS = torch.tensor([0.5, 1.0, 0.5, 1.0, 1.0])


def fed(metric, delta=DELTA, labels=LABELS, cut=2):
    metric.update(delta[:cut], labels[:cut])
    metric.update(delta[cut:], labels[cut:])
    return metric.compute()


def test_a_case_by_hand():
    """Without ties 2 of 3 are right; calling |delta| <= 0.1 a tie gets 3 of 5."""
    found = fed(TieAwareAccuracy())
    assert found["accuracy"].item() == pytest.approx(2 / 3)
    assert found["accuracy_with_ties"].item() == pytest.approx(3 / 5)
    assert found["tie_threshold"].item() == pytest.approx(0.1)
    assert found["count"] == 5


def test_a_given_threshold_is_not_fitted():
    found = fed(TieAwareAccuracy(threshold=1.5))
    assert found["accuracy_with_ties"].item() == pytest.approx(3 / 5)  # two ties and the last
    assert found["tie_threshold"] == 1.5
    with pytest.raises(ValueError, match=r"`threshold` must not be negative, got -1"):
        TieAwareAccuracy(threshold=-1)


def test_batches_add_up():
    delta, labels = torch.randn(100), torch.randint(3, (100,)) / 2
    found = fed(TieAwareAccuracy(), delta, labels, cut=37)
    assert found["accuracy_with_ties"].item() == pytest.approx(
        tie_threshold(delta, labels).accuracy
    )
    curve = fed(Calibration(bins=5), delta, labels, cut=37)
    expected = reliability(delta, labels, 5)
    assert curve["ece"].item() == pytest.approx(expected.error())
    assert curve["judgements"].tolist() == expected.judgements.tolist()


def test_nan_is_left_out_and_nothing_is_nan():
    metric = TieAwareAccuracy()
    metric.update(torch.tensor([torch.nan, 1.0]), torch.ones(2))
    assert metric.compute()["count"] == 1
    for empty, name in ((TieAwareAccuracy(), "accuracy"), (Calibration(), "ece")):
        empty.update(torch.zeros(0), torch.zeros(0))
        assert math.isnan(empty.compute()[name])


def test_confident_and_always_wrong():
    """Two judgements at sigmoid(2) = 0.881 that never come true."""
    found = fed(Calibration(), torch.tensor([-2.0, -2.0]), torch.ones(2), cut=1)
    assert found["ece"].item() == pytest.approx(1 / (1 + math.exp(-2)))


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"must both be \[N\], got \[\[2, 1\], \[2\]\]"):
        Calibration().update(torch.zeros(2, 1), torch.zeros(2))
    with pytest.raises(ValueError, match=r"`labels` must lie in \[0, 1\], got \[2.0\]"):
        TieAwareAccuracy().update(torch.zeros(1), torch.tensor([2.0]))
    with pytest.raises(ValueError, match=r"`bins` must be at least 1, got 0"):
        Calibration(bins=0)

"""Losses of reward models against numbers worked out by hand."""

import math

import pytest
import torch

from lit_align.functional.reward_modeling import (
    accuracy_with_ties,
    accuracy_without_ties,
    bradley_terry,
    bradley_terry_ties,
    masked_mean,
    plackett_luce,
    ranking_pairs,
    reliability,
    scaled_bradley_terry,
    tie_probabilities,
    tie_threshold,
)

ATOL = 1e-12
LOG_2 = 0.693147180559945
DELTA = torch.tensor([-2.0, 0.0, 0.7], dtype=torch.float64)
ZERO = torch.zeros(1, dtype=torch.float64)


def close(value, expected, atol=ATOL):
    torch.testing.assert_close(
        value, torch.as_tensor(expected, dtype=value.dtype), atol=atol, rtol=0
    )


@pytest.mark.parametrize("label", [0.0, 0.3, 0.5, 1.0])
def test_bradley_terry_starts_at_log_2(label):
    close(bradley_terry(ZERO, label), [LOG_2])


def test_bradley_terry_is_the_cross_entropy_of_two_scores():
    scores = torch.tensor([[0.3, -1.1], [2.0, 2.5]], dtype=torch.float64)
    zeros = torch.zeros(2, dtype=torch.int64)
    expected = torch.nn.functional.cross_entropy(scores, zeros, reduction="none")
    close(bradley_terry(scores[:, 0] - scores[:, 1]), expected)


@pytest.mark.parametrize("loss", [bradley_terry, lambda d, p: bradley_terry_ties(d, p, 5.0)])
def test_swapping_the_images_swaps_the_label(loss):
    for label in (0.0, 0.2, 0.5, 1.0):
        close(loss(DELTA, label), loss(-DELTA, 1 - label))


def test_bradley_terry_is_antisymmetric():
    """L(d) - L(-d) = -d, L(d) + L(-d) >= 2 log 2."""
    close(bradley_terry(DELTA) - bradley_terry(-DELTA), -DELTA)
    assert (bradley_terry(DELTA) + bradley_terry(-DELTA) >= 2 * LOG_2 - ATOL).all()


def test_gradient_of_bradley_terry():
    delta = DELTA.clone().requires_grad_()
    bradley_terry(delta).sum().backward()
    close(delta.grad, -torch.sigmoid(-DELTA))


def test_a_soft_tie_has_no_gradient_at_equal_scores():
    delta = ZERO.clone().requires_grad_()
    bradley_terry(delta, 0.5).sum().backward()
    close(delta.grad, [0.0])


def test_soft_labels_have_their_optimum_at_their_log_odds():
    delta = torch.tensor([math.log(0.8 / 0.2)], dtype=torch.float64, requires_grad=True)
    bradley_terry(delta, 0.8).sum().backward()
    close(delta.grad, [0.0])


def test_margin_shifts_and_scale_multiplies():
    close(bradley_terry(DELTA, margin=0.57), bradley_terry(DELTA - 0.57))
    close(scaled_bradley_terry(DELTA, torch.full_like(DELTA, 0.3)), 0.3 * bradley_terry(DELTA))


def test_losses_stay_finite_where_a_sigmoid_is_zero():
    far = torch.tensor([-1e4, 1e4])
    for loss in (bradley_terry(far), bradley_terry_ties(far, 1.0), bradley_terry_ties(far, 0.5)):
        assert loss.isfinite().all()
        assert loss.dtype == torch.float32


def test_ties_at_equal_scores():
    """log 6 = 1.791759 and -log(24 / 36) = 0.405465."""
    close(bradley_terry_ties(ZERO, 1.0, 5.0), [math.log(6)])
    close(bradley_terry_ties(ZERO, 0.5, 5.0), [-math.log(24 / 36)])
    assert bradley_terry_ties(ZERO, 1.0).item() == pytest.approx(1.791759, abs=1e-6)
    assert bradley_terry_ties(ZERO, 0.5).item() == pytest.approx(0.405465, abs=1e-6)


def test_probabilities_of_outcomes():
    chances = tie_probabilities(DELTA, 5.0)
    close(chances.sum(-1), torch.ones(3))
    for place, label in enumerate((1.0, 0.5, 0.0)):
        close(bradley_terry_ties(DELTA, label, 5.0), -chances[:, place].log())


def test_the_loss_of_a_tie_is_even():
    close(bradley_terry_ties(DELTA, 0.5), bradley_terry_ties(-DELTA, 0.5))


def test_labels_between_mix_wins_and_ties():
    mixed = (bradley_terry_ties(DELTA, 1.0) + bradley_terry_ties(DELTA, 0.5)) / 2
    close(bradley_terry_ties(DELTA, 0.75), mixed)


def test_without_ties_the_loss_of_a_preference_is_bradley_terry():
    close(bradley_terry_ties(DELTA, 1.0, 1 + 1e-9), bradley_terry(DELTA), atol=1e-8)
    with pytest.raises(ValueError, match=r"`theta` must be above 1, got 1.0; without ties use"):
        bradley_terry_ties(DELTA, 1.0, 1.0)


def test_plackett_luce_of_two_is_bradley_terry():
    scores = torch.tensor([[0.3, -1.1], [2.0, 2.5]], dtype=torch.float64)
    delta = scores[:, 0] - scores[:, 1]
    close(plackett_luce(scores, torch.tensor([[1.0, 2.0], [2.0, 1.0]])),
          bradley_terry(delta, torch.tensor([1.0, 0.0])))  # fmt: skip
    close(plackett_luce(scores, torch.ones(2, 2)), 2 * bradley_terry(delta, 0.5))


def plackett_luce_by_hand(scores, ranks):
    """Sum over images of log(sum of the exponents of those not ranked better) minus its score."""
    total = 0.0
    for score, rank in zip(scores, ranks, strict=True):
        rivals = [s for s, r in zip(scores, ranks, strict=True) if r and r >= rank]
        total += math.log(sum(map(math.exp, rivals))) - score if rank else 0.0
    return total


@pytest.mark.parametrize("ranks", [[2, 1, 3, 4], [1, 2, 2, 4], [2, 1, 1, 0], [1, 2, 0, 0]])
def test_plackett_luce_against_a_loop(ranks):
    scores = [0.3, -1.0, 2.0, 0.5]
    found = plackett_luce(torch.tensor([scores], dtype=torch.float64), torch.tensor([ranks]))
    close(found, [plackett_luce_by_hand(scores, ranks)])


def test_equal_scores_are_one_of_all_orders():
    ranks = torch.tensor([[1.0, 2.0, 3.0, 0.0]])
    close(plackett_luce(torch.zeros(1, 4, dtype=torch.float64), ranks), [math.log(6)])


def test_absent_images_get_no_gradient():
    scores = torch.tensor([[0.3, -1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    plackett_luce(scores, torch.tensor([[2.0, 1.0, 0.0]])).sum().backward()
    assert scores.grad[0, 2] == 0
    assert scores.grad.isfinite().all()
    assert scores.grad[0, 0] > 0


def test_pairs_of_a_ranking():
    scores = torch.tensor([[3.0, 1.0, 0.0, 9.0]])
    delta, labels = ranking_pairs(scores, torch.tensor([[1.0, 2.0, 1.0, 0.0]]))
    close(delta, [2.0, 3.0, 1.0])
    close(labels, [1.0, 0.5, 0.0])


def test_masked_axes_give_no_gradient_and_do_not_dilute():
    scores = torch.tensor([[1.0, 7.0], [0.0, 2.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 0], [1, 1]])
    mean = masked_mean(bradley_terry(scores), mask)
    close(mean.detach(), (bradley_terry(torch.tensor([1.0, 0, 2]).double()).sum() / 3))
    mean.backward()
    assert scores.grad[0, 1] == 0
    close(scores.grad[1, 0], -0.5 / 3)
    assert masked_mean(scores, torch.zeros(2, 2)) == 0
    assert masked_mean(torch.tensor([torch.nan, 1.0]), torch.tensor([0, 1])) == 1


def test_parts_of_a_batch_add_up_to_its_mean():
    losses, weights = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([1.0, 0.5, 2.0])
    parts = [masked_mean(losses[i : i + 1], weights[i : i + 1], 3.5) for i in range(3)]
    close(sum(parts), masked_mean(losses, weights), atol=1e-6)


def test_threshold_of_ties_on_a_case_by_hand():
    """Ties at |d| = 0.1 and 0.3, wins at 0.2, 1 and 2, one of them wrong.

    eps = 0: 2 of 5; 0.1: tie + 0.2 + 2 = 3; 0.2: 2; 0.3: two ties + 2 = 3; 1: 3.
    """
    delta = torch.tensor([0.1, 0.2, 0.3, -1.0, 2.0])
    labels = torch.tensor([0.5, 1.0, 0.5, 1.0, 1.0])
    found = tie_threshold(delta, labels)
    assert found.threshold == pytest.approx(0.1)
    assert found.accuracy == pytest.approx(3 / 5)
    assert accuracy_with_ties(delta, labels, 0.15) == pytest.approx(3 / 5)
    assert accuracy_with_ties(delta, labels, 0.0) == pytest.approx(2 / 5)


def test_threshold_of_ties_against_all_candidates():
    delta = torch.randn(200).mul(8).round() / 8  # with repetitions
    labels = torch.randint(3, (200,)) / 2
    brute = max(accuracy_with_ties(delta, labels, eps) for eps in [0.0, *delta.abs().tolist()])
    found = tie_threshold(delta, labels)
    assert found.accuracy == pytest.approx(brute)
    assert accuracy_with_ties(delta, labels, found.threshold) == pytest.approx(brute)


def test_accuracy_without_ties():
    delta = torch.tensor([1.0, -1.0, 0.0, 5.0])
    assert accuracy_without_ties(delta, torch.tensor([1.0, 1.0, 1.0, 0.5])) == 0.5
    assert math.isnan(accuracy_without_ties(delta[:1], torch.tensor([0.5])))
    assert math.isnan(tie_threshold(delta[:0], delta[:0]).accuracy)


def test_reliability_of_three_judgements():
    """Confidences 0.731 (right), 0.731 (wrong), 0.881 (right): bins 2 and 3 of four."""
    curve = reliability(torch.tensor([1.0, -1.0, 2.0]), torch.ones(3), bins=4)
    assert curve.judgements.tolist() == [0, 2, 0, 1]
    sure, surer = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-2))
    close(curve.confidence[[1, 3]], [sure, surer])
    close(curve.accuracy[[1, 3]], [0.5, 1.0])
    assert curve.error() == pytest.approx((2 * abs(sure - 0.5) + abs(surer - 1)) / 3)


def test_a_calibrated_model_has_no_calibration_error():
    """Labels that are the model's own probabilities agree exactly as often as it is sure."""
    delta = torch.linspace(-3, 3, 61).double()
    assert reliability(delta, delta.sigmoid()).error() == pytest.approx(0, abs=1e-12)

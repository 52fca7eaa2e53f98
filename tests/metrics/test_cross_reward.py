import math
import warnings

import pytest
import torch

from lit_align.metrics import CrossRewardGeneralization, joint_rates, proxy_correlation
from lit_align.metrics.cross_reward import (
    at_level,
    end_slope,
    first_passage,
    gao_fit,
    hypervolume,
    summarize,
)

# A held-out reward that peaks at g = 1 and is nearly lost again at g = 2.
GAIN = torch.tensor([0, 0.5, 1, 1.5, 2], dtype=torch.float64)
PEAKED = torch.tensor([0, 0.3, 0.5, 0.4, 0.1], dtype=torch.float64)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def filled(gain, *held_out, kl=None, **options):
    """Return a metric whose gains are those given: base means 10, base stds 2."""
    names = [f"k{number}" for number in range(len(held_out))]
    metric = CrossRewardGeneralization("target", names, **options)
    for step, row in enumerate(torch.stack([gain, *held_out], dim=1)):
        # Only the base's spread is a unit: those of later points must not matter.
        stds = torch.full_like(row, 2 if step == 0 else 5)
        divergence = math.nan if kl is None else float(kl[step])
        metric.update(10 + 2 * row, stds, queries=100 * step, kl=divergence)
    return metric


def test_a_peaked_curve_by_hand():
    result = filled(GAIN, PEAKED).compute()
    # slope = (.15 + .5 + .6 + .2) / (.25 + 1 + 2.25 + 4) = 1.45 / 7.5
    assert result["slope/k0"].item() == pytest.approx(1.45 / 7.5)
    # integral of h over (0, 2) = .5 * (.3/2 + .8/2 + .9/2 + .5/2) = 0.625; times 2 / 2^2
    assert result["auc/k0@2"].item() == pytest.approx(0.3125)
    assert result["gap/k0"].item() == pytest.approx(0.4)
    assert result["retention/k0@2"].item() == pytest.approx(0.2)  # .1 of .5
    assert result["retention/k0@1"].item() == pytest.approx(1)
    assert result["ood_at/k0@0.5"].item() == pytest.approx(0.3)
    assert result["onset/k0"].item() == pytest.approx(1)
    assert result["early_peak/k0"].item() == 1
    # rectangles: 2 * .1, and above them 1.5 * (.4 - .1), and 1 * (.5 - .4)
    assert result["hv"].item() == pytest.approx(0.75)
    assert result["hv_min"].item() == pytest.approx(0.75)
    assert not any(key.startswith("gao") for key in result)


@pytest.mark.parametrize("slope", [0.25, 1.0])
def test_a_straight_line_keeps_all_and_its_area_is_its_slope(slope):
    gain = torch.linspace(0, 2, 9, dtype=torch.float64)
    result = filled(gain, slope * gain).compute()
    for key in ("slope/k0", "end_slope/k0", "auc/k0@0.5", "auc/k0@1", "auc/k0@2"):
        assert result[key].item() == pytest.approx(slope), key
    for level in (0.5, 1.0, 2.0):
        assert result[f"ood_at/k0@{level:g}"].item() == pytest.approx(slope * level)
        assert result[f"retention/k0@{level:g}"].item() == pytest.approx(1)
    assert result["gap/k0"].item() == pytest.approx(0)
    assert result["onset/k0"].item() == pytest.approx(2)  # still rising: the largest g
    assert result["early_peak/k0"].item() == 0


def test_levels_that_are_never_reached_are_nan():
    result = filled(GAIN, PEAKED, levels=(1.75, 2.25)).compute()
    for key in ("ood_at", "retention", "auc"):
        assert result[f"{key}/k0@1.75"].isfinite(), key
        assert result[f"{key}/k0@2.25"].isnan(), key


def test_first_passage_reads_each_level_once():
    # g falls back from 1 and wavers below it before it reaches 2: levels up to 1 are read on the
    # first rise, h = 0.6 g; those above on the line from (0.5, -1) to (2, 0.5), h = g - 1.5.
    gain, held_out = tensor(0, 1, 0.4, 0.5, 2), tensor(0, 0.6, 3, -1, 0.5)
    ends, heights = first_passage(gain, held_out, 2.0)
    assert ends.tolist() == [[0, 1], [1, 2]]
    torch.testing.assert_close(heights, tensor(0, 0.6, -0.5, 0.5).reshape(2, 2))
    value, retention, area = at_level(gain, held_out, 1.5)
    assert value.item() == pytest.approx(0)
    assert retention.item() == pytest.approx(0)
    # .6 / 2 on (0, 1); then -(.5 * .5) / 2 on (1, 1.5)
    assert area.item() == pytest.approx((0.3 - 0.125) * 2 / 1.5**2)


def test_retention_of_a_curve_that_never_rose_is_nan():
    value, retention, area = at_level(GAIN, -PEAKED, 1.0)
    assert value.item() == pytest.approx(-0.5)
    assert retention.isnan()
    assert area.item() < 0


def test_the_end_slope_sees_the_last_points_only():
    # 0.7 * 2 = 1.4: only two points are beyond.
    assert end_slope(GAIN, PEAKED).isnan()
    gain = tensor(0, 1, 1.6, 1.8, 2)
    held_out = tensor(0, 5, 0.4, 0.3, 0.2)  # falls by 0.1 per 0.2 at the end
    assert end_slope(gain, held_out).item() == pytest.approx(-0.5)
    assert end_slope(-gain, held_out).isnan()  # the target never rose
    assert end_slope(tensor(0, 0, 0), tensor(0, 1, 2)).isnan()
    assert end_slope(tensor(0, 2, 2, 2), held_out[:4]).isnan()  # no spread in g


def test_a_small_loss_is_no_early_peak():
    held_out = tensor(0, 0.5, 0.75)
    late = torch.cat([held_out, tensor(0.5)])  # has lost exactly 0.25
    for margin, expected in ((0.25, 1), (0.26, 0)):
        assert summarize(tensor(0, 1, 2, 3), late, (), margin)["early_peak"] == expected


def test_hypervolume_of_two_rewards_uses_mean_and_minimum():
    result = filled(GAIN, GAIN, 0 * GAIN + tensor(0, 1, 1, 1, 1)).compute()
    # mean = (0, .75, 1, 1.25, 1.5), rising with g: 2 * 1.5; minimum (0, .5, 1, 1, 1): 2 * 1
    assert result["hv"].item() == pytest.approx(3)
    assert result["hv_min"].item() == pytest.approx(2)


def test_hypervolume_ignores_what_is_not_positive():
    assert hypervolume(tensor(0, -1, 1, 2), tensor(0, 1, -1, math.nan)).item() == 0
    # (1, 2) and (3, 1): 3 * 1 + 1 * (2 - 1); (0.5, 1.5) is dominated by the first
    assert hypervolume(tensor(0, 1, 0.5, 3), tensor(0, 2, 1.5, 1)).item() == pytest.approx(4)


def test_the_law_of_over_optimisation_is_recovered():
    d = tensor(0.5, 1, 2, 3, 5)
    alpha, beta, peak = gao_fit(d, d * (1 - 0.5 * d.log()))
    assert alpha.item() == pytest.approx(1)
    assert beta.item() == pytest.approx(0.5)
    assert peak.item() == pytest.approx(math.e)  # exp(1 / 0.5 - 1)
    alpha, beta, peak = gao_fit(d, d * (2 - 0.25 * d), form="bon")
    assert (alpha.item(), beta.item(), peak.item()) == pytest.approx((2, 0.25, 4))


def test_the_law_without_a_peak_or_enough_points():
    d = tensor(1, 2, 4)
    alpha, beta, peak = gao_fit(d, d * (1 + 0.5 * d.log()))
    assert (alpha.item(), beta.item()) == pytest.approx((1, -0.5))
    assert peak.isnan()
    assert all(value.isnan() for value in gao_fit(tensor(2, 2, 2), tensor(1, 2, 3)))


def test_the_law_is_fitted_if_three_points_have_a_divergence():
    kl = tensor(0, 1, 4, 9, math.nan)  # d = 1, 2, 3; the base has none, the last is unknown
    score = torch.cat([tensor(0), (d := tensor(1, 2, 3)) * (1 - 0.5 * d.log()), tensor(7)])
    result = filled(GAIN, score, kl=kl).compute()
    for key, expected in (("alpha", 1), ("beta", 0.5), ("dstar", math.e)):
        assert result[f"gao/{key}"].item() == pytest.approx(expected), key
    fewer = filled(GAIN, score, kl=tensor(0, 1, 4, math.nan, math.inf)).compute()
    assert "gao/alpha" not in fewer


def test_the_base_alone_has_no_curve():
    result = filled(tensor(0), tensor(0)).compute()
    zero = {"gap/k0", "onset/k0", "early_peak/k0", "hv", "hv_min"}
    for key, value in result.items():
        assert (value == 0) if key in zero else value.isnan(), key
    assert zero < set(result)


def test_points_are_in_units_of_the_base():
    metric = filled(GAIN, PEAKED, -PEAKED)
    points = metric.points
    torch.testing.assert_close(points["gain"], GAIN)
    torch.testing.assert_close(points["held_out_gains"], torch.stack([PEAKED, -PEAKED], dim=1))
    assert points["queries"].tolist() == [0, 100, 200, 300, 400]
    assert points["kl"].isnan().all()
    assert points["diversity"].isnan().all()


def test_points_that_could_not_be_scored_are_left_out():
    whole = filled(GAIN, PEAKED).compute()
    gain = torch.cat([GAIN[:2], tensor(0.7), GAIN[2:]])
    holed = torch.cat([PEAKED[:2], tensor(math.nan), PEAKED[2:]])
    result = filled(gain, holed).compute()
    assert set(result) == set(whole)
    for key, value in whole.items():
        torch.testing.assert_close(result[key], value, equal_nan=True)


def test_the_state_dict_restores_any_number_of_points():
    metric, fresh, longer = filled(GAIN, PEAKED), filled(tensor(0), tensor(0)), filled(GAIN, GAIN)
    longer.update(tensor(12, 12), tensor(2, 2), queries=500)
    longer.compute()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for other in (CrossRewardGeneralization("target", ["k0"]), fresh, longer):
            other.load_state_dict(metric.state_dict())
            torch.testing.assert_close(other.trajectory, metric.trajectory, equal_nan=True)
            assert other.compute()["hv"].item() == pytest.approx(0.75)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_reset_keeps_the_points_unless_hard():
    metric = filled(GAIN, PEAKED)
    metric.reset()
    assert len(metric.trajectory) == 5
    metric.reset(hard=True)
    assert len(metric.trajectory) == 0
    with pytest.raises(ValueError, match="no evaluation point"):
        metric.compute()


def test_forward_adds_one_point():
    metric = filled(GAIN[:2], PEAKED[:2])
    result = metric(tensor(12, 11), tensor(2, 2), queries=200)
    assert metric.points["queries"].tolist() == [0, 100, 200]
    assert result["ood_at/k0@1"].item() == pytest.approx(0.5)


@pytest.mark.parametrize("std", [0.0, math.nan, math.inf])
def test_a_base_without_spread_is_refused_by_name(std):
    metric = CrossRewardGeneralization("target", ["flat"])
    with pytest.raises(ValueError, match="standard deviation of 'flat' is"):
        metric.update(tensor(1, 1), tensor(1, std), queries=0)
    assert len(metric.trajectory) == 0


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="mean of 'target' is nan"):
        CrossRewardGeneralization("target", ["k"]).update(tensor(math.nan, 1), tensor(1, 1), 0)
    with pytest.raises(ValueError, match=r"must have shape \[2\].*got \[3\] and \[2\]"):
        CrossRewardGeneralization("target", ["k"]).update(tensor(1, 2, 3), tensor(1, 1), 0)
    with pytest.raises(ValueError, match="`held_out` must name at least one"):
        CrossRewardGeneralization("target", ["target"])
    with pytest.raises(ValueError, match=r"`levels` must be positive, got \[0\]"):
        CrossRewardGeneralization("target", ["k"], levels=[0])
    with pytest.raises(ValueError, match="`peak_margin` must be positive"):
        CrossRewardGeneralization("target", ["k"], peak_margin=0)


def test_joint_rates_by_hand():
    base = torch.zeros(6, 3)
    aligned = torch.tensor(
        [
            [1.0, 1.0, 1.0],  # dominates
            [1.0, -1.0, -1.0],  # collapses
            [1.0, -1.0, 1.0],  # neither
            [1.0, 1.0, 0.0],  # a tie is neither
            [-1.0, -1.0, -1.0],  # the target is worse
            [1.0, torch.nan, 1.0],  # not counted
        ]
    )
    domination, collapse = joint_rates(base, aligned)
    assert domination.item() == pytest.approx(1 / 5)
    assert collapse.item() == pytest.approx(1 / 5)
    assert all(rate.isnan() for rate in joint_rates(base[5:], aligned[5:]))


def test_proxy_correlation_is_of_ranks():
    # Ranks (1, 2, 3, 4): the same; reversed; (2, 1, 4, 3) with sum of squared rank differences 4,
    # hence 1 - 6 * 4 / (4 * 15) = 0.6; constant.
    scores = torch.tensor(
        [
            [1.0, 1.0, -1.0, 2.0, 5.0],
            [2.0, 8.0, -2.0, 1.0, 5.0],
            [5.0, 5.0, torch.nan, 5.0, 5.0],
            [3.0, 27.0, -4.0, 9.0, 5.0],
            [4.0, 64.0, -9.0, 7.0, 5.0],
        ]
    )
    result = proxy_correlation(scores)
    assert result[:3].tolist() == pytest.approx([1, -1, 0.6], abs=1e-4)
    assert result[3].isnan()
    assert proxy_correlation(scores[2:3]).isnan().all()

"""Does a gain on the trained reward carry over to rewards that were held out?

The target reward R and K held-out rewards are measured at evaluation points 0 .. T on the same
prompts and noise; point 0 is the base model. In units of the base model's standard deviations:

    g_t = (mean R_t - mean R_0) / std R_0,      h_t = (mean S_t - mean S_0) / std S_0

so every curve starts at (0, 0). Curves are compared at equal g, not at equal step: h(g) is read
where g is first passed, by linear interpolation between the two points around the passage. The
curve of over-optimisation against the distance from the base model is that of arXiv:2210.10760.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics.functional import spearman_corrcoef

from lit_align.metrics.base import PreciseMetric

_END = 0.7  # the end of a trajectory: where g is at least this share of its maximum


class CrossRewardGeneralization(PreciseMetric):
    """Keeps a training run's evaluation points and summarises them.

    The points outlive `reset`, which Lightning calls on metrics after each epoch, and are part of
    the state dict. They are taken as already reduced over processes, each of which adds them all.
    Points where a reward's mean is NaN are left out of what concerns that reward.

    Args:
        target: Name of the trained reward.
        held_out: Names of the K other rewards.
        levels: Of g, in base standard deviations, at which curves are read; positive.
        peak_margin: Loss since its peak, in base standard deviations, from which a held-out reward
            counts as having peaked early; positive.
        kwargs: See `torchmetrics.Metric`.
    """

    full_state_update = True
    trajectory: Tensor

    def __init__(
        self,
        target: str,
        held_out: Sequence[str],
        levels: Sequence[float] = (0.5, 1.0, 2.0),
        peak_margin: float = 0.1,
        **kwargs: Any,
    ) -> None:
        kwargs = {"sync_on_compute": False, "compute_with_cache": False, **kwargs}
        super().__init__(**kwargs)
        self.names = (target, *held_out)
        if len(self.names) < 2 or len(set(self.names)) < len(self.names):
            raise ValueError(
                "`held_out` must name at least one reward, and none twice or the target "
                f"{target!r}, got {list(held_out)}."
            )
        if not all(level > 0 for level in levels):
            raise ValueError(f"`levels` must be positive, got {list(levels)}.")
        if peak_margin <= 0:
            raise ValueError(f"`peak_margin` must be positive, got {peak_margin}.")
        self.target, self.held_out = target, tuple(held_out)
        self.levels, self.peak_margin = tuple(levels), peak_margin
        columns = 2 * len(self.names) + 3  # means, stds, queries, kl, diversity
        empty = torch.zeros(0, columns, dtype=torch.float64)
        self.add_state("trajectory", empty, dist_reduce_fx=None, persistent=True)
        self.register_load_state_dict_post_hook(_count_updates)

    def update(
        self,
        means: Tensor,
        stds: Tensor,
        queries: float,
        kl: float = math.nan,
        diversity: float = math.nan,
    ) -> None:
        """Add an evaluation point; the first one is the base model.

        Args:
            means: [1 + K], the target first, then the held-out rewards in their order.
            stds: [1 + K], over images; those of the base model are the units of all gains.
            queries: Scores asked of the target reward so far in training.
            kl: KL divergence from the base model's sampling process in nats, NaN if unknown.
            diversity: In any unit, NaN if unknown.

        Raises:
            ValueError: If a shape is wrong, or the base model's mean or standard deviation of a
                reward cannot serve as origin or unit.
        """
        size = (len(self.names),)
        if means.shape != size or stds.shape != size:
            raise ValueError(
                f"`means` and `stds` must have shape {list(size)}, one entry for each of "
                f"{list(self.names)}, got {list(means.shape)} and {list(stds.shape)}."
            )
        parts = [part.detach().to(self.trajectory.device, torch.float64) for part in (means, stds)]
        if len(self.trajectory) == 0:
            _check_base(self.names, *parts)
        row = torch.cat([*parts, parts[0].new_tensor([queries, kl, diversity])])
        self.trajectory = torch.cat([self.trajectory, row[None]])

    @property
    def points(self) -> dict[str, Tensor]:
        """The points so far, in float64.

        "queries" [T]; "gain" [T], g; "held_out_gains" [T, K], h; "kl" [T]; "diversity" [T].
        """
        rewards = len(self.names)
        means, stds = self.trajectory[:, :rewards], self.trajectory[:, rewards : 2 * rewards]
        gains = (means - means[:1]) / stds[:1]
        queries, kl, diversity = self.trajectory[:, 2 * rewards :].unbind(1)
        return {
            "queries": queries,
            "gain": gains[:, 0],
            "held_out_gains": gains[:, 1:],
            "kl": kl,
            "diversity": diversity,
        }

    def compute(self) -> dict[str, Tensor]:
        """Return the summary as float64 scalars; NaN where undefined, as at levels never reached.

        Returns:
            Of each held-out reward k, what `summarize` returns, with "/<k>" after the first word;
            "hv" and "hv_min", the `hypervolume` with the mean and the minimum over the held-out
            rewards; and if at least 3 points have a KL, "gao/{alpha,beta,dstar}", `gao_fit` of
            that mean against sqrt(KL).

        Raises:
            ValueError: If there is no point.
        """
        if len(self.trajectory) == 0:
            raise ValueError("There is no evaluation point yet; the first is the base model's.")
        # A few hundred tiny operations: launching them on an accelerator is what would take time.
        points = {name: values.cpu() for name, values in self.points.items()}
        gain, held_out = points["gain"], points["held_out_gains"]
        results = {}
        for column, name in enumerate(self.held_out):
            summary = summarize(gain, held_out[:, column], self.levels, self.peak_margin)
            for key, value in summary.items():
                word, *level = key.split("@")
                results["@".join([f"{word}/{name}", *level])] = value
        mean = held_out.mean(1)
        results["hv"] = hypervolume(gain, mean)
        results["hv_min"] = hypervolume(gain, held_out.amin(1))
        known = points["kl"].isfinite() & (points["kl"] > 0) & mean.isfinite()
        if known.sum() >= 3:
            fit = gao_fit(points["kl"][known].sqrt(), mean[known])
            results |= {
                f"gao/{key}": value
                for key, value in zip(("alpha", "beta", "dstar"), fit, strict=True)
            }
        return {key: value.to(self.trajectory.device) for key, value in results.items()}

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Add a point and return the summary of all."""
        self.update(*args, **kwargs)
        return self.compute()

    def reset(self, hard: bool = False) -> None:
        """Forget the points if `hard`, else do nothing."""
        if hard:
            super().reset()


def _check_base(names: Sequence[str], means: Tensor, stds: Tensor) -> None:
    for name, mean, std in zip(names, means.tolist(), stds.tolist(), strict=True):
        if not math.isfinite(mean):
            raise ValueError(f"The base model's mean of {name!r} is {mean}: no gain has an origin.")
        if not (math.isfinite(std) and std > 0):
            raise ValueError(
                f"The base model's standard deviation of {name!r} is {std}: gains are in units of "
                "it. Evaluate more images, or leave out a reward that scores them all the same."
            )


def _count_updates(metric: CrossRewardGeneralization, _: Any) -> None:
    """Tell torchmetrics that a restored metric has been updated, else `compute` warns."""
    metric._update_count = len(metric.trajectory)


def summarize(
    gain: Tensor, held_out: Tensor, levels: Sequence[float], peak_margin: float
) -> dict[str, Tensor]:
    """Summarise one held-out reward; points with a NaN are left out.

    Args:
        gain: g [T], starting at 0.
        held_out: h [T], starting at 0.
        levels: Of g, positive.
        peak_margin: See `CrossRewardGeneralization`.

    Returns:
        "slope": sum(g h) / sum(g^2), 1 if the held-out reward moves as much as the target.
        "end_slope": `end_slope`.
        "ood_at@<level>", "retention@<level>", "auc@<level>": `at_level`.
        "gap": max(h) - last h >= 0, what over-optimisation has cost.
        "onset": g where h is largest first.
        "early_peak": 1 if gap >= peak_margin, else 0.
    """
    known = gain.isfinite() & held_out.isfinite()
    gain, held_out = gain[known], held_out[known]
    gap = held_out.max() - held_out[-1]
    results = {
        "slope": (gain * held_out).sum() / (gain**2).sum(),  # 0 / 0 at the base
        "end_slope": end_slope(gain, held_out),
        "gap": gap,
        "onset": gain[held_out.argmax()],
        "early_peak": (gap >= peak_margin).to(gap.dtype),
    }
    for level in levels:
        values = at_level(gain, held_out, level)
        for key, value in zip(("ood_at", "retention", "auc"), values, strict=True):
            results[f"{key}@{level:g}"] = value
    return results


def end_slope(gain: Tensor, held_out: Tensor) -> Tensor:
    """Return the least-squares slope of h on g where g >= 0.7 max(g); < 0 is over-optimisation.

    NaN with fewer than 3 such points, or if the target never rose.

    Args:
        gain: g [T].
        held_out: h [T].
    """
    end = gain >= _END * gain.max()
    if end.sum() < 3:
        return gain.new_tensor(torch.nan)
    g, h = gain[end] - gain[end].mean(), held_out[end]
    return (g * h).sum() / (g**2).sum()  # 0 / 0 if g is constant


def first_passage(gain: Tensor, held_out: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """Return the linear pieces of h(g) for 0 < g <= level, read where g is first passed.

    A piece belongs to each point that exceeds all earlier ones; it covers the levels between
    their maximum and that point, on the line from the point's predecessor. Where g has fallen back
    in between, h(g) jumps.

    Args:
        gain: g [T], starting at 0.
        held_out: h [T].
        level: Positive.

    Returns:
        The levels [P, 2] where pieces start and end, and h [P, 2] there. There are none if the
        level is never reached.
    """
    before = gain.cummax(0).values[:-1]
    first = (gain[1:] > before) & (before < level)
    if gain.max() < level:
        first = torch.zeros_like(first)
    ends = torch.stack([before, gain[1:].clamp(max=level)], dim=1)[first]
    g, h = gain[:-1, None][first], held_out[:-1, None][first]
    slopes = (held_out.diff() / gain.diff())[first]
    return ends, h + slopes[:, None] * (ends - g)


def at_level(gain: Tensor, held_out: Tensor, level: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return h(level), the share of the best h kept there, and the area under h, as scalars.

    The share is h(level) / max h(g) over g <= level, NaN if that maximum is not positive. The area
    is scaled by 2 / level^2, so that it is the slope if h is a straight line. All are NaN if
    the level is never reached.

    Args:
        gain: g [T], starting at 0.
        held_out: h [T].
        level: Positive.
    """
    ends, heights = first_passage(gain, held_out, level)
    if len(ends) == 0:
        nan = gain.new_tensor(torch.nan)
        return nan, nan, nan
    value, best = heights[-1, 1], heights.max()
    retention = value / best if best > 0 else torch.full_like(value, torch.nan)
    area = (ends.diff(dim=1)[:, 0] * heights.mean(1)).sum()
    return value, retention, area * 2 / level**2


def hypervolume(gain: Tensor, held_out: Tensor) -> Tensor:
    """Return the area of the union of rectangles from (0, 0) to each (g, h) with both positive.

    Args:
        gain: g [T].
        held_out: h [T]; NaN never counts.
    """
    positive = (gain > 0) & (held_out > 0)
    g, order = gain[positive].sort(descending=True)
    best = torch.cat([g.new_zeros(1), held_out[positive][order]]).cummax(0).values
    return (g * best.diff()).sum()


def gao_fit(
    distance: Tensor, score: Tensor, form: Literal["rl", "bon"] = "rl"
) -> tuple[Tensor, Tensor, Tensor]:
    """Fit the law of over-optimisation of arXiv:2210.10760 by least squares.

    R(d) = d (alpha - beta log d), which peaks at exp(alpha / beta - 1), for training ("rl");
    R(d) = d (alpha - beta d), which peaks at alpha / (2 beta), for best-of-n sampling ("bon").

    Args:
        distance: d = sqrt(KL) [N], positive.
        score: R [N].
        form: See above.

    Returns:
        alpha, beta and the d of the peak, as scalars: NaN without two distinct distances; no peak,
        hence NaN, unless beta is positive.
    """
    nan = distance.new_tensor(torch.nan)
    if len(distance.unique()) < 2:
        return nan, nan, nan
    first, second = distance, -distance * (distance.log() if form == "rl" else distance)
    # The normal equations by hand: LAPACK's last digits depend on where tensors lie in memory, and
    # a resumed run is to write what the first would have.
    a, b, c = (first * first).sum(), (first * second).sum(), (second * second).sum()
    p, q = (first * score).sum(), (second * score).sum()
    determinant = a * c - b * b
    alpha, beta = (c * p - b * q) / determinant, (a * q - b * p) / determinant
    peak = (alpha / beta - 1).exp() if form == "rl" else alpha / (2 * beta)
    return alpha, beta, peak if beta > 0 else nan


def joint_rates(base: Tensor, aligned: Tensor) -> tuple[Tensor, Tensor]:
    """Return the joint domination and joint collapse rates of paired samples, as scalars.

    The share of samples that the target and all held-out rewards find better than the base model's,
    and the share that the target finds better and all held-out rewards find worse. Ties are
    neither. Samples with a NaN are left out; without any other the rates are NaN.

    Args:
        base: [N, 1 + K], the target first.
        aligned: [N, 1 + K], same prompts and noise.
    """
    difference = aligned.double() - base.double()
    difference = difference[~difference.isnan().any(1)]
    better, others = difference[:, 0] > 0, difference[:, 1:]
    dominates, collapses = (others > 0).all(1), (others < 0).all(1)
    return (better & dominates).double().mean(), (better & collapses).double().mean()


def proxy_correlation(scores: Tensor) -> Tensor:
    """Return Spearman's correlation of the target with each held-out reward [K], in float64.

    Over the samples of one model: near 1 the target still ranks them as the held-out reward does.
    Samples with a NaN are left out. NaN if a reward is constant.

    Args:
        scores: [N, 1 + K], the target first.
    """
    scores = scores.detach().double()
    scores = scores[~scores.isnan().any(1)]
    result = scores.new_full((scores.shape[1] - 1,), torch.nan)
    varies = (scores != scores[:1]).any(0)
    for column in range(len(result)):
        if varies[0] and varies[column + 1]:
            result[column] = spearman_corrcoef(scores[:, 0], scores[:, column + 1])
    return result

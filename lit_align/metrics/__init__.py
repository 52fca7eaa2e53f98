"""Metrics: what an alignment run gained, what it cost, and whether the gain is real."""

from lit_align.metrics.cross_reward import (
    CrossRewardGeneralization,
    joint_rates,
    proxy_correlation,
)
from lit_align.metrics.distance import CMMD, FrechetDistance, KernelDistance
from lit_align.metrics.diversity import PairwiseDiversity, VendiScore
from lit_align.metrics.drift import DriftStatistics, image_statistics
from lit_align.metrics.moments import RewardMoments
from lit_align.metrics.preference_accuracy import Calibration, TieAwareAccuracy
from lit_align.metrics.win_rate import WinRate

__all__ = [
    "CMMD",
    "Calibration",
    "CrossRewardGeneralization",
    "DriftStatistics",
    "FrechetDistance",
    "KernelDistance",
    "PairwiseDiversity",
    "RewardMoments",
    "TieAwareAccuracy",
    "VendiScore",
    "WinRate",
    "image_statistics",
    "joint_rates",
    "proxy_correlation",
]

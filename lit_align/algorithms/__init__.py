"""Alignment methods and pretraining, one file per paper."""

from lit_align.algorithms.base import AlignmentModule
from lit_align.algorithms.ddpo import DDPO
from lit_align.algorithms.large_scale_rl import LargeScaleRL
from lit_align.algorithms.online import OnlineModule
from lit_align.algorithms.pretraining import (
    ContrastivePretraining,
    DenoisingPretraining,
    VAEPretraining,
)
from lit_align.algorithms.tasks import Task
from lit_align.algorithms.tdpo import TDPO

__all__ = [
    "DDPO",
    "TDPO",
    "AlignmentModule",
    "ContrastivePretraining",
    "DenoisingPretraining",
    "LargeScaleRL",
    "OnlineModule",
    "Task",
    "VAEPretraining",
]

"""Alignment methods and pretraining, one file per paper."""

from lit_align.algorithms.base import AlignmentModule
from lit_align.algorithms.ddpo import DDPO
from lit_align.algorithms.online import OnlineModule
from lit_align.algorithms.pretraining import (
    ContrastivePretraining,
    DenoisingPretraining,
    VAEPretraining,
)

__all__ = [
    "DDPO",
    "AlignmentModule",
    "ContrastivePretraining",
    "DenoisingPretraining",
    "OnlineModule",
    "VAEPretraining",
]

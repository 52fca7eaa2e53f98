"""Rewards: images and prompts in, one score per image out."""

from lit_align.rewards.base import RewardModule
from lit_align.rewards.colorfulness import Colorfulness
from lit_align.rewards.jpeg import JPEGCompressibility
from lit_align.rewards.shapes_clip import ShapesCLIP
from lit_align.rewards.shapes_verifier import ShapesVerifier
from lit_align.rewards.weighted import WeightedReward

__all__ = [
    "Colorfulness",
    "JPEGCompressibility",
    "RewardModule",
    "ShapesCLIP",
    "ShapesVerifier",
    "WeightedReward",
]

"""Callbacks that watch a run; none changes the loss."""

from lit_align.callbacks.cross_reward import CrossRewardCallback
from lit_align.callbacks.sample_gallery import SampleGallery

__all__ = ["CrossRewardCallback", "SampleGallery"]

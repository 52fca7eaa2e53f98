"""Callbacks that watch a run or tend its weights; none changes the loss."""

from lit_align.callbacks.cross_reward import CrossRewardCallback
from lit_align.callbacks.ema import AdapterEMA
from lit_align.callbacks.invariants import InvariantError, InvariantsCallback
from lit_align.callbacks.neuron_reset import NeuronResetCallback
from lit_align.callbacks.overoptimization import OveroptimizationStopping
from lit_align.callbacks.rng_state import RNGStateCallback
from lit_align.callbacks.sample_gallery import SampleGallery

__all__ = [
    "AdapterEMA",
    "CrossRewardCallback",
    "InvariantError",
    "InvariantsCallback",
    "NeuronResetCallback",
    "OveroptimizationStopping",
    "RNGStateCallback",
    "SampleGallery",
]

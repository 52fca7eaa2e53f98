"""Text-to-image models as policies, one file per family."""

from lit_align.policies.base import DiffusionPolicy
from lit_align.policies.flux import FluxPolicy
from lit_align.policies.heads import TemporalCritic
from lit_align.policies.learned_schedule import LearnedSchedule
from lit_align.policies.sd3 import SD3Policy
from lit_align.policies.sdxl import SDXLPolicy
from lit_align.policies.stable_diffusion import StableDiffusionPolicy
from lit_align.policies.time_prediction import TimePredictor
from lit_align.policies.towers import CLIPTower, OpenCLIPTower
from lit_align.policies.wan import WanPolicy

__all__ = [
    "CLIPTower",
    "DiffusionPolicy",
    "FluxPolicy",
    "LearnedSchedule",
    "OpenCLIPTower",
    "SD3Policy",
    "SDXLPolicy",
    "StableDiffusionPolicy",
    "TemporalCritic",
    "TimePredictor",
    "WanPolicy",
]

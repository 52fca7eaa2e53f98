"""Alignment methods and pretraining, one file per paper."""

from lit_align.algorithms.adjoint_matching import AdjointMatching
from lit_align.algorithms.alignprop import AlignProp
from lit_align.algorithms.awm import AWM
from lit_align.algorithms.base import AlignmentModule
from lit_align.algorithms.crd import CRD
from lit_align.algorithms.d3po import D3PO
from lit_align.algorithms.ddpo import DDPO
from lit_align.algorithms.dgpo import DGPO
from lit_align.algorithms.diffusion_dpo import DiffusionDPO
from lit_align.algorithms.diffusion_nft import DiffusionNFT
from lit_align.algorithms.draft import DRaFT
from lit_align.algorithms.drtune import DRTune
from lit_align.algorithms.flow_dpo import FlowDPO
from lit_align.algorithms.flow_grpo import FlowGRPO
from lit_align.algorithms.forward_process import ForwardProcessModule
from lit_align.algorithms.large_scale_rl import LargeScaleRL
from lit_align.algorithms.nabla_gflownet import NablaGFlowNet
from lit_align.algorithms.online import OnlineModule
from lit_align.algorithms.online_dpo import OnlineDPO
from lit_align.algorithms.preference_learning import PreferenceModule
from lit_align.algorithms.pretraining import (
    ContrastivePretraining,
    DenoisingPretraining,
    VAEPretraining,
)
from lit_align.algorithms.refl import ReFL
from lit_align.algorithms.reward_gradient import RewardGradientModule
from lit_align.algorithms.reward_modeling import RewardModeling
from lit_align.algorithms.rounds import RoundModule
from lit_align.algorithms.schedule_learning import ScheduleModule
from lit_align.algorithms.tasks import Task
from lit_align.algorithms.tdpo import TDPO
from lit_align.algorithms.tpdm import TPDM

__all__ = [
    "AWM",
    "CRD",
    "D3PO",
    "DDPO",
    "DGPO",
    "TDPO",
    "TPDM",
    "AdjointMatching",
    "AlignProp",
    "AlignmentModule",
    "ContrastivePretraining",
    "DRTune",
    "DRaFT",
    "DenoisingPretraining",
    "DiffusionDPO",
    "DiffusionNFT",
    "FlowDPO",
    "FlowGRPO",
    "ForwardProcessModule",
    "LargeScaleRL",
    "NablaGFlowNet",
    "OnlineDPO",
    "OnlineModule",
    "PreferenceModule",
    "ReFL",
    "RewardGradientModule",
    "RewardModeling",
    "RoundModule",
    "ScheduleModule",
    "Task",
    "VAEPretraining",
]

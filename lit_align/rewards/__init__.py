"""Rewards: images and prompts in, one score per image out."""

from lit_align.rewards.aesthetic import AestheticScore
from lit_align.rewards.base import RewardModule
from lit_align.rewards.clip_score import CLIPScore, PickScore
from lit_align.rewards.colorfulness import Colorfulness
from lit_align.rewards.composition import Composition
from lit_align.rewards.detectors import OpenVocabularyDetector, OpenVocabularyFaces
from lit_align.rewards.embedders import CLIPEmbedder, DreamSimEmbedder
from lit_align.rewards.hps import HPSv2
from lit_align.rewards.image_reward import ImageReward
from lit_align.rewards.jpeg import JPEGCompressibility
from lit_align.rewards.judges import VLMJudge
from lit_align.rewards.learned import LearnedReward, ShapesPreference
from lit_align.rewards.mps import MPS
from lit_align.rewards.ocr import OCR, GOTOCRRecognizer, RapidOCRRecognizer
from lit_align.rewards.pairwise_diversity import PairwiseDiversityReward
from lit_align.rewards.parity import DistributionParity
from lit_align.rewards.remote import RemoteReward
from lit_align.rewards.shapes_clip import ShapesCLIP
from lit_align.rewards.shapes_color import ShapesColor
from lit_align.rewards.shapes_verifier import ShapesVerifier
from lit_align.rewards.skin_tone import ImageClassifier, SkinToneClassifier
from lit_align.rewards.towers import BLIPRewardTower, CLIPRewardTower, RewardTower
from lit_align.rewards.weighted import WeightedReward

__all__ = [
    "MPS",
    "OCR",
    "AestheticScore",
    "BLIPRewardTower",
    "CLIPEmbedder",
    "CLIPRewardTower",
    "CLIPScore",
    "Colorfulness",
    "Composition",
    "DistributionParity",
    "DreamSimEmbedder",
    "GOTOCRRecognizer",
    "HPSv2",
    "ImageClassifier",
    "ImageReward",
    "JPEGCompressibility",
    "LearnedReward",
    "OpenVocabularyDetector",
    "OpenVocabularyFaces",
    "PairwiseDiversityReward",
    "PickScore",
    "RapidOCRRecognizer",
    "RemoteReward",
    "RewardModule",
    "RewardTower",
    "ShapesCLIP",
    "ShapesColor",
    "ShapesPreference",
    "ShapesVerifier",
    "SkinToneClassifier",
    "VLMJudge",
    "WeightedReward",
]

"""Whatever opens a checkpoint that is not there says so alike: id, file, reason, command."""

import pytest
from huggingface_hub import constants

from lit_align import rewards
from lit_align.hub import CheckpointError
from lit_align.policies import CLIPTower, DiffusionPolicy, OpenCLIPTower, WanPolicy

OPENERS = {
    "DiffusionPolicy": lambda: DiffusionPolicy.from_pretrained("stabilityai/sdxl-turbo"),
    "WanPolicy": lambda: WanPolicy("Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
    "CLIPTower": CLIPTower,
    "OpenCLIPTower": OpenCLIPTower,
    "CLIPRewardTower": lambda: rewards.CLIPRewardTower("openai/clip-vit-base-patch32"),
    "BLIPRewardTower": lambda: rewards.BLIPRewardTower("Salesforce/blip-itm-base-coco"),
    "AestheticScore": rewards.AestheticScore,
    "CLIPScore": rewards.CLIPScore,
    "PickScore": rewards.PickScore,
    "HPSv2": rewards.HPSv2,
    "ImageReward": rewards.ImageReward,
    "MPS": rewards.MPS,
    "CLIPEmbedder": rewards.CLIPEmbedder,
    "OpenVocabularyDetector": rewards.OpenVocabularyDetector,
    "ImageClassifier": lambda: rewards.ImageClassifier("nateraw/vit-age-classifier", ["20-29"]),
    "GOTOCRRecognizer": rewards.GOTOCRRecognizer,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("name", OPENERS)
def test_a_missing_checkpoint_is_told_with_the_command_that_fetches_it(name):
    with pytest.raises(CheckpointError) as caught:
        OPENERS[name]()
    text = str(caught.value)
    assert "is not on this machine" in text
    assert "HF_HUB_OFFLINE is set" in text
    assert "`hf download " in text
    assert text.count("/") > 1  # the id and where it was looked for

"""HPSv2's checkpoints, in the layout of the released ones, and its architecture."""

import json

import open_clip
import pytest
import torch

from lit_align.hub import CheckpointError
from lit_align.rewards import HPSv2, hps
from tests.rewards.clip_models import open_clip_config, open_clip_model
from tests.rewards.test_clip_rewards import PROMPTS, from_yaml, images

NAME = "lit-align-tiny-hps"
FILE = "HPS_v2.1_compressed.pt"


@pytest.fixture(autouse=True)
def _tiny(tmp_path, monkeypatch):
    """Put a tiny architecture in the place of ViT-H-14."""
    path = tmp_path / "config" / f"{NAME}.json"
    path.parent.mkdir()
    path.write_text(json.dumps(open_clip_config()))
    open_clip.add_model_config(path)
    monkeypatch.setattr(hps, "ARCHITECTURE", NAME)


def save(path, weights=None, **more):
    torch.save({"state_dict": weights or open_clip_model().state_dict(), **more}, path)
    return str(path)


def test_a_checkpoint_is_read_from_its_file_or_its_folder(tmp_path):
    path = save(tmp_path / FILE, epoch=3)
    expected = HPSv2(model=open_clip_model())(images(), PROMPTS)
    for source in (path, str(tmp_path)):
        reward = HPSv2(checkpoint=source)
        assert torch.equal(reward(images(), PROMPTS), expected)


def test_half_precision_on_disk_is_float32_in_use(tmp_path):
    weights = {name: tensor.half() for name, tensor in open_clip_model().state_dict().items()}
    reward = HPSv2(checkpoint=save(tmp_path / FILE, weights))
    assert {p.dtype for p in reward.parameters()} == {torch.float32}


def test_the_command_line_opens_it(tmp_path):
    path = save(tmp_path / "HPS_v2_compressed.pt")
    reward = from_yaml(
        "reward: {class_path: lit_align.rewards.HPSv2, init_args: {version: v2.0, "
        f"checkpoint: {path}, antialias: false, dtype: bfloat16}}}}"
    )
    assert reward.name == "HPSv2.0-aliased"
    assert reward(images(), PROMPTS).isfinite().all()


def test_other_checkpoints_are_refused(tmp_path):
    weights = open_clip_model().state_dict()
    HPSv2(checkpoint=save(tmp_path / "extra.pt", {**weights, "logit_bias": torch.zeros(())}))
    wide = open_clip.CLIP(**open_clip_config(width=96)).state_dict()
    lacking = {name: tensor for name, tensor in weights.items() if name != "visual.proj"}
    for name, faulty, told in (
        ("wide.pt", wide, r"wide.pt' does not hold .*: \d+ of another shape \(visual.class_emb"),
        ("lacking.pt", lacking, r"1 missing \(visual.proj\)"),
        ("more.pt", {**weights, "head": torch.zeros(1)}, r"1 unknown \(head\)"),
    ):
        with pytest.raises(CheckpointError, match=told):
            HPSv2(checkpoint=save(tmp_path / name, faulty))
    torch.save(weights, tmp_path / "bare.pt")
    with pytest.raises(CheckpointError, match=r"has no entry 'state_dict'; give 'HPS_v2.1_comp"):
        HPSv2(checkpoint=str(tmp_path / "bare.pt"))


def test_the_other_version_is_refused_by_the_name_of_its_file(tmp_path):
    path = save(tmp_path / FILE)
    with pytest.raises(CheckpointError, match=r"is HPS v2.1; set `version` to 'v2.1'"):
        HPSv2("v2.0", path)


def test_without_the_file_the_command_to_fetch_it_is_named():
    with pytest.raises(CheckpointError, match=r"`hf download xswu/HPSv2 HPS_v2_compressed.pt`"):
        HPSv2("v2.0")
    with pytest.raises(ValueError, match=r"`version` must be one of v2.1, v2.0, got 'v2'"):
        HPSv2("v2")


def test_the_real_architecture_has_as_many_weights_as_the_released_file(monkeypatch):
    monkeypatch.setattr(hps, "ARCHITECTURE", "ViT-H-14")
    with torch.device("meta"):
        network = hps.build_network()
    assert len(network.state_dict()) == 686
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(986.1e6, abs=0.05e6)
    assert (network.context_length, network.visual.image_size) == (77, (224, 224))

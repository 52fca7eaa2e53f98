"""Embedders: their pixels, single images, gradients, and what rewards and metrics do with them."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from lit_align.functional.pixels import normalise
from lit_align.hub import CheckpointError
from lit_align.metrics.diversity import PairwiseDiversity
from lit_align.rewards import PairwiseDiversityReward
from lit_align.rewards.embedders import CLIPEmbedder, DreamSimEmbedder
from tests.rewards.plain_values import from_yaml

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 2, "projection_dim": 8}  # fmt: skip


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    config = CLIPVisionConfig(**SIZES, image_size=32, patch_size=8)
    model = CLIPVisionModelWithProjection(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


class Squeezing(nn.Module):
    """A linear map of the mean colours, squeezed like DreamSim's embeddings."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 5)
        self.seen, self.device = [], "meta"  # where it was made

    def embed(self, images):
        assert torch.device(self.device) == images.device
        self.seen.append(images)
        return self.layer(images.mean((2, 3))).squeeze()


@pytest.fixture(params=["clip", "dreamsim"])
def embedder(request, network):
    return CLIPEmbedder(model=network) if request.param == "clip" else DreamSimEmbedder(
        model=Squeezing()
    )  # fmt: skip


def test_embeddings_are_clips(network):
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        expected = F.normalize(network(pixel_values=normalise(images)).image_embeds, dim=1)
    torch.testing.assert_close(CLIPEmbedder(model=network)(images), expected)


def test_a_clip_of_images_and_text_serves_as_well(tmp_path):
    model = CLIPModel(
        CLIPConfig(
            text_config={**SIZES, "vocab_size": 10, "bos_token_id": 1, "eos_token_id": 2},
            vision_config={**SIZES, "image_size": 32, "patch_size": 8},
            projection_dim=8,
        )
    )
    model.save_pretrained(tmp_path / "clip")
    opened, given = CLIPEmbedder(str(tmp_path / "clip")), CLIPEmbedder(model=model)
    images = torch.rand(2, 3, 40, 32)
    torch.testing.assert_close(opened(images), given(images))
    reward = from_yaml(
        "{class_path: PairwiseDiversityReward, init_args: {embedder: {class_path: "
        f"embedders.CLIPEmbedder, init_args: {{pretrained: {tmp_path}/clip}}}}}}}}"
    )
    cosine = (given(images[:1]) * given(images[1:])).sum()
    torch.testing.assert_close(reward(images, ["a"] * 2), (1 - cosine).expand(2))
    assert not any("text" in name for name, _ in opened.named_parameters())


def test_dreamsim_sees_all_of_the_image_in_its_size():
    embedder = DreamSimEmbedder(model=Squeezing())
    images = torch.rand(2, 3, 30, 50)
    embedder(images)
    seen = embedder.model.seen[0]
    assert seen.shape == (2, 3, 224, 224)
    torch.testing.assert_close(seen.mean((2, 3)), images.mean((2, 3)), rtol=0, atol=1e-2)


def test_embeddings_are_unit_rows_whatever_the_batch(embedder):
    images = torch.rand(3, 3, 40, 32)
    embeddings = embedder(images)
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3))
    alone = torch.cat([embedder.embed_images(images[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(alone, embeddings)


def test_the_gradient_reaches_the_pixels_only(embedder):
    images = torch.rand(2, 3, 40, 32, requires_grad=True)
    embedder(images)[:, 0].sum().backward()
    assert images.grad.isfinite().all()
    assert (images.grad.abs().amax(dim=(1, 2, 3)) > 0).all()
    assert all(parameter.grad is None for parameter in embedder.parameters())


def test_reward_and_metric_agree_on_diversity(embedder):
    images = torch.rand(5, 3, 32, 32) ** torch.tensor([0.2, 1, 3, 9, 0.5])[:, None, None, None]
    groups = torch.tensor([0, 0, 0, 1, 1])
    scores = PairwiseDiversityReward(embedder)(images, [""] * 5, group_ids=groups)
    metric = PairwiseDiversity(embedder)
    metric.update(images, groups)
    expected = (scores[:3].mean() + scores[3:].mean()) / 2
    assert metric.compute().item() == pytest.approx(expected.item(), abs=1e-6)
    assert expected > 1e-4


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    with pytest.raises(CheckpointError, match="hf download openai/clip-vit-large-patch14"):
        CLIPEmbedder()
    monkeypatch.setitem(sys.modules, "dreamsim", None)
    with pytest.raises(ImportError, match=r'pip install "lit-align\[dreamsim\]"'):
        DreamSimEmbedder()

    def offline(**options):
        raise OSError(f"no network for {sorted(options)}")

    monkeypatch.setitem(sys.modules, "dreamsim", SimpleNamespace(dreamsim=offline))
    told = "no network for .'cache_dir', 'device', 'dreamsim_type'.*copy the folder"
    with pytest.raises(ValueError, match="`kind` must be one of ensemble, .*, got 'vgg'"):
        DreamSimEmbedder("vgg")
    with pytest.raises(CheckpointError, match=told):
        DreamSimEmbedder(cache_dir=str(tmp_path))

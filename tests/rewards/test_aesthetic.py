"""LAION's aesthetic predictors: their heads as one affine function, and the files they come from.

The released heads are checked where their files are named:
    LIT_ALIGN_AESTHETIC_V2   sac+logos+ava1-l14-linearMSE.pth, or the hub's aesthetic-model.pth
    LIT_ALIGN_AESTHETIC_V1   sa_0_4_vit_l_14_linear.pth
"""

import os

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from lit_align.hub import CheckpointError
from lit_align.rewards import AestheticScore
from lit_align.rewards.aesthetic import fold
from tests.rewards.clip_models import HEAD_WIDTHS, clip_model, head, linear_head, unfolded

EMBEDDING = 768  # of CLIP ViT-L/14


def images():
    return torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("seed", range(3))
def test_a_folded_stack_does_what_the_stack_does(seed):
    weights = {name: tensor.double() for name, tensor in head(EMBEDDING, seed).items()}
    weight, bias = fold([(weights[f"{n}.weight"], weights[f"{n}.bias"]) for n in HEAD_WIDTHS])
    assert (weight.shape, bias.shape, weight.dtype) == ((1, EMBEDDING), (1,), torch.float64)
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(8, EMBEDDING, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(
        embeddings @ weight.T + bias, unfolded(weights)(embeddings), atol=1e-10, rtol=0
    )


@pytest.mark.parametrize("whole", [True, False])
def test_scores_are_the_unfolded_head_on_unit_embeddings(whole):
    model, weights = clip_model(), head()
    embeddings = AestheticScore(model=model, head=weights).embed_images(images())
    if not whole:
        config = CLIPVisionConfig.from_dict(model.config.vision_config.to_dict())
        vision = CLIPVisionModelWithProjection(config)
        vision.vision_model.load_state_dict(model.vision_model.state_dict())
        vision.visual_projection.load_state_dict(model.visual_projection.state_dict())
        model = vision
    scores = AestheticScore(model=model, head=weights)(images(), [""] * 3)
    expected = unfolded(weights)(embeddings.double()).squeeze(1)
    torch.testing.assert_close(scores.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("version", "make"), [("v2", head), ("v1", linear_head)])
def test_a_head_is_read_from_its_file_or_its_folder(version, make, tmp_path):
    weights = make()
    name = {"v2": "aesthetic-model.pth", "v1": "sa_0_4_vit_l_14_linear.pth"}[version]
    torch.save(weights, tmp_path / name)
    expected = AestheticScore(version, model=clip_model(), head=weights)(images(), [""] * 3)
    for source in (tmp_path / name, tmp_path):
        reward = AestheticScore(version, str(source), model=clip_model())
        assert torch.equal(reward(images(), [""] * 3), expected)
        assert reward.name == f"AestheticScore-{version}"


def test_the_prompt_does_not_count():
    reward = AestheticScore(model=clip_model(), head=head())
    assert not reward.needs_prompt
    assert torch.equal(reward(images(), ["a"] * 3), reward(images(), ["b"] * 3))


def released(version):
    """Return the head in the file that the environment names, on a backbone that does not count."""
    variable = f"LIT_ALIGN_AESTHETIC_{version.upper()}"
    if variable not in os.environ:
        pytest.skip(f"{variable} names no file")
    return AestheticScore(version, os.environ[variable], model=clip_model(EMBEDDING)).head


def test_the_released_head_v2():
    """Recomputed once from the released file, in float64."""
    layer, unit = released("v2"), torch.eye(EMBEDDING)[0]
    even = torch.full((EMBEDDING,), EMBEDDING**-0.5)
    found = layer(torch.stack([0 * unit, even, unit])).squeeze(1).tolist()
    assert found == pytest.approx([5.236646, 4.883285, 4.545053], abs=2e-6)
    assert layer.weight.norm().item() == pytest.approx(17.9956, abs=1e-4)


def test_the_released_head_v1():
    layer = released("v1")
    assert layer.bias.item() == pytest.approx(3.529372, abs=1e-6)
    assert layer.weight.norm().item() == pytest.approx(28.4444, abs=1e-4)


def test_errors_name_the_remedy(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"not on the hub: fetch sa_0_4.* from https://github"
    ):
        AestheticScore("v1", model=clip_model())
    with pytest.raises(CheckpointError, match=r"'trl-lib/ddpo-aesthetic-predictor' is not on this"):
        AestheticScore(model=clip_model())
    with pytest.raises(CheckpointError, match=r"'openai/clip-vit-large-patch14' is not on this"):
        AestheticScore(head=head(EMBEDDING))
    with pytest.raises(ValueError, match=r"`version` must be one of v2, v1, got 'v3'"):
        AestheticScore("v3", head=head())
    with pytest.raises(ValueError, match=r"reads 20 numbers and the backbone gives 16"):
        AestheticScore(model=clip_model(), head=head(20))
    with pytest.raises(ValueError, match=r"either by `checkpoint` or as `head`"):
        AestheticScore(checkpoint="it", head=head())
    torch.save(head(), tmp_path / "ava+logos-l14-reluMSE.pth")
    with pytest.raises(CheckpointError, match=r"is a network with activations"):
        AestheticScore(checkpoint=str(tmp_path / "ava+logos-l14-reluMSE.pth"))


def test_other_heads_are_refused():
    for weights, told in (
        (linear_head(), r"`head` is no head of AestheticScore v2: .* and holds bias, weight"),
        ([1], r"and holds list"),
        ({}, r"and holds nothing"),
        ({**head(), "layers.2.weight": torch.ones(3, 3)}, r"one number, but the shapes \[1024, 16"),
        ({**head(), "layers.7.weight": torch.ones(2, 16), "layers.7.bias": torch.ones(2)},
         r"no linear layers that end in one number"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=told):
            AestheticScore(model=clip_model(), head=weights)
    with pytest.raises(CheckpointError, match=r"`head` is no head of AestheticScore v1"):
        AestheticScore("v1", model=clip_model(), head=head())

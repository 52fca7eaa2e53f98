"""Learned rewards: heads, towers, standardisation, and opening them from where they were saved."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForImageTextRetrieval,
)

from lit_align.data.image_text import ShapesPairs
from lit_align.rewards import (
    BLIPRewardTower,
    CLIPRewardTower,
    LearnedReward,
    ShapesCLIP,
    ShapesPreference,
)
from lit_align.rewards.base import checked_scores
from lit_align.rewards.shapes_clip import build_shapes_clip
from lit_align.rewards.towers import shapes_tower, tower_from

ATOL = 1e-4
PROMPTS = ["a red circle", "two small circles", "a red circle"]


def images(count=3, size=32):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def tiny_clip_tower():
    torch.manual_seed(0)
    encoder = build_shapes_clip(width=8, layers=2)
    return CLIPRewardTower(model=encoder.model, tokenizer=encoder.tokenizer)


def tiny_blip_tower():
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "circle", "two", "small"]
    tokenizer = BertTokenizer(vocab={word: place for place, word in enumerate(words)})
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2,
             "num_hidden_layers": 2}  # fmt: skip
    ids = {"bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0}
    text = {**small, **ids, "vocab_size": len(words), "encoder_hidden_size": 16}
    vision = {**small, "image_size": 16, "patch_size": 8}
    config = BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=8)
    return BLIPRewardTower(
        model=BlipForImageTextRetrieval(config), tokenizer=tokenizer, max_tokens=6
    )


TOWERS = {"clip": tiny_clip_tower, "blip": tiny_blip_tower}
BOTH = [
    ("clip", "cosine"),
    ("clip", "linear"),
    ("clip", "mlp"),
    ("blip", "linear"),
    ("blip", "mlp"),
]


def make(kind, head, **options):
    """Return a reward whose head gives something else than 0."""
    reward = LearnedReward(TOWERS[kind](), head, **options)
    generator = torch.Generator().manual_seed(1)
    for parameter in reward.layers.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return reward


@pytest.mark.parametrize(("kind", "head"), BOTH)
def test_scores_keep_the_contract_and_have_a_gradient(kind, head):
    reward = make(kind, head)
    pixels = images().requires_grad_()
    scores = checked_scores(reward, reward(pixels, PROMPTS), 3)
    assert scores.std() > 0
    scores.sum().backward()
    assert (pixels.grad.flatten(1).abs().sum(1) > 0).all()
    assert all(p.grad is None for p in reward.parameters()), "a reward is frozen"


@pytest.mark.parametrize(("kind", "head"), BOTH)
def test_a_score_does_not_depend_on_the_others(kind, head):
    reward = make(kind, head)
    together = reward(images(), PROMPTS)
    alone = torch.cat([reward(images()[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=ATOL, rtol=0)


@pytest.mark.parametrize("kind", TOWERS)
def test_the_prompt_counts(kind):
    reward = make(kind, "linear")
    one, other = reward(images()[:1], ["a red circle"]), reward(images()[:1], ["two circle"])
    assert (one - other).abs() > ATOL


def test_an_image_that_cannot_be_scored_is_nan():
    broken = images()
    broken[1] = torch.nan
    assert make("clip", "linear")(broken, PROMPTS).isnan().tolist() == [False, True, False]


def test_the_cosine_head_is_the_scaled_cosine_of_the_dual_encoder():
    encoder = build_shapes_clip(width=8, layers=1)
    half = [0.5] * 3
    tower = CLIPRewardTower(model=encoder.model, tokenizer=encoder.tokenizer, mean=half, std=half)
    expected = encoder.logit_scale.exp() * encoder(images(), PROMPTS)
    scores = LearnedReward(tower)(images(), PROMPTS)
    torch.testing.assert_close(scores, expected, atol=ATOL, rtol=0)


def test_the_logit_scale_is_kept_in_its_range():
    reward = LearnedReward(tiny_clip_tower())
    for value, kept in ((-3.0, 0.0), (9.0, math.log(100)), (2.0, 2.0)):
        reward.logit_scale.data.fill_(value)
        reward.clamp_logit_scale()
        assert reward.logit_scale.item() == pytest.approx(kept)


def test_the_mlp_starts_as_image_reward_does():
    reward = LearnedReward(tiny_clip_tower(), "mlp")
    shapes = [tuple(layer.weight.shape) for layer in reward.layers]
    assert shapes == [(1024, 24), (128, 1024), (64, 128), (16, 64), (1, 16)]
    assert reward.layers[1].weight.std().item() == pytest.approx(1 / 25, rel=0.02)
    assert all((layer.bias == 0).all() for layer in reward.layers)


def test_dropout_belongs_to_the_sample():
    reward = make("clip", "mlp")
    keys = torch.tensor([5, 6, 7])
    dropped = reward.raw(images(), PROMPTS, keys)
    alone = reward.raw(images()[1:2], PROMPTS[1:2], keys[1:2])
    torch.testing.assert_close(dropped[1:2], alone, atol=1e-4, rtol=0)
    assert (dropped - reward.raw(images(), PROMPTS)).abs().min() > ATOL
    again = reward.raw(images(), PROMPTS, torch.tensor([5, 6, 8]))
    assert again[2] != dropped[2]


def test_dropout_keeps_the_mean_and_its_shares():
    reward = make("clip", "mlp")
    for keep, share in zip(reward._keep(torch.arange(200)), (0.2, 0.2, 0.1), strict=True):
        assert (keep == 0).float().mean().item() == pytest.approx(share, abs=0.01)
        assert keep.mean().item() == pytest.approx(1, abs=0.01)


def test_standardised_scores_of_the_fixed_set():
    reward = make("clip", "linear")
    raw = reward.raw(images(), PROMPTS)
    reward.standardise(raw.mean(), raw.std())
    scores = reward(images(), PROMPTS)
    assert scores.mean().item() == pytest.approx(0, abs=ATOL)
    assert scores.std().item() == pytest.approx(1, abs=ATOL)
    with pytest.raises(ValueError, match=r"positive std of its raw scores, got 1.0 and 0.0"):
        reward.standardise(1.0, 0.0)


@pytest.mark.parametrize(("kind", "head"), BOTH)
def test_saved_and_opened_it_scores_the_same(kind, head, tmp_path):
    reward = make(kind, head, version=3)
    reward.standardise(0.4, 2.0)
    reward.save_pretrained(tmp_path / "it")
    assert sorted(p.name for p in (tmp_path / "it").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json"]  # fmt: skip
    opened = LearnedReward(pretrained=str(tmp_path / "it"), name="mine")
    assert (opened.name, opened.version, reward.name) == ("mine", 3, "LearnedReward")
    torch.testing.assert_close(opened(images(), PROMPTS), reward(images(), PROMPTS), atol=0, rtol=0)
    assert not any(p.requires_grad for p in opened.parameters())


def test_half_precision_on_disk_and_float32_in_use(tmp_path):
    reward = make("clip", "linear")
    reward.standardise(0.123456789, 2.0)
    reward.save_pretrained(tmp_path, torch.float16)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["layers.0.weight"].dtype == torch.float16
    assert stored["mean"] == reward.mean
    opened = LearnedReward(pretrained=str(tmp_path))
    assert {p.dtype for p in opened.parameters()} == {torch.float32}
    error = opened(images(), PROMPTS) - reward(images(), PROMPTS)
    assert error.abs().max() < 1e-2


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("freeze", [0.0, 0.5, "tower"])
def test_what_is_trained_gets_a_gradient_and_nothing_else(kind, head, freeze):
    reward = make(kind, head)
    reward.set_trainable(freeze)
    reward.raw(images(), PROMPTS).sum().backward()
    for name, parameter in reward.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert all(p.requires_grad for p in reward.layers.parameters())
    trained = sum(p.requires_grad for p in reward.tower.parameters())
    total = len(list(reward.tower.parameters()))
    assert {0.0: trained >= total - 1, 0.5: 0 < trained < total - 1, "tower": trained == 0}[freeze]


def test_half_of_the_layers_is_the_lower_half():
    reward = make("blip", "linear")
    reward.set_trainable(0.5)
    for embeddings, below, above in reward.tower.stacks():
        assert not any(p.requires_grad for p in [*embeddings.parameters(), *below.parameters()])
        assert all(p.requires_grad for p in above.parameters())
    with pytest.raises(ValueError, match=r"`freeze` must be a share in \[0, 1\] or 'tower', got 2"):
        reward.set_trainable(2)


def test_pixels_are_the_centre_square_resized_and_normalised():
    tower = tiny_clip_tower()
    wide = torch.zeros(1, 3, 32, 64)
    wide[..., 16:48] = images(1)
    mean, std = (torch.tensor(v)[:, None, None] for v in (tower.mean, tower.std))
    torch.testing.assert_close(tower.pixels(wide), (images(1) - mean) / std, atol=ATOL, rtol=0)
    assert tower.pixels(images(1, 100)).shape == (1, 3, 32, 32)


def test_the_shapes_tower_starts_from_the_shipped_encoder():
    tower, encoder = shapes_tower(), ShapesCLIP()
    torch.testing.assert_close(
        tower.similarity(images(), PROMPTS), encoder(images(), PROMPTS), atol=ATOL, rtol=0
    )
    assert shapes_tower(None, width=16).width == 48


def test_the_shipped_preference_likes_a_kept_caption_and_is_standardised():
    pairs = ShapesPairs(64, 5, ("heldout",))
    pixels = torch.stack([pairs[i]["image"] for i in range(64)])
    reward = ShapesPreference()
    own, other = reward(pixels, pairs.captions), reward(pixels, pairs.captions[::-1])
    assert (own > other).float().mean() > 0.85
    assert torch.cat([own, other]).mean().abs() < 0.5
    assert torch.cat([own, other]).std().item() == pytest.approx(1, abs=0.3)
    assert (reward.name, ShapesPreference(name="taste").name) == ("ShapesPreference", "taste")


def test_a_tower_is_described_in_plain_values():
    options = tiny_blip_tower().options()
    rebuilt = tower_from(json.loads(json.dumps(options)))
    assert rebuilt.options() == options
    ids, mask = rebuilt.tokens(["a red circle", "small"])
    assert ids.tolist() == [[2, 5, 6, 7, 3, 0], [2, 9, 3, 0, 0, 0]]
    assert mask.sum().item() == 8
    with pytest.raises(
        ValueError, match=r"There is no tower 'VGG'; known are CLIPRewardTower, BLIP"
    ):
        tower_from({"kind": "VGG"})


def test_errors_name_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"Give `pretrained`, or a `tower`"):
        LearnedReward()
    with pytest.raises(ValueError, match=r"`head` must be 'cosine', 'linear' or 'mlp', got 'vgg'"):
        LearnedReward(tiny_clip_tower(), "vgg")
    with pytest.raises(FileNotFoundError, match=r"no learned reward 'nowhere'; give a folder"):
        LearnedReward(pretrained="nowhere")
    with pytest.raises(ValueError, match=r"lacks config.json: it is no folder that"):
        LearnedReward(pretrained=str(tmp_path))
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    with pytest.raises(ValueError, match=r"is damaged or no checkpoint"):
        LearnedReward(pretrained=str(tmp_path / "text.ckpt"))
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"holds no learned reward; give a checkpoint of Reward"):
        LearnedReward(pretrained=str(tmp_path / "other.ckpt"))
    with pytest.raises(ValueError, match=r"BLIPRewardTower has no cosine of image and prompt; use"):
        LearnedReward(tiny_blip_tower(), "cosine")(images(), PROMPTS)
    make("clip", "linear").save_pretrained(tmp_path / "it")
    with pytest.raises(ValueError, match=r"Give either `pretrained`, or `tower` and `head`"):
        LearnedReward(tiny_clip_tower(), pretrained=str(tmp_path / "it"))
    with pytest.raises(ValueError, match=r"Give a tower either `pretrained` or `model`"):
        CLIPRewardTower()

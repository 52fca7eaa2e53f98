import io

import numpy as np
import pytest
import torch
from PIL import Image

from lit_align.rewards import (
    Colorfulness,
    JPEGCompressibility,
    RewardModule,
    ShapesVerifier,
    WeightedReward,
)
from lit_align.rewards.base import checked_scores, uint8_images
from lit_align.rewards.shapes_clip import ShapesCLIP, build_shapes_clip
from lit_align.shapes.grammar import parse
from lit_align.shapes.renderer import render
from tests.shapes.test_world import scenes_of

PROMPTS = ["a red circle", "two blue squares", "a triangle on a black background"]


@pytest.fixture
def images():
    return render(scenes_of([parse(prompt) for prompt in PROMPTS]))


def all_rewards():
    return [
        Colorfulness(),
        JPEGCompressibility(),
        JPEGCompressibility(negative=True),
        ShapesVerifier(),
        build_shapes_clip(width=16, layers=1),
        WeightedReward(
            {"a": Colorfulness(), "b": ShapesVerifier()}, {"a": 1.0, "b": 2.0}, normalize="none"
        ),
    ]


@pytest.mark.parametrize("reward", all_rewards(), ids=lambda r: r.name)
def test_contract(reward, images):
    """N in, N out, float32, permuting with the images, no gradient to parameters."""
    scores = checked_scores(reward, reward(images, PROMPTS).detach(), 3)
    assert scores.isfinite().all()
    order = [2, 0, 1]
    permuted = reward(images[order], [PROMPTS[i] for i in order])
    torch.testing.assert_close(permuted, scores[order], atol=1e-5, rtol=1e-5)
    assert not any(p.requires_grad for p in reward.parameters())
    pixels = images.clone().requires_grad_(True)
    assert reward(pixels, PROMPTS).requires_grad == reward.differentiable
    if reward.differentiable:
        (gradient,) = torch.autograd.grad(reward(pixels, PROMPTS).sum(), pixels)
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0


def test_colorfulness_by_hand():
    # Half the pixels red (1, 0, 0), half blue (0, 0, 1): rg = +1 / 0, yb = +0.5 / -1.
    image = torch.zeros(1, 3, 2, 2)
    image[0, 0, 0], image[0, 2, 1] = 1.0, 1.0
    # std rg 0.5, std yb 0.75, mean rg 0.5, mean yb -0.25
    expected = (0.25 + 0.5625) ** 0.5 + 0.3 * (0.25 + 0.0625) ** 0.5
    assert Colorfulness()(image, [""]).item() == pytest.approx(expected, rel=1e-5)
    gray = torch.full((1, 3, 4, 4), 0.3)
    assert Colorfulness()(gray, [""]).item() == pytest.approx(0, abs=2e-4)


def test_jpeg_sizes():
    black = JPEGCompressibility()(torch.zeros(1, 3, 512, 512), [""]).item()
    noise = torch.rand(1, 3, 512, 512, generator=torch.Generator().manual_seed(0))
    assert black == pytest.approx(-4.72, abs=0.1)
    assert JPEGCompressibility(negative=True)(noise, [""]).item() == pytest.approx(308, rel=0.02)


def test_jpeg_is_the_file_that_pillow_writes(images):
    buffer = io.BytesIO()
    pixels = (images[1].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95, subsampling=2)
    size = JPEGCompressibility()(images, PROMPTS)[1].item()
    assert size == pytest.approx(-buffer.tell() / 1000, rel=1e-6)


def test_uint8_images_round_and_clamp():
    image = torch.tensor([-0.1, 0.5 / 255 + 1e-4, 1.7]).view(1, 3, 1, 1)
    assert uint8_images(image).flatten().tolist() == [0, 1, 255]


def test_verifier_prefers_metadata_and_leaves_other_prompts_unscored(images):
    reward = ShapesVerifier()
    metadata = [parse(prompt).to_metadata() for prompt in PROMPTS]
    expected = reward(images, PROMPTS)
    torch.testing.assert_close(reward(images, ["?"] * 3, metadata), expected)
    mixed = reward(images, [PROMPTS[0], "a photo of a dog", PROMPTS[2]])
    assert mixed.isnan().tolist() == [False, True, False]
    assert reward(images, ["?"] * 3).isnan().all()
    assert (expected > 0.97).all()


def test_clip_round_trips_through_its_folder(images, tmp_path):
    encoder = build_shapes_clip(width=16, layers=1)
    encoder.save_pretrained(tmp_path)
    opened = ShapesCLIP(str(tmp_path))
    torch.testing.assert_close(opened(images, PROMPTS), encoder(images, PROMPTS))
    assert encoder(images, PROMPTS).abs().max() <= 1
    larger = torch.nn.functional.interpolate(images, scale_factor=2)
    assert encoder.embed_images(larger).shape == (3, 16)


class Fixed(RewardModule):
    """Returns the numbers it was given."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def forward(self, images, prompts, metadata=None, group_ids=None):
        return torch.tensor(self.values)


def test_weighted_sum_without_normalisation(images):
    reward = WeightedReward(
        {"a": Fixed([1.0, 2.0, 3.0]), "b": Fixed([0.0, torch.nan, 1.0])},
        {"a": 2.0, "b": -1.0},
        "none",
    )
    scores = reward(images, PROMPTS)
    assert scores[[0, 2]].tolist() == [2, 5]
    assert scores[1].isnan()


def test_running_statistics_follow_training_only(images):
    term = Fixed([1.0, torch.nan, 3.0])
    reward = WeightedReward({"a": term}, {"a": 1.0})
    assert reward(images, PROMPTS)[0].item() == 1  # nothing seen: mean 0, std 1
    reward.train()
    assert reward(images, PROMPTS)[[0, 2]].tolist() == [-1, 1]  # mean 2, std 1
    term.values = [2.0, 2.0, 2.0]
    reward(images, PROMPTS)  # now 1, 3, 2, 2, 2: mean 2, variance 0.4
    term.values = [2.0, 4.0, 2.0]
    reward.eval()
    expected = torch.tensor([0.0, 2 / 0.4**0.5, 0.0])
    torch.testing.assert_close(reward(images, PROMPTS), expected)
    torch.testing.assert_close(reward(images, PROMPTS), expected)
    restored = WeightedReward({"a": term}, {"a": 1.0})
    restored.load_statistics(reward.statistics())
    torch.testing.assert_close(restored(images, PROMPTS), expected)


def test_weighted_flags_and_errors():
    mixed = WeightedReward({"a": Colorfulness(), "b": ShapesVerifier()}, {"a": 1.0, "b": 1.0})
    assert not mixed.differentiable
    assert mixed.needs_prompt
    assert WeightedReward({"a": Colorfulness()}, {"a": 1.0}).differentiable
    with pytest.raises(ValueError, match=r"same terms, got \['a'\] and \['b'\]"):
        WeightedReward({"a": Colorfulness()}, {"b": 1.0})
    assert not any(term.training for term in mixed.train().terms.values())


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (torch.zeros(3, 1), ValueError, r"one score per image, shape \[3\], got \[3, 1\]"),
        (torch.zeros(3, dtype=torch.float64), TypeError, "float32 tensor, got torch.float64"),
        ([0.0, 0.0, 0.0], TypeError, "float32 tensor, got list"),
    ],
)
def test_broken_rewards_are_named(value, error, message):
    with pytest.raises(error, match=f"Colorfulness must return .*{message}"):
        checked_scores(Colorfulness(), value, 3)


def test_networks_of_a_reward_stay_in_evaluation_mode():
    class Dropping(RewardModule):
        def __init__(self):
            super().__init__()
            self.dropout = torch.nn.Dropout(0.5)

        def forward(self, images, prompts, metadata=None, group_ids=None):
            return self.dropout(images).mean(dim=(1, 2, 3))

    reward = Dropping().train()
    assert reward.training
    images = torch.ones(2, 3, 4, 4)
    assert torch.equal(reward(images, ["", ""]), torch.ones(2))
    assert not reward.eval().training

"""Pixels before an image encoder, against PIL's resize of the same images."""

import numpy as np
import pytest
import torch
from PIL import Image

from lit_align.functional.pixels import (
    CLIP_MEAN,
    CLIP_STD,
    centre_square,
    normalise,
    padded_square,
    resize,
)

PARITY = 5e-3  # mean difference in pixel units; without antialiasing it is ten times as much


def picture(height, width, seed=0):
    """Return a picture [3, H, W] uint8 with edges and noise at several scales."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST))
    noisy = image.astype(int) + generator.integers(-40, 40, image.shape)
    return torch.from_numpy(noisy.clip(0, 255).astype(np.uint8)).permute(2, 0, 1)


def by_pil(pixels, height, width):
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1) / 255


@pytest.mark.parametrize(("size", "to"), [(512, 224), (768, 224), (128, 224), (512, 384)])
def test_resize_agrees_with_pil(size, to):
    pixels = picture(size, size)
    error = (resize(pixels[None] / 255, to, to)[0] - by_pil(pixels, to, to)).abs().mean()
    assert error < PARITY


def test_without_antialiasing_it_would_not():
    pixels = picture(512, 512)
    plain = resize(pixels[None] / 255, 224, 224, antialias=False)[0]
    assert (plain - by_pil(pixels, 224, 224)).abs().mean() > 2 * PARITY


@pytest.mark.parametrize("sides", [(512, 768), (768, 512), (512, 512)])
def test_centre_square_scales_the_short_side_and_crops_the_long_one(sides):
    pixels = picture(*sides)
    scaled = by_pil(pixels, *(side * 224 // 512 for side in sides))
    top, left = ((side - 224) // 2 for side in scaled.shape[-2:])
    expected = scaled[:, top : top + 224, left : left + 224]
    assert (centre_square(pixels[None] / 255, 224)[0] - expected).abs().mean() < PARITY


def test_padded_square_scales_the_long_side_and_adds_black_evenly():
    images = torch.ones(1, 3, 64, 128)
    padded = padded_square(images, 32)
    assert padded.shape == (1, 3, 32, 32)
    torch.testing.assert_close(padded[..., 8:24, :], images[..., :16, :32])
    assert (padded[..., :8, :] == 0).all()
    assert (padded[..., 24:, :] == 0).all()
    odd = padded_square(torch.ones(1, 3, 30, 32), 32)  # 2 lines are left: one above, one below
    assert odd[0, 0, :, 0].tolist() == [0, *[1] * 30, 0]


def test_a_square_is_only_resized():
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(padded_square(images, 32), resize(images, 32, 32))
    assert torch.equal(centre_square(images, 32), resize(images, 32, 32))


def test_normalise_by_channel_and_gradient():
    images = torch.rand(2, 3, 40, 50, requires_grad=True)
    pixels = normalise(centre_square(images, 32))
    mean, std = (torch.tensor(v)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    torch.testing.assert_close(pixels * std + mean, centre_square(images, 32))
    pixels.sum().backward()
    assert images.grad.isfinite().all()
    assert images.grad.abs().sum() > 0

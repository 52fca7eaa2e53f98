import pytest
import torch

from lit_align.metrics import DriftStatistics, image_statistics

ATOL = 1e-5


def plain(red, green, blue, size=8):
    return torch.tensor([red, green, blue])[None, :, None, None].expand(1, 3, size, size)


def grey(pattern):
    return pattern[None, None].expand(1, 3, *pattern.shape)


def statistics(images):
    return {name: values.item() for name, values in image_statistics(images).items()}


@pytest.mark.parametrize(
    ("colour", "luminance", "saturation", "saturated"),
    [
        ((0.0, 0.0, 0.0), 0, 0, 1),
        ((1.0, 1.0, 1.0), 1, 0, 1),
        ((1.0, 0.0, 0.0), 0.2126, 1, 1),
        ((0.5, 0.5, 0.5), 0.5, 0, 0),
        ((0.2, 0.4, 0.8), 0.2126 * 0.2 + 0.7152 * 0.4 + 0.0722 * 0.8, 0.75, 0),  # (.8 - .2) / .8
        ((0.001, 0.5, 0.5), 0.2126 * 0.001 + 0.7874 * 0.5, 0.998, 1),  # 0.255 of 255 rounds to 0
        ((0.5, 0.5, 0.9985), 0.9278 * 0.5 + 0.0722 * 0.9985, 0.4985 / 0.9985, 1),  # 254.6 to 255
        ((0.5, 0.5, 0.9975), 0.9278 * 0.5 + 0.0722 * 0.9975, 0.4975 / 0.9975, 0),  # 254.4 to 254
    ],
)
def test_plain_colours(colour, luminance, saturation, saturated):
    result = statistics(plain(*colour))
    assert result["luminance"] == pytest.approx(luminance, abs=ATOL)
    assert result["saturation"] == pytest.approx(saturation, abs=ATOL)
    assert result["saturated_pixels"] == saturated
    assert result["high_frequency"] == 0


def test_a_checkerboard_is_all_high_frequency():
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    result = statistics(grey(0.25 + 0.5 * ((rows + columns) % 2)))
    assert result["high_frequency"] == pytest.approx(1, abs=ATOL)
    assert result["luminance"] == pytest.approx(0.5, abs=ATOL)
    assert result["saturated_pixels"] == 0


def wave(cycles_per_pixel, amplitude, size=32):
    phase = 2 * torch.pi * cycles_per_pixel * torch.arange(size)
    return (amplitude * torch.sin(phase)).expand(size, size)


def test_energy_is_split_at_half_the_nyquist_frequency():
    # Waves of 2 / 32 and 12 / 32 cycles per pixel, amplitudes 1 and 2: energies 1 and 4.
    mixed = grey(0.5 + wave(2 / 32, 0.1) + wave(12 / 32, 0.2))
    assert statistics(mixed)["high_frequency"] == pytest.approx(0.8, abs=ATOL)
    for cycles, share in ((8 / 32, 0), (9 / 32, 1)):
        image = grey(0.5 + wave(cycles, 0.1))
        assert statistics(image)["high_frequency"] == pytest.approx(share, abs=ATOL)
        turned = image.transpose(2, 3)
        assert statistics(turned)["high_frequency"] == pytest.approx(share, abs=ATOL)


def test_images_are_measured_one_by_one_and_averaged():
    images = torch.cat([plain(0.0, 0.0, 0.0), plain(1.0, 1.0, 1.0), plain(0.5, 0.5, 0.5)])
    assert image_statistics(images)["luminance"].tolist() == pytest.approx([0, 1, 0.5])
    metric = DriftStatistics()
    metric.update(images[:2], latents=torch.full((2, 4, 3, 3), -3.0))
    metric.update(images[2:])
    result = metric.compute()
    assert result["luminance"].item() == pytest.approx(0.5)
    assert result["saturated_pixels"].item() == pytest.approx(2 / 3)
    assert result["latent_norm"].item() == pytest.approx(3)  # of the two whose latents are known


def test_the_size_of_latents_is_a_root_mean_square():
    metric = DriftStatistics()
    latents = torch.tensor([[3.0, 4.0], [0.0, 0.0]])  # sqrt(25 / 2) and 0
    metric.update(torch.rand(2, 3, 4, 4), latents)
    assert metric.compute()["latent_norm"].item() == pytest.approx(12.5**0.5 / 2)
    metric.reset()
    metric.update(torch.rand(2, 3, 4, 4))
    assert metric.compute()["latent_norm"].isnan()


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"`images` must be \[B, 3, H, W\], got \[2, 1, 8, 8\]"):
        image_statistics(torch.rand(2, 1, 8, 8))

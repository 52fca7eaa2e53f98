import pytest
import torch
import torch.nn.functional as F

from lit_align.policies.features import predict_with_features, taps_of
from lit_align.policies.time_prediction import TimePredictor
from tests.conftest import tiny_policy

ATOL = 1e-5
FAMILIES = pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
PROMPTS = ["a red circle", "a blue square", "a triangle"]


def call(policy, latents, guidance_scale=1.0, times=None):
    times = torch.tensor([1000.0, 400.25, 3.0])[: len(latents)] if times is None else times
    conditioning = policy.encode_prompt(PROMPTS[: len(latents)])
    with torch.no_grad():
        output, features = predict_with_features(
            policy, latents, times, conditioning, guidance_scale
        )
        expected = policy.predict(latents, times, conditioning, guidance_scale)
    assert torch.equal(output, expected)  # and the hooks are gone
    return output, features


def noise(policy, batch=3, rows=8, columns=8):
    channels = policy.latent_shape()[0]
    return torch.randn(batch, channels, rows, columns)


@FAMILIES
def test_widths_are_those_that_the_taps_tell(family):
    policy = tiny_policy(family, train="none")
    _, features = call(policy, noise(policy))
    taps = taps_of(policy)
    side = 8 // policy.patch_size
    assert features.maps.shape == (3, 2 * taps.channels, side, side)
    assert features.embedding.shape == (3, taps.embedding_dim)
    assert features.maps.dtype == features.embedding.dtype == torch.float32
    head = TimePredictor.for_policy(policy, width=8)
    shapes = head(features.maps, features.embedding, torch.ones(3))
    assert [shape.shape for shape in shapes] == [(3,), (3,)]
    modules = policy.denoiser.modules()
    assert not any(module._forward_hooks for module in modules)


def head_of(policy, family, last):
    """Return the network's output, made of its last features as the network makes it."""
    net, (rows, columns) = policy.denoiser, last.shape[2:]
    if family in ("sd", "sdxl"):
        return net.conv_out(net.conv_act(net.conv_norm_out(last)))
    patches = net.proj_out(last.flatten(2).mT)  # [B, rows columns, 2 2 C]
    if family == "sd3":
        patches = patches.view(len(last), rows, columns, 2, 2, -1).permute(0, 5, 1, 3, 2, 4)
        return patches.reshape(len(last), -1, 2 * rows, 2 * columns)
    return F.pixel_shuffle(patches.mT.unflatten(2, (rows, columns)), 2)


@pytest.mark.parametrize("size", [(8, 8), (4, 8), (8, 4)])
@FAMILIES
def test_features_lie_where_the_image_has_them(family, size):
    """Also in images that are not square: the output can be made of the last features."""
    policy = tiny_policy(family, train="none")
    latents = noise(policy, 3, *size)
    output, features = call(policy, latents)
    first, last = features.maps.chunk(2, dim=1)
    with torch.no_grad():
        torch.testing.assert_close(head_of(policy, family, last), output, atol=ATOL, rtol=ATOL)
    changed = latents.clone()
    row, column = size[0] - 2, 1
    changed[:, :, row, column] += 1.0
    moved = (call(policy, changed)[1].maps.chunk(2, dim=1)[0] - first).abs().sum(dim=(0, 1))
    places = (moved > ATOL).nonzero().double()
    patch = policy.patch_size
    assert places.mean(dim=0).tolist() == [row // patch, column // patch]
    assert len(places) == (9 if family in ("sd", "sdxl") else 1)  # a 3x3 convolution, or a token


def test_embeddings_are_those_of_the_time():
    policy = tiny_policy("sd", train="none")
    _, features = call(policy, noise(policy))
    times = torch.tensor([1000.0, 400.25, 3.0])
    torch.testing.assert_close(features.embedding, policy.denoiser.time_proj(times))
    policy = tiny_policy("sd3", train="none")
    _, features = call(policy, noise(policy))
    pooled = policy.encode_prompt(PROMPTS)["pooled_prompt_embeds"]
    with torch.no_grad():
        expected = policy.denoiser.time_text_embed(times, pooled)
    torch.testing.assert_close(features.embedding, expected, atol=ATOL, rtol=ATOL)


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_guidance_extrapolates_features_as_it_does_the_output(family):
    policy = tiny_policy(family, train="none")
    latents, times = noise(policy), torch.tensor([900.0, 400.0, 3.0])
    conditioning = policy.encode_prompt(PROMPTS)
    negative = {k.removeprefix("negative_"): v for k, v in conditioning.items() if "negative" in k}
    with torch.no_grad():
        (_, c), (_, u), (_, guided) = (
            predict_with_features(policy, latents, times, texts, scale)
            for texts, scale in ((conditioning, 1.0), (negative, 1.0), (conditioning, 3.0))
        )
    assert not torch.allclose(c.maps, u.maps)
    for name in ("maps", "embedding"):
        one, other = getattr(c, name), getattr(u, name)
        expected = other + 3 * (one - other)
        torch.testing.assert_close(getattr(guided, name), expected, atol=10 * ATOL, rtol=1e-4)


def test_embedded_guidance_is_one_branch():
    policy = tiny_policy("flux", train="none")
    latents = noise(policy)
    (_, one), (_, other) = (call(policy, latents, scale) for scale in (1.0, 3.0))
    assert one.maps.shape == other.maps.shape
    assert not torch.allclose(one.embedding, other.embedding)


def test_hooks_are_removed_after_a_failure():
    policy = tiny_policy("sd", train="none")
    with pytest.raises(KeyError):
        predict_with_features(policy, noise(policy), torch.ones(3), {}, 1.0)
    assert not any(module._forward_hooks for module in policy.denoiser.modules())


def test_a_family_without_taps_is_named():
    policy = tiny_policy("sd", train="none")
    with pytest.raises(ValueError, match="object names no features: give it a method"):
        taps_of(object())
    assert taps_of(policy).last == "up_blocks.1"

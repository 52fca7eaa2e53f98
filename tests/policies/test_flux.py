"""What is Flux's own: packed latents, embedded guidance, times that depend on the image size."""

import math

import pytest
import torch
from diffusers import FluxTransformer2DModel

from lit_align.functional.noise import sample_generators
from lit_align.policies import FluxPolicy, adapters
from lit_align.policies.blueprints import build_shapes_flux
from tests.algorithms.harness import fit, make_ddpo
from tests.conftest import tiny_pipeline, tiny_policy

ATOL = 1e-6
PROMPTS = ["a red circle", "two small blue squares", "a triangle"]


def schnell(**options):
    """Return a policy without embedded guidance, whose times do not depend on the size."""
    pipeline = build_shapes_flux(
        layers=1, single_layers=1, heads=2, head_width=8, text_width=16, guidance_embeds=False
    )
    return FluxPolicy(pipeline, **{"image_size": 32, **options})


POLICIES = {"dev": lambda **options: tiny_policy("flux", **options), "schnell": schnell}
both = pytest.mark.parametrize("model", POLICIES)


def sample(policy, guidance_scale=1.0, steps=3, **options):
    return policy.sample(
        policy.encode_prompt(PROMPTS),
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=sample_generators("test", 0, 0, range(len(PROMPTS))),
        stochastic_steps=(),
        **options,
    )


@both
@pytest.mark.parametrize("size", [32, (64, 32), (16, 48)])
@pytest.mark.parametrize("steps", [1, 4, 7])
def test_times_are_those_of_the_pipeline(model, size, steps):
    policy = POLICIES[model](train="none", image_size=size)
    height, width = policy.image_size
    policy.pipeline.set_progress_bar_config(disable=True)
    policy.pipeline(
        PROMPTS[0], height=height, width=width, num_inference_steps=steps, guidance_scale=1.0,
        max_sequence_length=16, output_type="latent",
    )  # fmt: skip
    policy.scheduler.set_timesteps(steps)
    assert torch.equal(policy.scheduler.timesteps, policy.pipeline.scheduler.timesteps)
    assert torch.equal(policy.scheduler.sigmas, policy.pipeline.scheduler.sigmas)


@pytest.mark.parametrize("size", [512, 720, 1024])
def test_the_shift_of_flux_dev(size):
    """mu goes from 0.5 at 256 image tokens to 1.15 at 4,096.

    With m = e^mu a time s becomes m s / (1 + (m - 1) s). A token covers 16 pixels there; the tiny
    VAE makes it 8.
    """
    policy = tiny_policy("flux", train="none", image_size=size // 2)
    policy.scheduler.set_timesteps(4)
    tokens = (size // 16) ** 2
    factor = math.exp(0.5 + (tokens - 256) / (4096 - 256) * (1.15 - 0.5))
    uniform = torch.tensor([1, 0.75, 0.5, 0.25, 0])
    expected = factor * uniform / (1 + (factor - 1) * uniform)
    torch.testing.assert_close(policy.scheduler.sigmas, expected)


def test_the_times_belong_to_the_size_of_the_policy():
    policy = tiny_policy("flux")
    with pytest.raises(ValueError, match="depend on the size.*height 64 and width None.*image_si"):
        sample(policy, height=64)
    assert sample(policy, height=64, width=16).latents.shape[2:] == (4, 16, 4)  # as many tokens
    assert schnell().latent_shape(64, 32) == (4, 16, 8)


def test_tokens_are_squares_of_two_latents_in_raster_order():
    policy = tiny_policy("flux", train="none", image_size=(16, 24))
    channels, rows, columns = policy.latent_shape()
    assert (channels, rows, columns) == (4, 4, 6)
    seen = {}

    def network(hidden_states, img_ids, txt_ids, **inputs):
        seen.update(tokens=hidden_states, places=img_ids, text=txt_ids, **inputs)
        return (hidden_states * 2,)

    policy.denoiser.forward = network
    latents, conditioning = torch.randn(2, 4, 4, 6), policy.encode_prompt(PROMPTS[:2])
    output = policy.predict(latents, torch.tensor([1000.0, 250.0]), conditioning, 3.5)
    torch.testing.assert_close(output, 2 * latents)
    assert seen["tokens"].shape == (2, 6, 16)
    for token, (row, column) in enumerate((r, c) for r in range(2) for c in range(3)):
        square = latents[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert torch.equal(seen["tokens"][:, token], square.flatten(1))
        assert seen["places"][token].tolist() == [0, row, column]
    assert seen["text"].shape == (16, 3)
    assert not seen["text"].any()
    assert seen["timestep"].tolist() == [1.0, 0.25]
    assert seen["guidance"].tolist() == [3.5, 3.5]


def test_guidance_is_an_input_of_one_forward():
    policy = tiny_policy("flux", train="none")
    conditioning = policy.encode_prompt(PROMPTS)
    assert set(conditioning) == {"prompt_embeds", "pooled_prompt_embeds"}
    latents, timesteps = torch.randn(3, 4, 8, 8), torch.full((3,), 500.0)
    rows, forward = [], policy.denoiser.forward

    def counting(hidden_states, **inputs):
        rows.append(len(hidden_states))
        return forward(hidden_states, **inputs)

    policy.denoiser.forward = counting
    one, more = (policy.predict(latents, timesteps, conditioning, g) for g in (1.0, 3.5))
    assert rows == [3, 3]
    assert (one - more).abs().max() > 1e-3
    assert torch.equal(policy(latents, timesteps, conditioning), one)
    assert policy.branches(1.0) == policy.branches(3.5) == 1
    assert tiny_policy("sd3").branches(3.5) == 2


@both
def test_a_network_without_guidance_refuses_it_before_any_work(model):
    module = make_ddpo("flux", guidance_scale=3.5)
    if model == "dev":
        fit(module)
        # 8 samples of 3 steps, 2 of them trained on, once each although guided
        assert module.counters["denoiser_calls"] == 8 * 3 + 8 * 2
        return
    module.policy = schnell()
    module.rollout = lambda *_: pytest.fail("It sampled.")
    with pytest.raises(ValueError, match="FluxPipeline has no guidance; set `guidance_scale: 1`"):
        fit(module)
    assert module.counters["denoiser_calls"] == 0
    with pytest.raises(ValueError, match="got 2.0"):
        sample(module.policy, 2.0)


def test_schnell_draws_the_pipelines_images():
    policy = schnell(train="none")
    expected = policy.pipeline(
        PROMPTS, num_inference_steps=3, generator=sample_generators("test", 0, 0, range(3)),
        output_type="pt", **policy.call_options,
    ).images  # fmt: skip
    images = policy.decode(sample(policy).latents[:, -1])
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)


@both
def test_number_of_text_tokens(model):
    policy = POLICIES[model](train="none")
    assert policy.max_sequence_length == 16
    assert policy.call_options["max_sequence_length"] == 16
    policy.pipeline.tokenizer_2.model_max_length = 512
    assert policy.max_sequence_length == {"dev": 512, "schnell": 256}[model]
    assert ("max_sequence_length" in policy.call_options) == (model == "schnell")
    # CLIP reads 16 tokens, T5 what is above: a prompt is cut only where both cut it.
    assert policy.truncated(["a circle " * count for count in (2, 60, 140, 300)]) == [
        False, False, model == "schnell", True,
    ]  # fmt: skip


def test_decoded_latents_are_shifted():
    policy = tiny_policy("flux", train="none")
    images = torch.rand(2, 3, 32, 32)
    mean = policy.vae.encode(images * 2 - 1).latent_dist.mode()
    scale = policy.vae.config.scaling_factor
    torch.testing.assert_close(policy.encode(images), (mean - 0.1) * scale, atol=ATOL, rtol=1e-5)


def test_its_size_is_the_pipelines():
    pipeline = tiny_pipeline("flux")
    assert FluxPolicy(pipeline, train="none").image_size == (128 * 4, 128 * 4)


def test_lora_covers_the_attention_of_both_kinds_of_blocks():
    """Of Flux.1, without any weights: 19 blocks of 8 projections, 38 of 3, width 3,072."""
    with torch.device("meta"):
        denoiser = FluxTransformer2DModel(guidance_embeds=True).requires_grad_(False)
        adapters.add_lora(denoiser, 4, 4, list(FluxPolicy.default_lora_targets))
    trained = {n: p for n, p in denoiser.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == (19 * 8 + 38 * 3) * 4 * 2 * 3072
    assert sum(n.startswith("single_transformer_blocks.") for n in trained) == 38 * 3 * 2


def test_the_attention_whose_backward_is_wrong_is_off():
    torch.backends.cuda.enable_cudnn_sdp(True)
    tiny_policy("flux")
    assert not torch.backends.cuda.cudnn_sdp_enabled()

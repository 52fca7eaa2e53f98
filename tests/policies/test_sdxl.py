"""What is SDXL's own: two text encoders, sizes as inputs, a VAE in float32, Turbo's times."""

import warnings

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn

from lit_align.functional.noise import sample_generators
from lit_align.policies import DiffusionPolicy, SDXLPolicy, adapters
from lit_align.policies.adapters import LORA_FILE
from lit_align.verbs import sample_images
from tests.conftest import tiny_pipeline, tiny_policy

PROMPTS = ["a red circle", "two small blue squares", "a triangle"]


def sample(policy, guidance_scale=3.0, steps=4, **options):
    return policy.sample(
        policy.encode_prompt(PROMPTS),
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=sample_generators("test", 0, 0, range(len(PROMPTS))),
        **options,
    )


def plain(pipeline, guidance_scale=3.0, steps=4, output_type="pt", **options):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        PROMPTS, num_inference_steps=steps, guidance_scale=guidance_scale,
        generator=sample_generators("test", 0, 0, range(3)), output_type=output_type, **options,
    ).images  # fmt: skip


@pytest.mark.parametrize("size", [32, (16, 40)])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize(
    ("prediction", "spacing", "zeros"),
    [("epsilon", "leading", True), ("v_prediction", "leading", False),
     ("v_prediction", "trailing", True)],
)  # fmt: skip
def test_deterministic_images_are_the_plain_pipelines(
    prediction, spacing, zeros, guidance_scale, size
):
    family = {"leading": "sdxl", "trailing": "sdxl-turbo"}[spacing]
    policy = tiny_policy(family, prediction, train="none", image_size=size)
    policy.pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
    expected = plain(policy.pipeline, guidance_scale, **policy.call_options)
    images = policy.decode(sample(policy, guidance_scale, stochastic_steps=()).latents[:, -1])
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)


def test_embeddings_of_the_empty_prompt():
    policy = tiny_policy("sdxl", train="none")
    empty = policy.encode_prompt([""])
    # 16 of the first encoder and 24 of the second, whose pooled output has 24 too.
    assert empty["prompt_embeds"].shape == (1, 16, 16 + 24)
    assert empty["pooled_prompt_embeds"].shape == (1, 24)
    for name in ("prompt_embeds", "pooled_prompt_embeds"):
        assert empty[name].abs().max() > 0
        assert not empty[f"negative_{name}"].any()
    policy.pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    conditioning = policy.encode_prompt(PROMPTS)
    for name in ("prompt_embeds", "pooled_prompt_embeds"):
        negative = conditioning[f"negative_{name}"]
        torch.testing.assert_close(negative, empty[name].expand_as(negative))


def test_embeddings_are_the_states_before_the_last_layer():
    """``h_{L-1}`` of both encoders, and the projection of the second's normalised last state."""
    policy = tiny_policy("sdxl", train="none")
    pipeline, conditioning = policy.pipeline, policy.encode_prompt(PROMPTS)
    tokens = pipeline.tokenizer(
        PROMPTS, padding="max_length", max_length=16, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        first = pipeline.text_encoder(tokens, output_hidden_states=True)
        second = pipeline.text_encoder_2(tokens, output_hidden_states=True)
    expected = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    torch.testing.assert_close(conditioning["prompt_embeds"], expected)
    torch.testing.assert_close(conditioning["pooled_prompt_embeds"], second.text_embeds)


@pytest.mark.parametrize("size", [(8, 8), (4, 10)])
def test_sizes_are_those_of_the_image_without_a_crop(size):
    policy, seen = tiny_policy("sdxl", train="none"), []
    forward = policy.denoiser.forward

    def watching(*args, added_cond_kwargs, **options):
        seen.append(added_cond_kwargs["time_ids"])
        return forward(*args, added_cond_kwargs=added_cond_kwargs, **options)

    policy.denoiser.forward = watching
    latents = torch.randn(3, 4, *size)
    policy.predict(latents, torch.full((3,), 500), policy.encode_prompt(PROMPTS), 3.0)
    height, width = 4 * size[0], 4 * size[1]
    assert seen[0].tolist() == [[height, width, 0, 0, height, width]] * 6


def turbo(scheduler=EulerAncestralDiscreteScheduler, **options):
    """Return a policy over a pipeline with the scheduler that Turbo's repository names."""
    pipeline = tiny_pipeline("sdxl-turbo")
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    return SDXLPolicy(pipeline, train="none", **options)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_turbo_has_the_times_of_its_pipeline(steps):
    policy = turbo()
    policy.scheduler.set_timesteps(steps)
    expected = EulerAncestralDiscreteScheduler.from_config(policy.pipeline.scheduler.config)
    assert expected.config.timestep_spacing == "trailing"
    expected.set_timesteps(steps)
    assert policy.scheduler.timesteps.tolist() == expected.timesteps.tolist()
    assert policy.scheduler.timesteps[0] == 999
    assert list(policy.scheduler.density_steps) == list(range(steps))


@pytest.mark.parametrize("steps", [1, 4])
def test_turbo_without_noise_is_ddim_of_its_configuration(steps):
    policy = turbo()
    images = policy.decode(sample(policy, 1.0, steps, stochastic_steps=()).latents[:, -1])
    policy.pipeline.scheduler = DDIMScheduler.from_config(policy.pipeline.scheduler.config)
    expected = plain(policy.pipeline, guidance_scale=0.0, steps=steps)  # as its card has it: none
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)


def test_turbo_has_one_branch():
    policy, rows = turbo(), []
    policy.denoiser.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    assert policy.branches(1.0) == 1
    sample(policy, guidance_scale=1.0, steps=2)
    assert rows == [3, 3]


def test_steps_without_noise_are_eulers_up_to_the_last():
    """In the scheduler of SDXL's repository states are ``x / sqrt(abar)``, noise sigma.

    ``1 / abar = 1 + sigma^2``. Its last step ends at sigma = 0, where DDIM's ends at time 0.
    """
    policy = turbo(EulerDiscreteScheduler)
    policy.pipeline.scheduler.register_to_config(timestep_spacing="leading")
    policy = SDXLPolicy(policy.pipeline, train="none")
    states = []

    def keep(pipeline, step, timestep, inputs):
        sigma = pipeline.scheduler.sigmas[step + 1]
        states.append(inputs["latents"] / (1 + sigma**2).sqrt())
        return inputs

    plain(policy.pipeline, output_type="latent", callback_on_step_end=keep)
    found = sample(policy, stochastic_steps=()).latents[:, 1:]
    torch.testing.assert_close(found[:, :3], torch.stack(states[:3], dim=1), atol=1e-4, rtol=1e-4)
    assert (found[:, 3] - states[3]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_vae_that_overflows_works_in_float32(dtype):
    expected, policy = tiny_policy("sdxl", train="none"), tiny_policy("sdxl", dtype=dtype)
    latents, images = torch.randn(2, 4, 8, 8), torch.rand(2, 3, 32, 32)
    assert policy.vae.dtype == torch.float32
    assert policy.denoiser.conv_in.weight.dtype == getattr(torch, dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(policy.decode(latents), expected.decode(latents))
        assert torch.equal(policy.encode(images), expected.encode(images))
    pipeline = tiny_pipeline("sdxl")
    pipeline.vae.register_to_config(force_upcast=False)  # as of the VAE repaired for float16
    assert SDXLPolicy(pipeline, dtype=dtype).vae.dtype == getattr(torch, dtype)


def test_a_vae_that_others_have_cast():
    """By `bf16-true`, or in a pipeline that was passed: backward needs what forward used."""
    policy, expected = tiny_policy("sdxl", train="none"), tiny_policy("sdxl", train="none")
    for vae in (policy.vae, expected.vae):
        nn.Module.to(vae, torch.bfloat16)
    nn.Module.to(expected.vae, torch.float32)  # its weights were rounded too
    latents = torch.randn(2, 4, 8, 8, requires_grad=True)
    with torch.no_grad():
        assert torch.equal(policy.decode(latents), expected.decode(latents))
    assert policy.vae.dtype == torch.bfloat16
    for batch_size in (None, 1):
        nn.Module.to(policy.vae, torch.bfloat16)
        (gradient,) = torch.autograd.grad(policy.decode(latents, batch_size).sum(), latents)
        (other,) = torch.autograd.grad(expected.decode(latents).sum(), latents)
        torch.testing.assert_close(gradient, other, atol=1e-5, rtol=1e-3)


def test_lora_trains_the_attention_of_the_unet_only():
    policy = tiny_policy("sdxl", train="lora")
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trained
    assert all(name.startswith("denoiser.") and ".attn" in name for name in trained)
    assert not any("lora" in name for name, _ in policy.text_encoders.named_parameters())


def test_lora_has_the_size_of_sdxl():
    """Of its U-Net, without any weights: 10 blocks of width 640 and 60 of 1,280, text of 2,048.

    A layer from a to b has r (a + b). Self-attention has four of 2 w, attention to the text two
    of 2 w and two of w + 2,048: in all 14 w + 4,096, which is 1,451,520 r.
    """
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        denoiser = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[1, 2, 10],
            attention_head_dim=[5, 10, 20],
            use_linear_projection=True,
            cross_attention_dim=2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ).requires_grad_(False)
        adapters.add_lora(denoiser, 4, 4, list(SDXLPolicy.default_lora_targets))
    trained = sum(p.numel() for p in denoiser.parameters() if p.requires_grad)
    assert trained == 4 * (10 * (14 * 640 + 4096) + 60 * (14 * 1280 + 4096)) == 4 * 1_451_520


def test_gradient_checkpointing_changes_nothing_but_memory():
    gradients = []
    for checkpointing in (False, True):
        policy = tiny_policy("sdxl", train="full", gradient_checkpointing=checkpointing)
        policy.denoiser.train(checkpointing)  # diffusers checkpoints in training mode only
        assert policy.denoiser.is_gradient_checkpointing == checkpointing
        conditioning = policy.encode_prompt(PROMPTS)
        latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        policy.predict(latents, torch.tensor([900, 500, 3]), conditioning, 3.0).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.denoiser.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-4, rtol=1e-4)


def test_exported_lora_draws_its_images_in_plain_diffusers(tmp_path):
    policy = tiny_policy("sdxl", train="lora", lora_rank=2, lora_alpha=7)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.2 * torch.randn_like(parameter) if parameter.requires_grad else 0
    policy.save_pretrained(tmp_path / "lora")
    tiny_pipeline("sdxl").save_pretrained(tmp_path / "base")
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path / "base", add_watermarker=False)
    pipeline.load_lora_weights(str(tmp_path / "lora"), weight_name=LORA_FILE)
    pipeline.set_progress_bar_config(disable=True)
    seeds = [3, 4]
    expected = pipeline(
        PROMPTS[:2], num_inference_steps=3, guidance_scale=5.0, output_type="pt",
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
    ).images  # fmt: skip
    images = sample_images(policy, PROMPTS[:2], seeds, 3, 5.0)
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)
    base = DiffusionPolicy.from_pretrained(str(tmp_path / "base"), train="none")
    assert type(base) is SDXLPolicy
    assert (sample_images(base, PROMPTS[:2], seeds, 3, 5.0) - images).abs().max() > 1e-3


def test_other_networks_of_the_pipeline_are_refused(tmp_path):
    pipeline = tiny_pipeline("sdxl")
    pipeline.unet.register_to_config(projection_class_embeddings_input_dim=24 + 5 * 8)
    with pytest.raises(ValueError, match="other sizes than the six of SDXL, as its refiner"):
        SDXLPolicy(pipeline)
    pipeline = tiny_pipeline("sdxl")
    pipeline.unet.register_to_config(time_cond_proj_dim=256)
    with pytest.raises(ValueError, match="guidance of StableDiffusionXLPipeline is an input"):
        SDXLPolicy(pipeline)
    pipeline = tiny_pipeline("sdxl")
    pipeline.vae.register_to_config(latents_mean=[0.0] * 4)
    with pytest.raises(ValueError, match="normalises latents by `latents_mean`"):
        SDXLPolicy(pipeline)
    # The refiner's repository.
    parts = tiny_pipeline("sdxl").components
    StableDiffusionXLImg2ImgPipeline(
        **parts, requires_aesthetics_score=True, add_watermarker=False
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a StableDiffusionXLImg2ImgPipeline, which has no po"):
        DiffusionPolicy.from_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="XLImg2ImgPipeline, not a StableDiffusionXLPipeline"):
        SDXLPolicy(str(tmp_path))

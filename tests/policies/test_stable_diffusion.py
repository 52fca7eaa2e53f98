"""Stable Diffusion 2.x: what differs from 1.x in its text encoder, its U-Net and its schedules."""

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from lit_align.functional.noise import sample_generators
from lit_align.policies import StableDiffusionPolicy
from tests.conftest import tiny_pipeline

PROMPTS = ["a red circle", "two small blue squares", "a triangle"]
# As in the repositories of SD 2.x: v-prediction with an offset of one step; and as in those that
# were trained to a terminal signal-to-noise ratio of zero (arXiv:2305.08891).
SCHEDULES = {
    "2.1": {"steps_offset": 1},
    "zero SNR": {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
}


def sd2(schedule):
    """Return a tiny pipeline with an OpenCLIP-like text encoder, heads by level, v-prediction."""
    parts = tiny_pipeline("sd").components
    config = parts["text_encoder"].config.to_dict() | {"hidden_act": "gelu"}
    parts["text_encoder"] = CLIPTextModel(CLIPTextConfig(**config)).eval()
    parts["unet"] = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=[2, 4],
        use_linear_projection=True,
        cross_attention_dim=16,
        norm_num_groups=8,
    )
    parts["scheduler"] = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, prediction_type="v_prediction", **SCHEDULES[schedule],
    )  # fmt: skip
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


def sample(policy, guidance_scale=3.0, **options):
    return policy.sample(
        policy.encode_prompt(PROMPTS),
        num_inference_steps=4,
        guidance_scale=guidance_scale,
        generator=sample_generators("test", 0, 0, range(3)),
        **options,
    ).latents


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_deterministic_images_are_the_plain_pipelines(guidance_scale):
    policy = StableDiffusionPolicy(sd2("2.1"), train="none")
    policy.pipeline.set_progress_bar_config(disable=True)
    expected = policy.pipeline(
        PROMPTS, num_inference_steps=4, guidance_scale=guidance_scale, output_type="pt",
        generator=sample_generators("test", 0, 0, range(3)),
    ).images  # fmt: skip
    images = policy.decode(sample(policy, guidance_scale, stochastic_steps=())[:, -1])
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)


def test_steps_from_a_state_without_signal():
    """Also the first of a schedule that starts at ``abar = 0``."""
    policy = StableDiffusionPolicy(sd2("zero SNR"), train="none")
    policy.pipeline.set_progress_bar_config(disable=True)
    states = []

    def keep(pipeline, step, timestep, inputs):
        states.append(inputs["latents"])
        return inputs

    policy.pipeline(
        PROMPTS, num_inference_steps=4, guidance_scale=3.0, output_type="latent",
        generator=sample_generators("test", 0, 0, range(3)), callback_on_step_end=keep,
    )  # fmt: skip
    assert policy.scheduler.scheduler.alphas_cumprod[999] == 0
    found = sample(policy, stochastic_steps=())[:, 1:]
    assert policy.scheduler.timesteps.tolist() == [999, 749, 499, 249]
    torch.testing.assert_close(found, torch.stack(states, dim=1), atol=1e-4, rtol=1e-4)
    assert sample(policy).isfinite().all()


def test_the_scheduler_of_another_class_keeps_its_configuration():
    pipeline = sd2("2.1")
    expected = sample(StableDiffusionPolicy(pipeline, train="none"), stochastic_steps=())
    config = {**pipeline.scheduler.config, "skip_prk_steps": True}
    pipeline.scheduler = PNDMScheduler.from_config(config)  # as 2.1-base has it
    found = sample(StableDiffusionPolicy(pipeline, train="none"), stochastic_steps=())
    assert torch.equal(found, expected)

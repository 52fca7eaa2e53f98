"""Wan: videos by the plain pipeline's rules, and what rewards see of them."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline

from lit_align.policies import DiffusionPolicy, WanPolicy
from lit_align.schedulers import StochasticFlowMatch
from tests.conftest import tiny_pipeline, tiny_policy

ATOL = 1e-5
PROMPTS = ["a red circle", "two blue squares"]


def generators(count=2):
    return [torch.Generator().manual_seed(7 + k) for k in range(count)]


def sample(policy, guidance_scale=1.0, **options):
    return policy.sample(
        policy.encode_prompt(PROMPTS), num_inference_steps=3, guidance_scale=guidance_scale,
        generator=generators(), **options,
    )  # fmt: skip


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_videos_are_those_of_the_plain_pipeline(guidance_scale):
    policy = tiny_policy("wan", train="none")
    latents = sample(policy, guidance_scale, stochastic_steps=()).latents[:, -1]
    plain = policy.pipeline(
        PROMPTS, height=32, width=32, num_frames=5, num_inference_steps=3,
        guidance_scale=guidance_scale, generator=generators(), output_type="pt",
        max_sequence_length=policy.max_sequence_length,
    ).frames  # fmt: skip
    torch.testing.assert_close(policy.decode(latents), plain, atol=1e-4, rtol=0)
    assert policy.decode(latents).shape == (2, *policy.pixel_shape) == (2, 5, 3, 32, 32)


@pytest.mark.parametrize("shift", [3.0, 5.0])
@pytest.mark.parametrize("steps", [4, 30, 50])
def test_noise_levels_are_those_of_the_released_scheduler(shift, steps):
    pipeline = tiny_pipeline("wan")
    pipeline.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    policy = WanPolicy(pipeline, image_size=32, num_frames=5)
    policy.scheduler.set_timesteps(steps)
    pipeline.scheduler.set_timesteps(steps)
    # Some versions of diffusers start a little below 1.
    torch.testing.assert_close(
        policy.scheduler.sigmas, pipeline.scheduler.sigmas, atol=1e-3, rtol=0
    )
    assert policy.scheduler.sigmas[0] == 1
    # UniPC cuts its times to integers.
    rounded = policy.scheduler.timesteps.long()
    assert (rounded - pipeline.scheduler.timesteps).abs().max() <= 1


def test_the_first_frame_needs_the_first_latents_only():
    policy = tiny_policy("wan", decode_latents=1)
    latents = sample(policy).latents[:, -1]
    frame = policy.decode(latents)
    assert frame.shape == (2, 3, 32, 32) == (2, *policy.pixel_shape)
    whole = policy.render(latents)
    assert whole.shape == (2, 5, 3, 32, 32)
    torch.testing.assert_close(frame, whole[:, 0])
    other = latents.clone()
    other[:, :, 1:] += 1
    assert torch.equal(policy.decode(other), frame)
    leaf = latents.clone().requires_grad_()
    policy.decode(leaf).sum().backward()
    assert leaf.grad[:, :, 0].abs().sum() > 0
    assert (leaf.grad[:, :, 1:] == 0).all()


def test_frames_are_kept_evenly():
    policy = tiny_policy("wan", num_frames=9, decode_frames=3)
    latents = sample(policy).latents[:, -1]
    assert latents.shape == (2, 4, 3, 4, 4)
    whole = policy.render(latents)
    assert whole.shape[1] == 9
    assert torch.equal(policy.decode(latents), whole[:, [0, 4, 8]])
    sliced = tiny_policy("wan", num_frames=9, decode_latents=2, decode_frames=2)
    torch.testing.assert_close(sliced.decode(latents), whole[:, [0, 4]])
    assert sliced.pixel_shape == (2, 3, 32, 32)


def test_one_frame_is_an_image():
    policy = tiny_policy("wan", num_frames=1)
    latents = sample(policy).latents[:, -1]
    assert latents.shape == (2, 4, 1, 4, 4)
    images = policy.decode(latents)
    assert images.shape == (2, 3, 32, 32)
    assert policy.encode(images).shape == latents.shape


def test_encode_is_the_vaes_posterior_mean_in_units_of_its_statistics():
    policy = tiny_policy("wan")
    videos = torch.rand(2, 5, 3, 32, 32)
    latents = policy.encode(videos)
    raw = policy.vae.encode(videos.transpose(1, 2) * 2 - 1).latent_dist.mode()
    for channel, (mean, std) in enumerate(
        zip(policy.vae.config.latents_mean, policy.vae.config.latents_std, strict=True)
    ):
        torch.testing.assert_close(latents[:, channel], (raw[:, channel] - mean) / std)
    with pytest.raises(ValueError, match="multiple of 4 frames and one, got 4"):
        policy.encode(videos[:, :4])


def test_replay_gives_the_ratio_one():
    policy = tiny_policy("wan")
    trajectory = sample(policy, guidance_scale=3.0)
    step = policy.replay(trajectory.step(0))
    torch.testing.assert_close(step.log_prob, trajectory.log_probs[:, 0], atol=ATOL, rtol=0)


def test_only_the_attention_is_adapted_and_it_reloads_in_plain_diffusers(tmp_path):
    policy = tiny_policy("wan", lora_rank=2, lora_alpha=4)
    trained = [n for n, p in policy.named_parameters() if p.requires_grad]
    assert trained
    assert all(".attn1." in name or ".attn2." in name for name in trained)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    policy.save_pretrained(tmp_path)
    expected = policy.decode(sample(policy, 3.0, stochastic_steps=()).latents[:, -1])
    plain = tiny_pipeline("wan")
    plain.load_lora_weights(str(tmp_path))
    found = plain(
        PROMPTS, num_inference_steps=3, guidance_scale=3.0, generator=generators(),
        output_type="pt", max_sequence_length=policy.max_sequence_length, **policy.call_options,
    ).frames  # fmt: skip
    torch.testing.assert_close(expected, found, atol=1e-4, rtol=0)


def test_a_whole_pipeline_reloads(tmp_path):
    policy = tiny_policy("wan", train="full")
    policy.save_pretrained(tmp_path)
    WanPipeline.from_pretrained(str(tmp_path))
    again = DiffusionPolicy.from_pretrained(str(tmp_path), train="none", image_size=32)
    assert type(again) is WanPolicy
    assert again.num_frames == 81
    again = WanPolicy(str(tmp_path), train="none", image_size=32, num_frames=5)
    latents = [sample(p, stochastic_steps=()).latents for p in (policy, again)]
    torch.testing.assert_close(*latents)


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        policy = tiny_policy("wan", gradient_checkpointing=checkpointing)
        policy.denoiser.train(checkpointing)
        trajectory = sample(policy)
        step = policy.replay(trajectory.step(0))
        step.log_prob.sum().backward()
        gradients.append([p.grad for p in policy.parameters() if p.grad is not None])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_every_token_may_have_its_time():
    """Wan2.2-TI2V gives each token a time of its own, all alike without a first image."""
    pipeline = tiny_pipeline("wan")
    expected = sample(WanPolicy(pipeline, image_size=32, num_frames=5, train="none")).latents
    pipeline.register_to_config(expand_timesteps=True)
    found = sample(WanPolicy(pipeline, image_size=32, num_frames=5, train="none")).latents
    torch.testing.assert_close(found, expected)


def test_half_precision_stays_finite():
    policy = tiny_policy("wan", dtype="bfloat16")
    dtypes = {p.dtype for p in policy.denoiser.condition_embedder.time_embedder.parameters()}
    assert dtypes == {torch.float32}
    assert policy.denoiser.dtype == torch.bfloat16
    trajectory = sample(policy, guidance_scale=3.0)
    assert trajectory.latents.isfinite().all()
    assert policy.decode(trajectory.latents[:, -1]).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 4}, "`num_frames` must be a multiple of 4 and one, such as 17, got 4"),
        ({"num_frames": 0}, "got 0"),
        ({"decode_latents": 3}, r"`decode_latents` must lie in \[1, 2\], the latent frames of 5"),
        ({"decode_latents": 1, "decode_frames": 2}, r"`decode_frames` must lie in \[1, 1\]"),
        ({"image_size": 40}, "multiples of 16 pixels"),
    ],
)
def test_errors_name_the_remedy(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_policy("wan", **options)


def test_two_networks_are_refused():
    pipeline = tiny_pipeline("wan")
    pipeline.register_to_config(boundary_ratio=0.875)
    with pytest.raises(ValueError, match="two networks"):
        WanPolicy(pipeline, image_size=32, num_frames=5)


def test_default_size_and_call():
    policy = WanPolicy(tiny_pipeline("wan"), train="none")
    assert policy.latent_shape() == (4, 21, 60, 104)
    assert policy.call_options == {"height": 480, "width": 832, "num_frames": 81}
    assert isinstance(policy.scheduler, StochasticFlowMatch)
    assert isinstance(policy.pipeline_scheduler(), FlowMatchEulerDiscreteScheduler)

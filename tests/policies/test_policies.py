import pytest
import torch
from diffusers import UNet2DConditionModel

from lit_align.functional.noise import sample_generators
from lit_align.policies import DiffusionPolicy, StableDiffusionPolicy, adapters
from lit_align.policies.adapters import LORA_FILE
from tests.conftest import POLICIES, tiny_pipeline, tiny_policy

ATOL = 1e-6
PROMPTS = ["a red circle", "two small blue squares", "a triangle"]
FAMILIES = [
    ("sd", "epsilon"), ("sd", "v_prediction"), ("sdxl", "epsilon"),
    ("sd3", "flow"), ("flux", "flow"),
]  # fmt: skip
ALL = pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])


def sample(policy, guidance_scale=3.0, steps=4, **options):
    return policy.sample(
        policy.encode_prompt(PROMPTS),
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=sample_generators("test", 0, 0, range(len(PROMPTS))),
        **options,
    )


def transitions(policy, trajectory):
    trajectory = trajectory.replace(
        advantages=torch.ones(len(PROMPTS)), weights=torch.ones(len(PROMPTS))
    )
    steps = torch.tensor(list(policy.scheduler.density_steps))
    samples = torch.arange(len(PROMPTS)).repeat_interleave(len(steps))
    return trajectory.transitions(samples, steps.repeat(len(PROMPTS)))


@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize(("family", "prediction"), FAMILIES)
def test_ratio_is_one_before_the_first_update(family, prediction, guidance_scale, train):
    policy = tiny_policy(family, prediction, train=train)
    trajectory = sample(policy, guidance_scale)
    mixed = transitions(policy, trajectory)
    log_ratio = policy.replay(mixed).log_prob - mixed.old_log_prob
    assert log_ratio.abs().max() < 10 * ATOL  # another batch layout: kernels round differently
    for step in policy.scheduler.density_steps:
        batch = mixed.select(torch.arange(step, len(mixed), len(policy.scheduler.density_steps)))
        ratio = (policy.replay(batch).log_prob - batch.old_log_prob).exp()
        assert (ratio - 1).abs().max() < ATOL


@ALL
def test_trajectory_shapes(family):
    policy = tiny_policy(family)
    trajectory = sample(policy)
    assert trajectory.latents.shape == (3, 5, 4, 8, 8)
    assert trajectory.timesteps.shape == trajectory.log_probs.shape == (3, 4)
    finite = trajectory.log_probs.isfinite().all(dim=0).nonzero().flatten().tolist()
    assert finite == list(policy.scheduler.density_steps)
    images = policy.decode(trajectory.latents[:, -1])
    assert images.shape == (3, 3, *policy.image_size) == (3, 3, 32, 32)
    assert 0 <= images.min() < images.max() <= 1
    if family != "flux":  # whose times would be others
        assert policy.latent_shape(64, 32) == (4, 16, 8)


@ALL
def test_images_of_another_size(family):
    policy = tiny_policy(family, image_size=(32, 16))
    assert policy.latent_shape() == (4, 8, 4)
    images = policy.decode(sample(policy, steps=2).latents[:, -1])
    assert images.shape == (3, 3, *policy.image_size) == (3, 3, 32, 16)
    assert tiny_policy(family, image_size=16).image_size == (16, 16)
    step = {"sd": 4, "sdxl": 4, "sd3": 8, "flux": 8}[family]
    for size in (step * 3 + step // 2, 0, -step):
        with pytest.raises(ValueError, match=f"multiples of {step} pixels, got .{size}, {size}"):
            tiny_policy(family, image_size=size)


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3"])
def test_guidance_of_one_is_the_conditional_branch(family):
    policy = tiny_policy(family)
    conditioning = policy.encode_prompt(PROMPTS)
    latents, timesteps = torch.randn(3, 4, 8, 8), torch.full((3,), 500)
    conditional = policy.predict(latents, timesteps, conditioning, 1.0)
    negative = {k.removeprefix("negative_"): v for k, v in conditioning.items() if "negative" in k}
    unconditional = policy.predict(latents, timesteps, negative, 1.0)
    guided = policy.predict(latents, timesteps, conditioning, 3.0)
    expected = unconditional + 3 * (conditional - unconditional)
    torch.testing.assert_close(guided, expected, atol=10 * ATOL, rtol=1e-4)


@pytest.mark.parametrize(("cfg_grad", "share"), [("both", 1 - 3.0), ("cond_only", 0.0)])
def test_gradient_through_the_branches_of_guidance(cfg_grad, share):
    # d(u + w (c - u)) / du = 1 - w and / dc = w
    policy = tiny_policy("sd")
    outputs = torch.randn(6, 4, 8, 8, requires_grad=True)
    policy.forward = lambda latents, timesteps, conditioning: outputs
    conditioning = policy.encode_prompt(PROMPTS)
    latents = torch.zeros(3, 4, 8, 8)
    policy.predict(latents, torch.zeros(3), conditioning, 3.0, cfg_grad=cfg_grad).sum().backward()
    torch.testing.assert_close(outputs.grad[:3], torch.full_like(latents, share))
    torch.testing.assert_close(outputs.grad[3:], torch.full_like(latents, 3.0))


@pytest.mark.parametrize("size", [32, (32, 16)])
@ALL
def test_deterministic_sampling_equals_the_plain_pipeline(family, size):
    policy = tiny_policy(family, train="none", image_size=size)
    expected = policy.pipeline(
        PROMPTS,
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=sample_generators("test", 0, 0, range(3)),
        output_type="pt",
        **policy.call_options,
    ).images
    images = policy.decode(sample(policy, stochastic_steps=()).latents[:, -1])
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)


@ALL
def test_only_the_chosen_part_is_trainable(family):
    def trainable(train):
        policy = tiny_policy(family, train=train)
        return {n for n, p in policy.named_parameters() if p.requires_grad}

    assert trainable("none") == set()
    assert trainable("lora")
    assert all("lora_" in name and name.startswith("denoiser.") for name in trainable("lora"))
    full = {n for n, _ in tiny_policy(family).denoiser.named_parameters() if "lora" not in n}
    assert len(trainable("full")) == len(full)


def test_lora_starts_as_the_pretrained_model_and_reference_returns_to_it():
    plain, policy = tiny_policy("sd", train="none"), tiny_policy("sd", train="lora")
    expected = sample(plain, stochastic_steps=()).latents
    assert torch.equal(sample(policy, stochastic_steps=()).latents, expected)
    perturb(policy)
    trainable = [n for n, p in policy.named_parameters() if p.requires_grad]
    assert not torch.equal(sample(policy, stochastic_steps=()).latents, expected)
    with policy.reference():
        assert torch.equal(sample(policy, stochastic_steps=()).latents, expected)
    assert [n for n, p in policy.named_parameters() if p.requires_grad] == trainable


def test_reference_inside_a_loss_leaves_gradients_intact():
    policy = tiny_policy("sd", train="lora")
    perturb(policy)
    batch = transitions(policy, sample(policy))
    policy.replay(batch).log_prob.sum().backward()
    expected = [p.grad.clone() for p in policy.parameters() if p.requires_grad]
    policy.zero_grad()
    loss = policy.replay(batch).log_prob.sum()
    with torch.no_grad(), policy.reference():
        policy.replay(batch)
    loss.backward()
    for parameter, gradient in zip(
        (p for p in policy.parameters() if p.requires_grad), expected, strict=True
    ):
        torch.testing.assert_close(parameter.grad, gradient)


def test_full_fine_tuning_keeps_a_reference_on_demand():
    policy = tiny_policy("sd", train="full")
    with pytest.raises(RuntimeError, match="keep_reference"), policy.reference():
        pass
    expected = sample(policy, stochastic_steps=()).latents
    policy.keep_reference()
    names = set(policy.state_dict())
    perturb(policy)
    with policy.reference():
        assert torch.equal(sample(policy, stochastic_steps=()).latents, expected)
    assert not torch.equal(sample(policy, stochastic_steps=()).latents, expected)
    assert set(policy.state_dict()) == names


def test_adapters_by_name():
    policy = tiny_policy("sd", train="lora")
    policy.add_adapter("old")
    before = sample(policy, stochastic_steps=()).latents
    perturb(policy)
    after = sample(policy, stochastic_steps=()).latents
    with policy.use_adapter("old"):
        assert torch.equal(sample(policy, stochastic_steps=()).latents, before)
    with policy.use_adapter("default"):
        assert torch.equal(sample(policy, stochastic_steps=()).latents, after)
    assert not any(p.requires_grad for n, p in policy.named_parameters() if ".old." in n)
    with (
        pytest.raises(ValueError, match="no adapter 'ema'; there are: default, old"),
        policy.use_adapter("ema"),
    ):
        pass


@ALL
def test_exported_lora_loads_in_plain_diffusers(family, tmp_path):
    # alpha differs from rank: without the stored configuration diffusers would take scale 1.
    policy = tiny_policy(family, train="lora", lora_rank=2, lora_alpha=7)
    perturb(policy)
    policy.save_pretrained(tmp_path)
    assert (tmp_path / "pytorch_lora_weights.safetensors").is_file()
    plain = tiny_policy(family, train="none")
    plain.pipeline.load_lora_weights(str(tmp_path), weight_name=LORA_FILE)
    expected = sample(policy, stochastic_steps=()).latents
    torch.testing.assert_close(
        sample(plain, stochastic_steps=()).latents, expected, atol=1e-5, rtol=1e-5
    )
    assert not torch.equal(
        sample(tiny_policy(family, train="none"), stochastic_steps=()).latents, expected
    )


@pytest.mark.parametrize("dtype", [None, torch.float16])
@ALL
def test_full_pipeline_folder_round_trips(family, dtype, tmp_path):
    policy = tiny_policy(family, train="full")
    perturb(policy)
    policy.save_pretrained(tmp_path, dtype)
    opened = DiffusionPolicy.from_pretrained(str(tmp_path), train="none", image_size=32)
    assert type(opened) is POLICIES[family]
    # A folder stored in float16 must open in plain diffusers without asking for a dtype.
    absent = {"text_encoder_3": None, "tokenizer_3": None} if family == "sd3" else {}
    absent |= {"safety_checker": None} if family == "sd" else {}
    plain = type(policy.pipeline).from_pretrained(str(tmp_path), **absent)
    plain("a red circle", num_inference_steps=2, output_type="latent", **opened.call_options)
    dtypes = {p.dtype for p in opened.parameters()}
    assert dtypes == {torch.float32}
    tolerance = 1e-6 if dtype is None else 0.05
    torch.testing.assert_close(
        sample(opened, 1.0, stochastic_steps=()).latents,
        sample(policy, 1.0, stochastic_steps=()).latents,
        atol=tolerance,
        rtol=tolerance,
    )


def test_frozen_parts_in_bfloat16_leave_the_adapters_in_float32():
    policy = tiny_policy("sd", train="lora", dtype="bfloat16")
    trained = {p.dtype for p in policy.parameters() if p.requires_grad}
    frozen = {p.dtype for p in policy.parameters() if not p.requires_grad}
    assert (trained, frozen) == ({torch.float32}, {torch.bfloat16})
    trajectory = sample(policy)
    assert trajectory.latents.dtype == trajectory.log_probs.dtype == torch.float32


def test_gradient_checkpointing_changes_nothing_but_memory():
    gradients = []
    for checkpointing in (False, True):
        policy = tiny_policy("sd", train="full", gradient_checkpointing=checkpointing)
        policy.denoiser.train(checkpointing)  # diffusers checkpoints in training mode only
        policy.replay(transitions(policy, sample(policy))).log_prob.sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.denoiser.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)


def test_encode_inverts_decode_for_the_scaling():
    policy = tiny_policy("sd", train="none")
    images = torch.rand(2, 3, 32, 32)
    mean = policy.vae.encode(images * 2 - 1).latent_dist.mode()
    torch.testing.assert_close(policy.encode(images), mean * policy.vae.config.scaling_factor)


def test_bad_options_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no pipeline 'shapes-xl'.*not shipped \(shapes-sd"):
        DiffusionPolicy.from_pretrained("shapes-xl")
    with pytest.raises(ValueError, match="to_kk.*matches no layer of UNet2D.*near names:.*to_k"):
        tiny_policy("sd", lora_targets=["to_q", "to_kk"])
    with pytest.raises(ValueError, match="`lora_rank` must be positive, got 0"):
        tiny_policy("sd", lora_rank=0)
    with pytest.raises(ValueError, match="`train` must be"):
        tiny_policy("sd", train="half")
    with pytest.raises(ValueError, match="bf16-mixed"):
        tiny_policy("sd", train="full", dtype="bfloat16")
    tiny_pipeline("sd3").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="StableDiffusion3Pipeline, not a StableDiffusionPipeline"):
        StableDiffusionPolicy(str(tmp_path))


def perturb(policy):
    """Move the trainable weights, the same way every time."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize(("family", "prediction"), FAMILIES)
def test_kl_to_reference_is_that_of_the_transitions(family, prediction, train):
    policy = tiny_policy(family, prediction, train=train)
    policy.keep_reference()
    base = policy.kl_to_reference(sample(policy))
    density = list(policy.scheduler.density_steps)
    assert base[:, density].abs().max() == 0
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    trajectory = sample(policy)
    found = policy.kl_to_reference(trajectory)
    assert found.shape == (3, 4)
    assert found.isfinite().all(dim=0).nonzero().flatten().tolist() == density
    for step in density:
        transition = transitions(policy, trajectory).select(
            torch.arange(density.index(step), 3 * len(density), len(density))
        )
        with torch.no_grad():
            own = policy.replay(transition)
            with policy.reference():
                other = policy.replay(transition)
        std = own.std.view(-1, 1, 1, 1).expand_as(own.mean)
        expected = torch.distributions.kl_divergence(
            torch.distributions.Normal(own.mean, std), torch.distributions.Normal(other.mean, std)
        ).sum(dim=(1, 2, 3))
        assert expected.min() > 0
        torch.testing.assert_close(found[:, step], expected, rtol=1e-3, atol=1e-5)


def test_lora_has_the_papers_size_on_stable_diffusion_1():
    """Rank 4 on the attention projections of its U-Net, without any weights in memory."""
    with torch.device("meta"):
        denoiser = UNet2DConditionModel(cross_attention_dim=768)
        targets = list(StableDiffusionPolicy.default_lora_targets)
        adapters.add_lora(denoiser.requires_grad_(False), 4, 4, targets)
    trained = [p for p in denoiser.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 797_184

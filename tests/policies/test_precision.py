"""16-bit networks, float32 around them."""

import pytest
import torch
from torch import nn

from lit_align.functional.noise import keyed_generator, randn
from lit_align.rewards import Colorfulness
from lit_align.schedulers import StochasticFlowMatch
from tests.algorithms.harness import METHODS, Recorder, fit, make_ddpo, make_method, weights
from tests.conftest import tiny_pipeline, tiny_policy

RATIO_ATOL = 1e-2
PRECISIONS = {"bf16-mixed": "lora", "bf16-true": "full"}
FLOW = ("_sigmas", "timesteps")
DDIM = ("_abar", "_abar_next", "_std")
TABLES = {"sd": DDIM, "sdxl": DDIM, "sd3": FLOW, "flux": FLOW}
BOTH = pytest.mark.parametrize("precision", PRECISIONS)
FAMILIES = pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])


class Witness(Colorfulness):
    """Notes what it sees, and makes a tensor of the default type as users' rewards do."""

    name = "Witness"

    def __init__(self):
        super().__init__()
        self.seen = set()

    def forward(self, images, prompts, metadata=None, group_ids=None):
        self.seen |= {images.dtype, torch.zeros(1).dtype}
        return super().forward(images, prompts, metadata, group_ids)


def one_round(family, precision, accelerator="cpu"):
    """Return the module after one round, its trajectory, its first ratio and its reward."""
    reward = Witness()
    module = make_ddpo(family, PRECISIONS.get(precision, "full"), reward, lr=1e-4, beta=0.1)
    module.critic = nn.Linear(2, 1)  # trained by nothing here: what is looked at is its type
    trajectories, ratios = [], []
    collect, loss = module.collect, module.loss

    def collecting(*args):
        trajectories.append(collect(*args))
        return trajectories[-1]

    def losing(minibatch):
        step = module.policy.replay(minibatch)
        ratios.append((step.log_prob - minibatch.old_log_prob).exp().detach())
        return loss(minibatch)

    module.collect, module.loss = collecting, losing
    fit(module, val=True, precision=precision, accelerator=accelerator)
    return module, trajectories[0], ratios[0], reward


def check_round(family, precision, accelerator):
    module, trajectory, ratio, reward = one_round(family, precision, accelerator)
    for field in ("latents", "log_probs", "rewards", "advantages", "weights"):
        assert getattr(trajectory, field).dtype == torch.float32, field
    assert (ratio - 1).abs().max() < RATIO_ATOL
    assert ratio.dtype == torch.float32
    assert reward.seen == {torch.float32}
    stored = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {p.dtype for p in module.policy.denoiser.parameters()} == {stored}
    assert module.critic.weight.dtype == torch.float32
    assert module.val_means[0].mean_value.dtype == torch.float32

    expected = tiny_policy(family).scheduler
    expected.set_timesteps(module.num_inference_steps)
    for table in TABLES[family]:
        values = getattr(module.policy.scheduler, table)
        assert values.dtype == torch.float32
        assert torch.equal(values.cpu(), getattr(expected, table)), table


@BOTH
@FAMILIES
def test_only_networks_are_16_bit(family, precision):
    check_round(family, precision, "cpu")


@pytest.mark.gpu
@BOTH
@FAMILIES
def test_only_networks_are_16_bit_on_cuda(family, precision):
    check_round(family, precision, "gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@FAMILIES
def test_frozen_16_bit_base_on_cuda(family, dtype):
    precision = {"bfloat16": "bf16-mixed", "float16": "16-mixed"}[dtype]
    options = {"policy_options": {"dtype": dtype}}
    module = make_ddpo(family, "lora", lr=1e-4, **options)
    fit(module, precision=precision, accelerator="gpu")
    trained = [p for p in module.policy.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    assert all(p.isfinite().all() for p in trained)


@FAMILIES
def test_guided_output_and_images_are_float32(family):
    policy = tiny_policy(family, dtype="bfloat16")
    conditioning = policy.encode_prompt(["a red circle", "a square"])
    latents = torch.randn(2, 4, 8, 8)
    for guidance_scale in (1.0, 3.0):
        output = policy.predict(latents, torch.full((2,), 500), conditioning, guidance_scale)
        assert output.dtype == torch.float32
    assert policy.decode(latents).dtype == policy.encode(torch.rand(2, 3, 32, 32)).dtype
    assert policy.decode(latents).dtype == torch.float32


def test_draws_do_not_follow_the_default_type():
    expected = randn((4, 8), [keyed_generator("noise", 0)])
    scheduler = StochasticFlowMatch(tiny_pipeline("sd3").scheduler)
    times = scheduler.sample_timesteps(3, keyed_generator("times", 0))
    torch.set_default_dtype(torch.bfloat16)
    try:
        drawn = randn((4, 8), [keyed_generator("noise", 0)])
        again = scheduler.sample_timesteps(3, keyed_generator("times", 0))
        scheduler.set_timesteps(4)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(drawn, expected)
    assert torch.equal(again, times)
    assert scheduler.sigmas.dtype == scheduler.timesteps.dtype == torch.float32


def test_reference_follows_the_trained_weights_to_16_bits():
    policy = tiny_policy("sd3", train="full")
    policy.keep_reference()
    policy.denoiser.to(torch.bfloat16)
    conditioning = policy.encode_prompt(["a red circle"])
    latents, timesteps = torch.randn(1, 4, 8, 8), torch.full((1,), 500.0)
    trained = policy.predict(latents, timesteps, conditioning, 1.0)
    with policy.reference():
        assert torch.equal(policy.predict(latents, timesteps, conditioning, 1.0), trained)


@pytest.mark.parametrize("family", ["sd", "sd3"])
@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("DDPO", "TDPO")])
def test_methods_train_under_bfloat16_autocast(name, family):
    """Finite and moving weights, rewards and their gradients in float32."""
    reward = Witness()
    module = make_method(name, family, reward=reward, num_inference_steps=3, lr=1e-3)
    before = weights(module, True)
    recorder = Recorder()
    fit(module, precision="bf16-mixed", callbacks=[recorder])
    assert reward.seen == {torch.float32}
    assert all(g.isfinite().all() for gradients in recorder.gradients for g in gradients.values())
    after = weights(module, True)
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(value, before[key]) for key, value in after.items())


def adapter_gradient(family, dtype, device):
    """Return the gradient of a random direction of the network's output, all adapters in one."""
    policy = tiny_policy(family, dtype=dtype)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if ".lora_B." in name:
                key = keyed_generator("lora", len(name))
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=key))
    policy.to(device)
    shape = policy.latent_shape()
    latents, direction = (
        randn(shape, [keyed_generator(purpose, k) for k in range(2)], torch.device(device))
        for purpose in ("latents", "direction")
    )
    conditioning = policy.encode_prompt(["a red circle", "a square"])
    output = policy.predict(latents, torch.full((2,), 500.0, device=device), conditioning, 1.0)
    (output * direction).sum().backward()
    trained = [p.grad for p in policy.parameters() if p.requires_grad and p.grad is not None]
    return torch.cat([gradient.float().cpu().flatten() for gradient in trained])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux", "wan"])
def test_gradients_on_cuda_are_those_of_the_cpu(family, dtype):
    """Fused kernels of attention have been wrong before, in 16 bits and for single shapes."""
    found, expected = (
        adapter_gradient(family, *how) for how in ((dtype, "cuda"), ("float32", "cpu"))
    )
    cosine = torch.nn.functional.cosine_similarity(found, expected, dim=0)
    assert cosine > (0.9999 if dtype == "float32" else 0.99)
    assert found.norm() == pytest.approx(float(expected.norm()), rel=0.1)

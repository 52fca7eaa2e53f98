"""Every family of models under one method of each kind: a round, then out to plain diffusers."""

import pytest
import torch

from lit_align.algorithms import FlowDPO
from lit_align.policies import LearnedSchedule
from lit_align.policies.adapters import LORA_FILE
from lit_align.verbs import sample_images
from tests.algorithms import judgements
from tests.algorithms.harness import Recorder, fit, make_method, weights
from tests.conftest import tiny_pipeline

ATOL = 1e-6
PROMPTS = ["a red circle", "two small blue squares"]
SEEDS = [3, 4]
# Turbo and schnell have no guidance; that of Flux dev is an input of its network.
GUIDANCE = {
    "sd": 3.0, "sd-v": 3.0, "sdxl": 3.0, "sdxl-turbo": 1.0, "sd3": 3.0, "flux": 3.5, "schnell": 1.0,
}  # fmt: skip
FLOW = {"sd3", "flux", "schnell"}
SIZES = {"num_inference_steps": 2, "samples_per_prompt": 1, "minibatch_size": 4}
ROLLOUT = {"rollout_batch_size": 4}
families = pytest.mark.parametrize("family", GUIDANCE)


def make(method, family, **options):
    options = {"guidance_scale": GUIDANCE[family], **SIZES, **options}
    return make_method(method, family, **options)


def one_round(module, fit=fit):
    """Return what each step of a round logged, and the names of the trained tensors that moved."""
    frozen, trained = weights(module, False), weights(module, True)
    recorder = Recorder()
    fit(module, callbacks=[recorder])
    assert recorder.metrics[0]["train/grad_norm"] > 0
    assert all(g.isfinite().all() for step in recorder.gradients for g in step.values())
    assert all(torch.equal(value, frozen[name]) for name, value in weights(module, False).items())
    moved = {n for n, value in weights(module, True).items() if not torch.equal(value, trained[n])}
    return recorder.metrics, moved


def plain_images(pipeline, policy, family):
    """Return the images that plain diffusers draws."""
    return pipeline(
        PROMPTS, num_inference_steps=2, guidance_scale=GUIDANCE[family], output_type="pt",
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS], **policy.call_options,
    ).images  # fmt: skip


def assert_exports(module, family, folder):
    """Check that plain diffusers draws the images of the aligned model, and other ones before."""
    policy = module.policy
    policy.save_pretrained(folder)
    images = sample_images(policy, PROMPTS, SEEDS, 2, GUIDANCE[family])
    pipeline = tiny_pipeline(family)
    pipeline.set_progress_bar_config(disable=True)
    assert (plain_images(pipeline, policy, family) - images).abs().max() > 1e-4
    pipeline.load_lora_weights(str(folder), weight_name=LORA_FILE)
    found = plain_images(pipeline, policy, family)
    torch.testing.assert_close(found, images, atol=1e-4, rtol=0)


@families
def test_policy_gradient(family, tmp_path):
    method = "FlowGRPO" if family in FLOW else "DDPO"
    module = make(method, family, advantage_norm="batch", **ROLLOUT)
    logged, moved = one_round(module)
    assert logged[0]["train/ratio"] == pytest.approx(1, abs=ATOL)
    assert logged[0]["train/approx_kl"] == pytest.approx(0, abs=ATOL)
    assert any(".lora_B." in name for name in moved)
    assert_exports(module, family, tmp_path)


@families
def test_gradient_of_the_reward(family, tmp_path):
    module = make("DRaFT", family, truncation_steps=1, num_lv_samples=0)
    _, moved = one_round(module)
    assert any(".lora_B." in name for name in moved)
    assert_exports(module, family, tmp_path)


@families
def test_preferences(family, tmp_path):
    method = {"method": FlowDPO} if family in FLOW else {}
    module = judgements.make_dpo(family, guidance_scale=GUIDANCE[family], **method)
    _, moved = one_round(module, judgements.fit)
    assert any(".lora_B." in name for name in moved)
    assert_exports(module, family, tmp_path)


@families
def test_learned_schedule(family, tmp_path):
    """The policy stays as it is; the exported schedule draws its images on a plain pipeline."""
    module = make("TPDM", family, prompts_per_round=2, samples_per_prompt=2, **ROLLOUT)
    _, moved = one_round(module)
    assert moved
    assert all(name.startswith("head.") for name in moved)
    module.schedule.save_pretrained(tmp_path)
    schedule = LearnedSchedule.from_pretrained(tmp_path)
    seeds = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    found = schedule(tiny_pipeline(family), PROMPTS, seeds, 32, "pt")
    images = sample_images(
        module.policy, PROMPTS, SEEDS, schedule.max_steps, GUIDANCE[family], module.schedule
    )
    torch.testing.assert_close(found, images, atol=1e-5, rtol=0)

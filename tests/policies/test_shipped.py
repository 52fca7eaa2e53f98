"""The pipelines that ship with the package."""

import pytest
import torch
from safetensors import safe_open

from lit_align.functional.noise import sample_generators
from lit_align.policies import DiffusionPolicy
from lit_align.policies.loading import ASSETS, shipped_pipelines

PROMPTS = ["a red circle", "a blue square above a green circle", "three small triangles"]


def test_names():
    assert shipped_pipelines() == ["shapes-sd", "shapes-sd3"]


@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("name", ["shapes-sd", "shapes-sd3"])
def test_ratio_is_one_before_the_first_update(name, guidance_scale, train):
    policy = DiffusionPolicy.from_pretrained(name, train=train)
    with torch.no_grad():
        trajectory = policy.sample(
            policy.encode_prompt(PROMPTS),
            num_inference_steps=5,
            guidance_scale=guidance_scale,
            generator=sample_generators("rollout", 0, 0, [0, 1, 2]),
        ).replace(advantages=torch.ones(3), weights=torch.ones(3))
    for step in policy.scheduler.density_steps:
        minibatch = trajectory.transitions(torch.arange(3), torch.full((3,), step))
        ratio = (policy.replay(minibatch).log_prob - minibatch.old_log_prob).exp()
        assert (ratio - 1).abs().max() <= 1e-6


def test_weights_are_half_precision_and_small():
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) >= 8
    for path in weights:
        with safe_open(path, "pt") as stored:
            slices = [stored.get_slice(key) for key in stored.keys()]  # noqa: SIM118
        # Scalars, a reward's mean and standard deviation, may be float32.
        assert {part.get_dtype() for part in slices if part.get_shape()} <= {"F16", "I64"}, path


def test_each_has_a_model_card():
    for folder in ASSETS.iterdir():
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert "```python" in card
        trained_by = "reward_modeling" if folder.name == "shapes-preference" else "pretraining"
        assert f"configs/{trained_by}/" in card

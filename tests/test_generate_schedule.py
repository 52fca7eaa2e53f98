"""A learned schedule on the command line: `generate --schedule`, and `export`."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from lit_align.cli import main
from lit_align.policies import LearnedSchedule
from lit_align.policies.loading import ASSETS
from lit_align.rewards.base import uint8_images
from lit_align.verbs import export, generate, load_module, open_schedule
from tests.conftest import tiny_pipeline
from tests.test_cli import CONFIG, OPEN

PROMPTS = ["a red circle", "a blue square on a white background"]


def train(name, method="TPDM", run="tpdm", **options):
    """Train for a round and return the checkpoint's path."""
    config = yaml.safe_load(CONFIG)
    average = {"class_path": "AdapterEMA", "init_args": {"decay": 0.9}}
    config["trainer"] |= {"max_epochs": 1, "callbacks": [average]}
    config["data"]["init_args"]["val_size"] = 4
    options = {"prompts_per_round": 2, "rollout_batch_size": 4, "minibatch_size": 4, **options}
    policy = config["model"]["init_args"]["policy"]["init_args"]
    policy["pretrained"] = name
    if method == "TPDM":
        policy["train"] = "none"
        options |= {"samples_per_prompt": 2, "head_width": 8, "lr": 1e-2, "t_min": 0.1,
                    "num_inference_steps": 12, "clip_range": 0.2, "reward_offset": 1.0}  # fmt: skip
    config["model"]["class_path"] = method
    config["model"]["init_args"] |= options
    Path(f"{run}.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", f"{run}.yaml", "--name", run])
    (path,) = Path("runs", run).rglob("*.ckpt")
    return str(path)


def drawn(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def images_of_module(checkpoint, weights="trained"):
    """Draw with the module itself, as validation does but for the noise; write as `generate`."""
    module = load_module(checkpoint, weights)
    noise = [torch.Generator().manual_seed(7) for _ in PROMPTS]
    trajectory = module.schedule.sample(module.policy, module.policy.encode_prompt(PROMPTS), noise)
    steps = trajectory.extras["alive"].sum(dim=1)
    return uint8_images(module.policy.decode(trajectory.latents[:, -1])).int(), steps


def pixels(folder):
    files = sorted(Path(folder).glob("*.png"))
    return torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in files]).int()


@pytest.mark.parametrize("name", ["shapes-sd", "shapes-sd3"])
def test_generated_and_exported_draw_the_images_of_the_module(name):
    checkpoint = train(name)
    expected, steps = images_of_module(checkpoint)
    assert steps.max() < 12
    options = {"seed": 7}
    generate(PROMPTS, "own", ckpt_path=checkpoint, **options)
    assert (pixels("own") - expected).abs().max() <= 1  # in a batch of one image, not of two
    words = ["generate", "--prompts", str(PROMPTS), "--seed", "7", "--output", "alone"]
    main([*words, "--schedule", checkpoint])
    generate(PROMPTS, "above", pretrained=name, schedule=checkpoint, **options)
    export(checkpoint, "exported")
    generate(PROMPTS, "folder", pretrained=name, schedule="exported", **options)
    for other in ("alone", "above", "folder"):
        assert drawn(other) == drawn("own"), other

    family, opening, _ = OPEN[name]
    pipe = family.from_pretrained(ASSETS / name, **opening)
    schedule = LearnedSchedule.from_pretrained("exported")
    noise = [torch.Generator().manual_seed(7) for _ in PROMPTS]
    plain = uint8_images(schedule(pipe, PROMPTS, generator=noise, output_type="pt")).int()
    assert (plain - expected).abs().max() <= 1
    card = Path("exported", "README.md").read_text()
    assert "| most steps | 12 |" in card
    assert f"pipe = {family.__name__}.from_pretrained" in card

    generate(PROMPTS, "short", ckpt_path=checkpoint, num_inference_steps=2, **options)
    generate(PROMPTS, "uniform", pretrained=name, num_inference_steps=12, guidance_scale=1.0)
    for other in ("short", "uniform"):
        assert drawn(other) != drawn("own")


def test_on_top_of_a_policy_that_was_trained():
    schedule = train("shapes-sd")
    trained = train("shapes-sd", "DDPO", "ddpo", lr=1e-2, prompts_per_round=4)
    generate(PROMPTS, "base", pretrained="shapes-sd", schedule=schedule)
    generate(PROMPTS, "both", ckpt_path=trained, schedule=schedule)
    generate(PROMPTS, "plain", ckpt_path=trained)
    assert drawn("base").keys() == drawn("both").keys()
    assert len({str(drawn(name)) for name in ("base", "both", "plain")}) == 3
    with pytest.raises(ValueError, match=r"holds no schedule; give a checkpoint of TPDM"):
        generate(PROMPTS, "out", ckpt_path=schedule, schedule=trained)
    with pytest.raises(ValueError, match="learned on a StableDiffusionPipeline, but 'shapes-sd3'"):
        generate(PROMPTS, "out", pretrained="shapes-sd3", schedule=schedule)
    tiny_pipeline("sd").save_pretrained("narrow")
    with pytest.raises(ValueError, match="reads 64 channels .* width 32, but .* has 16 and 8"):
        generate(PROMPTS, "out", pretrained="narrow", schedule=schedule)
    with pytest.raises(ValueError, match="Give either `ckpt_path` or `pretrained`"):
        generate(PROMPTS, "out", schedule="nowhere")
    assert not Path("out").exists()


def test_the_average_of_the_head_can_be_exported_and_sampled():
    checkpoint = train("shapes-sd")
    for weights in ("trained", "ema"):
        export(checkpoint, weights, weights=weights)
        generate(PROMPTS, f"{weights}-own", ckpt_path=checkpoint, weights=weights)
        generate(PROMPTS, f"{weights}-out", pretrained="shapes-sd", schedule=weights)
        assert drawn(f"{weights}-own") == drawn(f"{weights}-out")
    one, other = (open_schedule(w).head.out.weight for w in ("trained", "ema"))
    assert not torch.equal(one, other)

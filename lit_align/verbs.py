"""What the command line offers beside training: generate images, export weights."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from lightning.pytorch import LightningModule
from PIL import Image

from lit_align.algorithms.base import AlignmentModule
from lit_align.algorithms.schedule_learning import ScheduleModule
from lit_align.callbacks.ema import stored_average
from lit_align.checkpoint_io import read_checkpoint
from lit_align.data.prompt_files import PromptFile, names_prompts
from lit_align.policies.adapters import LORA_FILE, scale_lora
from lit_align.policies.base import DiffusionPolicy
from lit_align.policies.learned_schedule import LearnedSchedule
from lit_align.policies.loading import Dtype, torch_dtype
from lit_align.rewards.base import uint8_images

Weights = Literal["trained", "ema"]

_FRAME_MS = 62  # of a video: 16 frames a second, as Wan 2.1 draws them


def load_module(ckpt_path: str, weights: Weights = "trained") -> LightningModule:
    """Rebuild the module of a checkpoint that the command line wrote.

    Args:
        ckpt_path: Its path.
        weights: "trained", or "ema" for the average that AdapterEMA kept.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, was made from Python objects, or holds no average.
    """
    stored = read_checkpoint(ckpt_path)
    if "_instantiator" not in stored.get("hyper_parameters", {}):
        raise ValueError(
            f"{ckpt_path!r} was made in Python and does not know its policy; load it by "
            "`DDPO.load_from_checkpoint(path, policy=..., reward=...)` and call `save_pretrained`."
        )
    average = stored_average(stored) if weights == "ema" else {}
    with warnings.catch_warnings():
        # Frozen weights come from the pretrained model, not from the checkpoint.
        warnings.filterwarnings("ignore", "Found keys that are in the model state dict")
        warnings.filterwarnings("ignore", "Attribute '.*' is an instance of `nn.Module`")
        module: LightningModule = LightningModule.load_from_checkpoint(
            ckpt_path, map_location="cpu", weights_only=True
        )
    module.load_state_dict(average, strict=False)
    return module


def generate(
    prompts: str | list[str],
    output: str = "samples",
    ckpt_path: str | None = None,
    pretrained: str | None = None,
    lora: str | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    images_per_prompt: int = 1,
    seed: int = 42,
    weights: Weights = "trained",
    lora_scale: float = 1.0,
    image_size: int | None = None,
    schedule: str | None = None,
) -> None:
    """Sample images from a checkpoint, or from a pipeline with or without a LoRA.

    Image k of a prompt starts from the noise of `torch.Generator().manual_seed(seed + k)`, so plain
    diffusers with the same seeds draws the same images.

    Args:
        prompts: Prompts, or the path of one prompts file, or a shipped list, see `PromptFile`.
        output: Folder for the PNG files, and animated WebP for videos.
        ckpt_path: A checkpoint written by `fit`.
        pretrained: A shipped name, a pipeline folder or a hub id.
        lora: A folder with `pytorch_lora_weights.safetensors`, on top of `pretrained`.
        num_inference_steps: Denoising steps; by default the checkpoint's, else 20.
        guidance_scale: Weight of guidance; by default the checkpoint's, else 3.
        images_per_prompt: Number of images of each prompt.
        seed: Decides the noise.
        weights: Of the checkpoint: "trained", or "ema" for the average that AdapterEMA kept.
        lora_scale: Share of the adapters' change; less than 1 goes back towards the pretrained
            model, which undoes over-optimisation in part (arXiv:2309.17400).
        image_size: Side of the images of `pretrained` in pixels; by default the model's own. The
            images of a checkpoint have the size they had in training.
        schedule: A checkpoint of TPDM, or the folder that it was exported to, whose steps and
            guidance are taken, with its own policy or on top of `ckpt_path` or `pretrained`.
    """
    opened = _open(ckpt_path, pretrained, lora, weights, image_size, schedule)
    policy = opened.policy
    if lora_scale != 1:
        scale_lora(policy.denoiser, lora_scale)
    guidance = opened.guidance_scale if guidance_scale is None else guidance_scale
    sampling = (num_inference_steps or opened.num_inference_steps, guidance, opened.schedule)
    policy.to("cuda" if torch.cuda.is_available() else "cpu")
    for number, prompt in enumerate(_read_prompts(prompts)):
        seeds = [seed + k for k in range(images_per_prompt)]
        images = sample_images(policy, [prompt] * images_per_prompt, seeds, *sampling)
        _write_images(images, Path(output), number)
    print(f"Wrote {output}/")


def _write_images(images: torch.Tensor, folder: Path, number: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for k, pixels in enumerate(uint8_images(images)):
        path = folder / f"{number:04d}_{k}.png"
        if pixels.ndim == 3:
            Image.fromarray(pixels.numpy()).save(path)
            continue
        first, *others = [Image.fromarray(frame.numpy()) for frame in pixels]
        first.save(
            path.with_suffix(".webp"), save_all=True, append_images=others, lossless=True,
            duration=_FRAME_MS, loop=0,
        )  # fmt: skip


class Opened(NamedTuple):
    """A policy, and how it is sampled from unless something else is asked for."""

    policy: DiffusionPolicy
    num_inference_steps: int
    guidance_scale: float
    schedule: LearnedSchedule | None = None


def _open(
    ckpt_path: str | None,
    pretrained: str | None,
    lora: str | None,
    weights: Weights,
    image_size: int | None,
    schedule: str | None,
) -> Opened:
    """Open a policy, and the schedule that it is sampled by."""
    if ckpt_path is None and pretrained is None and Path(schedule or "").is_file():
        ckpt_path = schedule
    opened = open_policy(ckpt_path, pretrained, lora, weights, image_size)
    if schedule in (None, ckpt_path):
        return opened
    assert schedule is not None
    learned = open_schedule(schedule)
    learned.check_fits(opened.policy)
    return Opened(opened.policy, learned.max_steps, learned.guidance_scale, learned)


def open_policy(
    ckpt_path: str | None,
    pretrained: str | None,
    lora: str | None = None,
    weights: Weights = "trained",
    image_size: int | None = None,
) -> Opened:
    """Return the policy alone, and the schedule only of a checkpoint that holds one.

    Args:
        ckpt_path: A checkpoint written by `fit`; or
        pretrained: A shipped name, a pipeline folder or a hub id.
        lora: A folder with LoRA weights, on top of `pretrained`.
        weights: Of the checkpoint.
        image_size: Side of the images of `pretrained` in pixels; by default the model's own.

    Raises:
        ValueError: If not one of the two is given, or what belongs to the other.
    """
    if (ckpt_path is None) == (pretrained is None):
        raise ValueError("Give either `ckpt_path` or `pretrained`.")
    if weights == "ema" and ckpt_path is None:
        raise ValueError("`weights: ema` is for a `ckpt_path`; `pretrained` has no average.")
    if image_size is not None and pretrained is None:
        raise ValueError("`image_size` is for `pretrained`; a checkpoint has its own.")
    if pretrained is not None:
        policy = DiffusionPolicy.from_pretrained(pretrained, train="none", image_size=image_size)
        if lora is not None:
            policy.pipeline.load_lora_weights(lora, weight_name=LORA_FILE)
        return Opened(policy, num_inference_steps=20, guidance_scale=3.0)
    assert ckpt_path is not None
    module = load_module(ckpt_path, weights)
    if not isinstance(module, AlignmentModule):
        raise ValueError(f"{ckpt_path!r} holds a {type(module).__name__}; `export` it first.")
    learned = module.schedule if isinstance(module, ScheduleModule) else None
    steps, guidance_scale = module.eval_num_inference_steps, module.guidance_scale
    return Opened(module.policy, steps, guidance_scale, learned)


def open_schedule(path: str) -> LearnedSchedule:
    """Return the schedule of a checkpoint, or of the folder that it was exported to.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If the checkpoint holds no schedule.
    """
    if Path(path).is_dir():
        return LearnedSchedule.from_pretrained(path)
    stored = read_checkpoint(path)
    options = stored.get("lit_align", {}).get("schedule")
    if options is None:
        raise ValueError(
            f"{path!r} holds no schedule; give a checkpoint of TPDM, or the folder that `export` "
            "made of it."
        )
    prefix, state = "head.", stored["state_dict"]
    tensors = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    return LearnedSchedule.from_tensors(options, tensors)


@torch.no_grad()
def sample_images(
    policy: DiffusionPolicy,
    prompts: list[str],
    seeds: list[int],
    num_inference_steps: int,
    guidance_scale: float,
    schedule: LearnedSchedule | None = None,
) -> torch.Tensor:
    """Return images [B, 3, H, W] in [0, 1], or videos, by the deterministic sampler, a seed each.

    With a learned schedule `num_inference_steps` is the most that an image may take.
    """
    conditioning = policy.encode_prompt(prompts)
    generator = [torch.Generator().manual_seed(seed) for seed in seeds]
    if schedule is None:
        trajectory = policy.sample(
            conditioning,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=generator,
            stochastic_steps=(),
        )
    else:
        schedule.head.to(policy.device)
        schedule = replace(schedule, max_steps=num_inference_steps, guidance_scale=guidance_scale)
        trajectory = schedule.sample(policy, conditioning, generator)
    return policy.render(trajectory.latents[:, -1])


def _read_prompts(prompts: str | list[str]) -> list[str]:
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if len(prompts) == 1 and names_prompts(prompts[0]):
        return [text for text, _ in PromptFile(prompts[0])]
    return prompts


def export(
    ckpt_path: str,
    output: str,
    dtype: Dtype = "float32",
    weights: Weights = "trained",
    lora_scale: float = 1.0,
) -> None:
    """Write a checkpoint's weights for plain diffusers, with a card that says how to use them.

    Args:
        ckpt_path: A checkpoint written by `fit`.
        output: Folder; it gets `pytorch_lora_weights.safetensors`, a full pipeline, or a learned
            schedule.
        dtype: Of the stored tensors.
        weights: "trained", or "ema" for the average that AdapterEMA kept.
        lora_scale: Share of the adapters' change, see `generate`.
    """
    module = load_module(ckpt_path, weights)
    if lora_scale != 1:
        if not isinstance(module, AlignmentModule):
            raise ValueError(
                f"`lora_scale` is for LoRA adapters, {type(module).__name__} has none."
            )
        scale_lora(module.policy.denoiser, lora_scale)
    if not callable(save := getattr(module, "save_pretrained", None)):
        raise ValueError(f"{type(module).__name__} has no `save_pretrained`.")
    save(output, torch_dtype(dtype))
    if isinstance(module, AlignmentModule):
        card = _schedule_card if isinstance(module, ScheduleModule) else _card
        Path(output, "README.md").write_text(card(module), encoding="utf-8")
    print(f"Wrote {output}/")


def _card(module: AlignmentModule) -> str:
    policy = module.policy
    family = type(policy.pipeline).__name__
    base = policy.pretrained
    call = {
        "num_inference_steps": module.eval_num_inference_steps,
        "guidance_scale": module.guidance_scale,
        **policy.call_options,
    }
    load = (
        f'pipe = {family}.from_pretrained("{base}")\npipe.load_lora_weights("path/of/this/folder")'
        if policy.train_mode == "lora"
        else f'pipe = {family}.from_pretrained("path/of/this/folder")'
    )
    return f"""# {base} aligned by {type(module).__name__}

Rewarded by {", ".join(module.rewards)[:200]}.

| | |
|---|---|
| base | {base} |
| sampler | {type(policy.pipeline.scheduler).__name__}, deterministic |
| steps | {module.eval_num_inference_steps} |
| guidance scale | {module.guidance_scale} |

```python
from diffusers import {family}

{load}
image = pipe("a prompt", {", ".join(f"{name}={value}" for name, value in call.items())}).images[0]
```
"""


def _schedule_card(module: AlignmentModule) -> str:
    assert isinstance(module, ScheduleModule)
    schedule, base, family = module.schedule, module.policy.pretrained, module.schedule.pipeline
    return f"""# A sampling schedule of {base}, learned by {type(module).__name__}

Rewarded by {", ".join(module.rewards)[:200]}. Every image takes its own number of steps.

| | |
|---|---|
| base | {base} |
| most steps | {schedule.max_steps} |
| finished below noise level | {schedule.t_min} |
| guidance scale | {schedule.guidance_scale} |

```python
from diffusers import {family}
from lit_align.policies import LearnedSchedule

pipe = {family}.from_pretrained("{base}")
schedule = LearnedSchedule.from_pretrained("path/of/this/folder")
image = schedule(pipe, "a prompt")[0]
```
"""

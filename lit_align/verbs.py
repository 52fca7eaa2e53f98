"""What the command line offers beside training: generate images, export weights."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch import LightningModule
from PIL import Image

from lit_align.algorithms.base import AlignmentModule
from lit_align.callbacks.ema import stored_average
from lit_align.checkpoint_io import read_checkpoint
from lit_align.data.prompts import PromptFile
from lit_align.policies.adapters import LORA_FILE, scale_lora
from lit_align.policies.base import DiffusionPolicy
from lit_align.rewards.base import uint8_images

Weights = Literal["trained", "ema"]
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


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
    prompts: list[str],
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
) -> None:
    """Sample images from a checkpoint, or from a pipeline with or without a LoRA.

    Image k of a prompt starts from the noise of `torch.Generator().manual_seed(seed + k)`, so plain
    diffusers with the same seeds draws the same images.

    Args:
        prompts: Prompts, or the path of one prompts file (.txt, .jsonl), or a shipped list.
        output: Folder for the PNG files.
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
    """
    policy, default_steps, default_guidance = _open_policy(ckpt_path, pretrained, lora, weights)
    if lora_scale != 1:
        scale_lora(policy.denoiser, lora_scale)
    policy.to("cuda" if torch.cuda.is_available() else "cpu")
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    for number, prompt in enumerate(_read_prompts(prompts)):
        images = sample_images(
            policy,
            [prompt] * images_per_prompt,
            [seed + k for k in range(images_per_prompt)],
            num_inference_steps or default_steps,
            default_guidance if guidance_scale is None else guidance_scale,
        )
        for k, pixels in enumerate(uint8_images(images)):
            Image.fromarray(pixels.numpy()).save(folder / f"{number:04d}_{k}.png")
    print(f"Wrote {folder}/")


def _open_policy(
    ckpt_path: str | None, pretrained: str | None, lora: str | None, weights: Weights
) -> tuple[DiffusionPolicy, int, float]:
    """Return a policy with its default number of steps and guidance scale."""
    if (ckpt_path is None) == (pretrained is None):
        raise ValueError("Give either `ckpt_path` or `pretrained`.")
    if weights == "ema" and ckpt_path is None:
        raise ValueError("`weights: ema` is for a `ckpt_path`; `pretrained` has no average.")
    if pretrained is not None:
        policy = DiffusionPolicy.from_pretrained(pretrained, train="none")
        if lora is not None:
            policy.pipeline.load_lora_weights(lora, weight_name=LORA_FILE)
        return policy, 20, 3.0
    assert ckpt_path is not None
    module = load_module(ckpt_path, weights)
    if not isinstance(module, AlignmentModule):
        raise ValueError(f"{ckpt_path!r} holds a {type(module).__name__}; `export` it first.")
    return module.policy, module.eval_num_inference_steps, module.guidance_scale


@torch.no_grad()
def sample_images(
    policy: DiffusionPolicy,
    prompts: list[str],
    seeds: list[int],
    num_inference_steps: int,
    guidance_scale: float,
) -> torch.Tensor:
    """Return images [B, 3, H, W] in [0, 1] by the deterministic sampler, one seed each."""
    trajectory = policy.sample(
        policy.encode_prompt(prompts),
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        stochastic_steps=(),
    )
    return policy.decode(trajectory.latents[:, -1])


def _read_prompts(prompts: list[str]) -> list[str]:
    if len(prompts) == 1 and (Path(prompts[0]).suffix in (".txt", ".jsonl")):
        return [text for text, _ in PromptFile(prompts[0])]
    return prompts


def export(
    ckpt_path: str,
    output: str,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    weights: Weights = "trained",
    lora_scale: float = 1.0,
) -> None:
    """Write a checkpoint's weights for plain diffusers, with a card that says how to use them.

    Args:
        ckpt_path: A checkpoint written by `fit`.
        output: Folder; it gets `pytorch_lora_weights.safetensors` or a full pipeline.
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
    save(output, _DTYPES[dtype])
    if isinstance(module, AlignmentModule):
        Path(output, "README.md").write_text(_card(module), encoding="utf-8")
    print(f"Wrote {output}/")


def _card(module: AlignmentModule) -> str:
    policy = module.policy
    family = type(policy.pipeline).__name__
    base = policy.pretrained
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
image = pipe("a prompt", num_inference_steps={module.eval_num_inference_steps}, \
guidance_scale={module.guidance_scale}).images[0]
```
"""

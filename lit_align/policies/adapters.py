"""LoRA adapters of a denoiser, by peft and diffusers."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

ADAPTER = "default"
LORA_FILE = "pytorch_lora_weights.safetensors"  # named, as diffusers 0.38 offline does not look


def add_lora(denoiser: Any, rank: int, alpha: float, targets: list[str]) -> None:
    """Add float32 adapters to the linear layers whose names end in one of `targets`.

    Raises:
        ValueError: If a target matches no layer; the message lists near names.
    """
    if rank < 1:
        raise ValueError(f"`lora_rank` must be positive, got {rank}.")
    _check_targets(denoiser, targets)
    options: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "target_modules": targets}
    config = LoraConfig(**options, init_lora_weights="gaussian")
    denoiser.add_adapter(config, adapter_name=ADAPTER)
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _check_targets(denoiser: Any, targets: list[str]) -> None:
    names = [n for n, m in denoiser.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    for target in targets:
        if any(name == target or name.endswith(f".{target}") for name in names):
            continue
        tails = {tail for name in names for tail in (name.rsplit(".", 1)[-1], name[-len(target) :])}
        tails |= {".".join(name.rsplit(".", 2)[-2:]) for name in names}
        near = difflib.get_close_matches(target, sorted(tails), n=5, cutoff=0.4)
        raise ValueError(
            f"`lora_targets`: {target!r} matches no layer of {type(denoiser).__name__}; "
            f"near names: {', '.join(near) or ', '.join(sorted(tails)[:8])}."
        )


@contextmanager
def disabled(denoiser: Any) -> Iterator[None]:
    """Run without adapters."""
    trainable = [p for p in denoiser.parameters() if p.requires_grad]
    denoiser.disable_adapters()
    try:
        yield
    finally:
        denoiser.enable_adapters()
        _train_only(denoiser, trainable)


@contextmanager
def active(denoiser: Any, name: str) -> Iterator[None]:
    """Run with the adapter `name`; the previous one is active again afterwards.

    Raises:
        ValueError: If there is no such adapter.
    """
    known = sorted(getattr(denoiser, "peft_config", {}))
    if name not in known:
        raise ValueError(f"There is no adapter {name!r}; there are: {', '.join(known) or 'none'}.")
    trainable = [p for p in denoiser.parameters() if p.requires_grad]
    previous = denoiser.active_adapters()
    denoiser.set_adapter(name)
    try:
        yield
    finally:
        denoiser.set_adapter(previous)
        _train_only(denoiser, trainable)


def _train_only(denoiser: Any, trainable: list[nn.Parameter]) -> None:
    """Undo what peft does to `requires_grad` when adapters are switched."""
    chosen = set(map(id, trainable))
    for parameter in denoiser.parameters():
        parameter.requires_grad_(id(parameter) in chosen)


def scale_lora(denoiser: Any, factor: float) -> None:
    """Multiply what the adapters add: 0 is the pretrained model, 1 leaves them as they are.

    Raises:
        ValueError: If the denoiser has no adapters.
    """
    second = [p for name, p in denoiser.named_parameters() if ".lora_B." in name]
    if not second:
        raise ValueError("`lora_scale` is for LoRA adapters, and there are none.")
    with torch.no_grad():
        for parameter in second:
            parameter.mul_(factor)


def copy_adapter(denoiser: Any, name: str) -> None:
    """Add a frozen copy of the trained adapter.

    Raises:
        ValueError: If the denoiser has no adapters, or already one of that name.
    """
    configs = getattr(denoiser, "peft_config", {})
    if ADAPTER not in configs or name in configs:
        raise ValueError(f"Cannot copy the adapter to {name!r}; there are: {sorted(configs)}.")
    trainable = [p for p in denoiser.parameters() if p.requires_grad]
    denoiser.add_adapter(configs[ADAPTER], adapter_name=name)
    state = get_peft_model_state_dict(denoiser, adapter_name=ADAPTER)
    set_peft_model_state_dict(denoiser, state, adapter_name=name)
    denoiser.set_adapter(ADAPTER)
    _train_only(denoiser, trainable)


def save_lora(
    denoiser: Any,
    pipeline: Any,
    denoiser_name: str,
    path: Path,
    dtype: torch.dtype | None,
) -> None:
    """Write `pytorch_lora_weights.safetensors` for `pipeline.load_lora_weights(path)`.

    The adapter's configuration is stored with it: without it diffusers assumes alpha = rank.
    """
    state = get_peft_model_state_dict(denoiser, adapter_name=ADAPTER)
    options = {
        f"{denoiser_name}_lora_layers": {k: v.to(dtype or v.dtype) for k, v in state.items()},
        f"{denoiser_name}_lora_adapter_metadata": denoiser.peft_config[ADAPTER].to_dict(),
    }
    type(pipeline).save_lora_weights(str(path), **options)

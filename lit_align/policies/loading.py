"""Finding, opening and writing diffusers pipelines."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers import DiffusionPipeline
from torch import nn

from lit_align.hub import CheckpointError, opening
from lit_align.shapes import ASSETS

Dtype = Literal["float32", "float16", "bfloat16"]


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype of that name.

    Raises:
        ValueError: If it is none of `Dtype`.
    """
    if name not in get_args(Dtype):
        raise ValueError(f"`dtype` must be one of {', '.join(get_args(Dtype))}, got {name!r}.")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def shipped_pipelines() -> list[str]:
    """Return the names of the pipelines inside the package."""
    return sorted(path.parent.name for path in ASSETS.glob("*/model_index.json"))


def resolve(pretrained: str) -> str:
    """Return the folder of a shipped name, or the argument itself (a folder or a hub id)."""
    return str(ASSETS / pretrained) if pretrained in shipped_pipelines() else pretrained


def pipeline_name(pretrained: str) -> str:
    """Return the class name in the pipeline's `model_index.json`.

    Raises:
        ValueError: If there is no such pipeline.
    """
    return str(_index(pretrained)["_class_name"])


def _index(pretrained: str) -> dict[str, Any]:
    try:
        with opening(resolve(pretrained), "model_index.json"):
            index: dict[str, Any] = DiffusionPipeline.load_config(resolve(pretrained))
    except (OSError, CheckpointError) as error:
        raise CheckpointError(
            f"There is no pipeline {pretrained!r}, which is not shipped "
            f"({', '.join(shipped_pipelines())}). {error}"
        ) from error
    return index


def family_of(pretrained: str, base: Any) -> Any:
    """Return the policy class, below `base`, of the pipeline's family.

    Raises:
        ValueError: If there is no such pipeline, or no class for it.
    """
    return _family(pipeline_name(pretrained), repr(pretrained), base)


def policy_over(pipe: Any, base: Any, image_size: int | tuple[int, int] | None = None) -> Any:
    """Return the frozen policy, of a class below `base`, over a diffusers pipeline.

    Args:
        pipe: The pipeline; its parts keep their dtypes and devices.
        base: `DiffusionPolicy`.
        image_size: See there.

    Raises:
        ValueError: If there is no class for the pipeline.
    """
    family = _family(type(pipe).__name__, "The pipeline", base)
    return family(pipe, train="none", dtype=None, image_size=image_size)


def _family(pipeline: str, told: str, base: Any) -> Any:
    families = {
        family.pipeline_class.__name__: family
        for family in _subclasses(base)
        if "pipeline_class" in vars(family)  # not the variants that users derive
    }
    if pipeline not in families:
        raise ValueError(
            f"{told} is a {pipeline}, which has no policy; "
            f"there are policies for {', '.join(sorted(families))}."
        )
    return families[pipeline]


def _subclasses(cls: Any) -> list[Any]:
    direct = cls.__subclasses__()
    return [*direct, *(deeper for child in direct for deeper in _subclasses(child))]


def load_pipeline(pretrained: str, expected: Any) -> Any:
    """Open a pipeline, its parts in the dtypes of their files.

    Raises:
        ValueError: If there is no such pipeline, or it is not an `expected` one.
    """
    index = _index(pretrained)
    if index["_class_name"] != expected.__name__:
        raise ValueError(
            f"{pretrained!r} is a {index['_class_name']}, not a {expected.__name__}; use "
            "`class_path: lit_align.policies.DiffusionPolicy.from_pretrained`, which picks the "
            "policy by the pipeline."
        )
    # Parts saved as absent must be passed as None, and the safety checker changes images unseen.
    absent = {
        name: None
        for name, value in index.items()
        if name == "safety_checker" or (isinstance(value, list | tuple) and value[0] is None)
    }
    with opening(resolve(pretrained), "the weights"):
        pipeline = expected.from_pretrained(resolve(pretrained), **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_pipeline(pipeline: Any, path: Path, dtype: torch.dtype | None) -> None:
    """Write a pipeline folder, its tensors as `dtype` if given.

    Text encoders are stored with ``"dtype": "float32"`` in their configuration, because plain
    `from_pretrained` would otherwise load them in the stored dtype and the rest in float32.
    """
    if dtype is None:
        pipeline.save_pretrained(path)
        return
    stored = copy.deepcopy(pipeline)
    for part in stored.components.values():
        if isinstance(part, nn.Module):
            nn.Module.to(part, dtype)  # diffusers' own `to` warns of a cast that is meant
    stored.save_pretrained(path)
    for config_path in path.glob("text_encoder*/config.json"):
        config = json.loads(config_path.read_text())
        config["dtype"] = "float32"
        config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def truncated(pipeline: Any, prompts: Sequence[str], longest: int) -> list[bool]:
    """Return which prompts are longer than what any of the text encoders reads.

    Args:
        pipeline: Has the tokenizers.
        prompts: Texts.
        longest: Tokens that an encoder without a limit of its own reads.
    """
    tokenizers = [
        part
        for name, part in pipeline.components.items()
        if name.startswith("tokenizer") and part is not None
    ]
    lengths = [[len(ids) for ids in t(list(prompts)).input_ids] for t in tokenizers]
    limits = [min(t.model_max_length, longest) for t in tokenizers]
    return [
        all(length > limit for length, limit in zip(of_prompt, limits, strict=True))
        for of_prompt in zip(*lengths, strict=True)
    ]

"""Released models as configurations without weights: what their hub repositories say they are.

One JSON file per model holds its pipeline class, the configurations of its parts and how many
parameters each has. Whatever is built of them has random weights, or on the meta device none, and
needs no file, no vocabulary and no network.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import diffusers
import torch
import transformers
from torch import Tensor

from lit_align.shapes import ASSETS

_FOLDER = Path(__file__).parent
Description = dict[str, Any]


@cache
def architectures() -> dict[str, Description]:
    """Return the descriptions of this folder by their names."""
    files = sorted(_FOLDER.glob("*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in files}


def describe(pretrained: str) -> Description:
    """Return the description of a pipeline.

    Args:
        pretrained: A name of this folder, a hub id that one stands for, a shipped pipeline, or a
            local pipeline folder, of which the configurations are read and no weights.

    Raises:
        ValueError: If it is none of them; the message lists what is known.
    """
    if pretrained in architectures():
        return architectures()[pretrained]
    for description in architectures().values():
        if pretrained in description["hub_ids"]:
            return description
    for folder in (ASSETS / pretrained, Path(pretrained)):
        if (folder / "model_index.json").is_file():
            return _of_folder(folder)
    known = sorted(i for each in architectures().values() for i in each["hub_ids"])
    raise ValueError(
        f"The architecture of {pretrained!r} is not known here, and its files are not asked for. "
        "Give the path of a local folder with its `model_index.json` and the `config.json` of each "
        "part (`hf download <id> --include '*.json'` fetches them without weights), or one of "
        f"{', '.join(known)}."
    )


def _of_folder(folder: Path) -> Description:
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    parts: dict[str, Any] = {}
    for name, value in index.items():
        if name.startswith("_"):
            continue
        is_part = isinstance(value, list) and len(value) == 2 and value[0] is not None
        if name in ("safety_checker", "feature_extractor", "image_encoder") or value == [None] * 2:
            parts[name] = None
        else:
            parts[name] = _part_of_folder(folder / name, value[1]) if is_part else value
    return {"hub_ids": [str(folder)], "pipeline": index["_class_name"], "components": parts}


def _part_of_folder(folder: Path, kind: str) -> Description:
    names = ("config.json", "scheduler_config.json", "tokenizer_config.json")
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise ValueError(f"{folder} has no {' or '.join(names)}, which say what it is.")
    return {**json.loads(path.read_text(encoding="utf-8")), "_class_name": kind}


def build_pipeline(
    pretrained: str, device: torch.device | str = "meta", dtype: torch.dtype = torch.float32
) -> Any:
    """Return diffusers' pipeline with random weights, made on the device itself.

    Args:
        pretrained: See `describe`.
        device: Where the networks are; on "meta" they take no memory.
        dtype: Of their weights.
    """
    description = describe(pretrained)
    parts = {
        name: build_part(part, device, dtype) if isinstance(part, dict) else part
        for name, part in description["components"].items()
    }
    pipeline_class = getattr(diffusers, description["pipeline"])
    if "requires_safety_checker" in inspect.signature(pipeline_class.__init__).parameters:
        parts["requires_safety_checker"] = False
    pipeline = pipeline_class(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_part(
    config: Description, device: torch.device | str = "meta", dtype: torch.dtype = torch.float32
) -> Any:
    """Return a network of that configuration, a scheduler, or a tokenizer that reads nothing."""
    options = {k: v for k, v in config.items() if k != "_diffusers_version"}
    kind = options.pop("_class_name", "Tokenizer")
    if "Tokenizer" in kind:
        return BlankTokenizer(int(options["model_max_length"]))
    if "Scheduler" in kind:
        return getattr(diffusers, kind).from_config(options)
    with _new_tensors(device, dtype):
        if hasattr(diffusers, kind):
            part = getattr(diffusers, kind).from_config(options)
        else:
            network = getattr(transformers, kind)
            part = network(network.config_class(**_of_transformers(options)))
    return part.requires_grad_(False).eval()


def _of_transformers(options: Description) -> Description:
    """Return options without what stored configurations say of files and versions."""
    dropped = {"architectures", "torch_dtype", "dtype", "transformers_version", "model_type"}
    return {name: value for name, value in options.items() if name not in dropped}


@contextmanager
def _new_tensors(device: torch.device | str, dtype: torch.dtype) -> Iterator[None]:
    """Make new tensors on a device and in a dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


class BlankTokenizer:
    """Stands in for a tokenizer without its vocabulary: every text becomes the same two tokens.

    Args:
        model_max_length: Tokens that the text encoder reads.
    """

    added_tokens_encoder: dict[str, int] = {}  # noqa: RUF012 - textual inversion asks for it
    pad_token_id = 0

    def __init__(self, model_max_length: int) -> None:
        self.model_max_length = model_max_length

    def tokenize(self, text: str) -> list[str]:
        """Return the text as a single token."""
        return [text]

    def batch_decode(self, ids: Any) -> list[str]:
        """Return an empty text for each row."""
        return [""] * len(ids)

    def __call__(
        self,
        text: str | Sequence[str],
        padding: str | bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        **_: Any,
    ) -> Any:
        """Return ids and mask, padded to `max_length` if asked for; see transformers."""
        count = 1 if isinstance(text, str) else len(text)
        length = (max_length or self.model_max_length) if padding == "max_length" else 2
        ids: list[list[int]] | Tensor = [[0, 1] + [0] * (length - 2) for _ in range(count)]
        mask: list[list[int]] | Tensor = [[1, 1] + [0] * (length - 2) for _ in range(count)]
        if return_tensors == "pt":
            ids, mask = torch.tensor(ids), torch.tensor(mask)
        return transformers.BatchEncoding({"input_ids": ids, "attention_mask": mask})


@contextmanager
def without_weights(
    device: torch.device | str = "meta", dtype: torch.dtype = torch.float32
) -> Iterator[None]:
    """Have policies that are opened meanwhile built by `build_pipeline`, from no weights."""

    def index(pretrained: str) -> dict[str, Any]:
        return {"_class_name": describe(pretrained)["pipeline"]}

    def load(pretrained: str, expected: Any) -> Any:
        if (found := describe(pretrained)["pipeline"]) != expected.__name__:
            raise ValueError(f"{pretrained!r} is a {found}, not a {expected.__name__}.")
        return build_pipeline(pretrained, device, dtype)

    opened = "lit_align.policies.loading"
    with ExitStack() as stack:
        stack.enter_context(patch(f"{opened}._index", index))
        stack.enter_context(patch(f"{opened}.load_pipeline", load))
        if torch.device(device).type == "meta":  # encoders that wait on the CPU stay where they are
            stack.enter_context(patch.object(torch.nn.ModuleList, "cpu", lambda module: module))
        yield

"""Images to choose between: K of each prompt, drawn from a policy or taken from a list.

Every candidate has a seed of its own, keyed by (seed, prompt's number, candidate's number), so the
images do not depend on how they are batched, and a broken-off drawing is taken up where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, Unpack

import torch
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from tqdm import tqdm

from lit_align.checkpoint_io import read_checkpoint
from lit_align.data.prompt_files import names_prompts
from lit_align.data.prompts import Prompt, PromptFile
from lit_align.functional.noise import keyed_generator
from lit_align.rewards.base import uint8_images
from lit_align.verbs import Opened, open_policy, sample_images

LIST = "candidates.jsonl"
RECORDS = "preferences.jsonl"  # the file that judgements of them are written to
_MAX_SEED = 2**53  # the largest whole numbers that every reader of JSON keeps
_SETTINGS = "lit_align"  # the PNG text that says how an image was drawn


class Candidates(NamedTuple):
    """The images of one prompt.

    Attributes:
        prompt: Its text.
        metadata: What is known of it.
        items: K entries of a preference record: `uid`, `path` relative to the folder that the list
            is for, `model`, `seed`.
    """

    prompt: str
    metadata: dict[str, Any] | None
    items: list[dict[str, Any]]


class Source(NamedTuple):
    """A policy to draw candidates from, and how.

    Attributes:
        opened: The policy.
        model: What the records call it.
        num_inference_steps: Denoising steps.
        guidance_scale: Weight of guidance.
    """

    opened: Opened
    model: str
    num_inference_steps: int
    guidance_scale: float

    @classmethod
    def open(
        cls,
        ckpt_path: str | None,
        pretrained: str | None,
        lora: str | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> Source:
        """Open a policy as `generate` does; steps and guidance are its own unless given.

        Raises:
            ValueError: If there is not exactly one of `ckpt_path` and `pretrained`.
        """
        opened = open_policy(ckpt_path, pretrained, lora)
        opened.policy.to("cuda" if torch.cuda.is_available() else "cpu")
        guidance = opened.guidance_scale if guidance_scale is None else guidance_scale
        steps = num_inference_steps or opened.num_inference_steps
        return cls(opened, _model_name(ckpt_path, pretrained, lora), steps, guidance)


def _model_name(ckpt_path: str | None, pretrained: str | None, lora: str | None) -> str:
    if ckpt_path is not None:  # files are overwritten by later steps
        return f"{ckpt_path}@step{read_checkpoint(ckpt_path)['global_step']}"
    return f"{pretrained}+{lora}" if lora else str(pretrained)


def read_prompts(prompts: str | list[str], limit: int | None = None) -> list[Prompt]:
    """Return texts with what is known of them.

    Args:
        prompts: Prompts; or a shipped list or a prompts file, see `PromptFile`.
        limit: Only the first so many.

    Raises:
        ValueError: If there are none, or `limit` is not positive.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` must be positive, got {limit}.")
    if isinstance(prompts, list) and len(prompts) == 1 and names_prompts(prompts[0]):
        prompts = prompts[0]  # how the command line reads one word
    if isinstance(prompts, str):
        file = PromptFile(prompts)
        return file[: len(file) if limit is None else limit]
    if not prompts:
        raise ValueError("`prompts` is empty; give texts, a prompts file or a shipped list.")
    return [(text, None) for text in prompts[:limit]]


def draw_candidates(
    source: Source,
    prompts: Sequence[Prompt],
    folder: Path,
    images_per_prompt: int = 2,
    seed: int = 42,
    batch_size: int = 64,
) -> list[Candidates]:
    """Draw K images of each prompt into `folder/images`, and list them in `candidates.jsonl`.

    Images that the folder has already are kept; one that was drawn in another way is refused.

    Args:
        source: The policy.
        prompts: P texts with metadata.
        folder: Where the record file will lie.
        images_per_prompt: K.
        seed: With prompt's and candidate's number it decides an image's own seed, from which
            `torch.Generator().manual_seed` draws the initial noise.
        batch_size: Images drawn at a time, of several prompts.

    Returns:
        P entries of K items each.

    Raises:
        ValueError: If K is less than 2, or an image of another model, prompt or sampler is in its
            place.
    """
    if images_per_prompt < 2:
        raise ValueError(
            f"`images_per_prompt` must be at least 2 to choose between, got {images_per_prompt}."
        )
    (folder / "images").mkdir(parents=True, exist_ok=True)
    found = [
        Candidates(
            text, metadata, [_item(source, text, seed, p, k) for k in range(images_per_prompt)]
        )
        for p, (text, metadata) in enumerate(prompts)
    ]
    missing = [
        (text, item)
        for text, _, items in found
        for item in items
        if not _is_drawn(folder / item["path"], _settings(source, text, item))
    ]
    batches = range(0, len(missing), batch_size)
    for start in tqdm(batches, desc="Drawing candidates", disable=not missing):
        _draw(source, missing[start : start + batch_size], folder)
    _write_list(found, folder / LIST)
    return found


def _item(source: Source, text: str, seed: int, prompt: int, candidate: int) -> dict[str, Any]:
    generator = keyed_generator("candidate", seed, prompt, candidate)
    item = {
        "path": f"images/{prompt:06d}_{candidate}.png",
        "model": source.model,
        "seed": int(torch.randint(_MAX_SEED, (), generator=generator)),
    }
    # One name for one image, also beside the images of other models and folders.
    digest = hashlib.blake2b(_settings(source, text, item).encode(), digest_size=8)
    return {"uid": digest.hexdigest(), **item}


def _settings(source: Source, text: str, item: dict[str, Any]) -> str:
    """Return how an image is drawn, as its file says it."""
    return json.dumps(
        {
            "prompt": text,
            "model": item["model"],
            "seed": item["seed"],
            "num_inference_steps": source.num_inference_steps,
            "guidance_scale": source.guidance_scale,
        }
    )


def _is_drawn(path: Path, settings: str) -> bool:
    if not path.is_file():
        return False
    try:
        with Image.open(path) as image:
            held = image.info.get(_SETTINGS)
    except (UnidentifiedImageError, OSError):
        held = None
    if held != settings:
        raise ValueError(
            f"{str(path)!r} was drawn as {held}, but {settings} is asked for; give another "
            "`output`, or remove the folder."
        )
    return True


def _draw(source: Source, batch: list[tuple[str, dict[str, Any]]], folder: Path) -> None:
    images = sample_images(
        source.opened.policy,
        [text for text, _ in batch],
        [item["seed"] for _, item in batch],
        source.num_inference_steps,
        source.guidance_scale,
        source.opened.schedule,
    )
    for (text, item), pixels in zip(batch, uint8_images(images), strict=True):
        path = folder / item["path"]
        info = PngImagePlugin.PngInfo()
        info.add_text(_SETTINGS, _settings(source, text, item))
        unfinished = path.with_suffix(".unfinished")  # a file in its place is whole
        Image.fromarray(pixels.numpy()).save(unfinished, "png", pnginfo=info)
        unfinished.replace(path)


def _write_list(found: list[Candidates], path: Path) -> None:
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        for candidates in found:
            file.write(json.dumps(candidates._asdict(), ensure_ascii=False) + "\n")
    unfinished.replace(path)


def read_candidates(path: Path, folder: Path) -> list[Candidates]:
    """Read a list of candidates, or a file of preference records for its images.

    Args:
        path: The JSONL file; of each line `prompt` and `items` are read, and what is known of the
            prompt: the `metadata` of a candidate, `metadata.prompt` of a record.
        folder: Where the record file will lie, which the returned paths are relative to.

    Raises:
        FileNotFoundError: If there is no such file, or no such image.
        ValueError: If a line is broken, or has less than two images, or there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no list of candidates {str(path)!r}.")
    found: dict[tuple[str, ...], Candidates] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
            prompt, items = row["prompt"], [{**item} for item in row["items"]]
            images = [path.parent / item["path"] for item in items]
            keys = [item["uid"] for item in items]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: expected a 'prompt' and 'items' with 'uid' and 'path', "
                f"got {line[:80]!r}."
            ) from error
        if len(items) < 2 and "schema" in row:
            continue  # a record of one image, or of none
        if len(set(keys)) < max(2, len(keys)):
            raise ValueError(f"{path}, line {number}: needs two items or more, got {keys}.")
        for item, image in zip(items, images, strict=True):
            if not image.is_file():
                raise FileNotFoundError(f"{path}, line {number}: there is no image {str(image)!r}.")
            item["path"] = Path(os.path.relpath(image, folder)).as_posix()
        known = row.get("metadata")
        if "schema" in row:
            known = (known or {}).get("prompt")
        # Several annotators' records of the same images are one question.
        found.setdefault(tuple(sorted(keys)), Candidates(prompt, known, items))
    if not found:
        raise ValueError(f"{str(path)!r} has no prompt with two images or more.")
    return list(found.values())


def images_key(items: list[dict[str, Any]]) -> str:
    """Return what judgements of the same images have in common, whoever told them."""
    return "|".join(sorted(item["uid"] for item in items))


class Drawing(TypedDict, total=False):
    """What the command line says of candidates: where they come from and how many there are.

    Attributes:
        prompts: Prompts, a prompts file (.txt, .jsonl), or a shipped list.
        ckpt_path: A checkpoint written by `fit`, to draw from.
        pretrained: A shipped name, a pipeline folder or a hub id, to draw from.
        lora: A folder with `pytorch_lora_weights.safetensors`, on top of `pretrained`.
        candidates: Instead of prompts and model the `candidates.jsonl` or `preferences.jsonl` of an
            earlier command, whose images are judged.
        images_per_prompt: Images drawn of each prompt, 2 or more; 2 by default.
        num_inference_steps: Denoising steps; by default the checkpoint's, else 20.
        guidance_scale: Weight of guidance; by default the checkpoint's, else 3.
        limit: Only the first so many prompts.
    """

    prompts: str | list[str] | None
    ckpt_path: str | None
    pretrained: str | None
    lora: str | None
    candidates: str | None
    images_per_prompt: int
    num_inference_steps: int | None
    guidance_scale: float | None
    limit: int | None


def gather_candidates(
    folder: Path, seed: int, batch_size: int, **drawing: Unpack[Drawing]
) -> list[Candidates]:
    """Return what the command line asks for: a list read, or candidates drawn into `folder`.

    Args:
        folder: Where the record file will lie.
        seed: Decides the images' noise.
        batch_size: Images drawn at a time.
        drawing: See `Drawing`.

    Raises:
        ValueError: If both, neither or half of the two is given.
    """
    prompts, given = drawing.get("prompts"), drawing.get("candidates")
    model = drawing.get("ckpt_path"), drawing.get("pretrained"), drawing.get("lora")
    folder.mkdir(parents=True, exist_ok=True)
    if given is not None:
        if any(value is not None for value in (prompts, *model)):
            raise ValueError("`candidates` have their images; leave out `prompts` and the model.")
        return read_candidates(Path(given), folder)[: drawing.get("limit")]
    if prompts is None:
        raise ValueError("Give `prompts` with `ckpt_path` or `pretrained`, or `candidates`.")
    texts = read_prompts(prompts, drawing.get("limit"))
    sampling = drawing.get("num_inference_steps"), drawing.get("guidance_scale")
    source = Source.open(*model, *sampling)
    count = drawing.get("images_per_prompt", 2)
    return draw_candidates(source, texts, folder, count, seed, batch_size)

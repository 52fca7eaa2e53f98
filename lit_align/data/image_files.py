"""Image-text pairs in folders, JSONL files and tar shards."""

from __future__ import annotations

import glob
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class Pair(NamedTuple):
    """Where a pair's image lies, and its caption.

    Attributes:
        prompt: The caption.
        path: The image's file, or the shard that holds it.
        member: The image's name in the shard; None for a file of its own.
        offset: The image's first byte in `path`.
        size: Its number of bytes; -1 for all.
    """

    prompt: str
    path: Path
    member: str | None = None
    offset: int = 0
    size: int = -1

    def __str__(self) -> str:
        """Return the image's place, for messages."""
        return f"{self.path}, member {self.member}" if self.member else str(self.path)


class ImageTextFiles(Dataset[dict[str, Any]]):
    """Pictures with their captions, opened when they are asked for; only captions are in memory.

    Args:
        source: One of
            - a folder with a `metadata.jsonl` of `{"file_name": ..., "text": ...}`; or without,
              of images (.png, .jpg, .jpeg, .webp; also in subfolders), each beside a `.txt` of the
              same stem;
            - a `.jsonl` file of `{"image": <path relative to the file>, "prompt": ...}`;
            - an uncompressed `.tar` shard, a glob pattern of shards or a list of them, with
              members `key.jpg` (or .jpeg, .png, .webp) and `key.txt`, or `key.json` with a
              "caption" or "prompt". Other members are left out.
            Folders and shards are read in the order of names, hidden files left out.
        image_size: Images are scaled to this short side and cropped in the centre to a square.

    Raises:
        FileNotFoundError: If there is no such source, or, once it is asked for, no such image.
        ValueError: If the source has no pair, another suffix, or a caption is missing; or, once it
            is asked for, an image is broken.
    """

    def __init__(self, source: str | Path | Sequence[str | Path], image_size: int) -> None:
        if image_size < 1:
            raise ValueError(f"`image_size` must be positive, got {image_size}.")
        self.image_size = image_size
        self.pairs = index_pairs(source)

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `image` [3, image_size, image_size] in [0, 1], `prompt` and `index`."""
        pair = self.pairs[index]
        return {"image": self._read(pair), "prompt": pair.prompt, "index": index}

    def _read(self, pair: Pair) -> Tensor:
        try:
            with pair.path.open("rb") as file:
                file.seek(pair.offset)
                content = file.read(pair.size)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"There is no image {str(pair)!r}; restore it, or take its caption out of the "
                "source."
            ) from error
        try:
            with Image.open(io.BytesIO(content)) as image:
                return to_square(image, self.image_size)
        except Exception as error:  # broken files make decoders raise nearly anything
            raise ValueError(
                f"The image {str(pair)!r} cannot be read ({error}); replace it, or take it and its "
                "caption out of the source."
            ) from error


def to_square(image: Image.Image, size: int) -> Tensor:
    """Return [3, size, size] in [0, 1]: short side scaled to `size`, cropped in the centre.

    Raises:
        ValueError: If the pixels have more than 8 bits per channel.
    """
    if image.mode[0] in "IF":  # Pillow would clip them to white
        raise ValueError(f"mode {image.mode!r}, but at most 8 bits per channel are supported")
    image = ImageOps.exif_transpose(image).convert("RGB")
    short = min(image.size)
    width, height = (max(size, round(side * size / short)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    pixels = np.array(image.crop((left, top, left + size, top + size)))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float() / 255


def index_pairs(source: str | Path | Sequence[str | Path]) -> list[Pair]:
    """Return the pairs of a source, see `ImageTextFiles`.

    Raises:
        FileNotFoundError: If there is no such source.
        ValueError: If it has no pair, another suffix, or a caption is missing.
    """
    if not isinstance(source, str | Path):
        pairs = _shards([Path(shard) for shard in source])
    elif (path := Path(source)).is_dir():
        rows = path / "metadata.jsonl"
        pairs = _rows(rows, "file_name", "text") if rows.is_file() else _folder(path)
    elif path.is_file() and path.suffix == ".jsonl":
        pairs = _rows(path, "image", "prompt")
    elif path.is_file():
        pairs = _shards([path])
    else:
        pairs = _shards([Path(name) for name in sorted(glob.glob(str(source), recursive=True))])
        if not pairs:
            raise FileNotFoundError(
                f"There is no source of image-text pairs {str(source)!r}; give a folder, a .jsonl "
                "file, or a .tar shard, a glob pattern or a list of shards."
            )
    if not pairs:
        raise ValueError(
            f"The source {str(source)!r} has no image-text pair; images end in "
            f"{', '.join(SUFFIXES)}, their captions in .txt."
        )
    return pairs


def _hidden(path: PurePath) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _caption(content: bytes, place: str | Path) -> str:
    try:
        caption = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"The caption {str(place)!r} is not UTF-8 text.") from error
    if not caption:
        raise ValueError(f"The caption {str(place)!r} is empty; write one, or remove the image.")
    return caption


def _folder(folder: Path) -> list[Pair]:
    found = [
        (name.with_suffix("").as_posix(), name.suffix)
        for name in (path.relative_to(folder) for path in folder.rglob("*"))
        if name.suffix.lower() in SUFFIXES and not _hidden(name)
    ]
    pairs = []
    for stem, suffix in sorted(found):
        image, caption = folder / f"{stem}{suffix}", folder / f"{stem}.txt"
        if not caption.is_file():
            raise ValueError(
                f"The image {str(image)!r} has no caption {caption.name!r} beside it; write one, "
                "or give the folder a metadata.jsonl."
            )
        pairs.append(Pair(_caption(caption.read_bytes(), caption), image))
    return pairs


def _rows(path: Path, image_key: str, prompt_key: str) -> list[Pair]:
    pairs = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                image, prompt = row[image_key].strip(), row[prompt_key].strip()
            except (ValueError, KeyError, TypeError, AttributeError):
                image = prompt = ""
            if not image or not prompt:
                raise ValueError(
                    f"{path}, line {number}: expected an object with the texts {image_key!r} and "
                    f"{prompt_key!r}, got {line.decode(errors='replace').strip()[:80]!r}."
                )
            pairs.append(Pair(prompt, path.parent / image))
    return pairs


def _shards(paths: list[Path]) -> list[Pair]:
    pairs = []
    for path in paths:
        if path.suffix != ".tar":
            raise ValueError(
                "A source of image-text pairs must be a folder, or end in .jsonl or .tar, got "
                f"{str(path)!r}."
            )
        if not path.is_file():
            raise FileNotFoundError(f"There is no shard {str(path)!r}.")
        try:
            pairs.extend(_shard(path))
        except tarfile.TarError as error:
            raise ValueError(
                f"The shard {str(path)!r} is not a whole, uncompressed tar file ({error}); write "
                "or download it again."
            ) from error
    return pairs


def _members(shard: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the members, and see that none was lost."""
    yield from shard
    assert shard.fileobj is not None
    shard.fileobj.seek(shard.offset)
    if any(shard.fileobj.read(tarfile.BLOCKSIZE)):  # `tarfile` takes a broken header for the end
        raise tarfile.ReadError(f"broken at byte {shard.offset}")


def _shard(path: Path) -> list[Pair]:
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    with tarfile.open(path, "r:") as shard:
        for member in _members(shard):
            name = PurePosixPath(member.name)
            stem, _, suffix = name.name.partition(".")
            kind = "image" if f".{suffix.lower()}" in SUFFIXES else suffix.lower()
            if not member.isreg() or _hidden(name) or kind not in ("image", "txt", "json"):
                continue
            sample = samples.setdefault(name.with_name(stem).as_posix(), {})
            if kind in sample:
                raise ValueError(
                    f"The shard {str(path)!r} has two members for one key, {sample[kind].name!r} "
                    f"and {member.name!r}; give each pair its own key."
                )
            sample[kind] = member
        pairs = [_sample(path, shard, sample) for _, sample in sorted(samples.items())]
    return [pair for pair in pairs if pair is not None]


def _sample(path: Path, shard: tarfile.TarFile, parts: dict[str, tarfile.TarInfo]) -> Pair | None:
    image, text, fields = (parts.get(kind) for kind in ("image", "txt", "json"))
    if image is None:
        if text is None:
            return None  # a .json that may be about something else
        raise ValueError(
            f"The shard {str(path)!r} has a caption {text.name!r} without an image; images end in "
            f"{', '.join(SUFFIXES)}."
        )
    if text is not None:
        prompt = _caption(_content(shard, text), f"{path}, member {text.name}")
    elif fields is not None:
        prompt = _field(_content(shard, fields), f"{path}, member {fields.name}")
    else:
        raise ValueError(
            f"The shard {str(path)!r} has no caption for {image.name!r}; add a .txt, or a .json "
            "with a 'caption', of the same key."
        )
    return Pair(prompt, path, image.name, image.offset_data, image.size)


def _content(shard: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = shard.extractfile(member)
    assert file is not None  # a regular file has content
    return file.read()


def _field(content: bytes, place: str) -> str:
    try:
        fields = json.loads(content)
        prompt = fields["caption"] if "caption" in fields else fields["prompt"]
        return _caption(prompt.encode(), place)
    except (KeyError, TypeError, AttributeError, UnicodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"Expected an object with the text 'caption' or 'prompt' in {place!r}, got "
            f"{content[:80].decode(errors='replace')!r}."
        ) from error

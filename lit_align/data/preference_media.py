"""Images and short videos of preference records as tensors."""

from __future__ import annotations

import io
import stat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

ANIMATIONS = (".gif", ".webp", ".png", ".apng")
FRAMES = (".png", ".jpg", ".jpeg", ".webp")

Size = int | tuple[int, int] | None


def media_size(path: Path, video: bool) -> int:
    """Return the bytes of an item's file without opening it; 0 for a folder of frames.

    Raises:
        ValueError: If it is not there, or is none that can be read.
    """
    try:
        status = path.stat()
    except OSError:
        raise ValueError(f"there is no file {str(path)!r}") from None
    if not stat.S_ISDIR(status.st_mode):
        if video and path.suffix.lower() not in ANIMATIONS:
            raise ValueError(
                f"{str(path)!r} is no video that can be read; convert it to an animation "
                f"({', '.join(ANIMATIONS)}) or to a folder of frames"
            )
        return status.st_size
    if not video:
        raise ValueError(f"{str(path)!r} is a folder, not an image")
    if not _frame_files(path):
        raise ValueError(f"{str(path)!r} is a folder without frames ({', '.join(FRAMES)})")
    return 0


def _frame_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in FRAMES)


def read_media(
    source: Path | bytes, video: bool = False, size: Size = None, num_frames: int = 1
) -> Tensor:
    """Return an image [3, H, W], or a video's frames [F, 3, H, W], in [0, 1].

    The picture is scaled by the larger of the two ratios (bilinear, antialiased) and cropped in
    the centre.

    Args:
        source: A file, the content of one, or a folder of frames, in the order of their names.
        video: Whether it is a video.
        size: (H, W), or one number for both; None keeps the picture's own.
        num_frames: F, evenly spaced from the first to the last; 1 gives the first as an image.

    Raises:
        ValueError: If it cannot be decoded, or has too few frames.
    """
    if num_frames > 1 and not video:
        raise ValueError(f"it is an image, but `num_frames` is {num_frames}; set it to 1")
    if isinstance(source, Path) and source.is_dir():
        frames = _frame_files(source)
        chosen = [frames[place] for place in _places(len(frames), num_frames)]
        pictures = [_decoded(path.read_bytes(), size, [0])[0] for path in chosen]
    else:
        content = source if isinstance(source, bytes) else source.read_bytes()
        pictures = _decoded(content, size, num_frames if num_frames > 1 else [0])
    return pictures[0] if num_frames == 1 else torch.stack(pictures)


def _places(available: int, wanted: int) -> list[int]:
    if wanted > available:
        raise ValueError(
            f"it has {available} frames, fewer than `num_frames` ({wanted}); set it lower"
        )
    return [round(place) for place in np.linspace(0, available - 1, wanted).tolist()]


def _decoded(content: bytes, size: Size, frames: int | list[int]) -> list[Tensor]:
    """Return frames by their places, or so many evenly spaced ones."""
    try:
        image: Any = Image.open(io.BytesIO(content))
    except Exception as error:  # broken files make decoders raise nearly anything
        raise ValueError(f"it cannot be decoded ({error})") from error
    with image:
        if isinstance(frames, int):
            frames = _places(getattr(image, "n_frames", 1), frames)
        tensors = []
        for place in frames:
            try:
                if place:
                    image.seek(place)
                image.load()
            except Exception as error:
                raise ValueError(f"it cannot be decoded ({error})") from error
            tensors.append(_to_tensor(image, size))
    return tensors


def _to_tensor(image: Image.Image, size: Size) -> Tensor:
    if image.mode[0] in "IF":  # Pillow would clip them to white
        raise ValueError(f"it has mode {image.mode!r}, but at most 8 bits per channel can be read")
    image = ImageOps.exif_transpose(image).convert("RGB")
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        ratio = max(height / image.height, width / image.width)
        scaled = (max(width, round(image.width * ratio)), max(height, round(image.height * ratio)))
        if scaled != image.size:
            image = image.resize(scaled, Image.Resampling.BILINEAR)
        left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
        image = image.crop((left, top, left + width, top + height))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255

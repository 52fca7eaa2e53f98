"""Latents of the pictures of a file of preferences, encoded once and kept in a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lit_align.data.preference_file import Judgement, PreferenceFile, hash_of
from lit_align.data.preference_media import Size, read_media
from lit_align.functional.noise import keyed_generator


def read_pictures(judgement: Judgement, size: Size, num_frames: int) -> list[Tensor]:
    """Return the pictures of a judgement, see `read_media`.

    Raises:
        ValueError: If one cannot be decoded; the message names the record.
    """
    pictures = []
    for number, source in enumerate(judgement.media):
        try:
            pictures.append(read_media(source, judgement.video, size, num_frames))
        except (OSError, ValueError) as error:
            name = f"{str(source)!r}" if isinstance(source, Path) else f"picture {number}"
            raise ValueError(
                f"{judgement.place}: {name} cannot be used: {error}. Replace it, or take the "
                "record out of the file."
            ) from error
    return pictures


def stacked(pictures: Sequence[Tensor], place: str) -> Tensor:
    """Return the pictures [N, ...].

    Raises:
        ValueError: If their shapes differ; the message names the place.
    """
    shapes = {tuple(picture.shape) for picture in pictures}
    if len(shapes) > 1:
        told = " and ".join(str(shape) for shape in sorted(shapes)[:2])
        raise ValueError(f"{place}: pictures of shapes {told} cannot be batched; set `image_size`.")
    return torch.stack(list(pictures))


class _Unseen(Dataset[tuple[list[int], list[Tensor]]]):
    """The pictures of each judgement, for the encoder."""

    def __init__(self, file: PreferenceFile, size: Size) -> None:
        self.file, self.size = file, size

    def __len__(self) -> int:
        return len(self.file)

    def __getitem__(self, number: int) -> tuple[list[int], list[Tensor]]:
        judgement = self.file[number]
        return judgement.keys, read_pictures(judgement, self.size, 1)


class LatentFile:
    """Latents [pictures, ...] float32 in a `.npy` file, one row per picture.

    Args:
        folder: Holds such files; it is made if need be.
        file: The preferences.
        name: What else decides the latents: encoder and size of the pictures.
    """

    def __init__(self, folder: str | Path, file: PreferenceFile, name: str) -> None:
        self.file = file
        self.keys = file.picture_keys()
        self.path = Path(folder) / f"{file.fingerprint}-{hash_of(name):016x}.npy"

    def complete(self) -> bool:
        """Return whether the latents are there; a file has its name only once it is whole."""
        return self.path.is_file()

    def read(self, keys: list[int]) -> Tensor:
        """Return the latents [K, ...] of pictures, by their `Judgement.keys`."""
        rows = np.searchsorted(self.keys, keys)
        # Opened anew each time, so that worker processes share nothing.
        return torch.from_numpy(np.load(self.path, mmap_mode="r")[rows])

    def write(
        self,
        encode: Callable[[Tensor], Tensor],
        size: Size,
        batch_size: int,
        num_workers: int,
    ) -> None:
        """Encode every picture once.

        Args:
            encode: Makes latents [N, ...] of images [N, 3, H, W].
            size: Of the images, see `read_media`.
            batch_size: Images that are encoded together, N.
            num_workers: Processes that read images.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(f".{os.getpid()}.partial")
        rows: Any = None
        try:
            for keys, images in self._batches(size, batch_size, num_workers):
                latents = encode(images).float().cpu().numpy()
                if rows is None:
                    shape = (len(self.keys), *latents.shape[1:])
                    rows = np.lib.format.open_memmap(partial, "w+", np.float32, shape)
                rows[np.searchsorted(self.keys, keys)] = latents
            rows.flush()
            partial.replace(self.path)
        finally:
            partial.unlink(missing_ok=True)

    def _batches(
        self, size: Size, batch_size: int, num_workers: int
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Yield pictures that were not yielded yet, with their keys."""
        unseen = np.ones(len(self.keys), dtype=bool)
        keys: list[int] = []
        images: list[Tensor] = []
        loader = DataLoader(
            _Unseen(self.file, size), batch_size=None, num_workers=num_workers,
            generator=keyed_generator("latents"),  # else the global one is drawn from
        )  # fmt: skip
        for own_keys, pictures in loader:
            for key, picture in zip(own_keys, pictures, strict=True):
                row = np.searchsorted(self.keys, key)
                if unseen[row]:
                    unseen[row] = False
                    keys.append(key)
                    images.append(picture)
                if len(keys) == batch_size:
                    yield keys, stacked(images, self.file.source)
                    keys, images = [], []
        if keys:
            yield keys, stacked(images, self.file.source)

"""Batches of judgements, dealt to processes, in an order that a seed decides."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lit_align.data.preference_file import Numbers, PreferenceFile
from lit_align.data.preference_latents import LatentFile, read_pictures, stacked
from lit_align.data.preference_media import Size
from lit_align.functional.noise import keyed_generator
from lit_align.trajectory import PreferenceBatch


class Decoded(NamedTuple):
    """A judgement with its pictures [K, ...], or their latents [K, ...]."""

    images: Tensor
    prompt: str
    labels: Tensor
    weight: float
    number: int
    latents: Tensor | None


class DecodedPreferences(Dataset[Decoded]):
    """Judgements of a file with their pictures, decoded when they are asked for.

    Args:
        file: The judgements.
        image_size: (H, W) of the pictures, or one number for both; None keeps their own size.
        num_frames: Frames of a video; 1 gives the first as an image.
        latents: Where latents lie, which are given in place of the pictures.
    """

    def __init__(
        self,
        file: PreferenceFile,
        image_size: Size = None,
        num_frames: int = 1,
        latents: LatentFile | None = None,
    ) -> None:
        self.file, self.image_size, self.num_frames = file, image_size, num_frames
        self.latents = latents

    def __len__(self) -> int:
        """Return the number of judgements."""
        return len(self.file)

    def __getitem__(self, number: int) -> Decoded:
        """Return a judgement; raises ValueError if a picture cannot be used."""
        judgement = self.file[number]
        latents = None if self.latents is None else self.latents.read(judgement.keys)
        if latents is None:
            pictures = read_pictures(judgement, self.image_size, self.num_frames)
            images = stacked(pictures, judgement.place)
        else:
            images = torch.empty(len(judgement.labels), 0)
        labels = torch.tensor(judgement.labels, dtype=torch.float32)
        return Decoded(images, judgement.prompt, labels, judgement.weight, number, latents)


class PreferenceLoader:
    """Yields this process's batches of one pass; the next pass has another order.

    The passes are numbered by Lightning's epochs, which are told to `set_epoch`, and by themselves
    where nobody tells them. With the seed the number decides the order, and a batch is dealt out
    one judgement to each process in turn, so that W processes see together what one with batches W
    times as large sees.

    Args:
        data: The judgements with their pictures.
        batch_size: Judgements per batch and process.
        numbers: Those of the file to yield; all if None.
        shuffle: For training: a new random order each pass, an incomplete last batch dropped. Else
            the file's order, and all of them; so that all processes have equally many, the last
            may be repeated with weight 0.
        seed: Decides the order.
        rank: This process.
        world_size: Number of processes W.
        num_workers: Processes that decode pictures; 0 decodes them in this one.
        held_out: The validation judgements, in the file's order, for methods that measure on them.

    Raises:
        ValueError: If there are too few judgements for one training batch.
    """

    def __init__(
        self,
        data: DecodedPreferences,
        batch_size: int,
        numbers: Numbers | None = None,
        shuffle: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        held_out: PreferenceLoader | None = None,
    ) -> None:
        self.data, self.batch_size = data, batch_size
        self.numbers: Numbers = np.arange(len(data)) if numbers is None else numbers
        self.shuffle, self.seed = shuffle, seed
        self.rank, self.world_size, self.num_workers = rank, world_size, num_workers
        self.held_out = held_out
        self._epoch: int | None = None  # as told, for the pass that begins next
        self._lap, self._served = -1, 0  # the pass in progress, and its batches yielded
        self._restored = False
        share = len(self.numbers) // world_size
        if shuffle and share < batch_size:
            remedy = f"set `batch_size: {share}`, or give more" if share else "give more"
            raise ValueError(
                f"{data.file.source!r} has {len(self.numbers)} judgement(s) to train on, too few "
                f"for one batch on {world_size} process(es); {remedy}."
            )

    def __len__(self) -> int:
        """Return the number of batches in one pass."""
        total, per_batch = len(self.numbers), self.batch_size * self.world_size
        return total // per_batch if self.shuffle else -(-total // per_batch)

    batch_sampler = None  # Lightning looks for it beside `sampler`

    @property
    def sampler(self) -> PreferenceLoader:
        """What Lightning tells the number of an epoch: the loader itself."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Number the pass that begins next."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[PreferenceBatch]:
        """Yield the batches of the next pass, or what is left of a restored one."""
        lap = self._lap + 1 if self._epoch is None else self._epoch
        unfinished = self._restored and self._served < len(self)
        if not (unfinished and self._epoch in (None, self._lap)):
            self._lap, self._served = lap, 0
        self._restored = False
        order, places = self._order(self._lap), self._places()[self._served :]
        last = len(self.numbers) - 1
        loader = DataLoader(
            self.data,
            batch_sampler=(order[np.minimum(own, last)].tolist() for own in places),
            num_workers=self.num_workers,
            collate_fn=list,
            generator=keyed_generator("workers", self.seed),  # else the global one is drawn from
        )
        for own, decoded in zip(places, loader, strict=True):
            self._served += 1
            yield self._batch(own, decoded)

    def _order(self, lap: int) -> Numbers:
        """Return the numbers of the pass in their order."""
        if not self.shuffle:
            return self.numbers
        generator = keyed_generator("preferences", self.seed, lap)
        order: Numbers = self.numbers[torch.randperm(len(self.numbers), generator=generator)]
        return order

    def _places(self) -> list[Numbers]:
        """Return this process's places in the order, batch by batch; past its end if uneven."""
        total, size = len(self.numbers), self.batch_size * self.world_size
        batches = []
        for start in range(0, len(self) * size, size):
            even = -(-min(size, total - start) // self.world_size) * self.world_size
            batches.append(np.arange(start + self.rank, start + even, self.world_size))
        return batches

    def _batch(self, places: Numbers, decoded: Sequence[Decoded]) -> PreferenceBatch:
        total = len(self.numbers)
        most = max(len(item.labels) for item in decoded)
        images = [_filled(item.images, most) for item in decoded]
        latents = [_filled(i.latents, most) for i in decoded if i.latents is not None]
        weights = torch.tensor([item.weight for item in decoded], dtype=torch.float32)
        weights[torch.from_numpy(places >= total)] = 0
        lap = self._lap if self.shuffle else 0
        return PreferenceBatch(
            images=stacked(images, self.data.file.source),
            prompts=[item.prompt for item in decoded],
            labels=torch.stack([_filled(item.labels, most) for item in decoded]),
            weights=weights,
            positions=torch.from_numpy(lap * total + np.minimum(places, total - 1)),
            record_ids=torch.tensor([item.number for item in decoded]),
            latents=torch.stack(latents) if latents else None,
        )

    @property
    def prompts(self) -> Sequence[tuple[str, dict[str, Any] | None]]:
        """The judgements' (prompt, None), read when they are asked for."""
        return _Prompts(self.data.file, self.numbers)

    @property
    def fingerprint(self) -> str:
        """Hash of the judgements, so that a resumed run sees if they were changed."""
        digest = hashlib.blake2b(self.data.file.fingerprint.encode(), digest_size=8)
        digest.update(np.ascontiguousarray(self.numbers, dtype=np.int64).tobytes())
        return digest.hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """Return the pass, its batches yielded, and what the judgements are."""
        return {
            "lap": self._lap,
            "served": self._served,
            "finished": self._served == len(self),
            "batch": self.batch_size * self.world_size,
            "count": len(self.numbers),
            "preferences": self.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the position in `state`, on as many processes or others.

        Raises:
            ValueError: If the judgements are not those that the state was taken with, or in the
                middle of a pass the batches of all processes together have another size.
        """
        if state["preferences"] != self.fingerprint:
            raise ValueError(
                f"The training judgements ({len(self.numbers)}) are not those that the checkpoint "
                f"was made with ({state['count']}); restore them, or start a new run."
            )
        batch = self.batch_size * self.world_size
        if not state["finished"] and state["batch"] != batch:
            raise ValueError(
                f"The checkpoint was made in the middle of a pass with batches of {state['batch']} "
                f"judgements over all processes, but now they have {batch}; set `batch_size` so "
                "that their product with the processes is the same."
            )
        self._lap, self._restored = state["lap"], True
        self._served = len(self) if state["finished"] else state["served"]


class _Prompts(Sequence[tuple[str, dict[str, Any] | None]]):
    def __init__(self, file: PreferenceFile, numbers: Numbers) -> None:
        self.file, self.numbers = file, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.file[int(self.numbers[index])].prompt, None


def _filled(values: Tensor, count: int) -> Tensor:
    """Return the values with zeros for absent places [count, ...]."""
    absent = count - len(values)
    return (
        values if not absent else torch.cat([values, values.new_zeros(absent, *values.shape[1:])])
    )

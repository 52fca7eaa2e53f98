"""Image-text pairs for pretraining."""

from __future__ import annotations

import hashlib
import random
from typing import Any, Protocol

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lit_align.data.image_files import ImageTextFiles
from lit_align.functional.noise import keyed_generator
from lit_align.shapes import grammar, renderer
from lit_align.shapes.scene import Facts
from lit_align.trajectory import PairBatch


class Pairs(Protocol):
    """A map-style dataset of `image` [3, H, W] in [0, 1], `prompt` and `index`."""

    def __len__(self) -> int:
        """Return the number of pairs."""
        ...

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        """Return one pair."""
        ...


class ShapesPairs(Dataset[dict[str, Any]]):
    """Rendered pictures of the shapes world with their captions.

    Args:
        size: Number of pairs.
        seed: Decides captions and pictures.
        splits: Prompt splits to draw from.
        colored: Only captions that state the colour of every object.
    """

    def __init__(
        self, size: int, seed: int, splits: tuple[str, ...] = ("train",), colored: bool = False
    ) -> None:
        rng = random.Random(seed)
        facts: list[Facts] = []
        while len(facts) < size:
            drawn = grammar.sample_facts(rng)
            if grammar.split_of(drawn) in splits and (not colored or grammar.states_colors(drawn)):
                facts.append(drawn)
        self.captions = [grammar.caption(f) for f in facts]
        images = renderer.render([renderer.sample_scene(f, rng) for f in facts])
        self.images = (images * 255).round().to(torch.uint8)

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.captions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `image` [3, 32, 32] in [0, 1], `prompt` and `index`."""
        image: Tensor = self.images[index].float() / 255
        return {"image": image, "prompt": self.captions[index], "index": index}


class ShapesPairsDataModule(LightningDataModule):
    """Loaders of rendered image-text pairs.

    Args:
        size: Number of training pairs.
        val_size: Number of validation pairs, of held-out captions.
        batch_size: Pairs per batch.
        splits: Prompt splits to train on: "train", "heldout", "unseen".
        seed: Decides captions, pictures and their order.
        colored: Train only on captions that state the colour of every object: pairs that say
            nothing about the colours of the others.
    """

    def __init__(
        self,
        size: int = 40_000,
        val_size: int = 1_000,
        batch_size: int = 64,
        splits: tuple[str, ...] = ("train",),
        seed: int = 0,
        colored: bool = False,
    ) -> None:
        super().__init__()
        self.size, self.val_size, self.batch_size = size, val_size, batch_size
        self.splits, self.seed, self.colored = splits, seed, colored

    def setup(self, stage: str) -> None:
        """Render the pairs."""
        if stage == "fit":
            self.train = ShapesPairs(self.size, self.seed, self.splits, self.colored)
        self.val = ShapesPairs(self.val_size, self.seed + 1, ("heldout",))

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Return shuffled batches; an incomplete last one is dropped."""
        return DataLoader(
            self.train,
            self.batch_size,
            shuffle=True,
            drop_last=True,
            generator=torch.Generator().manual_seed(self.seed),
        )

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Return the validation pairs in a fixed order."""
        return DataLoader(self.val, self.batch_size)


class ImageTextDataModule(LightningDataModule):
    """Loaders of image-text pairs from files.

    Args:
        source: Training pairs: a folder, a `.jsonl` file, or `.tar` shards; see `ImageTextFiles`.
        image_size: Side H of the square images.
        batch_size: Pairs per batch and process.
        val_source: The same as `source` for validation; none if None.
        num_workers: Processes that read images; 0 reads them in the training process.
        seed: Decides the order of training pairs.
    """

    def __init__(
        self,
        source: list[str] | str,
        image_size: int = 512,
        batch_size: int = 16,
        val_source: list[str] | str | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        for name, value in {"image_size": image_size, "batch_size": batch_size}.items():
            if value < 1:
                raise ValueError(f"`{name}` must be positive, got {value}.")
        self.source, self.val_source = source, val_source
        self.image_size, self.batch_size = image_size, batch_size
        self.num_workers, self.seed = num_workers, seed

    def setup(self, stage: str) -> None:
        """Index the sources that the stage needs, so that a broken one is told of at once.

        Raises:
            ValueError: If there are too few pairs for one training batch, or there is no
                validation source to validate on.
        """
        if stage == "fit":
            self.train = ImageTextFiles(self.source, self.image_size)
            world_size = self.trainer.world_size if self.trainer else 1
            share = -(-len(self.train) // world_size)
            if share < self.batch_size:
                raise ValueError(
                    f"{str(self.source)!r} has {len(self.train)} pairs, too few for one batch on "
                    f"{world_size} process(es); set `batch_size: {share}`, or give more pairs."
                )
        elif self.val_source is None:
            raise ValueError(f"There are no pairs to {stage} on; set `val_source`.")
        if self.val_source is not None:
            self.val = ImageTextFiles(self.val_source, self.image_size)

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Return shuffled batches; an incomplete last one is dropped."""
        return DataLoader(
            self.train,
            self.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            generator=torch.Generator().manual_seed(self.seed),
        )

    def val_dataloader(self) -> DataLoader[dict[str, Any]] | list[Any]:
        """Return the validation pairs in a fixed order; an empty list if there are none."""
        if self.val_source is None:
            return []
        return DataLoader(self.val, self.batch_size, num_workers=self.num_workers)


class PairStream:
    """Endless batches of pairs in an order that a seed decides, dealt to processes.

    The stream runs through the dataset in a new random order each lap. It has no state: a batch is
    a function of its number. W processes see together what one with batches W times as large sees.

    Args:
        pairs: A map-style dataset, such as `ShapesPairs` or `ImageTextFiles`.
        seed: Decides the order.
        rank: This process.
        world_size: Number of processes W.

    Raises:
        ValueError: If there are no pairs.
    """

    def __init__(self, pairs: Pairs, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if not len(pairs):
            raise ValueError("A stream of pairs needs at least one pair, but the dataset is empty.")
        self.pairs, self.seed = pairs, seed
        self.rank, self.world_size = rank, world_size
        self._lap = -1
        self._order = torch.empty(0, dtype=torch.int64)  # of lap `_lap`, kept for the next batch

    def batch(self, number: int, size: int) -> PairBatch:
        """Return this process's `size` pairs of batch `number`, counted from 0."""
        start = number * size * self.world_size
        places = range(start + self.rank, start + size * self.world_size, self.world_size)
        items = [self.pairs[self._index(place)] for place in places]
        return PairBatch(
            images=torch.stack([item["image"] for item in items]),
            prompts=[item["prompt"] for item in items],
            positions=torch.tensor(places, dtype=torch.int64),
        )

    def _index(self, place: int) -> int:
        lap, step = divmod(place, len(self.pairs))
        if lap != self._lap:
            generator = keyed_generator("pairs", self.seed, lap)
            self._order = torch.randperm(len(self.pairs), generator=generator)
            self._lap = lap
        return int(self._order[step])

    @property
    def fingerprint(self) -> str:
        """Hash of the number of pairs and the outer two prompts: a resumed run sees other data."""
        count = len(self.pairs)
        seen = (count, self.pairs[0]["prompt"], self.pairs[count - 1]["prompt"])
        return hashlib.blake2b(repr(seen).encode(), digest_size=8).hexdigest()

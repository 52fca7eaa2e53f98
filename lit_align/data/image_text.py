"""Image-text pairs for pretraining."""

from __future__ import annotations

import random
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lit_align.shapes import grammar, renderer
from lit_align.shapes.scene import Facts


class ShapesPairs(Dataset[dict[str, Any]]):
    """Rendered pictures of the shapes world with their captions.

    Args:
        size: Number of pairs.
        seed: Decides captions and pictures.
        splits: Prompt splits to draw from.
    """

    def __init__(self, size: int, seed: int, splits: tuple[str, ...] = ("train",)) -> None:
        rng = random.Random(seed)
        facts: list[Facts] = []
        while len(facts) < size:
            drawn = grammar.sample_facts(rng)
            if grammar.split_of(drawn) in splits:
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
    """

    def __init__(
        self,
        size: int = 40_000,
        val_size: int = 1_000,
        batch_size: int = 64,
        splits: tuple[str, ...] = ("train",),
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.size, self.val_size, self.batch_size = size, val_size, batch_size
        self.splits, self.seed = splits, seed

    def setup(self, stage: str) -> None:
        """Render the pairs."""
        if stage == "fit":
            self.train = ShapesPairs(self.size, self.seed, self.splits)
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

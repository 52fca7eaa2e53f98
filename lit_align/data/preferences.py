"""Preferences for training and evaluation: pairs, rankings and single images from files.

The files' layouts are in `preference_formats`, our own schema in `preference_records`.
"""

from __future__ import annotations

import copy
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from lit_align.data.preference_file import UNITS, Numbers, PreferenceFile
from lit_align.data.preference_latents import LatentFile
from lit_align.data.preference_loader import DecodedPreferences, PreferenceLoader
from lit_align.functional.choices import check_choice

__all__ = ["PreferenceDataModule", "PreferenceFile", "PreferenceLoader"]

Split = tuple[PreferenceFile, Numbers | None]


@runtime_checkable
class PreferenceConsumer(Protocol):
    """A module that decides how its training judgements are dealt out."""

    def experience(self, loader: PreferenceLoader) -> Any:
        """Return the training loader made of a `PreferenceLoader`."""


@runtime_checkable
class Encoder(Protocol):
    """A module that can learn from latents in place of images."""

    def encode_images(self, images: Tensor) -> Tensor:
        """Return latents [N, ...] of images [N, 3, H, W] in [0, 1]."""

    def latents_key(self) -> str:
        """Return what decides the latents: the autoencoder and the size of images."""


class PreferenceDataModule(LightningDataModule):
    """Judgements of images for training and evaluation.

    Args:
        train: A file of preferences, see `PreferenceFile`.
        val: The same, of held-out prompts; None holds out a share of `train`.
        format: Layout of the files: `lit_align`, `pickapic`, `hpdv2`, `imagereward`, `videoreward`
            or `kto`.
        unit: `pairs`, `rankings` or `ratings` (single images).
        axis: Only judgements on this axis, such as `visual_quality`; on all if None.
        ties: `keep` or `drop` judgements that prefer nothing.
        aggregate: How several judgements of one pair become one: `mean`, `majority`, `none`.
        broken: `raise` an error about broken rows, or `skip` them.
        media_folder: The folder that paths in the files are relative to; by default the files'.
        val_fraction: Share of the prompts of `train` that are held out if `val` is None, in [0, 1).
        image_size: (H, W) of the images, or one number for both; None keeps their own, which must
            be one size.
        num_frames: Frames of a video; 1 gives the first as an image.
        batch_size: Judgements per process and batch.
        num_workers: Processes that decode images; 0 decodes them in the training process.
        seed: Decides the order of training judgements.
        cache_latents: A folder for the images' latents, which are encoded once, by the module, and
            then given in the images' place; none are kept if None.
        prompts: A data module of prompts. Evaluation is then of images drawn for its prompts, and
            the held-out judgements are left to the training loader's `held_out`.

    Raises:
        ValueError: If an option cannot work.
    """

    def __init__(
        self,
        train: str,
        val: str | None = None,
        format: str = "lit_align",
        unit: str = "pairs",
        axis: str | None = None,
        ties: str = "keep",
        aggregate: str = "mean",
        broken: str = "raise",
        media_folder: str | None = None,
        val_fraction: float = 0.0,
        image_size: int | tuple[int, int] | None = None,
        num_frames: int = 1,
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        cache_latents: str | None = None,
        prompts: LightningDataModule | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        side = min(image_size) if isinstance(image_size, tuple) else image_size
        for name, value in {"batch_size": batch_size, "num_frames": num_frames,
                            "image_size": side}.items():  # fmt: skip
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be positive, got {value}.")
        if not 0 <= val_fraction < 1:
            raise ValueError(f"`val_fraction` must lie in [0, 1), got {val_fraction}.")
        if val is not None and val_fraction:
            raise ValueError("Set `val` or `val_fraction`, not both.")
        if cache_latents and num_frames > 1:
            raise ValueError("`cache_latents` keeps images, not videos; set `num_frames: 1`.")
        check_choice("unit", unit, UNITS)
        self.train, self.val, self.val_fraction = train, val, val_fraction
        self.opening: dict[str, Any] = {
            "format": format, "unit": unit, "axis": axis, "ties": ties, "aggregate": aggregate,
            "broken": broken, "media_folder": media_folder,
        }  # fmt: skip
        self.image_size, self.num_frames = image_size, num_frames
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.cache_latents = cache_latents
        # A copy: it gets the trainer, and hyperparameters, which are copied and saved, must not.
        self.prompts: Any = copy.copy(prompts)

    def setup(self, stage: str) -> None:
        """Open the files that the stage needs, so that a broken one is told of at once.

        Raises:
            ValueError: If there is nothing to train or evaluate on.
        """
        if self.prompts is not None:
            self.prompts.trainer = self.trainer
            self.prompts.setup(stage)
        if stage != "fit" and self.prompts is not None:
            return
        if stage == "fit" or self.val is None:
            file = PreferenceFile(self.train, **self.opening)
            trained, held_out = file.split(self.val_fraction)
            if self.val_fraction and not len(held_out):
                raise ValueError(
                    f"`val_fraction` {self.val_fraction} holds out none of the {len(file)} "
                    f"judgements in {self.train!r}, which have few prompts; set it higher."
                )
            self.trained: Split = (file, trained)
            self.held_out: Split | None = (file, held_out) if len(held_out) else None
        if self.val is not None:
            self.held_out = (PreferenceFile(self.val, **self.opening), None)
        if stage == "fit":
            self._loader(self.trained, shuffle=True)  # refuses too few, before any work
        elif self.held_out is None:
            raise ValueError(
                f"There are no judgements to {stage} on; set `val`, or a larger `val_fraction`."
            )

    def _loader(self, split: Split, shuffle: bool = False, **options: Any) -> PreferenceLoader:
        file, numbers = split
        data = DecodedPreferences(
            file, self.image_size, self.num_frames, options.pop("latents", None)
        )
        trainer = self.trainer
        share = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        return PreferenceLoader(
            data, self.batch_size, numbers, shuffle, self.seed, *share, self.num_workers, **options
        )

    def _held_out(self) -> PreferenceLoader | None:
        if self.held_out is None:
            return None
        return self._loader(self.held_out, latents=self._latents(self.held_out[0]))

    def _latents(self, file: PreferenceFile) -> LatentFile | None:
        """Return the latents of a file's images, encoded by the first process if need be."""
        if self.cache_latents is None:
            return None
        module = self.trainer.lightning_module if self.trainer else None
        if not isinstance(module, Encoder):
            raise ValueError(
                f"`cache_latents` is set, but {type(module).__name__} does not learn from latents; "
                "leave it out."
            )
        assert self.trainer is not None
        key = f"{module.latents_key()} {self.image_size}"
        latents = LatentFile(self.cache_latents, file, key)
        if self.trainer.is_global_zero and not latents.complete():
            device = module.device

            def encode(images: Tensor) -> Tensor:
                with torch.no_grad():
                    return module.encode_images(images.to(device))

            latents.write(encode, self.image_size, self.batch_size, self.num_workers)
        self.trainer.strategy.barrier("latents")
        return latents

    def train_dataloader(self) -> Any:
        """Return what the module makes of the training judgements: by default their loader."""
        latents = self._latents(self.trained[0])
        loader = self._loader(
            self.trained, shuffle=True, latents=latents, held_out=self._held_out()
        )
        module = self.trainer.lightning_module if self.trainer else None
        return module.experience(loader) if isinstance(module, PreferenceConsumer) else loader

    def val_dataloader(self) -> Any:
        """Return the validation prompts, or the held-out judgements in the file's order."""
        if self.prompts is not None:
            return self.prompts.val_dataloader()
        return self._held_out() or []

    def test_dataloader(self) -> Any:
        """Return the test prompts, or the held-out judgements in the file's order."""
        return self.val_dataloader() if self.prompts is None else self.prompts.test_dataloader()

    def predict_dataloader(self) -> Any:
        """Return the test prompts, or the held-out judgements in the file's order."""
        return self.val_dataloader() if self.prompts is None else self.prompts.predict_dataloader()

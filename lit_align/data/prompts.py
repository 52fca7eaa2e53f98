"""Prompts, dealt out by a stateful loader; their files are those of `prompt_files`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningDataModule

from lit_align.data.image_text import PairStream
from lit_align.data.prompt_files import Prompt, PromptFile, shipped_prompts
from lit_align.functional.noise import keyed_generator
from lit_align.trajectory import PromptBatch

__all__ = ["Prompt", "PromptConsumer", "PromptDataModule", "PromptFile", "PromptLoader",
           "shipped_prompts"]  # fmt: skip


@runtime_checkable
class PromptConsumer(Protocol):
    """A module that decides how its training prompts are dealt out."""

    def experience(self, loader: Any, pairs: PairStream | None = None) -> Any:
        """Return the training loader made of a PromptLoader, or of one for each task by name."""


class PromptLoader:
    """Batches of prompts, dealt to processes, in an order that a seed decides.

    Iterating yields this process's share of each batch. `take` draws from the same endless stream
    for those who deal prompts themselves.

    Args:
        prompts: (text, metadata) pairs.
        batch_size: Prompts per batch and process.
        shuffle: Draw in a new random order each time through; else in the file's order.
        seed: Decides the order.
        rank: This process.
        world_size: Number of processes.

    Raises:
        ValueError: If prompts in the file's order cannot be dealt out evenly: all processes must
            call the network equally often, or those of FSDP2 wait for each other forever.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        total = len(prompts)
        if not shuffle and total % world_size:
            even = total - total % world_size
            remedy = f"set `val_size: {even}` for validation, or " if even else ""
            raise ValueError(
                f"{total} prompts cannot be dealt out evenly to {world_size} processes; {remedy}"
                f"give a file with a multiple of {world_size} prompts."
            )
        self.prompts, self.batch_size = prompts, batch_size
        self.shuffle, self.seed = shuffle, seed
        self.rank, self.world_size = rank, world_size
        self._drawn = 0

    def __len__(self) -> int:
        """Return the number of batches in one pass; training drops an incomplete last one."""
        total, per_batch = len(self.prompts), self.batch_size * self.world_size
        return total // per_batch if self.shuffle else -(-total // per_batch)

    def __iter__(self) -> Iterator[PromptBatch]:
        """Yield this process's batches of one pass."""
        per_batch = self.batch_size * self.world_size
        for number in range(len(self)):
            if self.shuffle:
                numbers = self._next_numbers(per_batch)
            else:
                start = number * per_batch
                numbers = list(range(start, min(start + per_batch, len(self.prompts))))
            yield self.batch(numbers[self.rank :: self.world_size])

    def take(self, count: int) -> list[int]:
        """Draw the numbers of the next `count` prompts of the stream, for all processes."""
        return self._next_numbers(count)

    def batch(self, numbers: Sequence[int]) -> PromptBatch:
        """Return the prompts of these numbers, one sample each, keyed by their number.

        Equal prompts are a group, for rewards that compare images.
        """
        rows = [self.prompts[number] for number in numbers]
        texts = [text for text, _ in rows]
        ids = torch.tensor(numbers, dtype=torch.int64)
        groups = torch.tensor([numbers[texts.index(text)] for text in texts], dtype=torch.int64)
        return PromptBatch(texts, [metadata for _, metadata in rows], ids, ids, groups)

    def _next_numbers(self, count: int) -> list[int]:
        total = len(self.prompts)
        numbers: list[int] = []
        while len(numbers) < count:
            lap, start = divmod(self._drawn, total)
            chunk = self._order(lap)[start : start + count - len(numbers)]
            numbers.extend(chunk)
            self._drawn += len(chunk)
        return numbers

    def _order(self, lap: int) -> list[int]:
        if not self.shuffle:
            return list(range(len(self.prompts)))
        generator = keyed_generator("prompts", self.seed, lap)
        order: list[int] = torch.randperm(len(self.prompts), generator=generator).tolist()
        return order

    @property
    def fingerprint(self) -> str:
        """Hash of the prompts, so that a resumed run sees if they were changed."""
        if isinstance(self.prompts, PromptFile):
            return self.prompts.fingerprint
        return hashlib.blake2b(repr(list(self.prompts)).encode(), digest_size=8).hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream, and what the prompts are."""
        return {"drawn": self._drawn, "count": len(self.prompts), "prompts": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the position in `state`.

        Raises:
            ValueError: If the prompts are not those that the state was taken with.
        """
        if state["prompts"] != self.fingerprint:
            raise ValueError(
                f"The training prompts ({len(self.prompts)}) are not those that the checkpoint was "
                f"made with ({state['count']}); restore them, or start a new run."
            )
        self._drawn = state["drawn"]


class PromptDataModule(LightningDataModule):
    """Prompts for training and evaluation.

    Args:
        train: A shipped list or a prompts file, see `PromptFile`; for a method with several tasks,
            one for each of them by name.
        val: The same for validation, held-out prompts in all but special cases; null for the
            prompts of `train` that `held_out` sets apart.
        test: The same for `test` and `predict`; by default `val`.
        batch_size: Prompts per process and batch: in evaluation, and in the training of methods
            that consume prompts directly. Online methods deal prompts by `prompts_per_round`.
        val_size: Only the first so many validation prompts; all if None.
        seed: Decides the order of training prompts.
        pairs: A data module of image-text pairs, whose `train` a method's pretraining loss uses.
        prompt_key: Field of the prompt in files given by their paths, see `PromptFile`.
        category: Of files given by their paths take only prompts of this category, or of these.
        category_key: Field of the category.
        deduplicate: Take each prompt of a file only once.
        held_out: With `val: null` the share of the prompts that are held out from training, such
            as 0.1. A hash of the text decides, so that a prompt stays on its side whatever else
            the file holds, and files that share prompts can be split alike.

    Raises:
        ValueError: If `batch_size` is not positive, if not one of `val` and `held_out` is given,
            or an option is given that no source has a use for.
    """

    def __init__(
        self,
        train: str | dict[str, str],
        val: str | None = None,
        test: str | None = None,
        batch_size: int = 64,
        val_size: int | None = None,
        seed: int = 0,
        pairs: LightningDataModule | None = None,
        prompt_key: str | None = None,
        category: str | list[str] | None = None,
        category_key: str | None = None,
        deduplicate: bool = False,
        held_out: float = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        tasks = train if isinstance(train, dict) else {"": train}
        self.tasks = list(tasks)
        training = {f"train {name}".rstrip(): source for name, source in tasks.items()}
        self.held_out = held_out
        _check_held_out(train, val, held_out)
        val = val or next(iter(tasks.values()))
        self.sources = {**training, "val": val, "test": test or val}
        self.pairs: Any = pairs
        self.batch_size, self.val_size, self.seed = batch_size, val_size, seed
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be positive, got {batch_size}.")
        chosen = {"prompt_key": prompt_key, "category": category, "category_key": category_key}
        self._choice: dict[str, Any] = {
            name: value for name, value in chosen.items() if value is not None
        }
        self._deduplicate = deduplicate
        if self._choice and set(self.sources.values()) <= set(shipped_prompts()):
            raise ValueError(
                f"`{next(iter(self._choice))}` is for files given by their paths; shipped lists "
                "are taken whole. Leave it out."
            )

    def setup(self, stage: str) -> None:
        """Open the files that the stage needs, so that a broken one is told of at once."""
        evaluation = {"fit": "val", "validate": "val"}.get(stage, "test")
        training = [split for split in self.sources if split.startswith("train")]
        splits = [*training, evaluation] if stage == "fit" else [evaluation]
        self.files = {split: self._open(split) for split in splits}
        self._loader(evaluation)  # refuses prompts that cannot be dealt out, before any work
        if stage == "fit" and self.pairs is not None:
            self.pairs.setup(stage)

    def _open(self, split: str) -> PromptFile:
        source, part = self.sources[split], "all"
        if self.held_out and source == self.sources["train"]:
            part = "train" if split == "train" else "held_out"
        return PromptFile(
            source,
            **({} if source in shipped_prompts() else self._choice),
            deduplicate=self._deduplicate,
            held_out=self.held_out if part != "all" else 0.0,
            part=part,
        )

    def _loader(self, split: str, shuffle: bool = False) -> PromptLoader:
        prompts: Sequence[Prompt] = self.files[split]
        if split == "val" and self.val_size is not None:
            prompts = prompts[: self.val_size]
        return PromptLoader(prompts, self.batch_size, shuffle, self.seed, *self._share())

    def _share(self) -> tuple[int, int]:
        """Return this process and the number of processes."""
        trainer = self.trainer
        return (trainer.global_rank, trainer.world_size) if trainer else (0, 1)

    def train_dataloader(self) -> Any:
        """Return what the module makes of the prompts: batches of prompts, or its experience."""
        loaders = {t: self._loader(f"train {t}".rstrip(), shuffle=True) for t in self.tasks}
        loader: Any = loaders.get("", loaders)
        module = self.trainer.lightning_module if self.trainer else None
        if not isinstance(module, PromptConsumer):
            return loader
        if self.pairs is None:
            return module.experience(loader)
        pairs = PairStream(self.pairs.train, self.seed, *self._share())
        return module.experience(loader, pairs)

    def val_dataloader(self) -> PromptLoader:
        """Return the validation prompts in the file's order."""
        return self._loader("val")

    def test_dataloader(self) -> PromptLoader:
        """Return the test prompts in the file's order."""
        return self._loader("test")

    def predict_dataloader(self) -> PromptLoader:
        """Return the test prompts in the file's order."""
        return self._loader("test")


def _check_held_out(train: str | dict[str, str], val: str | None, held_out: float) -> None:
    if not 0 <= held_out < 1:
        raise ValueError(f"`held_out` must be a share in [0, 1), got {held_out}.")
    if val is not None and held_out:
        raise ValueError(
            f"`held_out: {held_out}` sets validation prompts apart from `train`, and `val` names "
            f"others, {val!r}; leave out one of the two."
        )
    if val is None and not held_out:
        raise ValueError(
            "`val` is missing; give a shipped list or a prompts file, or `held_out: 0.1` to hold "
            "out a tenth of `train`."
        )
    if val is None and isinstance(train, dict):
        raise ValueError(
            "`held_out` splits one file, and `train` names several; give `val` a file of its own."
        )

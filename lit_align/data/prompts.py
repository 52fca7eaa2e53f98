"""Prompts: files of any size, shipped lists, and a stateful loader."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from lightning.pytorch import LightningDataModule

from lit_align.data.image_text import PairStream
from lit_align.functional.noise import keyed_generator
from lit_align.trajectory import PromptBatch

Prompt = tuple[str, dict[str, Any] | None]

_SHIPPED = Path(str(resources.files("lit_align.data"))) / "prompts"


def shipped_prompts() -> list[str]:
    """Return the names of the prompt lists inside the package."""
    return sorted(path.stem for path in _SHIPPED.glob("*.jsonl"))


class PromptFile(Sequence[Prompt]):
    """Random access to a prompt file that need not fit in memory: only line offsets are kept.

    Args:
        source: A shipped name, or the path of a `.txt` file with one prompt per line or of a
            `.jsonl` file with one object per line, `{"prompt": ..., "metadata": {...}}`. Blank
            lines do not count.

    Attributes:
        fingerprint: Hash of the file's content.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no prompt, has another suffix, or a line is broken.
    """

    def __init__(self, source: str | Path) -> None:
        path = _SHIPPED / f"{source}.jsonl"
        self.path = path if path.is_file() else Path(source)
        if not self.path.is_file():
            raise FileNotFoundError(
                f"There is no prompts file {str(source)!r}; give the path of a .txt or .jsonl "
                f"file, or one of the shipped lists: {', '.join(shipped_prompts())}."
            )
        if self.path.suffix not in (".txt", ".jsonl"):
            raise ValueError(f"A prompts file must end in .txt or .jsonl, got {str(source)!r}.")
        self._offsets = self._index_lines()
        if not len(self._offsets):
            raise ValueError(f"The prompts file {str(self.path)!r} is empty.")

    def _index_lines(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        offsets, offset, digest = [], 0, hashlib.blake2b(digest_size=8)
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                digest.update(line)
                if line.strip():
                    self._parse(line, number)
                    offsets.append(offset)
                offset += len(line)
        self.fingerprint = digest.hexdigest()
        return np.asarray(offsets, dtype=np.int64)

    def _parse(self, line: bytes, number: int | None = None) -> Prompt:
        text = line.decode().strip()
        if self.path.suffix == ".txt":
            return text, None
        try:
            row = json.loads(text)
            prompt, metadata = row["prompt"], row.get("metadata")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.path}, line {number}: expected an object with a 'prompt', got "
                f"{text[:80]!r}."
            ) from error
        return str(prompt), metadata

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self._offsets)

    def __getitem__(self, index: Any) -> Any:
        """Return (text, metadata) of one prompt, or a list of them for a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        with self.path.open("rb") as file:
            file.seek(int(self._offsets[index]))
            return self._parse(file.readline())


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
        val: The same for validation, held-out prompts in all but special cases.
        test: The same for `test` and `predict`; by default `val`.
        batch_size: Prompts per process and batch: in evaluation, and in the training of methods
            that consume prompts directly. Online methods deal prompts by `prompts_per_round`.
        val_size: Only the first so many validation prompts; all if None.
        seed: Decides the order of training prompts.
        pairs: A data module of image-text pairs, whose `train` a method's pretraining loss uses.
    """

    def __init__(
        self,
        train: str | dict[str, str],
        val: str,
        test: str | None = None,
        batch_size: int = 64,
        val_size: int | None = None,
        seed: int = 0,
        pairs: LightningDataModule | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        tasks = train if isinstance(train, dict) else {"": train}
        self.tasks = list(tasks)
        training = {f"train {name}".rstrip(): source for name, source in tasks.items()}
        self.sources = {**training, "val": val, "test": test or val}
        self.pairs: Any = pairs
        self.batch_size, self.val_size, self.seed = batch_size, val_size, seed
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be positive, got {batch_size}.")

    def setup(self, stage: str) -> None:
        """Open the files that the stage needs, so that a broken one is told of at once."""
        evaluation = {"fit": "val", "validate": "val"}.get(stage, "test")
        training = [split for split in self.sources if split.startswith("train")]
        splits = [*training, evaluation] if stage == "fit" else [evaluation]
        self.files = {split: PromptFile(self.sources[split]) for split in splits}
        self._loader(evaluation)  # refuses prompts that cannot be dealt out, before any work
        if stage == "fit" and self.pairs is not None:
            self.pairs.setup(stage)

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

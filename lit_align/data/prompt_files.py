"""Prompts of files in any common layout, by their numbers, and the lists inside the package."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from lit_align.data.prompt_rows import OPENERS, Rows
from lit_align.functional.choices import check_choice

Prompt = tuple[str, dict[str, Any] | None]

PARTS = ("all", "train", "held_out")
_SHIPPED = Path(str(resources.files("lit_align.data"))) / "prompts"
_PROMPT_KEYS = ("prompt", "prompts", "caption", "captions", "text")
_CATEGORY_KEYS = ("category", "tag")
_SUFFIXES = ", ".join(list(OPENERS)[:-1]) + f" or {list(OPENERS)[-1]}"


def shipped_prompts() -> list[str]:
    """Return the names of the prompt lists inside the package."""
    return sorted(path.stem for path in _SHIPPED.glob("*.jsonl"))


def names_prompts(source: str) -> bool:
    """Return whether this is the name of a shipped list or of a prompts file, not a prompt."""
    return source in shipped_prompts() or Path(source).suffix in OPENERS


def is_held_out(prompt: str, share: float) -> bool:
    """Return whether a prompt is in the held-out part.

    A hash of its text decides: the answer depends neither on other prompts nor on their order, and
    what is held out by a small share is so by any larger one.

    Args:
        prompt: Its text.
        share: Expected size of the held-out part, in [0, 1].
    """
    digest = hashlib.blake2b(prompt.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


class PromptFile(Sequence[Prompt]):
    """Random access to the prompts of a file: only the places of its rows are kept in memory.

    The exception is parquet, of which the columns of texts are kept and no others but `metadata`
    are read. The prompt of a row comes with its `metadata`, if it has such a field, else with the
    whole row, if it has other fields than the prompt.

    Args:
        source: A shipped name, or the path of a file. `.txt` has one prompt per line; `.jsonl` one
            object per line, `{"prompt": ..., "metadata": {...}}`; `.json` a list of texts or of
            objects; `.csv` and `.tsv` a header; `.parquet` (extra `parquet`) columns. Blank lines
            do not count.
        prompt_key: Field of the prompt. By default `prompt`, else the one of prompt(s), caption(s)
            and text that there is, in capitals or not.
        category: Take only rows with this value in `category_key`, or with one of these.
        category_key: Field of the category, of the row or of its metadata. By default the one of
            category and tag that there is, in capitals or not.
        deduplicate: Take each text only once, where it comes first.
        held_out: Share of the prompts that are held out, in [0, 1), see `is_held_out`.
        part: "all", or the prompts that are held out, or those that are not.

    Attributes:
        fingerprint: Hash of the file's content, and of the options that are not the defaults.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If it is one of parquet and pyarrow is not installed.
        ValueError: If it holds no prompt, has another suffix, or a row is broken.
    """

    def __init__(
        self,
        source: str | Path,
        prompt_key: str | None = None,
        category: str | list[str] | None = None,
        category_key: str | None = None,
        deduplicate: bool = False,
        held_out: float = 0.0,
        part: str = "all",
    ) -> None:
        path = _SHIPPED / f"{source}.jsonl"
        self.path = path if path.is_file() else Path(source)
        check_choice("part", part, PARTS)
        if not 0 <= held_out < 1:
            raise ValueError(f"`held_out` must be a share in [0, 1), got {held_out}.")
        self._check_source(source)
        self.prompt_key, self.category_key = prompt_key, category_key
        self.categories = [category] if isinstance(category, str) else category
        self.held_out, self.part = held_out, part
        self._rows: Rows = OPENERS[self.path.suffix](self.path)
        options = (prompt_key, self.categories, category_key, deduplicate, held_out, part)
        self._addresses = self._index(deduplicate, options)

    def _check_source(self, source: str | Path) -> None:
        if not self.path.is_file():
            raise FileNotFoundError(
                f"There is no prompts file {str(source)!r}; give the path of a {_SUFFIXES} "
                f"file, or one of the shipped lists: {', '.join(shipped_prompts())}."
            )
        if self.path.suffix not in OPENERS:
            raise ValueError(f"A prompts file must end in {_SUFFIXES}, got {str(source)!r}.")

    def _index(
        self, deduplicate: bool, options: tuple[Any, ...]
    ) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return the addresses of the rows that are taken, after a check of all rows."""
        digest = hashlib.blake2b(digest_size=8)
        addresses, known = [], set()
        others: Counter[str] = Counter()
        for address, text, row in self._scan(digest):
            if self.categories is not None:
                found = self._category(row)
                if found not in self.categories:
                    others[found] += 1
                    continue
            if self.part != "all" and is_held_out(text, self.held_out) == (self.part == "train"):
                continue
            if deduplicate:
                key = hashlib.blake2b(text.encode(), digest_size=16).digest()
                if key in known:
                    continue
                known.add(key)
            addresses.append(address)
        if options != (None, None, None, False, 0.0, "all"):
            digest.update(repr(options).encode())
        self.fingerprint = digest.hexdigest()
        if not addresses:
            raise ValueError(self._why_none(others))
        return np.asarray(addresses, dtype=np.int64)

    def _scan(self, digest: Any) -> Iterator[tuple[int, str, Any]]:
        """Yield address, text and row of each prompt; `digest` gets the whole content."""
        given = self.prompt_key
        for number, address, row in self._rows.scan(digest.update):
            try:
                if isinstance(row, ValueError):
                    raise row
                if isinstance(row, str) and given is not None:
                    raise ValueError(f"a text has no field {given!r}; leave `prompt_key` out.")
                if isinstance(row, str) and self.categories is not None:
                    raise ValueError("a text has no category to choose by; leave `category` out.")
                if self.prompt_key is None and isinstance(row, dict):
                    self.prompt_key = _key_among(_PROMPT_KEYS, row, "prompt_key", "prompt")
                yield address, self._text(row), row
            except ValueError as error:
                place = f"{self.path}, {self._rows.place} {number}"
                raise ValueError(f"{place}: {error}") from error

    def _text(self, row: Any) -> str:
        """Return the prompt of a row.

        Raises:
            ValueError: If it has none.
        """
        if isinstance(row, str):
            return row
        text = row.get(self.prompt_key)
        if not isinstance(text, (str, int, float)):
            raise ValueError(
                f"expected an object with a {self.prompt_key!r}, got {_short(row)}; mend it, or "
                "set `prompt_key` to the field that all have."
            )
        if not str(text).strip() and self.path.suffix != ".jsonl":
            raise ValueError(
                f"the prompt is empty; fill in {self.prompt_key!r} or delete the "
                f"{self._rows.place}."
            )
        return str(text)

    def _category(self, row: Any) -> str:
        """Return the category of a row.

        Raises:
            ValueError: If it has none.
        """
        fields = dict(row) if isinstance(row, dict) else {}
        if isinstance(fields.get("metadata"), dict):
            fields = {**fields["metadata"], **fields}
        if self.category_key is None:
            self.category_key = _key_among(_CATEGORY_KEYS, fields, "category_key", "category")
        if self.category_key not in fields:
            raise ValueError(
                f"there is no {self.category_key!r} to choose a `category` by, but "
                f"{', '.join(map(repr, fields)) or 'the text only'}; leave `category` out or "
                "set `category_key`."
            )
        return str(fields[self.category_key])

    def _why_none(self, others: Counter[str]) -> str:
        path = str(self.path)
        if others:
            listed = ", ".join(map(repr, sorted(others)[:20]))
            return (
                f"The prompts file {path!r} has no {self.category_key} in {self.categories}; "
                f"it has {listed}."
            )
        if self.part != "all":
            part = "held-out" if self.part == "held_out" else "training"
            return (
                f"The {part} part of the prompts file {path!r} is empty with `held_out` "
                f"{self.held_out}; change that share, or give more prompts."
            )
        return f"The prompts file {path!r} is empty."

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self._addresses)

    def __getitem__(self, index: Any) -> Any:
        """Return (text, metadata) of one prompt, or a list of them for a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = self._rows.read(int(self._addresses[index]))
        text = self._text(row)
        if isinstance(row, str) or row.keys() == {self.prompt_key}:
            return text, None
        return text, row.get("metadata") if "metadata" in row else row


def _key_among(known: Sequence[str], row: dict[str, Any], option: str, first: str) -> str:
    """Return the field of a well-known name.

    Raises:
        ValueError: If there is none, or several and `first` is not among them.
    """
    found = [name for name in row if name.strip().lower() in known]
    if first in found:
        return first
    if len(found) == 1:
        return found[0]
    listed = ", ".join(map(repr, row)) or "none"
    if found:
        raise ValueError(
            f"any of {', '.join(map(repr, found))} may be the {first}; set `{option}` to one "
            f"of its fields {listed}."
        )
    raise ValueError(
        f"expected an object with a {first!r}, got the fields {listed}; set `{option}` to one of "
        "them."
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

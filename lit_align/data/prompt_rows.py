"""Rows of prompts files: each layout's rows are scanned once, and read by their addresses."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from lit_align.data.preference_rows import CsvRows, JsonArray, JsonLines, Scanned, parquet_module


class Rows(Protocol):
    """A file's rows: texts, or dictionaries of fields.

    Attributes:
        place: What a row's number counts: line, entry or row.
    """

    place: str

    def scan(self, hashed: Callable[[bytes], None]) -> Iterator[Scanned]:
        """Yield every row once, ValueErrors for broken ones, and give the content to `hashed`."""
        ...

    def read(self, address: int) -> Any:
        """Return the row at an address that `scan` gave."""
        ...


class Lines(JsonLines):
    """Texts, one per line; blank lines do not count."""

    def parse(self, line: bytes) -> Any:
        """Return the row of a line."""
        return _decoded(line).strip()


def _decoded(line: bytes, encoding: str = "utf-8") -> str:
    try:
        return line.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{error}; write the file in UTF-8.") from error


class ObjectLines(Lines):
    """JSON objects, one per line."""

    def parse(self, line: bytes) -> Any:
        """Return the object of a line."""
        text = super().parse(line)
        try:
            row = json.loads(text)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"expected an object with a 'prompt', got {text[:80]!r}.")
        return row


class TabbedLines(Lines):
    """Fields between tabs, one row per line, under a header.

    Quotes are letters like others, as in PartiPrompts. Only in a field that stands in quotes and
    has double ones inside, as spreadsheets write it, they are taken off.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with path.open("rb") as file:
            self.header = self._fields(file.readline())

    def scan(self, hashed: Callable[[bytes], None]) -> Iterator[Scanned]:
        """See `Rows`."""
        rows = super().scan(hashed)
        next(rows, None)
        yield from rows

    def parse(self, line: bytes) -> Any:
        """Return the fields of a line by their names."""
        fields = self._fields(line)
        if len(fields) != len(self.header):
            raise ValueError(
                f"expected {len(self.header)} fields between tabs, got {len(fields)}; take line "
                "breaks and tabs out of the texts."
            )
        return dict(zip(self.header, fields, strict=True))

    @staticmethod
    def _fields(line: bytes) -> list[str]:
        fields = _decoded(line, "utf-8-sig").rstrip("\r\n").split("\t")
        for place, field in enumerate(fields):
            inside = field[1:-1]
            quoted = field.startswith('"') and field.endswith('"') and '""' in inside
            if quoted and '"' not in inside.replace('""', ""):
                fields[place] = inside.replace('""', '"')
            fields[place] = fields[place].strip()
        return fields


class CaptionColumn:
    """Prompts of a parquet file, which are kept in memory; pictures beside them are not read.

    Args:
        path: The file.

    Raises:
        ImportError: If pyarrow is not installed.
        ValueError: If it is no parquet file.
    """

    place = "row"

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with parquet_module().ParquetFile(path) as file:
                names = [field.name for field in file.schema_arrow if _is_plain(str(field.type))]
                self._table = file.read(columns=[*names, *_metadata(file)], use_threads=False)
        except (ValueError, OSError) as error:
            raise ValueError(
                f"{str(path)!r} is not a whole parquet file ({error}); write or download it again."
            ) from error

    def scan(self, hashed: Callable[[bytes], None]) -> Iterator[Scanned]:
        """See `Rows`; the columns that are read are the content."""
        number = 0
        for batch in self._table.to_batches(max_chunksize=1024):
            for row in batch.to_pylist():
                hashed(repr(row).encode())
                yield number + 1, number, row
                number += 1

    def read(self, address: int) -> Any:
        """See `Rows`."""
        return self._table.slice(address, 1).to_pylist()[0]


def _is_plain(kind: str) -> bool:
    return kind in ("string", "large_string", "string_view")


def _metadata(file: Any) -> list[str]:
    names = {field.name: str(field.type) for field in file.schema_arrow}
    return ["metadata"] if not _is_plain(names.get("metadata", "string")) else []


def _texts_or_objects(path: Path) -> JsonArray:
    return JsonArray(path, kinds=(str, dict))


def _table(path: Path) -> CsvRows:
    with path.open(encoding="utf-8-sig", newline="", errors="replace") as file:
        if not next(csv.reader(file), []):
            raise ValueError(
                f"The prompts file {str(path)!r} is empty; its first line is a header."
            )
    return CsvRows(path, ())


OPENERS: dict[str, Callable[[Path], Rows]] = {
    ".txt": Lines,
    ".jsonl": ObjectLines,
    ".json": _texts_or_objects,
    ".csv": _table,
    ".tsv": TabbedLines,
    ".parquet": CaptionColumn,
}

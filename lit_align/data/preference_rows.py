"""Rows of JSONL, JSON, CSV and parquet files, read one at a time: only their places are kept."""

from __future__ import annotations

import bisect
import csv
import glob
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from lit_align.data.preference_records import parse_record

Row = dict[str, Any]
Scanned = tuple[int, int, Any]  # number for people, address for `read`, row or ValueError


class Rows(Protocol):
    """A file's rows.

    Attributes:
        place: What a row's number counts: line, entry or row.
    """

    place: str

    def scan(self, hashed: Callable[[bytes], None]) -> Iterator[Scanned]:
        """Yield every row once, and give the content to `hashed`.

        Raises:
            ValueError: If the file is so broken that its rows cannot be told apart.
        """
        ...

    def read(self, address: int) -> Row:
        """Return the row at an address that `scan` gave."""
        ...


class JsonLines:
    """Records of our schema, one per line; blank lines do not count."""

    place = "line"

    def __init__(self, path: Path) -> None:
        self.path = path

    def scan(self, hashed: Callable[[bytes], None]) -> Iterator[Scanned]:
        """See `Rows`."""
        address = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                hashed(line)
                if line.strip():
                    yield number, address, _or_flaw(self.parse, line)
                address += len(line)

    def read(self, address: int) -> Any:
        """See `Rows`."""
        with self.path.open("rb") as file:
            file.seek(address)
            return self.parse(file.readline())

    def parse(self, line: bytes) -> Any:
        """Return the row of a line."""
        return parse_record(line)


def _or_flaw(parse: Callable[[Any], Row], raw: Any) -> Row | ValueError:
    try:
        return parse(raw)
    except ValueError as error:
        return error


class JsonArray:
    """The objects of one JSON array. The text is in memory while it is scanned, not after.

    Args:
        path: The file.
        kinds: Python's types of the values that are taken.
    """

    place = "entry"

    def __init__(self, path: Path, kinds: tuple[type, ...] = (dict,)) -> None:
        self.path, self.kinds = path, kinds
        self.sizes: dict[int, int] = {}  # by address, in bytes

    def scan(self, hashed: Callable[[bytes], None]) -> Iterator[Scanned]:
        """See `Rows`."""
        content = self.path.read_bytes()
        hashed(content)
        decoder = json.JSONDecoder()
        try:
            text = content.decode()
            place = self._after(text, 0, "[")
            address, number = len(text[:place].encode()), 1
            while text[place] != "]":
                row, end = decoder.raw_decode(text, place)
                self.sizes[address] = len(text[place:end].encode())
                yield (
                    number,
                    address,
                    row
                    if isinstance(row, self.kinds)
                    else ValueError(f"expected an object, got {str(row)[:80]!r}"),
                )
                following = self._after(text, end, ",]")
                address += len(text[place:following].encode())
                place, number = following, number + 1
        except (ValueError, IndexError) as error:
            raise ValueError(
                f"{str(self.path)!r} is not a whole JSON array ({error}); write or download it "
                "again."
            ) from error

    @staticmethod
    def _after(text: str, place: int, expected: str) -> int:
        """Return the place of the next value, or of the array's end."""
        blank = " \t\r\n\ufeff"
        while text[place] in blank:
            place += 1
        if text[place] not in expected:
            raise ValueError(f"expected one of {expected!r} at character {place}")
        if text[place] == "]":
            return place
        place += 1
        while text[place] in blank:
            place += 1
        return place

    def read(self, address: int) -> Row:
        """See `Rows`."""
        with self.path.open("rb") as file:
            file.seek(address)
            row: Row = json.loads(file.read(self.sizes[address]))
            return row


class CsvRows:
    """The rows of a CSV file with a header, as texts by column.

    Raises:
        ValueError: If a column is missing.
    """

    place = "line"

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path = path
        with path.open(encoding="utf-8-sig", newline="", errors="replace") as file:
            self.header = next(csv.reader(file), [])
        _check_columns(path, self.header, columns)

    def scan(self, hashed: Callable[[bytes], None]) -> Iterator[Scanned]:
        """See `Rows`."""
        seen = [0, 0]  # lines and bytes that the reader has taken

        def lines() -> Iterator[str]:
            with self.path.open("rb") as file:
                for line in file:
                    hashed(line)
                    seen[0] += 1
                    seen[1] += len(line)
                    yield line.decode()

        reader = csv.reader(lines(), strict=True)
        try:
            next(reader)
            number, address = seen[0] + 1, seen[1]
            for values in reader:
                if values:
                    yield number, address, _or_flaw(self._row, values)
                number, address = seen[0] + 1, seen[1]
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(
                f"{str(self.path)!r} cannot be read from line {seen[0]} on ({error}); write it as "
                "CSV in UTF-8."
            ) from error

    def _row(self, values: list[str]) -> Row:
        if len(values) != len(self.header):
            raise ValueError(f"expected {len(self.header)} fields, got {len(values)}")
        return dict(zip(self.header, values, strict=True))

    def read(self, address: int) -> Row:
        """See `Rows`."""
        with self.path.open("rb") as file:
            file.seek(address)
            return self._row(next(csv.reader(line.decode() for line in file)))


def _check_columns(path: Path, given: Sequence[str], wanted: Sequence[str]) -> None:
    if missing := [column for column in wanted if column not in given]:
        raise ValueError(
            f"{str(path)!r} has no column {missing[0]!r}; it has {', '.join(given) or 'none'}. Is "
            "it of another `format`?"
        )


def parquet_module() -> Any:
    """Return `pyarrow.parquet`.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ImportError(
            "Parquet files need pyarrow; install it with `pip install 'lit-align[parquet]'`."
        ) from error
    return parquet


class ParquetRows:
    """The rows of parquet files, one row group in memory at a time.

    A row asked for out of turn reads its whole row group: files with shuffled pictures should have
    groups of some hundred rows.

    Args:
        paths: The files, in their order.
        columns: Those that must be there.
        blobs: The leaves that hold pictures, which are not read while scanning; a picture that is
            there is the empty bytes then.

    Raises:
        ImportError: If pyarrow is not installed.
        ValueError: If a file is none of parquet, or lacks a column.
    """

    place = "row"

    def __init__(self, paths: Sequence[Path], columns: Sequence[str], blobs: Sequence[str]) -> None:
        self.groups: list[tuple[Path, int]] = []
        self.starts: list[int] = []  # the number of each group's first row
        self.blobs = list(blobs)
        self._held: tuple[int, Any] = (-1, None)
        total = 0
        for path in paths:
            try:
                file = parquet_module().ParquetFile(path)
            except (ValueError, OSError) as error:
                raise ValueError(
                    f"{str(path)!r} is not a whole parquet file ({error}); write or download it "
                    "again."
                ) from error
            _check_columns(path, file.schema_arrow.names, columns)
            for group in range(file.num_row_groups):
                self.groups.append((path, group))
                self.starts.append(total)
                total += file.metadata.row_group(group).num_rows

    def scan(self, hashed: Callable[[bytes], None]) -> Iterator[Scanned]:
        """See `Rows`; of pictures their compressed sizes are hashed."""
        for (path, group), start in zip(self.groups, self.starts, strict=True):
            with parquet_module().ParquetFile(path) as file:
                leaves, sizes, complete = self._leaves(file, group)
                table = file.read_row_group(group, columns=leaves, use_threads=False)
            hashed(repr(sizes).encode())
            for number, row in enumerate(_rows_of(table), start):
                hashed(repr(row).encode())
                yield number + 1, number, self._marked(row) if complete else row

    def _leaves(self, file: Any, group: int) -> tuple[list[str], list[int], bool]:
        """Return the leaves to scan, the sizes of the pictures', and whether none is missing."""
        metadata = file.metadata.row_group(group)
        chunks = [metadata.column(i) for i in range(metadata.num_columns)]
        pictures = [chunk for chunk in chunks if chunk.path_in_schema in self.blobs]
        known = all(c.statistics and c.statistics.null_count == 0 for c in pictures)
        complete = bool(pictures) and known
        skipped = self.blobs if complete else []
        leaves = [c.path_in_schema for c in chunks if c.path_in_schema not in skipped]
        return leaves, [chunk.total_compressed_size for chunk in pictures], complete

    def _marked(self, row: Row) -> Row:
        """Return the row with empty bytes where a picture was not read."""
        for name in self.blobs:
            outer, _, _ = name.partition(".")
            if outer == name:
                row[name] = b""
            else:
                for item in row.get(outer) or []:
                    item.setdefault(name.rpartition(".")[2], b"")
        return row

    def read(self, address: int) -> Row:
        """See `Rows`."""
        index = bisect.bisect_right(self.starts, address) - 1
        if self._held[0] != index:
            path, group = self.groups[index]
            with parquet_module().ParquetFile(path) as file:
                self._held = (index, file.read_row_group(group, use_threads=False))
        (row,) = _rows_of(self._held[1].slice(address - self.starts[index], 1))
        return row

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the row group in memory, which worker processes read for themselves."""
        return {**self.__dict__, "_held": (-1, None)}


def _rows_of(table: Any) -> Iterator[Row]:
    """Yield the rows as dictionaries, absent values left out."""
    for batch in table.to_batches(max_chunksize=256):
        for row in batch.to_pylist():
            yield _without_none(row)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value


def matching_files(source: str | Path, suffixes: Sequence[str]) -> list[Path]:
    """Return the file, the files that a pattern matches, or those in a folder, by their names.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If one has another suffix.
    """
    path = Path(source)
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix in suffixes)
    elif path.is_file():
        found = [path]
    else:
        found = [Path(name) for name in sorted(glob.glob(str(source)))]
    if not found:
        raise FileNotFoundError(
            f"There is no file of preferences {str(source)!r}; give a file that ends in "
            f"{' or '.join(suffixes)}, or a pattern of such."
        )
    for path in found:
        if path.suffix not in suffixes:
            raise ValueError(
                f"A file of this `format` must end in {' or '.join(suffixes)}, got {str(path)!r}."
            )
    return found

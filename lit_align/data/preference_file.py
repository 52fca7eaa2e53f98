"""Judgements of a file of preferences: pairs, rankings or single images, by their numbers."""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from lit_align.data.preference_formats import FORMATS
from lit_align.data.preference_media import media_size
from lit_align.data.preference_records import AXES
from lit_align.data.preference_rows import Row
from lit_align.functional.choices import check_choice

UNITS = ("pairs", "rankings", "ratings")
_TOLD = 5
_TIE = 1e-6  # probabilities so near to a half are ties

Numbers = np.ndarray[Any, np.dtype[np.int64]]


class Judgement(NamedTuple):
    """K pictures of a prompt, and what was said of them.

    Attributes:
        prompt: What they answer.
        media: Of each its file, folder of frames, or content.
        labels: Of each, as in `PreferenceBatch`.
        weight: Not negative.
        video: Whether they are videos.
        place: Where the record lies, for messages.
        keys: Of each a number that tells it from others.
    """

    prompt: str
    media: list[Path | bytes]
    labels: list[float]
    weight: float
    video: bool
    place: str
    keys: list[int]


class PreferenceFile(Sequence[Judgement]):
    """Random access to a file of preferences that need not fit in memory: numbers are kept of it.

    Args:
        source: The file; of parquet also a folder or a glob pattern.
        format: Its layout, see `preference_formats`.
        unit: `pairs`, the preferred image first: a ranking gives all its pairs. `rankings`, the
            best image first: of a pair two places. `ratings`: a pair gives its winner, liked, and
            its loser, and a tie neither.
        axis: Only records of this axis; of all if None.
        ties: `keep` or `drop` judgements that prefer nothing.
        aggregate: What becomes of several records of one `pair_id` and axis: one judgement with
            the `mean` of their labels, or with what the `majority` said; `none` keeps them apart.
            The weight is their mean.
        broken: What to do about rows that are broken, or whose files are missing: `raise` an error
            that tells of the first five, or `skip` them with a warning that does.
        media_folder: The folder that paths are relative to; by default the file's.

    Attributes:
        fingerprint: Hash of the file's content, of the sizes of the media, and of the options.
        counts: Records that gave judgements, and reasons why others did not, by name.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If it needs a library that is not installed.
        ValueError: If it holds no judgement, or rows are broken.
    """

    def __init__(
        self,
        source: str | Path,
        format: str = "lit_align",
        unit: str = "pairs",
        axis: str | None = None,
        ties: str = "keep",
        aggregate: str = "mean",
        broken: str = "raise",
        media_folder: str | Path | None = None,
    ) -> None:
        check_choice("format", format, list(FORMATS))
        check_choice("unit", unit, UNITS)
        if axis is not None:
            check_choice("axis", axis, AXES)
        check_choice("ties", ties, ("keep", "drop"))
        check_choice("aggregate", aggregate, ("mean", "majority", "none"))
        check_choice("broken", broken, ("raise", "skip"))
        self.source, self.unit, self.axis, self.aggregate = str(source), unit, axis, aggregate
        self._convert = FORMATS[format].convert
        self._rows, folder = FORMATS[format].open(source)
        self._folder = folder if media_folder is None else Path(media_folder)
        self.counts: Counter[str] = Counter()
        self._hash: Any = hashlib.blake2b(repr((format, unit, axis, ties, aggregate)).encode(),
                                     digest_size=8)  # fmt: skip
        self._records = _Records()
        self._judged = _Judged()
        flaws = list(self._scan())
        self._tell(flaws, broken)
        self.fingerprint: str = self._hash.hexdigest()
        del self._hash  # which cannot be copied to another process
        self._entries = self._judged.finish(unit, ties, aggregate == "majority")
        self.counts["ties"] = self._judged.ties
        if not len(self):
            raise ValueError(f"{self.source!r} holds no judgement{self._why_none()}.")

    def _scan(self) -> Iterator[str]:
        """Take the numbers of all rows, and yield what is wrong with the broken ones."""
        for number, address, row in self._rows.scan(self._hash.update):
            try:
                if isinstance(row, ValueError):
                    raise row
                records = self._convert(row, number)
                self.counts["unlabelled"] += not records
                for part, record in enumerate(records):
                    self._take(record, number, address, part)
            except ValueError as error:
                self.counts["broken"] += 1
                if self.counts["broken"] <= _TOLD:
                    yield f"{self._rows.place} {number}: {error}"

    def _take(self, record: Row, number: int, address: int, part: int) -> None:
        axis = record.get("axis", "overall")
        if record["kind"] == "invalid" or self.axis not in (None, axis):
            self.counts["invalid" if record["kind"] == "invalid" else f"axis {axis}"] += 1
            return
        judged = _judged(record, self.unit)
        keys = [
            self._key(item, record, (address, part, i)) for i, item in enumerate(record["items"])
        ]
        group = None
        if self.aggregate != "none" and record.get("pair_id") is not None:
            group = hash_of((record["pair_id"], axis))
        uids = [item["uid"] for item in record["items"]]
        pair = [hash_of((record["prompt"], *order)) for order in (uids, uids[::-1])]
        weight = float(record.get("weight", 1.0))
        if group is not None and self._judged.merge(group, pair, judged[0][2], weight):
            self.counts["records"] += 1
            return
        place = self._records.add(number, address, part, hash_of(record["prompt"]), keys)
        self._judged.add(place, judged, weight, group, pair[0])
        self.counts["records"] += 1

    def _key(self, item: Row, record: Row, place: tuple[int, int, int]) -> int:
        """Return a number of the item's picture, having seen that its file is there."""
        if "path" not in item:
            return hash_of(place)
        video = record.get("media_type") == "video"
        size = media_size(self._folder / item["path"], video)
        self._hash.update(size.to_bytes(8))
        return hash_of(item["path"])

    def _tell(self, flaws: list[str], broken: str) -> None:
        if not flaws:
            return
        count = self.counts["broken"]
        more = f"\n  and {count - len(flaws)} more" if count > len(flaws) else ""
        text = f"{self.source!r} has {count} broken row(s):\n  " + "\n  ".join(flaws) + more
        if broken == "raise":
            raise ValueError(f"{text}\nMend them or take them out, or set `broken: skip`.")
        rank_zero_warn(f"{text}\nThey are skipped.")

    def _why_none(self) -> str:
        reasons = ", ".join(f"{n} {name}" for name, n in self.counts.items() if n)
        return f" of the `unit`, `axis` and `ties` asked for (it has: {reasons})" if reasons else ""

    def __len__(self) -> int:
        """Return the number of judgements."""
        return len(self._entries["record"])

    def __getitem__(self, index: Any) -> Any:
        """Return one judgement, its pictures not opened yet; or a list of them for a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        entry = {name: values[index] for name, values in self._entries.items()}
        number, address, part, keys = self._records.get(int(entry["record"]))
        record = self._convert(self._rows.read(address), number)[part]
        first, second, p = int(entry["first"]), int(entry["second"]), float(entry["label"])
        if self.unit == "ratings":
            chosen, labels = [first], [p]
        elif second < 0:
            ranks = record["rank"]
            chosen = sorted(range(len(ranks)), key=ranks.__getitem__)
            labels = [ranks[i] for i in chosen]
        else:
            chosen = [first, second]
            labels = [p, 1 - p] if self.unit == "pairs" else [1, 1 + (p > 0.5)]
        return Judgement(
            record["prompt"],
            [self._source(record["items"][i]) for i in chosen],
            [float(label) for label in labels],
            float(entry["weight"]),
            record.get("media_type") == "video",
            f"{self.source}, {self._rows.place} {number}",
            [keys[i] for i in chosen],
        )

    def _source(self, item: Row) -> Path | bytes:
        if "path" in item:
            return self._folder / str(item["path"])
        content: bytes = item["bytes"]
        return content

    def picture_keys(self) -> Numbers:
        """Return the `keys` of all pictures, each once, in ascending order."""
        return np.unique(np.frombuffer(self._records.keys, dtype=np.int64))

    def split(self, fraction: float) -> tuple[Numbers, Numbers]:
        """Return the numbers of judgements to train on and of those held out.

        A hash of the prompt decides, so that no prompt is on both sides.

        Args:
            fraction: Share of prompts to hold out, in [0, 1).
        """
        prompts = np.frombuffer(self._records.prompts, dtype=np.int64)[self._entries["record"]]
        held_out = prompts < round(fraction * 2**63)
        return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _judged(record: Row, unit: str) -> list[tuple[int, int, float]]:
    """Return (first item, second item, probability of the first) of what a record says.

    The second is -1 of a ranking as a whole, whose probability is 0.5 if all are equal and else 1,
    and of a single image, liked with the probability.
    """
    kind = record["kind"]
    if kind == "pair":
        return [(0, 1, float(record["label"][0]))]
    if kind == "rating" and unit == "ratings":
        return [(0, -1, float(record["label"][0]))]
    if kind == "ranking" and unit == "rankings":
        return [(0, -1, 1.0 if max(record["rank"]) > 1 else 0.5)]
    if kind == "ranking" and unit == "pairs":
        ranks = record["rank"]
        couples = itertools.combinations(range(len(ranks)), 2)
        return [(i, j, 0.5 + 0.5 * ((ranks[i] < ranks[j]) - (ranks[i] > ranks[j])))
                for i, j in couples]  # fmt: skip
    fitting = "ratings" if kind == "rating" else "rankings` or `unit: pairs"
    raise ValueError(f"a {kind} cannot become {unit}; set `unit: {fitting}`")


def hash_of(value: Any) -> int:
    """Return a number in [0, 2^63) that depends on the value's text."""
    digest = hashlib.blake2b(repr(value).encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


class _Records:
    """Numbers of the records that were taken."""

    def __init__(self) -> None:
        self.numbers, self.addresses, self.parts = array("q"), array("q"), array("b")
        self.prompts, self.keys, self.starts = array("q"), array("q"), array("q", [0])

    def add(self, number: int, address: int, part: int, prompt: int, keys: list[int]) -> int:
        """Take a record, and return its place."""
        for numbers, value in ((self.numbers, number), (self.addresses, address),
                               (self.parts, part), (self.prompts, prompt)):  # fmt: skip
            numbers.append(value)
        self.keys.extend(keys)
        self.starts.append(len(self.keys))
        return len(self.numbers) - 1

    def get(self, place: int) -> tuple[int, int, int, list[int]]:
        """Return the number, address, part and picture keys of a record."""
        keys = self.keys[self.starts[place] : self.starts[place + 1]]
        return self.numbers[place], self.addresses[place], self.parts[place], list(keys)


class _Judged:
    """Numbers of what was judged, while a file is scanned.

    Attributes:
        ties: How many of them `finish` left out because they prefer nothing.
    """

    def __init__(self) -> None:
        self.record, self.first, self.second = array("q"), array("i"), array("i")
        self.label, self.weight, self.count = array("d"), array("d"), array("q")  # sums, and terms
        self.votes = array("d")
        self.groups: dict[int, tuple[int, int]] = {}  # hash of pair_id -> its place, hash of pair
        self.ties = 0

    def add(
        self, record: int, judged: list[tuple[int, int, float]], weight: float,
        group: int | None, pair: int,
    ) -> None:  # fmt: skip
        """Take what a record says."""
        if group is not None:
            self.groups[group] = (len(self.record), pair)
        for first, second, p in judged:
            for numbers, value in ((self.record, record), (self.first, first),
                                   (self.second, second), (self.count, 1)):  # fmt: skip
                numbers.append(value)
            self.label.append(p)
            self.votes.append(_vote(p))
            self.weight.append(weight)

    def merge(self, group: int, pair: list[int], p: float, weight: float) -> bool:
        """Add a further judgement of a pair to the first; return whether there was one.

        Args:
            group: Hash of the `pair_id`.
            pair: Hashes of prompt and items, in the record's order and in the other.
            p: Probability that the record's first item is preferred.
            weight: Of the record.
        """
        if group not in self.groups:
            return False
        place, first_pair = self.groups[group]
        if first_pair not in pair:
            raise ValueError(
                "its 'pair_id' names another prompt or other items in an earlier record"
            )
        p = p if first_pair == pair[0] else 1 - p
        self.label[place] += p
        self.votes[place] += _vote(p)
        self.weight[place] += weight
        self.count[place] += 1
        return True

    def finish(self, unit: str, ties: str, majority: bool) -> dict[str, Any]:
        """Return the judgements as arrays, winners first."""
        columns = {"record": np.int64, "first": np.int32, "second": np.int32}
        entries: dict[str, Any] = {k: np.array(getattr(self, k), v) for k, v in columns.items()}
        count = np.array(self.count)
        votes = np.array(self.votes)
        means, voted = np.array(self.label) / count, (1 + np.sign(votes)) / 2
        entries["label"] = np.where(majority & (count > 1), voted, means)
        entries["weight"] = (np.array(self.weight) / count).astype(np.float32)
        pairs, lost = entries["second"] >= 0, entries["label"] < 0.5
        flip = pairs & lost
        first, second = entries["first"].copy(), entries["second"].copy()
        entries["first"][flip], entries["second"][flip] = second[flip], first[flip]
        entries["label"][flip] = 1 - entries["label"][flip]
        tied = np.abs(entries["label"] - 0.5) < _TIE
        entries["label"][tied] = 0.5
        if ties == "drop" or unit == "ratings":
            self.ties = int(tied.sum())
            entries = {name: values[~tied] for name, values in entries.items()}
        return _single(entries) if unit == "ratings" else entries


def _vote(p: float) -> float:
    return 0.0 if abs(p - 0.5) < _TIE else (1.0 if p > 0.5 else -1.0)


def _single(entries: dict[str, Any]) -> dict[str, Any]:
    """Return each pair as its winner, liked, and its loser, disliked; the rest as they are."""
    pairs = entries["second"] >= 0
    repeated = {name: np.repeat(values, 1 + pairs) for name, values in entries.items()}
    starts = np.cumsum(1 + pairs) - (1 + pairs)
    winners, losers = starts[pairs], starts[pairs] + 1
    repeated["first"][losers] = entries["second"][pairs]
    repeated["label"][winners], repeated["label"][losers] = 1.0, 0.0
    return repeated

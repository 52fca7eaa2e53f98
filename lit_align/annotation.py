"""A person's judgements of images: what is asked next, and what is written down.

Every prompt is one question. A share of them is asked again later with the images in the opposite
order: how often the same image is best both times is the person's consistency. Answers are written
at once, and the file alone says where to go on, so a session may be closed, or killed, at any time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from lit_align.candidates import RECORDS, Candidates, images_key
from lit_align.data.preference_records import (
    append_record,
    invalid_record,
    pair_record,
    parse_record,
    ranking_record,
)
from lit_align.functional.noise import keyed_generator

SUMMARY = "summary.json"
_GAP = 10  # questions before one is asked again


class Question(NamedTuple):
    """Images of one prompt to choose between.

    Attributes:
        id: Of the record that answers it.
        candidates: The prompt and its K images.
        shown: K numbers of items, in the order of their places on the page.
        repeat_of: The id of the same question when it was first asked.
    """

    id: str
    candidates: Candidates
    shown: list[int]
    repeat_of: str | None = None


def plan_questions(
    found: Sequence[Candidates], annotator: str, repeat_fraction: float = 0.1, seed: int = 42
) -> list[Question]:
    """Return the questions in the order in which they are asked.

    Args:
        found: P prompts with their images.
        annotator: Who is asked; each sees an order of places of their own.
        repeat_fraction: Share of the prompts that are asked a second time, in [0, 1]; ten questions
            later or more, as far as there are so many.
        seed: Decides the places, and what is repeated when.

    Returns:
        P questions in the order of the prompts, with the repeated ones between them.

    Raises:
        ValueError: If the share is not in its range.
    """
    if not 0 <= repeat_fraction <= 1:
        raise ValueError(f"`repeat_fraction` must be in [0, 1], got {repeat_fraction}.")
    first = [_first_time(entry, annotator, seed) for entry in found]
    timetable = [(float(number), question) for number, question in enumerate(first)]
    generator = keyed_generator("repeats", seed, annotator)
    count, wanted = len(first), round(repeat_fraction * len(first))
    gap = min(_GAP, count // 2)
    early = count - gap if wanted <= count - gap else count
    for number in torch.randperm(early, generator=generator)[:wanted].tolist():
        earliest = min(number + gap, count)
        share = float(torch.rand((), generator=generator))
        again = first[number]
        again = again._replace(id=f"{again.id}:again", shown=again.shown[::-1], repeat_of=again.id)
        timetable.append((earliest + share * (count - earliest), again))
    return [question for _, question in sorted(timetable, key=lambda row: row[0])]


def _first_time(entry: Candidates, annotator: str, seed: int) -> Question:
    key = images_key(entry.items)
    generator = keyed_generator("places", seed, annotator, key)
    shown: list[int] = torch.randperm(len(entry.items), generator=generator).tolist()
    return Question(f"{annotator}:{key}", entry, shown)


class AnnotationSession:
    """One person's questions and answers, kept in `preferences.jsonl`.

    Two images make a pair; of more the best is named and then the worst, and the others share the
    rank between. A skipped question, and the answer to a repeated one, are records of kind
    "invalid", so that training uses every judgement once.

    Args:
        found: Prompts with their images, whose paths are relative to `folder`.
        folder: Where the file lies; nobody else may annotate in it at the same time.
        annotator: Name in the records.
        repeat_fraction: See `plan_questions`.
        seed: See `plan_questions`.

    Attributes:
        questions: What is asked, in order.
        best: The place that was named best, of a question whose worst is still to be named.

    Raises:
        ValueError: If the name is empty, the file is broken, or there are two sessions.
    """

    def __init__(
        self,
        found: Sequence[Candidates],
        folder: str | Path,
        annotator: str,
        repeat_fraction: float = 0.1,
        seed: int = 42,
    ) -> None:
        if not annotator.strip():
            raise ValueError("`annotator` is empty; give a name, it stands in every record.")
        self.annotator, self.folder = annotator, Path(folder)
        self.questions = plan_questions(found, annotator, repeat_fraction, seed)
        self.best: int | None = None
        self._lock = _locked(self.folder / ".annotating")
        self._records = {record["id"]: record for record in read_records(self.path)}

    @property
    def path(self) -> Path:
        """The file of the records."""
        return self.folder / RECORDS

    @property
    def question(self) -> Question | None:
        """What is asked now; None when all is answered."""
        return next((question for question in self.questions if self._is_open(question)), None)

    def _is_open(self, question: Question) -> bool:
        if question.id in self._records:
            return False
        first = self._records.get(question.repeat_of or "")
        return first is None or first["kind"] != "invalid"  # who skips it need not do so twice

    @property
    def progress(self) -> tuple[int, int]:
        """Questions behind, and all."""
        behind = sum(not self._is_open(question) for question in self.questions)
        return behind, len(self.questions)

    @property
    def asked(self) -> str:
        """What is asked now, in words."""
        question = self.question
        if question is None:
            return "All questions are answered."
        if len(question.shown) == 2:
            return "Which image is better?"
        return "Which is the best?" if self.best is None else "And which is the worst?"

    @property
    def state(self) -> str:
        """The question and its part, which a key must name to count."""
        question = self.question
        return f"{question.id if question else 'end'} {self.best}"

    def press(self, key: str, state: str) -> None:
        """Answer by a key.

        Args:
            key: A place from 1, or t for a tie, s to skip, u to undo.
            state: The state that the key was pressed in; it says nothing about a later question.
        """
        if state != self.state:
            return
        actions = {"t": self.tie, "s": self.skip, "u": self.undo}
        if key in actions:
            actions[key]()
        else:
            self.choose(int(key) - 1)

    def choose(self, place: int) -> None:
        """Name the image at a place, from 0: the better of two, else the best and then the worst.

        A place that is not there, or that was named best already, changes nothing.
        """
        question = self.question
        if question is None or place == self.best or not 0 <= place < len(question.shown):
            return
        if len(question.shown) > 2 and self.best is None:
            self.best = place
            return
        best = place if self.best is None else self.best
        worst = place if self.best is not None else 1 - place
        ranks = [2] * len(question.shown)
        ranks[question.shown[best]], ranks[question.shown[worst]] = 1, 3
        self._answer(question, ranks)

    def tie(self) -> None:
        """Say that none is better than another; once the best is named, of the others."""
        if (question := self.question) is not None:
            ranks = [1 if self.best is None else 2] * len(question.shown)
            if self.best is not None:
                ranks[question.shown[self.best]] = 1
            self._answer(question, ranks)

    def skip(self) -> None:
        """Leave the question out, as none can be said to be better."""
        if (question := self.question) is not None:
            self._answer(question, None)

    def undo(self) -> None:
        """Take back the best just named, or the last answer: it is asked again."""
        own = self._records_of(self.annotator)
        if self.best is not None:
            self.best = None
        elif own:
            del self._records[own[-1]["id"]]
            remove_record(self.path, own[-1]["id"])
            self._write_summary()

    def _answer(self, question: Question, ranks: list[int] | None) -> None:
        """Write the record of an answer: ranks per item, None for a skipped question."""
        self.best = None
        prompt, metadata, items = question.candidates
        own = {"prompt": metadata, "shown": question.shown, "repeat_of": question.repeat_of}
        common: dict[str, Any] = {
            "id": question.id,
            "prompt": prompt,
            "items": items,
            "annotator": self.annotator,
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "metadata": {name: value for name, value in own.items() if value is not None},
        }
        if ranks is None:
            common["metadata"]["skipped"] = True
            record = invalid_record(**common)
        elif question.repeat_of is not None:
            common["metadata"]["rank"] = _dense(ranks)
            record = invalid_record(**common)
        elif len(items) > 2:
            record = ranking_record(rank=_dense(ranks), **common)
        else:
            label = [0.5, 0.5] if ranks[0] == ranks[1] else [float(rank == 1) for rank in ranks]
            record = pair_record(label=label, pair_id=images_key(items), **common)
        append_record(self.path, record)
        self._records[record["id"]] = record
        self._write_summary()

    def summary(self) -> dict[str, Any]:
        """Return what `summarise` says of this person's records."""
        return summarise(self._records_of(self.annotator))

    def _records_of(self, annotator: str) -> list[dict[str, Any]]:
        return [r for r in self._records.values() if r.get("annotator", "") == annotator]

    def _write_summary(self) -> None:
        names = {record.get("annotator", "") for record in self._records.values()}
        told = {name: summarise(self._records_of(name)) for name in names}
        _replace(self.folder / SUMMARY, json.dumps(told, indent=2, sort_keys=True).encode())

    def close(self) -> None:
        """Let another session use the folder."""
        if self._lock is not None:
            self._lock.close()


def _dense(ranks: list[int]) -> list[int]:
    """Return ranks without gaps, such as [1, 2] for [1, 3]."""
    order = sorted(set(ranks))
    return [order.index(rank) + 1 for rank in ranks]


def _ranks(record: dict[str, Any]) -> list[int] | None:
    """Return the ranks that were told, of a repeated question too; None if it was skipped."""
    if record["kind"] == "pair":
        return _dense([-round(2 * p) for p in record["label"]])
    ranks: list[int] | None = record.get("rank", _own(record).get("rank"))
    return ranks


def _own(record: dict[str, Any]) -> dict[str, Any]:
    return record.get("metadata") or {}


def _best(ranks: list[int]) -> set[int]:
    return {number for number, rank in enumerate(ranks) if rank == 1}


def summarise(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Count one person's judgements.

    Args:
        records: In any order.

    Returns:
        `judged` prompts, of them `tied`; `skipped` questions; `repeated` ones that were judged both
        times, `consistency`, the share of those where the same images were best; and
        `first_place`, the share of choices that fell on the first image shown, 1 / K by chance.
        Shares of nothing are None.
    """
    ranks = {record["id"]: told for record in records if (told := _ranks(record)) is not None}
    answers = [(record, ranks[record["id"]]) for record in records if record["id"] in ranks]
    first = [told for record, told in answers if record["kind"] != "invalid"]
    same = [
        _best(told) == _best(ranks[before])
        for record, told in answers
        if (before := _own(record).get("repeat_of")) in ranks
    ]
    of_first_place = [
        told[_own(record)["shown"][0]] == 1
        for record, told in answers
        if "shown" in _own(record) and len(set(told)) > 1
    ]
    return {
        "judged": len(first),
        "tied": sum(len(set(told)) == 1 for told in first),
        "skipped": len(records) - len(ranks),
        "repeated": len(same),
        "consistency": sum(same) / len(same) if same else None,
        "first_place": sum(of_first_place) / len(of_first_place) if of_first_place else None,
    }


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file, none if there is no file.

    A last line that was cut by a killed process is removed from the file, and told of.

    Raises:
        ValueError: If another line is broken; the message says which.
    """
    if not path.is_file():
        return []
    content = path.read_bytes()
    *lines, last = content.split(b"\n")
    if last.strip():
        try:
            json.loads(last)
            lines.append(last)
        except ValueError:
            print(f"{path}: the last line is cut and was removed; its question is asked again.")
            os.truncate(path, len(content) - len(last))
    records = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                records.append(parse_record(line + b"\n"))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}; repair or remove it.") from error
    return records


def remove_record(path: Path, id: str) -> None:
    """Rewrite a file without the record of that id; a process killed meanwhile changes nothing."""
    lines = path.read_bytes().splitlines(keepends=True)
    _replace(path, b"".join(line for line in lines if not line.strip() or _id(line) != id))


def _id(line: bytes) -> str:
    return str(json.loads(line)["id"])


def _replace(path: Path, content: bytes) -> None:
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def _locked(path: Path) -> IO[bytes] | None:
    """Return a file that is locked until it is closed, or its process ends in whatever way."""
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        return None
    file = path.open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ValueError(
            f"Somebody is annotating in {str(path.parent)!r} already; close that page, or give "
            "another `output`, whose file can be joined to the other's."
        ) from error
    return file

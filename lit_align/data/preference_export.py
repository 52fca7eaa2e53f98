"""Pairs as a parquet file with the columns of Pick-a-Pic (arXiv:2305.01569)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from lit_align.data.preference_file import Judgement, PreferenceFile
from lit_align.data.preference_rows import parquet_module

_GROUP = 100  # rows read together by whoever asks for one


def to_pickapic(source: PreferenceFile | Sequence[Judgement], path: str | Path) -> int:
    """Write pairs to a parquet file, images as the bytes of their files.

    The columns are `jpg_0`, `jpg_1`, `label_0`, `label_1`, `caption`, `are_different`, `has_label`,
    image 0 being the preferred one. Weights have no column there: they are lost.

    Args:
        source: A file opened with `unit: pairs`, or some of its judgements.
        path: Where to write.

    Returns:
        The number of pairs.

    Raises:
        ImportError: If pyarrow is not installed.
        ValueError: If a judgement is no pair of images.
    """
    parquet = parquet_module()
    import pyarrow as pa

    texts = {"caption": pa.string(), "are_different": pa.bool_(), "has_label": pa.bool_()}
    pictures = {"jpg_0": pa.binary(), "jpg_1": pa.binary()}
    labels = {"label_0": pa.float64(), "label_1": pa.float64()}
    schema = pa.schema({**pictures, **labels, **texts})
    rows, count = (_row(source[i]) for i in range(len(source))), 0
    partial = Path(path).with_suffix(".partial")
    try:
        with parquet.ParquetWriter(partial, schema) as writer:
            while group := list(islice(rows, _GROUP)):
                writer.write_table(pa.Table.from_pylist(group, schema))
                count += len(group)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return count


def _row(judgement: Judgement) -> dict[str, Any]:
    if judgement.video or len(judgement.media) != 2 or sum(judgement.labels) != 1:
        raise ValueError(
            f"{judgement.place}: Pick-a-Pic holds pairs of images; open the file with "
            "`unit: pairs`."
        )
    first, second = _contents(judgement)
    return {
        "jpg_0": first,
        "jpg_1": second,
        "label_0": judgement.labels[0],
        "label_1": judgement.labels[1],
        "caption": judgement.prompt,
        "are_different": first != second,
        "has_label": True,
    }


def _contents(judgement: Judgement) -> Iterator[bytes]:
    for source in judgement.media:
        yield source if isinstance(source, bytes) else source.read_bytes()

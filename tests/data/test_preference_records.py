import json

import pytest

from lit_align.data.preference_records import (
    append_record,
    check_record,
    invalid_record,
    pair_record,
    parse_record,
    ranking_record,
    rating_record,
)

ITEMS = [{"uid": "a", "path": "a.png"}, {"uid": "b", "path": "b.png", "scores": {"gold": 0.5}}]
PAIR = {"id": "r1", "prompt": "a cat", "items": ITEMS, "label": (1, 0)}


def test_constructors_write_what_the_schema_says():
    record = pair_record(**PAIR, annotator="u1", weight=0.5, round=3, pair_id=None)
    assert record == {
        "schema": "lit_align/pref/1", "id": "r1", "kind": "pair", "prompt": "a cat",
        "items": ITEMS, "label": [1.0, 0.0], "annotator": "u1", "weight": 0.5, "round": 3,
    }  # fmt: skip
    assert ranking_record(id="r", prompt="p", items=ITEMS, rank=(1, 1))["rank"] == [1, 1]
    assert rating_record(id="r", prompt="p", item=ITEMS[0], liked=True)["label"] == [1.0]
    assert invalid_record(id="r", prompt="p")["items"] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": "other"}, "'schema' must be 'lit_align/pref/1', got 'other'"),
        ({"kind": "triple"}, "'kind' must be one of pair, ranking, rating, invalid, got 'triple'"),
        ({"lable": [1, 0]}, "unknown field 'lable'"),
        ({"rank": [1, 2]}, "unknown field 'rank'"),
        ({"id": 7}, "'id' must be a text that is not empty, got 7"),
        ({"prompt": " "}, "'prompt' must be a text"),
        ({"items": ITEMS[:1]}, "'items' of a record of kind 'pair' must be 2, got 1"),
        ({"items": [ITEMS[0], ITEMS[0]]}, r"'uid' must differ, got \['a', 'a'\]"),
        ({"items": [ITEMS[0], {"uid": "b"}]}, r"'items\[1\].path' must be a text"),
        ({"items": [ITEMS[0], {**ITEMS[1], "url": ""}]}, r"unknown field 'items\[1\].url'"),
        ({"items": [{"uid": "a", "bytes": "x"}, ITEMS[1]]}, r"'items\[0\].bytes' must be bytes"),
        ({"label": [1.0]}, r"'label' must have one value per item \(2\), got \[1.0\]"),
        ({"label": [1.0, 1.0]}, r"'label' of a pair must sum to 1, got \[1.0, 1.0\]"),
        ({"label": [1.5, -0.5]}, r"'label' must lie in \[0, 1\]"),
        ({"label": [float("nan"), 0.5]}, r"'label' must lie in \[0, 1\]"),
        ({"kind": "ranking", "rank": [0, 1], "label": None}, "unknown field 'label'"),
        ({"axis": "beauty"}, "'axis' must be one of overall, .*got 'beauty'"),
        ({"media_type": "sound"}, "'media_type' must be one of image, video"),
        ({"weight": -1}, "'weight' must be a number from 0, got -1"),
        ({"round": 1.5}, "'round' must be an integer"),
        ({"created_at": "yesterday"}, "'created_at' must be ISO 8601, got 'yesterday'"),
        ({"annotator": ""}, "'annotator' must be a text"),
        ({"metadata": [1]}, r"'metadata' must be an object, got \[1\]"),
    ],
)
def test_broken_records_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        check_record({**pair_record(**PAIR), **changes})


def test_ranks_and_ratings_are_checked():
    with pytest.raises(ValueError, match=r"'rank' must be integers from 1, the best, got \[0, 1\]"):
        ranking_record(id="r", prompt="p", items=ITEMS, rank=(0, 1))
    rating = rating_record(id="r", prompt="p", item=ITEMS[0], liked=False)
    with pytest.raises(ValueError, match=r"must be \[1.0\] or \[0.0\], got \[0.5\]"):
        check_record({**rating, "label": [0.5]})
    with pytest.raises(ValueError, match="'pair_id' belongs to pairs, but .* is a rating"):
        check_record({**rating, "pair_id": "x"})
    with pytest.raises(ValueError, match="expected an object, got 3"):
        check_record(3)


def test_appended_records_are_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    records = [pair_record(**{**PAIR, "id": f"r{i}", "prompt": "thrée"}) for i in range(3)]
    for record in records:
        append_record(path, record)
    assert [parse_record(line) for line in path.read_bytes().splitlines(True)] == records
    with pytest.raises(ValueError, match="'bytes' cannot be written as JSON"):
        append_record(path, {**records[0], "items": [{"uid": "a", "bytes": b"x"}, ITEMS[1]]})


def test_a_cut_last_line_stays_the_only_broken_one(tmp_path):
    path = tmp_path / "a.jsonl"
    record = pair_record(**PAIR)
    append_record(path, record)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:40])
    with pytest.raises(ValueError, match="last line is cut, as by a killed process; delete it"):
        parse_record(path.read_bytes().splitlines(True)[-1])
    append_record(path, record)
    first, cut, last = path.read_bytes().splitlines(True)
    assert parse_record(first) == parse_record(last) == record
    with pytest.raises(ValueError, match='expected a JSON object, got \'{"schema"'):
        parse_record(cut)
    path.write_text(json.dumps([1]))
    with pytest.raises(ValueError, match=r"expected an object, got \[1\]"):
        parse_record(path.read_bytes())

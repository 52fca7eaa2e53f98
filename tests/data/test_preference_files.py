"""Files of preferences in every layout: what is read from them, and what is refused."""

import csv
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image

from lit_align.data import preference_rows
from lit_align.data.preference_export import to_pickapic
from lit_align.data.preference_file import PreferenceFile
from lit_align.data.preference_media import read_media
from lit_align.data.preference_records import append_record, pair_record, ranking_record


def png(level, size=(8, 8)):
    """Return the bytes of a grey image."""
    file = io.BytesIO()
    Image.new("RGB", size, (level,) * 3).save(file, "png")
    return file.getvalue()


def grey(source):
    """Return the level of a grey image."""
    return round(float(read_media(source).mean()) * 255)


@pytest.fixture
def folder(tmp_path):
    """A folder with images 0.png, 10.png, ... of these levels."""
    for level in range(0, 100, 10):
        (tmp_path / f"{level}.png").write_bytes(png(level))
    return tmp_path


def items(*levels):
    return [{"uid": str(level), "path": f"{level}.png"} for level in levels]


def write(folder, records, name="a.jsonl"):
    for record in records:
        append_record(folder / name, record)
    return folder / name


def said(file):
    """Return (prompt, levels of the images, labels) of every judgement."""
    return [(j.prompt, [grey(m) for m in j.media], j.labels) for j in file]


PAIRS = [
    pair_record(id="1", prompt="p", items=items(0, 10), label=(0, 1), weight=0.5),
    pair_record(id="2", prompt="q", items=items(20, 30), label=(0.5, 0.5)),
    pair_record(id="3", prompt="q", items=items(40, 50), label=(0.75, 0.25), axis="safety"),
]
RANKING = ranking_record(id="4", prompt="r", items=items(60, 70, 80), rank=(2, 1, 2))


def test_pairs_are_oriented_and_ties_kept_or_dropped(folder):
    path = write(folder, PAIRS)
    kept = PreferenceFile(path)
    first, tie, soft = (
        ("p", [10, 0], [1, 0]),
        ("q", [20, 30], [0.5, 0.5]),
        ("q", [40, 50], [0.75, 0.25]),
    )
    assert said(kept) == [first, tie, soft]
    assert [j.weight for j in kept] == [0.5, 1, 1]
    dropped = PreferenceFile(path, ties="drop")
    assert said(dropped) == [first, soft]
    assert dropped.counts["ties"] == 1
    assert said(PreferenceFile(path, axis="safety")) == [soft]
    assert kept[1:] == [kept[1], kept[2]]


def test_rankings_give_pairs_and_pairs_rankings_of_two(folder):
    path = write(folder, [RANKING, PAIRS[0]])
    ranked = ("r", [70, 60], [1, 0]), ("r", [60, 80], [0.5, 0.5]), ("r", [70, 80], [1, 0])
    assert said(PreferenceFile(path)) == [*ranked, ("p", [10, 0], [1, 0])]
    assert len(PreferenceFile(path, ties="drop")) == 3
    rankings = said(PreferenceFile(path, unit="rankings"))
    assert rankings == [("r", [70, 60, 80], [1, 2, 2]), ("p", [10, 0], [1, 2])]


def test_pairs_give_two_ratings_and_ties_none(folder):
    file = PreferenceFile(write(folder, PAIRS), unit="ratings")
    assert said(file) == [
        ("p", [10], [1]), ("p", [0], [0]), ("q", [40], [1]), ("q", [50], [0]),
    ]  # fmt: skip
    assert file.counts["ties"] == 1


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("mean", [([0, 10], 2 / 3)]),
        ("majority", [([0, 10], 1)]),
        ("none", [([0, 10], 1), ([0, 10], 1), ([10, 0], 1)]),
    ],
)
def test_judgements_of_one_pair_are_aggregated(folder, how, expected):
    """Two of three annotators prefer image 0; the second saw the images in the other order."""
    votes = [(items(0, 10), (1, 0), 1.0), (items(10, 0), (0, 1), 1.0), (items(0, 10), (0, 1), 4.0)]
    records = [
        pair_record(id=str(i), prompt="p", items=seen, label=label, pair_id="x", weight=weight)
        for i, (seen, label, weight) in enumerate(votes)
    ]
    file = PreferenceFile(write(folder, records), aggregate=how)
    assert [levels for _, levels, _ in said(file)] == [levels for levels, _ in expected]
    assert [j.labels[0] for j in file] == pytest.approx([p for _, p in expected])
    assert [j.weight for j in file] == ([2.0] if how != "none" else [1, 1, 4])


def test_prompts_are_never_on_both_sides_of_a_split(folder):
    records = [
        pair_record(id=str(i), prompt=f"prompt {i % 50}", items=items(0, 10), label=(1, 0))
        for i in range(200)
    ]
    file = PreferenceFile(write(folder, records))
    train, val = file.split(0.3)
    sides = [{file[int(i)].prompt for i in side} for side in (train, val)]
    assert sides[0].isdisjoint(sides[1])
    assert sorted([*train, *val]) == list(range(200))
    assert len(sides[1]) == pytest.approx(15, abs=8)
    more = file.split(0.6)[1]
    assert set(val) < set(more)  # whoever was held out stays so
    assert len(file.split(0.0)[1]) == 0


def test_the_fingerprint_follows_content_media_and_options(folder):
    path = write(folder, PAIRS)
    first = PreferenceFile(path).fingerprint
    assert PreferenceFile(path).fingerprint == first
    assert PreferenceFile(path, ties="drop").fingerprint != first
    (folder / "0.png").write_bytes(png(3, size=(50, 50)))
    changed = PreferenceFile(path).fingerprint
    assert changed != first
    write(folder, PAIRS[:1])
    assert PreferenceFile(path).fingerprint != changed


def pickapic_row(i, **changes):
    return {
        "are_different": True, "best_image_uid": "a", "caption": f"caption {i}",
        "created_at": None, "has_label": True, "image_0_uid": f"{i}a", "image_0_url": "",
        "image_1_uid": f"{i}b", "image_1_url": "", "jpg_0": png(i), "jpg_1": png(100 + i),
        "label_0": 0.0, "label_1": 1.0, "model_0": "m", "model_1": "n", "ranking_id": i,
        "user_id": 5, "num_example_per_prompt": 4, **changes,
    }  # fmt: skip


def write_parquet(path, rows, group=2):
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return path


def test_pickapic(tmp_path):
    rows = [
        pickapic_row(0),
        pickapic_row(1, has_label=False),
        pickapic_row(2, label_0=0.5, label_1=0.5),
        pickapic_row(3, label_0=1.0, label_1=0.0, num_example_per_prompt=None),
        pickapic_row(4, image_1_uid="4a"),
    ]
    file = PreferenceFile(write_parquet(tmp_path / "a.parquet", rows), "pickapic")
    assert said(file) == [
        ("caption 0", [100, 0], [1, 0]),
        ("caption 2", [2, 102], [0.5, 0.5]),
        ("caption 3", [3, 103], [1, 0]),
    ]
    assert [j.weight for j in file] == [0.25, 0.25, 1]
    assert file.counts["unlabelled"] == file.counts["invalid"] == 1
    assert grey(file[2].media[0]) == 3  # a group read out of turn
    (tmp_path / "shards").mkdir()
    for shard in "ba":
        write_parquet(tmp_path / "shards" / f"{shard}.parquet", rows)
    assert len(PreferenceFile(tmp_path / "shards", "pickapic")) == 6
    assert len(PreferenceFile(tmp_path / "shards" / "[a].parquet", "pickapic")) == 3


def test_pictures_are_not_read_while_a_file_is_scanned(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", [pickapic_row(i) for i in range(6)])
    read, opened = [], parquet.ParquetFile.read_row_group

    def watched(self, group, columns=None, **options):
        read.append((group, columns))
        return opened(self, group, columns=columns, **options)

    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", watched)
    file = PreferenceFile(path, "pickapic")
    assert [group for group, _ in read] == [0, 1, 2]
    assert all({"jpg_0", "jpg_1"}.isdisjoint(columns) for _, columns in read)
    assert [grey(file[i].media[1]) for i in (4, 5)] == [4, 5]
    assert read[3:] == [(2, None)]


def test_our_schema_in_parquet_with_bytes_and_paths(folder):
    inside = [{"uid": "a", "bytes": png(5)}, {"uid": "b", "path": "10.png", "scores": {"g": 1.0}}]
    rows = [pair_record(id="1", prompt="p", items=inside, label=(0, 1), round=2), PAIRS[1]]
    path = write_parquet(folder / "a.parquet", rows, group=1)
    assert said(PreferenceFile(path)) == [
        ("p", [10, 5], [1, 0]), ("q", [20, 30], [0.5, 0.5]),
    ]  # fmt: skip
    rows[0]["items"][0] = {"uid": "a"}
    with pytest.raises(ValueError, match=r"row 1: 'items\[0\].path' must be a text"):
        PreferenceFile(write_parquet(folder / "b.parquet", rows))


def test_hpdv2(folder):
    train = [{"prompt": "p", "file_path": ["0.png", "10.png"], "human_preference": [0, 1]},
             {"prompt": "é", "file_path": ["20.png", "30.png"], "human_preference": [1, 0],
              "user_hash": "x"}]  # fmt: skip
    path = folder / "train.json"
    path.write_text(json.dumps(train, ensure_ascii=False, indent=1), encoding="utf-8")
    assert said(PreferenceFile(path, "hpdv2")) == [
        ("p", [10, 0], [1, 0]), ("é", [20, 30], [1, 0]),
    ]  # fmt: skip
    test = [{"prompt": "p", "image_path": ["0.png", "10.png", "20.png"], "rank": [2, 0, 1],
             "raw_annotations": [{"rank": [2, 0, 1], "user_hash": "x"}]}]  # fmt: skip
    path.write_text(json.dumps(test))
    assert said(PreferenceFile(path, "hpdv2", "rankings")) == [("p", [10, 20, 0], [1, 2, 3])]
    (folder / "elsewhere").mkdir()
    moved = path.rename(folder / "elsewhere" / "test.json")
    assert len(PreferenceFile(moved, "hpdv2", media_folder=folder)) == 3


def test_imagereward(folder):
    rows = [{"id": "x", "prompt": "p", "generations": ["0.png", "10.png", "20.png"],
             "ranking": [3, 1, 1]}]  # fmt: skip
    (folder / "a.json").write_text(json.dumps(rows))
    file = PreferenceFile(folder / "a.json", "imagereward", ties="drop")
    assert said(file) == [("p", [10, 0], [1, 0]), ("p", [20, 0], [1, 0])]
    whole = PreferenceFile(folder / "a.json", "imagereward", "rankings")
    assert said(whole) == [("p", [10, 20, 0], [1, 1, 3])]


def write_csv(path, *rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


VIDEO_COLUMNS = ("path_A", "path_B", "prompt", "VQ", "MQ", "TA", "fps_A", "num_frames_A", "fps_B",
                 "num_frames_B")  # fmt: skip


def test_videoreward(tmp_path):
    for name, level in (("a", 0), ("b", 50)):
        frames = [Image.new("L", (8, 8), level + i) for i in range(5)]
        frames[0].save(tmp_path / f"{name}.gif", save_all=True, append_images=frames[1:])
    path = write_csv(
        tmp_path / "a.csv", VIDEO_COLUMNS,
        ("a.gif", "b.gif", "two\nlines", "A", "B", "same", "8.0", "5", "8", "5"),
        ("a.gif", "b.gif", "p", "22", "A", "A", "", "", "", ""),
    )  # fmt: skip
    file = PreferenceFile(path, "videoreward")
    assert [(j.prompt, [m.name for m in j.media], j.labels) for j in file] == [
        ("two\nlines", ["a.gif", "b.gif"], [1, 0]),
        ("two\nlines", ["b.gif", "a.gif"], [1, 0]),
        ("two\nlines", ["a.gif", "b.gif"], [0.5, 0.5]),
        ("p", ["a.gif", "b.gif"], [1, 0]),
        ("p", ["a.gif", "b.gif"], [1, 0]),
    ]
    assert file.counts["invalid"] == 1
    assert file[3].video
    assert file[3].place.endswith("line 4")
    motion = PreferenceFile(path, "videoreward", axis="motion_quality")
    assert [j.media[0].name for j in motion] == ["b.gif", "a.gif"]


def test_kto(folder):
    path = write_csv(
        folder / "a.csv", ("file_path", "caption", "label"),
        ("0.png", "p, q", "exclusive_win"), ("10.png", "r", "exclusive_lose"),
    )  # fmt: skip
    file = PreferenceFile(path, "kto", "ratings")
    assert said(file) == [("p, q", [0], [1]), ("r", [10], [0])]


def test_export_to_pickapic_keeps_the_bytes(folder):
    file = PreferenceFile(write(folder, PAIRS))
    assert to_pickapic(file, folder / "out.parquet") == 3
    table = parquet.read_table(folder / "out.parquet")
    assert set(table.column_names) == {
        "jpg_0", "jpg_1", "label_0", "label_1", "caption", "are_different", "has_label",
    }  # fmt: skip
    assert table["jpg_0"][0].as_py() == (folder / "10.png").read_bytes()
    assert said(PreferenceFile(folder / "out.parquet", "pickapic")) == said(file)
    with pytest.raises(ValueError, match="line 1: Pick-a-Pic holds pairs of images; open the file"):
        to_pickapic(PreferenceFile(write(folder, PAIRS), unit="ratings"), folder / "b.parquet")
    assert not (folder / "b.parquet").exists()


GOOD = json.dumps(PAIRS[0])
LINE = "expected a JSON object"
HPD = {"prompt": "p", "file_path": ["0.png", "10.png"], "human_preference": [1, 0]}
MALFORMED = [
    # name, format, unit, content, what is told
    ("a.jsonl", "lit_align", "pairs", "", "holds no judgement"),
    ("a.txt", "lit_align", "pairs", GOOD, "must end in .jsonl or .parquet, got .*a.txt"),
    ("a.jsonl", "lit_align", "pairs", "nonsense\n" + GOOD, f"line 1: {LINE}, got 'nonsense'"),
    ("a.jsonl", "lit_align", "pairs", f"{GOOD}\n\n{GOOD[:50]}", "line 3: the last line is cut"),
    ("a.jsonl", "lit_align", "pairs", GOOD.replace("/1", "/9"), "line 1: 'schema' must be"),
    ("a.jsonl", "lit_align", "pairs", GOOD.replace("[0.0, 1.0]", "[1.0, 1.0]"), "must sum to 1"),
    ("a.jsonl", "lit_align", "pairs", GOOD.replace("0.png", "99.png", 1), "no file '.*99.png'"),
    ("a.jsonl", "lit_align", "pairs", GOOD.replace("0.png", "dir", 1), "dir' is a folder, not an"),
    ("a.jsonl", "lit_align", "rankings", GOOD.replace('"pair"', '"rating"'), "'items' of a record"),
    ("a.jsonl", "lit_align", "pairs", GOOD[:-1] + ', "media_type": "video"}\n', None),
    ("a.jsonl", "lit_align", "ratings", json.dumps(RANKING), "ranking cannot become ratings; set"),
    ("a.jsonl", "lit_align", "pairs", b"\xff\xfe{}", f"line 1: {LINE}"),
    ("a.json", "hpdv2", "pairs", "{}", "not a whole JSON array.*write or download it again"),
    ("a.json", "hpdv2", "pairs", json.dumps([HPD])[:-2], "not a whole JSON array"),
    ("a.json", "hpdv2", "pairs", json.dumps([HPD, {"prompt": "p"}]), "entry 2: there is no 'image"),
    ("a.json", "hpdv2", "pairs", json.dumps([{**HPD, "human_preference": ["a"]}]), "be numbers"),
    ("a.json", "hpdv2", "pairs", json.dumps([HPD, 3]), "entry 2: expected an object, got '3'"),
    ("a.json", "imagereward", "rankings", json.dumps([{"prompt": "p", "generations": ["0.png"],
     "ranking": [1]}]), "'items' of a record of kind 'ranking' must be at least 2, got 1"),
    ("a.json", "imagereward", "rankings", json.dumps([{"prompt": "p", "generations": ["0.png"],
     "ranking": [1.5]}]), "'ranking' must be integers, the lowest the best"),
    ("a.csv", "kto", "ratings", "file_path,label\n", "has no column 'caption'; it has file_path"),
    ("a.csv", "kto", "ratings", "file_path,caption,label\n0.png,p,tie\n", "line 2: 'label' must"),
    ("a.csv", "kto", "ratings", "file_path,caption,label\n0.png,p\n", "line 2: expected 3 fields"),
    ("a.csv", "kto", "ratings", b"file_path,caption,label\n0.png,\xff,tie\n", "CSV in UTF-8"),
    ("a.csv", "kto", "pairs", "file_path,caption,label\n0.png,p,exclusive_win\n",
     "a rating cannot become pairs; set `unit: ratings`"),
    ("a.csv", "videoreward", "pairs", ",".join(VIDEO_COLUMNS) + "\n0.mp4,0.mp4,p,A,A,A,,,,\n",
     r"0.mp4' is no video that can be read; convert it to an animation \(.gif"),
    ("a.parquet", "pickapic", "pairs", "PAR1", "is not a whole parquet file"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "layout", "unit", "content", "told"), MALFORMED)
def test_malformed_files_are_refused(folder, name, layout, unit, content, told):
    (folder / "dir").mkdir()
    (folder / "0.mp4").write_bytes(b"")
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if told is None:  # a still image is a video of one frame
        assert PreferenceFile(path, layout, unit)[0].video
        return
    with pytest.raises(ValueError, match=told):
        PreferenceFile(path, layout, unit)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"jpg_1": None}, "row 1: 'jpg_1' holds no picture"),
        ({"label_0": 1.0}, "row 1: 'label' of a pair must sum to 1"),
        ({"label_0": None}, "row 1: there is no 'label_0'"),
        ({"caption": ""}, "row 1: 'prompt' must be a text"),
        ({"num_example_per_prompt": 0}, "'num_example_per_prompt' must be a positive integer"),
    ],
)
def test_malformed_rows_of_pickapic_are_refused(tmp_path, changes, told):
    rows = [pickapic_row(0, **changes), pickapic_row(1)]
    path = write_parquet(tmp_path / "a.parquet", rows)
    with pytest.raises(ValueError, match=told):
        PreferenceFile(path, "pickapic")
    with pytest.warns(UserWarning, match="They are skipped"):
        assert len(PreferenceFile(path, "pickapic", broken="skip")) == 1
    rows = [{k: v for k, v in row.items() if k != "jpg_0"} for row in rows]
    with pytest.raises(ValueError, match="has no column 'jpg_0'"):
        PreferenceFile(write_parquet(path, rows), "pickapic")


def test_five_broken_rows_are_told_and_all_counted(folder):
    path = folder / "a.jsonl"
    path.write_text("\n".join([GOOD, *["x"] * 7]))
    with pytest.raises(ValueError, match=r"(?s)7 broken row.*line 2: .*line 6: .*and 2 more"):
        PreferenceFile(path)
    with pytest.warns(UserWarning, match="(?s)7 broken row.*They are skipped"):
        file = PreferenceFile(path, broken="skip")
    assert len(file) == 1
    assert file.counts["broken"] == 7


def test_a_pair_id_names_one_pair(folder):
    records = [pair_record(id="1", prompt="p", items=items(0, other), label=(1, 0), pair_id="x")
               for other in (10, 20)]  # fmt: skip
    with pytest.raises(ValueError, match="line 2: its 'pair_id' names another prompt or other"):
        PreferenceFile(write(folder, records))


def test_what_does_not_exist_is_told(folder, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no file of preferences 'nowhere.jsonl'"):
        PreferenceFile("nowhere.jsonl")
    path = write(folder, PAIRS[:1])
    with pytest.raises(ValueError, match=r"holds no judgement.*asked for \(it has: 1 axis overall"):
        PreferenceFile(path, axis="safety")
    with pytest.raises(
        ValueError, match="`unit` must be one of 'pairs', 'rankings', 'ratings', got 'p'"
    ):
        PreferenceFile(path, unit="p")
    path = write_parquet(folder / "a.parquet", [pickapic_row(0)])
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"pip install 'lit-align\[parquet\]'"):
        preference_rows.parquet_module()


def test_images_are_scaled_on_the_short_side_and_cropped(tmp_path):
    """16 x 8 with black thirds outside: at 4 x 4 only the white middle is left."""
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, 4:12] = 255
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    assert torch.equal(read_media(path, size=8), torch.ones(3, 8, 8))
    assert read_media(path, size=4)[:, :, 1:3].min() == 1
    assert read_media(path, size=(4, 8)).shape == (3, 4, 8)
    assert read_media(path).shape == (3, 8, 16)
    halves = np.zeros((2, 2), np.uint8)
    halves[0] = 255
    Image.fromarray(halves).save(path)
    assert float(read_media(path, size=1).mean()) == pytest.approx(0.5, abs=0.01)  # antialiased


def test_videos_give_evenly_spaced_frames(tmp_path):
    frames = [Image.new("L", (8, 8), 10 * i) for i in range(5)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "b").mkdir()
    for i, frame in enumerate(frames):
        frame.save(tmp_path / "b" / f"{i:03}.png")
    for name in ("a.gif", "b"):
        video = read_media(tmp_path / name, video=True, num_frames=3)
        assert video.shape == (3, 3, 8, 8)
        assert (video.mean(dim=(1, 2, 3)) * 255).round().tolist() == [0, 20, 40]
        assert read_media(tmp_path / name, video=True).shape == (3, 8, 8)
        with pytest.raises(ValueError, match="5 frames, fewer than `num_frames` "):
            read_media(tmp_path / name, video=True, num_frames=6)
    with pytest.raises(ValueError, match="it is an image, but `num_frames` is 2"):
        read_media(tmp_path / "b" / "000.png", num_frames=2)
    with pytest.raises(ValueError, match="cannot be decoded"):
        read_media(b"x")

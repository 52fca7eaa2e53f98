import json
from collections import Counter

import pytest

from lit_align.benchmarks import shapes_prompts
from lit_align.data.prompts import PromptDataModule, PromptFile, PromptLoader, shipped_prompts
from lit_align.shapes.grammar import caption, split_of
from lit_align.shapes.scene import Facts

PROMPTS = [(f"prompt {i}", None) for i in range(10)]


def test_text_and_jsonl_files(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("one\n\n  two  \nthrée", encoding="utf-8")
    assert list(PromptFile(text)) == [("one", None), ("two", None), ("thrée", None)]
    rows = tmp_path / "a.jsonl"
    rows.write_text(
        json.dumps({"prompt": "one", "metadata": {"k": 1}}) + "\n" + json.dumps({"prompt": "two"})
    )
    file = PromptFile(rows)
    assert file[0] == ("one", {"k": 1})
    assert file[1:] == [("two", None)]


def test_only_offsets_are_kept_in_memory(tmp_path):
    path = tmp_path / "many.txt"
    path.write_text("\n".join(f"prompt number {i}" for i in range(20_000)))
    file = PromptFile(path)
    assert len(file) == 20_000
    assert file[19_999] == ("prompt number 19999", None)
    assert file._offsets.nbytes == 8 * 20_000


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("missing.txt", None, FileNotFoundError, "no prompts file.*shipped lists: .*shapes-train"),
        ("empty.txt", "\n \n", ValueError, "is empty"),
        ("a.csv", "x", ValueError, "must end in .txt or .jsonl"),
        ("bad.jsonl", '{"prompt": "a"}\n{"text": "b"}', ValueError, "line 2: expected.*'prompt'"),
        ("worse.jsonl", "{", ValueError, "line 1"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, content, error, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(error, match=message):
        PromptFile(path)


def test_training_order_is_shuffled_per_lap_and_decided_by_the_seed():
    loader = PromptLoader(PROMPTS, 5, shuffle=True, seed=1)
    first, second = loader.take(10), loader.take(10)
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    again = PromptLoader(PROMPTS, 3, shuffle=True, seed=1)
    assert again.take(4) + again.take(13) == (first + second)[:17]
    assert PromptLoader(PROMPTS, 5, shuffle=True, seed=2).take(10) != first


def test_state_continues_the_stream():
    loader = PromptLoader(PROMPTS, 5, shuffle=True)
    loader.take(7)
    state = loader.state_dict()
    expected = loader.take(9)
    resumed = PromptLoader(PROMPTS, 5, shuffle=True)
    resumed.load_state_dict(state)
    assert resumed.take(9) == expected


@pytest.mark.parametrize("shuffle", [True, False])
def test_processes_share_each_batch(shuffle):
    whole = [b.prompts for b in PromptLoader(PROMPTS, 4, shuffle, seed=3)]
    parts = [list(PromptLoader(PROMPTS, 2, shuffle, 3, rank, 2)) for rank in (0, 1)]
    assert len(parts[0]) == len(parts[1]) == len(whole) == (2 if shuffle else 3)
    for batch, one, two in zip(whole, *parts, strict=True):
        assert sorted(batch) == sorted(one.prompts + two.prompts)
    if not shuffle:
        assert [p for batch in whole for p in batch] == [text for text, _ in PROMPTS]


def test_data_module_opens_files_before_training(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.txt"):
        PromptDataModule("shapes-train", "nowhere.txt").setup("fit")
    with pytest.raises(ValueError, match="`batch_size` must be positive, got 0"):
        PromptDataModule("shapes-train", "shapes-heldout", batch_size=0)
    data = PromptDataModule("shapes-train", "shapes-heldout", val_size=10, batch_size=4)
    data.setup("fit")
    assert [len(b) for b in data.val_dataloader()] == [4, 4, 2]


def test_shipped_lists_are_what_their_generator_writes():
    lists = shapes_prompts.prompt_lists()
    assert sorted([*lists, "simple-animals"]) == shipped_prompts()
    for name, facts in lists.items():
        path = shapes_prompts.FOLDER / f"{name}.jsonl"
        assert path.read_text(encoding="utf-8") == shapes_prompts.lines(facts)
        split = name.split("-")[-1]
        split = split if split in ("heldout", "unseen") else "train"
        if name != "shapes-uncolored-test":  # of all that the training list lacks
            assert {split_of(f) for f in facts} == {split}
        text, metadata = PromptFile(name)[0]
        assert caption(Facts.from_metadata(metadata)) == text


def test_lists_of_relations_numbers_and_open_colours():
    lists = shapes_prompts.prompt_lists()
    # All there are, 288 = 18 x 4 x (3 + 1): a shape with a seen colour or none, 3 backgrounds or
    # none; two objects with 2 sizes or none, or three.
    for name, count in (("shapes-counts", 261), ("shapes-counts-heldout", 27)):
        assert len(set(lists[name])) == len(lists[name]) == count
        assert {f.kind for f in lists[name]} == {"count"}
    for name, count in (("shapes-relations", 1000), ("shapes-relations-heldout", 192)):
        assert len(set(lists[name])) == len(lists[name]) == count
        assert {f.kind for f in lists[name]} == {"relation"}
    train, test = lists["shapes-uncolored"], lists["shapes-uncolored-test"]
    assert len(set(train)) == len(train) == 53
    assert [len(set(test[i : i + 16])) for i in range(0, len(test), 16)] == [1] * 31
    # All there are of one object: 3 shapes, 3 sizes or none stated, 3 backgrounds or none stated;
    # of two equal ones the same, of three there are no sizes.
    kinds = Counter(len(f.objects) for f in {*train, *test})
    assert kinds == {1: 36, 2: 36, 3: 12}
    assert not any(item.color for f in train + test for item in f.objects)
    assert {"train", "heldout"} == {split_of(f) for f in test}
    assert len(lists["shapes-colored-heldout"]) == 192
    assert all(item.color for f in lists["shapes-colored-heldout"] for item in f.objects)

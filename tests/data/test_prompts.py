import json
from collections import Counter

import pytest

from lit_align.benchmarks import shapes_prompts
from lit_align.data.prompt_files import PromptFile, is_held_out, shipped_prompts
from lit_align.data.prompts import PromptDataModule, PromptLoader
from lit_align.rewards.composition import named_objects
from lit_align.shapes.grammar import caption, split_of
from lit_align.shapes.scene import Facts
from lit_align.verbs import _read_prompts

# Beside those of the shapes world; of each there is a held-out part too.
OWN = ("simple-animals", "animal-activities", "everyday-scenes", "object-pairs", "counted-objects",
       "rendered-text", "portraits-of-people")  # fmt: skip
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


def test_fingerprints_of_files_without_options_are_those_of_their_content(tmp_path):
    """Checkpoints hold them: blake2b of the bytes, eight of them, as `b2sum -l 64` prints it."""
    path = tmp_path / "a.txt"
    path.write_text("one\n\n  two  \n")
    assert PromptFile(path).fingerprint == "cff7ae083708a307"
    assert PromptFile("simple-animals").fingerprint == "479cdd1fb6805edc"
    assert PromptFile(path, deduplicate=True).fingerprint != PromptFile(path).fingerprint


GENEVAL = {"tag": "counting", "include": [{"class": "cup", "count": 2}], "prompt": "two cups"}


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("hpdv2.json", '["a cat", "a \\"dog\\""]', [("a cat", None), ('a "dog"', None)]),
        (
            "imagereward.json",
            '[{"id": "7", "prompt": "ä cat"},\n {"id": "8", "prompt": "a dog"}]',
            [("ä cat", {"id": "7", "prompt": "ä cat"}), ("a dog", {"id": "8", "prompt": "a dog"})],
        ),
        ("geneval.jsonl", json.dumps(GENEVAL), [("two cups", GENEVAL)]),
        ("other.jsonl", '{"caption": "a"}\n{"caption": "b"}', [("a", None), ("b", None)]),
        ("known.jsonl", '{"text": "x", "prompt": "a", "metadata": null}', [("a", None)]),
        (
            "drawbench.csv",
            'Prompts,Category\r\n"a ""sign"",\nlarge",Text\r\nred car,Colors\r\n',
            [
                ('a "sign",\nlarge', {"Prompts": 'a "sign",\nlarge', "Category": "Text"}),
                ("red car", {"Prompts": "red car", "Category": "Colors"}),
            ],
        ),
        ("plain.csv", "\ufeffcaption\na\n\nb\n", [("a", None), ("b", None)]),
        (
            "parti.tsv",
            'Prompt\tNote\nthe word "Fly" on a wall\t\n"a ""x"""\tq\r\n"b" and "c"\t\n',
            [
                ('the word "Fly" on a wall', {"Prompt": 'the word "Fly" on a wall', "Note": ""}),
                ('a "x"', {"Prompt": 'a "x"', "Note": "q"}),
                ('"b" and "c"', {"Prompt": '"b" and "c"', "Note": ""}),
            ],
        ),
    ],
)
def test_layouts_of_public_prompt_sets(tmp_path, name, content, rows):
    path = tmp_path / name
    path.write_bytes(content.encode())
    file = PromptFile(path)
    assert list(file) == rows
    assert file[-1] == rows[-1]


def test_captions_of_parquet_files_without_the_pictures_beside_them(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"caption": ["a", "b", "a"], "jpg_0": [b"1"] * 3, "label_0": [0.5] * 3}
    parquet.write_table(pa.table(columns), tmp_path / "pick.parquet", row_group_size=2)
    file = PromptFile(tmp_path / "pick.parquet", deduplicate=True)
    assert list(file) == [("a", None), ("b", None)]
    columns = {"text": ["a", "b"], "style": ["x", "y"], "metadata": [{"k": 1}, {"k": 2}]}
    parquet.write_table(pa.table(columns), tmp_path / "more.parquet")
    file = PromptFile(tmp_path / "more.parquet", category="y", category_key="style")
    assert list(file) == [("b", {"k": 2})]


def test_prompt_key_decides_among_fields(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("Prompt,Caption\na,b\n")
    assert PromptFile(path, prompt_key="Caption")[0][0] == "b"
    with pytest.raises(ValueError, match=r"a\.csv, line 2: expected an object with a 'Text', got"):
        PromptFile(path, prompt_key="Text")
    text = tmp_path / "a.txt"
    text.write_text("a")
    with pytest.raises(ValueError, match="a text has no field 'prompt'; leave `prompt_key` out"):
        PromptFile(text, prompt_key="prompt")
    with pytest.raises(ValueError, match="no category to choose by"):
        PromptFile(text, category="Text")


def test_categories_choose_rows(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("Prompts,Category\na,Text\nb,Colors\nc,Counting\na,Colors\n")
    assert [text for text, _ in PromptFile(path, category="Colors")] == ["b", "a"]
    assert [text for text, _ in PromptFile(path, category=["Text", "Counting"])] == ["a", "c"]
    with pytest.raises(
        ValueError, match=r"no Category in \['Color'\]; it has 'Colors', 'Counting'"
    ):
        PromptFile(path, category="Color")
    assert len(PromptFile("counted-objects", category="counting")) == 48  # the metadata's tag


def test_held_out_part_is_decided_by_each_text_alone(tmp_path):
    texts = [f"prompt {i}" for i in range(2000)]
    path, backwards = tmp_path / "a.txt", tmp_path / "b.txt"
    path.write_text("\n".join(texts))
    backwards.write_text("\n".join([*texts[1000::-1], *texts[:5]]))
    parts = [{t for t, _ in PromptFile(path, held_out=0.1, part=p)} for p in ("train", "held_out")]
    assert parts[0] | parts[1] == set(texts)
    assert not parts[0] & parts[1]
    # A binomial of 2000 and 0.1 has a standard deviation of 13.4.
    assert abs(len(parts[1]) - 200) < 4 * 13.4
    assert {t for t, _ in PromptFile(backwards, held_out=0.1, part="held_out")} <= parts[1]
    assert parts[1] < {t for t in texts if is_held_out(t, 0.2)}
    # The first 8 bytes of b2sum -l 64, as a share of 2**64: 0x3327 / 0x10000 = 0.1998
    assert is_held_out("cat", 0.201)
    assert not is_held_out("cat", 0.199)


def test_data_module_holds_out_a_part_of_one_file(tmp_path):
    path = str(tmp_path / "a.csv")
    rows = [f"prompt {i},{'even' if i % 2 == 0 else 'odd'}" for i in range(400)] * 2
    (tmp_path / "a.csv").write_text("\n".join(["Prompts,Category", *rows]))
    data = PromptDataModule(path, held_out=0.25, category="even", deduplicate=True)
    data.setup("fit")
    train, val = ({text for text, _ in data.files[split]} for split in ("train", "val"))
    assert train | val == {f"prompt {i}" for i in range(0, 400, 2)}
    assert not train & val
    assert len(data.files["train"]) == len(train)
    data.setup("test")
    assert {text for text, _ in data.files["test"]} == val
    mixed = PromptDataModule(path, "simple-animals", category="odd", prompt_key="Prompts")
    mixed.setup("fit")
    assert [len(mixed.files[split]) for split in ("train", "val")] == [400, 45]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": "a.txt"}, "`val` is missing; .*`held_out: 0.1`"),
        ({"train": "a.txt", "val": "b.txt", "held_out": 0.1}, "`val` names others, 'b.txt'"),
        ({"train": {"x": "a.txt", "y": "b.txt"}, "held_out": 0.1}, "`train` names several"),
        ({"train": "a.txt", "held_out": 1.0}, r"share in \[0, 1\), got 1.0"),
        (
            {"train": "simple-animals", "val": "simple-animals", "category": "x"},
            "`category` is for files given by their paths",
        ),
    ],
)
def test_data_module_refuses_what_cannot_be_meant(options, message):
    with pytest.raises(ValueError, match=message):
        PromptDataModule(**options)


def test_an_empty_part_is_told(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("cat\n")
    with pytest.raises(ValueError, match="held-out part of .* is empty with `held_out` 0.001"):
        PromptFile(path, held_out=0.001, part="held_out")


def test_generate_reads_shipped_lists_and_files_of_any_layout(tmp_path):
    assert _read_prompts(["simple-animals"])[:2] == ["cat", "dog"]
    path = tmp_path / "a.json"
    path.write_text('["one", "two"]')
    assert _read_prompts([str(path)]) == ["one", "two"]
    assert _read_prompts(["a red circle"]) == ["a red circle"]
    assert _read_prompts("simple-animals")[:2] == ["cat", "dog"]
    assert _read_prompts("a red circle") == ["a red circle"]


@pytest.mark.parametrize("name", OWN)
def test_shipped_sets_have_a_held_out_part_of_their_own(name):
    parts = [list(PromptFile(part)) for part in (name, f"{name}-heldout")]
    for part in parts:
        texts = [text for text, _ in part]
        assert len(set(texts)) == len(texts)
        assert all(text == text.strip() for text in texts)
    assert not {text for text, _ in parts[0]} & {text for text, _ in parts[1]}
    for text, metadata in parts[0] + parts[1]:
        if name == "object-pairs":
            assert all(thing in text for thing in named_objects(text, metadata))
        elif name == "rendered-text":
            assert text.split('"')[1] == metadata["text"]
        elif name == "counted-objects":
            (wanted,) = metadata["include"]
            number = ("two", "three", "four", "five")[wanted["count"] - 2]
            assert f"{number} {wanted['class']}s" in text == metadata["prompt"]
        elif name == "animal-activities":
            assert text.endswith(f" {metadata['animal']} {metadata['activity']}")


def test_only_offsets_are_kept_in_memory(tmp_path):
    path = tmp_path / "many.txt"
    path.write_text("\n".join(f"prompt number {i}" for i in range(20_000)))
    file = PromptFile(path)
    assert len(file) == 20_000
    assert file[19_999] == ("prompt number 19999", None)
    assert file._addresses.nbytes == 8 * 20_000


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("missing.txt", None, FileNotFoundError, "no prompts file.*shipped lists: .*shapes-train"),
        ("empty.txt", "\n \n", ValueError, "is empty"),
        ("a.xml", "x", ValueError, "must end in .txt, .jsonl, .json, .csv, .tsv or .parquet"),
        ("bad.jsonl", '{"prompt": "a"}\n{"text": "b"}', ValueError, "line 2: expected.*'prompt'"),
        ("worse.jsonl", "{", ValueError, "line 1"),
        ("null.jsonl", '{"prompt": null}', ValueError, "line 1: expected.*'prompt'"),
        ("empty.csv", "", ValueError, "is empty; its first line is a header"),
        ("blank.csv", 'Prompts,Category\n"\n",x', ValueError, "line 2: the prompt is empty"),
        ("two.csv", "Prompts,Caption\na,b", ValueError, "line 2: any of 'Prompts', 'Caption' may"),
        (
            "none.csv",
            "id,words\n1,b",
            ValueError,
            "line 2: .* fields 'id', 'words'; set `prompt_key`",
        ),
        ("cut.csv", 'prompt\n"a', ValueError, "cannot be read from line 2"),
        ("wide.tsv", "Prompt\tNote\na\tb\tc", ValueError, "line 2: expected 2 fields.*got 3"),
        ("cut.json", '["a", "b"', ValueError, "not a whole JSON array"),
        ("number.json", '["a", 3]', ValueError, "entry 2: expected an object, got '3'"),
        ("latin.txt", b"caf\xe9", ValueError, "line 1: 'utf-8'.*; write the file in UTF-8"),
        ("a.parquet", "x", ValueError, "not a whole parquet file"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, content, error, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
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
    assert {*lists, *OWN, *(f"{name}-heldout" for name in OWN)} == set(shipped_prompts())
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

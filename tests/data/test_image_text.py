import io
import json
import tarfile

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image

from lit_align.algorithms.pretraining import DenoisingPretraining
from lit_align.data.image_files import ImageTextFiles
from lit_align.data.image_text import ImageTextDataModule, PairStream, ShapesPairs
from lit_align.shapes.grammar import parse, states_colors
from tests.conftest import tiny_policy

SIZE = 32


def picture(number, width=SIZE, height=SIZE):
    """Return random pixels [height, width, 3]."""
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(pixels, form="png", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()


def write_folder(folder, count=4):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{number}.png").write_bytes(encoded(picture(number)))
        (folder / f"{number}.txt").write_text(f"picture {number}\n")
    return folder


def write_tar(path, members):
    with tarfile.open(path, "w") as shard:
        for name, content in members.items():
            content = content if isinstance(content, bytes) else content.encode()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    return path


def lines(rows):
    return "\n".join(json.dumps(row) for row in rows) + "\n\n"


def write_source(kind, root):
    """Write four pairs in one of the ways and return their source."""
    folder = write_folder(root / "pairs")
    if kind == "folder":
        (folder / ".hidden.png").write_bytes(b"")
        (folder / "readme.txt").write_text("not a caption")
        return folder
    if kind == "metadata":
        rows = [{"file_name": f"{n}.png", "text": f"picture {n}"} for n in range(4)]
        (folder / "metadata.jsonl").write_text(lines(rows))
        return str(folder)
    if kind == "jsonl":
        rows = [{"image": f"pairs/{n}.png", "prompt": f" picture {n}"} for n in range(4)]
        (root / "pairs.jsonl").write_text(lines(rows))
        return root / "pairs.jsonl"
    shards = []
    for first in (0, 2):
        members = {"._0.png": "x", "stats.json": '{"pairs": 2}', "0.cls": "7"}
        for number in (first + 1, first):  # keys need not be in order
            members |= {f"./{number}.png": encoded(picture(number))}
            members |= {f"./{number}.json": json.dumps({"caption": f"picture {number}"})}
            if number % 2:
                members |= {f"./{number}.json": "{}", f"./{number}.txt": f"picture {number}\n"}
        shards.append(str(write_tar(root / f"shard-{first}.tar", members)))
    return str(root / "shard-*.tar") if kind == "glob" else shards


@pytest.mark.parametrize("kind", ["folder", "metadata", "jsonl", "glob", "shards"])
def test_every_kind_of_source_gives_the_same_pairs(tmp_path, kind):
    pairs = ImageTextFiles(write_source(kind, tmp_path), SIZE)
    assert len(pairs) == 4
    for number in (3, 0, 2, 1):
        item = pairs[number]
        assert (item["prompt"], item["index"]) == (f"picture {number}", number)
        assert item["image"].shape == (3, SIZE, SIZE)
        pixels = torch.from_numpy(picture(number)).permute(2, 0, 1)
        assert torch.equal(item["image"], pixels.float() / 255)


def test_a_folder_takes_subfolders_and_all_suffixes(tmp_path):
    folder = write_folder(tmp_path / "pairs", 1)
    write_folder(folder / "more", 1)
    for number, name in enumerate(["a.JPG", "b.jpeg", "c.webp"]):
        form = "webp" if name.endswith("webp") else "jpeg"
        (folder / name).write_bytes(encoded(picture(number), form))
        (folder / name).with_suffix(".txt").write_text(name)
    pairs = ImageTextFiles(folder, SIZE)
    assert [pair.prompt for pair in pairs.pairs] == [
        "picture 0", "a.JPG", "b.jpeg", "c.webp", "picture 0",
    ]  # fmt: skip
    assert all(pairs[number]["image"].shape == (3, SIZE, SIZE) for number in range(5))


@pytest.mark.parametrize("shape", [(64, 40), (40, 64), (10, 33), (33, 10), (100, 100), (7, 7)])
def test_images_are_scaled_and_cropped_to_squares(tmp_path, shape):
    width, height = shape
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.png").write_bytes(encoded(np.full((height, width, 3), 51, dtype=np.uint8)))
    image = ImageTextFiles(tmp_path, 20)[0]["image"]
    torch.testing.assert_close(image, torch.full((3, 20, 20), 0.2))


def test_the_crop_is_central(tmp_path):
    pixels = picture(0, width=SIZE + 8)
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.png").write_bytes(encoded(pixels))
    image = ImageTextFiles(tmp_path, SIZE)[0]["image"]
    expected = torch.from_numpy(pixels[:, 4:-4].copy()).permute(2, 0, 1).float() / 255
    assert torch.equal(image, expected)


def test_shrinking_averages_neighbours(tmp_path):
    checkers = np.indices((64, 64)).sum(axis=0) % 2 * 255
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.png").write_bytes(encoded(checkers.astype(np.uint8)))  # grey becomes RGB
    image = ImageTextFiles(tmp_path, 8)[0]["image"]
    assert (image - 0.5).abs().max() < 0.05


def test_photographs_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # orientation: upside down
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.png").write_bytes(encoded(picture(0), exif=exif))
    image = ImageTextFiles(tmp_path, SIZE)[0]["image"]
    expected = torch.from_numpy(picture(0)).permute(2, 0, 1).flip(1, 2).float() / 255
    assert torch.equal(image, expected)


def broken_source(case, root):
    png = encoded(picture(0))
    single = {
        "suffix": ("a.csv", "x"),
        "zipped": ("a.tar.gz", "x"),
        "empty jsonl": ("a.jsonl", "\n"),
        "no object": ("a.jsonl", '\n{"image": "a.png"}'),
        "no text": ("a.jsonl", '{"image": "a.png", "prompt": null}'),
        "empty prompt": ("a.jsonl", '{"image": "a.png", "prompt": " "}'),
    }
    members = {
        "no caption in a shard": {"a.png": png},
        "no image in a shard": {"a.txt": "a", "a.gif": "x"},
        "two images": {"a.png": png, "a.jpg": png, "a.txt": "a"},
        "json without caption": {"a.png": png, "a.json": '{"text": "a"}'},
        "broken json": {"a.png": png, "a.json": "{"},
        "empty shard": {"b.cls": "1"},
    }
    if case in single:
        name, content = single[case]
        (root / name).write_text(content)
        return root / name
    if case in members:
        return write_tar(root / "a.tar", members[case])
    return {
        "missing": str(root / "nothing-*.tar"),
        "missing shard": [str(root / "nothing.tar")],
        "empty folder": root,
    }[case]


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        ("missing", FileNotFoundError, "no source of image-text pairs '.*nothing.*give a folder"),
        ("missing shard", FileNotFoundError, "no shard '.*nothing.tar'"),
        ("empty folder", ValueError, "has no image-text pair; images end in .png"),
        ("suffix", ValueError, "must be a folder, or end in .jsonl or .tar, got '.*a.csv'"),
        ("zipped", ValueError, "must be a folder, or end in .jsonl or .tar"),
        ("empty jsonl", ValueError, "has no image-text pair"),
        ("no object", ValueError, "a.jsonl, line 2: expected.*'image' and 'prompt', got"),
        ("no text", ValueError, "a.jsonl, line 1: expected"),
        ("empty prompt", ValueError, "a.jsonl, line 1: expected"),
        ("no caption in a shard", ValueError, "a.tar' has no caption for 'a.png'; add a .txt"),
        ("no image in a shard", ValueError, "a.tar' has a caption 'a.txt' without an image"),
        ("two images", ValueError, "two members for one key, 'a.png' and 'a.jpg'"),
        ("json without caption", ValueError, "'caption' or 'prompt' in '.*a.tar, member a.json'"),
        ("broken json", ValueError, "'caption' or 'prompt' in '.*a.tar, member a.json'"),
        ("empty shard", ValueError, "has no image-text pair"),
    ],
)
def test_bad_sources_are_refused_at_once(tmp_path, case, error, message):
    with pytest.raises(error, match=message):
        ImageTextFiles(broken_source(case, tmp_path), SIZE)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "has no caption '1.txt'"), (b" \n", "1.txt' is empty"), (b"\xff", "is not UTF-8")],
)
def test_a_missing_caption_in_a_folder_is_told_of_at_once(tmp_path, content, message):
    caption = write_folder(tmp_path) / "1.txt"
    caption.unlink()
    if content is not None:
        caption.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        ImageTextFiles(tmp_path, SIZE)


@pytest.mark.parametrize("cut", ["payload", "header", "garbage"])
def test_a_damaged_shard_is_refused(tmp_path, cut):
    members = {f"{n}.{s}": c for n in range(3) for s, c in (("png", encoded(picture(n))),
                                                            ("txt", "a"))}  # fmt: skip
    path = write_tar(tmp_path / "a.tar", members)
    content = path.read_bytes()
    with tarfile.open(path) as shard:
        last = shard.getmembers()[-2]
    end = {"payload": last.offset_data + 100, "header": last.offset + 100}.get(cut)
    noise = bytes(512) if end else b"\x01" * 512
    path.write_bytes(content[:end] if end else content[: last.offset] + noise)
    with pytest.raises(ValueError, match="a.tar' is not a whole, uncompressed tar file"):
        ImageTextFiles(path, SIZE)


def test_a_missing_or_broken_image_is_named_when_it_is_opened(tmp_path):
    folder = write_folder(tmp_path / "pairs")
    pairs = ImageTextFiles(folder, SIZE)
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "2.png").unlink()
    (folder / "3.png").write_bytes(encoded(np.zeros((SIZE, SIZE), dtype=np.uint16)))
    with pytest.raises(ValueError, match="image '.*1.png' cannot be read.*replace it"):
        pairs[1]
    with pytest.raises(FileNotFoundError, match="no image '.*2.png'; restore it"):
        pairs[2]
    with pytest.raises(ValueError, match="3.png' cannot be read .mode 'I;16', but at most 8 bits"):
        pairs[3]
    shard = write_tar(tmp_path / "a.tar", {"x/a.png": whole[:50], "x/a.txt": "a"})
    with pytest.raises(ValueError, match="image '.*a.tar, member x/a.png' cannot be read"):
        ImageTextFiles(shard, SIZE)[0]


PAIRS = [{"image": torch.full((3, 2, 2), n / 7), "prompt": str(n), "index": n} for n in range(7)]


def test_a_lap_of_the_stream_visits_each_pair_once_in_a_new_order():
    stream = PairStream(PAIRS, seed=1)
    laps = [stream.batch(number, 7).prompts for number in range(3)]
    assert [sorted(lap) for lap in laps] == [[str(n) for n in range(7)]] * 3
    assert laps[0] != laps[1] != laps[2]
    assert PairStream(PAIRS, seed=2).batch(0, 7).prompts != laps[0]
    across = PairStream(PAIRS, seed=1).batch(0, 21)  # one batch over three laps
    assert across.prompts == [prompt for lap in laps for prompt in lap]
    assert across.positions.tolist() == list(range(21))


def test_a_batch_of_the_stream_is_a_function_of_its_number():
    stream = PairStream(PAIRS, seed=1)
    forward = [stream.batch(number, 3) for number in range(6)]
    for number in (5, 0, 3):
        fresh = PairStream(PAIRS, seed=1).batch(number, 3)
        for batch in (fresh, stream.batch(number, 3)):
            assert batch.prompts == forward[number].prompts
            assert torch.equal(batch.images, forward[number].images)
            assert torch.equal(batch.positions, forward[number].positions)
    assert forward[1].images.shape == (3, 3, 2, 2)
    assert forward[1].positions.dtype == torch.int64


def test_processes_share_the_batches_of_one():
    whole = PairStream(PAIRS, seed=1)
    parts = [PairStream(PAIRS, 1, rank, 2) for rank in (0, 1)]
    for number in range(5):
        one = whole.batch(number, 6)
        shares = [part.batch(number, 3) for part in parts]
        for rank, share in enumerate(shares):
            assert share.positions.tolist() == one.positions[rank::2].tolist()
            assert share.prompts == one.prompts[rank::2]
            assert torch.equal(share.images, one.images[rank::2])


def test_the_fingerprint_tells_datasets_apart():
    original = PairStream(PAIRS, seed=1).fingerprint
    assert PairStream(list(PAIRS), seed=2).fingerprint == original
    others = [PAIRS[:-1], PAIRS[::-1], [*PAIRS[:-1], {**PAIRS[-1], "prompt": "x"}]]
    assert original not in [PairStream(other, seed=1).fingerprint for other in others]
    rendered = PairStream(ShapesPairs(3, seed=0), seed=0)
    assert rendered.batch(0, 2).images.shape == (2, 3, SIZE, SIZE)


def test_rendered_pairs_may_state_all_colors():
    drawn, colored = (
        [states_colors(parse(text)) for text in ShapesPairs(40, seed=0, colored=only).captions]
        for only in (False, True)
    )
    assert not all(drawn)
    assert colored == [True] * 40


def test_a_stream_needs_pairs():
    with pytest.raises(ValueError, match="at least one pair"):
        PairStream([], seed=0)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loaders(tmp_path, num_workers):
    source = str(write_folder(tmp_path / "pairs", 5))
    data = ImageTextDataModule(source, SIZE, 2, val_source=source, num_workers=num_workers, seed=3)
    data.setup("fit")
    assert len(data.train) == 5
    batches = list(data.train_dataloader())
    assert [batch["image"].shape for batch in batches] == [(2, 3, SIZE, SIZE)] * 2
    again = [batch["prompt"] for batch in data.train_dataloader()]
    assert [batch["prompt"] for batch in batches] == again
    indices = torch.cat([batch["index"] for batch in data.val_dataloader()])
    assert indices.tolist() == list(range(5))


def test_the_data_module_refuses_what_cannot_train(tmp_path):
    source = str(write_folder(tmp_path / "pairs"))
    with pytest.raises(ValueError, match="has 4 pairs, too few.*set `batch_size: 4`"):
        ImageTextDataModule(source).setup("fit")
    with pytest.raises(ValueError, match="no pairs to validate on; set `val_source`"):
        ImageTextDataModule(source).setup("validate")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ImageTextDataModule(source, SIZE, 2, val_source="nowhere").setup("fit")
    with pytest.raises(ValueError, match="`batch_size` must be positive, got 0"):
        ImageTextDataModule(source, batch_size=0)
    with pytest.raises(ValueError, match="`image_size` must be positive, got 0"):
        ImageTextDataModule(source, image_size=0)


@pytest.mark.parametrize("validate", [True, False])
def test_pretraining_takes_pairs_from_files(tmp_path, validate):
    source = str(write_folder(tmp_path / "pairs"))
    data = ImageTextDataModule(source, SIZE, 2, val_source=source if validate else None)
    module = DenoisingPretraining(tiny_policy("sd", train="full"), lr=1e-2, warmup_steps=1)
    before = [p.detach().clone() for p in module.policy.denoiser.parameters()]
    trainer = Trainer(
        max_steps=2,  # one pass
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    assert ("val/loss" in trainer.callback_metrics) == validate
    after = list(module.policy.denoiser.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))

"""The public layouts of preferences, from tiny files with their true columns to an update."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from pyarrow import parquet

from lit_align.algorithms import RewardModeling
from lit_align.data.preferences import PreferenceDataModule
from tests.algorithms.judgements import learned, make_dpo
from tests.data.test_preference_files import VIDEO_COLUMNS, pickapic_row


def pickapic(folder):
    rows = [pickapic_row(i) for i in range(4)]
    parquet.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    return folder / "a.parquet"


def hpdv2(folder):
    row = {"file_path": ["0.png", "1.png"], "human_preference": [0, 1]}
    return written(folder, [{"prompt": f"p{i}", **row} for i in range(4)])


def imagereward(folder):
    row = {"generations": ["0.png", "1.png", "2.png"], "ranking": [2, 1, 3]}
    return written(folder, [{"id": f"{i}", "prompt": f"p{i}", **row} for i in range(4)])


def written(folder, rows):
    (folder / "a.json").write_text(json.dumps(rows))
    return folder / "a.json"


def videoreward(folder):
    for name, level in (("a", 0), ("b", 50)):
        frames = [Image.new("RGB", (32, 32), (level + i,) * 3) for i in range(3)]
        frames[0].save(folder / f"{name}.gif", save_all=True, append_images=frames[1:])
    rows = [("a.gif", "b.gif", f"p{i}", "A", "B", "B", "8", "3", "8", "3") for i in range(4)]
    return table(folder, VIDEO_COLUMNS, rows)


def kto(folder):
    words = ["exclusive_win", "exclusive_lose"]
    rows = [(f"{i % 3}.png", f"p{i}", words[i % 2]) for i in range(4)]
    return table(folder, ("file_path", "caption", "label"), rows)


def table(folder, columns, rows):
    with (folder / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return folder / "a.csv"


@pytest.mark.parametrize("layout", [pickapic, hpdv2, imagereward, videoreward, kto])
def test_a_public_layout_is_trained_on(layout):
    folder = Path.cwd()
    for number in range(3):
        Image.new("RGB", (40, 32), (60 * number, 20, 90)).save(f"{number}.png")
    options = {"unit": "ratings"} if layout is kto else {}
    data = PreferenceDataModule(
        str(layout(folder)), format=layout.__name__, batch_size=2, image_size=32, **options
    )
    modules = [make_dpo("sd3", "full", loss_type="kto" if layout is kto else "sigmoid")]
    if layout is not kto:  # a reward model compares images
        modules.append(RewardModeling(learned("linear"), lr=1e-2))
    for module in modules:
        before = [p.clone() for p in module.parameters() if p.requires_grad]
        trainer = Trainer(
            accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        )  # fmt: skip
        trainer.fit(module, datamodule=data)
        after = [p for p in module.parameters() if p.requires_grad]
        assert trainer.global_step == 2
        assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))

import csv
import errno
from pathlib import Path

import pytest
import torch

from lit_align.run_folder import (
    AtomicCheckpointIO,
    RunCSVLogger,
    RunFolder,
    newest_checkpoint,
    read_checkpoint,
)


def rows(folder):
    with (folder.path / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_versions_count_up_and_are_found_again(tmp_path):
    first, second = RunFolder.new(str(tmp_path), "a"), RunFolder.new(str(tmp_path), "a")
    assert [first.version, second.version] == [0, 1]
    assert RunFolder.new(str(tmp_path), "b").version == 0
    checkpoint = second.path.absolute() / "checkpoints" / "x.ckpt"
    checkpoint.parent.mkdir()
    checkpoint.touch()
    found = RunFolder.of_checkpoint(str(checkpoint))
    assert found.path == second.path
    assert newest_checkpoint(str(tmp_path), "a") == checkpoint
    assert newest_checkpoint(str(tmp_path), "b") is None
    assert RunFolder.of_checkpoint(str(tmp_path / "x.ckpt")) is None


def test_both_loggers_write_into_the_folder(tmp_path):
    folder = RunFolder.new(str(tmp_path), "a")
    assert {Path(logger.log_dir) for logger in folder.loggers()} == {folder.path}


def test_metrics_are_continued_and_cut_back(tmp_path):
    folder = RunFolder.new(str(tmp_path), "a")
    logger = RunCSVLogger(tmp_path, "a", 0, flush_logs_every_n_steps=1)
    for step in range(4):
        logger.log_metrics({"x": step}, step)
    resumed = RunCSVLogger(tmp_path, "a", 0, flush_logs_every_n_steps=1)
    resumed.experiment.keep(2)
    assert [row["x"] for row in rows(folder)] == ["0", "1"]
    resumed.log_metrics({"x": 20, "y": 1}, 2)
    assert [(row["step"], row["x"], row["y"]) for row in rows(folder)] == [
        ("0", "0", ""), ("1", "1", ""), ("2", "20", "1")]  # fmt: skip


def test_a_checkpoint_takes_its_place_whole(tmp_path):
    path = tmp_path / "folder" / "a.ckpt"
    writer = AtomicCheckpointIO()
    writer.save_checkpoint({"x": torch.ones(2)}, path)
    writer.save_checkpoint({"x": torch.zeros(2)}, path)
    assert torch.equal(writer.load_checkpoint(path)["x"], torch.zeros(2))
    assert [p.name for p in path.parent.iterdir()] == ["a.ckpt"]


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint({"x": 1}, path)

    def fill(checkpoint, file):
        file.write(b"some bytes")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", fill)
    with pytest.raises(OSError, match=r"could not be written .*No space left.* MB are free"):
        AtomicCheckpointIO().save_checkpoint({"x": 2}, path)
    monkeypatch.undo()
    assert read_checkpoint(path) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


def test_damaged_and_missing_checkpoints_are_told_with_what_else_there_is(tmp_path):
    torch.save({"x": torch.ones(1000)}, tmp_path / "whole.ckpt")
    whole = (tmp_path / "whole.ckpt").read_bytes()
    (tmp_path / "half.ckpt").write_bytes(whole[: len(whole) // 2])
    told = r"half.ckpt' \(\d+ bytes\) is damaged or no checkpoint .* There are also: whole.ckpt"
    with pytest.raises(ValueError, match=told):
        read_checkpoint(tmp_path / "half.ckpt")
    (tmp_path / "half.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match="is damaged or no checkpoint"):
        read_checkpoint(tmp_path / "half.ckpt")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .* also: half.ckpt, whole.ckpt"):
        read_checkpoint(tmp_path / "none.ckpt")


def test_paths_are_the_same_for_a_run_and_its_resume(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    new = RunFolder.new("runs", "a")
    resumed = RunFolder.of_checkpoint(str(tmp_path / "runs/a/version_0/checkpoints/x.ckpt"))
    assert resumed.path == new.path == Path("runs/a/version_0")

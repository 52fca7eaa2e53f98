import errno

import pytest
import torch

from lit_align.checkpoint_io import AtomicCheckpointIO, read_checkpoint


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

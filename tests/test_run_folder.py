import csv
from pathlib import Path

from lit_align.run_folder import RunCSVLogger, RunFolder, newest_checkpoint


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


def test_paths_are_the_same_for_a_run_and_its_resume(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    new = RunFolder.new("runs", "a")
    resumed = RunFolder.of_checkpoint(str(tmp_path / "runs/a/version_0/checkpoints/x.ckpt"))
    assert resumed.path == new.path == Path("runs/a/version_0")

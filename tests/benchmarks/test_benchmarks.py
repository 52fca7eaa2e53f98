import csv

import pytest
import torch

from lit_align.benchmarks import base_quality, grid, overhead
from tests.conftest import tiny_pipeline


def write(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_validation_rows_are_cut_out_of_the_metrics(tmp_path):
    write(
        tmp_path / "metrics.csv",
        [
            {"step": 0, "reward_queries": 0.0, "train/loss": "", "val/reward/r": 0.5},
            {"step": 3, "reward_queries": 8.0, "train/loss": 1.0, "val/reward/r": ""},
            {"step": 3, "reward_queries": 8.0, "train/loss": "", "val/reward/r": 0.75},
        ],
    )
    assert grid.validation_rows(tmp_path / "metrics.csv") == [
        {"reward_queries": 0.0, "val/reward/r": 0.5},
        {"reward_queries": 8.0, "val/reward/r": 0.75},
    ]


def test_grid_skips_finished_runs_and_summarises(tmp_path, monkeypatch, capsys):
    lines = ["seeds: [0, 1]", "runs:", "  a: {config: a.yaml}", "  b: {config: b.yaml}"]
    (tmp_path / "runs.yaml").write_text("\n".join(lines))
    results = tmp_path / "results"
    results.mkdir()
    for seed, last in ((0, 0.7), (1, 0.9)):
        write(
            results / f"a_seed{seed}.csv",
            [
                {"reward_queries": 0.0, "val/reward/r": 0.5},
                {"reward_queries": 8.0, "val/reward/r": last},
            ],
        )
    started = []
    monkeypatch.setattr(grid, "_run", lambda name, run, seed, table: started.append(name))
    grid.grid(str(tmp_path / "runs.yaml"))
    assert started == ["b_seed0", "b_seed1"]
    summary = (results / "summary.md").read_text()
    # gains 0.2 and 0.4: mean 0.3, standard deviation 0.1414
    assert "| a | r | 2 | 8 | 0.5000 | 0.8000 | +0.3000 ± 0.1414 |" in summary
    assert (results / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_overhead_prints_a_ratio(family, tmp_path, capsys):
    tiny_pipeline(family).save_pretrained(tmp_path)
    overhead.overhead([str(tmp_path)], rounds=2, images_per_round=4, num_inference_steps=3)
    row = capsys.readouterr().out.splitlines()[-1].split()
    ratio, speed = float(row[1]), float(row[-1])
    assert ratio > 0.2
    assert speed > 0


def test_bare_loop_replays_every_call_with_its_gradient():
    layer = torch.nn.Linear(2, 2)
    x = torch.ones(3, 2)
    assert overhead._bare_loop([(layer, (x,), {}, False)]) > 0
    assert layer.weight.grad is None
    overhead._bare_loop([(layer, (x,), {}, True)])
    assert layer.weight.grad.abs().sum() > 0


def test_base_quality_prints_a_row_per_number_of_steps(tmp_path, capsys):
    tiny_pipeline("sd").save_pretrained(tmp_path / "tiny")
    base_quality.base_quality([str(tmp_path / "tiny")], [2, 20], 12, output=str(tmp_path))
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 2")]
    assert [row.split("|")[1].strip() for row in rows] == ["2", "20"]
    assert (tmp_path / "tiny_single.png").is_file()

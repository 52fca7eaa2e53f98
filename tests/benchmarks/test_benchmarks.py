import csv
import math
from pathlib import Path

import pytest
import torch
import yaml

from lit_align.benchmarks import base_quality, grid, matched, outcomes, overhead
from lit_align.benchmarks.results import read_results
from lit_align.callbacks import OveroptimizationStopping
from tests.conftest import tiny_pipeline

ROOT = Path(__file__).parent.parent.parent


def write(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_validation_rows_are_cut_out_of_the_metrics(tmp_path):
    write(
        tmp_path / "metrics.csv",
        [
            {"step": 0, "reward_queries": 0.0, "val/reward/r": 0.5, "val/reward_std/r": 0.2},
            {"step": 3, "reward_queries": 8.0, "val/reward/r": "", "val/reward_std/r": ""},
            {"step": 3, "reward_queries": 8.0, "val/reward/r": 0.75, "val/reward_std/r": ""},
        ],
    )
    first, last = grid.validation_rows(tmp_path / "metrics.csv")
    assert first == {"reward_queries": 0.0, "val/reward/r": 0.5, "val/reward_std/r": 0.2}
    assert last["val/reward/r"] == 0.75
    assert math.isnan(last["val/reward_std/r"])


def test_grid_skips_finished_runs_and_summarises(tmp_path, monkeypatch, capsys):
    lines = ["seeds: [0, 1]", "runs:", "  a: {config: a.yaml}", "  b: {config: b.yaml}"]
    (tmp_path / "runs.yaml").write_text("\n".join(lines))
    results = tmp_path / "results"
    results.mkdir()
    for seed, last in ((0, 0.7), (1, 0.9)):
        write(
            results / f"a_seed{seed}.csv",
            [
                {"reward_queries": 0.0, "val/reward/r": 0.5, "val/reward_std/r": 0.5},
                {"reward_queries": 8.0, "val/reward/r": last, "val/reward_std/r": "nan"},
            ],
        )
    started = []
    monkeypatch.setattr(grid, "_run", lambda name, run, seed, table, columns: started.append(name))
    grid.grid(str(tmp_path / "runs.yaml"))
    assert started == ["b_seed0", "b_seed1"]
    summary = (results / "summary.md").read_text()
    # gains 0.2 and 0.4: mean 0.3, standard deviation 0.1414; twice that in units of 0.5
    assert "| a | r | 2 | 8 | 0.5000 | 0.8000 | +0.3000 ± 0.1414 | +0.60 ± 0.28 |" in summary
    assert (results / "curves.png").stat().st_size > 1000


def test_runs_that_stopped_early_are_drawn_as_far_as_all_went():
    def rows(queries):
        return [{"reward_queries": q, "val/reward/r": q / 100} for q in queries]

    figure = grid._draw({"a": [rows([0, 8, 16]), rows([0, 8])]}, {"a": {}})
    assert figure.axes[0].lines[0].get_xdata().tolist() == [0, 8]
    assert figure.axes[0].lines[0].get_ydata().tolist() == [0, 0.08]


@pytest.mark.parametrize(("family", "callbacks"), [("sd", False), ("sd3", True)])
def test_overhead_prints_a_ratio(family, callbacks, tmp_path, capsys):
    tiny_pipeline(family).save_pretrained(tmp_path)
    sizes = {"rounds": 2, "images_per_round": 4, "num_inference_steps": 3}
    overhead.overhead([str(tmp_path)], **sizes, callbacks=callbacks)
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


def test_committed_tables_follow_from_the_committed_results():
    for path in (ROOT / "configs").rglob("runs.yaml"):
        listed = yaml.safe_load(path.read_text())
        results = path.parent / "results"
        curves = {n: read_results(results, n, listed["seeds"]) for n in listed["runs"]}
        expected = {name: len(grid.seeds_of(run, listed)) for name, run in listed["runs"].items()}
        assert {name: len(seeds) for name, seeds in curves.items()} == expected
        summary = grid.summarise(curves, listed["runs"])
        assert (results / "summary.md").read_text() == summary
        document = (path.parent / "README.md").read_text()
        assert summary in document or "(results/summary.md)" in document


MATCHED = [  # the tables of runs at equal gain, and what they were made with
    ("tdpo", (0.5, 1.0, 1.25), "colorfulness", "configs/tdpo/results/unseen.csv"),
    ("tdpo", (0.1, 0.15), "clip", None),
    ("large_scale_rl", (0.4, 0.5), "colorfulness", None),
]


@pytest.mark.parametrize(("method", "levels", "only", "checkpoints"), MATCHED)
def test_committed_runs_at_equal_gain(method, levels, only, checkpoints, capsys):
    folder = ROOT / "configs" / method
    others = str(ROOT / checkpoints) if checkpoints else None
    matched.matched(str(folder / "runs.yaml"), levels, only, others)
    assert capsys.readouterr().out in (folder / "README.md").read_text()


TDPO_RUNS = ROOT / "configs" / "tdpo" / "runs.yaml"
MEASURES = ("diversity", "vendi", "kl")
FOLLOWED = [  # the tables of reward gradients, and what they were made with
    ((0.5, 1.0, 1.5), "refl draft-1 draft-lv draft-4 alignprop drtune nabla nabla_beta3000 adjoint "
     "tdpo:ddpo_colorfulness tdpo:tdpo-r_colorfulness", (*MEASURES, "denoiser_calls")),
    ((0.05, 0.1), "draft-1_clip nabla_clip adjoint_clip tdpo:ddpo_clip",
     (*MEASURES, "denoiser_calls")),
    ((1.0, 2.0), "draft-1 draft-4 draft-8 drtune_full drtune drtune_early nabla_beta300 nabla "
     "nabla_beta3000 adjoint_lambda300 adjoint adjoint_lambda3000", MEASURES),
]  # fmt: skip


@pytest.mark.parametrize(("levels", "names", "measures"), FOLLOWED)
def test_committed_reward_gradients_at_equal_gain(levels, names, measures, capsys):
    folder = ROOT / "configs" / "reward_gradient"
    runs = [name.replace("tdpo:", f"{TDPO_RUNS}:") for name in names.split()]
    matched.matched(str(folder / "runs.yaml"), levels, names=runs, measures=measures)
    assert capsys.readouterr().out in (folder / "README.md").read_text()


def test_committed_flow_matching_at_equal_gain(capsys):
    folder = ROOT / "configs" / "flow_grpo"
    measures = ("diversity", "denoiser_calls")
    matched.matched(str(folder / "runs.yaml"), (0.1, 0.2), measures=measures)
    assert capsys.readouterr().out in (folder / "README.md").read_text()


@pytest.mark.parametrize("table", ["fairness", "tasks"])
def test_committed_outcomes(table, capsys):
    folder = ROOT / "configs" / "large_scale_rl"
    outcomes.outcomes(str(folder / "results" / f"{table}.csv"))
    assert capsys.readouterr().out in (folder / "README.md").read_text()


def trajectory(rows, target):
    """Return what OveroptimizationStopping saw of a committed run, and the held-out names."""
    held_out = [n for n in ("Colorfulness", "ShapesCLIP", "ShapesVerifier") if n != target]

    def gains(name):
        first = rows[0][f"val/reward/{name}"]
        return [(r[f"val/reward/{name}"] - first) / rows[0][f"val/reward_std/{name}"] for r in rows]

    return tuple(held_out), {
        "gain": torch.tensor(gains(target)),
        "held_out_gains": torch.tensor([gains(name) for name in held_out]).T,
        "diversity": torch.tensor([row["val/diversity"] for row in rows]),
    }


def test_committed_results_show_over_optimisation_and_its_absence():
    results = ROOT / "configs" / "ddpo" / "results"
    stopped, slopes = {}, {}
    for run, target in (
        ("colorfulness_shapes-sd", "Colorfulness"),
        ("verifier_shapes-sd", "ShapesVerifier"),
        ("verifier_shapes-sd3", "ShapesVerifier"),
    ):
        seeds = read_results(results, run, [0, 1, 2])
        slopes[run] = [rows[-1]["val/generalization/ShapesCLIP"] for rows in seeds]
        for seed, rows in enumerate(seeds):
            reasons = []
            for length in range(1, len(rows) + 1):
                held_out, points = trajectory(rows[:length], target)
                reasons.append(OveroptimizationStopping().judge(target, held_out, points))
            at = next((r["reward_queries"] for r, reason in zip(rows, reasons, strict=True)
                       if reason), None)  # fmt: skip
            stopped[run, seed] = at
    assert max(slopes["colorfulness_shapes-sd"]) < 0
    assert min(slopes["verifier_shapes-sd"] + slopes["verifier_shapes-sd3"]) > 0.5
    assert [stopped["colorfulness_shapes-sd", s] for s in range(3)] == [2240, 1600, 1920]
    others = [at for (run, _), at in stopped.items() if run.startswith("verifier")]
    assert others == [None] * 6


def ends(method, run, column):
    """Return a column of the base and of the last validation, of each seed of a committed run."""
    seeds = read_results(ROOT / "configs" / method / "results", run, [0, 1, 2])
    assert len(seeds) == 3
    return [(rows[0][column], rows[-1][column]) for rows in seeds]


def test_claims_about_preferences_follow_from_the_committed_results():
    truth = "val/reward/ShapesVerifier"
    for run in ("shapes-sd", "shapes-sd3"):
        rates = ends("diffusion_dpo", run, "val/win_rate/ShapesVerifier")
        assert min(end for _, end in rates) > 0.6
    for base, end in ends("rlhf", "beta0", truth):  # over-optimisation
        assert end < base
    for base, end in ends("rlhf", "beta0", "val/reward/LearnedReward"):
        assert end > base
    for run in ("beta01", "dpo"):
        assert all(end > base for base, end in ends("rlhf", run, truth))
    for run in ("fixed", "refreshed"):
        assert all(end > base + 0.015 for base, end in ends("online_dpo", run, truth))
    plain = ends("preference_losses", "sigmoid", truth)
    for run in ("dmpo", "hinge", "robust"):
        pairs = zip(ends("preference_losses", run, truth), plain, strict=True)
        assert all(better > worse for (_, better), (_, worse) in pairs)

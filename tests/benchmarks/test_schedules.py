import pytest
import torch

from lit_align.algorithms import TPDM
from lit_align.benchmarks import schedule_cost
from lit_align.benchmarks import schedules as benchmark
from lit_align.benchmarks.schedules import (
    MANY,
    SHIFTS,
    STEPS,
    baseline,
    best_fixed,
    comparison,
    noise_levels,
    table,
    walk,
)
from lit_align.functional.noise import randn
from tests.conftest import tiny_policy


def row(name, seed, steps, verifier, error=0.02):
    parts = {"steps": steps, "steps_single": steps - 1, "steps_composed": steps + 1}
    rewards = {"verifier": verifier, "verifier_se": error, "clip": verifier, "clip_se": error}
    return {"schedule": name, "seed": seed, **parts, **rewards}


def fixed_rows(quality):
    return [
        row(f"{shape} {steps}", seed, steps, quality(shape, steps) + 0.01 * (seed - 1))
        for seed in range(3)
        for shape in SHIFTS
        for steps in (*STEPS, MANY)
    ]


def test_levels_of_fixed_schedules():
    torch.testing.assert_close(noise_levels(4), torch.tensor([1, 0.75, 0.5, 0.25, 0]))
    torch.testing.assert_close(noise_levels(2, 3.0), torch.tensor([1, 0.75, 0]))  # 1.5 / 2
    assert (noise_levels(20, 3.0)[1:-1] > noise_levels(20)[1:-1]).all()


def test_a_fixed_schedule_takes_the_familys_own_steps():
    """Flow matching at its own times is the sampler that everything else uses."""
    policy = tiny_policy("sd3", train="none")
    conditioning = policy.encode_prompt(["a red circle", "two squares"])
    options = {"num_inference_steps": 4, "guidance_scale": 1.0, "stochastic_steps": ()}
    seeds = [torch.Generator().manual_seed(k) for k in range(2)]
    expected = policy.sample(conditioning, generator=seeds, **options).latents[:, -1]
    seeds = [torch.Generator().manual_seed(k) for k in range(2)]
    found = walk(policy, conditioning, seeds, policy.scheduler.sigmas, 1.0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    noise = randn(policy.latent_shape(), [torch.Generator().manual_seed(k) for k in range(2)])
    assert (found - noise).abs().max() > 0.1


def test_the_baseline_is_the_fewest_steps_as_good_as_many():
    # 50 steps of the better shape: 0.5; within 0.02 of it are "shifted" ones from 8 on.
    quality = {"uniform": lambda n: 0.45, "shifted": lambda n: 0.5 if n > 6 else 0.4}
    rows = fixed_rows(lambda shape, steps: quality[shape](steps))
    assert baseline(rows, "verifier") == 8
    assert baseline([{**r, "verifier_se": 0.06} for r in rows], "verifier") == 3
    assert baseline([{**r, "verifier_se": 0.0} for r in rows], "verifier") == 8
    rising = fixed_rows(lambda shape, steps: steps / 100)
    assert baseline(rising, "verifier") == MANY


def test_the_table_holds_means_and_spreads():
    rows = [row("gamma 0.9", seed, 8.0 + seed, 0.5 + seed / 10) for seed in range(3)]
    line = table(rows).splitlines()[-1]
    cells = ["gamma 0.9", "9.0 ± 1.0", "0.600 ± 0.100", "0.600 ± 0.100", "8.0 ± 1.0", "10.0 ± 1.0"]
    assert line == f"| {' | '.join(cells)} |"
    assert "| uniform 3 | 3.0 ± 0.0 |" in table([row("uniform 3", s, 3.0, 0.5) for s in range(3)])


def test_learned_schedules_are_compared_at_equal_steps_under_each_seed():
    # Shifted schedules gain 0.1 a step, uniform ones 0.05: with 6.5 steps 0.65, and 0.01 a seed.
    quality = {"uniform": lambda n: n / 20, "shifted": lambda n: min(n, 8) / 10}
    rows = fixed_rows(lambda shape, steps: quality[shape](steps))
    assert best_fixed(rows, "verifier", 1, 6.5) == pytest.approx(0.65)
    assert best_fixed(rows, "verifier", 2, 6.5) == pytest.approx(0.66)
    assert best_fixed(rows, "verifier", 1, 11) == pytest.approx(0.8)
    assert best_fixed(rows, "verifier", 1, 18) == pytest.approx(0.9)
    # Fifty uniform steps give 2.5, which no other comes near: the baseline is 50 itself.
    learned = [row("gamma 0.9", k, 6.5, 0.75 + 0.02 * (k - 1)) for k in range(3)]
    line = comparison([*rows, *learned], "verifier").splitlines()[-1]
    cells = ["6.5 ± 0.0", "0.750 ± 0.020", "0.650 ± 0.010", "+0.100 ± 0.010"]
    cells += ["(0.13)", "+2.00 ± 0.00"]
    assert line == f"| gamma 0.9 | {' | '.join(cells)} |"
    good = [{**r, "verifier": 2.49} for r in learned]
    assert "| 0.13 |" in comparison([*rows, *good], "verifier")


def test_rows_that_are_known_are_not_computed_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "STEPS", (1, 2))
    monkeypatch.setattr(benchmark, "MANY", 3)
    options = {"pretrained": "shapes-sd3", "output": str(tmp_path / "out"), "count": 4}
    benchmark.schedules(**options, seeds=1)
    assert capsys.readouterr().out.count("'seed': 0") == 6
    written = (tmp_path / "out.csv").read_text(encoding="utf-8")
    benchmark.schedules(**options, seeds=2)
    out = capsys.readouterr().out
    assert out.count("'seed': 1") == 6
    assert "'seed': 0" not in out
    assert (tmp_path / "out.csv").read_text(encoding="utf-8").startswith(written)
    assert (tmp_path / "out.png").stat().st_size > 1000


def test_a_run_without_a_schedule_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        benchmark.learned_module(str(tmp_path / "nothing"))


def test_rows_of_the_network_follow_the_steps(monkeypatch, capsys):
    """Finished images cost nothing; guidance makes two rows of a step."""
    policy = tiny_policy("sd3", train="none")
    module = TPDM(policy, head_width=8, t_min=0.02, guidance_scale=3.0)
    torch.nn.init.normal_(module.head.out.weight, std=0.5)  # so that steps differ
    torch.nn.init.normal_(module.head.conv_out.weight, std=0.2)
    torch.nn.init.normal_(module.head.hidden.weight, std=0.2)
    monkeypatch.setattr(schedule_cost, "learned_module", lambda run: module)
    schedule_cost.schedule_cost("a run", images=24, repeats=2, fixed=(4,))
    learned, fixed = ([cell.strip() for cell in line.split("|")] for line in _rows(capsys))
    assert fixed[1:4] == ["4 fixed", "4.00", "8.00"]
    assert float(learned[3]) == pytest.approx(2 * float(learned[2]), abs=0.011)
    assert 0 < float(learned[2]) != round(float(learned[2]))
    assert learned[5] == "1.00"
    assert 0 < float(learned[6].rstrip("%")) < 100
    assert fixed[6] == "0.0%"


def _rows(capsys):
    return capsys.readouterr().out.strip().splitlines()[-2:]

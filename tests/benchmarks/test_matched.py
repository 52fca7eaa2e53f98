import csv
from pathlib import Path

import yaml

from lit_align.benchmarks.matched import matched

COLUMNS = ("reward_queries", "val/reward/t", "val/reward/h", "val/reward_std/t",
           "val/reward_std/h", "val/generalization/h", "val/fid")  # fmt: skip


def write(path, columns, rows):
    with Path(path).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_runs_at_equal_gain_by_hand(capsys):
    Path("results").mkdir()
    runs = {"a": {"config": "x", "title": "A"}, "b": {"config": "x", "title": "B"}}
    Path("runs.yaml").write_text(yaml.safe_dump({"seeds": [0, 1], "runs": runs}))
    for seed, slope in ((0, 1.0), (1, 2.0)):
        rows = [(10 * k, 5 + 2 * slope * k, 1 - 0.4 * k, 2, 4, "nan" if k == 0 else 0.1, k / 10)
                for k in range(3)]  # fmt: skip
        write(f"results/a_seed{seed}.csv", COLUMNS, rows)
    others = [("base", 0, 0.5)] + [
        (f"a_seed{s}", q, 0.5 + q / 100) for s in (0, 1) for q in (10, 20)
    ]
    write("others.csv", ("run", "reward_queries", "unseen/h"), others)
    matched("runs.yaml", levels=(1.0, 4.0), checkpoints="others.csv")
    header, _, one, four = capsys.readouterr().out.splitlines()
    assert cells(header) == ["run", "gain", "reward queries", "h", "FID", "unseen/h"]
    # t gains 1 and 2 units per validation of 10 queries: level 1 after 10 and 5 queries; h falls
    # by a tenth of its unit per validation.
    assert cells(one) == ["a", "1", "8 ± 4", "-0.08 ± 0.04", "0.075 ± 0.035", "+0.075 ± 0.035"]
    assert cells(four) == ["a", "4", "20 (1 of 2)", "-0.20 (1 of 2)", "0.200 (1 of 2)",
                           "+0.200 (1 of 2)"]  # fmt: skip


def test_measures_and_runs_of_another_list(capsys):
    counted = ("reward_queries", "denoiser_calls", *COLUMNS[1:], "val/kl")
    for folder in (".", "other"):
        Path(folder, "results").mkdir(parents=True)
        runs = {"seeds": [0], "runs": {"a": {"config": "x"}}}
        Path(folder, "runs.yaml").write_text(yaml.safe_dump(runs))
    rows = [(10 * k, 80 * k, 5 + 2 * k, 1, 2, 4, 0, 0, 7.5 * k) for k in range(3)]
    write("other/results/a_seed0.csv", counted, rows)
    names, measures = ["a", "other/runs.yaml:a"], ("kl", "denoiser_calls")
    matched("runs.yaml", levels=(1.5,), names=names, measures=measures)
    header, _, row = capsys.readouterr().out.splitlines()
    assert cells(header) == ["run", "gain", "reward queries", "h", "FID", "kl", "denoiser calls"]
    assert cells(row) == ["a", "1.5", "15", "+0.00", "0.000", "11.2", "120"]

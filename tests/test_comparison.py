import csv
import math
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from lit_align.cli import main
from lit_align.comparison import compare, draw, generalization, matched_level, summarise
from lit_align.run_groups import find_runs, group_runs, read_run

# Gains of the trained reward "t" and of the held-out "h", in base standard deviations.
TARGET, HELD_OUT = (0.0, 0.5, 1.0, 1.5, 2.0), (0.0, 0.3, 0.5, 0.4, 0.1)


def write_run(
    folder, seed=0, name="a", target="t", gains=TARGET, others=HELD_OUT, measures=None, **options
):
    """Write a run's folder: base means 1 and 3, standard deviations 2 and 4, 10 queries a round.

    The measures are given per validation; the options overwrite `model.init_args`.
    """
    folder.mkdir(parents=True)
    config = {
        "seed_everything": seed,
        "name": name,
        "runs_dir": str(folder.parent),
        "ckpt_path": None,
        "trainer": {"max_epochs": 4, "logger": None, "callbacks": [{"class_path": f"C{seed}"}]},
        "model": {"class_path": "M", "init_args": {"lr": 1e-3, "seed": seed, **options}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    held_out = {"t": "h", "h": "t"}[target]
    rows = []
    for number, (gain, other) in enumerate(zip(gains, others, strict=True)):
        queries = 10.0 * number
        if number:
            seconds = {"time/rollout": number, "time/reward": 0.5}
            seconds |= {"time/update": 4.0} if number > 1 else {}
            common = {"epoch": number - 1, "step": 2 * number, "reward_queries": queries}
            rows += [{**common, f"rollout/reward/{target}": 9.0, **seconds}] * 2
        row = {"step": 2 * number, "reward_queries": queries}
        row |= {f"val/reward/{target}": 1 + 2 * gain, f"val/reward/{held_out}": 3 + 4 * other}
        if not number:
            row |= {f"val/reward_std/{target}": 2.0, f"val/reward_std/{held_out}": 4.0}
        rows.append(row | {f"val/{k}": values[number] for k, values in (measures or {}).items()})
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, sorted({name for row in rows for name in row}))
        writer.writeheader()
        writer.writerows(rows)
    return folder


def read(*folders):
    return group_runs([read_run(folder) for folder in folders])


def cells(table, title):
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {title} |")]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_a_run_is_read_in_units_of_the_base(tmp_path):
    run = read_run(write_run(tmp_path / "r", measures={"diversity": (0.5, 0.5, 0.4, 0.3, 0.25)}))
    assert (run.target, run.held_out, run.seed) == ("t", ["h"], 0)
    np.testing.assert_allclose(run.gain("t"), TARGET, atol=1e-12)
    np.testing.assert_allclose(run.gain("h"), HELD_OUT, atol=1e-12)
    np.testing.assert_allclose(run.diversity(), [1, 1, 0.8, 0.6, 0.5])
    assert np.isnan(run.series("val/fid")).all()
    # rounds of 1, 2, 3 and 4 seconds, each told twice; the first round has no update before it
    assert run.seconds == {"rollout": 2.5, "reward": 0.5, "update": 4.0}


def test_seeds_form_a_group_and_other_options_do_not(tmp_path):
    first = write_run(tmp_path / "a0", 0, "a_seed0")
    second = write_run(tmp_path / "a1", 1, "a_seed1")
    third = write_run(tmp_path / "b0", 0, "b_seed0", lr=1e-4)
    groups = read(first, third, second)
    assert [group.label for group in groups] == ["a", "b"]
    assert [[run.path for run in group.runs] for group in groups] == [[first, second], [third]]


def test_labels_tell_what_differs(tmp_path):
    runs = [
        write_run(tmp_path / f"a{number}", 0, "a", **options)
        for number, options in enumerate(({}, {"lr": 1e-4}, {"lr": 1e-4, "clip": 2}))
    ]
    labels = [group.label for group in read(*runs)]
    assert labels == [
        "a (clip=unset, lr=0.001)",
        "a (clip=unset, lr=0.0001)",
        "a (clip=2, lr=0.0001)",
    ]


def test_labels_tell_three_options_and_then_only_what_they_must(tmp_path):
    many = dict.fromkeys("bcdef", 1)
    runs = [write_run(tmp_path / "0", **many)]
    runs += [write_run(tmp_path / "1", **many | {"b": 2, "c": 2, "d": 2, "e": 2, "f": 2})]
    assert read(*runs)[1].label == "a (b=2, c=2, d=2, ...)"
    runs += [write_run(tmp_path / "2", **many | {"f": 2})]
    labels = [group.label for group in read(*runs)]
    assert labels[2] == "a (b=1, c=1, d=1, e=1, f=2)"
    assert len(set(labels)) == 3


def test_resets_make_another_method_and_measuring_does_not(tmp_path):
    """Of all callbacks only this one changes what is trained."""
    reset = {"class_path": "lit_align.callbacks.NeuronResetCallback"}
    modes = {"plain": None, "measured": "none", "active": "active", "all": "all"}
    for name, mode in modes.items():
        folder = write_run(tmp_path / name)
        config = yaml.safe_load((folder / "config.yaml").read_text())
        if mode:
            config["trainer"]["callbacks"].append({**reset, "init_args": {"mode": mode}})
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    groups = read(*(tmp_path / name for name in modes))
    assert [len(group.runs) for group in groups] == [2, 1, 1]
    assert groups[1].label == "a (mode=active)"


def test_seeds_meet_at_common_queries_up_to_the_shortest(tmp_path):
    write_run(tmp_path / "long", 0)
    write_run(tmp_path / "short", 1, gains=TARGET[:3], others=HELD_OUT[:3])
    (group,) = read(tmp_path / "long", tmp_path / "short")
    np.testing.assert_allclose(group.along(lambda run: run.gain("t")), [TARGET[:3]] * 2)
    text = (tmp_path / "short" / "metrics.csv").read_text()
    (tmp_path / "short" / "metrics.csv").write_text(text.replace("10.0", "5.0"))
    (group,) = read(tmp_path / "long", tmp_path / "short")
    np.testing.assert_allclose(group.along(lambda run: run.gain("t"))[0], [0, 0.25, 1])


def test_table_by_hand(tmp_path):
    kwargs = {"measures": {"fid": (math.nan, 1, 2, 3, 4), "kl": (0, 0.1, 0.2, 0.3, 0.4)}}
    write_run(tmp_path / "0", 0, **kwargs)
    write_run(tmp_path / "1", 1, gains=(0, 1, 2, 3, 4), others=(0, 1, 2, 3, 4), **kwargs)
    write_run(tmp_path / "2", 0, "b", target="h", lr=1e-2)
    groups = read(*(tmp_path / name for name in "012"))
    assert matched_level(groups) == 2
    table = summarise(groups, 2)
    assert cells(table, "") == ["a", "b"]
    assert cells(table, "trained reward") == ["t", "h"]
    assert cells(table, "seeds") == ["2", "1"]
    # mean of 2 and 4, and their standard deviation sqrt(2)
    assert cells(table, "final gain, trained reward") == ["+3.00 ± 1.41", "+2.00"]
    assert cells(table, "final gain, h") == ["+2.05 ± 2.76", "-"]
    assert cells(table, "final gain, t") == ["-", "+0.10"]
    assert cells(table, "FID to the base") == ["4 ± 0", "-"]
    assert cells(table, "KL to the base") == ["0.4 ± 0.0", "-"]
    assert cells(table, "diversity / base") == ["-", "-"]
    # reached after 4 validations and after 2, each 10 queries after the one before
    assert cells(table, "reward queries to trained gain 2") == ["30 ± 14", "40"]
    assert cells(table, "FID at trained gain 2") == ["3 ± 1.41", "-"]
    # of the two seeds: 0.1 and 2, 0.1 / 0.5 and 1, 0.3125 and 1, 0.1933 and 1, 0.4 and 0
    assert cells(table, "h at trained gain 2") == ["+1.05 ± 1.34", "-"]
    assert cells(table, "h, retention there") == ["+0.60 ± 0.57", "-"]
    assert cells(table, "h, area up to there") == ["+0.66 ± 0.49", "-"]
    assert cells(table, "h, slope") == ["+0.60 ± 0.57", "-"]
    assert cells(table, "h, lost since its best") == ["+0.20 ± 0.28", "-"]
    assert cells(table, "h, early peak") == ["1 of 2 seeds", "-"]
    assert cells(table, "t, slope") == ["-", "+0.19"]
    assert cells(table, "seconds a round, update") == ["4.00 ± 0.00", "4.00"]


def test_seeds_that_did_not_reach_the_level_are_not_counted(tmp_path):
    write_run(tmp_path / "0", 0)
    write_run(tmp_path / "1", 1, gains=TARGET[:3], others=HELD_OUT[:3])
    groups = read(tmp_path / "0", tmp_path / "1")
    assert matched_level(groups) == 1
    assert cells(summarise(groups, 1.5), "h at trained gain 1.5") == ["+0.40 (1 of 2)"]


def test_no_level_that_all_reached(tmp_path):
    groups = read(write_run(tmp_path / "0", gains=[g / 8 for g in TARGET]))
    assert matched_level(groups) is None
    table = summarise(groups, None)
    assert "No gain of the trained reward" in table
    assert "at trained gain" not in table
    assert cells(table, "h, slope") == ["+1.55"]


def test_a_held_out_reward_without_spread_has_no_gain(tmp_path):
    path = write_run(tmp_path / "0") / "metrics.csv"
    path.write_text(path.read_text().replace("4.0,2.0", "0.0,2.0"))  # of h and t
    run = read_run(path.parent)
    assert np.isnan(run.gain("h")).all()
    assert generalization(run, 1.0) == {}
    assert cells(summarise(group_runs([run]), 1.0), "h, slope") == ["-"]
    draw(group_runs([run]))


def test_command_line(tmp_path, capsys):
    measures = {"diversity": (0.5, 0.4, 0.4, 0.3, 0.25), "kid": ("", 1, 1, 1, 2)}
    for seed in (0, 1):
        write_run(tmp_path / "runs" / "a" / f"version_{seed}", seed, measures=measures)
    write_run(tmp_path / "runs" / "b" / "version_0", 5, "b", target="h", lr=1e-2)
    out = tmp_path / "out"
    main(["compare", *(str(tmp_path / "runs" / name) for name in "ab"), "--output", str(out)])
    printed = capsys.readouterr().out
    assert (out / "comparison.md").read_text() in printed
    assert str(out / "comparison.png") in printed
    assert (out / "comparison.png").stat().st_size > 10000
    with (out / "comparison.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 15
    assert list(rows[0]) == [
        *("group", "run", "seed", "reward_queries", "target", "target_gain"),
        *("gain/h", "gain/t", "diversity", "fid", "kid", "cmmd", "kl"),
    ]
    last = rows[9]
    assert (last["group"], last["seed"], last["reward_queries"]) == ("a", "1", "40")
    assert Path(last["run"]) == tmp_path / "runs" / "a" / "version_1"
    assert float(last["target_gain"]) == pytest.approx(2)
    assert float(last["gain/h"]) == pytest.approx(0.1)
    assert [last[k] for k in ("gain/t", "diversity", "fid", "kid")] == ["", "0.25", "", "2.0"]
    assert (rows[0]["kid"], rows[14]["target"], rows[14]["gain/h"]) == ("", "h", "")


def test_panels(tmp_path):
    measures = {"diversity": (0.5, 0.4, 0.4, 0.3, 0.25)}
    write_run(tmp_path / "0", 0, measures=measures)
    write_run(tmp_path / "1", 1, measures=measures, gains=(0, 1, 2, 3, 4))
    figure = draw(read(tmp_path / "0", tmp_path / "1"))
    gain, held_out, diversity, fid, seconds, _ = figure.axes
    np.testing.assert_allclose(gain.lines[0].get_xydata()[-1], [40, 3])
    np.testing.assert_allclose(held_out.lines[0].get_xydata()[-1], [3, 0.1])
    np.testing.assert_allclose(diversity.lines[0].get_xydata()[-1], [3, 0.5])
    assert [text.get_text() for text in fid.texts] == ["not measured"]
    assert [patch.get_width() for patch in seconds.patches] == [2.5, 0.5, 4.0]


def test_every_version_of_a_folder_in_order_and_once(tmp_path):
    paths = [write_run(tmp_path / "a" / f"version_{number}", number) for number in (0, 2, 10)]
    (tmp_path / "a" / "version_1").mkdir()  # a run that never wrote metrics
    assert find_runs([str(paths[1]), str(tmp_path / "a")]) == [paths[1], paths[0], paths[2]]


def test_mistakes_name_the_run(tmp_path):
    def told(folder, text):
        with pytest.raises((FileNotFoundError, ValueError), match=text) as error:
            main(["compare", str(folder), "--output", str(tmp_path / "out")])
        assert re.search(folder.name, str(error.value))

    told(tmp_path / "missing", "no such folder")
    (tmp_path / "empty").mkdir()
    told(tmp_path / "empty", "no metrics.csv")
    run = write_run(tmp_path / "untold")
    text = (run / "metrics.csv").read_text()
    (run / "metrics.csv").write_text(text.replace("rollout/reward/t", "rollout/reward/other"))
    told(run, "did not validate the reward")
    (run / "metrics.csv").write_text(text.replace("val/reward_std/t", "val/other"))
    told(run, "does not begin with the base")
    (run / "metrics.csv").write_text("\n".join(text.splitlines()[:1]) + "\n")
    told(run, "no validation of a reward")
    (run / "config.yaml").unlink()
    told(run, "no config.yaml")
    with pytest.raises(FileNotFoundError, match="Name the runs"):
        compare([])
    with pytest.raises(ValueError, match="`level` must be positive"):
        compare([], level=0.0)
    assert not (tmp_path / "out").exists()

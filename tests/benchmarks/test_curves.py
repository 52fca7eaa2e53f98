from pathlib import Path

import pytest
import yaml
from matplotlib.figure import Figure

from lit_align.benchmarks.curves import curves
from tests.benchmarks.test_matched import COLUMNS, write

RUNS = {"a": {"config": "x", "title": "A, colourfulness"}, "b": {"config": "x"}}


@pytest.fixture
def figures(monkeypatch):
    """Fill with the figures that are saved."""
    saved, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a: (saved.append(f), save(f, *a)))
    return saved


def test_runs_of_two_lists_are_drawn_against_each_other(figures):
    for folder, name in ((".", "a"), ("other", "b")):
        Path(folder, "results").mkdir(parents=True)
        Path(folder, "runs.yaml").write_text(yaml.safe_dump({"seeds": [0, 1], "runs": RUNS}))
        for seed, slope in ((0, 1.0), (1, 3.0)):
            rows = [(10 * k, 5 + slope * k, 1 - 4 * k, 2, 4, "nan", k / 10) for k in range(3)]
            write(f"{folder}/results/{name}_seed{seed}.csv", COLUMNS, rows)
    curves("runs.yaml", ["a", "other/runs.yaml:b"], "out.png", ["gain", "h", "fid"])
    assert Path("out.png").stat().st_size > 1000
    (figure,) = figures
    gain, held_out, distance = figure.axes
    assert [line.get_label() for line in gain.lines if line.get_label()[0] != "_"] == ["A", "b"]
    mean = gain.lines[2]  # after the two seeds
    assert list(mean.get_xdata()) == [0, 10, 20]
    assert list(mean.get_ydata()) == [0, 1, 2]  # t gains half its slope per validation, in its std
    assert list(held_out.lines[2].get_ydata()) == [0, -1, -2]
    assert list(distance.lines[2].get_ydata()) == pytest.approx([0, 0.1, 0.2])
    curves("runs.yaml", ["a"], "against.png", ["h"], x="gain")
    assert list(figures[1].axes[0].lines[0].get_xdata()) == [0, 0.5, 1]

import csv
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lit_align.benchmarks import memory as benchmark
from lit_align.benchmarks.memory import NOT_CHECKPOINTED, LiveBytes, memory, network, peak


def layers(states, weights):
    for weight in weights:
        states = torch.tanh(states @ weight)
    return states


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("parts", "depth"), [(1, 4), (4, 4), (8, 4), (4, 8)])
def test_peak_of_layers_by_hand(device, parts, depth):
    """In units of one layer's states; the weights and their gradients are small beside them.

    Each layer keeps its output; backward of the last one needs two gradients beside, but has freed
    that output. With checkpointed parts only their inputs are kept, the first of which is older
    than the count, and one part's layers.
    """
    rows, width = 4096, 8
    weights = torch.randn(parts, depth, width, width, device=device, requires_grad=True)
    states = torch.randn(rows, width, device=device)
    unit = states.numel() * states.element_size()

    def measured(checkpointed):
        def loss():
            output = states
            for part in weights:
                if checkpointed:
                    output = checkpoint(layers, output, part, use_reentrant=False)
                else:
                    output = layers(output, part)
            return output.sum()

        with LiveBytes() as count:
            torch.autograd.grad(loss(), weights)
        assert count.live == 0
        return count.peak / unit

    assert measured(checkpointed=False) == pytest.approx(parts * depth + 1, abs=0.3)
    assert measured(checkpointed=True) == pytest.approx(parts + depth, abs=0.3)


def test_a_view_or_an_older_tensor_is_not_counted():
    older = torch.ones(100)
    with LiveBytes() as count:
        older.add_(1).view(10, 10)
        assert count.peak == 0
        double = older * 2
        views = [double.view(10, 10), double[:3]]
        assert (count.live, count.peak) == (400, 400)
        del double, views
        assert (count.live, count.peak) == (0, 400)


def test_only_what_is_not_checkpointed_grows_with_the_trained_steps():
    policy = network("shapes-sd", 8)
    sizes = {
        method: [peak(policy, method, count) for count in counts]
        for method, counts in (
            ("DRTune", (1, 8)), ("DRaFT", (1, 8)), (NOT_CHECKPOINTED, (1, 4, 8)),
        )
    }  # fmt: skip
    first, last = sizes["DRTune"]
    assert last == pytest.approx(first, rel=0.05)
    first, last = sizes["DRaFT"]
    assert first < last < 1.1 * first
    first, middle, last = sizes[NOT_CHECKPOINTED]
    assert last > 3 * first
    assert (last - middle) / 4 == pytest.approx((middle - first) / 3, rel=0.05)


def test_table_and_figure_are_written(monkeypatch, capsys):
    methods = {name: benchmark.METHODS[name] for name in ("DRTune", "ReFL", "AdjointMatching")}
    monkeypatch.setattr(benchmark, "METHODS", methods)
    monkeypatch.setattr(benchmark, "NETWORKS", {"shapes-sd": (1, 2)})
    memory("memory", ["shapes-sd"])
    with Path("memory.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    cells = [(row["network"], row["method"], row["K"]) for row in rows]
    assert cells == [
        ("shapes-sd", "DRTune", "1"), ("shapes-sd", "DRTune", "2"), ("shapes-sd", "ReFL", "1"),
        ("shapes-sd", "AdjointMatching", "1"),
    ]  # fmt: skip
    assert all(int(row["bytes_per_sample"]) > 2**20 for row in rows)
    mebibytes = int(rows[2]["bytes_per_sample"]) / 2**20
    assert f"| shapes-sd | ReFL | 1 | {mebibytes:.2f} |" in capsys.readouterr().out
    assert Path("memory.png").stat().st_size > 5000

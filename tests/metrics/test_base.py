import copy
import pickle

import pytest
import torch
from torch import nn

from lit_align.metrics import (
    CMMD,
    CrossRewardGeneralization,
    DriftStatistics,
    FrechetDistance,
    KernelDistance,
    PairwiseDiversity,
    RewardMoments,
    VendiScore,
    WinRate,
)


class Embedder(nn.Module):
    """Mean colours, in the images' dtype; its parameter must not end up in a state dict."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images):
        return (images.float().mean((2, 3)) * self.weight).bfloat16().to(images.dtype)


def all_metrics():
    embedder = Embedder()
    return [
        RewardMoments(["a", "b"]),
        CrossRewardGeneralization("a", ["b"]),
        PairwiseDiversity(embedder),
        VendiScore(embedder),
        FrechetDistance(3, embedder),
        KernelDistance(3, embedder),
        CMMD(embedder),
        WinRate(replicates=10),
        DriftStatistics(),
    ]


def feed(metric, seed=0, dtype=torch.float32, cast=None):
    """Update once with inputs rounded to `dtype`, given in `cast`."""
    cast = cast or dtype
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(6, 3, 8, 8, generator=generator).to(dtype).to(cast)
    scores = torch.rand(6, 2, generator=generator).to(dtype).to(cast)
    ids = torch.tensor([0, 0, 1, 1, 2, 2]) + 10 * seed
    match metric:
        case RewardMoments():
            metric.update(scores)
        case CrossRewardGeneralization():
            means, stds = scores.float().mean(0).to(dtype), scores.float().std(0).to(dtype)
            metric.update(means.to(cast), stds.to(cast), queries=float(seed))
        case WinRate():
            metric.update(scores[:, 0], scores[:, 1], ids)
        case PairwiseDiversity() | VendiScore():
            metric.update(images, ids)
        case DriftStatistics():
            metric.update(images, images)
        case _:
            metric.update(images[:3], real=True)
            metric.update(images[3:], real=False)


def flat(result):
    parts = result.values() if isinstance(result, dict) else [result]
    return torch.cat([part.double().flatten() for part in parts])


def case_name(metric):
    return type(metric).__name__


@pytest.mark.parametrize("metric", all_metrics(), ids=case_name)
def test_the_embedder_is_no_part_of_the_metric(metric):
    assert list(metric.parameters()) == []
    assert set(metric.state_dict()) <= {"trajectory"}


@pytest.mark.parametrize("metric", all_metrics(), ids=case_name)
def test_casting_the_module_changes_no_result(metric):
    twin = copy.deepcopy(metric)
    holder = nn.ModuleList([twin]).to(torch.bfloat16)  # what Lightning's `bf16-true` does
    feed(metric)
    feed(twin)
    holder.half()
    assert torch.equal(flat(metric.compute()).nan_to_num(7), flat(twin.compute()).nan_to_num(7))


@pytest.mark.parametrize("metric", all_metrics(), ids=case_name)
def test_bfloat16_inputs_are_cast_before_anything_is_computed(metric):
    twin = copy.deepcopy(metric)
    feed(metric, dtype=torch.bfloat16)
    feed(twin, dtype=torch.bfloat16, cast=torch.float32)
    measured, expected = flat(metric.compute()), flat(twin.compute())
    torch.testing.assert_close(measured, expected, equal_nan=True)


SAMPLED = [m for m in all_metrics() if not isinstance(m, CrossRewardGeneralization)]


@pytest.mark.parametrize("metric", SAMPLED, ids=case_name)
def test_merged_halves_are_the_whole(metric):
    whole, left, right = metric, copy.deepcopy(metric), copy.deepcopy(metric)
    for part, seed in ((left, 0), (right, 1)):
        feed(part, seed)
        feed(whole, seed)
    before = flat(left.compute())
    right.merge_state(left)  # the left half first, as in the whole
    torch.testing.assert_close(flat(right.compute()), flat(whole.compute()))
    assert not torch.allclose(before, flat(whole.compute()))


@pytest.mark.parametrize("metric", all_metrics(), ids=case_name)
def test_a_process_without_samples_gathers_typed_rows_of_one_dimension(metric):
    """Gathering pads sizes, but a wrong number of dimensions or dtype would hang."""
    sent = []

    def gather(tensor, group=None):
        sent.append((tensor.ndim, tensor.dtype))
        return [tensor, tensor]

    idle = copy.deepcopy(metric)
    feed(metric)
    for each in (metric, idle):
        each.sync(dist_sync_fn=gather, distributed_available=lambda: True)
    half = len(sent) // 2
    assert half == len(metric.metric_state)
    assert sent[:half] == sent[half:]


@pytest.mark.parametrize("metric", all_metrics(), ids=case_name)
def test_metrics_pickle(metric):
    feed(metric)
    feed(metric, seed=1)
    restored = pickle.loads(pickle.dumps(metric))
    assert torch.equal(flat(restored.compute()).nan_to_num(7), flat(metric.compute()).nan_to_num(7))


def test_wrong_embeddings_are_named():
    with pytest.raises(ValueError, match="pass an `embedder` to give images"):
        CMMD().update(torch.rand(2, 3, 8, 8), real=True)
    metric = VendiScore()
    metric.update(torch.rand(2, 5))
    with pytest.raises(ValueError, match=r"must be 5 wide.*got \[2, 4\]"):
        metric.update(torch.rand(2, 4))
    for metric in (FrechetDistance(5), KernelDistance(5)):
        with pytest.raises(ValueError, match=r"must be 5 wide.*got \[2, 4\]"):
            metric.update(torch.rand(2, 4), real=True)

import random
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from lit_align.callbacks.invariants import _check_reward
from lit_align.rewards import (
    Composition,
    DistributionParity,
    PairwiseDiversityReward,
    ShapesColor,
)
from lit_align.rewards.composition import ShapesDetector
from lit_align.rewards.parity import marginal_parity, parity
from lit_align.rewards.scoring import RewardError, call_reward
from lit_align.rewards.shapes_clip import build_shapes_clip
from lit_align.shapes import grammar
from lit_align.shapes.renderer import render, sample_scene
from lit_align.shapes.scene import COLORS, KINDS, Facts
from lit_align.shapes.verifier import detect, detect_batch
from lit_align.trajectory import PromptBatch

UNIFORM = torch.full((4,), 0.25, dtype=torch.float64)


class Brightness(torch.nn.Module):
    """K classes by brightness; a black image has none."""

    def __init__(self, classes=4):
        super().__init__()
        self.classes = classes

    def forward(self, images, prompts, metadata):
        brightness = images.mean(dim=(1, 2, 3))
        labels = (brightness * self.classes).long().clamp(max=self.classes - 1)
        scores = F.one_hot(labels, self.classes).float()
        return scores.masked_fill((brightness == 0)[:, None], torch.nan)


class Returns(torch.nn.Module):
    """Returns what it was given, whatever it is asked."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, *args):
        return self.value


class Corner(torch.nn.Module):
    """The corner pixel's three channels as embedding."""

    def forward(self, images):
        return images[:, :, 0, 0]


def pictures(labels):
    """Images that `Brightness` puts into these classes, -1 for none."""
    levels = torch.tensor([0.0 if k < 0 else (k + 0.5) / 4 for k in labels])
    return levels[:, None, None, None].expand(-1, 3, 4, 4)


def score(reward, labels, groups=None):
    ids = None if groups is None else torch.tensor(groups)
    return reward(pictures(labels), [""] * len(labels), None, ids)


def scores_of(values):
    return pytest.approx(values, abs=1e-6, nan_ok=True)


# Statistical parity.

FIXTURES = [
    ((4, 4, 4, 4), 0.0),
    ((5, 4, 4, 3), 0.0884),
    ((8, 4, 2, 2), 0.3062),
    ((8, 8, 0, 0), 0.5),
    ((12, 4, 0, 0), 0.6124),
    ((16, 0, 0, 0), 0.8660),
]


@pytest.mark.parametrize(("counts", "distance"), FIXTURES)
def test_parity_of_sixteen_images_and_four_classes(counts, distance):
    assert parity(torch.tensor(counts), UNIFORM).item() == pytest.approx(distance, abs=5e-5)
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    random.Random(0).shuffle(labels)
    scores = score(DistributionParity(Brightness()), labels, [7] * 16)
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx([-distance] * 16, abs=5e-5)


def test_parity_takes_batches_of_counts_and_knows_nothing_of_nothing():
    counts = torch.tensor([[[4, 0, 0, 0], [1, 1, 1, 1]], [[0, 0, 0, 0], [2, 2, 0, 0]]])
    expected = [0.75**0.5, 0, torch.nan, 0.5]
    assert parity(counts, UNIFORM).flatten().tolist() == scores_of(expected)


@pytest.mark.parametrize("classes", [2, 4, 6])
def test_the_worst_group_is_all_of_one_class(classes):
    reward = DistributionParity(Brightness(classes))
    worst = -(((classes - 1) / classes) ** 0.5)
    assert score(reward, [0] * 5).tolist() == scores_of([worst] * 5)
    labels = torch.randint(0, 4, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    assert score(reward, labels, list(range(16)) * 4).min() >= worst - 1e-6


@pytest.mark.parametrize("credit", ["shared", "marginal"])
def test_groups_are_found_wherever_their_images_lie(credit):
    reward = DistributionParity(Brightness(), credit=credit)
    labels, groups = [0, 0, 1, 2, 3, 3, 3, 1], [5, 5, 5, 5, 9, 9, 9, 9]
    scores = score(reward, labels, groups)
    order = [6, 0, 3, 5, 1, 7, 2, 4]
    permuted = score(reward, [labels[i] for i in order], [groups[i] for i in order])
    torch.testing.assert_close(permuted, scores[order])
    for group in (5, 9):
        alone = [label for label, own in zip(labels, groups, strict=True) if own == group]
        expected = score(reward, alone)
        torch.testing.assert_close(scores[torch.tensor(groups) == group], expected)
        if credit == "shared":
            assert len(set(expected.tolist())) == 1


@pytest.mark.parametrize("credit", ["shared", "marginal"])
def test_images_without_a_class_do_not_count(credit):
    reward = DistributionParity(Brightness(), credit=credit)
    scores = score(reward, [0, -1, 1, 0, -1, -1], [1, 1, 1, 1, 2, 2])
    assert scores.isnan().tolist() == [False, True, False, False, True, True]
    torch.testing.assert_close(scores[[0, 2, 3]], score(reward, [0, 1, 0]))


def test_another_target():
    target = [0.5, 0.25, 0.25, 0.0]
    for credit in ("shared", "marginal"):
        reward = DistributionParity(Brightness(), credit=credit, target=target)
        assert score(reward, [0, 0, 1, 2]).tolist() == [0, 0, 0, 0]
    shared = DistributionParity(Brightness(), target=target)
    expected = -((0.5**2 + 2 * 0.25**2) ** 0.5)
    assert score(shared, [0] * 4).tolist() == scores_of([expected] * 4)
    thirds = DistributionParity(Brightness(3), target=[0.3333, 0.3333, 0.3333])
    assert score(thirds, [0, 2, 3]).tolist() == scores_of([0, 0, 0])  # made to sum to 1


# Marginal credit.


@pytest.mark.parametrize("counts", [counts for counts, distance in FIXTURES if distance])
@pytest.mark.parametrize("target", [UNIFORM, torch.tensor([0.4, 0.3, 0.2, 0.1]).double()])
def test_marginal_credit_is_the_derivative_of_the_parity(counts, target):
    counts = torch.tensor(counts).double()
    credit = marginal_parity(counts, target)
    step = 1e-6
    for label in range(4):
        mass = step * counts.sum() * F.one_hot(torch.tensor(label), 4)
        slope = -(parity(counts + mass, target) - parity(counts - mass, target)) / (2 * step)
        assert credit[label].item() == pytest.approx(slope.item(), abs=1e-6)
    assert (counts @ credit).item() == pytest.approx(0, abs=1e-12)


def test_marginal_credit_by_hand():
    # p - t = (.25, .25, -.25, -.25), SP = .5, sum of p (p - t) = .25
    scores = score(DistributionParity(Brightness(), credit="marginal"), [0, 1, 0, 1])
    assert scores.tolist() == scores_of([-0.5] * 4)  # and no image's share differs
    # p - t = (.5, 0, -.25, -.25), SP = sqrt(.375), sum of p (p - t) = .375
    scores = score(DistributionParity(Brightness(), credit="marginal"), [0, 1, 0, 0])
    common, rare = -0.125 / 0.375**0.5 - 0.375**0.5, 0.375**0.5 - 0.375**0.5
    assert scores.tolist() == scores_of([common, rare, common, common])
    assert scores.mean().item() == pytest.approx(-(0.375**0.5))  # the mean is still -SP
    assert marginal_parity(torch.tensor([3, 3, 3, 3]), UNIFORM).tolist() == [0, 0, 0, 0]


def test_a_target_with_rounding_errors_is_reached():
    target = torch.tensor([0.1] * 10, dtype=torch.float64)
    assert marginal_parity(torch.full((10,), 3), target).tolist() == [0] * 10


def test_a_batch_is_counted_as_a_whole():
    reward = DistributionParity(Brightness(), scope="batch", credit="marginal")
    assert reward.granularity == "batchwise"
    labels = [0, 0, 1, 3, -1, 0]
    scores = score(reward, labels, [0, 0, 1, 1, 2, 2])
    assert scores[4].isnan()
    torch.testing.assert_close(scores, score(reward, labels), equal_nan=True)
    counts = torch.tensor([3, 1, 0, 1])
    credit = (marginal_parity(counts, UNIFORM) - parity(counts, UNIFORM)).float()
    torch.testing.assert_close(scores[[0, 1, 2, 3, 5]], credit[[0, 0, 1, 3, 0]])
    assert DistributionParity(Brightness()).granularity == "groupwise"
    assert DistributionParity.granularity == "pointwise"


WHOLE = [0, 0, 1, 3, 2, -1, 0, 0]
NOISE = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def batchwise_rewards():
    return [
        DistributionParity(Brightness(), scope="batch", credit="marginal"),
        PairwiseDiversityReward(Corner(), scope="batch"),
    ]


def score_half(rank):
    """Return what the rewards give one of two processes, each with half of the images."""
    mine = slice(4 * rank, 4 * rank + 4)
    parity_reward, diversity = batchwise_rewards()
    found = [parity_reward(pictures(WHOLE[mine]), [""] * 4), diversity(NOISE[mine], [""] * 4)]
    return torch.stack(found)


def check_halves(halves):
    parity_reward, diversity = batchwise_rewards()
    expected = [parity_reward(pictures(WHOLE), [""] * 8), diversity(NOISE, [""] * 8)]
    torch.testing.assert_close(torch.cat(halves, dim=1), torch.stack(expected), equal_nan=True)


class TwoThreads:
    """Stands in for `torch.distributed`, the processes being threads named 0 and 1."""

    def __init__(self):
        self.given, self.barrier = [None, None], threading.Barrier(2, timeout=60)

    def exchange(self, tensor):
        self.given[self.rank()] = tensor.clone()
        self.barrier.wait()
        given = list(self.given)
        self.barrier.wait()
        return given

    def rank(self):
        return int(threading.current_thread().name)

    def all_reduce(self, tensor):
        tensor.copy_(sum(self.exchange(tensor)))

    def all_gather(self, parts, tensor):
        for part, given in zip(parts, self.exchange(tensor), strict=True):
            part.copy_(given)


def test_a_batch_is_that_of_all_processes(monkeypatch):
    world, halves = TwoThreads(), [None, None]
    with monkeypatch.context() as patch:
        for name, function in {
            "is_initialized": lambda: True,
            "get_world_size": lambda: 2,
            "get_rank": world.rank,
            "all_reduce": world.all_reduce,
            "all_gather": world.all_gather,
        }.items():
            patch.setattr(dist, name, function)

        def run(rank):
            halves[rank] = score_half(rank)

        threads = [threading.Thread(target=run, args=(rank,), name=str(rank)) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    check_halves(halves)


def save_half(rank, folder):
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.save(score_half(rank), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_batch_is_that_of_two_real_processes(tmp_path):
    torch.multiprocessing.spawn(save_half, (str(tmp_path),), nprocs=2)
    check_halves([torch.load(tmp_path / f"{rank}.pt") for rank in range(2)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"scope": "batch"},
            "one score, from which nothing can be learned; use `credit: marginal`",
        ),
        ({"scope": "prompt"}, "`scope` must be 'group' or 'batch', got 'prompt'"),
        ({"credit": "own"}, "`credit` must be 'shared' or 'marginal', got 'own'"),
        ({"target": [0.5, 0.6]}, r"sum to 1, got \[0.5, 0.6\], which sum to 1.1; divide"),
        ({"target": [1.5, -0.5]}, "shares of at least 0"),
        ({"target": [0.5, float("nan")]}, "shares of at least 0"),
    ],
)
def test_parity_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        DistributionParity(Brightness(), **options)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (torch.zeros(2, 4, dtype=torch.int64), TypeError, "Returns must .* got torch.int64; turn"),
        ([0, 1], TypeError, "got list"),
        (torch.zeros(2), ValueError, r"scores \[2, K\] of K > 1 classes, got \[2\]"),
        (torch.zeros(3, 4), ValueError, r"got \[3, 4\]"),
        (torch.zeros(2, 1), ValueError, r"got \[2, 1\]"),
        (torch.zeros(2, 3), ValueError, "has 4 shares, but the classifier Returns knows 3"),
    ],
)
def test_broken_classifiers_are_named(value, error, message):
    with pytest.raises(error, match=message):
        score(DistributionParity(Returns(value), target=[0.25] * 4), [0, 1])


# The colours of the shapes world.


def uncolored(count, kind="single"):
    facts = grammar.sample_split("train", 20 * count, seed=11, kind=kind)
    return [f for f in facts if all(o.color is None for o in f.objects)][:count]


def test_colors_of_rendered_scenes_are_read():
    facts, rng = uncolored(200), random.Random(1)
    scenes = [sample_scene(f, rng) for f in facts]
    scores = ShapesColor()(render(scenes), [grammar.caption(f) for f in facts])
    palette = torch.tensor(list(COLORS.values()))
    drawn = torch.tensor([scene.objects[0].rgb for scene in scenes])
    truth = torch.cdist(drawn, palette).argmin(dim=1)
    assert len(truth.unique()) == 6
    assert scores.shape == (200, 6)
    assert scores.sum(dim=1).tolist() == [1.0] * 200
    assert (scores.argmax(dim=1) == truth).float().mean() >= 0.95


def test_the_largest_object_counts():
    scene = sample_scene(grammar.parse("a small blue circle and a large green square"),
                         random.Random(0))  # fmt: skip
    scores = ShapesColor()(render([scene]), ["a circle and a square"])
    assert list(COLORS)[int(scores.argmax())] == "green"


def test_stated_colors_and_empty_pictures_are_not_classified():
    texts = ["a circle", "a red circle", "a circle and a blue square", "a photo of a dog", "a red"]
    images = render([sample_scene(grammar.parse("a red circle"), random.Random(0))]).expand(
        5, -1, -1, -1
    )
    assert ShapesColor()(images, texts).isnan().any(dim=1).tolist() == [
        False, True, True, False, False,
    ]  # fmt: skip
    colored = grammar.parse("a red circle").to_metadata()
    metadata = [colored, grammar.parse("a circle").to_metadata(), {"objects": ["dog"]}, None, {}]
    assert ShapesColor()(images, texts, metadata).isnan().all(dim=1).tolist() == [
        True, False, False, False, False,
    ]  # fmt: skip
    flat = torch.full((1, 3, 32, 32), 0.5)
    assert ShapesColor()(flat, ["a circle"]).isnan().all()


def test_parity_of_the_biased_world():
    """Seven of ten pictures are red."""
    facts = uncolored(1) * 400
    rng = random.Random(2)
    images = render([sample_scene(f, rng) for f in facts])
    prompts = [grammar.caption(f) for f in facts]
    shared = DistributionParity(ShapesColor())(images, prompts)
    assert 0.4 < -shared[0] < 0.7
    credit = DistributionParity(ShapesColor(), credit="marginal")(images, prompts)
    red = ShapesColor()(images, prompts)[:, 0] == 1
    assert credit[red].max() < shared[0] < credit[~red].min()


# Diversity.


def corners(rows):
    return torch.tensor(rows)[:, :, None, None].expand(-1, -1, 4, 4)


def test_diversity_in_closed_form():
    images = corners([[1.0, 0, 0], [0, 2.0, 0], [3.0, 0, 0], [0, 0, 1.0]])
    reward = PairwiseDiversityReward(Corner())
    # cosines with the others: 0 1 0 / 0 0 0 / 1 0 0 / 0 0 0
    assert reward(images, [""] * 4).tolist() == scores_of([2 / 3, 1, 2 / 3, 1])
    groups = torch.tensor([3, 8, 3, 5])
    assert reward(images, [""] * 4, None, groups).tolist() == scores_of(
        [0, torch.nan, 0, torch.nan]
    )
    batch = PairwiseDiversityReward(Corner(), scope="batch")
    assert batch(images, [""] * 4, None, groups).tolist() == scores_of([2 / 3, 1, 2 / 3, 1])
    opposite = corners([[1.0, 0, 0], [-1.0, 0, 0]])
    assert reward(opposite, ["", ""]).tolist() == scores_of([2, 2])
    assert (reward.granularity, batch.granularity) == ("groupwise", "batchwise")


def test_an_image_that_cannot_be_embedded_spoils_no_other():
    images = corners([[1.0, 0, 0], [torch.nan, 0, 0], [0, 1.0, 0], [torch.inf, 0, 0]])
    scores = PairwiseDiversityReward(Corner())(images, [""] * 4)
    assert scores.tolist() == scores_of([1, torch.nan, 1, torch.nan])


def test_embedders_are_found_by_their_method_and_checked():
    encoder = build_shapes_clip(width=16, layers=1)
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    cosines = encoder.embed_images(images) @ encoder.embed_images(images).T
    expected = 1 - (cosines.sum(dim=1) - 1) / 3
    torch.testing.assert_close(PairwiseDiversityReward(encoder)(images, [""] * 4), expected)
    with pytest.raises(ValueError, match=r"Identity must return embeddings \[4, D\], got \[4, 3,"):
        PairwiseDiversityReward(torch.nn.Identity())(images, [""] * 4)
    with pytest.raises(ValueError, match="`scope` must be 'group' or 'batch', got 'all'"):
        PairwiseDiversityReward(encoder, scope="all")


# Composition.


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_compose_what_their_captions_name(kind):
    facts, rng = grammar.sample_split("heldout", 60, seed=12, kind=kind), random.Random(3)
    images = render([sample_scene(f, rng) for f in facts])
    prompts = [grammar.caption(f) for f in facts]
    reward = Composition()
    scores = reward(images, prompts)
    assert scores.max() <= 1
    assert scores.mean() >= 0.97
    metadata = [f.to_metadata() for f in facts]
    torch.testing.assert_close(reward(images, ["?"] * 60, metadata), scores)


@pytest.mark.parametrize(
    ("drawn", "named", "share"),
    [
        ("a red circle", "a red circle", 1),
        ("a red circle", "a circle", 1),
        ("a red circle", "a red circle and a blue square", 1 / 2),
        ("a blue square", "a red circle", 0),
        ("a red circle", "two red circles", 1 / 2),
        ("two red circles", "three red circles", 2 / 3),
        ("a red circle", "a circle and a red circle", 1 / 2),
        # the second drawn object must go to the first named one
        ("a red circle and a blue circle", "a circle and a red circle", 1),
        # neither the relation nor the background is an object
        ("a red circle left of a blue square", "a red circle right of a blue square", 1),
    ],
)
def test_missing_objects_cost_their_share(drawn, named, share):
    images = render([sample_scene(grammar.parse(drawn), random.Random(4))])
    assert Composition()(images, [named]).item() == pytest.approx(share, abs=0.02)


def test_prompts_that_name_no_known_object_are_not_scored():
    images = render([sample_scene(grammar.parse("a red circle"), random.Random(0))]).expand(
        4, -1, -1, -1
    )
    metadata = [None, {"objects": []}, {"kind": "x"}, None]
    scores = Composition()(images, ["a dog", "a circle", "a red circle", ""], metadata)
    assert scores.isnan().tolist() == [True, True, False, True]
    assert Composition(Returns(None))(images, ["?"] * 4).isnan().all()  # is not even asked


class Names(torch.nn.Module):
    """Is as sure of an object as its name is long, of at most ten letters."""

    def forward(self, images, objects):
        assert len(images) == len(objects)
        return [[len(name) / 10 for name in names] for names in objects]


def test_any_detector_of_named_objects():
    metadata = [{"objects": ["cat", "bird"]}, None, {"objects": ["oboe"]}]
    scores = Composition(Names())(torch.rand(3, 3, 8, 8), ["?"] * 3, metadata)
    assert scores.tolist() == scores_of([0.35, torch.nan, 0.4])
    failed = Composition(Returns([[torch.nan, 1.0]]))
    assert failed(torch.rand(1, 3, 8, 8), ["?"], metadata[:1]).isnan().all()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "Returns must return one list of confidences per image, got 0 for 1"),
        ([[0.5]], r"one confidence per object, got 1 for \['cat', 'dog'\]; return 0"),
        ([[0.5, 1.2]], r"confidences in \[0, 1\], got \[0.5, 1.2\] for"),
        ([[-0.1, 0.2]], r"confidences in \[0, 1\]"),
    ],
)
def test_broken_detectors_are_named(value, message):
    metadata = [{"objects": ["cat", "dog"]}]
    with pytest.raises(ValueError, match=message):
        Composition(Returns(value))(torch.rand(1, 3, 8, 8), [""], metadata)


def test_unreadable_objects_are_named():
    images = torch.rand(1, 3, 32, 32)
    with pytest.raises(TypeError, match="'objects' of 'a cat' must be a list, got 'cat'; put"):
        Composition(Names())(images, ["a cat"], [{"objects": "cat"}])
    with pytest.raises(ValueError, match=r"The shapes world has no objects \['cat'\]; name them"):
        Composition()(images, ["a cat"], [{"objects": ["cat"]}])


def test_batches_are_detected_as_single_images_are():
    facts = grammar.sample_split("train", 20, seed=13)
    images = render([sample_scene(f, random.Random(5)) for f in facts])
    for image, together in zip(images, detect_batch(images), strict=True):
        alone = detect(image)
        assert [d.color for d in together] == [d.color for d in alone]
        assert [d.x for d in together] == pytest.approx([d.x for d in alone])
    objects = [f.to_metadata()["objects"] for f in facts]
    assert [Facts.from_metadata({"objects": o}).objects for o in objects] == [
        f.objects for f in facts
    ]
    assert [len(row) for row in ShapesDetector()(images, objects)] == [len(o) for o in objects]


# The contract.


def all_rewards():
    return [
        DistributionParity(Brightness()),
        DistributionParity(ShapesColor()),
        DistributionParity(Brightness(), credit="marginal"),
        DistributionParity(ShapesColor(), scope="batch", credit="marginal"),
        PairwiseDiversityReward(Corner()),
        PairwiseDiversityReward(build_shapes_clip(width=16, layers=1), scope="batch"),
        Composition(),
    ]


@pytest.mark.parametrize("reward", all_rewards(), ids=lambda r: r.name)
def test_contract(reward):
    texts = ["a circle"] * 4 + ["a large square"] * 4
    rng = random.Random(6)
    images = render([sample_scene(grammar.parse(text), rng) for text in texts])
    numbers = torch.arange(8)
    metadata = [grammar.parse(text).to_metadata() for text in texts]
    batch = PromptBatch(texts, metadata, numbers // 4, numbers, numbers // 4)
    scores = call_reward(reward, images, batch)
    assert scores.isfinite().all()
    order = torch.tensor([7, 2, 5, 0, 1, 6, 3, 4])
    permuted = call_reward(reward, images[order], batch.select(order))
    torch.testing.assert_close(permuted, scores[order], atol=1e-5, rtol=1e-5)
    assert not any(p.requires_grad for p in reward.parameters())
    assert not reward(images.clone().requires_grad_(True), texts).requires_grad
    assert not any(module.training for module in reward.train().children())
    module = SimpleNamespace(
        device=torch.device("cpu"),
        policy=SimpleNamespace(pixel_shape=(3, 32, 32)),
        score=call_reward,
    )
    _check_reward(module, reward, batch)
    _check_reward(module, reward, None)


def test_failures_name_the_reward():
    nothing = torch.zeros(2, dtype=torch.int64)
    batch = PromptBatch(["", ""], [None, None], nothing, nothing, nothing)
    with pytest.raises(RewardError, match="DistributionParity failed for 2 image.*got list"):
        call_reward(DistributionParity(Returns([0, 1])), torch.rand(2, 3, 8, 8), batch)


def test_sixteen_images_of_six_equal_classes_are_far_from_parity():
    """The figure of configs/large_scale_rl/README.md."""
    torch.manual_seed(0)
    counts = torch.distributions.Multinomial(16, torch.ones(6) / 6).sample((20_000,))
    assert parity(counts, torch.full((6,), 1 / 6)).mean().item() == pytest.approx(0.22, abs=5e-3)

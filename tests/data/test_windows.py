import dataclasses
from collections import Counter

import pytest

from lit_align.data.windows import StepWindow
from tests.data.test_experience import make_plan, pairs, steps_of_samples

NOISY = tuple(range(24))  # of 25 steps in flow matching, whose last one is deterministic
MIX = StepWindow(4, strategy="progressive", every=25, stride=1)


def places(window, rounds, trainable=NOISY, seed=0):
    return [window.steps(number, seed, trainable) for number in rounds]


def test_the_progressive_window_of_mixgrpo():
    # Algorithm 1, arXiv:2507.21802: w = 4, stride 1, tau = 25, T = 25; never the last step.
    for number in range(3 * 21 * 25):
        first = number // 25 % 21
        assert MIX.steps(number, 0, NOISY) == tuple(range(first, first + 4))
    assert places(MIX, [0, 24]) == [(0, 1, 2, 3)] * 2
    assert places(MIX, [25, 49]) == [(1, 2, 3, 4)] * 2
    assert places(MIX, [500, 524]) == [(20, 21, 22, 23)] * 2
    assert places(MIX, [525]) == [(0, 1, 2, 3)]


def test_strides_and_ranges_of_a_progressive_window():
    window = StepWindow(2, start=1, stop=7, strategy="progressive", every=1, stride=3)
    assert places(window, range(4)) == [(1, 2), (4, 5), (1, 2), (4, 5)]  # (7, 8) is out of range
    whole = StepWindow(3, start=2, stop=5, strategy="progressive", every=1)
    assert places(whole, range(3)) == [(2, 3, 4)] * 3
    uneven = StepWindow(2, strategy="progressive", every=2, stride=2)
    drawn = places(uneven, range(6), trainable=range(5))
    assert drawn == [(0, 1), (0, 1), (2, 3), (2, 3), (0, 1), (0, 1)]


def test_a_random_window_has_every_place_of_its_range_equally_often():
    drawn = places(StepWindow(3, start=1, stop=7), range(800))
    counts = Counter(drawn)
    assert set(counts) == {tuple(range(first, first + 3)) for first in (1, 2, 3, 4)}
    # 800 draws of 4 places: the standard error of a count is 12.
    assert max(abs(count - 200) for count in counts.values()) < 50


def test_a_random_window_is_decided_by_seed_and_round():
    window = StepWindow(1)
    assert places(window, range(20)) == places(window, range(20))
    assert places(window, range(20)) != places(window, range(20), seed=1)
    assert len(set(places(window, range(20)))) > 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "must be positive and `start` not negative, got 0, 25, 1 and 0"),
        ({"size": 1, "every": 0}, "got 1, 0, 1 and 0"),
        ({"size": 1, "stride": 0}, "got 1, 25, 0 and 0"),
        ({"size": 1, "start": -1}, "got 1, 25, 1 and -1"),
        ({"size": 1, "strategy": "sliding"}, "must be 'random' or 'progressive', got 'sliding'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        StepWindow(**options)


@pytest.mark.parametrize(("start", "stop"), [(0, 2), (3, None), (2, 4), (9, None)])
def test_a_window_that_does_not_fit_is_refused_before_the_first_round(start, stop):
    window = StepWindow(3, start=start, stop=stop)
    with pytest.raises(ValueError, match="A window of 3 steps does not fit into"):
        window.steps(0, 0, range(5))
    plan = make_plan(window=window, steps=tuple(range(5)))
    with pytest.raises(ValueError, match=r"smaller `size`.*`num_inference_steps`"):
        plan.check(1)


WINDOW = StepWindow(2, stop=3)  # (0, 1) or (1, 2)


@pytest.mark.parametrize("order", ["sample_major", "timestep_major"])
@pytest.mark.parametrize("choice", ["per_sample", "shared", "denoising"])
def test_a_round_trains_the_steps_of_its_window(choice, order):
    plan = make_plan(window=WINDOW, trained_steps=2, minibatch_size=8, step_choice=choice,
                     minibatch_order=order)  # fmt: skip
    plan.check(1)
    seen = set()
    for number in range(8):
        window = plan.noisy_steps(number)
        assert window == WINDOW.steps(number, plan.seed, plan.steps)
        seen.add(window)
        for trained in steps_of_samples(plan, number):
            assert {tuple(sorted(steps)) for steps in trained.values()} == {window}
    assert seen == {(0, 1), (1, 2)}


def test_a_share_of_the_window_is_drawn_for_each_sample():
    plan = make_plan(window=WINDOW, trained_steps=1, minibatch_size=8)
    for number in range(4):
        (first, second) = steps_of_samples(plan, number)
        drawn = {
            step for trained in (first, second) for steps in trained.values() for step in steps
        }
        assert drawn == set(plan.noisy_steps(number))
        assert all(len(steps) == 1 for steps in first.values())


def test_all_processes_have_the_same_window():
    options = {"window": WINDOW, "trained_steps": 2}
    for number in range(6):
        whole = pairs(make_plan(minibatch_size=16, **options), number)
        parts = [
            pairs(make_plan(minibatch_size=8, rank=rank, world_size=2, **options), number)
            for rank in range(2)
        ]
        for minibatch, *shares in zip(whole, *parts, strict=True):
            assert set().union(*shares) == minibatch


def test_without_a_window_all_steps_add_noise_and_are_drawn_from():
    plan = make_plan()
    assert plan.noisy_steps(0) is None
    whole = StepWindow(4)  # the only place there is
    windowed = dataclasses.replace(plan, window=whole)
    assert windowed.noisy_steps(0) == plan.steps
    assert pairs(windowed) == pairs(plan)

import math
from collections import Counter

import pytest
import torch

from lit_align.algorithms import AlignProp, DRTune, ReFL
from lit_align.algorithms.alignprop import truncated_steps
from lit_align.algorithms.drtune import chosen_steps
from lit_align.functional.noise import keyed_generator
from tests.algorithms.gradient_toy import OneProcess, make, minibatch

DRAWS = 2000
SIGMAS = 4  # the draws are fixed by seeds, so this is a bound on one outcome


def draws(truncation, total, mean=2, std=1.0, count=DRAWS):
    generator = torch.Generator().manual_seed(0)
    return [list(truncated_steps(truncation, total, mean, std, generator)) for _ in range(count)]


def within(observed, expected, variance, count=DRAWS):
    return abs(observed - expected) < SIGMAS * math.sqrt(variance / count)


@pytest.mark.parametrize(("total", "count"), [(1, 1), (7, 1), (7, 3), (50, 50)])
def test_uniform_steps_are_spaced_and_reach_every_start(total, count):
    check_uniform(total, count)


def test_uniform_steps_never_leave_the_schedule():
    for total in range(1, 26):
        for count in range(1, total + 1):
            for seed in range(5):
                steps = list(chosen_steps("uniform", count, total, keyed_generator(seed)))
                assert len(set(steps)) == count
                assert 0 <= min(steps) <= max(steps) < total


def check_uniform(total, count):
    # Starts s with s + (K - 1) floor(N / K) <= N - 1.
    spacing = total // count
    starts = Counter()
    for seed in range(20 * total):
        steps = list(chosen_steps("uniform", count, total, keyed_generator(seed)))
        assert steps == [steps[0] + j * spacing for j in range(count)]
        starts[steps[0]] += 1
    assert sorted(starts) == list(range(total - (count - 1) * spacing))


def test_other_step_strategies():
    generator = torch.Generator().manual_seed(0)
    assert list(chosen_steps("last", 3, 7, generator)) == [6]
    assert list(chosen_steps("tail", 3, 7, generator)) == [4, 5, 6]
    seen = Counter()
    for _ in range(DRAWS):
        steps = chosen_steps("random", 3, 7, generator)
        assert len(set(steps)) == 3
        assert list(steps) == sorted(steps)
        seen.update(steps)
    share = 3 / 7
    assert sorted(seen) == list(range(7))
    assert all(within(n / DRAWS, share, share * (1 - share)) for n in seen.values())


def test_fixed_truncation_keeps_the_last_steps():
    assert draws("fixed", 7, mean=3, count=2) == [[4, 5, 6]] * 2


def test_uniform_truncation_covers_all_numbers_of_steps():
    found = Counter()
    for steps in draws("uniform", 5):
        assert steps == list(range(steps[0], 5))
        found[len(steps)] += 1
    assert sorted(found) == [1, 2, 3, 4, 5]
    assert all(within(n / DRAWS, 0.2, 0.16) for n in found.values())


def normal_below(x, mean, std):
    return (1 + math.erf((x - mean) / (std * math.sqrt(2)))) / 2


@pytest.mark.parametrize(("total", "mean", "std"), [(50, 8, 5.0), (4, 2, 3.0)])
def test_normal_truncation_has_the_mean_of_the_cut_distribution(total, mean, std):
    # P(first = k) is that of the normal in [k, k + 1), given that k lies in 1..T-1.
    weights = {
        k: normal_below(k + 1, total - mean, std) - normal_below(k, total - mean, std)
        for k in range(1, total)
    }
    whole = sum(weights.values())
    expected = sum((total - k) * w for k, w in weights.items()) / whole
    variance = sum((total - k - expected) ** 2 * w for k, w in weights.items()) / whole
    kept = draws("normal", total, mean, std)
    assert all(steps == list(range(steps[0], total)) for steps in kept)
    counts = [len(steps) for steps in kept]
    assert min(counts) >= 1
    assert max(counts) <= total - 1
    assert within(sum(counts) / DRAWS, expected, variance)


def test_bernoulli_truncation_keeps_each_step_on_its_own():
    # Step i with probability (i + 1) / (T + 1), independent of the others; T! / (T + 1)^T, that
    # all are left out, is nothing here.
    total = 12
    kept = draws("bernoulli", total)
    single = Counter(step for steps in kept for step in steps)
    chance = [(step + 1) / (total + 1) for step in range(total)]
    for step, p in enumerate(chance):
        assert within(single[step] / DRAWS, p, p * (1 - p))
    for first in range(total):
        for second in range(first):
            both = sum(first in steps and second in steps for steps in kept) / DRAWS
            p = chance[first] * chance[second]
            assert within(both, p, p * (1 - p))


def test_bernoulli_truncation_always_keeps_a_step():
    # T! / (T + 1)^T = 2 / 9 for T = 2
    assert all(draws("bernoulli", 2, count=100))
    module = make(AlignProp, steps=2, truncation="bernoulli")
    for step in range(20):
        module._trainer = OneProcess()
        module._trainer.global_step = step
        loss, _ = module.loss(minibatch())
        loss.backward()


# One draw for each update


def drawn_steps(method, name, **options):
    """Return what two minibatches, another process, and 20 later updates draw."""
    module = make(method, steps=10, **options)
    path = []
    for trainer in [(0, 0, 0), (0, 0, 4), (1, 0, 8), *((0, step, 0) for step in range(1, 21))]:
        module._trainer = OneProcess()
        module._trainer.global_rank, module._trainer.global_step, first = trainer
        drawn = module.draw(minibatch(first=first))
        path.append((list(drawn.steps), drawn.trajectory.timesteps.shape[1]))
    assert path[0] == path[1] == path[2], name
    return path


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (ReFL, {"min_step": 2, "max_step": 8}),
        (AlignProp, {"truncation": "normal", "truncation_steps": 5}),
        (AlignProp, {"truncation": "uniform"}),
        (AlignProp, {"truncation": "bernoulli"}),
        (DRTune, {"truncation_steps": 3}),
        (DRTune, {"truncation_steps": 3, "train_step_strategy": "random"}),
        (DRTune, {"train_step_strategy": "last", "early_stop_ratio": 0.4}),
    ],
)
def test_draws_are_shared_within_an_update_and_differ_between_updates(method, options):
    path = drawn_steps(method, method.__name__, **options)
    assert len({str(steps) for steps in path}) >= 3


def test_refl_reaches_every_step_of_its_range():
    path = drawn_steps(ReFL, "ReFL", min_step=6, max_step=8)
    assert {tuple(steps) for steps, _ in path} == {(6,), (7,), (8,)}
    assert all(length == steps[0] + 1 for steps, length in path)


def test_drtune_stops_at_every_length_of_its_range():
    # 1 to round(0.3 * 10) = 3 steps before the end
    path = drawn_steps(DRTune, "DRTune", early_stop_ratio=0.3, truncation_steps=2)
    assert {length for _, length in path} == {7, 8, 9}
    assert all(max(steps) < length for steps, length in path)

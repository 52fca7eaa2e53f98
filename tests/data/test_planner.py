from collections import Counter

import pytest
import torch

from lit_align.data.planner import RoundPlan, strata
from lit_align.data.prompts import PromptLoader


@pytest.mark.parametrize("count", [2, 7, 19, 50])
@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.4, 0.99, 1.0])
def test_strata_divide_all_but_the_last_step_evenly(count, fraction):
    steps = tuple(range(3, 3 + count))
    *others, last = strata(steps, fraction)
    assert last == (steps[-1:], 1)
    assert len(others) == min(int(count * fraction), count - 1)  # all beside the last, at most
    assert all(drawn == 1 for _, drawn in others)
    if others:
        assert sum((pool for pool, _ in others), ()) == steps[:-1]
        sizes = {len(pool) for pool, _ in others}
        assert max(sizes) - min(sizes) <= 1


def test_five_strata_of_fifty_steps():
    bounds = [(0, 8), (9, 18), (19, 28), (29, 38), (39, 48), (49, 49)]
    assert [(pool[0], pool[-1]) for pool, _ in strata(tuple(range(50)), 0.1)] == bounds


def test_a_single_step_is_the_last():
    assert strata((0,), 1.0) == (((0,), 1),)


def make_plan(**options):
    pools = (((0, 1, 2, 3), 2), ((5, 6), 1), ((9,), 1))
    return RoundPlan(
        **{
            "prompts_per_round": 16, "samples_per_prompt": 1, "rollout_batch_size": 16,
            "minibatch_size": 4, "num_inner_epochs": 2, "steps": tuple(range(10)),
            "trained_steps": 4, "minibatch_order": "sample_major", "seed": 5, "pools": pools,
            **options,
        }
    )  # fmt: skip


def drawn(plan, round_index=0):
    """Return the steps of every sample and pass."""
    return [steps.tolist() for _, steps in plan.cut(round_index)]


@pytest.mark.parametrize("choice", ["per_sample", "shared", "denoising"])
def test_every_sample_draws_its_number_from_every_pool(choice):
    rows = drawn(make_plan(step_choice=choice))
    assert len(rows) == 32
    for steps in rows:
        assert len(set(steps)) == 4
        assert len(set(steps) & {0, 1, 2, 3}) == 2
        assert len(set(steps) & {5, 6}) == 1
        assert 9 in steps
    assert {step for steps in rows for step in steps} == {0, 1, 2, 3, 5, 6, 9} or choice == "shared"
    assert (len(set(map(tuple, rows))) == 2) == (choice == "shared")  # one draw per pass
    if choice == "denoising":
        assert all(steps == sorted(steps) for steps in rows)


def test_draws_from_a_pool_are_uniform():
    rows = [steps for number in range(20) for steps in drawn(make_plan(), number)]
    counts = torch.bincount(torch.tensor(rows).flatten(), minlength=10) / len(rows)
    # 640 draws: the standard error of a share is at most 0.02
    assert counts.tolist() == pytest.approx([0.5] * 4 + [0, 0.5, 0.5, 0, 0, 1], abs=0.08)


def test_without_pools_all_steps_are_one():
    one = make_plan(pools=((tuple(range(10)), 4),))
    assert drawn(make_plan(pools=())) == drawn(one)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_prompt_of_a_round_has_its_number_of_samples(world):
    """Over all processes, with its whole group on one of them; other prompts in the next round."""
    prompts = [(f"prompt {i}", None) for i in range(40)]
    options = {"prompts_per_round": 8, "samples_per_prompt": 3, "trained_steps": 4}
    plans = [make_plan(**options, rank=rank, world_size=world) for rank in range(world)]
    loaders = [PromptLoader(prompts, 1, shuffle=True) for _ in plans]
    rounds = []
    for number in range(2):
        parts = [p.deal(loader, number) for p, loader in zip(plans, loaders, strict=True)]
        counts = Counter(prompt for part in parts for prompt in part.prompts)
        assert len(counts) == 8
        assert set(counts.values()) == {3}
        for part in parts:
            assert set(Counter(part.prompts).values()) == {3}
            assert set(Counter(part.group_ids.tolist()).values()) == {3}
            assert len(set(zip(part.prompts, part.group_ids.tolist(), strict=True))) == 8 // world
        rounds.append(set(counts))
    assert not rounds[0] & rounds[1]


@pytest.mark.parametrize("order", ["sample_major", "timestep_major"])
@pytest.mark.parametrize("prompts", [6, 96])  # of 96 several lie in one lane
def test_whole_groups_lie_side_by_side_at_one_step(order, prompts):
    options = {"prompts_per_round": prompts, "samples_per_prompt": 3, "rollout_batch_size": 6,
               "minibatch_size": 12, "minibatch_order": order, "whole_groups": True}  # fmt: skip
    plan = make_plan(**options)
    plan.check(1)
    minibatches = [[each.view(-1, 3) for each in pair] for pair in plan.cut(0)]
    assert len(minibatches) == plan.minibatches == prompts * 3 * 4 // 12 * 2
    for samples, steps in minibatches:
        assert (samples == samples[:, :1] // 3 * 3 + torch.arange(3)).all()
        assert (steps == steps[:, :1]).all()
    half = len(minibatches) // 2
    for number in range(2):  # passes
        part = minibatches[number * half :][:half]
        groups = [first // 3 for samples, _ in part for first in samples[:, 0].tolist()]
        told = [step for _, steps in part for step in steps[:, 0].tolist()]
        assert Counter(groups) == dict.fromkeys(range(prompts), 4)
        assert len(set(zip(groups, told, strict=True))) == prompts * 4
        rows = {g: [s for h, s in zip(groups, told, strict=True) if h == g] for g in groups}
        assert len(set(map(tuple, rows.values()))) > 3  # each draws its own
        if order == "sample_major":
            assert len(set(groups[:4])) == 1
        else:
            assert len(set(groups[:prompts])) == prompts


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("order", ["sample_major", "timestep_major"])
@pytest.mark.parametrize("prompts", [8, 96])
def test_processes_see_together_the_groups_of_one(prompts, order, world):
    def seen(size, **dealt):
        plan = make_plan(prompts_per_round=prompts, samples_per_prompt=2, rollout_batch_size=2,
                         minibatch_size=size, minibatch_order=order, whole_groups=True,
                         **dealt)  # fmt: skip
        plan.check(1)
        return [
            set(zip(plan.positions[samples].tolist(), steps.tolist(), strict=True))
            for samples, steps in plan.cut(3)
        ]

    parts = [seen(32 // world, rank=rank, world_size=world) for rank in range(world)]
    for whole, *shares in zip(seen(32), *parts, strict=True):
        assert sum(map(len, shares)) == len(whole) == 32
        assert set().union(*shares) == whole


def test_minibatches_that_break_groups_are_refused():
    plan = make_plan(samples_per_prompt=6, minibatch_size=16, whole_groups=True)
    message = r"`minibatch_size` \(16\) must be a multiple of 6 and divide the 384 pairs .*images "
    with pytest.raises(ValueError, match=message + r"of a prompt.*use 6, 12, 24, 48, 96\."):
        plan.check(1)

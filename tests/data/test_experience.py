import dataclasses

import pytest
import torch

from lit_align.data.experience import ChainedLoader, ExperienceLoader
from lit_align.data.planner import RoundPlan
from lit_align.data.prompts import PromptLoader
from lit_align.trajectory import Trajectory

PROMPTS = [(f"prompt {i}", {"number": i}) for i in range(40)]


def make_plan(**changes):
    return RoundPlan(
        **{
            "prompts_per_round": 8,
            "samples_per_prompt": 2,
            "rollout_batch_size": 4,
            "minibatch_size": 12,
            "num_inner_epochs": 2,
            "steps": (0, 1, 2, 3),
            "trained_steps": 3,
            "minibatch_order": "sample_major",
            "seed": 5,
            **changes,
        }
    )


def pairs(plan, round_index=0):
    """Return, per minibatch, the set of (global position, step) pairs."""
    batch = plan.deal(PromptLoader(PROMPTS, 1, shuffle=True), round_index)
    return [
        {(int(batch.positions[s]), int(k)) for s, k in zip(samples, steps, strict=True)}
        for samples, steps in plan.cut(round_index)
    ]


@pytest.mark.parametrize("order", ["sample_major", "timestep_major"])
def test_every_pass_trains_each_sample_on_the_promised_number_of_steps(order):
    plan = make_plan(minibatch_order=order)
    minibatches = pairs(plan)
    assert len(minibatches) == plan.minibatches == 16 * 3 // 12 * 2
    for half in (minibatches[:4], minibatches[4:]):
        trained = [pair for minibatch in half for pair in minibatch]
        assert len(set(trained)) == 16 * 3
        for position in range(16):
            assert len({k for p, k in trained if p == position}) == 3
    assert minibatches[:4] != minibatches[4:]


def test_orders_are_what_their_names_say():
    samples, _ = next(make_plan(minibatch_order="sample_major").cut(0))
    assert len(set(samples.tolist())) == 4  # 12 pairs = 4 samples x 3 steps
    samples, _ = next(make_plan(minibatch_order="timestep_major").cut(0))
    assert len(set(samples.tolist())) == 12


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("order", ["sample_major", "timestep_major"])
@pytest.mark.parametrize("prompts", [8, 96])
def test_processes_see_together_what_one_process_sees(prompts, order, world):
    options = {"prompts_per_round": prompts, "minibatch_order": order}
    whole = pairs(make_plan(minibatch_size=24, **options))
    parts = [
        pairs(make_plan(minibatch_size=24 // world, rank=rank, world_size=world, **options))
        for rank in range(world)
    ]
    for minibatch, *shares in zip(whole, *parts, strict=True):
        assert sum(map(len, shares)) == len(minibatch)
        assert set().union(*shares) == minibatch


def steps_of_samples(plan, round_index=0):
    """Return, per pass, each sample's steps in the order that they are trained in."""
    passes = [{s: [] for s in range(plan.samples)} for _ in range(plan.num_inner_epochs)]
    for number, (samples, steps) in enumerate(plan.cut(round_index)):
        trained = passes[number * plan.num_inner_epochs // plan.minibatches]
        for sample, step in zip(samples.tolist(), steps.tolist(), strict=True):
            trained[sample].append(step)
    return passes


@pytest.mark.parametrize("order", ["sample_major", "timestep_major"])
def test_step_choices_are_what_their_names_say(order):
    chosen = {
        choice: steps_of_samples(make_plan(step_choice=choice, minibatch_order=order))
        for choice in ("per_sample", "shared", "denoising")
    }
    alike = {c: [len(set(map(tuple, p.values()))) for p in passes] for c, passes in chosen.items()}
    assert alike["shared"] == [1, 1]  # pass by pass
    assert chosen["shared"][0] != chosen["shared"][1]
    assert min(alike["per_sample"] + alike["denoising"]) > 1
    for drawn, increasing in zip(chosen["per_sample"], chosen["denoising"], strict=True):
        assert {s: sorted(steps) for s, steps in drawn.items()} == increasing


def test_shared_steps_are_drawn_anew_each_round_and_alike_on_all_processes():
    def drawn(round_index, **options):
        plan = make_plan(step_choice="shared", num_inner_epochs=1, trained_steps=2,
                         **{"minibatch_size": 8, **options})  # fmt: skip
        return steps_of_samples(plan, round_index)[0][0]

    assert len({tuple(drawn(number)) for number in range(8)}) > 1
    for number in range(8):
        assert drawn(number, rank=1, world_size=2, minibatch_size=4) == drawn(number)


def test_dealt_prompts_are_the_same_draw_on_every_process():
    whole = make_plan().deal(PromptLoader(PROMPTS, 1, shuffle=True), 3)
    parts = [
        make_plan(rank=rank, world_size=2).deal(PromptLoader(PROMPTS, 1, shuffle=True), 3)
        for rank in (0, 1)
    ]
    told = dict(zip(whole.positions.tolist(), whole.prompts, strict=True))
    for part in parts:
        for position, prompt, group, metadata in zip(
            part.positions.tolist(),
            part.prompts,
            part.group_ids.tolist(),
            part.metadata,
            strict=True,
        ):
            assert told[position] == prompt
            assert group == 3 * 8 + position // 2
            assert metadata == {"number": int(prompt.split()[1])}
    assert len(set(whole.group_ids.tolist())) == 8


@pytest.mark.parametrize(
    ("changes", "accumulate", "message"),
    [
        ({"rollout_batch_size": 5}, 1, r"`rollout_batch_size` \(5\) .* 16 samples.*use .*4.*8"),
        ({"minibatch_size": 7}, 1, r"`minibatch_size` \(7\) .* 48 pairs \(16 samples x 3 steps\)"),
        ({}, 3, r"`trainer.accumulate_grad_batches` \(3\) .* 8 minibatches.*use 1, 2, 4, 8"),
        ({"world_size": 3}, 1, r"`prompts_per_round` \(8\) .* processes \(3\); use .*6, 9"),
    ],
)
def test_sizes_that_do_not_divide_are_named_with_values_that_do(changes, accumulate, message):
    with pytest.raises(ValueError, match=message):
        make_plan(**changes).check(accumulate)


def test_arithmetic_in_words():
    text = make_plan().describe(2)
    assert "8 prompts x 2 = 16 images" in text
    assert "8 minibatches of 12 pairs" in text
    assert "4 optimiser step(s)" in text


class FakeCollector:
    """Counts its rounds; trajectories hold the round's number."""

    minibatches_in_flight = 0

    @property
    def minibatches_per_round(self):
        return self.plan.minibatches

    def __init__(self, plan, lost=0):
        self.plan, self.lost, self.collected = plan, lost, []

    def collect(self, batch, round_index):
        self.collected.append(round_index)
        count = len(batch)
        return Trajectory(
            latents=torch.full((count, 5, 1), float(round_index)),
            timesteps=torch.arange(4).expand(count, 4),
            log_probs=torch.zeros(count, 4),
            conditioning={"prompt_embeds": batch.positions[:, None].float()},
            guidance_scale=1.0,
            num_inference_steps=4,
            batch=batch,
            advantages=batch.positions.float(),
            weights=torch.ones(count),
        )

    def minibatches(self, trajectory, round_index):
        cuts = list(self.plan.cut(round_index))
        for samples, steps in cuts[: len(cuts) - self.lost]:
            yield trajectory.transitions(samples, steps)


def make_loader(**options):
    return ExperienceLoader(
        FakeCollector(make_plan(), **options), PromptLoader(PROMPTS, 1, shuffle=True)
    )


def test_rounds_are_lazy_and_one_epoch_is_one_round():
    loader = make_loader()
    iterator = iter(loader)
    assert loader.collector.collected == []
    assert len([next(iterator), *iterator]) == len(loader) == 8
    assert loader.collector.collected == [0]
    assert {float(m.latents[0]) for m in loader} == {1.0}


@pytest.mark.parametrize("lost", [1, -1])
def test_a_broken_promise_raises(lost):
    loader = make_loader(lost=max(lost, 0))
    if lost < 0:
        plan = loader.collector.plan
        loader.collector.plan = dataclasses.replace(plan, num_inner_epochs=1)
        loader.collector.minibatches = lambda trajectory, r: (
            trajectory.transitions(s, k) for s, k in plan.cut(r)
        )
    with pytest.raises(RuntimeError, match="minibatches it promised"):
        list(loader)


@pytest.mark.parametrize("served", [0, 3, 8])
def test_state_resumes_in_the_middle_of_a_round(served):
    uninterrupted, loader, resumed = make_loader(), make_loader(), make_loader()
    expected = [m.advantages for m in uninterrupted] + [m.advantages for m in uninterrupted]
    iterator = iter(loader)
    for _ in range(served):
        next(iterator)
    resumed.load_state_dict(loader.state_dict())
    tail = [m.advantages for m in resumed]
    if served < 8:
        tail += [m.advantages for m in resumed]
    for left, right in zip(expected[served:], tail, strict=True):
        assert torch.equal(left, right)
    assert resumed.collector.collected == ([1] if served > 0 else [0, 1])


def test_a_round_in_progress_continues_on_two_processes():
    def seen(minibatch):
        positions = minibatch.conditioning["prompt_embeds"][:, 0].tolist()
        return set(zip(positions, minibatch.timesteps.tolist(), strict=True))

    whole = make_loader()
    iterator = iter(whole)
    for _ in range(3):
        next(iterator)
    state = whole.state_dict()
    parts = []
    for rank in range(2):
        plan = make_plan(minibatch_size=6, rank=rank, world_size=2)
        part = ExperienceLoader(FakeCollector(plan), PromptLoader(PROMPTS, 1, shuffle=True))
        part.load_state_dict(state)
        parts.append([seen(minibatch) for minibatch in part])
    rest = [seen(minibatch) for minibatch in iterator]
    assert len(rest) == 5
    for expected, left, right in zip(rest, *parts, strict=True):
        assert left | right == expected
        assert len(left) + len(right) == len(expected)


def test_a_minibatch_in_flight_is_yielded_again():
    loader, resumed = make_loader(), make_loader()
    iterator = iter(loader)
    minibatches = [next(iterator) for _ in range(3)]
    loader.collector.minibatches_in_flight = 1  # training broke off in the third
    resumed.load_state_dict(loader.state_dict())
    assert torch.equal(next(iter(resumed)).advantages, minibatches[2].advantages)


def test_a_round_that_failed_is_collected_again_with_the_same_prompts():
    expected, loader, resumed = make_loader(), make_loader(), make_loader()
    list(expected), list(loader)
    collect = loader.collector.collect
    loader.collector.collect = lambda batch, number: 1 / 0
    with pytest.raises(ZeroDivisionError):
        list(loader)
    resumed.load_state_dict(loader.state_dict())
    loader.collector.collect = collect
    for again in (loader, resumed):
        again.collector.collected.clear()
    for left, right, third in zip(expected, loader, resumed, strict=True):
        assert torch.equal(left.conditioning["prompt_embeds"], right.conditioning["prompt_embeds"])
        assert torch.equal(left.conditioning["prompt_embeds"], third.conditioning["prompt_embeds"])
    assert loader.collector.collected == resumed.collector.collected == [1]


def test_changed_prompts_are_refused():
    state = PromptLoader(PROMPTS, 1, shuffle=True).state_dict()
    changed = PromptLoader([*PROMPTS[:-1], ("another", None)], 1, shuffle=True)
    with pytest.raises(ValueError, match=r"prompts \(40\) are not those .* made with \(40\)"):
        changed.load_state_dict(state)


def test_round_state_is_loadable_as_weights_only(tmp_path):
    loader = make_loader()
    next(iter(loader))
    torch.save(loader.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = make_loader()
    resumed.load_state_dict(state)
    assert len(list(resumed)) == 7


def test_changed_pairs_are_refused():
    def make(beside):
        return ExperienceLoader(
            FakeCollector(make_plan()), PromptLoader(PROMPTS, 1, shuffle=True), beside
        )

    state = make("pairs").state_dict()
    make("pairs").load_state_dict(state)
    for changed in ("others", ""):
        with pytest.raises(ValueError, match="image-text pairs are not those"):
            make(changed).load_state_dict(state)


PARTS = (8, 6, 2)  # minibatches


def make_chain(plans=None):
    plans = plans or [
        make_plan(),
        make_plan(prompts_per_round=6, samples_per_prompt=4, num_inner_epochs=1),
        make_plan(prompts_per_round=4, num_inner_epochs=1),
    ]
    return ChainedLoader(
        [
            ExperienceLoader(
                FakeCollector(plan), PromptLoader(PROMPTS[number:], 1, shuffle=True, seed=number)
            )
            for number, plan in enumerate(plans)
        ]
    )


def collected(chain):
    return [part.collector.collected for part in chain.parts]


def content(minibatch):
    """Return the round, and what tells minibatches of a round and of its parts apart."""
    positions = minibatch.conditioning["prompt_embeds"][:, 0].tolist()
    return float(minibatch.latents[0]), positions, minibatch.timesteps.tolist()


def test_a_chain_takes_its_parts_in_turn_and_collects_each_when_its_turn_comes():
    chain = make_chain()
    assert [len(part) for part in chain.parts] == [*PARTS]
    for number in range(2):
        done, iterator = [*range(number)], iter(chain)
        for turn, size in enumerate(PARTS):
            rounds = [[*done, number]] * (turn + 1) + [done] * (len(PARTS) - turn - 1)
            for _ in range(size):
                assert float(next(iterator).latents[0]) == number
                assert collected(chain) == rounds
        assert next(iterator, None) is None
    alone = make_chain().parts
    expected = [content(minibatch) for part in alone for minibatch in part]
    assert [content(minibatch) for minibatch in make_chain()] == expected
    assert len(expected) == len(chain) == sum(PARTS)


@pytest.mark.parametrize("served", range(2 * sum(PARTS) + 1))
def test_a_chain_resumes_anywhere(served):
    """In a part, between two, after the last: what follows is what would have followed."""
    uninterrupted, chain, resumed = make_chain(), make_chain(), make_chain()
    expected = [content(minibatch) for _ in range(4) for minibatch in uninterrupted]
    stream = (minibatch for _ in range(2) for minibatch in chain)
    for _ in range(served):
        next(stream)
    resumed.load_state_dict(chain.state_dict())
    again = make_chain()  # from a file that was written before anything was yielded
    again.load_state_dict(resumed.state_dict())
    for loader in (resumed, again):
        found = [content(minibatch) for _ in range(2) for minibatch in loader]
        assert found == expected[served : served + len(found)]
        assert len(found) == 2 * sum(PARTS) - served % sum(PARTS)


def test_a_part_that_failed_is_collected_when_a_chain_is_resumed():
    for turn in range(3):
        chain, resumed, expected = make_chain(), make_chain(), make_chain()
        list(chain), list(expected)
        failing = chain.parts[turn].collector
        failing.collect = lambda batch, number: 1 / 0
        stream, yielded = iter(chain), sum(PARTS[:turn])
        for _ in range(yielded):
            next(stream)
        with pytest.raises(ZeroDivisionError):
            next(stream)
        resumed.load_state_dict(chain.state_dict())
        remaining = [content(minibatch) for minibatch in expected][yielded:]
        del failing.collect  # it works again
        for again in (chain, resumed):
            assert [content(minibatch) for minibatch in again] == remaining


def test_prompt_lists_of_tasks_need_tasks():
    with pytest.raises(ValueError, match=r"\['a', 'b'\], but NoneType has no tasks"):
        ExperienceLoader(None, {"a": None, "b": None})

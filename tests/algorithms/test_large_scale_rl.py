import pytest
import torch
import torch.nn.functional as F

from lit_align.algorithms import DDPO, LargeScaleRL, Task
from lit_align.algorithms.large_scale_rl import denoising_loss
from lit_align.data.image_text import PairStream, ShapesPairs
from lit_align.functional.advantages import batch_advantages
from lit_align.functional.noise import keyed_generator
from lit_align.rewards import Colorfulness, JPEGCompressibility, RewardModule
from lit_align.trajectory import PairBatch, PromptBatch, Trajectory, Transition
from tests.algorithms.harness import POLICY_GRADIENT, make_trainer, prompt_loader
from tests.algorithms.test_ddpo import OneProcess
from tests.conftest import tiny_policy

ATOL = 1e-6


def pairs(size=16):
    return PairStream(ShapesPairs(size, seed=0), seed=0)


def trained(module, *experience, **options):
    trainer = make_trainer(**options)
    trainer.fit(module, module.experience(*experience))
    return {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}


def large(family="sd", reward=None, tasks=None, **options):
    options = {**POLICY_GRADIENT, "pretraining": "none", **options}
    reward = None if tasks else reward or Colorfulness()
    return LargeScaleRL(tiny_policy(family), reward, tasks=tasks, **options)


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_one_task_without_pretraining_is_ddpo(family):
    same = {
        "advantage_norm": "batch", "advantage_eps": 1e-7, "std_unbiased": True,
        "adv_clip_max": 10.0, "minibatch_order": "timestep_major", "step_choice": "shared",
        "timestep_fraction": 0.7, "weight_decay": 1e-2,
    }  # fmt: skip
    ddpo = trained(
        DDPO(tiny_policy(family), Colorfulness(), **{**POLICY_GRADIENT, **same}), prompt_loader()
    )
    ours = trained(large(family, timestep_fraction=0.7), prompt_loader())
    start = trained(large(family, timestep_fraction=0.7), prompt_loader(), max_epochs=0)
    for name, weight in ours.items():
        torch.testing.assert_close(weight, ddpo[name], atol=ATOL, rtol=0)
    assert any(not torch.equal(weight, start[name]) for name, weight in ours.items())


def test_the_papers_advantages():
    rewards = torch.tensor([1.0, 3.0, torch.nan, 5.0, -1.0])
    advantages = batch_advantages(rewards, eps=1e-7, correction=1)
    known = advantages[~advantages.isnan()]
    assert len(known) == 4
    assert known.mean().item() == pytest.approx(0, abs=1e-7)
    assert known.std().item() == pytest.approx(1, abs=1e-5)
    outlier = torch.zeros(400)
    outlier[0] = 1.0  # 19.95 standard deviations
    module = large()
    assert module.normalizer.correction == 1
    assert module.adv_clip_max == 10
    assert batch_advantages(outlier, 1e-7, 1).max() > 10
    module._trainer = OneProcess()
    ids, empty = torch.arange(400), torch.zeros(400, 1)
    batch = PromptBatch(["x"] * 400, [None] * 400, ids, ids, ids)
    trajectory = Trajectory(empty, empty, empty, {}, 1.0, 1, batch=batch, rewards=outlier)
    assert module.compute_targets(trajectory).advantages.max() == 10


def test_pretraining_has_the_gradient_of_the_denoising_error():
    policy = tiny_policy("sd", train="full")
    batch = pairs().batch(0, 4)
    loss = denoising_loss(policy, batch, seed=7)
    assert loss.shape == (4,)
    loss.mean().backward()
    found = {n: p.grad.clone() for n, p in policy.denoiser.named_parameters()}
    policy.zero_grad()
    total = 0.0
    for row, place in enumerate(batch.positions.tolist()):
        generator = keyed_generator("pairs", 7, place)
        t = policy.scheduler.sample_timesteps(1, generator)
        eps = torch.randn(4, 8, 8, generator=generator)[None]
        alpha = policy.pipeline.scheduler.alphas_cumprod[t.long()].view(1, 1, 1, 1)
        clean = policy.encode(batch.images[row : row + 1])
        noised = alpha.sqrt() * clean + (1 - alpha).sqrt() * eps
        text = policy.encode_prompt([batch.prompts[row]])["prompt_embeds"]
        output = policy.denoiser(noised, t, encoder_hidden_states=text).sample
        total = total + F.mse_loss(output, eps) / 4
    assert total.item() == pytest.approx(loss.mean().item(), abs=1e-5)
    total.backward()
    for name, p in policy.denoiser.named_parameters():
        torch.testing.assert_close(p.grad, found[name], atol=ATOL, rtol=1e-4)


class Brightness(RewardModule):
    def forward(self, images, prompts, metadata=None, group_ids=None):
        return images.mean(dim=(1, 2, 3))


def tasks():
    return {
        "color": Task(Colorfulness()),
        "groups": Task(Brightness(), prompts_per_round=2, samples_per_prompt=4),
    }


def loaders():
    return {"color": prompt_loader(), "groups": prompt_loader(seed=5)}


def spied(module):
    """Return the list of minibatches that the module's loss will see."""
    seen, loss = [], module.loss
    module.loss = lambda minibatch: (seen.append((module.task, minibatch)), loss(minibatch))[1]
    return seen


def test_a_round_takes_the_tasks_in_turn_and_ends_with_pairs():
    module = large(tasks=tasks(), pretraining="separate", pretraining_batch_size=5)
    seen = spied(module)
    rounds = []
    collect = module.collect
    module.collect = lambda batch, r: (rounds.append((module.task, r, batch)), collect(batch, r))[1]
    trainer = make_trainer(max_epochs=2, accumulate_grad_batches=2)
    module.timestep_fraction = 0.7  # 2 of 3 steps: 2 minibatches of 8 pairs a task
    trainer.fit(module, module.experience(loaders(), pairs()))
    kinds = [(task, type(minibatch)) for task, minibatch in seen]
    one = [("color", Transition)] * 2 + [("groups", Transition)] * 2 + [("groups", PairBatch)] * 2
    assert kinds == one * 2
    assert trainer.global_step == 2 * 3
    assert [(task, r) for task, r, _ in rounds] == [
        ("color", 0), ("groups", 0), ("color", 1), ("groups", 1),
    ]  # fmt: skip
    assert [len(batch.group_ids.unique()) for _, _, batch in rounds] == [4, 2, 4, 2]
    # No pair twice before all were seen, and prompts of tasks have statistics of their own.
    places = torch.cat([m.positions for _, m in seen if isinstance(m, PairBatch)])
    assert places.tolist() == list(range(20))
    assert rounds[1][2].prompt_ids.min() >= 1 << 40
    names = set(trainer.callback_metrics)
    assert {"rollout/reward/color", "rollout/reward/groups", "train/pretraining_loss"} <= names
    assert module.counters["reward_queries"] == 2 * 16
    # Sampled and trained on: 2 rounds of 2 tasks of 8 x 3, and 2 x 2 steps of 8; 20 pairs.
    assert module.counters["denoiser_calls"] == 2 * 2 * (24 + 16) + 20


def test_later_tasks_sample_from_updated_weights():
    module = large(tasks=tasks())
    sums = {}
    collect = module.collect

    def recorded(batch, round_index):
        weights = [p.sum() for p in module.policy.parameters() if p.requires_grad]
        sums[module.task] = torch.stack(weights).sum().item()
        return collect(batch, round_index)

    module.collect = recorded
    trained(module, loaders())
    assert sums["color"] != sums["groups"]


def test_tasks_do_not_share_noise():
    module = large(tasks={"one": Task(Colorfulness()), "two": Task(Brightness())}, lr=0.0)
    latents = {}
    rollout = module.rollout

    def recorded(batch, round_index):
        trajectory = rollout(batch, round_index)
        latents[module.task] = trajectory.latents[:, 0]
        return trajectory

    module.rollout = recorded
    trained(module, {"one": prompt_loader(), "two": prompt_loader()})
    assert not torch.isclose(latents["one"], latents["two"]).any()


def test_weighted_pretraining_adds_its_loss():
    module = large(pretraining="weighted", pretraining_beta=0.5, pretraining_batch_size=3)
    module.timestep_fraction = 1.0
    seen = spied(module)
    trained(module, prompt_loader(), pairs(), max_epochs=2)
    minibatches = [minibatch for _, minibatch in seen]
    assert all(isinstance(m, Transition) and len(m.pairs) == 3 for m in minibatches)
    places = torch.cat([m.pairs.positions for m in minibatches])
    assert places.tolist() == list(range(2 * 3 * 3))
    one = minibatches[-1]
    with torch.no_grad():
        together, logs = module.loss(one)
        alone, _ = module.loss(one.replace(pairs=None))
        expected = denoising_loss(module.policy, one.pairs, module.seed).mean()
    assert logs["train/pretraining_loss"].item() == pytest.approx(expected.item())
    assert together.item() == pytest.approx((alone + 0.5 * expected).item())


def test_pairs_of_the_weighted_loss_are_counted():
    module = large(pretraining="weighted", pretraining_batch_size=3, timestep_fraction=1.0)
    trained(module, prompt_loader(), pairs())
    assert module.counters["denoiser_calls"] == 24 + 24 + 3 * 3


class Together(Brightness):
    granularity = "batchwise"


def test_every_tasks_reward_must_suit_the_background():
    both = {"color": Task(Colorfulness()), "all": Task(Together())}
    with pytest.raises(ValueError, match="Together looks at several images together"):
        trained(large(tasks=both, background_rewards=True), {n: prompt_loader() for n in both})


def test_a_task_normalises_its_rewards_in_its_own_way():
    ways = {"color": Task(Colorfulness(), advantage_norm="batch"), "groups": tasks()["groups"]}
    module = large(tasks=ways, advantage_norm="group", adv_clip_max=None)
    found = {}
    compute_targets = module.compute_targets

    def recorded(trajectory):
        targets = compute_targets(trajectory)
        found[module.task] = (trajectory.rewards, targets.advantages)
        return targets

    module.compute_targets = recorded
    trained(module, loaders())
    rewards, advantages = found["color"]
    expected = batch_advantages(rewards, eps=1e-7, correction=1)
    torch.testing.assert_close(advantages, expected)
    groups = found["groups"][1].reshape(2, 4)
    torch.testing.assert_close(groups.mean(dim=1), groups.new_zeros(2), atol=1e-6, rtol=0)
    assert groups.std(dim=1).tolist() == pytest.approx([1, 1], abs=1e-3)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="either a `reward` or `tasks`"):
        LargeScaleRL(tiny_policy("sd"))
    with pytest.raises(ValueError, match="either a `reward` or `tasks`"):
        LargeScaleRL(tiny_policy("sd"), Colorfulness(), tasks=tasks())
    with pytest.raises(ValueError, match="`pretraining: separate` needs `data.init_args.pairs`"):
        large(pretraining="separate").experience(prompt_loader())
    with pytest.raises(ValueError, match="`pretraining: none` has no use for"):
        large().experience(prompt_loader(), pairs())
    with pytest.raises(ValueError, match=r"\['color', 'groups'\], got one list for all"):
        large(tasks=tasks()).experience(prompt_loader())
    with pytest.raises(ValueError, match=r"\['color', 'groups'\], got \['color'\]"):
        large(tasks=tasks()).experience({"color": prompt_loader()})
    with pytest.raises(ValueError, match="DDPO learns from no `pairs`"):
        DDPO(tiny_policy("sd"), Colorfulness()).experience(prompt_loader(), pairs())
    uneven = {"color": Task(Colorfulness(), prompts_per_round=3)}
    with pytest.raises(ValueError, match=r"`rollout_batch_size` \(8\) must divide the 6 samples"):
        trained(large(tasks=uneven), {"color": prompt_loader()})
    alone = {"color": Task(JPEGCompressibility(), 8, 1)}
    with pytest.raises(ValueError, match="needs `samples_per_prompt` of at least 2"):
        trained(large(tasks=alone, advantage_norm="group"), {"color": prompt_loader()})
    alone["color"].advantage_norm = "group_mean"
    with pytest.raises(ValueError, match="group_mean` needs `samples_per_prompt` of at least 2"):
        trained(large(tasks=alone), {"color": prompt_loader()})
    alone["color"].advantage_norm = "per_prompt"
    with pytest.raises(ValueError, match="takes the population's standard deviation"):
        large(tasks=alone)


def test_every_task_is_a_trained_reward():
    module = large(tasks=tasks())
    assert module.trained_rewards == list(module.rewards) == ["color", "groups"]

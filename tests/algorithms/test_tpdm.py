"""TPDM: its gradient by quadrature, and what holds of its rounds."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.distributions import Beta, kl_divergence

from lit_align.algorithms import DDPO, TPDM
from lit_align.functional.advantages import step_discount
from lit_align.functional.noise import sample_generators
from lit_align.policies.time_prediction import reference_shapes
from lit_align.rewards import Colorfulness, RewardModule
from lit_align.rewards.base import quantize
from lit_align.trajectory import PromptBatch, Trajectory
from tests.algorithms.harness import (
    PROMPTS,
    Recorder,
    fit,
    make_tpdm,
    prompt_loader,
    weights,
)
from tests.conftest import tiny_policy

ATOL = 1e-6
T_MIN = 0.4
NODES = 10
GAMMA = 0.7


class StepHead(nn.Module):
    """A head that knows the number of the step only, from its one-hot embedding."""

    def __init__(self):
        super().__init__()
        # Of both steps: Beta(6, 5) and Beta(5, 6), polynomials that quadrature integrates exactly.
        self.logits = nn.Parameter(torch.tensor([[5, 4], [4, 5]], dtype=torch.float64).log())

    def forward(self, maps, embedding, levels):
        return (1 + (embedding @ self.logits).exp()).unbind(dim=1)


class OneProcess:
    """Stands in for a trainer."""

    world_size, global_rank = 1, 0


def module_of(**options):
    policy = tiny_policy("sd", train="none")
    module = TPDM(policy, Colorfulness(), t_min=T_MIN, head_width=8, **options)
    module._trainer = OneProcess()
    return module


def nodes(low, high, count=NODES):
    """Return Gauss-Legendre nodes and weights on an interval."""
    matrix = torch.zeros(count, count, dtype=torch.float64)
    k = torch.arange(1, count, dtype=torch.float64)
    off = k / (4 * k**2 - 1).sqrt()
    matrix[range(count - 1), range(1, count)] = matrix[range(1, count), range(count - 1)] = off
    values, vectors = torch.linalg.eigh(matrix)
    return low + (values + 1) / 2 * (high - low), vectors[0] ** 2 * (high - low)


def paths():
    """Return all trajectories of up to two steps: ratios [M, 2], steps [M] and weights [M].

    One that falls below t_min at once ends there; the others may at the second step, or at the cap.
    """
    below, above = nodes(0.0, T_MIN), nodes(T_MIN, 1.0)
    whole = [torch.cat(parts) for parts in zip(below, above, strict=True)]
    short = torch.stack([below[0], torch.zeros(NODES).double()], dim=1)
    long = torch.cartesian_prod(above[0], whole[0])
    weight = torch.cat([below[1], torch.cartesian_prod(above[1], whole[1]).prod(dim=1)])
    steps = torch.tensor([1] * len(short) + [2] * len(long))
    return torch.cat([short, long]), steps, weight


def reward_of(ratios, steps):
    """Return something that both ratios have a part in."""
    return 1 + 2 * ratios[:, 0] ** 2 + (steps == 2) * (ratios[:, 1] - 0.3)


def log_probs(head, ratios, steps):
    shapes = 1 + head.logits.exp()
    alive = torch.arange(2) < steps[:, None]
    safe = ratios.where(alive, 0.5)
    found = Beta(shapes[:, 0], shapes[:, 1]).log_prob(safe)
    return found.where(alive, 0.0)


def trajectory_of(head, ratios, steps, rewards, groups):
    count = len(ratios)
    alive = torch.arange(2) < steps[:, None]
    levels = torch.stack([torch.ones(count).double(), ratios[:, 0]], dim=1) * alive
    extras = {
        "alive": alive,
        "levels": levels,
        "ratios": ratios * alive,
        "features": torch.zeros(count, 2, 1),
        "embedding": torch.eye(2).double().expand(count, 2, 2),
        "shapes": (1 + head.logits.detach().exp()).expand(count, 2, 2),
    }
    batch = PromptBatch(["x"] * count, [None] * count, groups, torch.arange(count), groups)
    empty = torch.zeros(count, 1)
    return Trajectory(
        empty, empty, log_probs(head, ratios, steps).detach(), {}, 1.0, 2, batch=batch,
        rewards=rewards, extras=extras,
    )  # fmt: skip


def pairs_of_paths(module):
    """Return the minibatch of all pairs of trajectories, a pair to a prompt, and the weights."""
    ratios, steps, weight = paths()
    head = module.head = StepHead()
    chance = weight * log_probs(head, ratios, steps).sum(dim=1).exp().detach()
    assert chance.sum().item() == pytest.approx(1, abs=1e-12)
    count = len(ratios)
    both = torch.cartesian_prod(torch.arange(count), torch.arange(count))
    members, groups = both.flatten(), torch.arange(len(both)).repeat_interleave(2)
    rewards = reward_of(ratios, steps)[members]
    trajectory = trajectory_of(head, ratios[members], steps[members], rewards, groups)
    trajectory = module._weigh(module.compute_targets(trajectory))
    assert (trajectory.weights == 1).all()
    chances = chance[both].prod(dim=1).repeat_interleave(2) * len(both)
    return trajectory.replace(advantages=trajectory.advantages.double(), weights=chances)


@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_the_gradient_is_that_of_the_discounted_reward(offset):
    """Of all pairs of trajectories, by quadrature over both ratios of both."""
    module = module_of(gamma=GAMMA, reward_offset=offset)
    minibatch = pairs_of_paths(module)
    loss, logs = module.loss(minibatch)
    loss.backward()
    measured = -module.head.logits.grad.clone()
    module.zero_grad()

    ratios, steps, weight = paths()
    chance = weight * log_probs(module.head, ratios, steps).sum(dim=1).exp()
    returns = (reward_of(ratios, steps) + offset) * step_discount(steps, GAMMA)
    (chance @ returns).backward()
    torch.testing.assert_close(measured, module.head.logits.grad, atol=ATOL, rtol=1e-5)
    assert measured.abs().min() > 100 * ATOL
    assert logs["train/ratio"].item() == pytest.approx(1, abs=1e-12)
    assert logs["train/approx_kl"].item() == pytest.approx(0, abs=1e-12)


def test_one_ratio_for_each_image_and_clipped_as_a_whole():
    """Gradient is zero iff (A > 0 and rho > 1 + eps) or (A < 0 and rho < 1 - eps)."""
    module = module_of(clip_range=0.2)
    head = module.head = StepHead()
    ratios = torch.tensor([[0.9, 0.8], [0.9, 0.8], [0.45, 0.1], [0.45, 0.1], [0.6, 0.5]]).double()
    steps, groups = torch.full((5,), 2), torch.arange(5)
    batch = trajectory_of(head, ratios, steps, torch.zeros(5), groups)
    batch = batch.replace(
        advantages=torch.tensor([1.0, -1, 1, -1, 1]).double(), weights=torch.ones(5).double()
    )
    with torch.no_grad():
        head.logits[:, 0] += 0.5  # towards larger ratios
    change = (log_probs(head, ratios, steps).detach() - batch.log_probs).sum(dim=1)
    rho = change.exp()
    assert rho[0] > 1.2
    assert rho[2] < 0.8
    _, logs = module.loss(batch)
    assert logs["train/ratio"].item() == pytest.approx(rho.mean().item())
    clipped = (rho - 1).abs() > 0.2
    assert logs["train/clip_fraction"].item() == pytest.approx(clipped.double().mean().item())
    for row, moves in enumerate([False, True, True, False]):
        module.zero_grad()
        one = batch.select(torch.tensor([row]))
        loss, _ = module.loss(one)
        loss.backward()
        assert bool(head.logits.grad.any()) == moves, row
        bound = one.advantages * rho[row].clamp(0.8, 1.2)
        expected = torch.maximum(-one.advantages * rho[row], -bound)
        assert loss.item() == pytest.approx(expected.item())


def test_statistics_are_of_the_steps_that_were_taken():
    module = module_of()
    head = module.head = StepHead()
    steps = torch.tensor([1, 2, 2])
    ratios = torch.tensor([[0.3, 0.5], [0.6, 0.5], [0.7, 0.2]]).double()
    batch = trajectory_of(head, ratios, steps, torch.zeros(3), torch.arange(3))
    batch = batch.replace(advantages=torch.ones(3).double(), weights=torch.ones(3).double())
    _, logs = module.loss(batch)
    shapes = 1 + head.logits.detach().exp()
    share = torch.tensor([3, 2]).double() / 5  # of first and second steps
    distribution = Beta(shapes[:, 0], shapes[:, 1])
    assert logs["train/entropy"].item() == pytest.approx((share @ distribution.entropy()).item())
    assert logs["train/time_ratio"].item() == pytest.approx((share @ distribution.mean).item())
    assert logs["train/concentration"].item() == pytest.approx((share @ shapes.sum(1)).item())


def targets(module, rewards, steps=(1, 2, 2, 2), groups=(0, 0, 1, 1)):
    ratios = torch.tensor([[0.3, 0.0], [0.6, 0.5], [0.7, 0.2], [0.9, 0.9]]).double()
    batch = trajectory_of(
        StepHead(), ratios, torch.tensor(steps), torch.tensor(rewards), torch.tensor(groups)
    )
    return module._weigh(module.compute_targets(batch))


def test_rewards_are_discounted_and_compared_within_prompts():
    module = module_of(gamma=GAMMA)
    found = targets(module, [2.0, 1.0, 3.0, 5.0])
    two = (1 + GAMMA) / 2
    first, second = 2.0 - 1.0 * two, (3.0 - 5.0) * two
    assert found.advantages.tolist() == pytest.approx([first, -first, second, -second])
    logs = module._round_logs
    assert logs["rollout/steps"] == 7 / 4
    assert logs["rollout/return"] == pytest.approx((2.0 + 9.0 * two) / 4)
    assert logs["rollout/unfinished"] == 1 / 4  # 0.81 is above t_min


def test_unscored_images_get_weight_zero_and_no_part_in_baselines():
    found = targets(module_of(gamma=1.0), [2.0, torch.nan, 3.0, 5.0])
    assert found.advantages.tolist() == [0, 0, -2, 2]
    assert found.weights.tolist() == [0, 0, 2, 2]  # the first has nothing to be compared with


def test_negative_rewards_are_warned_of_where_the_discount_would_reward_steps():
    with pytest.warns(UserWarning, match="asks for more steps instead of fewer"):
        targets(module_of(gamma=GAMMA), [-1.0, 2.0, 3.0, 5.0])
    module = module_of(gamma=GAMMA, reward_offset=1.5)
    shifted = targets(module, [-1.0, 2.0, 3.0, 5.0])  # warnings would be errors of this test
    assert shifted.advantages[0] == pytest.approx(0.5 - 3.5 * (1 + GAMMA) / 2)


@pytest.mark.parametrize("mean_kl", [False, True])
def test_divergence_from_the_fixed_schedule_lowers_the_return(mean_kl):
    plain = targets(module_of(gamma=1.0), [1.0, 1.0, 1.0, 1.0])
    assert not plain.advantages.any()
    module = module_of(gamma=1.0, kl_coef=0.1, mean_kl=mean_kl)
    found = targets(module, [1.0, 1.0, 1.0, 1.0])
    shapes = (1 + StepHead().logits.exp()).detach()
    expected = []
    for ratio, steps in ((None, 1), (0.6, 2), (0.7, 2), (0.9, 2)):
        levels = torch.tensor([1.0, ratio or 0.0][:steps]).double()
        fixed = Beta(*reference_shapes(levels))
        kl = kl_divergence(Beta(*shapes[:steps].T), fixed).sum().item()
        expected.append(-0.1 * (kl / steps if mean_kl else kl))
    gaps = [expected[0] - expected[1], expected[2] - expected[3]]
    assert found.advantages[[0, 2]].tolist() == pytest.approx(gaps, rel=1e-5)


class Brightness(RewardModule):
    def forward(self, images, prompts, metadata=None, group_ids=None):
        return images.mean(dim=(1, 2, 3)) + 1


FREE = {"num_inference_steps": 12, "t_min": 0.2, "init_alpha": 1.5, "init_beta": 0.5}


def free_module(family="sd", **options):
    """Return a module whose images take different numbers of steps."""
    return make_tpdm(family, reward=Brightness(), **{**FREE, "gamma": 0.9, **options})


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("family", "guidance_scale"), [("sd", 3.0), ("sd3", 1.0), ("flux", 2.0)])
def test_a_round(family, guidance_scale, dtype):
    """The ratio is 1 before the first update; calls are counted; only the head moves."""
    module = free_module(family, guidance_scale=guidance_scale, feature_dtype=dtype)
    rows, recorder = [], Recorder()
    count = lambda _, args, kwargs: rows.append(len(args[0] if args else kwargs["hidden_states"]))  # noqa: E731
    module.policy.denoiser.register_forward_pre_hook(count, with_kwargs=True)
    before = weights(module, True)
    fit(module, callbacks=[recorder])
    logged = recorder.metrics[0]
    assert logged["train/ratio"] == pytest.approx(1, abs=1e-5)
    assert logged["train/approx_kl"] == pytest.approx(0, abs=1e-5)
    assert logged["train/clip_fraction"] == 0
    assert recorder.metrics[1]["train/ratio"] != logged["train/ratio"]  # the second pass
    assert 1 < logged["rollout/steps"] < 12
    assert module.counters["denoiser_calls"] == sum(rows)
    assert sum(rows) == 8 * logged["rollout/steps"] * module.policy.branches(guidance_scale)
    assert module.counters["reward_queries"] == 8
    assert {name.split(".")[0] for name in before} == {"head"}
    assert all(not torch.equal(value, before[n]) for n, value in weights(module, True).items())


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_a_round_on_cuda(family):
    """Features lie in main memory, all else on the device."""
    module = free_module(family, feature_dtype="float32")
    recorder = Recorder()
    fit(module, callbacks=[recorder], val=True, accelerator="gpu")
    assert recorder.metrics[0]["train/ratio"] == pytest.approx(1, abs=1e-2)
    assert all(p.isfinite().all() for p in module.head.parameters())


def test_images_of_a_prompt_may_start_from_the_same_noise():
    starts = {}
    for shared in (True, False):
        module = free_module(shared_init_noise=shared, rollout_batch_size=4)
        collect, kept = module.collect, []
        module.collect = lambda *args, c=collect, k=kept: k.append(c(*args)) or k[-1]
        fit(module, max_epochs=2)
        first, second = kept
        assert not torch.equal(first.latents[:, 0], second.latents[:, 0])
        starts[shared] = first.latents[:, 0]
        ratios = first.extras["ratios"]
        assert len(set(ratios[:, 0].tolist())) == 8
        assert torch.equal(first.positions, torch.arange(8))  # two images a prompt
    pairs = starts[True].view(4, 2, -1)
    assert torch.equal(pairs[:, 0], pairs[:, 1])
    assert len({tuple(noise.tolist()) for noise in pairs[:, 0]}) == 4
    assert len({tuple(noise.flatten().tolist()) for noise in starts[False]}) == 8


def test_validation_follows_the_most_likely_steps():
    module = free_module(eval_num_inference_steps=20)
    trainer = fit(module, val=True)
    metrics = trainer.callback_metrics
    loader = prompt_loader(shuffle=False)
    batches = list(loader)
    outputs = [module.evaluate(batch) for batch in batches]
    steps = torch.cat([found["steps"] for found in outputs])
    assert float(metrics["val/steps"]) == pytest.approx(steps.double().mean().item())
    scores = torch.cat([found["scores"]["Brightness"] for found in outputs])
    assert float(metrics["val/reward/Brightness"]) == pytest.approx(scores.mean().item(), abs=1e-6)
    schedule = module.schedule
    assert (schedule.max_steps, schedule.t_min, schedule.guidance_scale) == (20, 0.2, 1.0)
    generators = sample_generators("val", module.seed, 0, batches[0].positions.tolist())
    texts = module.policy.encode_prompt(batches[0].prompts)
    expected = module.schedule.sample(module.policy, texts, generators)
    images = quantize(module.policy.decode(expected.latents[:, -1]))
    assert torch.equal(outputs[0]["images"], images)
    assert torch.equal(outputs[0]["steps"], expected.extras["alive"].sum(dim=1))


def test_training_continues_in_the_middle_of_a_round(tmp_path):
    saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    whole, resumed = free_module(), free_module()
    options = {"max_epochs": 2, "enable_checkpointing": True}
    fit(whole, callbacks=[saver], **options)
    stored = torch.load(tmp_path / "step=1.ckpt", weights_only=True)
    assert {name.split(".")[0] for name in stored["state_dict"]} == {"head"}
    assert stored["lit_align"]["schedule"] == whole.schedule.options()
    fit(resumed, resume=tmp_path / "step=1.ckpt", max_epochs=2)
    found = weights(resumed, True)
    for name, value in weights(whole, True).items():
        assert torch.equal(value, found[name]), name
    assert resumed.counters == whole.counters


def mean_steps(gamma):
    """Return the steps in the first round and after five, of a reward that asks for nothing."""

    class Constant(RewardModule):
        def forward(self, images, prompts, metadata=None, group_ids=None):
            return torch.ones(len(images))

    recorder = Recorder()
    options = {"reward": Constant(), "samples_per_prompt": 4, "minibatch_size": 16, "lr": 1e-2}
    module = make_tpdm("sd3", **{**FREE, **options, "num_inference_steps": 20, "gamma": gamma})
    before = weights(module, True)
    fit(module, callbacks=[recorder], max_epochs=6)
    moved = any(not torch.equal(value, before[n]) for n, value in weights(module, True).items())
    return recorder.metrics[0]["rollout/steps"], recorder.metrics[-1]["rollout/steps"], moved


def test_the_discount_shortens_schedules():
    first, last, moved = mean_steps(0.8)
    assert moved
    assert last < 0.8 * first
    _, _, moved = mean_steps(1.0)
    assert not moved


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match=r"`gamma` must lie in \(0, 1\].* got 1.5, 0.2"):
        module_of(gamma=1.5)
    with pytest.raises(ValueError, match="`clip_range` be positive"):
        module_of(clip_range=0.0)
    with pytest.raises(ValueError, match="`samples_per_prompt` must be at least 2.* got 1"):
        module_of(samples_per_prompt=1)
    with pytest.raises(ValueError, match=r"`t_min` must lie in \(0, 1\), got 0"):
        make_tpdm(t_min=0.0)
    with pytest.raises(ValueError, match="`feature_dtype` must be one of .* got 'int8'"):
        module_of(feature_dtype="int8")
    with pytest.raises(TypeError, match="advantage_norm"):
        module_of(advantage_norm="group")


def test_a_trainable_policy_is_refused_and_a_frozen_one_elsewhere():
    module = TPDM(tiny_policy("sd"), Colorfulness(), guidance_scale=1.0, head_width=8)
    with pytest.raises(ValueError, match="TPDM leaves the policy as it is: set its `train: none`"):
        fit(module)
    with pytest.raises(ValueError, match="has `train: none`; use 'lora' or 'full'"):
        fit(DDPO(tiny_policy("sd", train="none"), Colorfulness(), guidance_scale=1.0))


def test_prompts_of_a_round():
    assert len(PROMPTS) == 8
    with pytest.raises(ValueError, match="must divide the 8 pairs"):
        fit(free_module(minibatch_size=3))

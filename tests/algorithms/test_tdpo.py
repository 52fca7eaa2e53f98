import pytest
import torch

from lit_align.algorithms import TDPO
from lit_align.algorithms.tdpo import clipped_value_loss
from lit_align.functional.advantages import discounted_returns
from lit_align.policies import TemporalCritic
from lit_align.rewards import Colorfulness
from lit_align.rewards.base import quantize
from lit_align.trajectory import PromptBatch, Trajectory
from tests.algorithms.harness import fit
from tests.algorithms.test_ddpo import OneProcess
from tests.algorithms.toy import ToyPolicy, quadrature_transitions
from tests.conftest import tiny_policy
from tests.policies.test_heads import FakeTower

STEPS = 3


def critic(**options):
    return TemporalCritic(FakeTower(), **{"hidden": (16, 8), "dropout": (0.2,), **options})


def tdpo(policy=None, **options):
    defaults = {
        "num_inference_steps": STEPS,
        "guidance_scale": 1.0,
        "prompts_per_round": 4,
        "samples_per_prompt": 2,
        "rollout_batch_size": 8,
        "minibatch_size": 4,
        "clip_range": 1e-3,
        "advantage_norm": "batch",
    }
    policy = policy or tiny_policy("sd")
    return TDPO(policy, Colorfulness(), critic=critic(), **{**defaults, **options})


def targets(module, rewards, values, log_probs=None):
    count = len(rewards)
    ids = torch.arange(count)
    module._trainer = OneProcess()
    empty = torch.zeros(count, STEPS)
    trajectory = Trajectory(
        torch.zeros(count, STEPS + 1, 1), empty, empty if log_probs is None else log_probs, {},
        1.0, STEPS, batch=PromptBatch(["x"] * count, [None] * count, ids, ids, ids),
        rewards=torch.tensor(rewards), extras={"values": values},
    )  # fmt: skip
    return module._weigh(module.compute_targets(trajectory))


REWARDS = [0.0, 2.0, 4.0, 6.0]
NORMALISED = (torch.tensor(REWARDS) - 3) / 5**0.5


def test_returns_are_the_normalised_reward_at_every_step():
    found = targets(tdpo(), REWARDS, torch.zeros(4, STEPS))
    expected = NORMALISED[:, None].expand(-1, STEPS)
    torch.testing.assert_close(found.extras["returns"], expected)
    torch.testing.assert_close(found.advantages, expected)  # of a critic that expects nothing


def test_advantages_are_temporal_rewards_normalised_over_samples_and_steps():
    values = torch.randn(4, STEPS, generator=torch.Generator().manual_seed(0))
    found = targets(tdpo(), REWARDS, values)
    assert found.advantages.mean().item() == pytest.approx(0, abs=1e-6)
    assert found.advantages.std(correction=0).item() == pytest.approx(1, abs=1e-6)
    raw = targets(tdpo(temporal_reward_norm=False), REWARDS, values).advantages
    torch.testing.assert_close(raw, NORMALISED[:, None] - values)
    torch.testing.assert_close(found.advantages, (raw - raw.mean()) / raw.std(correction=0))


def test_a_discount_shrinks_what_lies_ahead():
    module = tdpo(gamma=0.5, temporal_reward_norm=False)
    found = targets(module, REWARDS, torch.zeros(4, STEPS)).advantages
    torch.testing.assert_close(found, NORMALISED[:, None] * torch.tensor([0.25, 0.5, 1.0]))
    rewards = torch.tensor([[1.0, 2.0, 4.0]])
    assert discounted_returns(rewards, 0.5).tolist() == [[3.0, 4.0, 4.0]]


def test_samples_without_a_score_do_not_count():
    found = targets(tdpo(), [0.0, torch.nan, 4.0, 6.0], torch.zeros(4, STEPS))
    assert found.weights[1].tolist() == [0] * STEPS
    torch.testing.assert_close(found.weights[0], torch.full((STEPS,), 4 / 3))
    assert found.extras["returns"].isfinite().all()


def test_the_penalty_lowers_the_returns_from_its_step_back():
    policy = ToyPolicy(0.3)
    module = tdpo(
        policy, kl_coef=2.0, kl_kind="kl", kl_init=0.5, kl_target=0.1, temporal_reward_norm=False
    )
    with torch.no_grad():
        policy.denoiser.theta += 0.1
    transition = quadrature_transitions(policy, torch.zeros_like)
    paths = (
        transition.latents.view(-1, STEPS, 1)[:4],
        transition.next_latents.view(-1, STEPS, 1)[:4],
    )
    latents = torch.cat([paths[0], paths[1][:, -1:]], dim=1)
    log_probs = transition.old_log_prob.view(-1, STEPS)[:4]
    module._trainer = type("Trainer", (OneProcess,), {"precision_plugin": Precision()})()
    count = len(latents)
    ids = torch.arange(count)
    trajectory = Trajectory(
        latents, policy.scheduler.timesteps.expand(count, -1), log_probs, {}, 1.0, STEPS,
        batch=PromptBatch(["x"] * count, [None] * count, ids, ids, ids),
        rewards=torch.tensor(REWARDS), extras={"values": torch.zeros(count, STEPS)},
    )  # fmt: skip
    with torch.no_grad(), policy.reference():
        d = log_probs - policy.replay_log_probs(trajectory)
    assert d.abs().min() > 0
    found = module.compute_targets(trajectory).advantages
    penalties = 2.0 * 0.5 * d.double()
    expected = NORMALISED[:, None].double() - penalties.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    error = min(max(d.mean().item() / 0.1 - 1, -0.2), 0.2)
    assert module.kl_controller.value == pytest.approx(0.5 * (1 + error * count / 2000))


class Precision:
    def forward_context(self):
        return torch.enable_grad()


def test_the_critics_loss_by_hand():
    values = torch.tensor([0.5, 0.1, -0.5], requires_grad=True)
    loss = clipped_value_loss(values, torch.zeros(3), torch.ones(3), 0.2)
    # max((.5 - 1)^2, (.2 - 1)^2) / 2;  inside the range both agree;  max(2.25, 1.44) / 2
    torch.testing.assert_close(loss, torch.tensor([0.32, 0.405, 1.125]))
    loss.sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor([0.0, -0.9, -1.5]))
    unclipped = clipped_value_loss(values.detach(), torch.zeros(3), torch.ones(3), 0.0)
    torch.testing.assert_close(unclipped, torch.tensor([0.125, 0.405, 1.125]))


def test_policy_and_critic_have_their_own_learning_rates_and_clipping():
    module = tdpo(lr=1e-3, lr_critic=1e-2, critic_weight_decay=0.5)
    policy, critic = module.configure_optimizers().param_groups
    assert (policy["lr"], critic["lr"]) == (1e-3, 1e-2)
    assert (policy["weight_decay"], critic["weight_decay"]) == (1e-4, 0.5)
    assert {id(p) for p in critic["params"]} == {id(p) for p in module.critic.parameters()}
    optimizer = module.configure_optimizers()
    for group, size in zip(optimizer.param_groups, (3.0, 0.01), strict=True):
        for p in group["params"]:
            p.grad = torch.full_like(p, size)
    module.configure_gradient_clipping(optimizer, 1.0, "norm")
    norms = [
        torch.nn.utils.get_total_norm([p.grad for p in group["params"]]).item()
        for group in optimizer.param_groups
    ]
    assert norms[0] == pytest.approx(1, rel=1e-4)
    small = 0.01 * sum(p.numel() for p in module.critic.parameters()) ** 0.5
    assert norms[1] == pytest.approx(small, rel=1e-4)  # below 1: left alone


@pytest.mark.parametrize("critic_input", ["xt", "x0_hat"])
def test_the_critic_looks_at_decoded_states(critic_input):
    module = tdpo(critic_input=critic_input)
    seen = []
    embed = module.critic.embed
    module.critic.embed = lambda images: (seen.append(images), embed(images))[1]
    kept = []
    loss = module.loss
    module.loss = lambda minibatch: (kept.append(minibatch), loss(minibatch))[1]
    trainer = fit(module)
    assert trainer.global_step == STEPS * 8 // 4
    assert [images.shape for images in seen] == [(8, 3, 32, 32)] * STEPS
    levels = seen[0] * 255
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
    minibatch = kept[0]
    assert minibatch.timesteps.shape == (4,)
    decoded = module.policy.decode(minibatch.latents)
    embeddings = embed(quantize(decoded))
    same = torch.allclose(embeddings, minibatch.extras["embeddings"], atol=1e-5)
    assert same == (critic_input == "xt")


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="TDPO needs a `critic`"):
        TDPO(tiny_policy("sd"), Colorfulness())
    with pytest.raises(
        ValueError, match="`clip_range` must be > 0 and `gamma` in .* got 0.001 and 2"
    ):
        tdpo(gamma=2)
    with pytest.raises(ValueError, match=r"`minibatch_size` x .* \(6\) divide the 8 samples"):
        fit(tdpo(minibatch_size=6))
    with pytest.raises(ValueError, match="`minibatch_order: timestep_major`"):
        fit(tdpo(minibatch_order="sample_major"))

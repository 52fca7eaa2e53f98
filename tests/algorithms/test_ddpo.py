import pytest
import torch

from lit_align.algorithms import DDPO
from lit_align.rewards import Colorfulness
from lit_align.trajectory import PromptBatch, Trajectory
from tests.algorithms.harness import fit, make_ddpo
from tests.algorithms.toy import ToyPolicy, quadrature_paths, quadrature_transitions

STEPS = 3
# J(theta) = E[r(x_0)] for x_0 linear in theta, from the schedule's coefficients.
LINEAR = (0.0, lambda x: x, -3.583691177754543)
QUADRATIC = (0.3, lambda x: -((x - 1) ** 2), -14.873087830018532)


def ddpo(policy, **options):
    return DDPO(policy, Colorfulness(), num_inference_steps=STEPS, **options)


def gradient(module, minibatch):
    """Return d J / d theta as the loss sees it: its mean over pairs is a third of the sum."""
    module.zero_grad()
    loss, logs = module.loss(minibatch)
    loss.backward()
    return -STEPS * module.policy.denoiser.theta.grad.item(), loss.item(), logs


@pytest.mark.parametrize("estimator", ["is", "sf"])
@pytest.mark.parametrize(("theta", "reward", "expected"), [LINEAR, QUADRATIC])
def test_analytic_gradient_comes_out_of_the_loss(estimator, theta, reward, expected):
    policy = ToyPolicy(theta)
    minibatch = quadrature_transitions(policy, reward)
    module = ddpo(policy, estimator=estimator, adv_clip_max=None)
    measured, _, _ = gradient(module, minibatch)
    assert measured == pytest.approx(expected, abs=1e-9)


def test_the_toy_has_the_known_mean():
    latents, weight = quadrature_paths(ToyPolicy(0.3))
    assert (weight * latents[:, -1, 0]).sum().item() == pytest.approx(
        -1.0751073533263642, abs=1e-12
    )


def test_baselines_leave_the_expected_gradient_unchanged():
    theta, reward, expected = QUADRATIC
    policy = ToyPolicy(theta)
    minibatch = quadrature_transitions(policy, reward)
    module = ddpo(policy)
    constant = minibatch.replace(advantages=minibatch.advantages - 7.0)
    assert gradient(module, constant)[0] == pytest.approx(expected, abs=1e-9)
    state = minibatch.replace(advantages=minibatch.advantages - minibatch.latents[:, 0] ** 2)
    assert gradient(module, state)[0] == pytest.approx(expected, abs=1e-9)


def test_first_inner_step():
    """Unchanged weights: ratio 1, no KL, nothing clipped, loss = -mean(A), gradients agree."""
    policy = ToyPolicy(0.3)
    minibatch = quadrature_transitions(policy, lambda x: x)
    importance, loss, logs = gradient(ddpo(policy, estimator="is"), minibatch)
    score, _, _ = gradient(ddpo(policy, estimator="sf"), minibatch)
    assert loss == pytest.approx(-(minibatch.weights * minibatch.advantages).mean().item())
    assert importance == pytest.approx(score, abs=1e-9)
    assert logs["train/ratio"] == 1
    assert logs["train/approx_kl"] == 0
    assert logs["train/clip_fraction"] == 0


def test_zero_weights_do_not_count():
    policy = ToyPolicy(0.3)
    minibatch = quadrature_transitions(policy, lambda x: x)
    poisoned = minibatch.replace(
        advantages=minibatch.advantages.index_fill(0, torch.arange(30), 1e6),
        weights=minibatch.weights.index_fill(0, torch.arange(30), 0.0),
    )
    honest = minibatch.replace(weights=poisoned.weights)
    module = ddpo(policy)
    assert gradient(module, poisoned)[0] == pytest.approx(gradient(module, honest)[0])


def test_kl_penalty_pulls_back_to_the_pretrained_model():
    # KL per step = (c (theta - theta_0))^2 / (2 std^2), with c = dmean/de.
    policy = ToyPolicy(0.3)
    module = ddpo(policy, beta=2.0)
    module._trainer = OneProcess()
    with torch.no_grad():
        policy.denoiser.theta += 0.1
    minibatch = quadrature_transitions(policy, torch.zeros_like)
    measured, loss, logs = gradient(module, minibatch)
    x = torch.zeros(STEPS, 1, dtype=torch.float64)
    outputs = torch.zeros(STEPS, 1, dtype=torch.float64, requires_grad=True)
    steps = policy.scheduler.step(outputs, policy.scheduler.timesteps, x, x)
    (c,) = torch.autograd.grad(steps.mean.sum(), outputs)
    rate = (c[:, 0] / steps.std).square()
    assert logs["train/kl_to_reference"].item() == pytest.approx((rate * 0.01 / 2).mean().item())
    assert loss == pytest.approx(2 * (rate * 0.01 / 2).mean().item())
    assert measured == pytest.approx(-2 * (rate * 0.1).sum().item())


class OneProcess:
    """Stands in for a trainer."""

    world_size, global_rank = 1, 0


def targets(rewards, **options):
    count = len(rewards)
    ids = torch.arange(count) // 2
    module = DDPO(ToyPolicy(0.0), Colorfulness(), samples_per_prompt=2, **options)
    module._trainer = OneProcess()
    batch = PromptBatch(["x"] * count, [None] * count, ids, torch.arange(count), ids)
    empty = torch.zeros(count, 1)
    trajectory = Trajectory(
        empty, empty, empty, {}, 1.0, 3, batch=batch, rewards=torch.tensor(rewards)
    )
    return module._weigh(module.compute_targets(trajectory))


def test_advantages_by_each_normalisation():
    rewards = [0.0, 2.0, 4.0, 6.0]
    batch = targets(rewards, advantage_norm="batch").advantages  # mean 3, std sqrt(5)
    torch.testing.assert_close(batch, (torch.tensor(rewards) - 3) / 5**0.5)
    group = targets(rewards, advantage_norm="group").advantages  # std sqrt(2) in each pair
    torch.testing.assert_close(group, torch.tensor([-1.0, 1, -1, 1]) / 2**0.5)
    # rewards 0, 2, 4, 10 in pairs: deviations -1, 1, -3, 3 over their std sqrt(56 / 3)
    mixed = targets([0.0, 2.0, 4.0, 10.0], advantage_norm="group_mean").advantages
    torch.testing.assert_close(mixed, torch.tensor([-1.0, 1, -3, 3]) / (56 / 3) ** 0.5)
    own = targets(rewards, advantage_norm="per_prompt", min_count=2).advantages
    torch.testing.assert_close(own, torch.tensor([-1.0, 1, -1, 1]), atol=1e-5, rtol=0)


def test_advantages_are_clipped():
    clipped = targets([0.0, 0.0, 0.0, 10.0], advantage_norm="batch", adv_clip_max=1.5)
    assert clipped.advantages.max() == 1.5


def test_unscored_samples_get_weight_zero_and_the_rest_average_to_one():
    trajectory = targets([0.0, torch.nan, 4.0, 6.0], advantage_norm="batch")
    assert trajectory.weights.tolist() == pytest.approx([4 / 3, 0, 4 / 3, 4 / 3])
    assert trajectory.advantages[1] == 0
    assert trajectory.advantages.isfinite().all()


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="`clip_range` must be positive, got 0"):
        ddpo(ToyPolicy(0.0), clip_range=0.0)
    with pytest.raises(ValueError, match="`samples_per_prompt` of at least 2"):
        fit(make_ddpo(advantage_norm="group", samples_per_prompt=1, prompts_per_round=8))
    with pytest.raises(ValueError, match=r"`timestep_fraction` must lie in \(0, 1\], got 1.5"):
        ddpo(ToyPolicy(0.0), timestep_fraction=1.5)

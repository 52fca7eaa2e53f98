"""GRPO on U-Nets (arXiv:2505.07818) as options of an online method."""

import pytest
import torch

from lit_align.functional.advantages import RewardNormalizer
from lit_align.rewards import RewardModule
from tests.algorithms.harness import fit, make_ddpo


def recorded(**options):
    """Run two rounds; return the trajectories and the minibatches."""
    module = make_ddpo(advantage_norm="group", **options)
    trajectories, minibatches = [], []
    collect, loss = module.collect, module.loss
    module.collect = lambda *a: (trajectories.append(collect(*a)), trajectories[-1])[1]
    module.loss = lambda m: (minibatches.append(m), loss(m))[1]
    fit(module, max_epochs=2)
    return trajectories, minibatches


def test_samples_of_a_round_start_from_the_same_noise():
    first, second = recorded(shared_init_noise=True)[0]
    for trajectory in (first, second):
        start = trajectory.latents[:, 0]
        assert torch.equal(start, start[:1].expand_as(start))
        assert not torch.equal(trajectory.latents[0, 1], trajectory.latents[1, 1])
    assert not torch.equal(first.latents[0, 0], second.latents[0, 0])
    usual = recorded()[0][0].latents[:, 0]
    assert len(usual.unique(dim=0)) == len(usual)


def test_the_last_step_is_dropped():
    trajectories, minibatches = recorded(drop_last_step=True)
    times = trajectories[0].timesteps[0]
    trained = torch.cat([m.timesteps for m in minibatches])
    assert set(trained.tolist()) == set(times[:-1].tolist())
    assert len(trained) == 2 * 8 * 2  # rounds, samples, steps but the last


def test_advantages_of_a_group_sum_to_zero():
    for trajectory in recorded()[0]:
        sums = trajectory.advantages.view(4, 2).sum(1)
        torch.testing.assert_close(sums, torch.zeros(4), atol=1e-6, rtol=0)


class Same(RewardModule):
    def forward(self, images, prompts, metadata=None, group_ids=None):
        return torch.ones(len(images))


def test_equal_rewards_teach_nothing():
    trajectories, minibatches = recorded(reward=Same())
    assert not trajectories[0].advantages.any()
    assert all(m.advantages.isfinite().all() for m in minibatches)


def test_normalizers_have_the_defaults_of_their_sources():
    ids = torch.zeros(3, dtype=torch.int64)
    rewards = torch.tensor([0.0, 1.0, 2.0])
    cases = {
        ("per_prompt", None, None): (2 / 3) ** 0.5 + 1e-6,
        ("batch", None, None): (2 / 3) ** 0.5,
        ("group", None, None): 1.0,
        ("group_mean", None, None): 1.0,
        ("batch", 0.5, True): 1.5,
        ("group", 0.5, False): (2 / 3) ** 0.5 + 0.5,
    }
    for (kind, eps, unbiased), divisor in cases.items():
        normalise = RewardNormalizer(kind, eps, unbiased, min_count=1)
        expected = (torch.tensor([-1.0, 0.0, 1.0]) / divisor).double()
        torch.testing.assert_close(normalise(rewards, ids, ids), expected, atol=1e-7, rtol=1e-6)
    with pytest.raises(ValueError, match="`std_unbiased` is for `advantage_norm: batch`"):
        RewardNormalizer("per_prompt", std_unbiased=True)

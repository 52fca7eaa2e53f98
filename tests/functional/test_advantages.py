from statistics import mean

import numpy as np
import pytest
import torch

from lit_align.functional.advantages import (
    PromptStatistics,
    batch_advantages,
    group_advantages,
    leave_one_out_advantages,
    step_discount,
    zero_std_fraction,
)

RTOL = 1e-5


def test_prompt_statistics_match_the_official_tracker(golden):
    # golden/step_log_prob.npz, keys stat/<round>/*: ddpo-pytorch, buffer 32, minimum 4.
    statistics = PromptStatistics(buffer_size=32, min_count=4)
    for number in range(4):
        data = {k: golden[f"stat/{number}/{k}"] for k in ("prompt", "reward", "advantage")}
        measured = statistics.advantages(
            torch.from_numpy(data["reward"]), torch.from_numpy(data["prompt"])
        )
        np.testing.assert_allclose(measured.numpy(), data["advantage"], rtol=RTOL)


def test_below_the_minimum_the_batch_serves_and_at_it_the_history():
    statistics = PromptStatistics(buffer_size=3, min_count=2)
    first = statistics.advantages(torch.tensor([0.0, 2.0]), torch.tensor([5, 6]))
    torch.testing.assert_close(first, torch.tensor([-1.0, 1.0]).double() / (1 + 1e-6))
    # Prompt 5 now has the history (0, 4), newest included: mean 2, population std 2.
    second = statistics.advantages(torch.tensor([4.0]), torch.tensor([5]))
    assert second.item() == pytest.approx(2 / (2 + 1e-6))


def test_buffer_forgets_and_state_round_trips():
    statistics = PromptStatistics(buffer_size=2, min_count=1)
    statistics.advantages(torch.tensor([100.0, 1.0, 3.0]), torch.tensor([9, 9, 9]))
    restored = PromptStatistics(buffer_size=2, min_count=1)
    restored.load_state_dict(statistics.state_dict())
    for tracker in (statistics, restored):  # history (3, 5): mean 4, std 1
        value = tracker.advantages(torch.tensor([5.0]), torch.tensor([9])).item()
        assert value == pytest.approx(1 / (1 + 1e-6))


def test_integer_rewards_are_not_truncated():
    statistics = PromptStatistics(min_count=16)
    advantages = statistics.advantages(torch.tensor([1, 2]), torch.tensor([0, 1]))
    torch.testing.assert_close(advantages, torch.tensor([-0.5, 0.5]).double() / (0.5 + 1e-6))


def test_nan_rewards_are_left_out_of_the_batch():
    advantages = batch_advantages(torch.tensor([1.0, torch.nan, 3.0]))
    assert advantages[1].isnan()
    torch.testing.assert_close(advantages[[0, 2]], torch.tensor([-1.0, 1.0]).double())


def test_batch_advantages_have_mean_zero_and_std_one():
    rewards = torch.randn(100) * 3 + 7
    advantages = batch_advantages(rewards, eps=1e-7, correction=1)
    assert advantages.mean().item() == pytest.approx(0, abs=1e-6)
    assert advantages.std().item() == pytest.approx(1, abs=1e-6)


def test_group_advantages_sum_to_zero_and_equal_rewards_give_zero():
    rewards = torch.tensor([1.0, 2.0, 6.0, 4.0, 4.0, 4.0])
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    advantages = group_advantages(rewards, groups)
    assert advantages[:3].sum().item() == pytest.approx(0, abs=1e-12)
    assert advantages[3:].tolist() == [0, 0, 0]
    # mean 3, unbiased std sqrt(7)
    assert advantages[2].item() == pytest.approx(3 / 7**0.5)


def test_group_nan_is_left_out_of_its_group():
    rewards = torch.tensor([1.0, torch.nan, 3.0])
    advantages = group_advantages(rewards, torch.zeros(3, dtype=torch.int64), correction=0)
    assert advantages[1].isnan()
    torch.testing.assert_close(advantages[[0, 2]], torch.tensor([-1.0, 1.0]).double())


def test_global_std_does_not_depend_on_the_order_of_groups():
    rewards, groups = torch.randn(12), torch.arange(12) // 4
    order = torch.randperm(12)
    straight = group_advantages(rewards, groups, eps=1e-4, correction=0, global_std=True)
    shuffled = group_advantages(rewards[order], groups[order], 1e-4, 0, global_std=True)
    torch.testing.assert_close(straight[order], shuffled)


def test_share_of_groups_that_teach_nothing():
    nan = torch.nan
    rewards = torch.tensor([1.0, 1.0, 1.0, 2.0, nan, 3.0, nan, nan, 5.0, 4.0])
    groups = torch.arange(10) // 2  # equal, different, one known, none known, different
    assert zero_std_fraction(rewards, groups) == 3 / 5
    order = torch.randperm(10)
    assert zero_std_fraction(rewards[order], groups[order]) == 3 / 5


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match=r"min_count.*\[1, buffer_size = 4\], got 5"):
        PromptStatistics(buffer_size=4, min_count=5)


def test_leave_one_out_by_the_loop_of_its_definition():
    rewards = torch.tensor([0.3, 1.0, -2.0, 0.7, 5.0], dtype=torch.float64)
    groups = torch.tensor([4, 9, 4, 9, 4])
    expected = [
        r - mean(o.item() for j, o in enumerate(rewards) if j != i and groups[j] == g)
        for i, (r, g) in enumerate(zip(rewards.tolist(), groups.tolist(), strict=True))
    ]
    found = leave_one_out_advantages(rewards, groups)
    assert found.tolist() == pytest.approx(expected)
    for group in (4, 9):
        assert found[groups == group].sum().item() == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(leave_one_out_advantages(rewards + 7, groups), found)


def test_unscored_images_stay_out_of_the_others_baseline():
    nan = torch.nan
    rewards, groups = torch.tensor([1.0, nan, 4.0, 2.0, nan]), torch.tensor([0, 0, 0, 1, 1])
    found = leave_one_out_advantages(rewards, groups)
    expected = torch.tensor([-3.0, nan, 3.0, nan, nan]).double()  # one of group 1 has no other
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("count", [2, 4])
def test_leave_one_out_is_an_unbiased_estimate_of_the_gradient(count):
    """Exactly, over all tuples of a bandit; the mean of the whole group loses 1 / k of it."""
    logits, rewards = torch.tensor([0.2, -0.5, 1.0]).double(), torch.tensor([1.0, 3.0, -2.0])
    chances = logits.softmax(0)
    truth = chances * (rewards - chances @ rewards.double())  # of the mean reward
    tuples = torch.cartesian_prod(*[torch.arange(3)] * count)
    weight = chances[tuples].prod(dim=1)
    scores = torch.eye(3).double()[tuples] - chances  # of each arm's log-probability

    groups = torch.arange(len(tuples)).repeat_interleave(count)
    left_out = leave_one_out_advantages(rewards[tuples].flatten(), groups).view_as(tuples)
    centred = rewards[tuples] - rewards[tuples].mean(dim=1, keepdim=True)
    for advantages, share in ((left_out, 1.0), (centred.double(), (count - 1) / count)):
        estimates = (advantages[..., None] * scores).mean(dim=1)
        torch.testing.assert_close(weight @ estimates, share * truth, atol=1e-6, rtol=1e-6)


DISCOUNTS = {
    0.85: (1, 0.7417, 0.5354, 0.4056, 0.3204, 0.2356),
    0.90: (1, 0.8190, 0.6513, 0.5294, 0.4392, 0.3385),
    0.95: (1, 0.9049, 0.8025, 0.7156, 0.6415, 0.5444),
    0.97: (1, 0.9418, 0.8753, 0.8150, 0.7603, 0.6831),
}


@pytest.mark.parametrize("gamma", DISCOUNTS)
def test_discount_of_a_reward_by_the_number_of_steps(gamma):
    steps = torch.tensor([1, 5, 10, 15, 20, 28])
    found = step_discount(steps, gamma)
    assert found.tolist() == pytest.approx(DISCOUNTS[gamma], abs=5e-5)
    sums = [mean(gamma ** (n - 1 - i) for i in range(n)) for n in steps.tolist()]
    assert found.tolist() == pytest.approx(sums, rel=1e-12)
    assert (step_discount(torch.arange(1, 41), gamma).diff() < 0).all()


def test_no_discount_as_gamma_goes_to_one():
    steps = torch.arange(1, 41)
    assert torch.equal(step_discount(steps, 1.0), torch.ones(40).double())
    torch.testing.assert_close(step_discount(steps, 1 - 1e-9), torch.ones(40).double())

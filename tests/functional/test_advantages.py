import numpy as np
import pytest
import torch

from lit_align.functional.advantages import (
    PromptStatistics,
    batch_advantages,
    group_advantages,
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


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match=r"min_count.*\[1, buffer_size = 4\], got 5"):
        PromptStatistics(buffer_size=4, min_count=5)

"""D3PO: bounds, gradients, and what a round keeps."""

import math

import pytest
import torch

from lit_align.algorithms import D3PO
from lit_align.algorithms.d3po import step_preference_loss
from lit_align.rewards import RewardModule
from tests.algorithms.harness import Recorder, fit, make_method
from tests.conftest import tiny_policy

LOG2 = math.log(2)


def test_the_loss_stays_in_its_band():
    """|z| <= beta log(1.1 / 0.9), so that the loss lies in [0.68316, 0.70323]."""
    log_ratio = torch.tensor([[9.0, -9.0], [-9.0, 9.0], [0.0, 0.0]], dtype=torch.float64)
    low, high, middle = step_preference_loss(log_ratio, 0.1, 0.1).tolist()
    bound = 0.1 * math.log(1.1 / 0.9)
    assert bound == pytest.approx(0.0200671, abs=1e-7)
    assert low == pytest.approx(math.log(1 + math.exp(-bound)))
    assert high == pytest.approx(math.log(1 + math.exp(bound)))
    assert (round(low, 5), round(high, 5)) == (0.68316, 0.70323)
    assert middle == pytest.approx(LOG2)


def test_gradient_flows_inside_the_band_only():
    log_ratio = torch.tensor([[0.05, 0.2], [-0.2, 0.0]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(step_preference_loss(log_ratio, 2.0, 0.1).sum(), log_ratio)
    assert (gradient != 0).tolist() == [[True, False], [False, True]]
    assert gradient[0, 0] < 0 < gradient[1, 1]


class Kept:
    """Wraps a module's targets to look at them."""

    def __init__(self, module):
        self.trajectory = None
        targets = module.compute_targets

        def recorded(trajectory):
            self.before, self.trajectory = trajectory, targets(trajectory)
            return self.trajectory

        module.compute_targets = recorded


def test_images_of_a_prompt_start_alike_and_two_are_kept():
    module = make_method(
        "D3PO", "sd", "lora", samples_per_prompt=4, prompts_per_round=2, minibatch_size=4
    )
    kept, recorder = Kept(module), Recorder()
    fit(module, callbacks=[recorder])
    starts = kept.before.latents[:, 0].unflatten(0, (2, 4))
    assert torch.equal(starts, starts[:, :1].expand_as(starts))
    assert not torch.equal(starts[0, 0], starts[1, 0])
    ends = kept.before.latents[:, -1].unflatten(0, (2, 4))
    assert not torch.equal(ends[:, 0], ends[:, 1])
    rewards = kept.before.rewards.unflatten(0, (2, 4))
    found = kept.trajectory.rewards.unflatten(0, (2, 2))
    assert torch.equal(found.max(1).values, rewards.max(1).values)
    assert torch.equal(found.min(1).values, rewards.min(1).values)
    signs = kept.trajectory.advantages.unflatten(0, (2, 2))
    assert torch.equal((found[:, 0] > found[:, 1]).float() * 2 - 1, signs[:, 0])
    assert recorder.metrics[0]["train/loss"] == pytest.approx(LOG2, abs=1e-6)
    assert recorder.metrics[0]["rollout/pairs"] == 2


class Constant(RewardModule):
    def forward(self, images, prompts, metadata=None, group_ids=None):
        return torch.ones(len(images))


def test_equal_images_teach_nothing():
    recorder = Recorder()
    module = make_method("D3PO", "sd3", "full", reward=Constant())
    fit(module, callbacks=[recorder])
    assert recorder.metrics[0]["rollout/pairs"] == 0
    assert recorder.metrics[0]["train/loss"] == 0
    assert all(not gradient.any() for step in recorder.gradients for gradient in step.values())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"beta": 0.0}, "`beta` must be positive"),
        ({"clip_range": 1.0}, r"`clip_range` lie in \(0, 1\), got 0.1 and 1.0"),
        ({"samples_per_prompt": 1}, "`samples_per_prompt` must be at least 2 to compare, got 1"),
    ],
)
def test_options_out_of_range_are_refused(options, told):
    with pytest.raises(ValueError, match=told):
        D3PO(tiny_policy("sd"), **options)

"""CRD: centred reward distillation (arXiv:2603.14128).

Where rewards tilt a distribution, they are beta times the log of what the density grew by, up to a
constant of the prompt that nobody knows. It cancels when both are centred over its images. The
error on noised samples stands for the log-density:

    sample x_0 ~ sampling policy,  A = (reward - mean of its prompt) / (std of the round + eps)
    r   = 1/2 + clip(A, +-c) / (2 c)                                         c = adv_clip_max
    (x_t, target) = corrupt(x_0, eps, t),   one t for all images of a prompt
    l   = mean |y - x_0|^2 / sg[mean |y - x_0|],   y the clean latents that an output implies
    rho = -(l(network) - l(old)),                  what the network thinks of x_0
    L   = (c / b) (b (rho - mean rho) - (r - mean r))^2 + kl_beta r mean |network - guided|^2
    after each round of updates:  old <- d old + (1 - d) network,  the sampling policy alike

Means are over the images of the prompt in the minibatch, which holds all of them; `guided` is the
pretrained network with guidance `kl_guidance`, though the trained one has none. At network = old
the gradient of the first part is 2 c (r - mean r) times that of l, whatever b is.

Deviations:
    1. A re-implementation takes errors of the velocity, and centres over all that a minibatch of
       all processes holds, of one prompt or several; there b = 1 too. Official code was not seen.
    2. That one's other centrings (softmax of the rewards, hard selection), its cross-entropy
       instead of squares, and the floor of 1e-4 under the weight of the penalty are left out.
    3. Any sampler may make x_0: here it is the one of evaluation (Euler, DDIM).
    4. Each group has times of its own; minibatches take one of every group before the next.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from lit_align.algorithms.forward_process import ForwardProcessModule, Logs
from lit_align.data.planner import MinibatchOrder
from lit_align.functional.gaussian import mean_square
from lit_align.functional.matching import good_share, group_mean, matching_error
from lit_align.policies.base import DiffusionPolicy
from lit_align.rewards.base import RewardModule
from lit_align.trajectory import ForwardOutputs, ForwardPairs, PromptBatch, Trajectory

Decay = tuple[int, float, float]


def centred_reward_loss(
    implicit: Tensor, share: Tensor, weights: Tensor, crd_beta: float
) -> Tensor:
    """Return ``(b (rho - mean rho) - (r - mean r))^2 / b`` [P, G], means over the group.

    The gradient of the mean of rho is left out: over a group, the others sum to none.

    Args:
        implicit: rho [P, G], of P groups of G images.
        share: r [P, G].
        weights: [P, G], 0 for images that must not count.
        crd_beta: b, positive.
    """
    thought = implicit - group_mean(implicit.detach(), weights)
    given = share - group_mean(share, weights)
    return (crd_beta * thought - given).square() / crd_beta


def check_decay(name: str, decay: Decay) -> None:
    """Refuse a decay that is not (flat, rate, hold).

    Raises:
        ValueError: If the rate is negative, or the last decay not in [0, 1].
    """
    _, rate, hold = decay
    if rate < 0 or not 0 <= hold <= 1:
        raise ValueError(
            f"`{name}` must be (flat, rate, hold) with a rate of at least 0 and `hold` in [0, 1], "
            f"got {tuple(decay)}."
        )


class CRD(ForwardProcessModule):
    """Match what the network thinks of its samples to their rewards, both centred.

    The arguments that are not listed are those of `ForwardProcessModule` and `OnlineModule`. A
    decay (flat, rate, hold) is 0 for `flat` updates, and then rises by `rate` an update up to
    `hold`; a negative `flat` starts within the rise.

    Args:
        crd_beta: b, positive; a larger one keeps the network nearer to the old one.
        kl_beta: Weight of the squared distance to the pretrained network's output, for r = 1; 0
            for none.
        kl_guidance: Guidance of the pretrained network there; None for the trained one's.
        old_decay: Of the old policy, by default min(0.25 + 0.005 n, 0.999) after n updates.
        rollout_decay: Of the policy that samples.
        timestep_fraction: Share of the sampler's times that each prompt is trained at.
        minibatch_order: "timestep_major" takes one time of every prompt before the next,
            "sample_major" all times of a prompt together.
    """

    whole_groups: ClassVar[bool] = True

    def __init__(
        self,
        policy: DiffusionPolicy,
        reward: RewardModule | None = None,
        eval_rewards: dict[str, RewardModule] | None = None,
        crd_beta: float = 1.0,
        kl_beta: float = 0.1,
        kl_guidance: float | None = 4.5,
        old_decay: Decay = (-50, 5e-3, 0.999),
        rollout_decay: Decay = (75, 7.5e-3, 0.999),
        timestep_fraction: float = 0.99,
        minibatch_order: MinibatchOrder = "timestep_major",
        **options: Any,
    ) -> None:
        super().__init__(
            policy, reward, eval_rewards, kl_beta=kl_beta, kl_guidance=kl_guidance,
            timestep_fraction=timestep_fraction, minibatch_order=minibatch_order, **options,
        )  # fmt: skip
        if crd_beta <= 0:
            raise ValueError(f"`crd_beta` must be positive, got {crd_beta}.")
        check_decay("old_decay", old_decay)
        check_decay("rollout_decay", rollout_decay)
        self.crd_beta = crd_beta
        self.keep_snapshot(*old_decay)
        self.sampler = self.keep_snapshot(*rollout_decay, name="sampler")

    def rollout(self, batch: PromptBatch, round_index: int) -> Trajectory:
        """Sample from the sampling policy."""
        with self.sampler.applied():
            return super().rollout(batch, round_index)

    def penalties(self, pairs: ForwardPairs) -> Tensor:
        """Hold good samples more than bad ones."""
        return self.kl_beta * good_share(pairs.advantages, self.max_advantage)

    def pair_loss(self, pairs: ForwardPairs, said: ForwardOutputs) -> tuple[Tensor, Logs]:
        """Return the squared difference of centred rewards of each pair."""
        assert said.averaged is not None
        error, old_error = (
            matching_error(
                self.policy.scheduler.clean(each, said.noised, pairs.timesteps), pairs.clean, True
            )
            for each in (said.output, said.averaged)
        )
        implicit = old_error - error
        share = good_share(pairs.advantages, self.max_advantage)
        rho, share, weights = map(self.grouped, (implicit, share, pairs.weights))
        loss = centred_reward_loss(rho, share, weights, self.crd_beta)
        logs = {
            "train/old_gap": mean_square(said.output - said.averaged).mean(),
            "train/implicit_reward": implicit.mean(),
        }
        return (self.max_advantage * loss).flatten().float(), logs

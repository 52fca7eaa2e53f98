"""D3PO: direct preference optimisation of denoising steps (arXiv:2311.13231).

The denoising chain is a decision process, and a preferred image makes every step that led to it a
preferred action:

    sample images of a prompt from the same noise x_T,  w the best by the reward, l the worst
    rho = p_theta(x_{t-1} | x_t) / p_ref(x_{t-1} | x_t) of each image's own step, cut to 1 +- eps
    L = mean_t -log sigmoid(beta (log rho_w - log rho_l))

Clipping bounds the loss: at beta = eps = 0.1 it stays in [0.6832, 0.7032], and what is outside the
band has no gradient.

Deviations:
    1. log p is averaged over the latent's elements, as in the official code; the paper sums.
    2. A reward judges in the place of a person. Of more than two images the best and the worst are
       kept; the official code takes all pairs of seven.
    3. Steps without noise, such as the last of DDIM, have no density and are left out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_align.algorithms.online import Logs, OnlineModule
from lit_align.algorithms.pairing import keep_best_and_worst
from lit_align.data.planner import RoundPlan
from lit_align.functional.judging import winner_first
from lit_align.functional.noise import keyed_generator
from lit_align.policies.base import DiffusionPolicy
from lit_align.rewards.base import RewardModule
from lit_align.trajectory import PromptBatch, Trajectory, Transition


def step_preference_loss(log_ratio: Tensor, beta: float, clip_range: float) -> Tensor:
    """Return ``-log sigmoid(beta (log rho_w - log rho_l))`` [P] with clipped ratios.

    Args:
        log_ratio: log rho [P, 2], of the preferred image's step first.
        beta: Positive.
        clip_range: eps, in (0, 1).
    """
    clipped = log_ratio.exp().clamp(1 - clip_range, 1 + clip_range).log()
    return -F.logsigmoid(beta * (clipped[:, 0] - clipped[:, 1]))


class D3PO(OnlineModule):
    """Prefer the steps of the better of two images.

    The arguments that are not listed are those of `OnlineModule`, with the official code's values.

    Args:
        beta: Of the loss.
        clip_range: eps in (0, 1); 0.2 degraded images in the authors' hands.
        gap_min: Prompts whose best and worst rewards differ by no more teach nothing.
        samples_per_prompt: Images per prompt, at least 2.
    """

    def __init__(
        self,
        policy: DiffusionPolicy,
        reward: RewardModule | None = None,
        eval_rewards: dict[str, RewardModule] | None = None,
        lr: float = 3e-5,
        beta: float = 0.1,
        clip_range: float = 0.1,
        gap_min: float = 0.0,
        num_inference_steps: int = 20,
        prompts_per_round: int = 10,
        samples_per_prompt: int = 2,
        **options: Any,
    ) -> None:
        super().__init__(
            policy, reward, eval_rewards, lr=lr, num_inference_steps=num_inference_steps,
            prompts_per_round=prompts_per_round, samples_per_prompt=samples_per_prompt, **options,
        )  # fmt: skip
        if beta <= 0 or not 0 < clip_range < 1:
            raise ValueError(
                f"`beta` must be positive and `clip_range` lie in (0, 1), got {beta} and "
                f"{clip_range}."
            )
        if samples_per_prompt < 2:
            raise ValueError(
                f"`samples_per_prompt` must be at least 2 to compare, got {samples_per_prompt}."
            )
        self.beta, self.clip_range, self.gap_min = beta, clip_range, gap_min
        policy.keep_reference()

    def initial_generators(
        self, batch: PromptBatch, key: tuple[str, int, int]
    ) -> list[torch.Generator]:
        """Return generators that start all images of a prompt from the same noise."""
        places = (batch.positions // self.samples_per_prompt).tolist()
        return [keyed_generator("prompt", *key, place) for place in places]

    def compute_targets(self, trajectory: Trajectory) -> Trajectory:
        """Keep the best and the worst image of each prompt, with the reference's densities."""
        kept = keep_best_and_worst(self, trajectory, self.gap_min)
        return kept.replace(extras={"ref_log_prob": self.reference_log_probs(kept)})

    def loss(self, minibatch: Transition) -> tuple[Tensor, Logs]:
        """Return the mean loss of pairs of steps."""
        step = self.policy.replay(minibatch, cfg_grad=self.cfg_grad)
        log_ratio = step.log_prob - minibatch.extras["ref_log_prob"]
        signs = minibatch.advantages.unflatten(0, (-1, 2))
        ordered = winner_first(log_ratio.unflatten(0, (-1, 2)), signs)
        loss = step_preference_loss(ordered, self.beta, self.clip_range)
        margin = (ordered[:, 0] - ordered[:, 1]).detach()
        logs = {
            "train/implicit_acc": ((margin > 0) + 0.5 * (margin == 0)).float().mean(),
            "train/margin": self.beta * margin.mean(),
            "train/clip_fraction": (log_ratio.expm1().abs() > self.clip_range).float().mean(),
        }
        return (minibatch.weights.unflatten(0, (-1, 2))[:, 0] * loss).mean(), logs

    @property
    def plan(self) -> RoundPlan:
        """The sizes and orders of a round, of whose images two of each prompt are kept."""
        return replace(super().plan, whole_groups=True, kept_per_prompt=2)

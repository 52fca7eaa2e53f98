"""Flow-DPO: direct preference optimisation of flow-matching models (arXiv:2501.13918).

Diffusion-DPO's loss on velocities u = eps - x_0 along x_t = (1 - t) x_0 + t eps:

    e = mean |network(x_t, t, prompt) - (eps - x_0)|^2,  e_ref the same of the reference
    L = -log sigmoid(-(beta_t / 2) ((e_w - e_ref,w) - (e_l - e_ref,l)))
    beta_t = beta                     ("constant")
    beta_t = beta (1 - t)^2           ("one_minus_t_sq", the errors of the implied noise)

The second follows from Diffusion-DPO letter by letter, and hardly constrains the noisiest steps;
the paper finds the first better everywhere.

Deviations:
    1. Times are drawn from the logistic of a standard normal, as in pretraining, and not from a
       scheduler's shifted table.
    2. beta 500 is a middle value of what is published (100 to 2000); the paper tells none.
"""

from __future__ import annotations

from typing import Any

from lit_align.algorithms.noising import BetaSchedule
from lit_align.algorithms.preference_learning import PreferenceModule
from lit_align.policies.base import DiffusionPolicy
from lit_align.rewards.base import RewardModule


class FlowDPO(PreferenceModule):
    """Learn from judged images by a flow-matching model.

    The arguments that are not listed are those of `PreferenceModule`.

    Args:
        beta: See there.
        beta_schedule: See above.
        prompt_dropout: Share of pairs without a prompt.

    Raises:
        ValueError: If the model is none of flow matching.
    """

    def __init__(
        self,
        policy: DiffusionPolicy,
        reward: RewardModule | None = None,
        eval_rewards: dict[str, RewardModule] | None = None,
        beta: float = 500.0,
        beta_schedule: BetaSchedule = "constant",
        prompt_dropout: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(
            policy, reward, eval_rewards, beta=beta, beta_schedule=beta_schedule,
            prompt_dropout=prompt_dropout, **options,
        )  # fmt: skip
        if not policy.scheduler.is_flow:
            raise ValueError(
                f"FlowDPO is for flow matching, but the policy's sampler is "
                f"{type(policy.scheduler).__name__}; use DiffusionDPO."
            )

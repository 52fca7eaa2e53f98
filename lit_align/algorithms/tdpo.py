"""TDPO and TDPO-R: temporal diffusion policy optimisation (arXiv:2402.08552).

DDPO's sparse reward is compared with what a temporal critic V expects of the intermediate image,
and the policy is updated one denoising step at a time. With k = 0 .. T-1 from noise to clean:

    sample x_0 .. x_T ~ p_theta,  R = reward(x_T), normalised per prompt
    r_k = [k = T-1] R - kl_coef c D(log p_theta / p_ref at step k)
    G_k = r_k + gamma G_{k+1},  A_k = G_k - V_old(image of x_k), normalised over samples and steps
    for each step, for the samples of each minibatch:
        rho = p_theta(x_{k+1} | x_k) / p_old(x_{k+1} | x_k)
        L = max(-A rho, -A clip(rho, 1 - clip_range, 1 + clip_range)) + cf_coef L_V
        L_V = max((V - G)^2, (clip(V, V_old - clip_range_critic, V_old + ...) - G)^2) / 2

TDPO-R adds `NeuronResetCallback`, which resets the critic's active neurons from time to time.

Deviations:
    1. What is published in full is the code; it, and this file, bootstrap nothing: with gamma 1
       and no penalty every G_k is R, and V is a baseline that depends on the state.
    2. log p is averaged over the latent's elements, as in the code: so is the penalty.
    3. Penalty "approx" is exp(-d) - 1 + d, which estimates KL(p || p_ref) at samples of p; the
       code has exp(d) - 1 - d, which does not.
    4. `clip_range_critic` 0 means no clipping; in the code that path fails.
    5. The critic's dropout is keyed by sample and step, and so the same in every inner pass.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_align.algorithms.choices import check_choice
from lit_align.algorithms.online import Logs, OnlineModule
from lit_align.data.planner import MinibatchOrder, StepChoice
from lit_align.functional.advantages import batch_advantages, discounted_returns
from lit_align.functional.noise import sample_keys
from lit_align.functional.penalty import AdaptiveCoefficient, PenaltyKind, divergence_penalty
from lit_align.functional.policy_gradient import clipped_surrogate, ratio_diagnostics
from lit_align.policies.base import DiffusionPolicy
from lit_align.rewards.base import RewardModule, quantize
from lit_align.trajectory import PromptBatch, Trajectory, Transition

CriticInput = Literal["xt", "x0_hat"]


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float
) -> Tensor:
    """Return ``max((V - G)^2, (clip(V, V_old +- clip_range) - G)^2) / 2`` per item [N].

    Args:
        values: V [N].
        old_values: V_old [N].
        returns: G [N].
        clip_range: 0 for no clipping.
    """
    error = (values - returns).square()
    if clip_range > 0:
        change = (values - old_values).clamp(-clip_range, clip_range)
        error = torch.maximum(error, (old_values + change - returns).square())
    return error / 2


class TDPO(OnlineModule):
    """Policy gradient step by step, against a temporal critic.

    The arguments that are not listed are those of `OnlineModule`.

    Args:
        critic: A `TemporalCritic`.
        lr_critic: Its learning rate.
        critic_weight_decay: Its weight decay.
        critic_input: "xt" decodes the noisy latents, "x0_hat" the clean ones that the network's
            output at them implies.
        clip_range: Of the importance ratio; 1e-4 on 64x64x4 latents.
        clip_range_critic: Of the values' change; 0 for none.
        cf_coef: Weight of the critic's loss.
        gamma: Discount per denoising step, in [0, 1].
        temporal_reward_norm: Normalise A over all samples and steps.
        kl_coef: Weight of the penalty on the divergence from the pretrained model; 0 for none.
        kl_kind: See `divergence_penalty`.
        kl_init: First value of the penalty's adaptive coefficient c.
        kl_target: Divergence per element to keep; None for a constant c.
        kl_horizon: Samples over which c makes an error good.
    """

    def __init__(
        self,
        policy: DiffusionPolicy,
        reward: RewardModule | None = None,
        eval_rewards: dict[str, RewardModule] | None = None,
        critic: nn.Module | None = None,
        lr: float = 1e-4,
        lr_critic: float = 1e-4,
        critic_weight_decay: float = 1e-4,
        critic_input: CriticInput = "xt",
        clip_range: float = 1e-4,
        clip_range_critic: float = 0.2,
        cf_coef: float = 1.0,
        gamma: float = 1.0,
        temporal_reward_norm: bool = True,
        kl_coef: float = 0.0,
        kl_kind: PenaltyKind = "clip",
        kl_init: float = 0.2,
        kl_target: float | None = None,
        kl_horizon: float = 2000,
        minibatch_order: MinibatchOrder = "timestep_major",
        step_choice: StepChoice = "per_sample",
        adv_clip_max: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            policy, reward, eval_rewards, lr=lr, minibatch_order=minibatch_order,
            step_choice=step_choice, adv_clip_max=adv_clip_max, **options,
        )  # fmt: skip
        check_choice("critic_input", critic_input, CriticInput)
        check_choice("kl_kind", kl_kind, PenaltyKind)
        if critic is None:
            raise ValueError("TDPO needs a `critic`: a TemporalCritic with a `tower`.")
        if clip_range <= 0 or not 0 <= gamma <= 1:
            given = f"{clip_range} and {gamma}"
            raise ValueError(f"`clip_range` must be > 0 and `gamma` in [0, 1], got {given}.")
        self.critic: Any = critic
        self.lr_critic, self.critic_weight_decay = lr_critic, critic_weight_decay
        self.keep = ("pred_original",) if critic_input == "x0_hat" else ()
        self.clip_range, self.clip_range_critic = clip_range, clip_range_critic
        self.cf_coef, self.gamma, self.temporal_reward_norm = cf_coef, gamma, temporal_reward_norm
        self.kl_coef, self.kl_kind = kl_coef, kl_kind
        self.kl_controller = AdaptiveCoefficient(kl_init, kl_target, kl_horizon)
        self.stateful["kl_coefficient"] = self.kl_controller
        if kl_coef > 0:
            policy.keep_reference()

    def rollout(self, batch: PromptBatch, round_index: int) -> Trajectory:
        """Also embed and value the image of every state."""
        trajectory = super().rollout(batch, round_index)
        states = trajectory.extras.get("pred_original", trajectory.latents[:, :-1])
        embeddings = torch.stack(
            [self.critic.embed(quantize(self.policy.decode(x))) for x in states.unbind(1)], dim=1
        )
        key = ("dropout", self.seed, round_index, batch.positions.tolist())
        extras = {
            "embeddings": embeddings,  # [B, T, D]
            "values": self.critic.evaluate(embeddings),
            "dropout_keys": sample_keys(*key, states.shape[1]).to(self.device),
        }
        return trajectory.replace(extras=extras)

    def compute_targets(self, trajectory: Trajectory) -> Trajectory:
        """Compare each step's return with the critic's value."""
        rewards = self.normalised_rewards(trajectory)
        per_step = torch.zeros_like(trajectory.log_probs, dtype=torch.float64)
        per_step[:, -1] = rewards
        if self.kl_coef > 0:
            per_step -= self._penalty(trajectory)
        returns = discounted_returns(per_step, self.gamma)
        advantages = returns - trajectory.extras["values"]
        if self.temporal_reward_norm:
            advantages = self.globally(batch_advantages, advantages)
        extras = {**trajectory.extras, "returns": returns.nan_to_num().float()}
        return trajectory.replace(advantages=advantages, extras=extras)

    def _penalty(self, trajectory: Trajectory) -> Tensor:
        """Return the weighted penalty of each step [B, T], 0 where it has no density."""
        log_ratio = trajectory.log_probs - self.reference_log_probs(trajectory)
        penalty = divergence_penalty(log_ratio, self.kl_kind)
        known = self.gathered(penalty[:, self.plan.steps])
        coefficient = self.kl_coef * self.kl_controller.value
        self.kl_controller.update(float(known.mean()), len(known))
        return coefficient * penalty.nan_to_num().double()

    def loss(self, minibatch: Transition) -> tuple[Tensor, Logs]:
        """Return the surrogate plus the critic's loss."""
        step = self.policy.replay(minibatch, cfg_grad=self.cfg_grad)
        log_ratio = step.log_prob - minibatch.old_log_prob
        surrogate = clipped_surrogate(log_ratio.exp(), minibatch.advantages, self.clip_range)
        old = minibatch.extras
        values = self.critic(old["embeddings"], old["dropout_keys"])
        critic = clipped_value_loss(values, old["values"], old["returns"], self.clip_range_critic)
        logs = ratio_diagnostics(log_ratio, self.clip_range)
        logs |= {"train/critic_loss": critic.mean(), "train/value": values.mean()}
        return (minibatch.weights * (surrogate + self.cf_coef * critic)).mean(), logs

    def setup(self, stage: str) -> None:
        """Check that an update holds samples of one step only; see the base class."""
        self.critic.tower.to(self.device)
        super().setup(stage)
        update = self.minibatch_size * self.trainer.accumulate_grad_batches
        mixed = self.minibatch_order != "timestep_major" or self.plan.samples % update
        if stage == "fit" and mixed:
            raise ValueError(
                "TDPO updates step by step: use `minibatch_order: timestep_major`, and let "
                f"`minibatch_size` x `trainer.accumulate_grad_batches` ({update}) divide the "
                f"{self.plan.samples} samples of a round and process."
            )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW over two groups: the policy and the critic."""
        return self.adamw_with(self.critic, self.lr_critic, self.critic_weight_decay)

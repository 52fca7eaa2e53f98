"""Online DPO: preference pairs from the policy's own samples, round after round.

Pairs drawn from an older model stop teaching once the policy tells them apart. So each round makes
its own (arXiv:2502.10248, section 4.4; arXiv:2412.14167):

    sample K images of each prompt,  score them by the reward
    w the best, l the worst of each prompt, if they differ by more than gap_min
    for some of the sampler's times t, with one eps for both:
        e = mean |network(x_t) - target|^2,  e_ref the same of the reference
        L = l(e, e_ref),  by default -log sigmoid(-(beta / 2) ((e_w - e_ref,w) - (e_l - e_ref,l)))
    each `ref_update_rounds` rounds the reference may become, or approach, the policy
    each `label_rounds`-th round an annotator labels the pairs, p(w over l), and the reward model
        learns them beside:  L += -p log sigmoid(r_w - r_l) - (1 - p) log sigmoid(r_l - r_w)

So what the reward model overrates is just what is sampled, labelled and unlearned.

Deviations:
    1. One AdamW trains both, which equals two of them; Step-Video-T2V tells no recipe.
    2. The times are the sampler's, as samples of few steps know no others.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lit_align.algorithms.choices import check_choice
from lit_align.algorithms.forward_process import ForwardProcessModule, Logs
from lit_align.algorithms.pairing import RewardRefresh, keep_best_and_worst
from lit_align.functional.judging import winner_first
from lit_align.functional.preference import (
    Judged,
    LossType,
    PreferenceLoss,
    denoising_error,
    preference_diagnostics,
)
from lit_align.policies.base import DiffusionPolicy
from lit_align.rewards.base import RewardModule
from lit_align.trajectory import ForwardOutputs, ForwardPairs, PromptBatch, Trajectory

RefUpdate = Literal["none", "hard", "ema"]


class OnlineDPO(ForwardProcessModule):
    """Sample, score, pair and train in rounds.

    The arguments that are not listed are those of `ForwardProcessModule` and `OnlineModule`.

    Args:
        loss_type: Of pairs, see `lit_align.functional.preference`.
        beta: As of `DiffusionDPO`.
        nll_coef: Weight of the better image's own error.
        gap_min: Prompts whose best and worst rewards differ by no more teach nothing.
        samples_per_prompt: K, at least 2.
        timestep_fraction: Share of the sampler's times that each pair is trained at.
        ref_update: Whether the reference follows: "none", a copy ("hard"), or an average ("ema").
        ref_update_rounds: Rounds from one update of the reference to the next.
        ref_alpha: Share of the trained weights in an "ema" update, in (0, 1].
        annotator: Labels pairs to refresh the reward model with, as a person would; it stands for
            one in experiments, or is a judge that is too slow to score every image.
        label_rounds: Every so manieth round is labelled.
        label_temperature: T of the annotator's doubt, p = sigmoid((u_w - u_l) / T); 0 for none.
        lr_reward: Learning rate of the reward model.
    """

    whole_groups: ClassVar[bool] = True
    shared_noise: ClassVar[bool] = True
    kept_per_prompt: ClassVar[int | None] = 2

    def __init__(
        self,
        policy: DiffusionPolicy,
        reward: RewardModule | None = None,
        eval_rewards: dict[str, RewardModule] | None = None,
        loss_type: LossType = "sigmoid",
        beta: float = 5000.0,
        nll_coef: float = 0.0,
        gap_min: float = 0.0,
        samples_per_prompt: int = 8,
        timestep_fraction: float = 0.2,
        ref_update: RefUpdate = "none",
        ref_update_rounds: int = 1,
        ref_alpha: float = 0.6,
        annotator: RewardModule | None = None,
        label_rounds: int = 1,
        label_temperature: float = 0.0,
        lr_reward: float = 1e-4,
        **options: Any,
    ) -> None:
        super().__init__(
            policy, reward, eval_rewards, samples_per_prompt=samples_per_prompt,
            timestep_fraction=timestep_fraction, **options,
        )  # fmt: skip
        check_choice("ref_update", ref_update, RefUpdate)
        if samples_per_prompt < 2 or ref_update_rounds < 1 or label_rounds < 1:
            raise ValueError(
                "`samples_per_prompt` must be at least 2, `ref_update_rounds` and `label_rounds` "
                f"at least 1, got {samples_per_prompt}, {ref_update_rounds} and {label_rounds}."
            )
        if not 0 < ref_alpha <= 1 or label_temperature < 0:
            raise ValueError(
                "`ref_alpha` must lie in (0, 1] and `label_temperature` not be negative, got "
                f"{ref_alpha} and {label_temperature}."
            )
        self.objective = PreferenceLoss(loss_type, beta, nll_coef=nll_coef)
        self.objective.check_labels(torch.tensor([[1.0, 0.0]]))
        self.gap_min = gap_min
        if self.objective.kind.needs_reference and ref_update == "none":
            self.needs_reference = True
            policy.keep_reference()
        elif self.objective.kind.needs_reference:
            decay = 0.0 if ref_update == "hard" else 1 - ref_alpha
            self.keep_snapshot(-1, decay, decay, every=ref_update_rounds)
        self.lr_reward, self.label_rounds = lr_reward, label_rounds
        self.refresh: RewardRefresh | None = None
        if annotator is not None:
            self._refresh_by(annotator, label_temperature)

    def _refresh_by(self, annotator: RewardModule, temperature: float) -> None:
        self.refresh = RewardRefresh(annotator, self.reward, temperature, self.seed)
        self.reward_model: Any = self.reward  # in the module tree, as it is trained
        self.counters["labels"] = 0

    def collect(self, batch: PromptBatch, round_index: int) -> Trajectory:
        """Run one round; see the base class."""
        self._labelling = (round_index + 1) % self.label_rounds == 0
        return super().collect(batch, round_index)

    def compute_targets(self, trajectory: Trajectory) -> Trajectory:
        """Keep the best and the worst image of each prompt, labelled if it is time."""
        kept = keep_best_and_worst(self, trajectory, self.gap_min)
        if self.refresh is None:
            return kept
        first = kept.latents.new_full((len(kept) // 2,), torch.nan)
        first = self.refresh.annotate(self, kept) if self._labelling else first
        labels = self.gathered(first.isfinite().float()).sum()
        self._round_logs["rollout/labels"] = float(labels)
        self.counters["labels"] += int(labels)
        shares = torch.stack([first, 1 - first], dim=1).flatten()
        return kept.replace(extras={"preferred": shares[:, None].expand_as(kept.timesteps)})

    def pair_loss(self, pairs: ForwardPairs, said: ForwardOutputs) -> tuple[Tensor, Logs]:
        """Return the loss of each pair, at both of its images."""
        signs = self.grouped(pairs.advantages)
        compared = said.averaged if said.reference is None else said.reference

        def ordered(values: Tensor) -> Tensor:
            return winner_first(self.grouped(values), signs)

        def errors(gap: Tensor) -> Tensor:
            return denoising_error(gap.flatten(0, 1)).unflatten(0, (-1, 2))

        gap, error_ref, shift = ordered(said.output - said.target), None, None
        if compared is not None:
            error_ref = errors(ordered(compared - said.target))
            shift = ordered(said.output - compared)
        labels = signs.new_tensor([1.0, 0.0]).expand_as(signs)
        judged = Judged(errors(gap), labels, error_ref, gap, shift)
        loss = self.objective(judged)
        return loss.repeat_interleave(2), preference_diagnostics(judged, self.objective)

    def loss(self, minibatch: ForwardPairs) -> tuple[Tensor, Logs]:
        """Return the mean loss of pairs, with the reward model's own where there are labels."""
        loss, logs = super().loss(minibatch)
        if self.refresh is None:
            return loss, logs
        preferred = self.grouped(minibatch.extras["preferred"])[:, 0]
        reward_loss = self.refresh.loss(self, minibatch, preferred)
        return loss + reward_loss, {**logs, "train/reward_loss": reward_loss.detach()}

    @property
    def idle(self) -> tuple[str, ...]:
        """The reward model, in a round without labels."""
        unlabelled = self.refresh is not None and not self._round_logs.get("rollout/labels")
        return ("reward_model.",) if unlabelled else ()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Leave alone what is idle; see the base class."""
        if self.idle:
            for parameter in self.reward_model.parameters():
                parameter.grad = None  # of zeros, by which AdamW would still move
        super().on_before_optimizer_step(optimizer)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW over the policy, and over the reward model if it is refreshed."""
        if self.refresh is None:
            return super().configure_optimizers()
        return self.adamw_with(self.reward_model, self.lr_reward, self.weight_decay)

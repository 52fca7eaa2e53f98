"""Methods that learn from judgements of images: pairs, rankings, or single ones.

    draw t and eps once for each judgement, alike for its images and for both networks
    (x_t, target) = corrupt(x_0, eps, t)
    e = mean |network(x_t, t, prompt) - target|^2,    e_ref that of the reference, without gradient
    L = mean of weight l(e, e_ref)                              l: `lit_align.functional.preference`

No image is sampled in training, no reward is asked, and networks that predict the noise, the
velocity or the clean sample are trained alike.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lit_align.algorithms.base import AlignmentModule
from lit_align.algorithms.choices import check_choice
from lit_align.algorithms.noising import (
    BetaSchedule,
    ErrorSpace,
    NoisedJudgements,
    Sharing,
    check_weighting,
    error_weights,
    noise_judgements,
)
from lit_align.functional.preference import (
    Judged,
    LossType,
    PreferenceLoss,
    Utility,
    denoising_error,
    preference_diagnostics,
    scaled_loser,
)
from lit_align.metrics.implicit_accuracy import ImplicitAccuracy
from lit_align.policies.base import DiffusionPolicy
from lit_align.policies.snapshots import Snapshot
from lit_align.rewards.base import RewardModule
from lit_align.trajectory import PreferenceBatch

Logs = dict[str, Tensor]
RefUpdate = Literal["none", "hard", "ema"]


class PreferenceModule(AlignmentModule, ABC):
    """Noise what was judged, and compare two networks' errors on it.

    Args:
        policy: The model.
        reward: What the labels stand for, if that can be asked; only evaluated, never trained on.
        eval_rewards: Further rewards by name, scored in every evaluation.
        loss_type: See `lit_align.functional.preference`, also for the six arguments that follow.
        beta: Of implicit rewards ``beta / 2 (e_ref - e)``. With the mean over D elements it is
            ``beta / (2 D)`` for each, which is logged: 5000 is 0.15 for Stable Diffusion 1.5 at
            512 pixels, and 9.8 for latents of 4x8x8.
        label_smoothing: Share of labels taken to be wrong.
        tau: Of "ipo".
        alpha: Of "dmpo".
        utility: Of "kto".
        nll_coef: Weight of the preferred image's own error.
        sdpo_mu: Hold the gradient of the rejected image back so that the preferred one's error
            falls by at least ``1 - mu`` of what it would alone (arXiv:2511.03317); None for no.
        beta_schedule: "constant", "one_minus_t_sq" (times the squared share of signal, (1 - t)^2
            of flow matching) or "elbo" (the exact weight of the likelihood's bound).
        error_space: Errors of the network's own output ("native"), or of the noise ("eps") or the
            clean latents ("x0") that it implies.
        error_reduction: "mean" or "sum" over the elements of a latent.
        share_noise: Noise the images of a judgement alike; else optima are biased towards 0.
        share_timestep: Noise them to the same time.
        fixed_noise_per_pair: Noise a judgement alike whenever it comes back.
        prompt_dropout: Share of judgements whose prompt is replaced by "", in [0, 1], which keeps
            classifier-free guidance.
        ref_update: Whether the reference follows: "none", a copy ("hard"), or an average ("ema",
            arXiv:2404.09656).
        ref_update_steps: Optimiser steps from one update of the reference to the next.
        ref_alpha: Share of the trained weights in an "ema" update, in (0, 1].
        warmup_steps: Optimiser steps in which the learning rate rises to `lr`.
        options: Of `AlignmentModule`.
    """

    needs_reward: ClassVar[bool] = False

    def __init__(
        self,
        policy: DiffusionPolicy,
        reward: RewardModule | None = None,
        eval_rewards: dict[str, RewardModule] | None = None,
        loss_type: LossType = "sigmoid",
        beta: float = 5000.0,
        label_smoothing: float = 0.0,
        tau: float = 1000.0,
        alpha: float = 0.01,
        utility: Utility = "sigmoid",
        nll_coef: float = 0.0,
        sdpo_mu: float | None = None,
        beta_schedule: BetaSchedule = "constant",
        error_space: ErrorSpace = "native",
        error_reduction: Literal["mean", "sum"] = "mean",
        share_noise: bool = True,
        share_timestep: bool = True,
        fixed_noise_per_pair: bool = False,
        prompt_dropout: float = 0.2,
        ref_update: RefUpdate = "none",
        ref_update_steps: int = 512,
        ref_alpha: float = 0.6,
        warmup_steps: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(policy, reward, eval_rewards, **options)
        check_choice("error_reduction", error_reduction, Literal["mean", "sum"])
        check_choice("ref_update", ref_update, RefUpdate)
        check_weighting(error_space, beta_schedule)
        _check_ranges(prompt_dropout, sdpo_mu, ref_alpha, ref_update_steps)
        self.objective = PreferenceLoss(
            loss_type, beta, label_smoothing, tau, alpha, utility, nll_coef
        )
        self.sdpo_mu, self.error_reduction = sdpo_mu, error_reduction
        self.weighting = (error_space, beta_schedule)
        self.sharing = Sharing(share_noise, share_timestep, fixed_noise_per_pair, prompt_dropout)
        self.ref_update, self.ref_update_steps = ref_update, ref_update_steps
        self.ref_decay = 0.0 if ref_update == "hard" else 1 - ref_alpha
        self.warmup_steps = warmup_steps
        self.snapshot = Snapshot()
        self.counters["judgements"] = 0
        self.held_out: Any = None
        self.implicit_accuracy = ImplicitAccuracy()
        if self.objective.kind.needs_reference:
            policy.keep_reference()

    def experience(self, loader: Any, pairs: Any = None) -> Any:
        """Return the loader of judgements itself, and keep its held-out ones for evaluation.

        Raises:
            ValueError: If it holds prompts instead.
        """
        if not hasattr(loader, "held_out") or pairs is not None:
            raise ValueError(
                f"{type(self).__name__} learns from judged images: use a PreferenceDataModule as "
                "`data`."
            )
        self.held_out = loader.held_out
        return loader

    def encode_images(self, images: Tensor) -> Tensor:
        """Return the latents [N, ...] of images [N, 3, H, W] in [0, 1]."""
        with torch.no_grad():
            return self.policy.encode(images.to(self.device))

    def latents_key(self) -> str:
        """Return what latents depend on beside the images: the pipeline and their size."""
        return f"{self.policy.pretrained}-{self.policy.image_size[0]}x{self.policy.image_size[1]}"

    def configure_optimizers(self) -> Any:
        """Return AdamW whose learning rate rises and then stays."""
        optimizer = super().configure_optimizers()
        if self.warmup_steps < 1:
            return optimizer
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / self.warmup_steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """Return the loss of a batch of judgements."""
        self._refresh_reference()
        self.objective.check_labels(batch.labels)
        noised = self._noised(batch, "preference")
        judged = self.judge(noised)
        weights = batch.weights / self.gathered(batch.weights).mean().clamp(min=1e-8)
        loss = (weights * self.objective(judged)).mean()
        self._count(len(noised.timesteps))
        self.counters["judgements"] += len(batch) * self.trainer.world_size
        logs = {"train/loss": loss.detach(), **self._describe(judged, noised)}
        self.log_dict(logs, sync_dist=True, batch_size=len(batch))
        counters = {name: float(count) for name, count in self.counters.items()}
        self.log_dict(counters, batch_size=len(batch))
        return loss

    def judge(self, noised: NoisedJudgements) -> Judged:
        """Return both networks' errors on noised judgements."""
        weights = error_weights(self.policy.scheduler, noised.timesteps, *self.weighting)
        weights = noised.grouped(weights)
        reference = shift = None
        if self.objective.kind.needs_reference:
            with torch.no_grad(), self.reference():
                reference = self._predict(noised)
        output = self._predict(noised)
        gap = noised.grouped(output - noised.target)
        error = weights * noised.grouped(denoising_error(gap.flatten(0, 1), self.error_reduction))
        if self.sdpo_mu is not None and error.shape[1] == 2:
            error = scaled_loser(error, gap, self.sdpo_mu)
        if reference is not None:
            shift = noised.grouped(output - reference)
            flat = denoising_error(reference - noised.target, self.error_reduction)
            reference = weights * noised.grouped(flat)
        judged = Judged(error, noised.labels, reference, gap, shift)
        if self.objective.loss_type != "kto":
            return judged
        baseline = self.gathered(judged.log_ratio.detach()).mean().clamp(min=0)
        return Judged(error, noised.labels, reference, gap, shift, baseline)

    def _predict(self, noised: NoisedJudgements) -> Tensor:
        return self.policy.predict(
            noised.noised, noised.timesteps, noised.conditioning, guidance_scale=1
        )

    def _noised(self, batch: PreferenceBatch, purpose: str) -> NoisedJudgements:
        latents = batch.latents
        if latents is None:
            encoded = self.encode_images(batch.images.flatten(0, 1))
            latents = encoded.unflatten(0, batch.labels.shape)
        return noise_judgements(self.policy, batch, latents, self.sharing, purpose, self.seed)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Run the reference: the pretrained weights, or those of the last update."""
        with self.policy.reference() if self.ref_update == "none" else self.snapshot.applied():
            yield

    def _refresh_reference(self) -> None:
        step = self.trainer.global_step
        if self.ref_update != "none" and step and step % self.ref_update_steps == 0:
            self.snapshot.refresh(step, self.ref_decay)

    def _count(self, latents: int) -> None:
        networks = 1 + self.objective.kind.needs_reference
        self.counters["denoiser_calls"] += networks * latents * self.trainer.world_size

    def _describe(self, judged: Judged, noised: NoisedJudgements) -> Logs:
        """Return what to log of a batch."""
        elements = noised.target[0].numel() if self.error_reduction == "mean" else 1
        logs = preference_diagnostics(judged, self.objective)
        beta = torch.tensor(self.objective.beta / (2 * elements))
        return {**logs, "train/beta_per_element": beta}

    @torch.no_grad()
    def on_validation_epoch_end(self) -> None:
        """Log `val/implicit_acc` and `val/margin` on held-out pairs, at the same noise each time.

        `val/implicit_acc/<k>` is the accuracy in the k-th quarter of noise levels; see the base
        class for the rest.
        """
        super().on_validation_epoch_end()
        if self.held_out is None:
            return
        for batch in self.held_out:
            if batch.labels.shape[1] != 2:
                return
            with self.trainer.precision_plugin.forward_context():
                noised = self._noised(batch.to(self.device), "heldout")
                judged = self.judge(noised)
            levels = noised.grouped(self.policy.scheduler.noise_levels(noised.timesteps))[:, 0]
            margin = -self.objective.implicit_reward(judged.ease).diff(dim=1)[:, 0]
            counted = batch.weights.to(self.device) > 0  # 0 fills up a process's share
            values = (margin, levels, noised.labels[:, 0])
            self.implicit_accuracy.update(*(value[counted] for value in values))
        self.log_dict({f"val/{k}": v for k, v in self.implicit_accuracy.compute().items()})
        self.implicit_accuracy.reset()

    def on_train_start(self) -> None:
        """Start the reference, or lay a restored one out as the weights are."""
        if self.ref_update != "none":
            self.snapshot.attach(self.policy)
            if not self.snapshot.average:
                self.snapshot.start(self.trainer.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the reference, if it is not the pretrained model; see the base class."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["lit_align"]["reference"] = self.snapshot.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the reference; see the base class."""
        super().on_load_checkpoint(checkpoint)
        self.snapshot.load_state_dict(checkpoint["lit_align"]["reference"])


def _check_ranges(
    prompt_dropout: float, sdpo_mu: float | None, ref_alpha: float, ref_update_steps: int
) -> None:
    for name, share in (("prompt_dropout", prompt_dropout), ("sdpo_mu", sdpo_mu or 0.0)):
        if not 0 <= share <= 1:
            raise ValueError(f"`{name}` must lie in [0, 1], got {share}.")
    if not 0 < ref_alpha <= 1 or ref_update_steps < 1:
        raise ValueError(
            "`ref_alpha` must lie in (0, 1] and `ref_update_steps` be positive, got "
            f"{ref_alpha} and {ref_update_steps}."
        )

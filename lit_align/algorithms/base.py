"""What every alignment method shares: rewards, evaluation, optimiser, checkpoints."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lit_align.algorithms.checkpoint import check_identity, describe, keep_args, keep_trainable
from lit_align.algorithms.choices import check_train
from lit_align.algorithms.precision import check_precision, keep_float32
from lit_align.algorithms.sharding import check_strategy, name_optimizer_states, shard, whole
from lit_align.functional.noise import sample_generators
from lit_align.policies.base import DiffusionPolicy
from lit_align.rewards.base import RewardModule, quantize
from lit_align.rewards.scoring import call_reward
from lit_align.trajectory import PromptBatch

_PROMPTS_CHECKED = 10_000
COUNTERS = ("reward_queries", "gradient_queries", "denoiser_calls")


class AlignmentModule(LightningModule, ABC):
    """A policy, the reward it is aligned with, and the rewards it is only evaluated with.

    Args:
        policy: The model; its trainable part is optimised by AdamW.
        reward: What training maximises.
        eval_rewards: Further rewards by name, scored in every evaluation.
        lr: Learning rate.
        weight_decay: Of AdamW.
        adam_epsilon: Of AdamW, added to the root of the second moment.
        adam_betas: Of AdamW, the decay rates of its moments.
        num_inference_steps: Denoising steps T in training.
        guidance_scale: Weight of classifier-free guidance, in training and evaluation; 1 runs no
            unconditional branch. Of Flux.1-dev the input of that name.
        eval_num_inference_steps: Denoising steps in evaluation; by default as in training.
        seed: Decides prompts, noise and orders.
        max_invalid_fraction: With a larger share of images that the trained reward could not
            score, training stops; in [0, 1].
        reward_timeout: Seconds that one call of a reward may take; None for no limit.

    Attributes:
        rewards: Every reward by name, the trained one first.
        trained_rewards: Names of those that are trained.
        counters: Totals over all processes: `reward_queries` (images scored in training),
            `gradient_queries` (reward gradients), `denoiser_calls` (network evaluations of one
            latent, guidance counting twice).
    """

    trains_policy: ClassVar[bool] = True  # else it is frozen, and something beside it is trained
    needs_reward: ClassVar[bool] = True

    def __init__(
        self,
        policy: DiffusionPolicy,
        reward: RewardModule | None = None,
        eval_rewards: dict[str, RewardModule] | None = None,
        lr: float = 3e-4,
        weight_decay: float = 1e-4,
        adam_epsilon: float = 1e-8,
        adam_betas: tuple[float, float] = (0.9, 0.999),
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        eval_num_inference_steps: int | None = None,
        seed: int = 42,
        max_invalid_fraction: float = 0.05,
        reward_timeout: float | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= max_invalid_fraction <= 1:
            raise ValueError(
                f"`max_invalid_fraction` must lie in [0, 1], got {max_invalid_fraction}."
            )
        keep_args(self)
        self.strict_loading = False  # a checkpoint holds trainable tensors only
        self.policy = policy
        # A plain dictionary: rewards belong in no checkpoint, and no precision plugin casts them.
        self.rewards: dict[str, RewardModule] = {}
        if reward is not None:
            self.rewards[reward.name] = reward
        self.trained_rewards = list(self.rewards)
        self.rewards |= eval_rewards or {}
        for frozen in self.rewards.values():
            frozen.requires_grad_(False).eval()
        self.reward = reward
        self.lr, self.weight_decay, self.seed = lr, weight_decay, seed
        self.adam_betas, self.adam_epsilon = adam_betas, adam_epsilon
        self.num_inference_steps, self.guidance_scale = num_inference_steps, guidance_scale
        self.eval_num_inference_steps = eval_num_inference_steps or num_inference_steps
        self.max_invalid_fraction, self.reward_timeout = max_invalid_fraction, reward_timeout
        self.counters = dict.fromkeys(COUNTERS, 0)
        self.val_means: Any = nn.ModuleList(  # no dictionary: names may hold dots, as HPSv2.1
            MeanMetric(nan_strategy="ignore") for _ in self.rewards
        )

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep `reward` out of the module tree; see `rewards`."""
        if name == "reward":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def setup(self, stage: str) -> None:
        """Check the run before any work is done.

        Raises:
            ValueError: If an option cannot work; the message says what can.
        """
        keep_float32(self.trainer.precision_plugin, self.policy)
        self.policy.branches(self.guidance_scale)  # refuses a scale that the network cannot take
        steps = {self.eval_num_inference_steps}
        if stage == "fit":
            self._check_trainer()
            steps.add(self.num_inference_steps)
        for number in steps:
            self.policy.scheduler.set_timesteps(number)
        for reward in self.rewards.values():
            self._check_reward(reward.to(self.device))

    def _check_trainer(self) -> None:
        if self.needs_reward and self.reward is None:
            raise ValueError(f"{type(self).__name__} needs a `reward`.")
        check_train(self.policy, type(self).__name__, self.trains_policy)
        check_precision(str(self.trainer.precision), self.policy)
        check_strategy(self.trainer.strategy)

    def _check_reward(self, reward: RewardModule) -> None:
        nothing = torch.zeros(2, dtype=torch.int64, device=self.device)
        images = torch.full((2, *self.policy.pixel_shape), 0.5, device=self.device)
        with torch.no_grad():
            blank = PromptBatch(["", ""], [None, None], nothing, nothing, nothing)
            self.score(reward, images, blank)

    def experience(self, loader: Any, pairs: Any = None) -> Any:
        """Return the training loader made of a `PromptLoader`; here the loader itself.

        Raises:
            ValueError: If there are image-text pairs, which this method does not learn from.
        """
        if pairs is not None:
            raise ValueError(f"{type(self).__name__} learns from no `pairs`; leave them out.")
        for each in loader.values() if isinstance(loader, dict) else [loader]:
            self._warn_of_long_prompts(each.prompts)
        return loader

    def _warn_of_long_prompts(self, prompts: Sequence[tuple[str, Any]]) -> None:
        texts = [prompts[i][0] for i in range(min(len(prompts), _PROMPTS_CHECKED))]
        long = [text for text, cut in zip(texts, self.policy.truncated(texts), strict=True) if cut]
        if long:
            rank_zero_warn(
                f"{len(long)} of {len(texts)} prompts are longer than the text encoder reads; the "
                f"model does not see their ends. The first is {long[0][:100]!r}."
            )

    def configure_model(self) -> None:
        """Shard what is trained, if the strategy is FSDP2."""
        shard(self, self.policy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW over the trainable parameters."""
        return self.adamw([{"params": [p for p in self.parameters() if p.requires_grad]}])

    def adamw(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Return AdamW over groups of parameters, which may have options of their own."""
        options: Any = (self.lr, self.adam_betas, self.adam_epsilon, self.weight_decay)
        return torch.optim.AdamW(groups, *options)

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val: Any = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:  # fmt: skip
        """Clip as the trainer says, the norm of each group of parameters on its own."""
        if len(optimizer.param_groups) == 1 or gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            for group in optimizer.param_groups:
                nn.utils.clip_grad_norm_(group["params"], gradient_clip_val)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the norm of the gradient, before clipping."""
        trained = (p for group in optimizer.param_groups for p in group["params"])
        gradients = [p.grad for p in trained if p.grad is not None]
        self.log("train/grad_norm", whole(nn.utils.get_total_norm(gradients)))

    @torch.no_grad()
    def generate(self, batch: PromptBatch, purpose: str = "val") -> tuple[Tensor, Tensor]:
        """Return images [B, 3, H, W] in [0, 1] and latents by the deterministic sampler.

        The noise of a sample is keyed by (purpose, seed, position): the same at every call.
        """
        trajectory = self.policy.sample(
            self.policy.encode_prompt(batch.prompts),
            num_inference_steps=self.eval_num_inference_steps,
            guidance_scale=self.guidance_scale,
            generator=sample_generators(purpose, self.seed, 0, batch.positions.tolist()),
            stochastic_steps=(),
        )
        latents = trajectory.latents[:, -1]
        return quantize(self.policy.decode(latents)), latents

    @torch.no_grad()
    def evaluate(self, batch: PromptBatch) -> dict[str, Any]:
        """Return `images` [B, 3, H, W], `latents` [B, ...] and `scores`, [B] for every reward."""
        images, latents = self.generate(batch)
        scores = {name: self.score(reward, images, batch) for name, reward in self.rewards.items()}
        return {"images": images, "latents": latents, "scores": scores}

    def score(self, reward: RewardModule, images: Tensor, batch: PromptBatch) -> Tensor:
        """Return the scores [B] float32, NaN where an image could not be scored.

        Raises:
            RewardError: If the reward failed, broke its contract, or took too long.
        """
        return call_reward(reward, images, batch, self.reward_timeout).to(self.device)

    def gathered(self, values: Tensor) -> Tensor:
        """Return the values of all processes [W * B, ...], rank by rank, on the device."""
        if self.trainer.world_size == 1:
            return values.to(self.device)
        everywhere: Any = self.all_gather(values.to(self.device))
        return torch.as_tensor(everywhere.flatten(0, 1))

    def globally(self, function: Callable[..., Tensor], *values: Tensor) -> Tensor:
        """Return `function` of the values of all processes, cut back to this process's share."""
        result = function(*(self.gathered(value) for value in values))
        return result.chunk(self.trainer.world_size)[self.trainer.global_rank]

    def validation_batches(self) -> Iterable[PromptBatch]:
        """Return the validation loader, set up also before the first epoch that validates."""
        if self.trainer.val_dataloaders is None and self.trainer.enable_validation:
            self.trainer.validating = True
            self.trainer.fit_loop.epoch_loop.val_loop.setup_data()
            self.trainer.training = True
        loader: Iterable[PromptBatch] | None = self.trainer.val_dataloaders
        return [] if loader is None else loader

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """Sample and score; what `evaluate` returns goes to the callbacks."""
        outputs = self.evaluate(batch)
        for mean, values in zip(self.val_means, outputs["scores"].values(), strict=True):
            mean.update(values)
        return outputs

    def on_validation_epoch_end(self) -> None:
        """Log `val/reward/<name>`, the mean over all images that could be scored."""
        self._log_means("val")
        self.log_dict({name: float(count) for name, count in self.counters.items()})

    def test_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """Sample and score, as in validation."""
        return self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Log `test/reward/<name>`."""
        self._log_means("test")

    def _log_means(self, stage: str) -> None:
        for name, mean in zip(self.rewards, self.val_means, strict=True):
            self.log(f"{stage}/reward/{name}", mean.compute())
            mean.reset()

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """Return the prompts, images [B, 3, H, W] in [0, 1] and scores of a batch."""
        return {"prompts": batch.prompts, **self.evaluate(batch)}

    def save_pretrained(self, path: str, dtype: torch.dtype | None = None) -> None:
        """Write what plain diffusers reads: a LoRA file, or a full pipeline folder."""
        self.policy.save_pretrained(path, dtype)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep trainable tensors, counters, statistics, and what the checkpoint is."""
        keep_trainable(self, checkpoint)
        name_optimizer_states(self, checkpoint)
        checkpoint["lit_align"] = {
            **describe(self._identity()),
            "counters": dict(self.counters),
            "rewards": {name: reward.statistics() for name, reward in self.rewards.items()},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore counters and statistics.

        Raises:
            ValueError: If the checkpoint belongs to another method or policy, or lacks a tensor.
        """
        stored = check_identity(self, checkpoint, self._identity())
        self.counters = dict(stored["counters"])
        for name, statistics in stored["rewards"].items():
            if name in self.rewards:
                self.rewards[name].load_statistics(statistics)

    def _identity(self) -> dict[str, str]:
        return {"method": type(self).__name__, "policy": self.policy.fingerprint()}

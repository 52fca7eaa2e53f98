"""What holds in every correct run, checked while it runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lit_align.algorithms.base import AlignmentModule
from lit_align.callbacks.evaluation import path_divergences
from lit_align.callbacks.rng_state import undisturbed_rng
from lit_align.functional.noise import keyed_generator
from lit_align.rewards.base import RewardModule
from lit_align.rewards.scoring import RewardError
from lit_align.trajectory import PromptBatch

_KL_AT_START = 1e-6  # nats
_MIN_KL_TOLERANCE = 1e-6
_MODULES_TOLD = 5
_CHUNK = 1 << 22  # elements hashed at once, which bounds the memory that takes


class InvariantError(RuntimeError):
    """A run is wrong in a way that training would hide."""


class InvariantsCallback(Callback):
    """Stops a run that is wrong.

        ratio       1 before the first update of each round: the policy is still the one that
                    sampled; `train/approx_kl` is 0
        start       the divergence from the pretrained model is 0, for LoRA or a kept reference
        gradients   finite at every update; from the second on, no trained module is left out
        ranks       bitwise equal weights on all processes after each round
        rewards     one score per image, and the same for an image at any place of the batch

    Args:
        ratio_tolerance: Of the ratio; its square, but at least 1e-6, is that of `train/approx_kl`.
            By default 1e-4 if all is float32, else the method's `clip_range`, else 1e-2.
        check_rewards: Turn it off for a reward that answers differently each time.
    """

    def __init__(self, ratio_tolerance: float | None = None, check_rewards: bool = True) -> None:
        if ratio_tolerance is not None and ratio_tolerance <= 0:
            raise ValueError(f"`ratio_tolerance` must be positive, got {ratio_tolerance}.")
        self.ratio_tolerance = ratio_tolerance
        self.check_rewards = check_rewards
        # The parameters by name, kept: to walk through the module for them would slow each update.
        self._named: list[tuple[str, nn.Parameter]] = []
        # Whether a round's first update is still to come. Where a run is resumed within a round it
        # is over, and the policy is no longer the one that sampled.
        self._new_round = False
        self._round_step = 0
        self._modules_checked = False
        self._moved = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the rewards, and at a fresh start the policy."""
        self._named = list(pl_module.named_parameters())
        self._modules_checked = False
        self._moved = trainer.global_step > 0
        if not isinstance(pl_module, AlignmentModule):
            return
        batch = next(iter(pl_module.validation_batches()), None)
        with undisturbed_rng(), torch.no_grad():
            if self.check_rewards:
                for reward in pl_module.rewards.values():
                    _check_reward(pl_module, reward, batch)
            if batch is not None and not self._moved:
                _check_start(trainer, pl_module, batch)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the round's first update."""
        self._new_round, self._round_step = True, trainer.global_step
        self._modules_checked = False

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Check the gradients."""
        parameters = {n: p for n, p in self._named if p.requires_grad}
        # With a loss scale, steps with infinite gradients are part of the game, and skipped.
        if getattr(trainer.precision_plugin, "scaler", None) is None:
            _check_finite(parameters, trainer.global_step)
        if self._moved and not self._modules_checked:
            idle = _idle_by_design(pl_module) + getattr(pl_module, "idle", ())
            _check_modules(parameters, idle, trainer.global_step)
            self._modules_checked = True
        # LoRA's first factor has no gradient until the second has moved.
        self._moved = self._moved or any(group["lr"] > 0 for group in optimizer.param_groups)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Check what the round's first update has logged of the ratio."""
        if not self._new_round or trainer.global_step == self._round_step:
            return
        self._new_round = False
        metrics = trainer.callback_metrics
        if "train/ratio" not in metrics:
            return
        tolerance = self.ratio_tolerance or _default_tolerance(trainer, pl_module)
        ratio, kl = float(metrics["train/ratio"]), float(metrics.get("train/approx_kl", 0.0))
        kl_tolerance = max(tolerance**2, _MIN_KL_TOLERANCE)
        if not (abs(ratio - 1) <= tolerance and kl <= kl_tolerance):
            raise InvariantError(
                f"Round {trainer.current_epoch}: before its first update train/ratio is {ratio:.6g}"
                f" (1 within {tolerance:.1e} expected) and train/approx_kl {kl:.3g} (at most "
                f"{kl_tolerance:.1e}), though the policy is still the one that sampled. Replaying "
                "a step differs from sampling it: look for dropout, another precision, conditioning"
                " or guidance in one of them, or stored latents that were rounded. If it is only "
                "the rounding of a low precision, raise `ratio_tolerance`."
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that all processes hold the same weights."""
        weights = {
            name: p
            for name, p in pl_module.named_parameters()
            if p.requires_grad and not isinstance(p, DTensor)  # shards differ by design
        }
        if trainer.world_size == 1 or not weights:
            return
        hashes = torch.stack([bit_hash(weight) for weight in weights.values()])
        everywhere: Any = pl_module.all_gather(hashes)  # [W, tensors]
        equal = (everywhere == everywhere[0]).all(dim=0).tolist()
        different = [name for name, same in zip(weights, equal, strict=True) if not same]
        if different:
            raise InvariantError(
                f"After round {trainer.current_epoch}, {len(different)} of {len(weights)} trained "
                f"tensors differ between processes: {_told(different)}. Something changes weights "
                "outside the synchronised update, or outside what DistributedDataParallel wraps; "
                "draw its randomness from a generator with the same seed on all processes."
            )


def _check_reward(module: AlignmentModule, reward: RewardModule, batch: PromptBatch | None) -> None:
    """Score two prompts twice each, in two orders; the images are noise."""
    nothing = torch.zeros(1, dtype=torch.int64)
    batch = batch or PromptBatch([""], [None], nothing, nothing, nothing)
    batch = batch.select(torch.tensor([0, 0, len(batch) - 1, len(batch) - 1])).to(module.device)
    noise = torch.rand(4, *module.policy.pixel_shape, generator=keyed_generator("invariants"))
    images, order = noise.to(module.device), torch.tensor([2, 0, 3, 1])
    try:
        scores = module.score(reward, images, batch)
        permuted = module.score(reward, images[order], batch.select(order))
    except (RewardError, TypeError, ValueError) as error:
        raise InvariantError(
            f"The reward {reward.name} cannot score 4 images of 2 prompts: {error}"
        ) from error
    if reward.granularity == "batchwise":
        return
    expected = scores[order]
    same = torch.isclose(permuted, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    if not same.all():
        gap = (permuted - expected)[~same].abs().nan_to_num(torch.inf).max()
        raise InvariantError(
            f"The reward {reward.name} gives an image another score at another place of the batch:"
            f" by up to {gap:.3g}. If it compares all images of a batch, declare `granularity = "
            "'batchwise'`; if it answers differently each time, set `check_rewards: false`; else "
            "it mixes up images, prompts, metadata or groups."
        )


def _check_start(trainer: Trainer, module: AlignmentModule, batch: PromptBatch) -> None:
    """Sample two prompts and compare each step with the pretrained model's."""
    policy = module.policy
    if policy.train_mode != "lora" and policy._reference is None:
        return
    if not len(policy.scheduler.density_steps):
        return
    batch = batch.select(torch.arange(min(2, len(batch)))).to(module.device)
    kl = float(path_divergences(trainer, module, batch, "invariants").max())
    if not kl <= _KL_AT_START:
        raise InvariantError(
            f"Before the first update the policy is {kl:.3g} nats from the pretrained model (at "
            f"most {_KL_AT_START:.0e} expected). Its adapters do not start as zero, or the "
            "reference runs other weights, precision or conditioning than the policy. To go on "
            "from trained weights, resume with `ckpt_path`, or run without InvariantsCallback."
        )


def _default_tolerance(trainer: Trainer, module: LightningModule) -> float:
    exact = str(trainer.precision).startswith(("32", "64")) and all(
        p.dtype.itemsize >= 4 for p in module.parameters()
    )
    return 1e-4 if exact else float(getattr(module, "clip_range", None) or 1e-2)


def _check_finite(parameters: dict[str, nn.Parameter], step: int) -> None:
    gradients = {n: p.grad for n, p in parameters.items() if p.grad is not None}
    if not gradients or bool(size_of(gradients.values()).isfinite()):  # one wait for the device
        return
    guilty = [n for n, g in gradients.items() if not size_of([g]).isfinite()]
    modules = list(dict.fromkeys(map(_module_of, guilty)))
    raise InvariantError(
        f"Update {step + 1}: the gradients of {len(guilty)} of {len(gradients)} tensors are not "
        f"finite, in {_told(modules)}. The loss is not finite, or overflows on the way back: look "
        "at the last `train/` metrics, lower the learning rate, set `trainer.gradient_clip_val`, "
        "or find the operation with `trainer.detect_anomaly: true`."
    )


def _check_modules(parameters: dict[str, nn.Parameter], idle: tuple[str, ...], step: int) -> None:
    """Check that every trained module has a gradient, unless none has."""
    gradients: dict[str, list[Tensor]] = {}
    for name, parameter in parameters.items():
        if name.startswith(idle):
            continue
        found = gradients.setdefault(_module_of(name), [])
        if parameter.grad is not None:
            found.append(parameter.grad)
    reached = {name: size_of(found) for name, found in gradients.items() if found}
    if not reached:
        return
    nonzero = (torch.stack(list(reached.values())) != 0).tolist()
    trained = {name for name, is_nonzero in zip(reached, nonzero, strict=True) if is_nonzero}
    left_out = [name for name in gradients if name not in trained]
    if trained and left_out:
        raise InvariantError(
            f"Update {step + 1}: {len(left_out)} of {len(gradients)} trained modules have no "
            f"gradient or only zeros: {_told(left_out)}. The loss does not depend on them: look "
            "for a `detach()`, a `torch.no_grad()` or an unused layer, or freeze them by "
            "`requires_grad_(False)`."
        )


def _idle_by_design(module: nn.Module) -> tuple[str, ...]:
    """Return how the names of tensors begin that the pretrained network has but does not use.

    The last block of Stable Diffusion 3 drops what the text's tokens have attended to.
    """
    return tuple(
        f"{name}.{layer}."
        for name, part in module.named_modules()
        if getattr(part, "context_pre_only", None) is True
        for layer in ("add_q_proj", "norm_added_q")
    )


def size_of(gradients: Iterable[Tensor]) -> Tensor:
    """Return the sum of absolute values, of whole tensors where they are sharded.

    Unlike the root of squares it is 0 for zeros only, and unlike the maximum it exists for a
    process's share of a tensor that has fewer rows than there are processes.
    """
    size = nn.utils.get_total_norm(gradients, norm_type=1)
    return size.full_tensor() if isinstance(size, DTensor) else size


def _module_of(name: str) -> str:
    return name.rpartition(".")[0] or name


def _told(names: list[str]) -> str:
    rest = len(names) - _MODULES_TOLD
    return ", ".join(names[:_MODULES_TOLD]) + (f" and {rest} more" if rest > 0 else "")


@torch.no_grad()
def bit_hash(tensor: Tensor) -> Tensor:
    """Return an int64 hash of a tensor's bits, ``sum_i m_i bits_i mod 2^64`` with odd mixed m_i.

    Integers add up exactly in any order, so that equal tensors have equal hashes on any device.
    One changed element always changes the hash, a permutation or several do almost surely.
    """
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.detach().flatten().view(integers[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(bits), _CHUNK):
        chunk = bits[start : start + _CHUNK].long()
        mixed = torch.arange(start, start + len(chunk), device=tensor.device)
        for odd in (0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9):
            mixed = (mixed + 1) * odd
            mixed ^= mixed >> 29
        total += (chunk * (mixed | 1)).sum()
    return total

"""What a round costs beyond its irreducible calls: `python -m lit_align.benchmarks.overhead`.

Runs DDPO rounds and records every call of the network, the decoder and the reward. After each
round the same calls are replayed in a bare loop at the same shapes (with backward where the round
had one), and the round's wall time is divided by the loop's. Both are measured in one process,
turn by turn, so that the ratio holds when the machine's speed drifts.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jsonargparse import auto_cli
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_align.algorithms import DDPO
from lit_align.callbacks import (
    AdapterEMA,
    CrossRewardCallback,
    InvariantsCallback,
    OveroptimizationStopping,
    RNGStateCallback,
    SampleGallery,
)
from lit_align.data.prompts import PromptFile, PromptLoader
from lit_align.policies import DiffusionPolicy
from lit_align.rewards import Colorfulness, ShapesCLIP, ShapesVerifier

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], bool]


class _Recorder(Callback):
    """Times rounds, and the bare loop over each round's calls right after it."""

    def __init__(self, module: DDPO) -> None:
        self.calls: list[Call] = []
        self.rounds: list[float] = []
        self.bare: list[float] = []
        policy = module.policy
        assert module.reward is not None
        for owner, name in (
            (policy.denoiser, "forward"),
            (policy.vae, "decode"),
            (module.reward, "forward"),
        ):
            self._tap(owner, name)
        self._started = 0.0

    def _tap(self, owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def recorded(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((original, args, kwargs, torch.is_grad_enabled()))
            return original(*args, **kwargs)

        setattr(owner, name, recorded)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close a round, replay its calls, and start the clock of the next."""
        now = time.perf_counter()
        if self._started:  # the first round warms up
            self.rounds.append(now - self._started)
            self.bare.append(_bare_loop(self.calls))
            pl_module.zero_grad()
        self.calls.clear()
        self._started = time.perf_counter()


def _bare_loop(calls: list[Call]) -> float:
    started = time.perf_counter()
    for function, args, kwargs, with_gradient in list(calls):
        with torch.set_grad_enabled(with_gradient):
            output = function(*args, **kwargs)
            if with_gradient:
                output = output[0] if isinstance(output, tuple) else output
                output.float().square().mean().backward()
    return time.perf_counter() - started


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def overhead(
    pipelines: list[str] | None = None,
    rounds: int = 6,
    guidance_scale: float = 1.0,
    images_per_round: int = 64,
    num_inference_steps: int = 10,
    callbacks: bool = True,
) -> None:
    """Print, per pipeline, the overhead ratio and images per second.

    Args:
        pipelines: Names or folders; by default the shipped ones.
        rounds: Measured rounds, after one that warms up.
        guidance_scale: Weight of guidance; 1 runs no unconditional branch.
        images_per_round: Images per round.
        num_inference_steps: Denoising steps.
        callbacks: Run with all callbacks of the package at their defaults.
    """
    print(f"{'pipeline':<12} {'ratio (median, min, max)':<28} images / s")
    for name in pipelines or ["shapes-sd", "shapes-sd3"]:
        with _quiet(), TemporaryDirectory() as folder:
            module = DDPO(
                DiffusionPolicy.from_pretrained(name),
                Colorfulness(),
                {"ShapesVerifier": ShapesVerifier(), "ShapesCLIP": ShapesCLIP()},
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                prompts_per_round=images_per_round,
                rollout_batch_size=images_per_round,
                minibatch_size=images_per_round,
                advantage_norm="batch",
            )
            recorder = _Recorder(module)
            trainer = Trainer(
                max_epochs=rounds + 1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                num_sanity_val_steps=0,
                check_val_every_n_epoch=rounds + 2,  # rounds with a validation are not measured
                callbacks=[*(_all_callbacks() if callbacks else []), recorder],
                default_root_dir=folder,
            )
            prompts = module.experience(PromptLoader(PromptFile("shapes-train"), 1, shuffle=True))
            trainer.fit(module, prompts, PromptLoader(PromptFile("shapes-heldout")[:64], 64))
        ratios = [a / b for a, b in zip(recorder.rounds, recorder.bare, strict=True)]
        shown = f"{statistics.median(ratios):.3f} ({min(ratios):.3f}, {max(ratios):.3f})"
        speed = images_per_round / statistics.median(recorder.rounds)
        print(f"{name:<12} {shown:<28} {speed:.1f}")


def _all_callbacks() -> list[Callback]:
    return [
        AdapterEMA(),
        InvariantsCallback(),
        CrossRewardCallback(),
        OveroptimizationStopping(),
        SampleGallery(),
        RNGStateCallback(),
    ]


if __name__ == "__main__":
    auto_cli(overhead)

"""One round of experience: sample, score, and check what the reward answered."""

from __future__ import annotations

import time
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from tqdm.auto import tqdm

from lit_align.rewards.scoring import check_invalid, in_thread
from lit_align.trajectory import PromptBatch, Trajectory

if TYPE_CHECKING:
    from lit_align.algorithms.online import OnlineModule

Scores = list[Future[Tensor]]


def sample_and_score(
    module: OnlineModule, batch: PromptBatch, round_index: int
) -> tuple[Trajectory, dict[str, float]]:
    """Return the round's samples with their rewards, and what to log of them."""
    started = time.perf_counter()
    trajectory, scores = _sample(module, batch, round_index)
    sampled = time.perf_counter()
    rewards = torch.cat([s.result() for s in scores]) if scores else _score(module, trajectory)
    scored = time.perf_counter()
    logs = _check_rewards(module, rewards)
    logs |= {"time/rollout": sampled - started, "time/reward": scored - sampled}
    return trajectory.replace(rewards=rewards, images=None), logs


@torch.no_grad()
def _sample(
    module: OnlineModule, batch: PromptBatch, round_index: int
) -> tuple[Trajectory, Scores]:
    """Return the round's samples, and their scores if those are computed beside."""
    parts: list[Trajectory] = []
    scores: Scores = []
    for part in batch.split(module.rollout_batch_size):
        with module.trainer.precision_plugin.forward_context():
            parts.append(module.rollout(part, round_index))
        if module.background_rewards:
            scores.append(in_thread(partial(_score, module, parts[-1])))
    return Trajectory.concatenate(parts), scores


@torch.no_grad()
def _score(module: OnlineModule, trajectory: Trajectory) -> Tensor:
    assert module.reward is not None
    assert trajectory.images is not None
    assert trajectory.batch is not None
    module.reward.train()  # running statistics follow training samples only
    scores = module.score(module.reward, trajectory.images, trajectory.batch)
    module.reward.eval()
    return scores


def _check_rewards(module: OnlineModule, rewards: Tensor) -> dict[str, float]:
    """Return the round's statistics; stop if too many images could not be scored."""
    name, everywhere = module.reward_name, module.gathered(rewards)
    valid = everywhere[~everywhere.isnan()]
    invalid = len(everywhere) - len(valid)
    check_invalid(name, invalid, len(everywhere), module.max_invalid_fraction)
    return {
        f"rollout/reward/{name}": float(valid.mean()),
        f"rollout/reward_std/{name}": float(valid.std(correction=0)),
        "rollout/invalid": float(invalid),
    }


def progress_bar(trainer: Trainer, total: int) -> Any:
    """Return a bar over the network calls of a rollout, silent where the trainer has none."""
    quiet = trainer.progress_bar_callback is None or trainer.global_rank > 0
    return tqdm(total=total, desc="Rollout", unit="call", leave=False, disable=quiet)

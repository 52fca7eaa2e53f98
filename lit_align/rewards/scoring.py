"""Calling a reward: its contract, its failures, its time limit, and threads to wait in."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from threading import Thread
from typing import TypeVar

import torch
from torch import Tensor

from lit_align.functional.frames import over_frames
from lit_align.rewards.base import RewardModule, checked_scores
from lit_align.trajectory import PromptBatch

T = TypeVar("T")
_PROMPTS_TOLD = 3


class RewardError(RuntimeError):
    """A reward failed as a whole; a single image that could not be scored is NaN instead."""


def call_reward(
    reward: RewardModule, images: Tensor, batch: PromptBatch, timeout: float | None = None
) -> Tensor:
    """Return the scores [B] float32 of images [B, 3, H, W], with autocast off.

    Of videos [B, F, 3, H, W] a reward that does not read them scores each frame, and the mean
    is the video's; NaN if one of them could not be scored.

    Args:
        reward: Scores the images.
        images: In [0, 1].
        batch: The prompts that they answer.
        timeout: Seconds to wait; the call then runs in a thread of its own.

    Raises:
        RewardError: If the reward raised, broke its contract, or took too long; the message names
            the reward and the prompts.
    """

    def call() -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            if images.ndim == 4 or reward.reads_videos:
                scores = reward(images.float(), batch.prompts, batch.metadata, batch.group_ids)
                return checked_scores(reward, scores, len(images))
            return over_frames(partial(_score_frames, reward, batch), images.float())

    try:
        if timeout is None:
            return call()
        future = in_thread(call)
        if wait([future], timeout).done:
            return future.result()
    except Exception as error:
        raise RewardError(
            f"{reward.name} failed for {_named(batch)}: {type(error).__name__}: {error}"
        ) from error
    raise RewardError(
        f"{reward.name} did not answer within {timeout} seconds (`reward_timeout`) for "
        f"{_named(batch)}."
    )


def _score_frames(reward: RewardModule, batch: PromptBatch, frames: Tensor) -> Tensor:
    """Return the scores [B F] of the frames [B F, 3, H, W] of a batch's videos."""
    if reward.granularity != "pointwise":
        raise ValueError(
            f"it compares images ({reward.granularity}), and a video has many; decode one frame of "
            "each (`policy.init_args.decode_latents: 1`)"
        )
    each = torch.arange(len(batch)).repeat_interleave(len(frames) // len(batch))
    repeated = batch.select(each.to(frames.device))
    scores = reward(frames, repeated.prompts, repeated.metadata, repeated.group_ids)
    return checked_scores(reward, scores, len(frames))


def check_background(reward: RewardModule) -> None:
    """Check that a reward may be called batch by batch, beside the sampling.

    Raises:
        ValueError: If it looks at several images together or keeps statistics of them.
    """
    if reward.granularity != "pointwise" or reward.statistics():
        raise ValueError(
            f"`background_rewards` scores batch by batch, but {reward.name} looks at several "
            "images together or keeps statistics; leave it out."
        )


def check_invalid(name: str, invalid: int, total: int, max_invalid_fraction: float) -> None:
    """Check that few enough of a round's images could not be scored.

    Raises:
        RewardError: If there are more than `max_invalid_fraction` of them.
    """
    if invalid > max_invalid_fraction * total:
        raise RewardError(
            f"{name} could not score {invalid} of the round's {total} images, more than "
            f"`max_invalid_fraction` ({max_invalid_fraction}) allows; repair the reward, or "
            "raise the limit if so many NaN are expected."
        )


def check_differentiable(reward: RewardModule, method: str) -> None:
    """Check that a reward has a gradient, image by image.

    Raises:
        ValueError: If it has none, or compares images; names the method that follows it.
    """
    if not reward.differentiable:
        raise ValueError(
            f"{method} follows the reward's gradient, and {reward.name} has none; use a reward "
            "with `differentiable = True`, or a policy gradient such as DDPO."
        )
    if reward.granularity != "pointwise":
        raise ValueError(
            f"{method} scores minibatch by minibatch, but {reward.name} compares the images of a "
            f"{reward.granularity.removesuffix('wise')}; use a policy gradient such as DDPO."
        )


def in_thread(function: Callable[[], T]) -> Future[T]:
    """Start `function` in a thread that does not keep the program alive, with the same grad mode.

    Work on a GPU would queue behind the main thread's; what gains is work on CPU or elsewhere.
    """
    future: Future[T] = Future()
    grad = torch.is_grad_enabled()

    def run() -> None:
        try:
            with torch.set_grad_enabled(grad):  # grad mode belongs to the thread
                future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


def _named(batch: PromptBatch) -> str:
    shown = ", ".join(repr(prompt[:100]) for prompt in batch.prompts[:_PROMPTS_TOLD])
    more = ", ..." if len(batch) > _PROMPTS_TOLD else ""
    return f"{len(batch)} image(s) of the prompts {shown}{more}"

"""DRTune: deep reward tuning (arXiv:2405.00760).

    tau ~ U{1..round(early_stop_ratio T)},  N = T - tau    (N = T if early_stop_ratio is 0)
    S = { s + j floor(N / K) : j = 0..K-1 },  s ~ U{0..N - 1 - (K - 1) floor(N / K)}
    for i = 0..N-1:   out = network(sg(x_i)), without gradient if i is not in S;  x_{i+1} = a x_i + b out
    x0 = x_T, or the clean latents that the last step's output implies if N < T
    L = -reward(decode(x0), prompt)

As no gradient flows into the network's input, that of x_T is a plain weighted sum over S, which
does not explode; each call is checkpointed, so that memory does not grow with K.

Deviations:
    1. Which steps have a gradient may also be the last K, K at random, or a list, as in the video
       code EasyAnimate; there the start of "uniform" could put a step beyond the last one.
    2. T, K and the range of tau are not stated in full by the paper and there is no official code;
       the defaults are 50, 5 and 40 % of T.
    3. All draws are made once for each update, the same for all its samples and processes.
"""  # noqa: E501 - the algorithm reads best in one line per step

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch

from lit_align.algorithms.choices import check_choice
from lit_align.algorithms.reward_gradient import Drawn, RewardGradientModule
from lit_align.policies.base import DiffusionPolicy
from lit_align.rewards.base import RewardModule
from lit_align.trajectory import PromptMinibatch

StepStrategy = Literal["uniform", "last", "tail", "random", "list"]


def chosen_steps(
    strategy: StepStrategy, count: int, total: int, generator: torch.Generator
) -> Collection[int]:
    """Return the indices of the steps that have a gradient, increasing.

    Args:
        strategy: "uniform" for K equally spaced ones from a random start, "last" for the last,
            "tail" for the last K, "random" for K of all.
        count: K.
        total: N.
        generator: Of the draw.
    """
    if strategy == "last":
        return (total - 1,)
    if strategy == "tail":
        return range(total - count, total)
    if strategy == "random":
        return sorted(torch.randperm(total, generator=generator)[:count].tolist())
    spacing = total // count
    room = total - (count - 1) * spacing
    start = int(torch.randint(room, (), generator=generator))
    return range(start, start + count * spacing, spacing)


class DRTune(RewardGradientModule):
    """Back-propagation through spaced steps, past the network's inputs.

    The arguments that are not listed are those of `RewardGradientModule`.

    Args:
        train_step_strategy: Which steps have a gradient, see `chosen_steps`; "list" takes
            `train_steps`.
        truncation_steps: K, how many.
        train_steps: Their indices, for "list".
        early_stop_ratio: Stop up to this share of the steps before the end; 0 for never.
        stop_input_grad: Let no gradient flow into the network's input; without it and without
            early stop this is DRaFT on the chosen steps.
    """

    def __init__(
        self,
        policy: DiffusionPolicy,
        reward: RewardModule | None = None,
        eval_rewards: dict[str, RewardModule] | None = None,
        train_step_strategy: StepStrategy = "uniform",
        truncation_steps: int = 5,
        train_steps: Sequence[int] = (),
        early_stop_ratio: float = 0.4,
        stop_input_grad: bool = True,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        lr: float = 1e-4,
        **options: Any,
    ) -> None:
        super().__init__(
            policy, reward, eval_rewards, num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale, lr=lr, **options,
        )  # fmt: skip
        self.latest_stop = round(early_stop_ratio * num_inference_steps)
        shortest = num_inference_steps - self.latest_stop
        check_choice("train_step_strategy", train_step_strategy, StepStrategy)
        count = 1 if train_step_strategy in ("last", "list") else truncation_steps
        if not 0 <= early_stop_ratio < 1 or not 1 <= count <= shortest:
            raise ValueError(
                "`truncation_steps` must be positive and fit into what `early_stop_ratio` in [0, 1)"
                f" leaves of {num_inference_steps} steps, got {truncation_steps} and "
                f"{early_stop_ratio}."
            )
        listed = train_step_strategy == "list"
        repeated = len(set(train_steps)) < len(train_steps)
        if listed != bool(train_steps) or repeated or not set(train_steps) <= set(range(shortest)):
            raise ValueError(
                "`train_step_strategy: list`, and only it, needs `train_steps` of 0.."
                f"{shortest - 1}, each once, got {list(train_steps)}."
            )
        self.train_step_strategy: StepStrategy = train_step_strategy
        self.truncation_steps, self.train_steps = truncation_steps, tuple(train_steps)
        self.stop_input_grad = stop_input_grad

    def draw(self, minibatch: PromptMinibatch) -> Drawn:
        """Sample with the gradient of the chosen steps, up to the step that was drawn."""
        generator, total = self.draw_generator(), self.num_inference_steps
        if self.latest_stop:
            total -= int(torch.randint(1, self.latest_stop + 1, (), generator=generator))
        steps = self.train_steps or chosen_steps(
            self.train_step_strategy, self.truncation_steps, total, generator
        )
        keep = ("pred_original",) if total < self.num_inference_steps else ()
        path = self.sample(
            minibatch, steps, num_steps=total, keep=keep, detach_input=self.stop_input_grad
        )
        states = path.extras.get("pred_original", path.latents)
        return Drawn([states[:, -1]], path, steps)

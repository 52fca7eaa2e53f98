"""DiffusionNFT: negative-aware fine-tuning on the forward process (arXiv:2509.16117).

Samples of an old policy are split softly into good and bad ones. The network is trained to lie on
the good side of the old one, and its mirror image on the bad side:

    sample x_0 ~ old policy,  A = (reward - mean of its prompt) / (std of the round + eps)
    r  = 1/2 + clip(A, +-c) / (2 c)                                          c = adv_clip_max
    (x_t, target) = corrupt(x_0, eps, t)   for all but one of the sampler's times t
    o+ = (1 - b) old(x_t) + b network(x_t),   o- = (1 + b) old(x_t) - b network(x_t)
    L  = (c / b) (r l(o+) + (1 - r) l(o-)) + kl_beta mean |network - pretrained|^2
    "x0"       l(o) = mean |y - x_0|^2 / sg[mean |y - x_0|],   y the clean latents that o implies
    "output"   l(o) = mean |o - target|^2
    after each round of updates:  old <- d old + (1 - d) network,  d(n) by `decay_type`

At network = old its gradient is that of A l(network), whatever b is. Where old(x_t) is the mean of
the targets, the optimum of "output" is old + (2 / b) E[r | x_t] (mean of good targets - old).

Deviations:
    1. "x0" is the official code's form, "output" the paper's. The factor c / b is the code's, and
       serves both.
    2. Any sampler may make x_0: here it is the one of evaluation (Euler, DDIM) instead of a
       second-order solver.
    3. Noise is keyed by sample and time, and so the same in every inner pass.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from lit_align.algorithms.choices import check_choice
from lit_align.algorithms.forward_process import ForwardProcessModule, Logs
from lit_align.functional.gaussian import mean_square
from lit_align.functional.matching import good_share, matching_error
from lit_align.policies.base import DiffusionPolicy
from lit_align.rewards.base import RewardModule
from lit_align.trajectory import ForwardOutputs, ForwardPairs, PromptBatch, Trajectory

Form = Literal["x0", "output"]
DecayType = Literal[0, 1, 2]

# Of the old policy's decay: how long it is 0, by how much it rises a step, and up to what.
DECAYS: dict[int, tuple[int, float, float]] = {
    0: (0, 0.0, 0.0),
    1: (0, 1e-3, 0.5),
    2: (75, 7.5e-3, 0.999),
}


def negative_aware_loss(
    prediction: Tensor,
    old: Tensor,
    target: Tensor,
    share: Tensor,
    nft_beta: float,
    normalise: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(r l(p+) + (1 - r) l(p-)) / b`` with ``p+- = old +- b (p - old)``, and both l.

    Args:
        prediction: p [N, ...], of the network that is trained.
        old: Of the one that sampled [N, ...].
        target: [N, ...].
        share: r [N], in [0, 1], how good the sample is.
        nft_beta: b, positive.
        normalise: See `matching_error`.

    Returns:
        Three times [N], float64.
    """
    moved = nft_beta * (prediction - old)
    positive = matching_error(old + moved, target, normalise)
    negative = matching_error(old - moved, target, normalise)
    return (share * positive + (1 - share) * negative) / nft_beta, positive, negative


class DiffusionNFT(ForwardProcessModule):
    """Contrast good with bad samples, without likelihoods.

    The arguments that are not listed are those of `ForwardProcessModule` and `OnlineModule`, with
    the values of the official code.

    Args:
        form: "x0" or "output", see above.
        nft_beta: b, positive; 0.1 learns faster, 1 is more stable.
        kl_beta: Weight of the squared distance to the pretrained network's output; 0 for none.
        decay_type: Of d(n) after n updates: 0 is d = 0, which keeps samples on-policy; 1 is
            min(0.001 n, 0.5); 2 is 0 up to n = 75 and then min(0.0075 (n - 75), 0.999).
        timestep_fraction: Share of the sampler's times that each sample is trained at.
    """

    def __init__(
        self,
        policy: DiffusionPolicy,
        reward: RewardModule | None = None,
        eval_rewards: dict[str, RewardModule] | None = None,
        form: Form = "x0",
        nft_beta: float = 1.0,
        kl_beta: float = 1e-4,
        decay_type: DecayType = 1,
        timestep_fraction: float = 0.99,
        **options: Any,
    ) -> None:
        super().__init__(
            policy, reward, eval_rewards, kl_beta=kl_beta, timestep_fraction=timestep_fraction,
            **options,
        )  # fmt: skip
        check_choice("form", form, Form)
        if nft_beta <= 0:
            raise ValueError(f"`nft_beta` must be positive, got {nft_beta}.")
        if decay_type not in DECAYS:
            raise ValueError(f"`decay_type` must be 0, 1 or 2, got {decay_type}.")
        self.form, self.nft_beta = form, nft_beta
        self.keep_snapshot(*DECAYS[decay_type])

    def rollout(self, batch: PromptBatch, round_index: int) -> Trajectory:
        """Sample from the old policy."""
        with self.snapshot.applied():
            return super().rollout(batch, round_index)

    def pair_loss(self, pairs: ForwardPairs, said: ForwardOutputs) -> tuple[Tensor, Logs]:
        """Return the contrast of each pair."""
        assert said.averaged is not None
        output, averaged, target = said.output, said.averaged, said.target
        logs = {"train/old_gap": mean_square(output - averaged).mean()}
        if self.form == "x0":
            target = pairs.clean
            output, averaged = (
                self.policy.scheduler.clean(each, said.noised, pairs.timesteps)
                for each in (output, averaged)
            )
        bound = self.max_advantage
        share = good_share(pairs.advantages, bound)
        loss, positive, negative = negative_aware_loss(
            output, averaged, target, share, self.nft_beta, normalise=self.form == "x0"
        )
        logs |= {"train/positive_error": positive.mean(), "train/negative_error": negative.mean()}
        return (bound * loss).float(), logs

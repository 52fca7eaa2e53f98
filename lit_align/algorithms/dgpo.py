"""DGPO: direct group preference optimisation (arXiv:2510.08425).

The preference loss of whole groups instead of pairs: images better than others of their prompt are
learned as data are, worse ones are unlearned, and the less so the more the group already tells them
apart better than the pretrained network does:

    sample x_0,  A = clip((reward - mean of its prompt) / (std + eps), +-c)       c = adv_clip_max
    (x_t, target) = corrupt(x_0, eps, t),  one t and one eps for all G images of a prompt
    l = mean |network(x_t) - target|^2,    l_ref that of the pretrained network
    w = sg[sigmoid(beta sum_j A_j (l_j - l_ref,j) / G)]             over the images j of the prompt
    L = w A l + kl_beta mean |network - pretrained|^2

At network = pretrained, w is 1/2 and the gradient half that of the advantage times the pretraining
loss. Both distances ask the pretrained network with guidance `kl_guidance`, as the official code
does, though the trained one has none.

Deviations:
    1. Times are drawn for each group; the official code draws them for all groups of a round, as
       `step_choice: shared` does.
    2. G counts the images that could be scored.
    3. The official code's clipping of A l against averaged weights, its sampling from those after
       some hundred updates, and averaged weights in the place of the pretrained ones (there with
       beta 2000 to 5000) are left out.
    4. Advantages are divided by the round's std, as in some of the official settings; in others by
       that of the prompt (`advantage_norm: group`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from lit_align.algorithms.forward_process import ForwardProcessModule, Logs
from lit_align.data.planner import MinibatchOrder, RoundPlan
from lit_align.functional.matching import group_mean, matching_error
from lit_align.policies.base import DiffusionPolicy
from lit_align.rewards.base import RewardModule
from lit_align.trajectory import ForwardOutputs, ForwardPairs


def preference_weight(
    error: Tensor, reference: Tensor, advantages: Tensor, weights: Tensor, dgpo_beta: float
) -> Tensor:
    """Return ``sg[sigmoid(beta mean_j A_j (l_j - l_ref,j))]`` of each group [P, 1].

    Args:
        error: l [P, G], of P groups of G images.
        reference: l_ref [P, G].
        advantages: A [P, G].
        weights: [P, G], 0 for images that must not count.
        dgpo_beta: beta, positive.
    """
    gain = group_mean(advantages * (error.detach() - reference), weights)
    return (dgpo_beta * gain).sigmoid()


def noisiest(count: int, fraction: float, trained: int) -> tuple[int, ...]:
    """Return the sampler's times to draw from: the first ``int(count * fraction)``.

    Args:
        count: T, how many times there are.
        fraction: In (0, 1].
        trained: How many are drawn.

    Raises:
        ValueError: If there are fewer times than that.
    """
    most = int(count * fraction)
    if not 1 <= trained <= most:
        raise ValueError(
            f"`trained_times` must lie in [1, {most}], the noisiest {fraction:.0%} of {count} "
            f"steps, got {trained}; change it, `num_inference_steps` or `timestep_fraction`."
        )
    return tuple(range(most))


class DGPO(ForwardProcessModule):
    """Weigh the pretraining loss by the advantage, and by what a group has yet to learn.

    The arguments that are not listed are those of `ForwardProcessModule` and `OnlineModule`, with
    the values of the official code.

    Args:
        dgpo_beta: beta, positive, of the order of 10 to 100.
        trained_times: How many times each prompt is trained at.
        timestep_fraction: Share of the sampler's times, from noise on, that they are drawn from;
            details of images that were sampled in few steps teach little.
        kl_beta: Weight of the squared distance to the pretrained network's output; 0 for none.
        kl_guidance: Guidance of the pretrained network; None for the trained one's.
        adv_clip_max: Bound on A.
        minibatch_order: "timestep_major" takes one time of every prompt before the next,
            "sample_major" all times of a prompt together.
    """

    needs_reference: bool = True
    whole_groups: ClassVar[bool] = True
    shared_noise: ClassVar[bool] = True

    def __init__(
        self,
        policy: DiffusionPolicy,
        reward: RewardModule | None = None,
        eval_rewards: dict[str, RewardModule] | None = None,
        dgpo_beta: float = 100.0,
        trained_times: int = 4,
        timestep_fraction: float = 0.5,
        kl_beta: float = 0.02,
        kl_guidance: float | None = 4.5,
        minibatch_order: MinibatchOrder = "timestep_major",
        num_inference_steps: int = 10,
        **options: Any,
    ) -> None:
        super().__init__(
            policy, reward, eval_rewards, kl_beta=kl_beta, kl_guidance=kl_guidance,
            timestep_fraction=timestep_fraction, minibatch_order=minibatch_order,
            num_inference_steps=num_inference_steps, **options,
        )  # fmt: skip
        if dgpo_beta <= 0:
            raise ValueError(f"`dgpo_beta` must be positive, got {dgpo_beta}.")
        noisiest(num_inference_steps, timestep_fraction, trained_times)  # refuses too many
        self.dgpo_beta, self.trained_times = dgpo_beta, trained_times

    def pair_loss(self, pairs: ForwardPairs, said: ForwardOutputs) -> tuple[Tensor, Logs]:
        """Return the weighted error of each pair."""
        assert said.reference is not None
        error, reference_error, advantages, weights = map(
            self.grouped,
            (
                matching_error(said.output, said.target, normalise=False),
                matching_error(said.reference, said.target, normalise=False),
                pairs.advantages,
                pairs.weights,
            ),
        )
        weight = preference_weight(error, reference_error, advantages, weights, self.dgpo_beta)
        logs = {
            "train/matching_error": error.mean(),
            "train/preference_weight": weight.mean(),
        }
        return (weight * advantages * error).flatten().float(), logs

    @property
    def plan(self) -> RoundPlan:
        """The sizes and orders of a round, with times of the noisier ones."""
        times = noisiest(self.num_inference_steps, self.timestep_fraction, self.trained_times)
        pools = ((times, self.trained_times),)
        return replace(super().plan, pools=pools, trained_steps=self.trained_times)

"""A head on a frozen denoiser that predicts the next noise level.

At noise level t_{n-1} the head reads the denoiser's features f_n and gives a Beta distribution
over the ratio of the next level to this one (arXiv:2412.01243):

    (a, b) = head(f_n),   r_n ~ Beta(1 + e^a, 1 + e^b),   t_n = r_n t_{n-1},   t_0 = 1

Both shapes are above 1, so that there is one mode, ``sigmoid(a - b)``.

An addition: with `init_steps` the head starts as a fixed schedule of so many steps and learns what
to change of it, ``r_n ~ Beta(1 + c m e^a, 1 + c (1 - m) e^b)`` with the mode m that takes that
schedule's step from t_{n-1}, and the head's a and b about 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_align.functional.beta import beta_around
from lit_align.policies.base import DiffusionPolicy
from lit_align.policies.features import taps_of

MIN_RATIO = 1e-3  # ratios are kept this far from 0 and 1
_POOLED = 16
_INIT_STD = 0.02
_INIT_BIASES = (2.5, 1.0)
_REFERENCE_CONCENTRATION = 20.0


class TimePredictor(nn.Module):
    """Reads a denoiser's features, gives the Beta of the next step; float32 (arXiv:2412.01243).

    Two convolutions, the first normalised and modulated by the embedding of the time, pooled to one
    vector, and an MLP. With ``width=128`` on Stable Diffusion 3 it has the paper's 4,097,154
    parameters. At the start the mode is about ``sigmoid(init_alpha - init_beta)`` at every step, or
    that of a fixed schedule.

    Args:
        channels: Of the feature maps, those of the first and the last features together.
        embedding_dim: Width of the time's embedding.
        width: Channels inside.
        init_alpha: Bias of a at the start; by default 2.5, with `init_steps` 0.
        init_beta: Bias of b at the start; by default 1, with `init_steps` 0.
        init_steps: Steps of the fixed schedule to start as; 0 for the paper's constant ratio.
        init_shift: Its shift, positive; 1 is uniform, see `reference_shapes`.
    """

    def __init__(
        self,
        channels: int,
        embedding_dim: int,
        width: int = 128,
        init_alpha: float | None = None,
        init_beta: float | None = None,
        init_steps: int = 0,
        init_shift: float = 1.0,
    ) -> None:
        super().__init__()
        if init_steps < 0 or init_shift <= 0:
            raise ValueError(
                "`init_steps` must be at least 0 and `init_shift` positive, got "
                f"{init_steps} and {init_shift}."
            )
        self.channels, self.embedding_dim, self.width = channels, embedding_dim, width
        self.init_steps, self.init_shift = init_steps, init_shift
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        self.norm = nn.GroupNorm(1, width, eps=1e-6)
        self.modulation = nn.Linear(embedding_dim, 2 * width)
        self.conv_out = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.hidden = nn.Linear(width, width)
        self.out = nn.Linear(width, 2)
        layer: Any
        for layer in (self.conv_in, self.modulation, self.conv_out, self.hidden, self.out):
            nn.init.normal_(layer.weight, std=_INIT_STD)
            if layer is not self.modulation:  # its bias stays as torch draws it
                nn.init.zeros_(layer.bias)
        defaults = (0.0, 0.0) if init_steps else _INIT_BIASES
        chosen = zip((init_alpha, init_beta), defaults, strict=True)
        with torch.no_grad():
            self.out.bias.copy_(torch.tensor([b if a is None else a for a, b in chosen]))

    @classmethod
    def for_policy(cls, policy: DiffusionPolicy, width: int = 128, **options: Any) -> TimePredictor:
        """Return a head for the features of a policy's denoiser; arguments as for the class.

        Raises:
            ValueError: If the policy's family names no features.
        """
        taps = taps_of(policy)
        return cls(2 * taps.channels, taps.embedding_dim, width, **options)

    def forward(self, maps: Tensor, embedding: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and beta, each [B] float32 and above 1.

        Args:
            maps: [B, channels, H, W].
            embedding: [B, embedding_dim].
            levels: Noise levels [B] in (0, 1]; they count with `init_steps` only.
        """
        with torch.autocast(maps.device.type, enabled=False):
            modulation = self.modulation(F.silu(embedding.float()))[..., None, None]
            shift, scale = modulation.chunk(2, dim=1)
            hidden = self.norm(self.conv_in(maps.float())) * (1 + scale) + shift
            hidden = self.conv_out(F.silu(hidden))
            hidden = F.adaptive_max_pool2d(F.adaptive_avg_pool2d(hidden, _POOLED), 1).flatten(1)
            a, b = self.out(F.silu(self.hidden(hidden))).unbind(dim=1)
        if not self.init_steps:
            return 1 + a.exp(), 1 + b.exp()
        alpha, beta = reference_shapes(levels, self.init_steps, self.init_shift)
        return 1 + (alpha - 1) * a.exp(), 1 + (beta - 1) * b.exp()

    def check_fits(self, policy: DiffusionPolicy) -> None:
        """Check that the head reads the features of a policy's denoiser.

        Raises:
            ValueError: If they have other widths.
        """
        taps = taps_of(policy)
        own, found = (self.channels, self.embedding_dim), (2 * taps.channels, taps.embedding_dim)
        if own != found:
            raise ValueError(
                f"The time predictor reads {own[0]} channels and an embedding of width {own[1]}, "
                f"but {policy.pretrained!r} has {found[0]} and {found[1]}; use the schedule with "
                "the model that it was learned on, or one fine-tuned from it."
            )


def reference_shapes(
    levels: Tensor, steps: int = 28, shift: float = math.e
) -> tuple[Tensor, Tensor]:
    """Return alpha and beta of a shifted uniform schedule at noise levels.

    A Beta of concentration 20 whose mode takes the step of the schedule from there, with shift s:
    ``u = t / (s + (1 - s) t)``, ``u' = max(u - 1 / steps, 1e-3)``,
    ``t' = s u' / (1 + (s - 1) u')``, mode ``t' / t`` (arXiv:2412.01243, official code).

    Args:
        levels: In (0, 1], of any shape.
        steps: Of the schedule, positive.
        shift: s, positive; 1 is the uniform schedule, above 1 it stays longer at much noise.
    """
    even = levels / (shift + (1 - shift) * levels)
    following = (even - 1 / steps).clamp(min=1e-3)
    shifted = shift * following / (1 + (shift - 1) * following)
    mode = (shifted / levels).clamp(MIN_RATIO, 1 - MIN_RATIO)
    return beta_around(mode, _REFERENCE_CONCENTRATION)

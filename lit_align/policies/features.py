"""What a denoiser knows of a sample: its first and last features, taken by forward hooks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lit_align.policies.base import Conditioning, DiffusionPolicy


@dataclass(frozen=True)
class FeatureTaps:
    """Names of a denoiser's modules whose outputs are its features.

    Attributes:
        first: What enters the first block: maps [B, C, H, W], or tokens [B, H W, C] in raster
            order.
        last: What leaves the last block, in the same layout.
        embedding: That of the time, and of the pooled text where there is one, [B, E].
        channels: C.
        embedding_dim: E.
    """

    first: str
    last: str
    embedding: str
    channels: int
    embedding_dim: int


@dataclass(frozen=True)
class Features:
    """Features of one network call.

    Attributes:
        maps: [B, 2 C, H, W] float32, the first features and the last.
        embedding: [B, E] float32.
    """

    maps: Tensor
    embedding: Tensor


class Tapped(Protocol):
    """A policy of a family that names its taps."""

    def feature_taps(self) -> FeatureTaps:
        """Return where the features of its denoiser come out."""


def taps_of(policy: DiffusionPolicy) -> FeatureTaps:
    """Return where the features of a policy's denoiser come out.

    Raises:
        ValueError: If its family names no taps.
    """
    if not hasattr(policy, "feature_taps"):
        raise ValueError(
            f"{type(policy).__name__} names no features: give it a method `feature_taps` that "
            "returns the `FeatureTaps` of its denoiser."
        )
    return cast(Tapped, policy).feature_taps()


def predict_with_features(
    policy: DiffusionPolicy,
    latents: Tensor,
    timesteps: Tensor,
    conditioning: Conditioning,
    guidance_scale: float,
) -> tuple[Tensor, Features]:
    """Return what `DiffusionPolicy.predict` does and the features of its one network call.

    Where guidance has an unconditional branch, features are ``u + w (c - u)`` as the output is.
    """
    taps = taps_of(policy)
    with _recorded(policy.denoiser, (taps.first, taps.last, taps.embedding)) as found:
        output = policy.predict(latents, timesteps, conditioning, guidance_scale)
    first, last, embedding = (_guided(value, len(latents), guidance_scale) for value in found)
    sides = [side // policy.patch_size for side in latents.shape[2:]]
    maps = [x.mT.unflatten(2, sides) if x.ndim == 3 else x for x in (first, last)]
    # In one memory format, so that stored features give bit by bit what these do.
    return output, Features(torch.cat(maps, dim=1).contiguous(), embedding)


@contextmanager
def _recorded(network: Any, names: tuple[str, ...]) -> Iterator[list[Tensor]]:
    """Fill a list with what the named modules return, in the order of the names."""
    outputs: list[Tensor] = [torch.empty(0)] * len(names)

    def keep(place: int) -> Any:
        def hook(module: Any, inputs: Any, output: Tensor) -> None:
            outputs[place] = output

        return hook

    handles = [
        network.get_submodule(name).register_forward_hook(keep(place))
        for place, name in enumerate(names)
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _guided(values: Tensor, batch: int, guidance_scale: float) -> Tensor:
    values = values.float()
    if len(values) == batch:
        return values
    unconditional, conditional = values.chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)

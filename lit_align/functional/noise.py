"""Noise that belongs to a sample, not to a process.

Every random number of a run is drawn from a generator keyed by what it is for, so that the same
sample gets the same noise on one process or on eight, and a resumed run the same as an
uninterrupted one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def keyed_generator(*key: int | str) -> torch.Generator:
    """Return a CPU generator seeded by a hash of `key`, e.g. ("rollout", seed, round, position)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest) >> 1)


def sample_generators(
    purpose: str, seed: int, round_index: int, positions: Iterable[int]
) -> list[torch.Generator]:
    """Return one generator per sample, keyed by (purpose, seed, round, position in the round)."""
    return [keyed_generator(purpose, seed, round_index, position) for position in positions]


def sample_keys(
    purpose: str, seed: int, round_index: int, positions: Iterable[int], count: int
) -> Tensor:
    """Return `count` seeds per sample [B, count] int64, keyed as in `sample_generators`."""
    generators = sample_generators(purpose, seed, round_index, positions)
    return torch.stack([torch.randint(2**62, (count,), generator=g) for g in generators])


def randn(
    shape: Sequence[int],
    generators: Sequence[torch.Generator],
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw standard normal noise [B, *shape], row i from `generators[i]`.

    It is drawn on the CPU in float32 and then moved, so that it does not depend on the device.
    """
    rows = [torch.randn(*shape, generator=g, dtype=torch.float32) for g in generators]
    return torch.stack(rows).to(device)

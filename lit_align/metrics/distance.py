"""Distances between two sets of images: FID, KID and CMMD on embeddings of any network.

The "real" set is the reference: photographs, or the base model's samples on the same prompts, for
which the distance is the drift from the base model. It survives `reset` unless told otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from lit_align.metrics.base import (
    Embedder,
    EmbeddingMetric,
    PreciseMetric,
    check_width,
    embed,
    normalized,
)

Kernel = Callable[[Tensor, Tensor], Tensor]

_CHUNK = 1024  # rows of a kernel matrix in memory at once
_SUBSETS = 100  # as in arXiv:1801.01401


class FrechetDistance(PreciseMetric, FrechetInceptionDistance):
    """Fréchet distance of Gaussians fitted to two sets of embeddings (arXiv:1706.08500, Eq. 6).

    |mu_r - mu_f|^2 + Tr(S_r + S_f - 2 (S_r S_f)^1/2). Biased upwards with few samples: compare at
    equal numbers, of more than `num_features`.

    Args:
        num_features: Width D of the embeddings.
        embedder: Images [B, 3, H, W] to embeddings [B, D]; None if embeddings are given.
        reset_real_features: Whether `reset` forgets the real set too.
        kwargs: See `torchmetrics.Metric`.
    """

    def __init__(
        self,
        num_features: int,
        embedder: Embedder | None = None,
        reset_real_features: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(_Given(num_features), reset_real_features=reset_real_features, **kwargs)
        self.num_features = num_features
        self._embedder = (embedder,)  # in a tuple, as an attribute would become a submodule
        self.orig_dtype = torch.float64  # torchmetrics sets it in `update` only

    def update(self, imgs: Tensor, real: bool) -> None:
        """Add images.

        Args:
            imgs: [B, 3, H, W], or embeddings [B, D] if there is no embedder.
            real: Whether they belong to the reference.

        Raises:
            ValueError: If the embeddings are not [B, D].
        """
        embeddings = embed(self._embedder[0], imgs)
        check_width(embeddings, self.num_features)
        super().update(embeddings.to(self.real_features_sum.device, torch.float64), real)


class _Given(nn.Module):
    """Stands for the feature network that torchmetrics would call: features are given."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


class _TwoSets(EmbeddingMetric):
    """Keeps the embeddings of a real and of a generated set."""

    higher_is_better = False

    def __init__(
        self,
        embedder: Embedder | None = None,
        num_features: int = 0,
        reset_real_features: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(embedder, num_features, **kwargs)
        self.reset_real_features = reset_real_features
        self.add_samples("real_features", torch.float32)
        self.add_samples("fake_features", torch.float32)

    def update(self, images: Tensor, real: bool) -> None:
        """Add images.

        Args:
            images: [B, 3, H, W], or embeddings [B, D] if there is no embedder.
            real: Whether they belong to the reference.

        Raises:
            ValueError: If the embeddings are no matrix, or of another width than before.
        """
        self.append_embeddings("real_features" if real else "fake_features", images)

    def reset(self) -> None:
        """Forget the generated images, and the real ones if `reset_real_features`."""
        kept, width = self.samples("real_features"), self.width
        super().reset()
        if not self.reset_real_features and len(kept):
            self.width = width
            self.append_samples("real_features", kept)


class KernelDistance(_TwoSets):
    """Kernel distance (KID, arXiv:1801.01401) of two sets of embeddings.

    The unbiased estimate of MMD^2 with the kernel (x'y / D + 1)^3; it can be negative. It is
    deterministic: by default over all samples at once; with `subset_size`, the mean over 100 random
    subsets, drawn by a generator of its own.

    Args:
        num_features: Width D of the embeddings.
        embedder: Images [B, 3, H, W] to embeddings [B, D]; None if embeddings are given.
        subset_size: Samples in a subset, at least 2; None for all.
        reset_real_features: Whether `reset` forgets the real set too.
        kwargs: See `torchmetrics.Metric`.
    """

    def __init__(
        self,
        num_features: int,
        embedder: Embedder | None = None,
        subset_size: int | None = None,
        reset_real_features: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(embedder, num_features, reset_real_features, **kwargs)
        if subset_size is not None and subset_size < 2:
            raise ValueError(f"`subset_size` must be at least 2, got {subset_size}.")
        self.subset_size = subset_size

    def compute(self) -> Tensor:
        """Return the distance, a float64 scalar.

        Raises:
            ValueError: If a set has fewer than 2 samples, or fewer than `subset_size`.
        """
        real, fake = self.embeddings("real_features"), self.embeddings("fake_features")
        smaller = min(len(real), len(fake))
        if smaller < (self.subset_size or 2):
            raise ValueError(
                f"Each set needs at least {self.subset_size or 2} samples, got {len(real)} real "
                f"and {len(fake)} generated ones."
            )
        if self.subset_size is None:
            return unbiased_mmd(real, fake, polynomial_kernel)
        generator = torch.Generator().manual_seed(0)
        values = []
        for _ in range(_SUBSETS):
            x, y = (
                features[torch.randperm(len(features), generator=generator)[: self.subset_size]]
                for features in (real, fake)
            )
            values.append(unbiased_mmd(x, y, polynomial_kernel))
        return torch.stack(values).mean()


class CMMD(_TwoSets):
    """CLIP maximum mean discrepancy (arXiv:2401.09603) of two sets of embeddings.

    The biased estimate of MMD^2 between L2-normalised embeddings, CLIP's in the paper, with a
    Gaussian kernel, times `scale`. With the defaults it is about 10 |mu_r - mu_f|^2.

    Args:
        embedder: Images [B, 3, H, W] to embeddings [B, D]; None if embeddings are given.
        sigma: Width of the kernel exp(-|x - y|^2 / (2 sigma^2)).
        scale: Factor for readability.
        reset_real_features: Whether `reset` forgets the real set too.
        kwargs: See `torchmetrics.Metric`.
    """

    def __init__(
        self,
        embedder: Embedder | None = None,
        sigma: float = 10.0,
        scale: float = 1000.0,
        reset_real_features: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(embedder, reset_real_features=reset_real_features, **kwargs)
        if sigma <= 0:
            raise ValueError(f"`sigma` must be positive, got {sigma}.")
        self.sigma, self.scale = sigma, scale

    def compute(self) -> Tensor:
        """Return the discrepancy, a float64 scalar >= 0.

        Raises:
            ValueError: If a set is empty.
        """
        real, fake = self.embeddings("real_features"), self.embeddings("fake_features")
        if not (len(real) and len(fake)):
            raise ValueError(f"A set is empty: {len(real)} real, {len(fake)} generated samples.")

        def kernel(x: Tensor, y: Tensor) -> Tensor:
            squares = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
            return torch.exp(-squares / (2 * self.sigma**2))

        return self.scale * biased_mmd(normalized(real), normalized(fake), kernel)


def polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    """Return (x'y / D + 1)^3 [N, M] of rows x [N, D] and y [M, D]."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def biased_mmd(x: Tensor, y: Tensor, kernel: Kernel) -> Tensor:
    """Return MMD^2 of rows x [N, D] and y [M, D] with all pairs, a scalar >= 0."""
    within = _kernel_sum(x, x, kernel) / len(x) ** 2 + _kernel_sum(y, y, kernel) / len(y) ** 2
    return within - 2 * _kernel_sum(x, y, kernel) / (len(x) * len(y))


def unbiased_mmd(x: Tensor, y: Tensor, kernel: Kernel) -> Tensor:
    """Return MMD^2 of rows x [N, D] and y [M, D] without a row's pair with itself, a scalar.

    N and M are at least 2 and may differ (Gretton et al., JMLR 2012, Eq. 3).
    """
    within = x.new_zeros(())
    for rows in (x, y):
        n = len(rows)
        itself = torch.cat([kernel(part, part).diagonal() for part in rows.split(_CHUNK)]).sum()
        within = within + (_kernel_sum(rows, rows, kernel) - itself) / (n * (n - 1))
    return within - 2 * _kernel_sum(x, y, kernel) / (len(x) * len(y))


def _kernel_sum(x: Tensor, y: Tensor, kernel: Kernel) -> Tensor:
    return torch.stack([kernel(part, y).sum() for part in x.split(_CHUNK)]).sum()

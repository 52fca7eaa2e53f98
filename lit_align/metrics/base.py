"""What the metrics share: states that keep their precision, and samples gathered over processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

Embedder = Callable[[Tensor], Tensor]


class PreciseMetric(Metric):
    """A metric whose states keep their dtype when the module that holds it is cast.

    `Module.to(torch.bfloat16)`, which Lightning's `bf16-true` calls, would turn float64 sums into
    bfloat16 ones.
    """

    full_state_update = False

    def _apply(
        self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ""
    ) -> nn.Module:
        """Move the states to the device that `fn` moves to, and do nothing else to them."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(fn(tensor.new_empty(0)).device)

        return super()._apply(move, exclude_state)


class SampleMetric(PreciseMetric):
    """A metric that keeps something of every sample, gathered over processes by `compute`.

    Processes may hold different numbers of samples, or none. Everything is kept flat, as a process
    without samples cannot know the shape of a row, and with another number of dimensions or
    another dtype than the others' it would leave them waiting.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._sample_dtypes: dict[str, torch.dtype] = {}

    def add_samples(self, name: str, dtype: torch.dtype) -> None:
        """Declare a state of samples."""
        self.add_state(name, [], dist_reduce_fx="cat")
        self._sample_dtypes[name] = dtype

    def append_samples(self, name: str, values: Tensor) -> None:
        """Add values of any shape to a state, without gradient, on the metric's device."""
        dtype = self._sample_dtypes[name]
        getattr(self, name).append(values.detach().to(self.device, dtype).flatten())

    def samples(self, name: str) -> Tensor:
        """Return a state [number of values]."""
        values = getattr(self, name)
        if isinstance(values, Tensor):  # gathered
            return values
        return torch.cat([self._no_sample(name), *values])

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the states of all processes (see `torchmetrics.Metric.sync`)."""
        for name in self._sample_dtypes:
            if isinstance(getattr(self, name), list) and not getattr(self, name):
                setattr(self, name, [self._no_sample(name)])
        super().sync(*args, **kwargs)

    def _no_sample(self, name: str) -> Tensor:
        return torch.zeros(0, dtype=self._sample_dtypes[name], device=self.device)


class EmbeddingMetric(SampleMetric):
    """A metric on embeddings of images.

    Args:
        embedder: Maps images [B, 3, H, W] to embeddings [B, D]; None if embeddings are given. It
            is no part of the metric: its parameters are not in the state dict, and it is neither
            moved nor cast with the metric.
        num_features: Width D of the embeddings; 0 if that of the first ones decides.
        kwargs: See `torchmetrics.Metric`.
    """

    width: Tensor

    def __init__(
        self, embedder: Embedder | None = None, num_features: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self._embedder = (embedder,)  # in a tuple, as an attribute would become a submodule
        self.add_state("width", torch.tensor(num_features), dist_reduce_fx="max")

    def append_embeddings(self, name: str, images: Tensor) -> None:
        """Add the embeddings of images to a state, in float32.

        Raises:
            ValueError: If they are no matrix, or their width is not that of the earlier ones.
        """
        embeddings = embed(self._embedder[0], images)
        check_width(embeddings, int(self.width) or embeddings.shape[1])
        self.width = torch.full_like(self.width, embeddings.shape[1])
        self.append_samples(name, embeddings)

    def embeddings(self, name: str) -> Tensor:
        """Return the embeddings [N, D] of a state in float64."""
        flat = self.samples(name).double()
        return flat.reshape(-1, int(self.width)) if len(flat) else flat.reshape(0, 0)


def embed(embedder: Embedder | None, images: Tensor) -> Tensor:
    """Return embeddings [B, D] of images [B, 3, H, W], or what was given if there is no embedder.

    Raises:
        ValueError: If the result is no matrix.
    """
    embeddings = images if embedder is None else embedder(images)
    if embeddings.ndim != 2:
        hint = "; pass an `embedder` to give images" if embedder is None else ""
        raise ValueError(f"Embeddings must be [B, D], got {list(embeddings.shape)}{hint}.")
    return embeddings


def check_width(embeddings: Tensor, num_features: int) -> None:
    """Raise a ValueError unless the embeddings are [B, num_features]."""
    if embeddings.shape[1] != num_features:
        raise ValueError(
            f"Embeddings must be {num_features} wide, as the metric was told or as the first ones "
            f"were, got {list(embeddings.shape)}."
        )


def normalized(embeddings: Tensor) -> Tensor:
    """Return embeddings [N, D] divided by their Euclidean norms; zero rows stay zero."""
    return nn.functional.normalize(embeddings, dim=1, eps=1e-30)

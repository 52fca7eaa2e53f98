"""What released reward networks share: frozen weights, precision, names, cached text, strict files.

Scores of neighbouring models differ in the third digit, where bfloat16 has steps of 0.002 at a
cosine of 0.27 and of 0.125 at a logit of 21. So a network may run in half precision, but what comes
after its features (normalise, dot product, scale, head) stays float32.
"""

from __future__ import annotations

import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from lit_align.hub import CheckpointError
from lit_align.rewards.base import Metadata, RewardModule

Dtype = Literal["float32", "bfloat16", "float16"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOLD = 3

Network = TypeVar("Network", bound=nn.Module)


class PretrainedReward(RewardModule, ABC):
    """A released reward network, frozen; a subclass implements `score`.

    How many images it sees at once is its caller's business. A score that is not finite is NaN.

    Args:
        dtype: Of the frozen network: "float32", "bfloat16" or "float16"; see the module.
        version: One of `versions`; the first by default.
        scale: One of `scales`; the first by default.

    Attributes:
        versions: The released ones, the default first; empty if there is only one.
        scales: What the raw score may be turned into, the default first; empty if nothing.
        version: The one in use, None if there is only one.
        scale: The one in use, None if there is only one.

    Raises:
        ValueError: If an argument is none of these words.
    """

    differentiable = True
    versions: ClassVar[tuple[str, ...]] = ()
    scales: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, dtype: Dtype = "float32", version: str | None = None, scale: str | None = None
    ) -> None:
        super().__init__()
        self.dtype = _DTYPES[_one_of("dtype", dtype, _DTYPES)]
        self.version = _chosen("version", version, self.versions)
        self.scale = _chosen("scale", scale, self.scales)

    @property
    def name(self) -> str:
        """The name in logs: the class, its version, and its scale if it is not the default."""
        scale = None if self.scale in self.scales[:1] else self.scale
        return "-".join(part for part in (type(self).__name__, self.version, scale) if part)

    @abstractmethod
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return scores [B] float32 of images [B, 3, H, W] float32 and prompts; see `forward`."""

    def forward(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Metadata | None = None,
        group_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the scores [B]; see the base class."""
        with torch.autocast(images.device.type, enabled=False):
            scores = self.score(images.float(), prompts).float()
        return scores.where(scores.isfinite(), torch.nan)

    def frozen(self, network: Network) -> Network:
        """Return `network` in evaluation mode, without gradients for it, in the reward's dtype."""
        return network.requires_grad_(False).eval().to(self.dtype)


class DualEncoderReward(PretrainedReward, ABC):
    """A released reward that is a function of the cosine of an image's and a prompt's embedding.

    Args:
        dtype, version, scale: See `PretrainedReward`.
    """

    needs_prompt = True

    def __init__(
        self, dtype: Dtype = "float32", version: str | None = None, scale: str | None = None
    ) -> None:
        super().__init__(dtype, version, scale)
        self.texts = PromptCache()

    @abstractmethod
    def embed_images(self, images: Tensor) -> Tensor:
        """Return unit embeddings [B, d] float32 of images [B, 3, H, W] in [0, 1]."""

    @abstractmethod
    def embed_text(self, prompts: Sequence[str]) -> Tensor:
        """Return unit embeddings [B, d] float32, on the network's device."""

    def cosine(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the cosines [B] of images [B, 3, H, W] in [0, 1] and their prompts."""
        text = self.texts(prompts, self.embed_text, images.device)
        return (self.embed_images(images) * text).sum(dim=-1)


class PromptCache:
    """Text features of the prompts that were used last, so that each is encoded once.

    They are kept without a graph, and also what was made in inference mode may take part in one.

    Args:
        size: How many prompts are kept; 1024 float32 numbers each are 4 kB.

    Raises:
        ValueError: If `size` is below 1.
    """

    def __init__(self, size: int = 4096) -> None:
        if size < 1:
            raise ValueError(f"`size` must be at least 1, got {size}.")
        self.size = size
        self._kept: dict[str, Tensor] = {}  # the least recently used first

    def __len__(self) -> int:
        """Return how many prompts are at hand."""
        return len(self._kept)

    def __call__(
        self,
        prompts: Sequence[str],
        encode: Callable[[list[str]], Tensor],
        device: torch.device | str,
    ) -> Tensor:
        """Return features [B, ...] of B prompts, on `device`.

        Args:
            prompts: Equal ones share their features.
            encode: Returns features [N, ...] of N prompts, row by row; called at most once, with
                those that are not at hand.
            device: Features from elsewhere are moved there.
        """
        # Taken out and put back, so that what is in use comes last. One operation each: rewards
        # may be called from several threads, which at worst encode a prompt twice.
        popped = {prompt: self._kept.pop(prompt, None) for prompt in dict.fromkeys(prompts)}
        found = {prompt: row for prompt, row in popped.items() if row is not None}
        with torch.inference_mode(False), torch.no_grad():
            if missing := [prompt for prompt in popped if prompt not in found]:
                # Each row in memory of its own: a dropped prompt must not wait for its batch.
                rows = (row.clone() for row in encode(missing))
                found.update(zip(missing, rows, strict=True))
            found = {prompt: row.to(device) for prompt, row in found.items()}
        self._kept.update((prompt, found[prompt]) for prompt in popped)
        for prompt in list(self._kept)[: -self.size]:
            self._kept.pop(prompt, None)
        return torch.stack([found[prompt] for prompt in prompts])


def read_weights(path: Path) -> Any:
    """Return what a weights file of torch holds, tensors and plain values only, on the CPU.

    Raises:
        CheckpointError: If it is damaged, or holds code that would have to be run.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{str(path)!r} is damaged or no file of weights ({type(error).__name__}: "
            f"{str(error)[:120]}); fetch it again."
        ) from error


def load_strictly(
    network: nn.Module, weights: Any, source: str, extras: Collection[str] = ()
) -> None:
    """Load all weights of `network`.

    Args:
        network: Gets the weights, in place.
        weights: A tensor by name.
        source: What they came from, for messages.
        extras: Names that may be there and are left out; every other one is refused.

    Raises:
        CheckpointError: If a weight is missing, unknown, or of another shape.
    """
    if not isinstance(weights, dict) or not all(isinstance(w, Tensor) for w in weights.values()):
        raise CheckpointError(f"{source} holds no tensors by name, but {type(weights).__name__}.")
    needed = network.state_dict()
    faults = {
        "missing": sorted(needed.keys() - weights.keys()),
        "unknown": sorted(weights.keys() - needed.keys() - set(extras)),
        "of another shape": sorted(
            name for name in needed.keys() & weights.keys()
            if needed[name].shape != weights[name].shape
        ),
    }  # fmt: skip
    if any(faults.values()):
        told = (
            f"{len(names)} {kind} ({', '.join(names[:_TOLD])}{', ...' * (len(names) > _TOLD)})"
            for kind, names in faults.items()
            if names
        )
        raise CheckpointError(
            f"{source} does not hold the weights of this network: {'; '.join(told)}."
        )
    network.load_state_dict({name: weights[name] for name in needed})


def _chosen(argument: str, value: str | None, known: tuple[str, ...]) -> str | None:
    """Return `value`, the first of the known ones if None."""
    if value is None:
        return known[0] if known else None
    return _one_of(argument, value, known)


def _one_of(argument: str, value: str, known: Collection[str]) -> str:
    if value not in known:
        names = ", ".join(known) or "none"
        raise ValueError(f"`{argument}` must be one of {names}, got {value!r}.")
    return value

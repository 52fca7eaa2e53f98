"""What rewards behind an HTTP server share: images out in several requests, scores back."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from lit_align.rewards.base import Metadata, RewardModule, uint8_images
from lit_align.rewards.http_client import JSONClient, in_parallel, now
from lit_align.rewards.wire import ImageFormat, Item, encode_image

Answer = tuple[list[float], list[str]]


class ServedReward(RewardModule):
    """A reward whose scores are asked of a server; see the subclasses.

    Args:
        client: Speaks with the server.
        deadline: Seconds for one call with all its requests.
        batch_size: Images per request.
        concurrency: Requests at the same time.
        image_format: "png" or "jpeg".

    Attributes:
        counts: "requests" that were sent, "retries", and "unscored" images, so far.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        client: JSONClient,
        deadline: float,
        batch_size: int,
        concurrency: int,
        image_format: ImageFormat,
    ) -> None:
        super().__init__()
        if not deadline > 0:
            raise ValueError(f"`deadline` must be above 0 seconds, got {deadline}.")
        if batch_size < 1 or concurrency < 1:
            raise ValueError(
                "`batch_size` and `concurrency` must be 1 or more, got "
                f"{batch_size} and {concurrency}."
            )
        if image_format not in get_args(ImageFormat):
            raise ValueError(f"`image_format` must be 'png' or 'jpeg', got {image_format!r}.")
        self.client, self.deadline = client, deadline
        self.batch_size, self.concurrency = batch_size, concurrency
        self.image_format: ImageFormat = image_format
        self.eval()

    @property
    def counts(self) -> Counter[str]:
        """What was sent and what came of it; see the class."""
        return self.client.counts

    def forward(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Metadata | None = None,
        group_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the server's scores [B]; see the base class.

        An image that is not finite is not sent and gets NaN.

        Raises:
            ValueError: If the images' shape is another, or there are not as many prompts.
            ServerUnavailableError: If no usable answer came, with all retries or in time.
            ServerRefusalError: If the server refused (a wrong token, too large a request).
            ProtocolError: If it answers what its protocol does not allow.
        """
        self._check(images, prompts)
        ends = now() + self.deadline
        known = list(metadata) if metadata is not None else [None] * len(images)
        finite = images.detach().isfinite().flatten(1).all(dim=1).nonzero().flatten()
        pixels = uint8_images(self.prepared(images[finite])) if len(finite) else images[:0]

        at: list[int] = finite.tolist()

        def ask(part: range) -> Answer:
            items = [
                Item(
                    str(k),
                    prompts[at[k]],
                    self.image_format,
                    encode_image(pixels[k], self.image_format),
                    known[at[k]] or {},
                )
                for k in part
            ]
            return self.ask(items, ends)

        step = self.batch_size
        parts = [range(k, min(k + step, len(at))) for k in range(0, len(at), step)]
        if parts:
            self.connect(ends)
        answers = in_parallel(ask, parts, self.concurrency, self.deadline)
        scores = torch.full((len(images),), torch.nan)
        scores[finite.cpu()] = torch.tensor([s for found, _ in answers for s in found])
        self._tell(scores, [error for _, errors in answers for error in errors])
        return scores.to(images.device)

    def _check(self, images: Tensor, prompts: Sequence[str]) -> None:
        if images.ndim != 4 or images.shape[1] != 3 or len(prompts) != len(images):
            raise ValueError(
                f"{self.name} takes images [B, 3, H, W] and B prompts, got {list(images.shape)} "
                f"and {len(prompts)} prompts."
            )

    def _tell(self, scores: Tensor, errors: list[str]) -> None:
        if unscored := int(scores.isnan().sum()):
            self.client.count("unscored", unscored)
            first = errors[0] if errors else "its pixels are not finite"
            warnings.warn(
                f"{self.name} could not score {unscored} of {len(scores)} image(s), one because: "
                f"{first}",
                stacklevel=3,
            )

    def connect(self, ends: float) -> None:
        """See, before the first image is sent, that the server is the right one."""

    def prepared(self, images: Tensor) -> Tensor:
        """Return the images [B, 3, H, W] as they are sent."""
        return images

    @abstractmethod
    def ask(self, items: list[Item], ends: float) -> Answer:
        """Return the scores of one request's items, and what was said of those without one.

        Args:
            items: Up to `batch_size`.
            ends: Deadline, on the clock of `now`.
        """

"""Text embeddings made once for each prompt, by encoders that need not stay on the device."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Encode = Callable[[Sequence[str], bool], dict[str, Tensor]]
_Rows = dict[str, Tensor]  # of one prompt, each [...]


class TextCache:
    """The embeddings of the prompts used last, and where the encoders are meanwhile.

    With a cache each prompt is encoded alone: its embeddings depend neither on the batch that it
    came in nor on what was kept before, so a run resumed with an empty cache goes on as it was.

    Args:
        size: Number of prompts whose embeddings are kept on the CPU; the one unused for longest
            leaves first. 0 keeps none and encodes batches as they come.
        offload: Keep the encoders on the CPU, and on the device only while they encode.

    Raises:
        ValueError: If the size is negative.
    """

    def __init__(self, size: int, offload: bool) -> None:
        if size < 0:
            raise ValueError(
                f"`cache_text` must not be negative, got {size}; 0 keeps no embeddings."
            )
        self.size, self.offload = size, offload
        self._kept: dict[Hashable, _Rows] = {}  # by prompt and arithmetic, the last used last
        self._negative: dict[Hashable, _Rows] = {}  # by arithmetic

    def encode(
        self, encode: Encode, encoders: nn.Module, prompts: Sequence[str], device: torch.device
    ) -> dict[str, Tensor]:
        """Return what `encode(prompts, True)` does, each [B, ...] on the device.

        Args:
            encode: Takes prompts, and whether embeddings of the empty prompt are wanted too, under
                names starting with "negative_".
            encoders: The frozen networks that it uses.
            prompts: B texts.
            device: Where they are encoded.

        Raises:
            ValueError: If the encoders are trained, so that what is kept would be outdated.
        """
        if not (self.size or self.offload):
            return encode(prompts, True)
        if any(parameter.requires_grad for parameter in encoders.parameters()):
            raise ValueError(
                "`cache_text` and `offload_text_encoders` are for frozen text encoders, and these "
                "are trained; leave both options out."
            )
        if not self.size:
            with self._on_device(encoders, device):
                return encode(prompts, True)
        arithmetic = _arithmetic(encoders, device)
        distinct = list(dict.fromkeys(prompts))
        rows = self._rows(encode, encoders, distinct, arithmetic, device)
        places = torch.tensor([distinct.index(prompt) for prompt in prompts], device=device)
        positive = {
            name: torch.stack([row[name] for row in rows]).to(device)[places] for name in rows[0]
        }
        negative = {
            name: row.to(device).expand(len(prompts), *row.shape)
            for name, row in self._negative[arithmetic].items()
        }
        return positive | negative

    def _rows(
        self,
        encode: Encode,
        encoders: nn.Module,
        prompts: Sequence[str],
        arithmetic: Hashable,
        device: torch.device,
    ) -> list[_Rows]:
        """Return the embeddings of distinct prompts, which are then the last used."""
        missing = [prompt for prompt in prompts if (prompt, arithmetic) not in self._kept]
        if missing:
            # Not as tensors of an inference mode, of which training could not take gradients later.
            with self._on_device(encoders, device), torch.inference_mode(False), torch.no_grad():
                made = {text: self._encode_one(encode, text, arithmetic) for text in missing}
        rows = []
        for prompt in prompts:
            key = (prompt, arithmetic)
            rows.append(made[prompt] if prompt in missing else self._kept.pop(key))
            self._kept[key] = rows[-1]
        for unused in list(self._kept)[: -self.size]:
            del self._kept[unused]
        return rows

    def _encode_one(self, encode: Encode, prompt: str, arithmetic: Hashable) -> _Rows:
        encoded = encode([prompt], arithmetic not in self._negative)
        row = {name: value[0].cpu() for name, value in encoded.items()}
        negative = {name: value for name, value in row.items() if name.startswith("negative_")}
        self._negative.setdefault(arithmetic, negative)
        return {name: value for name, value in row.items() if name not in negative}

    @contextmanager
    def _on_device(self, encoders: nn.Module, device: torch.device) -> Iterator[None]:
        if not self.offload:
            yield
            return
        encoders.to(device)
        try:
            yield
        finally:
            encoders.to("cpu")


def _arithmetic(encoders: nn.Module, device: torch.device) -> Hashable:
    """Return what besides the prompt decides the bits of embeddings."""
    dtypes = frozenset(parameter.dtype for parameter in encoders.parameters())
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    return device.type, dtypes, autocast

"""Memory that operators take, counted as they run, on real tensors and on the meta device."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the `live` bytes of storages made since it is active, and their `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def forget_peak(self) -> None:
        """Start the peak from what is alive now."""
        self.peak = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator; what it is given and was not seen before is older than the count."""
        self._see((args, kwargs), counted=False)
        output = func(*args, **(kwargs or {}))
        self._see(output, counted=True)
        return output

    def _see(self, tensors: Any, counted: bool) -> None:
        for tensor in filter(torch.is_tensor, tree_leaves(tensors)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._seen:
                size = storage.nbytes() if counted else 0
                self._seen.add(storage._cdata)
                self.live += size
                weakref.finalize(storage, self._free, storage._cdata, size)
        self.peak = max(self.peak, self.live)

    def _free(self, address: int, size: int) -> None:
        self._seen.remove(address)
        self.live -= size

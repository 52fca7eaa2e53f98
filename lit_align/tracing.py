"""Memory and floating-point operations, counted as operators run, with or without real tensors.

`LiveBytes` counts bytes. `Trace` also counts operations and lets networks on the meta device, whose
tensors have shapes and no values, take part in a program that runs on the CPU: what enters such a
network leaves its values behind, and what comes out has made-up ones. So samplers, rewards and
losses run as they are, at the networks' full size and without their memory.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from lit_align.policies import sampling
from lit_align.policies.base import DiffusionPolicy

Fill = Callable[..., Tensor]  # of a shape and a dtype
_META = torch.device("meta")


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


class Trace(LiveBytes):
    """Counts bytes by phase and operations, of a program whose large networks are on meta.

    Attributes:
        peaks: The most bytes alive in each phase, of what was made since the trace is active.
        flops: Operations of matrix products, convolutions and attention in each phase, a
            multiplication and an addition being two.
        phase: Where the program is, see `during`.
        inside: Whether it is in a network on the meta device.

    Args:
        on_gpu: Whether to count what cuDNN needs while a convolution runs, see `_relaid`.
    """

    def __init__(self, on_gpu: bool = False) -> None:
        super().__init__()
        self.on_gpu = on_gpu
        self.peaks: defaultdict[str, int] = defaultdict(int)
        self.flops: defaultdict[str, int] = defaultdict(int)
        self.phase, self.inside = "", False
        self._uncounted = False
        self._known: dict[Any, tuple[int, int, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and count its operations; masks are taken to be without gaps."""
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device == _META:
            return True
        output = super().__torch_dispatch__(func, types, args, kwargs)
        packet = getattr(func, "_overloadpacket", func)
        if self.on_gpu and packet in _CONVOLUTIONS:
            during = self.live + _relaid(args, output)
            self.peaks[self.phase] = max(self.peaks[self.phase], during)
        if formula := flop_registry.get(packet) or _ATTENTION.get(packet):
            self.flops[self.phase] += formula(*args, **(kwargs or {}), out_val=output)
        return output

    def _see(self, tensors: Any, counted: bool) -> None:
        super()._see(tensors, counted and not self._uncounted)
        self.peaks[self.phase] = max(self.peaks[self.phase], self.live)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Count for a phase."""
        before, self.phase = self.phase, phase
        self.peaks[phase] = max(self.peaks[phase], self.live)
        try:
            yield
        finally:
            self.phase = before

    def crossing(
        self,
        function: Callable[..., Any],
        name: str,
        fill: Fill | None = None,
        stay: Collection[int] = (),
    ) -> Any:
        """Return what calls `function` on the meta device, and may be given real tensors.

        What was called before with the same shapes and without gradient is not called again, but
        counted.

        Args:
            function: Has its weights there.
            name: Of the function, to remember its calls by.
            fill: Makes the values of an output of a meta tensor; zeros by default.
            stay: Places in the tuple that it returns of what is to stay on the meta device.
        """

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return function(*args, **kwargs)
            given = tree_map(self._enter, (args, kwargs))

            def enter() -> Any:
                with self.on_meta():
                    return function(*given[0], **given[1])

            if torch.is_grad_enabled():
                found = enter()
            else:
                found = self._once((name, _shapes((args, kwargs))), enter)
            emerged = tree_map(lambda value: self._emerge(value, fill), found)
            if not stay:
                return emerged
            return tuple(found[i] if i in stay else value for i, value in enumerate(emerged))

        return call

    def repeating(self, function: Callable[..., Tensor], name: str, like: int) -> Any:
        """Return `function`, called once for every shape of its argument number `like`.

        Its results have no gradient; later calls are counted as the first one was.
        """

        def call(*args: Any) -> Tensor:
            key = (name, tuple(args[like].shape))
            found: Tensor = self._once(key, lambda: function(*args))
            return _zeros(found.shape, found.dtype) if found.device == _META else found

        return call

    def _once(self, key: Any, function: Callable[[], Any]) -> Any:
        """Call a function, or count what it took before and return tensors of the same shapes."""
        if key in self._known:
            excess, flops, shapes = self._known[key]
            self.peaks[self.phase] = max(self.peaks[self.phase], self.live + excess)
            self.flops[self.phase] += flops
            return tree_map(_shape_only, shapes)
        live, flops = self.live, self.flops[self.phase]
        peak, self.peaks[self.phase] = self.peaks[self.phase], live
        found = function()
        excess = self.peaks[self.phase] - live
        self.peaks[self.phase] = max(peak, self.peaks[self.phase])
        with self.uncounted():
            shapes = tree_map(_shape_only, found)
        self._known[key] = (excess, self.flops[self.phase] - flops, shapes)
        return found

    def _enter(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.device == _META:
            return value
        return _Cross.apply(value, self, None)

    def _emerge(self, value: Any, fill: Fill | None) -> Any:
        if not isinstance(value, Tensor) or value.device != _META:
            return value
        return _Cross.apply(value, self, fill or _zeros)

    @contextmanager
    def on_meta(self) -> Iterator[None]:
        """Let policies say that they are on the meta device."""
        before, self.inside = self.inside, True
        try:
            yield
        finally:
            self.inside = before

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Count nothing of what is made meanwhile."""
        self._uncounted = True
        try:
            yield
        finally:
            self._uncounted = False


class _Cross(torch.autograd.Function):
    """Takes a tensor from the CPU to the meta device or back; both count as one.

    The original lives as long as its copy, which is not counted. Its gradient crosses the other
    way, and so does that one's.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, trace: Trace, fill: Fill | None) -> Tensor:
        ctx.trace, ctx.back = trace, None if value.device == _META else _zeros
        with trace.uncounted():
            if value.device == _META:
                copy = (fill or _zeros)(value.shape, value.dtype)
            else:
                copy = torch.empty_like(value, device=_META)
        weakref.finalize(copy.untyped_storage(), _forget, value.detach())
        return copy

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _Cross.apply(gradients[0], ctx.trace, ctx.back), None, None


def _forget(original: Tensor) -> None:
    """Do nothing: what is waiting for this call keeps the original until then."""


def _zeros(shape: Any, dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def _shapes(values: Any) -> Any:
    def told(value: Any) -> Any:
        if isinstance(value, Tensor):
            return tuple(value.shape), value.dtype
        return value if isinstance(value, int | float | str | bool | None) else type(value).__name__

    return tuple(map(told, tree_leaves(values)))


def _shape_only(value: Any) -> Any:
    return torch.empty_like(value, device=_META) if isinstance(value, Tensor) else value


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward_flops(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> int:
    return int(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))


_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION: dict[Any, Callable[..., int]] = {
    _FUSED: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


_LOWERED = {
    torch.nn.functional.linear, torch.conv1d, torch.conv2d, torch.conv3d, torch.matmul, torch.mm,
    torch.bmm, torch.addmm, torch.baddbmm, Tensor.matmul, Tensor.__matmul__,
    torch.nn.functional.scaled_dot_product_attention,
}  # fmt: skip
_RAISED = {
    torch.nn.functional.layer_norm, torch.nn.functional.group_norm, torch.nn.functional.softmax,
    torch.softmax, Tensor.softmax, torch.exp, torch.pow, Tensor.pow, torch.sum, Tensor.sum,
    torch.nn.functional.mse_loss,
}  # fmt: skip


class GPUOperators(TorchFunctionMode):
    """Lets meta tensors take the operators that a GPU would: fused attention, and autocast.

    Args:
        dtype: Of products and convolutions while `lowered`; None without mixed precision.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.dtype, self.lowered = dtype, False
        self._copies: dict[tuple[int, bool], Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function."""
        kwargs = kwargs or {}
        on_meta = args and isinstance(args[0], Tensor) and args[0].device == _META
        if not on_meta:
            return func(*args, **kwargs)
        if func is Tensor.cpu:
            return args[0]  # what is kept in main memory has no values either
        if self.dtype is not None and self.lowered and func in _LOWERED:
            args, kwargs = tree_map(self._lower, (args, kwargs))
        elif self.dtype is not None and self.lowered and func in _RAISED:
            args, kwargs = tree_map(_raise, (args, kwargs))
        fused = torch.backends.cuda.flash_sdp_enabled()  # off where a second derivative is wanted
        if func is torch.nn.functional.scaled_dot_product_attention and fused:
            return _fused_attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _lower(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if value.is_leaf and value.requires_grad and value.dtype == torch.float32:
            # Autocast keeps its copies of weights that are trained until its context ends.
            key = (id(value), torch.is_grad_enabled())
            if key not in self._copies:
                self._copies[key] = value.to(self.dtype)
            return self._copies[key]
        return value.to(self.dtype)

    @contextmanager
    def autocast(self, *_: Any, enabled: bool = True, **__: Any) -> Iterator[None]:
        """Stand in for `torch.autocast`."""
        before, self.lowered = self.lowered, enabled and self.dtype is not None
        try:
            yield
        finally:
            self.lowered = before
            if not before:
                self._copies = {}

    def checkpoint(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Stand in for `torch.utils.checkpoint.checkpoint`: backward leaves modes behind."""
        lowered = self.lowered

        def call(*inner: Any, **more: Any) -> Any:
            active = self in _get_current_function_mode_stack()
            with nullcontext() if active else self, self.autocast(enabled=lowered):
                return function(*inner, **more)

        return _CHECKPOINT(call, *args, **options)


_CHECKPOINT: Any = sampling.checkpoint
_CONVOLUTIONS = (torch.ops.aten.convolution, torch.ops.aten.convolution_backward)


def _relaid(args: Any, output: Any) -> int:
    """Return the bytes of a convolution's images in and out.

    On the GPUs of today its kernels want channels last, and lay out copies of what comes otherwise
    while they run; not every one does, so that the peak of a VAE is told up to 13 % too high.
    """
    backward = isinstance(output, tuple)  # of a gradient and an image, the image's gradient first
    tensors = (args[0], args[1], output[0]) if backward else (args[0], output)
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _raise(value: Any) -> Any:
    lowered = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if lowered else value


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, **_: Any,
) -> Any:  # fmt: skip
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    return _FUSED(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


@contextmanager
def tracing(trace: Trace, operators: GPUOperators) -> Iterator[None]:
    """Run a program with `trace`; policies tell the device that their callers should use."""
    device = property(lambda _: _META if trace.inside else torch.device("cpu"))
    with ExitStack() as stack:
        stack.enter_context(patch.object(DiffusionPolicy, "device", device))
        stack.enter_context(patch("torch.autocast", operators.autocast))
        stack.enter_context(patch.object(sampling, "checkpoint", operators.checkpoint))
        stack.enter_context(patch("torch.utils.checkpoint.checkpoint", operators.checkpoint))
        stack.enter_context(operators)
        stack.enter_context(trace)
        yield

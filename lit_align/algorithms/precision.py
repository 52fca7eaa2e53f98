"""Keeping everything but the networks in float32 under 16-bit weights."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from lightning.pytorch.plugins.precision import HalfPrecision, Precision
from torch import nn
from torchmetrics import Metric


def keep_float32(plugin: Precision) -> None:
    """Let `bf16-true` and `16-true` cast weights only.

    Lightning's plugin would also cast minibatches (latents, log-probabilities, advantages) and
    running means, and make 16 bits the default of every tensor that a scheduler, a reward or its
    thread creates. The policies cast what enters their networks themselves.
    """
    if isinstance(plugin, HalfPrecision):
        options: Any = plugin
        options.convert_input = lambda data: data
        options.forward_context = nullcontext
        options.convert_module = partial(_convert_weights, plugin)


def _convert_weights(plugin: HalfPrecision, module: nn.Module) -> nn.Module:
    converted = type(plugin).convert_module(plugin, module)
    for part in converted.modules():
        if isinstance(part, Metric):
            part.set_dtype(torch.float32)
    return converted

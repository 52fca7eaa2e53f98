"""FSDP2 through Lightning's `ModelParallelStrategy`: what is sharded, and how it is stored.

The denoiser is sharded block by block, then as a whole, and so is every other part with trainable
tensors (critics, heads). Frozen parts (text encoders, VAE) stay whole on every process.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from lit_align.policies.base import DiffusionPolicy

# Children of diffusers' denoisers that are large and called as modules, in lists or alone.
_BLOCKS = (
    "transformer_blocks", "single_transformer_blocks", "blocks",
    "down_blocks", "mid_block", "up_blocks",
)  # fmt: skip

FSDP_MESSAGE = (
    "`strategy: fsdp` (FSDP1) cannot run several forwards per backward; use `strategy: ddp`, or "
    "FSDP2, Lightning's ModelParallelStrategy: add `--config configs/scale/fsdp2.yaml`."
)


def check_strategy(strategy: object) -> None:
    """Refuse FSDP1; raises ValueError with what to use instead."""
    if isinstance(strategy, FSDPStrategy):
        raise ValueError(FSDP_MESSAGE)


def shard(module: LightningModule, policy: DiffusionPolicy) -> None:
    """Shard what is trained, if the strategy is FSDP2; parts that are sharded already stay so.

    Raises:
        ValueError: If the strategy also splits tensors, or a trainable tensor cannot be sharded.
    """
    # `load_from_checkpoint` configures a module that has no trainer.
    strategy = module._trainer.strategy if module._trainer else None
    if not isinstance(strategy, ModelParallelStrategy):
        return
    mesh: Any = strategy.device_mesh
    if mesh["tensor_parallel"].size() > 1:
        raise ValueError(
            "Denoisers are sharded by data parallelism only: give ModelParallelStrategy "
            f"`data_parallel_size: {strategy.world_size}` and `tensor_parallel_size: 1`, see "
            "configs/scale/fsdp2.yaml."
        )
    options: dict[str, Any] = {
        "mesh": mesh["data_parallel"],
        # Also at the root: its weights would otherwise stay whole from a rollout until the next
        # backward, and a checkpoint or averaging in between would see two kinds of tensors.
        "reshard_after_forward": True,
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32),
    }
    for part in _parts(module, policy):
        if not isinstance(part, FSDPModule):
            _start_equal(part, strategy.root_device)
            # FSDP2 takes no scalars; frozen ones, as CLIP's logit_scale, may stay whole.
            scalars = {p for p in part.parameters() if p.ndim == 0 and not p.requires_grad}
            fully_shard(part, ignored_params=scalars, **options)
    check_sharded(module)


def _parts(module: LightningModule, policy: DiffusionPolicy) -> Iterator[nn.Module]:
    """Yield what is sharded, blocks before what holds them."""
    blocks = (getattr(policy.denoiser, name, None) for name in _BLOCKS)
    yield from chain.from_iterable(_callable_parts(block) for block in blocks)
    yield policy.denoiser
    others = {id(policy), id(policy.denoiser)}
    for child in chain(policy.children(), module.children()):
        if id(child) not in others and any(p.requires_grad for p in child.parameters()):
            yield from _callable_parts(child)


def _callable_parts(part: nn.Module | None) -> Iterator[nn.Module]:
    """Yield a module, or the members of a container, which has no `forward` to hook into."""
    if isinstance(part, nn.ModuleList | nn.ModuleDict):
        for member in part.children():
            yield from _callable_parts(member)
    elif part is not None:
        yield part


@torch.no_grad()
def _start_equal(part: nn.Module, device: torch.device) -> None:
    """Give all processes the trainable weights of the first, as DDP does and FSDP2 does not."""
    for parameter in part.parameters():
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            first = parameter.detach().to(device)
            distributed.broadcast(first, src=0)
            parameter.copy_(first)


def check_sharded(module: nn.Module) -> None:
    """Check that every trainable tensor is sharded: the gradient of another is not synchronised.

    Raises:
        ValueError: If one is not; the message names it.
    """
    unsharded = [
        name
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and not isinstance(parameter, DTensor)
    ]
    if unsharded:
        raise ValueError(
            f"FSDP2 left {len(unsharded)} trainable tensor(s) whole, first {unsharded[0]!r}: its "
            "gradient would differ between processes. Put it into an `nn.Module` that is a child "
            "of the LightningModule or of the policy and is called as a module."
        )


def anywhere(module: LightningModule, condition: bool) -> bool:
    """Return whether a condition holds here, or on any process of those that share a network.

    Every call of a sharded network is one on all processes: a loop over calls goes on as long as
    one of them needs it.
    """
    if not isinstance(module.trainer.strategy, ModelParallelStrategy):
        return condition
    everywhere: Any = module.all_gather(torch.tensor(condition, device=module.device))
    return bool(everywhere.any())


def whole(tensor: Tensor) -> Tensor:
    """Return the tensor itself, or the whole of a sharded one; called on every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def name_optimizer_states(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Key the optimisers' states by the tensors' names, which mean the same under any strategy.

    torch numbers the tensors of the optimiser, Lightning's FSDP2 those of the module, frozen ones
    included, so that a file written by one would be misread by the other.
    """
    names = {parameter: name for name, parameter in module.named_parameters()}
    sharded = isinstance(module.trainer.strategy, ModelParallelStrategy)
    states = checkpoint.get("optimizer_states", [])
    for number, state in enumerate(states):
        if not state:  # under FSDP2 only the first process holds the states
            continue
        optimizer = module.trainer.optimizers[number]
        groups = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
        numbered = list(names.values()) if sharded else list(chain.from_iterable(groups))
        states[number] = {
            **state,
            "state": {numbered[key]: value for key, value in state["state"].items()},
            "param_groups": [
                {**group, "params": own}
                for group, own in zip(state["param_groups"], groups, strict=True)
            ],
        }

"""What a run of a method costs: parameters, memory, calls and operations, without running it.

The module's networks lie on the meta device and take no memory. A small round runs on them: images
are sampled, decoded and scored, and learned from in a minibatch or two, while `Trace` counts the
bytes alive and the operations. Two sizes of that round are extended to the whole one along a
straight line, as what grows with its images (trajectories, text embeddings, pixels) grows linearly.
Beside them stand weights and the states of AdamW, which are known exactly.

Left out are what an allocator loses to fragments, the workspaces of kernels, CUDA's own context
(some 0.5 GB), and buffers of communication but DDP's buckets.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from lit_align.algorithms import AlignmentModule, PreferenceModule, RoundModule
from lit_align.architectures.stand_ins import is_blank
from lit_align.small_rounds import Runner, size_of, trained_tensors

_ADAM_BYTES = 8  # two float32 moments of each trained number


@dataclass(frozen=True)
class Setting:
    """What decides the costs beside the module.

    Attributes:
        precision: As of the trainer.
        accumulate_grad_batches: Minibatches per optimiser step.
        world_size: Processes.
        strategy: Whether they hold the whole model ("ddp") or shares of it ("fsdp2").
        averages: Averages of the trained weights that callbacks keep.
        batch_size: Of validation, and of judgements.
        judged: Images of a judgement.
        on_gpu: Whether convolutions take what they take there, see `Trace`.
    """

    precision: str = "32-true"
    accumulate_grad_batches: int = 1
    world_size: int = 1
    strategy: Literal["ddp", "fsdp2"] = "ddp"
    averages: int = 0
    batch_size: int = 8
    judged: int = 2
    on_gpu: bool = True


@dataclass
class Estimate:
    """What a run costs.

    Attributes:
        parameters: Their numbers by part.
        trainable: How many of them are trained.
        resident: Bytes that are there throughout, per process and by what they are.
        peaks: Bytes beside them at the peak of each phase, per process.
        images: Images sampled per round, over all processes.
        updates: Optimiser steps per round.
        counts: Denoiser calls, reward and gradient queries per round, over all processes.
        flops: Operations per round, over all processes, by phase. Methods that learn from
            judgements have no rounds; of them a round is one optimiser step.
        notes: What could not be counted.
    """

    parameters: dict[str, int] = field(default_factory=dict)
    trainable: int = 0
    resident: dict[str, int] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    images: int = 0
    updates: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    flops: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    @property
    def peak(self) -> int:
        """The most bytes at once, per process."""
        return sum(self.resident.values()) + max(self.peaks.values(), default=0)


def estimate(module: AlignmentModule, setting: Setting | None = None) -> Estimate:
    """Return what a run of the module costs.

    Args:
        module: Its large networks are on the meta device; none of them may be used afterwards.
        setting: Of the run.

    Raises:
        ValueError: If `fit` would refuse the options, or the method has no policy to align.
    """
    if not isinstance(module, RoundModule | PreferenceModule):
        raise ValueError(
            f"Costs are estimated of methods that align a policy; {type(module).__name__} does not."
        )
    setting, found = setting or Setting(), Estimate()
    runner = Runner(module, setting, found)
    with runner.ready():
        _count_parameters(module, found)
        _count_resident(module, setting, found)
        if isinstance(module, PreferenceModule):
            runner.run_judgements()
        else:
            runner.run_rounds()
    if setting.strategy == "fsdp2":
        _shard(module, setting, found)
    return found


def _bytes(module: nn.Module) -> int:
    return size_of((*module.parameters(), *module.buffers()))


def _parts(module: Any) -> dict[str, nn.Module]:
    """Return the networks of policy and rewards by name."""
    policy = module.policy
    parts = {"denoiser": policy.denoiser, "VAE": policy.vae, "text encoders": policy.text_encoders}
    parts |= {f"reward {name}": reward for name, reward in module.rewards.items()}
    beside = ((name, getattr(child, "tower", None)) for name, child in module.named_children())
    # That of a critic is frozen, and kept out of the module.
    return parts | {f"tower of the {name}": t for name, t in beside if isinstance(t, nn.Module)}


def _beside(module: Any) -> list[nn.Parameter]:
    """Return the parameters of critics, heads and the like."""
    known = {id(p) for part in _parts(module).values() for p in part.parameters()}
    return [p for p in module.parameters() if id(p) not in known]


def _count_parameters(module: Any, found: Estimate) -> None:
    for name, part in _parts(module).items():
        found.parameters[name] = sum(p.numel() for p in part.parameters())
    named = module.policy.denoiser.named_parameters()
    if adapters := sum(p.numel() for name, p in named if "lora_" in name):
        found.parameters["denoiser"] -= adapters
        found.parameters["LoRA"] = adapters
    if beside := _beside(module):
        found.parameters["beside the policy"] = sum(p.numel() for p in beside)
    found.trainable = sum(p.numel() for p in trained_tensors(module))
    for name, reward in module.rewards.items():
        if is_blank(reward):
            found.notes.append(f"{name} is elsewhere, or its network is not known: counted as 0.")
        elif not found.parameters[f"reward {name}"]:
            found.notes.append(f"{name} has no parameters to count.")


def _count_resident(module: Any, setting: Setting, found: Estimate) -> None:
    policy, resident = module.policy, found.resident
    resident["denoiser"], resident["VAE"] = _bytes(policy.denoiser), _bytes(policy.vae)
    if any(policy.text_encoders is child for child in policy.children()):  # else offloaded
        resident["text encoders"] = _bytes(policy.text_encoders)
    resident["rewards"] = sum(map(_bytes, {id(r): r for r in module.rewards.values()}.values()))
    towers = [part for name, part in _parts(module).items() if name.startswith("tower ")]
    resident["beside the policy"] = size_of(_beside(module)) + sum(map(_bytes, towers))
    if policy._reference is not None:
        resident["reference copy"] = _bytes(policy._reference)
    resident["states of AdamW"] = _ADAM_BYTES * found.trainable
    resident["averaged weights"] = 4 * found.trainable * setting.averages
    if setting.strategy == "ddp" and setting.world_size > 1:
        resident["buckets of DDP"] = size_of(trained_tensors(module))


def _shard(module: Any, setting: Setting, found: Estimate) -> None:
    """Divide what FSDP2 divides; a block is whole while it computes, and so is the next one."""
    resident, denoiser = found.resident, module.policy.denoiser
    blocks = [b for child in denoiser.children() if isinstance(child, nn.ModuleList) for b in child]
    for name in ("denoiser", "reference copy", "states of AdamW", "averaged weights"):
        if name in resident:
            resident[name] = math.ceil(resident[name] / setting.world_size)
    resident["gathered blocks of FSDP2"] = 2 * max(map(_bytes, blocks), default=0)

"""What a run would cost, before anything is downloaded: `run.py fit --config FILE --dry_run`.

The configuration is parsed and its classes are built as in `fit`, but networks are built from their
configurations, without weights; no file of weights or data and no network is touched. What the run
costs is then estimated by `lit_align.costs`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from lightning.pytorch.strategies import ModelParallelStrategy

from lit_align.algorithms import AlignmentModule, PreferenceModule
from lit_align.architectures import without_weights
from lit_align.architectures.stand_ins import networks_without_weights
from lit_align.callbacks import AdapterEMA
from lit_align.costs import Estimate, Setting, estimate

TFLOPS = 200.0
_TFLOPS_HELP = (
    "Trillions of operations per second that a dry run reckons with, per process. 200 is a round "
    "number; rollouts of Stable Diffusion 1.5 at 512 pixels came to about 130 on an H100."
)
_JUDGED = {"pairs": 2, "rankings": 4, "ratings": 1}
_DEFAULT_EPOCHS = 1000  # of Lightning, without any limit


def add_arguments(parser: Any) -> None:
    """Add the flags to the parser of a subcommand."""
    told = "Print what the run would cost, and download and train nothing."
    parser.add_argument("--dry_run", type=bool, default=False, nargs="?", const=True, help=told)
    parser.add_argument("--dry_run_tflops", type=float, default=TFLOPS, help=_TFLOPS_HELP)


@contextmanager
def nothing_opened() -> Iterator[None]:
    """Have classes that are made meanwhile open no weights and no connection."""
    offline = patch("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with offline, without_weights(), networks_without_weights():
        yield


def dry_run(module: Any, data: Any, trainer: dict[str, Any], tflops: float = TFLOPS) -> str:
    """Return what a run would cost, in words and tables.

    Args:
        module: Made while `nothing_opened`.
        data: The data module.
        trainer: The trainer's arguments by name, its callbacks and its strategy as objects.
        tflops: Trillions of operations per second and process, positive.

    Raises:
        ValueError: If `fit` would refuse the options, or the costs of the method are not known.
    """
    if tflops <= 0:
        raise ValueError(f"`dry_run_tflops` must be positive, got {tflops}.")
    if not isinstance(module, AlignmentModule):
        raise ValueError(
            f"A dry run is for methods that align a policy; {type(module).__name__} does not. "
            "Leave `--dry_run` out."
        )
    setting = setting_of(module, data, trainer)
    found = estimate(module, setting)
    sections = (
        [_title(module, setting)],
        _parameters(found),
        _memory(found, setting),
        _calls(module, found, trainer),
        _time(found, setting, tflops),
        [f"Note: {note}" for note in found.notes],
    )
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def setting_of(module: AlignmentModule, data: Any, trainer: dict[str, Any]) -> Setting:
    """Return what decides the costs beside the module; see `dry_run`."""
    callbacks = trainer.get("callbacks") or []
    callbacks = callbacks if isinstance(callbacks, Iterable) else [callbacks]
    strategy = trainer.get("strategy")
    sharded = isinstance(strategy, ModelParallelStrategy)
    batch_size = min(data.batch_size, getattr(data, "val_size", None) or data.batch_size)
    return Setting(
        precision=str(trainer.get("precision") or "32-true"),
        accumulate_grad_batches=int(trainer.get("accumulate_grad_batches") or 1),
        world_size=_processes(trainer),
        strategy="fsdp2" if sharded else "ddp",
        averages=sum(isinstance(callback, AdapterEMA) for callback in callbacks),
        batch_size=batch_size,
        judged=_JUDGED.get(getattr(data, "opening", {}).get("unit", "pairs"), 1),
    )


def _processes(trainer: dict[str, Any]) -> int:
    """Return the number of processes; what is left to the machine counts as one."""
    devices = trainer.get("devices")
    if isinstance(devices, list):
        return len(devices) * int(trainer.get("num_nodes") or 1)
    count = str(devices)
    return (int(count) if count.isdigit() else 1) * int(trainer.get("num_nodes") or 1)


def _title(module: Any, setting: Setting) -> str:
    policy = module.policy
    size = " x ".join(map(str, policy.image_size))
    processes = f"{setting.world_size} processes ({setting.strategy})"
    return (
        f"Dry run: {type(module).__name__} on {policy.pretrained} ({type(policy).__name__}, {size} "
        f"pixels), precision {setting.precision}, "
        f"{'1 process' if setting.world_size == 1 else processes}."
    )


def _parameters(found: Estimate) -> list[str]:
    total = sum(n for name, n in found.parameters.items() if not name.startswith("reward "))
    lines = ["| parameters | number |", "|---|---|"]
    lines += [f"| {name} | {count:,} |" for name, count in found.parameters.items()]
    share = f"{100 * found.trainable / max(total, 1):.3g} % of the module's"
    return [*lines, f"| trained | {found.trainable:,} ({share}) |"]


def _memory(found: Estimate, setting: Setting) -> list[str]:
    resident = {name: size for name, size in found.resident.items() if size}
    lines = ["| memory per process | GiB |", "|---|---|"]
    lines += [f"| {name} | {_gib(size)} |" for name, size in resident.items()]
    lines += [f"| beside them, at most, {name} | {_gib(size)} |"
              for name, size in found.peaks.items() if name != "setting up"]  # fmt: skip
    highest = max(found.peaks, key=lambda name: found.peaks[name], default="")
    lines.append(f"| estimated peak, {highest} | {_gib(found.peak)} |")
    return lines


def _calls(module: Any, found: Estimate, trainer: dict[str, Any]) -> list[str]:
    judged = isinstance(module, PreferenceModule)
    rounds, told = _rounds(found, trainer, judged)
    rows = {"images sampled": found.images, **found.counts, "optimiser steps": found.updates}
    per = "optimiser step" if judged else "round"
    lines = [f"| over all processes | per {per} | {told} |", "|---|---|---|"]
    return lines + [
        f"| {name.replace('_', ' ')} | {count:,.6g} | {count * rounds:,.6g} |"
        for name, count in rows.items()
    ]


def _rounds(found: Estimate, trainer: dict[str, Any], judged: bool) -> tuple[float, str]:
    """Return how many rounds, or optimiser steps, the run has at most, and what limits them."""
    steps = int(trainer.get("max_steps") or -1)
    epochs = trainer.get("max_epochs")
    limits: dict[str, float] = {}
    if steps > 0:
        limits[f"the run, of {steps:,} optimiser steps"] = steps / max(found.updates, 1e-9)
    if not judged and (epochs or steps <= 0):
        count = int(epochs or _DEFAULT_EPOCHS)
        if count > 0:
            limits[f"the run, of {count:,} rounds"] = float(count)
    if not limits:
        return 1.0, "of a run whose length the data decides"
    told = min(limits, key=lambda name: limits[name])
    return limits[told], told


def _time(found: Estimate, setting: Setting, tflops: float) -> list[str]:
    flops = {name: count for name, count in found.flops.items() if count}
    images = found.images or setting.batch_size * setting.judged * setting.world_size
    kind = "image" if found.images else "judged image"
    shown = ", ".join(f"{name} {count / images / 1e12:.3g}" for name, count in flops.items())
    total = sum(flops.values()) / images
    hours = total * 1000 / (tflops * 1e12) / 3600
    return [
        f"Per {kind}, in units of 10^12 operations: {total / 1e12:.3g} ({shown}).",
        f"At {tflops:g} x 10^12 operations per second (`--dry_run_tflops`): {hours:.3g} hours of "
        f"one process per 1,000 {kind}s; validations come on top.",
    ]


def _gib(size: float) -> str:
    return f"{size / 2**30:.3f}" if size < 2**30 else f"{size / 2**30:.2f}"

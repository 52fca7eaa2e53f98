r"""Rounds of a method at a model's full size, measured: `python -m lit_align.benchmarks.full_size`.

    python -m lit_align.benchmarks.full_size --architecture sd15 --method ddpo --output sd15.csv

The pipeline is built from its configuration with random weights, on the device itself: no file, no
vocabulary and no network is needed, and starting takes seconds. Memory and time do not depend on
what the weights are. The reward is `Colorfulness`, which costs next to nothing.

Three rounds are run through Lightning. The first warms up. In the second, peaks of memory and times
are measured; the peaks are the allocator's on a GPU and counted by `LiveBytes` elsewhere. The third
records the calls of the network, the decoder and the reward, which are then replayed in a bare
loop: the ratio of a round's time to that is what the rest costs, as in `benchmarks.overhead`.
Beside the peaks stands what a dry run of the same module on the meta device estimates.
"""

from __future__ import annotations

import csv
import logging
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils._pytree import tree_map

from lit_align import algorithms
from lit_align.algorithms.online import OnlineModule
from lit_align.architectures import without_weights
from lit_align.costs import Setting, estimate
from lit_align.data.prompts import PromptFile, PromptLoader
from lit_align.policies import DiffusionPolicy
from lit_align.rewards import Colorfulness
from lit_align.tracing import LiveBytes

METHODS: dict[str, Callable[..., Any]] = {
    "ddpo": partial(algorithms.DDPO, advantage_norm="batch"),
    "flow_grpo": partial(algorithms.FlowGRPO, samples_per_prompt=4),
    "diffusion_nft": partial(algorithms.DiffusionNFT, samples_per_prompt=4),
    "draft": algorithms.DRaFT,
    "refl": algorithms.ReFL,
    "alignprop": partial(algorithms.AlignProp, truncation="fixed"),
    "drtune": algorithms.DRTune,
}
_GIB = 2**30


class Meter(Callback):
    """Measures the second round, and in the third the calls that cannot be spared.

    Attributes:
        found: What was measured, by name; bytes and seconds.
    """

    def __init__(self, count: LiveBytes | None) -> None:
        self.count = count
        self.found: dict[str, float] = {}
        self.calls: list[tuple[Callable[..., Any], Any, Any, bool]] = []
        self._updates = 0
        self._taps = ExitStack()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tap the module's `collect`, which samples and scores."""
        module: Any = pl_module
        collect = module.collect

        def timed(*args: Any) -> Any:
            self._mark()
            started = time.perf_counter()
            result = collect(*args)
            self._end("collect", started)
            return result

        module.collect = timed

    def _mark(self) -> None:
        """Wait for the device, and forget the peak so far."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        elif self.count is not None:
            self.count.forget_peak()

    def _end(self, phase: str, started: float) -> None:
        """Note the seconds since `started` and the peak."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
            reserved = torch.cuda.max_memory_reserved()
        else:
            peak = reserved = self.count.peak if self.count is not None else 0
        seconds = time.perf_counter() - started
        for name, value in (("peak", peak), ("reserved", reserved)):
            key = f"{phase}_{name}_bytes"
            self.found[key] = max(value, self.found.get(key, 0))
        key = f"{phase}_seconds"
        self.found[key] = self.found.get(key, 0.0) + seconds

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a round: the second from zero, the third with taps."""
        if trainer.current_epoch == 1:
            self.found, self._updates = {}, trainer.global_step
        if trainer.current_epoch == 2:
            self.found["updates"] = trainer.global_step - self._updates
            self._measured = dict(self.found)
            self._tap_calls(pl_module)
        self._mark()
        self._round_started = time.perf_counter()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock of a minibatch."""
        self._mark()
        self._batch_started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop it; gradients and the optimiser's step belong to the update."""
        self._end("update", self._batch_started)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell of the round; replay the calls of the third."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._round_started
        print(f"round {trainer.current_epoch}: {seconds:.2f} s", flush=True)
        self.found["round_seconds"] = seconds
        if trainer.current_epoch == 2:
            self._taps.close()
            pl_module.zero_grad()
            self.found = self._measured
            with trainer.precision_plugin.forward_context():
                bare = _bare_loop(self.calls)
            print(f"its {len(self.calls)} calls alone: {bare:.2f} s", flush=True)
            self.found |= {"recorded_round_seconds": seconds, "bare_seconds": bare}
            self.calls.clear()

    def _tap_calls(self, pl_module: LightningModule) -> None:
        module: Any = pl_module
        owners = ((module.policy.denoiser, "forward"), (module.policy.vae, "decode"),
                  (module.reward, "forward"))  # fmt: skip
        for owner, name in owners:
            original = getattr(owner, name)
            setattr(owner, name, partial(self._recorded, original))
            self._taps.callback(setattr, owner, name, original)

    def _recorded(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # What backward calls again for a checkpoint is a forward, whose backward is counted once.
        again = torch._C._current_graph_task_id() != -1
        kept = tree_map(_leaf, (args, kwargs))
        self.calls.append((original, *kept, torch.is_grad_enabled() and not again))
        return original(*args, **kwargs)


def _leaf(value: Any) -> Any:
    """Return a tensor without its graph, which the recorded round frees."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().requires_grad_(value.requires_grad and value.is_floating_point())


def _bare_loop(calls: list[tuple[Callable[..., Any], Any, Any, bool]]) -> float:
    """Return the seconds that the calls alone take, with backward where the round had one."""
    started = time.perf_counter()
    for function, args, kwargs, with_gradient in calls:
        with torch.set_grad_enabled(with_gradient):
            output = function(*args, **kwargs)
            output = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
            if with_gradient and output.requires_grad:
                loss = output.float().square().mean()
                wanted = [p for p in _leaves(function, args, kwargs) if p.requires_grad]
                torch.autograd.grad(loss, wanted, allow_unused=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _leaves(function: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    owner = getattr(function, "__self__", None)
    weights = list(owner.parameters()) if isinstance(owner, torch.nn.Module) else []
    given = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
    return [*weights, *given]


@dataclass(frozen=True)
class Rounds:
    """What is run.

    Attributes:
        architecture: A name of `lit_align.architectures`, a hub id there, a shipped pipeline or a
            folder; only its configuration is read.
        method: One of `METHODS`.
        output: CSV file that a row is added to; none if None.
        image_size: Side in pixels; the model's own if None.
        images_per_round: Images per round.
        rollout_batch_size: Images sampled at once, for methods with a rollout.
        minibatch_size: Pairs, or images of methods that follow the gradient, per minibatch.
        accumulate_grad_batches: Minibatches per update.
        num_inference_steps: T.
        trained_steps: Steps of each image that are trained on, or K, the steps with a gradient.
        guidance_scale: Weight of guidance.
        lora_rank: Rank of the adapters.
        gradient_checkpointing: As of the policy.
        dtype: Of the frozen weights.
        precision: Of the trainer.
        method_options: Further options of the method.

    Raises:
        ValueError: If the method is unknown.
    """

    architecture: str = "sd15"
    method: str = "ddpo"
    output: str | None = None
    image_size: int | None = 512
    images_per_round: int = 8
    rollout_batch_size: int = 8
    minibatch_size: int = 4
    accumulate_grad_batches: int = 1
    num_inference_steps: int = 10
    trained_steps: int = 1
    guidance_scale: float = 4.5
    lora_rank: int = 16
    gradient_checkpointing: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    precision: str = "32-true"
    method_options: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Check the name of the method."""
        if self.method not in METHODS:
            raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {self.method!r}.")


def full_size(rounds: Rounds) -> dict[str, Any]:
    """Run three rounds, print what was measured, and append it to a table; return its row."""
    started = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = _build(rounds, device)
    print(f"built on {_name(device)} in {time.perf_counter() - started:.1f} s", flush=True)
    measured = _run(module, rounds.accumulate_grad_batches, rounds.precision, device)
    del module
    settings = asdict(rounds)
    del settings["output"], settings["method_options"]
    setting = Setting(
        rounds.precision, rounds.accumulate_grad_batches, batch_size=1, on_gpu=device == "cuda"
    )
    row: dict[str, Any] = {
        **settings, "device": _name(device), **_derived(measured, settings),
        **_estimated(_build(rounds, "meta"), setting),
    }  # fmt: skip
    for name, value in row.items():
        print(f"{name:<28} {value}", flush=True)
    if rounds.output is not None:
        _append(Path(rounds.output), row)
    return row


def _build(rounds: Rounds, device: str) -> Any:
    """Return the method over a policy whose networks are on the device."""
    with without_weights(device, getattr(torch, rounds.dtype)):
        policy = DiffusionPolicy.from_pretrained(
            rounds.architecture, lora_rank=rounds.lora_rank, dtype=rounds.dtype,
            image_size=rounds.image_size, gradient_checkpointing=rounds.gradient_checkpointing,
        )  # fmt: skip
    return _module(rounds.method, policy, asdict(rounds), rounds.method_options or {})


def _module(
    method: str, policy: DiffusionPolicy, settings: dict[str, Any], more: dict[str, Any]
) -> Any:
    """Return the method over the policy with the benchmark's settings."""
    make = METHODS[method]
    options: dict[str, Any] = {
        name: settings[name] for name in ("num_inference_steps", "guidance_scale", "minibatch_size")
    }
    options["max_invalid_fraction"] = 1.0  # random weights may draw anything
    kind: Any = make.func if isinstance(make, partial) else make
    given = make.keywords if isinstance(make, partial) else {}
    options["samples_per_prompt"] = given.get("samples_per_prompt", 1)
    options["prompts_per_round"] = settings["images_per_round"] // options["samples_per_prompt"]
    if issubclass(kind, OnlineModule):
        options["rollout_batch_size"] = settings["rollout_batch_size"]
        options["timestep_fraction"] = settings["trained_steps"] / settings["num_inference_steps"]
    elif method != "refl":
        options["truncation_steps"] = settings["trained_steps"]
    return make(policy, Colorfulness(), **{**options, **more})


def _run(module: Any, accumulate: int, precision: str, device: str) -> dict[str, float]:
    """Return what the meter found in three rounds."""
    count = None if device == "cuda" else LiveBytes()
    meter = Meter(count)
    trainer = Trainer(
        max_epochs=3,
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[meter],
    )
    loader = module.experience(PromptLoader(PromptFile("simple-animals"), 1, shuffle=True))
    with count or nullcontext():
        trainer.fit(module, loader)
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    return {**meter.found, "weight_bytes": weights, "counted_without_weights": count is not None}


def _derived(measured: dict[str, float], settings: dict[str, Any]) -> dict[str, Any]:
    """Return the columns of the table: GiB, images per second, seconds per update, the ratio."""
    found: dict[str, Any] = {}
    older = measured["weight_bytes"] if measured["counted_without_weights"] else 0
    for phase in ("collect", "update"):
        found[f"{phase}_peak_gib"] = round((measured[f"{phase}_peak_bytes"] + older) / _GIB, 6)
        found[f"{phase}_reserved_gib"] = round(
            (measured[f"{phase}_reserved_bytes"] + older) / _GIB, 6
        )
    images, updates = settings["images_per_round"], max(measured["updates"], 1)
    found["weights_gib"] = round(measured["weight_bytes"] / _GIB, 6)
    # Methods that follow the gradient sample in their updates.
    sampling = measured["collect_seconds"]
    sampling = sampling if sampling > 1e-2 else measured["round_seconds"]
    found["rollout_images_per_second"] = round(images / sampling, 3)
    found["round_images_per_second"] = round(images / measured["round_seconds"], 3)
    found["seconds_per_update"] = round(measured["update_seconds"] / updates, 4)
    ratio = measured["recorded_round_seconds"] / measured["bare_seconds"]
    return {**found, "updates": updates, "overhead_ratio": round(ratio, 3)}


def _estimated(module: Any, setting: Setting) -> dict[str, float]:
    """Return the peaks that a dry run of the module estimates."""
    found = estimate(module, setting)
    resident = sum(found.resident.values())
    update = {"update", "stepping"}
    others = [peak for phase, peak in found.peaks.items() if phase not in {*update, "validation"}]
    peaks = {
        "collect": max(others), "update": max(found.peaks[phase] for phase in update)
    }  # fmt: skip
    return {
        f"estimated_{name}_peak_gib": round((resident + peak) / _GIB, 6)
        for name, peak in peaks.items()
    }


def _name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else device


def _append(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a CSV file, which starts with the names of the columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    full_size(auto_cli(Rounds, as_positional=False))

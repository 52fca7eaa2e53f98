"""Memory that following the reward's gradient takes per sample, over K, the trained steps.

    python -m lit_align.benchmarks.memory --output configs/reward_gradient/memory

One sample is drawn, scored and differentiated with respect to the trained weights (guidance 1,
LoRA of rank 8). What counts is the peak of the bytes alive in storages that operators returned
meanwhile, until they are freed: states kept for backward, those that checkpointed calls compute
again, gradients, values in passing. Weights do not count, nor what a kernel needs inside itself.

    DRTune          K spaced steps, no early stop
    AlignProp       its truncation fixed to K, which makes it DRaFT-K but for the sampler's noise
    not checkpointed            DRaFT-K as it would be if each network call kept its states
    ReFL            one trained step, the first; K does not apply
    NablaGFlowNet   a minibatch of one (sample, step) pair; K of them need no more
    AdjointMatching the same, and before it the adjoint of the sample

"shapes-sd" is run for real, with T = 8 and the reward `Colorfulness`. Stable Diffusion 1.5 and SD3
medium have their full sizes, 512 pixels and bfloat16 weights, but live on the meta device, whose
tensors have no values. There T = 50, or 2 where K does not apply. The methods, samplers, networks
and decoders are the real ones, but

    embeddings  of the prompt are empty, and older than the count
    steps       look up their coefficients at index 0, for the index is a value
    untrained   steps of the methods with K do not call the network, which would keep nothing
    reward      is the sum or mean of the pixels
    attention   is the fused operator, as on a GPU: meta tensors would get the one that is not
    autocast    is missing, as in `precision: 32-true`
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import diffusers
import torch
from jsonargparse import auto_cli
from lightning.pytorch import Trainer
from matplotlib.figure import Figure
from torch import Tensor

from lit_align import algorithms
from lit_align.algorithms import pixels
from lit_align.architectures import build_pipeline
from lit_align.benchmarks.results import write_rows
from lit_align.policies import DiffusionPolicy, SD3Policy, StableDiffusionPolicy, sampling
from lit_align.rewards import Colorfulness
from lit_align.schedulers import StochasticDDIM, StochasticFlowMatch
from lit_align.tracing import LiveBytes
from lit_align.trajectory import PromptBatch, PromptMinibatch

NOT_CHECKPOINTED = "DRaFT, not checkpointed"
METHODS: dict[str, Callable[..., Any]] = {
    NOT_CHECKPOINTED: algorithms.DRaFT,
    "DRaFT": algorithms.DRaFT,
    "AlignProp": partial(algorithms.AlignProp, truncation="fixed"),
    "DRTune": partial(algorithms.DRTune, early_stop_ratio=0.0),
    "ReFL": partial(algorithms.ReFL, min_step=0, max_step=0),
    "NablaGFlowNet": algorithms.NablaGFlowNet,
    "AdjointMatching": algorithms.AdjointMatching,
}
WITHOUT_K = ("ReFL", "NablaGFlowNet", "AdjointMatching")
# And the K of each.
NETWORKS = {"shapes-sd": (1, 2, 4, 8), "SD 1.5": (1, 2, 5, 10, 25, 50)}
NETWORKS["SD3 medium"] = NETWORKS["SD 1.5"]
_NAMES = {"SD 1.5": "sd15", "SD3 medium": "sd3-medium"}  # of `lit_align.architectures`
Rows = list[dict[str, Any]]


def network(name: str, steps: int) -> Any:
    """Return the policy of one of `NETWORKS`, ready for so many steps."""
    if name == "shapes-sd":
        policy: Any = DiffusionPolicy.from_pretrained(name, lora_rank=8)
        policy.scheduler.set_timesteps(steps)
        return policy
    large = name == "SD3 medium"
    ddim = diffusers.DDIMScheduler(clip_sample=False, steps_offset=1)
    euler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler: Any = StochasticFlowMatch(euler, "memoryless") if large else StochasticDDIM(ddim)
    scheduler.set_timesteps(steps)
    tables = {key: value for key, value in vars(scheduler).items() if isinstance(value, Tensor)}
    vars(scheduler).update({key: value.to("meta") for key, value in tables.items()})
    scheduler.set_timesteps = lambda *_: None
    scheduler.index = lambda timesteps: torch.zeros_like(timesteps, dtype=torch.int64)
    make = SD3Policy if large else StableDiffusionPolicy
    with torch.device("meta"):
        policy = make(
            build_pipeline(_NAMES[name]), lambda _: scheduler, lora_rank=8, dtype="bfloat16",
            image_size=512,
        )  # fmt: skip
        embeds = {"prompt_embeds": torch.empty(1, *((333, 4096) if large else (77, 768)))}
        if large:
            embeds["pooled_prompt_embeds"] = torch.empty(1, 2048)
    policy.encode_prompt = lambda prompts: embeds
    return policy


@contextmanager
def _stand_ins(policy: Any, skipping: bool) -> Iterator[None]:
    """On the meta device, replace what needs values, and calls without gradient if `skipping`."""
    predict, fused = policy.predict, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def trained(latents: Tensor, *args: Any, **options: Any) -> Any:
        called = torch.is_grad_enabled() or not skipping
        return predict(latents, *args, **options) if called else torch.empty_like(latents)

    def scored(module: Any, images: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return images[:, 0, 0, 0], images.detach()

    stand_ins: dict[str, Any] = {
        "torch.nn.functional.scaled_dot_product_attention": lambda q, k, v, **_: fused(q, k, v)[0],
        "torch.autocast": lambda *_, **__: nullcontext(),
        "lit_align.algorithms.pixels.pixel_gradient": scored,
    }
    with ExitStack() as stack:
        if policy.device.type == "meta":
            stack.enter_context(patch.object(policy, "predict", trained))
            for name, stand_in in stand_ins.items():
                stack.enter_context(patch(name, stand_in))
        yield


def peak(policy: Any, method: str, trained: int = 1) -> int:
    """Return the peak of the bytes that one sample needs, see the module; `trained` is K."""
    fixed = method in WITHOUT_K
    options: dict[str, Any] = {} if fixed else {"truncation_steps": trained}
    options |= {"num_inference_steps": len(policy.scheduler.timesteps), "guidance_scale": 1.0}
    module = METHODS[method](policy, Colorfulness(), **options)
    module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainable = [p for p in policy.parameters() if p.requires_grad]
    direct = patch.object(sampling, "with_checkpoint", lambda call, *a, **b: call(*a, **b))
    calls = direct if method == NOT_CHECKPOINTED else nullcontext()
    with _stand_ins(policy, skipping=not fixed), calls, LiveBytes() as count:
        torch.autograd.grad(_loss(module), trainable, allow_unused=True)
    return count.peak


def _loss(module: Any) -> Any:
    """Return the loss of one sample, drawn now; of its first step if it is one of a pair."""
    policy, first = module.policy, torch.zeros(1, dtype=torch.int64)
    prompts = PromptBatch(["a red circle"], [None], first, first, first)
    if hasattr(module, "compute_targets"):
        with torch.no_grad():
            path = policy.sample(
                policy.encode_prompt(prompts.prompts), guidance_scale=1.0,
                num_inference_steps=module.num_inference_steps, generator=[torch.Generator()],
                keep=module.keep,
            )  # fmt: skip
            one = torch.ones(1, device=policy.device)
            path = module.compute_targets(path.replace(batch=prompts, rewards=one, weights=one))
        return module.loss(path.transitions(first, first))[0]
    minibatch = PromptMinibatch(prompts, 0)
    if policy.device.type != "meta":
        return module.loss(minibatch)[0]
    latents = torch.cat(list(module.draw(minibatch).latents))
    return pixels.decode_pixels(policy, latents, module.decode_batch_size, "clamped").mean()


def _draw(rows: Rows) -> Figure:
    """Draw a panel per network; a dashed line is of a method whose K does not apply."""
    names = list(dict.fromkeys(row["network"] for row in rows))
    figure = Figure(figsize=(4.2 * len(names), 3.6), dpi=120, layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for axis, name in zip(axes, names, strict=True):
        for number, method in enumerate(METHODS):
            own = [row for row in rows if (row["network"], row["method"]) == (name, method)]
            sizes = [row["bytes_per_sample"] / 2**20 for row in own]
            style: dict[str, Any] = {"label": method, "color": f"C{number}"}
            if method in WITHOUT_K:
                axis.axhline(sizes[0], linestyle="--", linewidth=1, **style)
            else:  # thinner and thinner, so that equal curves show
                axis.plot([r["K"] for r in own], sizes, "o-", lw=6 - 1.5 * number, **style)
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set(title=name, xlabel="K, trained steps")
    axes[0].legend(fontsize=7)
    figure.supylabel("peak memory of a sample, MiB", fontsize=9)
    return figure


def memory(output: str, networks: Sequence[str] = tuple(NETWORKS)) -> None:
    """Measure `networks`, print a table, and write it and a figure to `output`.csv and .png."""
    rows: Rows = []
    print("| network | method | K | MiB |\n|---|---|---|---|")
    for name, method in product(networks, METHODS):
        fixed = method in WITHOUT_K
        policy = network(name, 8 if name == "shapes-sd" else 2 if fixed else 50)
        for count in (1,) if fixed else NETWORKS[name]:
            size = peak(policy, method, count)
            rows.append({"network": name, "method": method, "K": count, "bytes_per_sample": size})
            print(f"| {name} | {method} | {count} | {size / 2**20:.2f} |", flush=True)
    write_rows(Path(f"{output}.csv"), rows)
    _draw(rows).savefig(f"{output}.png")


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # it tells of every trainer
    auto_cli(memory, as_positional=False)

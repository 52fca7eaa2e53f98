"""Memory that the methods which follow the reward's gradient need per sample, over K.

    python -m lit_align.benchmarks.memory --output configs/reward_gradient/memory

K is the number of trained steps. One sample is drawn, scored and differentiated with respect to
the trained weights (guidance 1, LoRA of rank 8), and the peak of the bytes alive in tensors that
came into being meanwhile is reported: states kept for backward, those computed again by
checkpointed calls, gradients, and what operators return for a moment. Weights are not counted, nor
what a kernel needs inside itself or an allocator rounds up. Storages are counted once, however
many views they have, from the operator that returns them until they are freed.

    ReFL            one trained step, here the first, so K does not apply
    AlignProp       its truncation fixed to K, which makes it DRaFT-K but for the samplers' noise
    DRTune          K spaced steps, no early stop
    NablaGFlowNet   loss of a minibatch of one (sample, step) pair: K such minibatches need no more
    AdjointMatching the same, and the adjoint of its sample; by itself the smaller of the two
    DRaFT, not checkpointed   DRaFT-K as it would be if each network call kept its states

"shapes-sd" is run for real, with T = 8 and the reward `Colorfulness`. Stable Diffusion 1.5 and SD3
medium have their full sizes, 512 pixels and bfloat16 weights, but live on the meta device, whose
tensors have shapes and no values. There T = 50, or 2 for the methods whose K does not apply; the
methods, samplers, networks and decoders are the real ones, except that

    prompts     are encoded to empty tensors of the right shape
    steps       look up their coefficients at index 0, for the index is a value
    untrained   steps do not call the network, which would keep nothing
    reward      is the mean of the pixels
    attention   is the fused operator, as on a GPU: meta tensors would get the one that is not
    autocast    is missing, as in `precision: 32-true`
"""

from __future__ import annotations

import csv
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from jsonargparse import auto_cli
from lightning.pytorch import Trainer
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_align.algorithms import (
    AdjointMatching,
    AlignProp,
    DRaFT,
    DRTune,
    NablaGFlowNet,
    OnlineModule,
    ReFL,
    pixels,
)
from lit_align.policies import DiffusionPolicy, SD3Policy, StableDiffusionPolicy, sampling
from lit_align.rewards import Colorfulness
from lit_align.schedulers import StochasticDDIM, StochasticFlowMatch
from lit_align.trajectory import PromptBatch, PromptMinibatch, Trajectory

UNCHECKPOINTED = "DRaFT, not checkpointed"
METHODS: dict[str, Callable[..., Any]] = {
    "ReFL": partial(ReFL, min_step=0, max_step=0),
    UNCHECKPOINTED: DRaFT,
    "AlignProp": partial(AlignProp, truncation="fixed"),
    "DRaFT": DRaFT,
    "DRTune": partial(DRTune, early_stop_ratio=0.0),
    "NablaGFlowNet": NablaGFlowNet,
    "AdjointMatching": AdjointMatching,
}
WITHOUT_K = ("ReFL", "NablaGFlowNet", "AdjointMatching")
Rows = list[dict[str, Any]]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that come into being while it is active.

    Attributes:
        live: Those that are not freed yet.
        peak: The most there were at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator; what it is given and was not seen before is older than the count."""
        kwargs = kwargs or {}
        self._see((args, kwargs), counted=False)
        output = func(*args, **kwargs)
        self._see(output, counted=True)
        return output

    def _see(self, tensors: Any, counted: bool) -> None:
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._seen:
                    self._seen.add(storage._cdata)
                    size = storage.nbytes() if counted else 0
                    self.live += size
                    weakref.finalize(storage, self._free, storage._cdata, size)
        self.peak = max(self.peak, self.live)

    def _free(self, address: int, size: int) -> None:
        self._seen.remove(address)
        self.live -= size


def shapes(steps: int) -> Any:
    """Return the policy of the shapes world."""
    policy: Any = DiffusionPolicy.from_pretrained("shapes-sd", lora_rank=8)
    policy.scheduler.set_timesteps(steps)
    return policy


def sd15(steps: int) -> Any:
    """Return a policy over Stable Diffusion 1.5 on the meta device."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(320, 640, 1280, 1280),
            cross_attention_dim=768,
            attention_head_dim=8,
        )
        pipeline = StableDiffusionPipeline(
            _decoder(4), None, None, unet, None, None, None, requires_safety_checker=False
        )
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    options: dict[str, Any] = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    scheduler = StochasticDDIM(DDIMScheduler(**betas, **options))
    embeds = {"prompt_embeds": (77, 768)}
    return _on_meta(StableDiffusionPolicy, pipeline, scheduler, steps, embeds)


def sd3(steps: int) -> Any:
    """Return a policy over Stable Diffusion 3 medium on the meta device, for 512 pixels."""
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(
            sample_size=64,
            in_channels=16,
            num_layers=24,
            attention_head_dim=64,
            num_attention_heads=24,
            caption_projection_dim=1536,
            pos_embed_max_size=192,
        )
        vae = _decoder(
            16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False,
            use_post_quant_conv=False,
        )  # fmt: skip
        nothing: list[Any] = [None] * 6
        pipeline = StableDiffusion3Pipeline(transformer, None, vae, *nothing)
    scheduler = StochasticFlowMatch(FlowMatchEulerDiscreteScheduler(shift=3.0), "memoryless")
    embeds = {"prompt_embeds": (333, 4096), "pooled_prompt_embeds": (2048,)}
    return _on_meta(SD3Policy, pipeline, scheduler, steps, embeds)


# Each network, its T and the K to measure at.
NETWORKS: dict[str, tuple[Callable[[int], Any], int, tuple[int, ...]]] = {
    "shapes-sd": (shapes, 8, (1, 2, 4, 8)),
    "SD 1.5": (sd15, 50, (1, 2, 5, 10, 25, 50)),
    "SD3 medium": (sd3, 50, (1, 2, 5, 10, 25, 50)),
}


def _decoder(channels: int, **options: Any) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=channels,
        sample_size=512,
        **options,
    )


def _on_meta(
    family: type[DiffusionPolicy],
    pipeline: Any,
    scheduler: Any,
    steps: int,
    embeds: dict[str, tuple[int, ...]],
) -> Any:
    """Return a policy that needs no values: of prompts, nor of steps."""
    with torch.device("meta"):
        policy: Any = family(pipeline, lambda _: scheduler, lora_rank=8, dtype="bfloat16")
    scheduler.set_timesteps(steps)
    for name, value in list(vars(scheduler).items()):
        if isinstance(value, Tensor):
            setattr(scheduler, name, value.to("meta"))
    scheduler.set_timesteps = lambda *_: None
    scheduler.index = lambda timesteps: torch.zeros_like(timesteps, dtype=torch.int64)
    policy.encode_prompt = lambda prompts: {
        name: torch.empty(len(prompts), *shape, device="meta") for name, shape in embeds.items()
    }
    return policy


@contextmanager
def _stand_ins(policy: Any) -> Iterator[None]:
    """Replace what a policy on the meta device cannot run; do nothing for others."""
    predict, fused = policy.predict, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def attention(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Any:
        return fused(query, key, value)[0]

    def trained(latents: Tensor, *args: Any, **options: Any) -> Any:
        called = torch.is_grad_enabled() or policy.scheduler.timesteps.numel() == 2
        return predict(latents, *args, **options) if called else torch.empty_like(latents)

    def gradient(_: Any, images: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        return images.new_zeros(len(images)), torch.ones_like(images)

    with ExitStack() as stack:
        if policy.device.type == "meta":
            functional = torch.nn.functional
            stack.enter_context(patch.object(functional, "scaled_dot_product_attention", attention))
            stack.enter_context(patch.object(torch, "autocast", lambda *_, **__: nullcontext()))
            stack.enter_context(patch.object(pixels, "pixel_gradient", gradient))
            stack.enter_context(patch.object(policy, "predict", trained))
        yield


def peak(policy: Any, method: str, trained: int) -> int:
    """Return the peak of the bytes that one sample needs, see the module.

    Args:
        policy: One of `NETWORKS`.
        method: One of `METHODS`.
        trained: K, for the methods that have one.
    """
    options: dict[str, Any] = {} if method in WITHOUT_K else {"truncation_steps": trained}
    total = len(policy.scheduler.timesteps)
    module = METHODS[method](
        policy, Colorfulness(), num_inference_steps=total, guidance_scale=1.0, **options
    )
    module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    zero = torch.zeros(1, dtype=torch.int64)
    prompts = PromptBatch(["a red circle"], [None], zero, zero, zero)
    plain = patch.object(sampling, "with_checkpoint", lambda call, *a, **kw: call(*a, **kw))
    with _stand_ins(policy), plain if method == UNCHECKPOINTED else nullcontext():
        path = _path(module, prompts) if isinstance(module, OnlineModule) else None
        with LiveBytes() as count:
            loss = _sampled_loss(module, prompts) if path is None else _pair_loss(module, path)
            torch.autograd.grad(loss, parameters, allow_unused=True)
    return count.peak


def _sampled_loss(module: Any, prompts: PromptBatch) -> Tensor:
    minibatch = PromptMinibatch(prompts, 0)
    if module.policy.device.type != "meta":
        loss: Tensor = module.loss(minibatch)[0]
        return loss
    latents = torch.cat(list(module.draw(minibatch).latents))
    options = (module.decode_batch_size, module.pixel_grad)
    return pixels.decode_pixels(module.policy, latents, *options).mean()


@torch.no_grad()
def _path(module: Any, prompts: PromptBatch) -> Trajectory:
    """Return a sample of a method that learns from samples drawn before."""
    path = module.policy.sample(
        module.policy.encode_prompt(prompts.prompts),
        num_inference_steps=module.num_inference_steps,
        guidance_scale=module.guidance_scale,
        generator=[torch.Generator()],
        keep_predicted=module.keep_predicted,
    )
    one = torch.ones(1, device=module.policy.device)
    sampled: Trajectory = path.replace(batch=prompts, rewards=one, weights=one)
    return sampled


def _pair_loss(module: Any, path: Trajectory) -> Tensor:
    first = torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        targets = module.compute_targets(path)
    loss: Tensor = module.loss(targets.transitions(first, first))[0]
    return loss


def measure(networks: Sequence[str]) -> Rows:
    """Return a row for each network, method and K."""
    rows = []
    for network in networks:
        make, steps, counts = NETWORKS[network]
        for method in METHODS:
            fixed = method in WITHOUT_K
            policy = make(2 if fixed and network != "shapes-sd" else steps)
            for count in (1,) if fixed else counts:
                size = peak(policy, method, count)
                print(f"{network}, {method}, K = {count}: {size / 2**20:.1f} MiB", flush=True)
                rows.append(
                    {"network": network, "method": method, "K": count, "bytes_per_sample": size}
                )
    return rows

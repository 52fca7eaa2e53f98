"""A text-to-image model as a policy: one interface over diffusers' pipelines."""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from lit_align.functional.gaussian import gaussian_kl
from lit_align.functional.noise import randn
from lit_align.policies import adapters, loading
from lit_align.policies.latents import LatentSpace
from lit_align.policies.sampling import CFGGrad, denoise, stack_steps
from lit_align.policies.text_cache import TextCache
from lit_align.schedulers.base import StepOutput, StochasticScheduler
from lit_align.trajectory import Trajectory, Transition

Conditioning = dict[str, Tensor]
SchedulerFactory = Callable[[Any], StochasticScheduler]

MAX_TEXT_TOKENS = 256  # of encoders without a limit of their own (T5)


class DiffusionPolicy(LatentSpace, ABC):
    """A pretrained pipeline, a stochastic sampler over it, and the part of it that is trained.

    Only the denoiser is ever trained; text encoders and VAE are frozen.

    Args:
        pretrained: A shipped name ("shapes-sd", "shapes-sd3"), a local pipeline folder, a hub id,
            or a diffusers pipeline.
        scheduler: Makes the stochastic scheduler from the pipeline's own; by default the family's.
        train: "lora" adds low-rank adapters, "full" trains the whole denoiser, "none" nothing.
        lora_rank: Rank of the adapters.
        lora_alpha: Their scale is alpha / rank; by default alpha = rank.
        lora_targets: Names of the denoiser's linear layers; by default the family's attention
            projections.
        dtype: "float32", "bfloat16" or "float16" for the frozen parts; adapters stay float32. None
            leaves a pipeline that was passed as it is.
        gradient_checkpointing: Trade compute for memory in the denoiser.
        image_size: Side of the images in pixels, or height and width; by default the model's own.
        cache_text: Number of prompts whose text embeddings are kept on the CPU, so that each is
            encoded once; the one unused for longest leaves first.
        offload_text_encoders: Keep the text encoders on the CPU, and on the device only while they
            encode; outside the module tree, as every part of it follows the module's device.

    Raises:
        ValueError: If the name is unknown, an option is out of range, or a LoRA target matches no
            module.
    """

    pipeline_class: ClassVar[Any]
    denoiser_name: ClassVar[str]
    default_scheduler: ClassVar[Any]
    default_lora_targets: ClassVar[tuple[str, ...]]
    text_encoders: nn.ModuleList

    def __init__(
        self,
        pretrained: str | DiffusionPipeline,
        scheduler: SchedulerFactory | None = None,
        train: Literal["lora", "full", "none"] = "lora",
        lora_rank: int = 4,
        lora_alpha: float | None = None,
        lora_targets: list[str] | None = None,
        dtype: loading.Dtype | None = "float32",
        gradient_checkpointing: bool = False,
        image_size: int | tuple[int, int] | None = None,
        cache_text: int = 0,
        offload_text_encoders: bool = False,
    ) -> None:
        super().__init__()
        if train not in ("lora", "full", "none"):
            raise ValueError(f"`train` must be 'lora', 'full' or 'none', got {train!r}.")
        if train == "full" and dtype != "float32":
            raise ValueError(
                f"`dtype: {dtype}` is for frozen weights; to train the whole denoiser, keep "
                "`dtype: float32` and set `trainer.precision: bf16-mixed`."
            )
        self._texts = TextCache(cache_text, offload_text_encoders)
        if isinstance(pretrained, str):
            pipeline: Any = loading.load_pipeline(pretrained, self.pipeline_class)
        else:
            pipeline = pretrained
        self.pretrained = pretrained if isinstance(pretrained, str) else type(pipeline).__name__
        self.train_mode = train
        self._take_parts(pipeline)
        self._check_pipeline()
        if dtype is not None:
            self._cast_frozen(loading.torch_dtype(dtype))
        self.set_image_size(image_size)
        make_scheduler: SchedulerFactory = scheduler or type(self).default_scheduler
        self.scheduler = make_scheduler(self.pipeline_scheduler())
        self._reference: nn.Module | None = None
        if train == "lora":
            targets = lora_targets or list(self.default_lora_targets)
            adapters.add_lora(self.denoiser, lora_rank, lora_alpha or lora_rank, targets)
        elif train == "full":
            self.denoiser.requires_grad_(True)
        if gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()

    @classmethod
    def from_pretrained(
        cls,
        pretrained: str,
        scheduler: SchedulerFactory | None = None,
        train: Literal["lora", "full", "none"] = "lora",
        lora_rank: int = 4,
        lora_alpha: float | None = None,
        lora_targets: list[str] | None = None,
        dtype: loading.Dtype = "float32",
        gradient_checkpointing: bool = False,
        image_size: int | tuple[int, int] | None = None,
        cache_text: int = 0,
        offload_text_encoders: bool = False,
    ) -> DiffusionPolicy:
        """Build the policy of the family that `pretrained` belongs to; arguments as for the class.

        Raises:
            ValueError: If the name is unknown or its pipeline has no policy class.
        """
        family = loading.family_of(pretrained, cls)
        policy: DiffusionPolicy = family(
            pretrained, scheduler, train, lora_rank, lora_alpha, lora_targets, dtype,
            gradient_checkpointing, image_size, cache_text=cache_text,
            offload_text_encoders=offload_text_encoders,
        )  # fmt: skip
        return policy

    def _take_parts(self, pipeline: Any) -> None:
        """Hold the pipeline's networks, frozen."""
        # The pipeline is no module; its parts are, and both views share them.
        self.pipeline = pipeline
        self.denoiser: Any = getattr(pipeline, self.denoiser_name)
        self.vae: Any = pipeline.vae
        encoders = nn.ModuleList(
            module
            for name, module in sorted(pipeline.components.items())
            if name.startswith("text_encoder") and module is not None
        )
        if self._texts.offload:
            object.__setattr__(self, "text_encoders", encoders.cpu())
        else:
            self.text_encoders = encoders
        for networks in (self, encoders):
            networks.requires_grad_(False).eval()

    def _check_pipeline(self) -> None:
        """Raise ValueError for pipelines of the family's class that work in another way."""

    def _cast_frozen(self, dtype: torch.dtype) -> None:
        for network in (self.denoiser, self.text_encoders, self.vae):
            nn.Module.to(network, dtype)  # diffusers' own `to` warns of a cast that is meant

    @property
    def device(self) -> torch.device:
        """Where the denoiser lives."""
        return next(self.denoiser.parameters()).device

    def pipeline_scheduler(self) -> Any:
        """Return diffusers' scheduler, with the pipeline's times from `set_timesteps(T)`."""
        return self.pipeline.scheduler

    def branches(self, guidance_scale: float) -> int:
        """Return how many rows the network sees per sample under this guidance.

        Raises:
            ValueError: If the network has no such guidance.
        """
        return 1 if guidance_scale == 1 else 2

    def fingerprint(self) -> str:
        """Return a name and hash of what is trained: the pipeline, and which of its tensors."""
        trained = [(n, tuple(p.shape)) for n, p in self.named_parameters() if p.requires_grad]
        digest = hashlib.blake2b(repr(trained).encode(), digest_size=4).hexdigest()
        return f"{self.pretrained} ({self.train_mode}, {digest})"

    @abstractmethod
    def forward(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the raw network output [B, ...] in the network's dtype.

        Args:
            latents: [B, C, H, W].
            timesteps: [B], as the network takes them.
            conditioning: The positive entries of `encode_prompt`.
        """

    def encode_prompt(self, prompts: Sequence[str]) -> Conditioning:
        """Return text embeddings, each [B, ...]: those of the prompts, and under names starting
        with "negative_" those of the empty prompt.
        """  # noqa: D205
        return self._texts.encode(self._encode, self.text_encoders, prompts, self.device)

    def _encode(self, prompts: Sequence[str], with_negative: bool) -> Conditioning:
        """Return what `encode_prompt` does, made anew; each family's own.

        Args:
            prompts: B texts.
            with_negative: Whether those of the empty prompt are wanted, if the family has them.
        """
        # Not abstract: a policy may have its own `encode_prompt` instead, and then keeps nothing.
        raise NotImplementedError(f"{type(self).__name__} must define `_encode`.")

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        """Return which prompts are longer than what any of the text encoders reads."""
        return loading.truncated(self.pipeline, prompts, MAX_TEXT_TOKENS)

    def predict(
        self,
        latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        guidance_scale: float,
        *,
        cfg_grad: CFGGrad = "both",
    ) -> Tensor:
        """Return the guided output ``u + w (c - u)`` [B, C, H, W] float32, by one forward.

        Args:
            latents: [B, C, H, W].
            timesteps: [B].
            conditioning: What `encode_prompt` returned.
            guidance_scale: w; 1 leaves the unconditional branch out.
            cfg_grad: Whether gradient also flows through the unconditional branch.
        """
        positive = {k: v for k, v in conditioning.items() if not k.startswith("negative_")}
        if guidance_scale == 1:
            return self(latents, timesteps, positive).float()
        both = {k: torch.cat([conditioning[f"negative_{k}"], v]) for k, v in positive.items()}
        output = self(torch.cat([latents, latents]), timesteps.repeat(2), both).float()
        unconditional, conditional = output.chunk(2)
        if cfg_grad == "cond_only":
            unconditional = unconditional.detach()
        return unconditional + guidance_scale * (conditional - unconditional)

    def sample(
        self,
        conditioning: Conditioning,
        *,
        num_inference_steps: int,
        guidance_scale: float,
        generator: Sequence[torch.Generator],
        initial_generator: Sequence[torch.Generator] | None = None,
        stochastic_steps: Collection[int] | None = None,
        num_steps: int | None = None,
        grad_steps: Collection[int] = (),
        detach_input: bool = False,
        cfg_grad: CFGGrad = "both",
        keep: Collection[str] = (),
        height: int | None = None,
        width: int | None = None,
        progress: Callable[[], Any] = lambda: None,
    ) -> Trajectory:
        """Run the sampler from noise to clean latents.

        Args:
            conditioning: What `encode_prompt` returned, for B samples.
            num_inference_steps: T.
            guidance_scale: Weight of classifier-free guidance.
            generator: B of them; each draws its sample's initial noise, then that of its steps.
            initial_generator: B of them to draw the initial noise instead.
            stochastic_steps: Indices of the steps that add noise; by default all with a density.
            num_steps: Stop after so many of them.
            grad_steps: Indices of the steps whose network call has a gradient.
            detach_input: Let no gradient flow into what the network sees (arXiv:2405.00760).
            cfg_grad: Whether gradient also flows through the unconditional branch.
            keep: Fields of `StepOutput` to keep of each step, as the trajectory's extras.
            height: Of the image in pixels; by default the model's.
            width: The same.
            progress: Called after each step.
        """
        self.scheduler.set_timesteps(num_inference_steps, self.device)
        timesteps = self.scheduler.timesteps[:num_steps]
        noisy = self.scheduler.density_steps if stochastic_steps is None else stochastic_steps
        shape = self.latent_shape(height, width)
        initial = randn(shape, initial_generator or generator, self.device)
        steps = denoise(
            self, initial, timesteps, conditioning, guidance_scale, generator, noisy, grad_steps,
            detach_input, cfg_grad, progress,
        )  # fmt: skip
        return Trajectory(
            **stack_steps(initial, steps, keep),
            timesteps=timesteps.expand(len(generator), -1), conditioning=conditioning,
            guidance_scale=guidance_scale, num_inference_steps=num_inference_steps,
        )  # fmt: skip

    def replay(self, transition: Transition, *, cfg_grad: CFGGrad = "both") -> StepOutput:
        """Evaluate recorded steps under the current weights, by the code path of `sample`."""
        self.scheduler.set_timesteps(transition.num_inference_steps, self.device)
        output = self.predict(
            transition.latents,
            transition.timesteps,
            transition.conditioning,
            transition.guidance_scale,
            cfg_grad=cfg_grad,
        )
        return self.scheduler.step(
            output, transition.timesteps, transition.latents, transition.next_latents
        )

    def keep_reference(self) -> None:
        """Make `reference` possible: copies a fully trained denoiser, needs nothing for LoRA."""
        if self.train_mode == "full" and self._reference is None:
            frozen = copy.deepcopy(self.denoiser).requires_grad_(False)
            # Not registered: the copy belongs in no checkpoint and takes part in no sharding.
            object.__setattr__(self, "_reference", frozen)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Run the pretrained weights: adapters off, or the kept copy.

        Raises:
            RuntimeError: If the whole denoiser is trained and no copy was kept.
        """
        if self.train_mode == "lora":
            with adapters.disabled(self.denoiser):
                yield
        elif self.train_mode == "none":
            yield
        elif self._reference is None:
            raise RuntimeError("Call `keep_reference()` before training to use `reference()`.")
        else:
            # Also in the dtype that `precision: bf16-true` gave to the trained weights.
            # diffusers' own `to` warns of a cast that is meant.
            dtype = next(self.denoiser.parameters()).dtype
            frozen = nn.Module.to(self._reference, self.device, dtype)
            trained, self.denoiser = self.denoiser, frozen
            try:
                yield
            finally:
                self.denoiser = trained

    @torch.no_grad()
    def kl_to_reference(self, trajectory: Trajectory) -> Tensor:
        """Return the divergence from the pretrained weights at each step [B, T], in nats.

        ``KL(p_theta(. | x_t) || p_ref(. | x_t)) = |mean_theta - mean_ref|^2 / (2 std_t^2)``

        Its sum over the steps of samples drawn from p_theta estimates the divergence of the paths,
        a bound from above on that of the images. NaN where the step has no density.
        """
        divergence = torch.full_like(trajectory.log_probs, torch.nan)
        self.scheduler.set_timesteps(trajectory.num_inference_steps, self.device)
        for index in self.scheduler.density_steps:
            transition = trajectory.step(index)
            step = self.replay(transition)
            with self.reference():
                reference = self.replay(transition)
            per_dimension = gaussian_kl(step.mean, reference.mean, step.std)
            divergence[:, index] = per_dimension * step.mean[0].numel()
        return divergence

    @torch.no_grad()
    def replay_log_probs(self, trajectory: Trajectory) -> Tensor:
        """Return the `log_probs` [B, T] that the current weights give to recorded steps."""
        log_probs = torch.full_like(trajectory.log_probs, torch.nan)
        self.scheduler.set_timesteps(trajectory.num_inference_steps, self.device)
        for index in self.scheduler.density_steps:
            log_probs[:, index] = self.replay(trajectory.step(index)).log_prob
        return log_probs

    @contextmanager
    def use_adapter(self, name: str) -> Iterator[None]:
        """Run with the LoRA adapter `name` ("default", or one made by `add_adapter`)."""
        with adapters.active(self.denoiser, name):
            yield

    def add_adapter(self, name: str) -> None:
        """Add a frozen copy of the trained LoRA adapter under another name."""
        adapters.copy_adapter(self.denoiser, name)

    def save_pretrained(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write what plain diffusers reads: a LoRA file, or a full pipeline folder.

        Args:
            path: A folder, made if missing.
            dtype: Of the stored tensors; by default as they are.
        """
        if self.train_mode == "lora":
            adapters.save_lora(self.denoiser, self.pipeline, self.denoiser_name, Path(path), dtype)
        else:
            loading.save_pipeline(self.pipeline, Path(path), dtype)

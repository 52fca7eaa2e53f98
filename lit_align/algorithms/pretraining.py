"""Training the small base models: VAE, denoiser, dual encoder.

VAE          mean |D(z) - x| + mean (D(z) - x)^2 + kl_weight KL(q(z|x) || N(0, I)), z ~ q(z|x)
denoising    mean ||network(noised x0, t, prompt) - target||^2, prompt dropped with probability p
target: epsilon or v (arXiv:2006.11239, arXiv:2202.00512), eps - x0 (arXiv:2210.02747)
contrastive  symmetric cross-entropy over cosine / temperature, equal captions joint positives
(arXiv:1312.6114, arXiv:2103.00020)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from lit_align.functional.noise import keyed_generator
from lit_align.policies.base import DiffusionPolicy


class Pretraining(LightningModule, ABC):
    """AdamW with linear warm-up and cosine decay over the run; noise from a keyed generator.

    Args:
        lr: Peak learning rate.
        weight_decay: Of AdamW.
        warmup_steps: Optimiser steps of linear warm-up.
        seed: Decides all noise drawn during training.
    """

    def __init__(self, lr: float, weight_decay: float, warmup_steps: int, seed: int) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.lr, self.weight_decay, self.warmup_steps = lr, weight_decay, warmup_steps
        self.seed = seed

    @abstractmethod
    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """Return the training loss of a batch with entries `image`, `prompt`, `index`."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the loss; the step's noise is keyed by (seed, optimiser step)."""
        loss = self.loss(batch, keyed_generator("train", self.seed, self.global_step))
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["index"]))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Log the loss with the same noise at every validation."""
        loss = self.loss(batch, keyed_generator("val", self.seed, batch_idx))
        self.log("val/loss", loss, prog_bar=True, batch_size=len(batch["index"]))

    def configure_optimizers(self) -> Any:
        """Return the optimiser and its per-step schedule."""
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.lr, weight_decay=self.weight_decay)
        total = int(self.trainer.estimated_stepping_batches)
        warmup = LinearLR(optimizer, 1e-2, 1.0, self.warmup_steps)
        decay = CosineAnnealingLR(optimizer, total - self.warmup_steps)
        schedule = SequentialLR(optimizer, [warmup, decay], [self.warmup_steps])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class VAEPretraining(Pretraining):
    """Train a diffusers `AutoencoderKL`; its `scaling_factor` becomes 1 / std of the latents.

    Args:
        vae: The autoencoder.
        lr, weight_decay, warmup_steps, seed: See `Pretraining`.
        kl_weight: Weight of the divergence from the standard normal, summed over a latent.
    """

    def __init__(
        self,
        vae: nn.Module,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        warmup_steps: int = 100,
        kl_weight: float = 1e-6,
        seed: int = 0,
    ) -> None:
        super().__init__(lr, weight_decay, warmup_steps, seed)
        self.vae: Any = vae
        self.kl_weight = kl_weight
        self.register_buffer("latent_std", torch.ones(()))

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """Return the reconstruction loss plus the weighted divergence."""
        pixels = batch["image"] * 2 - 1
        posterior = self.vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(pixels.device)
        error = self.vae.decode(posterior.mean + posterior.std * noise).sample - pixels
        reconstruction: Tensor = error.abs().mean() + error.square().mean()
        return reconstruction + self.kl_weight * posterior.kl().mean()

    @torch.no_grad()
    def on_validation_epoch_end(self) -> None:
        """Measure the spread of the latents."""
        images = next(iter(self.trainer.val_dataloaders or []))["image"].to(self.device)
        self.latent_std = self.vae.encode(images * 2 - 1).latent_dist.mode().std()
        self.log("val/latent_std", self.latent_std)

    def save_pretrained(self, path: str, dtype: torch.dtype | None = None) -> None:
        """Write a folder that `AutoencoderKL.from_pretrained` reads, scaled to unit latents."""
        self.vae.register_to_config(scaling_factor=round(1 / float(self.latent_std), 4))
        nn.Module.to(self.vae, dtype or torch.float32).save_pretrained(path)


class DenoisingPretraining(Pretraining):
    """Train a policy's denoiser, and its text encoders with it, on image-text pairs.

    Args:
        policy: A policy with `train: full`.
        lr, weight_decay, warmup_steps, seed: See `Pretraining`.
        prompt_dropout: Share of prompts replaced by "", for classifier-free guidance.
        train_text_encoders: Train the text encoders too.
        cache_latents: Encode each image once and keep the latents in memory.
    """

    def __init__(
        self,
        policy: DiffusionPolicy,
        lr: float = 1e-3,
        weight_decay: float = 1e-2,
        warmup_steps: int = 500,
        prompt_dropout: float = 0.1,
        train_text_encoders: bool = True,
        cache_latents: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(lr, weight_decay, warmup_steps, seed)
        if policy.train_mode != "full":
            raise ValueError(f"`policy` must have `train: full`, got {policy.train_mode!r}.")
        self.policy = policy
        policy.text_encoders.requires_grad_(train_text_encoders)
        self.prompt_dropout = prompt_dropout
        self.latents: dict[int, Tensor] | None = {} if cache_latents else None

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """Return the mean squared error of the network's output."""
        latents = self._encode(batch)
        count = len(latents)
        timesteps = self.policy.scheduler.sample_timesteps(count, generator).to(self.device)
        noise = torch.randn(latents.shape, generator=generator).to(self.device)
        dropped = torch.rand(count, generator=generator) < self.prompt_dropout
        prompts = ["" if d else p for p, d in zip(batch["prompt"], dropped, strict=True)]
        noised, target = self.policy.scheduler.corrupt(latents, noise, timesteps)
        conditioning = self.policy.encode_prompt(prompts)
        output = self.policy.predict(noised, timesteps, conditioning, guidance_scale=1)
        return F.mse_loss(output, target)

    @torch.no_grad()
    def _encode(self, batch: dict[str, Any]) -> Tensor:
        if self.latents is None or not self.training:
            return self.policy.encode(batch["image"])
        indices = batch["index"].tolist()
        if any(index not in self.latents for index in indices):
            self.latents.update(zip(indices, self.policy.encode(batch["image"]), strict=True))
        return torch.stack([self.latents[index] for index in indices])

    def save_pretrained(self, path: str, dtype: torch.dtype | None = None) -> None:
        """Write a pipeline folder that plain diffusers reads."""
        self.policy.save_pretrained(path, dtype)


class ContrastivePretraining(Pretraining):
    """Train a dual encoder on image-text pairs.

    Args:
        encoder: Has `embed_images`, `embed_text` (unit vectors [B, D]) and `logit_scale`.
        lr, weight_decay, warmup_steps, seed: See `Pretraining`; no noise is drawn.
    """

    def __init__(
        self,
        encoder: nn.Module,
        lr: float = 1e-3,
        weight_decay: float = 1e-2,
        warmup_steps: int = 500,
        seed: int = 0,
    ) -> None:
        super().__init__(lr, weight_decay, warmup_steps, seed)
        self.encoder: Any = encoder.requires_grad_(True)

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """Return the symmetric cross-entropy with equal captions as joint positives."""
        images = self.encoder.embed_images(batch["image"])
        logits = images @ self.encoder.embed_text(batch["prompt"]).T
        logits = logits * self.encoder.logit_scale.exp().clamp(max=100)
        prompts = batch["prompt"]
        same = torch.tensor([[a == b for b in prompts] for a in prompts], device=logits.device)
        target = same / same.sum(dim=1, keepdim=True)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    def save_pretrained(self, path: str, dtype: torch.dtype | None = None) -> None:
        """Write the encoder's folder."""
        self.encoder.save_pretrained(path, dtype)

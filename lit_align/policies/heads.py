"""Networks beside the denoiser: a critic on a frozen image tower, a correction of the flow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn


class TemporalCritic(nn.Module):
    """Values of intermediate images: an MLP on the embeddings of a frozen tower (arXiv:2402.08552).

    Without a nonlinearity, as in the paper's code, it is affine in the embedding. Its weights start
    so small that all values are about 0. It stays float32.

    Args:
        tower: Has `embed_images`, images [B, 3, H, W] in [0, 1] to unit vectors [B, D]; frozen,
            in no checkpoint.
        hidden: Widths of the hidden layers.
        dropout: Of the first hidden layers, shares in [0, 1).
        nonlinearity: Between layers: None or "relu".
        layer_norm: Normalise each hidden layer's output.
        embedding_dim: D; by default found by embedding a blank image.

    Attributes:
        layers: The linear layers.
        init_std: Standard deviation of their weights at the start, ``1 / (D + 1)``.
    """

    def __init__(
        self,
        tower: nn.Module,
        hidden: Sequence[int] = (1024, 128, 64, 16),
        dropout: Sequence[float] = (0.2, 0.2, 0.1),
        nonlinearity: str | None = None,
        layer_norm: bool = False,
        embedding_dim: int | None = None,
    ) -> None:
        super().__init__()
        if not hasattr(tower, "embed_images"):
            raise ValueError(f"`tower` needs `embed_images`, {type(tower).__name__} has none.")
        if nonlinearity not in (None, "relu"):
            raise ValueError(f"`nonlinearity` must be None or 'relu', got {nonlinearity!r}.")
        if len(dropout) > len(hidden) or not all(0 <= share < 1 for share in dropout):
            raise ValueError(
                f"`dropout` must give shares in [0, 1) of at most {len(hidden)} hidden layers, got "
                f"{list(dropout)}."
            )
        # Not registered: the tower belongs in no checkpoint, no precision plugin casts it.
        object.__setattr__(self, "tower", tower.requires_grad_(False).eval())
        width = embedding_dim or self._measure_width()
        self.init_std = 1 / (width + 1)
        self.dropout, self.nonlinearity = tuple(dropout), nonlinearity
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise((width, *hidden, 1)))
        norms = (nn.LayerNorm(size) if layer_norm else nn.Identity() for size in hidden)
        self.norms = nn.ModuleList(norms)
        layer: Any
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=self.init_std)
            nn.init.zeros_(layer.bias)

    tower: Any

    def _measure_width(self) -> int:
        device = next((p.device for p in self.tower.parameters()), torch.device("cpu"))
        return int(self.embed(torch.full((1, 3, 32, 32), 0.5, device=device)).shape[1])

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Return embeddings [B, D] float32 of images [B, 3, H, W] in [0, 1]."""
        with torch.autocast(images.device.type, enabled=False):
            embeddings: Tensor = self.tower.embed_images(images.float())
        return embeddings.float()

    def forward(self, embeddings: Tensor, dropout_keys: Tensor | None = None) -> Tensor:
        """Return the values [N].

        Args:
            embeddings: [N, D].
            dropout_keys: [N] int64, what seeds each row's dropout; without them, and in
                evaluation mode, nothing is dropped.
        """
        keep = self._keep(embeddings, dropout_keys)
        with torch.autocast(embeddings.device.type, enabled=False):
            values = embeddings.float()
            for number, (layer, norm) in enumerate(zip(self.layers[:-1], self.norms, strict=True)):
                values = norm(layer(values))
                values = values.relu() if self.nonlinearity == "relu" else values
                values = values * keep[number] if number < len(keep) else values
            values = self.layers[-1](values)
        return values.squeeze(1)

    @torch.no_grad()
    def evaluate(self, embeddings: Tensor) -> Tensor:
        """Return the values [B, T] of embeddings [B, T, D], without dropout."""
        training = self.training
        values: Tensor = self.eval()(embeddings.flatten(0, 1)).view(embeddings.shape[:2])
        self.train(training)
        return values

    def _keep(self, embeddings: Tensor, keys: Tensor | None) -> list[Tensor]:
        """Return what each hidden layer's outputs [N, width] are multiplied by."""
        if keys is None or not self.training or not self.dropout:
            return []
        layers: Any = self.layers[: len(self.dropout)]
        widths = [layer.out_features for layer in layers]
        draws = torch.stack(
            [
                torch.rand(sum(widths), generator=torch.Generator().manual_seed(key))
                for key in keys.tolist()
            ]
        ).to(embeddings.device)
        parts = draws.split(widths, dim=1)
        return [
            (part >= share) / (1 - share) for part, share in zip(parts, self.dropout, strict=True)
        ]


class FlowCorrection(nn.Module):
    """What the reward's gradient at predicted clean images lacks of the flow's (arXiv:2412.07775).

    A small U-Net g(x_t, t, prompt) of the latents' shape, zero at the start. It stays float32.

    Args:
        channels: Of the latents.
        text_width: Width of the prompt embeddings.
        sample_size: Side of the latents.
        widths: Channels of its resolutions, multiples of 8.
    """

    def __init__(
        self,
        channels: int = 4,
        text_width: int = 768,
        sample_size: int = 64,
        widths: Sequence[int] = (64, 128, 256, 256),
    ) -> None:
        super().__init__()
        depth = len(widths) - 1
        network: Any = UNet2DConditionModel(
            sample_size=sample_size,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=tuple(widths),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",) * depth + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * depth,
            cross_attention_dim=text_width,
            norm_num_groups=math.gcd(32, *widths),
        )
        nn.init.zeros_(network.conv_out.weight)
        nn.init.zeros_(network.conv_out.bias)
        self.network = network

    def forward(self, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Return the correction [N, C, H, W], in the units of a score.

        Args:
            latents: [N, C, H, W].
            timesteps: [N], as the denoiser takes them.
            prompt_embeds: [N, tokens, width].
        """
        with torch.autocast(latents.device.type, enabled=False):
            arguments = (latents.float(), timesteps, prompt_embeds.float())
            correction: Tensor = self.network(*arguments, return_dict=False)[0]
        return correction

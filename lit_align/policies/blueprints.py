"""Random-weight networks of the shapes world, ready to be pretrained.

They are ordinary diffusers and transformers classes at a size that trains in an hour on two CPU
cores; tests build their tiny models here too.
"""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from lit_align.shapes.grammar import vocabulary
from lit_align.shapes.scene import IMAGE_SIZE
from lit_align.shapes.tokens import MAX_TOKENS, tokenizer_options

_LATENT_SIDE = IMAGE_SIZE // 4


def build_vae(widths: tuple[int, ...] = (16, 32, 32), layers_per_block: int = 1) -> AutoencoderKL:
    """Return a VAE that maps 32x32 images to 4 x 8 x 8 latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=layers_per_block,
        norm_num_groups=8,
        latent_channels=4,
        shift_factor=0.0,  # SD3 pipelines add it
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
    )


def build_shapes_sd(
    vae: str | None = None,
    widths: tuple[int, ...] = (32, 64),
    text_width: int = 64,
    prediction_type: str = "epsilon",
) -> StableDiffusionPipeline:
    """Return a Stable Diffusion pipeline with a random U-Net and text encoder.

    Args:
        vae: Folder of a trained VAE; random if None.
        widths: Channels of the U-Net's resolutions.
        text_width: Width of the text encoder.
        prediction_type: "epsilon" or "v_prediction".
    """
    tokenizer = CLIPTokenizer(**tokenizer_options())
    unet = UNet2DConditionModel(
        sample_size=_LATENT_SIDE,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * len(widths),
        up_block_types=("CrossAttnUpBlock2D",) * len(widths),
        cross_attention_dim=text_width,
        norm_num_groups=8,
    )
    return StableDiffusionPipeline(
        vae=_open_vae(vae),
        text_encoder=CLIPTextModel(_text_config(tokenizer, text_width)),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=_ddim(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_shapes_sdxl(
    vae: str | None = None,
    widths: tuple[int, ...] = (32, 64),
    text_width: int = 64,
    prediction_type: str = "epsilon",
    timestep_spacing: str = "leading",
) -> StableDiffusionXLPipeline:
    """Return a Stable Diffusion XL pipeline with a random U-Net and two text encoders.

    Args:
        vae: Folder of a trained VAE; random if None.
        widths: Channels of the U-Net's resolutions; the first has no attention, as in XL.
        text_width: Width of the first text encoder; the second's is one and a half times that.
        prediction_type: "epsilon" or "v_prediction".
        timestep_spacing: "leading" as of XL, "trailing" as of XL-Turbo.
    """
    tokenizer = CLIPTokenizer(**tokenizer_options())
    second_width, size_width = text_width * 3 // 2, 8
    unet = UNet2DConditionModel(
        sample_size=_LATENT_SIDE,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * (len(widths) - 1),
        up_block_types=("CrossAttnUpBlock2D",) * (len(widths) - 1) + ("UpBlock2D",),
        attention_head_dim=[2] * len(widths),  # which are numbers of heads
        use_linear_projection=True,
        cross_attention_dim=text_width + second_width,
        addition_embed_type="text_time",
        addition_time_embed_dim=size_width,
        projection_class_embeddings_input_dim=6 * size_width + second_width,
        norm_num_groups=8,
    )
    second = _text_config(tokenizer, second_width, layers=3, hidden_act="gelu")
    return StableDiffusionXLPipeline(
        vae=_open_vae(vae),
        text_encoder=CLIPTextModel(_text_config(tokenizer, text_width)),
        text_encoder_2=CLIPTextModelWithProjection(second),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=_ddim(prediction_type, timestep_spacing),
        add_watermarker=False,
    )


def build_shapes_sd3(
    vae: str | None = None,
    layers: int = 6,
    heads: int = 4,
    head_width: int = 24,
    text_width: int = 64,
) -> StableDiffusion3Pipeline:
    """Return a Stable Diffusion 3 pipeline with a random transformer and two text encoders.

    Args:
        vae: Folder of a trained VAE; random if None.
        layers: Transformer blocks.
        heads: Attention heads.
        head_width: Width of a head.
        text_width: Width of each text encoder.
    """
    tokenizer = CLIPTokenizer(**tokenizer_options())
    transformer = SD3Transformer2DModel(
        sample_size=_LATENT_SIDE,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=head_width,
        caption_projection_dim=heads * head_width,
        joint_attention_dim=2 * text_width,
        pooled_projection_dim=2 * text_width,
        pos_embed_max_size=_LATENT_SIDE // 2,
    )
    text_config = _text_config(tokenizer, text_width, layers=3)
    return StableDiffusion3Pipeline(
        vae=_open_vae(vae),
        text_encoder=CLIPTextModelWithProjection(text_config),
        text_encoder_2=CLIPTextModelWithProjection(text_config),
        text_encoder_3=None,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=None,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def build_shapes_flux(
    vae: str | None = None,
    layers: int = 2,
    single_layers: int = 4,
    heads: int = 4,
    head_width: int = 24,
    text_width: int = 64,
    guidance_embeds: bool = True,
) -> FluxPipeline:
    """Return a Flux pipeline with a random transformer, CLIP and T5.

    Args:
        vae: Folder of a trained VAE; random if None.
        layers: Transformer blocks with streams of their own for text and image.
        single_layers: Blocks after them, where the streams are one.
        heads: Attention heads.
        head_width: Width of a head, a multiple of 8.
        text_width: Width of each text encoder.
        guidance_embeds: Whether the guidance scale is an input of the transformer, as in Flux.1-dev
            and not in schnell; dev's times also depend on the image size.
    """
    tokenizer = CLIPTokenizer(**tokenizer_options())
    t5_tokenizer, t5 = _build_t5(text_width)
    axis = head_width // 4
    transformer = FluxTransformer2DModel(
        in_channels=4 * 4,
        num_layers=layers,
        num_single_layers=single_layers,
        attention_head_dim=head_width,
        num_attention_heads=heads,
        joint_attention_dim=text_width,
        pooled_projection_dim=text_width,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(head_width - 2 * axis, axis, axis),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=guidance_embeds),
        vae=_open_vae(vae),
        text_encoder=CLIPTextModel(_text_config(tokenizer, text_width)),
        tokenizer=tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        transformer=transformer,
    )


def build_shapes_wan(
    layers: int = 2,
    heads: int = 4,
    head_width: int = 24,
    text_width: int = 64,
    vae_width: int = 8,
) -> WanPipeline:
    """Return a Wan pipeline with random weights: 8 pixels to a latent, 4 frames to one.

    Args:
        layers: Transformer blocks.
        heads: Attention heads.
        head_width: Width of a head, a multiple of 4.
        text_width: Width of the text encoder.
        vae_width: Width of the VAE's first layers.
    """
    tokenizer, t5 = _build_t5(text_width)
    vae = AutoencoderKLWan(
        base_dim=vae_width,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1, -0.1, 0.2, 0.0],
        latents_std=[1.5, 1.0, 2.0, 1.2],
    )
    transformer = WanTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head_width,
        in_channels=4,
        out_channels=4,
        text_dim=text_width,
        freq_dim=32,
        ffn_dim=2 * heads * head_width,
        num_layers=layers,
        rope_max_seq_len=32,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return WanPipeline(tokenizer, t5, vae, scheduler, transformer)


def _build_t5(width: int) -> tuple[T5Tokenizer, T5EncoderModel]:
    words: Any = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -3.0)]
    words += [(f"▁{word}", -1.0) for word in vocabulary()]
    tokenizer = T5Tokenizer(vocab=words, extra_ids=0, model_max_length=MAX_TOKENS)
    sizes: dict[str, Any] = {"d_model": width, "d_kv": width // 4, "d_ff": 4 * width}
    config = T5Config(vocab_size=len(tokenizer), num_layers=2, num_heads=4, **sizes)
    return tokenizer, T5EncoderModel(config).eval()  # it has dropout


def _ddim(prediction_type: str, timestep_spacing: str = "leading") -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
        timestep_spacing=timestep_spacing,
    )


def _open_vae(folder: str | None) -> AutoencoderKL:
    return build_vae() if folder is None else AutoencoderKL.from_pretrained(folder)


def _text_config(
    tokenizer: CLIPTokenizer, width: int, layers: int = 2, hidden_act: str = "quick_gelu"
) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_act=hidden_act,
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )

"""Tiny instances of the real classes behind the rewards of the CLIP family, with random weights."""

import open_clip
import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from lit_align.rewards import AestheticScore, CLIPScore, HPSv2, PickScore
from lit_align.shapes.tokens import tokenizer_options

SIDE = 32
WIDTH = 16
HEAD_WIDTHS = {"layers.0": 1024, "layers.2": 128, "layers.4": 64, "layers.6": 16, "layers.7": 1}


def tokenizer():
    return CLIPTokenizer(**{**tokenizer_options(), "model_max_length": 77})


def clip_model(projection=WIDTH):
    torch.manual_seed(0)
    words = tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2,
             "num_hidden_layers": 2, "hidden_act": "gelu", "initializer_factor": 4.0}  # fmt: skip
    ids = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id,
           "pad_token_id": words.pad_token_id, "vocab_size": len(words)}  # fmt: skip
    vision = {"image_size": SIDE, "patch_size": 8, "projection_dim": projection, **sizes}
    config = CLIPConfig(text_config={**sizes, **ids}, vision_config=vision)
    config.projection_dim = projection
    return CLIPModel(config)


def open_clip_config(width=64):
    vision = {"image_size": SIDE, "layers": 2, "width": width, "head_width": 32, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
    return {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}


def open_clip_model():
    torch.manual_seed(0)
    return open_clip.CLIP(**open_clip_config(), output_dict=True)


def head(width=WIDTH, seed=0):
    """Return the released head of AestheticScore v2 for embeddings of `width`, random."""
    generator, weights = torch.Generator().manual_seed(seed), {}
    for name, out in HEAD_WIDTHS.items():
        weights[f"{name}.weight"] = torch.randn(out, width, generator=generator) / width**0.5
        weights[f"{name}.bias"] = torch.randn(out, generator=generator)
        width = out
    return weights


def unfolded(weights):
    """Return a head as the layers that it was trained as, float64."""
    layers = []
    for name in HEAD_WIDTHS:
        out, width = weights[f"{name}.weight"].shape
        layers.append(nn.Linear(width, out, dtype=torch.float64))
        layers[-1].load_state_dict({kind: weights[f"{name}.{kind}"] for kind in ("weight", "bias")})
    return nn.Sequential(*layers)


def linear_head(width=WIDTH):
    return {"weight": torch.randn(1, width), "bias": torch.randn(1)}


MAKE = {
    "AestheticScore-v2": lambda **o: AestheticScore(model=clip_model(), head=head(), **o),
    "AestheticScore-v1": lambda **o: AestheticScore(
        "v1", model=clip_model(), head=linear_head(), **o
    ),
    "CLIPScore": lambda **o: CLIPScore(model=clip_model(), tokenizer=tokenizer(), **o),
    "PickScore": lambda **o: PickScore(model=clip_model(), tokenizer=tokenizer(), **o),
    "HPSv2.1": lambda **o: HPSv2(model=open_clip_model(), **o),
}
WITH_TEXT = ("CLIPScore", "PickScore", "HPSv2.1")

"""MPS without its weights: names, the joining layers by loops, the mask, and gradients."""

import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTokenizer

from lit_align.functional.pixels import normalise
from lit_align.hub import CheckpointError
from lit_align.rewards import MPS, mps
from lit_align.rewards.base import checked_scores
from lit_align.rewards.mps import CONDITION, CrossModel, MPSNetwork, relevance, rotary
from lit_align.shapes.tokens import tokenizer_options
from tests.rewards.plain_values import from_yaml

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 2}  # fmt: skip
PROMPTS = ["a red circle", "two blue squares", "a green triangle on white", "a red circle"]


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer(**tokenizer_options())


@pytest.fixture
def options(tokenizer):
    text = {**SIZES, "vocab_size": len(tokenizer), "max_position_embeddings": 16,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id}  # fmt: skip
    vision = {**SIZES, "image_size": 32, "patch_size": 8}
    return {"width": 12, "heads": 3, "head_width": 4, "layers": 2, "vision": vision, "text": text}


@pytest.fixture
def network(options):
    network = MPSNetwork(**options).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network


def reward(network, tokenizer, **options):
    return MPS(model=network, tokenizer=tokenizer, **options)


def original(network, prefix):
    """Random weights by the names of the released files, with what these hold beside weights."""
    found = {}
    for name, weight in network.state_dict().items():
        if name.startswith("clip."):
            name = "model." + name.removeprefix("clip.")
        else:
            _, _, layer, block, rest = name.split(".", 4)
            name = f"cross_model.layers.{layer}.{block}.fn.{rest}"
        found[prefix + name] = torch.randn_like(weight)
    for layer in range(2):
        for block in range(2):
            found[f"{prefix}cross_model.layers.{layer}.{block}.fn.norm.bias"] = torch.zeros(12)
        rates = torch.ones(2)
        found[f"{prefix}cross_model.layers.{layer}.1.fn.rotary_emb.inv_freq"] = rates
    for tower in ("text", "vision"):
        found[f"{prefix}model.{tower}_model.embeddings.position_ids"] = torch.arange(9)[None]
    return found


def test_the_released_sizes():
    with torch.device("meta"):
        network = MPSNetwork()
    counted = [sum(w.numel() for w in part.parameters()) for part in (network.clip, network.cross)]
    # Per layer: norm, q, kv, out, ff; norm, fused, out, ff.
    d, inner, head, wide = 1024, 1024, 64, 4096
    layer = 2 * d + 2 * (2 * d * inner + 2 * d * head + 3 * d * wide)
    assert counted == [986_109_441, 4 * layer]


@pytest.mark.parametrize("prefix", ["", "mps."])
def test_every_weight_of_the_file_arrives(network, options, prefix):
    weights = original(network, prefix)
    network.load_original(weights, "the file")
    again = original(MPSNetwork(**options), prefix)  # for its names only
    assert again.keys() == weights.keys()
    for name, weight in network.state_dict().items():
        theirs = {mps.renamed(key): value for key, value in weights.items()}[name]
        assert torch.equal(weight, theirs), name


def test_files_that_are_not_the_networks_are_refused(network, tokenizer, tmp_path):
    weights = original(network, "")
    short = {n: w for n, w in weights.items() if "0.fn.to_q" not in n}
    with pytest.raises(CheckpointError, match=r"2 missing \(cross.layers.0.0.to_q.weight"):
        network.load_original(short, "the file")
    with pytest.raises(CheckpointError, match=r"1 unknown \(head.weight\)"):
        network.load_original(weights | {"head.weight": torch.zeros(1)}, "the file")
    torch.save(network, tmp_path / "module.pth")
    with pytest.raises(CheckpointError, match="a pickled module, give a file of its weights"):
        MPS(checkpoint=str(tmp_path / "module.pth"), tokenizer=tokenizer)
    with pytest.raises(CheckpointError, match=r"hf download RE-N-Y/mpsv1 model\.safetensors"):
        MPS()


def test_released_files_are_opened(network, options, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(mps, "MPSNetwork", lambda: MPSNetwork(**options))
    weights = original(network, "mps.")
    save_file(weights, tmp_path / "model.safetensors")
    torch.save({n.removeprefix("mps."): w for n, w in weights.items()}, tmp_path / "overall.pth")
    tokenizer.save_pretrained(tmp_path / "clip")
    folder = MPS(checkpoint=str(tmp_path), tokenizer=tokenizer)
    file = from_yaml(
        f"{{class_path: MPS, init_args: {{checkpoint: {tmp_path}/overall.pth, "
        f"tokenizer: {tmp_path}/clip, scale: cosine, threshold: 0.3}}}}"
    )
    images = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(folder(images, PROMPTS), file(images, PROMPTS), rtol=0, atol=0)


# The joining layers.


def turned(vector, position):
    """A vector turned pair by pair: (k, k + d / 2) by position / 10000^(2 k / d)."""
    half = len(vector) // 2
    out = vector.clone()
    for k in range(half):
        angle = position / 10000 ** (k / half)
        a, b = vector[k].item(), vector[k + half].item()
        out[k] = a * math.cos(angle) - b * math.sin(angle)
        out[k + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def test_rotary_positions():
    values = torch.randn(2, 5, 3, 8)
    found = rotary(values, dim=1)
    for position in range(5):
        expected = turned(values[1, position, 2], position)
        torch.testing.assert_close(found[1, position, 2], expected)


def normed(x, weight):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def swiglu(x):
    a, gate = x.chunk(2, dim=-1)
    return a * gate * torch.sigmoid(gate)


def attended(queries, keys, values):
    """One head's rows, one after the other."""
    rows = [(keys @ q / len(q) ** 0.5).softmax(0) @ values for q in queries]
    return torch.stack(rows)


def test_the_joining_layers_by_loops():
    model = CrossModel(width=6, heads=2, head_width=4, layers=1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    w = {name: weight.detach() for name, weight in model.named_parameters()}
    image, text, seen = torch.randn(1, 5, 6), torch.randn(1, 3, 6), torch.tensor([[1, 0, 1]]) > 0

    x = normed(image[0], w["layers.0.0.norm.weight"])
    keys, values = (text[0][seen[0]] @ w["layers.0.0.to_kv.weight"].T).chunk(2, dim=1)
    queries = x @ w["layers.0.0.to_q.weight"].T
    heads = [attended(q, keys, values) for q in queries.chunk(2, dim=1)]
    after = image[0] + torch.cat(heads, 1) @ w["layers.0.0.to_out.weight"].T
    after = after + swiglu(x @ w["layers.0.0.ff.0.weight"].T) @ w["layers.0.0.ff.2.weight"].T

    x = normed(after, w["layers.0.1.norm.weight"])
    inner = x @ w["layers.0.1.fused_attn_ff_proj.weight"].T
    queries, keys, values, wide = inner[:, :8], inner[:, 8:12], inner[:, 12:16], inner[:, 16:]
    keys = torch.stack([turned(k, i) for i, k in enumerate(keys)])
    heads = [
        attended(torch.stack([turned(q, i) for i, q in enumerate(head)]), keys, values)
        for head in queries.chunk(2, dim=1)
    ]
    expected = after + torch.cat(heads, 1) @ w["layers.0.1.attn_out.weight"].T
    expected = expected + swiglu(wide) @ w["layers.0.1.ff_out.1.weight"].T
    torch.testing.assert_close(model(image, text, seen)[0], expected, rtol=1e-4, atol=1e-5)


# Scores.


def test_relevance_by_hand():
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [-1.0, -1.0]], [[4.0, 0.0], [0, 0], [0, 1]]])
    condition = torch.tensor([[1.0, 0.0], [0.0, 0.5]])
    # Largest products: 1, 1, -0.5 and 4, 0, 0.5.
    expected = torch.tensor([[1, 1, -0.5], [1, 0, 0.125]])
    torch.testing.assert_close(relevance(tokens, condition), expected)


def test_a_score_is_the_cosine_of_end_and_fused_token(network, tokenizer):
    images = torch.rand(1, 3, 32, 32)
    ids = tokenizer([PROMPTS[0], CONDITION], padding="max_length", truncation=True, max_length=16,
                    return_tensors="pt").input_ids  # fmt: skip
    clip = network.clip
    with torch.no_grad():
        read = clip.text_model(input_ids=ids)
        tokens, condition = clip.text_projection(read.last_hidden_state)
        end = clip.text_projection(read.pooler_output)[0]
        products = (tokens @ condition.T).amax(dim=1)
        seen = products / products.max() > 0.9
        vision = clip.vision_model(pixel_values=normalise(images)).last_hidden_state
        fused = network.cross(clip.visual_projection(vision), tokens[None], seen[None])[0, 0]
    cosine = torch.dot(end, fused) / end.norm() / fused.norm()
    options = {"threshold": 0.9}
    scores = reward(network, tokenizer, **options)(images, PROMPTS[:1])
    torch.testing.assert_close(scores, cosine[None])
    logit = reward(network, tokenizer, scale="logit", **options)(images, PROMPTS[:1])
    torch.testing.assert_close(logit, clip.logit_scale.exp() * cosine[None])
    assert 0 < seen.sum() < len(seen)


def test_names_tell_scale_and_threshold(network, tokenizer):
    assert reward(network, tokenizer).name == "MPS"
    other = reward(network, tokenizer, scale="logit", threshold=0.01)
    assert other.name == "MPS-logit-0.01"


def test_scores_depend_on_image_and_prompt_and_on_nothing_else(network, tokenizer):
    model = reward(network, tokenizer)
    images = torch.rand(4, 3, 40, 32)
    scores = checked_scores(model, model(images, PROMPTS), 4)
    alone = [model(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(torch.cat(alone), scores)
    assert scores[0] != scores[3]
    assert model(images[:1], PROMPTS[1:2]) != scores[0]


def test_the_threshold_matters(network, tokenizer):
    images = torch.rand(4, 3, 32, 32)
    low, high = (reward(network, tokenizer, threshold=t)(images, PROMPTS) for t in (0.01, 0.9))
    assert (low != high).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_reaches_the_pixels_only(network, tokenizer, dtype):
    model = reward(network, tokenizer, dtype=dtype)
    images = torch.rand(2, 3, 48, 40, requires_grad=True)
    checked_scores(model, model(images, PROMPTS[:2]), 2).sum().backward()
    assert images.grad.isfinite().all()
    assert (images.grad.abs().amax(dim=(1, 2, 3)) > 0).all()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_bad_options_are_refused(network, tokenizer):
    with pytest.raises(ValueError, match="`scale` must be one of cosine, logit, got '100'"):
        reward(network, tokenizer, scale="100")
    for threshold in (-0.1, 1.0):
        with pytest.raises(ValueError, match="`threshold` must be in"):
            reward(network, tokenizer, threshold=threshold)

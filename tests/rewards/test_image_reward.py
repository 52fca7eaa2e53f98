"""ImageReward without its weights: names, sizes, attention, head and gradients."""

from itertools import pairwise

import pytest
import timm
import torch
from torch import nn
from transformers import BertTokenizer

from lit_align.hub import CheckpointError
from lit_align.rewards import ImageReward, image_reward
from lit_align.rewards.base import checked_scores
from lit_align.rewards.image_reward import ImageRewardNetwork, renamed
from tests.rewards.plain_values import from_yaml

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "circle", "square"]
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
}
TEXT = {
    "vocab_size": len(WORDS),
    "hidden_size": 12,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
}
HEAD = (12, 8, 6, 4, 3, 1)
NUMBERS = (0, 2, 4, 6, 7)  # dropout lies between


@pytest.fixture
def tokenizer(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(WORDS))
    return BertTokenizer(str(path))


@pytest.fixture
def network():
    network = ImageRewardNetwork(VISION, TEXT).eval()
    for parameter in network.parameters():  # the classes start too near zero to tell images apart
        nn.init.normal_(parameter, std=0.3)
    return network


def reward(network, tokenizer, **options):
    return ImageReward(model=network, tokenizer=tokenizer, **options)


def transformer():
    """The image encoder in the family of the original's code, with random weights."""
    vision = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=16, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2,
        num_classes=0, global_pool="",
    )  # fmt: skip
    for parameter in vision.parameters():
        nn.init.normal_(parameter, std=0.3)
    return vision.eval()


def original(network, vision):
    """Random weights by the names of the released file."""
    text = {name: torch.randn_like(weight) for name, weight in network.text.state_dict().items()}
    layers = {
        f"{number}.{kind}": torch.randn(shape)
        for number, (a, b) in zip(NUMBERS, pairwise(HEAD), strict=True)
        for kind, shape in (("weight", (b, a)), ("bias", (b,)))
    }
    return {
        **{f"blip.visual_encoder.{name}": w for name, w in vision.state_dict().items()},
        **{f"blip.text_encoder.{name}": w for name, w in text.items()},
        "blip.text_encoder.embeddings.position_ids": torch.arange(40)[None],
        **{f"blip.vision_proj.{kind}": torch.zeros(1) for kind in ("weight", "bias")},
        **{f"blip.text_proj.{kind}": torch.zeros(1) for kind in ("weight", "bias")},
        **{f"mlp.layers.{name}": w for name, w in layers.items()},
    }


def test_names_are_those_of_the_released_sizes():
    with torch.device("meta"):
        network = ImageRewardNetwork()
    counted = [
        (len(part.state_dict()), sum(w.numel() for w in part.state_dict().values()))
        for part in (network.vision, network.text)
    ]
    assert counted == [(294, 303_301_632), (316, 141_977_088)]
    assert network.head.weight.shape == (1, 768)


def test_every_weight_of_the_file_arrives_under_one_name(network):
    weights = original(network, transformer())
    ours = renamed(weights, "the file")
    assert set(ours) == set(network.state_dict())
    kept = {id(weight) for weight in ours.values()}
    left = [name for name, weight in weights.items() if id(weight) not in kept]
    # Left out are what no score depends on and the layers of the head, which became one.
    assert all(n.startswith(("blip.vision_proj", "blip.text_proj", "mlp.")) for n in left[1:])
    assert left[0] == "blip.text_encoder.embeddings.position_ids"


def test_the_image_encoder_is_the_originals(network):
    vision = transformer()
    network.load_original(original(network, vision), "the file")
    pixels = torch.randn(3, 3, 32, 32)
    expected = vision(pixels)
    torch.testing.assert_close(network.vision(pixels).last_hidden_state, expected)


def test_the_head_is_its_five_layers(network, tokenizer):
    weights = original(network, transformer())
    network.load_original(weights, "the file")
    layers = [
        [weights[f"mlp.layers.{n}.{kind}"].double() for kind in ("weight", "bias")] for n in NUMBERS
    ]
    images, prompts = torch.rand(3, 3, 32, 32), ["a red circle", "a blue square", "red"]
    raw = reward(network, tokenizer, scale="raw")
    features = []
    network.head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].double()))
    scores = raw(images, prompts)
    expected = features[0]
    for weight, bias in layers:
        expected = expected @ weight.T + bias
    torch.testing.assert_close(scores.double(), expected.squeeze(1), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("lost", "told"),
    [
        ("blip.visual_encoder.blocks.1.attn.qkv.bias", r"1 missing \(vision.encoder.layers.1"),
        ("blip.text_encoder.encoder.layer.0.crossattention.self.key.weight", "1 missing"),
        ("mlp.layers.4.bias", "the head of ImageReward: mlp.layers.4.bias"),
    ],
)
def test_a_file_that_lacks_a_weight_is_refused(network, lost, told):
    weights = original(network, transformer())
    del weights[lost]
    with pytest.raises(CheckpointError, match=told):
        network.load_original(weights, "the file")


def test_a_file_of_another_network_is_refused(network):
    weights = original(network, transformer()) | {"visual.proj": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"1 unknown \(visual.proj\)"):
        network.load_original(weights, "the file")
    for number in (4, 7):
        short = {n: w for n, w in weights.items() if not n.startswith(f"mlp.layers.{number}.")}
        with pytest.raises(CheckpointError, match="the head of ImageReward"):
            network.load_original(short, "the file")
    turned = weights | {"mlp.layers.2.weight": weights["mlp.layers.2.weight"].T}
    with pytest.raises(CheckpointError, match=r"shapes \[8, 12\], \[8, 6\]"):
        network.load_original({n: w for n, w in turned.items() if n != "visual.proj"}, "the file")
    with pytest.raises(CheckpointError, match="no tensors by name, but list"):
        network.load_original([], "the file")


def test_it_opens_a_file_in_the_released_layout(network, tokenizer, tmp_path, monkeypatch):
    torch.save(original(network, transformer()), tmp_path / "ImageReward.pt")
    for sizes, options in (("_VISION", VISION), ("_TEXT", TEXT)):
        monkeypatch.setattr(image_reward, sizes, getattr(image_reward, sizes) | options)
    opened = ImageReward(pretrained=str(tmp_path), tokenizer=tokenizer)
    tokenizer.save_pretrained(tmp_path / "bert")
    again = from_yaml(
        f"{{class_path: ImageReward, init_args: {{pretrained: {tmp_path}/ImageReward.pt, "
        f"tokenizer: {tmp_path}/bert, scale: standardised, max_tokens: 35, dtype: float32}}}}"
    )
    images, prompts = torch.rand(2, 3, 32, 32), ["a red circle", "a blue square"]
    torch.testing.assert_close(opened(images, prompts), again(images, prompts), rtol=0, atol=0)


def test_what_is_not_at_hand_is_told(network):
    with pytest.raises(CheckpointError, match=r"hf download THUDM/ImageReward ImageReward\.pt"):
        ImageReward()
    with pytest.raises(CheckpointError, match="bert-base-uncased"):
        ImageReward(model=network)


def test_the_text_is_read_in_both_directions(network):
    pixels = torch.randn(1, 3, 32, 32)
    ids, mask = torch.tensor([[2, 5, 6, 8, 3]]), torch.ones(1, 5, dtype=torch.int64)
    seen = network.vision(pixels).last_hidden_state
    changed = ids.clone()
    changed[0, 3] = 9

    def read(ids):
        return network.text(ids, attention_mask=mask, encoder_hidden_states=seen)[0]

    assert (read(ids)[0, :3] - read(changed)[0, :3]).abs().amax(dim=1).min() > 1e-4


def test_the_image_and_every_word_matter_and_padding_does_not(network, tokenizer):
    images = torch.rand(2, 3, 32, 32)
    short, long = (reward(network, tokenizer, max_tokens=n) for n in (8, 35))
    scores = long(images, ["a red circle"] * 2)
    assert scores[0] != scores[1]
    assert long(images, ["a red square"] * 2)[0] != scores[0]
    torch.testing.assert_close(short(images, ["a red circle"] * 2), scores)
    cut = reward(network, tokenizer, max_tokens=5)  # [CLS] a red circle [SEP]
    torch.testing.assert_close(cut(images, ["a red circle"] * 2), scores)
    longer = cut(images, ["a red circle square"] * 2)
    torch.testing.assert_close(longer, scores)


def test_scores_do_not_depend_on_the_batch(network, tokenizer):
    model = reward(network, tokenizer)
    images, prompts = torch.rand(4, 3, 40, 32), ["a", "red circle", "a blue square", "red"]
    scores = checked_scores(model, model(images, prompts), 4)
    alone = torch.cat([model(images[i : i + 1], prompts[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(scores, alone)


def test_standardised_and_raw_scores(network, tokenizer):
    images, prompts = torch.rand(3, 3, 32, 32), ["a", "red circle", "blue square"]
    standardised, raw = reward(network, tokenizer), reward(network, tokenizer, scale="raw")
    assert (standardised.name, raw.name) == ("ImageReward", "ImageReward-raw")
    expected = (raw(images, prompts) - 0.16717362830052426) / 1.0333394966054072
    torch.testing.assert_close(standardised(images, prompts), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_reaches_the_pixels_only(network, tokenizer, dtype):
    model = reward(network, tokenizer, dtype=dtype)
    assert model.model.vision.dtype == getattr(torch, dtype)
    assert model.model.head.weight.dtype == torch.float32
    images = torch.rand(2, 3, 48, 40, requires_grad=True)
    checked_scores(model, model(images, ["a red circle", "a blue square"]), 2).sum().backward()
    assert images.grad.isfinite().all()
    assert (images.grad.abs().amax(dim=(1, 2, 3)) > 0).all()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_bad_options_are_refused(network, tokenizer):
    with pytest.raises(ValueError, match="`scale` must be one of standardised, raw, got 'z'"):
        reward(network, tokenizer, scale="z")
    with pytest.raises(ValueError, match="`max_tokens` must be 2 to 40, got 512"):
        reward(network, tokenizer, max_tokens=512)

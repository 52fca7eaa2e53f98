"""OCR: targets, distances and failures by hand, the recognizers on what they can read here."""

import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torchvision.transforms.functional import to_pil_image, to_tensor
from transformers import (
    GotOcr2Config,
    GotOcr2ForConditionalGeneration,
    GotOcr2ImageProcessor,
    GotOcr2Processor,
    PreTrainedTokenizerFast,
)

from lit_align.hub import CheckpointError
from lit_align.rewards import OCR
from lit_align.rewards.base import checked_scores
from lit_align.rewards.ocr import (
    GOTOCRRecognizer,
    RapidOCRRecognizer,
    edit_distance,
    text_match,
    wanted_text,
)
from tests.rewards.plain_values import from_yaml


class Reads(torch.nn.Module):
    """Reads the texts that it was given; the red of an image's corner says which."""

    def __init__(self, *texts):
        super().__init__()
        self.texts, self.calls = texts, 0

    def forward(self, images):
        self.calls += 1
        return [self.texts[round(float(value) * 255)] for value in images[:, 0, 0, 0]]


def numbered(count):
    images = torch.zeros(count, 3, 4, 4)
    images[:, 0, 0, 0] = torch.arange(count) / 255
    return images


def written(text, size=(256, 96)):
    """An image [3, H, W] of black letters."""
    picture = Image.new("RGB", size, "white")
    font = ImageFont.load_default(36)
    ImageDraw.Draw(picture).text((12, 24), text, fill="black", font=font)
    return to_tensor(picture)


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("ab", "ba", 2),
     ("intention", "execution", 5)],
)  # fmt: skip
def test_edit_distances(first, second, distance):
    assert edit_distance(first, second) == distance
    assert edit_distance(second, first) == distance


@pytest.mark.parametrize(
    ("read", "target", "score", "exact"),
    [
        ("Open Late", "open late", 1, 1),
        ("open\nla te", "OPENLATE", 1, 1),
        ("opan", "open", 3 / 4, 3 / 4),
        ("", "open", 0, 0),
        # Five of four letters are wrong, of which four count.
        ("xxxxx", "open", 0, 0),
        # Among other text: contained, and three letters too many.
        ("reopens", "open", 1, 1 / 4),
        ("open open", "open", 1, 0),
    ],
)
def test_matches_by_hand(read, target, score, exact):
    assert text_match(read, target) == pytest.approx(score)
    assert text_match(read, target, exact=True) == pytest.approx(exact)


@pytest.mark.parametrize(
    ("prompt", "metadata", "text"),
    [
        ('a sign "Open" by "Bob"', None, "Open"),
        ('a sign "Open"', {"text": "Closed"}, "Closed"),
        ('a sign "Open"', {"text": None, "tag": 1}, "Open"),
        ("a sign", {}, None),
        ('an empty sign ""', None, None),
        ('a sign " " and "Open"', None, None),
        ('a sign "Open', None, None),
        ('a sign "Open"', {"text": ""}, None),
    ],
)
def test_the_target_stands_in_the_prompt_or_its_metadata(prompt, metadata, text):
    assert wanted_text(prompt, metadata) == text


def test_a_target_is_text():
    with pytest.raises(TypeError, match=r"'text' of 'a sign' must be a string, got \['a', 'b'\]"):
        wanted_text("a sign", {"text": ["a", "b"]})


def test_scores_and_what_cannot_be_scored():
    reads = Reads("open", "", None, "opens", "open", "open")
    images = numbered(6)
    images[4, 1, 1, 1] = torch.nan
    prompts = ['a sign "Open"'] * 5 + ["a sign"]
    reward = OCR(reads)
    scores = checked_scores(reward, reward(images, prompts), 6).tolist()
    assert scores == pytest.approx([1, 0, torch.nan, 1, torch.nan, torch.nan], nan_ok=True)
    exact = OCR(reads, exact=True)(images, prompts)
    assert exact[3].item() == pytest.approx(3 / 4)
    assert (reward.name, OCR(reads, exact=True).name) == ("OCR", "OCR-exact")
    known = reward(images[:2], ["a sign"] * 2, [{"text": "open"}, None]).tolist()
    assert known == pytest.approx([1, torch.nan], nan_ok=True)


def test_images_without_a_target_are_not_read():
    reads = Reads("open")
    assert OCR(reads)(numbered(1), ["a sign"]).isnan().all()
    assert reads.calls == 0


def test_a_recognizer_answers_for_every_image():
    class Forgets(torch.nn.Module):
        def forward(self, images):
            return ["open"]

    with pytest.raises(ValueError, match="Forgets must return one text or None per image, got 1"):
        OCR(Forgets())(numbered(2), ['"a"', '"b"'])


# RapidOCR.


def test_rapidocr_gets_blue_first_and_its_lines_are_joined():
    seen = []

    def engine(pixels):
        seen.append(pixels)
        return SimpleNamespace(txts=("two", "lines") if len(seen) == 1 else None)

    images = torch.zeros(2, 3, 5, 7)
    images[0, 0] = 1  # red
    assert RapidOCRRecognizer(engine)(images) == ["two lines", ""]
    assert (seen[0].shape, str(seen[0].dtype)) == ((5, 7, 3), "uint8")
    assert seen[0][0, 0].tolist() == [0, 0, 255]


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(ImportError, match=r'pip install "lit-align\[ocr\]".*GOTOCRRecognizer'):
        OCR()


def test_rapidocr_reads_letters():
    pytest.importorskip("rapidocr", reason="the extra `ocr` is not installed")
    images = torch.stack([written("HELLO"), written("world"), torch.ones(3, 96, 256)])
    scores = OCR(exact=True)(images, ['"Hello"', '"hello"', '"hello"'])
    # "world" and "hello" share the fourth letter only.
    assert scores.tolist() == pytest.approx([1, 1 / 5, 0])


# GOT-OCR, tiny and random.

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<imgpad>"]


@pytest.fixture(scope="module")
def processor():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=letters,
        pad_token=SPECIAL[0],
        padding_side="left",
        additional_special_tokens=SPECIAL[1:],
    )
    return GotOcr2Processor(GotOcr2ImageProcessor(size={"height": 1024, "width": 1024}), tokenizer)


@pytest.fixture(scope="module")
def network(processor):
    torch.manual_seed(0)
    tokenizer = processor.tokenizer
    config = GotOcr2Config(
        text_config={
            "model_type": "qwen2", "vocab_size": len(tokenizer), "hidden_size": 16,
            "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "hidden_size": 8, "mlp_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "output_channels": 8, "global_attn_indexes": [],
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<imgpad>"),
    )  # fmt: skip
    model = GotOcr2ForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=1.0)
    return model


def test_got_ocr_writes_what_its_own_example_writes(network, processor):
    images = torch.stack([written("HELLO").round(), torch.zeros(3, 96, 256), torch.eye(3)[0]
                          [:, None, None].expand(3, 96, 256)])  # fmt: skip
    read = GOTOCRRecognizer(model=network, processor=processor, max_new_tokens=4, batch_size=2)
    texts = read(images)
    expected = []
    for image in images:
        inputs = processor(to_pil_image(image), return_tensors="pt")
        tokens = network.generate(**inputs, do_sample=False, max_new_tokens=4)
        answer = tokens[0, inputs["input_ids"].shape[1] :]
        expected.append(processor.decode(answer, skip_special_tokens=True))
    assert texts == expected
    assert len(set(texts)) > 1


def test_the_command_line_opens_it_from_plain_values(network, processor, tmp_path):
    network.save_pretrained(tmp_path / "got")
    processor.save_pretrained(tmp_path / "got")
    reward = from_yaml(
        "{class_path: OCR, init_args: {exact: true, recognizer: {class_path: ocr.GOTOCRRecognizer, "
        f"init_args: {{pretrained: {tmp_path}/got, max_new_tokens: 3}}}}}}}}"
    )
    assert reward.name == "OCR-exact"
    scores = reward(torch.rand(2, 3, 64, 64), ['a "sign"', "a sign"])
    assert scores.isnan().tolist() == [False, True]


def test_bad_got_ocr_options_are_refused(network):
    with pytest.raises(CheckpointError, match="hf download stepfun-ai/GOT-OCR-2.0-hf"):
        GOTOCRRecognizer()
    with pytest.raises(ValueError, match="needs its `processor`"):
        GOTOCRRecognizer(model=network)
    for option in ("max_new_tokens", "batch_size"):
        with pytest.raises(ValueError, match=f"`{option}` must be at least 1, got 0"):
            GOTOCRRecognizer(**{option: 0})

"""Rewards of the CLIP family: scales, precision, pixels, text, and the files they come from."""

import inspect

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image
from transformers import CLIPImageProcessor, CLIPModel

from lit_align.functional.pixels import CLIP_STD
from lit_align.hub import CheckpointError
from lit_align.rewards import CLIPScore, PickScore, RewardModule
from lit_align.rewards.base import checked_scores
from lit_align.rewards.pretrained import PromptCache
from tests.rewards.clip_models import MAKE, SIDE, WITH_TEXT, clip_model, linear_head, tokenizer

ATOL = 1e-5
PARITY = 5e-3  # of pixels in [0, 1]
PROMPTS = ["a red circle", "two small blue squares", "a red circle"]
LONG = "a red circle and " * 40


def images(count=3, height=40, width=SIDE):
    shape = (count, 3, height, width)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def cosines(model, words, pixels, prompts):
    """Return the cosines of transformers' own forward, whose embeddings are unit vectors."""
    ids = words(list(prompts), padding=True, return_tensors="pt").input_ids
    found = model(input_ids=ids, pixel_values=pixels)
    return (found.image_embeds * found.text_embeds).sum(1), found.logits_per_image.diagonal()


@pytest.mark.parametrize("name", MAKE)
def test_scores_keep_the_contract_and_have_a_gradient(name):
    reward = MAKE[name]()
    assert reward.name == name
    pixels = images().requires_grad_()
    scores = checked_scores(reward, reward(pixels, PROMPTS), 3)
    assert scores.isfinite().all()
    assert scores.std() > 0
    scores.sum().backward()
    assert pixels.grad.isfinite().all()
    assert (pixels.grad.flatten(1).abs().sum(1) > 0).all()
    assert not any(p.requires_grad for p in reward.parameters())


@pytest.mark.parametrize("name", MAKE)
def test_a_score_depends_neither_on_the_others_nor_on_their_order(name):
    reward = MAKE[name]()
    together = reward(images(), PROMPTS)
    alone = torch.cat([reward(images()[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=ATOL, rtol=0)
    order = [2, 0, 1]
    moved = MAKE[name]()(images()[order], [PROMPTS[i] for i in order])
    if name != "AestheticScore-v1":  # its head is drawn anew
        torch.testing.assert_close(together[order], moved, atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", MAKE)
def test_an_image_that_cannot_be_scored_is_nan_and_alone_with_it(name):
    broken = images()
    broken[1, 0, 20, 20] = torch.nan
    scores = MAKE[name]()(broken, PROMPTS)
    assert scores.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["AestheticScore-v2", *WITH_TEXT])
def test_a_half_precision_tower_moves_scores_little_and_does_not_round_them(name, dtype):
    scale = {"scale": "cosine"} if name == "PickScore" else {}
    exact, rough = MAKE[name](**scale), MAKE[name](**scale, dtype=dtype)
    pixels, prompts = images(16), PROMPTS[:2] * 8
    difference = rough(pixels, prompts) - exact(pixels, prompts)
    assert difference.dtype == torch.float32
    assert 0 < difference.abs().mean() < (2e-2 if name.startswith("Aesthetic") else 4e-3)
    scores = rough(pixels, prompts)
    assert (scores != scores.to(getattr(torch, dtype)).float()).any(), "the cosine is float32"


def test_what_follows_a_half_precision_tower_is_float32():
    reward = MAKE["AestheticScore-v2"](dtype="bfloat16")
    assert {p.dtype for p in reward.vision_model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in reward.head.parameters()} == {torch.float32}
    reward = MAKE["PickScore"](dtype="bfloat16")
    assert {p.dtype for p in reward.tower.model.text_model.parameters()} == {torch.bfloat16}
    assert reward.tower.logit_scale.dtype == torch.float32


@pytest.mark.parametrize("name", MAKE)
def test_autocast_around_a_reward_changes_nothing(name):
    reward = MAKE[name]()
    expected = reward(images(), PROMPTS)
    if name in WITH_TEXT:
        reward.texts = PromptCache()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(reward(images(), PROMPTS), expected)


def test_scales_of_pick_score():
    model, words = clip_model(), tokenizer()
    reward = {s: PickScore(scale=s, model=model, tokenizer=words) for s in PickScore.scales}
    pixels = reward["logit"].tower.pixels(images())
    cosine, logit = cosines(model, words, pixels, PROMPTS)
    expected = {"logit": logit, "cosine": cosine, "flow_grpo": logit / 26}
    for scale, scores in expected.items():
        found = reward[scale](images(), PROMPTS)
        torch.testing.assert_close(found, scores, atol=ATOL, rtol=1e-5)
    names = [r.name for r in reward.values()]
    assert names == ["PickScore", "PickScore-cosine", "PickScore-flow_grpo"]


def test_scales_of_clip_score():
    model, words = clip_model(), tokenizer()
    reward = {s: CLIPScore(scale=s, model=model, tokenizer=words) for s in CLIPScore.scales}
    pixels = reward["cosine"].tower.pixels(images(16))
    prompts = PROMPTS[:2] * 8
    cosine, _ = cosines(model, words, pixels, prompts)
    prefixed, _ = cosines(model, words, pixels, [f"A photo depicts {p}" for p in prompts])
    assert (prefixed < 0).any(), "there is something to clip"
    assert (prefixed > 0).any(), "there is something to keep"
    expected = {"cosine": cosine, "100": 100 * cosine, "hessel": 2.5 * prefixed.clamp(min=0)}
    for scale, scores in expected.items():
        found = reward[scale](images(16), prompts)
        torch.testing.assert_close(found, scores, atol=ATOL, rtol=1e-5)
    bare = CLIPScore(scale="hessel", prefix="", model=model, tokenizer=words)
    torch.testing.assert_close(
        bare(images(16), prompts), 2.5 * cosine.clamp(min=0), atol=ATOL, rtol=0
    )
    assert [r.name for r in reward.values()] == ["CLIPScore", "CLIPScore-100", "CLIPScore-hessel"]


def test_hps_is_the_cosine_of_open_clip_with_its_tokenizer():
    import open_clip

    reward = MAKE["HPSv2.1"]()
    square = images(3, SIDE, SIDE)
    mean, std = (torch.tensor(v)[:, None, None] for v in (open_clip.OPENAI_DATASET_MEAN, CLIP_STD))
    tokens = open_clip.get_tokenizer("ViT-H-14")(PROMPTS)
    found = reward.model((square - mean) / std, tokens)
    cosine = (found["image_features"] * found["text_features"]).sum(1)
    torch.testing.assert_close(reward(square, PROMPTS), cosine, atol=ATOL, rtol=0)


def test_without_antialiasing_hps_scores_differ_and_the_name_tells():
    large = images(3, 200, 200)
    plain, smooth = MAKE["HPSv2.1"](antialias=False), MAKE["HPSv2.1"]()
    assert (plain(large, PROMPTS) - smooth(large, PROMPTS)).abs().min() > 1e-4
    assert (plain.name, MAKE["HPSv2.1"](version="v2.0").name) == ("HPSv2.1-aliased", "HPSv2.0")


def picture(height, width):
    """Return a picture [H, W, 3] uint8 with edges and noise."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST))
    noisy = image.astype(int) + generator.integers(-40, 40, image.shape)
    return noisy.clip(0, 255).astype(np.uint8)


def seen_by(reward, owner, method, image):
    """Return the pixels [3, S, S] that the network of a reward gets, in units of [0, 1]."""
    seen = []
    original = getattr(owner, method)

    def watch(*arguments, **options):
        seen.append(next(iter((*arguments, *options.values()))))
        return original(*arguments, **options)

    setattr(owner, method, watch)
    reward(torch.from_numpy(image).permute(2, 0, 1)[None] / 255, PROMPTS[:1])
    return seen[0][0] * torch.tensor(CLIP_STD)[:, None, None]


@pytest.mark.parametrize("sides", [(512, 512), (512, 768), (640, 320)])
@pytest.mark.parametrize("name", ["AestheticScore-v2", "CLIPScore", "PickScore"])
def test_networks_see_what_the_processor_of_clip_shows_them(name, sides):
    reward, image = MAKE[name](), picture(*sides)
    vision = reward.vision_model if name.startswith("A") else reward.tower.model.vision_model
    processor = CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    expected = processor(Image.fromarray(image), return_tensors="pt").pixel_values[0]
    expected = expected * torch.tensor(CLIP_STD)[:, None, None]
    assert (seen_by(reward, vision, "forward", image) - expected).abs().mean() < PARITY


@pytest.mark.parametrize("sides", [(512, 512), (512, 768), (640, 320)])
def test_hps_sees_the_whole_image_on_black(sides):
    from open_clip import OPENAI_DATASET_MEAN

    reward, image = MAKE["HPSv2.1"](), picture(*sides)
    height, width = (round(side * SIDE / max(sides)) for side in sides)
    small = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    board = Image.new("RGB", (SIDE, SIDE))
    board.paste(small, ((SIDE - width) // 2, (SIDE - height) // 2))
    expected = torch.from_numpy(np.asarray(board).copy()).permute(2, 0, 1) / 255
    expected = expected - torch.tensor(OPENAI_DATASET_MEAN)[:, None, None]
    found = seen_by(reward, reward.model, "encode_image", image)
    assert (found - expected).abs().mean() < PARITY


@pytest.mark.parametrize("name", WITH_TEXT)
def test_a_prompt_is_cut_after_77_tokens(name):
    reward = MAKE[name]()
    one, other = (reward(images(1), [LONG + end]) for end in ("circle", "square"))
    assert torch.equal(one, other)
    assert (one - reward(images(1), ["two " + LONG])).abs() > ATOL


@pytest.mark.parametrize("name", WITH_TEXT)
def test_the_text_of_a_prompt_is_encoded_once(name):
    reward = MAKE[name]()
    text = reward.model.token_embedding if name == "HPSv2.1" else reward.tower.model.text_model
    rows = []
    text.register_forward_pre_hook(
        lambda _, given, named: rows.append(len(named["input_ids"] if named else given[0])),
        with_kwargs=True,
    )
    reward(images(), PROMPTS)
    reward(images(), PROMPTS[::-1])
    assert rows == [2], "two different prompts in one forward"
    reward(images(2), ["a square", "a red circle"])
    assert rows == [2, 1]


@pytest.mark.parametrize("name", WITH_TEXT)
def test_text_from_validation_serves_a_gradient_later(name):
    reward = MAKE[name]()
    with torch.inference_mode():
        reward(images(), PROMPTS)
    pixels = images().requires_grad_()
    reward(pixels, PROMPTS).sum().backward()
    assert pixels.grad.abs().sum() > 0


@pytest.mark.parametrize("name", MAKE)
def test_embeddings_of_images_are_unit_vectors(name):
    """What measures diversity with a reward asks for them."""
    embeddings = MAKE[name]().embed_images(images())
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3))


@pytest.fixture
def folder(tmp_path):
    """Return a folder as transformers writes it of a CLIP and its tokenizer."""
    clip_model().save_pretrained(tmp_path / "clip")
    tokenizer().save_pretrained(tmp_path / "clip")
    torch.save(linear_head(), tmp_path / "v1.pth")
    return tmp_path / "clip"


def from_yaml(text):
    """Return the reward that a configuration names, as the command line makes it."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(RewardModule, "reward")
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # 4.48
    return instantiate(parser.parse_string(text)).reward


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ("class_path: CLIPScore, init_args: {{pretrained: {folder}}}", "CLIPScore"),
        ("class_path: CLIPScore, init_args: {{pretrained: {folder}, scale: '100'}}",
         "CLIPScore-100"),
        ("class_path: CLIPScore, init_args: {{pretrained: {folder}, scale: 100}}",
         "CLIPScore-100"),
        ("class_path: PickScore, init_args: {{pretrained: {folder}, tokenizer: {folder}, "
         "scale: cosine}}", "PickScore-cosine"),
        ("class_path: AestheticScore, init_args: {{version: v1, backbone: {folder}, "
         "checkpoint: {folder}/../v1.pth, dtype: bfloat16}}", "AestheticScore-v1"),
    ],
)  # fmt: skip
def test_the_command_line_opens_them_from_plain_values(options, name, folder):
    text = options.format(folder=folder).replace("class_path: ", "class_path: lit_align.rewards.")
    reward = from_yaml(f"reward: {{{text}}}")
    assert reward.name == name
    assert reward(images(), PROMPTS).isfinite().all()


def test_opened_from_a_folder_it_scores_as_its_model(folder):
    expected = PickScore(model=CLIPModel.from_pretrained(folder), tokenizer=tokenizer())
    opened = PickScore(str(folder), str(folder))
    torch.testing.assert_close(opened(images(), PROMPTS), expected(images(), PROMPTS))


def test_a_checkpoint_without_some_weights_is_refused(tmp_path):
    model = clip_model()
    stored = {n: t for n, t in model.state_dict().items() if not n.startswith("text_projection")}
    model.save_pretrained(tmp_path, state_dict=stored)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"lacks 1 weights of a CLIPModel, such as 'text_pro"):
        CLIPScore(str(tmp_path))


def test_defaults_that_are_not_here_name_what_to_fetch():
    for make, told in (
        (CLIPScore, "openai/clip-vit-large-patch14"),
        (PickScore, "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
        (lambda: PickScore(tokenizer=tokenizer()), "yuvalkirstain/PickScore_v1"),
    ):
        with pytest.raises(CheckpointError, match=rf"'{told}' is not on this machine.*`hf downl"):
            make()
    with pytest.raises(ValueError, match=r"`scale` must be one of logit, .*, got 'percent'"):
        PickScore(scale="percent")
    with pytest.raises(ValueError, match=r"needs its `tokenizer`"):
        CLIPScore(model=clip_model())


@pytest.mark.parametrize("name", MAKE)
def test_every_argument_has_a_default(name):
    parameters = inspect.signature(type(MAKE[name]()).__init__).parameters.values()
    assert all(p.default is not inspect.Parameter.empty for p in list(parameters)[1:])

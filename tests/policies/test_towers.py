import json

import open_clip
import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel

from lit_align.policies import CLIPTower, OpenCLIPTower, TemporalCritic
from lit_align.policies.towers import CLIP_MEAN, CLIP_STD

SIDE = 16
WIDTH = 12
NAME = "lit-align-tiny"


def clip_model():
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
    }
    text = {"vocab_size": 10, "max_position_embeddings": 4, "bos_token_id": 1, "eos_token_id": 2,
            "pad_token_id": 0, **sizes}  # fmt: skip
    vision = {"image_size": SIDE, "patch_size": 8, **sizes}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


def open_clip_config(width=16):
    vision = {"image_size": SIDE, "patch_size": 8, "width": width, "head_width": 8, "layers": 1}
    text = {"context_length": 4, "vocab_size": 10, "width": 16, "heads": 2, "layers": 1}
    return {"embed_dim": WIDTH, "vision_cfg": vision, "text_cfg": text}


def open_clip_model():
    model = open_clip.CLIP(**open_clip_config())
    torch.nn.init.normal_(model.visual.proj)
    return model


@pytest.fixture(scope="module", autouse=True)
def _tiny_model(tmp_path_factory):
    """Let open_clip know a tiny architecture by name."""
    path = tmp_path_factory.mktemp("configs") / f"{NAME}.json"
    path.write_text(json.dumps(open_clip_config()))
    open_clip.add_model_config(path)


KINDS = {
    "transformers": lambda **options: CLIPTower(model=clip_model(), **options),
    "open_clip": lambda **options: OpenCLIPTower(model=open_clip_model(), **options),
}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_unit_vectors_in_float32_and_nothing_is_trained(kind, dtype):
    tower = KINDS[kind](dtype=dtype)
    for sides in ((SIDE, SIDE), (40, 24), (8, 12)):
        embeddings = tower.embed_images(torch.rand(3, 3, *sides))
        assert embeddings.shape == (3, WIDTH)
        assert embeddings.dtype == torch.float32
        torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3))
    parameters = list(tower.parameters())
    assert parameters
    assert not any(p.requires_grad for p in parameters)
    assert {p.dtype for p in parameters} == {getattr(torch, dtype)}
    assert not any(part.training for part in tower.children())


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_the_images(kind):
    images = torch.rand(2, 3, 24, 24, requires_grad=True)
    KINDS[kind]().embed_images(images)[:, 0].sum().backward()
    assert images.grad.abs().sum() > 0


def test_an_image_of_the_towers_size_is_only_normalised():
    images = torch.rand(4, 3, SIDE, SIDE)
    mean, std = (torch.tensor(x)[:, None, None] for x in (CLIP_MEAN, CLIP_STD))
    pixels = (images - mean) / std

    model = clip_model().eval()
    pooled = model.vision_model(pixel_values=pixels).pooler_output
    expected = F.normalize(model.visual_projection(pooled), dim=-1)
    found = CLIPTower(model=model).embed_images(images)
    assert (F.cosine_similarity(found, expected) > 1 - 1e-6).all()

    model = open_clip_model().eval()
    expected = model.encode_image(pixels, normalize=True)
    found = OpenCLIPTower(model=model).embed_images(images)
    assert (F.cosine_similarity(found, expected) > 1 - 1e-6).all()


def denormalised(pixels, tower):
    mean, std = (torch.tensor(values)[:, None, None] for values in (tower.mean, tower.std))
    return pixels * std + mean


def test_images_are_scaled_to_the_short_side_and_cropped_in_the_centre():
    tower = CLIPTower(model=clip_model())
    images = torch.rand(2, 3, SIDE, 30)
    torch.testing.assert_close(
        tower.embed_images(images), tower.embed_images(images[..., 7 : 7 + SIDE])
    )
    # Flat stripes: the centre of the enlarged image is flat, too.
    striped = torch.zeros(1, 3, 64, 192)
    striped[..., 64:128] = 0.75
    seen = []
    tower.features = lambda pixels: seen.append(pixels) or torch.ones(len(pixels), 1)
    tower.embed_images(striped)
    (pixels,) = seen
    assert pixels.shape == (1, 3, SIDE, SIDE)
    centre = denormalised(pixels, tower)[..., 4:-4]
    torch.testing.assert_close(centre, torch.full_like(centre, 0.75))


def test_resized_pixels_stay_in_range():
    tower = CLIPTower(model=clip_model())
    seen = []
    tower.features = lambda pixels: seen.append(pixels) or torch.ones(len(pixels), 1)
    tower.embed_images(torch.rand(8, 3, 7, 7).round())
    pixels = denormalised(seen[0], tower)
    assert pixels.min() > -1e-6
    assert pixels.max() < 1 + 1e-6


def test_preprocessing_is_close_to_that_of_the_library():
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    pixels = F.interpolate(torch.rand(2, 3, 6, 5), (48, 36), mode="bilinear").mul(255).byte()
    images = [image.permute(1, 2, 0).numpy() for image in pixels]
    expected = processor(images=images, return_tensors="pt").pixel_values
    tower = CLIPTower(model=clip_model())
    seen = []
    tower.features = lambda pixels: seen.append(pixels) or torch.ones(len(pixels), 1)
    tower.embed_images(pixels / 255)
    # The library rounds to bytes after resizing, 1 / 255 in units of the standard deviation.
    assert (seen[0] - expected).abs().max() < 2 / 255 / min(CLIP_STD)


def test_clip_is_opened_from_a_folder(tmp_path):
    model = clip_model()
    model.save_pretrained(tmp_path)
    images = torch.rand(2, 3, 20, 20)
    torch.testing.assert_close(
        CLIPTower(str(tmp_path)).embed_images(images), CLIPTower(model=model).embed_images(images)
    )


def test_clip_without_its_image_tower_is_refused(tmp_path):
    model = clip_model()
    stored = {n: t for n, t in model.state_dict().items() if not n.startswith("visual_projection")}
    model.save_pretrained(tmp_path, state_dict=stored)
    with pytest.raises(ValueError, match="'visual_projection.weight'; give a whole CLIPModel"):
        CLIPTower(str(tmp_path))


@pytest.mark.parametrize("form", ["state_dict", "bare", "module"])
def test_open_clip_reads_a_checkpoint_file(tmp_path, form):
    model = open_clip_model()
    stored = model.state_dict()
    if form == "module":
        stored = {f"module.{name}": tensor for name, tensor in stored.items()}
    path = tmp_path / "tiny.pt"
    torch.save(stored if form == "bare" else {"state_dict": stored, "epoch": 3}, path)
    images = torch.rand(2, 3, 20, 20)
    torch.testing.assert_close(
        OpenCLIPTower(NAME, str(path)).embed_images(images),
        OpenCLIPTower(model=model).embed_images(images),
    )


def test_open_clip_refuses_what_does_not_fit(tmp_path):
    path = tmp_path / "wide.pt"
    torch.save({"state_dict": open_clip.CLIP(**open_clip_config(width=32)).state_dict()}, path)
    with pytest.raises(ValueError, match=f"does not hold the image tower of {NAME}; set"):
        OpenCLIPTower(NAME, str(path))
    torch.save({"logit_scale": torch.zeros(())}, path)
    with pytest.raises(ValueError, match="Missing key"):
        OpenCLIPTower(NAME, str(path))
    with pytest.raises(ValueError, match="no model 'ViT-H14'; near: .*ViT-H-14"):
        OpenCLIPTower("ViT-H14")
    with pytest.raises(ValueError, match="no file 'HPS.pt'.* one of: .*laion2b_s32b_b79k"):
        OpenCLIPTower("ViT-H-14", "HPS.pt")
    with pytest.raises(ValueError, match="`dtype` must be one of float32, .*, got 'half'"):
        OpenCLIPTower(model=open_clip_model(), dtype="half")


def test_open_clips_own_normalisation_is_kept():
    model = open_clip_model()
    config = {"size": SIDE, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    open_clip.set_model_preprocess_cfg(model, config)
    tower = OpenCLIPTower(model=model)
    assert list(tower.mean) == [0.5] * 3
    assert list(tower.std) == [0.25] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_critic_finds_the_towers_width(kind):
    critic = TemporalCritic(KINDS[kind](), hidden=(8, 4), dropout=(0.2,))
    assert critic.init_std == 1 / (WIDTH + 1)
    embeddings = critic.embed(torch.rand(5, 3, 24, 24))
    assert embeddings.shape == (5, WIDTH)
    assert not embeddings.requires_grad
    assert critic(embeddings).shape == (5,)
    assert not any("tower" in name for name in critic.state_dict())

"""What released rewards share: names, precision, cached text, strict files."""

import pytest
import torch
from torch import nn

from lit_align.hub import CheckpointError
from lit_align.rewards.base import checked_scores
from lit_align.rewards.pretrained import PretrainedReward, PromptCache, load_strictly, read_weights


class Brightness(PretrainedReward):
    """One over a linear layer of the mean colour."""

    versions = ("v2", "v1")
    scales = ("plain", "percent")

    def __init__(self, **options):
        super().__init__(**options)
        self.layer = self.frozen(nn.Linear(3, 1))

    def score(self, images, prompts):
        means = images.mean((2, 3)).to(self.dtype)
        return 1 / self.layer(means).squeeze(1)


def encoder(calls):
    """Return an encoder of prompts into their length, which notes what it is asked."""

    def encode(prompts):
        calls.append(list(prompts))
        return torch.tensor([[len(prompt), 1.0] for prompt in prompts])

    return encode


def test_names_tell_version_and_scale():
    assert Brightness().name == "Brightness-v2"
    assert Brightness(version="v1", scale="percent").name == "Brightness-v1-percent"
    assert (Brightness().version, Brightness().scale) == ("v2", "plain")


@pytest.mark.parametrize("argument", ["version", "scale", "dtype"])
def test_unknown_words_are_refused(argument):
    with pytest.raises(ValueError, match=rf"`{argument}` must be one of .*, got 'half'"):
        Brightness(**{argument: "half"})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_scores_are_float32_and_networks_frozen_in_their_dtype(dtype):
    reward = Brightness(dtype=dtype)
    images = torch.rand(3, 3, 4, 4, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        checked_scores(reward, reward(images, ["a"] * 3), 3)
    assert {p.dtype for p in reward.parameters()} == {getattr(torch, dtype)}
    assert not any(p.requires_grad for p in reward.parameters())
    assert not reward.train().layer.training


def test_a_score_that_is_not_finite_is_nan():
    reward = Brightness()
    nn.init.zeros_(reward.layer.bias)
    nn.init.ones_(reward.layer.weight)
    images = torch.ones(3, 3, 4, 4)
    images[1] = 0
    torch.testing.assert_close(
        reward(images, ["a"] * 3), torch.tensor([1 / 3, torch.nan, 1 / 3]), equal_nan=True
    )


def test_equal_prompts_are_encoded_once_and_missing_ones_together():
    calls = []
    cache, encode = PromptCache(), encoder(calls)
    first = cache(["aa", "b", "aa"], encode, "cpu")
    assert first[:, 0].tolist() == [2, 1, 2]
    assert cache(["b", "ccc", "aa", "b"], encode, "cpu")[:, 0].tolist() == [1, 3, 2, 1]
    assert calls == [["aa", "b"], ["ccc"]]


def test_the_least_recently_used_prompt_goes_first():
    calls = []
    cache, encode = PromptCache(size=2), encoder(calls)
    cache(["a"], encode, "cpu")
    cache(["b"], encode, "cpu")
    cache(["a"], encode, "cpu")
    cache(["c"], encode, "cpu")  # "b" goes
    cache(["a", "c", "b"], encode, "cpu")  # more than there is room for is answered all the same
    assert calls == [["a"], ["b"], ["c"], ["b"]]
    assert len(cache) == 2
    with pytest.raises(ValueError, match=r"`size` must be at least 1, got 0"):
        PromptCache(size=0)


def test_cached_features_hold_no_graph_and_serve_one_later():
    weight = torch.ones(2, requires_grad=True)
    cache = PromptCache()
    with torch.inference_mode():
        cache(["a"], lambda prompts: torch.ones(len(prompts), 2) * weight, "cpu")
    features = cache(["a", "b"], lambda prompts: torch.ones(len(prompts), 2) * weight, "cpu")
    assert not features.requires_grad
    image = torch.ones(2, requires_grad=True)
    (features * image).sum().backward()
    assert image.grad.tolist() == [2, 2]
    assert weight.grad is None


def test_features_follow_the_device():
    cache = PromptCache()
    cache(["a"], encoder([]), "cpu")
    assert cache(["a"], encoder([]), "meta").device.type == "meta"


def test_a_dropped_prompt_does_not_keep_the_memory_of_its_batch():
    cache = PromptCache()
    cache(["a", "b", "c"], encoder([]), "cpu")
    sizes = {row.untyped_storage().nbytes() for row in cache._kept.values()}
    assert sizes == {8}


def test_weights_are_loaded_strictly():
    network = nn.Linear(3, 1)
    weights = {"weight": torch.ones(1, 3), "bias": torch.ones(1)}
    load_strictly(network, {**weights, "extra": torch.ones(1)}, "'it'", extras=("extra",))
    assert network.weight.tolist() == [[1, 1, 1]]
    faulty = {"weight": torch.ones(1, 4), "more": torch.ones(1)}
    with pytest.raises(CheckpointError) as caught:
        load_strictly(network, faulty, "'it'")
    assert str(caught.value) == (
        "'it' does not hold the weights of this network: 1 missing (bias); 1 unknown (more); "
        "1 of another shape (weight)."
    )
    with pytest.raises(CheckpointError, match="'it' holds no tensors by name, but list"):
        load_strictly(network, [], "'it'")


def test_damaged_files_and_code_are_refused(tmp_path):
    (tmp_path / "text.pt").write_text("no weights")
    torch.save(nn.Linear(1, 1), tmp_path / "module.pt")
    torch.save({"a": torch.ones(1)}, tmp_path / "weights.pt")
    for name in ("text.pt", "module.pt"):
        with pytest.raises(CheckpointError, match=rf"{name}' is damaged or no file of weights"):
            read_weights(tmp_path / name)
    assert read_weights(tmp_path / "weights.pt")["a"].tolist() == [1]

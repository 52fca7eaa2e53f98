"""Prompts that are encoded once, by encoders that need not stay on the device."""

from collections import Counter

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_align.algorithms import DenoisingPretraining
from lit_align.policies import DiffusionPolicy, SD3Policy
from lit_align.policies.text_cache import TextCache
from tests.algorithms.harness import fit, make_ddpo
from tests.conftest import tiny_pipeline, tiny_policy

PROMPTS = ["a red circle", "", "two small blue squares", "a red circle"]
ALL = pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux", "wan"])
# Calls for the empty prompt: its embeddings are zero in XL, and Flux has none.
NEGATIVES = {"sd": 1, "sdxl": 0, "sd3": 1, "flux": 0, "wan": 1}
CPU = torch.device("cpu")


def rows_of(policy, encoder=0):
    """Return a list that grows by the rows of each call of one of the policy's text encoders."""
    rows = []
    policy.text_encoders[encoder].register_forward_pre_hook(
        lambda module, inputs: rows.append(len(inputs[0])), with_kwargs=False
    )
    return rows


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
        assert found[name].dtype == value.dtype, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{"cache_text": 8},
                                     {"cache_text": 2, "offload_text_encoders": True}])  # fmt: skip
@ALL
def test_kept_embeddings_are_those_of_each_prompt_alone(family, options, dtype):
    """Bit by bit, whatever was kept; those of a batch differ by the rounding of its kernels."""
    plain, policy = tiny_policy(family, dtype=dtype), tiny_policy(family, dtype=dtype, **options)
    for prompts in (PROMPTS, PROMPTS[::-1], ["a triangle", *PROMPTS[:2]], [""]):
        found = policy.encode_prompt(prompts)
        alone = [plain.encode_prompt([prompt]) for prompt in prompts]
        assert_equal(found, {key: torch.cat([one[key] for one in alone]) for key in alone[0]})
        tolerance = {"float32": 1e-5, "bfloat16": 0.05}[dtype]
        for key, value in plain.encode_prompt(prompts).items():
            torch.testing.assert_close(found[key], value, atol=tolerance, rtol=tolerance)


@ALL
def test_embeddings_by_offloaded_encoders_are_bit_equal(family):
    plain, policy = tiny_policy(family), tiny_policy(family, offload_text_encoders=True)
    for prompts in (PROMPTS, PROMPTS[:1]):
        assert_equal(policy.encode_prompt(prompts), plain.encode_prompt(prompts))


@ALL
def test_each_prompt_is_encoded_once(family):
    policy = tiny_policy(family, cache_text=8)
    rows = rows_of(policy)
    policy.encode_prompt(PROMPTS)
    assert rows == [1] * (3 + NEGATIVES[family])  # three distinct ones, and the empty prompt
    policy.encode_prompt(PROMPTS[::-1])
    policy.encode_prompt(PROMPTS[:1])
    assert sum(rows) == 3 + NEGATIVES[family]
    policy.encode_prompt(["a triangle", *PROMPTS])
    assert sum(rows) == 4 + NEGATIVES[family]


class Letters:
    """Encodes a prompt as its length, and counts."""

    def __init__(self):
        self.seen = Counter()
        self.encoders = torch.nn.ModuleList()

    def __call__(self, prompts, with_negative):
        self.seen.update(prompts)
        lengths = torch.tensor([[float(len(prompt))] for prompt in prompts])
        self.seen["negative"] += with_negative
        return {"x": lengths} | ({"negative_x": -torch.ones_like(lengths)} if with_negative else {})

    def ask(self, cache, *prompts):
        found = cache.encode(self, self.encoders, prompts, CPU)
        assert found["x"].tolist() == [[float(len(prompt))] for prompt in prompts]
        assert found["negative_x"].tolist() == [[-1.0]] * len(prompts)
        return found


def test_the_prompt_unused_for_longest_leaves_first():
    cache, letters = TextCache(2, offload=False), Letters()
    letters.ask(cache, "a", "bb")
    letters.ask(cache, "a")
    letters.ask(cache, "ccc")  # instead of bb
    letters.ask(cache, "a", "ccc")
    assert letters.seen == {"a": 1, "bb": 1, "ccc": 1, "negative": 1}
    letters.ask(cache, "bb")  # instead of a
    letters.ask(cache, "ccc", "bb")
    letters.ask(cache, "a")
    assert letters.seen == {"a": 2, "bb": 2, "ccc": 1, "negative": 1}


def test_a_batch_larger_than_the_cache():
    cache, letters = TextCache(2, offload=False), Letters()
    letters.ask(cache, "a", "bb", "ccc", "dddd", "a")
    letters.ask(cache, "ccc", "dddd")
    assert letters.seen == {"a": 1, "bb": 1, "ccc": 1, "dddd": 1, "negative": 1}
    letters.ask(cache, "a")
    assert letters.seen["a"] == 2


def test_without_a_cache_batches_are_encoded_as_they_come():
    cache, letters = TextCache(0, offload=False), Letters()
    for _ in range(2):
        letters.ask(cache, "a", "a", "bb")
    assert letters.seen == {"a": 4, "bb": 2, "negative": 2}


def test_embeddings_under_autocast_are_others():
    plain, policy = tiny_policy("sd"), tiny_policy("sd", cache_text=8)
    for enabled in (True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found = policy.encode_prompt(PROMPTS[:1])
            assert_equal(found, plain.encode_prompt(PROMPTS[:1]))
    assert len(policy._texts._kept) == 2


def test_what_validation_kept_can_be_trained_on():
    policy = tiny_policy("sd", train="lora", cache_text=8)
    with torch.inference_mode():  # as Lightning validates
        policy.encode_prompt(PROMPTS)
    conditioning = policy.encode_prompt(PROMPTS)
    assert not any(value.is_inference() or value.requires_grad for value in conditioning.values())
    latents, timesteps = torch.randn(4, 4, 8, 8), torch.full((4,), 500)
    policy.predict(latents, timesteps, conditioning, 3.0).sum().backward()
    assert any(p.grad.any() for p in policy.parameters() if p.requires_grad)


@pytest.mark.parametrize(("cache_text", "moves"), [(0, 3), (8, 2)])
def test_offloaded_encoders_are_on_the_device_only_while_they_encode(cache_text, moves):
    policy = tiny_policy("sd", cache_text=cache_text, offload_text_encoders=True)
    encoders, places = policy.text_encoders, []
    move = encoders.to

    def moving(device):
        places.append(str(device))
        return move(device)

    encoders.to = moving
    encoders[0].register_forward_pre_hook(lambda module, inputs: places.append("encode"))
    policy.encode_prompt(PROMPTS)
    policy.encode_prompt(PROMPTS)
    policy.encode_prompt(["a triangle"])
    device, home = [place for place in places if place != "encode"][:2]
    assert (device, home) == (str(policy.device), "cpu")
    assert places.count("cpu") == 2 * moves  # here the device is one too
    assert [places[0], places[-1]] == ["cpu", "cpu"]
    encodes = [i for i, place in enumerate(places) if place == "encode"]
    assert all(places[:i].count("cpu") % 2 == 1 for i in encodes)  # between there and back


def test_offloaded_encoders_come_back_from_a_failure():
    policy = tiny_policy("sd", offload_text_encoders=True)
    places = []
    policy.text_encoders.to = lambda device: places.append(str(device))
    policy.pipeline.encode_prompt = None
    with pytest.raises(TypeError):
        policy.encode_prompt(PROMPTS)
    assert places == [str(policy.device), "cpu"]


def test_offloaded_encoders_stay_where_they_are_when_the_module_moves():
    """Also frozen, in their dtype, in evaluation mode, and out of what DDP looks at."""
    policy = tiny_policy("sd3", dtype="bfloat16", offload_text_encoders=True)
    policy.train()
    assert not any(name.startswith("text_encoders") for name, _ in policy.named_modules())
    encoders = policy.text_encoders
    assert not any(p.requires_grad for p in encoders.parameters())
    assert {p.dtype for p in encoders.parameters()} == {torch.bfloat16}
    assert not any(module.training for module in encoders.modules())
    policy.to("meta")  # a device that is no CPU
    assert {p.device.type for p in policy.parameters()} == {"meta"}
    assert {p.device.type for p in encoders.parameters()} == {"cpu"}


def run(folder, **options):
    """Return the metrics and the checkpoint of two rounds with validation."""
    module = make_ddpo("sd3", policy_options=options, guidance_scale=3.0, lr=1e-3)
    saver = ModelCheckpoint(folder, "last", save_on_train_epoch_end=True)
    trainer = fit(module, val=True, callbacks=[saver], enable_checkpointing=True, max_epochs=2)
    metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if "time/" not in k}
    return metrics, torch.load(saver.best_model_path, weights_only=True)


@pytest.mark.parametrize(
    "options", [({}, {"offload_text_encoders": True}), ({"cache_text": 1}, {"cache_text": 100})]
)
def test_a_run_is_the_same_and_its_checkpoint_without_embeddings(options, tmp_path):
    pairs = [run(tmp_path / str(number), **each) for number, each in enumerate(options)]
    (expected, one), (found, other) = pairs
    assert found == expected
    assert other.keys() == one.keys()
    assert other["lit_align"].keys() == one["lit_align"].keys()
    assert all("lora" in name for name in other["state_dict"])
    assert_equal(other["state_dict"], one["state_dict"])


def test_options_reach_every_family(tmp_path):
    tiny_pipeline("sd3").save_pretrained(tmp_path)
    options = {"cache_text": 5, "offload_text_encoders": True}
    policy = DiffusionPolicy.from_pretrained(str(tmp_path), train="none", **options)
    assert type(policy) is SD3Policy
    assert (policy._texts.size, policy._texts.offload) == (5, True)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="`cache_text` must not be negative, got -1; 0 keeps no"):
        tiny_policy("sd", cache_text=-1)
    for options in ({"cache_text": 1}, {"offload_text_encoders": True}):
        module = DenoisingPretraining(tiny_policy("sd", train="full", **options))
        with pytest.raises(ValueError, match="for frozen text encoders, and these are trained"):
            module.policy.encode_prompt(PROMPTS)

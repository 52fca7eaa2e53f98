"""What holds for every method that learns in rounds."""

import inspect
import random

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_align import algorithms
from lit_align.algorithms import RoundModule
from lit_align.rewards import Colorfulness, ShapesCLIP, WeightedReward
from tests.algorithms.harness import METHODS, Recorder, fit, make_method, weights

ATOL = 1e-6
UPDATES = {  # a round's steps x samples / minibatch, of two tasks each with one more on pairs
    "DDPO": {"sd": 3 * 8 // 8, "sd3": 2 * 8 // 8},
    "FlowGRPO": {"sd": 3 * 8 // 8, "sd3": 2 * 8 // 8},
    "TDPO": {"sd": 3 * 8 // 4, "sd3": 2 * 8 // 4},
    "LargeScaleRL": {"sd": 2 * (2 * 8 // 4) + 1, "sd3": 2 * (1 * 8 // 4) + 1},
    **{name: {"sd": 2, "sd3": 2} for name in ("ReFL", "DRaFT", "AlignProp", "DRTune")},
    "NablaGFlowNet": {"sd": 2 * 8 // 4, "sd3": 1 * 8 // 4},
    "AdjointMatching": {"sd": 3 * 8 // 8, "sd3": 2 * 8 // 8},
    "DiffusionNFT": dict.fromkeys(("sd", "sd3"), 2 * 8 // 8),
    "AWM": dict.fromkeys(("sd", "sd3"), 1 * 8 // 4),
    **{name: dict.fromkeys(("sd", "sd3"), 2 * 8 // 8) for name in ("CRD", "DGPO")},
    "D3PO": {"sd": 3 * 8 // 8, "sd3": 2 * 8 // 8},  # both images of a prompt are kept
    "OnlineDPO": dict.fromkeys(("sd", "sd3"), 2 * 8 // 8),
    "TPDM": dict.fromkeys(("sd", "sd3"), 2 * 8 // 8),  # images, in two passes
}
# In SD3's last block nothing reads the text's new states, and so nothing asks for its queries.
UNREAD = "transformer_blocks.1.attn.add_q_proj"

POLICY_GRADIENTS = ("DDPO", "FlowGRPO", "TDPO", "LargeScaleRL")
CASES = [("sd", "lora", 2), ("sd3", "full", 3)]


def cases(names):
    """Return both cases for each policy gradient, and for the other methods one or the other."""
    both = [(name, *case) for name in names if name in POLICY_GRADIENTS for case in CASES]
    others = [name for name in names if name not in POLICY_GRADIENTS]
    return [*both, *((name, *CASES[number % 2]) for number, name in enumerate(others))]


all_methods = pytest.mark.parametrize(("name", "family", "train", "steps"), cases(METHODS))


@pytest.mark.gpu
@all_methods
def test_a_round_on_cuda(name, family, train, steps):
    """Nothing of a round stays on the CPU that meets the rest."""
    module = make_method(name, family, train)
    trainer = fit(module, val=True, accelerator="gpu", max_epochs=2)
    assert trainer.global_step > 0
    assert all(p.isfinite().all() for p in weights(module, True).values())


def test_every_method_is_here():
    public = [getattr(algorithms, name) for name in algorithms.__all__]
    methods = {
        method.__name__
        for method in public
        if issubclass(method, RoundModule) and not inspect.isabstract(method)
    }
    assert set(METHODS) == set(UPDATES) == methods


def frozen_parts(module):
    """Return what no method may train, also what is outside the module tree."""
    parts = {n: p for n, p in module.named_parameters() if not p.requires_grad}
    for name, reward in module.rewards.items():
        parts |= {f"{name}.{n}": p for n, p in reward.named_parameters()}
    if hasattr(module, "critic"):
        parts |= {f"tower.{n}": p for n, p in module.critic.tower.named_parameters()}
    return parts


COMBINATIONS = [
    ("sd", "lora", 2.0), ("sd3", "full", 2.0), ("sd", "full", 1.0), ("sd3", "lora", 1.0),
]  # fmt: skip


def halves(names):
    """Return for each name two of the combinations, in turn the first and the last."""
    cases = []
    for number, name in enumerate(names):
        start = 2 * (number % 2)
        cases += [(name, *combination) for combination in COMBINATIONS[start : start + 2]]
    return cases


# Guidance is an input of Flux, not a second branch.
FLUX = [
    ("DDPO", "flux", "full", 3.5), ("FlowGRPO", "flux", "lora", 3.5), ("TPDM", "flux", "none", 3.5),
    ("DiffusionNFT", "flux", "full", 3.5), ("AWM", "flux", "lora", 3.5),
    ("CRD", "flux", "lora", 3.5), ("DGPO", "flux", "full", 3.5),
    ("AdjointMatching", "flux", "lora", 3.5),
]  # fmt: skip


@pytest.mark.parametrize(("name", "family", "train", "guidance_scale"), halves(METHODS) + FLUX)
def test_one_round(name, family, train, guidance_scale):
    """Only trainable weights move, all of them; before an update the policy is that which sampled.

    The first factors of LoRA pairs have no gradient as long as the second are zero.
    """
    decay = {"critic_weight_decay": 0.0} if name == "TDPO" else {}
    module = make_method(
        name, family, train, reward=ShapesCLIP(), guidance_scale=guidance_scale, weight_decay=0.0,
        **decay,
    )  # fmt: skip
    updates = UPDATES[name]["sd3" if family == "flux" else family]
    before = {key: value.clone() for key, value in frozen_parts(module).items()}
    trained = weights(module, True)
    recorder = Recorder()
    trainer = fit(module, callbacks=[recorder])

    assert trainer.global_step == len(recorder.gradients) == updates
    for key, value in frozen_parts(module).items():
        assert value.grad is None, key
        assert torch.equal(value, before[key]), key
    still = {key for key, p in weights(module, True).items() if torch.equal(p, trained[key])}
    assert still == {key for key in trained if UNREAD in key}

    first, *_ = recorder.gradients
    assert set(first) == set(trained)
    assert all(gradient.isfinite().all() for gradient in first.values())
    without = {key for key, gradient in first.items() if not gradient.any()}
    assert without == still | {key for key in trained if ".lora_A." in key}

    if name not in POLICY_GRADIENTS:
        assert recorder.metrics[0]["train/grad_norm"] > 0
        return
    starts = [0, updates // 2] if name == "LargeScaleRL" else [0]
    for start in starts:  # of each task
        logged = recorder.metrics[start]
        assert logged["train/ratio"] == pytest.approx(1, abs=ATOL)
        assert logged["train/approx_kl"] == pytest.approx(0, abs=ATOL)
        assert logged["train/clip_fraction"] == 0
        assert logged["train/grad_norm"] > 0


def gradients(name, accumulate, **options):
    """Return the gradients of a round's updates at unchanging weights."""
    recorder = Recorder()
    rates = {"lr": 0.0, **({"lr_critic": 0.0} if name == "TDPO" else {})}
    module = make_method(name, "sd3", "full", **rates, **options)
    fit(module, callbacks=[recorder], accumulate_grad_batches=accumulate)
    return recorder.gradients


def assert_same_gradients(left, right, number):
    assert len(left) == len(right) == number
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for key, gradient in one.items():
            torch.testing.assert_close(gradient, other[key], atol=ATOL, rtol=1e-4, msg=key)


ALL_STEPS = {"timestep_fraction": 1.0}
PAIRS = {"minibatch_size": 8, "pretraining_batch_size": 6}


@pytest.mark.parametrize(
    ("name", "options", "sizes", "accumulate", "updates"),
    [
        ("DDPO", {"minibatch_order": "sample_major"}, {"minibatch_size": 24}, 3, 1),
        ("DDPO", {"minibatch_order": "timestep_major"}, {"minibatch_size": 24}, 3, 1),
        ("FlowGRPO", {"ratio": "norm", "beta": 0.1}, {"minibatch_size": 24}, 3, 1),
        ("TDPO", {}, {"minibatch_size": 8}, 2, 3),  # one for each step
        ("LargeScaleRL", {"pretraining_steps": 2} | ALL_STEPS, PAIRS, 2, 2 * 3 + 2),
        ("LargeScaleRL", {"pretraining": "weighted"} | ALL_STEPS, PAIRS, 2, 2 * 3),
        ("ReFL", {}, {"minibatch_size": 4}, 2, 2),
        ("DRaFT", {}, {"minibatch_size": 4}, 2, 2),
        ("AlignProp", {}, {"minibatch_size": 4}, 2, 2),
        ("DRTune", {}, {"minibatch_size": 4}, 2, 2),
        ("NablaGFlowNet", {}, {"minibatch_size": 8}, 2, 2),
        ("AdjointMatching", {}, {"minibatch_size": 24}, 3, 1),
        ("DiffusionNFT", {}, {"minibatch_size": 12}, 2, 2),
        ("AWM", {"trained_times": 2}, {"minibatch_size": 8}, 2, 2),
        ("CRD", {}, {"minibatch_size": 12}, 3, 2),
        ("DGPO", {}, {"minibatch_size": 8}, 2, 2),
        ("D3PO", {}, {"minibatch_size": 12}, 2, 2),
        ("OnlineDPO", {}, {"minibatch_size": 8}, 2, 2),
        ("TPDM", {}, {"minibatch_size": 8}, 2, 2),
    ],
)
def test_accumulation_equals_one_large_minibatch(name, options, sizes, accumulate, updates):
    options = {"num_inference_steps": 4, **options}  # three with a density
    parts = {key: size // accumulate for key, size in sizes.items()}
    whole = gradients(name, 1, **options, **sizes)
    assert_same_gradients(whole, gradients(name, accumulate, **options, **parts), updates)


@pytest.mark.parametrize(("name", "updates"), [("DDPO", 1), ("LargeScaleRL", 2 + 1)])
def test_order_of_minibatches_leaves_the_accumulated_gradient_unchanged(name, updates):
    orders = [
        gradients(name, 4, minibatch_order=order, minibatch_size=4, **ALL_STEPS)
        for order in ("sample_major", "timestep_major")
    ]
    assert_same_gradients(*orders, updates)


@all_methods
def test_same_seed_same_run_and_global_randomness_plays_no_part(name, family, train, steps):
    runs = []
    for noise in (1, 2):
        module = make_method(name, family, train, num_inference_steps=steps)
        torch.manual_seed(noise)
        random.seed(noise)
        recorder = Recorder()
        trainer = fit(module, callbacks=[recorder], val=family == "sd3")
        logs = [*recorder.metrics, {k: float(v) for k, v in trainer.callback_metrics.items()}]
        runs.append([{k: v for k, v in row.items() if "time/" not in k} for row in logs])
    assert runs[0] == runs[1]


@all_methods
def test_checkpoint_round_trip(name, family, train, steps, tmp_path):
    """A round from the file of an earlier one is what followed there."""

    def make():
        """Return a module whose reward and whose advantages remember earlier scores."""
        reward = WeightedReward({"c": Colorfulness()}, {"c": 1.0})
        memory = {"advantage_norm": "per_prompt", "std_unbiased": False, "min_count": 1}
        memory = memory if name in POLICY_GRADIENTS else {}
        options = {"num_inference_steps": steps, "reward": reward, **memory}
        return make_method(name, family, train, **options)

    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    whole, resumed = make(), make()
    fit(whole, callbacks=[saver], enable_checkpointing=True, max_epochs=2)
    stored = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    assert set(stored["state_dict"]) == set(weights(whole, True))
    assert stored["lit_align"]["method"] == name
    fit(resumed, resume=tmp_path / "epoch=0.ckpt", max_epochs=2)
    assert {key: 2 * number for key, number in stored["lit_align"]["counters"].items()} == (
        resumed.counters
    )
    assert resumed.counters == whole.counters
    found = weights(resumed, True)
    for key, value in weights(whole, True).items():
        assert torch.equal(value, found[key]), key

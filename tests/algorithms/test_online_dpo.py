"""Online DPO: pairs, references, and the refreshed reward model."""

import math

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_align.algorithms import OnlineDPO
from lit_align.callbacks import InvariantsCallback
from lit_align.rewards import Colorfulness
from tests.algorithms.harness import Recorder, fit, make_method, weights
from tests.algorithms.judgements import learned
from tests.algorithms.test_d3po import Constant, Kept
from tests.conftest import tiny_policy

LOG2 = math.log(2)


def make(**options):
    return make_method("OnlineDPO", "sd3", "full", **{"weight_decay": 0.0, **options})


def refreshed(**options):
    return make(reward=learned(), annotator=Colorfulness(), lr_reward=1e-2, **options)


def test_the_first_loss_is_log_2_and_the_best_and_worst_are_kept():
    module = make(samples_per_prompt=4, prompts_per_round=2, minibatch_size=4)
    kept, recorder = Kept(module), Recorder()
    fit(module, callbacks=[recorder])
    assert recorder.metrics[0]["train/loss"] == pytest.approx(LOG2, abs=1e-6)
    assert recorder.metrics[0]["train/implicit_acc"] == 0.5
    assert recorder.metrics[-1]["train/loss"] != pytest.approx(LOG2, abs=1e-6)
    before = kept.before.rewards.unflatten(0, (2, 4))
    after = kept.trajectory.rewards.unflatten(0, (2, 2))
    assert torch.equal(after.max(1).values, before.max(1).values)
    assert torch.equal(after.min(1).values, before.min(1).values)
    assert module.counters["reward_queries"] == 8
    # 8 samples x 3 steps, and at 2 times each 4 of them by both networks.
    assert module.counters["denoiser_calls"] == 8 * 3 + 2 * 2 * 4


def test_images_of_a_pair_are_noised_alike():
    module = make()
    seen = []
    loss = module.loss

    def recorded(minibatch):
        seen.append(minibatch)
        return loss(minibatch)

    module.loss = recorded
    fit(module)
    for minibatch in seen:
        noise, times = (module.grouped(v) for v in (minibatch.noise, minibatch.timesteps))
        assert torch.equal(noise[:, 0], noise[:, 1])
        assert torch.equal(times[:, 0], times[:, 1])
        assert bool((module.grouped(minibatch.advantages).sum(1) == 0).all())


def first_losses(**options):
    """Return the first loss of each of three rounds of two updates."""
    recorder = Recorder()
    fit(make(**options), callbacks=[recorder], max_epochs=3)
    return [row["train/loss"] for row in recorder.metrics[::2]]


def test_a_hard_update_of_the_reference_brings_the_loss_back():
    near = pytest.approx(LOG2, abs=1e-6)
    assert [loss == near for loss in first_losses()] == [True, False, False]
    assert [loss == near for loss in first_losses(ref_update="hard")] == [True] * 3
    every_other = first_losses(ref_update="hard", ref_update_rounds=2)
    assert [loss == near for loss in every_other] == [True, False, True]
    assert first_losses(ref_update="ema")[1] != near


def test_equal_images_teach_nothing():
    recorder = Recorder()
    fit(make(reward=Constant()), callbacks=[recorder])
    assert recorder.metrics[0]["rollout/pairs"] == 0
    assert all(not gradient.any() for step in recorder.gradients for gradient in step.values())


def test_the_reward_model_learns_in_labelled_rounds_only():
    module = refreshed(label_rounds=2)
    recorder, parts = Recorder(), []
    before = {n: p.clone() for n, p in module.reward_model.named_parameters()}
    step = module.on_train_batch_end

    def watched(*args):
        step(*args)
        parts.append({n: p.clone() for n, p in module.reward_model.named_parameters()})

    module.on_train_batch_end = watched
    fit(module, callbacks=[recorder], max_epochs=3)
    moved = [
        any(not torch.equal(p, old[n]) for n, p in new.items())
        for old, new in zip([before, *parts], parts, strict=False)
    ]
    assert moved == [False, False, True, True, False, False]
    assert module.counters["labels"] == 4
    assert [row["rollout/labels"] for row in recorder.metrics] == [0, 0, 4, 4, 0, 0]
    assert recorder.metrics[0]["train/reward_loss"] == 0
    assert recorder.metrics[2]["train/reward_loss"] > 0


def test_an_idle_reward_model_is_no_broken_one():
    module = refreshed(label_rounds=2)
    fit(module, callbacks=[InvariantsCallback()], max_epochs=2)
    assert module.idle == ()
    assert refreshed().idle == ("reward_model.",)  # nothing is labelled yet


def test_labels_follow_the_annotator():
    module = refreshed()
    kept = Kept(module)
    fit(module)
    images = module.policy.decode(kept.trajectory.latents[:, -1])
    utilities = Colorfulness()((images * 255).round() / 255, []).unflatten(0, (-1, 2))
    preferred = kept.trajectory.extras["preferred"][:, 0].unflatten(0, (-1, 2))
    assert torch.equal(preferred[:, 0], (utilities[:, 0] > utilities[:, 1]).float())
    assert torch.equal(preferred.sum(1), torch.ones(4))


def test_the_reward_model_is_stored_and_the_run_resumes_bit_by_bit(tmp_path):
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    whole, resumed = refreshed(ref_update="ema"), refreshed(ref_update="ema")
    fit(whole, callbacks=[saver], enable_checkpointing=True, max_epochs=2)
    fit(resumed, resume=tmp_path / "epoch=0.ckpt", max_epochs=2)
    found = weights(resumed, True)
    assert any(name.startswith("reward_model.") for name in found)
    assert all(torch.equal(value, found[name]) for name, value in weights(whole, True).items())
    assert resumed.counters == whole.counters


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"samples_per_prompt": 1}, "`samples_per_prompt` must be at least 2"),
        ({"label_rounds": 0}, "`label_rounds` at least 1, got 8, 1 and 0"),
        ({"ref_alpha": 1.5}, r"`ref_alpha` must lie in \(0, 1\]"),
        ({"label_temperature": -1.0}, "`label_temperature` not be negative, got 0.6 and -1.0"),
        ({"ref_update": "soft"}, "`ref_update` must be one of"),
        ({"loss_type": "rang"}, "`loss_type` must be one of"),
        ({"annotator": Colorfulness(), "reward": Colorfulness()}, "that is a LearnedReward"),
    ],
)
def test_options_out_of_range_are_refused(options, told):
    with pytest.raises(ValueError, match=told):
        OnlineDPO(tiny_policy("sd3"), **options)

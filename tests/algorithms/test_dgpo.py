import math

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_align.algorithms.dgpo import DGPO, noisiest, preference_weight
from tests.algorithms.harness import Recorder, fit, make_method, weights
from tests.algorithms.test_diffusion_nft import (
    HalfBlind,
    assert_same_gradients,
    draws,
    first_round,
    gradients_of,
)
from tests.policies.test_snapshots import assert_equal

FAMILIES = pytest.mark.parametrize("family", ["sd", "sd3"])


def make(family="sd3", train="full", **options):
    return make_method("DGPO", family, train, **options)


def test_weight_by_hand():
    # beta / 2 (1 * (0.5 - 0.3) - 1 * (0.2 - 0.6)) = 10 / 2 * 0.6 = 3;  second group: 0
    error = torch.tensor([[0.5, 0.2], [1.0, 2.0]])
    reference = torch.tensor([[0.3, 0.6], [1.0, 2.0]])
    advantages = torch.tensor([[1.0, -1.0], [2.0, -2.0]])
    weight = preference_weight(error, reference, advantages, torch.ones(2, 2), 10.0)
    assert weight.flatten().tolist() == pytest.approx([1 / (1 + math.exp(-3)), 0.5])


def test_a_group_that_tells_its_images_apart_learns_less():
    reference, advantages = torch.full((1, 2), 0.5), torch.tensor([[1.0, -1.0]])
    better, worse = torch.tensor([[0.4, 0.6]]), torch.tensor([[0.6, 0.4]])
    lower, higher = (
        preference_weight(each, reference, advantages, torch.ones(1, 2), 30.0).item()
        for each in (better, worse)
    )
    assert lower < 0.5 < higher
    assert lower + higher == pytest.approx(1)


def test_weight_has_no_gradient_and_knows_its_own_group_only():
    error = draws(2, 3).square().requires_grad_()
    reference, advantages = draws(2, 3, seed=1).square(), draws(2, 3, seed=2)
    counted = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    expected = preference_weight(error, reference, advantages, counted, 1.0)
    assert not expected.requires_grad
    gain = (advantages * (error - reference)).detach()[0, :2].mean()
    assert expected[0].item() == pytest.approx(gain.sigmoid().item())  # over the two that count
    advantages[1] *= -3
    advantages[0, 2] = 100.0
    found = preference_weight(error, reference, advantages, counted, 1.0)
    assert torch.equal(found[0], expected[0])
    assert not torch.equal(found[1], expected[1])


@FAMILIES
def test_first_gradient_is_half_the_advantage_times_the_plain_loss(family):
    """The pretrained network is the trained one, so that w = sigmoid(0)."""
    recorder = Recorder()
    module = make(family, kl_beta=0.0, kl_guidance=None, lr=0.0)
    _, (pairs, *_) = first_round(module, callbacks=[recorder])
    assert recorder.metrics[0]["train/preference_weight"] == 0.5
    noised, target = module.corrupt(pairs)
    error = (module.predict(pairs, noised) - target).square().flatten(1).mean(1)
    assert pairs.advantages.abs().min() > 0
    expected = gradients_of(module, (pairs.advantages / 2 * error).mean())
    assert_same_gradients(recorder.gradients[0], expected)


def test_the_loss_of_a_minibatch():
    """Of weights that have moved, with the pretrained network under guidance."""
    module = make("sd", "lora", dgpo_beta=50.0, kl_beta=0.3, kl_guidance=2.5)
    _, minibatches = first_round(module, max_epochs=2)
    pairs = minibatches[-1]
    noised, target = module.corrupt(pairs)
    with torch.no_grad(), module.policy.reference():
        guided = module.policy.predict(noised, pairs.timesteps, pairs.conditioning, 2.5)
    output = module.predict(pairs, noised)
    error, known = ((o - target).square().flatten(1).mean(1) for o in (output, guided))
    total = 0.0
    for start in range(0, len(pairs), 2):
        group = slice(start, start + 2)
        a, change = pairs.advantages[group], (error - known)[group].detach()
        weight = (50 * (a * change).sum() / 2).sigmoid()
        assert abs(weight - 0.5) > 1e-3
        total = total + (weight * a * error[group]).sum()
    penalty = (output - guided).square().mean()
    loss, logs = DGPO.loss(module, pairs)
    torch.testing.assert_close(loss, total / len(pairs) + 0.3 * penalty, atol=1e-6, rtol=1e-5)
    assert logs["train/kl_to_reference"].item() == pytest.approx(penalty.item(), rel=1e-5)
    assert logs["train/matching_error"].item() == pytest.approx(error.mean().item(), rel=1e-5)


@FAMILIES
def test_a_group_shares_time_and_noise(family):
    module = make(family, "lora", num_inference_steps=6, trained_times=2, timestep_fraction=0.5,
                  samples_per_prompt=4, minibatch_size=8)  # fmt: skip
    _, minibatches = first_round(module)
    assert len(minibatches) == 4 * 4 * 2 // 8
    allowed = set(module.policy.scheduler.timesteps[:3].tolist())
    noises, times = [], []
    for pairs in minibatches:
        grouped = module.grouped(pairs.noise)
        assert (grouped == grouped[:, :1]).all()
        at = module.grouped(pairs.timesteps)
        assert (at == at[:, :1]).all()
        assert len(module.grouped(pairs.clean)[0].flatten(1).unique(dim=0)) == 4
        noises += [*grouped[:, 0].flatten(1)]
        times += at[:, 0].tolist()
    assert len(torch.stack(noises).unique(dim=0)) == len(noises) == 4 * 2  # each prompt and time
    assert set(times) <= allowed
    assert len(set(times)) > 1


@pytest.mark.parametrize("order", ["sample_major", "timestep_major"])
def test_sizes_that_break_groups_are_refused(order):
    message = r"`minibatch_size` \(12\) must be a multiple of 8 and divide the 32 pairs .*keeps "
    with pytest.raises(ValueError, match=message + "the 8 images of a prompt.*use 8, 16, 32"):
        fit(make(train="lora", minibatch_size=12, minibatch_order=order, prompts_per_round=2,
                 samples_per_prompt=8))  # fmt: skip


def test_what_is_not_asked_for_is_not_computed():
    recorder = Recorder()
    module = make("sd", "lora", kl_beta=0.1, minibatch_size=16, kl_guidance=None)
    fit(module, callbacks=[recorder])
    # 8 samples: 3 steps sampled; 2 times by the trained network, and once by the pretrained one
    assert recorder.metrics[-1]["denoiser_calls"] == 8 * 3 + 16 + 16
    module = make("sd", "lora", kl_beta=0.0, minibatch_size=16)  # guided, for the loss
    fit(module, callbacks=[recorder])
    assert recorder.metrics[-1]["denoiser_calls"] == 8 * 3 + 16 + 2 * 16
    assert module.snapshots == {} or module.snapshot.average == {}


@pytest.mark.parametrize(("family", "train"), [("sd", "full"), ("sd3", "lora")])
def test_every_checkpoint_resumes_bit_by_bit(family, train, tmp_path):
    saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    whole = make(family, train)
    fit(whole, callbacks=[saver], enable_checkpointing=True, max_epochs=2)
    for step in (1, 2, 3):
        resumed = make(family, train)
        fit(resumed, resume=tmp_path / f"step={step}.ckpt", max_epochs=2)
        assert_equal(weights(resumed, True), weights(whole, True))
        assert resumed.counters == whole.counters


def test_images_that_could_not_be_scored_leave_the_others_finite():
    recorder = Recorder()
    module = make(reward=HalfBlind(), max_invalid_fraction=0.5, samples_per_prompt=4)
    _, minibatches = first_round(module, callbacks=[recorder])
    assert {w.item() for m in minibatches for w in m.weights} == {0.0, 2.0}
    assert all(g.isfinite().all() for row in recorder.gradients for g in row.values())


def test_the_noisiest_times():
    assert noisiest(10, 0.5, 4) == (0, 1, 2, 3, 4)  # as in the official settings
    assert noisiest(6, 0.7, 4) == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dgpo_beta": 0.0}, "`dgpo_beta` must be positive, got 0.0"),
        ({"trained_times": 4}, r"`trained_times` must lie in \[1, 3\].* of 3 steps, got 4; change"),
        ({"trained_times": 0}, r"`trained_times` must lie in \[1, 3\].*got 0"),
        ({"kl_beta": -1.0}, "`kl_beta` must be at least 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)

import math

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_align.algorithms.awm import AWM, time_strata, weighted_error
from lit_align.trajectory import ForwardOutputs
from tests.algorithms.harness import Recorder, fit, make_method, weights
from tests.algorithms.test_diffusion_nft import (
    Watch,
    assert_same_gradients,
    first_round,
    gradients_of,
)
from tests.policies.test_snapshots import assert_equal

FAMILIES = pytest.mark.parametrize("family", ["sd", "sd3"])
EPS = 1e-10
AT_START = {"kl_beta": 0.0, "ema_beta": 0.0, "lr": 0.0}


def make(family="sd3", train="full", **options):
    return make_method("AWM", family, train, **options)


@pytest.mark.parametrize(
    ("weighting", "value", "slope"),
    [  # w and dw/dl at l = 0.25 and t = 0.6
        ("uniform", 0.25, 1.0),
        ("t", 0.15, 0.6),
        ("t2", 0.09, 0.36),
        ("huber", 0.6 * (0.5 - 1e-5), 0.6 / 2 / 0.5),
        ("ghuber", 0.6 / 0.25 * (0.25**0.25 - 1e-10**0.25), 0.6 * 0.25**-0.75),
    ],
)
def test_weightings_by_hand(weighting, value, slope):
    error = torch.tensor([0.25, 0.0], dtype=torch.float64, requires_grad=True)
    times = torch.tensor([0.6, 0.3], dtype=torch.float64)
    found = weighted_error(error, times, weighting, 0.25)
    assert found[0].item() == pytest.approx(value, rel=1e-8)
    assert found[1].item() == 0
    (gradient,) = torch.autograd.grad(found.sum(), error)
    assert gradient[0].item() == pytest.approx(slope, rel=1e-8)
    assert gradient.isfinite().all()


def test_generalised_huber_is_t_at_power_one_and_has_the_known_slope():
    error = torch.logspace(-8, 2, 30, dtype=torch.float64, requires_grad=True)
    times = torch.linspace(0.05, 1, 30, dtype=torch.float64)
    straight = weighted_error(error, times, "ghuber", 1.0)
    torch.testing.assert_close(straight, times * error, atol=EPS, rtol=1e-12)
    for power in (0.25, 0.5, 1.0):
        value = weighted_error(error, times, "ghuber", power)
        (slope,) = torch.autograd.grad(value.sum(), error)
        expected = times * (error.detach() + EPS) ** (power - 1)
        torch.testing.assert_close(slope, expected, atol=0, rtol=1e-10)
    half = weighted_error(error, times, "ghuber", 0.5)  # twice "huber"
    torch.testing.assert_close(half, 2 * weighted_error(error, times, "huber", 0.5))


def test_strata_of_the_official_setting():
    pools = [(1,), (2, 3), (4, 5), (6, 7), (8, 9), (10, 11)]  # of 14 times, up to int(12.6)
    assert time_strata(14, 0.9, 6) == tuple((pool, 1) for pool in pools)


@pytest.mark.parametrize("count", [3, 6, 10, 14, 25, 40])
@pytest.mark.parametrize("fraction", [0.5, 0.9, 1.0])
def test_strata_are_cut_where_equal_parts_begin(count, fraction):
    last = int(count * fraction)
    for trained in range(1, last):
        bounds = torch.linspace(1, last, trained + 1, dtype=torch.float64)
        starts = [math.floor(b + 1e-9) for b in bounds.tolist()]
        pools = time_strata(count, fraction, trained)
        assert [pool[0] for pool, _ in pools] == starts[:-1]
        assert sum((pool for pool, _ in pools), ()) == tuple(range(1, last))
        assert {drawn for _, drawn in pools} == {1}
    for trained in (0, last):
        with pytest.raises(ValueError, match=rf"`trained_times` must lie in \[1, {last - 1}\]"):
            time_strata(count, fraction, trained)


def test_each_sample_is_trained_at_one_time_of_each_stratum():
    module = make("sd", "lora", num_inference_steps=10, trained_times=3, timestep_fraction=0.9,
                  minibatch_size=24)  # fmt: skip
    _, (pairs,) = first_round(module)
    index = module.policy.scheduler.index(pairs.timesteps).view(8, 3).sort(dim=1).values
    # 1 + 8 k / 3 = 1, 3.67, 6.33, 9
    for column, (low, high) in zip(index.T, [(1, 2), (3, 5), (6, 8)], strict=True):
        assert column.min() >= low
        assert column.max() <= high
    assert len(index.unique(dim=0)) > 3
    assert torch.equal(pairs.clean[0], pairs.clean[1])  # its times lie side by side


@pytest.mark.parametrize(
    ("weighting", "family"),
    [("uniform", "sd"), ("t", "sd3"), ("t2", "sd"), ("huber", "sd3"), ("ghuber", "sd")],
)
def test_on_policy_gradient_is_that_of_the_weighted_error(weighting, family):
    recorder = Recorder()
    module = make(family, weighting=weighting, adv_clip_max=0.8, advantage_max=3.0, **AT_START)
    _, (pairs, *_) = first_round(module, callbacks=[recorder])
    assert recorder.metrics[0]["train/ratio"] == 1
    noised, target = module.corrupt(pairs)
    error = (module.predict(pairs, noised).double() - target).square().flatten(1).mean(1)
    times = module.policy.scheduler.noise_levels(pairs.timesteps).double()
    plain = weighted_error(error, times, weighting, 0.25)
    scaled = 3 * pairs.advantages / 0.8
    expected = gradients_of(module, (pairs.weights * scaled * plain).mean())
    assert_same_gradients(recorder.gradients[0], expected)


@FAMILIES
def test_uniform_weighting_is_at_first_negative_aware_tuning_of_outputs(family):
    """Both gradients are the advantage times that of the pretraining loss."""
    recorder = Recorder()
    other = make_method("DiffusionNFT", family, "full", form="output", nft_beta=0.3, kl_beta=0.0,
                        adv_clip_max=0.9, lr=0.0)  # fmt: skip
    _, (pairs, *_) = first_round(other, callbacks=[recorder])
    unknown = torch.full((len(pairs),), torch.nan, dtype=torch.float64)
    module = make(family, weighting="uniform", adv_clip_max=0.9, advantage_max=0.9, **AT_START)
    loss, _ = module.loss(pairs.replace(extras={"old_log_prob": unknown}))
    assert_same_gradients(gradients_of(module, loss), recorder.gradients[0])


@pytest.mark.parametrize(("inner", "accumulate"), [(1, 1), (1, 2), (2, 1)])
def test_log_probabilities_of_the_policy_that_sampled(inner, accumulate):
    """Known for all pairs that are seen after an update, and those of the start of the round."""
    recorder = Recorder()
    module = make(
        num_inner_epochs=inner, kl_beta=0.0, ema_beta=0.0, num_inference_steps=4, trained_times=2
    )
    kept, seen, loss = [], [], module.loss

    def watched(pairs):
        if not seen:
            kept.append(AWM._old_log_probs(module, trajectory[0], 0))
        seen.append(pairs)
        return loss(pairs)

    trajectory, collect = [], module.collect
    module.collect = lambda *a: (trajectory.append(collect(*a)), trajectory[-1])[1]
    module.loss = watched
    fit(module, callbacks=[recorder], accumulate_grad_batches=accumulate)
    old = torch.cat([pairs.extras["old_log_prob"] for pairs in seen])
    assert len(old) == 16 * inner
    first = 4 * accumulate
    assert old[:first].isnan().all() or inner == 2  # there they may come again
    assert old[first:].isfinite().all()
    torch.testing.assert_close(
        kept[0], trajectory[0].extras["old_log_prob"], atol=0, rtol=0, equal_nan=True
    )
    first, *others = (row["train/ratio"] for row in recorder.metrics[accumulate - 1 :: accumulate])
    assert first == pytest.approx(1, abs=1e-6)
    assert all(abs(ratio - 1) > 1e-4 for ratio in others)


def test_unchanged_weights_keep_the_ratio_at_one():
    recorder = Recorder()
    module = make(train="lora", num_inner_epochs=2, lr=0.0)
    fit(module, callbacks=[recorder], max_epochs=2)
    assert len(recorder.metrics) == 8
    decays = [row["rollout/snapshot_decay"] for row in recorder.metrics]
    assert decays == pytest.approx([0] * 4 + [0.004] * 4)  # after 4 updates
    for row in recorder.metrics:
        assert row["train/ratio"] == 1
        assert row["train/approx_kl"] == row["train/clip_fraction"] == 0


def test_the_ratio_is_clipped():
    """A ratio beyond the range gives a good sample no further gradient, and a bad one its own."""
    module = make(clip_range=0.1, ema_beta=0.0, kl_beta=0.0, weighting="t")
    _, (pairs, *_) = first_round(module)
    _, target = module.corrupt(pairs)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    log_ratio = torch.tensor([0.2, -0.2, 0.2, -0.2])
    output = (target + 0.1).requires_grad_()
    old = module._log_prob(pairs, target, output).detach() - log_ratio
    pairs = pairs.replace(advantages=advantages, extras={"old_log_prob": old})
    loss, logs = module.pair_loss(pairs, ForwardOutputs(target, target, output))
    (gradient,) = torch.autograd.grad(loss.sum(), output)
    assert gradient.flatten(1).any(dim=1).tolist() == [False, True, True, False]
    scaled = advantages / module.max_advantage
    expected = -scaled * torch.stack([log_ratio.exp()[k] if k in (1, 2) else torch.tensor(edge)
                                      for k, edge in enumerate([1.1, 0, 0, 0.9])])  # fmt: skip
    torch.testing.assert_close(loss.detach(), expected)
    assert logs["train/clip_fraction"] == 1


def test_the_averaged_weights_pull():
    module, watch, recorder = make(ema_beta=2.0, kl_beta=0.0), Watch(), Recorder()
    module.keep_snapshot(0, 0.2, 0.3)
    _, minibatches = first_round(module, callbacks=[watch, recorder], max_epochs=2)
    first, second, third, fourth = (row["train/ema_gap"] for row in recorder.metrics)
    assert first == 0
    assert min(second, third, fourth) > 0
    expected = {n: 0.3 * a + 0.7 * watch.weights[2][n] for n, a in watch.old[0].items()}
    for name, average in watch.old[2].items():
        torch.testing.assert_close(average, expected[name], atol=1e-7, rtol=1e-5)
    pairs = minibatches[-1]
    noised, _ = module.corrupt(pairs)
    with torch.no_grad(), module.snapshot.applied():
        averaged = module.predict(pairs, noised)
    gap = (module.predict(pairs, noised) - averaged).square().mean()
    pull = gradients_of(module, 2 * gap)
    loss, logs = AWM.loss(module, pairs)
    assert logs["train/ema_gap"].item() == pytest.approx(gap.item(), rel=1e-5)
    total = gradients_of(module, loss)
    module.ema_beta = 0.0
    without = gradients_of(module, AWM.loss(module, pairs)[0])
    assert_same_gradients({n: g - without[n] for n, g in total.items()}, pull, rtol=1e-2)


def test_what_is_not_asked_for_is_not_computed():
    recorder = Recorder()
    module = make("sd", "lora", kl_beta=0.0, ema_beta=0.0, minibatch_size=8)
    fit(module, callbacks=[recorder], max_epochs=2)
    # Two rounds of 8 samples: 3 steps sampled, one time trained in one update.
    assert recorder.metrics[-1]["denoiser_calls"] == 2 * (8 * 3 + 8)
    assert "snapshot" not in module.stateful
    assert module.snapshot.average == {}
    module = make("sd", "lora", kl_beta=0.1, ema_beta=0.1)
    fit(module, callbacks=[recorder])
    # Trained, averaged and pretrained weights; before the second of two updates those at the start.
    assert recorder.metrics[-1]["denoiser_calls"] == 8 * 3 + 8 * 3 + 4


def test_every_checkpoint_resumes_bit_by_bit(tmp_path):
    def made():
        module = make(num_inference_steps=4, trained_times=2, kl_beta=0.1, minibatch_size=8)
        module.keep_snapshot(0, 0.1, 0.5)
        return module

    saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    whole = made()
    fit(whole, callbacks=[saver], enable_checkpointing=True, max_epochs=2)
    for step in (1, 2, 3):
        resumed = made()
        fit(resumed, resume=tmp_path / f"step={step}.ckpt", max_epochs=2)
        assert_equal(weights(resumed, True), weights(whole, True))
        assert_equal(resumed.snapshot.average, whole.snapshot.average)
        assert resumed.counters == whole.counters


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weighting": "flat"}, "`weighting` must be one of 'uniform', 't', 't2', 'huber'"),
        ({"ghuber_power": 0.0}, r"`ghuber_power` must lie in \(0, 1\]"),
        ({"ema_decay": 1.0}, r"`ema_decay` in \[0, 1\)"),
        ({"ema_beta": -1.0}, "`ema_beta` be at least 0"),
        ({"clip_range": 0.0}, r"`clip_range` and `advantage_max` must be positive, got \(0.0, "),
        ({"trained_times": 3}, r"`trained_times` must lie in \[1, 2\].*got 3"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)

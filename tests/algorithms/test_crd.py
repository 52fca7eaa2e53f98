import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_align.algorithms.crd import CRD, centred_reward_loss
from lit_align.functional.matching import group_mean, matching_error
from lit_align.policies.snapshots import ramp
from tests.algorithms.harness import Recorder, fit, make_method, weights
from tests.algorithms.test_diffusion_nft import (
    HalfBlind,
    Watch,
    assert_same_gradients,
    draws,
    first_round,
    gradients_of,
)
from tests.policies.test_snapshots import assert_equal

FAMILIES = pytest.mark.parametrize("family", ["sd", "sd3"])
EXACT = {"atol": 1e-12, "rtol": 0}


def make(family="sd3", train="full", **options):
    return make_method("CRD", family, train, **options)


def test_loss_by_hand():
    # b = 2. First group: rho - mean = +-1, r - mean = +-0.25: (2 - 0.25)^2 / 2, twice.
    # Second: rho equal, r - mean = -+0.5: 0.25 / 2.
    rho, share = torch.tensor([[3.0, 1.0], [7.0, 7.0]]), torch.tensor([[0.75, 0.25], [0.0, 1.0]])
    loss = centred_reward_loss(rho, share, torch.ones(2, 2), 2.0)
    assert loss.tolist() == [[1.53125, 1.53125], [0.125, 0.125]]


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_constants_of_a_group_leave_loss_and_gradient_unchanged(beta):
    rho, share = draws(3, 4).requires_grad_(), draws(3, 4, seed=1)
    ones, constants = torch.ones(3, 4), torch.tensor([[5.0], [-2.0], [0.5]], dtype=torch.float64)

    def both(rho, share):
        loss = centred_reward_loss(rho, share, ones, beta)
        (gradient,) = torch.autograd.grad(loss.sum(), rho)
        return loss.detach(), gradient

    expected = both(rho, share)
    assert expected[0].min() > 0
    for changed in (both(rho, share + constants), both((rho + constants), share)):
        torch.testing.assert_close(changed, expected, **EXACT)


def test_the_gradient_of_the_mean_cancels():
    """Of all gradients of a group, and also if some of its images do not count."""
    rho, share = draws(3, 4).requires_grad_(), draws(3, 4, seed=1)
    weights = torch.ones(3, 4, dtype=torch.float64)
    weights[1, 2] = weights[2, 0] = weights[2, 3] = 0
    loss = centred_reward_loss(rho, share, weights, 0.7)
    mean = (weights * rho).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
    given = share - (weights * share).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
    whole = (0.7 * (rho - mean) - given).square() / 0.7
    torch.testing.assert_close(loss, whole, **EXACT)
    gradients = [torch.autograd.grad((weights * each).sum(), rho)[0] for each in (loss, whole)]
    torch.testing.assert_close(*gradients, **EXACT)


def test_other_groups_and_images_that_do_not_count_do_not_matter():
    rho, share = draws(2, 3), draws(2, 3, seed=1)
    weights = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    expected = centred_reward_loss(rho, share, weights, 1.0)
    share[1], rho[1] = 9 * share[1], -rho[1]
    share[0, 2], rho[0, 2] = 100.0, -50.0
    found = centred_reward_loss(rho, share, weights, 1.0)
    torch.testing.assert_close(found[0, :2], expected[0, :2], **EXACT)
    assert (found[1] - expected[1]).abs().min() > 0.01


def test_means_of_groups():
    values, weights = torch.tensor([[1.0, 3.0], [5.0, 6.0], [7.0, 8.0]]), torch.ones(3, 2)
    weights[1], weights[2] = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 0.0])
    assert group_mean(values, weights).tolist() == [[2.0], [5.0], [0.0]]


def test_decays_of_the_paper():
    (_, *old), (_, *rollout) = make(train="lora")._schedules.values()
    steps = (0, 50, 75, 100, 149, 150, 10_000)
    expected = [min(0.25 + 0.005 * n, 0.999) for n in steps]
    assert [ramp(n, *old) for n in steps] == pytest.approx(expected, abs=1e-12)
    assert [ramp(n, *rollout) for n in (0, 75, 77, 10_000)] == pytest.approx([0, 0, 0.015, 0.999])


@FAMILIES
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_first_gradient_is_that_of_centred_advantages_times_the_plain_loss(family, beta):
    """As that of DiffusionNFT is, whatever b is; also of a network that predicts noise."""
    recorder = Recorder()
    module = make(family, crd_beta=beta, kl_beta=0.0, lr=0.0, samples_per_prompt=4)
    _, (pairs, *_) = first_round(module, callbacks=[recorder])
    assert pairs.advantages.abs().max() < module.max_advantage  # so that r - mean r = A / 2 c
    noised, _ = module.corrupt(pairs)
    output = module.predict(pairs, noised)
    clean = module.policy.scheduler.clean(output, noised, pairs.timesteps)
    loss = (pairs.advantages * matching_error(clean, pairs.clean, True)).mean()
    assert_same_gradients(recorder.gradients[0], gradients_of(module, loss))
    assert recorder.metrics[0]["train/implicit_reward"] == recorder.metrics[0]["train/old_gap"] == 0


@FAMILIES
def test_minibatches_hold_whole_groups_at_one_time(family):
    module = make(family, "lora", num_inference_steps=5, minibatch_size=4)
    (trajectory,), minibatches = first_round(module)
    assert len(minibatches) == 4 * 8 // 4
    groups = {tuple(c.flatten()[:4].tolist()): n // 2 for n, c in enumerate(trajectory.latents)}
    seen = []
    for pairs in minibatches:
        keys = module.grouped(torch.tensor([groups[tuple(c.flatten()[:4].tolist())]
                                            for c in pairs.clean]))  # fmt: skip
        times = module.grouped(pairs.timesteps)
        for values in (keys, times):
            assert (values == values[:, :1]).all()
        assert not torch.equal(pairs.noise[0], pairs.noise[1])
        torch.testing.assert_close(
            module.grouped(pairs.advantages).sum(1), torch.zeros(2), atol=1e-5, rtol=0
        )
        seen += list(zip(keys[:, 0].tolist(), times[:, 0].tolist(), strict=True))
    assert len(set(seen)) == len(seen) == 4 * 4  # prompts x times, of 5
    assert [key for key, _ in seen[:4]] != sorted(key for key, _ in seen)[:4]
    assert len({key for key, _ in seen[:4]}) == 4  # one time of every prompt before the next


def test_sizes_that_break_groups_are_refused():
    message = r"`minibatch_size` \(3\) must be a multiple of 2 and divide the 16 pairs .*keeps the "
    with pytest.raises(ValueError, match=message + "2 images of a prompt together.*use 2, 4, 8"):
        fit(make(train="lora", minibatch_size=3))


def test_the_penalty_asks_the_pretrained_network_under_guidance_and_holds_good_samples_more():
    module = make("sd", "lora", kl_beta=0.5, kl_guidance=3.0, adv_clip_max=0.5)
    _, minibatches = first_round(module)
    pairs = minibatches[-1]
    noised, _ = module.corrupt(pairs)
    with torch.no_grad(), module.policy.reference():
        conditioning = pairs.conditioning
        guided = module.policy.predict(noised, pairs.timesteps, conditioning, 3.0)
    gap = (module.predict(pairs, noised) - guided).square().flatten(1).mean(1)
    share = (pairs.advantages / 0.5).clamp(-1, 1) / 2 + 0.5
    assert share.max() - share.min() > 0.5
    penalty = gradients_of(module, (0.5 * share * gap).mean())
    loss, logs = CRD.loss(module, pairs)
    assert logs["train/kl_to_reference"].item() == pytest.approx(gap.mean().item(), rel=1e-5)
    total = gradients_of(module, loss)
    module.kl_beta = 0.0
    without = gradients_of(module, CRD.loss(module, pairs)[0])
    assert_same_gradients({n: g - without[n] for n, g in total.items()}, penalty, rtol=1e-2)


def test_both_snapshots_move_on_their_own_and_one_of_them_samples():
    frozen = {"rollout_decay": (-1, 1.0, 1.0)}
    module, watch = make(kl_beta=0.0, old_decay=(-2, 0.1, 0.9), **frozen), Watch()
    rounds, _ = first_round(module, callbacks=[watch], max_epochs=2)
    untrained, _ = first_round(make(lr=0.0), max_epochs=2)
    assert torch.equal(rounds[1].latents, untrained[1].latents)  # the start still samples
    assert_equal(module.sampler.average, watch.weights[0])
    expected = {n: 0.4 * a + 0.6 * watch.weights[2][n] for n, a in watch.weights[0].items()}
    for name, average in watch.old[2].items():  # after 2 updates
        torch.testing.assert_close(average, expected[name], atol=1e-7, rtol=1e-5)
    current, _ = first_round(make(kl_beta=0.0), max_epochs=2)
    assert not torch.equal(current[1].latents, untrained[1].latents)


@pytest.mark.parametrize(("family", "train"), [("sd", "lora"), ("sd3", "full")])
def test_every_checkpoint_resumes_bit_by_bit(family, train, tmp_path):
    def made():
        return make(family, train, old_decay=(0, 0.1, 0.5), rollout_decay=(1, 0.2, 0.5))

    saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    whole = made()
    fit(whole, callbacks=[saver], enable_checkpointing=True, max_epochs=2)
    for step in (1, 2, 3):
        resumed = made()
        fit(resumed, resume=tmp_path / f"step={step}.ckpt", max_epochs=2)
        assert_equal(weights(resumed, True), weights(whole, True))
        for name in ("snapshot", "sampler"):
            assert_equal(resumed.snapshots[name].average, whole.snapshots[name].average)
        assert resumed.counters == whole.counters


def test_images_that_could_not_be_scored_leave_the_others_finite():
    recorder = Recorder()
    module = make(reward=HalfBlind(), max_invalid_fraction=0.5, samples_per_prompt=4)
    _, minibatches = first_round(module, callbacks=[recorder])
    assert {w.item() for m in minibatches for w in m.weights} == {0.0, 2.0}
    assert all(g.isfinite().all() for row in recorder.gradients for g in row.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crd_beta": 0.0}, "`crd_beta` must be positive, got 0.0"),
        ({"old_decay": (0, -0.1, 0.5)}, r"`old_decay` must be .* at least 0 .*got \(0, -0.1, 0"),
        ({"rollout_decay": (0, 0.1, 1.5)}, r"`rollout_decay` must be .*`hold` in \[0, 1\]"),
        ({"kl_beta": -1.0}, "`kl_beta` must be at least 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)

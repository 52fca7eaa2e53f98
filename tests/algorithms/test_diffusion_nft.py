import copy
import itertools
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_align.algorithms.diffusion_nft import (
    DECAYS,
    DiffusionNFT,
    matching_error,
    negative_aware_loss,
)
from lit_align.policies.snapshots import ramp
from lit_align.rewards import Colorfulness, RewardModule
from lit_align.schedulers import StochasticDDIM, StochasticFlowMatch
from lit_align.trajectory import ForwardOutputs
from tests.algorithms.harness import Recorder, experience_of, fit, make_method, weights
from tests.policies.test_snapshots import assert_equal, disturb

ATOL = 1e-6
FORMS = pytest.mark.parametrize("form", ["x0", "output"])
FAMILIES = pytest.mark.parametrize("family", ["sd", "sd3"])


def make(family="sd3", train="full", **options):
    return make_method("DiffusionNFT", family, train, **options)


def draws(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("beta", [0.1, 1.0, 2.0])
@pytest.mark.parametrize("normalise", [False, True])
def test_loss_and_gradient_where_the_network_is_the_old_one(beta, normalise):
    # p+ = p- = old, so the loss is l(old) / b whatever r is. dp+/dp = b and dp-/dp = -b, so its
    # gradient is (r b - (1 - r) b) / b = (2 r - 1) times that of l, whatever b is.
    old, target = draws(2, 5, 4, 3)
    share = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    prediction = old.clone().requires_grad_()
    loss, positive, negative = negative_aware_loss(prediction, old, target, share, beta, normalise)
    single = old.clone().requires_grad_()
    error = matching_error(single, target, normalise)
    for each in (beta * loss, positive, negative):
        torch.testing.assert_close(each, error, atol=1e-12, rtol=0)
    (gradient,) = torch.autograd.grad(loss.sum(), prediction)
    (plain,) = torch.autograd.grad(error.sum(), single)
    expected = (2 * share - 1).view(-1, 1, 1) * plain
    torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=0)
    assert not gradient[2].any()
    assert gradient[[0, 1, 3, 4]].abs().amin(dim=0).max() > 0


def test_normalised_error_by_hand():
    # gaps 1 and -3: mean square 5, mean size 2; the size has no gradient: d/dp = 2 gap / 2 / 2
    prediction = torch.tensor([[1.0, -3.0]], dtype=torch.float64, requires_grad=True)
    error = matching_error(prediction, torch.zeros(1, 2), normalise=True)
    assert error.tolist() == [2.5]
    (gradient,) = torch.autograd.grad(error.sum(), prediction)
    assert gradient.tolist() == [[0.5, -1.5]]
    tiny = matching_error(torch.full((1, 4), 1e-7), torch.zeros(1, 4), normalise=True)
    assert tiny.item() == pytest.approx(1e-14 / 1e-5)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_optimum_of_a_discrete_distribution(beta):
    # x_t and t fixed, three x_0 with posterior probabilities p: targets v_i = (x_t - x_0i) / t, and
    # v_old = E[v]. The optimum is v_old + (2 / b) E[r] (E[r v] / E[r] - v_old).
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    share = torch.tensor([0.9, 0.4, 0.1], dtype=torch.float64)
    clean, t, x = draws(3, 6), 0.7, draws(1, 6, seed=1)
    targets = (x - clean) / t
    old = (p[:, None] * targets).sum(0, keepdim=True)
    alpha = (p * share).sum()
    good = ((p * share)[:, None] * targets).sum(0, keepdim=True) / alpha
    optimum = (old + 2 / beta * alpha * (good - old)).requires_grad_()

    def total(value):
        loss, _, _ = negative_aware_loss(
            value.expand(3, -1), old.expand(3, -1), targets, share, beta, normalise=False
        )
        return (p * loss).sum()

    (gradient,) = torch.autograd.grad(total(optimum), optimum)
    assert gradient.abs().max() < 1e-12
    for seed in range(3):  # and it is the minimum of a parabola
        assert total(optimum + 0.1 * draws(1, 6, seed=seed)) > total(optimum)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (0, [0, 0, 0, 0, 0, 0]),
        (1, [0, 0.074, 0.075, 0.208, 0.5, 0.5]),
        (2, [0, 0, 0, 0.9975, 0.999, 0.999]),
    ],
)
def test_decays_of_the_old_policy(kind, expected):
    found = [ramp(step, *DECAYS[kind]) for step in (0, 74, 75, 208, 500, 10_000)]
    assert found == pytest.approx(expected, abs=1e-15)


def first_round(module, **options):
    """Fit one round; return its trajectory and its minibatches."""
    trajectories, minibatches = [], []
    collect, loss = module.collect, module.loss
    module.collect = lambda *a: (trajectories.append(collect(*a)), trajectories[-1])[1]
    module.loss = lambda m: (minibatches.append(m), loss(m))[1]
    fit(module, **options)
    return trajectories, minibatches


def gradients_of(module, loss):
    module.zero_grad()
    loss.backward()
    return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def assert_same_gradients(found, expected, rtol=1e-3):
    """Up to rounding: some are zero but for it, of biases before a softmax or a normalisation."""
    assert found.keys() == expected.keys()
    scale = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in found.items():
        atol = 0.01 * rtol * scale
        torch.testing.assert_close(gradient, expected[name], atol=atol, rtol=rtol, msg=name)


@FORMS
@FAMILIES
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_first_gradient_is_that_of_the_advantage_times_the_plain_loss(family, form, beta):
    recorder = Recorder()
    module = make(family, form=form, nft_beta=beta, kl_beta=0.0, lr=0.0, adv_clip_max=0.7)
    _, (pairs, *_) = first_round(module, callbacks=[recorder])
    assert (pairs.advantages.abs() > 0.69).any()  # some are clipped
    noised, target = module.corrupt(pairs)
    output = module.predict(pairs, noised)
    if form == "x0":
        output = module.policy.scheduler.clean(output, noised, pairs.timesteps)
        target = pairs.clean
    plain = matching_error(output, target, normalise=form == "x0")
    loss = (pairs.weights * pairs.advantages * plain).mean()
    assert_same_gradients(recorder.gradients[0], gradients_of(module, loss))


def test_shares_are_half_and_half_without_advantage_and_bounded():
    module = make(kl_beta=0.0, form="output", adv_clip_max=5.0)
    old, output, target = draws(3, 4, 4, 8, 8).float()
    pairs = SimpleNamespace(advantages=torch.tensor([0.0, 5.0, -5.0, 2.5]))
    loss, _ = module.pair_loss(pairs, ForwardOutputs(old, target, output, old))
    gap = {
        sign: matching_error(old + sign * (output - old), target, False).float() for sign in (1, -1)
    }
    share = torch.tensor([0.5, 1.0, 0.0, 0.75])
    expected = 5 * (share * gap[1] + (1 - share) * gap[-1])
    torch.testing.assert_close(loss, expected)


def test_rollouts_keep_clean_latents_and_all_but_one_time():
    module = make(num_inference_steps=5, minibatch_size=32, train="lora")
    (trajectory,), minibatches = first_round(module)
    assert trajectory.latents.shape == (8, 1, 4, 8, 8)
    assert trajectory.log_probs.isnan().all()
    times = module.policy.scheduler.timesteps
    by_sample = {}
    for pairs in minibatches:
        for clean, time in zip(pairs.clean, pairs.timesteps, strict=True):
            by_sample.setdefault(tuple(clean.flatten().tolist()), []).append(time.item())
    assert len(by_sample) == 8
    for seen in by_sample.values():
        assert len(set(seen)) == len(seen) == 4  # of 5
        assert set(seen) < set(times.tolist())
    assert len({tuple(seen) for seen in by_sample.values()}) > 4  # in orders of their own
    assert len({*times.tolist()} - {s[0] for s in by_sample.values()}) < 5


def test_noise_is_fresh_for_each_time_sample_and_round_and_kept_in_inner_passes():
    module = make(num_inner_epochs=2, minibatch_size=16, train="lora")
    _, minibatches = first_round(module, max_epochs=2)
    assert len(minibatches) == 4  # one for each pass and round
    rounds = [torch.cat([m.noise for m in minibatches[k : k + 2]]) for k in (0, 2)]
    keys = [[(c.flatten()[0].item(), t.item()) for m in minibatches[k : k + 2]
             for c, t in zip(m.clean, m.timesteps, strict=True)] for k in (0, 2)]  # fmt: skip
    known = {}
    for key, noise in zip(itertools.chain(*keys), torch.cat(rounds), strict=True):
        if key in known:
            assert torch.equal(known[key], noise)
        known[key] = noise
    assert len(set(keys[0])) < len(keys[0])  # both passes saw some pairs
    flat = torch.stack(list(known.values())).flatten(1)
    assert len(flat.unique(dim=0)) == len(flat)
    assert flat.mean().abs() < 5 / flat.numel() ** 0.5


def test_all_samplers_and_predictions_are_taken():
    """No step has a density; and where steps could have noise, rollouts add none."""
    latents = []
    for kind in ("ode", "flow"):
        scheduler = partial(StochasticFlowMatch, kind=kind)
        module = make(policy_options={"scheduler": scheduler}, train="lora")
        latents.append(first_round(module)[0][0].latents)
    assert torch.equal(latents[0], latents[1])
    noisy = first_round(make(stochastic_rollout=True, train="lora"))[0][0].latents
    assert not torch.equal(noisy, latents[0])
    for prediction in ("epsilon", "v_prediction"):
        options = {"prediction_type": prediction, "scheduler": partial(StochasticDDIM, eta=0.0)}
        module = make("sd", "lora", policy_options=options)
        before = weights(module, True)
        fit(module)
        assert any(not torch.equal(p, before[n]) for n, p in weights(module, True).items())


def test_the_old_policy_samples():
    """That of the start if it never moves, the trained one of each round's start without decay."""
    untrained, _ = first_round(make(train="lora", lr=0.0), max_epochs=2)
    frozen = make(train="lora")
    frozen.keep_snapshot(0, 1.0, 1.0)  # from the first update on, all of the past is kept
    forever, _ = first_round(frozen, max_epochs=2)
    current, _ = first_round(make(train="lora", decay_type=0), max_epochs=2)
    for mine in (forever, current):
        assert torch.equal(mine[0].latents, untrained[0].latents)
    assert torch.equal(forever[1].latents, untrained[1].latents)
    assert not torch.equal(current[1].latents, untrained[1].latents)
    assert any(p.any() for n, p in weights(frozen, True).items() if "lora_B" in n)  # it did train


class Watch(Callback):
    """Keeps the old policy and the weights before each update and after the last one."""

    def __init__(self):
        self.old, self.weights = [], []

    def note(self, module):
        self.old.append({n: a.clone() for n, a in module.snapshot.average.items()})
        self.weights.append(weights(module.policy, True))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.note(pl_module)

    def on_train_end(self, trainer, pl_module):
        self.note(pl_module)


def test_the_old_policy_is_refreshed_once_before_each_round():
    module, watch = make(decay_type=2), Watch()
    module.keep_snapshot(0, 0.1, 0.3)
    fit(module, callbacks=[watch], max_epochs=3)
    assert len(watch.old) == 3 * 2 + 1
    old = watch.weights[0]
    for step in range(6):
        if step in (2, 4):  # a round begins, after so many updates
            decay = {2: 0.2, 4: 0.3}[step]
            old = {n: decay * a + (1 - decay) * watch.weights[step][n] for n, a in old.items()}
        for name, average in watch.old[step].items():
            torch.testing.assert_close(average, old[name], atol=1e-7, rtol=1e-5)
    assert_equal(watch.old[5], watch.old[6])  # the last round's end begins no other


def test_the_penalty_pulls_to_the_pretrained_network():
    module, recorder = make(kl_beta=0.5, num_inner_epochs=2), Recorder()
    with torch.no_grad():
        reference = module.policy._reference
        before = {n: p.clone() for n, p in reference.named_parameters()}
    (_,), minibatches = first_round(module, callbacks=[recorder])
    assert_equal({n: p for n, p in reference.named_parameters()}, before)
    for name in ("train/kl_to_reference", "train/old_gap"):
        first, *others = (row[name] for row in recorder.metrics)
        assert first == 0
        assert min(others) > 0
    pairs = minibatches[-1]
    noised, _ = module.corrupt(pairs)
    with torch.no_grad(), module.policy.reference():
        pretrained = module.predict(pairs, noised)
    gap = (module.predict(pairs, noised) - pretrained).square().mean()
    penalty = gradients_of(module, 0.5 * gap)
    loss, logs = DiffusionNFT.loss(module, pairs)
    assert logs["train/kl_to_reference"].item() == pytest.approx(gap.item(), rel=1e-5)
    total = gradients_of(module, loss)
    module.kl_beta = 0.0
    without = gradients_of(module, DiffusionNFT.loss(module, pairs)[0])
    assert_same_gradients({n: g - without[n] for n, g in total.items()}, penalty, rtol=1e-2)


class HalfBlind(RewardModule):
    """Cannot score every other image."""

    def forward(self, images, prompts, metadata=None, group_ids=None):
        scores = images.mean(dim=(1, 2, 3)) + torch.arange(len(images)) // 2
        scores[::2] = torch.nan
        return scores


def test_unscored_images_do_not_count():
    module = make(reward=HalfBlind(), max_invalid_fraction=0.5, advantage_norm="batch", lr=0.0)
    (trajectory,), minibatches = first_round(module)
    blind = trajectory.rewards.isnan()
    assert blind.tolist() == [True, False] * 4
    assert trajectory.weights.tolist() == [0, 2] * 4
    pairs = minibatches[0]
    assert (pairs.weights == 0).any()
    poisoned = pairs.replace(
        clean=pairs.clean.where(pairs.weights.view(-1, 1, 1, 1) > 0, 7.0),
        advantages=pairs.advantages.where(pairs.weights > 0, -3.0),
    )
    own, other = (
        gradients_of(module, DiffusionNFT.loss(module, each)[0]) for each in (pairs, poisoned)
    )
    assert_same_gradients(own, other)


def test_every_network_call_is_counted():
    recorder = Recorder()
    fit(make(kl_beta=0.1, guidance_scale=2.0), callbacks=[recorder], max_epochs=2)
    # Two rounds of 8 samples: 3 steps sampled; 2 times by the trained, old and pretrained weights.
    assert recorder.metrics[-1]["denoiser_calls"] == 2 * (8 * 3 + 8 * 2 * 3) * 2
    decays = [row["rollout/snapshot_decay"] for row in recorder.metrics]
    assert decays == pytest.approx([0, 0, 0.002, 0.002])  # after 2 updates, by the default type
    fit(make(kl_beta=0.0), callbacks=[recorder])
    assert recorder.metrics[-1]["denoiser_calls"] == 8 * 3 + 8 * 2 * 2
    expected = {"train/old_gap", "train/positive_error", "train/negative_error",
                "rollout/zero_std_fraction", "rollout/snapshot_decay"}  # fmt: skip
    assert expected <= set(recorder.metrics[-1])


@pytest.mark.parametrize(("family", "train"), [("sd", "lora"), ("sd3", "full")])
def test_every_checkpoint_resumes_bit_by_bit(family, train, tmp_path):
    """In the middle of a round, at its end, and in the middle of the next one."""

    def made():
        module = make(family, train, kl_beta=0.1)
        module.keep_snapshot(0, 0.1, 0.5)  # so that the old policy is one of its own
        return module

    saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    whole, recorder = made(), Recorder()
    fit(whole, callbacks=[saver, recorder], enable_checkpointing=True, max_epochs=2)
    for step in (1, 2, 3):
        path = tmp_path / f"step={step}.ckpt"
        stored = torch.load(path, weights_only=True)["lit_align"]["snapshot"]
        assert set(stored["average"]) == set(weights(whole.policy, True))
        resumed, again = made(), Recorder()
        fit(resumed, resume=path, callbacks=[again], max_epochs=2)
        assert_equal(weights(resumed, True), weights(whole, True))
        assert_equal(resumed.snapshot.average, whole.snapshot.average)
        assert resumed.snapshot.step == whole.snapshot.step == 2
        assert resumed.counters == whole.counters
        last, wanted = (
            {k: v for k, v in each.metrics[-1].items() if "time/" not in k}
            for each in (again, recorder)
        )
        assert last == wanted


def test_a_second_run_starts_with_its_own_weights():
    module = make()
    fit(module)
    disturb(module)
    trained, watch = weights(module.policy, True), Watch()
    fit(module, callbacks=[watch])
    assert_equal(watch.old[0], trained)


def test_a_checkpoint_asked_for_in_a_rollout_holds_the_trained_weights():
    """As a signal does; the old policy is in place then."""
    module, stored = make(), []

    decode = module.policy.decode

    def asking(latents, *args, **kwargs):
        if module.snapshot.displaced:
            displaced = {n: w.clone() for n, w in module.snapshot.displaced.items()}
            dump = module.trainer._checkpoint_connector.dump_checkpoint()
            stored.append((displaced, weights(module.policy, True), copy.deepcopy(dump)))
        return decode(latents, *args, **kwargs)

    module.policy.decode = asking
    fit(module, max_epochs=2)
    assert len(stored) == 2  # one batch a round
    trained, in_place, dump = stored[1]
    assert any(not torch.equal(w, in_place[n]) for n, w in trained.items())
    assert_equal(dump["state_dict"], {f"policy.{n}": w for n, w in trained.items()})


def test_a_round_that_failed_is_collected_again_with_the_same_old_policy():
    class Fails(Colorfulness):
        def forward(self, images, prompts, metadata=None, group_ids=None):
            if self.failing and self.training:
                raise OSError("no answer")
            return super().forward(images, prompts, metadata, group_ids)

    outcomes = []
    for failing in (False, True):
        reward = Fails()
        reward.failing = False
        module = make(train="lora", reward=reward)
        module.keep_snapshot(0, 0.3, 0.9)
        fit(module)
        batch = module.plan.deal(experience_of(module).prompts, 1)
        before = weights(module, True)
        if failing:
            reward.failing = True
            with pytest.raises(RuntimeError, match="no answer"):
                module.collect(batch, 1)
            assert_equal(weights(module, True), before)
            reward.failing = False
        outcomes.append((module.collect(batch, 1), dict(module.snapshot.average)))
    assert torch.equal(outcomes[0][0].latents, outcomes[1][0].latents)
    assert_equal(outcomes[0][1], outcomes[1][1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "eps"}, "`form` must be one of 'x0', 'output', got 'eps'"),
        ({"nft_beta": 0.0}, "`nft_beta` must be positive, got 0.0"),
        ({"decay_type": 3}, "`decay_type` must be 0, 1 or 2, got 3"),
        ({"kl_beta": -1.0}, "`kl_beta` must be at least 0"),
        ({"adv_clip_max": 0.0}, "`adv_clip_max` positive, got"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_options_without_a_meaning_are_refused():
    with pytest.raises(TypeError, match="drop_last_step"):
        make(drop_last_step=True)

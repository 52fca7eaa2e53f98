import warnings

import pytest
import torch
from torch import nn

from lit_align.algorithms import AlignProp, DRaFT, DRTune, ReFL
from lit_align.algorithms.denoising import denoising_loss
from lit_align.algorithms.pixels import decode_pixels, pixel_gradient
from lit_align.data.image_text import PairStream, ShapesPairs
from lit_align.policies import sampling
from lit_align.rewards import JPEGCompressibility
from lit_align.rewards.scoring import RewardError
from lit_align.trajectory import PairBatch
from tests.algorithms.gradient_toy import (
    PROMPTS,
    RANGE,
    SHAPE,
    STEPS,
    BlindNetwork,
    Score,
    coefficients,
    curved,
    drawn_gradient,
    gradient,
    loss_gradient,
    make,
    minibatch,
    plain_loop,
)
from tests.algorithms.harness import fit, prompt_loader
from tests.conftest import tiny_policy

RTOL = 1e-10
FLOAT32_RTOL = 1e-5
ALL = range(STEPS)
LAST = (STEPS - 1,)
FAMILIES = pytest.mark.parametrize("family", ["ddim", "flow"])
EVERY_STEP = {"train_step_strategy": "tail", "truncation_steps": STEPS}
METHODS = [
    (ReFL, {}),
    (DRaFT, {"truncation_steps": 2}),
    (DRaFT, {"num_lv_samples": 2}),
    (AlignProp, {"truncation_steps": 2}),
    (DRTune, {"truncation_steps": 2}),
    (DRTune, {"truncation_steps": 2, "early_stop_ratio": 0.5}),
]
EACH_METHOD = pytest.mark.parametrize(("method", "options"), METHODS)


def close(actual, expected, rtol=RTOL):
    """Compare, after making sure that there is something to compare."""
    assert expected.norm() > 1e-6
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * expected.norm().item())


def lora_method(method, family="sd", reward=None, **options):
    """Return a method on a tiny pipeline of the real classes."""
    sizes = {"num_inference_steps": 3, "guidance_scale": 1.0, "prompts_per_round": 4}
    policy = tiny_policy(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # modules passed as arguments, which is meant
        return method(policy, reward or Score(mean_score), **{**sizes, **options})


def mean_score(images, prompts):
    return images.mean((1, 2, 3))


# The gradient through the sampler


@FAMILIES
@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_draft_with_all_steps_equals_plain_back_propagation(family, noise, guidance):
    options = {"stochastic_sampling": noise, "guidance_scale": guidance}
    module = make(DRaFT, family, truncation_steps=STEPS, **options)
    expected = gradient(module, curved(plain_loop(module, ALL)[0]))
    close(drawn_gradient(module), expected)


@pytest.mark.parametrize(("family", "steps"), [("ddim", 2), ("flow", 2), ("flow", 8)])
def test_noise_does_not_depend_on_the_schedule_of_the_last_evaluation(family, steps):
    module = make(DRaFT, family, stochastic_sampling=True)
    (expected,) = module.draw(minibatch()).latents
    module.policy.scheduler.set_timesteps(steps)
    (latents,) = module.draw(minibatch()).latents
    assert torch.equal(latents, expected)


@FAMILIES
@pytest.mark.parametrize("count", [1, 2, 3])
def test_draft_k_has_the_gradient_of_the_last_steps(family, count):
    module = make(DRaFT, family, truncation_steps=count)
    expected = gradient(module, curved(plain_loop(module, ALL[-count:])[0]))
    close(drawn_gradient(module), expected)


def test_without_gradient_of_the_unconditional_branch():
    module = make(DRaFT, truncation_steps=STEPS, guidance_scale=3.0, cfg_grad="cond_only")
    expected = gradient(module, curved(plain_loop(module, ALL, cfg_grad="cond_only")[0]))
    close(drawn_gradient(module), expected)


@FAMILIES
def test_the_loss_has_the_gradient_of_the_reward(family):
    # L = -mean r with r linear in pixels, and pixels = latents / RANGE + 1/2.
    module = make(DRaFT, family, truncation_steps=STEPS)
    weight = module.reward.weight.double()
    x = plain_loop(module, ALL)[0]
    expected = gradient(module, -(weight * x / RANGE).flatten(1).sum(1).mean())
    loss, logs = module.loss(minibatch())
    assert logs["train/saturated"] == 0
    close(gradient(module, loss), expected)
    rewards = (weight * (x / RANGE + 0.5)).flatten(1).sum(1)
    assert loss.item() == pytest.approx(-rewards.mean().item(), rel=FLOAT32_RTOL)
    assert logs["rollout/reward/Score"].item() == pytest.approx(-loss.item())


def test_checkpoints_change_nothing_and_call_the_network_again(monkeypatch):
    # 3 steps of 4 samples, of which backward repeats 2.
    module = make(DRaFT, steps=3, truncation_steps=2)
    checkpointed = drawn_gradient(module)
    assert module.policy.calls == 4 * (3 + 2)
    direct = lambda function, *args, **options: function(*args, **options)  # noqa: E731
    monkeypatch.setattr(sampling, "with_checkpoint", direct)
    module.policy.calls = 0
    close(drawn_gradient(module), checkpointed)
    assert module.policy.calls == 4 * 3


def streamed(module, through_inputs, steps=ALL):
    """Return the gradient of `curved`, walking back with one step's graph at a time.

    g = d r / d x_T;  for i = T-1..0:  theta.grad += d <b g, out(x_i)>,  g <- a g + b J^T g
    """
    policy = module.policy
    with torch.no_grad():
        last, _, states = plain_loop(module, ALL)
    last.requires_grad_()
    (adjoint,) = torch.autograd.grad(curved(last).sum(), last)
    total = 0.0
    for index in reversed(ALL):
        a, b = coefficients(policy, index)
        x = states[index].double().requires_grad_()
        times = policy.scheduler.timesteps[index].expand(len(x))
        output = policy.predict(x, times, policy.encode_prompt(PROMPTS), module.guidance_scale)
        weights = list(policy.denoiser.parameters())
        *own, through = torch.autograd.grad(
            (b * adjoint * output).sum(), [*weights, x], allow_unused=True, materialize_grads=True
        )
        if index in steps:
            total = total + nn.utils.parameters_to_vector(own)
        adjoint = a * adjoint + (through if through_inputs else 0.0)
    return total


@FAMILIES
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_graph_equals_the_adjoint_streamed_step_by_step(family, guidance):
    module = make(DRaFT, family, truncation_steps=STEPS, guidance_scale=guidance)
    close(drawn_gradient(module), streamed(module, through_inputs=True))


@FAMILIES
@pytest.mark.parametrize("steps", [(0, 2), (1,), (0, 1, 2, 3)])
def test_drtune_is_a_weighted_sum_of_single_steps(family, steps):
    # d x_T / d theta = sum over S of (prod_{j > i} a_j) b_i d out(x_i) / d theta
    module = make(DRTune, family, train_step_strategy="list", train_steps=steps, guidance_scale=3.0)
    close(drawn_gradient(module), streamed(module, through_inputs=False, steps=steps))


@FAMILIES
@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("see_through", [False, True])
def test_drtune_equals_a_plain_loop_past_the_inputs(family, noise, see_through):
    module = make(
        DRTune, family, train_step_strategy="list", train_steps=(0, 2),
        stop_input_grad=not see_through, stochastic_sampling=noise,
    )  # fmt: skip
    expected = gradient(module, curved(plain_loop(module, (0, 2), see_through)[0]))
    close(drawn_gradient(module), expected)


@FAMILIES
def test_drtune_stops_early_at_the_predicted_clean_latents(family):
    # round(0.25 * 4) = 1, so that it always stops one step before the end.
    module = make(DRTune, family, early_stop_ratio=0.25, truncation_steps=3)
    expected = gradient(module, curved(plain_loop(module, range(3), False, total=3)[1]))
    close(drawn_gradient(module), expected)


# Methods that are special cases of each other


@pytest.mark.parametrize("noise", [False, True])
def test_draft_1_on_a_flow_equals_refl_at_the_last_step(noise):
    # The last step goes to t = 0, so that x' = x - t v is the prediction itself.
    refl = make(ReFL, "flow", stochastic_sampling=noise)
    draft = make(DRaFT, "flow", truncation_steps=1, stochastic_sampling=noise)
    draft.policy = refl.policy
    close(drawn_gradient(draft), drawn_gradient(refl))


@FAMILIES
@pytest.mark.parametrize("step", [0, 2])
def test_refl_has_the_gradient_of_one_prediction(family, step):
    module = make(ReFL, family, min_step=step, max_step=step, stochastic_sampling=True)
    expected = gradient(module, curved(plain_loop(module, (step,), total=step + 1)[1]))
    close(drawn_gradient(module), expected)


@FAMILIES
@pytest.mark.parametrize("count", range(1, STEPS + 1))
def test_alignprop_with_a_fixed_draw_equals_draft_k(family, count):
    alignprop = make(AlignProp, family, truncation_steps=count, stochastic_sampling=True)
    draft = make(DRaFT, family, truncation_steps=count, stochastic_sampling=True)
    draft.policy = alignprop.policy
    close(drawn_gradient(alignprop), drawn_gradient(draft))


@FAMILIES
@pytest.mark.parametrize("strategy", ["tail", "uniform", "random"])
def test_drtune_on_all_steps_with_input_gradient_equals_draft(family, strategy):
    every = {"train_step_strategy": strategy, "truncation_steps": STEPS}
    drtune = make(DRTune, family, stop_input_grad=False, **every)
    draft = make(DRaFT, family, truncation_steps=STEPS)
    draft.policy = drtune.policy
    close(drawn_gradient(drtune), drawn_gradient(draft))


@FAMILIES
@pytest.mark.parametrize("stop", [False, True])
def test_drtune_on_the_last_step_equals_draft_1(family, stop):
    drtune = make(DRTune, family, train_step_strategy="last", stop_input_grad=stop)
    draft = make(DRaFT, family, truncation_steps=1)
    draft.policy = drtune.policy
    close(drawn_gradient(drtune), drawn_gradient(draft))


@FAMILIES
def test_drtune_equals_draft_if_the_network_does_not_see_the_latents(family):
    drtune = make(DRTune, family, network=BlindNetwork, **EVERY_STEP)
    draft = make(DRaFT, family, truncation_steps=STEPS)
    draft.policy = drtune.policy
    close(drawn_gradient(drtune), drawn_gradient(draft))


@FAMILIES
def test_drtune_on_all_steps_equals_flowbp_sparse(family):
    # arXiv:2606.11075: the cached sample, straight-through onto calls at the cached states,
    # x_0 + sum_i (prod_{j > i} a_j) b_i (out_i - sg out_i).
    module = make(DRTune, family, **EVERY_STEP)
    policy = module.policy
    with torch.no_grad():
        sample, _, states = plain_loop(module, ALL)
    tail = 1.0
    for index in reversed(ALL):
        times = policy.scheduler.timesteps[index].expand(len(sample))
        output = policy.predict(states[index], times, policy.encode_prompt(PROMPTS), 1.0)
        a, b = coefficients(policy, index)
        sample = sample + tail * b * (output - output.detach())
        tail = tail * a
    close(drawn_gradient(module), gradient(module, curved(sample)))


# DRaFT-LV


@FAMILIES
def test_draft_lv_without_repeats_is_draft_1(family):
    module = make(DRaFT, family, num_lv_samples=0)
    (latents,) = module.draw(minibatch()).latents
    expected, _, _ = plain_loop(module, LAST)
    assert torch.equal(latents, expected)


@FAMILIES
def test_draft_lv_equals_draft_1_if_nothing_depends_on_the_noise(family):
    # Its network sees no latents and its reward is linear, so this holds for every noise.
    lv = make(DRaFT, family, network=BlindNetwork, num_lv_samples=3)
    draft = make(DRaFT, family)
    draft.policy = lv.policy
    linear = lambda x: x.flatten(1) @ torch.arange(12.0, dtype=torch.float64)  # noqa: E731
    assert not torch.equal(*lv.draw(minibatch()).latents[1:3])
    close(drawn_gradient(lv, linear), drawn_gradient(draft, linear))
    close(loss_gradient(lv), loss_gradient(draft))


def test_draft_lv_repeats_the_last_step_from_fresh_noise_of_its_level():
    # x_1 = (1 - t) sg(x_0) + t eps and x_0 = x_1 - t v; without gradient into x_1. The noise is
    # what the network's input leaves: eps = (x_1 - (1 - t) x_0) / t.
    module = make(DRaFT, "flow", num_lv_samples=2)
    seen, predict = [], module.policy.predict

    def spy(latents, *args, **options):
        seen.append(latents)
        return predict(latents, *args, **options)

    module.policy.predict = spy
    first, *repeated = module.draw(minibatch()).latents
    t = module.policy.scheduler.sigmas[-2].double()
    for x, result in zip(seen[STEPS:], repeated, strict=True):
        assert not x.requires_grad
        eps = ((x - (1 - t) * first) / t).detach()
        assert eps.mean().abs() < 3 / 48**0.5  # 48 standard normals, within 3 sigma
        assert 0.6 < eps.std() < 1.4
        times = module.policy.scheduler.timesteps[-1].expand(len(x))
        velocity = predict(x, times, module.policy.encode_prompt(PROMPTS), 1.0)
        close(result, x - t * velocity)
        close(gradient(module, curved(result)), gradient(module, curved(x - t * velocity)))


def test_repeats_are_scored_by_their_own_prompt():
    prompts = []
    score = lambda images, texts: prompts.extend(texts) or images.sum((1, 2, 3))  # noqa: E731
    module = make(DRaFT, score=score, num_lv_samples=2)
    module.loss(minibatch())
    assert prompts == PROMPTS * 3


# Which gradients are zero, and whose


@EACH_METHOD
@FAMILIES
def test_a_constant_reward_has_no_gradient(method, options, family):
    module = make(method, family, lambda images, prompts: (images * 0).sum((1, 2, 3)), **options)
    assert not loss_gradient(module).any()


@EACH_METHOD
def test_the_hinge_has_no_gradient_beyond_the_margin(method, options):
    above = make(method, hinge_margin=-1e3, **options)
    assert not loss_gradient(above).any()
    below = make(method, hinge_margin=1e3, **options)
    assert loss_gradient(below).any()


@pytest.mark.parametrize("family", ["sd", "sd3"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        (ReFL, {"min_step": 1, "max_step": 2}),
        (DRaFT, {"num_lv_samples": 1, "beta": 0.5}),
        (AlignProp, {"truncation_steps": 2}),
        (DRTune, {"truncation_steps": 2, "early_stop_ratio": 0.0}),
    ],
)
def test_only_trained_weights_get_a_gradient(method, options, family):
    class Learned(Score):
        def __init__(self):
            super().__init__(lambda images, prompts: self.factor * images.mean((1, 2, 3)))
            self.factor = nn.Parameter(torch.ones(()))

    module = lora_method(method, family, Learned(), **options)
    module._trainer = make(DRaFT)._trainer
    loss, _ = module.loss(minibatch(PROMPTS[:2]))
    loss.backward()
    trained = [p for p in module.policy.parameters() if p.requires_grad]
    assert any(p.grad is not None and p.grad.any() for p in trained)
    frozen = [p for p in module.policy.parameters() if not p.requires_grad]
    assert any(p is module.policy.vae.decoder.conv_in.weight for p in frozen)
    assert all(p.grad is None for p in [*frozen, *module.reward.parameters()])


def test_no_gradient_reaches_the_copy_of_the_pretrained_weights():
    module = make(DRaFT, beta=1.0)
    loss, _ = module.loss(minibatch())
    loss.backward()
    others = [*module.policy._reference.parameters(), *module.policy.vae.parameters()]
    assert all(p.grad is None for p in [*others, *module.reward.parameters()])
    assert all(p.grad is not None for p in module.policy.denoiser.parameters())


@EACH_METHOD
def test_another_prompt_changes_only_its_own_sample(method, options):
    changed = [*PROMPTS[:2], "three yellow trees", *PROMPTS[3:]]
    module = make(method, guidance_scale=3.0, **options)
    before, after = (
        [
            [gradient_of_sample(module, x, sample) for x in drawn.latents]
            for sample in range(len(PROMPTS))
        ]
        for drawn in (module.draw(minibatch()), module.draw(minibatch(changed)))
    )
    for sample in range(len(PROMPTS)):
        same = [torch.equal(a, b) for a, b in zip(before[sample], after[sample], strict=True)]
        assert all(same) if sample != 2 else not any(same)


def gradient_of_sample(module, latents, sample):
    weights = list(module.policy.denoiser.parameters())
    found = torch.autograd.grad(curved(latents)[sample], weights, retain_graph=True)
    return nn.utils.parameters_to_vector(found)


def test_another_prompt_changes_only_its_own_reward_gradient():
    def by_length(images, prompts):
        return images.square().sum((1, 2, 3)) * torch.tensor([float(len(p)) for p in prompts])

    module = make(DRaFT, score=by_length)
    images = torch.rand(4, *SHAPE)
    _, before = pixel_gradient(module, images, minibatch().batch)
    _, after = pixel_gradient(module, images, minibatch([*PROMPTS[:3], "a"]).batch)
    assert torch.equal(before[:3], after[:3])
    # r = |p| x^2, so dr/dx = 2 |p| x, with |p| of 16 and 1
    torch.testing.assert_close(before[3], 32 * images[3])
    torch.testing.assert_close(after[3], 2 * images[3])


# Losses


@pytest.mark.parametrize(
    ("options", "losses", "slopes"),
    [
        ({}, [2.0, -1.0, -3.0], [-2.0, -2.0, -2.0]),
        ({"hinge_margin": 0.5}, [3.0, 0.0, 0.0], [-2.0, 0.0, 0.0]),
        ({"target_reward": 1.0}, [4.0, 1.0, 1.0], [-2.0, -2.0, 2.0]),
    ],
)
def test_losses_of_three_rewards(options, losses, slopes):
    rewards = torch.tensor([-1.0, 0.5, 1.5], requires_grad=True)
    result = make(DRaFT, **{"loss_scale": 2.0, **options}).loss_of(rewards)
    assert result.tolist() == losses
    result.sum().backward()
    assert rewards.grad.tolist() == slopes


def test_the_loss_is_that_of_the_rewards_and_its_gradient_scales():
    hinge = make(DRaFT, hinge_margin=1e3, loss_scale=0.25)
    plain = make(DRaFT)
    plain.policy = hinge.policy
    loss, logs = hinge.loss(minibatch())
    assert loss.item() == pytest.approx(0.25 * (1e3 - logs["rollout/reward/Score"].item()))
    close(gradient(hinge, loss), 0.25 * loss_gradient(plain))


# Images without a score


def partly_unscored(bad):
    """Return a score that is NaN for some images, and so is its derivative there."""

    def score(images, prompts):
        scores = images.square().sum((1, 2, 3))
        return scores * torch.tensor([torch.nan if i in bad else 1.0 for i in range(len(images))])

    return score


def test_an_image_without_score_has_no_gradient():
    module = make(DRaFT, score=partly_unscored({1}), max_invalid_fraction=0.25)
    rewards, slopes = pixel_gradient(module, torch.rand(4, *SHAPE), minibatch().batch)
    assert rewards.isnan().tolist() == [False, True, False, False]
    assert slopes.isfinite().all()
    assert not slopes[1].any()
    loss, _ = module.loss(minibatch())
    assert loss.isfinite()
    assert module._round_logs["rollout/invalid"] == 1
    scored = make(DRaFT, score=partly_unscored(()))
    scored.policy = module.policy
    images = decode_pixels(module.policy, plain_loop(module, LAST)[0], None, "clamped")
    squares = images.square().sum((1, 2, 3))[[0, 2, 3]]
    assert loss.item() == pytest.approx(-squares.mean().item())
    close(gradient(module, loss), gradient(module, -squares.mean()), FLOAT32_RTOL)


def test_too_many_images_without_score_stop_the_run():
    # A round of 8 samples may have 2; the next round starts from 0 again.
    module = make(DRaFT, score=partly_unscored({1}), max_invalid_fraction=0.25, prompts_per_round=8)
    module.loss(minibatch())
    module.loss(minibatch(first=4))
    assert module._round_logs["rollout/invalid"] == 2
    with pytest.raises(RewardError, match="Score could not score 3 of the round's 8 images"):
        module.loss(minibatch())
    module.loss(minibatch().replace(round_index=1))
    assert module._round_logs["rollout/invalid"] == 1


def test_one_of_the_repeated_images_without_score_counts():
    module = make(DRaFT, score=partly_unscored({5}), num_lv_samples=2, max_invalid_fraction=1.0)
    module.loss(minibatch())
    assert module._round_logs["rollout/invalid"] == 1


def test_a_batch_without_any_score_has_no_gradient():
    nothing = lambda images, prompts: torch.full((len(images),), torch.nan)  # noqa: E731
    module = make(DRaFT, score=nothing, max_invalid_fraction=1.0)
    loss, _ = module.loss(minibatch())
    assert loss == 0
    assert not gradient(module, loss).any()


def test_a_reward_that_only_claims_a_gradient_is_named():
    module = make(DRaFT, score=lambda images, prompts: images.detach().sum((1, 2, 3)))
    with pytest.raises(RewardError, match="Score"):
        module.loss(minibatch())


# Pixels


def test_straight_through_shows_rounded_pixels_and_passes_every_gradient():
    seen = []
    score = lambda images, prompts: seen.append(images.detach()) or images.sum((1, 2, 3))  # noqa: E731
    module = make(DRaFT, score=score, pixel_grad="straight_through")
    # pixel = latent / RANGE + 1/2: -0.5, 0.5 = 127.5 levels and so 128, 100.3 levels, 2
    pixels = torch.tensor([-0.5, 0.5, 100.3 / 255, 2.0], dtype=torch.float64)
    latents = RANGE * (pixels - 0.5)
    latents = latents.expand(4, 3, 4).reshape(4, *SHAPE).requires_grad_()
    loss, _ = module.reward_loss(latents, minibatch())
    expected = torch.tensor([0.0, 128.0, 100.0, 255.0]) / 255
    torch.testing.assert_close(seen[0][0, 0].flatten(), expected)
    (slope,) = torch.autograd.grad(loss, latents)
    assert torch.equal(slope, torch.full_like(latents, -1 / RANGE / 4))  # of the mean of 4


def test_clamped_pixels_have_no_gradient():
    module = make(DRaFT, score=lambda images, prompts: images.sum((1, 2, 3)))
    latents = RANGE * torch.tensor([-1.0, 0.0, 0.1, 1.5], dtype=torch.float64)
    latents = latents.expand(4, 3, 4).reshape(4, *SHAPE).requires_grad_()
    loss, logs = module.reward_loss(latents, minibatch())
    (slope,) = torch.autograd.grad(loss, latents)
    assert slope[0, 0].flatten().tolist() == [0, -1 / RANGE / 4, -1 / RANGE / 4, 0]
    assert logs["train/saturated"] == 0.5


def test_rewards_and_decoders_run_in_float32_under_autocast():
    seen = []
    mixing = torch.randn(12, 5)

    def score(images, prompts):
        seen.append((images.dtype, torch.is_autocast_enabled("cpu")))
        return (images.flatten(1) @ mixing).sin().sum(1)

    module = make(DRaFT, score=score)
    latents = torch.randn(4, *SHAPE, dtype=torch.float64, requires_grad=True)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            images = decode_pixels(module.policy, latents, 2, "clamped")
            rewards, slopes = pixel_gradient(module, images, minibatch().batch)
            loss, _ = module.reward_loss(latents, minibatch())
        (chained,) = torch.autograd.grad(loss, latents)
        results.append((images, rewards, slopes, chained))
    assert set(seen) == {(torch.float32, False)}
    for exact, cast in zip(*results, strict=True):
        assert exact.dtype == cast.dtype
        assert torch.equal(exact, cast)


@pytest.mark.parametrize("pixel_grad", ["clamped", "straight_through"])
def test_decoding_in_parts_changes_nothing(pixel_grad):
    gradients = []
    whole = make(DRaFT, decode_batch_size=None, pixel_grad=pixel_grad)
    for size in (None, 1, 3):
        module = make(DRaFT, decode_batch_size=size, pixel_grad=pixel_grad)
        module.policy = whole.policy
        gradients.append(loss_gradient(module))
    for part in gradients[1:]:
        close(part, gradients[0])


# Penalties


@FAMILIES
def test_the_penalty_is_the_mean_squared_distance_of_outputs(family):
    module = make(DRaFT, family, truncation_steps=2, beta=3.0, guidance_scale=3.0)
    _, logs = module.loss(minibatch())
    assert logs["train/distance_to_reference"] == 0
    before = [p.detach().clone() for p in module.policy.denoiser.parameters()]
    for parameter in module.policy.denoiser.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    with torch.no_grad():
        _, _, states = plain_loop(module, ())
    moved = list(module.policy.denoiser.parameters())
    distances = [squared_distances(module, states[i], i, before, moved) for i in (2, 3)]
    expected = torch.cat(distances).mean()
    loss, logs = module.loss(minibatch())
    assert logs["train/distance_to_reference"].item() == pytest.approx(expected.item(), rel=RTOL)
    without = make(DRaFT, family, truncation_steps=2, guidance_scale=3.0)
    without.policy = module.policy
    alone, _ = without.loss(minibatch())
    close(gradient(module, loss), gradient(module, alone) + 3 * gradient(module, expected))


def squared_distances(module, x, index, before, moved):
    """Return the squared change of each element of the guided output at a state."""
    policy = module.policy
    names = [f"denoiser.{n}" for n, _ in policy.denoiser.named_parameters()]
    times = policy.scheduler.timesteps[index].expand(len(x))
    outputs = []
    for weights in (before, moved):
        arguments = (x, times, policy.encode_prompt(PROMPTS)["prompt"])
        nothing = torch.zeros_like(arguments[2])
        own = {n.removeprefix("denoiser."): w for n, w in zip(names, weights, strict=True)}
        conditional = torch.func.functional_call(policy.denoiser, own, arguments)
        empty = torch.func.functional_call(policy.denoiser, own, (x, times, nothing))
        outputs.append(empty + module.guidance_scale * (conditional - empty))
    return (outputs[0] - outputs[1]).square().flatten()


def test_the_penalty_of_adapters_is_differentiated_with_the_adapters_on():
    # Checkpoints run again in backward, when the adapters must not be off.
    module = lora_method(DRaFT, beta=2.0, truncation_steps=2)
    module._trainer = make(DRaFT)._trainer
    trained = [p for p in module.policy.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    drawn = module.draw(minibatch(PROMPTS[:2]))
    penalty = module._distance(drawn)
    assert penalty > 0
    checkpointed = torch.autograd.grad(penalty, trained)
    path, squares = drawn.trajectory, []
    for step in (1, 2):
        call = (path.latents[:, step].detach(), path.timesteps[:, step], path.conditioning, 1.0)
        with torch.no_grad(), module.policy.reference():
            base = module.policy.predict(*call)
        squares.append((module.policy.predict(*call) - base).square())
    direct = torch.autograd.grad(torch.stack(squares).mean(), trained)
    for left, right in zip(checkpointed, direct, strict=True):
        torch.testing.assert_close(left, right)


def test_pretraining_adds_its_weighted_loss():
    pairs = PairBatch(torch.rand(3, *SHAPE), PROMPTS[:3], torch.arange(3))
    module = make(ReFL, pretraining_beta=0.5)
    alone, _ = module.loss(minibatch())
    loss, logs = module.loss(minibatch(pairs=pairs))
    expected = denoising_loss(module.policy, pairs, module.seed).mean()
    assert logs["train/pretraining_loss"].item() == pytest.approx(expected.item(), rel=RTOL)
    assert (loss - alone).item() == pytest.approx(0.5 * expected.item())
    close(gradient(module, loss - alone), 0.5 * gradient(module, expected), FLOAT32_RTOL)


def test_pairs_need_a_weight_and_a_weight_needs_pairs():
    pairs = PairStream(ShapesPairs(size=2, seed=0), 0)
    with pytest.raises(ValueError, match="`pretraining_beta: 0.0` has no use for `data.init_arg"):
        make(DRaFT).experience(prompt_loader(), pairs)
    with pytest.raises(ValueError, match="`pretraining_beta: 0.5` needs `data.init_args.pairs`"):
        make(DRaFT, pretraining_beta=0.5).experience(prompt_loader())


def test_minibatches_bring_their_pairs():
    module = make(DRaFT, pretraining_beta=0.5, pretraining_batch_size=3, minibatch_size=2)
    stream = PairStream(ShapesPairs(size=20, seed=0), 0)
    module.experience(prompt_loader(), stream)
    # A round of 4 samples has 2 minibatches, so that of round 5 they are the 10th and 11th.
    batch = minibatch().batch
    first, second = module.minibatches(batch, 5)
    assert first.round_index == second.round_index == 5
    for number, cut in ((10, first), (11, second)):
        assert cut.pairs.positions.tolist() == stream.batch(number, 3).positions.tolist()
    together = [*first.batch.positions.tolist(), *second.batch.positions.tolist()]
    assert sorted(together) == batch.positions.tolist()


# Counters


def spent(method, samples=None, **options):
    """Return the denoiser calls, rewards and reward gradients of one minibatch of 4 samples."""
    module = make(method, **options)
    module.loss(samples or minibatch())
    names = ("denoiser_calls", "reward_queries", "gradient_queries")
    return [module.counters[name] for name in names]


def test_counters_equal_a_count_by_hand():
    # 4 samples of 4 steps; the repetition of calls in backward is not counted.
    assert spent(DRaFT) == [16, 4, 4]
    assert spent(DRaFT, guidance_scale=3.0) == [32, 4, 4]
    # ReFL stops after step 2, which is the third.
    assert spent(ReFL, min_step=2, max_step=2) == [12, 4, 4]
    # Two repeats: 8 more calls, and 12 images.
    assert spent(DRaFT, num_lv_samples=2, guidance_scale=3.0) == [48, 12, 12]
    # One step before the end, of 3 steps.
    assert spent(DRTune, early_stop_ratio=0.25) == [12, 4, 4]
    # The penalty calls the network and its base again, at 2 steps.
    assert spent(DRaFT, truncation_steps=2, beta=1.0) == [32, 4, 4]
    pairs = PairBatch(torch.rand(3, *SHAPE), PROMPTS[:3], torch.arange(3))
    assert spent(DRaFT, minibatch(pairs=pairs), guidance_scale=3.0) == [35, 4, 4]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@EACH_METHOD
def test_denoiser_calls_are_those_that_the_network_got(method, options, guidance):
    module = make(method, guidance_scale=guidance, beta=1.0, **options)
    reference = []
    module.policy._reference.register_forward_hook(lambda m, args, out: reference.append(1))
    module.loss(minibatch())
    assert reference
    assert module.counters["denoiser_calls"] == module.policy.calls


# Options


def test_a_reward_without_gradient_is_refused():
    with pytest.raises(ValueError, match="DRaFT follows the reward's gradient, and JPEGCompress"):
        fit(lora_method(DRaFT, reward=JPEGCompressibility()))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (DRaFT, {"hinge_margin": 1.0, "target_reward": 1.0}, "`hinge_margin` or `target_reward`"),
        (DRaFT, {"truncation_steps": 0}, r"`truncation_steps` must lie in \[1, 4\], got 0"),
        (DRaFT, {"truncation_steps": 5}, r"`truncation_steps` must lie in \[1, 4\], got 5"),
        (DRaFT, {"truncation_steps": 2, "num_lv_samples": 1}, "use `truncation_steps: 1`, got 2"),
        (
            AlignProp,
            {"truncation_steps": 5},
            r"must lie in \[1, 4\] for `truncation: fixed`",
        ),
        (AlignProp, {"truncation": "normal", "truncation_steps": 4}, r"must lie in \[1, 3\] for"),
        (ReFL, {"min_step": 3, "max_step": 2}, "must be steps of 0..3, got 3 and 2"),
        (ReFL, {"min_step": -1, "max_step": 2}, "must be steps of 0..3, got -1 and 2"),
        (ReFL, {"min_step": 3, "max_step": 4}, "must be steps of 0..3, got 3 and 4"),
        (DRTune, {"truncation_steps": 0}, "must be positive and fit"),
        (DRTune, {"truncation_steps": 4, "early_stop_ratio": 0.25}, "leaves of 4 steps, got 4"),
        (DRTune, {"early_stop_ratio": 1.0}, r"in \[0, 1\) leaves"),
        (DRTune, {"train_step_strategy": "list"}, r"of 0..3, each once, got \[\]"),
        (DRTune, {"train_steps": [1]}, "`train_step_strategy: list`, and only it"),
        (
            DRTune,
            {"train_step_strategy": "list", "train_steps": [4]},
            r"each once, got \[4\]",
        ),
        (DRTune, {"train_step_strategy": "list", "train_steps": [-1]}, r"each once, got \[-1\]"),
    ],
)
def test_bad_options_are_refused(method, options, message):
    with pytest.raises(ValueError, match=message):
        make(method, **options)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (AlignProp, {"truncation": "gaussian"}),
        (DRTune, {"train_step_strategy": "equal"}),
        (DRaFT, {"pixel_grad": "straight-through"}),
        (DRaFT, {"cfg_grad": "conditional"}),
    ],
)
def test_unknown_choices_are_refused(method, options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
        make(method, **options)


@pytest.mark.parametrize(
    "options",
    [{"train_step_strategy": "last"}, {"train_step_strategy": "list", "train_steps": [1]}],
)
def test_step_strategies_that_take_no_number_accept_the_default(options):
    make(DRTune, truncation_steps=5, **options)


def test_a_normal_draw_that_cannot_succeed_is_refused():
    # T - K = floor(N(0, 0)) = 0 never lies in 1..T-1.
    with pytest.raises(ValueError, match="`truncation_std`"):
        make(AlignProp, truncation="normal", truncation_steps=3, truncation_std=0.0)

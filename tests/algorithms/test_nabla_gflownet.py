import warnings

import pytest
import torch
from torch import nn

from lit_align.algorithms.nabla_gflownet import NablaGFlowNet
from lit_align.algorithms.pixels import latent_gradient
from lit_align.rewards.base import RewardModule
from tests.algorithms.gaussian_chain import (
    ROUNDING,
    SHAPE,
    ChainPolicy,
    Linear,
    Table,
    all_steps,
    attach,
    each,
    prompt_batch,
    sampled_mean,
    shift_gradient,
)
from tests.algorithms.harness import make_trainer, prompt_loader

BETA = 3.12
SLOPE = "1.25"  # c, which float32 holds exactly
SCALE = BETA * float(SLOPE)  # beta c = 3.9
STEPS = {"ddim": 50, "flow": 20}
MODES = ("alpha_bar", "sqrt", "one")
both_kinds = pytest.mark.parametrize("kind", ["ddim", "flow"])


def make(kind="ddim", correction=None, reward=None, steps=None, **options):
    """Return the method, with the tilt's correction times `correction` if that is given."""
    policy = ChainPolicy(kind, steps or STEPS[kind])
    if correction is not None:
        missed = SCALE * (policy.chain.ahead - policy.chain.seen(options["gamma_mode"]))
        correction = Table(policy, correction * missed)
    options = {
        "reward_scale": BETA, "trust_region_weight": 0.0, "guidance_scale": 1.0,
        "num_inference_steps": policy.chain.steps, "flow_correction": correction, **options,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # modules passed as arguments, which is meant
        return attach(NablaGFlowNet(policy, reward or Linear(), **options))


def test_the_toy_has_the_known_numbers():
    chain = ChainPolicy("ddim", 50).chain
    assert chain.terminal(torch.zeros(50)) == pytest.approx((0.698684, 0.205738), abs=5e-7)
    mean, variance = chain.terminal(chain.tilt(SCALE))
    assert (mean, variance) == pytest.approx((1.499635, 0.205738), abs=5e-7)
    assert chain.ahead[0] ** 2 == pytest.approx(3.7e-4, rel=0.02)  # what is left of x_0's variance


@both_kinds
def test_the_toy_takes_the_schedulers_steps(kind):
    policy = ChainPolicy(kind, STEPS[kind])
    chain, noisy = policy.chain, policy.chain.noisy
    policy.set(torch.randn(chain.steps))
    x = torch.randn(len(noisy), *SHAPE).double()
    times = policy.scheduler.timesteps[noisy]
    step = policy.scheduler.step(policy(x, times, {}), times, x, x)
    offset = chain.offset + chain.response * policy.denoiser.shift
    expected = chain.slope[noisy].view(-1, 1, 1, 1) * x + offset[noisy].view(-1, 1, 1, 1)
    torch.testing.assert_close(step.mean, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(step.std, chain.std[noisy], rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    "options",
    [{"loss_weighting": "std"}, {"gamma_mode": "linear"}, {"pixel_grad": "straight-through"}],
)
def test_unknown_choices_are_refused(options):
    (name, value), = options.items()  # fmt: skip
    with pytest.raises(ValueError, match=f"`{name}` must be one of .* got '{value}'"):
        make(**options)


@both_kinds
def test_without_a_reward_scale_the_pretrained_model_is_optimal(kind):
    module = make(kind, reward_scale=0.0, trust_region_weight=1e3)
    pairs = all_steps(module, SLOPE)
    assert shift_gradient(module, pairs).abs().max() == 0
    assert module.loss(pairs)[0] == 0


@both_kinds
@pytest.mark.parametrize("mode", MODES)
def test_the_tilted_chain_with_its_correction_is_balanced(kind, mode):
    module = make(kind, correction=1.0, gamma_mode=mode)
    policy = module.policy
    policy.set(policy.chain.tilt(SCALE))
    with torch.no_grad():  # the flow of the last state is the reward, whatever g says
        module.flow_correction.values[policy.chain.last] = 2.0
    pairs = all_steps(module, SLOPE)
    _, logs = module.loss(pairs)
    assert logs["train/forward_loss"] < (SCALE * ROUNDING) ** 2
    assert logs["train/backward_loss"] < (SCALE * ROUNDING) ** 2
    assert logs["train/terminal_loss"].item() == pytest.approx(2.0**2 / len(pairs))
    per_gap = (policy.chain.response / policy.chain.std**2)[policy.chain.noisy]
    assert (shift_gradient(module, pairs) / per_gap).abs().max() < 2 * SCALE * ROUNDING


def test_at_the_end_the_balance_is_exact():
    # The only state whose reward gradient, c itself, float32 does not round.
    module = make("ddim")
    module.policy.set(module.policy.chain.tilt(SCALE))
    assert each(module, all_steps(module, SLOPE))[-1] < 1e-20


@both_kinds
@pytest.mark.parametrize("mode", MODES)
def test_without_correction_the_tilted_chain_lacks_what_gamma_takes_away(kind, mode):
    # The flow's gradient is beta c P, and beta c gamma d E[x0 | x] / d x is what is followed. They
    # agree at all states only for flow matching with gamma = 1; DDIM's chain ends a little before
    # clean data, which makes a difference of 0.3 %.
    module = make(kind, gamma_mode=mode)
    chain = module.policy.chain
    module.policy.set(chain.tilt(SCALE))
    missed = SCALE * (chain.ahead - chain.seen(mode))[chain.noisy + 1]
    if mode == "one":
        assert missed.abs().max() < (0.0117 if kind == "ddim" else 1e-12)
    losses = each(module, all_steps(module, SLOPE))
    torch.testing.assert_close(losses, missed**2, rtol=1e-4, atol=(SCALE * ROUNDING) ** 2)


@both_kinds
@pytest.mark.parametrize("mode", MODES)
def test_the_gradient_at_the_pretrained_model(kind, mode):
    # gap = (response / s^2) shift. Noise prediction has response = -kappa, so the gradient is
    # 2 kappa / s^2 beta c P.
    for correction in (None, 1.0):
        module = make(kind, correction, gamma_mode=mode, backward_weight=0.0)
        chain = module.policy.chain
        flow = chain.ahead if correction else chain.seen(mode)
        slope = (chain.response / chain.std**2)[chain.noisy]
        expected = -2 * slope * SCALE * flow[chain.noisy + 1]
        gradient = shift_gradient(module, all_steps(module, SLOPE))
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)
        assert (gradient > 0).all()


def test_variance_weighting_multiplies_both_balances():
    plain, weighted = (
        make("flow", correction=0.5, gamma_mode="sqrt", loss_weighting=weighting)
        for weighting in ("none", "variance")
    )
    chain, pairs = plain.policy.chain, all_steps(plain, SLOPE)
    for module in (plain, weighted):
        with torch.no_grad():
            module.flow_correction.values[chain.last] = 0.0  # L_T is not weighted
    expected = chain.std[chain.noisy] ** 2 * each(plain, pairs)
    torch.testing.assert_close(each(weighted, pairs), expected)
    assert expected.min() > 0


class Quadratic(RewardModule):
    """``(h x - k x^2 / 2) / beta`` of every pixel."""

    differentiable = True
    K, H = 2.0, 1.5

    def forward(self, images, prompts, metadata=None, group_ids=None):
        return ((self.H * images - self.K * images.square() / 2) / BETA).sum(dim=(1, 2, 3))


class QuadraticCorrection(nn.Module):
    """What the flow ``h x - k x^2 / 2`` of a state has beyond the gradient at E[x0 | x]."""

    def __init__(self, chain, index, k, h):
        super().__init__()
        self.state = (k, h, chain.clean_slope[index], chain.signal[index])

    def forward(self, latents, timesteps, prompt_embeds):
        k, h, slope, signal = self.state
        clean = 0.7 + slope * (latents - signal * 0.7)
        return h - k * latents - slope * (Quadratic.H - Quadratic.K * clean)


@pytest.mark.parametrize("step", [9, 4])
def test_a_quadratic_reward_has_zero_expected_gradient_at_the_optimal_mean(step):
    # log E[exp(beta r) | x_i] = h_i x - k_i x^2 / 2 + const by k = A^2 k' / (1 + k' s^2) and
    # h = A (h' - k' B) / (1 + k' s^2); the best mean is (mean_base + s^2 h') / (1 + s^2 k'). A
    # policy that cannot change its variance keeps the loss k'^2 s^2.
    policy = ChainPolicy("ddim", 10)
    chain, k, h = policy.chain, Quadratic.K, Quadratic.H
    for i in range(9, step, -1):
        shrink = 1 + k * chain.std[i] ** 2
        k, h = (
            chain.slope[i] ** 2 * k / shrink,
            chain.slope[i] * (h - k * chain.offset[i]) / shrink,
        )
    s = chain.std[step]
    x, count = 0.4, 20_000
    base = chain.slope[step] * x + chain.offset[step]
    best = (base + s**2 * h) / (1 + s**2 * k)
    correction = QuadraticCorrection(chain, step + 1, k, h) if step < 9 else None
    module = make(
        reward=Quadratic(), steps=10, gamma_mode="one", backward_weight=0.0,
        flow_correction=correction,
    )  # fmt: skip
    shift = torch.zeros(10).double()
    shift[step] = (best - base) / chain.response[step]
    module.policy.set(shift)
    pair = all_steps(module, "").select(torch.full((count,), step))
    states = torch.full_like(pair.latents, x)
    pairs = pair.replace(
        latents=states, next_latents=best + s * torch.randn_like(states), weights=torch.ones(count)
    )
    gradient = module.zero_grad() or torch.autograd.grad(
        module.loss(pairs)[0], module.policy.denoiser.shift
    )[0]  # fmt: skip
    elements = count * SHAPE[0]
    sigma = 2 * abs(chain.response[step]) / s**2 * k * s / elements**0.5
    assert gradient[step].abs() < 3 * sigma
    floor = k**2 * s**2
    loss = module.loss(pairs)[1]["train/forward_loss"]
    assert abs(loss - floor) < 3 * (2 / elements) ** 0.5 * floor
    off = shift.clone()
    off[step] += 0.3 * s / abs(chain.response[step])
    module.policy.set(off)
    shifted = torch.autograd.grad(module.loss(pairs)[0], module.policy.denoiser.shift)[0]
    assert shifted[step].abs() > 10 * sigma


def test_the_trust_region_is_the_squared_change_of_the_output():
    for kind in ("ddim", "flow"):
        module = make(kind, reward_scale=0.0, trust_region_weight=7.0)
        pairs = all_steps(module, SLOPE)
        module.policy.set(0.3)
        loss, logs = module.loss(pairs)
        assert logs["train/trust_region"].item() == pytest.approx(0.3**2, rel=1e-6)
        expected = logs["train/forward_loss"] + 7 * 0.3**2
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_each_pair_follows_the_reward_of_its_own_prompt():
    slopes = (1.0, -2.0, 0.5)
    module = make("flow", gamma_mode="one")
    flow = BETA * module.policy.chain.ahead[module.policy.chain.noisy + 1]
    pairs = all_steps(module, *map(str, slopes))
    order = torch.randperm(len(pairs))
    expected = torch.stack([(slope * flow) ** 2 for slope in slopes]).flatten()[order]
    torch.testing.assert_close(each(module, pairs.select(order)), expected, rtol=1e-5, atol=0)


def test_another_prompt_changes_the_gradient_of_its_sample_only():
    module = make()
    latents = torch.randn(3, *SHAPE)
    one, two = (
        latent_gradient(module, latents, prompt_batch(prompts), 2, "clamped")
        for prompts in (["1", "2", "3"], ["1", "5", "3"])
    )
    assert torch.equal(one[[0, 2]], two[[0, 2]])
    assert (one[1] == 2).all()
    assert (two[1] == 5).all()


def test_only_the_policy_and_the_correction_learn():
    module = make(correction=0.5, gamma_mode="one", backward_trains_policy=True)
    policy = module.policy
    frozen = [policy._reference, policy.vae, module.reward]
    for part in frozen:
        part.requires_grad_(True)  # nothing may reach them even so
    module.loss(all_steps(module, SLOPE))[0].backward()
    assert all(p.grad is None for part in frozen for p in part.parameters())
    assert policy.denoiser.shift.grad.abs().min() > 0
    assert module.flow_correction.values.grad.abs().max() > 0


@pytest.mark.parametrize("detach", [True, False])
def test_the_forward_balance_trains_the_correction_unless_detached(detach):
    module = make(correction=0.5, gamma_mode="one", backward_weight=0.0, detach_flow=detach)
    chain = module.policy.chain
    inner = all_steps(module, SLOPE).select(torch.arange(chain.steps - 1))
    shift_gradient(module, inner)
    gradient = module.flow_correction.values.grad * len(inner)
    # d L_F / d g = 2 (beta c seen + g), of which half the correction is learned already
    flow = SCALE * (chain.ahead + chain.seen("one")) / 2
    expected = torch.zeros(chain.steps + 1).double()
    if not detach:
        expected[1:-1] = 2 * flow[1:-1]
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=0)


@both_kinds
@pytest.mark.parametrize("trains", [True, False])
def test_the_backward_balance_trains_the_policy_only_on_request(kind, trains):
    # At the pretrained model and g = 0, L_B = (seen)^2 and d L_B / d gap = -2 slope seen.
    modules = [
        make(kind, 0.0, gamma_mode="sqrt", backward_weight=weight, backward_trains_policy=trains)
        for weight in (2.0, 0.0)
    ]
    chain, noisy = modules[0].policy.chain, modules[0].policy.chain.noisy
    pairs = all_steps(modules[0], SLOPE)
    forward_and_backward, forward = (shift_gradient(module, pairs) for module in modules)
    seen = SCALE * chain.seen("sqrt")[noisy]
    per_gap = (chain.response / chain.std**2)[noisy]
    expected = -2 * 2 * chain.slope[noisy] * seen * per_gap * trains
    torch.testing.assert_close(forward_and_backward - forward, expected, rtol=1e-5, atol=1e-7)
    learned = modules[0].flow_correction.values.grad[noisy] * len(pairs)
    from_forward = modules[1].flow_correction.values.grad[noisy] * len(pairs)
    torch.testing.assert_close(learned - from_forward, 2 * 2 * seen, rtol=1e-6, atol=1e-9)


def test_samples_without_a_reward_do_not_count():
    module, alone = make("flow", max_invalid_fraction=1.0), make("flow")
    pairs, known = all_steps(module, SLOPE, "nan"), all_steps(alone, SLOPE)
    for part in (module, alone):
        part.policy.set(0.1)  # else what has no reward has no loss either
    assert module.loss(pairs)[0].item() == pytest.approx(alone.loss(known)[0].item(), rel=1e-6)


def test_every_sample_trains_on_a_step_of_each_stratum_and_the_last():
    module = make(timestep_fraction=0.1, prompts_per_round=8, minibatch_size=6)
    drawn = [steps.tolist() for _, steps in module.plan.cut(0)]
    assert module.plan.trained_steps == 6
    for steps in drawn:
        # 49 steps beside the last in five strata: 9, 10, 10, 10, 10
        assert [sum(a <= s < b for s in steps) for a, b in
                [(0, 9), (9, 19), (19, 29), (29, 39), (39, 49), (49, 50)]] == [1] * 6  # fmt: skip
    assert len(set(map(tuple, drawn))) == 8


TRAINING = {
    "prompts_per_round": 4, "samples_per_prompt": 1, "rollout_batch_size": 4,
    "timestep_fraction": 1.0, "weight_decay": 0.0, "lr": 0.05,
}  # fmt: skip


def trained(module, rounds):
    module._trainer = None
    loader = prompt_loader([SLOPE] * 4)
    make_trainer(max_epochs=rounds).fit(module, module.experience(loader))
    return sampled_mean(module)


@pytest.mark.parametrize(("kind", "correction"), [("ddim", None), ("flow", None), ("ddim", 0.0)])
def test_training_reaches_the_tilted_mean(kind, correction):
    # The tilt of N(m, v) by exp(beta c x) has the mean m + beta c v. gamma = 1 needs no correction;
    # with gamma = abar, g is learned.
    steps = 10
    mode = "one" if correction is None else "alpha_bar"
    pairs = 4 * (steps if kind == "ddim" else steps - 1)
    module = make(
        kind, correction, steps=steps, gamma_mode=mode, minibatch_size=pairs, lr_flow=0.1,
        flow_weight_decay=0.0, num_inner_epochs=10, **TRAINING,
    )  # fmt: skip
    mean, variance = module.policy.chain.terminal(torch.zeros(steps))
    assert trained(module, 20) == pytest.approx(mean + SCALE * variance, rel=0.02)

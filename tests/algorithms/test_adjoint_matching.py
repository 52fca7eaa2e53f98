import warnings

import pytest
import torch

from lit_align.algorithms.adjoint_matching import AdjointMatching, control_loss
from lit_align.algorithms.nabla_gflownet import NablaGFlowNet
from tests.algorithms.gaussian_chain import (
    ROUNDING,
    SHAPE,
    ChainPolicy,
    Linear,
    all_steps,
    attach,
    each,
    prompt_batch,
    sampled_mean,
    shift_gradient,
)
from tests.algorithms.harness import make_trainer, prompt_loader

LAMBDA = 3.12
SLOPE = "1.25"  # c, which float32 holds exactly
SCALE = LAMBDA * float(SLOPE)  # lambda c = 3.9
STEPS = {"ddim": 50, "flow": 20}
ELEMENTS = SHAPE[0]
both_kinds = pytest.mark.parametrize("kind", ["ddim", "flow"])
both_indices = pytest.mark.parametrize("index", ["next", "same"])


def make(kind="ddim", steps=None, method=AdjointMatching, **options):
    policy = ChainPolicy(kind, steps or STEPS[kind])
    options = {
        "reward_scale": LAMBDA, "num_inference_steps": policy.chain.steps, "guidance_scale": 1.0,
        **options,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # modules passed as arguments, which is meant
        return attach(method(policy, Linear(), **options))


def paired(chain, index):
    """Return P at the state [T] whose adjoint a step is paired with."""
    return chain.ahead[1:] if index == "next" else chain.ahead[:-1]


@both_kinds
@both_indices
def test_the_lean_adjoint_is_the_product_of_the_pretrained_slopes(kind, index):
    # a_T = -lambda c and a_i = slope_i a_{i+1}, whatever the policy has learned.
    module = make(kind, adjoint_index=index, rollout_batch_size=1)
    module.policy.denoiser.slope.fill_(0.1)
    chain = module.policy.chain
    adjoints = module.collect(prompt_batch([SLOPE, "-2"]), 0).extras["adjoint"]
    assert adjoints.shape == (2, chain.steps, *SHAPE)
    for adjoint, slope in zip(adjoints, (float(SLOPE), -2.0), strict=True):
        expected = (-LAMBDA * slope * paired(chain, index)).view(-1, 1, 1, 1).expand_as(adjoint)
        torch.testing.assert_close(adjoint, expected, rtol=1e-6, atol=0)


@both_kinds
def test_without_a_reward_scale_the_pretrained_model_is_optimal(kind):
    module = make(kind, reward_scale=0.0)
    pairs = all_steps(module, SLOPE)
    assert shift_gradient(module, pairs).abs().max() == 0
    assert module.loss(pairs)[0] == 0


@both_kinds
@both_indices
def test_the_optimum_shifts_the_means_by_minus_the_variance_times_the_adjoint(kind, index):
    module = make(kind, adjoint_index=index)
    chain = module.policy.chain
    module.policy.set(chain.tilt(SCALE, SCALE * paired(chain, index)))
    pairs = all_steps(module, SLOPE)
    assert each(module, pairs).max() < ELEMENTS * (SCALE * ROUNDING) ** 2
    per_control = (chain.response / chain.std)[chain.noisy]
    gradient = shift_gradient(module, pairs)
    assert (gradient / per_control).abs().max() < 2 * ELEMENTS * SCALE * ROUNDING


def test_the_adjoint_of_the_same_state_has_the_known_bias():
    # It moves the mean from 0.698684 to 1.4437, 93 % of the way to 1.499635.
    chain = ChainPolicy("ddim", 50).chain
    same = chain.terminal(chain.tilt(SCALE, SCALE * paired(chain, "same")))[0]
    assert same == pytest.approx(1.4437, abs=5e-5)
    assert chain.terminal(chain.tilt(SCALE))[0] == pytest.approx(1.499635, abs=5e-7)


@both_kinds
@both_indices
def test_loss_and_gradient_at_the_pretrained_model(kind, index):
    # The loss of a step is the sum over elements of (std lambda c P)^2.
    module = make(kind, adjoint_index=index)
    chain = module.policy.chain
    pairs = all_steps(module, SLOPE)
    control = (chain.std * SCALE * paired(chain, index))[chain.noisy]
    torch.testing.assert_close(each(module, pairs), ELEMENTS * control**2, rtol=1e-6, atol=0)
    per_control = (chain.response / chain.std)[chain.noisy]
    expected = -2 * ELEMENTS * control * per_control
    torch.testing.assert_close(shift_gradient(module, pairs), expected, rtol=1e-6, atol=0)


def test_both_methods_have_the_same_optimum():
    # Without noise in the last step and gamma = 1, the flow's gradient of Nabla-GFlowNet is that of
    # the expected reward, minus the adjoint.
    matching = make("flow")
    balance = make("flow", method=NablaGFlowNet, gamma_mode="one", trust_region_weight=0.0)
    for module in (matching, balance):
        module.policy.set(module.policy.chain.tilt(SCALE))
        pairs = all_steps(module, SLOPE)
        assert each(module, pairs).max() < ELEMENTS * (SCALE * ROUNDING) ** 2
        module.policy.set(0.9 * module.policy.chain.tilt(SCALE))
        assert each(module, pairs).min() > 1e-8


def test_a_bounded_term_gives_no_gradient():
    module = make(lct_constant=0.02)
    bound, chain = 0.02 * LAMBDA**2, module.policy.chain
    pairs = all_steps(module, SLOPE)
    unbounded = ELEMENTS * (chain.std * SCALE * chain.ahead[1:]) ** 2
    clipped = unbounded > bound
    assert 10 < clipped.sum() < 40
    gradient = shift_gradient(module, pairs)
    assert ((gradient == 0) == clipped).all()
    expected = unbounded.clamp(max=bound)
    torch.testing.assert_close(each(module, pairs), expected, rtol=1e-6, atol=0)
    share = module.loss(pairs)[1]["train/clipped"].item()
    assert share == pytest.approx(clipped.double().mean().item())


def test_the_control_loss_sums_over_elements():
    gap = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    adjoint = torch.tensor([[1.0, -1.0], [3.0, 4.0]])
    std = torch.tensor([0.5, 2.0])
    # (2 + 0.5)^2 + (4 - 0.5)^2 and 6^2 + 8^2
    assert control_loss(gap, std, adjoint, None).tolist() == [18.5, 100.0]
    assert control_loss(gap, std, adjoint, 20.0).tolist() == [18.5, 20.0]


def test_guidance_serves_the_rollouts_only():
    module = make(guidance_scale=7.5)
    seen = module.policy.guidance_scales
    trajectory = module.collect(prompt_batch([SLOPE]), 0)
    assert seen == [7.5] * 50 + [1] * 50
    module.loss(trajectory.step(3).replace(extras={"adjoint": trajectory.extras["adjoint"][:, 3]}))
    assert seen[100:] == [1, 1]


def test_only_the_policy_learns():
    module = make()
    frozen = [module.policy._reference, module.policy.vae, module.reward]
    for part in frozen:
        part.requires_grad_(True)  # nothing may reach them even so
    pairs = all_steps(module, SLOPE)
    assert not pairs.extras["adjoint"].requires_grad
    module.loss(pairs)[0].backward()
    assert all(p.grad is None for part in frozen for p in part.parameters())
    assert module.policy.denoiser.shift.grad.abs().min() > 0


def test_each_pair_follows_the_reward_of_its_own_prompt():
    slopes = (1.0, -2.0, 0.5)
    module = make("flow")
    chain = module.policy.chain
    control = LAMBDA * (chain.std * chain.ahead[1:])[chain.noisy]
    pairs = all_steps(module, *map(str, slopes))
    order = torch.randperm(len(pairs))
    expected = ELEMENTS * torch.stack([(slope * control) ** 2 for slope in slopes]).flatten()[order]
    torch.testing.assert_close(each(module, pairs.select(order)), expected, rtol=1e-6, atol=0)


def test_samples_without_a_reward_do_not_count():
    module, alone = make("flow", max_invalid_fraction=1.0), make("flow")
    pairs, known = all_steps(module, SLOPE, "nan"), all_steps(alone, SLOPE)
    for part in (module, alone):
        part.policy.set(0.1)  # else what has no reward has no loss either
    assert module.loss(pairs)[0].item() == pytest.approx(alone.loss(known)[0].item(), rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "early", "late"),
    [("ddim", range(30), range(30, 50)), ("flow", range(11), range(11, 19))],  # 60 % of 50, of 19
)
def test_every_sample_trains_on_early_and_late_steps(kind, early, late):
    module = make(kind, early_steps=3, late_steps=2, prompts_per_round=8, minibatch_size=5)
    drawn = [steps.tolist() for _, steps in module.plan.cut(0)]
    assert module.plan.trained_steps == 5
    for steps in drawn:
        assert len(set(steps) & set(early)) == 3
        assert len(set(steps) & set(late)) == 2
    assert len(set(map(tuple, drawn))) == 8


def test_more_steps_than_there_are_means_all_of_them():
    module = make("flow", early_steps=100, late_steps=100, prompts_per_round=1, minibatch_size=19)
    (_, steps), = module.plan.cut(0)  # fmt: skip
    assert sorted(steps.tolist()) == list(range(19))


@pytest.mark.parametrize(
    "options",
    [{"early_fraction": 1.0}, {"late_steps": 0}, {"early_steps": -1}, {"reward_scale": -1.0}],
)
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        make(**options)


@pytest.mark.parametrize("name", ["adjoint_index", "pixel_grad"])
def test_unknown_choices_are_refused(name):
    with pytest.raises(ValueError, match=f"`{name}` must be one of .* got 'middle'"):
        make(**{name: "middle"})


@both_kinds
def test_training_reaches_the_tilted_mean(kind):
    # The tilt of N(m, v) by exp(lambda c x) has the mean m + lambda c v.
    steps = 10
    module = make(
        kind, steps, prompts_per_round=4, rollout_batch_size=4, early_steps=6, late_steps=4,
        minibatch_size=4 * (steps if kind == "ddim" else steps - 1), num_inner_epochs=10, lr=0.05,
    )  # fmt: skip
    mean, variance = module.policy.chain.terminal(torch.zeros(steps))
    module._trainer = None
    trainer = make_trainer(max_epochs=20)
    trainer.fit(module, module.experience(prompt_loader([SLOPE] * 4)))
    assert sampled_mean(module) == pytest.approx(mean + SCALE * variance, rel=0.02)

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.distributions import Normal

from lit_align.functional.gaussian import gaussian_kl
from lit_align.functional.noise import sample_generators
from lit_align.schedulers import StochasticFlowMatch

RTOL, ATOL = 1e-5, 1e-6


def make(kind="flow", noise_level=0.7, steps=10, shift=3.0, **options):
    scheduler = StochasticFlowMatch(
        FlowMatchEulerDiscreteScheduler(shift=shift), kind, noise_level, **options
    )
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("shift", ["1.0", "3.0"])
def test_sde_step_matches_the_official_code(golden, shift):
    # golden/step_log_prob.npz, keys flow_sde/shift<shift>/*: flow_grpo.
    names = ("sample", "model_output", "timestep", "sigmas", "prev_sample", "log_prob", "mean")
    data = {n: torch.from_numpy(golden[f"flow_sde/shift{shift}/{n}"]) for n in names}
    level = torch.from_numpy(golden[f"flow_sde/shift{shift}/std_dev_t"])
    scheduler = make(shift=float(shift))
    torch.testing.assert_close(scheduler.sigmas, data["sigmas"], rtol=RTOL, atol=ATOL)
    index = torch.tensor([int((scheduler.timesteps == t).nonzero()) for t in data["timestep"]])
    step = scheduler.step(
        data["model_output"], data["timestep"], data["sample"], data["prev_sample"]
    )
    dt = scheduler.sigmas[index] - scheduler.sigmas[index + 1]
    torch.testing.assert_close(step.mean, data["mean"], rtol=RTOL, atol=ATOL)
    torch.testing.assert_close(step.std, level * dt.sqrt(), rtol=RTOL, atol=0)
    torch.testing.assert_close(step.log_prob, data["log_prob"], rtol=RTOL, atol=0)


def test_the_sd35_schedule():
    expected = [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0]
    assert make().sigmas.tolist() == pytest.approx(expected, abs=5e-5)


# A Gaussian target x0 ~ N(m, s2) has mu_t = (1 - t) m, V_t = (1 - t)^2 s2 + t^2 and the velocity
# v(x) = -m + K_t (x - mu_t) / V_t with K_t = t - (1 - t) s2. Every step is linear in x, so the
# moments after it follow from its action on two points.
MEAN, S2 = 1.3, 0.49


def moments(t):
    return (1 - t) * MEAN, (1 - t) ** 2 * S2 + t**2


def velocity(x, t):
    mean, variance = moments(t)
    return -MEAN + (t - (1 - t) * S2) * (x - mean) / variance


def one_step(scheduler, index):
    """Return (t, t', mean', variance') of the exact marginal pushed through one step."""
    sigmas = scheduler.sigmas.double()
    t, following = sigmas[index], sigmas[index + 1]
    mean, variance = moments(t)
    x = torch.stack([mean, mean + 1])[:, None]
    timesteps = scheduler.timesteps[index].expand(2)
    step = scheduler.step(velocity(x, t), timesteps, x, x)
    slope = (step.mean[1] - step.mean[0]).item()
    spread = slope**2 * variance + step.std[0].double() ** 2
    return t.item(), following.item(), step.mean[0].item(), spread.item()


@pytest.mark.parametrize("index", [0, 3, 8])
@pytest.mark.parametrize(("kind", "level"), [("flow", 0.7), ("dance", 0.3)])
def test_a_step_keeps_the_mean_and_errs_in_the_variance_as_derived(kind, level, index):
    scheduler = make(kind, level)
    t, following, mean, variance = one_step(scheduler, index)
    expected_mean, expected_variance = moments(following)
    h = t - following
    remaining = 1 - scheduler.sigmas[1].item() if t == 1 else 1 - t
    s2 = level**2 if kind == "dance" else level**2 * t / remaining
    k = t - (1 - t) * S2
    error = h**2 * ((k + s2 / 2) ** 2 / moments(t)[1] - (1 + S2))
    assert mean == pytest.approx(expected_mean, abs=ATOL)
    assert variance == pytest.approx(expected_variance + error, rel=RTOL)


@pytest.mark.parametrize("index", [0, 3, 8])
def test_the_ode_errs_in_the_variance_as_derived(index):
    scheduler = make("ode")
    t, following, mean, variance = one_step(scheduler, index)
    h = t - following
    assert mean == pytest.approx(moments(following)[0], abs=ATOL)
    assert variance == pytest.approx(moments(following)[1] - h**2 * S2 / moments(t)[1], rel=RTOL)


@pytest.mark.parametrize("eta", [0.2, 0.8, 1.0])
@pytest.mark.parametrize("index", [0, 3, 8])
def test_cps_keeps_the_mean_and_errs_in_the_variance_as_derived(eta, index):
    t, following, mean, variance = one_step(make("cps", eta), index)
    cosine = math.cos(eta * math.pi / 2)
    # Var' = V' - s2 ((1 - t') t - t' cos (1 - t))^2 / V
    error = -S2 * ((1 - following) * t - following * cosine * (1 - t)) ** 2 / moments(t)[1]
    assert mean == pytest.approx(moments(following)[0], abs=ATOL)
    assert variance == pytest.approx(moments(following)[1] + error, rel=RTOL)


@pytest.mark.parametrize("kind", ["flow", "dance", "cps"])
def test_without_noise_every_kind_is_the_euler_step(kind):
    scheduler = make(kind, 0.0)
    x, v = torch.randn(2, 9, 4)
    timesteps, sigmas = scheduler.timesteps[:9], scheduler.sigmas
    mean, std, _ = scheduler._transition(v, torch.arange(9), x, deterministic=False)
    expected = x + (sigmas[1:10] - sigmas[:9])[:, None] * v
    torch.testing.assert_close(mean, expected, atol=ATOL, rtol=RTOL)
    assert std.abs().max() == 0
    torch.testing.assert_close(scheduler.step(v, timesteps, x).mean, expected, atol=ATOL, rtol=RTOL)
    assert not len(scheduler.density_steps)


def test_cps_with_full_noise_keeps_only_the_clean_part():
    scheduler = make("cps", 1.0)
    x, v = torch.randn(2, 9, 4)
    t, following = scheduler.sigmas[:9, None], scheduler.sigmas[1:10, None]
    step = scheduler.step(v, scheduler.timesteps[:9], x, x)
    torch.testing.assert_close(step.mean, (x - t * v) * (1 - following), atol=ATOL, rtol=RTOL)
    torch.testing.assert_close(step.std, following[:, 0], atol=ATOL, rtol=RTOL)


def test_dance_with_the_flow_level_equals_flow():
    flow = make("flow", 0.7)
    x, v = torch.randn(2, 1, 4)
    for index in (1, 5, 8):
        t = flow.sigmas[index].item()
        dance = make("dance", 0.7 * math.sqrt(t / (1 - t)))
        steps = [
            s.step(v, s.timesteps[index][None], x, generator=sample_generators("z", 0, 0, [0]))
            for s in (flow, dance)
        ]
        torch.testing.assert_close(
            steps[0].next_latents, steps[1].next_latents, atol=ATOL, rtol=RTOL
        )


@pytest.mark.parametrize(("kind", "level"), [("flow", 0.7), ("dance", 0.3), ("cps", 0.8)])
def test_log_prob_is_that_of_torch_and_finite_at_the_first_step(kind, level):
    scheduler = make(kind, level, **({"cps_log_prob": "gaussian"} if kind == "cps" else {}))
    x, v, following = torch.randn(3, 9, 4, 8, 8)
    step = scheduler.step(v, scheduler.timesteps[:9], x, following)
    density = Normal(step.mean, step.std.view(-1, 1, 1, 1)).log_prob(following)
    torch.testing.assert_close(step.log_prob, density.mean(dim=(1, 2, 3)), rtol=RTOL, atol=0)
    assert step.log_prob.isfinite().all()
    assert scheduler.timesteps[0] == 1000


def test_unnormalised_cps_log_prob_is_minus_the_squared_distance():
    scheduler = make("cps", 0.8)
    x, v, following = torch.randn(3, 9, 4)
    step = scheduler.step(v, scheduler.timesteps[:9], x, following)
    expected = -(following - step.mean).square().mean(dim=1)
    torch.testing.assert_close(step.log_prob, expected)


@pytest.mark.parametrize("kind", ["flow", "dance"])
def test_kl_in_velocity_form(kind):
    # mean_d (mu - mu')^2 / (2 s^2 h) = (h / 2) (s (1 - t) / (2 t) + 1 / s)^2 mean_d (v - v')^2
    scheduler = make(kind, 0.5)
    x, v, other = torch.randn(3, 8, 16)
    other = other.requires_grad_(True)
    steps = scheduler.timesteps[1:9]
    one, two = (scheduler.step(output, steps, x, x) for output in (v, other))
    t, following = scheduler.sigmas[1:9], scheduler.sigmas[2:10]
    h = t - following
    s = one.std / h.sqrt()
    factor = h / 2 * (s * (1 - t) / (2 * t) + 1 / s) ** 2
    expected = factor * (v - other).square().mean(dim=1)
    kl = gaussian_kl(one.mean, two.mean, one.std)
    torch.testing.assert_close(kl, expected, rtol=1e-4, atol=0)
    kl.sum().backward()
    assert other.grad.abs().min() > 0


def test_replay_is_bitwise_and_the_last_step_has_no_density():
    scheduler = make()
    assert list(scheduler.density_steps) == list(range(9))
    x, v = torch.randn(2, 9, 4, 8, 8)
    generators = sample_generators("test", 0, 0, range(9))
    taken = scheduler.step(v, scheduler.timesteps[:9], x, generator=generators)
    again = scheduler.step(v, scheduler.timesteps[:9], x, taken.next_latents)
    assert torch.equal(taken.log_prob, again.log_prob)


def test_the_last_deterministic_step_decodes_the_clean_latents():
    scheduler = make()
    x, v = torch.randn(2, 1, 4)
    last = scheduler.step(v, scheduler.timesteps[-1:], x)
    torch.testing.assert_close(last.next_latents, last.pred_original)


def test_corrupt_is_linear_between_data_and_noise():
    scheduler = make()
    clean, noise = torch.randn(2, 3, 4)
    noised, target = scheduler.corrupt(clean, noise, torch.tensor([0.0, 250.0, 1000.0]))
    torch.testing.assert_close(noised[0], clean[0])
    torch.testing.assert_close(noised[1], 0.75 * clean[1] + 0.25 * noise[1])
    torch.testing.assert_close(noised[2], noise[2])
    torch.testing.assert_close(target, noise - clean)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="`kind` must be .* got 'sde'"):
        make("sde")
    with pytest.raises(ValueError, match="at most 1 for 'cps', got 1.5"):
        make("cps", 1.5)
    with pytest.raises(ValueError, match=r"must lie in \[1, 1000\], got 2000"):
        make(steps=2000)


@pytest.mark.parametrize("index", [0, 3, 8])
def test_a_memoryless_step_is_the_posterior_given_the_predicted_clean_latents(index):
    # x = r x' + noise with r = (1 - t) / (1 - t') links neighbouring levels. By Bayes' rule, given
    # x and x0, the variance of x' is t'^2 (t^2 - r^2 t'^2) / t^2 and its mean has the weight
    # r t'^2 / t^2 on x. With its own mean for x0, the step lacks the variance that x0 still has,
    # S2 t^2 / V, times the square of its weight: none of it if the data were one point.
    t, following, mean, variance = one_step(make("memoryless"), index)
    r = (1 - t) / (1 - following)
    weight = (1 - following) - r * following**2 / t**2 * (1 - t)
    error = -(weight**2) * S2 * t**2 / moments(t)[1]
    assert mean == pytest.approx(moments(following)[0], abs=ATOL)
    assert variance == pytest.approx(moments(following)[1] + error, rel=RTOL)
    scheduler, zero = make("memoryless"), torch.zeros(1, 1)
    step = scheduler.step(zero, scheduler.timesteps[index, None], zero, zero)
    posterior = following**2 * (t**2 - r**2 * following**2) / t**2
    assert step.std.item() ** 2 == pytest.approx(posterior, rel=RTOL)


def test_a_memoryless_sampler_forgets_the_initial_noise_at_once():
    scheduler = make("memoryless")
    t, following = scheduler.sigmas[:2]
    assert t == 1
    clean = torch.full((2, 1), 0.7)
    x = torch.tensor([[-5.0], [5.0]])
    step = scheduler.step((x - clean) / t, scheduler.timesteps[[0, 0]], x, x)
    torch.testing.assert_close(step.mean, clean * (1 - following), rtol=0, atol=1e-6)
    torch.testing.assert_close(step.std, following.expand(2), rtol=RTOL, atol=0)


@pytest.mark.parametrize("index", [200, 500, 800])
def test_short_memoryless_steps_follow_the_memoryless_sde(index):
    # Time u = 1 - t from noise to data, v = x0 - eps: the drift 2 v - x / u and the variance
    # 2 (1 - u) / u per unit of time (arXiv:2409.08861).
    scheduler = make("memoryless", steps=1000, shift=1.0)
    scheduler._sigmas = torch.linspace(1, 0, 1001).double()
    x, v = torch.randn(2, 1, 5).double()
    step = scheduler.step(-v, scheduler.timesteps[index, None], x, x)
    u, h = index / 1000, 1 / 1000
    drift = 2 * v - x / u
    assert (step.std**2 / h).item() == pytest.approx(2 * (1 - u) / u, rel=5 * h / u / (1 - u))
    error = (step.mean - x) / h - drift
    assert error.abs().max() < 5 * h / u * drift.abs().max()
    # It is the ODE's v plus half that variance times the score (u v - x) / (1 - u).
    torch.testing.assert_close(drift, v + (1 - u) / u * (u * v - x) / (1 - u), rtol=1e-10, atol=0)


def test_the_last_memoryless_step_is_deterministic():
    scheduler = make("memoryless", noise_level=0.0)
    assert list(scheduler.density_steps) == list(range(9))
    x, v = torch.randn(2, 1, 4)
    last = scheduler.step(v, scheduler.timesteps[-1:], x)
    torch.testing.assert_close(last.next_latents, x - scheduler.sigmas[-2] * v)
    assert last.std == 0


@pytest.mark.parametrize("kind", ["flow", "dance", "cps", "ode"])
def test_only_memoryless_steps_are_memoryless(kind):
    make("memoryless").check_memoryless("Method")
    with pytest.raises(ValueError, match="Method needs a memoryless sampler.*kind: memoryless"):
        make(kind).check_memoryless("Method")


def test_signal_levels_and_changes_of_the_output():
    # x_t = (1 - t) x0 + t eps, and x0 = x - t v.
    scheduler = make("memoryless")
    torch.testing.assert_close(scheduler.signal_levels, 1 - scheduler.sigmas)
    x, v, other = torch.randn(3, 10, 3, 2, 2)
    one, two = (scheduler.step(output, scheduler.timesteps, x) for output in (v, other))
    change = scheduler.output_change(scheduler.timesteps, two.pred_original - one.pred_original)
    torch.testing.assert_close(change, other - v, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["flow", "dance", "cps", "memoryless"])
def test_lengths_and_gradient_weights_of_steps(kind):
    # Eq. (12) of arXiv:2510.22319: delta = 1 / h, for dance times 1 + s^2 (1 - t) / (2 t).
    scheduler = make(kind, 0.3)
    order = torch.tensor([4, 0, 8])
    sigmas = scheduler.sigmas.double()
    t, h = sigmas[order], sigmas[order] - sigmas[order + 1]
    times = scheduler.timesteps[order]
    torch.testing.assert_close(scheduler.step_sizes(times).double(), h, rtol=1e-4, atol=0)
    factor = 1 + 0.09 * (1 - t) / (2 * t) if kind == "dance" else 1
    found = scheduler.gradient_weights(times).double()
    torch.testing.assert_close(found, factor / h, rtol=1e-4, atol=0)

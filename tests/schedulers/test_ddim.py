import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler

from lit_align.functional.noise import sample_generators
from lit_align.schedulers import StochasticDDIM

RTOL, ATOL = 1e-5, 1e-5
SD_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}


def make(eta=1.0, steps=50, **changes):
    scheduler = StochasticDDIM(DDIMScheduler(**{**SD_SCHEDULE, **changes}), eta=eta)
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("eta", ["1.0", "0.4"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_log_prob_matches_the_official_code(golden, prediction, eta):
    # golden/step_log_prob.npz, keys ddim/<prediction>/eta<eta>/*: ddpo-pytorch.
    names = ("sample", "model_output", "timestep", "prev_sample", "log_prob")
    data = {n: torch.from_numpy(golden[f"ddim/{prediction}/eta{eta}/{n}"]) for n in names}
    scheduler = make(float(eta), prediction_type=prediction)
    step = scheduler.step(
        data["model_output"], data["timestep"], data["sample"], data["prev_sample"]
    )
    torch.testing.assert_close(step.log_prob, data["log_prob"], rtol=RTOL, atol=0)


# t, sigma, dmean/de and their ratio for the Stable Diffusion schedule at 50 steps and eta = 1.
TABLE = [
    (981, 0.45446, -0.23294, -0.5126),
    (481, 0.28769, -0.10808, -0.3757),
    (181, 0.17707, -0.07924, -0.4475),
    (61, 0.11942, -0.09044, -0.7573),
    (41, 0.09989, -0.10161, -1.0173),
    (21, 0.03948, -0.12929, -3.2748),
    (1, 0.02065, -0.02071, -1.0032),
]


@pytest.mark.parametrize(("timestep", "sigma", "sensitivity", "ratio"), TABLE)
def test_stable_diffusion_schedule(timestep, sigma, sensitivity, ratio):
    scheduler = make()
    output = torch.zeros(1, 1, requires_grad=True)
    step = scheduler.step(output, torch.tensor([timestep]), torch.zeros(1, 1))
    stochastic = scheduler.step(
        output, torch.tensor([timestep]), torch.zeros(1, 1), torch.zeros(1, 1)
    )
    (gradient,) = torch.autograd.grad(stochastic.mean.sum(), output)
    assert step.std.item() == 0
    assert stochastic.std.item() == pytest.approx(sigma, rel=3e-4)
    assert gradient.item() == pytest.approx(sensitivity, rel=3e-4)
    assert gradient.item() / stochastic.std.item() == pytest.approx(ratio, rel=3e-4)


def test_every_step_has_positive_std_and_eta_zero_has_no_density():
    for steps in (3, 10, 50, 100):
        scheduler = make(steps=steps)
        outputs = torch.zeros(steps, 1)
        step = scheduler.step(outputs, scheduler.timesteps, outputs, outputs)
        assert step.std.min() > 1e-4
        assert list(scheduler.density_steps) == list(range(steps))
    assert not len(make(eta=0.0).density_steps)


def test_eta_one_equals_ancestral_sampling():
    # mean = (x - (1 - alpha) / sqrt(1 - abar_t) e) / sqrt(alpha), alpha = abar_t / abar_next
    scheduler = make(steps=10)
    x, e = torch.randn(2, 10, 4)
    abar = scheduler.scheduler.alphas_cumprod[scheduler.timesteps]
    following = torch.cat([scheduler.timesteps[1:], torch.tensor([0])])
    abar_next = scheduler.scheduler.alphas_cumprod[following]
    alpha = (abar / abar_next)[:, None]
    mean = (x - (1 - alpha) / (1 - abar[:, None]).sqrt() * e) / alpha.sqrt()
    std = ((1 - abar_next) / (1 - abar) * (1 - abar / abar_next)).sqrt()
    step = scheduler.step(e, scheduler.timesteps, x, x)
    torch.testing.assert_close(step.mean, mean, atol=ATOL, rtol=RTOL)
    torch.testing.assert_close(step.std, std, atol=0, rtol=RTOL)


def test_parametrisations_agree():
    epsilon, v, sample = (make(prediction_type=p) for p in ("epsilon", "v_prediction", "sample"))
    times = epsilon.timesteps[[0, 20, 49]]
    clean, noise = torch.randn(2, 3, 4)
    noised, target = epsilon.corrupt(clean, noise, times)
    _, velocity = v.corrupt(clean, noise, times)
    _, original = sample.corrupt(clean, noise, times)
    means = [
        s.step(output, times, noised, noised).mean
        for s, output in ((epsilon, target), (v, velocity), (sample, original))
    ]
    # The first step divides by sqrt(abar) = 0.08, which amplifies rounding.
    torch.testing.assert_close(means[0], means[1], atol=5 * ATOL, rtol=RTOL)
    torch.testing.assert_close(means[0], means[2], atol=5 * ATOL, rtol=RTOL)
    assert torch.equal(original, clean)


def test_deterministic_step_is_plain_ddim():
    scheduler = make(steps=10)
    plain = DDIMScheduler(**SD_SCHEDULE)
    plain.set_timesteps(10)
    x, e = torch.randn(2, 1, 4, 8, 8)
    for timestep in plain.timesteps:
        step = scheduler.step(e, timestep[None], x)
        expected = plain.step(e, timestep, x, eta=0.0).prev_sample
        torch.testing.assert_close(step.next_latents, expected, atol=ATOL, rtol=RTOL)
        assert step.log_prob.isnan().all()


def test_replay_of_a_stored_step_gives_its_log_prob():
    scheduler = make(steps=10)
    x, e = torch.randn(2, 10, 4, 8, 8)
    taken = scheduler.step(
        e, scheduler.timesteps, x, generator=sample_generators("test", 0, 0, range(10))
    )
    again = scheduler.step(e, scheduler.timesteps, x, taken.next_latents)
    assert torch.equal(taken.log_prob, again.log_prob)


def test_float32_storage_fixes_the_bias_of_bfloat16():
    # At t = 1 sigma is 0.02: rounding the stored latents to bfloat16 moves the mean log-prob by
    # about -3e-3, thirty times the usual clip range.
    scheduler = make()
    count = 64
    x, e = torch.randn(2, count, 4, 16, 16)
    timesteps = torch.full((count,), 1)
    taken = scheduler.step(e, timesteps, x, generator=sample_generators("test", 0, 0, range(count)))
    rounded = scheduler.step(e, timesteps, x, taken.next_latents.bfloat16().float())
    bias = (rounded.log_prob - taken.log_prob).mean().item()
    assert -6e-3 < bias < -1.5e-3
    kept = scheduler.step(e, timesteps, x, taken.next_latents)
    assert (kept.log_prob - taken.log_prob).abs().max() == 0


def test_analytic_toy_gradient_by_quadrature():
    """Check d E[x_0] / d theta for the constant noise predictor e = theta in one dimension.

    x_0 is linear in theta: dE[x_0]/dtheta = sum_k c_k prod_{l > k} sqrt(abar_next / abar)_l with
    c = dmean/de, at the steps (667, 334, 1).
    """
    scheduler = toy_scheduler()
    theta = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    x = torch.zeros(1, 1, dtype=torch.float64)
    for timestep in scheduler.timesteps:
        x = scheduler.step(theta.expand(1, 1), timestep[None], x, x).mean
    (gradient,) = torch.autograd.grad(x.sum(), theta)
    assert gradient.item() == pytest.approx(-3.583691177754543, abs=1e-10)


def toy_scheduler():
    """Return the schedule (667, 334, 1) with tables in float64."""
    scheduler = StochasticDDIM(DDIMScheduler(**SD_SCHEDULE))
    betas = np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000, dtype=np.float64) ** 2
    scheduler.scheduler.alphas_cumprod = torch.from_numpy(np.cumprod(1 - betas))
    scheduler.set_timesteps(3)
    assert scheduler.timesteps.tolist() == [667, 334, 1]
    return scheduler


def test_per_sample_timesteps_equal_one_by_one():
    scheduler = make(steps=5)
    x, e = torch.randn(2, 5, 4)
    together = scheduler.step(e, scheduler.timesteps, x, x)
    for i, timestep in enumerate(scheduler.timesteps):
        alone = scheduler.step(e[i : i + 1], timestep[None], x[i : i + 1], x[i : i + 1])
        torch.testing.assert_close(together.mean[i], alone.mean[0], rtol=0, atol=0)


def test_bad_configurations_are_refused():
    with pytest.raises(ValueError, match=r"`eta` must lie in \[0, 1\], got 1.5"):
        make(eta=1.5)
    with pytest.raises(ValueError, match="clip_sample: false"):
        make(clip_sample=True)
    with pytest.raises(ValueError, match=r"must lie in \[1, 1000\], got 0"):
        make(steps=0)
    with pytest.raises(ValueError, match="the schedule ends at 999; use fewer steps"):
        make(steps=1000)
    with pytest.raises(ValueError, match="without noise.*steps_offset: 1"):
        make(steps_offset=0)
    with pytest.raises(ValueError, match="members of the schedule"):
        make().step(torch.zeros(1, 1), torch.tensor([982]), torch.zeros(1, 1))


@pytest.mark.parametrize("other", [DDPMScheduler, PNDMScheduler])
def test_configurations_of_other_schedulers_are_read(other):
    options = {k: v for k, v in SD_SCHEDULE.items() if "beta" in k}
    if other is DDPMScheduler:
        options["clip_sample"] = False
    else:
        options["steps_offset"] = 1  # without `clip_sample`, which DDIM would take as true
    scheduler = StochasticDDIM(other(**options))
    if other is DDPMScheduler:  # its configuration has no offset
        with pytest.raises(ValueError, match="steps_offset"):
            scheduler.set_timesteps(50)
    else:
        scheduler.set_timesteps(50)
        assert scheduler.timesteps[0] == 981
        assert scheduler.scheduler.config["clip_sample"] is False


def test_score_gaps_follow_from_the_outputs():
    # With alpha = abar / abar', kappa = (1 - alpha) / sqrt((1 - abar) alpha) is minus what the mean
    # gains per unit of noise prediction, s^2 = (1 - abar') (1 - alpha) / (1 - abar), and so
    # (mean - mean_2) / s^2, the difference of the scores, is kappa / s^2 (e_2 - e).
    scheduler = double(50)
    abar = scheduler.scheduler.alphas_cumprod[[*range(981, 0, -20), 0]]
    assert abar[[0, -2, -1]].tolist() == pytest.approx([0.00578, 0.99830, 0.99915], abs=6e-6)
    alpha = abar[:-1] / abar[1:]
    kappa = (1 - alpha) / ((1 - abar[:-1]) * alpha).sqrt()
    variance = (1 - abar[1:]) * (1 - alpha) / (1 - abar[:-1])
    ratio = kappa / variance
    assert ratio[[0, -1]].tolist() == pytest.approx([1.13, 48.6], rel=5e-3)
    torch.testing.assert_close(1 / ratio, (1 - abar[1:]) * (alpha / (1 - abar[:-1])).sqrt())
    x, e, other = torch.randn(3, 50, 4).double()
    times = scheduler.timesteps
    one, two = (
        scheduler.step(output, times, x, generator=sample_generators("z", 0, 0, range(50)))
        for output in (e, other)
    )
    torch.testing.assert_close(one.std**2, variance, rtol=1e-10, atol=0)
    moved = kappa[:, None] * (other - e)
    torch.testing.assert_close(one.next_latents - two.next_latents, moved, rtol=0, atol=1e-12)
    scores = [(one.next_latents - step.mean) / variance[:, None] for step in (one, two)]
    gap = (one.mean - two.mean) / variance[:, None]
    torch.testing.assert_close(gap, ratio[:, None] * (other - e), rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(gap, scores[1] - scores[0], rtol=1e-10, atol=1e-9)


def double(steps, **changes):
    """Return the schedule with tables in float64."""
    scheduler = StochasticDDIM(DDIMScheduler(**{**SD_SCHEDULE, **changes}))
    scheduler.scheduler.alphas_cumprod = scheduler.scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_change_of_the_clean_latents_tells_that_of_the_output(prediction):
    scheduler = double(50, prediction_type=prediction)
    x, output, other = torch.randn(3, 50, 3, 2, 2).double()
    one, two = (scheduler.step(o, scheduler.timesteps, x, x) for o in (output, other))
    change = scheduler.output_change(scheduler.timesteps, two.pred_original - one.pred_original)
    torch.testing.assert_close(change, other - output, rtol=0, atol=1e-10)


def test_signal_levels_reach_from_the_first_state_to_the_last():
    scheduler = make()
    states = scheduler.scheduler.alphas_cumprod[[*range(981, 0, -20), 0]]
    torch.testing.assert_close(scheduler.signal_levels, states.sqrt())


def test_only_full_noise_is_memoryless():
    make(eta=1.0).check_memoryless("Method")
    with pytest.raises(ValueError, match="Method needs a memoryless sampler.*eta: 1"):
        make(eta=0.5).check_memoryless("Method")

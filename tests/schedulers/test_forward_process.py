"""Noising at any time, and what an output there implies of the clean latents."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from lit_align.schedulers import StochasticDDIM, StochasticFlowMatch
from tests.schedulers.test_ddim import SD_SCHEDULE

ATOL = 1e-5
PREDICTIONS = ["epsilon", "v_prediction", "sample", "flow"]


def make(prediction, steps=5):
    if prediction == "flow":
        scheduler = StochasticFlowMatch(FlowMatchEulerDiscreteScheduler(shift=3.0), "ode")
    else:
        base = DDIMScheduler(**SD_SCHEDULE, prediction_type=prediction)
        scheduler = StochasticDDIM(base, eta=0.0)
    scheduler.set_timesteps(steps)
    return scheduler


def times_of(scheduler, prediction):
    """Return the schedule's times, others between them, and the first of the table."""
    between = torch.tensor([0, 3, 250, 777])
    own = scheduler.timesteps
    return torch.cat([own, between.to(own.dtype) + (0.25 if prediction == "flow" else 0)])


def draws(count):
    return torch.randn(2, count, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_target_implies_the_clean_latents_at_any_time(prediction):
    scheduler = make(prediction)
    times = times_of(scheduler, prediction)
    clean, noise = draws(len(times))
    noised, target = scheduler.corrupt(clean, noise, times)
    found = scheduler.clean(target, noised, times)
    # Noise prediction divides by the share of signal, at least 0.068.
    torch.testing.assert_close(found, clean, atol=2 * ATOL, rtol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_on_the_schedule_it_is_what_a_step_says(prediction):
    scheduler = make(prediction)
    times = scheduler.timesteps
    output, latents = draws(len(times))
    expected = scheduler.step(output, times, latents).pred_original
    found = scheduler.clean(output, latents, times)
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_it_is_affine_in_the_output(prediction):
    scheduler = make(prediction)
    times = times_of(scheduler, prediction)
    first, second = draws(len(times)).double()
    latents = draws(len(times))[0].double()
    mixed = scheduler.clean(1.5 * first - 0.5 * second, latents, times)
    ends = [scheduler.clean(each, latents, times) for each in (first, second)]
    torch.testing.assert_close(mixed, 1.5 * ends[0] - 0.5 * ends[1], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_noise_levels_are_the_factor_of_the_noise(prediction):
    scheduler = make(prediction)
    times = times_of(scheduler, prediction)
    clean, noise = draws(len(times))
    noised, _ = scheduler.corrupt(torch.zeros_like(clean), noise, times)
    levels = scheduler.noise_levels(times)
    assert levels.shape == times.shape
    torch.testing.assert_close(noised, levels.view(-1, 1, 1, 1) * noise, atol=1e-6, rtol=1e-5)
    if prediction == "flow":
        torch.testing.assert_close(levels[:5], scheduler.sigmas[:5], atol=1e-6, rtol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_half_precision_outputs_are_computed_with_in_float32(prediction):
    scheduler = make(prediction)
    output, latents = draws(5).to(torch.bfloat16)
    found = scheduler.clean(output, latents, scheduler.timesteps)
    assert found.dtype == torch.float32

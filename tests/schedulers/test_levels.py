"""Steps between any two noise levels, each sample at its own."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from lit_align.schedulers import StochasticDDIM, StochasticFlowMatch
from tests.schedulers.test_ddim import SD_SCHEDULE

ATOL = 1e-5
LAST = 999


def ddim(prediction="epsilon", double=False, **changes):
    options = {**SD_SCHEDULE, "prediction_type": prediction, **changes}
    scheduler = StochasticDDIM(DDIMScheduler(**options))
    if double:
        scheduler.scheduler.alphas_cumprod = scheduler.scheduler.alphas_cumprod.double()
    return scheduler


def flow():
    return StochasticFlowMatch(FlowMatchEulerDiscreteScheduler(shift=3.0))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_at_integer_times_it_is_ddim_of_diffusers(prediction):
    plain = DDIMScheduler(
        **{**SD_SCHEDULE, "prediction_type": prediction, "set_alpha_to_one": True}
    )
    plain.set_timesteps(10)
    x, output = torch.randn(2, 10, 4)
    expected = torch.stack(
        [
            plain.step(o, int(t), row, eta=0.0).prev_sample
            for o, t, row in zip(output, plain.timesteps, x, strict=True)
        ]
    )
    following = torch.cat([plain.timesteps[1:], torch.tensor([0])]) / LAST
    found = ddim(prediction).advance(output, x, plain.timesteps / LAST, following)
    # The first step divides by sqrt(abar) = 0.08, which amplifies rounding.
    torch.testing.assert_close(found, expected, atol=10 * ATOL, rtol=ATOL)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_it_is_eulers_step_in_the_ratio_of_noise_to_signal(prediction):
    """Of x / sqrt(abar), in S whose logarithm is linear between the table's times."""
    scheduler = ddim(prediction, double=True)
    times = torch.tensor([[999.0, 998.3], [640.25, 17.5], [123.4, 0.7], [3.0, 2.0]]).double()
    table = scheduler.scheduler.alphas_cumprod
    log_s = ((1 - table) / table).log() / 2
    s = torch.from_numpy(np.interp(times.numpy(), range(1000), log_s.numpy())).exp()
    abar = 1 / (1 + s**2)
    x, epsilon = torch.randn(2, 4, 3).double()
    signal, noise = abar[:, :1].sqrt(), (1 - abar[:, :1]).sqrt()
    clean = (x - noise * epsilon) / signal
    output = {
        "epsilon": epsilon, "sample": clean, "v_prediction": signal * epsilon - noise * clean,
    }[prediction]  # fmt: skip
    found = scheduler.advance(output, x, *(times / LAST).unbind(dim=1))
    assert found.dtype == torch.float64
    scaled = x / signal + (s[:, 1:] - s[:, :1]) * epsilon
    torch.testing.assert_close(found, scaled * abar[:, 1:].sqrt(), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_perfect_prediction_arrives_wherever_it_goes(prediction):
    scheduler = ddim(prediction)
    clean, noise = torch.randn(2, 6, 5)
    times = torch.tensor([999, 999, 500, 500, 3, 3])
    following = torch.tensor([500, 0, 20, 501, 0, 1])  # also to more noise
    noised, output = scheduler.corrupt(clean, noise, times)
    expected = scheduler.corrupt(clean, noise, following)[0]
    expected = torch.where(following[:, None] == 0, clean, expected)  # level 0 has none
    found = scheduler.advance(output, noised, times / LAST, following / LAST)
    torch.testing.assert_close(found, expected, atol=10 * ATOL, rtol=ATOL)


def test_a_schedule_without_signal_at_its_end_stays_finite():
    scheduler = ddim("v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    assert scheduler.scheduler.alphas_cumprod[-1] == 0
    clean, noise = torch.randn(2, 2, 5)
    noised, velocity = scheduler.corrupt(clean, noise, torch.tensor([999, 999]))
    found = scheduler.advance(velocity, noised, torch.ones(2), torch.tensor([0.0, 0.9995]))
    assert found.isfinite().all()
    torch.testing.assert_close(found[0], clean[0], atol=1e-3, rtol=0)


def test_flow_takes_the_euler_step_of_each_sample():
    clean, noise = torch.randn(2, 3, 4, 2, 2)
    levels, following = torch.tensor([1.0, 0.6, 0.05]), torch.tensor([0.82, 0.0, 0.049])
    noised, velocity = flow().corrupt(clean, noise, 1000 * levels)
    found = flow().advance(velocity, noised, levels, following)
    expected = flow().corrupt(clean, noise, 1000 * following)[0]
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=ATOL)
    torch.testing.assert_close(found[1], clean[1], atol=ATOL, rtol=ATOL)


@pytest.mark.parametrize("scheduler", [ddim(), flow()], ids=["ddim", "flow"])
def test_every_sample_is_at_its_own_level(scheduler):
    x, output = torch.randn(2, 5, 4, 2, 2)
    levels, following = torch.rand(2, 5).sort(dim=0, descending=True).values
    found = scheduler.advance(output.bfloat16(), x, levels, following)
    assert found.dtype == torch.float32
    for i in range(5):
        one = slice(i, i + 1)
        alone = scheduler.advance(output[one].bfloat16(), x[one], levels[one], following[one])
        assert torch.equal(alone, found[one])
    unmoved = scheduler.advance(output, x, levels, levels)
    torch.testing.assert_close(unmoved, x, atol=10 * ATOL, rtol=ATOL)


def test_times_of_the_network():
    levels = torch.tensor([1.0, 0.5, 0.0])
    assert flow().network_times(levels).tolist() == [1000, 500, 0]
    assert ddim().network_times(levels).tolist() == [999, 499.5, 0]

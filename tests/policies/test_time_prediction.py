import math

import pytest
import torch

from lit_align.functional.beta import beta_mode
from lit_align.policies.time_prediction import TimePredictor, reference_shapes
from tests.conftest import tiny_policy


def features(batch=4, channels=6, embedding_dim=5, side=8):
    maps = torch.randn(batch, channels, side, side)
    return maps, torch.randn(batch, embedding_dim), torch.linspace(1, 0.1, batch)


def test_it_has_the_papers_size_on_stable_diffusion_3():
    with torch.device("meta"):
        head = TimePredictor(2 * 1536, 1536)
    assert sum(p.numel() for p in head.parameters()) == 4_097_154


@pytest.mark.parametrize(
    ("init", "mode"), [((2.5, 1.0), 0.8176), ((1.5, 0.5), 0.7311), ((1.5, -0.7), 0.9002)]
)
def test_at_the_start_the_mode_is_nearly_the_same_everywhere(init, mode):
    head = TimePredictor(6, 5, 128, *init)
    alpha, beta = head(*features(16))
    assert beta_mode(alpha, beta).tolist() == pytest.approx([mode] * 16, abs=1e-2)
    assert alpha.mean().item() == pytest.approx(1 + math.exp(init[0]), rel=2e-2)
    assert beta.mean().item() == pytest.approx(1 + math.exp(init[1]), rel=2e-2)
    assert alpha.std() > 0  # it does read the features


def test_weights_at_the_start():
    head = TimePredictor(64, 40, 96)
    for layer in (head.conv_in, head.modulation, head.conv_out, head.hidden, head.out):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.15)
    for layer in (head.conv_in, head.conv_out, head.hidden):
        assert not layer.bias.any()
    assert head.out.bias.tolist() == [2.5, 1.0]
    assert head.modulation.bias.abs().max() > 0.02


def test_the_first_half_of_the_modulation_shifts_and_the_second_scales():
    """With scale -1 nothing of the maps is left, and without a shift nothing at all."""
    head = TimePredictor(6, 5, 8)
    maps, embedding, levels = features()
    with torch.no_grad():
        head.modulation.weight.zero_()
        head.modulation.bias[:8], head.modulation.bias[8:] = 3.0, -1.0
    constant = torch.stack(head(maps, embedding, levels))
    torch.testing.assert_close(constant, torch.stack(head(0 * maps, embedding, levels)))
    with torch.no_grad():
        head.modulation.bias[8:] = 0.0
    assert not torch.allclose(torch.stack(head(maps, embedding, levels)), constant)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_computes_in_float32(dtype):
    head = TimePredictor(6, 5, 8)
    maps, embedding, levels = (values.to(dtype) for values in features())
    expected = head(maps.float(), embedding.float(), levels)
    with torch.autocast("cpu", torch.bfloat16):
        found = head(maps, embedding, levels)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


@pytest.mark.parametrize("side", [(2, 2), (5, 3), (40, 40)])
def test_maps_of_any_size(side):
    head = TimePredictor(6, 5, 8)
    alpha, beta = head(torch.randn(2, 6, *side), torch.randn(2, 5), torch.ones(2))
    assert (alpha > 1).all()
    assert (beta > 1).all()


def test_average_before_maximum_in_pooling():
    """Of a map that is high at one of 40 x 40 places, the average of a cell of 16 x 16 is left."""
    head = TimePredictor(1, 1, 1)
    seen = []
    head.hidden.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    with torch.no_grad():
        head.conv_out.weight.zero_()
        head.conv_out.weight[0, 0, 1, 1] = 1.0
    inputs = []
    head.conv_out.register_forward_hook(lambda module, i, output: inputs.append(output))
    maps = torch.zeros(1, 1, 80, 80)
    maps[0, 0, 40, 40] = 1e4
    head(maps, torch.zeros(1, 1), torch.ones(1))
    expected = torch.nn.functional.adaptive_avg_pool2d(inputs[0], 16).amax()
    assert seen[0].item() == pytest.approx(expected.item())
    assert seen[0].item() < inputs[0].max().item()


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_it_may_start_as_a_fixed_schedule(shift):
    """Ten steps, u_k = 1 - k / 10 before the shift; the last one falls below every sensible end."""
    head = TimePredictor(6, 5, 128, init_steps=10, init_shift=shift)
    assert head.out.bias.tolist() == [0.0, 0.0]
    even = torch.arange(10, 0, -1) / 10
    levels = shift * even / (1 + (shift - 1) * even)
    maps, embedding, _ = features(10)
    alpha, beta = head(maps, embedding, levels)
    reached = levels * beta_mode(alpha, beta)
    torch.testing.assert_close(reached[:-1], levels[1:], atol=1e-2, rtol=0)
    assert reached[-1] < 0.01
    assert ((alpha + beta)[:-1] - 20).abs().max() < 0.7  # the head's a and b are near 0
    assert alpha.requires_grad


def test_a_wrong_start_is_refused():
    with pytest.raises(ValueError, match=r"`init_steps`.*`init_shift` positive, got -1 and 1"):
        TimePredictor(6, 5, 8, init_steps=-1)
    with pytest.raises(ValueError, match="got 10 and 0"):
        TimePredictor(6, 5, 8, init_steps=10, init_shift=0)


def test_a_head_for_other_features_is_refused():
    policy = tiny_policy("sd3", train="none")
    TimePredictor.for_policy(policy, width=8).check_fits(policy)
    with pytest.raises(ValueError, match=r"reads 6 channels and .* width 5.*has 32 and 16"):
        TimePredictor(6, 5, 8).check_fits(policy)


def test_the_fixed_schedule():
    """28 even steps, shifted by e: from 1 to 1 - 1/28 before the shift."""
    even = torch.arange(28, 0, -1, dtype=torch.float64) / 28
    shifted = math.e * even / (1 + (math.e - 1) * even)
    alpha, beta = reference_shapes(shifted)
    torch.testing.assert_close(alpha + beta, torch.full_like(alpha, 20.0))
    modes = beta_mode(alpha, beta)
    torch.testing.assert_close(shifted[:-1] * modes[:-1], shifted[1:])
    end = math.e * 1e-3 / (1 + (math.e - 1) * 1e-3)  # where even steps would end at 0
    assert (shifted[-1] * modes[-1]).item() == pytest.approx(end)
    low = beta_mode(*reference_shapes(torch.tensor([1e-3])))  # below it the ratio would exceed 1
    assert low.item() == pytest.approx(1 - 1e-3, abs=1e-6)

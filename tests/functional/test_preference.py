"""Values, symmetries, gradients and optima of preference losses, in float64."""

import math

import pytest
import torch

from lit_align.functional.gaussian import mean_square
from lit_align.functional.judging import best_and_worst, win_shares, winner_first
from lit_align.functional.preference import (
    LOSSES,
    Judged,
    PreferenceLoss,
    denoising_error,
    preference_diagnostics,
    scaled_loser,
)

LOG2 = 0.693147180559945
HARD = torch.tensor([[1.0, 0.0]], dtype=torch.float64)


def judged(winner, loser, reference=(0.0, 0.0), labels=None):
    """Return pairs with these errors, [B] each or numbers."""
    pair = [torch.as_tensor(v, dtype=torch.float64).reshape(-1) for v in (winner, loser)]
    error = torch.stack(torch.broadcast_tensors(*pair), dim=1)
    ref = torch.tensor([reference], dtype=torch.float64).expand_as(error)
    labels = HARD if labels is None else torch.tensor([labels], dtype=torch.float64)
    return Judged(error, labels.expand_as(error), ref)


def pairs_with_margins(z, beta=2.0):
    """Return pairs whose margins are z [B]: all of it is the winner's log-ratio."""
    return judged(-2 * torch.as_tensor(z, dtype=torch.float64) / beta, 0.0)


EQUAL = judged(0.3, 0.3, (0.3, 0.3))


@pytest.mark.parametrize(
    ("loss", "value"),
    [
        (PreferenceLoss("sigmoid"), LOG2),
        (PreferenceLoss("sigmoid", label_smoothing=0.1), LOG2),
        (PreferenceLoss("robust", label_smoothing=0.1), LOG2),
        (PreferenceLoss("soft"), LOG2),
        (PreferenceLoss("smpo"), LOG2),
        (PreferenceLoss("hinge"), 1.0),
        (PreferenceLoss("ipo", tau=3.0), 1 / 36),
        (PreferenceLoss("dmpo"), 1.614463),
        (PreferenceLoss("nca"), 2 * LOG2),
        (PreferenceLoss("apo_zero"), 1.0),
        (PreferenceLoss("apo_down"), 1.0),
        (PreferenceLoss("sppo_hard", beta=4.0), 2 * (0.5 / 4) ** 2),
        (PreferenceLoss("discopop"), 0.5 * LOG2 + 0.5),
        (PreferenceLoss("kto"), 0.5),
        (PreferenceLoss("mapo", beta=0.1), 0.3 + 0.1 * LOG2),
        (PreferenceLoss("cpo", nll_coef=2.0), LOG2 + 0.6),
        (PreferenceLoss("rank"), 0.532456 * LOG2),
    ],
    ids=lambda value: value.loss_type if isinstance(value, PreferenceLoss) else "",
)
def test_value_where_network_and_reference_agree(loss, value):
    assert loss(EQUAL).item() == pytest.approx(value, abs=5e-7)


def test_dspo_starts_at_the_winners_error():
    gap = torch.randn(3, 2, 4, 2, 2, dtype=torch.float64)
    error = denoising_error(gap.flatten(0, 1)).view(3, 2)
    start = Judged(error, HARD.expand(3, 2), error, gap, torch.zeros_like(gap))
    loss = PreferenceLoss("dspo", beta=0.001)
    torch.testing.assert_close(loss(start), error[:, 0])
    shift = torch.ones_like(gap)
    moved = Judged(error, HARD.expand(3, 2), error, gap, shift)
    expected = mean_square(gap[:, 0] - 0.001 * 0.5)  # 1 - sigmoid(0)
    torch.testing.assert_close(loss(moved), expected)


def test_all_losses_are_tested_at_their_start():
    """The two tests above name every loss."""
    tested = test_value_where_network_and_reference_agree.pytestmark[0].args[1]
    assert {loss.loss_type for loss, _ in tested} | {"dspo"} == set(LOSSES)


Z = torch.linspace(-3, 3, 13, dtype=torch.float64)


def test_swapping_the_images_flips_the_margin():
    loss = PreferenceLoss("sigmoid", beta=2.0)
    there, back = pairs_with_margins(Z), pairs_with_margins(-Z)
    torch.testing.assert_close(loss.margin(there), Z)
    torch.testing.assert_close(loss(there) - loss(back), -Z)
    assert bool((loss(there) + loss(back) >= 2 * LOG2 - 1e-12).all())


def test_soft_labels_swap_with_the_images():
    p, z = 0.8, torch.tensor([0.7])
    there = PreferenceLoss("soft", beta=2.0)(judged(-z, 0.0, labels=(p, 1 - p)))
    back = PreferenceLoss("soft", beta=2.0)(judged(z, 0.0, labels=(1 - p, p)))
    torch.testing.assert_close(there, back)


@pytest.mark.parametrize(
    "loss",
    [PreferenceLoss("ipo", tau=3.0), PreferenceLoss("mapo", beta=0.1)],
    ids=["ipo", "mapo"],
)
def test_losses_that_are_not_antisymmetric(loss):
    there, back = judged(0.1, 0.3, (0.2, 0.2)), judged(0.3, 0.1, (0.2, 0.2))
    difference = float(loss(there) - loss(back))
    z = float(loss.margin(there))
    assert abs(difference + z) > 1e-3


@pytest.mark.parametrize("name", ["hinge", "sigmoid", "dmpo", "nca", "apo_zero", "cpo", "mapo"])
def test_a_better_winner_lowers_the_loss(name):
    loss = PreferenceLoss(name, beta=0.1 if name == "mapo" else 2.0)
    good, bad = judged(0.1, 0.3, (0.2, 0.2)), judged(0.3, 0.1, (0.2, 0.2))
    assert float(loss(good)) < float(loss(bad))


def predictions(batch=3):
    """Return targets, predictions that are leaves, and those of a reference, [3, 2, 4, 3, 3]."""
    generator = torch.Generator().manual_seed(1)
    shape = (batch, 2, 4, 3, 3)
    target, prediction, reference = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    return target, prediction.requires_grad_(), reference.requires_grad_()


def test_gradient_has_the_closed_form():
    """d L / d p_w = sigmoid(-z) beta / (D B) (p_w - y_w), the loser's has the other sign."""
    target, prediction, reference = predictions()
    gap = prediction - target
    error = denoising_error(gap.flatten(0, 1)).view(3, 2)
    with torch.no_grad():
        ref = denoising_error((reference - target).flatten(0, 1)).view(3, 2)
    loss = PreferenceLoss("sigmoid", beta=1.7)
    case = Judged(error, HARD.expand(3, 2), ref)
    (gradient,) = torch.autograd.grad(loss(case).mean(), prediction)
    weight = (-loss.margin(case)).sigmoid().detach().view(3, 1, 1, 1) * 1.7 / (36 * 3)
    torch.testing.assert_close(gradient[:, 0], weight * gap[:, 0].detach())
    torch.testing.assert_close(gradient[:, 1], -weight * gap[:, 1].detach())
    assert not ref.requires_grad


def test_beta_on_means_is_beta_over_elements_on_sums():
    target, prediction, reference = predictions()
    values = []
    for beta, reduction in ((72.0, "mean"), (2.0, "sum")):
        error, ref = (
            denoising_error((p - target).flatten(0, 1), reduction).view(3, 2)
            for p in (prediction, reference)
        )
        values.append(PreferenceLoss("sigmoid", beta)(Judged(error, HARD.expand(3, 2), ref)))
    torch.testing.assert_close(*values)


def test_2500_without_the_half_is_5000_with_it():
    case = judged(torch.tensor([0.1]), 0.1002, (0.1001, 0.1001))
    without = -torch.nn.functional.logsigmoid(2500 * case.gain)
    torch.testing.assert_close(PreferenceLoss("sigmoid", 5000.0)(case), without)


@pytest.mark.parametrize("smoothing", [0.05, 0.2])
def test_label_smoothing_has_its_optimum_at_the_log_odds(smoothing):
    loss = PreferenceLoss("sigmoid", beta=2.0, label_smoothing=smoothing)
    best = math.log((1 - smoothing) / smoothing)
    z = torch.tensor([best], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(judged(-z, 0.0)).sum(), z)
    assert slope.item() == pytest.approx(0, abs=1e-12)
    for other in (best - 0.1, best + 0.1):
        assert float(loss(pairs_with_margins([other]))) > float(loss(pairs_with_margins([best])))


def test_ipo_has_its_optimum_at_the_mean_label():
    """Of labels with P(w > l) = p the optimum is m = (2 p - 1) / (2 tau)."""
    p, tau = 0.8, 5.0
    loss = PreferenceLoss("ipo", tau=tau)
    best = (2 * p - 1) / (2 * tau)

    def risk(m):
        return p * float(loss(judged(-m, 0.0))) + (1 - p) * float(loss(judged(m, 0.0)))

    assert risk(best) < min(risk(best - 1e-3), risk(best + 1e-3))


def test_separable_labels_pull_the_margin_on_forever():
    z = torch.tensor([5.0], dtype=torch.float64, requires_grad=True)
    loss = PreferenceLoss("sigmoid", beta=2.0)
    (slope,) = torch.autograd.grad(loss(judged(-z, 0.0)).sum(), z)
    assert slope.item() == pytest.approx(-1 / (1 + math.exp(5)))


def test_a_tie_has_no_gradient_at_equal_errors():
    error = torch.full((1, 2), 0.3, dtype=torch.float64, requires_grad=True)
    case = Judged(error, torch.full((1, 2), 0.5), torch.full((1, 2), 0.3, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(PreferenceLoss("soft")(case).sum(), error)
    assert not gradient.any()


def optimum(slope, beta, labels_slope, share=True):
    """Return the least-loss shift of a network, from many pairs of labelled points.

    Args:
        slope: Of m in the shift times x_w - x_l, with shared noise.
        beta: Of the loss.
        labels_slope: a, by which points are preferred.
        share: Whether the two are noised alike.
    """
    generator = torch.Generator().manual_seed(0)
    points = 0.2 + torch.randn(2, 200_000, generator=generator, dtype=torch.float64)
    chance = (labels_slope * (points[0] - points[1])).sigmoid()
    first = torch.rand(chance.shape, generator=generator, dtype=torch.float64) < chance
    gap = torch.where(first, points[0] - points[1], points[1] - points[0])
    if not share:
        k, alpha, sigma = slope
        noise = torch.randn(2, len(gap), generator=generator, dtype=torch.float64)
        # err - err_ref = d^2 + 2 d (k (alpha x + sigma e - alpha m) - e): the noise no longer goes
        gap = k * alpha * gap + (k * sigma - 1) * (noise[0] - noise[1])
        slope = 1.0
    shift = torch.zeros((), dtype=torch.float64)
    for _ in range(30):  # Newton's method on a convex loss
        z = -beta * shift * slope * gap
        first_derivative = (-(-z).sigmoid() * -beta * slope * gap).mean()
        second = (z.sigmoid() * (-z).sigmoid() * (beta * slope * gap).square()).mean()
        shift = shift - first_derivative / second
    return float(shift)


def test_the_optimum_on_noised_gaussians_needs_shared_noise():
    """Data N(0.2, 1), eps_ref the exact one: delta* = -a / (beta k alpha) = -0.387."""
    a, beta, alpha, sigma = 1.3, 7.0, 0.8, 0.6
    k = sigma / (alpha**2 + sigma**2)
    expected = -a / (beta * k * alpha)
    assert expected == pytest.approx(-0.38690, abs=1e-5)
    assert optimum(k * alpha, beta, a) == pytest.approx(expected, rel=0.02)
    assert optimum((k, alpha, sigma), beta, a, share=False) == pytest.approx(-0.10, abs=0.01)


def test_the_optimum_of_a_flow():
    """u_ref the exact one: delta* = -a V / (beta t) with V = (1 - t)^2 + t^2."""
    a, beta, t = 1.3, 7.0, 0.6
    spread = (1 - t) ** 2 + t**2
    assert optimum(t / spread, beta, a) == pytest.approx(-a * spread / (beta * t), rel=0.02)


def test_the_optimum_of_exact_densities():
    """z = beta (mu - mu_0) (x_w - x_l) / s^2 has its optimum at mu_0 + a s^2 / beta."""
    a, beta = 1.3, 7.0
    assert optimum(-1.0, beta, a) == pytest.approx(a / beta, rel=0.02)


def ranking(ranks, h):
    labels = torch.tensor([ranks], dtype=torch.float32)
    error = -torch.tensor([h], dtype=torch.float64)
    return Judged(error, labels, torch.zeros_like(error))


def test_rank_of_two_is_a_weighted_sigmoid():
    case = judged(torch.tensor([0.1, 0.4]), 0.2, (0.15, 0.25))
    weight = 1 / math.log(2) - 1 / math.log(3)
    assert weight == pytest.approx(0.532456, abs=1e-6)
    expected = weight * PreferenceLoss("sigmoid", 3.0)(case)
    torch.testing.assert_close(PreferenceLoss("rank", 3.0)(case), expected)


def test_rank_does_not_depend_on_the_order_of_images():
    loss = PreferenceLoss("rank", 2.0)
    value = loss(ranking([1, 3, 2, 2], [0.1, -0.2, 0.3, 0.0]))
    permuted = loss(ranking([2, 1, 2, 3], [0.3, 0.1, 0.0, -0.2]))
    torch.testing.assert_close(value, permuted)
    absent = loss(ranking([1, 3, 2, 2, 0], [0.1, -0.2, 0.3, 0.0, 9.0]))
    torch.testing.assert_close(value, absent)


def test_shares_of_wins():
    labels = torch.tensor([[1.0, 2.0, 2.0, 0.0], [3.0, 1.0, 2.0, 4.0]])
    expected = torch.tensor([[1.0, 0.25, 0.25, 0.0], [1 / 3, 1.0, 2 / 3, 0.0]])
    torch.testing.assert_close(win_shares(labels), expected)


def test_kto_compares_with_its_baseline():
    loss = PreferenceLoss("kto", beta=2.0)
    error = torch.tensor([[0.0], [0.0]], dtype=torch.float64)
    labels = torch.tensor([[1.0], [0.0]])
    reference = torch.tensor([[0.5], [0.5]], dtype=torch.float64)
    values = loss(Judged(error, labels, reference, baseline=0.2))
    sigmoid = 1 / (1 + math.exp(-2 * 0.3))
    assert values.tolist() == pytest.approx([1 - sigmoid, sigmoid])
    averse = PreferenceLoss("kto", beta=2.0, utility="loss_averse")
    seeking = PreferenceLoss("kto", beta=2.0, utility="risk_seeking")
    zero = Judged(error, labels, error)
    assert averse(zero).tolist() == pytest.approx([1 + LOG2] * 2)
    assert seeking(zero).tolist() == pytest.approx([1 - LOG2] * 2)


def test_holding_the_loser_back():
    """All of it counts where the two pull apart; along one line, 1 - mu of it."""
    gap = torch.tensor([[[2.0, 0.0], [2.0, 0.0]], [[2.0, 0.0], [-1.0, 0.0]]], dtype=torch.float64)
    error = torch.tensor([[4.0, 4.0], [4.0, 1.0]], dtype=torch.float64, requires_grad=True)
    held = scaled_loser(error, gap, 0.9)
    torch.testing.assert_close(held, error)
    (gradient,) = torch.autograd.grad(held.sum(), error)
    torch.testing.assert_close(gradient, torch.tensor([[1.0, 0.1], [1.0, 1.0]]).double())
    (whole,) = torch.autograd.grad(scaled_loser(error, gap, 0.0)[0].sum(), error)
    torch.testing.assert_close(whole[0], torch.ones(2).double())


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "hinge", "mapo"])
def test_ties_are_refused_where_they_mean_nothing(name):
    with pytest.raises(ValueError, match="cannot learn from ties; set `data.init_args.ties: drop`"):
        PreferenceLoss(name).check_labels(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
    PreferenceLoss("soft").check_labels(torch.tensor([[0.5, 0.5]]))


@pytest.mark.parametrize(
    ("name", "places", "told"),
    [
        ("sigmoid", 1, "learns from pairs, but the data holds ratings"),
        ("sigmoid", 4, "learns from pairs, but the data holds rankings"),
        ("kto", 3, "learns from ratings or pairs, but the data holds rankings"),
        ("rank", 1, "learns from pairs or rankings, but the data holds ratings"),
    ],
)
def test_judgements_of_another_size_are_refused(name, places, told):
    with pytest.raises(ValueError, match=f"{told}; change `data.init_args.unit`"):
        PreferenceLoss(name).check_labels(torch.ones(2, places))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"loss_type": "dpo"}, "`loss_type` must be one of"),
        ({"utility": "greedy"}, "`utility` must be one of"),
        ({"beta": 0.0}, "`beta` must be positive, got 0.0"),
        ({"tau": -1.0}, "`tau` must be positive, got -1.0"),
        ({"label_smoothing": 0.5}, r"`label_smoothing` must lie in \[0, 0.5\), got 0.5"),
        ({"alpha": 1.0}, r"`alpha` must lie in \(0, 1\), got 1.0"),
        ({"nll_coef": -1.0}, "`nll_coef` must not be negative, got -1.0"),
    ],
)
def test_constants_out_of_range_are_refused(options, told):
    with pytest.raises(ValueError, match=told):
        PreferenceLoss(**options)


def test_a_loss_without_a_reference_says_what_it_lacks():
    error = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="needs the reference's errors"):
        PreferenceLoss("sigmoid")(Judged(error, HARD))
    with pytest.raises(ValueError, match="needs the networks' predictions"):
        PreferenceLoss("dspo")(Judged(error, HARD, error))


def test_diagnostics():
    logs = preference_diagnostics(
        judged(torch.tensor([0.1, 0.5]), 0.3, (0.2, 0.2)), PreferenceLoss("sigmoid", beta=2.0)
    )
    assert float(logs["train/implicit_acc"]) == 0.5
    assert float(logs["train/err_w_minus_ref"]) == pytest.approx(0.1)
    assert float(logs["train/err_l_minus_ref"]) == pytest.approx(0.1)
    assert float(logs["train/margin"]) == pytest.approx(0.0, abs=1e-6)
    none = Judged(torch.tensor([[0.1, 0.3]]), HARD)
    logs = preference_diagnostics(none, PreferenceLoss("cpo", beta=2.0))
    assert float(logs["train/margin"]) == pytest.approx(0.2)
    assert set(logs) == {"train/model_mse", "train/implicit_acc", "train/margin"}


NAN = math.nan


def test_best_and_worst():
    rewards = torch.tensor(
        [[0.1, 0.9, 0.5], [NAN, 0.2, 0.8], [0.4, 0.4, 0.4], [NAN, NAN, 0.3], [0.3, 0.2, 0.25]]
    )
    places, signs = best_and_worst(rewards, gap_min=0.15)
    assert places[:2].tolist() == [[0, 1], [1, 2]]
    assert signs[:2].tolist() == [[-1, 1], [-1, 1]]
    assert signs[2:].isnan().all()
    assert all(a < b for a, b in places.tolist())


def test_the_better_comes_first():
    values = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])
    ordered = winner_first(values, torch.tensor([[-1.0, 1.0], [1.0, -1.0]]))
    assert ordered.flatten().tolist() == [2, 1, 3, 4]

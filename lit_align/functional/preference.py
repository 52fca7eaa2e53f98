"""Preference losses: pure functions of how well a network and its reference denoise images.

With e [B, K] the network's errors on K images of a prompt at a shared time and noise, the preferred
one first, and e_ref the reference's:

    h = e_ref - e          log-ratio, positive where the network denoises better than the reference
    r = (beta / 2) h       implicit reward, Eq. (14) of arXiv:2311.12908 as its code computes it
    z = r_w - r_l          margin;   m = h_w - h_l = 2 z / beta

    sigmoid     -(1 - s) log sigmoid(z) - s log sigmoid(-z),  s = label_smoothing (2311.12908, cDPO)
    robust      (-(1 - s) log sigmoid(z) + s log sigmoid(-z)) / (1 - 2 s)              (2403.00409)
    soft        -p log sigmoid(z) - (1 - p) log sigmoid(-z),  p the label
    hinge       relu(1 - z)                                                            (2305.10425)
    ipo         (m - 1 / (2 tau))^2                                                    (2310.12036)
    dmpo        KL(Bernoulli(sigmoid(z)) || Bernoulli(1 - alpha)), also called exo     (2507.07510)
    nca         -log sigmoid(r_w) - log sigmoid(-r_w) / 2 - log sigmoid(-r_l) / 2      (2402.05369)
    apo_zero    1 - sigmoid(r_w) + sigmoid(r_l)                                        (2408.06266)
    apo_down    sigmoid(r_w) + 1 - sigmoid(z)                                          (2408.06266)
    sppo_hard   (h_w / 2 - 1 / (2 beta))^2 + (h_l / 2 + 1 / (2 beta))^2                (2405.00675)
    discopop    -(1 - g) log sigmoid(z) + g exp(-z),  g = sigmoid(z / 0.05)            (2406.08414)
    kto         mean over images of 1 - U(y beta (h - hbar)),  y = +1 if liked, else -1 (2404.04465)
    mapo        e_w - beta log sigmoid(1000 (phi(e_w) - phi(e_l))),
                phi(e) = e / (2 (exp(e / 2) - 1))                                      (2406.06424)
    cpo         -log sigmoid(-(beta / 2) (e_w - e_l)), no reference                    (2401.08417)
    dspo        mean |p_w - target_w - beta sg[1 - sigmoid(z)] (p_w - p_ref,w)|^2    (xyfb9HHvMe)
    smpo        -log sigmoid(10 (2 p - 1) z),  p the label                             (2506.02698)
    rank        -sum over pairs |G_i - G_j| |1 / D_i - 1 / D_j| log sigmoid(r_i - r_j),
                G = 2^(share of wins) - 1,  D = log(1 + place)                         (2410.18013)

Left out: those that need statistics of the whole batch beside KTO's (BCO, AOT), and Inversion-DPO,
whose gradient vanishes where training starts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_align.functional.choices import check_choice
from lit_align.functional.gaussian import mean_square
from lit_align.functional.judging import win_shares

LossType = Literal[
    "sigmoid", "robust", "soft", "hinge", "ipo", "dmpo", "nca", "apo_zero", "apo_down",
    "sppo_hard", "discopop", "kto", "mapo", "cpo", "dspo", "smpo", "rank",
]  # fmt: skip
Utility = Literal["sigmoid", "loss_averse", "risk_seeking"]

_MAPO_SCALE, _MAPO_SNR = 1000.0, 0.5  # T and s of its code
_DISCOPOP_TEMPERATURE = 0.05
_SMPO_SHARPNESS = 10.0


@dataclass(frozen=True)
class Judged:
    """What a preference loss sees of B judgements of K images.

    Attributes:
        error: e [B, K] of the trained network.
        labels: [B, K], as of `PreferenceBatch`.
        reference: e_ref [B, K], or None for a loss without a reference.
        gap: ``p - target`` [B, K, ...] of the trained network.
        shift: ``p - p_ref`` [B, K, ...].
        baseline: hbar, a scalar, of KTO.
    """

    error: Tensor
    labels: Tensor
    reference: Tensor | None = None
    gap: Tensor | None = None
    shift: Tensor | None = None
    baseline: Tensor | float = 0.0

    @property
    def log_ratio(self) -> Tensor:
        """The log-ratios h [B, K]."""
        if self.reference is None:
            raise ValueError("This loss needs the reference's errors.")
        return self.reference - self.error

    @property
    def ease(self) -> Tensor:
        """What implicit rewards are of [B, K]: h, or -e for a loss without a reference."""
        return -self.error if self.reference is None else self.log_ratio

    @property
    def gain(self) -> Tensor:
        """The gain ``m = h_w - h_l`` [B] of pairs."""
        return self.log_ratio[:, 0] - self.log_ratio[:, 1]


@dataclass(frozen=True)
class LossKind:
    """A preference loss and what it asks for.

    Attributes:
        function: Takes `Judged` and the `PreferenceLoss` with its constants; returns [B].
        sizes: What K may be.
        needs_reference: Whether it compares with a reference.
        takes_soft_labels: Whether p in (0.5, 1), or a tie, means anything to it.
    """

    function: Callable[[Judged, PreferenceLoss], Tensor]
    sizes: Literal["pairs", "singles", "any"] = "pairs"
    needs_reference: bool = True
    takes_soft_labels: bool = False


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss by name, with its constants.

    Args:
        loss_type: See the module's table.
        beta: In the convention of Diffusion-DPO's code, positive; what it means differs for
            `mapo` (weight of the margin, 0.1) and `dspo` (0.001).
        label_smoothing: s in [0, 0.5), the share of labels taken to be wrong.
        tau: Of `ipo`, positive: the optimum of m is (2 p - 1) / (2 tau).
        alpha: Of `dmpo`, in (0, 1).
        utility: U of `kto`: "sigmoid" (Kahneman-Tversky), "loss_averse" (log sigmoid) or
            "risk_seeking" (-log sigmoid(-x)).
        nll_coef: Weight of e_w, added to any loss of pairs; a likelihood term that keeps the
            preferred image from becoming less likely. Not negative.

    Raises:
        ValueError: If a constant is out of its range.
    """

    loss_type: LossType = "sigmoid"
    beta: float = 5000.0
    label_smoothing: float = 0.0
    tau: float = 1000.0
    alpha: float = 0.01
    utility: Utility = "sigmoid"
    nll_coef: float = 0.0

    def __post_init__(self) -> None:
        """Check the constants."""
        check_choice("loss_type", self.loss_type, LossType)
        check_choice("utility", self.utility, Utility)
        for name in ("beta", "tau"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"`label_smoothing` must lie in [0, 0.5), got {self.label_smoothing}.")
        if not 0 < self.alpha < 1:
            raise ValueError(f"`alpha` must lie in (0, 1), got {self.alpha}.")
        if self.nll_coef < 0:
            raise ValueError(f"`nll_coef` must not be negative, got {self.nll_coef}.")

    @property
    def kind(self) -> LossKind:
        """What the loss asks for."""
        return LOSSES[self.loss_type]

    def check_labels(self, labels: Tensor) -> None:
        """Check that the loss can be taken of such judgements.

        Raises:
            ValueError: If their number of images does not fit, or they hold ties that mean nothing
                to it.
        """
        size, sizes = labels.shape[1], self.kind.sizes
        wanted = {"pairs": size == 2, "singles": size <= 2, "any": size >= 2}[sizes]
        if not wanted:
            remedy = {1: "ratings", 2: "pairs"}.get(size, "rankings")
            fit = {"pairs": "pairs", "singles": "ratings or pairs", "any": "pairs or rankings"}
            raise ValueError(
                f"`loss_type: {self.loss_type}` learns from {fit[sizes]}, but the data holds "
                f"{remedy}; change `data.init_args.unit`."
            )
        if size == 2 and not self.kind.takes_soft_labels and bool((labels[:, 0] <= 0.5).any()):
            raise ValueError(
                f"`loss_type: {self.loss_type}` cannot learn from ties; set "
                "`data.init_args.ties: drop`, or use `loss_type: soft`."
            )

    def implicit_reward(self, log_ratio: Tensor) -> Tensor:
        """Return ``r = (beta / 2) h``, of any shape."""
        return self.beta / 2 * log_ratio

    def margin(self, judged: Judged) -> Tensor:
        """Return z [B] of pairs."""
        return self.implicit_reward(judged.gain)

    def __call__(self, judged: Judged) -> Tensor:
        """Return the loss of each judgement [B]."""
        loss = self.kind.function(judged, self)
        if self.nll_coef:
            loss = loss + self.nll_coef * judged.error[:, 0]
        return loss


def denoising_error(gap: Tensor, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
    """Return the mean, or the sum, of squares [B] of gaps [B, ...], in float32 or better."""
    error = mean_square(gap)
    return error * gap[0].numel() if reduction == "sum" else error


def preference_diagnostics(judged: Judged, loss: PreferenceLoss) -> dict[str, Tensor]:
    """Return means of errors and implicit rewards, and how many are in order, as they are logged.

    `train/err_w_minus_ref` above 0 says that the preferred images have become less likely too.
    """
    logs = {"train/model_mse": judged.error.detach().mean()}
    rewards = loss.implicit_reward(judged.ease.detach())
    if rewards.shape[1] == 2:
        margin = rewards[:, 0] - rewards[:, 1]
        logs["train/implicit_acc"] = ((margin > 0) + 0.5 * (margin == 0)).mean()
        logs["train/margin"] = margin.mean()
    if judged.reference is None:
        return logs
    log_ratio = judged.log_ratio.detach()
    logs["train/ref_mse"] = judged.reference.mean()
    if judged.shift is not None:
        logs["train/ref_gap"] = judged.shift.detach().square().mean()
    if log_ratio.shape[1] != 2:
        return logs
    return logs | {
        "train/implicit_reward_w": rewards[:, 0].mean(),
        "train/implicit_reward_l": rewards[:, 1].mean(),
        "train/err_w_minus_ref": -log_ratio[:, 0].mean(),
        "train/err_l_minus_ref": -log_ratio[:, 1].mean(),
    }


def scaled_loser(error: Tensor, gap: Tensor, mu: float) -> Tensor:
    """Return the errors with the gradient of the rejected image's held back (arXiv:2511.03317).

    The gradient is multiplied by ``(1 - mu) |g_w|^2 / <g_w, g_l>`` cut to [0, 1] where the two
    pull the network's output the same way, so that the preferred image's error still falls; the
    value stays.

    Args:
        error: e [B, 2].
        gap: ``p - target`` [B, 2, ...], whose multiple each error's gradient is.
        mu: Share of the preferred image's progress that may be given up, in [0, 1].
    """
    preferred, rejected = gap.detach().flatten(2).unbind(1)
    product = (preferred * rejected).sum(1)
    scale = ((1 - mu) * preferred.square().sum(1) / product).clamp(0, 1)
    scale = scale.where(product > 0, 1.0)
    loser = error[:, 1]
    held = loser.detach() + scale * (loser - loser.detach())
    return torch.stack([error[:, 0], held], dim=1)


def _sigmoid(judged: Judged, loss: PreferenceLoss) -> Tensor:
    z, smoothing = loss.margin(judged), loss.label_smoothing
    return -(1 - smoothing) * F.logsigmoid(z) - smoothing * F.logsigmoid(-z)


def _robust(judged: Judged, loss: PreferenceLoss) -> Tensor:
    z, smoothing = loss.margin(judged), loss.label_smoothing
    both = -(1 - smoothing) * F.logsigmoid(z) + smoothing * F.logsigmoid(-z)
    return both / (1 - 2 * smoothing)


def _soft(judged: Judged, loss: PreferenceLoss) -> Tensor:
    z, p = loss.margin(judged), judged.labels[:, 0]
    return -p * F.logsigmoid(z) - (1 - p) * F.logsigmoid(-z)


def _hinge(judged: Judged, loss: PreferenceLoss) -> Tensor:
    return F.relu(1 - loss.margin(judged))


def _ipo(judged: Judged, loss: PreferenceLoss) -> Tensor:
    return (judged.gain - 1 / (2 * loss.tau)).square()


def _dmpo(judged: Judged, loss: PreferenceLoss) -> Tensor:
    z, alpha = loss.margin(judged), _constant(loss.alpha, judged.error)
    first = z.sigmoid() * (F.logsigmoid(z) - (1 - alpha).log())
    return first + (-z).sigmoid() * (F.logsigmoid(-z) - alpha.log())


def _constant(value: float, like: Tensor) -> Tensor:
    """Return a number as a scalar tensor of the precision of `like`."""
    return torch.as_tensor(value, dtype=like.dtype, device=like.device)


def _nca(judged: Judged, loss: PreferenceLoss) -> Tensor:
    winner, loser = loss.implicit_reward(judged.log_ratio).unbind(1)
    both = F.logsigmoid(-winner) + F.logsigmoid(-loser)
    return -F.logsigmoid(winner) - 0.5 * both


def _apo_zero(judged: Judged, loss: PreferenceLoss) -> Tensor:
    winner, loser = loss.implicit_reward(judged.log_ratio).unbind(1)
    return 1 - winner.sigmoid() + loser.sigmoid()


def _apo_down(judged: Judged, loss: PreferenceLoss) -> Tensor:
    winner, _ = loss.implicit_reward(judged.log_ratio).unbind(1)
    return winner.sigmoid() + 1 - loss.margin(judged).sigmoid()


def _sppo_hard(judged: Judged, loss: PreferenceLoss) -> Tensor:
    winner, loser = (judged.log_ratio / 2).unbind(1)
    target = 1 / (2 * loss.beta)
    return (winner - target).square() + (loser + target).square()


def _discopop(judged: Judged, loss: PreferenceLoss) -> Tensor:
    z = loss.margin(judged)
    gate = (z / _DISCOPOP_TEMPERATURE).sigmoid()
    return -(1 - gate) * F.logsigmoid(z) + gate * (-z).exp()


def _kto(judged: Judged, loss: PreferenceLoss) -> Tensor:
    sign = 2 * judged.labels.round() - 1
    x = sign * loss.beta * (judged.log_ratio - judged.baseline)
    utilities: dict[str, Callable[[Tensor], Tensor]] = {
        "sigmoid": torch.sigmoid,
        "loss_averse": F.logsigmoid,
        "risk_seeking": lambda x: -F.logsigmoid(-x),
    }
    return (1 - utilities[loss.utility](x)).mean(1)


def _mapo(judged: Judged, loss: PreferenceLoss) -> Tensor:
    scaled = _MAPO_SNR * judged.error
    winner, loser = (scaled / scaled.expm1()).unbind(1)
    margin = _MAPO_SCALE * (winner - loser)
    return judged.error[:, 0] - loss.beta * F.logsigmoid(margin)


def _cpo(judged: Judged, loss: PreferenceLoss) -> Tensor:
    winner, loser = judged.error.unbind(1)
    return -F.logsigmoid(-loss.beta / 2 * (winner - loser))


def _dspo(judged: Judged, loss: PreferenceLoss) -> Tensor:
    if judged.gap is None or judged.shift is None:
        raise ValueError("`dspo` needs the networks' predictions.")
    doubt = (-loss.margin(judged)).sigmoid().detach()
    doubt = doubt.view(-1, *[1] * (judged.gap.ndim - 2))
    return mean_square(judged.gap[:, 0] - loss.beta * doubt * judged.shift[:, 0])


def _smpo(judged: Judged, loss: PreferenceLoss) -> Tensor:
    sharpness = _SMPO_SHARPNESS * (2 * judged.labels[:, 0] - 1)
    return -F.logsigmoid(sharpness * loss.margin(judged))


def _rank(judged: Judged, loss: PreferenceLoss) -> Tensor:
    shares = win_shares(judged.labels).to(judged.error.dtype)
    present = judged.labels > 0 if judged.labels.shape[1] > 2 else judged.labels >= 0
    gains = torch.exp2(shares) - 1
    ahead = (shares[:, None] > shares[:, :, None]) & present[:, None]
    discounts = 1 / (ahead.sum(2) + 2).to(gains.dtype).log()  # 1 / log(1 + place)
    weights = _differences(gains).abs() * _differences(discounts).abs()
    better = (shares[:, :, None] > shares[:, None]) & present[:, :, None] & present[:, None]
    rewards = loss.implicit_reward(judged.log_ratio)
    return -(weights * better * F.logsigmoid(_differences(rewards))).sum((1, 2))


def _differences(values: Tensor) -> Tensor:
    """Return ``v_i - v_j`` [B, K, K]."""
    return values[:, :, None] - values[:, None]


LOSSES: dict[str, LossKind] = {
    "sigmoid": LossKind(_sigmoid),
    "robust": LossKind(_robust),
    "soft": LossKind(_soft, takes_soft_labels=True),
    "hinge": LossKind(_hinge),
    "ipo": LossKind(_ipo),
    "dmpo": LossKind(_dmpo),
    "nca": LossKind(_nca),
    "apo_zero": LossKind(_apo_zero),
    "apo_down": LossKind(_apo_down),
    "sppo_hard": LossKind(_sppo_hard),
    "discopop": LossKind(_discopop),
    "kto": LossKind(_kto, sizes="singles"),
    "mapo": LossKind(_mapo, needs_reference=False),
    "cpo": LossKind(_cpo, needs_reference=False),
    "dspo": LossKind(_dspo),
    "smpo": LossKind(_smpo, takes_soft_labels=True),
    "rank": LossKind(_rank, sizes="any", takes_soft_labels=True),
}

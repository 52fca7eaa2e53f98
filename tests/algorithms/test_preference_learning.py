"""Diffusion-DPO and Flow-DPO on tiny policies of real classes."""

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_align.algorithms import DiffusionDPO, FlowDPO
from lit_align.algorithms.noising import (
    Sharing,
    check_weighting,
    error_weights,
    noise_judgements,
)
from lit_align.data.prompts import PromptLoader
from lit_align.functional.gaussian import mean_square
from lit_align.functional.preference import LOSSES
from tests.algorithms.harness import weights
from tests.algorithms.judgements import Judgements, fit, judgements, make_dpo
from tests.conftest import tiny_policy

LOG2 = 0.693147180559945
FAMILIES = [("sd", "epsilon"), ("sd", "v_prediction"), ("sd3", "epsilon")]
families = pytest.mark.parametrize(("family", "prediction"), FAMILIES)


class Recorder(Callback):
    """Keeps what is logged at each step."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.rows.append({k: float(v) for k, v in trainer.callback_metrics.items()})


@families
@pytest.mark.parametrize("train", ["lora", "full"])
def test_the_loss_starts_at_log_2_on_real_networks(family, prediction, train):
    """Exactly: both networks take one path, in one precision."""
    policy = tiny_policy(family, prediction, train=train)
    recorder = Recorder()
    module = make_dpo(policy=policy, beta=5000.0)
    fit(module, Judgements(laps=1, held_out=Judgements(laps=1)), [recorder])
    (row,) = recorder.rows
    assert row["train/loss"] == pytest.approx(LOG2, abs=1e-7)
    assert row["train/implicit_acc"] == 0.5
    assert row["train/margin"] == 0
    assert row["train/grad_norm"] > 0
    assert row["train/beta_per_element"] == pytest.approx(5000 / (2 * 256))
    assert module.counters["judgements"] == 4
    assert module.counters["denoiser_calls"] == 2 * 8
    assert module.counters["reward_queries"] == 0


@pytest.mark.parametrize("loss_type", sorted(LOSSES))
def test_every_loss_trains_only_what_may_be(loss_type):
    module = make_dpo("sd3", "full", loss_type=loss_type, weight_decay=0.0)
    frozen = {n: p.clone() for n, p in module.named_parameters() if not p.requires_grad}
    before = weights(module, True)
    recorder = Recorder()
    fit(module, callbacks=[recorder])
    assert all(torch.equal(p, frozen[n]) for n, p in module.named_parameters() if n in frozen)
    changed = {n for n, p in weights(module, True).items() if not torch.equal(p, before[n])}
    assert len(changed) > 0.9 * len(before)
    networks = 1 + LOSSES[loss_type].needs_reference
    assert module.counters["denoiser_calls"] == 2 * 8 * networks


def test_a_loss_without_a_reference_asks_none(monkeypatch):
    module = make_dpo("sd3", "lora", loss_type="cpo", nll_coef=1.0)
    monkeypatch.setattr(module.policy, "reference", None)
    fit(module)


def test_ratings_and_rankings():
    rated = Judgements(places=1, label=[1.0])
    fit(make_dpo("sd3", loss_type="kto"), rated)
    recorder = Recorder()
    fit(make_dpo("sd3", loss_type="rank"), Judgements(places=4, label=[1.0, 3.0, 2.0, 0.0]),
        [recorder])  # fmt: skip
    assert recorder.rows[0]["train/loss"] > 0
    with pytest.raises(ValueError, match="learns from pairs, but the data holds ratings"):
        fit(make_dpo("sd3"), rated)


def noised(family="sd", batch=None, purpose="preference", **sharing):
    policy = tiny_policy(family, train="none")
    batch = batch or judgements()
    latents = policy.encode(batch.images.flatten(0, 1)).unflatten(0, (4, 2))
    return noise_judgements(policy, batch, latents, Sharing(**sharing), purpose, 0), latents, policy


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_images_of_a_pair_share_time_noise_and_prompt(family):
    found, latents, policy = noised(family, prompt_dropout=1.0)
    times = found.grouped(found.timesteps)
    assert torch.equal(times[:, 0], times[:, 1])
    assert len(set(times[:, 0].tolist())) == 4
    # The same noise: states differ by the clean latents' difference times the share of signal.
    states, targets = found.grouped(found.noised), found.grouped(found.target)
    gap = latents[:, 0] - latents[:, 1]
    if family == "sd":
        torch.testing.assert_close(targets[:, 0], targets[:, 1])
    else:
        torch.testing.assert_close(targets[:, 1] - targets[:, 0], gap)
    signal = policy.scheduler.corrupt(torch.ones(4, 1, 1, 1), torch.zeros(4, 1, 1, 1), times[:, 0])
    torch.testing.assert_close(states[:, 0] - states[:, 1], signal[0] * gap, atol=1e-5, rtol=0)
    empty = policy.encode_prompt([""])
    for key, value in found.conditioning.items():
        rows = found.grouped(value)
        assert torch.equal(rows[:, 0], rows[:, 1]), key
        torch.testing.assert_close(rows[:, 0], empty[key].expand_as(rows[:, 0]))


def test_sharing_can_be_turned_off():
    apart, _, _ = noised(noise=False, timestep=False)
    times = apart.grouped(apart.timesteps)
    assert not torch.equal(times[:, 0], times[:, 1])
    targets = apart.grouped(apart.target)
    assert not torch.equal(targets[:, 0], targets[:, 1])


def test_fixed_noise_comes_back_with_the_pair():
    first, _, _ = noised(fixed=True)
    again, _, _ = noised(batch=judgements(lap=3), fixed=True)
    assert torch.equal(first.noised, again.noised)
    fresh, _, _ = noised(batch=judgements(lap=3))
    assert not torch.equal(first.noised, fresh.noised)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
def test_errors_convert_between_spaces(prediction):
    """For any prediction: |eps - eps^|^2 and |x0 - x0^|^2 are multiples of the output's error."""
    family = "sd3" if prediction == "flow" else "sd"
    policy = tiny_policy(family, "epsilon" if prediction == "flow" else prediction, train="none")
    scheduler = policy.scheduler
    generator = torch.Generator().manual_seed(3)
    times = torch.tensor([0.1, 0.5, 0.9]) * 1000
    times = times.double() if family == "sd3" else times.long()
    clean, noise, prediction_ = (
        torch.randn(3, 4, 8, 8, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    state, target = scheduler.corrupt(clean, noise, times)
    signal = scheduler.corrupt(torch.ones_like(clean), torch.zeros_like(noise), times)[0]
    sigma = scheduler.noise_levels(times).view(-1, 1, 1, 1)
    implied = scheduler.clean(prediction_, state, times)
    noise_implied = (state - signal * implied) / sigma
    native = mean_square(prediction_ - target)
    for space, error in (("x0", implied - clean), ("eps", noise_implied - noise)):
        expected = mean_square(error) / native
        found = error_weights(scheduler, times, space).double()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_the_noise_space_of_a_flow_is_its_time_dependent_beta():
    scheduler = tiny_policy("sd3", train="none").scheduler
    times = torch.linspace(10, 990, 7)
    noise_space = error_weights(scheduler, times, "eps")
    torch.testing.assert_close(
        noise_space, error_weights(scheduler, times, "native", "one_minus_t_sq")
    )
    torch.testing.assert_close(noise_space, (1 - times / 1000).square())


def test_the_exact_weights_of_the_likelihood():
    """1000 / 2 (SNR(t - 1) / SNR(t) - 1), from the table of abar."""
    scheduler = tiny_policy("sd", train="none").scheduler
    abar = scheduler.scheduler.alphas_cumprod.double()
    snr = abar / (1 - abar)
    times = torch.tensor([1, 100, 999])
    expected = 500 * (snr[times - 1] / snr[times] - 1)
    found = error_weights(scheduler, times, "eps", "elbo").double()
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=0)
    with pytest.raises(ValueError, match="set `error_space: eps`, got 'native'"):
        check_weighting("native", "elbo")


def test_spaces_give_the_same_loss_on_both_roads():
    rows = []
    for options in ({"error_space": "eps"}, {"beta_schedule": "one_minus_t_sq"}):
        recorder = Recorder()
        fit(make_dpo("sd3", "full", FlowDPO, **options), callbacks=[recorder])
        rows.append(recorder.rows)
    for one, other in zip(*rows, strict=True):
        assert one["train/loss"] == pytest.approx(other["train/loss"], rel=1e-5)


def test_the_reference_stays_as_it_was():
    module = make_dpo("sd3", "lora", lr=1e-1)
    batch = judgements()
    with torch.no_grad(), module.reference():
        before = module._predict(module._noised(batch, "heldout"))
    fit(module, Judgements(laps=3))
    with torch.no_grad():
        with module.reference():
            after = module._predict(module._noised(batch, "heldout"))
        trained = module._predict(module._noised(batch, "heldout"))
    assert torch.equal(before, after)
    assert not torch.equal(before, trained)
    with pytest.raises(RuntimeError, match="in between"), module.reference():
        raise RuntimeError("in between")
    with torch.no_grad():
        assert torch.equal(trained, module._predict(module._noised(batch, "heldout")))


def test_a_refreshed_reference_brings_the_loss_back():
    """After a hard update z = 0 and L = log 2, whatever was learned before."""
    recorder = Recorder()
    module = make_dpo("sd3", "full", ref_update="hard", ref_update_steps=2)
    fit(module, Judgements(laps=5), [recorder])
    losses = [row["train/loss"] for row in recorder.rows]
    assert [loss == pytest.approx(LOG2, abs=1e-6) for loss in losses] == [
        True, False, True, False, True,
    ]  # fmt: skip
    recorder = Recorder()
    fit(
        make_dpo("sd3", "full", ref_update="ema", ref_update_steps=2),
        Judgements(laps=3),
        [recorder],
    )
    assert recorder.rows[2]["train/loss"] != pytest.approx(LOG2, abs=1e-6)


def test_pairs_are_learned():
    """Four pairs, the likelihood term beside: all in order, and the winners' errors fall."""
    images = torch.rand(4, 2, 3, 32, 32, generator=torch.Generator().manual_seed(7))
    images[:, 1] = 1 - images[:, 1] / 4  # bright
    recorder = Recorder()
    module = make_dpo(
        "sd3", "full", lr=1e-2, beta=200.0, nll_coef=1.0, fixed_noise_per_pair=True,
        prompt_dropout=0.0,
    )  # fmt: skip
    held_out = Judgements(laps=1, images=images)
    fit(module, Judgements(laps=30, held_out=held_out, images=images), [recorder])
    last = recorder.rows[-1]
    assert last["train/implicit_acc"] == 1
    assert last["train/loss"] - last["train/model_mse"] < 0.3
    assert last["train/err_w_minus_ref"] < 0


@pytest.mark.parametrize("loss_type", ["sigmoid", "mapo"])
def test_held_out_pairs_are_measured(loss_type):
    """Without a reference by the errors themselves."""
    module = make_dpo("sd3", "full", loss_type=loss_type)
    loader = Judgements(laps=2, held_out=Judgements(laps=2))
    prompts = PromptLoader([("a red circle", None)] * 2, 2)
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, module.experience(loader), prompts)
    metrics = trainer.callback_metrics
    assert 0 <= metrics["val/implicit_acc"] <= 1
    assert {f"val/implicit_acc/{k}" for k in range(4)} < set(metrics)
    assert "val/reward/gold" in metrics


def test_a_run_resumes_bit_by_bit(tmp_path):
    def make():
        return make_dpo("sd3", "full", ref_update="ema", ref_update_steps=1, warmup_steps=3)

    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    whole, resumed = make(), make()
    fit(whole, callbacks=[saver], enable_checkpointing=True, max_epochs=2)
    fit(resumed, resume=tmp_path / "epoch=0.ckpt", max_epochs=2)
    found = weights(resumed, True)
    assert all(torch.equal(value, found[key]) for key, value in weights(whole, True).items())
    assert resumed.counters == whole.counters


def test_the_learning_rate_rises_and_stays():
    rates = []

    class Rates(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    fit(make_dpo("sd3", "full", warmup_steps=2, lr=1.0), Judgements(laps=4), [Rates()])
    assert rates == [0.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"prompt_dropout": 1.5}, r"`prompt_dropout` must lie in \[0, 1\], got 1.5"),
        ({"sdpo_mu": -1.0}, r"`sdpo_mu` must lie in \[0, 1\], got -1.0"),
        ({"ref_alpha": 0.0}, r"`ref_alpha` must lie in \(0, 1\]"),
        ({"ref_update": "soft"}, "`ref_update` must be one of"),
        ({"error_space": "pixels"}, "`error_space` must be one of"),
        ({"beta_schedule": "elbo"}, "set `error_space: eps`"),
        ({"beta": -1.0}, "`beta` must be positive"),
    ],
)
def test_options_out_of_range_are_refused(options, told):
    with pytest.raises(ValueError, match=told):
        make_dpo("sd3", **options)


def test_prompts_and_other_families_are_refused():
    module = make_dpo("sd")
    with pytest.raises(ValueError, match="learns from judged images: use a PreferenceDataModule"):
        module.experience(PromptLoader([("a", None)], 1))
    with pytest.raises(ValueError, match="FlowDPO is for flow matching, .*use DiffusionDPO"):
        make_dpo("sd", method=FlowDPO)


def test_flow_dpo_is_diffusion_dpo_with_other_values():
    rows = []
    for method in (FlowDPO, DiffusionDPO):
        recorder = Recorder()
        fit(make_dpo("sd3", "full", method, prompt_dropout=0.0), callbacks=[recorder])
        rows.append(recorder.rows)
    assert rows[0] == rows[1]

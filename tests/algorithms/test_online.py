import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_align.algorithms import DDPO
from lit_align.data.prompts import PromptLoader
from lit_align.rewards import Colorfulness, RewardModule
from lit_align.rewards.scoring import RewardError
from lit_align.trajectory import Transition
from tests.algorithms.harness import Recorder, fit, make_ddpo, make_trainer, prompt_loader, weights

ATOL = 1e-6


def test_counters_and_logged_names():
    module = make_ddpo(guidance_scale=2.0)
    recorder = Recorder()
    trainer = fit(module, val=True, callbacks=[recorder], max_epochs=2)
    last = recorder.metrics[-1]
    assert last["reward_queries"] == 2 * 8
    # Two rounds of 8 samples x 3 steps, sampled and trained on, two branches of guidance.
    assert last["denoiser_calls"] == 2 * (8 * 3 + 8 * 3) * 2
    assert last["gradient_queries"] == 0
    expected = {"rollout/reward/Colorfulness", "rollout/reward_std/Colorfulness", "rollout/invalid",
                "time/rollout", "time/reward", "time/update", "train/loss", "train/ratio",
                "train/approx_kl", "train/clip_fraction", "train/grad_norm"}  # fmt: skip
    assert expected <= set(last)
    assert {"val/reward/Colorfulness", "val/reward/gold"} <= set(trainer.callback_metrics)


def test_score_function_and_importance_sampling_agree_on_policy():
    gradients = []
    for estimator in ("is", "sf"):
        recorder = Recorder()
        module = make_ddpo(estimator=estimator, minibatch_size=24)
        fit(module, callbacks=[recorder])
        gradients.append(recorder.gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=ATOL, rtol=1e-4)


def test_timestep_fraction_trains_fewer_steps():
    recorder = Recorder()
    module = make_ddpo(timestep_fraction=0.7, minibatch_size=4)
    fit(module, callbacks=[recorder])
    assert len(recorder.metrics) == 8 * 2 // 4  # 2 of 3 steps


@pytest.mark.parametrize(("family", "trained"), [("sd", [0, 1]), ("sd3", [0])])
def test_the_last_step_can_be_left_out(family, trained):
    """The last of those with a density: flow matching takes its very last step without noise."""
    module = make_ddpo(family, drop_last_step=True)
    seen = []
    module.loss = lambda minibatch: (seen.append(minibatch), DDPO.loss(module, minibatch))[1]
    fit(module)
    timesteps = torch.cat([minibatch.timesteps for minibatch in seen])
    assert len(timesteps) == 8 * len(trained)
    assert set(timesteps.tolist()) == set(module.policy.scheduler.timesteps[trained].tolist())


def test_inner_epochs_leave_the_policy_that_sampled():
    recorder = Recorder()
    fit(make_ddpo(num_inner_epochs=2, minibatch_size=24), callbacks=[recorder])
    assert recorder.metrics[0]["train/ratio"] == pytest.approx(1, abs=ATOL)
    assert recorder.metrics[1]["train/approx_kl"] > 1e-8


class HalfBlind(RewardModule):
    """Cannot score every other image."""

    def forward(self, images, prompts, metadata=None, group_ids=None):
        scores = images.mean(dim=(1, 2, 3))
        scores[::2] = torch.nan
        return scores


def test_unscored_images_are_masked_and_counted():
    recorder = Recorder()
    fit(make_ddpo(reward=HalfBlind(), max_invalid_fraction=0.5), callbacks=[recorder])
    assert recorder.metrics[0]["rollout/invalid"] == 4
    assert all(value == value for value in recorder.metrics[0].values())  # no NaN


class Blind(RewardModule):
    def forward(self, images, prompts, metadata=None, group_ids=None):
        return torch.full((len(images),), torch.nan)


def test_a_round_without_any_score_leaves_the_weights_alone():
    module = make_ddpo(reward=Blind(), weight_decay=0.0, max_invalid_fraction=1.0)
    before = weights(module, True)
    fit(module)
    assert all(torch.equal(value, before[name]) for name, value in weights(module, True).items())


def test_mismatched_checkpoints_are_refused(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="saved", save_on_train_epoch_end=True)
    fit(make_ddpo("sd"), callbacks=[saver], enable_checkpointing=True)
    other = make_ddpo("sd", policy_options={"lora_rank": 2})
    with pytest.raises(ValueError, match="checkpoint has policy .* this run"):
        fit(other, resume=tmp_path / "saved.ckpt")


class MyDDPO(DDPO):
    """A variant in one method: advantages are the rewards' ranks."""

    def compute_targets(self, trajectory):
        ranks = trajectory.rewards.argsort().argsort().float()
        return trajectory.replace(advantages=ranks - ranks.mean())


def test_a_variant_overrides_one_method():
    module = make_ddpo()
    variant = MyDDPO(
        module.policy, Colorfulness(), num_inference_steps=3, guidance_scale=1.0,
        prompts_per_round=4, samples_per_prompt=2, rollout_batch_size=8, minibatch_size=8,
    )  # fmt: skip
    recorder = Recorder()
    fit(variant, callbacks=[recorder])
    assert recorder.metrics[0]["train/grad_norm"] > 0


class WrongShape(RewardModule):
    def forward(self, images, prompts, metadata=None, group_ids=None):
        return images.mean(dim=(2, 3))


@pytest.mark.parametrize(
    ("options", "trainer_options", "message"),
    [
        ({"minibatch_size": 7}, {}, r"`minibatch_size` \(7\) must divide the 24 pairs"),
        ({"rollout_batch_size": 3}, {}, r"`rollout_batch_size` \(3\) must divide the 8 samples"),
        ({}, {"accumulate_grad_batches": 2}, r"accumulate_grad_batches` \(2\) .* use 1, 3"),
        ({"estimator": "sf"}, {}, "one optimiser step per round: set .* to 3, got 1"),
        ({"reward": WrongShape()}, {}, r"WrongShape must return one score per image"),
        ({"num_inference_steps": 1000}, {}, r"`num_inference_steps` \(1000\) needs timestep"),
        ({"eval_num_inference_steps": 2000}, {}, r"must lie in \[1, 1000\], got 2000"),
        ({}, {"precision": "bf16-true"}, "bf16-mixed"),
        ({"train": "none"}, {}, "`train: none`; use 'lora' or 'full'"),
    ],
)
def test_bad_runs_are_refused_before_training(options, trainer_options, message):
    with pytest.raises((ValueError, RewardError), match=message):
        fit(make_ddpo(**options), **trainer_options)


def test_eta_zero_is_refused():
    from lit_align.schedulers import StochasticDDIM

    module = make_ddpo(
        policy_options={"scheduler": lambda scheduler: StochasticDDIM(scheduler, eta=0.0)}
    )
    with pytest.raises(ValueError, match="DDPO needs a stochastic sampler: set `eta` above 0"):
        fit(module)


def test_bare_prompts_are_refused():
    with pytest.raises(TypeError, match="trains on its own samples.*PromptBatch.*PromptDataModule"):
        make_trainer().fit(make_ddpo(), prompt_loader())
    with pytest.raises(TypeError, match="list"):
        make_trainer().fit(make_ddpo(), [["a red circle"]])


def test_bf16_mixed_runs_and_keeps_scores_in_float32():
    recorder = Recorder()
    module = make_ddpo()
    fit(module, callbacks=[recorder], precision="bf16-mixed")
    # The replay runs the rollout's code path in the rollout's precision.
    assert recorder.metrics[0]["train/ratio"] == pytest.approx(1, abs=1e-4)


def test_evaluation_needs_no_training(tmp_path):
    module = make_ddpo()
    trainer = make_trainer()
    metrics = trainer.validate(module, prompt_loader(shuffle=False), verbose=False)
    tested = trainer.test(module, prompt_loader(shuffle=False), verbose=False)
    assert metrics[0]["val/reward/Colorfulness"] == tested[0]["test/reward/Colorfulness"] > 0
    (first, second) = trainer.predict(module, prompt_loader(shuffle=False))
    assert first["images"].shape == (4, 3, 32, 32)
    assert len(second["prompts"]) == 4
    # Images are on the 256 levels of a file.
    levels = first["images"] * 255
    torch.testing.assert_close(levels, levels.round())


def test_minibatches_are_transitions():
    module = make_ddpo()
    trainer = make_trainer(limit_train_batches=1)
    seen = []
    module.loss = lambda minibatch: (seen.append(minibatch), DDPO.loss(module, minibatch))[1]
    trainer.fit(module, module.experience(prompt_loader()))
    assert type(seen[0]) is Transition
    assert len(seen[0]) == 8


def test_long_prompts_are_counted_before_training():
    module = make_ddpo()
    words = " ".join(["red"] * 40)
    loader = PromptLoader([(f"a {words} circle", None), ("a circle", None)] * 2, 4, shuffle=True)
    with pytest.warns(UserWarning, match="2 of 4 prompts are longer than the text encoder reads"):
        module.experience(loader)


def test_evaluation_in_more_steps_leaves_the_rounds_as_they_are():
    """The scheduler is shared: its timetable is that of the last one who sampled."""
    module = make_ddpo("sd3", eval_num_inference_steps=6)
    trainer = fit(module, val=True, num_sanity_val_steps=1, max_epochs=2)
    module.policy.scheduler.set_timesteps(6)
    assert module.plan.steps == (0, 1)
    assert trainer.num_training_batches == module.plan.minibatches == 2
    assert trainer.global_step == 2 * 2


def test_names_of_rewards_may_hold_dots():
    class Versioned(Colorfulness):
        name = "Colour.2.1"

    trainer = fit(make_ddpo(reward=Versioned()), val=True)
    assert trainer.callback_metrics["val/reward/Colour.2.1"].isfinite()

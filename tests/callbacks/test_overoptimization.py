import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_align.callbacks import CrossRewardCallback, OveroptimizationStopping
from lit_align.rewards import RewardModule
from tests.algorithms.harness import fit, make_ddpo

NAN = float("nan")


def points(gain, *held_out, diversity=None):
    """Return a trajectory: base first, in base standard deviations."""
    return {
        "gain": torch.tensor(gain),
        "held_out_gains": torch.tensor(held_out).T,
        "diversity": torch.tensor(diversity or [NAN] * len(gain)),
        "queries": torch.arange(len(gain)) * 100.0,
    }


def judge(trajectory, **options):
    options = {"window": 2, "margin": 0.3, "diversity_margin": 0.2, **options}
    return OveroptimizationStopping(**options).judge("r", ("a", "b")[: trajectory[
        "held_out_gains"].shape[1]], trajectory)  # fmt: skip


def test_target_up_and_held_out_down_is_over_optimisation():
    told = judge(points([0.0, 1.0, 1.5, 2.0], [0.0, 0.2, 0.0, -0.2]))
    assert told == (
        "Over-optimisation: in the last 2 validations r rose by 1.00 base standard deviations, "
        "while a by 0.40 base standard deviations fell."
    )


@pytest.mark.parametrize(
    "trajectory",
    [
        points([0.0, 1.0], [0.0, -1.0]),  # fewer validations than the window
        points([0.0, 1.0, 0.9, 0.8], [0.0, 0.2, 0.0, -0.3]),  # the target does not rise
        points([0.0, 1.0, 1.5, 2.0], [0.0, 0.1, 0.0, -0.1]),  # less than the margin
        points([0.0, 1.0, 1.5, 2.0], [0.0, 0.9, 0.7, 0.5]),  # still better than the base
        points([0.0, 1.0, 1.5, 2.0], [0.0, 0.1, 0.2, 0.3], diversity=[1.0, 1.0, 0.9, 0.85]),
    ],
)
def test_what_is_not_over_optimisation(trajectory):
    assert judge(trajectory) == ""


def test_any_held_out_reward_and_diversity_count():
    told = judge(points([0.0, 1.0, 1.5, 2.0], [0.0, 0.1, 0.1, 0.1], [0.0, 0.0, -0.1, -0.5]))
    assert "while b by 0.50 base standard deviations fell" in told
    told = judge(points([0.0, 1.0, 2.0], [0.0, 0.1, 0.2], diversity=[2.0, 1.9, 1.5]))
    assert "while diversity by 25% of the base model's fell" in told


class Brightness(RewardModule):
    def forward(self, images, prompts, metadata=None, group_ids=None):
        return images.mean(dim=(1, 2, 3))


class Darkness(RewardModule):
    def forward(self, images, prompts, metadata=None, group_ids=None):
        return 1 - images.mean(dim=(1, 2, 3))


def over_optimise(tmp_path, action, *callbacks):
    """Raise brightness while its opposite is held out."""
    module = make_ddpo(reward=Brightness(), prompts_per_round=8, minibatch_size=16, lr=0.02)
    module.rewards = {"Brightness": module.reward, "Darkness": Darkness()}
    module.val_means = torch.nn.ModuleList(type(module.val_means[0])() for _ in module.rewards)
    measuring = CrossRewardCallback(diversity_prompts=0, kl_prompts=0)
    stopping = OveroptimizationStopping(window=1, margin=1e-3, action=action)
    options = {"max_epochs": 6, "default_root_dir": tmp_path, "enable_checkpointing": True}
    trainer = fit(module, val=True, callbacks=[measuring, stopping, *callbacks], **options)
    return trainer, stopping


def test_a_run_is_stopped_and_its_best_checkpoint_named(tmp_path):
    saver = ModelCheckpoint(tmp_path, monitor="val/heldout_gain", mode="max", every_n_epochs=1)
    with pytest.warns(UserWarning, match="Over-optimisation: .* Brightness rose .* Darkness by"):
        trainer, stopping = over_optimise(tmp_path, "stop", saver)
    assert trainer.current_epoch < 6
    assert stopping.reason
    resumed = OveroptimizationStopping()
    resumed.load_state_dict(stopping.state_dict())
    assert resumed.reason == stopping.reason


def test_a_warning_lets_the_run_go_on(tmp_path):
    with pytest.warns(UserWarning, match="give ModelCheckpoint `monitor: val/heldout_gain"):
        trainer, _ = over_optimise(tmp_path, "warn")
    assert trainer.current_epoch == 6


def test_it_needs_somebody_who_measures():
    with pytest.raises(ValueError, match="needs a CrossRewardCallback before it"):
        fit(make_ddpo(), callbacks=[OveroptimizationStopping()])
    with pytest.raises(ValueError, match="needs a CrossRewardCallback before it"):
        fit(make_ddpo(), callbacks=[OveroptimizationStopping(), CrossRewardCallback()])
    with pytest.raises(ValueError, match="`window` must be positive, got 0"):
        OveroptimizationStopping(window=0)

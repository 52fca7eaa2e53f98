import random

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lit_align.callbacks import InvariantError, InvariantsCallback
from lit_align.callbacks.invariants import bit_hash, size_of
from lit_align.rewards import Colorfulness, RewardModule
from tests.algorithms.harness import fit, make_ddpo, make_trainer, prompt_loader


def checked_fit(module, val=True, checks=None, **options):
    return fit(module, val=val, callbacks=[checks or InvariantsCallback()], **options)


# Correct runs.


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_a_correct_run_passes(family, train, accumulate):
    module = make_ddpo(family, train, beta=0.1, guidance_scale=2.0, num_inner_epochs=2)
    trainer = checked_fit(module, accumulate_grad_batches=accumulate, max_epochs=2)
    assert trainer.global_step == 2 * module.plan.minibatches // accumulate


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_a_correct_run_in_low_precision_passes(family):
    module = make_ddpo(family, minibatch_size=4, policy_options={"dtype": "bfloat16"})
    trainer = checked_fit(module, precision="bf16-mixed", max_epochs=2)
    assert trainer.global_step == 2 * module.plan.minibatches


def test_no_validation_prompts_no_check_of_the_start():
    module = make_ddpo(lr=1e-3)
    moved(module)
    assert checked_fit(module, val=False).global_step == 3


class Drawing(Colorfulness):
    """Draws from the global generators, as a data augmentation may."""

    def forward(self, *args):
        random.random(), np.random.rand(), torch.rand(())
        return super().forward(*args)


def test_the_checks_change_nothing():
    runs = []
    for callbacks in ([], [InvariantsCallback()]):
        module = make_ddpo(reward=Drawing())
        torch.manual_seed(1), random.seed(1), np.random.seed(1)
        fit(module, val=True, callbacks=callbacks, max_epochs=2)
        left = torch.tensor([torch.rand(()), random.random(), np.random.rand()])
        trained = [p.detach().flatten() for p in module.parameters() if p.requires_grad]
        runs.append(torch.cat([left, *trained]))
        counters = dict(module.counters)
    assert torch.equal(*runs)
    assert counters["reward_queries"] == 2 * 8


# The ratio.


def replaying_otherwise(module, change, from_round=0):
    """Let the recorded log-probabilities of each minibatch differ from those of the replay."""
    loss = module.loss

    def wrong(minibatch):
        if module.trainer.current_epoch >= from_round:
            old = minibatch.old_log_prob
            minibatch = minibatch.replace(old_log_prob=old + change(torch.arange(len(old))))
        return loss(minibatch)

    module.loss = wrong
    return module


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("broken_round", [0, 1])
def test_a_replay_that_differs_is_told(broken_round, accumulate):
    module = replaying_otherwise(make_ddpo(), lambda i: i * 0 - 0.01, broken_round)
    with pytest.raises(
        InvariantError, match=rf"Round {broken_round}: .*train/ratio is 1\.01005 .*1 wi"
    ):
        checked_fit(module, max_epochs=2, accumulate_grad_batches=accumulate)
    assert module.trainer.global_step == (broken_round * 3 // accumulate) + 1


def test_differences_that_cancel_in_the_mean_are_told_by_the_divergence():
    module = replaying_otherwise(make_ddpo(), lambda i: 3e-3 * (-1.0) ** i)
    with pytest.raises(InvariantError, match="approx_kl 4.5e-06 \\(at most 1.0e-06"):
        checked_fit(module)


def test_a_ratio_that_is_not_a_number_is_told():
    module = replaying_otherwise(make_ddpo(), lambda i: i * torch.nan)
    checks = InvariantsCallback()
    checks.on_before_optimizer_step = lambda *args: None  # the gradients are not finite either
    with pytest.raises(InvariantError, match="ratio is nan"):
        checked_fit(module, checks=checks)


@pytest.mark.parametrize(
    ("tolerance", "options", "passes"),
    [
        (None, {}, False),  # 1e-4
        (1e-2, {}, True),
        (None, {"precision": "bf16-mixed"}, True),  # the clip range, 1e-3
        (1e-5, {"precision": "bf16-mixed"}, False),
    ],
)
def test_tolerance_of_the_ratio(tolerance, options, passes):
    module = replaying_otherwise(make_ddpo(), lambda i: i * 0 + 5e-4)
    checks = InvariantsCallback(tolerance)
    if passes:
        assert checked_fit(module, checks=checks, **options).global_step == 3
    else:
        with pytest.raises(InvariantError, match="train/ratio"):
            checked_fit(module, checks=checks, **options)
    with pytest.raises(ValueError, match="must be positive, got 0"):
        InvariantsCallback(0.0)


class Progress:
    """What the callback reads of a trainer after a batch."""

    precision, current_epoch, world_size = "32-true", 3, 1

    def __init__(self, global_step, **metrics):
        self.global_step, self.callback_metrics = global_step, metrics


def test_a_round_that_is_continued_in_its_middle_is_off_policy_by_right():
    checks, off = InvariantsCallback(), {"train/ratio": torch.tensor(1.5)}
    checks.on_train_batch_end(Progress(5, **off), nn.Linear(1, 1), None, None, 4)
    checks.on_train_epoch_start(Progress(6), nn.Linear(1, 1))
    checks.on_train_batch_end(Progress(6, **off), nn.Linear(1, 1), None, None, 0)  # accumulating
    with pytest.raises(InvariantError, match="Round 3"):
        checks.on_train_batch_end(Progress(7, **off), nn.Linear(1, 1), None, None, 1)


def test_modules_without_a_ratio_are_left_alone():
    checks = InvariantsCallback()
    checks.on_train_epoch_start(Progress(0), nn.Linear(1, 1))
    checks.on_train_batch_end(Progress(1), nn.Linear(1, 1), None, None, 0)
    assert not checks._new_round


# The start.


def moved(module):
    """Let the policy start away from the pretrained model."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.add_(0.1)
    return module


@pytest.mark.parametrize("options", [{}, {"train": "full", "beta": 0.1}], ids=["lora", "kept"])
def test_a_start_away_from_the_pretrained_model_is_told(options):
    module = moved(make_ddpo(**options))
    with pytest.raises(InvariantError, match=r"nats from the pretrained model \(at most 1e-06"):
        checked_fit(module)
    assert module.trainer.global_step == 0


def test_without_a_reference_nothing_is_known_of_the_start():
    assert checked_fit(moved(make_ddpo(train="full", lr=1e-4))).global_step == 3


def test_a_resumed_run_may_be_away(tmp_path):
    saving = ModelCheckpoint(tmp_path, save_on_train_epoch_end=True)
    fit(make_ddpo(), val=True, callbacks=[saving], enable_checkpointing=True)
    module = make_ddpo()
    trainer = make_trainer(max_epochs=2, callbacks=[InvariantsCallback()])
    loaders = (module.experience(prompt_loader()), prompt_loader(shuffle=False))
    trainer.fit(module, *loaders, ckpt_path=saving.best_model_path, weights_only=True)
    assert trainer.global_step == 6


# Gradients.


class AtStep(Callback):
    """Changes the gradients of some parameters before the checks see them."""

    def __init__(self, step, names, change):
        self.step, self.names, self.change = step, names, change

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.step:
            for name, parameter in pl_module.named_parameters():
                if parameter.requires_grad and self.names in name:
                    self.change(parameter)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("step", [0, 2])
def test_gradients_that_are_not_finite_are_told_before_they_do_harm(step, value):
    module = make_ddpo()
    breaking = AtStep(step, "mid_block", lambda p: p.grad.view(-1)[-1].fill_(value))
    with pytest.raises(InvariantError, match=f"Update {step + 1}: .* not finite, in .*mid_block"):
        fit(module, callbacks=[breaking, InvariantsCallback()])
    assert all(p.isfinite().all() for p in module.parameters())


def drop(parameter):
    parameter.grad = None


def zero(parameter):
    parameter.grad.zero_()


@pytest.mark.parametrize("change", [drop, zero])
@pytest.mark.parametrize(
    ("step", "epochs", "seen"), [(0, 1, False), (1, 1, True), (2, 1, False), (3, 2, True)]
)
def test_a_module_without_gradient_is_told_at_the_second_update_and_once_per_round(
    step, epochs, seen, change
):
    callbacks = [AtStep(step, "mid_block", change), InvariantsCallback()]
    module = make_ddpo(train="full", lr=1e-4)
    if seen:
        told = rf"Update {step + 1}: .* no gradient .*mid_block.* and \d+ more"
        with pytest.raises(InvariantError, match=told):
            fit(module, callbacks=callbacks, max_epochs=epochs)
    else:
        assert fit(module, callbacks=callbacks, max_epochs=epochs).global_step == 3 * epochs


def test_a_parameter_left_out_of_the_loss_is_told():
    module = make_ddpo()
    module.head = nn.Linear(2, 1)
    with pytest.raises(InvariantError, match=r"1 of \d+ trained modules .*: head\. The loss does"):
        checked_fit(module)
    assert module.trainer.global_step == 1


class Indifferent(RewardModule):
    def forward(self, images, prompts, metadata=None, group_ids=None):
        return torch.ones(len(images))


def test_a_round_without_any_advantage_is_no_mistake():
    assert checked_fit(make_ddpo(reward=Indifferent()), max_epochs=2).global_step == 6


def test_lora_may_be_warmed_up_from_a_learning_rate_of_zero():
    module = make_ddpo()
    optimizer = module.configure_optimizers()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 4, 1))
    module.configure_optimizers = lambda: {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": schedule, "interval": "step"},
    }
    assert checked_fit(module).global_step == 3


def test_a_share_of_a_small_tensor_may_be_empty():
    """FSDP2 splits rows; a process beyond the last one holds none."""
    assert size_of([torch.zeros(0, 3), torch.tensor([-1.0, 1.0])]) == 2
    assert size_of([torch.full((2,), 1e-30)]) > 0


# Ranks.


class Drifting(LightningModule):
    """A linear layer whose weights one process changes on its own, from the second round on."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def training_step(self, batch):
        return self.layer(batch).square().mean()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.current_epoch == 1 and self.global_rank == 1:
            with torch.no_grad():
                self.layer.weight[:, :2] = self.layer.weight[:, :2].flip(1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_weights_that_differ_between_processes_are_told():
    trainer = make_trainer(
        strategy="ddp_spawn", devices=2, max_epochs=3, callbacks=[InvariantsCallback()]
    )
    told = r"InvariantError: After round 1, 1 of 2 trained tensors differ .*: layer\.weight\."
    with pytest.raises(Exception, match=told):
        trainer.fit(Drifting(), DataLoader(torch.randn(4, 4)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_hash_of_bits(dtype, monkeypatch):
    weights = torch.randn(30, 10).to(dtype)
    expected = bit_hash(weights)
    assert torch.equal(bit_hash(weights.clone()), expected)
    swapped, nudged = weights.clone(), weights.clone()
    swapped[[0, 7]] = weights[[7, 0]]  # keeps the sum and the sum of squares
    nudged.view(-1)[3] = torch.nextafter(weights.view(-1)[3], torch.tensor(9.0, dtype=dtype))
    assert bit_hash(swapped) != expected
    assert bit_hash(nudged) != expected
    assert bit_hash(weights.flip(0)) != expected
    monkeypatch.setattr("lit_align.callbacks.invariants._CHUNK", 7)
    assert torch.equal(bit_hash(weights), expected)


# Rewards.


class First(RewardModule):
    """Scores two images and forgets the others."""

    def forward(self, images, prompts, metadata=None, group_ids=None):
        return images.mean(dim=(1, 2, 3))[:2]


class Places(RewardModule):
    """Prefers images late in the batch, unless there is only one prompt."""

    def forward(self, images, prompts, metadata=None, group_ids=None):
        places = torch.arange(len(images)) * float(len(set(prompts)) > 1)
        return images.mean(dim=(1, 2, 3)) + places


class Neighbours(RewardModule):
    """Takes it for granted that the images of a group follow each other."""

    granularity = "groupwise"

    def forward(self, images, prompts, metadata=None, group_ids=None):
        pairs = images.mean(dim=(1, 2, 3)).unflatten(0, (-1, 2))
        return (pairs - pairs.mean(dim=1, keepdim=True)).flatten()


class Ranks(RewardModule):
    granularity = "batchwise"

    def forward(self, images, prompts, metadata=None, group_ids=None):
        return torch.linspace(0, 1, len(images))


class Group(RewardModule):
    """Compares images with their group, wherever it lies; cannot score dark ones."""

    granularity = "groupwise"

    def forward(self, images, prompts, metadata=None, group_ids=None):
        values = images.mean(dim=(1, 2, 3))
        same = (group_ids[:, None] == group_ids).float()
        scores = values - same @ values / same.sum(dim=1)
        return scores.where(values > values.median(), torch.nan)


class Moody(RewardModule):
    def forward(self, images, prompts, metadata=None, group_ids=None):
        return torch.randn(len(images))


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (First(), r"First cannot score 4 images of 2 prompts: .*one score per image"),
        (Places(), r"Places gives an image another score .* up to 2\."),
        (Neighbours(), "Neighbours gives an image another score"),
        (Moody(), r"Moody .*`check_rewards: false`"),
    ],
)
def test_a_reward_that_mixes_up_images_is_told(reward, message):
    module = make_ddpo(reward=reward)
    with pytest.raises(InvariantError, match=message):
        checked_fit(module)
    assert module.counters["reward_queries"] == 0


def test_rewards_of_the_evaluation_are_checked_too_and_without_validation_prompts():
    module = make_ddpo()
    module.rewards["mood"] = Moody()
    with pytest.raises(InvariantError, match="Moody"):
        checked_fit(module, val=False)


@pytest.mark.parametrize("reward", [Group(), Ranks()])
def test_correct_rewards_pass(reward):
    module = make_ddpo(reward=reward, max_invalid_fraction=1.0)
    assert checked_fit(module).global_step == 3


def test_the_check_of_rewards_can_be_turned_off():
    checks = InvariantsCallback(check_rewards=False)
    assert checked_fit(make_ddpo(reward=Moody()), checks=checks).global_step == 3

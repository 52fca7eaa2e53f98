"""Reward models trained on judgements: losses, measures, checkpoints, resuming, two processes."""

import math
import warnings

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lit_align.algorithms import RewardModeling
from lit_align.callbacks import RNGStateCallback
from lit_align.checkpoint_io import read_checkpoint
from lit_align.rewards import CLIPRewardTower, Colorfulness, LearnedReward
from lit_align.rewards.shapes_clip import build_shapes_clip
from lit_align.trajectory import PreferenceBatch

ATOL = 1e-6
LOG_2 = math.log(2)


def judgements(count=8, places=2, seed=0):
    """Return B judgements that prefer the brighter image."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.linspace(0.9, 0.1, places).expand(count, places)
    noise = torch.rand(count, places, 3, 32, 32, generator=generator)
    ranks = torch.arange(1.0, places + 1).expand(count, places)
    labels = torch.tensor([1.0, 0.0]).expand(count, 2) if places == 2 else ranks
    numbers = torch.arange(count)
    return PreferenceBatch(
        images=0.2 * noise + 0.8 * levels[..., None, None, None],
        prompts=["a red circle"] * count,
        labels=labels.clone(),
        weights=torch.ones(count),
        positions=numbers,
        record_ids=numbers,
    )


def tied(batch, places=slice(0, 2)):
    labels = batch.labels.clone()
    labels[places] = 0.5
    return batch.replace(labels=labels)


def make(head="linear", **options):
    torch.manual_seed(0)
    encoder = build_shapes_clip(width=8, layers=1)
    tower = CLIPRewardTower(model=encoder.model, tokenizer=encoder.tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a module passed as argument, which is meant
        return RewardModeling(LearnedReward(tower, head), **{"lr": 3e-3, **options})


def loader(batch, size=4):
    return DataLoader(list(batch.split(1)), size, collate_fn=PreferenceBatch.concatenate)


def fit(module, batch=None, val=None, ckpt_path=None, **options):
    batch = judgements() if batch is None else batch
    defaults = {"max_epochs": 1, "callbacks": [RNGStateCallback()], "enable_checkpointing": False}
    options = {**defaults, **options}
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, num_sanity_val_steps=0,
        enable_model_summary=False, **options,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(
            module, loader(batch), None if val is None else loader(val), ckpt_path=ckpt_path
        )
    return trainer


@pytest.mark.parametrize("loss_type", ["bt", "soft", "scaled", "listwise"])
def test_a_new_linear_head_starts_at_log_2(loss_type):
    batch = judgements()
    module = make(loss_type=loss_type)
    torch.testing.assert_close(
        module.losses(module.score(batch), batch.labels), torch.full((8,), LOG_2)
    )


def test_losses_of_ties_and_margins_at_equal_scores():
    zeros, labels = torch.zeros(2, 2), torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    torch.testing.assert_close(
        make(loss_type="btt").losses(zeros, labels), torch.tensor([math.log(6), math.log(36 / 24)])
    )
    margin = make(loss_type="margin", margin=0.57).losses(zeros[:1], labels[:1])
    assert margin.item() == pytest.approx(math.log(1 + math.exp(0.57)))
    half = torch.tensor([[0.75, 0.25]])
    assert make(loss_type="scaled").losses(zeros[:1], half).item() == pytest.approx(LOG_2 / 2)
    assert make(loss_type="margin").losses(zeros[:1], half).item() == pytest.approx(
        math.log(1 + math.exp(0.57 / 2))
    )


def test_rankings_are_learned_whole():
    """Three equal scores: -log(1/3 1/2 1/1)."""
    batch = judgements(places=3)
    module = make(loss_type="listwise")
    losses = module.losses(module.score(batch), batch.labels)
    torch.testing.assert_close(losses, torch.full((8,), math.log(6)))
    trainer = fit(module, batch, batch, max_epochs=5)
    assert trainer.callback_metrics["val/accuracy"] > 0.9
    with pytest.raises(ValueError, match=r"'bt' is for pairs, got 3 images to a judgement; use"):
        fit(make(), batch)


@pytest.mark.parametrize("loss_type", ["bt", "btt", "soft", "margin", "scaled", "listwise"])
def test_every_loss_learns_the_brighter_image(loss_type):
    batch = judgements()
    trainer = fit(make(loss_type=loss_type), batch, batch, max_epochs=5)
    metrics = trainer.callback_metrics
    assert metrics["val/accuracy"] > 0.9
    assert metrics["val/accuracy_with_ties"] >= metrics["val/accuracy"] - ATOL
    assert {"train/loss", "val/loss", "val/tie_threshold", "val/ece"} <= set(metrics)


@pytest.mark.parametrize(("head", "freeze"), [("cosine", 0.0), ("mlp", 1.0), ("linear", "tower")])
def test_only_what_is_not_frozen_moves(head, freeze):
    module = make(head, freeze=freeze, lr=1e-2)
    before = {name: p.clone() for name, p in module.named_parameters()}
    fit(module)
    for name, parameter in module.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved <= parameter.requires_grad, name
    scale = "reward.tower.model.logit_scale"
    assert torch.equal(before[scale], module.reward.logit_scale) == (head != "cosine")


@pytest.mark.parametrize("loss_type", ["bt", "margin", "scaled"])
def test_ties_are_refused_where_they_say_nothing(loss_type):
    with pytest.raises(ValueError, match=r"2 of the batch's 4 judgements are ties, .* 'soft' or "):
        fit(make(loss_type=loss_type), tied(judgements()))


def test_ties_in_validation_are_left_out_of_the_loss():
    module = make(lr=0.0)
    metrics = fit(module, judgements(), tied(judgements())).callback_metrics
    assert metrics["val/loss"].item() == pytest.approx(LOG_2)
    assert metrics["val/accuracy_with_ties"].item() == pytest.approx(2 / 8)  # all scores are equal


def test_weights_are_relative_within_the_batch():
    batch = judgements(4)
    weights = torch.tensor([1.0, 0.0, 2.0, 1.0])
    doubled = PreferenceBatch.concatenate([batch.select(torch.tensor([0, 2, 2, 3]))])
    one, other = make(), make()
    fit(one, batch.replace(weights=3 * weights))
    fit(other, doubled)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_validation_standardises_the_reward():
    batch = judgements()
    module = make(lr=1e-2)
    fit(module, batch, batch)
    scores = module.reward(batch.images.flatten(0, 1), ["a red circle"] * 16)
    assert scores.mean().item() == pytest.approx(0, abs=1e-4)
    assert scores.std().item() == pytest.approx(1, abs=1e-3)


def test_a_checkpoint_is_a_reward(tmp_path):
    """It opens by path, without the module, and gives the same scores; so does its export."""
    saved = ModelCheckpoint(tmp_path, filename="it", save_on_train_epoch_end=False)
    module, batch = make("mlp", lr=1e-2), judgements()
    fit(module, batch, batch, callbacks=[saved], enable_checkpointing=True)
    pixels, prompts = batch.images.flatten(0, 1), ["a red circle"] * 16
    expected = module.reward(pixels, prompts)
    path = str(tmp_path / "it.ckpt")
    opened = LearnedReward(pretrained=path, name="taste")
    torch.testing.assert_close(opened(pixels, prompts), expected, atol=0, rtol=0)
    module.save_pretrained(str(tmp_path / "folder"))
    exported = LearnedReward(pretrained=str(tmp_path / "folder"))
    torch.testing.assert_close(exported(pixels, prompts), expected, atol=0, rtol=0)
    assert read_checkpoint(path)["lit_align"]["method"] == "RewardModeling"


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    batch = judgements(16)
    whole = make("mlp", warmup_steps=3)
    fit(whole, batch, max_epochs=3)
    saved = ModelCheckpoint(tmp_path, filename="it", every_n_train_steps=6, save_top_k=1)
    first = make("mlp", warmup_steps=3)
    fit(first, batch, max_epochs=3, callbacks=[saved, RNGStateCallback()],
        enable_checkpointing=True)  # fmt: skip
    resumed = make("mlp", warmup_steps=3)
    trainer = fit(resumed, batch, max_epochs=3, ckpt_path=saved.best_model_path)
    assert trainer.global_step == 12
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_the_same_run_twice_is_the_same():
    one, other = make("mlp"), make("mlp")
    for module in (one, other):
        torch.manual_seed(hash(id(module)) % 1000)  # the global generator does not matter
        fit(module)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_options_out_of_range_are_named():
    with pytest.raises(ValueError, match=r"`loss_type` must be one of 'bt', .* got 'dpo'"):
        make(loss_type="dpo")
    with pytest.raises(ValueError, match=r"`theta` must be above 1, .* got 1.0, 0.57"):
        make(theta=1.0)
    with pytest.raises(ValueError, match=r"`reward` must be a LearnedReward, got Colorfulness"):
        RewardModeling(Colorfulness())
    single = judgements(2).replace(images=torch.zeros(2, 1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"learns from two or more images .* got \[2, 1, 3"):
        make().score(single)


def test_what_fills_up_a_share_of_held_out_judgements_is_not_measured():
    """A process that has one less repeats its last with weight 0."""
    batch = judgements(4)
    wrong = batch.replace(labels=batch.labels.flip(1)).select(torch.tensor([0, 1]))
    filled = PreferenceBatch.concatenate([batch, wrong.replace(weights=torch.zeros(2))])
    seen = []
    for val in (batch, filled):
        module = make("cosine", lr=0.0)
        trainer = fit(module, batch, val)
        seen.append({k: float(v) for k, v in trainer.callback_metrics.items() if "val/" in k})
        seen[-1]["std"] = float(module.reward.std)
    assert seen[0] == pytest.approx(seen[1], abs=1e-6)


class Halves(DataLoader):
    """Deals every other judgement of each batch to a process."""

    def __iter__(self):
        rank = torch.distributed.get_rank()
        for batch in super().__iter__():
            yield batch.select(torch.arange(rank, len(batch), 2))


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one():
    batch = judgements().replace(weights=torch.tensor([1.0, 5, 0, 2, 1, 1, 3, 0]))
    alone = make("mlp")
    fit(alone, batch)
    module = make("mlp")
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp_spawn", max_epochs=1, logger=False,
        enable_progress_bar=False, enable_checkpointing=False, use_distributed_sampler=False,
    )  # fmt: skip
    items = list(batch.split(1))
    trainer.fit(module, Halves(items, 4, collate_fn=PreferenceBatch.concatenate))
    for a, b in zip(alone.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)  # AdamW enlarges rounding

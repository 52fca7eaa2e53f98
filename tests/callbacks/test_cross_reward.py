import csv
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lit_align.callbacks import AdapterEMA, CrossRewardCallback, SampleGallery
from lit_align.data.prompts import PromptLoader
from lit_align.metrics import PairwiseDiversity
from lit_align.rewards import Colorfulness, RewardModule, ShapesCLIP
from tests.algorithms.harness import PROMPTS, fit, make_ddpo, make_trainer, prompt_loader

SMALL = {"diversity_prompts": 4, "samples_per_prompt": 3, "kl_prompts": 4}


class Thirds(torch.nn.Module):
    """Embeds an image as its mean colours."""

    def forward(self, images):
        return images.mean(dim=(2, 3))


class Brightness(RewardModule):
    def forward(self, images, prompts, metadata=None, group_ids=None):
        return images.mean(dim=(1, 2, 3))


class Constant(RewardModule):
    def forward(self, images, prompts, metadata=None, group_ids=None):
        return torch.ones(len(images))


def module_with(*held_out, **options):
    module = make_ddpo(lr=3e-2, **options)
    return type(module)(
        module.policy, Colorfulness(), {r.name: r for r in held_out},
        num_inference_steps=3, guidance_scale=1.0, prompts_per_round=4, samples_per_prompt=2,
        rollout_batch_size=8, minibatch_size=8, clip_range=1e-3, advantage_norm="batch", lr=3e-2,
    )  # fmt: skip


def rows_of(callback, module, *others, **options):
    """Run three rounds; return the validation rows of metrics.csv, the base model first."""
    logger = CSVLogger("logs", flush_logs_every_n_steps=1)
    options = {"max_epochs": 3, "logger": logger, "log_every_n_steps": 1, **options}
    fit(module, val=True, callbacks=[*others, callback], **options)
    with Path(logger.log_dir, "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val/reward/Colorfulness"]]
    return [{k: float(v) for k, v in row.items() if v} for row in rows], Path(logger.log_dir)


def test_everything_is_measured_from_the_base_on():
    callback = CrossRewardCallback(embedder=Thirds(), **SMALL)
    rows, folder = rows_of(callback, module_with(Brightness(), ShapesCLIP()))
    assert [row["reward_queries"] for row in rows] == [0, 8, 16, 24]
    base, *_, last = rows
    names = {"val/heldout_gain", "val/joint_gain", "val/joint_collapse", "val/diversity",
             "val/vendi", "val/fid", "val/kid", "val/cmmd", "val/kl", "val/drift/luminance",
             "val/drift/saturation", "val/drift/high_frequency", "val/drift/saturated_pixels",
             "val/drift/latent_norm", "val/win_rate/Colorfulness", "val/invalid/ShapesCLIP",
             "val/correlation/Brightness", "val/generalization/ShapesCLIP"}  # fmt: skip
    assert names <= set(last)
    assert base["val/kl"] == base["val/heldout_gain"] == 0
    assert base["val/fid"] == pytest.approx(0, abs=1e-9)
    assert base["val/win_rate/Colorfulness"] == 0.5
    assert last["val/kl"] > 0
    assert last["val/fid"] > 1e-9
    # In units of the base model's spread, averaged over the two held-out rewards.
    gains = [
        (last[f"val/reward/{n}"] - base[f"val/reward/{n}"]) / base[f"val/reward_std/{n}"]
        for n in ("Brightness", "ShapesCLIP")
    ]
    assert last["val/heldout_gain"] == pytest.approx(sum(gains) / 2, rel=1e-4)
    assert (folder / "generalization.png").stat().st_size > 1000
    with (folder / "generalization.csv").open(newline="") as file:
        summary = {row["key"]: float(row["value"]) for row in csv.DictReader(file)}
    slope = last["val/generalization/Brightness"]
    assert summary["slope/Brightness"] == pytest.approx(slope)
    assert callback.generalization.points["queries"].tolist() == [0, 8, 16, 24]


def test_diversity_is_that_of_several_images_of_a_prompt():
    callback = CrossRewardCallback(embedder=Thirds(), **SMALL)
    rows, _ = rows_of(callback, module_with(Brightness()), max_epochs=1)
    fresh = module_with(Brightness())
    loader = PromptLoader([(p, None) for p in PROMPTS], 4)
    batch = loader.batch([i for i in range(4) for _ in range(3)])
    batch = batch.replace(positions=batch.positions * 3 + torch.arange(12) % 3)
    images, _ = fresh.generate(batch, "diversity")
    expected = PairwiseDiversity(embedder=Thirds())
    expected.update(images, batch.prompt_ids)
    assert rows[0]["val/diversity"] == pytest.approx(float(expected.compute()), abs=1e-6)
    assert rows[0]["val/diversity"] > 0


def test_the_embedder_is_the_first_reward_that_has_one_and_may_be_missing():
    rows, _ = rows_of(CrossRewardCallback(**SMALL), module_with(Brightness()), max_epochs=1)
    assert not {"val/diversity", "val/fid"} & set(rows[-1])
    clip = ShapesCLIP()
    callback = CrossRewardCallback(**SMALL)
    rows, _ = rows_of(callback, module_with(Brightness(), clip), max_epochs=1)
    assert callback.base.embeddings.shape == (8, 64)
    assert {"val/diversity", "val/fid"} <= set(rows[-1])


def test_without_held_out_rewards_there_is_no_generalization():
    callback = CrossRewardCallback(**SMALL)
    rows, folder = rows_of(callback, module_with())
    assert callback.generalization is None
    assert "val/win_rate/Colorfulness" in rows[-1]
    assert not (folder / "generalization.csv").exists()


def test_a_reward_without_spread_is_left_out_and_told_of():
    callback = CrossRewardCallback(**SMALL)
    with pytest.warns(UserWarning, match="Constant scores all images of the base model the same"):
        rows, _ = rows_of(callback, module_with(Constant(), Brightness()))
    assert callback.generalization.held_out == ("Brightness",)
    assert "val/generalization/Brightness" in rows[-1]
    assert "val/reward/Constant" in rows[-1]


def test_full_fine_tuning_is_measured_against_a_kept_copy():
    callback = CrossRewardCallback(**SMALL)
    rows, _ = rows_of(callback, module_with(Brightness(), train="full"))
    assert rows[0]["val/kl"] == 0
    assert rows[-1]["val/kl"] > 0


def test_averaged_weights_are_what_is_measured_and_drawn():
    """With a decay near 1 the average stays the base model, and so do picture and scores."""
    callback, gallery = CrossRewardCallback(**SMALL), SampleGallery(2, every_n_rounds=1)
    drawn = []
    sample = gallery._sample
    gallery._sample = lambda *args: drawn.append(sample(*args)) or drawn[-1]
    average = AdapterEMA(decay=0.999999)
    rows, _ = rows_of(callback, module_with(Brightness()), average, gallery, max_epochs=2)
    assert rows[-1]["val/kl"] < 1e-6
    assert rows[-1]["val/reward/Colorfulness"] == pytest.approx(
        rows[0]["val/reward/Colorfulness"], abs=1e-5
    )
    assert (drawn[0].int() - drawn[-1].int()).abs().max() <= 1


def test_state_continues_the_trajectory_and_other_prompts_are_refused(tmp_path):
    callback = CrossRewardCallback(**SMALL)
    rows_of(callback, module_with(Brightness()), max_epochs=2)
    torch.save(callback.state_dict(), "state.pt")
    state = torch.load("state.pt", weights_only=True)
    resumed = CrossRewardCallback(**SMALL)
    resumed.load_state_dict(state)
    assert torch.equal(resumed.base.scores, callback.base.scores)
    points, expected = resumed.generalization.points, callback.generalization.points
    assert all(torch.equal(points[k].nan_to_num(), v.nan_to_num()) for k, v in expected.items())
    module = module_with(Brightness())
    module.evaluate = lambda batch: pytest.fail("the base must not be scored again")
    trainer = make_trainer(callbacks=[resumed], limit_train_batches=0)
    trainer.fit(module, module.experience(prompt_loader()), prompt_loader(shuffle=False))
    changed = CrossRewardCallback(**SMALL)
    changed.load_state_dict(state)
    other = PromptLoader([(p + " on a white background", None) for p in PROMPTS], 4)
    module = module_with(Brightness())
    with pytest.raises(ValueError, match="The validation prompts are not those"):
        make_trainer(callbacks=[changed]).fit(module, module.experience(prompt_loader()), other)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="`samples_per_prompt` must be at least 2, got 1"):
        CrossRewardCallback(samples_per_prompt=1)


def test_prompts_are_shared_evenly_or_refused():
    from lit_align.callbacks.evaluation import first_prompts

    module = module_with(Brightness())
    trainer = make_trainer()
    trainer.fit(module, module.experience(prompt_loader()), prompt_loader(shuffle=False))
    assert first_prompts(module, 3).prompts == PROMPTS[:3]
    assert first_prompts(module, 100, share=True).prompts == PROMPTS

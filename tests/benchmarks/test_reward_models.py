"""Synthetic annotators with known probabilities, and the measures of models learned of them."""

import math
from pathlib import Path

import pytest
import torch

from lit_align.benchmarks.reward_models import (
    Judged,
    fit_outcomes,
    read_runs,
    reward_models,
    summarise,
)
from lit_align.benchmarks.synthetic_annotators import (
    draw_pool,
    indifference_for,
    judge,
    noise_ceiling,
    outcome_probabilities,
    write_preferences,
)
from lit_align.cli import main
from lit_align.data.preferences import PreferenceFile
from lit_align.functional.noise import keyed_generator
from lit_align.functional.reward_modeling import tie_probabilities
from lit_align.rewards import LearnedReward, ShapesVerifier

ATOL = 1e-6
CONFIGS = Path(__file__).parent.parent.parent / "configs" / "reward_modeling"
DELTA = torch.linspace(-3, 3, 13, dtype=torch.float64)


def test_without_indifference_annotators_are_bradley_terry():
    chances = outcome_probabilities(DELTA, temperature=0.5)
    torch.testing.assert_close(chances[:, 0], (DELTA / 0.5).sigmoid())
    assert chances[:, 1].abs().max() < ATOL


def test_an_indifferent_annotator_is_bradley_terry_with_ties():
    """theta = exp(tau / T), at scores u / T."""
    chances = outcome_probabilities(DELTA, temperature=0.5, indifference=0.4)
    torch.testing.assert_close(chances, tie_probabilities(DELTA / 0.5, math.exp(0.8)))


def test_the_indifference_gives_the_share_of_ties():
    tau = indifference_for(0.25, DELTA, 0.5)
    assert outcome_probabilities(DELTA, 0.5, tau)[:, 1].mean().item() == pytest.approx(0.25)
    assert indifference_for(0.0, DELTA, 0.5) == 0


def test_labels_follow_the_probabilities():
    chances = torch.tensor([[0.6, 0.3, 0.1]]).expand(20_000, 3)
    labels = judge(chances, keyed_generator("test"))
    for value, expected in ((1.0, 0.6), (0.5, 0.3), (0.0, 0.1)):
        assert (labels == value).float().mean().item() == pytest.approx(expected, abs=0.015)


def test_ceiling_of_a_single_pair():
    assert noise_ceiling(torch.tensor([-math.log(4)]), 1.0) == pytest.approx(0.8)


def test_scale_and_theta_are_found_again():
    delta = torch.randn(4000, generator=keyed_generator("delta"))
    chances = tie_probabilities(2 * delta.double(), 3.0)
    scale, theta = fit_outcomes(delta, judge(chances, keyed_generator("labels")))
    assert scale == pytest.approx(2, rel=0.15)
    assert theta == pytest.approx(3, rel=0.15)


def test_a_pool_is_the_same_each_time_and_from_its_cache(tmp_path):
    first, cached = draw_pool(6, "train", 3, tmp_path), draw_pool(6, "train", 3, tmp_path)
    again, other = draw_pool(6, "train", 3), draw_pool(6, "train", 4)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.images, cached.images)
    assert not torch.equal(first.images, other.images)
    prompts = [prompt for prompt in first.prompts for _ in range(2)]
    scores = ShapesVerifier()(first.images.flatten(0, 1).float() / 255, prompts)
    torch.testing.assert_close(scores, first.gold.flatten(), atol=ATOL, rtol=0)
    assert first.gold.max() == 1


def test_utilities_are_standardised():
    pool = draw_pool(20, "heldout", 0)
    assert pool.utilities(0.0).mean().item() == pytest.approx(0, abs=1e-5)
    assert pool.utilities(0.0).std().item() == pytest.approx(1, abs=1e-5)
    color = (pool.color - pool.color.mean()) / pool.color.std()
    taste = pool.utilities(2.0) - pool.utilities(0.0)
    torch.testing.assert_close(taste, 2 * color, atol=1e-5, rtol=0)


def test_the_preferred_image_comes_first():
    pool = draw_pool(3, "train", 0)
    judged = Judged(pool, torch.tensor([1.0, 0.0, 0.5]))
    for index, first in ((0, 0), (1, 1), (2, 0)):
        record = judged[index]
        torch.testing.assert_close(record.images[0, 0] * 255, pool.images[index, first].float())
        assert record.labels.tolist() == ([[0.5, 0.5]] if index == 2 else [[1.0, 0.0]])


def test_written_preferences_can_be_read(tmp_path):
    write_preferences(str(tmp_path), pairs=8, val_pairs=4)
    file = PreferenceFile(str(tmp_path / "train.jsonl"))
    assert len(file) == 8
    assert len(PreferenceFile(str(tmp_path / "val.jsonl"))) == 4


def test_finished_runs_are_skipped_and_summed_up(tmp_path, capsys):
    for seed, accuracy in ((0, 0.7), (1, 0.8)):
        row = "judgements,accuracy,ceiling\n1000," + f"{accuracy},0.82\n"
        (tmp_path / f"bt_1000_seed{seed}.csv").write_text(row)
    reward_models(str(tmp_path), seeds=[0, 1], only=["bt_1000"])
    assert [row["accuracy"] for row in read_runs(tmp_path)["bt_1000"]] == [0.7, 0.8]
    assert "| bt_1000 | 2 | 1,000 | 0.7500 ± 0.0707 | 0.8200 ± 0.0000 |" in capsys.readouterr().out
    summarise(tmp_path)
    assert (tmp_path / "accuracy.png").stat().st_size > 1000


@pytest.mark.parametrize("name", ["shapes_bt", "shapes_btt"])
def test_from_judgements_to_a_reward_by_the_command_line(name, tmp_path):
    """Write, fit, export; the checkpoint and the folder are the same reward."""
    write_preferences(str(tmp_path / "it"), pairs=16, val_pairs=8)
    given = {
        "trainer.max_epochs": "1",
        "trainer.enable_progress_bar": "false",
        "data.init_args.train": str(tmp_path / "it" / "train.jsonl"),
        "data.init_args.val": str(tmp_path / "it" / "val.jsonl"),
        "data.init_args.batch_size": "4",
        "runs_dir": str(tmp_path / "runs"),
    }
    words = [word for key, value in given.items() for word in (f"--{key}", value)]
    main(["fit", "--config", str(CONFIGS / f"{name}.yaml"), *words])
    (checkpoint,) = (tmp_path / "runs").rglob("last.ckpt")
    folder = str(tmp_path / "exported")
    main(["export", "--ckpt_path", str(checkpoint), "--output", folder])
    images, prompts = torch.rand(2, 3, 32, 32), ["a red circle", "two squares"]
    one, other = (LearnedReward(pretrained=path) for path in (str(checkpoint), folder))
    torch.testing.assert_close(one(images, prompts), other(images, prompts), atol=0, rtol=0)
    assert one.std != 1, "standardised by the validation"

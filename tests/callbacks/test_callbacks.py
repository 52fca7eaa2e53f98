import pytest
import torch

from lit_align.algorithms import DDPO
from lit_align.callbacks import CrossRewardCallback, SampleGallery
from lit_align.callbacks.cross_reward import compare_paired
from lit_align.callbacks.sample_gallery import draw_rows
from tests.algorithms.harness import fit, make_ddpo, prompt_loader


def test_paired_comparison_by_hand():
    base = torch.tensor([0.0, 1.0, 2.0, torch.nan, 5.0])
    aligned = torch.tensor([1.0, 1.0, 4.0, 1.0, torch.nan])
    # Differences 1, 0, 2: mean 1, std 1, standard error 1 / sqrt(3); base std 1.
    row = compare_paired("r", base, aligned, torch.arange(5))
    assert row[:-1] == ("r", "+1.0000", "+2.0000", "+1.0000", "+0.5774", "+1.73", "+1.00")
    assert row[-1].startswith("0.833 (")  # two wins and a tie


def test_the_base_is_scored_before_and_the_aligned_after(capsys, tmp_path):
    callback = CrossRewardCallback()
    module = make_ddpo(lr=3e-2)
    trainer = fit(module, val=True, callbacks=[callback], max_epochs=2, default_root_dir=tmp_path)
    assert callback.base.scores.shape == (8, 2)  # Colorfulness, gold
    fresh = make_ddpo()
    expected = torch.cat(
        [fresh.evaluate(b)["scores"]["Colorfulness"] for b in prompt_loader(shuffle=False)]
    )
    torch.testing.assert_close(callback.base.scores[:, 0], expected, atol=1e-6, rtol=0)
    assert not torch.equal(callback.base.scores[:, 0], callback._current.scores[:, 0])
    assert "Base -> aligned on 8 held-out images" in capsys.readouterr().out
    assert (tmp_path / "summary.md").read_text().startswith("| reward")
    assert trainer.callback_metrics["val/reward/Colorfulness"] == pytest.approx(
        callback._current.scores[:, 0].mean().item()
    )


@pytest.mark.parametrize("every", [2, 3, 5], ids=["not first", "last", "never"])
def test_base_and_last_round_are_scored_whenever_validation_runs(every, tmp_path, capsys):
    callback, gallery = CrossRewardCallback(), SampleGallery(num_prompts=2)
    module = make_ddpo(lr=3e-2)
    options = {"max_epochs": 3, "check_val_every_n_epoch": every, "default_root_dir": tmp_path}
    fit(module, val=True, callbacks=[callback, gallery], **options)
    fresh, loader = make_ddpo(), prompt_loader(shuffle=False)
    base = torch.cat([fresh.evaluate(b)["scores"]["Colorfulness"] for b in loader])
    torch.testing.assert_close(callback.base.scores[:, 0], base, atol=1e-6, rtol=0)
    aligned = torch.cat([module.evaluate(b)["scores"]["Colorfulness"] for b in loader])
    ids = callback.base.prompt_ids
    row = compare_paired("Colorfulness", callback.base.scores[:, 0], aligned, ids)
    assert f"| {row[1]} | {row[2]} |" in capsys.readouterr().out
    assert gallery.base.shape == (2, 32, 32, 3)


def test_callbacks_never_change_what_is_learned():
    """The weights after a run are the same with and without them."""
    runs = []
    for callbacks in ([], [CrossRewardCallback(), SampleGallery(num_prompts=2, every_n_rounds=1)]):
        module = make_ddpo()
        fit(module, val=True, callbacks=callbacks, max_epochs=2)
        runs.append([p.clone() for p in module.parameters() if p.requires_grad])
    for left, right in zip(*runs, strict=True):
        assert torch.equal(left, right)


def test_no_validation_prompts_no_table(capsys):
    fit(make_ddpo(), callbacks=[CrossRewardCallback(), SampleGallery()])
    assert "Base -> aligned" not in capsys.readouterr().out


def test_gallery_draws_every_n_rounds_and_the_last(tmp_path):
    gallery = SampleGallery(num_prompts=3, every_n_rounds=2)
    fit(make_ddpo(), val=True, callbacks=[gallery], max_epochs=3, default_root_dir=tmp_path)
    assert gallery.base.shape == (3, 32, 32, 3)
    drawn = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert drawn == ["round_0002.png", "round_0003.png"]


def test_rows_have_their_names_and_prompts():
    images = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
    figure = draw_rows({"base": images, "round 3": images}, ["a red circle", "a square"])
    assert len(figure.axes) == 4
    assert [axis.get_title() for axis in figure.axes[:2]] == ["a red circle", "a square"]
    assert figure.axes[2].get_ylabel() == "round 3"


def test_gallery_shows_what_evaluation_scores():
    module = make_ddpo()
    batch = next(iter(prompt_loader(shuffle=False)))
    images = DDPO.evaluate(module, batch)["images"]
    first, _ = module.generate(batch.select(torch.tensor([0, 1])))
    torch.testing.assert_close(first, images[:2], atol=1 / 255, rtol=0)

"""Candidates: drawn, taken up, read; and preferences told by a reward."""

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lit_align import candidates
from lit_align.candidates import (
    Candidates,
    Source,
    draw_candidates,
    gather_candidates,
    read_candidates,
    read_prompts,
)
from lit_align.cli import main
from lit_align.data.preference_records import parse_record
from lit_align.label import SyntheticAnnotator, label, score_candidates, weighted_total
from lit_align.rewards import Colorfulness, RewardModule, ShapesVerifier, WeightedReward
from lit_align.verbs import Opened, sample_images
from tests.conftest import tiny_policy

PROMPTS = [("a red circle", {"kind": "single"}), ("two blue squares", None), ("a cat", None)]
DRAWS = 4000
FOUR_SIGMA = 4 * 0.5 / math.sqrt(DRAWS)  # of a share


@pytest.fixture(scope="module")
def source():
    return Source(Opened(tiny_policy("sd"), 2, 1.0), "tiny", 2, 1.0)


def lines(path):
    return Path(path).read_bytes().splitlines(keepends=True)


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


class Brightness(RewardModule):
    """Mean pixel value; not a number for prompts about cats."""

    def forward(self, images, prompts, metadata=None, group_ids=None):
        scores = images.mean(dim=(1, 2, 3))
        return scores.where(torch.tensor(["cat" not in prompt for prompt in prompts]), torch.nan)


def grays(levels, prompt="a circle", folder="."):
    """Return candidates that are gray images of these levels."""
    items = []
    for number, level in enumerate(levels):
        name = f"{prompt.replace(' ', '-')}-{number}.png"
        Image.new("RGB", (4, 4), (level, level, level)).save(Path(folder, name))
        items.append({"uid": name, "path": name})
    return Candidates(prompt, None, items)


def test_candidates_do_not_depend_on_how_they_are_batched(source):
    one = draw_candidates(source, PROMPTS, Path("one"), images_per_prompt=3, batch_size=2)
    all_ = draw_candidates(source, PROMPTS, Path("all"), images_per_prompt=3, batch_size=64)
    assert one == all_
    assert [entry[:2] for entry in one] == PROMPTS
    items = [item for entry in one for item in entry.items]
    assert len({item["uid"] for item in items}) == len({item["seed"] for item in items}) == 9
    for item in items:
        assert np.abs(pixels(f"one/{item['path']}") - pixels(f"all/{item['path']}")).max() <= 1
    drawn = sample_images(source.opened.policy, ["a cat"], [one[2].items[1]["seed"]], 2, 1.0)
    expected = (drawn[0].permute(1, 2, 0).numpy() * 255).round()
    assert np.abs(pixels(f"one/{one[2].items[1]['path']}") - expected).max() <= 1
    assert read_candidates(Path("one/candidates.jsonl"), Path("one")) == one


def test_only_what_is_missing_is_drawn(source, monkeypatch):
    counts = []

    def counted(policy, prompts, *rest):
        counts.append(len(prompts))
        return sample_images(policy, prompts, *rest)

    monkeypatch.setattr(candidates, "sample_images", counted)
    (found, *_) = draw_candidates(source, PROMPTS, Path("out"))
    Path("out", found.items[1]["path"]).unlink()
    times = {path: path.stat().st_mtime_ns for path in Path("out/images").iterdir()}
    draw_candidates(source, PROMPTS, Path("out"), images_per_prompt=3, batch_size=3)
    assert counts == [6, 3, 1]  # the one that was removed, and a third of each prompt
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert not list(Path("out").rglob("*.unfinished"))


@pytest.mark.parametrize("changed", ["model", "guidance_scale", "seed", "prompt", "broken"])
def test_images_that_were_drawn_in_another_way_are_refused(source, changed):
    draw_candidates(source, PROMPTS[:1], Path("out"))
    prompts, seed = PROMPTS[:1], 42
    if changed == "prompt":
        prompts = [("a cat", None)]
    elif changed == "seed":
        seed = 43
    elif changed == "broken":
        Path("out/images/000000_1.png").write_bytes(b"cut")
    else:
        source = source._replace(**{changed: {"model": "other", "guidance_scale": 2.0}[changed]})
    with pytest.raises(ValueError, match="was drawn as .*give another `output`"):
        draw_candidates(source, prompts, Path("out"), seed=seed)


def test_names_of_images_tell_models_apart(source):
    (one,) = draw_candidates(source, PROMPTS[:1], Path("one"))
    (two,) = draw_candidates(source._replace(model="other"), PROMPTS[:1], Path("two"))
    assert one.items[0]["seed"] == two.items[0]["seed"]
    assert one.items[0]["uid"] != two.items[0]["uid"]


def test_records_name_the_model_and_the_step_of_a_checkpoint():
    torch.save({"global_step": 400}, "last.ckpt")
    assert candidates._model_name("last.ckpt", None, None) == "last.ckpt@step400"
    assert candidates._model_name(None, "shapes-sd", None) == "shapes-sd"
    assert candidates._model_name(None, "shapes-sd", "lora") == "shapes-sd+lora"


def test_prompts_are_texts_files_and_shipped_lists():
    assert read_prompts(["a cat", "a dog"], limit=1) == [("a cat", None)]
    assert read_prompts("simple-animals", limit=2) == [("cat", None), ("dog", None)]
    assert read_prompts(["simple-animals"]) == read_prompts("simple-animals")
    (prompt, metadata), *_ = read_prompts("shapes-heldout")
    assert prompt == "a cyan triangle on a white background"
    assert metadata["background"] == "white"
    for prompts, limit, told in (([], None, "empty"), (["a cat"], 0, "`limit` must be positive")):
        with pytest.raises(ValueError, match=told):
            read_prompts(prompts, limit)
    with pytest.raises(FileNotFoundError, match="no prompts file 'nowhere'"):
        read_prompts("nowhere")


def test_lists_of_candidates_are_read_for_another_folder():
    Path("old").mkdir()
    entry = grays([0, 9], folder="old")
    record = {"schema": "lit_align/pref/1", "prompt": "a circle", "items": entry.items,
              "metadata": {"prompt": {"kind": "single"}}}  # fmt: skip
    swapped = {**record, "items": entry.items[::-1]}
    single = {**record, "items": entry.items[:1]}
    rows = "\n".join(json.dumps(row) for row in (record, swapped, single))
    Path("old/preferences.jsonl").write_text(rows)
    (found,) = read_candidates(Path("old/preferences.jsonl"), Path("new"))
    assert found.metadata == {"kind": "single"}
    assert [item["path"] for item in found.items] == [f"../old/a-circle-{k}.png" for k in (0, 1)]
    Path("old/bad.jsonl").write_text(json.dumps({"prompt": "a circle"}))
    with pytest.raises(ValueError, match=r"bad.jsonl, line 1: expected a 'prompt' and 'items'"):
        read_candidates(Path("old/bad.jsonl"), Path("new"))
    Path("old/a-circle-1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"line 1: there is no image .*a-circle-1.png"):
        read_candidates(Path("old/preferences.jsonl"), Path("new"))
    with pytest.raises(FileNotFoundError, match="no list of candidates"):
        read_candidates(Path("nowhere.jsonl"), Path("new"))


def test_where_candidates_come_from_is_told_once(source):
    with pytest.raises(ValueError, match="Give `prompts` with"):
        gather_candidates(Path("out"), 0, 1)
    with pytest.raises(ValueError, match="leave out `prompts`"):
        gather_candidates(Path("out"), 0, 1, candidates="a.jsonl", prompts=["a cat"])
    with pytest.raises(ValueError, match="either `ckpt_path` or `pretrained`"):
        gather_candidates(Path("out"), 0, 1, prompts=["a cat"])
    with pytest.raises(ValueError, match="`images_per_prompt` must be at least 2"):
        draw_candidates(source, PROMPTS, Path("out"), images_per_prompt=1)


def test_the_better_one_wins_without_temperature():
    annotator, generator = SyntheticAnnotator("a", tie_threshold=0.1), torch.Generator()
    assert annotator.prefer(1.0, 0.5, generator) == [1.0, 0.0]
    assert annotator.prefer(0.5, 1.0, generator) == [0.0, 1.0]
    assert annotator.prefer(0.5, 0.5625, generator) == [0.5, 0.5]
    assert annotator.rank([0.5, 1.0, 0.5625, 0.0], generator) == [2, 1, 2, 3]


@pytest.mark.parametrize(("gap", "temperature"), [(0.5, 0.5), (-1.0, 2.0), (2.0, 1.0)])
def test_pairs_follow_bradley_and_terry(gap, temperature):
    """P(1 > 2) = 1 / (1 + exp(-gap / T)), by pairs and by rankings."""
    annotator = SyntheticAnnotator("a", temperature)
    generator = torch.Generator().manual_seed(1)
    expected = 1 / (1 + math.exp(-gap / temperature))
    won = sum(annotator.prefer(gap, 0.0, generator)[0] for _ in range(DRAWS)) / DRAWS
    assert abs(won - expected) < FOUR_SIGMA
    ranks = [annotator.rank([gap, 5.0, 0.0], generator) for _ in range(DRAWS)]
    assert all(sorted(rank) == [1, 2, 3] for rank in ranks)
    assert abs(sum(rank[0] < rank[2] for rank in ranks) / DRAWS - expected) < FOUR_SIGMA


def test_records_of_pairs_rankings_and_what_cannot_be_scored():
    entry = grays([0, 100, 200])
    annotator = SyntheticAnnotator("ada")
    pairs = annotator.judge(entry, [0.0, 1.0, 1.0], "pairs")
    assert [record["label"] for record in pairs] == [[0.0, 1.0], [0.0, 1.0], [0.5, 0.5]]
    assert pairs[0]["items"] == entry.items[:2]
    assert len({record["pair_id"] for record in pairs}) == 3
    (ranking,) = annotator.judge(entry, [0.0, 1.0, 1.0], "rankings")
    assert ranking["rank"] == [2, 1, 1]
    assert {record["annotator"] for record in [*pairs, ranking]} == {"ada"}
    kinds = [r["kind"] for r in annotator.judge(entry, [0.0, 1.0, math.nan], "pairs")]
    assert kinds == ["pair", "invalid", "invalid"]
    (ranking,) = annotator.judge(entry, [0.0, 1.0, math.nan], "rankings")
    assert ranking["kind"] == "invalid"


def test_an_annotator_is_decided_by_name_and_seed():
    entries = [grays([0, 1], prompt=f"number {n}") for n in range(20)]

    def told(**options):
        annotator = SyntheticAnnotator(**{"name": "ada", "temperature": 9.0, **options})
        return [annotator.judge(entry, [0.0, 1.0], "pairs")[0]["label"] for entry in entries]

    assert told() == told()
    assert told() != told(seed=1)
    assert told() != told(name="bob")
    for option in ("temperature", "tie_threshold"):
        with pytest.raises(ValueError, match=f"`{option}` must be 0 or more, got -1"):
            told(**{option: -1.0})


def test_scores_are_of_the_files_and_every_term_is_kept():
    found = [grays([0, 51]), grays([255, 102], "a cat"), grays([204, 153], "a dog")]
    reward = WeightedReward(
        {"bright": Brightness(), "color": Colorfulness()}, {"bright": 2.0, "color": 1.0}, "none"
    )
    totals = score_candidates(reward, found, Path(), batch_size=1)
    torch.testing.assert_close(totals[0], [0.0, 0.4], atol=1e-3, rtol=0)  # gray is not quite 0
    assert all(math.isnan(total) for total in totals[1])
    kept = found[2].items[0]["scores"]
    assert kept["bright"] == pytest.approx(0.8)
    assert kept["WeightedReward"] == pytest.approx(2 * kept["bright"] + kept["color"])
    assert found[1].items[0]["scores"].keys() == {"color"}


def test_terms_are_standardised_over_all_candidates():
    """z of (0, 2, 4) is (-a, 0, a), a = sqrt(3 / 2); an equal term adds nothing."""
    reward = WeightedReward({"a": Brightness(), "b": Brightness()}, {"a": 2.0, "b": 1.0})
    nan = math.nan
    scores = {"a": torch.tensor([0.0, 2.0, 4.0, nan]), "b": torch.tensor([5.0, 5.0, 5.0, 5.0])}
    total = weighted_total(reward, scores)
    a = math.sqrt(1.5)
    expected = torch.tensor([-2 * a, 0.0, 2 * a, nan], dtype=torch.float64)
    torch.testing.assert_close(total, expected, equal_nan=True)
    nested = WeightedReward({"inner": reward}, {"inner": 1.0})
    with pytest.raises(ValueError, match="'inner' is itself a WeightedReward"):
        score_candidates(nested, [grays([0, 1])], Path())


def test_images_of_two_sizes_are_not_scored_together():
    entry = grays([0, 1])
    Image.new("RGB", (8, 4)).save(entry.items[1]["path"])
    with pytest.raises(ValueError, match=r"one size, got \[\(4, 4\), \(4, 8\)\]"):
        score_candidates(Brightness(), [entry], Path())


def test_the_command_writes_records_that_follow_the_gold_reward(capsys):
    words = ["--prompts", "shapes-heldout", "--limit", "6", "--pretrained", "shapes-sd",
             "--num_inference_steps", "2", "--guidance_scale", "1"]  # fmt: skip
    main(["label", "--reward", "ShapesVerifier", *words, "--output", "out"])
    told = capsys.readouterr().out
    records = [parse_record(line) for line in lines("out/preferences.jsonl")]
    decided = 0
    for record in records:
        first, second = (item["scores"]["ShapesVerifier"] for item in record["items"])
        expected = [1.0, 0.0] if first > second else [0.0, 1.0] if second > first else [0.5, 0.5]
        assert record["label"] == expected
        assert record["annotator"] == "ShapesVerifier"
        assert record["metadata"]["prompt"]["objects"]
        decided += first != second
    assert len(records) == 6
    assert f"6 pairs, of them {decided} decided, {6 - decided} tied, 0 invalid." in told
    with pytest.raises(ValueError, match="exists; give another `output`"):
        main(["label", "--reward", "ShapesVerifier", *words, "--output", "out"])
    label(ShapesVerifier(), "again", candidates="out/candidates.jsonl", unit="rankings")
    ranked = [parse_record(line) for line in lines("again/preferences.jsonl")]
    for pair, ranking in zip(records, ranked, strict=True):
        order = [a < b for a, b in pairwise(ranking["rank"])]
        assert order == [pair["label"][0] > pair["label"][1]]
        assert Path("again", ranking["items"][0]["path"]).is_file()

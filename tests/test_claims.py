"""The claims of the tables, run again: `pytest -m slow -n 0`, about two hours on two CPU cores."""

import statistics
from pathlib import Path

import pytest
import torch
import yaml

from lit_align.benchmarks import grid
from lit_align.benchmarks.base_quality import score
from lit_align.benchmarks.results import read_results
from lit_align.data.prompts import PromptFile, PromptLoader
from lit_align.functional.noise import sample_generators
from lit_align.metrics import FrechetDistance
from lit_align.policies import DiffusionPolicy
from lit_align.rewards import ShapesCLIP

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["shapes-sd", "shapes-sd3"])
def test_base_pipelines_leave_room_to_improve(name):
    rows = PromptFile("shapes-heldout")[:600]
    single = [metadata["kind"] == "single" for _, metadata in rows]
    policy = DiffusionPolicy.from_pretrained(name, train="none")

    def compositions(scores):
        return statistics.mean(s for s, alone in zip(scores, single, strict=True) if not alone)

    by_steps = {steps: score(policy, rows, steps, 3.0)[1] for steps in (3, 5, 10, 20)}
    assert 0.55 <= statistics.mean(by_steps[20]) <= 0.85
    alone = statistics.mean(s for s, own in zip(by_steps[20], single, strict=True) if own)
    assert alone - compositions(by_steps[20]) >= 0.10
    means = [compositions(by_steps[steps]) for steps in (3, 5, 10)]
    assert means == sorted(means)


def test_fid_of_the_base_model_against_itself_is_near_zero():
    """Two draws of 384 images: what a distance of 0 looks like with so many."""
    policy, clip = DiffusionPolicy.from_pretrained("shapes-sd", train="none"), ShapesCLIP()
    distance = FrechetDistance(num_features=64, embedder=clip.embed_images)
    for purpose, real in (("val", True), ("other", False)):
        for batch in PromptLoader(PromptFile("shapes-heldout")[:384], 64):
            generators = sample_generators(purpose, 0, 0, batch.positions.tolist())
            sampled = policy.sample(
                policy.encode_prompt(batch.prompts), num_inference_steps=8, guidance_scale=1.0,
                generator=generators, stochastic_steps=(),
            )  # fmt: skip
            with torch.no_grad():
                distance.update(policy.decode(sampled.latents[:, -1]), real=real)
    assert 0 < float(distance.compute()) < 0.02


def curves(name, method="ddpo"):
    """Run the three seeds of a run of configs/<method>; return the validation rows of each."""
    listed = yaml.safe_load((ROOT / "configs" / method / "runs.yaml").read_text())
    run = listed["runs"][name]
    run["config"] = str(ROOT / run["config"])
    Path("runs.yaml").write_text(yaml.safe_dump({"seeds": [0, 1, 2], "runs": {name: run}}))
    grid.grid("runs.yaml", workers=2)
    read = read_results(Path("results"), name, [0, 1, 2])
    assert len(read) == 3
    return read


def gains(seeds, reward, queries=5000):
    """Return each seed's gain at the last validation within so many reward queries."""
    name = f"val/reward/{reward}"
    return [[r for r in rows if r["reward_queries"] <= queries][-1][name] - rows[0][name]
            for rows in seeds]  # fmt: skip


@pytest.mark.parametrize("pipeline", ["shapes-sd", "shapes-sd3"])
def test_ddpo_learns_the_gold_reward_within_5000_queries(pipeline):
    seeds = curves(f"verifier_{pipeline}")
    assert min(gains(seeds, "ShapesVerifier")) > 0
    assert statistics.mean(gains(seeds, "ShapesVerifier")) >= 0.05


def test_colorfulness_is_over_optimised():
    seeds = curves("colorfulness_shapes-sd")
    unit = statistics.mean(rows[0]["val/reward_std/Colorfulness"] for rows in seeds)
    assert min(gains(seeds, "Colorfulness")) >= 0.6 * unit
    assert max(gains(seeds, "ShapesVerifier")) <= -0.05
    for rows in seeds:  # the distance from the base model grows along the run
        assert rows[1]["val/fid"] < 0.05 < 0.3 < rows[-1]["val/fid"]


def queries_to(seeds, reward, level):
    """Return the mean reward queries at which the gain first passes `level` base stds."""
    found = []
    for rows in seeds:
        base, unit = rows[0][f"val/reward/{reward}"], rows[0][f"val/reward_std/{reward}"]
        gain = [(row[f"val/reward/{reward}"] - base) / unit for row in rows]
        end = next(i for i, value in enumerate(gain) if value >= level)
        share = (level - gain[end - 1]) / (gain[end] - gain[end - 1])
        queries = [row["reward_queries"] for row in rows]
        found.append(queries[end - 1] + share * (queries[end] - queries[end - 1]))
    return statistics.mean(found)


def test_tdpo_needs_fewer_queries_than_ddpo():
    ddpo = curves("ddpo_colorfulness", "tdpo")
    tdpo = curves("tdpo_colorfulness", "tdpo")
    for level, most in ((0.5, 0.75), (1.0, 0.7)):
        ratio = queries_to(tdpo, "Colorfulness", level) / queries_to(ddpo, "Colorfulness", level)
        assert ratio <= most, level


@pytest.mark.parametrize("name", ["nft", "awm"])
def test_learning_on_the_forward_process_gains_more_than_flow_grpo(name):
    """Every seed gains more than any seed of Flow-GRPO, and ends nearer to the base model."""
    matching, flow_grpo = curves(name, "flow_grpo"), curves("flow_grpo", "flow_grpo")
    assert min(gains(matching, "ShapesVerifier")) > max(gains(flow_grpo, "ShapesVerifier"))
    assert min(gains(matching, "ShapesCLIP")) > 0
    ends = [[rows[-1]["val/kl"] for rows in seeds] for seeds in (matching, flow_grpo)]
    assert max(ends[0]) < 0.5 * min(ends[1])

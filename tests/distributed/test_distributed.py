"""Two processes take the updates of one with batches twice as large, by DDP and by FSDP2."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lit_align.algorithms.sharding import check_sharded
from lit_align.data.prompts import PromptDataModule, PromptLoader
from tests.distributed.scenarios import (
    JUDGING,
    RESET,
    ROUNDS,
    RUNS,
    STRATEGIES,
    checkpoint,
    launch_both,
    references,
    run,
)

SAME = 1e-6  # samples under equal weights
ATOL = 1e-5  # weights, and samples under weights that agree so far

PAIRS_OF_RUNS = pytest.mark.parametrize(
    "name", [f"{method}-{strategy}" for method, strategy in RUNS]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of all runs: those of one process, and those of one pair of processes."""
    folder = tmp_path_factory.mktemp("runs")
    references(folder)
    launch_both(folder)
    return folder


def left_by(folder, name, rank=0):
    return torch.load(folder / f"{name}-{rank}.pt", weights_only=True)


def one(name):
    return name.split("-")[0] + "-one"


def tasks(name):
    return 2 if name.startswith("LargeScaleRL") else 1


def assert_near(weights, expected, atol=ATOL):
    assert weights.keys() == expected.keys()
    for key, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[key], atol=atol, rtol=0, msg=key)


@PAIRS_OF_RUNS
def test_two_processes_sample_what_one_samples(folder, name):
    expected = left_by(folder, one(name))["rounds"]
    halves = [left_by(folder, name, rank)["rounds"] for rank in range(2)]
    assert len(expected) == len(halves[0]) == ROUNDS * tasks(name)
    for number, (whole, *parts) in enumerate(zip(expected, *halves, strict=True)):
        order = torch.cat([part["positions"] for part in parts]).argsort()
        for key in whole:
            together = torch.cat([part[key] for part in parts])[order]
            atol = SAME if number == 0 else ATOL
            torch.testing.assert_close(together, whole[key], atol=atol, rtol=0)


@PAIRS_OF_RUNS
def test_two_processes_take_the_updates_of_one(folder, name):
    before = torch.load(checkpoint(folder, one(name), 0), weights_only=True)["state_dict"]
    expected = left_by(folder, one(name))["weights"]
    assert max((expected[k] - before[k]).abs().max() for k in before) > 100 * ATOL
    for rank in range(2):
        assert_near(left_by(folder, name, rank)["weights"], expected)
    assert_near(left_by(folder, name, 0)["weights"], left_by(folder, name, 1)["weights"], atol=0.0)


@PAIRS_OF_RUNS
def test_two_processes_log_what_one_logs(folder, name):
    expected = left_by(folder, one(name))["logs"]
    for rank in range(2):
        logs = left_by(folder, name, rank)["logs"]
        assert len(logs) == len(expected)
        for row, wanted in zip(logs, expected, strict=True):
            assert row == pytest.approx(wanted, abs=10 * ATOL, rel=1e-3)


@pytest.mark.parametrize("method", JUDGING)
def test_two_processes_learn_from_judgements_as_one(folder, method):
    expected = left_by(folder, f"{method}-one")
    for rank in range(2):
        found = left_by(folder, f"{method}-both", rank)
        # AdamW's epsilon is no option of RewardModeling, and rounding is enlarged there.
        atol = 5e-4 if method == "RewardModeling" else ATOL
        assert_near(found["weights"], expected["weights"], atol)
        for row, wanted in zip(found["logs"], expected["logs"], strict=True):
            assert row == pytest.approx(wanted, abs=10 * ATOL, rel=1e-3)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_both_processes_reset_the_same_neurons_of_the_critic(folder, strategy):
    resets = [row.get("reset/count", 0) for row in left_by(folder, f"TDPO-{strategy}")["logs"]]
    assert not any(resets[: RESET - 1])
    assert 0 < resets[RESET - 1] < 16 + 8  # active ones, not all


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_accumulation_gives_the_gradient_of_the_larger_batch(folder, strategy):
    expected = torch.load(checkpoint(folder, "TDPO-one", 0), weights_only=True)["state_dict"]
    assert_near(left_by(folder, f"TDPO-{strategy}-accumulated")["weights"], expected)


@PAIRS_OF_RUNS
def test_checkpoint_of_two_processes_is_that_of_one(folder, name):
    stored, expected = (
        torch.load(checkpoint(folder, run, ROUNDS - 1), weights_only=True)
        for run in (name, one(name))
    )
    assert_near(stored["state_dict"], expected["state_dict"])
    assert {type(tensor) for tensor in stored["state_dict"].values()} == {torch.Tensor}
    (state,), (expected_state,) = stored["optimizer_states"], expected["optimizer_states"]
    for key in ("exp_avg", "exp_avg_sq"):
        moments = {name: s[key] for name, s in state["state"].items()}
        assert {type(tensor) for tensor in moments.values()} == {torch.Tensor}
        assert_near(moments, {name: s[key] for name, s in expected_state["state"].items()})
    for group, expected_group in zip(
        state["param_groups"], expected_state["param_groups"], strict=True
    ):
        assert (group["params"], group["lr"]) == (expected_group["params"], expected_group["lr"])


@PAIRS_OF_RUNS
def test_two_processes_continue_the_run_of_one(folder, name):
    """From the middle of a round, and in it of the last task."""
    continued = left_by(folder, f"{name}-resumed")
    assert len(continued["rounds"]) == tasks(name)
    assert_near(continued["weights"], left_by(folder, one(name))["weights"])


@PAIRS_OF_RUNS
def test_one_process_continues_the_run_of_two(folder, name):
    method, resumed = name.split("-")[0], f"{name}-resumed-by-one"
    run(folder, resumed, method, resume=checkpoint(folder, name, ROUNDS - 2))
    continued = left_by(folder, resumed)
    assert len(continued["rounds"]) == tasks(name)
    assert_near(continued["weights"], left_by(folder, one(name))["weights"])


def test_processes_whose_images_take_different_steps_call_a_sharded_network_together(folder):
    """Else they would wait for each other for ever."""
    expected = left_by(folder, "uneven-one")
    (whole,) = expected["rounds"]
    halves = [left_by(folder, "uneven", rank) for rank in range(2)]
    order = torch.cat([half["rounds"][0]["positions"] for half in halves]).argsort()
    latents = torch.cat([half["rounds"][0]["latents"] for half in halves])[order]
    torch.testing.assert_close(latents, whole["latents"], atol=ATOL, rtol=0)
    counted = [half["logs"][-1]["denoiser_calls"] for half in (expected, *halves)]
    assert len(set(counted)) == 1  # those of the other's sake do not count
    assert counted[0] < 8 * 12
    for half in halves:
        assert_near(half["weights"], expected["weights"])


def test_fsdp2_trains_float32_adapters_on_a_bfloat16_base(folder):
    weights = left_by(folder, "frozen-bf16")["weights"]
    moved = [w.abs().max() for name, w in weights.items() if "lora_B" in name]
    assert moved
    assert max(moved) > 0  # they start at 0
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_fsdp2_casts_the_denoiser_but_no_critic_to_bfloat16(folder):
    weights = left_by(folder, "all-bf16")["weights"]
    for name, weight in weights.items():
        expected = torch.float32 if name.startswith("critic") else torch.bfloat16
        assert weight.dtype == expected, name


def test_validation_and_callbacks_agree_with_one_process(folder):
    expected = json.loads((folder / "watched-one-0.json").read_text())
    compared = [name for name in expected if name.startswith(("val/reward", "rollout/", "train/"))]
    assert {"val/reward/gold", "train/grad_norm", "rollout/reward/Colorfulness"} <= set(compared)
    for rank in range(2):
        measured = json.loads((folder / f"watched-fsdp2-{rank}.json").read_text())
        for name in compared:
            assert measured[name] == pytest.approx(expected[name], abs=ATOL), name
    for name in ("watched-one", "watched-fsdp2"):
        written = {path.name for path in (folder / name / "version_0").rglob("*")}
        assert {"metrics.csv", "summary.md", "round_0001.png"} <= written


def test_prompts_that_cannot_be_dealt_out_evenly_are_refused():
    prompts = [("a red circle", None)] * 9
    assert len(PromptLoader(prompts, 2, world_size=3)) == 2
    assert len(PromptLoader(prompts, 2, shuffle=True, world_size=2)) == 2
    with pytest.raises(ValueError, match=r"9 prompts .* to 2 processes; set `val_size: 8`"):
        PromptLoader(prompts, 2, world_size=2)
    with pytest.raises(ValueError, match="16 processes; give a file with a multiple of 16"):
        PromptLoader(prompts, 2, world_size=16)


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_uneven_prompts_are_refused_before_any_work(stage):
    trainer = SimpleNamespace(global_rank=0, world_size=2)
    Path("prompts.txt").write_text("a red circle\na square\na triangle\n")
    data = PromptDataModule("shapes-train", "prompts.txt")
    data.setup(stage)
    data.trainer = trainer
    with pytest.raises(ValueError, match="3 prompts cannot be dealt out evenly to 2 processes"):
        data.setup(stage)


def test_a_trainable_tensor_left_whole_is_named():
    module = nn.Module()
    module.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    check_sharded(module)
    module.temperature = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"whole, first 'temperature'"):
        check_sharded(module)


def test_tensor_parallelism_is_refused(folder):
    message = (folder / "refused.txt").read_text()
    assert "`data_parallel_size: 2` and `tensor_parallel_size: 1`" in message

"""Every YAML in configs/ is a complete run that the command line accepts."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from diffusers import DDIMScheduler
from PIL import Image

from lit_align.algorithms.tasks import Task
from lit_align.cli import main
from lit_align.data.planner import RoundPlan, strata
from lit_align.data.preference_records import append_record, pair_record
from lit_align.data.prompts import PromptFile
from lit_align.schedulers import StochasticDDIM
from lit_align.shapes import ASSETS

ROOT = Path(__file__).parent.parent
OVERLAYS = sorted((ROOT / "configs" / "scale").glob("*.yaml"))
CONFIGS = sorted(
    path
    for path in set((ROOT / "configs").rglob("*.yaml")) - set(OVERLAYS)
    if path.name != "runs.yaml"
)


def ids(path):
    return path.relative_to(ROOT / "configs").as_posix()


@pytest.mark.parametrize("path", CONFIGS, ids=ids)
def test_configuration_parses_and_is_complete(path, capsys):
    printed = parsed(path, capsys)
    assert printed["model"]["class_path"]
    assert printed["data"]["class_path"]
    assert printed["name"] != "run", "give the run a name"


@pytest.mark.parametrize("path", CONFIGS, ids=ids)
def test_header_says_what_it_is_and_how_to_launch_it(path):
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    text = "\n".join(header)
    assert "Hardware:" in text
    assert f"fit --config configs/{ids(path)}" in text


SHAPES = [
    path for path in CONFIGS if path.parent.name != "pretraining" and "shapes" in path.read_text()
]


@pytest.mark.parametrize("path", SHAPES, ids=ids)
def test_configuration_for_the_shapes_world_trains_on_one_batch(path):
    small = {
        "trainer.fast_dev_run": "true",
        "trainer.accumulate_grad_batches": "1",
        "trainer.enable_progress_bar": "false",
        "trainer.callbacks": "null",
    }
    run = yaml.safe_load(path.read_text())
    if run["data"]["class_path"] == "PreferenceDataModule":
        small |= few_judgements(run["data"]["init_args"])
    else:
        small |= few_prompts(path)
    small |= left_by_other_runs(path.read_text())
    main(
        ["fit", "--config", str(path), *(word for k, v in small.items() for word in (f"--{k}", v))]
    )


def few_judgements(options):
    """Return options that read six judgements of noise, half of them to evaluate on."""
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"{number}.png")
    for number in range(6):
        items = [{"uid": f"{k}", "path": f"{k}.png"} for k in (2 * number, 2 * number + 1)]
        record = pair_record(
            id=f"pair{number}", prompt=f"a red circle {number}", items=items, label=[1.0, 0.0]
        )
        append_record("few.jsonl", record)
    small = {"train": "few.jsonl", "batch_size": "2", "num_workers": "0"}
    small |= {"val": "few.jsonl"} if options.get("val") else {"val_fraction": "0.5"}
    if options.get("cache_latents"):
        small["cache_latents"] = "latents"
    if options.get("prompts"):
        small["prompts.init_args.val_size"] = "4"
    return {f"data.init_args.{name}": value for name, value in small.items()}


def few_prompts(path):
    small = {
        "data.init_args.val_size": "4",
        "model.init_args.eval_num_inference_steps": "2",
        "model.init_args.prompts_per_round": "2",
        "model.init_args.samples_per_prompt": "2",
        "model.init_args.minibatch_size": "4",
    }
    if "rollout_batch_size" in path.read_text():
        small["model.init_args.rollout_batch_size"] = "4"
    return small


def left_by_other_runs(text):
    """Return what stands in for the models that other runs leave behind."""
    found = {}
    if "pretrained: runs/offline/exported" in text:
        found["model.init_args.policy.init_args.pretrained"] = "shapes-sd3"
    if "pretrained: runs/rlhf_reward_model/exported" in text:
        found["model.init_args.reward.init_args.pretrained"] = str(ASSETS / "shapes-preference")
    return found


def parsed(path, capsys, known={}):  # noqa: B006 - parsing takes seconds: once per file
    if path not in known:
        with pytest.raises(SystemExit) as stop:
            main(["fit", "--config", str(path), "--print_config"])
        assert stop.value.code == 0
        known[path] = capsys.readouterr().out
    return yaml.safe_load(known[path])


def plans_of(options):
    """Return the plans of a round of Stable Diffusion, by task, from a parsed configuration."""
    scheduler = StochasticDDIM(DDIMScheduler(steps_offset=1, clip_sample=False))
    scheduler.set_timesteps(options["num_inference_steps"])
    steps = tuple(scheduler.density_steps)
    steps = steps[:-1] if options["drop_last_step"] else steps
    own = {field.name for field in dataclasses.fields(RoundPlan)} & set(options)
    plan = RoundPlan(
        steps=steps,
        trained_steps=int(len(steps) * options["timestep_fraction"]),
        **{name: options[name] for name in own},
    )
    sizes = ("prompts_per_round", "samples_per_prompt")
    return {
        name: Task(None, *(task[size] for size in sizes)).resize(plan)
        for name, task in (options.get("tasks") or {"": dict.fromkeys(sizes)}).items()
    }


# Of a round: images, updates, and on how many GPUs it also runs.
ROUNDS = {
    "ddpo/sd15_jpeg.yaml": (256, 4, (1, 8)),
    "ddpo/sd14_aesthetic.yaml": (256, 2, (1, 8)),
    "ddpo/sd14_alignment.yaml": (288, 2, (1, 6)),
    "ddpo/sd14_grpo.yaml": (512, 2, (1, 8)),
    "ddpo/sdxl_aesthetic.yaml": (256, 2, (1, 8)),
    "ddpo/sdxl_pickscore.yaml": (256, 2, (1, 8)),
    **{
        f"tdpo/sd14_{reward}{reset}.yaml": (256, 100, (1, 8))
        for reward in ("aesthetic", "hpsv2", "pickscore")
        for reset in ("", "_reset")
    },
    **{
        f"large_scale_rl/sd2_{task}.yaml": (2048, 5, (1, 8, 64))
        for task in ("imagereward", "composition", "fairness", "multi")
    },
}


@pytest.mark.parametrize("name", ROUNDS)
def test_headers_tell_the_arithmetic_of_a_round(name, capsys):
    images, updates, worlds = ROUNDS[name]
    path = ROOT / "configs" / name
    printed = parsed(path, capsys)
    accumulate = printed["trainer"]["accumulate_grad_batches"]
    header = " ".join(
        line[1:].strip() for line in path.read_text().partition("\nname:")[0].split("\n")
    )
    for plan in plans_of(printed["model"]["init_args"]).values():
        pairs = images * plan.trained_steps
        assert f"{images:,} samples x {plan.trained_steps} " in header
        assert f"= {pairs:,} pairs" in header
        assert f"{pairs // plan.minibatch_size:,} minibatches of {plan.minibatch_size}" in header
        assert f"{updates} updates" in header
        assert f"(accumulate_grad_batches {accumulate})" in header
        for world_size in worlds:
            share = dataclasses.replace(plan, world_size=world_size)
            assert accumulate % world_size == 0
            share.check(accumulate // world_size)
            assert share.minibatches // (accumulate // world_size) == updates
            if 1 < world_size == worlds[-1]:
                assert f"accumulate_grad_batches {accumulate // world_size}" in header


FOLLOWS = [
    path
    for path in CONFIGS
    if path.parent.name in ("refl", "draft", "alignprop", "drtune", "nabla_gflownet",
                            "adjoint_matching")
]  # fmt: skip


@pytest.mark.parametrize("path", FOLLOWS, ids=ids)
def test_headers_of_reward_gradients_tell_the_arithmetic_of_a_round(path, capsys):
    printed = parsed(path, capsys)
    options, accumulate = (
        printed["model"]["init_args"],
        printed["trainer"]["accumulate_grad_batches"],
    )
    header = " ".join(
        line[1:].strip() for line in path.read_text().partition("\nname:")[0].split("\n")
    )
    images, size, what = options["prompts_per_round"], options["minibatch_size"], "images"
    items = images
    if "rollout_batch_size" in options:  # they learn from single steps
        steps = options.get("early_steps", 0) + options.get("late_steps", 0)
        steps = steps or len(strata(tuple(range(options["num_inference_steps"])),
                                    options["timestep_fraction"]))  # fmt: skip
        items = images * steps
        what = f"samples x {steps} steps = {items:,} pairs"
        assert images % options["rollout_batch_size"] == 0
    minibatches = items // size
    assert (
        f"A round is {images} {what} in {minibatches:,} minibatches of {size}: "
        in header.replace(f"{images} images x", f"{images} samples x")
    )
    updates = minibatches // accumulate
    assert f": {updates} update{'s' * (updates > 1)}" in header
    assert items % size == minibatches % accumulate == 0
    if accumulate > 1:
        assert f"(accumulate_grad_batches {accumulate})" in header


FLOW = [
    path
    for path in CONFIGS
    if path.parent.name in ("flow_grpo", "diffusion_nft", "awm", "tpdm")
    and "shapes" not in path.name
]


def trained_steps(options):
    """Return how many of its steps a sample is trained on, by flow matching."""
    steps = options["num_inference_steps"]
    if "gamma" in options:  # the schedule, as a whole
        return 1
    if "window" in options:  # the last step is without noise
        window = options["window"]
        return window["size"] if window else int((steps - 1) * options["timestep_fraction"])
    return options.get("trained_times") or int(steps * options["timestep_fraction"])


@pytest.mark.parametrize("path", FLOW, ids=ids)
def test_headers_for_flow_matching_tell_the_arithmetic_of_a_round(path, capsys):
    """On one GPU and on as many as the header names."""
    printed = parsed(path, capsys)
    options, trainer = printed["model"]["init_args"], printed["trainer"]
    header = " ".join(
        line[1:].strip() for line in path.read_text().partition("\nname:")[0].split("\n")
    )
    own = {field.name for field in dataclasses.fields(RoundPlan)} & set(options) - {"window"}
    count = trained_steps(options)
    given = {"minibatch_order": "sample_major", **{name: options[name] for name in own}}
    plan = RoundPlan(steps=tuple(range(count)), trained_steps=count, **given)
    plan.check(trainer["accumulate_grad_batches"])
    updates = plan.minibatches // trainer["accumulate_grad_batches"]
    samples, passes = f"{plan.samples:,}", plan.num_inner_epochs
    what = f"{samples} images"
    if count > 1:
        what = f"{samples} samples x {count} (steps|times) = {plan.samples * count:,} pairs"
    again = f", {passes} times" if passes > 1 else ""
    minibatches = f"{plan.minibatches // passes:,} minibatches of {plan.minibatch_size}"
    assert re.search(rf"A round is {what} in {minibatches}{again}: {updates} update", header)
    assert f"(accumulate_grad_batches {trainer['accumulate_grad_batches']})" in header
    worlds = re.findall(
        r"[Oo]n (\d+)(?: GPUs)?[:,].*?accumulate_grad_batches (\d+).*?val_size (\d+)", header
    )
    assert worlds
    for world_size, accumulate, val_size in (map(int, numbers) for numbers in worlds):
        share = dataclasses.replace(plan, world_size=world_size)
        share.check(accumulate)
        assert share.minibatches // accumulate == updates
        # In sample-major order an update must hold whole samples to be that of one process.
        assert accumulate * plan.minibatch_size % count == 0
        assert val_size % world_size == 0
        assert val_size <= len(PromptFile(printed["data"]["init_args"]["val"]))


@pytest.mark.parametrize("name", ["d3po/sd15_jpeg.yaml", "d3po/sd15_pickscore.yaml"])
def test_headers_of_d3po_tell_the_arithmetic_of_a_round(name, capsys):
    path = ROOT / "configs" / name
    printed = parsed(path, capsys)
    accumulate = printed["trainer"]["accumulate_grad_batches"]
    (plan,) = plans_of(printed["model"]["init_args"] | {"drop_last_step": False}).values()
    plan.check(accumulate)
    assert plan.minibatches == accumulate  # as its code, which accumulates over a whole round
    pairs = plan.samples * plan.trained_steps
    assert (
        f"A round is {plan.prompts_per_round} prompts x {plan.samples_per_prompt} images x "
        f"{plan.trained_steps} steps = {pairs} pairs in {plan.minibatches} minibatches of "
        f"{plan.minibatch_size}: 1 update"
    ) in path.read_text()


FLOW_GRPO = sorted((ROOT / "configs" / "flow_grpo").glob("shapes-*.yaml"))


@pytest.mark.parametrize("path", FLOW_GRPO, ids=ids)
def test_headers_of_flow_grpo_tell_the_arithmetic_of_a_round(path, capsys):
    options = parsed(path, capsys)["model"]["init_args"]
    header = " ".join(
        line[1:].strip() for line in path.read_text().partition("\nname:")[0].split("\n")
    )
    trained = trained_steps(options)
    prompts, repeats = options["prompts_per_round"], options["samples_per_prompt"]
    pairs, size = prompts * repeats * trained, options["minibatch_size"]
    assert f"A round is {prompts} prompts x {repeats} images x {trained} " in header
    assert f" steps = {pairs} pairs in {pairs // size} minibatches of {size}: " in header
    assert f": {pairs // size} updates" in header
    assert pairs % size == 0


RESETS = sorted((ROOT / "configs" / "tdpo").glob("sd14_*_reset.yaml"))


@pytest.mark.parametrize("path", RESETS, ids=ids)
def test_neurons_are_reset_every_ten_rounds_as_in_the_paper(path, capsys):
    callbacks = parsed(path, capsys)["trainer"]["callbacks"]
    (reset,) = (
        c["init_args"] for c in callbacks if c["class_path"].endswith("NeuronResetCallback")
    )
    _, updates, worlds = ROUNDS[ids(path)]
    assert reset["every_n_steps"] == 10 * updates
    assert reset["probe_size"] * worlds[-1] == 64


@pytest.mark.parametrize("path", RESETS, ids=ids)
def test_tdpo_without_resets_differs_by_nothing_else(path, capsys):
    printed = [parsed(p, capsys) for p in (path, path.with_name(path.name.replace("_reset", "")))]
    callbacks = [p["trainer"].pop("callbacks") for p in printed]
    names = [p.pop("name") for p in printed]
    assert printed[0] == printed[1]
    kept = [c for c in callbacks[0] if not c["class_path"].endswith("NeuronResetCallback")]
    assert kept == callbacks[1]
    assert names[0] == names[1].replace("tdpo_", "tdpo-r_")


def test_tasks_of_large_scale_rl_are_those_of_the_paper(capsys):
    printed = parsed(ROOT / "configs/large_scale_rl/sd2_multi.yaml", capsys)
    plans = plans_of(printed["model"]["init_args"])
    assert list(plans) == list(printed["data"]["init_args"]["train"])
    assert list(plans) == ["preference", "composition", "fairness"]
    assert {plan.samples for plan in plans.values()} == {2048}
    assert (plans["fairness"].prompts_per_round, plans["fairness"].samples_per_prompt) == (128, 16)
    accumulate = printed["trainer"]["accumulate_grad_batches"]
    options = printed["model"]["init_args"]
    assert (options["pretraining"], options["pretraining_steps"]) == ("separate", 1)
    assert options["pretraining_batch_size"] * accumulate == 2048


# Runs of models from the hub.
REAL = [
    path for path in CONFIGS if re.search(r"pretrained: [\w-]+/[\w.-]+[\n,}]", path.read_text())
]


@pytest.mark.parametrize("path", REAL, ids=ids)
def test_rewards_that_watch_are_not_the_trained_one(path, capsys):
    printed = parsed(path, capsys)
    options = printed["model"]["init_args"]
    trained = {task["reward"]["class_path"] for task in (options.get("tasks") or {}).values()}
    if options.get("reward"):
        trained.add(options["reward"]["class_path"])
        terms = options["reward"].get("init_args", {}).get("rewards") or {}
        trained |= {term["class_path"] for term in terms.values()}
    watching = {reward["class_path"] for reward in (options.get("eval_rewards") or {}).values()}
    assert not trained & watching
    assert watching or "RewardModeling" in printed["model"]["class_path"]
    assert printed["name"].endswith(path.stem.removesuffix("_reset")) or "grpo" in printed["name"]


@pytest.mark.parametrize("path", REAL, ids=ids)
def test_prompts_are_shipped_and_held_out(path, capsys):
    """So that a run starts; which prompts the paper has is told by the header."""
    options = parsed(path, capsys)["data"]["init_args"]
    prompts = options if "format" not in options else (options["prompts"] or {}).get("init_args")
    if prompts is None:
        return
    train = prompts["train"]
    train = list(train.values()) if isinstance(train, dict) else [train]
    held_out = {text for text, _ in PromptFile(prompts["val"])}
    # DDPO and those after it evaluate on the animals that they train on.
    if prompts["val"] != "simple-animals":
        assert not any(text in held_out for source in train for text, _ in PromptFile(source))


# One for each family of models, kind of method and reward; what a dry run costs takes a minute for
# some, so that those of all configurations are slow tests.
BUILT = {
    "ddpo/sdxl_aesthetic.yaml",
    "flow_dpo/wan21_videoreward.yaml",
    "flow_grpo/flux_mix_multi.yaml",
    "tdpo/sd14_pickscore_reset.yaml",
    "tpdm/sd3_imagereward.yaml",
}


@pytest.mark.parametrize("path", [path for path in REAL if ids(path) in BUILT], ids=ids)
def test_modules_of_real_models_can_be_built(path, monkeypatch, capsys):
    """Without weights, as for a dry run; the fields that parsing leaves unread are read here."""
    built = []
    monkeypatch.setattr("lit_align.dry_run.dry_run", lambda module, *_: built.append(module) or "")
    main(["fit", "--config", str(path), "--dry_run"])
    (module,) = built
    expected = parsed(path, capsys)["model"]
    assert type(module).__name__ == expected["class_path"].rpartition(".")[2]
    assert list(module.rewards)[len(module.trained_rewards) :] == list(
        expected["init_args"]["eval_rewards"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("path", REAL, ids=ids)
def test_dry_runs_accept_all_configurations(path, capsys):
    if "RewardModeling" in path.read_text():
        pytest.skip("a dry run is for methods that align a policy")
    main(["fit", "--config", str(path), "--dry_run"])
    assert "estimated peak" in capsys.readouterr().out


@pytest.mark.parametrize("overlay", OVERLAYS, ids=ids)
@pytest.mark.parametrize("run", ["configs/quickstart.yaml", "configs/ddpo/sd15_jpeg.yaml"])
def test_overlay_scales_any_run(overlay, run, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(ROOT / run), "--config", str(overlay), "--print_config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    alone = yaml.safe_load((ROOT / run).read_text())
    assert printed["name"] == alone["name"]
    assert printed["trainer"]["max_epochs"] == alone["trainer"]["max_epochs"]
    assert printed["trainer"]["devices"] == 8
    nodes = printed["trainer"]["num_nodes"]
    assert nodes == (2 if "nodes" in overlay.name else 1)
    strategy = printed["trainer"]["strategy"]
    if "fsdp2" in overlay.name:
        assert strategy["class_path"].endswith(".ModelParallelStrategy")
        assert strategy["init_args"]["data_parallel_size"] == 8 * nodes
        assert strategy["init_args"]["tensor_parallel_size"] == 1
        assert strategy["init_args"]["save_distributed_checkpoint"] is False
    else:
        assert strategy == "ddp"


@pytest.mark.parametrize("overlay", OVERLAYS, ids=ids)
def test_overlay_says_how_to_launch_it_and_what_to_divide(overlay):
    text = "\n".join(line for line in overlay.read_text().splitlines() if line.startswith("#"))
    assert "Hardware:" in text
    assert f"--config configs/ddpo/sd15_jpeg.yaml --config configs/{ids(overlay)}" in text
    assert "What to divide" in text
    assert ("torchrun --nnodes 2 --nproc-per-node 8" in text) == ("nodes" in overlay.name)


def test_fsdp1_is_refused_by_naming_the_overlay_for_fsdp2():
    run = str(ROOT / "configs/quickstart.yaml")
    with pytest.raises(ValueError, match="configs/scale/fsdp2.yaml"):
        main(["fit", "--config", run, "--trainer.strategy", "fsdp"])


def test_lists_of_runs_name_configurations_that_exist():
    lists = sorted((ROOT / "configs").rglob("runs.yaml"))
    assert lists
    for path in lists:
        listed = yaml.safe_load(path.read_text())
        assert len(listed["seeds"]) >= 3
        for run in listed["runs"].values():
            assert (ROOT / run["config"]).is_file()

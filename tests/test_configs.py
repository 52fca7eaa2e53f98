"""Every YAML in configs/ is a complete run that the command line accepts."""

from pathlib import Path

import pytest
import yaml

from lit_align.cli import main

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
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(path), "--print_config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
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
        "data.init_args.val_size": "4",
        "model.init_args.prompts_per_round": "4",
        "model.init_args.samples_per_prompt": "2",
        "model.init_args.rollout_batch_size": "8",
        "model.init_args.minibatch_size": "8",
    }
    main(
        ["fit", "--config", str(path), *(word for k, v in small.items() for word in (f"--{k}", v))]
    )


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

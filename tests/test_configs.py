"""Every YAML in configs/ is a complete run that the command line accepts."""

from pathlib import Path

import pytest
import yaml

from lit_align.cli import main

ROOT = Path(__file__).parent.parent
CONFIGS = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if path.name != "runs.yaml"]


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


def test_lists_of_runs_name_configurations_that_exist():
    lists = sorted((ROOT / "configs").rglob("runs.yaml"))
    assert lists
    for path in lists:
        listed = yaml.safe_load(path.read_text())
        assert len(listed["seeds"]) >= 3
        for run in listed["runs"].values():
            assert (ROOT / run["config"]).is_file()

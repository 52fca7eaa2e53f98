import csv
from pathlib import Path

import yaml

from lit_align.benchmarks import checkpoints as benchmark
from lit_align.benchmarks.checkpoints import Listed, checkpoints
from lit_align.benchmarks.outcomes import outcomes
from lit_align.cli import main

CONFIG = Path(__file__).parent.parent.parent / "configs" / "quickstart.yaml"
SAVER = {
    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
    "init_args": {"save_top_k": -1, "save_on_train_epoch_end": True},
}
MEASURED = {
    "class_path": "CrossRewardCallback",
    "init_args": {"diversity_prompts": 0, "kl_prompts": 0},
}


def test_checkpoints_are_scored_on_other_prompts(monkeypatch):
    config = yaml.safe_load(CONFIG.read_text())
    config["trainer"] |= {"max_epochs": 2, "check_val_every_n_epoch": 1,
                          "callbacks": [MEASURED, SAVER]}  # fmt: skip
    config["model"]["init_args"] |= {
        "prompts_per_round": 4, "rollout_batch_size": 4, "minibatch_size": 32, "lr": 0.1,
        "num_inference_steps": 8,
    }  # fmt: skip
    config["data"]["init_args"] |= {"val_size": 4}
    Path("run.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", "run.yaml", "--name", "own", "--trainer.enable_progress_bar=false"])
    lists = {
        "unseen": Listed("shapes-unseen", 3, 1, ("Colorfulness",)),
        "uncolored": Listed("shapes-uncolored-test", 2, 3, ("Parity",)),
    }
    monkeypatch.setattr(benchmark, "LISTS", lists)
    checkpoints(["runs/own"], "table.csv", level=1.0)
    with Path("table.csv").open(newline="") as file:
        base, first, second = csv.DictReader(file)
    assert [base["run"], first["run"], second["run"]] == ["base", "own", "own"]
    assert [row["reward_queries"] for row in (base, first, second)] == ["0", "4", "8"]
    values = [float(row["unseen/Colorfulness"]) for row in (base, first, second)]
    assert len(set(values)) == 3
    assert all(-0.92 < float(row["uncolored/Parity"]) <= 0 for row in (base, first, second))
    assert Path("table.png").stat().st_size > 10_000
    checkpoints(["runs/own"], "last.csv", ["unseen"], last_only=True)
    with Path("last.csv").open(newline="") as file:
        rows = [float(row["unseen/Colorfulness"]) for row in csv.DictReader(file)]
    assert rows == [values[0], values[2]]


def test_outcomes_are_those_of_the_last_checkpoints(tmp_path, capsys):
    path = tmp_path / "table.csv"
    path.write_text(
        "run,reward_queries,a/Parity\nbase,0,-0.5\nx_seed0,8,-0.4\nx_seed0,16,-0.1\n"
        "x_seed1,16,-0.2\ny_seed0,16,-0.25\n"
    )
    outcomes(str(path))
    assert capsys.readouterr().out.splitlines() == [
        "| run | reward queries | a/Parity |",
        "|---|---|---|",
        "| base | 0 | -0.500 |",
        "| x | 16 | -0.150 ± 0.071 |",
        "| y | 16 | -0.250 |",
    ]

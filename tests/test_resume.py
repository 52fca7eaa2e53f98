"""A run that broke off, resumed from what Lightning wrote, equals the run without a break."""

import csv
import json
import multiprocessing
import random
import signal
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback

from lit_align.cli import main
from tests import victim
from tests.algorithms.harness import fit as fit_module
from tests.algorithms.harness import make_ddpo, make_trainer, prompt_loader
from tests.conftest import PRELOADED
from tests.test_cli import CONFIG

SAVER = "lightning.pytorch.callbacks.ModelCheckpoint"
OVERWRITE = {"enable_version_counter": False}  # else a resumed run writes last-v1.ckpt
CALLBACKS = [
    {"class_path": "AdapterEMA", "init_args": {"decay": 0.9}},
    {"class_path": "InvariantsCallback"},
    {"class_path": "CrossRewardCallback",
     "init_args": {"diversity_prompts": 2, "samples_per_prompt": 2, "kl_prompts": 2}},
    {"class_path": "OveroptimizationStopping"},
    {"class_path": "SampleGallery", "init_args": {"num_prompts": 2, "every_n_rounds": 1}},
]  # fmt: skip
DROPOUT = '''
import random
import torch
from lit_align.rewards import RewardModule


class Noisy(RewardModule):
    """Draws from the global generators, which a resumed run must find as they were."""

    def forward(self, images, prompts, metadata=None, group_ids=None):
        draws = torch.rand(len(images)) + random.random()
        return images.mean(dim=(1, 2, 3)) + (0.1 * draws if self.training else 0.0)
'''


# What another method needs beside the configuration of DDPO, and the places in a run of two rounds
# whose checkpoints are resumed from.
RESET = {"every_n_steps": 4, "probe_every_n_steps": 2}  # in the middle of the second round
CRITIC = {"tower": {"class_path": "ShapesCLIP"}, "hidden": [16, 8], "dropout": [0.2]}
OTHERS = {
    "TDPO": {
        "callbacks": [{"class_path": "NeuronResetCallback", "init_args": RESET}],
        "model": {"critic": {"class_path": "TemporalCritic", "init_args": CRITIC}},
        "data": {},
        "minibatches": 3,
        "resumed": (0, 2, 4),  # before and after the reset
    },
    "LargeScaleRL": {
        "callbacks": [],
        "model": {
            "tasks": {
                "brightness": {"reward": {"class_path": "my_rewards.Noisy"}},
                "color": {
                    "reward": {"class_path": "Colorfulness"},
                    "prompts_per_round": 4,
                    "samples_per_prompt": 2,
                },
            },
            "timestep_fraction": 0.7,
            "std_unbiased": False,
            "pretraining_batch_size": 4,
        },
        "data": {
            "train": {"brightness": "shapes-train", "color": "shapes-mixture"},
            "pairs": {
                "class_path": "ShapesPairsDataModule",
                "init_args": {"size": 16, "val_size": 1},
            },
        },
        "minibatches": 2 + 2 + 1,
        "resumed": (1, 3, 4),  # after the first task, after the second, after the pairs
    },
}


def configuration(saver, pipeline="shapes-sd", rounds=4, method="DDPO"):
    config = yaml.safe_load(CONFIG.replace("shapes-sd\n", f"{pipeline}\n").replace(
        "pretrained: shapes-sd}", f"pretrained: {pipeline}}}"))  # fmt: skip
    config["trainer"] |= {
        "max_epochs": rounds,
        "callbacks": [*CALLBACKS, {"class_path": SAVER, "init_args": saver | OVERWRITE}],
    }
    config["model"]["init_args"] |= {
        "reward": {"class_path": "my_rewards.Noisy"},
        "prompts_per_round": 2,
        "samples_per_prompt": 4,
        "minibatch_size": 8,
        "lr": 1e-2,
        "advantage_norm": "per_prompt",
        "buffer_size": 6,
        "min_count": 1,
    }
    config["model"]["init_args"]["eval_rewards"]["ShapesCLIP"] = {"class_path": "ShapesCLIP"}
    if method in OTHERS:
        other = OTHERS[method]
        config["model"]["class_path"] = method
        config["model"]["init_args"] |= other["model"]
        config["data"]["init_args"] |= other["data"]
        config["trainer"]["callbacks"][: len(CALLBACKS)] = other["callbacks"]
        if "tasks" in other["model"]:
            del config["model"]["init_args"]["reward"]
    return config


def metrics(run):
    with (run / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if "time/" not in k} for row in csv.DictReader(file)]


def with_repeats(resumed, whole):
    """Return the rows of a resumed run, filled with what Lightning repeats from row to row.

    What not every step logs stands also in the round's later rows, but for those of a run that was
    resumed in between.
    """
    rows, expected = metrics(resumed), metrics(whole)
    for row, then, before in zip(rows[1:], expected[1:], expected, strict=False):
        row |= {k: v for k, v in then.items() if not row[k] and v == before[k]}
    return rows


def contents(path):
    """Return a checkpoint without times and the paths in ModelCheckpoint's own state."""
    stored = torch.load(path, weights_only=True)
    stored["callbacks"] = {
        k: v for k, v in stored["callbacks"].items() if "ModelCheckpoint" not in k
    }
    del stored["metrics"]
    logs = stored["lit_align"]["round_logs"]
    stored["lit_align"]["round_logs"] = {k: v for k, v in logs.items() if "time/" not in k}
    return stored


def leaves(value, where=""):
    """Yield (path, something to compare by) of a nested structure; tensors by their bits."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{where}/{key}")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from leaves(item, f"{where}/{number}")
    elif isinstance(value, torch.Tensor):
        yield where, (value.dtype, value.shape, value.numpy().tobytes())
    else:
        yield where, repr(value)


def differences(left, right):
    """Return the paths at which two checkpoints differ."""
    left, right = dict(leaves(left)), dict(leaves(right))
    return sorted(path for path in left.keys() | right.keys() if left.get(path) != right.get(path))


def assert_equal_runs(whole, resumed):
    assert metrics(resumed) == metrics(whole)
    for name in ("samples", "generalization.csv", "summary.md"):
        files = sorted((whole / name).iterdir()) if name == "samples" else [whole / name]
        assert files
        for file in files:
            other = resumed / file.relative_to(whole)
            assert other.read_bytes() == file.read_bytes(), file
    last = Path("checkpoints", "last.ckpt")
    assert differences(contents(whole / last), contents(resumed / last)) == []


@pytest.fixture(autouse=True)
def _reward(_own_folder, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    Path("my_rewards.py").write_text(DROPOUT)


def fit(name, *words):
    main(["fit", "--config", "config.yaml", "--name", name, *words])
    return Path("runs", name, "version_0")


@pytest.mark.parametrize(
    ("method", "when"),
    [
        ("DDPO", "after each step"),
        ("DDPO", "after each validation"),
        *((method, "after each step") for method in OTHERS),
    ],
)
def test_every_checkpoint_of_a_run_continues_it_exactly(method, when):
    """Saved in the middle of rounds and at what would be their last update."""
    saver = {"save_last": True, "save_top_k": -1}
    steps = when == "after each step"
    saver |= {"every_n_train_steps": 1} if steps else {"save_on_train_epoch_end": False}
    config = configuration(saver, rounds=2, method=method)
    config["trainer"] |= {} if steps else {"val_check_interval": 1}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    whole = fit("whole")
    rows = [row for row in metrics(whole) if row["val/reward/verifier"]]
    assert rows[0]["val/reward/verifier"] != rows[-1]["val/reward/verifier"]  # it learns something
    checkpoints = sorted((whole / "checkpoints").glob("epoch*.ckpt"), key=step_of)
    # For DDPO in the middle of the first round, at its end, and before the last update.
    other = OTHERS.get(method, {"minibatches": 3, "resumed": (0, 2, 4)})
    assert len(checkpoints) == 2 * other["minibatches"]
    for number, checkpoint in enumerate(checkpoints[i] for i in other["resumed"]):
        resumed = Path("runs", f"again{number}", "version_0")
        target = resumed / "checkpoints" / checkpoint.name
        target.parent.mkdir(parents=True)
        target.write_bytes(checkpoint.read_bytes())
        for path in whole.iterdir():
            if path.suffix in (".csv", ".md"):
                (resumed / path.name).write_bytes(path.read_bytes())
        fit(f"again{number}", "--ckpt_path", str(target))
        assert with_repeats(resumed, whole) == metrics(whole), checkpoint.name
        last = Path("checkpoints", "last.ckpt")
        found = differences(contents(whole / last), contents(resumed / last))
        assert found == [], checkpoint.name


def step_of(checkpoint):
    return int(checkpoint.stem.split("step=")[1])


class SaveAtEveryBatch(Callback):
    """Asks for a checkpoint also where gradients are being accumulated."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.save_checkpoint(f"{trainer.fit_loop.epoch_loop.total_batch_idx:02d}.ckpt")


def test_saves_wait_for_the_end_of_an_accumulation_window_and_of_the_round():
    module = make_ddpo(minibatch_size=4)  # 6 minibatches a round, 3 updates
    options = {"accumulate_grad_batches": 2, "max_epochs": 2}
    fit_module(module, callbacks=[SaveAtEveryBatch()], **options)
    expected = [p.clone() for p in module.parameters() if p.requires_grad]
    counted = {
        path.name: torch.load(path, weights_only=True)["global_step"]
        for path in sorted(Path().glob("*.ckpt"))
    }
    # Asked for in the middle of a window (even batches), written at its end with the odd ones.
    assert list(counted.values()) == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    for name in counted:
        resumed = make_ddpo(minibatch_size=4)
        make_trainer(**options).fit(
            resumed, resumed.experience(prompt_loader()), ckpt_path=name, weights_only=True
        )
        found = [p for p in resumed.parameters() if p.requires_grad]
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)), name


def children(*runs):
    """Run command lines in processes of their own, side by side; return their exit codes."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOADED)
    processes = [
        server.Process(target=victim.run, args=(str(Path.cwd()), *run), daemon=True) for run in runs
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    return [process.exitcode for process in processes]


MOMENTS = ("rollout", "update", "save")


@pytest.mark.parametrize(
    "pipeline", ["shapes-sd", pytest.param("shapes-sd3", marks=pytest.mark.slow)]
)
def test_a_killed_run_resumes_bit_equal(pipeline):
    """Killed by SIGKILL in a rollout, in an update, and while a checkpoint is being written."""
    saver = {"save_last": True, "every_n_train_steps": 2}
    config = configuration(saver, pipeline)
    config["trainer"]["check_val_every_n_epoch"] = 2
    Path("config.yaml").write_text(yaml.safe_dump(config))
    words = ["fit", "--config", "config.yaml"]
    assert children([[*words, "--name", "whole"]]) == [0], Path("whole.txt").read_text()[-3000:]
    saves = [json.loads(line) for line in Path("whole.jsonl").read_text().splitlines()]
    middle, end = saves[len(saves) // 2 - 1], saves[-1]  # about the end of round 2
    chosen = random.Random(pipeline)
    numbers = {m: chosen.randint(middle[m] + 1, end[m] - (m == "save")) for m in MOMENTS}
    killed = children(*([[*words, "--name", m], m, numbers[m]] for m in MOMENTS))
    assert killed == [-signal.SIGKILL] * 3
    runs = {m: Path("runs", m, "version_0") for m in MOMENTS}
    unfinished = {m: bool(list((run / "checkpoints").glob(".*"))) for m, run in runs.items()}
    assert unfinished == {"rollout": False, "update": False, "save": True}
    resumed = children(*([[*words, "--name", m, "--ckpt_path", "last"]] for m in MOMENTS))
    assert resumed == [0] * 3, [Path(f"{m}.txt").read_text()[-1000:] for m in MOMENTS]
    for moment, run in runs.items():
        assert [path.name for path in Path("runs", moment).iterdir()] == ["version_0"]
        assert_equal_runs(Path("runs", "whole", "version_0"), run)

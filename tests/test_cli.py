import csv
import re
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import FluxPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from safetensors.torch import load_file

from lit_align.cli import main
from lit_align.data.prompts import PromptFile
from lit_align.policies.adapters import LORA_FILE
from lit_align.policies.loading import ASSETS
from lit_align.rewards.base import uint8_images
from lit_align.verbs import export, generate, load_module, sample_images
from tests.conftest import tiny_pipeline

CONFIG = """
seed_everything: 3
trainer:
  accelerator: cpu
  max_epochs: 2
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: CrossRewardCallback
    - class_path: SampleGallery
      init_args: {num_prompts: 2, every_n_rounds: 1}
model:
  class_path: DDPO
  init_args:
    policy:
      class_path: lit_align.policies.DiffusionPolicy.from_pretrained
      init_args: {pretrained: shapes-sd}
    reward: {class_path: Colorfulness}
    eval_rewards:
      verifier: {class_path: ShapesVerifier}
    num_inference_steps: 3
    guidance_scale: 1.0
    prompts_per_round: 4
    rollout_batch_size: 4
    minibatch_size: 2
    clip_range: 1.0e-3
    lr: 1.0e-3
data:
  class_path: PromptDataModule
  init_args: {train: shapes-train, val: shapes-heldout, val_size: 4}
"""


@pytest.fixture(autouse=True)
def _configuration(_own_folder, tmp_path, monkeypatch):
    """Put a configuration into the test's folder, and import modules from there."""
    monkeypatch.syspath_prepend(tmp_path)
    Path("config.yaml").write_text(CONFIG)


def fit(*words, name="test"):
    main(["fit", "--config", "config.yaml", "--name", name, *words])
    return max(Path("runs", name).iterdir(), key=lambda path: int(path.name.split("_")[1]))


def metrics(run):
    """Return the rows of a run's metrics.csv without times."""
    with (run / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if "time/" not in k} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    """The folder of one run of CONFIG, for tests that compare others with it."""
    folder = tmp_path_factory.mktemp("plain")
    (folder / "config.yaml").write_text(CONFIG)
    where = ["--runs_dir", str(folder / "runs"), "--name", "plain"]
    main(["fit", "--config", str(folder / "config.yaml"), *where])
    return folder / "runs" / "plain" / "version_0"


def test_a_run_leaves_its_folder_and_the_table(capsys):
    run = fit()
    assert {p.name for p in run.iterdir()} >= {
        "config.yaml", "metrics.csv", "checkpoints", "samples", "summary.md"}  # fmt: skip
    assert list(run.glob("events.out.tfevents.*"))
    assert {p.name for p in (run / "samples").iterdir()} == {"round_0001.png", "round_0002.png"}
    printed = capsys.readouterr().out
    assert (run / "summary.md").read_text() in printed + "\n"
    assert str(run / "samples" / "round_0002.png") in printed
    rows = (run / "summary.md").read_text().splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:]] == ["Colorfulness", "verifier"]
    first, *_, last = [row for row in metrics(run) if row["val/reward/verifier"]]
    assert (first["reward_queries"], last["reward_queries"]) == ("0.0", "8.0")


def test_the_saved_configuration_is_complete_and_repeats_the_run(plain_run):
    saved = yaml.safe_load((plain_run / "config.yaml").read_text())
    assert saved["model"]["init_args"]["adv_clip_max"] == 5.0
    main(["fit", "--config", str(plain_run / "config.yaml")])
    assert metrics(plain_run.parent / "version_1") == metrics(plain_run)


def test_the_same_command_twice_gives_the_same_metrics(plain_run):
    assert metrics(fit()) == metrics(plain_run)


def test_resume_continues_in_the_same_folder_as_if_nothing_had_happened(plain_run):
    whole = plain_run
    half = fit("--trainer.max_epochs", "1", name="half")
    (checkpoint,) = (half / "checkpoints").iterdir()
    resumed = fit("--ckpt_path", str(checkpoint), name="half")
    assert resumed == half
    assert [r for r in metrics(half) if r["val/reward/verifier"]] == [
        r for r in metrics(whole) if r["val/reward/verifier"]
    ]
    assert metrics(half) == metrics(whole)
    assert (half / "config-resume1.yaml").is_file()
    assert (half / "samples" / "round_0002.png").read_bytes() == (
        whole / "samples" / "round_0002.png"
    ).read_bytes()
    assert (half / "summary.md").read_text() == (whole / "summary.md").read_text()


def test_resume_keeps_the_rows_of_the_round_that_wrote_the_checkpoint():
    """A checkpoint written at a validation's end, before Lightning has counted the round."""
    saving = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
              "init_args": {"save_on_train_epoch_end": False, "save_top_k": -1}}  # fmt: skip
    config = yaml.safe_load(CONFIG)
    config["trainer"] |= {"max_epochs": 3, "callbacks": [saving]}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    run = fit()
    expected = metrics(run)
    checkpoint = next((run / "checkpoints").glob("epoch=1-*.ckpt"))
    fit("--ckpt_path", str(checkpoint))
    assert metrics(run) == expected


def test_resume_with_averaged_weights_equals_the_run_without_a_break():
    config = yaml.safe_load(CONFIG)
    averaging = {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging",
                 "init_args": {"decay": 0.9}}  # fmt: skip
    config["trainer"]["callbacks"] = [averaging]
    Path("config.yaml").write_text(yaml.safe_dump(config))
    whole = fit(name="whole")
    half = fit("--trainer.max_epochs", "1", name="half")
    (checkpoint,) = (half / "checkpoints").iterdir()
    stored = torch.load(checkpoint, weights_only=True)
    assert stored["state_dict"].keys() == stored["current_model_state"].keys()
    assert all("lora" in name for name in stored["current_model_state"])
    fit("--ckpt_path", str(checkpoint), name="half")
    assert metrics(half) == metrics(whole)


def with_callbacks(*callbacks):
    config = yaml.safe_load(CONFIG)
    config["trainer"]["callbacks"] = list(callbacks)
    Path("config.yaml").write_text(yaml.safe_dump(config))


AVERAGE = {"class_path": "AdapterEMA", "init_args": {"decay": 0.5}}


def test_resume_with_an_average_of_the_adapters_equals_the_run_without_a_break():
    with_callbacks(
        AVERAGE, {"class_path": "RNGStateCallback"}, {"class_path": "InvariantsCallback"}
    )
    whole = fit(name="whole")
    half = fit("--trainer.max_epochs", "1", name="half")
    (checkpoint,) = (half / "checkpoints").iterdir()
    fit("--ckpt_path", str(checkpoint), name="half")
    assert metrics(half) == metrics(whole)
    for key in ("average", "state_dict"):
        ends = []
        for run in (whole, half):
            newest = max((run / "checkpoints").iterdir(), key=lambda path: path.stat().st_mtime_ns)
            stored = torch.load(newest, weights_only=True)
            ends.append(stored["callbacks"]["AdapterEMA"][key] if key == "average" else stored[key])
        assert ends[0].keys() == ends[1].keys()
        assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_the_average_can_be_exported_and_sampled(capsys):
    with_callbacks(AVERAGE)
    checkpoint = last_checkpoint("--model.init_args.lr", "1e-2")
    stored = torch.load(checkpoint, weights_only=True)
    average = stored["callbacks"]["AdapterEMA"]["average"]
    state = load_module(checkpoint, "ema").state_dict()
    assert all(torch.equal(state[name], average[name]) for name in average)
    assert any(not torch.equal(stored["state_dict"][name], average[name]) for name in average)
    files = {}
    for weights in ("ema", "trained"):
        words = ["--ckpt_path", checkpoint, "--weights", weights, "--output"]
        main(["export", *words, f"{weights}-lora"])
        main(["generate", *words, weights, "--prompts", str(PROMPTS)])
        generate(PROMPTS, f"{weights}-plain", pretrained="shapes-sd", lora=f"{weights}-lora",
                 num_inference_steps=3, guidance_scale=1.0)  # fmt: skip
        files[weights] = [path.read_bytes() for path in sorted(Path(weights).iterdir())]
        plain = [path.read_bytes() for path in sorted(Path(f"{weights}-plain").iterdir())]
        assert files[weights] == plain
    assert files["ema"] != files["trained"]


def test_a_checkpoint_without_an_average_is_refused_where_one_is_asked_for():
    with_callbacks()
    checkpoint = last_checkpoint("--trainer.max_epochs", "1")
    with pytest.raises(ValueError, match="no averaged weights: .* no AdapterEMA"):
        export(checkpoint, "out", weights="ema")
    with pytest.raises(ValueError, match="no averaged weights"):
        generate(PROMPTS, "out", ckpt_path=checkpoint, weights="ema")
    with pytest.raises(ValueError, match="`weights: ema` is for a `ckpt_path`"):
        generate(PROMPTS, "out", pretrained="shapes-sd", weights="ema")
    assert not Path("out").exists()


def test_resume_of_the_last_run_by_name_and_configuration_wins(capsys):
    fit("--trainer.max_epochs", "1")
    capsys.readouterr()
    run = fit("--ckpt_path", "last", "--model.init_args.lr", "5e-4")
    assert run.name == "version_0"
    told = capsys.readouterr()
    assert "Resuming with lr = 0.0005, checkpoint: 0.001." in told.out + told.err
    saved = yaml.safe_load((run / "config-resume1.yaml").read_text())
    assert saved["model"]["init_args"]["lr"] == 5e-4


def test_evaluation_takes_what_is_unset_from_the_checkpoint(plain_run, capsys):
    (checkpoint,) = (plain_run / "checkpoints").iterdir()
    capsys.readouterr()
    main(["validate", "--ckpt_path", str(checkpoint), "--trainer.accelerator", "cpu",
          "--trainer.enable_progress_bar", "false"])  # fmt: skip
    (told,) = re.findall(r"val/reward/verifier\W+([\d.]+)", capsys.readouterr().out)
    expected = [
        row["val/reward/verifier"] for row in metrics(plain_run) if row["val/reward/verifier"]
    ]
    assert float(told) == pytest.approx(float(expected[-1]), abs=1e-6)
    main(["test", "--ckpt_path", str(checkpoint), "--trainer.accelerator", "cpu",
          "--trainer.enable_progress_bar", "false",
          "--model.init_args.eval_num_inference_steps", "2"])  # fmt: skip
    assert "test/reward/verifier" in capsys.readouterr().out


def test_the_other_pipeline_by_one_line():
    Path("config.yaml").write_text(
        CONFIG.replace("pretrained: shapes-sd", "pretrained: shapes-sd3")
    )
    rows = metrics(fit())
    assert float(rows[-1]["denoiser_calls"]) == 2 * (4 * 3 + 4 * 2)


MY_FILE = '''
from lit_align.algorithms import DDPO


class MyMethod(DDPO):
    """Advantages are ranks of the rewards in the round."""

    def __init__(self, *args, sharpness: float = 1.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.sharpness = sharpness

    def compute_targets(self, trajectory):
        ranks = trajectory.rewards.argsort().argsort().float()
        return trajectory.replace(advantages=self.sharpness * (ranks - ranks.mean()))
'''
MY_REWARD = """
from lit_align.rewards import RewardModule


class Darkness(RewardModule):
    differentiable = True

    def forward(self, images, prompts, metadata=None, group_ids=None):
        return 1 - images.mean(dim=(1, 2, 3))
"""


def test_a_method_and_a_reward_of_the_users_own():
    Path("my_file.py").write_text(MY_FILE)
    Path("my_reward.py").write_text(MY_REWARD)
    run = fit("--model", "my_file.MyMethod", "--model.init_args.sharpness", "2.0",
              "--model.init_args.reward", "my_reward.Darkness")  # fmt: skip
    assert "rollout/reward/Darkness" in metrics(run)[0]
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["model"]["class_path"] == "my_file.MyMethod"
    assert saved["model"]["init_args"]["sharpness"] == 2.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.init_args.clip_rnge", "1"], "clip_rnge"),
        (["--model.init_args.policy.init_args.lora_rnk", "4"], "lora_rnk"),
        (["--trainer.max_rounds", "4"], "trainer.max_rounds"),
        (["--model.init_args.clip_range", "wide"], "wide"),
    ],
)
def test_unknown_options_are_refused_by_name(words, message, capsys):
    with pytest.raises(SystemExit):
        fit(*words)
    assert message in capsys.readouterr().err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--model.init_args.policy.init_args.pretrained", "shapes-xl"], ValueError,
         r"no pipeline 'shapes-xl'.*\(shapes-sd, shapes-sd3\)"),
        (["--data.init_args.train", "nowhere.txt"], FileNotFoundError, "no prompts file"),
        (["--data.init_args.train", "empty.txt"], ValueError, "is empty"),
        (["--model.init_args.policy.init_args.lora_targets", "[to_kk]"], ValueError,
         "'to_kk' matches no layer.*near names: .*to_k"),
        (["--model.init_args.minibatch_size", "5"], ValueError, "must divide the 12 pairs"),
        (["--trainer.precision", "bf16-true"], ValueError, "bf16-mixed"),
        (["--trainer.strategy", "fsdp"], ValueError, "ModelParallelStrategy"),
        (["--model.init_args.policy.init_args.scheduler.class_path", "StochasticDDIM",
          "--model.init_args.policy.init_args.scheduler.init_args.eta", "0"], ValueError,
         "set `eta` above 0"),
        (["--model.init_args.num_inference_steps", "1500"], ValueError, r"\[1, 1000\], got 1500"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)  # fmt: skip
def test_bad_input_is_refused_before_training(words, error, message):
    Path("empty.txt").write_text("\n")
    with pytest.raises(error, match=message):
        fit(*words)
    assert not list(Path("runs").rglob("*.ckpt"))


def last_checkpoint(*words):
    (checkpoint,) = (fit(*words) / "checkpoints").iterdir()
    return str(checkpoint)


PROMPTS = ["a red circle", "a blue square on a white background"]


def plain_images(pipe, steps, guidance, **options):
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(7) for _ in PROMPTS]
    images = pipe(PROMPTS, num_inference_steps=steps, guidance_scale=guidance, output_type="pt",
                  generator=generators, **options).images  # fmt: skip
    return uint8_images(images).int()


OPEN = {
    "shapes-sd": (StableDiffusionPipeline, {}, {}),
    "shapes-sd3": (
        StableDiffusion3Pipeline,
        {"text_encoder_3": None, "tokenizer_3": None},
        {"max_sequence_length": 0},
    ),
}


@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize("name", ["shapes-sd", "shapes-sd3"])
def test_exported_weights_draw_the_same_images_in_plain_diffusers(name, train):
    policy = "--model.init_args.policy.init_args"
    words = [f"{policy}.pretrained", name, f"{policy}.train", train, "--model.init_args.lr", "1e-2"]
    if train == "lora":  # alpha != rank: its scale must survive the export
        words += [f"{policy}.lora_alpha", "6"]
    checkpoint = last_checkpoint(*words)
    export(checkpoint, "exported")
    family, opening, calling = OPEN[name]
    if train == "lora":
        pipe = family.from_pretrained(ASSETS / name, **opening)
        base = plain_images(pipe, 5, 2.0, **calling)
        pipe.load_lora_weights("exported", weight_name=LORA_FILE)
    else:
        base = plain_images(family.from_pretrained(ASSETS / name, **opening), 5, 2.0, **calling)
        pipe = family.from_pretrained("exported", **opening)
    expected = uint8_images(
        sample_images(load_module(checkpoint).policy, PROMPTS, [7, 7], 5, 2.0)
    ).int()
    drawn = plain_images(pipe, 5, 2.0, **calling)
    assert (drawn - expected).abs().max() <= 2
    assert (base - expected).abs().max() > 2
    card = Path("exported", "README.md").read_text()
    assert "| steps | 3 |" in card
    assert family.__name__ in card


def test_the_card_of_a_flux_of_another_size_draws_the_same_images():
    tiny_pipeline("flux").save_pretrained("flux")
    policy = "--model.init_args.policy.init_args"
    words = [f"{policy}.pretrained", "flux", f"{policy}.image_size", "32"]
    checkpoint = last_checkpoint(*words, "--model.init_args.lr", "1e-2",
                                 "--model.init_args.guidance_scale", "3.5")  # fmt: skip
    export(checkpoint, "exported")
    card = Path("exported", "README.md").read_text()
    call = card.partition('pipe("a prompt", ')[2].partition(").images")[0]
    assert call == (
        "num_inference_steps=3, guidance_scale=3.5, height=32, width=32, max_sequence_length=16"
    )
    pipe = FluxPipeline.from_pretrained("flux")
    options = {k: float(v) if "." in v else int(v) for k, v in
               (part.split("=") for part in call.split(", "))}  # fmt: skip
    steps, guidance = options.pop("num_inference_steps"), options.pop("guidance_scale")
    base = plain_images(pipe, steps, guidance, **options)
    pipe.load_lora_weights("exported", weight_name=LORA_FILE)
    expected = uint8_images(
        sample_images(load_module(checkpoint).policy, PROMPTS, [7, 7], 3, 3.5)
    ).int()
    assert (plain_images(pipe, steps, guidance, **options) - expected).abs().max() <= 2
    assert (base - expected).abs().max() > 2
    # A LoRA remembers no size.
    generate(PROMPTS, "small", pretrained="flux", lora="exported", num_inference_steps=3,
             guidance_scale=3.5, image_size=32)  # fmt: skip
    generate(PROMPTS, "trained", ckpt_path=checkpoint)
    for path in Path("small").iterdir():
        assert path.read_bytes() == Path("trained", path.name).read_bytes()
    with pytest.raises(ValueError, match="`image_size` is for `pretrained`"):
        generate(PROMPTS, "out", ckpt_path=checkpoint, image_size=32)


def test_generate_writes_files_from_checkpoints_and_loras(capsys):
    checkpoint = last_checkpoint("--model.init_args.lr", "1e-2")
    main(["generate", "--ckpt_path", checkpoint, "--prompts", str(PROMPTS), "--output", "one",
          "--images_per_prompt", "2"])  # fmt: skip
    assert sorted(p.name for p in Path("one").iterdir()) == [
        "0000_0.png", "0000_1.png", "0001_0.png", "0001_1.png"]  # fmt: skip
    main(["export", "--ckpt_path", checkpoint, "--output", "lora"])
    generate(PROMPTS, "two", pretrained="shapes-sd", lora="lora", num_inference_steps=3,
             guidance_scale=1.0, images_per_prompt=2)  # fmt: skip
    for path in Path("one").iterdir():
        assert path.read_bytes() == Path("two", path.name).read_bytes()
    size = ["--num_inference_steps", "3", "--guidance_scale", "1", "--prompts", str(PROMPTS)]
    main(["generate", "--pretrained", "shapes-sd", *size, "--output", "base"])
    main(["generate", "--ckpt_path", checkpoint, *size, "--output", "off", "--lora_scale", "0"])
    main(["export", "--ckpt_path", checkpoint, "--output", "half", "--lora_scale", "0.5"])
    half, whole = (load_file(f"{folder}/{LORA_FILE}") for folder in ("half", "lora"))
    for name, tensor in whole.items():
        assert torch.equal(half[name], tensor / 2 if ".lora_B." in name else tensor), name
    for path in Path("base").iterdir():
        assert path.read_bytes() == Path("off", path.name).read_bytes()
        assert path.read_bytes() != Path("one", path.name).read_bytes()
    with pytest.raises(ValueError, match="`lora_scale` is for LoRA adapters"):
        main(["generate", "--pretrained", "shapes-sd", *size, "--lora_scale", "0.5"])
    Path("list.txt").write_text("\n".join(PROMPTS))
    generate(["list.txt"], "three", pretrained="shapes-sd", num_inference_steps=2)
    assert len(list(Path("three").iterdir())) == len(PromptFile("list.txt"))


def test_generate_and_export_say_what_is_missing():
    with pytest.raises(ValueError, match="either `ckpt_path` or `pretrained`"):
        generate(PROMPTS)
    with pytest.raises(FileNotFoundError, match="no checkpoint 'nowhere.ckpt'"):
        export("nowhere.ckpt", "out")

"""What a run would cost, against what runs do cost."""

import json
import resource
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from lit_align import dry_run
from lit_align.architectures import architectures, build_part, build_pipeline, describe
from lit_align.architectures.stand_ins import backbones, networks_without_weights
from lit_align.benchmarks.full_size import Rounds, full_size
from lit_align.cli import main
from lit_align.costs import Setting, estimate
from lit_align.policies import DiffusionPolicy
from lit_align.rewards import AestheticScore, ImageReward, PickScore
from lit_align.shapes import ASSETS
from lit_align.tracing import GPUOperators, Trace, tracing
from tests.algorithms.harness import METHODS, fit, make_method

CONFIGS = Path(__file__).parent.parent / "configs"


def numel(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", architectures())
def test_published_numbers_of_parameters(name):
    description = architectures()[name]
    for part, count in description["parameters"].items():
        assert numel(build_part(description["components"][part])) == count, part


@pytest.mark.parametrize("hub_id", backbones())
def test_published_numbers_of_reward_networks(hub_id):
    description = backbones()[hub_id]
    network = build_part(description["network"])
    assert {p.device.type for p in network.parameters()} == {"meta"}
    if "parameters" in description:  # of the others none is published
        assert numel(network) == description["parameters"]


def test_hub_ids_stand_for_one_architecture():
    ids = [hub_id for each in architectures().values() for hub_id in each["hub_ids"]]
    assert len(ids) == len(set(ids))


def test_the_largest_model_takes_no_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
    pipeline = build_pipeline("Wan-AI/Wan2.1-T2V-14B-Diffusers")
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert numel(pipeline.transformer) == 14_288_491_584
    assert after - before < 2**20  # of the 53 GiB that it has


def test_a_folder_is_read_without_its_weights(tmp_path):
    own = ASSETS / "shapes-sd3"
    folder = tmp_path / "pipeline"
    for path in own.rglob("*.json"):
        target = folder / path.relative_to(own)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text())
    built = build_pipeline(str(folder))
    real = DiffusionPolicy.from_pretrained("shapes-sd3", train="none")
    assert numel(built.transformer) == numel(real.denoiser)
    assert numel(built.vae) == numel(real.vae)
    assert numel(built.text_encoder) + numel(built.text_encoder_2) == numel(real.text_encoders)


def test_an_unknown_model_is_told_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'who/knows'.*local folder.*black-forest-labs/FLUX"):
        describe("who/knows")


def test_rewards_are_built_without_their_checkpoints():
    with networks_without_weights():
        made = {r: r() for r in (AestheticScore, PickScore, ImageReward)}
    assert all(p.device.type == "meta" for r in made.values() for p in r.parameters())
    assert numel(made[PickScore]) == 986_109_441
    assert numel(made[AestheticScore]) == 303_966_208 + 769  # vision tower, projection, head
    assert numel(made[ImageReward]) == 303_301_632 + 141_977_088 + 769


def meta_method(name, **options):
    module = make_method(name, **options)
    module.policy.to("meta")
    return module


COUNTED = ("DDPO", "DRaFT", "AdjointMatching", "AWM")


@pytest.mark.parametrize(
    "name",
    [
        name if name in COUNTED else pytest.param(name, marks=pytest.mark.slow)
        for name in METHODS
        if name != "TPDM"  # how many steps it takes depends on what the network says
    ],
)
def test_calls_and_queries_are_those_of_a_round(name):
    family = "sd" if name in ("DDPO", "TDPO", "LargeScaleRL", "D3PO", "NablaGFlowNet") else "sd3"
    module = make_method(name, family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = fit(module)
    found = estimate(meta_method(name, family=family))
    expected = {k: v for k, v in module.counters.items() if v}
    assert {k: v for k, v in found.counts.items() if v} == expected
    assert found.updates == trainer.global_step
    assert found.peak > 0
    assert found.flops["update"] > 0


def test_tpdm_takes_at_most_all_steps():
    found = estimate(meta_method("TPDM", family="sd3"))
    assert 0 < found.counts["denoiser_calls"] <= 3 * found.images
    assert found.trainable == found.parameters["beside the policy"]


def test_states_of_the_optimiser_are_exact():
    module = make_method("DDPO")
    fit(module)
    states = module.trainer.optimizers[0].state.values()
    moments = sum(t.nbytes for state in states for t in state.values() if t.ndim)
    found = estimate(meta_method("DDPO"))
    assert found.resident["states of AdamW"] == moments
    assert found.trainable == sum(p.numel() for p in module.parameters() if p.requires_grad)


SMALL = {
    "image_size": 32,
    "images_per_round": 4,
    "num_inference_steps": 2,
    "lora_rank": 4,
    "guidance_scale": 1.0,
    "rollout_batch_size": 4,
    "minibatch_size": 2,
}


@pytest.mark.parametrize(
    ("architecture", "method", "options"),
    [
        pytest.param("shapes-sd", "ddpo", {}, marks=pytest.mark.slow),
        ("shapes-sd3", "flow_grpo", {"gradient_checkpointing": True, "trained_steps": 2,
                                     "accumulate_grad_batches": 2}),
        ("shapes-sd", "draft", {"trained_steps": 2, "images_per_round": 2}),
        pytest.param("shapes-sd3", "diffusion_nft", {"dtype": "float32"}, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_memory_is_that_of_real_rounds(architecture, method, options):
    """Peaks of bytes alive in a real fit on the CPU against the estimate on the meta device."""
    row = full_size(Rounds(architecture, method, "table.csv", **{**SMALL, **options}))
    for phase in ("collect", "update"):
        measured, estimated = row[f"{phase}_peak_gib"], row[f"estimated_{phase}_peak_gib"]
        assert estimated == pytest.approx(measured, rel=0.15), phase
    assert row["updates"] > 0
    assert row["overhead_ratio"] > 0
    assert Path("table.csv").read_text().startswith("architecture,")


def test_processes_share_the_work():
    one = estimate(meta_method("FlowGRPO", family="sd3", policy_options={"lora_rank": 8}))
    options = {"family": "sd3", "policy_options": {"lora_rank": 8}, "rollout_batch_size": 4}
    options["minibatch_size"] = 4
    ddp = estimate(meta_method("FlowGRPO", **options), Setting(world_size=2))
    fsdp = estimate(meta_method("FlowGRPO", **options), Setting(world_size=2, strategy="fsdp2"))
    assert ddp.counts == fsdp.counts == one.counts
    assert ddp.resident["buckets of DDP"] == 4 * one.trainable
    assert ddp.resident["denoiser"] == one.resident["denoiser"]
    assert fsdp.resident["denoiser"] == -(-one.resident["denoiser"] // 2)


def test_what_enters_the_meta_device_keeps_its_gradient_and_counts_once():
    trace, weight = Trace(), nn.Parameter(torch.empty(64, 64, device="meta"))
    call = trace.crossing(lambda x: (x @ weight) @ weight, "products")
    with tracing(trace, GPUOperators()), trace.during("all"):
        x = torch.ones(32, 64, requires_grad=True)
        output = call(x)
        assert (output.device.type, output.shape) == ("cpu", (32, 64))
        # The input, what is between the products, and their result; no copies.
        assert trace.live == 3 * 32 * 64 * 4
        gradients = torch.autograd.grad(output.sum(), [x, weight])
    assert [g.device.type for g in gradients] == ["cpu", "meta"]
    assert trace.flops["all"] == 3 * 2 * (2 * 32 * 64 * 64)  # backward has two products for each


def test_calls_without_gradient_are_made_once_and_counted_again():
    trace, weight, calls = Trace(), torch.empty(64, 64, device="meta"), []

    def product(x):
        calls.append(len(x))
        return x @ weight

    crossing = trace.crossing(product, "product")
    with tracing(trace, GPUOperators()), torch.no_grad(), trace.during("all"):
        for rows in (32, 32, 16, 32):
            assert crossing(torch.ones(rows, 64)).shape == (rows, 64)
    assert calls == [32, 16]
    assert trace.flops["all"] == 2 * 64 * 64 * (3 * 32 + 16)


def test_convolutions_lay_out_images_anew_on_a_gpu():
    layer = nn.Conv2d(4, 8, 3, padding=1, device="meta").requires_grad_(False)
    image, out = 2 * 4 * 16 * 16 * 4, 2 * 8 * 16 * 16 * 4  # bytes
    for on_gpu, copies in ((False, 0), (True, image + out)):
        trace, images = Trace(on_gpu), torch.empty(2, 4, 16, 16, device="meta", requires_grad=True)
        with tracing(trace, GPUOperators()):
            with trace.during("forward"):
                output = layer(images)
            assert trace.peaks["forward"] == out + copies
            with trace.during("backward"):
                torch.autograd.grad(output, images, torch.empty_like(output))
        # Both gradients and the output are alive, and each of the images has a copy.
        copied = 2 * image + out if on_gpu else 0
        assert trace.peaks["backward"] == 2 * out + image + copied


@pytest.mark.parametrize(("enabled", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_autocast_of_meta_tensors(enabled, dtype):
    operators = GPUOperators(torch.bfloat16)
    layer = nn.Linear(8, 8, device="meta")
    with operators, operators.autocast(enabled=enabled):
        output = layer(torch.empty(2, 8, device="meta"))
        assert output.dtype == dtype
        assert nn.functional.layer_norm(output, (8,)).dtype == torch.float32


def told(capsys, *words):
    main(["fit", *map(str, words)])
    return capsys.readouterr().out


def test_the_command_line_prints_and_leaves_nothing_behind(capsys):
    out = told(capsys, "--config", CONFIGS / "ddpo" / "sd15_jpeg.yaml", "--dry_run",
               "--model.init_args.num_inference_steps", 5,
               "--trainer.accumulate_grad_batches", 40)  # fmt: skip
    assert "| denoiser | 859,520,964 |" in out
    assert "| VAE | 83,653,863 |" in out
    assert "| LoRA | 797,184 |" in out
    assert "JPEGCompressibility has no parameters" in out
    assert "estimated peak" in out
    assert "At 200 x 10^12 operations per second" in out
    assert not list(Path().iterdir())


def test_many_processes_and_another_speed(capsys):
    out = told(
        capsys, "--config", CONFIGS / "ddpo" / "shapes-sd_verifier.yaml",
        "--config", CONFIGS / "scale" / "fsdp2.yaml", "--dry_run", "true", "--dry_run_tflops", "50",
        "--trainer.strategy.init_args.data_parallel_size", "2", "--trainer.devices", "2",
        "--model.init_args.prompts_per_round", "16", "--model.init_args.rollout_batch_size", "8",
        "--model.init_args.minibatch_size", "8", "--trainer.accumulate_grad_batches", "1",
    )  # fmt: skip
    assert "2 processes (fsdp2)" in out
    assert "gathered blocks of FSDP2" in out
    assert "At 50 x 10^12" in out


def test_what_fit_refuses_is_refused():
    config = CONFIGS / "ddpo" / "shapes-sd_verifier.yaml"
    with pytest.raises(ValueError, match="`minibatch_size` \\(7\\) must"):
        main(["fit", "--config", str(config), "--dry_run", "--model.init_args.minibatch_size=7"])
    with pytest.raises(ValueError, match="'who/knows' is not known here"):
        main(["fit", "--config", str(config), "--dry_run",
              "--model.init_args.policy.init_args.pretrained=who/knows"])  # fmt: skip


def test_only_fit_has_dry_runs():
    config = CONFIGS / "ddpo" / "shapes-sd_verifier.yaml"
    with pytest.raises(ValueError, match="`--dry_run` is for `fit`"):
        main(["validate", "--config", str(config), "--dry_run", "true"])


def test_a_method_without_policy_is_refused():
    with pytest.raises(ValueError, match="methods that align a policy; Linear does not"):
        dry_run.dry_run(nn.Linear(1, 1), None, {})


def test_architectures_are_plain_facts():
    for path in Path(dry_run.__file__).parent.glob("architectures/**/*.json"):
        assert json.loads(path.read_text()), path

"""Short runs on one process or two, and what they leave behind to be compared."""

import json
import multiprocessing
import os
import socket
import sys
import time

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy

from lit_align.algorithms import DiffusionDPO, FlowDPO, RewardModeling, Task
from lit_align.algorithms.sharding import whole
from lit_align.callbacks import CrossRewardCallback, NeuronResetCallback, SampleGallery
from lit_align.data.windows import StepWindow
from lit_align.rewards import Colorfulness, RewardModule
from lit_align.trajectory import Trajectory
from tests.algorithms.harness import (
    Recorder,
    experience_of,
    make_ddpo,
    make_method,
    make_trainer,
    prompt_loader,
    tiny_critic,
)
from tests.algorithms.judgements import Judgements, learned, make_dpo
from tests.conftest import PRELOADED

STRATEGIES = ("ddp", "fsdp2")
ROUNDS = 2
METHODS = {
    "DDPO": {"family": "sd", "train": "lora", "beta": 0.1},
    "FlowGRPO": {
        "family": "sd3", "train": "full", "num_inference_steps": 4, "window": StepWindow(2),
        "ratio": "norm", "beta": 0.1, "kl": "drift",
    },
    "TDPO": {
        "family": "sd3", "train": "full", "lr_critic": 2e-3, "kl_coef": 0.1, "kl_target": 1e-3,
    },
    "LargeScaleRL": {"family": "sd3", "train": "full", "timestep_fraction": 1.0},
    "ReFL": {"family": "sd3", "train": "lora"},
    "DRaFT": {"family": "sd3", "train": "full"},
    "AlignProp": {"family": "sd3", "train": "full", "num_inference_steps": 4},
    "DRTune": {"family": "sd", "train": "lora"},
    "NablaGFlowNet": {"family": "sd3", "train": "full", "timestep_fraction": 0.5},
    "AdjointMatching": {"family": "sd", "train": "lora"},
    "DiffusionNFT": {"family": "sd3", "train": "full", "kl_beta": 0.1},
    "AWM": {
        "family": "sd3", "train": "lora", "num_inference_steps": 4, "trained_times": 2,
        "kl_beta": 0.1,
    },
    "CRD": {"family": "sd", "train": "lora", "rollout_decay": (1, 0.3, 0.6)},
    "DGPO": {"family": "sd3", "train": "lora"},
    "D3PO": {"family": "sd", "train": "lora"},
    "OnlineDPO": {"family": "sd3", "train": "full", "ref_update": "ema", "lr_reward": 1e-3},
    "TPDM": {
        "family": "sd3", "train": "none", "num_inference_steps": 6, "kl_coef": 0.1,
        "shared_init_noise": True,
    },
}  # fmt: skip
# Each of the first three under both strategies, each of the others under one.
RUNS = [
    *((method, strategy) for method in ("DDPO", "TDPO", "LargeScaleRL") for strategy in STRATEGIES),
    *(("ReFL", "ddp"), ("DRaFT", "fsdp2"), ("AlignProp", "ddp"), ("DRTune", "fsdp2")),
    *(("NablaGFlowNet", "fsdp2"), ("AdjointMatching", "ddp"), ("FlowGRPO", "fsdp2")),
    *(("DiffusionNFT", "fsdp2"), ("AWM", "ddp"), ("TPDM", "fsdp2")),
    *(("CRD", "fsdp2"), ("DGPO", "ddp"), ("D3PO", "ddp"), ("OnlineDPO", "fsdp2")),
]
# Gradients of untrained models are tiny, and AdamW's epsilon would hide them.
SCALE = {"loss_scale": 1e3}
# Over all processes. In the sample-major order of DDPO half a minibatch, the share of one of two
# processes, holds whole samples of 3 trained steps. Else the pairs of a sample would lie in two
# minibatches on one process and in one on two, and the updates would differ.
SIZES = {
    "DDPO": {"minibatch_size": 12},
    "FlowGRPO": {"minibatch_size": 8},
    "TDPO": {"minibatch_size": 4},
    "LargeScaleRL": {"minibatch_size": 8, "pretraining_batch_size": 4},
    **{name: {"minibatch_size": 4} for name in ("ReFL", "DRaFT", "AlignProp", "DRTune")},
    "NablaGFlowNet": {"minibatch_size": 8},
    **{name: {"minibatch_size": 12} for name in ("AdjointMatching", "D3PO")},
    **{
        name: {"minibatch_size": 8}
        for name in ("DiffusionNFT", "AWM", "CRD", "DGPO", "OnlineDPO", "TPDM")
    },
}
# Updates to the middle of the first round, of 4 of TDPO's, 5 of LargeScaleRL's (there of the second
# task), and 2 of the others.
MIDDLE = {**dict.fromkeys(METHODS, 1), "TDPO": 2, "LargeScaleRL": 3}
ONLINE = ("DDPO", "FlowGRPO", "TDPO", "LargeScaleRL", "NablaGFlowNet", "AdjointMatching",
          "DiffusionNFT", "AWM", "CRD", "DGPO", "D3PO", "OnlineDPO", "TPDM")  # fmt: skip
RESET = 5  # updates
TIMEOUT = 1800  # seconds, of a machine that does other work too

# AdamW divides by sqrt(v) + eps. Gradients that are zero but for rounding (of biases before a
# softmax or a normalisation) would be blown up to steps of size lr with the default of 1e-8; the
# others are larger than this by orders.
EPS = 1e-6
# Schedules on which images take different numbers of steps, on either process.
UNEVEN = {"num_inference_steps": 12, "t_min": 0.2, "init_alpha": 1.5, "init_beta": 0.5}
FROZEN_BF16 = {"train": "lora", "policy_options": {"dtype": "bfloat16"}}


class Brightness(RewardModule):
    def forward(self, images, prompts, metadata=None, group_ids=None):
        return images.mean(dim=(1, 2, 3))


def make(method, rank=0, parts=1, **options):
    """Return a module for one of so many processes and accumulated minibatches."""
    if method == "TDPO":
        torch.manual_seed(rank)  # the critics start different, and must be made equal
        options["critic"] = tiny_critic()
    if method == "OnlineDPO":  # its reward model is trained too
        options |= {"reward": learned("linear"), "annotator": Colorfulness()}
    if method == "LargeScaleRL":
        other = Task(Brightness(), prompts_per_round=2, samples_per_prompt=4)
        options["tasks"] = {"color": Task(Colorfulness()), "brightness": other}
    sizes = {key: size // parts for key, size in SIZES[method].items()}
    # Rollouts in equal batches are equal bit by bit, else a pixel is rounded to another level now
    # and then.
    online = {"rollout_batch_size": 4} if method in ONLINE else SCALE
    clipped = {"clip_range": 1e-2} if method in ("DDPO", "FlowGRPO", "TDPO", "LargeScaleRL") else {}
    common = {**online, **clipped, "lr": 1e-3, "adam_epsilon": EPS}
    return make_method(method, **{**METHODS[method], **common, **sizes, **options})


def keep_rounds(module):
    """Return a list that fills with the samples of each round of each task, if it draws them."""
    rounds, collect = [], module.collect

    def recorded(batch, round_index):
        collected = collect(batch, round_index)
        kept = {"positions": collected.positions}
        if isinstance(collected, Trajectory):
            kept |= {"latents": collected.latents, "rewards": collected.rewards}
        rounds.append(kept)
        return collected

    module.collect = recorded
    return rounds


def run(
    folder, name, method, strategy=None, accumulate=1, resume=None, rounds=ROUNDS,
    precision="32-true", **options,
):  # fmt: skip
    """Train and write `NAME-RANK.pt` with samples, logs and weights, and checkpoints.

    They are `NAME/epoch=N.ckpt`, and of one process `NAME/step=N.ckpt` in the middle of a round; a
    run that is resumed writes none.
    Without a strategy it is the one process that the two must agree with.
    """
    processes = 1 if strategy is None else 2
    rank = int(os.environ["LOCAL_RANK"]) if processes > 1 else 0
    module = make(method, rank, processes * accumulate, **options)
    kept, recorder = keep_rounds(module), Recorder()
    configure = module.configure_model
    # Lightning calls it once per fit, validate, ...
    module.configure_model = lambda: (configure(), configure())
    every_round = {"every_n_epochs": 1, "save_on_train_epoch_end": True}
    savers = []
    if resume is None:
        savers.append(ModelCheckpoint(folder / name, "{epoch}", save_top_k=-1, **every_round))
    if resume is None and strategy is None:
        within = {"every_n_train_steps": MIDDLE[method]}
        savers.append(ModelCheckpoint(folder / name, "{step}", save_top_k=-1, **within))
    resets = [NeuronResetCallback(every_n_steps=RESET)] if method == "TDPO" else []
    trainer = make_trainer(
        max_epochs=rounds,
        devices=processes,
        strategy={None: "auto", "ddp": "ddp"}.get(strategy) or fsdp2(),
        accumulate_grad_batches=accumulate,
        gradient_clip_val=0.5,
        precision=precision,
        callbacks=[*resets, recorder, *savers],
        enable_checkpointing=resume is None,
    )
    experience = experience_of(module, rank, processes)
    trainer.fit(module, experience, ckpt_path=resume, weights_only=True)
    weights = {n: whole(p.detach()) for n, p in module.named_parameters() if p.requires_grad}
    logs = [{k: v for k, v in m.items() if "time/" not in k} for m in recorder.metrics]
    torch.save({"rounds": kept, "logs": logs, "weights": weights}, folder / f"{name}-{rank}.pt")
    return trainer


JUDGING = {
    "DiffusionDPO": "ddp",
    "FlowDPO": "fsdp2",
    "RewardModeling": "ddp",
}


def judge(folder, name, method, strategy=None):
    """Learn from judged images, and write `NAME-RANK.pt` with losses and weights."""
    processes = 1 if strategy is None else 2
    rank = int(os.environ["LOCAL_RANK"]) if processes > 1 else 0
    loader = Judgements(laps=2, rank=rank, world_size=processes)
    if method == "RewardModeling":
        module = RewardModeling(learned(), lr=1e-3)
        module.experience = lambda loader: loader
    else:
        # Errors of noise are nearly alike here, and their gradients small.
        options = {"ref_update": "ema", "ref_update_steps": 1, "lr": 1e-3, "adam_epsilon": 1e-3}
        chosen = FlowDPO if method == "FlowDPO" else DiffusionDPO
        module = make_dpo("sd3" if chosen is FlowDPO else "sd", "full", chosen, **options)
    recorder = Recorder()
    trainer = make_trainer(
        devices=processes,
        strategy={None: "auto", "ddp": "ddp"}.get(strategy) or fsdp2(),
        callbacks=[recorder],
    )
    trainer.fit(module, module.experience(loader))
    weights = {n: whole(p.detach()) for n, p in module.named_parameters() if p.requires_grad}
    torch.save({"logs": recorder.metrics, "weights": weights}, folder / f"{name}-{rank}.pt")


def watch(folder, name, strategy=None):
    """Train with what a run of the command line has around it: loggers, validation, callbacks."""
    processes = 1 if strategy is None else 2
    rank = int(os.environ["LOCAL_RANK"]) if processes > 1 else 0
    dealt = {"rank": rank, "world_size": processes}
    module = make_ddpo("sd3", rollout_batch_size=4, minibatch_size=8 // processes)
    trainer = make_trainer(
        devices=processes,
        strategy="auto" if strategy is None else fsdp2(),
        logger=CSVLogger(folder, name, version=0),
        callbacks=[CrossRewardCallback(), SampleGallery(num_prompts=2, every_n_rounds=1)],
    )
    validation = prompt_loader(shuffle=False, **dealt)
    trainer.fit(module, module.experience(prompt_loader(**dealt)), validation)
    (folder / f"{name}-{rank}.json").write_text(
        json.dumps({n: float(v) for n, v in trainer.callback_metrics.items()})
    )


def fsdp2():
    return ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False
    )


def checkpoint(folder, name, epoch):
    return folder / name / f"epoch={epoch}.ckpt"


def within_a_round(folder, method):
    return folder / f"{method}-one" / f"step={MIDDLE[method]}.ckpt"


def references(folder):
    """What one process makes of it."""
    for method in METHODS:
        run(folder, f"{method}-one", method)
    for method in JUDGING:
        judge(folder, f"{method}-one", method)
    run(folder, "uneven-one", "TPDM", rounds=1, **UNEVEN)
    watch(folder, "watched-one")


def both(folder):
    """Everything that two processes do, in turn."""
    for method, strategy in RUNS:
        name = f"{method}-{strategy}"
        run(folder, name, method, strategy)
        run(folder, f"{name}-resumed", method, strategy, resume=within_a_round(folder, method))
    for method, strategy in JUDGING.items():
        judge(folder, f"{method}-both", method, strategy)
    for strategy in STRATEGIES:
        run(folder, f"TDPO-{strategy}-accumulated", "TDPO", strategy, accumulate=2, rounds=1)
    run(folder, "uneven", "TPDM", "fsdp2", rounds=1, **UNEVEN)
    run(folder, "frozen-bf16", "TDPO", "fsdp2", rounds=1, precision="bf16-mixed", **FROZEN_BF16)
    run(folder, "all-bf16", "TDPO", "fsdp2", rounds=1, precision="bf16-true")
    watch(folder, "watched-fsdp2", "fsdp2")
    trainer = make_trainer(devices=2, strategy=ModelParallelStrategy())  # "auto": tensor parallel
    with pytest.raises(ValueError, match="data parallelism only") as refused:
        trainer.fit(make_ddpo("sd3", rollout_batch_size=4), prompt_loader())
    (folder / "refused.txt").write_text(str(refused.value))


def launch_both(folder):
    """Run `both` in two processes of one node, forked from one that has imported all they need."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    node = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2",
            "NODE_RANK": "0"}  # fmt: skip
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOADED)
    pair = [
        server.Process(target=_as_one_of_two, args=(folder, {**node, "LOCAL_RANK": str(rank)}))
        for rank in range(2)
    ]
    for process in pair:
        process.start()
    end = time.monotonic() + TIMEOUT
    for process in pair:
        process.join(max(0, end - time.monotonic()))
    for process in pair:
        process.kill()  # does nothing to one that has ended
        process.join()
    for rank, process in enumerate(pair):
        assert process.exitcode == 0, (folder / f"output-{rank}.txt").read_text()[-10_000:]


def _as_one_of_two(folder, environment):
    os.environ |= environment
    torch.set_num_threads(1)
    rank = environment["LOCAL_RANK"]
    sys.stdout = sys.stderr = (folder / f"output-{rank}.txt").open("w", buffering=1)
    both(folder)

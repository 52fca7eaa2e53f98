"""Short runs on one process or two, and what they leave behind to be compared.

python -m tests.distributed.scenarios FOLDER       as one of two processes, see `launch`
"""

import json
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from lit_align.algorithms import DDPO
from lit_align.algorithms.sharding import whole
from lit_align.callbacks import CrossRewardCallback, SampleGallery
from lit_align.rewards import Colorfulness
from tests.algorithms.harness import make_ddpo, make_trainer, prompt_loader
from tests.conftest import tiny_policy

ROOT = Path(__file__).parent.parent.parent
FAMILIES = {"sd": "lora", "sd3": "full"}
STRATEGIES = ("ddp", "fsdp2")
ROUNDS = 3
# Per minibatch, over all processes: half of them, and half of that again, are whole samples of 3
# (DDIM) or 2 (flow matching) trained steps. Else the pairs of a sample would lie in two minibatches
# on one process and in one on two, and the updates would differ.
PAIRS = {"sd": 12, "sd3": 8}
TIMEOUT = 300  # seconds

# AdamW divides by sqrt(v) + eps. Gradients that are zero but for rounding (of biases before a
# softmax or a normalisation) would be blown up to steps of size lr with the default of 1e-8; the
# others are larger than this by orders.
EPS = 1e-6
FROZEN_BF16 = {"train": "lora", "dtype": "bfloat16"}


class WithCritic(DDPO):
    """DDPO that also fits a small network, with a learning rate of its own, to the advantages."""

    def __init__(self, policy, reward, **options):
        super().__init__(policy, reward, **options)
        self.critic = nn.Sequential(nn.Linear(256, 8), nn.Tanh(), nn.Linear(8, 1))
        self.rounds = []

    def configure_model(self):
        super().configure_model()
        super().configure_model()  # Lightning calls it once per fit, validate, ...

    def configure_optimizers(self):
        policy = [p for p in self.policy.parameters() if p.requires_grad]
        critic = {"params": list(self.critic.parameters()), "lr": 2 * self.lr}
        return torch.optim.AdamW([critic, {"params": policy}], lr=self.lr, eps=EPS)

    def loss(self, minibatch):
        loss, logs = super().loss(minibatch)
        values = self.critic(minibatch.latents.flatten(1)).squeeze(1)
        return loss + (values - minibatch.advantages).square().mean(), logs

    def collect(self, batch, round_index):
        trajectory = super().collect(batch, round_index)
        self.rounds.append(
            {
                "positions": trajectory.batch.positions,
                "latents": trajectory.latents,
                "rewards": trajectory.rewards,
            }
        )
        return trajectory


def run(
    folder, name, family, strategy=None, accumulate=1, resume=None, rounds=ROUNDS,
    precision="32-true", **policy_options,
):  # fmt: skip
    """Train and write `NAME-RANK.pt` with samples and weights, and checkpoints `NAME/epoch=N.ckpt`.

    Without a strategy it is the one process that the two must agree with.
    """
    processes = 1 if strategy is None else 2
    rank = int(os.environ["LOCAL_RANK"]) if processes > 1 else 0
    sizes = {"rollout_batch_size": 8 // processes, "clip_range": 1e-2, "beta": 0.1, "lr": 1e-3}
    policy = tiny_policy(family, **{"train": FAMILIES[family], **policy_options})
    torch.manual_seed(rank)  # the critics start different, and must be made equal
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # modules passed as arguments, which is meant
        module = WithCritic(
            policy,
            Colorfulness(),
            num_inference_steps=3,
            guidance_scale=1.0,
            prompts_per_round=4,
            samples_per_prompt=2,
            minibatch_size=PAIRS[family] // processes // accumulate,
            advantage_norm="batch",
            **sizes,
        )
    trainer = make_trainer(
        max_epochs=rounds,
        devices=processes,
        strategy={None: "auto", "ddp": "ddp"}.get(strategy) or fsdp2(),
        accumulate_grad_batches=accumulate,
        gradient_clip_val=0.5,
        precision=precision,
        callbacks=[
            ModelCheckpoint(
                folder / name, "{epoch}", every_n_epochs=1, save_top_k=-1,
                save_on_train_epoch_end=True,
            )
        ],
        enable_checkpointing=True,
    )  # fmt: skip
    loader = prompt_loader(rank=rank, world_size=processes)
    trainer.fit(module, module.experience(loader), ckpt_path=resume)
    weights = {n: whole(p.detach()) for n, p in module.named_parameters() if p.requires_grad}
    torch.save({"rounds": module.rounds, "weights": weights}, folder / f"{name}-{rank}.pt")
    return trainer


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


def references(folder):
    """What one process makes of it."""
    for family in FAMILIES:
        run(folder, f"{family}-one", family)
    watch(folder, "watched-one")


def both(folder):
    """Everything that two processes do, in turn."""
    for family in FAMILIES:
        whole_round = checkpoint(folder, f"{family}-one", 1)
        for strategy in STRATEGIES:
            name = f"{family}-{strategy}"
            run(folder, name, family, strategy)
            run(folder, f"{name}-resumed", family, strategy, resume=whole_round)
    for strategy in STRATEGIES:
        run(folder, f"sd3-{strategy}-accumulated", "sd3", strategy, accumulate=2, rounds=1)
    run(folder, "frozen-bf16", "sd3", "fsdp2", rounds=1, precision="bf16-mixed", **FROZEN_BF16)
    run(folder, "all-bf16", "sd3", "fsdp2", rounds=1, precision="bf16-true")
    watch(folder, "watched-fsdp2", "fsdp2")
    trainer = make_trainer(devices=2, strategy=ModelParallelStrategy())  # "auto": tensor parallel
    with pytest.raises(ValueError, match="data parallelism only") as refused:
        trainer.fit(make_ddpo("sd3", rollout_batch_size=4), prompt_loader())
    (folder / "refused.txt").write_text(str(refused.value))


def launch(command, **environment):
    """Run a command as two processes of one node; return their outputs."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    shared = {
        **os.environ,
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"},
        **{"NODE_RANK": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        **environment,
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    pair = [
        subprocess.Popen(command, env={**shared, "LOCAL_RANK": str(rank)}, **pipes)
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=TIMEOUT)[0] for process in pair]
    finally:
        for process in pair:
            process.kill()
    for process, output in zip(pair, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs


def launch_both(folder):
    launch([sys.executable, "-m", "tests.distributed.scenarios", str(folder)])


if __name__ == "__main__":
    both(Path(sys.argv[1]))

import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_align.callbacks import RNGStateCallback
from lit_align.callbacks.rng_state import rng_state, set_rng_state, undisturbed_rng
from lit_align.rewards import RewardModule
from tests.algorithms.harness import make_ddpo, make_trainer, prompt_loader


def seed(number):
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def draws():
    """Return numbers from each generator, normal ones too: they are drawn in pairs."""
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(),
            torch.rand(()).item(), torch.randn(()).item()]  # fmt: skip


class Moody(RewardModule):
    """Adds noise from the global generators."""

    def __init__(self):
        super().__init__()
        self.given = []

    def forward(self, images, prompts, metadata=None, group_ids=None):
        noise = torch.tensor(draws(), dtype=torch.float32).sum() + torch.randn(len(images))
        if self.training:
            self.given.append(noise)
        return images.mean(dim=(1, 2, 3)) + noise


def run(epochs, folder, callbacks, ckpt_path=None):
    reward = Moody()
    module = make_ddpo(reward=reward)
    saving = ModelCheckpoint(folder / str(epochs), save_on_train_epoch_end=True)
    trainer = make_trainer(callbacks=[*callbacks, saving], max_epochs=epochs,
                           enable_checkpointing=True)  # fmt: skip
    seed(5)
    trainer.fit(module, module.experience(prompt_loader()), ckpt_path=ckpt_path, weights_only=True)
    weights = torch.cat([p.flatten() for p in module.parameters() if p.requires_grad])
    return saving.best_model_path, reward.given, weights.detach()


@pytest.mark.parametrize("kept", [True, False])
def test_global_randomness_continues_after_a_resume(kept, tmp_path):
    callbacks = [RNGStateCallback()] if kept else []
    _, whole, weights = run(2, tmp_path, callbacks)
    path, first, _ = run(1, tmp_path, callbacks)
    _, second, resumed = run(2, tmp_path, callbacks, path)
    assert torch.equal(first[0], whole[0])
    assert torch.equal(second[0], whole[1]) == kept
    assert torch.equal(resumed, weights) == kept


def test_every_state_survives_a_file_that_holds_no_code(tmp_path):
    seed(1)
    draws()  # leaves half of a pair of normal numbers behind
    torch.save(rng_state(), tmp_path / "state.pt")
    expected = [draws(), draws()]
    seed(2)
    assert draws() != expected[0]
    set_rng_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [draws(), draws()] == expected


def test_what_is_drawn_inside_leaves_no_trace():
    seed(1)
    expected = draws()
    seed(1)
    with pytest.raises(KeyError), undisturbed_rng():  # noqa: PT012
        draws()
        raise KeyError
    assert draws() == expected


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_each_rank_gets_its_own_state_and_new_ranks_keep_their_seed(rank):
    class Ranked:
        global_rank = rank

    states, expected = [], []
    for number in range(2):
        seed(number)
        states.append(rng_state())
        expected.append(draws())
    callback = RNGStateCallback()
    callback.load_state_dict({"ranks": states})
    seed(7)
    unchanged = draws()
    seed(7)
    callback.on_train_start(Ranked(), None)
    assert draws() == [*expected, unchanged][rank]
    seed(7)
    callback.on_train_start(Ranked(), None)  # a second fit continues without the old state
    assert draws() == unchanged


def gather(rank, folder):
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.manual_seed(rank)
    state = RNGStateCallback().state_dict()
    if rank == 0:
        torch.save(state, f"{folder}/state.pt")
    dist.destroy_process_group()


def test_states_of_all_processes_are_collected(tmp_path):
    torch.multiprocessing.spawn(gather, (str(tmp_path),), nprocs=2)
    states = torch.load(tmp_path / "state.pt", weights_only=True)["ranks"]
    assert len(states) == 2
    for number, state in enumerate(states):
        assert torch.equal(state["torch"], torch.manual_seed(number).get_state())

import copy

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lit_align.callbacks import AdapterEMA
from lit_align.callbacks.ema import stored_average
from tests.algorithms.harness import fit, make_ddpo, make_trainer, prompt_loader


def trainable(module):
    return {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}


def assert_equal(left, right):
    assert left.keys() == right.keys()
    assert left
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def different(left, right):
    return any(not torch.equal(tensor, right[name]) for name, tensor in left.items())


class Recorder(Callback):
    """Keeps the weights at every optimiser step, before and during each validation."""

    def __init__(self):
        self.steps, self.validated, self.after = [], [], []

    def on_train_start(self, trainer, pl_module):
        self.steps.append(trainable(pl_module))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append(trainable(pl_module))

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.validated.append(trainable(pl_module))

    def on_train_epoch_end(self, trainer, pl_module):
        self.after.append(trainable(pl_module))


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        # Of w0..w3 in ema = 0.5 ema + 0.5 w, from w0.
        ({}, [0.125, 0.125, 0.25, 0.5]),
        ({"every_n_steps": 2}, [0.5, 0, 0.5, 0]),
        ({"start_step": 2}, [0, 0, 0.5, 0.5]),
        ({"start_step": 1, "every_n_steps": 2}, [0, 0.5, 0, 0.5]),
        ({"decay": 0.0}, [0, 0, 0, 1]),
    ],
)
def test_average_by_hand(options, weights):
    ema, recorder = AdapterEMA(**{"decay": 0.5, **options}), Recorder()
    fit(make_ddpo(), callbacks=[ema, recorder])
    assert len(recorder.steps) == 4
    for name, average in ema.average.items():
        expected = sum(w * step[name] for w, step in zip(weights, recorder.steps, strict=True))
        torch.testing.assert_close(average, expected, atol=1e-7, rtol=1e-6)
    assert different(ema.average, recorder.steps[0])


def test_accumulated_minibatches_are_one_step():
    ema, recorder = AdapterEMA(decay=0.5), Recorder()
    fit(make_ddpo(), callbacks=[ema, recorder], accumulate_grad_batches=3)
    for name, average in ema.average.items():
        expected = (recorder.steps[0][name] + recorder.steps[-1][name]) / 2
        torch.testing.assert_close(average, expected, atol=1e-7, rtol=1e-6)


def test_the_average_is_validated_and_the_trained_weights_go_on():
    runs = {}
    for evaluate in (True, False):
        ema, recorder = AdapterEMA(decay=0.9, evaluate=evaluate), Recorder()
        module = make_ddpo()
        fit(module, val=True, callbacks=[ema, recorder], max_epochs=2)
        runs[evaluate] = recorder
        validated = ema.average if evaluate else recorder.steps[-1]
        assert_equal(recorder.validated[-1], validated)
        assert different(ema.average, recorder.steps[-1])
        assert_equal(recorder.after[-1], recorder.steps[-1])
        assert_equal(trainable(module), recorder.steps[-1])
    for left, right in zip(runs[True].steps, runs[False].steps, strict=True):
        assert_equal(left, right)


def test_the_weights_of_a_run_are_the_same_with_and_without_it():
    runs = []
    for callbacks in ([], [AdapterEMA(decay=0.5)]):
        module = make_ddpo()
        fit(module, val=True, callbacks=callbacks, max_epochs=2)
        runs.append(trainable(module))
    assert_equal(*runs)


def test_before_its_start_the_trained_weights_are_validated():
    ema, recorder = AdapterEMA(decay=0.5, start_step=100), Recorder()
    fit(make_ddpo(), val=True, callbacks=[ema, recorder])
    assert ema.average == {}
    assert_equal(recorder.validated[-1], recorder.steps[-1])


@pytest.mark.parametrize("start_step", [0, 4])
def test_resume_equals_the_run_without_a_break(start_step, tmp_path):
    def run(epochs, ckpt_path=None):
        ema, recorder, module = AdapterEMA(0.9, start_step=start_step), Recorder(), make_ddpo()
        saving = ModelCheckpoint(tmp_path / str(epochs), save_on_train_epoch_end=True)
        options = {"max_epochs": epochs, "enable_checkpointing": True}
        trainer = make_trainer(callbacks=[ema, recorder, saving], **options)
        loaders = (module.experience(prompt_loader()), prompt_loader(shuffle=False))
        trainer.fit(module, *loaders, ckpt_path=ckpt_path, weights_only=True)
        return saving.best_model_path, ema, recorder

    _, whole, whole_recorder = run(2)
    path, half, half_recorder = run(1)
    stored = torch.load(path, weights_only=True)
    if start_step == 0:
        assert_equal(stored_average(stored), half.average)
        assert_equal(stored["state_dict"], half_recorder.steps[-1])
    else:
        with pytest.raises(ValueError, match="no averaged weights.*`start_step`"):
            stored_average(stored)
    _, resumed, resumed_recorder = run(2, path)
    assert_equal(resumed.average, whole.average)
    assert_equal(resumed_recorder.validated[-1], whole_recorder.validated[-1])
    assert_equal(resumed_recorder.steps[-1], whole_recorder.steps[-1])


class Interruption(Callback):
    """Makes a checkpoint during validation, as a signal may ask for, and then fails."""

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        # A copy, as a file would be: the weights in it are those of the module.
        self.checkpoint = copy.deepcopy(trainer._checkpoint_connector.dump_checkpoint())
        raise KeyError("interrupted")


def test_whatever_happens_in_validation_the_trained_weights_are_saved_and_back():
    ema, recorder, interruption = AdapterEMA(decay=0.5), Recorder(), Interruption()
    module = make_ddpo()
    with pytest.raises(KeyError, match="interrupted"):
        fit(module, val=True, callbacks=[ema, recorder, interruption])
    assert_equal(trainable(module), recorder.steps[-1])
    assert_equal(interruption.checkpoint["state_dict"], recorder.steps[-1])
    assert_equal(stored_average(interruption.checkpoint), ema.average)


def test_applied_is_a_context():
    ema, module = AdapterEMA(decay=0.5), make_ddpo()
    before = trainable(module)
    with ema.applied(module):  # nothing to apply yet
        assert_equal(trainable(module), before)
    fit(module, callbacks=[ema])
    trained = trainable(module)
    with pytest.raises(KeyError), ema.applied(module):  # noqa: PT012
        assert_equal(trainable(module), ema.average)
        with ema.applied(module):
            assert_equal(trainable(module), ema.average)
        assert_equal(trainable(module), ema.average)
        raise KeyError
    assert_equal(trainable(module), trained)


def test_a_new_run_starts_a_new_average():
    ema, recorder = AdapterEMA(decay=0.5), Recorder()
    fit(make_ddpo(lr=0.1), callbacks=[ema])
    first = ema.average
    fit(make_ddpo(lr=0.0), callbacks=[ema, recorder])
    assert different(ema.average, first)
    assert_equal(ema.average, recorder.steps[0])


def test_a_young_average_forgets_its_start():
    # After n = 1, 2, 3 updates the past weighs (1 + n) / (10 + n), at most 0.3.
    ema, recorder = AdapterEMA(decay=0.3, warm_up=True), Recorder()
    fit(make_ddpo(), callbacks=[ema, recorder])
    expected = recorder.steps[0]
    for decay, step in zip((2 / 11, 3 / 12, 0.3), recorder.steps[1:], strict=True):
        expected = {n: decay * a + (1 - decay) * step[n] for n, a in expected.items()}
    for name, average in ema.average.items():
        torch.testing.assert_close(average, expected[name], atol=1e-7, rtol=1e-6)


class Progress:
    """What the callback reads of a trainer."""

    def __init__(self, global_step):
        self.global_step = global_step


def test_half_precision_weights_are_averaged_in_float32():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))

    module, ema = Half(), AdapterEMA(decay=0.999)
    ema.on_train_start(Progress(0), module)
    module.weight.data.fill_(2)
    ema.on_train_batch_end(Progress(1), module, None, None, 0)
    torch.testing.assert_close(ema.average["weight"], torch.full((3,), 1.001))
    with ema.applied(module):
        assert module.weight.tolist() == [1, 1, 1]
    assert module.weight.tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    "options", [{"decay": 1.0}, {"decay": -0.1}, {"every_n_steps": 0}, {"start_step": -1}]
)
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        AdapterEMA(**options)


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0,
                            world_size=1)  # fmt: skip
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_sharded_weights_are_averaged_and_stored_whole(mesh):
    """The outermost module of FSDP2 stays gathered after a forward: it must forget that."""
    module = nn.Sequential(nn.Linear(2, 1, bias=False))
    nn.init.ones_(module[0].weight)
    fully_shard(module, mesh=mesh)
    ema, ones = AdapterEMA(decay=0.5), torch.ones(1, 2)
    ema.on_train_start(Progress(0), module)
    with torch.no_grad():
        module[0].weight.mul_(3)
        assert module(ones).item() == 6
    ema.on_train_batch_end(Progress(1), module, None, None, 0)
    state = ema.state_dict()
    assert type(state["average"]["0.weight"]) is torch.Tensor
    assert state["average"]["0.weight"].tolist() == [[2, 2]]
    resumed = AdapterEMA(decay=0.5)
    resumed.load_state_dict(state)
    resumed.on_train_start(Progress(1), module)
    assert isinstance(resumed.average["0.weight"], DTensor)
    with torch.no_grad():
        with resumed.applied(module):
            assert module(ones).item() == 4
        assert module(ones).item() == 6

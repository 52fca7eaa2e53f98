import copy
import itertools

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lit_align.callbacks import NeuronResetCallback
from lit_align.callbacks.neuron_reset import (
    dormancy_logs,
    dormant_neurons,
    find_layers,
    overwrite,
    reset_entries,
)
from tests.algorithms.harness import fit, make_ddpo, make_trainer
from tests.conftest import GOLDEN, tiny_policy

WIDTHS = (6, 5, 4, 3, 1)
NEURONS = {"0": 5, "2": 4, "4": 3}  # by layer, all but the last


def mlp(widths=WIDTHS):
    layers = [
        part for pair in itertools.pairwise(widths) for part in (nn.Linear(*pair), nn.Dropout(0.2))
    ]
    return nn.Sequential(*layers[:-1])


class Critic(nn.Module):
    """A critic as a list of layers, called with keys that it does not need in eval mode."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(WIDTHS))
        self.init_std = 0.01

    def forward(self, values, keys):
        assert len(keys["seeds"]) == len(values)
        for layer in self.layers:
            values = layer(values)
        return values


class Regression(LightningModule):
    """Trains a critic; `frozen` and `other` are never touched."""

    def __init__(self, critic=None):
        super().__init__()
        self.critic = mlp() if critic is None else critic
        self.other = nn.Linear(6, 1)
        self.logged = {}

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        extra = ({"seeds": torch.arange(len(inputs))},) if isinstance(self.critic, Critic) else ()
        return (self.critic(inputs, *extra) + self.other(inputs) - targets).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def log(self, name, value, **options):
        self.logged.setdefault(self.trainer.global_step, {})[name] = float(value)
        super().log(name, value, **options)


class Snapshot(Callback):
    """Keeps weights and the optimiser's states after every step, as its neighbours see them."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights = copy.deepcopy(dict(pl_module.state_dict()))
        names = {p: n for n, p in pl_module.named_parameters()}
        state = trainer.optimizers[0].state
        self.states = {names[p]: copy.deepcopy(dict(s)) for p, s in state.items()}
        self.rng = torch.get_rng_state()
        self.training = {n: m.training for n, m in pl_module.named_modules()}


def batches(size=4, number=12):
    generator = torch.Generator().manual_seed(1)
    data = [torch.randn(size * number, width, generator=generator) for width in (6, 1)]
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), batch_size=size)


def train(callback, module=None, steps=2, **options):
    torch.manual_seed(0)
    module = module or Regression()
    make_trainer(max_steps=steps, max_epochs=-1, callbacks=[callback], **options).fit(
        module, batches()
    )
    return module


def around_a_reset(module=None, steps=2, **options):
    """Return a callback and what was before and after its reset at the last step."""
    torch.manual_seed(0)
    callback = NeuronResetCallback(every_n_steps=steps, **options)
    before, after = Snapshot(), Snapshot()
    module = module or Regression()
    trainer = make_trainer(
        max_steps=steps, max_epochs=-1, callbacks=[before, callback, after], log_every_n_steps=1
    )
    trainer.fit(module, batches())
    return callback, before, after


def chosen_masks(callback, mode):
    choose = {"active": lambda m: ~m, "dormant": lambda m: m, "all": lambda m: m | True}[mode]
    return {name: choose(mask) for name, mask in callback.dormant.items()}


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.5])
def test_dormant_neurons_are_those_of_the_official_code(threshold):
    # golden/neuron_masks.npz, keys dormant/<threshold>/<layer>: ZiyiZhang27/tdpo, an MLP
    # 32-64-16-8-1 without activations.
    golden = np.load(GOLDEN / "neuron_masks.npz")
    values = torch.from_numpy(golden["input"])
    for layer in ("0", "2", "4"):
        weight, bias = (golden[f"state/{layer}.{name}"] for name in ("weight", "bias"))
        values = values @ torch.from_numpy(weight).T + torch.from_numpy(bias)
        expected = torch.from_numpy(golden[f"dormant/{threshold}/{layer}"])
        assert torch.equal(dormant_neurons(values, threshold), expected)


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.5])
def test_a_run_measures_the_same_as_the_official_code(threshold):
    golden = np.load(GOLDEN / "neuron_masks.npz")
    rate = 0.1
    module = Regression(
        nn.Sequential(
            nn.Linear(32, 64), nn.Dropout(rate), nn.Linear(64, 16), nn.Dropout(rate),
            nn.Linear(16, 8), nn.Linear(8, 1),
        )
    )  # fmt: skip
    state = {n: torch.from_numpy(golden[f"state/{n}"]) for n in module.critic.state_dict()}
    module.critic.load_state_dict(state)
    module.other = nn.Linear(32, 1)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    callback = NeuronResetCallback(tau=threshold, every_n_steps=1, probe_size=128, mode="none")
    data = torch.utils.data.TensorDataset(torch.from_numpy(golden["input"]), torch.ones(128, 1))
    make_trainer(max_steps=1, callbacks=[callback]).fit(
        module, torch.utils.data.DataLoader(data, batch_size=128)
    )
    assert list(callback.dormant) == ["0", "2", "4"]  # not the output layer
    for layer, mask in callback.dormant.items():
        assert torch.equal(mask, torch.from_numpy(golden[f"dormant/{threshold}/{layer}"]))


def test_dormancy_by_hand():
    # Scores 0, 1, 2, 9 of mean 3: relative 0, 1/3, 2/3, 3.
    activations = torch.tensor([[-1.0, 2.0, 4.0, 9.0], [-5.0, -3.0, -1.0, 9.0]])
    for tau, dormant in ((0.0, 1), (0.34, 2), (0.67, 3), (3.0, 4)):
        assert dormant_neurons(activations, tau).tolist() == [n < dormant for n in range(4)]


def test_all_neurons_of_a_dead_layer_are_dormant():
    assert dormant_neurons(torch.zeros(3, 5), 0.0).all()
    assert dormant_neurons(-torch.rand(3, 5), 0.0).all()


def test_logs_by_hand():
    dormant = {"a": torch.tensor([True, True, False, False]), "b": torch.tensor([False, False])}
    previous = {"b": torch.tensor([True, False]), "a": torch.tensor([True, False, True, True])}
    logs = {name: value.item() for name, value in dormancy_logs(dormant, previous).items()}
    # In common: the first of "a"; the smaller sets are 2 of "a", 2 of all, and none of "b".
    assert logs == {
        "reset/dormant/a": 0.5,
        "reset/dormant/b": 0.0,
        "reset/dormant": pytest.approx(1 / 3),
        "reset/overlap/a": 0.5,
        "reset/overlap": 0.5,
    }
    assert not any("overlap" in name for name in dormancy_logs(dormant, {}))
    many = {str(n): torch.tensor([True, n > 0]) for n in range(17)}
    assert set(dormancy_logs(many, many)) == {"reset/dormant", "reset/overlap"}


def test_entries_are_rows_and_columns():
    rows, columns = torch.tensor([True, False]), torch.tensor([False, False, True])
    expected = torch.tensor([[True, True, True], [False, False, True]])
    assert torch.equal(reset_entries(torch.Size([2, 3]), rows, columns), expected)
    kernels = reset_entries(torch.Size([2, 3, 4, 4]), rows, columns)
    assert torch.equal(kernels, expected[..., None, None].expand(2, 3, 4, 4))


def named(layers):
    return [(layer.name, layer.has_neurons, layer.fed_by) for layer in layers]


def test_linear_layers_that_feed_each_other_are_chains():
    parts = [nn.Linear(2, 3), nn.LayerNorm(3), nn.ReLU(), nn.Linear(3, 4), nn.PReLU()]
    parts += [nn.Linear(5, 6), nn.Conv2d(1, 1, 1), nn.Linear(6, 2), nn.Linear(2, 1)]
    assert named(find_layers(nn.Sequential(*parts))) == [
        ("0", True, None),
        ("3", False, "0"),
        ("7", True, None),
        ("8", False, "7"),
        ("5", True, None),  # 5 inputs from 4 outputs: another chain, that a convolution ends
        ("6", True, None),
    ]
    critic = Critic()
    expected = [("0", True, None), ("1", True, "0"), ("2", True, "1"), ("3", False, "2")]
    assert named(find_layers(critic)) == [
        (f"layers.{name}", neurons, fed and f"layers.{fed}") for name, neurons, fed in expected
    ]
    critic.again = nn.Sequential(*critic.layers)
    assert len(find_layers(critic)) == 4
    assert named(find_layers(nn.Linear(2, 1))) == [("self", True, None)]
    critic.layers[1].requires_grad_(False)
    assert [layer.name for layer in find_layers(critic)] == ["layers.2", "layers.3", "layers.0"]


@pytest.mark.parametrize("mode", ["active", "dormant", "all"])
@pytest.mark.parametrize("outgoing", ["resample", "zero", "keep"])
def test_which_entries_change(mode, outgoing):
    callback, before, after = around_a_reset(mode=mode, outgoing=outgoing, tau=0.5)
    masks = chosen_masks(callback, mode)
    assert {name: len(mask) for name, mask in masks.items()} == NEURONS
    assert any(mask.any() for mask in masks.values())
    changed = {n: before.weights[n] != after.weights[n] for n in before.weights}
    for name, fed_by, width in (("0", "", 6), ("2", "0", 5), ("4", "2", 4), ("6", "4", 3)):
        rows = masks.get(name, torch.zeros(1, dtype=torch.bool))
        columns = masks.get(fed_by, torch.zeros(width, dtype=torch.bool))
        outside = columns if outgoing != "keep" else columns & False
        assert torch.equal(changed[f"critic.{name}.weight"], rows[:, None] | outside)
        bias = after.weights[f"critic.{name}.bias"]
        assert torch.equal(changed[f"critic.{name}.bias"], rows)
        assert (bias[rows] == 0).all()
        led = after.weights[f"critic.{name}.weight"][~rows][:, columns]
        if outgoing == "zero":
            assert (led == 0).all()
    assert not changed["critic.6.bias"].any()
    assert not changed["other.weight"].any()
    assert not changed["other.bias"].any()


def test_active_and_dormant_neurons_are_all_neurons():
    changed = {}
    for mode in ("active", "dormant", "all"):
        _, before, after = around_a_reset(mode=mode, outgoing="keep", tau=0.5)
        changed[mode] = {n: before.weights[n] != after.weights[n] for n in before.weights}
    assert any(mask.any() for mask in changed["active"].values())
    assert any(mask.any() for mask in changed["dormant"].values())
    for name, everything in changed["all"].items():
        assert torch.equal(changed["active"][name] ^ changed["dormant"][name], everything)


def test_without_a_mode_it_only_measures():
    callback, before, after = around_a_reset(mode="none")
    assert callback.dormant.keys() == NEURONS.keys()
    assert all(torch.equal(before.weights[n], after.weights[n]) for n in before.weights)


@pytest.mark.parametrize("reset_moments", [True, False])
@pytest.mark.parametrize("reset_step", [True, False])
def test_moments_are_zero_exactly_there(reset_moments, reset_step):
    options = {"reset_moments": reset_moments, "reset_step": reset_step}
    _, before, after = around_a_reset(mode="dormant", tau=0.5, **options)
    assert before.states.keys() == after.states.keys()
    for name, state in after.states.items():
        entries = before.weights[name] != after.weights[name]
        for key in ("exp_avg", "exp_avg_sq"):
            old = before.states[name][key]
            assert old.any()
            expected = old.where(~entries, 0) if reset_moments else old
            assert torch.equal(state[key], expected)
        assert state["step"] == (0 if reset_step and entries.any() else 2)


def test_global_randomness_is_left_alone():
    module = Regression(nn.Sequential(*[Noisy(), *mlp()]))
    _, before, after = around_a_reset(module, mode="all")
    assert torch.equal(before.rng, after.rng)
    assert before.training == after.training


class Noisy(nn.Module):
    def forward(self, values):
        return values + 1e-3 * torch.randn_like(values)


def test_training_flags_are_left_alone():
    module = Regression()
    modes = []
    module.critic.register_forward_hook(
        lambda critic, *_: modes.append([part.training for part in critic])
    )
    torch.manual_seed(0)
    callback, flags = NeuronResetCallback(every_n_steps=1, mode="none"), Snapshot()

    class Mixed(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.critic[1].eval()

    trainer = make_trainer(max_steps=1, callbacks=[Mixed(), callback, flags])
    trainer.fit(module, batches())
    assert modes == [[True, False, *[True] * 5], [False] * 7]  # training, measurement
    assert flags.training["critic"]
    assert not flags.training["critic.1"]
    assert flags.training["critic.3"]
    assert not module.critic._forward_pre_hooks
    assert not module.critic[0]._forward_hooks


@pytest.mark.parametrize("fresh_draws", [True, False])
def test_each_reset_draws_the_same_unless_told_otherwise(fresh_draws):
    drawn = [
        around_a_reset(mode="all", fresh_draws=fresh_draws, steps=steps)[2].weights
        for steps in (2, 4)
    ]
    for layer in NEURONS:
        name = f"critic.{layer}.weight"
        assert torch.equal(drawn[0][name], drawn[1][name]) != fresh_draws
    other = around_a_reset(mode="all", seed=1)[2].weights
    assert not torch.equal(drawn[0]["critic.0.weight"], other["critic.0.weight"])


@pytest.mark.parametrize("source", ["argument", "attribute", "fan_in"])
def test_standard_deviation(source):
    critic = mlp((6, 400, 300, 1))
    if source != "fan_in":
        critic.init_std = 0.3
    init_std = 0.02 if source == "argument" else None
    _, _, after = around_a_reset(Regression(critic), mode="all", init_std=init_std)
    for name, fan_in in (("0", 6), ("2", 400), ("4", 300)):
        std = {"argument": 0.02, "attribute": 0.3, "fan_in": (3 * fan_in) ** -0.5}[source]
        weight = after.weights[f"critic.{name}.weight"]
        error = std / (2 * weight.numel()) ** 0.5
        assert weight.std().item() == pytest.approx(std, abs=4 * error)
        assert weight.mean().abs() < 4 * std / weight.numel() ** 0.5


def test_a_reset_critic_is_called_as_in_training():
    """With what it was called with, cut to a few rows: dictionaries too."""
    module = Regression(Critic())
    callback, before, after = around_a_reset(module, mode="all", probe_size=3)
    assert set(callback.dormant) == {"layers.0", "layers.1", "layers.2"}
    assert after.weights["critic.layers.0.weight"].std() < 0.02
    assert not torch.equal(
        before.weights["critic.layers.3.weight"], after.weights["critic.layers.3.weight"]
    )


def test_steps_of_measurements_and_resets():
    module = Regression()
    options = {"every_n_steps": 4, "probe_every_n_steps": 2, "extra_tau": 2.0, "tau": 0.5}
    callback = NeuronResetCallback(mode="dormant", **options)
    train(callback, module, steps=9, log_every_n_steps=1)
    assert list(module.logged) == [2, 4, 6, 8]
    assert callback.probed_step == 8
    for step, logs in module.logged.items():
        shares = [logs[f"reset/dormant/{name}"] for name in NEURONS]
        assert all(0 <= share <= 1 for share in shares)
        number = sum(s * n for s, n in zip(shares, NEURONS.values(), strict=True))
        assert logs["reset/dormant"] == pytest.approx(number / 12)
        assert logs["reset/dormant_extra"] >= logs["reset/dormant"]
        assert ("reset/count" in logs) == (step % 4 == 0)
        if step % 4 == 0:
            assert logs["reset/count"] == pytest.approx(number)
        assert ("reset/overlap" in logs) == (step > 2)
        assert 0 <= logs.get("reset/overlap", 0) <= 1


def test_accumulated_batches_are_one_step():
    module = Regression()
    callback = NeuronResetCallback(mode="none", every_n_steps=2)
    train(callback, module, steps=3, accumulate_grad_batches=3)
    assert list(module.logged) == [2]


def test_resume_equals_the_run_without_a_break(tmp_path):
    def run(epochs, ckpt_path=None):
        torch.manual_seed(0)
        module = Regression(Critic())
        options = {"mode": "dormant", "every_n_steps": 4, "probe_every_n_steps": 2, "tau": 0.5}
        callback = NeuronResetCallback(**options)
        saving = ModelCheckpoint(tmp_path / str(epochs), save_on_train_epoch_end=True)
        callbacks = {"callbacks": [callback, saving], "enable_checkpointing": True}
        trainer = make_trainer(max_epochs=epochs, **callbacks)
        trainer.fit(module, batches(number=3), ckpt_path=ckpt_path, weights_only=True)
        return module, saving.best_model_path

    whole, _ = run(3)
    _, path = run(2)
    stored = torch.load(path, weights_only=True)["callbacks"]["NeuronResetCallback"]
    assert stored["probed_step"] == 6
    assert all(mask.dtype == torch.bool for mask in stored["dormant"].values())
    resumed, _ = run(3, path)
    assert resumed.logged == {8: whole.logged[8]}
    assert "reset/overlap" in resumed.logged[8]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name])


def test_a_resumed_run_resets_nothing_before_its_first_step(tmp_path):
    module = Regression()
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=1)
    trainer = make_trainer(
        max_steps=4, max_epochs=-1, callbacks=[saving], enable_checkpointing=True
    )
    trainer.fit(module, batches())
    module = Regression()
    callback = NeuronResetCallback(mode="all", every_n_steps=4)
    options = {"max_steps": 7, "max_epochs": -1, "callbacks": [callback]}
    make_trainer(**options).fit(module, batches(), ckpt_path=saving.best_model_path)
    assert module.logged == {}


def test_state_round_trip():
    callback, _, _ = around_a_reset(mode="none", tau=0.5)
    other = NeuronResetCallback()
    other.load_state_dict(copy.deepcopy(callback.state_dict()))
    assert other.probed_step == 2
    assert other.dormant.keys() == callback.dormant.keys()
    assert all(torch.equal(other.dormant[n], mask) for n, mask in callback.dormant.items())


def test_a_new_run_forgets_the_last():
    callback = NeuronResetCallback(mode="none", tau=2.0, every_n_steps=2)
    for _ in range(2):
        module = train(callback, steps=2)
        assert not any("overlap" in name for name in module.logged[2])


def changed_by_reset(module, **options):
    """Return what changed in a reset of the denoiser, and the callback."""
    callback = NeuronResetCallback("policy.denoiser", every_n_steps=2, **options)
    before, after = Snapshot(), Snapshot()
    fit(module, callbacks=[before, callback, after], max_steps=2, log_every_n_steps=1)
    assert all(torch.isfinite(w).all() for w in after.weights.values() if w.is_floating_point())
    changed = {n for n, w in before.weights.items() if not torch.equal(w, after.weights[n])}
    return changed, after, callback


@pytest.mark.parametrize("outgoing", ["resample", "keep"])
def test_lora_pairs_of_a_denoiser(outgoing):
    module = make_ddpo()
    lora = {n for n, p in module.named_parameters() if p.requires_grad}
    changed, after, callback = changed_by_reset(module, mode="all", outgoing=outgoing)
    expected = {n for n in lora if "lora_A" in n or outgoing == "resample"}
    assert changed == expected
    assert changed
    for name in changed:
        weight = after.weights[name]
        if "lora_B" in name:
            assert (weight == 0).all()
        else:
            error = 4 / len(weight) / (2 * weight.numel()) ** 0.5
            assert weight.std().item() == pytest.approx(1 / len(weight), abs=error)
    assert set(callback.dormant) == {
        n.removeprefix("policy.denoiser.").removesuffix(".weight") for n in lora if "lora_A" in n
    }


def test_only_the_chosen_lora_neurons_change():
    module = make_ddpo()
    changed, _, callback = changed_by_reset(module, mode="dormant", tau=0.2)
    found = {name for name, mask in callback.dormant.items() if mask.any()}
    expected = {f"policy.denoiser.{name}.weight" for name in found}
    assert changed == expected | {name.replace("lora_A", "lora_B") for name in expected}
    assert found


def test_linear_and_convolutional_layers_of_a_denoiser():
    module = make_ddpo(train="full", lr=1e-4)
    changed, _, callback = changed_by_reset(module, mode="active")
    kinds = {type(module.get_submodule(name.rpartition(".")[0])).__name__ for name in changed}
    assert {"Linear", "Conv2d"} <= kinds
    assert "LayerNorm" not in kinds
    assert "GroupNorm" not in kinds
    assert callback.dormant["conv_in"].shape == (8,)
    assert {"reset/dormant", "reset/overlap"} >= {
        n for n in module.trainer.callback_metrics if n.startswith("reset/")
    } - {"reset/count"}  # of many layers only what holds of all


def test_a_guided_denoiser_is_measured_without_being_changed():
    module = make_ddpo(guidance_scale=2.0)
    changed, _, callback = changed_by_reset(module, mode="none")
    assert not changed
    assert callback.dormant


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "some"},
        {"outgoing": "scale"},
        {"tau": -0.1},
        {"extra_tau": -1.0},
        {"init_std": -1.0},
        {"every_n_steps": 0},
        {"probe_every_n_steps": 0},
        {"probe_every_n_steps": 300},
        {"probe_size": 0},
    ],
)
def test_bad_options_are_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"`{name}`.*{value}"):
        NeuronResetCallback(**options)


def test_what_cannot_be_reset_is_said_before_training():
    with pytest.raises(ValueError, match="no 'critics'; near: critic"):
        train(NeuronResetCallback("critics"))
    with pytest.raises(ValueError, match="no 'zzz'; near: "):
        train(NeuronResetCallback("zzz"))
    with pytest.raises(ValueError, match="'critic.1' .Dropout. is no .* trainable"):
        train(NeuronResetCallback("critic.1"))
    with pytest.raises(ValueError, match="'critic.layers' .ModuleList. is no callable"):
        train(NeuronResetCallback("critic.layers"), Regression(Critic()))
    module = Regression()
    module.critic.requires_grad_(False)
    with pytest.raises(ValueError, match="trainable"):
        train(NeuronResetCallback(), module)
    with pytest.raises(ValueError, match="no 'critic'; near: "):
        fit(make_ddpo(), callbacks=[NeuronResetCallback()])


def test_what_is_never_called_is_named():
    module = Regression()
    module.unused = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="'unused' can be measured at step 1"):
        train(NeuronResetCallback("unused", every_n_steps=1), module)
    assert not module.unused._forward_pre_hooks


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0,
                            world_size=1)  # fmt: skip
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_sharded_tensors_are_overwritten_in_place(mesh):
    layer = nn.Linear(3, 4)
    before = layer.weight.detach().clone()
    fully_shard(layer, mesh=mesh)
    assert isinstance(layer.weight, DTensor)
    entries, values = before > 0, torch.randn(4, 3)
    with torch.no_grad():
        overwrite(layer.weight, entries, values)
    assert torch.equal(layer.weight.full_tensor(), values.where(entries, before))


@pytest.mark.parametrize("name", ["critic", "critic.inner"])
def test_a_sharded_critic_is_reset_as_a_whole_one(mesh, name):
    results = []
    for sharded in (False, True):
        torch.manual_seed(0)
        module = Regression(nn.Sequential())
        module.critic.add_module("inner", mlp())
        if sharded:
            fully_shard(module.critic, mesh=mesh)
        options = {"module": name, "mode": "dormant", "tau": 0.5, "outgoing": "zero"}
        callback = NeuronResetCallback(every_n_steps=2, **options)
        before, after = Snapshot(), Snapshot()
        callbacks = [before, callback, after]
        make_trainer(max_steps=3, max_epochs=-1, callbacks=callbacks).fit(module, batches())
        assert isinstance(module.critic.inner[0].weight, DTensor) == sharded
        weights = {n: p.detach() for n, p in module.named_parameters()}
        states = {f"{n}/{k}": v for n, s in after.states.items() for k, v in s.items()}
        results.append(
            {
                n: t.full_tensor() if isinstance(t, DTensor) else t
                for n, t in {**weights, **states}.items()
            }
        )
        assert module.logged[2]["reset/count"] > 0
    assert results[0].keys() == results[1].keys()
    for key, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][key], atol=1e-7, rtol=1e-6, msg=key)


def test_the_layers_of_a_tiny_policy_are_found_once():
    denoiser = tiny_policy("sd", train="full").denoiser
    layers = [x.module for x in find_layers(denoiser)]
    expected = [m for m in denoiser.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert len(layers) == len(expected)
    assert set(layers) == set(expected)

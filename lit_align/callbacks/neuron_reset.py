"""Redraws the neurons that are active, or those that are dormant, every so many updates."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from lit_align.callbacks.evaluation import evaluation_mode
from lit_align.callbacks.rng_state import undisturbed_rng
from lit_align.functional.noise import keyed_generator

Chain = list[tuple[str, Any]]  # layers by name, each fed by the one before
Masks = dict[str, Tensor]  # bool [neurons] on the CPU, by the layer's name

# What is reset, given what is dormant.
_MODES: dict[str, Any] = {"none": torch.zeros_like, "active": torch.logical_not,
                          "dormant": torch.clone, "all": torch.ones_like}  # fmt: skip
_LAYERS_LOGGED = 16  # of more, only what holds of all together
_CONTAINERS = (nn.Sequential, nn.ModuleList)
_PER_NEURON = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.PReLU)


class Layer(NamedTuple):
    """A layer, by its name inside the module that is reset, and its place in a chain."""

    name: str
    module: Any
    has_neurons: bool  # the outputs of a chain's last layer are none
    fed_by: str | None  # the layer whose neurons are its inputs, if known
    is_lora: bool


class NeuronResetCallback(Callback):
    """Resets neurons of a trained module every so many optimiser steps.

    A neuron's score is its mean ``relu(output)`` on inputs of the last training forward, in eval
    mode; one whose score is at most `tau` times its layer's mean is dormant, the others are active.
    A reset redraws a neuron's incoming weights and zeroes its bias.

        "active"    TDPO-R (arXiv:2402.08552): against primacy bias, of a critic
        "dormant"   ReDo (arXiv:2302.12902), there with `outgoing: zero`
        "all"       both
        "none"      only measures

    The layers are the module's LoRA pairs if it has any, else its linear and convolutional ones.
    Neurons are the outputs of each but a pair's second factor, and the last of linear layers that
    feed each other in an `nn.Sequential` or `nn.ModuleList`.

    Args:
        module: Name of the module, as in ``get_submodule``.
        mode: Which neurons are reset.
        tau: Largest score of a dormant neuron, relative to its layer's mean.
        extra_tau: Of a second count of dormant neurons, which is only logged.
        every_n_steps: Optimiser steps from one reset to the next.
        probe_every_n_steps: The same of measurements, a divisor; by default `every_n_steps`.
        probe_size: Rows of the batch that are measured, per process.
        outgoing: "resample", "zero" or "keep" the weights that lead from a reset neuron into the
            next of such layers; in a LoRA pair "resample" is "zero", their initial value.
        reset_moments: Zero the optimiser's moments of what was reset.
        reset_step: Zero its step count, which is one of a whole tensor.
        fresh_draws: Draw other numbers at each reset; otherwise they are always the same.
        init_std: Standard deviation of the weights drawn. By default the module's attribute of
            that name, else ``1 / rank`` for LoRA and ``1 / sqrt(3 fan_in)`` for other layers.
        seed: Of the weights drawn.

    Attributes:
        dormant: The masks of the last measurement, by the layers' names inside the module.
        probed_step: The optimiser steps before it.
    """

    def __init__(
        self,
        module: str = "critic",
        mode: Literal["none", "active", "dormant", "all"] = "active",
        tau: float = 0.0,
        extra_tau: float | None = None,
        every_n_steps: int = 1000,
        probe_every_n_steps: int | None = None,
        probe_size: int = 8,
        outgoing: Literal["resample", "zero", "keep"] = "resample",
        reset_moments: bool = True,
        reset_step: bool = False,
        fresh_draws: bool = False,
        init_std: float | None = None,
        seed: int = 42,
    ) -> None:
        self.module, self.mode, self.outgoing = module, mode, outgoing
        self.tau, self.extra_tau, self.init_std = tau, extra_tau, init_std
        self.every_n_steps, self.probe_size = every_n_steps, probe_size
        every = every_n_steps if probe_every_n_steps is None else probe_every_n_steps
        self.probe_every_n_steps = every
        self.reset_moments, self.reset_step = reset_moments, reset_step
        self.fresh_draws, self.seed = fresh_draws, seed
        self._check_options()
        self.dormant: Masks = {}
        self.probed_step = 0
        self._layers: list[Layer] = []
        self._inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._handle: Any = None
        self._step = 0

    def _check_options(self) -> None:
        choices = {"mode": (*_MODES,), "outgoing": ("resample", "zero", "keep")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` must be in {known}, got {getattr(self, name)!r}.")
        for name in ("tau", "extra_tau", "init_std"):
            if not (getattr(self, name) or 0) >= 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        for name in ("every_n_steps", "probe_every_n_steps", "probe_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        if self.every_n_steps % self.probe_every_n_steps:
            found = f"{self.probe_every_n_steps} and {self.every_n_steps}"
            raise ValueError(f"`probe_every_n_steps` must divide `every_n_steps`, got {found}.")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is something to reset, and forget what an earlier run measured."""
        if stage == "fit":
            self._find(pl_module)
            if trainer.global_step == 0:
                self.dormant, self.probed_step = {}, 0

    def _find(self, pl_module: LightningModule) -> nn.Module:
        names = [n for n, _ in pl_module.named_modules(remove_duplicate=False) if n]
        if self.module not in names:
            near = difflib.get_close_matches(self.module, names, n=5, cutoff=0.4) or names[:5]
            raise ValueError(f"`module`: there is no {self.module!r}; near: {', '.join(near)}.")
        module = pl_module.get_submodule(self.module)
        self._layers = find_layers(module)
        if not self._layers or isinstance(module, nn.ModuleList | nn.ModuleDict):
            raise ValueError(
                f"`module`: {self.module!r} ({type(module).__name__}) is no callable module with "
                "trainable linear or convolutional layers; name one that is trained and called."
            )
        return module

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the module's inputs from now on."""
        self._release()
        module = self._find(pl_module)  # it may have been changed after `setup`
        self._handle = module.register_forward_pre_hook(self._keep_inputs, with_kwargs=True)
        self._step = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep them no longer."""
        self._release()

    def on_exception(self, *args: Any) -> None:
        """Keep them no longer."""
        self._release()

    def _release(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = self._inputs = None

    def _keep_inputs(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():  # neither in rollouts nor in validation
            tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim()]
            batch = len(tensors[0]) if tensors else 0
            self._inputs = _cut((args, kwargs), batch, self.probe_size)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure, and reset, after an optimiser step."""
        # With several optimisers the count may jump over the multiple itself.
        seen, self._step = self._step, trainer.global_step
        if self._step // self.probe_every_n_steps == seen // self.probe_every_n_steps:
            return
        scores = self._measure(trainer, pl_module)
        previous, self.probed_step = self.dormant, self._step
        self.dormant = {name: below_mean(score, self.tau) for name, score in scores.items()}
        logs = dormancy_logs(self.dormant, previous)
        if self.extra_tau is not None:
            extra = [below_mean(score, self.extra_tau) for score in scores.values()]
            logs["reset/dormant_extra"] = torch.cat(extra).float().mean()
        if self.mode != "none" and self._step // self.every_n_steps > seen // self.every_n_steps:
            chosen = {name: _MODES[self.mode](mask) for name, mask in self.dormant.items()}
            self._reset(trainer, pl_module, chosen)
            logs["reset/count"] = torch.cat(list(chosen.values())).float().sum()
        for name, value in logs.items():
            pl_module.log(name, value, on_step=True, on_epoch=False)

    @torch.no_grad()
    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor]:
        """Return the scores [neurons] of the layers that are called, over all processes."""
        sums: dict[str, Tensor] = {}
        if self._inputs is not None:
            args, kwargs = self._inputs
            module = pl_module.get_submodule(self.module)
            context = trainer.precision_plugin.forward_context()
            with undisturbed_rng(), _probing(pl_module, module, self._layers, sums), context:
                module(*args, **kwargs)
        if not sums:
            raise RuntimeError(
                f"`module`: nothing of {self.module!r} can be measured at step {self._step}: the "
                "training step has to call it as a module with gradients, and it its layers."
            )
        # One exchange for all layers: of each its neurons' sums, then its count.
        flat = trainer.strategy.reduce(torch.cat(list(sums.values())), reduce_op="sum")
        parts = flat.cpu().split([len(part) for part in sums.values()])
        return {name: part[:-1] / part[-1] for name, part in zip(sums, parts, strict=True)}

    @torch.no_grad()
    def _reset(self, trainer: Trainer, pl_module: LightningModule, chosen: Masks) -> None:
        std = self.init_std
        if std is None:
            std = getattr(pl_module.get_submodule(self.module), "init_std", None)
        for layer in self._layers:
            weight, bias = layer.module.weight, layer.module.bias
            fed_by = None if self.outgoing == "keep" else layer.fed_by
            rows, columns = (
                chosen[name] if name in chosen else torch.zeros(size, dtype=torch.bool)
                for name, size in ((layer.name, len(weight)), (fed_by, weight.shape[1]))
            )
            if not (rows.any() or columns.any()):
                continue
            fresh = self._draw(layer, std)
            fed = fresh * 0 if self.outgoing == "zero" or layer.is_lora else fresh
            # A neuron that is reset has only fresh weights, also from one that is reset before it.
            in_rows = reset_entries(weight.shape, rows, torch.zeros_like(columns))
            entries = reset_entries(weight.shape, rows, columns)
            self._replace(trainer, weight, entries, fresh.where(in_rows, fed))
            if bias is not None and rows.any():
                self._replace(trainer, bias, rows, torch.zeros(()))

    def _draw(self, layer: Layer, std: float | None) -> Tensor:
        weight = layer.module.weight
        if std is None:  # as peft's "gaussian" adapters and torch's layers start
            std = 1 / len(weight) if layer.is_lora else (3 * weight[0].numel()) ** -0.5
        step = (self._step,) if self.fresh_draws else ()
        generator = keyed_generator("neuron_reset", self.seed, layer.name, *step)
        return torch.randn(weight.shape, generator=generator) * std

    def _replace(self, trainer: Trainer, weight: Tensor, entries: Tensor, values: Tensor) -> None:
        overwrite(weight, entries, values)
        for optimizer in trainer.optimizers:
            for name, state in optimizer.state.get(weight, {}).items():
                if name == "step" and self.reset_step:
                    state.zero_()
                elif self.reset_moments and getattr(state, "shape", None) == weight.shape:
                    overwrite(state, entries, torch.zeros(()))

    def state_dict(self) -> dict[str, Any]:
        """Return the masks of the last measurement and when it was."""
        return {"dormant": dict(self.dormant), "probed_step": self.probed_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them: the next measurement is compared with the last."""
        self.dormant = {name: mask.cpu() for name, mask in state_dict["dormant"].items()}
        self.probed_step = state_dict["probed_step"]


def find_layers(module: nn.Module) -> list[Layer]:
    """Return the trainable layers, those of a chain in its order."""
    parts = list(module.named_modules())
    chains = [pair for name, part in parts for pair in _lora_pairs(name, part)]
    is_lora = bool(chains)
    if not is_lora:
        known: set[nn.Module] = set()  # a layer may be a member of several containers
        runs = [run for name, part in parts for run in _runs(name, part)]
        singles = [[(name or "self", part)] for name, part in parts if _is_trained(part)]
        for chain in sorted([*runs, *singles], key=len, reverse=True):
            if known.isdisjoint(layer for _, layer in chain):
                known.update(layer for _, layer in chain)
                chains.append(chain)
    return [
        Layer(name, layer, layer is not chain[-1][1] or len(chain) == 1, fed_by, is_lora)
        for chain in chains
        for (name, layer), fed_by in zip(chain, [None, *(name for name, _ in chain)], strict=False)
    ]


def _lora_pairs(name: str, part: nn.Module) -> Iterator[Chain]:
    first, second = getattr(part, "lora_A", None), getattr(part, "lora_B", None)
    if isinstance(first, nn.ModuleDict) and isinstance(second, nn.ModuleDict):
        for adapter in first:
            pair = {"lora_A": first[adapter], "lora_B": second[adapter]}
            if all(map(_is_trained, pair.values())):
                yield [(f"{name}.{k}.{adapter}".lstrip("."), p) for k, p in pair.items()]


def _runs(name: str, part: nn.Module) -> Iterator[Chain]:
    """Yield the linear members of a container that feed each other, norms and the like aside."""
    run: Chain = []
    for key, member in part.named_children() if isinstance(part, _CONTAINERS) else ():
        is_linear = isinstance(member, nn.Linear) and _is_trained(member)
        if not is_linear and (isinstance(member, _PER_NEURON) or not list(member.parameters())):
            continue
        if run and not (is_linear and run[-1][1].out_features == member.in_features):
            yield run
            run = []
        if is_linear:
            run.append((f"{name}.{key}".lstrip("."), member))
    if run:
        yield run


def _is_trained(part: nn.Module) -> bool:
    return isinstance(part, nn.Linear | nn.Conv2d) and part.weight.requires_grad


def dormant_neurons(activations: Tensor, tau: float) -> Tensor:
    """Return the mask [neurons] of the dormant ones by `activations` [N, neurons] before a ReLU."""
    sums = _score_sums(activations)
    return below_mean(sums[:-1] / sums[-1], tau)


def _score_sums(activations: Tensor) -> Tensor:
    """Return each neuron's sum of ``relu(activations)``, and last the number of rows."""
    rows = activations.detach().float().relu().flatten(end_dim=-2)
    return torch.cat([rows.sum(0), rows.new_tensor([len(rows)])])


def below_mean(scores: Tensor, tau: float) -> Tensor:
    """Return which scores are at most `tau` times their mean."""
    return scores / (scores.mean() + 1e-9) <= tau


def dormancy_logs(dormant: Masks, previous: Masks) -> dict[str, Tensor]:
    """Return the shares of dormant neurons, and how many of them were so before.

    That overlap is relative to the smaller of both sets, and left out if one is empty.
    """
    pairs = {f"/{name}": (mask, previous.get(name)) for name, mask in dormant.items()}
    if len(pairs) > _LAYERS_LOGGED:
        pairs = {}
    same = dormant.keys() == previous.keys()
    before = torch.cat([previous[name] for name in dormant]) if same else None
    pairs[""] = (torch.cat(list(dormant.values())), before)
    logs: dict[str, Tensor] = {}
    for name, (mask, old) in pairs.items():
        logs[f"reset/dormant{name}"] = mask.float().mean()
        if old is not None and old.shape == mask.shape and mask.any() and old.any():
            logs[f"reset/overlap{name}"] = (mask & old).sum() / min(mask.sum(), old.sum())
    return logs


def reset_entries(shape: torch.Size, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the mask of a weight's entries in the rows or the columns."""
    mask = rows[:, None] | columns
    return mask.reshape(*mask.shape, *[1] * (len(shape) - 2)).expand(shape)


def overwrite(tensor: Tensor, entries: Tensor, values: Tensor) -> None:
    """Put the values there in place, all others staying bit by bit, also of a sharded tensor."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    changed = torch.where(entries.to(whole.device), values.to(whole), whole)
    if isinstance(tensor, DTensor):
        changed = distribute_tensor(changed, tensor.device_mesh, tensor.placements)
    tensor.copy_(changed)


def _cut(value: Any, batch: int, size: int) -> Any:
    """Return a copy of what a module is called with, of tensors over the batch `size` rows."""
    if isinstance(value, Tensor):
        has_rows = value.dim() > 0 and len(value) == batch
        return (value[:size] if has_rows else value).detach().clone()
    if isinstance(value, dict):
        return {key: _cut(part, batch, size) for key, part in value.items()}
    return tuple(_cut(part, batch, size) for part in value) if type(value) is tuple else value


@contextmanager
def _probing(
    pl_module: nn.Module, module: nn.Module, layers: list[Layer], sums: dict[str, Tensor]
) -> Iterator[None]:
    """Add up what the layers' neurons put out in eval mode; everything is as before afterwards."""
    sharded: list[Any] = [part for part in pl_module.modules() if isinstance(part, FSDPModule)]
    measured = [layer for layer in layers if layer.has_neurons]
    hooks = [x.module.register_forward_hook(partial(_add_up, sums, x)) for x in measured]
    try:
        with evaluation_mode(module):
            for part in sharded:
                if module in part.modules():  # the hooks that gather it are those of this part
                    part.unshard()
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for part in sharded:
            part.reshard()  # shards, not gathered copies, are what is trained and may be changed


def _add_up(sums: dict[str, Tensor], layer: Layer, _: Any, args: Any, output: Tensor) -> None:
    channels_last = output.movedim(1, -1) if isinstance(layer.module, nn.Conv2d) else output
    sums[layer.name] = sums.get(layer.name, 0) + _score_sums(channels_last)

"""A small round of a method, run on the meta device and extended to the whole one."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from lightning.pytorch.plugins.precision import HalfPrecision, Precision
from torch import Tensor, nn

from lit_align.algorithms import ScheduleModule
from lit_align.architectures.stand_ins import is_blank, made_up_scores
from lit_align.data.planner import RoundPlan
from lit_align.policies import learned_schedule
from lit_align.policies.features import Features
from lit_align.policies.text_cache import TextCache
from lit_align.policies.towers import ImageTower
from lit_align.rewards import RewardModule
from lit_align.tracing import GPUOperators, Trace, tracing
from lit_align.trajectory import PairBatch, PreferenceBatch, PromptBatch

if TYPE_CHECKING:
    from lit_align.costs import Estimate, Setting

_DTYPES = {"bf16": torch.bfloat16, "16": torch.float16}
_WHOLE = ("update", "validation")  # phases that take in those within


def trained_tensors(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are trained."""
    return [p for p in module.parameters() if p.requires_grad]


def size_of(tensors: Any) -> int:
    """Return the bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


@dataclass
class _Small:
    """What a small round took: bytes at peaks, operations and calls, and those of a minibatch."""

    peaks: dict[str, float]
    flops: Counter[str]
    counts: Counter[str]
    minibatch_flops: float = 0.0
    minibatch_counts: Counter[str] = field(default_factory=Counter)


class Runner:
    """Runs a module without a trainer, its networks on the meta device."""

    def __init__(self, module: Any, setting: Setting, found: Estimate) -> None:
        self.module, self.setting, self.found = module, setting, found
        kind, _, how = setting.precision.partition("-")
        dtype = _DTYPES.get(kind)
        self.operators = GPUOperators(dtype if how == "mixed" else None)
        self.plugin: Any = Precision()
        if dtype is not None and how == "true":
            self.plugin = HalfPrecision(setting.precision)  # type: ignore[arg-type]
        elif dtype is not None:
            self.plugin.forward_context = self.operators.autocast  # type: ignore[method-assign]
        self.trace = Trace(setting.on_gpu)
        self.trainer = SimpleNamespace(
            world_size=setting.world_size, global_rank=0, global_step=0, current_epoch=0,
            accumulate_grad_batches=setting.accumulate_grad_batches, precision=setting.precision,
            precision_plugin=self.plugin, strategy=None, progress_bar_callback=None,
            val_dataloaders=None, enable_validation=False,
        )  # fmt: skip

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Trace the module, set up as for `fit`."""
        module: Any = self.module
        module._trainer = self.trainer
        module.max_invalid_fraction = 1.0  # scores are made up, or asked without metadata
        with ExitStack() as stack:
            for owner, name, stand_in in self._stand_ins():
                stack.enter_context(patch.object(owner, name, stand_in))
            stack.enter_context(tracing(self.trace, self.operators))
            stack.enter_context(self.trace.during("setting up"))
            module.setup("fit")
            self.plugin.convert_module(module)
            if _learns_from_pairs(module):
                module.pairs = SimpleNamespace(batch=self._pairs, fingerprint="")
            module.on_train_start()
            self.plans = getattr(module, "plans", {})
            self.trainer.world_size = 1
            yield
        module._trainer = None

    def _stand_ins(self) -> Iterator[tuple[Any, str, Any]]:
        """Yield objects, names of their attributes, and what takes their place."""
        module, trace = self.module, self.trace
        for name in ("log", "log_dict", "print"):
            yield module, name, lambda *_, **__: None
        yield TextCache, "_on_device", lambda *_: nullcontext()
        yield learned_schedule, "predict_with_features", _crossing_features(trace)
        policy = module.policy
        phases = {"_encode": "encoding prompts", "decode": "decoding", "sample": "sampling"}
        for name in ("_encode", "predict", "decode", "encode", "sample"):
            own = getattr(policy, name)
            call = own if name == "sample" else trace.crossing(own, name)
            yield policy, name, _within(trace, phases[name], call) if name in phases else call
        if hasattr(module, "_pull_back"):  # once for each step, with a gradient that ends in it
            yield module, "_pull_back", trace.repeating(module._pull_back, "pull back", like=2)
        if isinstance(module, ScheduleModule):
            yield module.head, "forward", _head_on_meta(trace, module.head)
            walk = learned_schedule._Walk
            yield walk, "_write", _uncounted(trace, walk._write)  # it keeps features elsewhere
        yield policy, "reference", _on_meta_reference(trace, policy.reference)
        for part in {id(m): m for r in self._scorers() for m in r.modules()}.values():
            if isinstance(part, RewardModule):
                yield from self._of_reward(part)
            elif isinstance(part, ImageTower) and _on_meta(part):
                yield part, "embed_images", trace.crossing(part.embed_images, f"tower {id(part)}")
                yield part, "to", lambda *_, **__: None

    def _scorers(self) -> list[nn.Module]:
        scorers = [*self.module.rewards.values(), *self.module.children()]
        scorers += [c.tower for c in self.module.children() if hasattr(c, "tower")]
        return [s for s in scorers if s is not self.module.policy]

    def _of_reward(self, reward: RewardModule) -> Iterator[tuple[Any, str, Any]]:
        forward: Any = reward.forward
        if is_blank(reward):
            forward = lambda images, *_, **__: made_up_scores((len(images),))  # noqa: E731
        elif any(p.device.type == "meta" for p in _own_parameters(reward)):
            forward = self.trace.crossing(forward, f"reward {id(reward)}", made_up_scores)
        if _on_meta(reward):
            yield reward, "to", lambda *_, **__: reward
        yield reward, "forward", _within(self.trace, "scoring", forward)

    def _pairs(self, number: int, size: int) -> PairBatch:
        images = torch.zeros(size, 3, *self.module.policy.image_size)
        return PairBatch(images, [""] * size, torch.arange(size))

    def run_rounds(self) -> None:
        """Fill in the costs of a round, of all of its parts."""
        module, found = self.module, self.found
        minibatches = 0
        for name, plan in self.plans.items():
            module.begin(name)
            found.images += plan.prompts_per_round * plan.samples_per_prompt
            sizes = _small_sizes(plan, self.setting.world_size)
            small = [
                self._run_small(replace(plan, prompts_per_round=n, world_size=1)) for n in sizes
            ]
            share = plan.prompts_per_round // self.setting.world_size
            self._extend(small, sizes, share, plan.minibatches)
            minibatches += plan.minibatches
        if extra := getattr(module, "pretraining_minibatches", 0):
            minibatches += extra
            self._run_pretraining(extra)
        found.updates = minibatches / self.setting.accumulate_grad_batches

    def _extend(self, small: list[_Small], sizes: list[int], share: int, minibatches: int) -> None:
        """Add what the whole round costs, which deals `share` prompts to each process."""
        first, last = small[0], small[-1]
        along = (share - sizes[0]) / (sizes[1] - sizes[0]) if len(sizes) > 1 else 0.0
        processes, found = self.setting.world_size, self.found

        def at(a: float, b: float) -> float:
            return a + (b - a) * along

        for phase in first.peaks:
            peak = math.ceil(at(first.peaks[phase], last.peaks[phase]))
            found.peaks[phase] = max(peak, found.peaks.get(phase, 0))
        for phase in last.flops:
            found.flops[phase] += round(processes * at(first.flops[phase], last.flops[phase]))
        for name in last.counts:
            found.counts[name] += round(processes * at(first.counts[name], last.counts[name]))
        found.flops["update"] += round(processes * minibatches * first.minibatch_flops)
        for name, count in first.minibatch_counts.items():
            found.counts[name] += processes * minibatches * count

    def _run_small(self, plan: RoundPlan) -> _Small:
        """Run a round of few prompts on one process, and learn from one minibatch."""
        module, trace = self.module, self.trace
        trace.peaks.clear()
        trace.flops.clear()
        before = Counter(module.counters)
        gradients = self._old_gradients()
        with patch.object(type(module), "plan", plan), trace.during("collecting"):
            collected = module.collect(_blank(plan), 0)
            counts = Counter(module.counters) - before
            flops = Counter(trace.flops)
            minibatch = next(iter(module.minibatches(collected, 0)))
            before = Counter(module.counters)
            self._learn(lambda: module.loss(minibatch)[0], gradients)
            module.count_calls(minibatch)
            of_minibatch = Counter(module.counters) - before
            self._validate()
        small = _Small(dict(trace.peaks), flops, counts, trace.flops["update"], of_minibatch)
        if isinstance(module, ScheduleModule):  # features stay in main memory
            kept = size_of([collected.extras["features"]])
            small.peaks.pop("collecting")
            after = ("scoring", "update", "validation", "stepping")
            small.peaks |= {p: max(small.peaks[p] - kept, 0) for p in after if p in small.peaks}
        return small

    def run_judgements(self) -> None:
        """Fill in the costs of an optimiser step on judgements."""
        module, found, setting = self.module, self.found, self.setting
        batch = self._judgements()
        before = Counter(module.counters)
        self._learn(lambda: module.training_step(batch, 0), self._old_gradients())
        steps = setting.accumulate_grad_batches
        for name, count in (Counter(module.counters) - before).items():
            found.counts[name] += count * steps * setting.world_size
        found.flops["update"] = self.trace.flops["update"] * steps * setting.world_size
        found.updates = 1.0
        self._validate()
        found.peaks |= dict(self.trace.peaks)

    def _judgements(self) -> PreferenceBatch:
        size, judged = self.setting.batch_size, self.setting.judged
        places = torch.arange(size)
        labels = torch.tensor([1.0] + [0.0] * (judged - 1)).expand(size, judged)
        if judged > 2:
            labels = torch.arange(1.0, judged + 1).expand(size, judged)
        images = torch.zeros(size, judged, *_pixel_shape(self.module.policy))
        return PreferenceBatch(images, [""] * size, labels, torch.ones(size), places, places)

    def _run_pretraining(self, minibatches: int) -> None:
        module, trace = self.module, self.trace
        flops = trace.flops["update"]
        pairs = module.pairs.batch(0, module.pretraining_batch_size)
        self._learn(lambda: module.loss(pairs)[0], self._old_gradients())
        module.count_calls(pairs)
        total = self.setting.world_size * minibatches
        self.found.counts["denoiser_calls"] += total * len(pairs)
        self.found.flops["update"] += (trace.flops["update"] - flops) * total
        self.found.peaks["update"] = max(self.found.peaks["update"], trace.peaks["update"])

    def _old_gradients(self) -> list[Tensor | None]:
        """Return gradients of the update before, which live until the next backward."""
        return [torch.empty_like(p) for p in trained_tensors(self.module)]

    def _learn(self, loss: Callable[[], Tensor], old: list[Tensor | None]) -> None:
        """Compute a loss and its gradients, and make room for the optimiser's step."""
        trained = trained_tensors(self.module)
        with self.trace.during("update"), torch.enable_grad(), self.plugin.forward_context():
            value = loss()
            if self.setting.accumulate_grad_batches == 1:
                old[:] = [None] * len(old)
            # Where gradients accumulate, a new one is added to its old one at once.
            handles = [p.register_hook(partial(_release, old, i)) for i, p in enumerate(trained)]
            gradients = torch.autograd.grad(value, trained, allow_unused=True)
            for handle in handles:
                handle.remove()
        del value
        with self.trace.during("stepping"):
            roots = [torch.empty_like(p) for p in trained]  # of second moments, at once on a GPU
            del roots, gradients

    def _validate(self) -> None:
        size = self.setting.batch_size
        nothing = torch.zeros(size, dtype=torch.int64)
        batch = PromptBatch([""] * size, [None] * size, nothing, torch.arange(size), nothing)
        with self.trace.during("validation"), torch.no_grad(), self.plugin.forward_context():
            self.module.evaluate(batch)


def _learns_from_pairs(module: Any) -> bool:
    """Return whether a module learns from image-text pairs beside its own samples."""
    weight = getattr(module, "pretraining_beta", 0.0)
    return bool(weight > 0 and getattr(module, "pretraining", "weighted") != "none")


def _release(old: list[Tensor | None], place: int, gradient: Tensor) -> None:
    old[place] = None


def _on_meta(module: nn.Module) -> bool:
    return any(p.device.type == "meta" for p in module.parameters())


def _own_parameters(reward: RewardModule) -> Iterator[nn.Parameter]:
    """Yield a reward's parameters without those of rewards within."""
    within = [m for m in reward.modules() if isinstance(m, RewardModule) and m is not reward]
    others = {id(p) for other in within for p in other.parameters()}
    return (p for p in reward.parameters() if id(p) not in others)


def _within(trace: Trace, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, counted for a phase unless it is part of one that takes it in."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with trace.during(trace.phase if trace.phase in _WHOLE else phase):
            return function(*args, **kwargs)

    return call


def _head_on_meta(trace: Trace, head: Any) -> Callable[..., Any]:
    """Move a head of schedules to the meta device; its outputs are those of blank features."""
    start = copy.deepcopy(head)
    maps, embedding = torch.zeros(1, head.channels, 8, 8), torch.zeros(1, head.embedding_dim)
    crossing = trace.crossing(head.to("meta").forward, "head")

    def call(*args: Any) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), trace.uncounted():
            blank = (x.expand(len(args[2]), *x.shape[1:]) for x in (maps, embedding))
            alpha, beta = start(*blank, args[2].detach())
        first, second = crossing(*args)
        return first + alpha, second + beta

    return call


def _on_meta_reference(trace: Trace, own: Any) -> Any:
    """Return `reference`, which moves the copied weights to where the policy says that it is."""

    @contextmanager
    def reference() -> Iterator[None]:
        with ExitStack() as stack:
            with trace.on_meta():
                stack.enter_context(own())
            yield

    return reference


def _uncounted(trace: Trace, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        with trace.uncounted():
            return function(*args)

    return call


def _crossing_features(trace: Trace) -> Callable[..., Any]:
    own = learned_schedule.predict_with_features

    def parts(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        output, features = own(*args)
        return output, features.maps, features.embedding

    crossing = trace.crossing(parts, "features", stay=[1])  # maps of a whole round are large

    def call(policy: Any, *args: Any) -> tuple[Tensor, Features]:
        output, maps, embedding = crossing(policy, *args)
        return output, Features(maps, embedding)

    return call


def _pixel_shape(policy: Any) -> tuple[int, ...]:
    """Return the shape of an image, or a video, that was judged."""
    frames = getattr(policy, "num_frames", 1)
    return (3, *policy.image_size) if frames == 1 else (frames, 3, *policy.image_size)


def _small_sizes(plan: RoundPlan, world_size: int) -> list[int]:
    """Return one or two numbers of prompts that fill a rollout batch and a minibatch."""
    kept = plan.kept_per_prompt or plan.samples_per_prompt
    sampled = math.ceil(plan.rollout_batch_size / plan.samples_per_prompt)
    learned = math.ceil(plan.minibatch_size / (kept * plan.trained_steps))
    share, least = plan.prompts_per_round // world_size, max(sampled, learned)
    return sorted({min(least, share), min(2 * least, share)})


def _blank(plan: RoundPlan) -> PromptBatch:
    """Return the round's samples of empty prompts."""
    places = torch.arange(plan.samples)
    slots = places // plan.samples_per_prompt
    count = len(places)
    return PromptBatch([""] * count, [None] * count, slots, places, slots)

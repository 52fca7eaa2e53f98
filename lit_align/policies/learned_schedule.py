"""A sampling schedule that is learned: every image at its own noise levels, for its own steps."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_align.functional.beta import beta_log_prob, beta_mode, sample_beta
from lit_align.functional.noise import randn
from lit_align.policies.base import Conditioning, DiffusionPolicy
from lit_align.policies.features import predict_with_features
from lit_align.policies.loading import policy_over
from lit_align.policies.time_prediction import MIN_RATIO, TimePredictor
from lit_align.trajectory import Trajectory

CONFIG_FILE, WEIGHTS_FILE = "schedule.json", "schedule.safetensors"


@dataclass(frozen=True)
class LearnedSchedule:
    """A `TimePredictor` with the options that it was learned with (arXiv:2412.01243).

    A sample starts at noise level 1 and is finished when its level falls below `t_min`; from then
    on it is no longer computed.

    Attributes:
        head: Predicts the steps.
        pipeline: Class name of the pipeline whose denoiser the head reads; "" for any.
        guidance_scale: Weight of classifier-free guidance, which features depend on too.
        max_steps: T, the most steps of a sample.
        t_min: In (0, 1).
        final_to_zero: Let the step that falls below `t_min` end at 0, where there is no noise left.
    """

    head: TimePredictor
    pipeline: str = ""
    guidance_scale: float = 7.0
    max_steps: int = 28
    t_min: float = 0.01
    final_to_zero: bool = True

    @torch.no_grad()
    def __call__(
        self,
        pipe: Any,
        prompts: str | Sequence[str],
        generator: Sequence[torch.Generator] | None = None,
        image_size: int | tuple[int, int] | None = None,
        output_type: str = "pil",
    ) -> Any:
        """Return images of prompts, drawn with a plain diffusers pipeline.

        Args:
            pipe: The pipeline; its weights are used in place.
            prompts: One, or B.
            generator: One on the CPU for each image, which draws its initial noise.
            image_size: Side of the images in pixels, or height and width; by default the model's.
            output_type: "pil", "np" or "pt", as in diffusers.

        Raises:
            ValueError: If the pipeline is not one that the schedule can be used with.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        policy = policy_over(pipe, DiffusionPolicy, image_size)
        self.head.to(policy.device)
        if generator is None:
            generator = [torch.Generator() for _ in prompts]
            for each in generator:
                each.seed()
        trajectory = self.sample(policy, policy.encode_prompt(prompts), generator)
        images = policy.decode(trajectory.latents[:, -1])
        return pipe.image_processor.postprocess(2 * images - 1, output_type)

    @torch.no_grad()
    def sample(
        self,
        policy: DiffusionPolicy,
        conditioning: Conditioning,
        generator: Sequence[torch.Generator],
        *,
        initial_generator: Sequence[torch.Generator] | None = None,
        explore: bool = False,
        feature_dtype: torch.dtype | None = None,
        anywhere: Callable[[bool], bool] = bool,
        progress: Callable[[int], Any] = lambda rows: None,
    ) -> Trajectory:
        """Sample from noise to clean latents.

        Args:
            policy: The frozen model, which also knows the size of images.
            conditioning: What `encode_prompt` returned, for B samples.
            generator: B of them; each draws its sample's initial noise, then its ratios.
            initial_generator: B of them to draw the initial noise instead.
            explore: Draw ratios, and stop at the cap wherever that is. Otherwise they are modes,
                and the last step of the cap ends at 0 too.
            feature_dtype: Keep the features, rounded to it before the head reads them.
            anywhere: Whether a condition holds on any process, where all must call the network
                equally often.
            progress: Called after each step with the number of samples that took it.

        Returns:
            `latents` are the noise and the image [B, 2, ...]. The rest is [B, T, ...], 0 where a
            sample was finished: `log_probs` of the ratios; the extras `alive`, `levels`, `ratios`
            and `shapes` (alpha and beta, [B, T, 2]), with `feature_dtype` also `features` [B, T, C,
            H, W], on the CPU, and `embedding` [B, T, E].

        Raises:
            ValueError: If the schedule is for another kind of model.
        """
        self.check_fits(policy)
        initial = randn(policy.latent_shape(), initial_generator or generator, policy.device)
        walk = _Walk(self, policy, conditioning, initial, feature_dtype)
        for step in range(self.max_steps):
            if not anywhere(len(walk.rows) > 0):
                break
            progress(len(walk.rows))
            walk.advance(step, generator if explore else None)
        return Trajectory(
            latents=torch.stack([initial, walk.latents], dim=1),
            timesteps=walk.seen.pop("timesteps"), log_probs=walk.seen.pop("log_probs"),
            conditioning=conditioning, guidance_scale=self.guidance_scale,
            num_inference_steps=self.max_steps, extras=walk.seen,
        )  # fmt: skip

    def check_fits(self, policy: DiffusionPolicy) -> None:
        """Check that the schedule is for this kind of model.

        Raises:
            ValueError: If it is for another pipeline, or the head reads features of other widths.
        """
        found = type(policy.pipeline).__name__ if self.pipeline else ""
        if found != self.pipeline:
            raise ValueError(
                f"The schedule was learned on a {self.pipeline}, but {policy.pretrained!r} is a "
                f"{found}; use it with the model that it was learned on, or one fine-tuned from it."
            )
        self.head.check_fits(policy)

    def options(self) -> dict[str, Any]:
        """Return what `from_tensors` needs beside the head's tensors, as plain values."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "head"}
        sizes = ("channels", "embedding_dim", "width", "init_steps", "init_shift")
        return {**fields, "head": {name: getattr(self.head, name) for name in sizes}}

    @classmethod
    def from_tensors(cls, options: dict[str, Any], tensors: dict[str, Tensor]) -> LearnedSchedule:
        """Return the schedule of what `options` returned, and the head's tensors by name."""
        head = TimePredictor(**options["head"])
        head.load_state_dict(tensors)
        return cls(**{**options, "head": head.requires_grad_(False).eval()})

    def save_pretrained(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write `schedule.json` and `schedule.safetensors`.

        Args:
            path: A folder, made if missing.
            dtype: Of the stored tensors; by default float32.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.options(), indent=2, sort_keys=True)
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        tensors = self.head.state_dict().items()
        stored = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in tensors}
        save_file(stored, folder / WEIGHTS_FILE)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> LearnedSchedule:
        """Read a folder that `save_pretrained` wrote.

        Raises:
            FileNotFoundError: If there is no such folder.
        """
        folder = Path(path)
        if not (folder / CONFIG_FILE).is_file():
            raise FileNotFoundError(
                f"{str(path)!r} is no folder with a {CONFIG_FILE}; `export` a checkpoint of TPDM."
            )
        options = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        return cls.from_tensors(options, load_file(folder / WEIGHTS_FILE))


class _Walk:
    """Samples on their way, each at its own level.

    Attributes:
        latents: Where they are [B, ...].
        rows: Those of them that are not finished [b].
        seen: What was seen of every step so far, by name, each [B, T, ...].
    """

    def __init__(
        self,
        schedule: LearnedSchedule,
        policy: DiffusionPolicy,
        conditioning: Conditioning,
        initial: Tensor,
        feature_dtype: torch.dtype | None,
    ) -> None:
        self._schedule, self._policy, self._conditioning = schedule, policy, conditioning
        self._feature_dtype = feature_dtype
        self._levels = initial.new_ones(len(initial))
        self.latents, self.seen = initial.clone(), dict[str, Tensor]()
        self.rows = torch.arange(len(initial), device=initial.device)

    def advance(self, step: int, generator: Sequence[torch.Generator] | None) -> None:
        """Take a step; without generators the most likely one."""
        # Where all are finished the network is called for nothing, see `anywhere`.
        rows = self.rows if len(self.rows) else self.rows.new_zeros(1)
        levels = self._levels[rows]
        output, seen = self._look(rows, levels)
        alpha, beta = seen["shapes"].unbind(dim=1)
        if not len(self.rows):
            return
        if generator is None:
            ratios = beta_mode(alpha, beta)
        else:
            ratios = sample_beta(alpha, beta, [generator[row] for row in rows.tolist()])
        ratios = ratios.clamp(MIN_RATIO, 1 - MIN_RATIO)
        seen |= {"ratios": ratios, "log_probs": beta_log_prob(ratios, alpha, beta)}
        self._write(seen, step)
        following = self._levels[rows] = ratios * levels
        finished, target = following < self._schedule.t_min, following
        if self._schedule.final_to_zero:
            forced = generator is None and step == self._schedule.max_steps - 1
            target = following.where(~finished & (not forced), 0.0)
        states = self.latents[rows]
        self.latents[rows] = self._policy.scheduler.advance(output, states, levels, target)
        self.rows = rows[~finished]

    def _look(self, rows: Tensor, levels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Call the network; return its output, and what is kept of the call."""
        times = self._policy.scheduler.network_times(levels)
        output, features = predict_with_features(
            self._policy,
            self.latents[rows],
            times,
            {name: values[rows] for name, values in self._conditioning.items()},
            self._schedule.guidance_scale,
        )
        alive = torch.ones_like(rows, dtype=torch.bool)
        seen = {"timesteps": times, "levels": levels, "alive": alive}
        maps = features.maps
        if self._feature_dtype is not None:
            # The head must read here what it will read in training.
            maps = maps.to(self._feature_dtype)
            seen |= {"features": maps.cpu(), "embedding": features.embedding}
        seen["shapes"] = torch.stack(self._schedule.head(maps, features.embedding, levels), dim=1)
        return output, seen

    def _write(self, seen: dict[str, Tensor], step: int) -> None:
        for name, values in seen.items():
            if name not in self.seen:
                size = (len(self.latents), self._schedule.max_steps, *values.shape[1:])
                self.seen[name] = values.new_zeros(size)
            self.seen[name][self.rows.to(values.device), step] = values

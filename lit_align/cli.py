"""The command line: fit, validate, test, predict by LightningCLI, and the verbs beside them."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from jsonargparse import Namespace, auto_cli
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

# Importing them registers the short names of their classes.
from lit_align import algorithms, callbacks, dry_run, policies, rewards, schedulers, verbs
from lit_align.algorithms.sharding import FSDP_MESSAGE
from lit_align.annotate_page import annotate
from lit_align.callbacks import RNGStateCallback
from lit_align.checkpoint_io import AtomicCheckpointIO, read_checkpoint
from lit_align.comparison import compare
from lit_align.data import image_text, preferences, prompts
from lit_align.label import label
from lit_align.reward_server import serve_reward
from lit_align.run_folder import ResumeMetrics, RunFolder, SaveRunConfig, newest_checkpoint

NAMED = (algorithms, callbacks, image_text, policies, preferences, prompts, rewards, schedulers)
VERBS: dict[str, Any] = {
    "generate": verbs.generate,
    "export": verbs.export,
    "label": label,
    "annotate": annotate,
    "compare": compare,
    "serve-reward": serve_reward,
}


class LitAlignCLI(LightningCLI):
    """LightningCLI with a run folder, exact resume of its files, and checkpoints as defaults."""

    def __init__(self, args: ArgsType = None) -> None:
        words = list(args) if isinstance(args, list) else sys.argv[1:]
        self._asked = words[0] if words else ""
        super().__init__(
            save_config_callback=SaveRunConfig,
            parser_kwargs={"parser_mode": "omegaconf"},
            trainer_defaults={"log_every_n_steps": 1, "num_sanity_val_steps": 0},
            seed_everything_default=42,
            args=args,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return the subcommand that is asked for: parsers of all of them take a while to build."""
        every = LightningCLI.subcommands()
        return {self._asked: every[self._asked]} if self._asked in every else every

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the name of the run."""
        parser.add_argument("--name", type=str, default="run", help="Name of the run's folder.")
        parser.add_argument("--runs_dir", type=str, default="runs", help="Holds all runs.")
        dry_run.add_arguments(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; outside `fit` a checkpoint's hyperparameters are the defaults."""
        words = list(args) if isinstance(args, list) else sys.argv[1:]
        checkpoint = _option(words, "--ckpt_path")
        if words and words[0] != "fit" and checkpoint and Path(checkpoint).is_file():
            subparser = self._subcommand_parsers.get(words[0])
            if subparser is not None:
                subparser.set_defaults(_stored_configuration(checkpoint))
        super().parse_arguments(parser, args)

    def _parse_ckpt_path(self) -> None:
        """In `fit`, configuration and command line win; print where they differ."""
        config = self.config[self.config.subcommand]
        if self.config.subcommand != "fit" or not config.get("ckpt_path"):
            return
        if config["ckpt_path"] == "last":
            newest = newest_checkpoint(config["runs_dir"], config["name"])
            config["ckpt_path"] = str(newest) if newest else "last"
        if Path(config["ckpt_path"]).is_file():
            stored = _stored_configuration(config["ckpt_path"]).get("model", {})
            _print_differences(stored.get("init_args", {}), config["model"]["init_args"])

    def before_instantiate_classes(self) -> None:
        """Refuse what cannot work before anything is built."""
        strategy = self._get(self.config, "trainer")["strategy"]
        name = strategy if isinstance(strategy, str) else strategy["class_path"].rsplit(".", 1)[-1]
        if name in ("fsdp", "fsdp_cpu_offload", "FSDPStrategy"):
            raise ValueError(FSDP_MESSAGE)

    def instantiate_classes(self) -> None:
        """Build what is configured, of a dry run without weights; and tell what it would cost.

        Raises:
            ValueError: If a dry run is asked of another subcommand than `fit`.
        """
        config = self.config[self.subcommand]
        if not config["dry_run"]:
            return super().instantiate_classes()
        if self.subcommand != "fit":
            raise ValueError(
                f"`--dry_run` is for `fit`, not for `{self.subcommand}`; leave it out."
            )
        with dry_run.nothing_opened():
            built = self.parser.instantiate_classes(self.config)[self.subcommand]
            trainer = dict(built["trainer"])
            told = dry_run.dry_run(built["model"], built["data"], trainer, config["dry_run_tflops"])
        return _say(told)

    def _run_subcommand(self, subcommand: str) -> None:
        """Run it, unless that was a dry run."""
        if not self.config[subcommand]["dry_run"]:
            super()._run_subcommand(subcommand)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Give `fit` its run folder, unless loggers were configured."""
        config = self.config[self.subcommand]
        logger = config["trainer"]["logger"]
        if self.subcommand != "fit":
            return super().instantiate_trainer(**{"logger": logger or False, **kwargs})
        if logger in (None, True) and not config["trainer"]["fast_dev_run"]:
            checkpoint = config.get("ckpt_path")
            folder = RunFolder.of_checkpoint(checkpoint) if checkpoint else None
            folder = folder or RunFolder.new(config["runs_dir"], config["name"])
            kwargs["logger"] = folder.loggers()
            _say(f"Run folder: {folder.path}")
        trainer: Any = super().instantiate_trainer(**kwargs)
        if not any(isinstance(callback, RNGStateCallback) for callback in trainer.callbacks):
            trainer.callbacks.append(RNGStateCallback())
        trainer.callbacks.append(ResumeMetrics())  # last: who refuses to resume does so before
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # not one of the user's
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer


def _option(words: list[str], name: str) -> str | None:
    """Return the value of `--name value` or `--name=value`."""
    for index, word in enumerate(words):
        if word == name and index + 1 < len(words):
            return words[index + 1]
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None


def _stored_configuration(checkpoint: str) -> dict[str, Any]:
    """Return the `model` and `data` configuration that a checkpoint was made with."""
    stored = read_checkpoint(checkpoint)
    parts = {"model": "hyper_parameters", "data": "datamodule_hyper_parameters"}
    found = {}
    for part, key in parts.items():
        arguments = dict(stored.get(key) or {})
        class_path = arguments.pop("_class_path", None)
        arguments.pop("_instantiator", None)
        if class_path:
            found[part] = {"class_path": class_path, "init_args": arguments}
    return found


def _print_differences(stored: dict[str, Any], given: Namespace) -> None:
    for name, value in given.as_dict().items():
        if name in stored and stored[name] != value:
            _say(f"Resuming with {name} = {value!r}, checkpoint: {stored[name]!r}.")


@rank_zero_only
def _say(text: str) -> None:
    print(text, flush=True)


def _quiet() -> None:
    """Silence warnings that say nothing to a user of this package."""
    # The frozen parts of a policy are meant to be in evaluation mode.
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
    # Networks are passed as arguments, and checkpoints drop them from the hyperparameters.
    warnings.filterwarnings("ignore", message="Attribute .* is an instance of `nn.Module`")
    # Experience is generated, not loaded: there is nothing for workers to do.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # torch 2.15 deprecates what lightning 2.6 still calls.
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
    warnings.filterwarnings("ignore", message=".*instantiate_classes.*deprecated.*")


def main(args: list[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: Words after the program's name; by default those of the process.
    """
    sys.path.insert(0, os.getcwd())  # classes of the user's own folder
    _quiet()
    words = sys.argv[1:] if args is None else args
    if words and words[0] in VERBS:
        given = _runs_first(words[1:]) if words[0] == "compare" else words[1:]
        auto_cli(VERBS[words[0]], args=given, prog=f"run.py {words[0]}", as_positional=False)
    else:
        _run(args)


def _runs_first(words: list[str]) -> list[str]:
    """Return the words with those before the first option as `--runs [...]`."""
    count = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    return [f"--runs={json.dumps(words[:count])}", *words[count:]] if count else words


def _run(args: list[str] | None) -> None:
    """Run LightningCLI; what a constructor refused is told without the parser's wrapping.

    Raises:
        ValueError: As the constructor raised it, or another error.
    """
    try:
        LitAlignCLI(args=args)
    except ValueError as error:
        cause = error.__cause__ or error.__context__
        while cause is not None and (deeper := cause.__cause__ or cause.__context__):
            if _raised_here(cause):
                break
            cause = deeper
        if cause is None or not _raised_here(cause) or _raised_here(error):
            raise
        raise cause from None


def _raised_here(error: BaseException) -> bool:
    """Return whether a statement of this package raised the error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    raiser = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return raiser.split(".")[0] == "lit_align"

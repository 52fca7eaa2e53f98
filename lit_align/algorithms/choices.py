"""Options that are one of several words, checked also where no command line does."""

from __future__ import annotations

from typing import Any, get_args

from lit_align.policies.base import DiffusionPolicy


def check_choice(name: str, value: str, choices: Any) -> None:
    """Check an option that is one of several words.

    Raises:
        ValueError: If it is none of them.
    """
    if value not in get_args(choices):
        words = ", ".join(map(repr, get_args(choices)))
        raise ValueError(f"`{name}` must be one of {words}, got {value!r}.")


def check_train(policy: DiffusionPolicy, method: str, trains_policy: bool) -> None:
    """Check that the policy is trainable if the method trains it, and frozen otherwise.

    Raises:
        ValueError: If it is not.
    """
    trainable = any(parameter.requires_grad for parameter in policy.parameters())
    if trains_policy and not trainable:
        raise ValueError("The policy has `train: none`; use 'lora' or 'full' to fit it.")
    if trainable and not trains_policy:
        raise ValueError(
            f"{method} leaves the policy as it is: set its `train: none`, got "
            f"{policy.train_mode!r}."
        )

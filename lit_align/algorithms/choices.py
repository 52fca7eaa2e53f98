"""Checks of the options that methods are given."""

from __future__ import annotations

from lit_align.functional.choices import check_choice
from lit_align.policies.base import DiffusionPolicy

__all__ = ["check_choice", "check_train"]


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

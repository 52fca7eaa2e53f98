"""Options that are one of several words, checked also where no command line does."""

from __future__ import annotations

from typing import Any, get_args


def check_choice(name: str, value: str, choices: Any) -> None:
    """Check an option that is one of several words.

    Args:
        name: Of the option.
        value: What was given.
        choices: The words, as a `Literal` or one by one.

    Raises:
        ValueError: If it is none of them.
    """
    words = get_args(choices) or tuple(choices)
    if value not in words:
        told = ", ".join(map(repr, words))
        raise ValueError(f"`{name}` must be one of {told}, got {value!r}.")

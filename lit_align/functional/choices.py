"""Options that are one of several words, checked also where no command line does."""

from __future__ import annotations

from typing import Any, get_args


def check_choice(name: str, value: str, choices: Any) -> None:
    """Check an option that is one of several words.

    Args:
        name: Of the option.
        value: What was given.
        choices: The words, as a `Literal`.

    Raises:
        ValueError: If it is none of them.
    """
    if value not in get_args(choices):
        words = ", ".join(map(repr, get_args(choices)))
        raise ValueError(f"`{name}` must be one of {words}, got {value!r}.")

"""Byte-pair tables for captions: every word of the grammar is one token."""

from __future__ import annotations

from typing import Any

from lit_align.shapes.grammar import vocabulary

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_TOKENS = 16  # the longest caption has 14 words


def byte_pair_tables() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return (vocabulary, merges) for a CLIP tokenizer; unknown words fall apart into bytes."""
    alphabet = _byte_alphabet()
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet)]
    merges: list[tuple[str, str]] = []
    for word in vocabulary():
        parts = [*word[:-1], f"{word[-1]}</w>"]
        for pair in merges:
            parts = _merge(parts, pair)
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            tokens.append(parts[0] + parts[1])
            parts = _merge(parts, merges[-1])
    return {token: index for index, token in enumerate([*tokens, START, END])}, merges


def tokenizer_options() -> dict[str, Any]:
    """Return the arguments of transformers' `CLIPTokenizer` for captions."""
    vocab, merges = byte_pair_tables()
    return {"vocab": vocab, "merges": merges, "model_max_length": MAX_TOKENS}


def _byte_alphabet() -> list[str]:
    """Return the 256 printable stand-ins for bytes of byte-level tokenizers (as in GPT-2)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return sorted(chr(byte) for byte in printable) + [chr(256 + i) for i in range(len(hidden))]


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged

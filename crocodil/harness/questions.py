"""Requests as token ids: cut to what the model reads, in batches of equal lengths, each with a seed of its own."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import groupby
from typing import Any

Pair = tuple[list[int], list[int]]
"""Token ids of a prompt and of an answer to it."""


@dataclass(frozen=True)
class Question:
    """What is to be answered.

    Attributes:
        prompt: token ids.
        seed: 64 bits.
        length: tokens to write.
        temperature: of written tokens.
        until: strings before which the answer ends.
    """

    prompt: list[int]
    seed: int
    length: int
    temperature: float
    until: list[str]


def request_seed(*parts: Any) -> int:
    """64 bits that depend on what is asked alone; the same in every process."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "big", signed=True)


def fit_prompts(prompts: Sequence[list[int]], lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Prompts that leave room for answers; those that are too long lose their beginning, with a warning.

    Args:
        prompts: token ids.
        lengths: tokens of the answer to each.
        max_length: the longest text the model reads, in tokens.

    Raises:
        ValueError: if an answer has no token, or is too long by itself.
    """
    if 0 in lengths:
        raise ValueError("an answer must have a token of its own, but one ends inside the last token of its prompt")
    if (longest := max(lengths, default=1)) > max_length:
        raise ValueError(
            f"an answer must have at most {max_length} tokens, all that the model reads, got {longest} (where answers "
            "are written, length or max_gen_toks says how many)"
        )
    surplus = [max(0, len(prompt) + length - max_length) for prompt, length in zip(prompts, lengths, strict=True)]
    if num_long := sum(excess > 0 for excess in surplus):
        warnings.warn(
            f"{num_long} of {len(prompts)} prompts lost their beginning: the model reads {max_length} tokens, those of "
            "the answer included",
            stacklevel=4,
        )
    return [prompt[excess:] for prompt, excess in zip(prompts, surplus, strict=True)]


def equal_lengths(pairs: Sequence[Pair], batch_size: int) -> Iterator[list[int]]:
    """Indices of pairs in batches without padding, the longest texts first, so that memory runs out early or never.

    Args:
        pairs: prompts and answers.
        batch_size: the most pairs in a batch.
    """

    def lengths(i: int) -> tuple[int, int]:
        return len(pairs[i][0]), len(pairs[i][1])

    order = sorted(range(len(pairs)), key=lambda i: (-sum(lengths(i)), lengths(i), pairs[i]))
    for _, group in groupby(order, key=lengths):
        members = list(group)
        yield from (members[at : at + batch_size] for at in range(0, len(members), batch_size))

"""From documents of any length to rows of at most `length` tokens: cut, grouped by length, or packed."""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

Layout = Literal["padded", "grouped", "packed"]
PACK_WINDOW = 4096
MAX_DOCUMENTS = 16
"""Documents in a packed row at most: the registers of all of them stand before the row."""
PAD_MULTIPLE = 8
GROUP_BATCHES = 64


@dataclass(frozen=True)
class RowFormat:
    """How rows become batches.

    Args:
        length: L, tokens in a row at most.
        eos_token_id: fills the tail of a row.
        layout: "padded": one text a row, all rows `length` tokens; "grouped": one text a row, texts of similar length
            in a batch, which is as long as its longest; "packed": several texts in a row, which do not see each other.
        hide_padding: the tail is neither seen nor trained on, instead of being text that consists of end tokens, from
            which a model learns how long texts are. Packed rows always hide it.

    Raises:
        ValueError: if the layout is unknown.
    """

    length: int
    eos_token_id: int
    layout: Layout = "padded"
    hide_padding: bool = False

    def __post_init__(self) -> None:
        if self.layout not in get_args(Layout):
            raise ValueError(f"layout must be one of {', '.join(get_args(Layout))}, got {self.layout!r}.")

    def held_out(self) -> "RowFormat":
        """The format of held-out batches: one text a row, in the order of the corpus."""
        if self.layout != "packed":
            return self
        return RowFormat(self.length, self.eos_token_id, "grouped", hide_padding=True)

    @property
    def hides_padding(self) -> bool:
        """Whether networks do not see the tail of a row."""
        return self.hide_padding or self.layout == "packed"

    def alone(self) -> "RowFormat":
        """The format that gives each text, one a row, the latents that it has in training.

        Raises:
            ValueError: if these depend on the batch the text is in.
        """
        if self.hides_padding:
            return RowFormat(self.length, self.eos_token_id, "grouped", hide_padding=True)
        if self.layout == "grouped":
            raise ValueError(
                "stored latents need layout=grouped to go with hide_padding=true: else the end tokens behind a text, "
                "which the encoder reads, are as many as its batch is wide."
            )
        return self

    def collate(self, rows: Sequence[Sequence[np.ndarray]]) -> dict[str, Tensor]:
        """A batch of rows, each of one or more texts.

        Args:
            rows: B rows, each the token ids of its texts, at most `length` in all.

        Returns:
            "token_ids" (B, L) int64; and, where padding is hidden or rows are packed, "document_ids" (B, L) int64: 0 at
            padding, n at the n-th text of its row.
        """
        longest = max(sum(map(len, row)) for row in rows)
        width = min(self.length, -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE)
        width = width if self.layout == "grouped" else self.length
        token_ids = np.full((len(rows), width), self.eos_token_id, dtype=np.int64)
        document_ids = np.zeros_like(token_ids)
        for row, ids, numbers in zip(rows, token_ids, document_ids, strict=True):
            start = 0
            for number, text in enumerate(row, 1):
                ids[start : start + len(text)] = text
                numbers[start : start + len(text)] = number
                start += len(text)
        batch = {"token_ids": torch.from_numpy(token_ids)}
        if self.hides_padding:
            batch["document_ids"] = torch.from_numpy(document_ids)
        return batch


def cut(lengths: np.ndarray, length: int) -> np.ndarray:
    """Cuts documents that stand one behind the other into pieces of at most `length` tokens.

    Args:
        lengths: (N,) integers, tokens of each document, at least 2; the last token of each is its end token.
        length: tokens of a piece at most, at least 2.

    Returns:
        (M, 3) int64, in order: where the piece begins among all tokens, its length, and the document it is of. All
        pieces of a document but its last have `length` tokens; an end token is never a piece of its own, but left out.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    per_document = -(-lengths // length) - (lengths % length == 1)
    document = np.repeat(np.arange(len(lengths)), per_document)
    starts = np.cumsum(lengths) - lengths
    ordinal = np.arange(len(document)) - np.repeat(np.cumsum(per_document) - per_document, per_document)
    offset = ordinal * length
    return np.stack([starts[document] + offset, np.minimum(length, lengths[document] - offset), document], axis=1)


def pack(lengths: np.ndarray, capacity: int, max_documents: int = MAX_DOCUMENTS) -> list[np.ndarray]:
    """Puts pieces into rows of `capacity` tokens by best fit, longest first, within windows of `PACK_WINDOW` pieces.

    Args:
        lengths: (N,) integers, 1 to `capacity`.
        capacity: tokens of a row.
        max_documents: pieces of a row at most.

    Returns:
        For each row the indices of its pieces, rising, in the order of the rows' first pieces; every index occurs once.
    """
    rows: list[np.ndarray] = []
    for start in range(0, len(lengths), PACK_WINDOW):
        window = np.asarray(lengths[start : start + PACK_WINDOW])
        packed = (start + np.sort(row) for row in _best_fit(window, capacity, max_documents))
        rows += sorted(packed, key=lambda row: row[0])
    return rows


def _best_fit(lengths: np.ndarray, capacity: int, max_documents: int) -> list[list[int]]:
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for piece in np.argsort(-lengths, kind="stable").tolist():
        size = int(lengths[piece])
        place = bisect_left(room, (size, -1))
        if place == len(room):
            free, row = capacity, len(rows)
            rows.append([])
        else:
            free, row = room.pop(place)
        rows[row].append(piece)
        if free > size and len(rows[row]) < max_documents:
            insort(room, (free - size, row))
    return rows


def grouped_order(lengths: np.ndarray, batch_size: int, generator: np.random.Generator, first: int = 0) -> np.ndarray:
    """An order of rows in which each batch has rows of similar length, and batches follow one another at random.

    Args:
        lengths: (N,) integers, in an order that is random already.
        batch_size: rows of a batch, over all processes.
        generator: of the order of batches.
        first: rows that complete a batch begun before, in [0, batch_size).

    Returns:
        (N,) int64, a permutation: `first` rows, then whole batches, then the rest.
    """
    by_length = first + np.argsort(lengths[first:], kind="stable")
    whole = len(by_length) // batch_size * batch_size
    # What is left over must not always be the longest: it is taken from a random place.
    place = int(generator.integers(whole // batch_size + 1)) * batch_size
    rest = by_length[place : place + len(by_length) - whole]
    batches = np.delete(by_length, slice(place, place + len(rest))).reshape(-1, batch_size)
    order = generator.permuted(generator.permutation(batches), axis=1)
    return np.concatenate([np.arange(min(first, len(lengths))), order.ravel(), rest])


def windows(order: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Consecutive parts of an order, of `size` items each but the last."""
    for start in range(0, len(order), size):
        yield order[start : start + size]

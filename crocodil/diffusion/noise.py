"""Counter-based random numbers: a value depends on its own keys, never on the batch it travels in."""

import math
from copy import copy
from typing import Self

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
_GOLDEN_SECTION = (math.sqrt(5) - 1) / 2
STREAM_TIME, STREAM_MASK, STREAM_LATENT_NOISE, STREAM_CHOICE = 100, 101, 102, 103
"""Streams of training and evaluation; samplers have their own below 100."""


def mix(keys: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele et al., 2014), on int64 tensors with wrap-around."""
    keys = (keys ^ _shift_right(keys, 30)) * _MIX_1
    keys = (keys ^ _shift_right(keys, 27)) * _MIX_2
    return keys ^ _shift_right(keys, 31)


def _shift_right(keys: Tensor, bits: int) -> Tensor:
    """Logical shift: the sign bit is not copied."""
    return (keys >> bits) & ((1 << (64 - bits)) - 1)


class RowNoise:
    """Independent streams of random numbers, one for each row of a batch.

    Each value is a hash of (seed of the row, stream, step, index): the same on every device, whatever the batch
    size and whichever rows share the batch.

    Args:
        seeds: (B,) int64, one for each row.
    """

    def __init__(self, seeds: Tensor) -> None:
        self.keys = mix(mix(seeds.long()) + _GOLDEN)

    def to(self, device: torch.device) -> Self:
        """The same noise, drawn on another device."""
        moved = copy(self)
        moved.keys = self.keys.to(device, non_blocking=True)
        return moved

    @classmethod
    def from_generator(cls, generator: torch.Generator | None, batch_size: int, device: torch.device) -> "RowNoise":
        """Draws one seed a row from `generator`, or from torch's global generator if None."""
        source = torch.device("cpu") if generator is None else generator.device
        seeds = torch.randint(-(2**63), 2**63 - 1, (batch_size,), generator=generator, device=source)
        return cls(seeds.to(device))

    def uniform(self, stream: int, step: int, size: int) -> Tensor:
        """(B, size) float64, uniform on the open interval (0, 1): odd multiples of 2^-53, all exact in float64."""
        index = torch.arange(1, size + 1, device=self.keys.device)
        key = mix(self.keys + _wrap(_GOLDEN * 3 * (stream + 1)))
        key = mix(key + _wrap(_GOLDEN * (step + 1)))
        bits = _shift_right(mix(key[:, None] + index * _GOLDEN), 12)
        return (bits.double() + 0.5) * 2.0**-52

    def normal(self, stream: int, step: int, shape: tuple[int, ...]) -> Tensor:
        """(B, *shape) float32 standard normal numbers, by the Box-Muller transform in float64."""
        size = math.prod(shape)
        u, v = self.uniform(stream, step, 2 * size).chunk(2, dim=1)
        values = (-2 * u.log()).sqrt() * (2 * math.pi * v).cos()
        return values.float().view(-1, *shape)


class BatchNoise(RowNoise):
    """The noise of a batch whose rows may be spread over processes: keyed by their places in the whole batch.

    Args:
        seed: int64 scalar, of the batch.
        rows: (B,) int64, places of these rows in the whole batch.
        num_rows: rows of the whole batch.
    """

    def __init__(self, seed: Tensor, rows: Tensor, num_rows: int) -> None:
        super().__init__(seed + rows)
        self.rows = rows
        self.num_rows = num_rows
        self._first = RowNoise(seed[None])

    def to(self, device: torch.device) -> Self:
        """The same noise, drawn on another device."""
        moved = super().to(device)
        moved.rows, moved._first = self.rows.to(device, non_blocking=True), self._first.to(device)
        return moved

    def of_documents(self, row: Tensor, number: Tensor) -> Self:
        """The noise of documents, several in a row of this batch, that of a row's first document being the row's own.

        Places in the batch tell the stratified times. A document stands (n - 1) golden sections of the batch behind its
        row: the n-th documents of all rows are as evenly spread as rows are, and those of one row are far from each
        other, whatever the number of rows.

        Args:
            row: (N,) int64, the row of each document, as an index of `rows`.
            number: (N,) int64, n, which document of its row it is, from 1.
        """
        documents, before = copy(self), number - 1
        documents.keys = self.keys[row] + before * _MIX_1
        documents.rows = self.rows[row] + before.double() * _GOLDEN_SECTION % 1 * self.num_rows
        return documents

    def shared(self, stream: int, step: int) -> Tensor:
        """One number for the whole batch, that of its first row: a float64 scalar, uniform on (0, 1)."""
        return self._first.uniform(stream, step, 1)[0, 0]


def _wrap(value: int) -> int:
    """A Python integer reduced to the signed 64-bit range."""
    return (value + 2**63) % 2**64 - 2**63

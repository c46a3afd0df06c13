"""The documents of a batch: one a row, or several in a row that do not see each other, and padding."""

from collections.abc import Mapping
from copy import copy
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from crocodil.diffusion.noise import BatchNoise


class Documents:
    """What belongs to which document, in a batch whose rows are one document each.

    Built on the host, so that sizes are known without a wait for a device; `to` gives the same for tensors on one.

    Args:
        num_rows: B.
        length: L.

    Attributes:
        per_row: S, documents in a row at most.
        num_tokens: tokens of all documents; padding is none.
    """

    def __init__(self, num_rows: int, length: int) -> None:
        self.num_rows, self.length = num_rows, length
        self.per_row, self.num_tokens = 1, num_rows * length

    @staticmethod
    def of(batch: Mapping[str, Tensor]) -> "Documents":
        """The documents of a batch, on its device.

        Args:
            batch: "token_ids" (B, L) int64 and, if there is padding or packing, "document_ids" (B, L) int64.

        Raises:
            ValueError: see `NumberedDocuments`.
        """
        token_ids, ids = batch["token_ids"], batch.get("document_ids")
        return Documents(*token_ids.shape) if ids is None else NumberedDocuments(ids).to(token_ids.device)

    def __len__(self) -> int:
        """N."""
        return self.num_rows

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        return self

    def one_a_row(self, who: str) -> Self:
        """Itself, if no row is packed.

        Args:
            who: reads one document a row.

        Raises:
            ValueError: if there are several in a row.
        """
        if self.per_row > 1:
            raise ValueError(f"{who} reads one text a row, got {self.per_row} documents in a row; use padded rows")
        return self

    def first_rows(self, count: int) -> "Documents":
        """The documents of the first rows of the batch."""
        return Documents(count, self.length)

    @property
    def host(self) -> "Documents":
        """The same on the host."""
        return self

    @property
    def attention(self) -> dict[str, Any]:
        """The arguments with which a network keeps documents apart."""
        return {}

    def noise(self, noise: BatchNoise) -> BatchNoise:
        """The noise of each document from that of the rows; the first document of a row has the row's own."""
        return noise

    def spread(self, values: Tensor) -> Tensor:
        """Values of documents (N,) at the positions of each, (B, 1 or L); 0 at padding."""
        return values[:, None]

    def sums(self, values: Tensor) -> Tensor:
        """Sums over the positions of each document: (B, L), 0 at padding -> (N,)."""
        return values.sum(1)

    def of_row(self, values: Tensor) -> Tensor:
        """For each document the value of its row: (B,) -> (N,)."""
        return values

    def from_rows(self, values: Tensor) -> Tensor:
        """What a network gives for the documents of each row, (B, S, ...), or (B, ...) if S = 1, as (N, ...)."""
        return values

    def to_rows(self, values: Tensor) -> Tensor:
        """The inverse of `from_rows`: zeros in the place of documents that a row does not have."""
        return values


class NumberedDocuments(Documents):
    """What belongs to which document, where rows are padded or hold several.

    Args:
        document_ids: (B, L) int64: n at the n-th document of a row, from 1, without gaps; 0 at padding. On the host,
            else this waits for its device.

    Attributes:
        ids: (B, L) int64, the same.
        row: (N,) int64, the row of each document, rising.
        number: (N,) int64, which one of its row it is, from 1.
        index: (B, L) int64, the document of each position, in [0, N); any at padding.

    Raises:
        ValueError: if there is no document, or one that is not contiguous, or the numbers of a row have a gap.
    """

    def __init__(self, document_ids: Tensor) -> None:
        super().__init__(*document_ids.shape)
        self._host, self.ids = self, document_ids.cpu()
        self.per_row = int(self.ids.max()) if self.ids.numel() else 0
        if self.per_row < 1:
            raise ValueError("document_ids must number at least one document from 1, got zeros only")
        counts = torch.zeros(self.num_rows, self.per_row + 1, dtype=torch.int64)
        counts.scatter_add_(1, self.ids, torch.ones_like(self.ids))
        is_there = counts[:, 1:] > 0
        self.num_tokens = int(counts[:, 1:].sum())
        self._refuse_scattered(is_there)
        self.row, place = is_there.nonzero(as_tuple=True)
        self.number = place + 1
        order = is_there.flatten().cumsum(0).view_as(is_there) - 1
        self.index = F.pad(order, (1, 0)).gather(1, self.ids)

    def _refuse_scattered(self, is_there: Tensor) -> None:
        begins = (F.pad(self.ids, (1, 0))[:, :-1] != self.ids) & (self.ids > 0)
        bad = (is_there[:, 1:] > is_there[:, :-1]).any(1) | (begins.sum(1) != is_there.sum(1))
        if bad.any():
            got = self.ids[bad][0].unique_consecutive().tolist()
            raise ValueError(
                f"document_ids must number the contiguous documents of each row 1, 2, ... without a gap, got {got}"
            )

    def __len__(self) -> int:
        """N."""
        return len(self.row)

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        moved = copy(self)
        for name in ("ids", "row", "number", "index"):
            setattr(moved, name, getattr(self, name).to(device, non_blocking=True))
        return moved

    def first_rows(self, count: int) -> Documents:
        """The documents of the first rows of the batch."""
        return NumberedDocuments(self._host.ids[:count]).to(self.ids.device)

    @property
    def host(self) -> Documents:
        """The same on the host."""
        return self._host

    @property
    def attention(self) -> dict[str, Any]:
        """The arguments with which a network keeps documents apart."""
        return {"attention_mask": self.ids, "num_documents": self.per_row}

    def noise(self, noise: BatchNoise) -> BatchNoise:
        """The noise of each document from that of the rows; the first document of a row has the row's own."""
        return noise.of_documents(self.row, self.number)

    def spread(self, values: Tensor) -> Tensor:
        """Values of documents (N,) at the positions of each, (B, L); 0 at padding."""
        return values[self.index] * (self.ids > 0)

    def sums(self, values: Tensor) -> Tensor:
        """Sums over the positions of each document: (B, L), 0 at padding -> (N,)."""
        return values.new_zeros(len(self)).index_add(0, self.index.flatten(), values.flatten())

    def of_row(self, values: Tensor) -> Tensor:
        """For each document the value of its row: (B,) -> (N,)."""
        return values[self.row]

    def from_rows(self, values: Tensor) -> Tensor:
        """What a network gives for the documents of each row, (B, S, ...), or (B, ...) if S = 1, as (N, ...)."""
        values = values.flatten(0, 1) if self.per_row > 1 else values
        return values if len(self) == len(values) else values[self._place]

    def to_rows(self, values: Tensor) -> Tensor:
        """The inverse of `from_rows`: zeros in the place of documents that a row does not have."""
        places = self.num_rows * self.per_row
        if len(self) < places:
            values = values.new_zeros(places, *values.shape[1:]).index_copy(0, self._place, values)
        return values.unflatten(0, (self.num_rows, self.per_row)) if self.per_row > 1 else values

    @property
    def _place(self) -> Tensor:
        return self.row * self.per_row + self.number - 1

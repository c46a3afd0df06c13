"""In which order an epoch sees the rows of a split, and a loader that goes on within an epoch."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from crocodil.data.rows import GROUP_BATCHES, grouped_order, windows
from crocodil.data.tokens import TokenDataset
from crocodil.ranks import rank_and_size

WINDOW = 2**16


class EpochOrder(DistributedSampler[int]):
    """A fresh order for each epoch, a function of (seed, epoch) alone, dealt out in turn to the processes of the run.

    So N processes read together what one would with batches N times as large.

    Args:
        dataset: whose rows are ordered.
        seed: at least 0.
        batch_size: rows of a batch of each process; batches of a "grouped" row format have rows of similar length.
        weights: of the sources, as shares of the rows of an epoch; None takes every row once.

    Raises:
        ValueError: if an epoch has no row.
    """

    def __init__(
        self, dataset: TokenDataset, seed: int, batch_size: int, weights: Sequence[float] | None = None
    ) -> None:
        rank, size = rank_and_size()
        super().__init__(dataset, size, rank, seed=seed, drop_last=True)
        self.rows, self.weights = dataset, weights
        total = len(dataset) if weights is None else int(shares(dataset.bounds, weights).sum())
        if not total:
            raise ValueError(
                f"sources with a weight above 0 must have rows, got {np.diff(dataset.bounds)} of weights {weights}."
            )
        self.num_samples = total // size
        self.total_size = self.num_samples * size
        self.group = batch_size * size if dataset.row_format.layout == "grouped" else None
        self.start = 0
        """Rows of this process to leave out of the next epoch that is begun."""

    def __iter__(self) -> Iterator[int]:
        skipped, self.start = self.start * self.num_replicas, 0
        order = self.of_epoch()[skipped + self.rank : self.total_size : self.num_replicas]
        for window in windows(order, WINDOW):
            yield from window.tolist()

    def of_epoch(self) -> np.ndarray:
        """The rows of the epoch for all processes together, (N,) int64."""
        generator = np.random.default_rng((self.seed, self.epoch))
        if self.weights is None:
            order = generator.permutation(len(self.rows))
        else:
            order = generator.permutation(mixture(self.rows.bounds, self.weights, self.seed, self.epoch))
        if self.group is None:
            return order
        lengths = self.rows.store.lengths
        parts = []
        for part in windows(order, self.group * GROUP_BATCHES):
            parts.append(part[grouped_order(lengths[part], self.group, generator)])
        return np.concatenate(parts) if parts else order


def mixture(bounds: np.ndarray, weights: Sequence[float], seed: int, epoch: int) -> np.ndarray:
    """Rows of an epoch in which each source has its share, whatever its size.

    A source is read in passes, each in an order of its own, that run on from epoch to epoch: no row of it comes again
    before all others have come.

    Args:
        bounds: (S + 1,), the rows of source s are those from bounds[s] up to bounds[s + 1].
        weights: (S,) shares, at least 0; only their ratios matter.
        seed: of the orders.
        epoch: from 0 on.

    Returns:
        As many rows as there are, source after source, int64.
    """
    rows = [np.empty(0, np.int64)]
    counts = shares(bounds, weights).tolist()
    for source, (size, count) in enumerate(zip(np.diff(bounds).tolist(), counts, strict=True)):
        if not count:
            continue
        drawn = epoch * count + np.arange(count)
        passes = range(drawn[0] // size, drawn[-1] // size + 1)
        orders = np.concatenate([np.random.default_rng((seed, source, i)).permutation(size) for i in passes])
        rows.append(bounds[source] + orders[drawn - drawn[0] // size * size])
    return np.concatenate(rows)


def shares(bounds: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Rows of an epoch from each source, (S,) int64: as many as there are in all, but for rounding; see `mixture`."""
    sizes = np.diff(bounds)
    given = np.where(sizes > 0, weights, 0.0)
    return np.floor(sizes.sum() * given / max(given.sum(), 1e-300)).astype(np.int64)


class ResumableLoader(DataLoader[Tensor]):
    """A loader over an `EpochOrder` that goes on within an epoch: Lightning keeps its state in every checkpoint."""

    _resumed: dict[str, Any] | None = None
    _given = 0

    @property
    def _epoch(self) -> int | None:
        return getattr(self.sampler, "epoch", None)  # None where the Trainer put in a sampler without epochs

    def state_dict(self) -> dict[str, Any]:
        """The epoch, and how many of its batches were given out."""
        return {"epoch": self._epoch, "batches": self._given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Leaves out the batches that were given out, if the next epoch is the one they were of.

        Args:
            state: of `state_dict`.
        """
        self._resumed = state

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        resumed, self._resumed = self._resumed, None
        self._given = 0
        if resumed and isinstance(self.sampler, EpochOrder) and resumed["epoch"] == self._epoch:
            assert self.batch_size is not None
            self._given = resumed["batches"]
            self.sampler.start = self._given * self.batch_size
        for batch in super().__iter__():
            self._given += 1
            yield batch

"""Blocks of token ids as a PyTorch dataset, read a batch at a time, and the order in which an epoch sees them."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from crocodil.ranks import rank_and_size


class BlockDataset(Dataset[Tensor]):
    """Rows of an integer array.

    Args:
        array: (N, L) integers, possibly memory-mapped.
    """

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> Tensor:
        return self.__getitems__([index])["token_ids"][0]

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A whole batch at once: {"token_ids": (B, L) int64}; a DataLoader calls this instead of `__getitem__`."""
        return {"token_ids": torch.from_numpy(self.array[np.asarray(indices)].astype(np.int64))}


class EpochShuffle(DistributedSampler[int]):
    """A fresh permutation for each epoch, a function of (seed, epoch) alone.

    It is dealt out in turn to the processes of the run, so that N of them read together what one would with batches
    N times as large.

    Args:
        dataset: whose items are shuffled.
        seed: at least 0.
    """

    def __init__(self, dataset: BlockDataset, seed: int) -> None:
        rank, size = rank_and_size()
        super().__init__(dataset, size, rank, seed=seed, drop_last=True)

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self.dataset))  # type: ignore[arg-type]
        yield from order[self.rank : self.total_size : self.num_replicas].tolist()


class ResumableLoader(DataLoader[Tensor]):
    """A loader over an `EpochShuffle` that goes on within an epoch: Lightning keeps its state in every checkpoint."""

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
        epoch = self._epoch
        self._given = resumed["batches"] if resumed and epoch is not None and resumed["epoch"] == epoch else 0
        for batch in islice(super().__iter__(), self._given, None):
            self._given += 1
            yield batch


def whole_batch(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Collate function of a dataset that gives whole batches."""
    return batch

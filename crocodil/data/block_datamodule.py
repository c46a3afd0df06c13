"""What every data module of crocodil is: blocks of token ids in three splits, prepared once, then read from a cache."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader

from crocodil.data.blocks import BlockDataset, EpochShuffle, ResumableLoader, whole_batch
from crocodil.data.cache import cache_key, cached_folder
from crocodil.data.codec import TextCodec
from crocodil.data.corpora import SourceFile, Split
from crocodil.data.vocabulary import Vocabulary
from crocodil.ranks import rank_and_size

SUMMARY_FILE = "summary.json"


class BlockDataModule(LightningDataModule, ABC):
    """Blocks of `length` token ids in three splits, prepared once and kept in a cache.

    A batch is {"token_ids": (B, L) int64}. The training loader shuffles by (seed, epoch) and drops the last partial
    batch; the other loaders keep everything in order. `predict` is the test split.

    Args:
        length: tokens in a block, BOS and EOS included.
        batch_size: blocks in a batch of each process.
        cache_dir: folder of prepared corpora; None for `$XDG_CACHE_HOME/crocodil` or `~/.cache/crocodil`.
        num_workers: processes that read batches; 0 reads them in the main process, which is fast enough.
        seed: seed of the shuffle.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(self, length: int, batch_size: int, cache_dir: str | None, num_workers: int, seed: int) -> None:
        super().__init__()
        require_at_least("length", length, 4)
        require_at_least("batch_size", batch_size, 1)
        require_at_least("num_workers", num_workers, 0)
        require_at_least("seed", seed, 0)
        self.length = length
        self.batch_size = batch_size
        self.cache_dir = cache_dir
        self.num_workers = num_workers
        self.seed = seed
        self._folder: Path | None = None

    @property
    @abstractmethod
    def vocabulary(self) -> Vocabulary:
        """Size and special token ids, known before any data is prepared."""

    @property
    @abstractmethod
    def codec(self) -> TextCodec:
        """Text to token ids and back; prepared on first use."""

    @abstractmethod
    def _configuration(self) -> dict[str, Any]:
        """Plain values that the prepared content depends on."""

    @abstractmethod
    def _source_files(self) -> list[SourceFile]:
        """The files of the corpus in a fixed order."""

    @abstractmethod
    def _build(self, folder: Path, files: Sequence[SourceFile]) -> dict[str, int | str]:
        """Writes train.npy, val.npy, test.npy into the folder; returns the counts to report."""

    def prepare_data(self) -> None:
        """Prepares the blocks, unless the cache has them."""
        self._prepared_folder()

    def _prepared_folder(self) -> Path:
        if self._folder is None:
            files = self._source_files()
            name = f"{type(self).__name__}-{cache_key(self._configuration(), files)}"
            self._folder = cached_folder(self.cache_dir, name, lambda folder: self._build_and_report(folder, files))
        return self._folder

    def _build_and_report(self, folder: Path, files: Sequence[SourceFile]) -> None:
        counts = self._build(folder, files)
        (folder / SUMMARY_FILE).write_text(json.dumps(counts, indent=2) + "\n")
        rank_zero_info(f"{type(self).__name__}: {_in_words(counts)}.")

    def setup(self, stage: str | None = None) -> None:
        """Opens the splits that the stage needs.

        Args:
            stage: "fit", "validate", "test", "predict", or None for "fit".

        Raises:
            ValueError: if the corpus is too small for the stage.
        """
        needed: dict[str | None, tuple[Split, ...]] = {"validate": ("val",), "test": ("test",), "predict": ("test",)}
        for split in needed.get(stage, ("train", "val")):
            self.array(split)

    def blocks(self, split: Split) -> Tensor:
        """All blocks of a split in order.

        Args:
            split: "train", "val" or "test".

        Returns:
            (N, L) int64.

        Raises:
            ValueError: if the split is empty.
        """
        return torch.from_numpy(self.array(split).astype(np.int64))

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Shuffled batches of the training split, all of `batch_size` blocks; each process has its own."""
        dataset = BlockDataset(self.array("train"))
        return self._loader(dataset, ResumableLoader, sampler=EpochShuffle(dataset, self.seed), drop_last=True)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Batches of the validation split, in order."""
        return self._loader(BlockDataset(self.array("val")))

    def test_dataloader(self) -> DataLoader[Tensor]:
        """Batches of the test split, in order."""
        return self._loader(BlockDataset(self.array("test")))

    def predict_dataloader(self) -> DataLoader[Tensor]:
        """Batches of the test split, in order."""
        return self.test_dataloader()

    def _loader(
        self, dataset: BlockDataset, loader: type[DataLoader[Tensor]] = DataLoader, **options: Any
    ) -> DataLoader[Tensor]:
        return loader(
            dataset,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=whole_batch,  # type: ignore[arg-type]
            **options,
        )

    def array(self, split: Split) -> np.ndarray:
        """All blocks of a split, memory-mapped: (N, L) int32.

        Args:
            split: "train", "val" or "test".

        Raises:
            ValueError: if the split is too small.
        """
        folder = self._prepared_folder()
        array = np.load(folder / f"{split}.npy", mmap_mode="r")
        least = self.batch_size * rank_and_size()[1] if split == "train" else 1
        if len(array) < least:
            counts = json.loads((folder / SUMMARY_FILE).read_text())
            raise ValueError(
                f"the {split} split must hold at least {least} blocks of length {self.length}, got {len(array)} "
                f"({_in_words(counts)}): give more files, or a smaller batch_size."
            )
        return array


def require_at_least(name: str, value: int, least: int) -> None:
    """Raises a ValueError that names the argument if it is too small.

    Args:
        name: name of the argument.
        value: what was given.
        least: the smallest value allowed.
    """
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")


def _in_words(counts: Mapping[str, int | str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())

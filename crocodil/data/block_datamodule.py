"""What every data module of crocodil is: token ids in three splits, prepared once, then read from a cache."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader

from crocodil.data.cache import cache_key, cached_folder
from crocodil.data.codec import TextCodec
from crocodil.data.corpora import SourceFile, Split
from crocodil.data.latent_store import LatentStore
from crocodil.data.order import EpochOrder, ResumableLoader
from crocodil.data.rows import Layout, RowFormat, pack
from crocodil.data.tokens import Packs, TokenDataset, TokenStore, whole_batch, write_packs
from crocodil.data.vocabulary import Vocabulary
from crocodil.ranks import rank_and_size

SUMMARY_FILE = "summary.json"
NAMES_FILE = "names.json"


class BlockDataModule(LightningDataModule, ABC):
    """Texts of at most `length` token ids in three splits, prepared once and kept in a cache.

    A batch is that of `RowFormat.collate`, with "origins" (B, 2) int64 to tell where its rows are from. The training
    loader shuffles by (seed, epoch) and drops the last partial batch; the other loaders keep everything in order.
    `predict` is the test split.

    Args:
        length: L, tokens of a text, BOS and EOS included.
        batch_size: rows in a batch of each process.
        cache_dir: folder of prepared corpora; None for `$XDG_CACHE_HOME/crocodil` or `~/.cache/crocodil`.
        num_workers: processes that read batches; 0 reads them in the main process.
        seed: seed of the shuffle.
        layout: of the training batches, see `RowFormat`.
        hide_padding: see `RowFormat`.
        latents: folder of `crocodil encode`; batches of the splits that it holds, the training split at least, have
            "latents" (N, K, D) float32 of their N texts. None for none.

    Raises:
        ValueError: if a number is out of range, or the latents of a text depend on its batch (`RowFormat.alone`).
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        cache_dir: str | None,
        num_workers: int,
        seed: int,
        layout: Layout = "padded",
        hide_padding: bool = False,
        latents: str | None = None,
    ) -> None:
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
        self.row_format = RowFormat(length, self.vocabulary.eos_token_id, layout, hide_padding)
        self.latents = latents
        if latents is not None:
            self.row_format.alone()
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
    def _build(self, folder: Path, aside: Path, files: Sequence[SourceFile]) -> dict[str, int | str]:
        """Writes the splits into the folder (`write_split`); returns the counts to report.

        What is half done may lie in `aside`, where the next call finds it if this one is killed.
        """

    def prepare_data(self) -> None:
        """Prepares the texts, unless the cache has them."""
        self._prepared_folder()
        if self.row_format.layout == "packed":
            self._packs("train")

    def _prepared_folder(self) -> Path:
        if self._folder is None:
            files = self._source_files()
            name = f"{type(self).__name__}-{cache_key(self._configuration(), files)}"
            build = partial(self._build_and_report, files=files)
            self._folder = cached_folder(self.cache_dir, name, build)
        return self._folder

    def _build_and_report(self, folder: Path, aside: Path, files: Sequence[SourceFile]) -> None:
        counts = self._build(folder, aside, files)
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
            self.dataset(split)

    def store(self, split: Split) -> TokenStore:
        """The texts of a split.

        Args:
            split: "train", "val" or "test".
        """
        return TokenStore(self._prepared_folder(), split)

    def dataset(self, split: Split) -> TokenDataset:
        """The rows of a split: of the training split in its layout, else one text each.

        Args:
            split: "train", "val" or "test".

        Raises:
            ValueError: if the split is too small, or its latents are not its own.
        """
        is_train = split == "train"
        row_format = self.row_format if is_train else self.row_format.held_out()
        packs = self._packs(split) if row_format.layout == "packed" else None
        dataset = TokenDataset(self.store(split), row_format, packs, self.latent_store(split))
        least = self.batch_size * rank_and_size()[1] if is_train else 1
        if len(dataset) < least:
            counts = json.loads((self._prepared_folder() / SUMMARY_FILE).read_text())
            raise ValueError(
                f"the {split} split must hold at least {least} rows of length {self.length}, got {len(dataset)} "
                f"({_in_words(counts)}): give more files, or a smaller batch_size."
            )
        return dataset

    @property
    def corpus_name(self) -> str:
        """Name of the prepared corpus, which tells it from every other."""
        return self._prepared_folder().name

    def latent_store(self, split: Split) -> LatentStore | None:
        """The stored latents of a split; None without `latents`, or for a held-out split that was not encoded.

        Args:
            split: "train", "val" or "test".

        Raises:
            ValueError: if those of the training split are absent, or some are not of these texts.
        """
        if self.latents is None:
            return None
        folder = Path(self.latents) / split
        if split != "train" and not folder.exists():
            return None
        store = LatentStore(folder)
        self._check(store, corpus=self.corpus_name, split=split, hides_padding=self.row_format.hides_padding)
        return store

    def check_latents(self, encoder: str) -> None:
        """Refuses stored latents of another encoder.

        Args:
            encoder: fingerprint of the one that is in use.

        Raises:
            ValueError: if one of the splits has others.
        """
        for split in get_args(Split):
            if self.latents is not None and (Path(self.latents) / split).exists():
                self._check(LatentStore(Path(self.latents) / split), encoder=encoder)

    @staticmethod
    def _check(store: LatentStore, **expected: Any) -> None:
        if differing := store.record.differences(**expected):
            raise ValueError(
                f"the latents in {store.folder} are of others: {differing}; give the folder that `crocodil encode` "
                "wrote with this configuration, or let it write a new one."
            )

    def _packs(self, split: Split) -> Packs:
        store = self.store(split)
        return store.packs or write_packs(store, packed_rows(store, self.length))

    def array(self, split: Split) -> np.ndarray:
        """All texts of a split in order, filled up with end tokens: (N, L) int32.

        Args:
            split: "train", "val" or "test".

        Raises:
            ValueError: if the split is too small.
        """
        return self.dataset(split).store.padded(self.length, self.vocabulary.eos_token_id)

    def blocks(self, split: Split) -> Tensor:
        """`array` as a tensor, (N, L) int64."""
        return torch.from_numpy(self.array(split).astype(np.int64))

    def describe(self, origin: tuple[int, int]) -> str:
        """Where a row is from, in words.

        Args:
            origin: a row of a batch's "origins".
        """
        names = json.loads((self._prepared_folder() / NAMES_FILE).read_text())
        return f"{names[origin[0]]}, record {origin[1]}"

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leaves "document_ids" on the host: how many documents there are must be known without a wait for a device."""
        moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return {**moved, **{name: batch[name] for name in ("document_ids",) if name in batch}}

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches of the training split, all of `batch_size` rows; each process has its own."""
        dataset = self.dataset("train")
        order = EpochOrder(dataset, self.seed, self.batch_size, self._weights())
        return self._loader(dataset, ResumableLoader, sampler=order, drop_last=True)

    def _weights(self) -> Sequence[float] | None:
        """Shares of the sources in an epoch; None reads every row once."""
        return None

    def val_dataloader(self) -> DataLoader[Any]:
        """Batches of the validation split, in order."""
        return self._loader(self.dataset("val"))

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of the test split, in order."""
        return self._loader(self.dataset("test"))

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches of the test split, in order."""
        return self.test_dataloader()

    def _loader(
        self, dataset: TokenDataset, loader: type[DataLoader[Any]] = DataLoader, **options: Any
    ) -> DataLoader[Any]:
        return loader(
            dataset,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=whole_batch,  # type: ignore[arg-type]  # the dataset gives batches, not lists of rows
            **options,
        )


def packed_rows(store: TokenStore, length: int) -> list[np.ndarray]:
    """Which texts share a row; texts of different sources do not."""
    rows = []
    for first, last in zip(store.bounds[:-1].tolist(), store.bounds[1:].tolist(), strict=True):
        rows += [first + row for row in pack(store.lengths[first:last], length)]
    return rows


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

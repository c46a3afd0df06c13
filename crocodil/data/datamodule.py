"""LightningDataModules that turn Python programs into blocks of token ids."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from crocodil.data.block_datamodule import BlockDataModule, require_at_least
from crocodil.data.canonical_text import CANONICAL_TOKENS
from crocodil.data.codec import TextCodec, byte_level_bpe
from crocodil.data.corpora import (
    DEFAULT_PACKAGES,
    SkipCount,
    SourceFile,
    Split,
    distinct_by_split,
    folder_files,
    installed_package_files,
    read_text,
    split_of,
    standard_library_files,
    with_progress,
)
from crocodil.data.functions import read_functions
from crocodil.data.vocabulary import Vocabulary

EOS_ID, BOS_ID, MASK_ID = 0, 1, 2
MIN_BPE_SIZE = 260  # 256 bytes and the four special tokens


class CanonicalFunctions(BlockDataModule):
    """Canonical functions, one a block: BOS, the tokens of the function, and EOS up to the end.

    Args:
        length: tokens in a block; functions that do not fit with BOS and one EOS are left out.
        batch_size: blocks in a batch.
        packages: installed distributions to read beside the standard library; None for those that crocodil depends
            on, [] for none.
        folder: folder of Python files to read instead.
        min_tokens: functions with fewer tokens are left out.
        max_functions: keep about this many distinct functions, evenly spread over the corpus; None for all.
        cache_dir: folder of prepared corpora; None for `$XDG_CACHE_HOME/crocodil` or `~/.cache/crocodil`.
        num_workers: processes that read batches.
        seed: seed of the shuffle.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        length: int = 64,
        batch_size: int = 64,
        packages: list[str] | None = None,
        folder: str | None = None,
        min_tokens: int = 14,
        max_functions: int | None = None,
        cache_dir: str | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(length, batch_size, cache_dir, num_workers, seed)
        require_at_least("min_tokens", min_tokens, 1)
        if max_functions is not None:
            require_at_least("max_functions", max_functions, 1)
        self.packages = list(DEFAULT_PACKAGES) if packages is None else packages
        self.folder = folder
        self.min_tokens = min_tokens
        self.max_functions = max_functions

    @property
    def vocabulary(self) -> Vocabulary:
        """The fixed vocabulary of canonical functions."""
        return Vocabulary(len(CANONICAL_TOKENS), EOS_ID, BOS_ID, EOS_ID, MASK_ID)

    @cached_property
    def codec(self) -> TextCodec:  # type: ignore[override]
        """Canonical Python text to token ids and back."""
        return TextCodec.canonical()

    def _configuration(self) -> dict[str, Any]:
        return {"length": self.length, "min_tokens": self.min_tokens, "max_functions": self.max_functions}

    def _source_files(self) -> list[SourceFile]:
        if self.folder is not None:
            return folder_files(self.folder)
        files = standard_library_files() + installed_package_files(self.packages)
        return sorted(files, key=lambda file: file.name)

    def _build(self, folder: Path, files: Sequence[SourceFile]) -> dict[str, int | str]:
        found, skipped = read_functions(files, self.min_tokens, self.length - 2)
        splits = distinct_by_split(found)
        num_kept = sum(map(len, splits.values()))
        share = 1.0 if self.max_functions is None else min(1.0, self.max_functions / max(num_kept, 1))
        rows = {
            split: [[BOS_ID, *function, EOS_ID] for function in _evenly_spaced(functions, share)]
            for split, functions in splits.items()
        }
        num_functions = sum(map(len, found.values()))
        counts = _save_splits(folder, rows, self.length)
        return {
            "files": len(files),
            "functions": num_functions,
            "duplicates": num_functions - num_kept,
            **counts,
            "skipped files": str(skipped),
        }


class SourceText(BlockDataModule):
    """Source text in byte-level BPE, or in the tokens of a published checkpoint, cut into consecutive blocks.

    The tail of a file's last block is filled with EOS.

    Args:
        length: tokens in a block.
        batch_size: blocks in a batch.
        folder: folder to read; None for the standard library.
        pattern: glob pattern of the files below `folder`.
        vocab_size: token types, special ones included, at least 260; learned from the training split alone.
        tokenizer: folder or hub id of a published checkpoint whose tokenizer is used instead of learning one.
        family: of that checkpoint; None tells it from its `config.json`.
        cache_dir: folder of prepared corpora; None for `$XDG_CACHE_HOME/crocodil` or `~/.cache/crocodil`.
        num_workers: processes that read batches.
        seed: seed of the shuffle.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        length: int = 64,
        batch_size: int = 64,
        folder: str | None = None,
        pattern: str = "**/*.py",
        vocab_size: int = 2048,
        tokenizer: str | None = None,
        family: str | None = None,
        cache_dir: str | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(length, batch_size, cache_dir, num_workers, seed)
        require_at_least("vocab_size", vocab_size, MIN_BPE_SIZE)
        self.folder = folder
        self.pattern = pattern
        self.vocab_size = vocab_size
        self.published = None if tokenizer is None else TextCodec.published(tokenizer, family)

    @property
    def vocabulary(self) -> Vocabulary:
        """That of the published tokenizer, or the size as asked for and the special ids that all of ours share."""
        if self.published is not None:
            return self.published.vocabulary
        return Vocabulary(self.vocab_size, EOS_ID, BOS_ID, EOS_ID, MASK_ID)

    @cached_property
    def codec(self) -> TextCodec:  # type: ignore[override]
        """The published tokenizer, or the byte-level BPE of this corpus."""
        return self.published or TextCodec.from_pretrained(self._prepared_folder() / "codec")

    def _configuration(self) -> dict[str, Any]:
        if self.published is not None:
            return {"length": self.length, **self.published.to_state()}
        return {"length": self.length, "vocab_size": self.vocab_size}

    def _source_files(self) -> list[SourceFile]:
        return standard_library_files() if self.folder is None else folder_files(self.folder, self.pattern)

    def _build(self, folder: Path, files: Sequence[SourceFile]) -> dict[str, int | str]:
        skipped = SkipCount()
        texts: dict[Split, dict[str, None]] = {"test": {}, "val": {}, "train": {}}
        for file in with_progress(files, files, "Reading files"):
            text = read_text(file.path, skipped)
            if text is not None:
                texts[split_of(file.name)][text] = None
        codec = self.published or byte_level_bpe(texts["train"], self.vocab_size)
        if self.published is None and codec.vocabulary.size < self.vocab_size:
            raise ValueError(
                f"the training files must hold enough text for vocab_size {self.vocab_size}, got {len(texts['train'])} "
                f"files that give {codec.vocabulary.size}: give more files or a smaller vocab_size."
            )
        codec.save_pretrained(folder / "codec")
        found = {split: [row for text in part for row in self._rows(codec, text)] for split, part in texts.items()}
        counts = _save_splits(folder, distinct_by_split(found), self.length, self.vocabulary.eos_token_id)
        num_blocks = sum(map(len, found.values()))
        return {
            "files": len(files),
            "blocks": num_blocks,
            "duplicates": num_blocks - counts["kept"],
            **counts,
            "skipped files": str(skipped),
        }

    def _rows(self, codec: TextCodec, text: str) -> list[tuple[int, ...]]:
        token_ids = [self.vocabulary.bos_token_id, *codec.encode(text)]
        return [tuple(token_ids[start : start + self.length]) for start in range(0, len(token_ids), self.length)]


def _save_splits(
    folder: Path, splits: Mapping[Split, Sequence[Sequence[int]]], length: int, eos_token_id: int = EOS_ID
) -> dict[str, int]:
    """Writes the rows of each split as one (N, length) array, filled up with EOS; returns the numbers of rows."""
    for split, rows in splits.items():
        blocks = np.full((len(rows), length), eos_token_id, dtype=np.int32)
        for block, row in zip(blocks, rows, strict=True):
            block[: len(row)] = row
        np.save(folder / f"{split}.npy", blocks)
    return {"kept": sum(map(len, splits.values())), **{split: len(rows) for split, rows in splits.items()}}


def _evenly_spaced(items: list[bytes], share: float) -> list[bytes]:
    if share == 1.0 or not items:
        return items
    count = max(1, round(share * len(items)))
    return [items[position * len(items) // count] for position in range(count)]

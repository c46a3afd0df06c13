"""A LightningDataModule of canonical Python functions, the corpus of the quickstart."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from crocodil.data.block_datamodule import NAMES_FILE, BlockDataModule, require_at_least
from crocodil.data.canonical_text import CANONICAL_TOKENS
from crocodil.data.codec import BOS_ID, EOS_ID, MASK_ID, TextCodec
from crocodil.data.corpora import (
    DEFAULT_PACKAGES,
    SourceFile,
    distinct_by_split,
    folder_files,
    installed_package_files,
    standard_library_files,
)
from crocodil.data.functions import SplitBy, read_functions
from crocodil.data.rows import Layout
from crocodil.data.tokens import flat, tokens_file, write_split
from crocodil.data.vocabulary import Vocabulary


class CanonicalFunctions(BlockDataModule):
    """Canonical functions, one a text: BOS, the tokens of the function, and EOS.

    Args:
        length: tokens in a row; functions that do not fit with BOS and one EOS are left out.
        batch_size: rows in a batch.
        packages: installed distributions to read beside the standard library; None for those that crocodil depends
            on, [] for none.
        folder: folder of Python files to read instead.
        split_by: what of a file decides its split: its "name", or its "folder", the first part of the name, so that the
            files of a package stay together.
        min_tokens: functions with fewer tokens are left out.
        max_functions: keep about this many distinct functions, evenly spread over the corpus; None for all.
        cache_dir: folder of prepared corpora; None for `$XDG_CACHE_HOME/crocodil` or `~/.cache/crocodil`.
        num_workers: processes that read batches.
        seed: seed of the shuffle.
        layout: of the training batches, see `RowFormat`.
        hide_padding: see `RowFormat`.
        latents: folder of `crocodil encode`; see `BlockDataModule`.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        length: int = 64,
        batch_size: int = 64,
        packages: list[str] | None = None,
        folder: str | None = None,
        split_by: SplitBy = "name",
        min_tokens: int = 14,
        max_functions: int | None = None,
        cache_dir: str | None = None,
        num_workers: int = 0,
        seed: int = 0,
        layout: Layout = "padded",
        hide_padding: bool = False,
        latents: str | None = None,
    ) -> None:
        super().__init__(length, batch_size, cache_dir, num_workers, seed, layout, hide_padding, latents)
        require_at_least("min_tokens", min_tokens, 1)
        if max_functions is not None:
            require_at_least("max_functions", max_functions, 1)
        self.packages = list(DEFAULT_PACKAGES) if packages is None else packages
        self.folder = folder
        self.split_by = split_by
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
        names = ("length", "min_tokens", "max_functions", "split_by")
        return {name: getattr(self, name) for name in names}

    def _source_files(self) -> list[SourceFile]:
        if self.folder is not None:
            return folder_files(self.folder)
        files = standard_library_files() + installed_package_files(self.packages)
        return sorted(files, key=lambda file: file.name)

    def _build(self, folder: Path, aside: Path, files: Sequence[SourceFile]) -> dict[str, int | str]:
        found, num_functions, skipped = read_functions(files, self.min_tokens, self.length - 2, self.split_by)
        splits = distinct_by_split(found)
        num_distinct = sum(map(len, splits.values()))
        share = 1.0 if self.max_functions is None else min(1.0, self.max_functions / max(num_distinct, 1))
        counts: dict[str, int] = {}
        for split, functions in splits.items():
            kept = _evenly_spaced(functions, share)
            tokens, lengths = flat([[BOS_ID, *function, EOS_ID] for function in kept], self.vocabulary.size)
            np.save(tokens_file(folder, split), tokens)
            pieces = np.stack([np.cumsum(lengths) - lengths, lengths], axis=1)
            write_split(folder, split, pieces, np.array([found[split][item] for item in kept]), (0, len(kept)))
            counts[split] = len(kept)
        (folder / NAMES_FILE).write_text(json.dumps([file.name for file in files]))
        return {
            "files": len(files),
            "functions": num_functions,
            "duplicates": num_functions - num_distinct,
            "kept": sum(counts.values()),
            **counts,
            "skipped files": str(skipped),
        }


def _evenly_spaced(items: list[bytes], share: float) -> list[bytes]:
    if share == 1.0 or not items:
        return items
    count = max(1, round(share * len(items)))
    return [items[position * len(items) // count] for position in range(count)]

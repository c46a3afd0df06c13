"""Token ids of a split on disk, memory-mapped: all texts one behind the other, and where each begins."""

import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from crocodil.data.rows import RowFormat

TOKENS, PIECES, ORIGINS, BOUNDS, PACKS = "tokens", "pieces", "origins", "bounds", "packs"


class TokenStore:
    """The texts of one split, in a fixed order; nothing is read before it is asked for.

    Args:
        folder: of `write_split`.
        split: "train", "val" or "test".

    Attributes:
        pieces: (N, 2) int64, where the n-th text begins among all tokens, and how many tokens it has.
        origins: (N, 2) int32, the file or shard it is from, and which record of it.
        bounds: (S + 1,) int64; the texts of source s are those from bounds[s] up to bounds[s + 1].
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.folder, self.split = folder, split
        self.tokens, self.pieces, self.origins, self.bounds = (
            _mapped(self._path(name)) for name in (TOKENS, PIECES, ORIGINS, BOUNDS)
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenStore, (self.folder, self.split)  # another process maps the files itself

    def _path(self, name: str) -> Path:
        return self.folder / f"{self.split}.{name}.npy"

    def __len__(self) -> int:
        return len(self.pieces)

    @property
    def lengths(self) -> np.ndarray:
        """(N,) int64, tokens of each text."""
        return self.pieces[:, 1]

    def __getitem__(self, index: int) -> np.ndarray:
        start, length = self.pieces[index]
        return self.tokens[start : start + length]

    def padded(self, length: int, eos_token_id: int) -> np.ndarray:
        """All texts as one array, (N, length) int32, filled up with end tokens."""
        rows = np.full((len(self), length), eos_token_id, dtype=np.int32)
        for index, row in enumerate(rows):
            text = self[index]
            row[: len(text)] = text
        return rows

    @property
    def packs(self) -> "Packs | None":
        """Which texts share a row; None where that was not written yet."""
        path = self._path(PACKS)
        return Packs(self.bounds, _mapped(path)) if path.is_file() else None


class Packs:
    """Which texts share a row.

    Args:
        bounds: of the texts of each source, see `TokenStore`.
        row_of: (2, N) int64: all texts, row by row; and the row that each is in.
    """

    def __init__(self, bounds: np.ndarray, row_of: np.ndarray) -> None:
        self.texts, rows = row_of
        self.starts = np.searchsorted(rows, np.arange(rows[-1] + 2 if len(rows) else 1))
        self.bounds = np.searchsorted(self.texts[self.starts[:-1]], bounds)
        """(S + 1,): the rows of source s are those from bounds[s] up to bounds[s + 1]; they are not mixed."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> list[int]:
        return self.texts[self.starts[row] : self.starts[row + 1]].tolist()


def _mapped(path: Path) -> np.ndarray:
    return np.asarray(np.load(path, mmap_mode="r"))  # a plain array over the file: it is indexed faster than a memmap


def write_split(
    folder: Path, split: str, pieces: np.ndarray, origins: np.ndarray, bounds: Sequence[int] | np.ndarray
) -> None:
    """Writes one split but for its tokens, which go to `tokens_file`; see `TokenStore`.

    Args:
        folder: exists.
        split: "train", "val" or "test".
        pieces: (N, 2).
        origins: (N, 2).
        bounds: (S + 1,).
    """
    arrays: dict[str, np.ndarray] = {
        PIECES: np.asarray(pieces, np.int64).reshape(-1, 2),
        ORIGINS: np.asarray(origins, np.int32).reshape(-1, 2),
        BOUNDS: np.asarray(bounds, np.int64),
    }
    for name, array in arrays.items():
        np.save(folder / f"{split}.{name}.npy", array)


def tokens_file(folder: Path, split: str) -> Path:
    """Where the tokens of a split lie, (T,) unsigned integers."""
    return folder / f"{split}.{TOKENS}.npy"


def write_packs(store: TokenStore, rows: Sequence[np.ndarray]) -> Packs:
    """Writes which texts share a row, and returns it.

    Args:
        store: the texts.
        rows: the indices of each row's texts, rows in the order of their first texts.
    """
    row_of = np.stack(
        [np.concatenate([*rows, np.empty(0, np.int64)]), np.repeat(np.arange(len(rows)), [*map(len, rows)])]
    )
    path = store._path(PACKS)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".fresh", delete=False) as fresh:
        np.save(fresh, row_of.astype(np.int64))
    os.chmod(fresh.name, 0o644)  # readable like all the rest
    os.replace(fresh.name, path)  # two processes that write it write the same
    return Packs(store.bounds, row_of)


def flat(texts: Iterable[Sequence[int]], vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Texts one behind the other in the narrowest unsigned integers that hold the vocabulary, and their lengths."""
    rows = [np.asarray(text, dtype=token_dtype(vocab_size)) for text in texts]
    tokens = np.concatenate(rows) if rows else np.empty(0, token_dtype(vocab_size))
    return tokens, np.array([len(row) for row in rows], dtype=np.int64)


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest unsigned integers that hold every token id."""
    return np.min_scalar_type(vocab_size - 1)


class TokenDataset(Dataset[dict[str, Tensor]]):
    """The rows of a split as batches.

    Args:
        store: the texts.
        row_format: how they become rows.
        packs: which texts share a row, where the rows are packed.
        latents: (N, K, D), an array or anything that is indexed likewise, of all texts of the store; None for none.
    """

    def __init__(
        self, store: TokenStore, row_format: RowFormat, packs: Packs | None = None, latents: Any = None
    ) -> None:
        self.store, self.row_format, self.packs, self.latents = store, row_format, packs, latents

    def __len__(self) -> int:
        return len(self.store if self.packs is None else self.packs)

    @property
    def bounds(self) -> np.ndarray:
        """(S + 1,): the rows of source s are those from bounds[s] up to bounds[s + 1]."""
        return self.store.bounds if self.packs is None else self.packs.bounds

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A whole batch at once; a DataLoader calls this instead of `__getitem__`.

        Returns:
            That of `RowFormat.collate`, "origins" (B, 2) int64 of the rows' first texts, and "latents" if there are
            any, (N, K, D) float32 of all texts, row by row.
        """
        rows = [[index] if self.packs is None else self.packs[index] for index in indices]
        batch = self.row_format.collate([[self.store[text] for text in row] for row in rows])
        origins = self.store.origins[[row[0] for row in rows]]
        batch["origins"] = torch.from_numpy(origins.astype(np.int64))
        if self.latents is not None:
            batch["latents"] = torch.as_tensor(self.latents[np.concatenate(rows)]).float()
        return batch


def whole_batch(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Collate function of a dataset that gives whole batches."""
    return batch

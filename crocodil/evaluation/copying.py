"""How much of a text was copied from the training data, word for word."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from crocodil.evaluation.judge import tokens_through_eos

CHUNK = 1 << 22
"""Training tokens hashed at once."""
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_INVERSE = np.uint64(pow(int(_MULTIPLIER), -1, 1 << 64))


class LongestCopiedRun(Metric):
    """The longest run of tokens of each text that also occurs in the training data, averaged over texts.

    A run lies between the start token and the first end token of the text, and within one row of the corpus. Short
    runs are inevitable: compare with held-out data, and read the share of the text beside the number of tokens.

    If a run of n tokens is a copy, so is every part of it; hence the longest is found by bisection over n, each time
    with one pass over the corpus' 64-bit n-gram hashes.

    Args:
        corpus: (M, L) integers, rows of the training data, possibly memory-mapped.
        bos_token_id: starts rows, and counts for nothing.
        eos_token_id: ends texts and rows, likewise.
    """

    total: Tensor
    total_share: Tensor
    longest: Tensor
    num_texts: Tensor

    def __init__(self, corpus: np.ndarray, bos_token_id: int, eos_token_id: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.corpus = corpus
        self.bos_token_id, self.eos_token_id = bos_token_id, eos_token_id
        for name in ("total", "total_share"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_texts", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("longest", torch.zeros((), dtype=torch.int64), dist_reduce_fx="max")

    def update(self, token_ids: Tensor) -> None:
        """Adds texts, (N, L) int64."""
        inside = tokens_through_eos(token_ids, self.eos_token_id) & (token_ids != self.eos_token_id)
        inside &= token_ids != self.bos_token_id
        texts = [row[keep].cpu().numpy() for row, keep in zip(token_ids, inside, strict=True)]
        runs = torch.tensor(longest_runs(texts, self.corpus, (self.bos_token_id, self.eos_token_id)))
        lengths = inside.sum(1).cpu().clamp(min=1)
        self.total += runs.sum().to(self.total.device)
        self.total_share += (runs / lengths).double().sum().to(self.total.device)
        self.longest = torch.maximum(self.longest, runs.max().to(self.longest.device))
        self.num_texts += len(texts)

    def compute(self) -> dict[str, Tensor]:
        """`copied_run` in tokens, `copied_share` of the text, and `longest_copied_run` of all texts."""
        return {
            "copied_run": self.total / self.num_texts,
            "copied_share": self.total_share / self.num_texts,
            "longest_copied_run": self.longest,
        }


def longest_runs(texts: list[np.ndarray], corpus: np.ndarray, boundaries: tuple[int, ...]) -> np.ndarray:
    """Length of the longest run of each text that occurs in a row of the corpus.

    Args:
        texts: arrays of token ids without boundaries.
        corpus: (M, L) integers.
        boundaries: token ids that no run may hold.

    Returns:
        (N,) int64.
    """
    low, high = np.zeros(len(texts), np.int64), np.array([len(text) for text in texts], np.int64)
    high = np.minimum(high, corpus.shape[1])
    while (open_ := low < high).any():
        middle = (low + high + 1) // 2
        for n in np.unique(middle[open_]):
            chosen = np.flatnonzero(open_ & (middle == n))
            found = _occurs([texts[i] for i in chosen], corpus, int(n), boundaries)
            low[chosen[found]], high[chosen[~found]] = n, n - 1
    return low


def _occurs(texts: list[np.ndarray], corpus: np.ndarray, n: int, boundaries: tuple[int, ...]) -> np.ndarray:
    """Whether any run of n tokens of each text occurs in the corpus: (N,) bool."""
    hashes = [_hashes(text[None], n)[0] for text in texts]
    wanted, owner = np.concatenate(hashes), np.repeat(np.arange(len(texts)), [len(h) for h in hashes])
    order = np.argsort(wanted, kind="stable")
    wanted, owner = wanted[order], owner[order]
    hit = np.zeros(len(wanted), bool)
    rows_at_once = max(1, CHUNK // corpus.shape[1])
    for start in range(0, len(corpus), rows_at_once):
        rows = np.asarray(corpus[start : start + rows_at_once])
        is_boundary = np.isin(rows, boundaries)
        crossed = np.cumsum(np.pad(is_boundary, ((0, 0), (1, 0))), axis=1)
        whole = crossed[:, n:] == crossed[:, :-n]
        there = np.unique(_hashes(rows, n)[whole])
        at = np.searchsorted(there, wanted)
        hit |= (at < len(there)) & (there[np.minimum(at, len(there) - 1)] == wanted) if len(there) else False
    found = np.zeros(len(texts), bool)
    found[owner[hit]] = True
    return found


def _hashes(rows: np.ndarray, n: int) -> np.ndarray:
    """Polynomial hashes modulo 2^64 of scrambled tokens, of each run of n: (M, L) -> (M, L - n + 1) uint64.

    They are differences of prefix hashes, so the cost does not grow with n.
    """
    length = rows.shape[1]
    with np.errstate(over="ignore"):
        values = _scramble(rows.astype(np.uint64) + np.uint64(1))
        prefixes = np.cumsum(values * _powers(_MULTIPLIER, length), axis=1, dtype=np.uint64)
        prefixes = np.pad(prefixes, ((0, 0), (1, 0)))
        sums = prefixes[:, n:] - prefixes[:, :-n]
        return _scramble(sums * _powers(_INVERSE, length)[: sums.shape[1]])  # the same wherever the run stands


def _powers(base: np.uint64, count: int) -> np.ndarray:
    return np.cumprod(np.concatenate([np.ones(1, np.uint64), np.full(count - 1, base, np.uint64)]), dtype=np.uint64)


def _scramble(keys: np.ndarray) -> np.ndarray:
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))

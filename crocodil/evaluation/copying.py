"""How much of a text was copied from the training data, word for word."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from crocodil.evaluation.ends import tokens_through_eos

SEPARATOR = -1
"""Stands behind each row and in place of start and end tokens, so that no run crosses them."""


class SuffixArray:
    """All places of a corpus in the order of what follows them, to look up runs of tokens in.

    Built by doubling: places are ordered by their next 1, 2, 4, ... tokens, up to the length of a row, each order from
    the one before (Manber and Myers, 1993). It takes 16 bytes a token and some seconds a million: of a large corpus,
    give a part.

    Args:
        corpus: (M, L) integers, rows of text.
        boundaries: token ids that no run may hold.
    """

    def __init__(self, corpus: np.ndarray, boundaries: tuple[int, ...]) -> None:
        rows = np.pad(np.asarray(corpus, dtype=np.int64), ((0, 0), (0, 1)), constant_values=SEPARATOR)
        rows[np.isin(rows, boundaries)] = SEPARATOR
        self.tokens = rows.ravel()
        _, rank = np.unique(self.tokens, return_inverse=True)
        width = 1
        while width < corpus.shape[1]:
            # What lies beyond the row is beyond a separator, where no run goes: any order will do.
            key = rank * (len(rank) + 1) + np.concatenate([rank[width:] + 1, np.zeros(min(width, len(rank)), np.int64)])
            _, rank = np.unique(key, return_inverse=True)
            width *= 2
        self.order = np.argsort(rank, kind="stable")

    def longest_runs(self, texts: list[np.ndarray]) -> np.ndarray:
        """Length of the longest run of each text that occurs in the corpus: (N,) int64.

        Args:
            texts: arrays of token ids without boundaries.
        """
        lengths = np.array([len(text) for text in texts], np.int64)
        flat = np.concatenate([*texts, np.zeros(0, np.int64)]).astype(np.int64)
        owner = np.repeat(np.arange(len(texts)), lengths)
        left = np.concatenate([np.arange(length, 0, -1) for length in lengths] or [flat])
        longest, active = np.zeros(len(texts), np.int64), np.arange(len(flat))
        low, high = np.zeros(len(flat), np.int64), np.full(len(flat), len(self.order))
        for depth in range(int(lengths.max(initial=0))):
            active = active[left[active] > depth]
            wanted = flat[active + depth]
            first = self._search(low[active], high[active], depth, wanted)
            last = self._search(first, high[active], depth, wanted + 1)
            found = first < last
            low[active], high[active] = first, last
            active = active[found]
            if not len(active):
                break
            longest[owner[active]] = depth + 1
        return longest

    def _search(self, low: np.ndarray, high: np.ndarray, depth: int, wanted: np.ndarray) -> np.ndarray:
        """The first place in [low, high) whose token at a depth is not below the wanted one; all places at once."""
        low, high = low.copy(), high.copy()
        while (open_ := low < high).any():
            middle = (low + high) // 2
            at = np.minimum(self.order[np.minimum(middle, len(self.order) - 1)] + depth, len(self.tokens) - 1)
            below = self.tokens[at] < wanted
            low, high = np.where(open_ & below, middle + 1, low), np.where(open_ & ~below, middle, high)
        return low


class LongestCopiedRun(Metric):
    """The longest run of tokens of each text that also occurs in the training data, averaged over texts.

    A run lies between the start token and the first end token of the text, and within one row of the corpus. Short
    runs are inevitable: compare with held-out data, and read the share of the text beside the number of tokens.

    Args:
        corpus: the training data.
        bos_token_id: starts rows, and counts for nothing.
        eos_token_id: ends texts and rows, likewise.
    """

    total: Tensor
    total_share: Tensor
    longest: Tensor
    num_texts: Tensor

    def __init__(self, corpus: SuffixArray, bos_token_id: int, eos_token_id: int, **kwargs: Any) -> None:
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
        runs = torch.from_numpy(self.corpus.longest_runs(texts))
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

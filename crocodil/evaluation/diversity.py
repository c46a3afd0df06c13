"""Diversity of a set of texts: within each text, and between them."""

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from crocodil.diffusion.noise import mix
from crocodil.evaluation.ends import tokens_through_eos


def unigram_entropies(token_ids: Tensor, eos_token_id: int | Sequence[int]) -> Tensor:
    """Entropy of the tokens within each text, in nats: (N, L) int64 -> (N,) float64.

    Each text counts from its second token, behind the start token, through its first end token.

    Args:
        token_ids: (N, L) int64.
        eos_token_id: what ends a text.
    """
    counted = tokens_through_eos(token_ids, eos_token_id)[:, 1:]
    ids, order = token_ids[:, 1:].sort(dim=1)
    weights = counted.gather(1, order).double()
    # Equal tokens lie side by side now; the places of each run share one slot, so memory does not grow with V.
    slots = torch.cat([torch.zeros_like(ids[:, :1]), (ids[:, 1:] != ids[:, :-1]).long()], dim=1).cumsum(1)
    counts = torch.zeros_like(weights).scatter_add(1, slots, weights)
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    return -torch.special.xlogy(shares, shares).sum(1)


class UnigramEntropy(Metric):
    """Entropy of the tokens within a text, averaged over texts, in nats (the field's diversity figure, as in Duo).

    It grows with length, is blind to order, and copies of one text have as much of it as that text.

    Args:
        eos_token_id: what ends a text.
    """

    total: Tensor
    num_texts: Tensor

    def __init__(self, eos_token_id: int | Sequence[int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.eos_token_id = eos_token_id
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_texts", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, token_ids: Tensor) -> None:
        """Adds texts, (N, L) int64."""
        self.total += unigram_entropies(token_ids, self.eos_token_id).sum()
        self.num_texts += len(token_ids)

    def compute(self) -> dict[str, Tensor]:
        """`entropy`, in nats."""
        return {"entropy": self.total / self.num_texts}


class DistinctNgrams(Metric):
    """Distinct n-grams over all n-grams of all texts together (distinct-n, arXiv 1510.03055), in (0, 1].

    It falls as the number of texts grows: compare equal numbers only. n-grams run from behind the start token to
    before the first end token.

    Args:
        n: length of the n-grams.
        eos_token_id: what ends a text.
    """

    seen: list[Tensor]
    num_ngrams: Tensor

    def __init__(self, n: int, eos_token_id: int | Sequence[int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.n, self.eos_token_id = n, eos_token_id
        self.add_state("seen", [], dist_reduce_fx="cat")
        self.add_state("num_ngrams", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, token_ids: Tensor) -> None:
        """Adds texts, (N, L) int64."""
        ends = torch.as_tensor(self.eos_token_id, device=token_ids.device)
        inside = tokens_through_eos(token_ids, self.eos_token_id) & ~torch.isin(token_ids, ends)
        if token_ids.shape[1] <= self.n:
            return
        hashes = ngram_hashes(token_ids[:, 1:], self.n)[inside[:, self.n :]]
        self.seen.append(hashes.unique().to(self.device))
        self.num_ngrams += len(hashes)

    def compute(self) -> dict[str, Tensor]:
        """`distinct_n`; NaN if there was no n-gram."""
        hashes = dim_zero_cat(self.seen) if len(self.seen) else self.num_ngrams.new_zeros(0)
        return {f"distinct_{self.n}": len(hashes.unique()) / self.num_ngrams}


def ngram_hashes(token_ids: Tensor, n: int) -> Tensor:
    """A 64-bit hash of each run of n tokens: (N, L) int64 -> (N, L - n + 1) int64."""
    hashes = torch.zeros_like(token_ids[:, n - 1 :])
    for i, tokens in enumerate(token_ids.unfold(1, n, 1).unbind(2)):
        hashes = mix(hashes + mix(tokens + 1 + i))
    return hashes


class DuplicateRate(Metric):
    """Share of texts that are a copy of another one counted before: 1 - distinct texts / texts, in [0, 1)."""

    hashes: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("hashes", [], dist_reduce_fx="cat")

    def update(self, texts: Sequence[str]) -> None:
        """Adds texts."""
        digests = [blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in texts]
        numbers = [int.from_bytes(digest, "big", signed=True) for digest in digests]
        self.hashes.append(torch.tensor(numbers, dtype=torch.int64, device=self.device))

    def compute(self) -> dict[str, Tensor]:
        """`duplicate_rate`."""
        hashes = dim_zero_cat(self.hashes)
        return {"duplicate_rate": torch.tensor(1 - len(hashes.unique()) / len(hashes), dtype=torch.float64)}

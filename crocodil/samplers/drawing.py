"""Tokens from logits, exactly, and how sure the model is of them; no copy of all logits is ever alive."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_ELEMENTS = 1 << 20
"""How many logits are worked on at once: on a CPU, what its cache holds (4 MiB in float32)."""
GPU_CHUNK_ELEMENTS = 1 << 26
GROUP = 128
NUCLEUS = 256
"""How many tokens are tried first for a nucleus."""
BELOW_ONE = 1 - 2.0**-52


@dataclass(frozen=True)
class TokenDistribution:
    """What is drawn from: softmax(logits / temperature), cut to its `top_k` and then to its nucleus.

    Args:
        temperature: 0 takes the most probable token, 1 samples the model as it is.
        top_p: share of the probability that is kept, the most probable tokens first (arXiv 1904.09751); 1 keeps all.
        top_k: how many tokens are kept at most; None keeps all.

    Raises:
        ValueError: if a setting is out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature must not be negative, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, or None for all tokens, got {self.top_k}")

    def draw(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Exact categorical samples by inversion of the distribution function.

        Each weight exp((l - max) / temperature) is as exact as a float32 can be, however small, sums are float64, and
        the uniform number has 52 bits: no tail is cut off, unlike Gumbel noise in low precision (arXiv 2409.02908).

        Args:
            logits: (..., V) float.
            uniform: (...,) float64 in (0, 1).

        Returns:
            (...,) int64 token ids; -1 where the logits are no distribution (NaN, infinite, or nothing possible).
        """
        if self.temperature == 0:
            best, token = logits.max(-1)
            return token.masked_fill(~best.isfinite(), -1)
        tokens = [
            self._draw_rows(part, u)
            for part, u in zip(row_chunks(logits), _rows_like(uniform.reshape(-1, 1), logits), strict=True)
        ]
        return torch.cat(tokens).view(logits.shape[:-1])

    def _draw_rows(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """One token (R,) for each row (R, V) of logits, by uniform numbers (R, 1)."""
        best = logits.amax(-1, keepdim=True)
        weights = (logits - best).div_(self.temperature).exp_()
        if self.top_k is None and self.top_p == 1:
            drawn = _invert(weights, uniform)
        else:
            weights, tokens = self._most_probable(weights)
            drawn = tokens.gather(1, _invert(weights, uniform)[:, None]).squeeze(1)
        return drawn.masked_fill(~best.isfinite().squeeze(1), -1)

    def _most_probable(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of the tokens that are kept, those of others 0, and their ids: (R, V) -> (R, N) each, N <= V."""
        size = most = min(self.top_k or weights.shape[1], weights.shape[1])
        # On a CPU, where to ask costs nothing, a few tokens are tried first: sorting all takes longer than the network.
        if self.top_k is None and not weights.is_cuda:
            size = min(most, NUCLEUS)
        mass = None if self.top_k else weights.sum(-1, keepdim=True, dtype=torch.float64)
        while True:
            kept, tokens = weights.topk(size, dim=-1)
            reached = kept.cumsum(-1, dtype=torch.float64)
            least = self.top_p * (reached[:, -1:] if mass is None else mass)
            if size == most or (reached[:, -1:] >= least).all():
                return kept.masked_fill(reached - kept >= least, 0.0), tokens
            size = min(most, 8 * size)


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """The first token at which the summed weights pass `uniform` of their total: first its group, then the token.

    Args:
        weights: (R, V), not negative, and not all zero.
        uniform: (R, 1) float64.
    """
    num_rows, size = weights.shape
    if size % GROUP:
        weights = F.pad(weights, (0, -size % GROUP))
    groups = weights.view(num_rows, -1, GROUP)
    sums = groups.sum(-1, dtype=torch.float64)
    group, rest = _first_above(sums, uniform * sums.sum(-1, keepdim=True))
    inside = groups.gather(1, group[..., None].expand(-1, -1, GROUP)).squeeze(1).double()
    token, _ = _first_above(inside, rest)
    return (group * GROUP + token).squeeze(1).clamp(max=size - 1)  # rows of NaN land anywhere


def _first_above(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Index (R, 1) of the first of (R, N) float64 weights at which their sum passes a target, and what is left of it.

    A weight of 0 adds nothing to the sum, so `right=True` steps over it, and a target kept below the total never lands
    behind the last weight that is not 0.
    """
    cumulative = weights.cumsum(-1)
    target = torch.minimum(target, cumulative[:, -1:] * BELOW_ONE)
    index = torch.searchsorted(cumulative, target, right=True).clamp(max=weights.shape[-1] - 1)
    return index, (target - cumulative.gather(1, index) + weights.gather(1, index)).clamp(min=0)


def row_chunks(logits: Tensor) -> Iterator[Tensor]:
    """Rows of (..., V) logits, some (R, V) at a time, in float32 or wider."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    for part in _rows_like(logits.reshape(-1, logits.shape[-1]), logits):
        yield part.to(dtype)


def _rows_like(rows: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
    size = GPU_CHUNK_ELEMENTS if logits.is_cuda else CHUNK_ELEMENTS
    return rows.split(max(1, size // logits.shape[-1]))


def by_rows(function: Callable[[Tensor, Tensor], Tensor], logits: Tensor, tokens: Tensor) -> Tensor:
    """Applies a function of (R, V) logits and (R, 1) tokens to all rows of (..., V) and (...,): (...,) float."""
    parts = zip(row_chunks(logits), _rows_like(tokens.reshape(-1, 1), logits), strict=True)
    return torch.cat([function(*part) for part in parts]).view(tokens.shape)


def confidence(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log p(token), (...,) float32 or wider, of (..., V) logits that are neither tempered nor cut."""
    return by_rows(lambda rows, token: (rows.gather(1, token) - _log_total(rows)).squeeze(1), logits, tokens)


def margin(logits: Tensor, tokens: Tensor) -> Tensor:
    """Probability of the most probable token minus that of the second, (...,)."""

    def of_rows(rows: Tensor, _: Tensor) -> Tensor:
        best = rows.topk(2, dim=-1).values
        best, second = (best - _log_total(rows)).exp().unbind(-1)
        return best - second

    return by_rows(of_rows, logits, tokens)


def negative_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Sum p log p, (...,), in nats."""

    def of_rows(rows: Tensor, _: Tensor) -> Tensor:
        rows = rows - rows.amax(-1, keepdim=True)
        weights = rows.exp()
        total = weights.sum(-1)
        return weights.mul_(rows.nan_to_num_(neginf=0.0)).sum(-1) / total - total.log()  # 0 log 0 = 0

    return by_rows(of_rows, logits, tokens)


def _log_total(rows: Tensor) -> Tensor:
    """Log sum exp of rows (R, V) -> (R, 1), in fewer passes than `torch.logsumexp` on a CPU."""
    best = rows.amax(-1, keepdim=True)
    return best + (rows - best).exp_().sum(-1, keepdim=True).log()

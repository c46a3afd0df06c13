"""Which masked positions to commit in a step, and what to write there."""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

Remasking = Literal["random", "low_confidence", "margin", "entropy"]
REMASKING_RULES: tuple[str, ...] = get_args(Remasking)

CHUNK_ELEMENTS = 1 << 24
"""How many float64 probabilities are alive at once while tokens are drawn (128 MiB)."""


def draw_tokens(logits: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """Exact categorical samples by inversion of the distribution function.

    One float64 uniform number a position and float64 sums: no tail is cut off, unlike Gumbel noise in low precision
    (arXiv 2409.02908). Runs over chunks of rows, so that no float64 copy of all logits is alive.

    Args:
        logits: (..., V) float.
        temperature: above 0 divides the logits; 0 is the argmax.
        uniform: (...,) float64 in (0, 1).

    Returns:
        (...,) int64 token ids.
    """
    if temperature == 0:
        return logits.argmax(-1)
    vocab_size = logits.shape[-1]
    rows = max(1, CHUNK_ELEMENTS // vocab_size)
    chunks = zip(logits.reshape(-1, vocab_size).split(rows), uniform.reshape(-1, 1).split(rows), strict=True)
    tokens = [_invert((part.double() / temperature).softmax(-1), u) for part, u in chunks]
    return torch.cat(tokens).view(logits.shape[:-1])


def _invert(probabilities: Tensor, uniform: Tensor) -> Tensor:
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1:]
    # A token of probability 0 adds nothing to the sum, so `right=True` steps over it.
    return torch.searchsorted(cumulative, uniform * total, right=True).squeeze(1).clamp(max=probabilities.shape[-1] - 1)


def commit_scores(rule: Remasking, logits: Tensor, tokens: Tensor) -> Tensor:
    """How willingly each position is committed under a confidence rule; higher goes first.

    Args:
        rule: "low_confidence" re-masks positions whose drawn token is least probable (LLaDA, arXiv 2502.09992),
            "margin" those where the two most probable tokens are closest (arXiv 2502.06768), "entropy" those of
            highest entropy (Dream, arXiv 2508.15487).
        logits: (B, M, V) float, neither tempered nor noised.
        tokens: (B, M) int64, the drawn tokens.

    Returns:
        (B, M) float32.
    """
    return _SCORES[rule](logits.float().log_softmax(-1), tokens)


def _confidence(log_probs: Tensor, tokens: Tensor) -> Tensor:
    return log_probs.gather(-1, tokens[..., None]).squeeze(-1)


def _margin(log_probs: Tensor, tokens: Tensor) -> Tensor:
    best, second = log_probs.topk(2, dim=-1).values.exp().unbind(-1)
    return best - second


def _negative_entropy(log_probs: Tensor, tokens: Tensor) -> Tensor:
    return (log_probs.exp() * log_probs).nan_to_num(0.0).sum(-1)  # 0 log 0 = 0


_SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "low_confidence": _confidence,
    "margin": _margin,
    "entropy": _negative_entropy,
}


def keep_best(scores: Tensor, allowed: Tensor, quota: Tensor) -> Tensor:
    """Marks the `quota` best allowed positions of each row, ties to the left, without a host sync.

    Args:
        scores: (B, M) float.
        allowed: (B, M) bool.
        quota: (B,) int64.

    Returns:
        (B, M) bool.
    """
    order = scores.masked_fill(~allowed, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return (rank < quota[:, None]) & allowed


def step_quotas(num_masked: Tensor, num_steps: int) -> Tensor:
    """How many positions each step commits: equal shares, the remainder to the first steps (LLaDA's schedule).

    Args:
        num_masked: (B,) int64.
        num_steps: number of steps.

    Returns:
        (num_steps, B) int64 whose sum over steps is `num_masked`.
    """
    step = torch.arange(num_steps, device=num_masked.device)[:, None]
    return num_masked // num_steps + (step < num_masked % num_steps)

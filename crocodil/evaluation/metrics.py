"""Figures of a set of texts."""

import ast
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from crocodil.evaluation.judge import tokens_through_eos


def parse_rate(texts: Sequence[str]) -> float:
    """Share of texts that are not empty and that `ast.parse` accepts, in [0, 1]."""
    return sum(map(parses, texts)) / len(texts)


def parses(text: str) -> bool:
    """Whether Python's own parser accepts a text; an empty one does not count."""
    if not text.strip():
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the parser warns of odd but valid code
            ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def unique_rate(texts: Sequence[str]) -> float:
    """Number of different texts over the number of texts, in (0, 1]."""
    return len(set(texts)) / len(texts)


def unigram_entropy(token_ids: Tensor, eos_token_id: int) -> float:
    """Entropy of the tokens within a text, averaged over texts, in nats (the field's diversity figure, as in Duo).

    Each text counts from its second token, behind the start token, through its first end token.

    Args:
        token_ids: (N, L) int64.
        eos_token_id: id of the end token.
    """
    counted = tokens_through_eos(token_ids, eos_token_id)[:, 1:]
    counts = torch.zeros((len(token_ids), int(token_ids.max()) + 1), dtype=torch.float64)
    counts.scatter_add_(1, token_ids[:, 1:].cpu(), counted.double().cpu())
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    return float(-torch.special.xlogy(shares, shares).sum(1).mean())


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    r"""|m - m'|^2 + tr(C + C' - 2 (C C')^{1/2}) between Gaussians fitted to two sets of features (arXiv 1706.08500).

    Args:
        features: (N, H) float.
        reference: (M, H) float.
    """
    a, b = features.double(), reference.double()
    shift = (a.mean(0) - b.mean(0)).square().sum()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    root_a = _matrix_sqrt(cov_a)
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    return float(shift + cov_a.trace() + cov_b.trace() - 2 * cross)


def _matrix_sqrt(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T

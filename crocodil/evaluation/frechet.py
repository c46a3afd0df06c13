"""Fréchet distance between what was written and the data, in a judge's features."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from crocodil.evaluation.judge import Judge


class FrechetDistance(Metric):
    r"""|m - m'|^2 + tr(C + C' - 2 (C C')^{1/2}) between Gaussians fitted to two sets of features (arXiv 1706.08500).

    Features are the judge's last hidden states, averaged over a text. The distance is never zero for finitely many
    texts: quote the distance of data to data beside it, from as many texts.

    Args:
        judge: the causal language model.
        reference: (M, H) float, features of the data (`Judgement.mean_states`).
    """

    num_texts: Tensor
    total: Tensor
    products: Tensor

    def __init__(self, judge: Judge, reference: Tensor, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.judge = judge
        self.mean, self.covariance = moments(reference.cpu())
        width = reference.shape[1]
        self.add_state("num_texts", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(width, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("products", torch.zeros(width, width, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, texts: Sequence[str], token_ids: Tensor | None = None) -> None:
        """Adds texts; arguments as of `Judge.read`."""
        # Relative to the data's mean, so that the sums lose no digits to it.
        features = (self.judge.read(texts, token_ids).mean_states.double() - self.mean).to(self.total.device)
        self.num_texts += len(features)
        self.total += features.sum(0)
        self.products += features.T @ features

    def compute(self) -> dict[str, Tensor]:
        """`distance`; needs two texts at least."""
        shift = self.total / self.num_texts
        covariance = (self.products - self.num_texts * torch.outer(shift, shift)) / (self.num_texts - 1)
        return {"distance": distance(shift.cpu() + self.mean, covariance.cpu(), self.mean, self.covariance)}


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (H,) and covariance (H, H) of features (N, H), in float64."""
    return features.double().mean(0), torch.cov(features.double().T)


def distance(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> Tensor:
    """The Fréchet distance of two Gaussians; see `FrechetDistance`."""
    root = _matrix_sqrt(covariance)
    cross = torch.linalg.eigvalsh(root @ other_covariance @ root).clamp(min=0).sqrt().sum()
    shift = (mean - other_mean).square().sum()
    return shift + covariance.trace() + other_covariance.trace() - 2 * cross


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """The distance of two sets of features, (N, H) and (M, H)."""
    return float(distance(*moments(features), *moments(reference)))


def _matrix_sqrt(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T

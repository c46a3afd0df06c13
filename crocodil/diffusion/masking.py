r"""The masked process: each token of x_0 is replaced by the mask with probability 1 - alpha_t (MDLM, arXiv 2406.07524).

q(x_t^i | x_0^i) = alpha_t [x_t^i = x_0^i] + (1 - alpha_t) [x_t^i = mask], with alpha_0 = 1 and alpha_1 = 0.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from crocodil.diffusion.documents import Documents

LossWeight = Literal["elbo", "none"]


@dataclass(frozen=True)
class MaskingPoint:
    """A schedule at t: `alpha_t`, the share of clean tokens, and its derivative; both of the shape of t."""

    alpha_t: Tensor
    d_alpha_t: Tensor

    def to(self, device: torch.device) -> "MaskingPoint":
        """The same on another device."""
        return MaskingPoint(self.alpha_t.to(device), self.d_alpha_t.to(device))

    @property
    def mask_prob(self) -> Tensor:
        """1 - alpha_t."""
        return 1 - self.alpha_t

    @property
    def elbo_weight(self) -> Tensor:
        """-alpha'_t / (1 - alpha_t), the weight of the negative ELBO (MDLM eq. 10); 1 / t for the linear schedule."""
        return -self.d_alpha_t / self.mask_prob


@dataclass(frozen=True)
class LinearMasking:
    """mask_prob = (1 - eps) t + eps, LLaDA's schedule (arXiv 2502.09992); eps keeps the weight 1 / mask_prob finite."""

    eps: float = 1e-3

    def __call__(self, t: Tensor) -> MaskingPoint:
        """The schedule at t in [0, 1]."""
        return MaskingPoint((1 - self.eps) * (1 - t), torch.full_like(t, self.eps - 1))


@dataclass(frozen=True)
class CosineMasking:
    """mask_prob = sin(pi t / 2), MaskGIT's schedule (arXiv 2202.04200), kept above eps."""

    eps: float = 1e-3

    def __call__(self, t: Tensor) -> MaskingPoint:
        """The schedule at t in [0, 1]."""
        angle = math.pi / 2 * t
        return MaskingPoint((1 - self.eps) * (1 - angle.sin()), -(1 - self.eps) * math.pi / 2 * angle.cos())


MaskingSchedule = LinearMasking | CosineMasking


def stratified_times(offset: Tensor, index: Tensor, size: int | Tensor) -> Tensor:
    """One time for each row, uniform on [0, 1), spread evenly over the batch for a lower variance of the loss.

    Args:
        offset: float scalar u in (0, 1), drawn once for the whole batch.
        index: (B,) places of these rows in the whole batch.
        size: N, the rows of the whole batch; or (B,), where the batch is stratified in parts.

    Returns:
        (B,) float32: (u + index / N) mod 1, so that each of N equal bins holds one time.
    """
    return ((offset + index.double() / size) % 1.0).float()


def corrupt(token_ids: Tensor, mask_prob: Tensor, uniform: Tensor, mask_token_id: int) -> tuple[Tensor, Tensor]:
    """Draws x_t from q(x_t | x_0).

    Args:
        token_ids: (B, L) int64, x_0.
        mask_prob: (B, 1 or L) float in [0, 1]; 0 at padding (`Documents.spread`).
        uniform: (B, L) float in (0, 1), the randomness.
        mask_token_id: id of the mask.

    Returns:
        x_t, (B, L) int64, and where it is masked, (B, L) bool.
    """
    is_masked = uniform < mask_prob
    return token_ids.masked_fill(is_masked, mask_token_id), is_masked


def posterior(mask_prob_t: Tensor, mask_prob_s: Tensor) -> Tensor:
    r"""Probability that a token masked at t is revealed at s < t: (alpha_s - alpha_t) / (1 - alpha_t) (MDLM eq. 6).

    Given x_0, q(x_s = x_0 | x_t = mask, x_0) is this number, and x_s stays the mask otherwise. A token already
    revealed at t never changes.

    Args:
        mask_prob_t: 1 - alpha_t, any shape.
        mask_prob_s: 1 - alpha_s, same shape, not above `mask_prob_t`.
    """
    return 1 - mask_prob_s / mask_prob_t


def loss_weights(
    is_masked: Tensor, point: MaskingPoint, weight: LossWeight, documents: Documents | None = None
) -> Tensor:
    """The weights (B, L) with which -log f(x_0 | x_t) is summed to the training loss of a demasker.

    "elbo": E_t [ sum over documents of w_t sum over masked positions of -log f(x_0 | x_t) ] / T with T tokens in all
    documents of the batch, padding apart, and w_t = -alpha'_t / (1 - alpha_t) at a document's own time: an upper bound
    on the negative log-likelihood per token (LLaDA eq. 3 for the linear schedule). "none": the mean cross-entropy over
    masked positions (DiLaDiff), of lower variance.

    Args:
        is_masked: (B, L) bool, nowhere at padding.
        point: the masking schedule at the (N,) times of the documents.
        weight: "elbo" or "none".
        documents: of the batch; None where each row is one.
    """
    documents = Documents(*is_masked.shape) if documents is None else documents
    if weight == "elbo":
        return is_masked * documents.spread(point.elbo_weight) / documents.num_tokens
    return is_masked.float() / is_masked.sum().clamp(min=1)  # never in a half-precision default


def masked_cross_entropy(
    nats: Tensor, is_masked: Tensor, point: MaskingPoint, weight: LossWeight, documents: Documents | None = None
) -> Tensor:
    """The loss of a demasker from its cross-entropies (B, L): a scalar, in nats per token or per masked token.

    Args:
        nats: (B, L) float, -log f(x_0 | x_t); what stands at unmasked positions does not count.
        is_masked: see `loss_weights`.
        point: likewise.
        weight: likewise.
        documents: likewise.
    """
    return (nats * loss_weights(is_masked, point, weight, documents)).sum()


def token_cross_entropy(logits: Tensor, token_ids: Tensor) -> Tensor:
    """-log softmax(logits)[token] in float32: (B, L, V) and (B, L) -> (B, L), nats."""
    return F.cross_entropy(logits.float().transpose(1, 2), token_ids, reduction="none")

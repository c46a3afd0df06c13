"""Cross-entropy of a linear head without its logits: chunk by chunk, the gradient taken on the way."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_ROWS = 512


def weighted_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""sum_i w_i (-log softmax(W h_i + b)[y_i]), without ever holding more than `CHUNK_ROWS` rows of logits.

    The gradients, w_i W^T (softmax - onehot) with respect to h_i and likewise those of a trainable W and b, are formed
    while a chunk's logits are there, so nothing is computed again in the backward pass. Logits are computed in the
    dtype of `hidden` (under autocast in autocast's) and reduced in float32 or wider.

    Args:
        hidden: (N, H) float, the states at the masked positions.
        weight: (V, H) float, the head.
        targets: (N,) int64.
        row_weights: (N,) float32, the weight of each row in the sum; no gradient flows into them.
        bias: (V,) float or None.

    Returns:
        The sum, a scalar, and -log softmax(W h_i + b)[y_i] of each row, (N,), through which no gradient flows; both
        float32 or wider.
    """
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(device_type, enabled=False):
        return _WeightedCrossEntropy.apply(hidden, weight, bias, targets, row_weights)


@torch.no_grad()
def chunked_nats(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """-log softmax(W h_i + b)[y_i] of each row, (N,), and whether y_i is the most probable token, (N,) bool."""
    nats, hits = [], []
    for rows, chosen in zip(hidden.split(CHUNK_ROWS), targets.split(CHUNK_ROWS), strict=True):
        logits = _wide(F.linear(rows, weight, bias))
        nats.append(F.cross_entropy(logits, chosen, reduction="none"))
        hits.append(logits.argmax(1) == chosen)
    return torch.cat(nats), torch.cat(hits)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class _WeightedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, row_weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        needs = ctx.needs_input_grad[:3]
        nats = hidden.new_empty(hidden.shape[0], dtype=wide)
        d_hidden, d_weight, d_bias = (
            torch.zeros_like(part, dtype=kept) if needed and part is not None else None
            for part, needed, kept in zip((hidden, weight, bias), needs, (hidden.dtype, wide, wide), strict=True)
        )
        for start in range(0, hidden.shape[0], CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            # In place, the logits become first log-probabilities and then the gradient of the loss.
            logits = _wide(F.linear(hidden[rows], weight, bias))
            logits -= logits.logsumexp(1, keepdim=True)
            chosen, weights = targets[rows, None], row_weights[rows, None].to(wide)
            nats[rows] = -logits.gather(1, chosen).squeeze(1)
            if not any(needs):
                continue
            gradient = logits.exp_().scatter_add_(1, chosen, torch.full_like(weights, -1.0)).mul_(weights)
            narrow = gradient.to(hidden.dtype)
            if d_hidden is not None:
                d_hidden[rows] = narrow @ weight
            if d_weight is not None:
                d_weight += narrow.T @ hidden[rows]
            if d_bias is not None:
                d_bias += gradient.sum(0)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = [part if part is None else part.dtype for part in (hidden, weight, bias)]
        ctx.mark_non_differentiable(nats)
        return (nats * row_weights).sum(), nats

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gradients = [
            None if saved is None else (saved * grad_loss.to(saved.dtype)).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*gradients, None, None)

"""Does the demasker read the sketch? Its guesses at masked tokens, by the share that is masked."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from crocodil.diffusion.documents import Documents
from crocodil.diffusion.masking import corrupt
from crocodil.diffusion.noise import STREAM_MASK, RowNoise
from crocodil.models import Demasker

MASK_RATIOS = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)


class MaskedPrediction(Metric):
    """Cross-entropy and top-1 accuracy at masked positions against the mask ratio (the paper's figure 4).

    At each ratio r every token is masked with probability r. The same noise hides the same tokens at a ratio, and more
    of them at a larger one, whatever is asked with them: with and without latents are compared on the same masks.

    Args:
        ratios: mask ratios, in (0, 1].
    """

    nats: Tensor
    squares: Tensor
    hits: Tensor
    num_tokens: Tensor

    def __init__(self, ratios: tuple[float, ...] = MASK_RATIOS, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ratios = tuple(ratios)
        for name, dtype in (("nats", torch.float64), ("squares", torch.float64), ("hits", torch.int64)):
            self.add_state(name, torch.zeros(len(ratios), dtype=dtype), dist_reduce_fx="sum")
        self.add_state("num_tokens", torch.zeros(len(ratios), dtype=torch.int64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(
        self,
        demasker: Demasker,
        token_ids: Tensor,
        latents: Tensor | None,
        noise: RowNoise,
        documents: Documents | None = None,
    ) -> None:
        """Asks the demasker about a batch.

        Args:
            demasker: the network to ask.
            token_ids: (B, L) int64, clean texts.
            latents: (N, k, D) float, their registers; None asks without.
            noise: draws the masks.
            documents: of the batch, on its device; None where each row is one.
        """
        documents = Documents(*token_ids.shape) if documents is None else documents
        registers = None if latents is None else documents.to_rows(latents)
        uniform = noise.to(token_ids.device).uniform(STREAM_MASK, 2, token_ids.shape[1])
        for i, ratio in enumerate(self.ratios):
            mask_prob = documents.spread(torch.full((len(documents),), ratio, device=token_ids.device))
            noisy_ids, is_masked = corrupt(token_ids, mask_prob, uniform, demasker.mask_token_id)
            nats, hits = demasker.nats(noisy_ids, token_ids, is_masked, registers, **documents.attention)
            self.nats[i] += nats.double().sum()
            self.squares[i] += nats.double().square().sum()
            self.hits[i] += hits.sum()
            self.num_tokens[i] += is_masked.sum()

    def compute(self) -> dict[str, Tensor]:
        """`cross_entropy` in nats and `top1` in [0, 1], one value for each ratio, and the former's `standard_error`.

        The standard error takes the tokens as independent.
        """
        count = self.num_tokens.double()
        mean = self.nats / count
        variance = (self.squares / count - mean.square()).clamp(min=0)
        return {
            "cross_entropy": mean,
            "top1": self.hits / count,
            "standard_error": (variance / count).sqrt(),
            "num_tokens": self.num_tokens,
        }

"""Generative perplexity: how likely a judge finds what was written."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from crocodil.evaluation.judge import Judge


class GenerativePerplexity(Metric):
    """exp of the nats per counted token of all texts together, under a named judge.

    It falls with every loss of diversity (repetition, low temperature, truncated sampling): never quote it without the
    entropy of the same texts. Which tokens count is told by `Judge`. Texts without a counted token change nothing.

    Args:
        judge: the causal language model.
    """

    nats: Tensor
    num_tokens: Tensor

    def __init__(self, judge: Judge, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.judge = judge
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self, texts: Sequence[str], token_ids: Tensor | None = None, prompts: Sequence[str] | None = None
    ) -> None:
        """Adds texts; arguments as of `Judge.read`."""
        judgement = self.judge.read(texts, token_ids, prompts)
        self.nats += judgement.nats.sum().to(self.nats.device)
        self.num_tokens += judgement.num_tokens.sum().to(self.nats.device)

    def compute(self) -> dict[str, Tensor]:
        """`judge_nll`, nats per token, and `perplexity`, its exponential; NaN if no token was counted."""
        nll = self.nats / self.num_tokens
        return {"judge_nll": nll, "perplexity": nll.exp()}

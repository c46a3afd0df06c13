"""Scores under a judge: negative log-likelihood per token, and features for a distribution distance."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from crocodil.models.backbone import checked_config


def build_judge(settings: Mapping[str, Any]) -> PreTrainedModel:
    """A causal language model of transformers from `model_type` and fields of its configuration.

    Raises:
        ValueError: if `model_type` is absent or unknown, or a field is not one of that model's.
    """
    return AutoModelForCausalLM.from_config(checked_config(settings))


def tokens_through_eos(token_ids: Tensor, eos_token_id: int) -> Tensor:
    """True from the start of each row through its first end token: (B, L) int64 -> (B, L) bool."""
    is_eos = token_ids == eos_token_id
    return is_eos.cumsum(1) - is_eos.long() == 0


@torch.no_grad()
def judge_texts(
    judge: PreTrainedModel, token_ids: Tensor, eos_token_id: int, batch_size: int = 64
) -> tuple[float, Tensor]:
    """Scores texts that begin with a start token, each through its first end token.

    Args:
        judge: a causal language model over the same tokens.
        token_ids: (N, L) int64.
        eos_token_id: id of the end token.
        batch_size: rows scored at once.

    Returns:
        Nats per token over all counted tokens (the start token is given, not counted), and features (N, H) float32:
        the judge's last hidden states averaged over the text.
    """
    nats_sum, count = 0.0, 0
    features = []
    for rows in token_ids.split(batch_size):
        out = judge(input_ids=rows, use_cache=False, output_hidden_states=True)
        nats = F.cross_entropy(out.logits[:, :-1].double().transpose(1, 2), rows[:, 1:], reduction="none")
        counted = tokens_through_eos(rows, eos_token_id)
        nats_sum += (nats * counted[:, 1:]).sum().item()
        count += int(counted[:, 1:].sum())
        weights = counted[..., None].float()
        features.append((out.hidden_states[-1].float() * weights).sum(1) / weights.sum(1))
    return nats_sum / max(count, 1), torch.cat(features)

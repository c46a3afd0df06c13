"""Where texts end: what is behind the first end token counts for nothing."""

from collections.abc import Sequence

import torch
from torch import Tensor


def tokens_through_eos(token_ids: Tensor, eos_token_id: int | Sequence[int]) -> Tensor:
    """True from the start of each row through its first end token: (B, L) int64 -> (B, L) bool."""
    ends = torch.as_tensor(eos_token_id, device=token_ids.device)
    is_eos = torch.isin(token_ids, ends)
    return is_eos.cumsum(1) - is_eos.long() == 0

"""Classifier-free guidance of the demasker (arXiv 2207.12598)."""

from typing import Any, Literal

import torch
from torch import Tensor

from crocodil.samplers.protocols import DemaskerLike

GuidedBy = Literal["latents", "prompt"]


class GuidedDemasker:
    """f_none + scale (f_cond - f_none), where f_none does not hear what guides; one call of twice the rows.

    LLaDA's cfg_scale is this scale minus 1.

    Args:
        demasker: f_theta.
        scale: above 0; 1 would be f_cond.
        guided_by: "latents" compares with the same text without registers, "prompt" with the prompt masked.
        is_given: (B, W) bool, the tokens of the prompt.
    """

    def __init__(self, demasker: DemaskerLike, scale: float, guided_by: GuidedBy, is_given: Tensor) -> None:
        self.demasker = demasker
        self.mask_token_id = demasker.mask_token_id
        self.scale = scale
        self.guided_by = guided_by
        self.is_given = is_given

    def __call__(self, token_ids: Tensor, latents: Tensor | None = None, **given: Any) -> Tensor:
        """Guided logits, in float32 or wider; arguments as those of the demasker."""
        doubled = {name: double(value) if isinstance(value, Tensor) else value for name, value in given.items()}
        if self.guided_by == "latents":
            if latents is None:
                raise ValueError("guided_by='latents' needs latents; without them give guided_by='prompt'")
            heard = latents.new_ones(latents.shape[:2], dtype=torch.bool)
            doubled["latent_mask"] = torch.cat([heard, ~heard])
            canvases = double(token_ids)
        else:
            canvases = torch.cat([token_ids, token_ids.masked_fill(self.is_given, self.mask_token_id)])
        logits = self.demasker(canvases, None if latents is None else double(latents), **doubled)
        with_it, without = logits.to(torch.promote_types(logits.dtype, torch.float32)).chunk(2)
        return without.lerp_(with_it, self.scale)


def double(rows: Tensor) -> Tensor:
    """(B, ...) -> (2 B, ...): all rows twice."""
    return torch.cat([rows, rows])

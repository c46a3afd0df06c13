"""Rotary positions on two axes, text and registers, and the masks that go with them."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel


def add_register_axis(network: PreTrainedModel, register_spacing: float = 0.0, full_precision: bool = False) -> bool:
    """Gives a rotary network the second position axis in place; returns False where it has no rotary embedding.

    Args:
        network: a decoder without its head.
        register_spacing: see `TwoAxisRotary`.
        full_precision: see `TwoAxisRotary`.
    """
    rotary = getattr(network, "rotary_emb", None)
    if rotary is None:
        return False
    if not isinstance(rotary, TwoAxisRotary):
        network.rotary_emb = TwoAxisRotary(rotary, register_spacing, full_precision)
    return True


class TwoAxisRotary(nn.Module):
    r"""Rotary positions on two axes, text and registers (the paper's MRoPE variant).

    A position p >= 0 is the p-th text token: every frequency band rotates by p, exactly as the pretrained network
    learned. A position -k < 0 is the k-th register: odd bands (the register axis) rotate by -k, even bands (the text
    axis) by (k - 1/2) register_spacing. Registers followed by text have the consecutive positions -K .. -1, 0 .. L - 1.

    Args:
        rotary: the network's own rotary embedding, called as `rotary(x, position_ids)`.
        register_spacing: distance of neighbouring registers on the text axis, in tokens. 0 puts all of them at its
            origin; L / K spreads them over the text, so that each has a neighbourhood there from the start.
        full_precision: cosines and sines stay float32 whatever the dtype of the network, so that queries and keys are
            rotated in float32 (LLaDA's `rope_full_precision`); `register_attention` casts them back afterwards.
    """

    def __init__(self, rotary: nn.Module, register_spacing: float = 0.0, full_precision: bool = False) -> None:
        super().__init__()
        self.rotary = rotary
        self.register_spacing = register_spacing
        self.full_precision = full_precision

    def forward(self, x: Tensor, position_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Cosines and sines for (B, S) int64 positions, each (B, S, head_dim), float32 or in the dtype of `x`."""
        if self.full_precision:
            x = x.new_empty(0, dtype=torch.float32)  # the rotary embedding takes its device and dtype, nothing else
        cos, sin = self.rotary(x, position_ids, **kwargs)
        on_text_axis = torch.where(position_ids < 0, (-position_ids - 0.5) * self.register_spacing, position_ids)
        cos_text, sin_text = self.rotary(x, on_text_axis, **kwargs)
        half = cos.shape[-1] // 2
        is_register_band = torch.arange(cos.shape[-1], device=cos.device) % half % 2 == 1
        return torch.where(is_register_band, cos, cos_text), torch.where(is_register_band, sin, sin_text)


def positions_with_registers(num_registers: int, text_positions: Tensor, num_documents: int = 1) -> Tensor:
    """Positions (B, S K + L) int64 of S times K registers, last one first, followed by the text's own (B, L)."""
    registers = torch.arange(-num_registers, 0, device=text_positions.device).repeat(num_documents)
    return torch.cat([registers.expand(text_positions.shape[0], -1), text_positions], dim=1)


def text_positions(length: int, device: torch.device, unpadded: Tensor | None = None) -> Tensor:
    """Positions 0 .. L - 1 of a text, (1, L) int64; with a padding mask, counted from each row's first real token.

    Args:
        length: L.
        device: of the result.
        unpadded: (B, L), 1 at real tokens, for networks that learned positions without the padding (Dream); None
            counts from the start of the row (LLaDA).
    """
    if unpadded is None:
        return torch.arange(length, device=device)[None]
    return (unpadded.long().cumsum(1) - 1).clamp(min=0)


def document_positions(document_ids: Tensor) -> Tensor:
    """Positions (B, L) int64 of packed texts, from 0 in each document; `document_ids` (B, L) tells which is where."""
    places = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    begins = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=True)
    return places - (places * begins).cummax(1).values


def visible_keys(
    attention_mask: Tensor | None,
    shape: tuple[int, int],
    num_registers: int,
    num_documents: int = 1,
    register_mask: Tensor | None = None,
) -> Tensor | None:
    """Which positions see which, of the registers of all documents of a row, followed by its text.

    With one document a row, all see the same keys. In a packed row registers and text of a document see one another
    and nothing else, which takes a mask as large as the attention itself: SDPA then leaves its flash kernels.

    Args:
        attention_mask: (B, L): 0 at padding, elsewhere 1, or in packed rows n at the n-th document; None for all 1.
        shape: (B, L) of the text.
        num_registers: K of each document.
        num_documents: S, documents in a row at most.
        register_mask: (B, S K) bool, which registers may be seen, in the order in which they stand; None for all.

    Returns:
        (B, 1, 1 or S K + L, S K + L) bool, or None where nothing is hidden, so that fast kernels apply.
    """
    if num_documents == 1:
        keys = join_masks(register_mask, attention_mask, shape[0], (num_registers, shape[1]))
        return None if keys is None else keys[:, None, None]
    if attention_mask is None:
        raise ValueError(
            f"with {num_documents} documents in a row attention_mask must tell which is where, but it is None"
        )
    owner = torch.arange(1, num_documents + 1, device=attention_mask.device).repeat_interleave(num_registers)
    document = torch.cat([owner.expand(shape[0], -1), attention_mask], dim=1)
    visible = document[:, :, None] == document[:, None]
    if register_mask is not None:
        # A register that is hidden sees itself, lest it see nothing: a softmax over nothing is NaN.
        keys = F.pad(register_mask, (0, shape[1]), value=True)[:, None]
        visible &= keys | torch.eye(keys.shape[2], dtype=torch.bool, device=keys.device)
    return visible[:, None]


def join_masks(first: Tensor | None, second: Tensor | None, batch: int, sizes: tuple[int, int]) -> Tensor | None:
    """Joins two optional key masks along the sequence; None where nothing is masked, so that fast kernels apply.

    Args:
        first: (B, sizes[0]) bool or int, 1 = attend, or None for all ones.
        second: (B, sizes[1]), likewise.
        batch: B.
        sizes: the lengths of the two parts.
    """
    given = first if first is not None else second
    if given is None:
        return None
    parts = [
        mask.bool() if mask is not None else given.new_ones((batch, size), dtype=torch.bool)
        for mask, size in zip((first, second), sizes, strict=True)
    ]
    return torch.cat(parts, dim=1)

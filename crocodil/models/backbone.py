"""Any decoder of transformers made bidirectional, with an axis of its own for registers."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel


def network_config(settings: Mapping[str, Any] | PretrainedConfig) -> PretrainedConfig:
    """Turns the `network:` section of a YAML into a transformers configuration.

    Args:
        settings: `model_type` (a name that transformers knows: llama, qwen2, qwen3, ...) and fields of that
            model's configuration; or a ready configuration, which is returned as it is.

    Returns:
        The configuration of a bidirectional network without a key-value cache.

    Raises:
        ValueError: if `model_type` is absent or unknown, or a field is not one of that model's.
    """
    config = settings if isinstance(settings, PretrainedConfig) else checked_config(settings)
    config.is_causal = False
    config.use_cache = False
    return config


def checked_config(settings: Mapping[str, Any]) -> PretrainedConfig:
    """As `network_config`, of a network as transformers has it: a decoder stays causal."""
    fields = dict(settings)
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise ValueError(f"a network needs `model_type` (llama, qwen3, ...) among its settings, got {sorted(settings)}")
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"transformers has no model_type {model_type!r}{_hint([model_type], CONFIG_MAPPING)}")
    known = AutoConfig.for_model(model_type).to_dict().keys() | {"attn_implementation", "is_causal"}
    if unknown := sorted(fields.keys() - known):
        raise ValueError(f"a {model_type} network has no setting {', '.join(unknown)}{_hint(unknown, known)}")
    return AutoConfig.for_model(model_type, **fields)


def _hint(unknown: Iterable[str], known: Iterable[str]) -> str:
    hints = [match for name in unknown for match in get_close_matches(str(name), list(known), n=1)]
    return f"; did you mean {', '.join(hints)}?" if hints else "; see its configuration in transformers"


def add_register_axis(network: PreTrainedModel, register_spacing: float = 0.0) -> bool:
    """Gives a rotary network the second position axis in place; returns False where it has no rotary embedding.

    Args:
        network: a decoder without its head.
        register_spacing: see `TwoAxisRotary`.
    """
    rotary = getattr(network, "rotary_emb", None)
    if rotary is None:
        return False
    if not isinstance(rotary, TwoAxisRotary):
        network.rotary_emb = TwoAxisRotary(rotary, register_spacing)
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
    """

    def __init__(self, rotary: nn.Module, register_spacing: float = 0.0) -> None:
        super().__init__()
        self.rotary = rotary
        self.register_spacing = register_spacing

    def forward(self, x: Tensor, position_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Cosines and sines for (B, S) int64 positions, each (B, S, head_dim) in the dtype of `x`."""
        cos, sin = self.rotary(x, position_ids, **kwargs)
        on_text_axis = torch.where(position_ids < 0, (-position_ids - 0.5) * self.register_spacing, position_ids)
        cos_text, sin_text = self.rotary(x, on_text_axis, **kwargs)
        half = cos.shape[-1] // 2
        is_register_band = torch.arange(cos.shape[-1], device=cos.device) % half % 2 == 1
        return torch.where(is_register_band, cos, cos_text), torch.where(is_register_band, sin, sin_text)


def positions_with_registers(num_registers: int, length: int, device: torch.device) -> Tensor:
    """Positions (1, K + L) int64 of K registers, last one first, followed by L text tokens."""
    return torch.arange(-num_registers, length, device=device)[None]


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

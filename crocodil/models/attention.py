"""Attention over registers and text, with gates that let a pretrained network begin as itself."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

REGISTER_ATTENTION = "crocodil_registers"


def register_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    num_registers: int = 0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention, both ways, over K registers followed by L text tokens.

    A layer with a `register_gate` g (heads,) mixes, at each text position and head, the attention over the text alone
    with the attention over registers and text: (1 - g) a_text + g a_all. With g = 0 the registers are not heard and
    the text is treated exactly as by the pretrained network; the gradient of g does not vanish there. Without the gate
    registers are a plain prefix (g = 1).

    Args:
        module: the attention layer.
        query: (B, heads, K + L, head_dim), already rotated, possibly in a wider dtype than `value`.
        key: (B, key heads, K + L, head_dim), likewise.
        value: (B, key heads, K + L, head_dim).
        attention_mask: (B, 1, K + L, K + L) bool or float as transformers prepares it, or None.
        dropout: probability that an attention weight is dropped.
        scaling: of the scores; None for 1 / sqrt(head_dim).
        num_registers: K.
        kwargs: what transformers passes on to any attention function.

    Returns:
        (B, K + L, heads, head_dim), and None for the weights.
    """
    query, key = query.to(value.dtype), key.to(value.dtype)
    options = {**kwargs, "dropout": dropout, "scaling": scaling, "is_causal": False}
    out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    gate = getattr(module, "register_gate", None)
    if gate is None or not num_registers:
        return out, None
    query, key, value = (part[:, :, num_registers:] for part in (query, key, value))
    text_mask = None if attention_mask is None else attention_mask[..., num_registers:, num_registers:]
    text, _ = sdpa_attention_forward(module, query, key, value, text_mask, **options)
    gated = torch.lerp(text, out[:, num_registers:], gate.to(text.dtype)[:, None])
    return torch.cat([out[:, :num_registers], gated], dim=1), None


AttentionInterface.register(REGISTER_ATTENTION, register_attention)
AttentionMaskInterface.register(REGISTER_ATTENTION, sdpa_mask)


def add_register_gates(network: PreTrainedModel) -> list[nn.Parameter]:
    """Gives every attention layer of a decoder a gate that starts at zero; returns the gates.

    Args:
        network: a decoder without its head, of `REGISTER_ATTENTION`.

    Raises:
        ValueError: if the network attends in another way, which knows no gates.
    """
    if (given := network.config._attn_implementation) != REGISTER_ATTENTION:
        raise ValueError(f"register_gates need the default attn_implementation ({REGISTER_ATTENTION}), got {given}")
    gates = []
    for attention in (module for name, module in network.named_modules() if name.endswith("self_attn")):
        device = next(attention.parameters()).device
        zeros = torch.zeros(network.config.num_attention_heads, device="cpu" if device.type == "meta" else device)
        attention.register_gate = nn.Parameter(zeros)
        gates.append(attention.register_gate)
    return gates

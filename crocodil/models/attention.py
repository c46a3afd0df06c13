"""Attention over registers and text, with gates that let a pretrained network begin as itself."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from crocodil.models.key_values import KeyValues

REGISTER_ATTENTION = "crocodil_registers"
_TAKE_ADDITIVE_MASKS = (REGISTER_ATTENTION, "sdpa", "eager")


def register_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    num_registers: int = 0,
    registers_read_text: bool = True,
    key_values: KeyValues | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention, both ways, over K registers followed by L text tokens.

    A layer with a `register_gate` g (heads,) mixes, at each text position and head, the attention over the text alone
    with the attention over registers and text: (1 - g) a_text + g a_all. With g = 0 the registers are not heard and
    the text is treated exactly as by the pretrained network; the gradient of g does not vanish there. Without the gate
    registers are a plain prefix (g = 1).

    Args:
        module: the attention layer.
        query: (B, heads, K + L, head_dim), already rotated, possibly in a wider dtype than `value`; with a filled cache
            (B, heads, M, head_dim), of text positions only.
        key: (B, key heads, K + L or M, head_dim), likewise.
        value: (B, key heads, K + L or M, head_dim).
        attention_mask: (B, 1, 1 or K + L, K + L) bool or float as transformers prepares it, or None. In packed rows K
            counts the registers of all documents, and the mask keeps apart what is not of one document.
        dropout: probability that an attention weight is dropped.
        scaling: of the scores; None for 1 / sqrt(head_dim).
        num_registers: K.
        registers_read_text: registers attend to the text; if not, to one another alone.
        key_values: takes keys and values, or gives those that are not computed in this call.
        kwargs: what transformers passes on to any attention function.

    Returns:
        (B, K + L or M, heads, head_dim), and None for the weights.
    """
    query, key = query.to(value.dtype), key.to(value.dtype)
    is_whole = key_values is None or key_values.places is None
    if key_values is not None:
        key, value = key_values.merge(module.layer_idx, key, value)  # type: ignore[arg-type]
    options = {**kwargs, "dropout": dropout, "scaling": scaling, "is_causal": False}

    def attend(queries: slice, keys: slice) -> Tensor:
        mask = attention_mask
        if mask is not None:
            mask = mask[..., queries if mask.shape[2] > 1 else slice(None), keys]
        parts = query[:, :, queries], key[:, :, keys], value[:, :, keys]
        return sdpa_attention_forward(module, *parts, mask, **options)[0]

    everything, registers, text = slice(None), slice(num_registers), slice(num_registers, None)
    asking = text if is_whole else everything  # the queries of the text
    gate = getattr(module, "register_gate", None)
    if not num_registers or (gate is None and (registers_read_text or not is_whole)):
        return attend(everything, everything), None
    if registers_read_text and is_whole:
        heard = attend(everything, everything)
        of_registers, of_text = heard[:, registers], heard[:, text]
    else:
        of_text = attend(asking, everything)
        of_registers = attend(registers, registers) if is_whole else of_text[:, :0]
    if gate is not None:
        alone = attend(asking, text)
        of_text = torch.lerp(alone, of_text, gate.to(alone.dtype)[:, None])
    return torch.cat([of_registers, of_text], dim=1), None


AttentionInterface.register(REGISTER_ATTENTION, register_attention)
AttentionMaskInterface.register(REGISTER_ATTENTION, sdpa_mask)


def network_mask(network: PreTrainedModel, visible: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What to tell a network about which position sees which, prepared once for all its layers.

    Args:
        network: a decoder or encoder without its head.
        visible: (B, 1, 1 or Q, S) bool, see `visible_keys`; None where all see all.
        dtype: of the embeddings; under autocast, attention computes in autocast's.

    Raises:
        ValueError: if rows are packed and the network's attention takes no mask of its own for each position.
    """
    if visible is None:
        return None
    config, device_type = network.config, visible.device.type
    is_local = {*(getattr(config, "layer_types", None) or ())} - {"full_attention"}
    if config._attn_implementation in _TAKE_ADDITIVE_MASKS and not is_local:
        autocast = torch.is_autocast_enabled(device_type)
        return additive_mask(visible, torch.get_autocast_dtype(device_type) if autocast else dtype)
    if visible.shape[2] > 1:
        raise ValueError(
            f"packed rows need full attention by one of {', '.join(_TAKE_ADDITIVE_MASKS)}, got a network of "
            f"{config._attn_implementation} with {', '.join(sorted(is_local)) or 'full_attention'} layers; use padded "
            "rows"
        )
    return visible[:, 0, 0]


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """What attention adds to its scores: 0 where it may look, else the lowest number, so that no row becomes NaN."""
    zeros = torch.zeros((), dtype=dtype, device=visible.device)
    return torch.where(visible, zeros, torch.finfo(dtype).min)


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

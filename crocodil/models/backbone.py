"""Any decoder of transformers made bidirectional, and the families of published checkpoints as small records."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from crocodil.models.attention import REGISTER_ATTENTION


@dataclass(frozen=True)
class Family:
    """What must be known to read a kind of published masked-diffusion checkpoint, beside its own `config.json`.

    Attributes:
        model_type: the decoder of transformers that computes the same; None takes the checkpoint's own.
        mask_token_id: used where neither the checkpoint's configuration nor its tokenizer names a mask token.
        eos_token_id: likewise of the end token.
        stop_token_ids: further tokens that end an answer (the end of a turn).
        shift_logits: the logits of position i stand at position i - 1, as in the causal model it came from (Dream).
        rotary_float32: queries and keys are rotated in float32 (LLaDA's `rope_full_precision`).
        skip_padding: positions are counted without the padding on the left (Dream); LLaDA counts it.
        fields: the checkpoint's names of configuration fields -> those of transformers.
        requires: values of the checkpoint's configuration without which it would be another network.
        tensors: (pattern, replacement) for the names of its tensors, applied in order.
        tokenizer: class of transformers that reads its tokenizer without remote code.
    """

    model_type: str | None = None
    mask_token_id: int | None = None
    eos_token_id: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    shift_logits: bool = False
    rotary_float32: bool = False
    skip_padding: bool = False
    fields: Mapping[str, str] = field(default_factory=dict)
    requires: Mapping[str, Any] = field(default_factory=dict)
    tensors: tuple[tuple[str, str], ...] = ()
    tokenizer: str = "AutoTokenizer"

    def network_settings(self, published: Mapping[str, Any]) -> dict[str, Any]:
        """The checkpoint's `config.json` as settings for `network_config`.

        Raises:
            ValueError: if it describes another network than this family's, or lacks a field.
        """
        for name, expected in self.requires.items():
            if published.get(name, expected) != expected:
                raise ValueError(
                    f"a network of this family needs {name} = {expected!r}, but the checkpoint's config.json says "
                    f"{published[name]!r}: this variant is not supported"
                )
        if missing := [name for name in self.fields if published.get(name) is None]:
            raise ValueError(f"the checkpoint's config.json lacks {', '.join(missing)}")
        model_type = self.model_type or published["model_type"]
        known = AutoConfig.for_model(model_type).to_dict().keys() - {"architectures", "transformers_version", "dtype"}
        own = {name: value for name, value in published.items() if name in known} if not self.fields else {}
        settings = own | {theirs: published[name] for name, theirs in self.fields.items()}
        if (theta := published.get("rope_theta")) and "rope_parameters" not in settings:
            scaling = published.get("rope_scaling") or {"rope_type": "default"}
            settings["rope_parameters"] = {**scaling, "rope_theta": theta}
        return {**settings, "model_type": model_type}

    def tensor_name(self, name: str) -> str:
        """The name in transformers of a tensor of the checkpoint."""
        for pattern, replacement in self.tensors:
            name = re.sub(pattern, replacement, name)
        return name


_LLADA = Family(
    model_type="llama",
    mask_token_id=126336,
    eos_token_id=126081,
    stop_token_ids=(126348,),
    rotary_float32=True,
    fields={
        "d_model": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "mlp_hidden_size": "intermediate_size",
        "embedding_size": "vocab_size",
        "max_sequence_length": "max_position_embeddings",
        "rms_norm_eps": "rms_norm_eps",
        "weight_tying": "tie_word_embeddings",
    },
    requires={
        "block_type": "llama",
        "activation_type": "silu",
        "layer_norm_type": "rms",
        "rope": True,
        "rope_full_precision": True,
        "alibi": False,
        "attention_layer_norm": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "bias_for_layer_norm": False,
        "input_emb_norm": False,
        "scale_logits": False,
    },
    tensors=(
        (r"^model\.transformer\.blocks\.(\d+)\.(q_proj|k_proj|v_proj)\.", r"model.layers.\1.self_attn.\2."),
        (r"^model\.transformer\.blocks\.(\d+)\.attn_out\.", r"model.layers.\1.self_attn.o_proj."),
        (r"^model\.transformer\.blocks\.(\d+)\.ff_proj\.", r"model.layers.\1.mlp.gate_proj."),
        (r"^model\.transformer\.blocks\.(\d+)\.up_proj\.", r"model.layers.\1.mlp.up_proj."),
        (r"^model\.transformer\.blocks\.(\d+)\.ff_out\.", r"model.layers.\1.mlp.down_proj."),
        (r"^model\.transformer\.blocks\.(\d+)\.attn_norm\.", r"model.layers.\1.input_layernorm."),
        (r"^model\.transformer\.blocks\.(\d+)\.ff_norm\.", r"model.layers.\1.post_attention_layernorm."),
        (r"^model\.transformer\.wte\.", "model.embed_tokens."),
        (r"^model\.transformer\.ln_f\.", "model.norm."),
        (r"^model\.transformer\.ff_out\.", "lm_head."),
    ),
    tokenizer="PreTrainedTokenizerFast",
)
_DREAM = Family(
    model_type="qwen2",
    mask_token_id=151666,
    eos_token_id=151643,
    stop_token_ids=(151645,),
    shift_logits=True,
    skip_padding=True,
    tokenizer="Qwen2Tokenizer",
)
FAMILIES: dict[str, Family] = {
    "llada": _LLADA,  # LLaDA-8B-Base, -Instruct, LLaDA-1.5
    "illada": replace(_LLADA, mask_token_id=5, eos_token_id=2, stop_token_ids=()),  # iLLaDA-8B
    "dream": _DREAM,  # Dream-v0, Dream-Coder, DiffuCoder
    "open-dcoder": replace(_DREAM, model_type=None, mask_token_id=None, eos_token_id=None, stop_token_ids=()),
    "decoder": Family(),  # any Llama, Qwen2 or Qwen3 of transformers; a mask token is added where there is none
}


def detect_family(published: Mapping[str, Any]) -> str:
    """The family of a checkpoint, by its `config.json`.

    Raises:
        ValueError: if none fits.
    """
    model_type = str(published.get("model_type"))
    if model_type == "llada":
        if published.get("n_experts") or published.get("num_experts"):
            raise ValueError("the checkpoint is a mixture of experts (LLaDA-MoE); expected a dense LLaDA")
        is_illada = published.get("mask_token_id") == 5 or published.get("eos_token_id") == 2
        return "illada" if is_illada else "llada"
    if model_type.lower() == "dream":
        return "dream"
    if model_type in CONFIG_MAPPING:
        return "decoder"
    raise ValueError(
        f"no family reads the model_type {model_type!r}; give `family` (one of {', '.join(FAMILIES)}) if it is one"
    )


def family_record(name: str) -> Family:
    """The record of a family.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {name!r}")
    return FAMILIES[name]


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
    if config._attn_implementation is None:
        config._attn_implementation = REGISTER_ATTENTION
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

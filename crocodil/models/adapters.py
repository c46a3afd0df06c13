"""LoRA adapters (arXiv 2106.09685) inside a network, through peft: added, chosen, merged, and kept in peft's layout."""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn

BLOCK_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear maps inside the blocks of Llama, Qwen2 and Qwen3; the head is not among them."""
ADAPTER_FILE = "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."


def lora_config(settings: Mapping[str, Any]) -> LoraConfig:
    """Settings of `peft.LoraConfig`; without `target_modules`, all projections inside the blocks, never the head.

    Raises:
        ValueError: if a setting is unknown.
    """
    known = {field.name for field in fields(LoraConfig)}
    if unknown := sorted(settings.keys() - known):
        raise ValueError(f"LoRA has no setting {', '.join(unknown)}; see peft.LoraConfig")
    return LoraConfig(**{"target_modules": list(BLOCK_PROJECTIONS), **settings})


def add_adapter(network: nn.Module, settings: Mapping[str, Any], name: str = "default") -> None:
    """Freezes a network and adds an adapter to it, in place; its update starts at zero.

    The adapter is float32 on any base: its steps are too small for bfloat16. On a base without weights (meta device)
    it lies on the CPU, ready.

    Args:
        network: any module; on repeated calls another adapter is added beside the others.
        settings: see `lora_config`.
        name: of the adapter.

    Raises:
        ValueError: if a setting is unknown, no module matches, or the name is taken.
    """
    if name in adapter_names(network):
        raise ValueError(f"there is an adapter {name!r} already; choose another name")
    network.requires_grad_(False)
    try:
        inject_adapter_in_model(lora_config(settings), network, adapter_name=name)
    except ValueError as error:  # peft's own sentence names the modules that were looked for
        raise ValueError(f"LoRA found nothing to adapt: {str(error).splitlines()[0]}") from error
    for layer in lora_layers(network):
        if name in layer.lora_A:
            _settle(layer, name, lora_config(settings).init_lora_weights)
    choose_adapter(network, name)


def _settle(layer: LoraLayer, name: str, init: Any) -> None:
    """Makes an adapter's weights float32, and real where its base is on the meta device."""
    parts = (layer.lora_A[name], layer.lora_B[name])
    was_meta = parts[0].weight.is_meta
    for part in parts:
        (part.to_empty(device="cpu") if was_meta else part).float()
    if was_meta:
        layer.reset_lora_parameters(name, init)


def lora_layers(network: nn.Module) -> Iterator[LoraLayer]:
    """The adapted layers of a network."""
    return (module for module in network.modules() if isinstance(module, LoraLayer))


def adapter_names(network: nn.Module) -> list[str]:
    """The names of a network's adapters, in the order they were added."""
    return list(dict.fromkeys(name for layer in lora_layers(network) for name in layer.lora_A))


def choose_adapter(network: nn.Module, name: str | None) -> None:
    """Lets one adapter act, and train; None switches all of them off, which gives the base again.

    Raises:
        ValueError: if there is no adapter of that name.
    """
    if name is not None and name not in adapter_names(network):
        raise ValueError(f"there is no adapter {name!r}, only {', '.join(adapter_names(network)) or 'none'}")
    for layer in lora_layers(network):
        layer.enable_adapters(name is not None)
        if name is not None:
            layer.set_adapter(name)


def merge_adapter(network: nn.Module) -> None:
    """Adds the acting adapter's update to the weights, W + (alpha / r) B A, so that it costs nothing in sampling."""
    for layer in lora_layers(network):
        layer.merge(safe_merge=True)  # type: ignore[operator]


def unmerge_adapter(network: nn.Module) -> None:
    """Takes a merged update out of the weights again."""
    for layer in lora_layers(network):
        layer.unmerge()  # type: ignore[operator]


def save_adapter(network: nn.Module, folder: str | Path, settings: Mapping[str, Any], name: str = "default") -> None:
    """Writes an adapter in peft's layout: `adapter_config.json` and `adapter_model.safetensors`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(network, adapter_name=name)
    save_file({f"{_PEFT_PREFIX}{key}": value.contiguous() for key, value in state.items()}, str(folder / ADAPTER_FILE))
    lora_config(settings).save_pretrained(str(folder))


def load_adapter(network: nn.Module, folder: str | Path, name: str = "default") -> None:
    """Reads an adapter's weights into the adapter of that name, which the network has already.

    Raises:
        ValueError: if the folder holds none, or tensors are missing or left over.
    """
    path = Path(folder) / ADAPTER_FILE
    if not path.is_file():
        raise ValueError(f"expected an adapter in peft's layout, but {path} is not there")
    state = {key.removeprefix(_PEFT_PREFIX): value for key, value in load_file(str(path)).items()}
    expected = get_peft_model_state_dict(network, adapter_name=name)
    fits = {key for key, value in state.items() if key in expected and value.shape == expected[key].shape}
    if odd := sorted((state.keys() | expected.keys()) - fits):
        raise ValueError(f"{path} does not fit the adapter: {', '.join(odd[:8])} absent or of another shape")
    set_peft_model_state_dict(network, state, adapter_name=name)

"""Our own networks as folders: `config.json`, safetensors, and adapters in peft's layout; no code, no pickle."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from crocodil.models.backbone import network_config
from crocodil.models.loading import fill, published_config, skeleton, stream_tensors, write_folder
from crocodil.models.quantization import quantize_linears

OWN_KEY = "crocodil_network"
ADAPTER_FOLDER = "adapter"


def is_own(folder: str | Path) -> bool:
    """Whether a folder was written by `save_network`."""
    return Path(folder).is_dir() and OWN_KEY in (published_config(Path(folder)))


def save_network(network: nn.Module, folder: str | Path) -> None:
    """Writes a demasker, an encoder or a prior; it comes back bit for bit.

    The quantised weights of a frozen base are written as they were before, read again from where they came from:
    quantising them on loading gives the same bits.

    Args:
        network: has `to_config`.
        folder: created if absent.
    """
    folder = Path(folder)
    config = network.to_config()  # type: ignore[operator]
    source = config.pop("pretrained", None)
    if source is not None:
        config["quantization"] = source["quantization"]
    write_folder(folder, {OWN_KEY: type(network).__name__, **config}, dict(_weights(network)))
    if config.get("lora"):
        from crocodil.models.adapters import save_adapter

        save_adapter(network.network, folder / ADAPTER_FOLDER, config["lora"])  # type: ignore[arg-type]


def _weights(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What goes into the safetensors files: all but adapters, tied heads and the packed bits of quantised weights."""
    inner = getattr(network, "network", None)
    is_tied = isinstance(inner, PreTrainedModel) and inner.config.tie_word_embeddings
    quantized = {
        name.replace(".base_layer", "")
        for name, module in network.named_modules()
        if hasattr(module, "quantized_shape")
    }
    for name, tensor in network.state_dict().items():
        plain = name.replace(".base_layer.", ".")
        if ".lora_" in name or (is_tied and plain == "network.lm_head.weight"):
            continue
        if plain.endswith(".bias") or not any(plain.startswith(f"{module}.") for module in quantized):
            yield plain, tensor.contiguous()
    if quantized:
        source = network.pretrained.backbone_tensors()  # type: ignore[union-attr, operator]
        named = ((f"network.{name}", tensor) for name, tensor in source)
        yield from ((name, tensor) for name, tensor in named if name.removesuffix(".weight") in quantized)


def load_network(
    make: Any, folder: str | Path, quantization: str | None = None, dtype: torch.dtype | None = None
) -> Any:
    """Reads what `save_network` wrote.

    Args:
        make: Demasker, RegisterEncoder or LatentPrior.
        folder: as written.
        quantization: see `Pretrained`; None keeps what was saved.
        dtype: of the backbone's weights; None keeps the file's.

    Raises:
        ValueError: if the folder holds another network, or tensors are missing or left over.
    """
    folder = Path(folder)
    settings = published_config(folder)
    kind = settings.pop(OWN_KEY, None)
    if kind != make.__name__:
        raise ValueError(f"expected a {make.__name__} in {folder}, got {kind or 'no network of crocodil'}")
    lora = settings.pop("lora", None)
    quantization = settings.pop("quantization", None) if quantization is None else quantization
    settings.pop("quantization", None)
    if "network" in settings:
        auto_class = AutoModelForCausalLM if kind == "Demasker" else AutoModel
        settings["network"] = skeleton(auto_class, network_config(settings["network"]))
        if quantization is not None:
            quantize_linears(settings["network"].get_decoder(), quantization, dtype or torch.float32)
    network = make(**settings)
    fill(network, stream_tensors(folder), folder, dtype)
    if lora:
        from crocodil.models.adapters import load_adapter

        network.with_lora(lora)
        load_adapter(network.network, folder / ADAPTER_FOLDER)
    return network

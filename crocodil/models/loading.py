"""From folders of safetensors to networks: strict about names and shapes, one tensor at a time."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PretrainedConfig, PreTrainedModel

from crocodil.models.backbone import Family
from crocodil.models.quantization import quantized_parameter
from crocodil.weightless import is_weightless

CONFIG_FILE = "config.json"
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
NOT_CODE = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
SHOWN = 8


def checkpoint_folder(path_or_id: str | Path) -> Path:
    """A folder as it is, or the local copy of a repository of the Hugging Face hub; code files are never fetched.

    Raises:
        ValueError: if it is neither, or cannot be reached.
    """
    if Path(path_or_id).is_dir():
        return Path(path_or_id)
    try:
        wanted = "*.json" if is_weightless() else NOT_CODE
        return Path(snapshot_download(str(path_or_id), allow_patterns=wanted))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"expected a folder of a checkpoint or the id of a hub repository, got {path_or_id}, which is no folder "
            f"and cannot be fetched ({reason})"
        ) from error


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON file of a checkpoint; empty if absent."""
    path = folder / name
    return json.loads(path.read_text()) if path.is_file() else {}


def published_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a checkpoint.

    Raises:
        ValueError: if there is none.
    """
    if config := read_json(folder, CONFIG_FILE):
        return config
    raise ValueError(f"expected a checkpoint in {folder}, but it has no {CONFIG_FILE}")


def tensor_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in order.

    Raises:
        ValueError: if there are none, or some are absent.
    """
    index = read_json(folder, INDEX_FILE)
    files = [folder / name for name in sorted(set(index["weight_map"].values()))] if index else [folder / WEIGHTS_FILE]
    if absent := [path.name for path in files if not path.is_file()]:
        raise ValueError(f"expected weights as safetensors in {folder}, but {', '.join(absent[:SHOWN])} is not there")
    return files


def stream_tensors(folder: Path, family: Family | None = None) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint one by one, under their names in transformers; none is read before its turn."""
    for path in tensor_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - the handle is no mapping
                yield (family.tensor_name(name) if family else name), file.get_tensor(name)


def tensor_dtype(folder: Path) -> torch.dtype:
    """The dtype of a checkpoint's weights, from its configuration or the first of its tensors."""
    config = published_config(folder)
    told = config.get("dtype") or config.get("torch_dtype")
    return getattr(torch, told) if told else next(stream_tensors(folder))[1].dtype


def skeleton(auto_class: Any, config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A network of transformers without its weights (meta device), but with its rotary frequencies, in float32."""
    with torch.device("meta"):
        network = auto_class.from_config(config).to(dtype)
    for module in network.modules():
        if (rotary := getattr(module, "rotary_emb", None)) is not None:
            module.rotary_emb = type(rotary)(config=network.config)
    return network


def fill(
    network: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    source: Path,
    dtype: torch.dtype | None,
    new_parts: str | None = None,
) -> None:
    """Puts a checkpoint's tensors into a network: onto meta or quantised parameters, real ones, or shards of them.

    Args:
        network: whose parameters are filled, those of adapters apart.
        tensors: names and values, as from `stream_tensors`.
        source: told in errors.
        dtype: of floating-point parameters that were on the meta device; None keeps the checkpoint's.
        new_parts: last name of parameters that the checkpoint cannot have, because they were added since.

    Raises:
        ValueError: if tensors are missing, left over, or of another shape, with their names.
    """
    open_slots = {name: slot for name, slot in _slots(network) if slot[1] != new_parts}
    left_over: list[str] = []
    for name, tensor in _outlines(dict(open_slots), source) if is_weightless() else tensors:
        if name not in open_slots:
            left_over.append(name)
            continue
        module, leaf = open_slots.pop(name)
        _put(module, leaf, tensor, dtype, f"{name} of {source}")
    tied = [inner for inner in network.modules() if isinstance(inner, PreTrainedModel) and _is_tied(inner)]
    for inner in tied:
        inner.tie_weights()
    missing = [name for name in open_slots if not (tied and name.endswith("lm_head.weight"))]
    if missing or left_over:
        raise ValueError(
            f"{source} does not fit the network: {_listed('missing', missing)}, {_listed('left over', left_over)}"
        )


def _slots(network: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
    """Parameters and saved buffers by the names they have without adapters."""
    for prefix, module in network.named_modules():
        own = dict(module.named_parameters(recurse=False)) | {
            name: buffer
            for name, buffer in module.named_buffers(recurse=False)
            if name not in module._non_persistent_buffers_set
        }
        for leaf in own:
            name = f"{prefix}.{leaf}" if prefix else leaf
            if ".lora_" not in name:
                yield name.replace(".base_layer.", "."), (module, leaf)


def _outlines(slots: Mapping[str, tuple[nn.Module, str]], source: Path) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the shape of the slots, in the dtype that the checkpoint tells, with no meaning."""
    config = published_config(source)
    config = config.get("network", config)
    dtype = getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")
    for name, (module, leaf) in slots.items():
        shape = getattr(module, "quantized_shape", None) if leaf == "weight" else None
        current = getattr(module, leaf)
        yield name, torch.empty(shape or current.shape, dtype=dtype if current.is_meta else current.dtype)


def _is_tied(network: PreTrainedModel) -> bool:
    return network.config.tie_word_embeddings and network.get_output_embeddings() is not None


def _put(module: nn.Module, leaf: str, tensor: Tensor, dtype: torch.dtype | None, where: str) -> None:
    current = getattr(module, leaf)
    shape = getattr(module, "quantized_shape", None) if leaf == "weight" else None
    if tuple(tensor.shape) != tuple(shape or current.shape):
        raise ValueError(f"{where} has the shape {tuple(tensor.shape)}, expected {tuple(shape or current.shape)}")
    if shape is not None:
        setattr(module, leaf, quantized_parameter(module, tensor))
    elif current.is_meta:
        value = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        is_parameter = isinstance(current, nn.Parameter)
        setattr(module, leaf, nn.Parameter(value, current.requires_grad) if is_parameter else value)
    elif isinstance(current, DTensor):
        whole = tensor.to(current.device, current.dtype)
        current.detach().copy_(distribute_tensor(whole, current.device_mesh, current.placements))
    else:
        current.detach().copy_(tensor)


def _listed(what: str, names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{what} {', '.join(names[:SHOWN]) or 'none'}{more}"


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes `config.json` and safetensors, in several files if they are large."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(dict(config), indent=2) + "\n")
    save_torch_state_dict(dict(tensors), str(folder), filename_pattern="model{suffix}.safetensors")

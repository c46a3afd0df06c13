"""Published checkpoints and folders of our own as networks; `config.json` decides which, and no code is run."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from crocodil.models.backbone import Family, detect_family, family_record, network_config
from crocodil.models.folders import is_own
from crocodil.models.loading import (
    checkpoint_folder,
    fill,
    published_config,
    read_json,
    skeleton,
    stream_tensors,
    tensor_dtype,
)
from crocodil.models.quantization import quantize_linears

PER_TOKEN = ("embed_tokens.weight", "lm_head.weight")
SPECIAL_FILES = ("tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class Pretrained:
    """Where a network comes from.

    Attributes:
        path: folder with `config.json` and safetensors, or id of a repository of the Hugging Face hub.
        family: one of `FAMILIES`; None tells it from `config.json`.
        quantization: "nf4" or "int8" for the linear maps inside the blocks; None for none.
        dtype: of the weights ("float32", "bfloat16", "float16"); None keeps the checkpoint's.
    """

    path: str
    family: str | None = None
    quantization: str | None = None
    dtype: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def backbone_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The weights of the network at `path`, one by one, under their names in transformers."""
        if not is_own(self.path):
            return Checkpoint.open(self).tensors()
        return ((name.removeprefix("network."), tensor) for name, tensor in stream_tensors(Path(self.path)))

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype itself.

        Raises:
            ValueError: if it is none of floating-point numbers.
        """
        return named_dtype(self.dtype)


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint, opened: its folder and what its files say.

    Args:
        source: where it is.
    """

    source: Pretrained
    folder: Path
    published: dict[str, Any]
    family: str

    @classmethod
    def open(cls, source: Pretrained) -> "Checkpoint":
        """Reads the configuration, not the weights.

        Raises:
            ValueError: if there is no checkpoint, or none of a known family.
        """
        folder = checkpoint_folder(source.path)
        published = published_config(folder)
        family = source.family or detect_family(published)
        family_record(family)
        return cls(source, folder, published, family)

    @property
    def record(self) -> Family:
        """The record of its family."""
        return family_record(self.family)

    @property
    def config(self) -> PretrainedConfig:
        """Its network, bidirectional, as a configuration of transformers; with a row for the mask token."""
        config = network_config(self.record.network_settings(self.published))
        config.vocab_size = max(config.vocab_size, self.mask_token_id + 1)
        return config

    @property
    def eos_token_id(self) -> int:
        """The end token, as the checkpoint says, else as the family does.

        Raises:
            ValueError: if nobody says.
        """
        said = [file.get("eos_token_id") for file in (self.published, read_json(self.folder, "generation_config.json"))]
        chosen = next((given for given in (*said, self.record.eos_token_id) if given is not None), None)
        if chosen is None:
            raise ValueError(f"expected an eos_token_id in {self.folder / 'config.json'}, but there is none")
        return chosen[0] if isinstance(chosen, list) else chosen

    @property
    def mask_token_id(self) -> int:
        """The mask token: of the configuration, the tokenizer, the family, else a new one behind the vocabulary."""
        given = self.published.get("mask_token_id")
        for chosen in (given, mask_token_of_tokenizer(self.folder), self.record.mask_token_id):
            if chosen is not None:
                return chosen
        return tokenizer_size(self.folder) or self.record.network_settings(self.published)["vocab_size"]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Its tensors under their names in transformers; rows of new tokens are the mean of the others."""
        rows = self.config.vocab_size
        for name, tensor in stream_tensors(self.folder, self.record):
            if name.endswith(PER_TOKEN) and len(tensor) < rows:
                mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
                tensor = torch.cat([tensor, mean.expand(rows - len(tensor), -1)])
            yield name, tensor


def mask_token_of_tokenizer(folder: Path) -> int | None:
    """The id of a tokenizer's mask token, read from its files; None where it has none."""
    for name in SPECIAL_FILES:
        token = read_json(folder, name).get("mask_token")
        if token is not None:
            content = token["content"] if isinstance(token, dict) else token
            return tokenizer_vocabulary(folder).get(content)
    return None


def tokenizer_vocabulary(folder: Path) -> dict[str, int]:
    """Token -> id of a tokenizer's files; added tokens included."""
    listed = read_json(folder, "tokenizer.json")
    vocabulary = dict(listed.get("model", {}).get("vocab", {})) if listed else read_json(folder, "vocab.json")
    added = {token["content"]: token["id"] for token in listed.get("added_tokens", [])}
    decoder = read_json(folder, "tokenizer_config.json").get("added_tokens_decoder", {})
    return vocabulary | added | {token["content"]: int(token_id) for token_id, token in decoder.items()}


def tokenizer_size(folder: Path) -> int:
    """One more than the largest id of a tokenizer; 0 where there are no files of one."""
    return 1 + max(tokenizer_vocabulary(folder).values(), default=-1)


def named_dtype(name: str | None) -> torch.dtype | None:
    """The dtype of a name such as "bfloat16"; None for None.

    Raises:
        ValueError: if it is none of floating-point numbers.
    """
    if name is None:
        return None
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {name!r}")
    return dtype


def build_empty(checkpoint: Checkpoint, auto_class: Any) -> PreTrainedModel:
    """The network of a checkpoint without its weights, quantised if so asked; `load_weights` puts them in."""
    source = checkpoint.source
    network = skeleton(auto_class, checkpoint.config, source.torch_dtype or tensor_dtype(checkpoint.folder))
    if source.quantization is not None:
        quantize_linears(network.get_decoder(), source.quantization, source.torch_dtype or torch.float32)
    network.is_empty = True  # type: ignore[assignment]
    return network


def load_weights(network: PreTrainedModel, source: Pretrained) -> None:
    """Puts the weights of a checkpoint into its network, one tensor at a time; into shards, where it is sharded.

    Args:
        network: from `build_empty`, possibly with adapters and sharded since; one that has its weights is left alone.
        source: of the checkpoint.

    Raises:
        ValueError: if tensors are missing, left over, or of another shape, with their names.
    """
    if not getattr(network, "is_empty", False):
        return
    network.is_empty = False  # type: ignore[assignment]
    tensors = source.backbone_tensors()
    if network.get_output_embeddings() is None:  # an encoder; checkpoints of decoders have a head and a prefix
        tensors = ((name.removeprefix("model."), tensor) for name, tensor in tensors if not name.startswith("lm_head."))
    fill(network, tensors, Path(source.path), source.torch_dtype, new_parts="register_gate")

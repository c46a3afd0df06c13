"""Checkpoints as folders to which every process writes its part: plain data, and reading them runs no code.

`.metadata` tells where in the `*.distcp` files each tensor lies (torch.distributed.checkpoint); `meta.pt` has the rest.
"""

import pickle
import shutil
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from crocodil.weightless import is_weightless

META_FILE = "meta.pt"
DESCRIPTIONS = {
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "_MEM_FORMAT_ENCODING",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
}
"""What may be named in `.metadata`: classes that describe tensors and files, none of which does anything."""


def save_sharded(path: Path, tensors: dict[str, Any], rest: dict[str, Any]) -> None:
    """Writes a checkpoint in place of the one that may be at `path`, which stays whole until the new one is.

    All processes must call this.

    Args:
        path: folder to write, the same on all processes and seen by all.
        tensors: nested dictionaries of tensors, shards among them, and of plain values.
        rest: plain data, of which that of the first process is kept.
    """
    first = distributed.get_rank() == 0
    fresh, old = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.old")
    if first:
        shutil.rmtree(fresh, ignore_errors=True)
    distributed.barrier()
    dcp.save(tensors, checkpoint_id=fresh)
    if first:
        torch.save(rest, fresh / META_FILE)
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.rename(old)
        fresh.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    distributed.barrier()


def load_sharded(path: Path, tensors: dict[str, Any], alone: bool = False) -> None:
    """Fills `tensors` in place, each process its own shards; all processes must call this.

    Args:
        path: folder of the checkpoint.
        tensors: nested dictionaries as they were saved; may be a part of what was.
        alone: this process reads for itself, without the others.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=PlainReader(path), planner=PlainPlanner(), no_dist=alone)


def read_weights(path: Path, prefix: str) -> dict[str, Tensor]:
    """The entries of the `state_dict` whose names begin with `prefix`, whole and on the CPU."""
    head = f"state_dict.{prefix}"
    weights = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in PlainReader(path).read_metadata().state_dict_metadata.items()
        if name.startswith(head) and isinstance(entry, TensorStorageMetadata)
    }
    if not is_weightless():
        load_sharded(path, weights, alone=True)
    return {name.removeprefix("state_dict."): value for name, value in weights.items()}


class PlainReader(dcp.FileSystemReader):
    """Reads `.metadata` only if all it names are `DESCRIPTIONS`."""

    def read_metadata(self) -> Metadata:  # type: ignore[override]  # without the fallback to other files
        """Where the tensors lie.

        Raises:
            UnpicklingError: if anything else is in the file.
        """
        with (Path(self.path) / ".metadata").open("rb") as file:
            _DescriptionUnpickler(file).load()
        return super().read_metadata()


class _DescriptionUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in DESCRIPTIONS.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in the metadata of a checkpoint")
        return super().find_class(module, name)


class PlainPlanner(dcp.DefaultLoadPlanner):
    """Takes values that are no tensors only if they are plain data."""

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        """Loads one value.

        Raises:
            UnpicklingError: if it is more than plain data.
        """
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)

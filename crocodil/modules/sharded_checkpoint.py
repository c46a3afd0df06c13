"""Checkpoints as folders to which every process writes its part: plain data, and reading them runs no code.

`.metadata` tells where in the `*.distcp` files each tensor lies (torch.distributed.checkpoint); `meta.pt` has the rest.
"""

import pickle
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from crocodil.modules.checkpoint_io import cannot_write, write_synced
from crocodil.modules.integrity import digest, is_whole_folder, part_of, put_in_place, remove, way_out, write_sums
from crocodil.ranks import rank_and_size
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
    """Writes a checkpoint aside and puts it in place once it is on the disk; the one that was there is kept.

    All processes must call this.

    Args:
        path: folder to write, the same on all processes and seen by all.
        tensors: nested dictionaries of tensors, shards among them, and of plain values.
        rest: plain data, of which that of the first process is kept.

    Raises:
        OSError: if it cannot be written, as on a full disk; the checkpoint that was there stays.
    """
    first = distributed.get_rank() == 0
    fresh = part_of(path)
    try:
        if first:
            remove(fresh)
            fresh.mkdir(parents=True)
            write_synced(rest, fresh / META_FILE)
        distributed.barrier()
        dcp.save(tensors, checkpoint_id=fresh)
        sums = sums_of_all(fresh)
        if first:
            write_sums(fresh, sums)
            put_in_place(path)
    except (OSError, CheckpointException) as error:
        if first:
            remove(fresh)
        raise OSError(cannot_write(path, innermost(error))) from error
    distributed.barrier()


def sums_of_all(folder: Path) -> dict[str, str]:
    """The sums of all files of a folder, to which each process adds those of its share."""
    rank, size = rank_and_size()
    names = sorted(path.name for path in folder.iterdir())
    parts: list[dict[str, str]] = [{} for _ in range(size)]
    distributed.all_gather_object(parts, {name: digest(folder / name) for name in names[rank::size]})
    return {name: value for part in parts for name, value in part.items()}


def innermost(error: OSError | CheckpointException) -> OSError:
    """What the system said, of an error that may gather those of several processes."""
    inside: list[BaseException] = (
        [each for each, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    )
    return next((each for each in inside if isinstance(each, OSError)), OSError(str(inside[0])))


def read_folder(path: Path, kind: str = "a checkpoint", share: slice = slice(None), **options: Any) -> Any:
    """Verifies a folder and reads what is no tensor in it, as plain data.

    Args:
        path: of the folder.
        kind: what it must be, for the sentence of a refusal.
        share: the files to verify, in order of their names, where other processes verify the others.
        options: further arguments of `torch.load`.

    Raises:
        ValueError: if the folder is no checkpoint, damaged or holds more than plain data.
    """
    if not (path / META_FILE).is_file():
        raise ValueError(f"expected {kind} at {path}, but there is no such file{way_out(path)}")
    try:
        if is_whole_folder(path, share):
            PlainReader(path).read_metadata()
            return torch.load(path / META_FILE, weights_only=True, **options)
        reason = None
    except Exception as error:  # the unpickler meets a file of others with almost any exception
        reason = error
    raise ValueError(f"expected {kind}, but {path} is damaged or no checkpoint{way_out(path)}") from reason


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

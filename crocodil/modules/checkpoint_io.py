"""How the Trainer writes and reads checkpoints that are files."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from crocodil.modules.integrity import is_whole, part_of, put_in_place, way_out


class WholeCheckpointIO(TorchCheckpointIO):
    """Checkpoints are whole or not there, are verified before they are read, and are plain data: no pickle is run.

    The checkpoint that was at the same place before is kept (`previous_of`).
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Writes a checkpoint aside, and puts it in place once it is on the disk.

        Args:
            checkpoint: plain data and tensors.
            path: of the file.
            storage_options: none are known.

        Raises:
            OSError: if it cannot be written, as on a full disk; the checkpoint that was there stays.
        """
        place = Path(path)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_synced(checkpoint, part_of(place))
            put_in_place(place)
        except OSError as error:
            with suppress(OSError):  # where nothing could be written, there is nothing to remove
                part_of(place).unlink()
            raise OSError(cannot_write(place, error)) from error

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Callable[..., Any] | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Verifies a checkpoint and reads it as plain data.

        Args:
            path: of the file.
            map_location: see `torch.load`.
            weights_only: of Lightning's interface; nothing but plain data is ever read.

        Raises:
            ValueError: if the file is absent, damaged or more than plain data.
        """
        return load_verified(Path(path), map_location=map_location)


def write_synced(content: Any, path: Path) -> None:
    """Saves with torch and waits until the file is on the disk.

    Args:
        content: plain data and tensors.
        path: of the file.

    Raises:
        OSError: if it cannot be written.
    """
    try:
        with path.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except RuntimeError as error:  # of the archive's writer, which hides what the system said
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise


def load_verified(path: Path, kind: str = "a checkpoint", **options: Any) -> Any:
    """Verifies a file and reads it as plain data.

    Args:
        path: of the file.
        kind: what it must be, for the sentence of a refusal.
        options: further arguments of `torch.load`.

    Raises:
        ValueError: if the file is absent, damaged or more than plain data.
    """
    if not path.is_file():
        raise ValueError(f"expected {kind} at {path}, but there is no such file{way_out(path)}")
    try:
        if is_whole(path):
            return torch.load(path, weights_only=True, **options)
        reason = None
    except Exception as error:  # the unpickler meets a file of others with almost any exception
        reason = error
    raise ValueError(f"expected {kind}, but {path} is damaged or no checkpoint{way_out(path)}") from reason


def cannot_write(path: Path, error: OSError) -> str:
    """The sentence about a checkpoint that could not be written.

    Args:
        path: of the checkpoint.
        error: of the system.
    """
    reason = error.strerror or error
    return (
        f"the checkpoint {path} cannot be written: {reason}; the one before it is untouched, and the same command goes "
        "on from it"
    )

"""Where results go: checked before the work starts, and on the disk when it is done."""

import os
import tempfile
from pathlib import Path


def check_writable(folder: str | Path) -> None:
    """Creates the folder if absent and tries to write there.

    Raises:
        ValueError: if it cannot be written to.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"the output folder {folder} cannot be written to: {error.strerror or error}") from error


def sync(path: Path) -> None:
    """Waits until a file, or the list of files of a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Where results go: checked before the work starts, not after."""

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

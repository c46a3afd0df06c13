"""Prepared corpora on disk: a folder for each configuration, complete or absent."""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from crocodil.data.corpora import SourceFile

CORPUS_VERSION = 2  # to be raised with every change of what is written for the same files


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/crocodil`, or `~/.cache/crocodil`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crocodil"


def cache_key(configuration: dict[str, Any], files: Sequence[SourceFile]) -> str:
    """Hash of a configuration and of the names, sizes and modification times of its files.

    Args:
        configuration: plain values.
        files: files in a fixed order.

    Returns:
        16 hexadecimal digits.
    """
    stats = [(file.name, stat.st_size, stat.st_mtime_ns) for file in files for stat in [file.path.stat()]]
    content = json.dumps([CORPUS_VERSION, sys.version_info[:2], sorted(configuration.items()), stats])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def cached_folder(cache_dir: str | Path | None, name: str, build: Callable[[Path, Path], None]) -> Path:
    """Folder `name` of the cache; built first if it is absent.

    It is written aside and then renamed, so that a reader never sees half of it, and of two builders one wins.

    Args:
        cache_dir: folder of all caches; None for `default_cache_dir()`.
        name: what distinguishes this content from every other.
        build: writes the content into the first folder that it is given; in the second, which need not exist, it may
            leave what a later call can go on from.

    Returns:
        The complete folder.

    Raises:
        ValueError: if nothing can be written under `cache_dir`.
    """
    root = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
    folder, parts = root / name, root / f".{name}.parts"
    if not folder.is_dir():
        write_whole(folder, lambda aside: build(aside, parts))
        shutil.rmtree(parts, ignore_errors=True)
    return folder


def write_whole(folder: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a folder that has its name only when it is whole, and removes what killed processes left of it.

    Args:
        folder: absent; of two processes that write it one wins.
        write: fills the folder that it is given.

    Raises:
        ValueError: if nothing can be written beside the folder.
    """
    root = folder.parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=root))
    except OSError as error:
        raise ValueError(f"cache_dir must be a writable folder, got {str(root)!r}: {error.strerror}.") from error
    try:
        write(aside)
        aside.chmod(0o755)
        aside.rename(folder)
    except Exception:  # a library may meet the loss of its folder with any
        if not folder.is_dir():  # unless another process has just finished, and removed what this one wrote
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    for left in root.glob(f".{folder.name}-*"):
        shutil.rmtree(left, ignore_errors=True)

"""Checkpoints that are whole or not there: written aside, put in place in one step, and checked before they are read.

A file is torch's archive, whose records carry checksums (CRC-32); a folder has the SHA-256 sums of its files in it.
"""

import hashlib
import shutil
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from crocodil.output import sync

SUMS_FILE = "SHA256SUMS"
"""In the format of `sha256sum`, which can check a folder, too."""


def part_of(path: Path) -> Path:
    """Where a checkpoint is written until it is whole."""
    return path.with_name(f"{path.name}.part")


def previous_of(path: Path) -> Path:
    """Where the checkpoint is kept that was at `path` before: `previous.ckpt` for `last.ckpt`."""
    return path.with_stem("previous" if path.stem == "last" else f"{path.stem}-previous")


def put_in_place(path: Path) -> None:
    """Moves what was written at `part_of(path)` to `path`, and what was there to `previous_of(path)`.

    A process that dies here leaves at least one of the two whole.

    Args:
        path: file or folder; what was written must be on the disk already (`sync`).
    """
    previous = previous_of(path)
    if path.exists():
        remove(previous)
        path.rename(previous)
    part_of(path).rename(path)
    sync(path.parent)


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def is_whole(path: Path) -> bool:
    """Whether a checkpoint is there and holds what was written; reads all of it once.

    Args:
        path: file or folder.
    """
    return is_whole_folder(path) if path.is_dir() else is_whole_file(path)


def is_whole_file(path: Path) -> bool:
    """Whether all records of an archive have the checksums they were written with."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # a damaged header may say anything, and zipfile answers with almost any exception
        return False


def digest(path: Path) -> str:
    """The SHA-256 sum of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(folder: Path, sums: dict[str, str]) -> None:
    """Writes the sums of the files of a folder, and waits until they are on the disk.

    Args:
        folder: of the checkpoint.
        sums: by name of file.
    """
    lines = [f"{value}  {name}\n" for name, value in sorted(sums.items())]
    (folder / SUMS_FILE).write_text("".join(lines))
    sync(folder / SUMS_FILE)
    sync(folder)


def is_whole_folder(folder: Path, share: slice = slice(None)) -> bool:
    """Whether the files of a folder have the sums they were written with.

    Args:
        folder: of the checkpoint.
        share: which of the files to read, in order of their names.
    """
    try:
        pairs = [line.split("  ", 1) for line in (folder / SUMS_FILE).read_text().splitlines()]
        sums = {name: value for value, name in pairs}
        files = {path.name for path in folder.iterdir()} - {SUMS_FILE}
        return sums.keys() == files and all(digest(folder / name) == sums[name] for name in sorted(files)[share])
    except (OSError, ValueError):  # a damaged list has lines that are none
        return False


def way_out(path: Path) -> str:
    """The end of a sentence about a checkpoint that cannot be used: which other one can.

    Args:
        path: of the checkpoint.
    """
    previous = previous_of(path)
    return f"; the checkpoint before it is whole: {previous}" if is_whole(previous) else ""


def newest_first(paths: Sequence[Path]) -> list[Path]:
    """Files and folders in order of their time of writing; another process may have taken one away."""
    times = {}
    for path in paths:
        with suppress(FileNotFoundError):
            times[path] = path.stat().st_mtime_ns
    return sorted(times, key=lambda path: times[path], reverse=True)

"""The Python programs of the headline: widely used packages and the standard library, one folder a package.

    python benchmarks/headline_corpus.py --output runs/headline/corpus

Downloads the wheels of `headline_packages.txt` (pinned; 3 GB of disk) from the index that pip is set up with, and
unpacks their Python files, at most 6 MB a package, evenly spread over its files, so that no generated client library
outweighs the rest. A package that cannot be had any more is named, with what pip said, and left out. Started again, it
goes on where it was.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from zipfile import ZipFile

from crocodil.data.corpora import EXCLUDED_FOLDERS, MAX_FILE_BYTES, standard_library_files, with_progress

PACKAGES = Path(__file__).with_name("headline_packages.txt")
PACKAGE_BYTES = 6_000_000
LIBRARY_BYTES = 20_000_000
"""The standard library counts as one package, of more good code than most."""

Files = list[tuple[str, int]]
"""Names and bytes."""


def download(requirement: str, folder: Path) -> Path | str:
    """The wheel of one requirement, such as "flask==3.1.0", or what pip said last if there is none.

    Args:
        requirement: name and version.
        folder: where wheels lie; one that lies there is not loaded again.
    """
    name, _, version = requirement.partition("==")
    start = f"{re.sub(r'[-_.]+', '_', name)}-{version}-".lower()

    def lying_there() -> Path | None:
        return next((path for path in sorted(folder.glob("*.whl")) if path.name.lower().startswith(start)), None)

    if (wheel := lying_there()) is not None:
        return wheel
    options = ("--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(folder))
    command = [sys.executable, "-m", "pip", "download", *options, requirement]
    pip = subprocess.run(command, capture_output=True, text=True, check=False)
    return lying_there() or (pip.stderr.strip().splitlines() or ["pip said nothing"])[-1]


def spread(files: Files, max_bytes: int) -> Files:
    """Files of at most so many bytes together, evenly spread over the list.

    Args:
        files: in a fixed order.
        max_bytes: of all of them.
    """
    total = sum(size for _, size in files)
    kept, passed = [], 0
    held = 0
    for name, size in files:
        passed += size
        if held + size <= min(max_bytes, max_bytes * passed / max(total, 1) + size / 2):
            kept.append((name, size))
            held += size
    return kept


def python_files(wheel: ZipFile) -> Files:
    """Python files of a wheel that are no tests and not larger than a corpus takes, by name."""
    return sorted(
        (entry.filename, entry.file_size)
        for entry in wheel.infolist()
        if entry.filename.endswith(".py")
        and entry.file_size <= MAX_FILE_BYTES
        and not EXCLUDED_FOLDERS.intersection(PurePosixPath(entry.filename).parts)
        and ".." not in PurePosixPath(entry.filename).parts
        and not entry.filename.startswith("/")
    )


def unpack(path: Path, folder: Path, max_bytes: int = PACKAGE_BYTES) -> None:
    """Writes the Python files of a wheel into a folder of the package's name, which is complete once it exists.

    Args:
        path: the wheel.
        folder: of the corpus.
        max_bytes: of the package's files.
    """
    target = folder / path.name.partition("-")[0].lower()
    if target.exists():
        return
    with ZipFile(path) as wheel:
        _write(target, ((name, wheel.read(name)) for name, _ in spread(python_files(wheel), max_bytes)))


def unpack_library(folder: Path, max_bytes: int = LIBRARY_BYTES) -> None:
    """Writes the interpreter's standard library into the folder "python", likewise."""
    target = folder / "python"
    if target.exists():
        return
    paths = {file.name: file.path for file in standard_library_files()}
    sizes = [(name, path.stat().st_size) for name, path in paths.items()]
    _write(target, ((name, paths[name].read_bytes()) for name, _ in spread(sizes, max_bytes)))


def _write(target: Path, files: Iterable[tuple[str, bytes]]) -> None:
    aside = target.with_name(f".{target.name}")
    for name, content in files:
        path = aside / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    aside.mkdir(parents=True, exist_ok=True)
    aside.rename(target)


def build(output: Path) -> Path:
    """Downloads and unpacks everything.

    Args:
        output: folder for "wheels" and "packages".

    Returns:
        The folder of packages.

    Raises:
        RuntimeError: if none of the packages can be downloaded.
    """
    wheels, packages = output / "wheels", output / "packages"
    for folder in (wheels, packages):
        folder.mkdir(parents=True, exist_ok=True)
    missing, wanted = [], PACKAGES.read_text().split()
    with ThreadPoolExecutor(6) as pool:
        found: Iterator[Path | str] = pool.map(lambda item: download(item, wheels), wanted)
        for requirement, path in zip(wanted, with_progress(len(wanted), found, "Packages"), strict=True):
            if isinstance(path, Path):
                unpack(path, packages)
            else:
                missing.append(f"{requirement} ({path})")
    if len(missing) == len(wanted):
        raise RuntimeError(f"none of the {len(wanted)} packages could be downloaded, the first: {missing[0]}")
    unpack_library(packages)
    if missing:
        print(f"Left out, as pip found no wheel: {', '.join(missing)}.", file=sys.stderr)
    return packages


def main() -> None:
    """Prints where the corpus lies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/headline/corpus"))
    print(build(parser.parse_args().output))


if __name__ == "__main__":
    main()

"""Where the text comes from: the interpreter's standard library, installed packages, a user's folder."""

import hashlib
import sysconfig
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Literal, TypeVar

from rich.console import Console
from rich.progress import track

Item = TypeVar("Item", bound=Hashable)
Result = TypeVar("Result")
Split = Literal["train", "val", "test"]

HELD_OUT_FIRST: tuple[Split, ...] = ("test", "val", "train")
EXCLUDED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
MAX_FILE_BYTES = 1_000_000
VAL_PERCENT = TEST_PERCENT = 5
DEFAULT_PACKAGES = (
    "torch",
    "lightning",
    "transformers",
    "datasets",
    "torchmetrics",
    "peft",
    "omegaconf",
    "jsonargparse",
    "rich",
    "numpy",
    "pandas",
    "matplotlib",
    "tokenizers",
    "huggingface_hub",
    "safetensors",
    "accelerate",
)


@dataclass(frozen=True)
class SourceFile:
    """A file of a corpus.

    Args:
        path: where the file lies on this machine.
        name: its name relative to the root of its corpus, with forward slashes, the same on every machine.
    """

    path: Path
    name: str


@dataclass
class SkipCount:
    """How many files were left out, by reason.

    Args:
        not_utf8: files that are not UTF-8.
        null_bytes: files that hold NUL bytes.
        empty: files without any visible character.
        too_large: files of more than `MAX_FILE_BYTES` bytes.
        unparsable: files that are no Python program (canonical functions only).
        unreadable: files that the operating system refuses to read.
    """

    not_utf8: int = 0
    null_bytes: int = 0
    empty: int = 0
    too_large: int = 0
    unparsable: int = 0
    unreadable: int = 0

    @property
    def total(self) -> int:
        """Number of files left out."""
        return sum(asdict(self).values())

    def add(self, other: "SkipCount") -> None:
        """Adds the counts of another record to this one."""
        for reason, count in asdict(other).items():
            setattr(self, reason, getattr(self, reason) + count)

    def __str__(self) -> str:
        reasons = [f"{count} {reason.replace('_', ' ')}" for reason, count in asdict(self).items() if count]
        return ", ".join(reasons) or "none"


def standard_library_files() -> list[SourceFile]:
    """Python files of the running interpreter's standard library, without `EXCLUDED_FOLDERS`, sorted by name."""
    files = folder_files(sysconfig.get_paths()["stdlib"])
    return [file for file in files if not EXCLUDED_FOLDERS.intersection(file.name.split("/"))]


def installed_package_files(packages: Sequence[str] = DEFAULT_PACKAGES) -> list[SourceFile]:
    """Python files of installed distributions, without `EXCLUDED_FOLDERS`, sorted by name.

    Args:
        packages: names of distributions; those that are not installed, and crocodil itself, are passed over.

    Returns:
        Files named relative to the folder that holds the packages, such as "torch/nn/modules/linear.py".
    """
    files = {}
    for package in packages:
        if package == "crocodil":  # a run must not learn from the code that is being worked on
            continue
        try:
            listed = distribution(package).files or []
        except PackageNotFoundError:
            continue
        for entry in listed:
            if entry.suffix == ".py" and not EXCLUDED_FOLDERS.intersection(entry.parts):
                files[entry.as_posix()] = SourceFile(Path(str(entry.locate())), entry.as_posix())
    return [files[name] for name in sorted(files) if files[name].path.is_file()]


def folder_files(folder: str | Path, pattern: str = "**/*.py") -> list[SourceFile]:
    """Files of a user's folder, sorted by name.

    Args:
        folder: any folder.
        pattern: glob pattern below the folder.

    Returns:
        Files named relative to the folder.

    Raises:
        ValueError: if the folder does not exist or holds no matching file.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise ValueError(f"folder must be an existing folder, got {str(folder)!r}: correct the path.")
    files = sorted((path.relative_to(root).as_posix(), path) for path in root.glob(pattern) if path.is_file())
    if not files:
        raise ValueError(f"folder must hold files that match {pattern!r}, got none in {str(folder)!r}.")
    return [SourceFile(path, name) for name, path in files]


def read_text(path: Path, skipped: SkipCount) -> str | None:
    """Text of a UTF-8 file (a byte order mark is dropped), or None if the file is unfit.

    Args:
        path: any file.
        skipped: the reason is counted here if the file is unfit.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            skipped.too_large += 1
            return None
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        skipped.not_utf8 += 1
        return None
    except OSError:
        skipped.unreadable += 1
        return None
    if "\0" in text:
        skipped.null_bytes += 1
        return None
    if not text.strip():
        skipped.empty += 1
        return None
    return text


def split_of(relative_name: str) -> Split:
    """Split of a file by a stable hash of its relative name: 5 % "val", 5 % "test", the rest "train".

    Args:
        relative_name: name with forward slashes relative to the root of the corpus, such as "json/decoder.py".
    """
    percent = int.from_bytes(hashlib.sha256(relative_name.encode()).digest()[:8], "big") % 100
    if percent < TEST_PERCENT:
        return "test"
    return "val" if percent < TEST_PERCENT + VAL_PERCENT else "train"


def distinct_by_split(found: Mapping[Split, Iterable[Item]]) -> dict[Split, list[Item]]:
    """Removes duplicates within and between splits, keeping the order.

    Of equal items one is kept: the first of the test split, else of val, else of train. So no held-out item occurs in
    train, and common items do not empty the held-out splits.

    Args:
        found: items of each split.
    """
    seen: set[Item] = set()
    distinct: dict[Split, list[Item]] = {}
    for split in HELD_OUT_FIRST:
        distinct[split] = [item for item in dict.fromkeys(found[split]) if item not in seen]
        seen.update(distinct[split])
    return distinct


def with_progress(files: Sequence[SourceFile], results: Iterable[Result], description: str) -> Iterator[Result]:
    """Passes results on, one a file, behind a progress bar that shows in a terminal only and leaves no trace.

    Args:
        files: the files of the corpus.
        results: what is made of each file, in the same order.
        description: what is being done.
    """
    console = Console(stderr=True)
    bar = track(
        results, description, total=len(files), console=console, transient=True, disable=not console.is_terminal
    )
    yield from bar

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
MAX_DOCUMENT_BYTES = 2**24
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
    """How many files, or records of files, were left out, by reason.

    Args:
        not_utf8: not UTF-8, or JSON strings that no UTF-8 can spell (lone surrogates).
        null_bytes: with NUL bytes.
        empty: without any visible character.
        too_large: of more bytes than the limit of whoever reads (`MAX_FILE_BYTES` in `read_text`).
        not_json: lines that are no JSON object.
        missing_values: rows without a text, or without a plain value in a column that was asked for.
        damaged: files, parts of a table or members of an archive that break off or cannot be decoded.
        unsafe: links out of the folder; members of archives that are links, devices or named outside the archive.
        unreadable: files that the operating system refuses to read; members of archives that are encrypted.
        unparsable: files that are no Python program (canonical functions only).
        filtered: records that a source was told to leave out.
        too_few_tokens: documents shorter than asked for.
        too_many_tokens: documents longer than asked for.
    """

    not_utf8: int = 0
    null_bytes: int = 0
    empty: int = 0
    too_large: int = 0
    not_json: int = 0
    missing_values: int = 0
    damaged: int = 0
    unsafe: int = 0
    unreadable: int = 0
    unparsable: int = 0
    filtered: int = 0
    too_few_tokens: int = 0
    too_many_tokens: int = 0

    @property
    def total(self) -> int:
        """Number of all that was left out."""
        return sum(asdict(self).values())

    def add(self, other: "SkipCount") -> None:
        """Adds the counts of another record to this one."""
        for reason, count in asdict(other).items():
            setattr(self, reason, getattr(self, reason) + count)

    def accepts(self, text: object, max_bytes: int = MAX_DOCUMENT_BYTES) -> bool:
        """Whether this is a text fit for a corpus; if not, the reason is counted.

        Args:
            text: a string, or whatever stands in its place.
            max_bytes: length of the text in UTF-8 at most.
        """
        reason = _unfitness(text, max_bytes)
        if reason is not None:
            setattr(self, reason, getattr(self, reason) + 1)
        return reason is None

    def __str__(self) -> str:
        reasons = [f"{count} {reason.replace('_', ' ')}" for reason, count in asdict(self).items() if count]
        return ", ".join(reasons) or "none"


def _unfitness(text: object, max_bytes: int) -> str | None:
    if not isinstance(text, str):
        return "missing_values"
    try:
        num_bytes = len(text.encode())
    except UnicodeEncodeError:
        return "not_utf8"
    if num_bytes > max_bytes:
        return "too_large"
    if "\0" in text:
        return "null_bytes"
    return "empty" if not text or text.isspace() else None


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
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError:
        skipped.unreadable += 1
        return None
    return fit_text(content, skipped, MAX_FILE_BYTES)


def fit_text(content: bytes, skipped: SkipCount, max_bytes: int = MAX_DOCUMENT_BYTES) -> str | None:
    """Text of a document's bytes (a byte order mark is dropped), or None if it is unfit.

    Args:
        content: the document, or more than `max_bytes` bytes of it.
        skipped: the reason is counted here if the document is unfit.
        max_bytes: a longer document is unfit.
    """
    if len(content) > max_bytes:
        skipped.too_large += 1
        return None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        skipped.not_utf8 += 1
        return None
    return text if skipped.accepts(text, max_bytes) else None


def split_of(name: str, val_percent: float = VAL_PERCENT, test_percent: float = TEST_PERCENT) -> Split:
    """Split of what has this name, by a stable hash: the same on every machine, whatever else is in the corpus.

    Args:
        name: such as "json/decoder.py", relative to the root of the corpus, with forward slashes.
        val_percent: share of "val", in [0, 100], to a thousandth.
        test_percent: share of "test", likewise; the rest is "train".
    """
    number = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "big")
    percent = number % 100 + number // 100 % 1000 / 1000
    if percent < test_percent:
        return "test"
    return "val" if percent < test_percent + val_percent else "train"


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


def with_progress(total: int, results: Iterable[Result], description: str) -> Iterator[Result]:
    """Passes results on behind a progress bar that shows in a terminal only and leaves no trace.

    Args:
        total: how many results there will be.
        results: what is made, one after the other.
        description: what is being done.
    """
    console = Console(stderr=True)
    bar = track(results, description, total=total, console=console, transient=True, disable=not console.is_terminal)
    yield from bar

"""A grid of cells, measured one by one: finished ones are kept in a file and never measured again."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import distributed

from crocodil.ranks import rank_and_size

Row = dict[str, Any]


class Ledger:
    """JSON lines of finished cells, `{"cell": ..., "row": ...}`, each on disk before the next one begins.

    Under several processes the first one reads and writes, the others are told. A line that a killed run left half
    written is cut off.

    Args:
        folder: created if absent.
        name: stem of the file.
        context: what the rows depend on beside their cells: weights, judge, data, numbers of texts. Another context
            has another file, so that rows of other weights are never reused.
    """

    def __init__(self, folder: str | Path, name: str, context: dict[str, Any]) -> None:
        digest = blake2b(json.dumps(context, sort_keys=True).encode(), digest_size=6).hexdigest()
        self.path = Path(folder) / f"{name}-{digest}.jsonl"
        self.is_first = rank_and_size()[0] == 0
        if self.is_first:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._cut_unfinished_line()
        self.rows: dict[str, Row] = dict(_from_first(self._read() if self.is_first else None))

    def _cut_unfinished_line(self) -> None:
        if self.path.is_file():
            content = self.path.read_bytes()
            if content and not content.endswith(b"\n"):
                with self.path.open("rb+") as file:
                    file.truncate(content.rfind(b"\n") + 1)

    def _read(self) -> list[tuple[str, Row]]:
        if not self.path.is_file():
            return []
        lines = [json.loads(line) for line in self.path.read_text().splitlines()]
        return [(json.dumps(line["cell"]), line["row"]) for line in lines]

    def row(self, cell: Any, measure: Callable[[], Row]) -> Row:
        """The row of a cell, measured if it is not there yet.

        Args:
            cell: a dataclass of plain values.
            measure: makes the row; all processes call it together, and the first one's row is kept.
        """
        settings = {"kind": type(cell).__name__, **asdict(cell)}
        key = json.dumps(settings)
        if key not in self.rows:
            row = _from_first(measure())
            if self.is_first:
                with self.path.open("a") as file:
                    file.write(json.dumps({"cell": settings, "row": row}) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
            self.rows[key] = row
        return self.rows[key]


def _from_first(value: Any) -> Any:
    """What the first process has, in all of them."""
    if rank_and_size()[1] == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def share_of(num_items: int) -> range:
    """Which of some items this process works on: a run of them, as even as can be, none twice and none left out.

    Raises:
        ValueError: if there are fewer items than processes.
    """
    rank, size = rank_and_size()
    if num_items < size:
        raise ValueError(f"expected at least one text for each of the {size} processes, got {num_items}")
    return range(rank * num_items // size, (rank + 1) * num_items // size)


def with_bar(cells: Sequence[Any], description: str) -> Iterator[Any]:
    """The cells one by one, behind a progress bar on standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=rank_and_size()[0] > 0,
    ) as bars:
        yield from bars.track(cells, description=description)


def array_fingerprint(array: np.ndarray) -> str:
    """Hash of the content of an array."""
    return blake2b(np.ascontiguousarray(array).tobytes(), digest_size=8).hexdigest()


def fingerprint(folder: str | Path) -> str:
    """Hash of the content of all files of a folder, such as a pipeline."""
    digest = blake2b(digest_size=8)
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()

"""Documents from files of many formats, hostile ones included: what is unfit is counted and passed over."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

from crocodil.data.archives import read_tar, read_zip, shown
from crocodil.data.corpora import MAX_DOCUMENT_BYTES, SkipCount, SourceFile
from crocodil.data.json_lines import is_object, read_json_lines, read_values, values_of_file
from crocodil.data.parquet import read_parquet, row_group_ranges
from crocodil.data.records import Record, Wanted, damage_counted
from crocodil.data.streams import STREAM_ERRORS, decompressed, format_of

SHARD_BYTES = 2**26
BUFFER_BYTES = 2**18  # of the file: long lines are read three times as fast as with Python's own choice
JSON_LINES = frozenset({".jsonl", ".ndjson"})
ZIPS = frozenset({".zip", ".whl"})


@dataclass(frozen=True)
class Shard:
    """A part of a corpus that one process reads from its beginning to its end.

    Args:
        path: of the file on this machine.
        name: of the file; see `SourceFile`.
        start: first row group (parquet) or byte (JSON lines: lines that begin in the range belong to it).
        stop: end of the range; start and stop are 0 for a whole file.
        num_bytes: of the part, as the file has them, compressed or not; 0 if they cannot be told.
    """

    path: Path
    name: str
    start: int
    stop: int
    num_bytes: int


def list_shards(files: Sequence[SourceFile], shard_bytes: int = SHARD_BYTES) -> list[Shard]:
    """Shards of files, in their order: large parquet files and large uncompressed JSON lines in parts.

    No file is refused here: what cannot be read is one shard, and counted when that is read.

    Args:
        files: in a fixed order.
        shard_bytes: size of a part, about, at least 1.

    Raises:
        ValueError: if `shard_bytes` is less.
    """
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes must be at least 1, got {shard_bytes}.")
    return [shard for file in files for shard in _shards_of(file, shard_bytes)]


def _shards_of(file: SourceFile, shard_bytes: int) -> list[Shard]:
    try:
        num_bytes = file.path.stat().st_size
        ranges = _ranges(file, num_bytes, shard_bytes) if num_bytes > shard_bytes and _is_within(file) else []
    except OSError:
        num_bytes, ranges = 0, []
    return [Shard(file.path, file.name, *part) for part in ranges or [(0, 0, num_bytes)]]


def _ranges(file: SourceFile, num_bytes: int, shard_bytes: int) -> list[tuple[int, int, int]]:
    kind, compression = format_of(file.name)
    if compression or not file.path.is_file():
        return []
    if kind == ".parquet":
        return row_group_ranges(file.path, shard_bytes)
    if kind in JSON_LINES or (kind == ".json" and _begins_with_object(file.path)):
        bounds = [*range(0, num_bytes, shard_bytes), num_bytes]
        return [(start, stop, stop - start) for start, stop in pairwise(bounds)]
    return []


def _begins_with_object(path: Path) -> bool:
    with path.open("rb") as file:
        return is_object(file.readline(MAX_DOCUMENT_BYTES))


def records_of(
    files: Sequence[SourceFile], text_column: str, columns: Sequence[str], skipped: SkipCount
) -> Iterator[Record]:
    """All records of files, in order; see `read_shard`.

    Args:
        files: in a fixed order.
        text_column: see `read_shard`.
        columns: see `read_shard`.
        skipped: see `read_shard`.
    """
    for shard in list_shards(files):
        for _, record in read_shard(shard, text_column, columns, skipped):
            yield record


def read_shard(
    shard: Shard,
    text_column: str,
    columns: Sequence[str],
    skipped: SkipCount,
    start: int = 0,
    max_document_bytes: int = MAX_DOCUMENT_BYTES,
) -> Iterator[tuple[int, Record]]:
    """Records of a shard, with bounded memory.

    The name of the file tells its format: `.parquet`; `.jsonl`, `.ndjson`, `.json`, `.tar`, compressed or not; `.zip`,
    `.whl`;
    everything else is one document of plain text, compressed or not (`.gz`, `.bz2`, `.xz`, `.zst`).

    Args:
        shard: of `list_shards`.
        text_column: where rows of a table have their text.
        columns: further columns that every record must have.
        skipped: what is left out is counted here, in this reading, from `start` on.
        start: index of the first record to read.
        max_document_bytes: bytes of a text, or of a line of JSON lines, at most.

    Yields:
        The index of a record in the shard, unfit ones counted, and the record: "text", "name" (such as
        "json/decoder.py", "part.parquet:17" for row 17, "part.jsonl@5210" for the line that begins at byte 5210 of the
        uncompressed file, "old.tar:json/decoder.py"), "folder" (the first part of the file's name, or of the member's
        if the archive lies in no folder; "" if there is none), and the columns asked for.

    Raises:
        ValueError: if a parquet file lacks a column, a large `.json` file has no lines, or a column is named like what
            records have by themselves.
    """
    wanted = Wanted(text_column, columns, max_document_bytes, skipped)
    name = shown(shard.name)
    for index, place, record in _contents(shard, wanted, start):
        yield index, {**record, "name": name + place, "folder": _first_folder(name) or _first_folder(place[1:])}


def _contents(shard: Shard, wanted: Wanted, start: int) -> Iterator[tuple[int, str, Record]]:
    if not _is_within(shard):
        wanted.skipped.unsafe += 1
        return
    try:
        if shard.path.exists() and not shard.path.is_file():
            raise OSError("to open a pipe would wait for its other end")
        file = shard.path.open("rb", buffering=BUFFER_BYTES)
    except OSError:
        wanted.skipped.unreadable += 1
        return
    kind, compression = format_of(shard.name)
    with file, damage_counted(wanted.skipped, *STREAM_ERRORS):
        if kind == ".parquet" and not compression:
            yield from read_parquet(file, wanted, start, shard.start, shard.stop or None)
        elif kind in ZIPS and not compression:
            yield from read_zip(file, wanted, start)
        elif kind == ".tar":
            yield from read_tar(decompressed(file, compression), wanted, start)
        elif kind == ".json" and not shard.stop:
            yield from _of_json(file, compression, shard, wanted, start)
        elif kind in JSON_LINES or kind == ".json":
            stream = decompressed(file, compression)
            yield from read_json_lines(stream, wanted, start, shard.start, shard.stop or None)
        elif start == 0:
            content = decompressed(file, compression).read(wanted.max_bytes + 1)
            if (record := wanted.of_document(content)) is not None:
                yield 0, "", record


def _of_json(
    file: BinaryIO, compression: str, shard: Shard, wanted: Wanted, start: int
) -> Iterator[tuple[int, str, Record]]:
    """Records of a whole .json file: one array, one object, or lines."""
    values = values_of_file(decompressed(file, compression), str(shard.path))
    if values is not None:
        yield from read_values(values, wanted, start)
        return
    file.seek(0)
    yield from read_json_lines(decompressed(file, compression), wanted, start)


def _is_within(file: SourceFile | Shard) -> bool:
    """Whether a file lies, links followed, in the folder that its name is relative to."""
    depth = min(file.name.count("/"), len(file.path.parents) - 1)
    return Path(os.path.realpath(file.path)).is_relative_to(os.path.realpath(file.path.parents[depth]))


def _first_folder(name: str) -> str:
    return name.split("/", 1)[0] if "/" in name else ""

"""Files to read, and what readers make of them."""

import bz2
import gzip
import lzma
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from crocodil.data.corpora import SkipCount, SourceFile
from crocodil.data.readers import SHARD_BYTES, list_shards, read_shard
from crocodil.data.records import Record

Read = tuple[list[Record], SkipCount]


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


@pytest.fixture(scope="session")
def compress() -> dict[str, Callable[[bytes], bytes]]:
    """Compresses bytes, by the suffix that says how."""
    return {
        "": bytes,
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": partial(lzma.compress, preset=0),
        ".zst": zstd,
    }


@pytest.fixture
def put(tmp_path: Path) -> Callable[[str, bytes], SourceFile]:
    """Writes a file of a corpus."""

    def put(name: str, content: bytes) -> SourceFile:
        path = tmp_path / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return SourceFile(path, name)

    return put


@pytest.fixture(scope="session")
def read() -> Callable[..., Read]:
    """Reads all shards of a file; asserts that indices rise."""

    def read(
        file: SourceFile, columns: tuple[str, ...] = (), shard_bytes: int = SHARD_BYTES, start: int = 0, **options: Any
    ) -> Read:
        skipped, records = SkipCount(), []
        for shard in list_shards([file], shard_bytes):
            before = -1
            for index, record in read_shard(shard, "text", columns, skipped, start, **options):
                assert index > before
                before = index
                records.append(record)
        return records, skipped

    return read

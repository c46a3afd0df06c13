"""Files as streams of bounded memory: decompression, and lines of any length."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import BinaryIO, cast

import pyarrow as pa

COMPRESSIONS = frozenset({".gz", ".bz2", ".xz", ".zst"})
SHORT_FOR = {".tgz": ".tar.gz", ".tbz2": ".tar.bz2", ".txz": ".tar.xz", ".tzst": ".tar.zst"}
STREAM_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""What reading a stream raises where its bytes are damaged or break off."""

CHUNK_BYTES = 2**16
XZ_MEMORY_BYTES = 2**27


def format_of(name: str) -> tuple[str, str]:
    """What a file's name tells: its format, and how it is compressed.

    Args:
        name: any name, in any case.

    Returns:
        Two suffixes in lower case, such as (".jsonl", ".gz") or (".tar", ".gz"); the second, or both, may be "".
    """
    path = PurePosixPath(name.lower())
    path = path.with_suffix(SHORT_FOR.get(path.suffix, path.suffix))
    compression = path.suffix if path.suffix in COMPRESSIONS else ""
    return PurePosixPath(path.name.removesuffix(compression)).suffix, compression


def decompressed(file: BinaryIO, compression: str) -> BinaryIO:
    """The stream of what a file holds; reading it takes a bounded amount of memory.

    Args:
        file: opened for reading.
        compression: as `format_of` tells it.
    """
    if compression == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=file))
    if compression == ".bz2":
        return cast(BinaryIO, bz2.BZ2File(file))
    if compression == ".xz":
        return cast(BinaryIO, io.BufferedReader(XzStream(file), CHUNK_BYTES))
    if compression == ".zst":
        return cast(BinaryIO, io.BufferedReader(pa.CompressedInputStream(file, "zstd"), CHUNK_BYTES))
    return file


class XzStream(io.RawIOBase):
    """What an .xz file holds, like `lzma.LZMAFile`, which sets no limit to the memory that a file may ask for.

    Args:
        file: opened for reading.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decompressor = lzma.LZMADecompressor(memlimit=XZ_MEMORY_BYTES)

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # typeshed: any buffer; a BufferedReader gives a memoryview
        """Fills the buffer as far as one step goes; 0 at the end.

        Raises:
            EOFError: if the file breaks off.
            lzma.LZMAError: if it is damaged, or asks for more than `XZ_MEMORY_BYTES`.
        """
        while True:
            if self._decompressor.eof:
                content = self._decompressor.unused_data.lstrip(b"\0") or self._file.read(CHUNK_BYTES).lstrip(b"\0")
                if not content:
                    return 0
                self._decompressor = lzma.LZMADecompressor(memlimit=XZ_MEMORY_BYTES)
            else:
                content = self._file.read(CHUNK_BYTES) if self._decompressor.needs_input else b""
                if not content and self._decompressor.needs_input:
                    raise EOFError("the file breaks off")
            found = self._decompressor.decompress(content, len(buffer))
            if found:
                buffer[: len(found)] = found
                return len(found)


def bounded_lines(
    file: BinaryIO, max_bytes: int, first: int = 0, stop: int | None = None
) -> Iterator[tuple[int, bytes | None]]:
    r"""Lines that begin in a range of bytes. Only "\n" ends a line.

    Args:
        file: a stream at its beginning; one that can seek if `first` is not 0.
        max_bytes: longer lines are passed over without being held in memory.
        first: the range begins here.
        stop: the range ends before this byte; None for the end of the file.

    Yields:
        Where each line begins, in bytes, and the line with its end, or None in place of one that is too long.
    """
    start = first
    if first:
        file.seek(first - 1)
        start += _pass_line(file, None if stop is None else stop - first + 1) - 1
    while (stop is None or start < stop) and (line := file.readline(max_bytes + 1)):
        if len(line) > max_bytes and not line.endswith(b"\n"):
            length = len(line) + _pass_line(file)
            yield start, None
        else:
            length = len(line)
            yield start, line
        start += length


def _pass_line(file: BinaryIO, max_bytes: int | None = None) -> int:
    """Passes over the rest of a line, or at least `max_bytes` of it; returns how many bytes it took."""
    passed = 0
    while (max_bytes is None or passed < max_bytes) and (part := file.readline(CHUNK_BYTES)):
        passed += len(part)
        if part.endswith(b"\n"):
            break
    return passed

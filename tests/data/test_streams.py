import io
import lzma
import zlib
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crocodil.data.streams import STREAM_ERRORS, bounded_lines, decompressed, format_of

Compress = dict[str, Callable[[bytes], bytes]]
COMPRESSIONS = [".gz", ".bz2", ".xz", ".zst"]
CONTENT = "".join(f"é{number * number}\n" for number in range(30)).encode()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/Part.PARQUET", (".parquet", "")),
        ("a.b.jsonl.GZ", (".jsonl", ".gz")),
        ("a.tar.zst", (".tar", ".zst")),
        ("a.TGZ", (".tar", ".gz")),
        ("gz/README", ("", "")),
        ("a.xz", ("", ".xz")),
        (".jsonl", ("", "")),
    ],
)
def test_a_name_tells_the_format(name: str, expected: tuple[str, str]) -> None:
    assert format_of(name) == expected


@pytest.mark.parametrize("compression", ["", *COMPRESSIONS])
def test_streams_one_behind_the_other_are_one(compression: str, compress: Compress) -> None:
    twice = compress[compression](CONTENT) + compress[compression](CONTENT[:50])
    assert decompressed(io.BytesIO(twice), compression).read() == CONTENT + CONTENT[:50]
    lines = io.BytesIO(CONTENT + CONTENT[:50]).readlines()
    assert [*iter(decompressed(io.BytesIO(twice), compression).readline, b"")] == lines


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_stream_that_breaks_off_anywhere_says_so(compression: str, compress: Compress) -> None:
    whole = compress[compression](CONTENT)
    for stop in range(1, len(whole)):
        with pytest.raises(STREAM_ERRORS):
            decompressed(io.BytesIO(whole[:stop]), compression).read()


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_damaged_stream_says_so(compression: str, compress: Compress) -> None:
    damaged = bytearray(compress[compression](CONTENT))
    place = 0 if compression == ".zst" else len(damaged) // 2  # pyarrow writes no checksums of contents
    damaged[place] ^= 255
    with pytest.raises(STREAM_ERRORS):
        decompressed(io.BytesIO(bytes(damaged)), compression).read()


def test_xz_padding_between_and_behind_streams_is_passed_over() -> None:
    padded = lzma.compress(b"one") + bytes(8) + lzma.compress(b" two") + bytes(4)
    assert decompressed(io.BytesIO(padded), ".xz").read() == b"one two"


def test_an_xz_file_that_asks_for_a_gigabyte_is_refused() -> None:
    asking = bytearray(lzma.compress(CONTENT, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 4096}]))
    end = 12 + 4 * (asking[12] + 1)  # of the header of the first block; its last four bytes are a checksum
    asking[16] = 36  # a dictionary of 2**30 bytes
    asking[end - 4 : end] = zlib.crc32(asking[12 : end - 4]).to_bytes(4, "little")
    assert lzma.decompress(asking) == CONTENT
    with pytest.raises(lzma.LZMAError, match="Memory usage limit"):
        decompressed(io.BytesIO(bytes(asking)), ".xz").read()


@settings(deadline=None)
@given(
    content=st.lists(st.sampled_from([b"\n", b"\r", b"a", b"bcd", "é".encode(), b"\xe2\x80\xa8"])).map(b"".join),
    max_bytes=st.integers(1, 9),
    first=st.integers(0, 40),
    stop=st.none() | st.integers(0, 40),
)
def test_lines_of_a_range_are_those_that_begin_in_it(
    content: bytes, max_bytes: int, first: int, stop: int | None
) -> None:
    ends = [place + 1 for place, byte in enumerate(content) if byte == ord("\n")]
    expected = [
        (start, content[start:end] if len(content[start:end].removesuffix(b"\n")) <= max_bytes else None)
        for start, end in pairwise(dict.fromkeys([0, *ends, len(content)]))
        if first <= start and (stop is None or start < stop)
    ]
    assert list(bounded_lines(io.BytesIO(content), max_bytes, first, stop)) == expected


def test_a_range_within_a_line_does_not_read_the_whole_line() -> None:
    file = io.BytesIO(b"x" * 2**20)
    assert list(bounded_lines(file, 10, 100, 200)) == []
    assert file.tell() < 2**17

import gzip
import io
import os
import stat
import struct
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crocodil.data.archives import is_safe, shown
from crocodil.data.corpora import SkipCount, SourceFile

Put = Callable[[str, bytes], SourceFile]
UNSAFE = ["../../x", "/etc/x", "a/../../x", "C:\\x", "c:x", "\\\\server\\share\\x", "..", "a\\..\\x"]
SAFE = ["x", "a/b.txt", "a\\b.txt", "..a/b", "./x", "…/é"]
LIMIT = 1000


def tar(*members: tuple[str | tarfile.TarInfo, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=format) as archive:
        for member, text in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text))
    return content.getvalue()


def special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def zipped(*members: tuple[str | zipfile.ZipInfo, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as archive:
        for member, text in members:
            archive.writestr(member, text)
    return content.getvalue()


def texts(records: list[dict[str, Any]]) -> list[str]:
    return [record["text"] for record in records]


@pytest.mark.parametrize("name", UNSAFE)
def test_names_that_leave_the_archive_are_unsafe(name: str) -> None:
    assert not is_safe(name)


@pytest.mark.parametrize("name", SAFE)
def test_names_that_stay_in_it_are_safe(name: str) -> None:
    assert is_safe(name)


def test_names_are_shown_as_unicode_with_forward_slashes() -> None:
    assert shown(os.fsdecode(b"a\\b/\xff\xc3\xa9")) == "a/b/?é"


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("compression", ["", ".gz", ".bz2", ".xz", ".zst"])
def test_each_regular_member_of_a_tar_is_a_document(
    compression: str, format: int, compress: dict[str, Callable[[bytes], bytes]], put: Put, read: Callable[..., Any]
) -> None:
    long_name = "package/" * 20 + "é.txt"
    content = tar(
        (special("package", tarfile.DIRTYPE), b""), ("package/a.txt", b"a\r\n"), (long_name, b"b"), format=format
    )
    records, skipped = read(put(f"a.tar{compression}", compress[compression](content)))
    assert records == [
        {"text": "a\r\n", "name": f"a.tar{compression}:package/a.txt", "folder": "package"},
        {"text": "b", "name": f"a.tar{compression}:{long_name}", "folder": "package"},
    ]
    assert skipped == SkipCount()
    [record, _], _ = read(put(f"old/a.tar{compression}", compress[compression](content)))
    assert record["folder"] == "old"


def test_unsafe_members_of_a_tar_are_counted_and_nothing_is_written(
    put: Put, read: Callable[..., Any], tmp_path: Path
) -> None:
    links = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
    members = [(special(f"m{kind!r}", kind, "/etc/passwd"), b"") for kind in links]
    file = put("a.tar", tar(("good.txt", b"good"), *((name, b"evil") for name in UNSAFE), *members, ("last", b"last")))
    before = sorted(tmp_path.rglob("*"))
    records, skipped = read(file)
    assert texts(records) == ["good", "last"]
    assert skipped == SkipCount(unsafe=len(UNSAFE) + len(links))
    assert sorted(tmp_path.rglob("*")) == before


def test_unsafe_members_of_a_zip_are_counted(put: Put, read: Callable[..., Any]) -> None:
    link = zipfile.ZipInfo("link.txt")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    folder = zipfile.ZipInfo("folder/")
    content = zipped(
        (folder, b""), ("good.txt", b"good"), (link, b"/etc/passwd"), *((name, b"evil") for name in UNSAFE)
    )
    records, skipped = read(put("a.zip", content))
    assert records == [{"text": "good", "name": "a.zip:good.txt", "folder": ""}]
    assert skipped == SkipCount(unsafe=1 + len(UNSAFE))


@pytest.mark.parametrize(("name", "pack"), [("a.tar", tar), ("a.zip", zipped), ("a.whl", zipped)])
def test_members_are_checked_like_files(name: str, pack: Any, put: Put, read: Callable[..., Any]) -> None:
    unfit = {"not_utf8": b"\xff", "null_bytes": b"a\0", "empty": b" \n", "too_large": b"x" * (LIMIT + 1)}
    content = pack(("largest", b"x" * LIMIT), *unfit.items(), ("last", b"\xef\xbb\xbflast"))
    records, skipped = read(put(name, content), max_document_bytes=LIMIT)
    assert texts(records) == ["x" * LIMIT, "last"]
    assert skipped == SkipCount(not_utf8=1, null_bytes=1, empty=1, too_large=1)
    records, skipped = read(put(name, content), columns=("license",))
    assert (records, skipped) == ([], SkipCount(missing_values=6))


def test_a_tar_that_breaks_off_keeps_whole_members(put: Put, read: Callable[..., Any]) -> None:
    content = tar(*((f"{number}.txt", f"{number} ".encode() * 400) for number in range(4)))
    whole = texts(read(put("a.tar", content))[0])
    assert len(whole) == 4
    for stop in range(0, 4 * 1536 + 512, 32):  # a header of 512 bytes and a text of 800, filled up to 1024
        records, skipped = read(put("a.tar", content[:stop]))
        assert texts(records) == whole[: (stop + 224) // 1536]
        assert skipped == SkipCount(damaged=1)


def test_a_damaged_header_of_a_tar_is_not_taken_for_its_end(put: Put, read: Callable[..., Any]) -> None:
    content = bytearray(tar(("a", b"a"), ("b", b"b"), ("c", b"c")))
    content[2 * 512 + 3] ^= 1  # behind the header and the text of the first member
    records, skipped = read(put("a.tar", bytes(content)))
    assert texts(records) == ["a"] and skipped == SkipCount(damaged=1)


@pytest.mark.parametrize("kind", ["comment", "GNU name", "sparse map"])
def test_a_header_of_many_megabytes_is_not_read(kind: str, put: Put, read: Callable[..., Any]) -> None:
    large = tarfile.TarInfo("large")
    text = b"large"
    if kind == "comment":
        large.pax_headers = {"comment": "x" * 2**22}
    elif kind == "GNU name":
        large.name = "x" * 2**22
    else:
        large.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
        text = b"400000\n" + b"0\n1\n" * 400_000 + bytes(2**22)
    format = tarfile.GNU_FORMAT if kind == "GNU name" else tarfile.PAX_FORMAT
    records, skipped = read(put("a.tar", tar(("a", b"a"), (large, text), format=format)))
    assert texts(records) == ["a"] and skipped == SkipCount(damaged=1)


def test_a_large_member_between_small_ones_is_passed_over(put: Put, read: Callable[..., Any]) -> None:
    content = tar(("a", b"a"), ("large", bytes(2**23)), ("b", b"b"), ("c", bytes(2**21 + 1)), ("d", b"d"))
    records, skipped = read(put("a.tgz", gzip.compress(content)), max_document_bytes=LIMIT)
    assert texts(records) == ["a", "b", "d"] and skipped == SkipCount(too_large=2)


def test_a_tar_of_many_members_and_a_large_one_takes_little_memory(put: Put, read: Callable[..., Any]) -> None:
    content = tar(*((f"{number}", b"") for number in range(2000)), ("large", bytes(2**23)))
    file = put("a.tar", content)
    tracemalloc.start()
    try:
        _, skipped = read(file, max_document_bytes=LIMIT)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert skipped == SkipCount(empty=2000, too_large=1)
    assert peak < 2**20, peak


def test_a_damaged_member_of_a_zip_costs_itself_alone(put: Put, read: Callable[..., Any]) -> None:
    content = bytearray(zipped(("a", b"aaaa"), ("b", b"bbbb"), ("c", b"cccc"), compression=zipfile.ZIP_STORED))
    content[content.index(b"bbbb")] ^= 1
    records, skipped = read(put("a.zip", bytes(content)))
    assert texts(records) == ["aaaa", "cccc"] and skipped == SkipCount(damaged=1)


def test_a_zip_that_breaks_off_has_no_table_of_contents(put: Put, read: Callable[..., Any]) -> None:
    content = zipped(("a", b"aaaa"), ("b", b"bbbb"))
    for stop in range(len(content)):
        assert read(put("a.zip", content[:stop])) == ([], SkipCount(damaged=1))


def test_a_zip_member_that_holds_more_than_it_says_is_damaged(put: Put, read: Callable[..., Any]) -> None:
    content = zipped(("bomb", bytes(2**22)), ("b", b"b"))
    size, lie = struct.pack("<I", 2**22), struct.pack("<I", 10)
    records, skipped = read(put("a.zip", content.replace(size, lie)), max_document_bytes=LIMIT)
    assert texts(records) == ["b"] and skipped == SkipCount(damaged=1)


def test_encrypted_and_oddly_compressed_members_are_unreadable(put: Put, read: Callable[..., Any]) -> None:
    content = zipped(("a", b"a"))
    directory = content.index(b"PK\1\2")
    encrypted = content[: directory + 8] + b"\1" + content[directory + 9 :]
    assert read(put("a.zip", encrypted)) == ([], SkipCount(unreadable=1))
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):  # zipfile unpacks them in steps without a limit
        assert read(put("a.zip", zipped(("a", bytes(900)), compression=method))) == ([], SkipCount(unreadable=1))


def test_a_member_without_a_name_is_a_document_like_others(put: Put, read: Callable[..., Any]) -> None:
    content = zipped(("nameless", b"a"), ("b", b"b")).replace(b"nameless", bytes(8))
    records, skipped = read(put("a.zip", content))
    assert texts(records) == ["a", "b"] and skipped == SkipCount()

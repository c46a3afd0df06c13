import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crocodil.data.corpora import SkipCount, SourceFile, folder_files
from crocodil.data.readers import list_shards, read_shard, records_of

Put = Callable[[str, bytes], SourceFile]
TEXTS = ["a\r\nb", None, "é", " ", "c\0", "d", "e", None]
FIT = [(index, text) for index, text in enumerate(TEXTS) if text is not None and text.strip() and "\0" not in text]
COUNTS = SkipCount(missing_values=2, empty=1, null_bytes=1)


def as_lines() -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def as_array() -> bytes:
    return json.dumps([{"text": text} for text in TEXTS], indent=1).encode()


def as_parquet() -> bytes:
    content = io.BytesIO()
    pq.write_table(pa.table({"text": TEXTS}), content, row_group_size=3)
    return content.getvalue()


def as_tar() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for number, text in enumerate(TEXTS):
            info = tarfile.TarInfo(f"d/{number}.txt")
            info.type = tarfile.SYMTYPE if text is None else tarfile.REGTYPE
            info.size = len((text or "").encode())
            archive.addfile(info, io.BytesIO((text or "").encode()))
    return content.getvalue()


def as_zip() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, text in enumerate(TEXTS):
            archive.writestr(f"../{number}" if text is None else f"d/{number}", text or "")
    return content.getvalue()


MANY = {".jsonl": as_lines, ".json": as_array, ".tar": as_tar}
FILES = [(f"a{kind}{how}", make, how) for kind, make in MANY.items() for how in ("", ".gz", ".bz2", ".xz", ".zst")]
FILES += [("a.ndjson", as_lines, ""), ("a.json", as_lines, ""), ("a.Parquet", as_parquet, ""), ("a.ZIP", as_zip, "")]


@pytest.mark.parametrize(("name", "make", "how"), FILES)
def test_resuming_anywhere_gives_exactly_the_rest(
    name: str, make: Callable[[], bytes], how: str, compress: dict[str, Callable[[bytes], bytes]], put: Put
) -> None:
    file = put(f"folder/{name}", compress[how](make()))
    expected = COUNTS if ".tar" not in name and name != "a.ZIP" else SkipCount(unsafe=2, empty=1, null_bytes=1)
    [shard] = list_shards([file])
    records = list(read_shard(shard, "text", [], SkipCount()))
    assert [(index, record["text"]) for index, record in records] == FIT
    assert {record["folder"] for _, record in records} == {"folder"}
    assert len({record["name"] for _, record in records}) == len(FIT)
    for start in range(len(TEXTS) + 1):
        skipped = SkipCount()
        before = list(stopped_at(start, read_shard(shard, "text", [], skipped)))
        behind = list(read_shard(shard, "text", [], skipped, start=before[-1][0] + 1 if before else 0))
        assert before + behind == records
        assert skipped == expected
        assert list(read_shard(shard, "text", [], SkipCount(), start=start)) == [r for r in records if r[0] >= start]


def stopped_at(index: int, records: Any) -> Any:
    """Records before an index, of an iterator that is asked for no more than those."""
    for _ in range(sum(place < index for place, _ in FIT)):
        yield next(records)


@pytest.mark.parametrize("how", ["", ".gz", ".bz2", ".xz", ".zst"])
def test_any_other_file_is_one_document(
    how: str, compress: dict[str, Callable[[bytes], bytes]], put: Put, read: Callable[..., Any]
) -> None:
    file = put(f"a/b.c.py{how}", compress[how](b"\xef\xbb\xbfx\r\n"))
    assert read(file) == ([{"text": "x\r\n", "name": f"a/b.c.py{how}", "folder": "a"}], SkipCount())
    assert read(file, start=1) == ([], SkipCount())
    assert read(file, max_document_bytes=6)[1] == SkipCount()
    assert read(file, max_document_bytes=5) == ([], SkipCount(too_large=1))
    assert read(put(f"b{how}", compress[how](b"")))[1] == SkipCount(empty=1)
    assert read(put(f"b{how}", compress[how](b"\xff")))[1] == SkipCount(not_utf8=1)
    assert read(file, ("license",)) == ([], SkipCount(missing_values=1))


@pytest.mark.parametrize("how", [".gz", ".bz2", ".xz", ".zst"])
def test_of_a_stream_that_breaks_off_whole_lines_are_kept(
    how: str, compress: dict[str, Callable[[bytes], bytes]], put: Put, read: Callable[..., Any]
) -> None:
    lines = "".join(json.dumps({"text": os.urandom(3000).hex()}) + "\n" for _ in range(250)).encode()
    whole, _ = read(put("a.jsonl", lines))
    content = compress[how](lines)
    for share in (0.3, 0.9):
        records, skipped = read(put(f"a.jsonl{how}", content[: int(share * len(content))]))
        assert [record["text"] for record in records] == [record["text"] for record in whole[: len(records)]]
        assert len(records) > 0 if how != ".bz2" or share > 0.5 else len(records) == 0  # its blocks hold 900 kB
        assert skipped == SkipCount(damaged=1)
        assert read(put(f"a.txt{how}", content[: int(share * len(content))])) == ([], SkipCount(damaged=1))


def test_shards_follow_the_files_and_travel_between_processes(put: Put) -> None:
    files = [put("b.jsonl", as_lines() * 20), put("a.txt", b"a" * 5000), put("c.jsonl.gz", gzip.compress(as_lines()))]
    shards = list_shards(files, shard_bytes=1000)
    assert [shard.name for shard in shards] == ["b.jsonl"] * (len(shards) - 2) + ["a.txt", "c.jsonl.gz"]
    assert shards == list_shards(files, shard_bytes=1000) == pickle.loads(pickle.dumps(shards))
    assert len(set(shards)) == len(shards) == -(-files[0].path.stat().st_size // 1000) + 2
    skipped = SkipCount()
    texts = [record["text"] for record in records_of(files, "text", [], skipped)]
    assert texts == [text for _, text in FIT] * 20 + ["a" * 5000] + [text for _, text in FIT]
    assert skipped.missing_values == 42


def test_only_plain_lines_are_divided_by_bytes(put: Put, read: Callable[..., Any]) -> None:
    array = json.dumps([{"text": "x"}] * 9).encode()
    whole = {"a.json": array, "a.jsonl.gz": gzip.compress(as_lines()), "a.txt": b"x" * 99, "a.tar": as_tar()}
    for name, content in whole.items():
        file = put(name, content)
        assert len(list_shards([file], 20)) == 1
        assert read(file, shard_bytes=20) == read(file)
    for name in ("b.json", "b.jsonl", "b.NDJSON"):
        file = put(name, as_lines())
        assert len(list_shards([file], 20)) > 1
        assert read(file, shard_bytes=20) == read(file)


def test_shards_have_at_least_a_byte() -> None:
    with pytest.raises(ValueError, match="shard_bytes must be at least 1, got 0"):
        list_shards([], 0)


def test_links_out_of_the_folder_are_not_followed(put: Put, tmp_path: Path, read: Callable[..., Any]) -> None:
    put("a/inside.txt", b"inside")
    root = tmp_path / "corpus"
    (tmp_path / "secret.jsonl").write_text('{"text": "secret"}\n' * 99)
    (tmp_path / "corpus too").mkdir()
    (tmp_path / "corpus too" / "x.txt").write_text("secret")
    links = {"a/out.jsonl": "../../secret.jsonl", "out.txt": "../corpus too/x.txt", "dir": "../corpus too"}
    for name, target in ({"a/in.txt": "inside.txt", "in": "a"} | links).items():
        (root / name).symlink_to(target)
    (tmp_path / "link to corpus").symlink_to("corpus")
    names = ["a/in.txt", "a/inside.txt", "in/inside.txt", "a/out.jsonl", "out.txt", "dir/x.txt"]
    for start in (root, tmp_path / "link to corpus"):
        skipped = SkipCount()
        files = [SourceFile(start / name, name) for name in names]
        texts = [
            record["text"] for shard in list_shards(files, 10) for _, record in read_shard(shard, "text", [], skipped)
        ]
        assert texts == ["inside"] * 3 and skipped == SkipCount(unsafe=3)


def test_files_that_cannot_be_opened_are_counted(put: Put, tmp_path: Path) -> None:
    files = [put(f"vanished{kind}", b"x" * 100) for kind in (".txt", ".jsonl", ".parquet", ".zip", ".tar.gz", ".json")]
    listed_before = list_shards(files)
    for file in files:
        file.path.unlink()
    root = tmp_path / "corpus"
    (root / "loop.txt").symlink_to("loop.txt")
    (root / "folder.jsonl").mkdir()
    os.mkfifo(root / "pipe.json")
    others = [SourceFile(root / name, name) for name in ("loop.txt", "folder.jsonl", "pipe.json")]
    skipped = SkipCount()
    shards = [*listed_before, *list_shards([*files, *others], 1)]
    assert list(chain.from_iterable(map(read_shard, shards, repeat("text"), repeat([]), repeat(skipped)))) == []
    assert skipped == SkipCount(unreadable=len(shards)) and len(shards) == 15


def test_files_without_permission_are_counted(put: Put, read: Callable[..., Any]) -> None:
    file = put("a.jsonl", as_lines())
    file.path.chmod(0)
    user = os.geteuid()
    if user == 0:  # who may read everything
        os.seteuid(65534)
    try:
        assert read(file, shard_bytes=1) == ([], SkipCount(unreadable=1))
    finally:
        os.seteuid(user)


def test_a_name_that_is_no_unicode_is_shown_all_the_same(tmp_path: Path) -> None:
    os.makedirs(os.path.join(os.fsencode(tmp_path), b"caf\xe9"))
    with open(os.path.join(os.fsencode(tmp_path), b"caf\xe9", b"\xe9.txt"), "wb") as file:
        file.write(b"text")
    [record] = records_of(folder_files(tmp_path, "**/*"), "text", [], SkipCount())
    assert record == {"text": "text", "name": "caf?/?.txt", "folder": "caf?"}


def test_columns_that_every_record_has_cannot_be_asked_for(put: Put) -> None:
    [shard] = list_shards([put("a.jsonl", as_lines())])
    for name in ("text", "name", "folder"):
        with pytest.raises(ValueError, match=f"columns must not be named folder, name, text, .* got '{name}'"):
            list(read_shard(shard, "content", ["license", name], SkipCount()))


MEASURE = """
import sys
from pathlib import Path
from crocodil.data.corpora import SkipCount, SourceFile
from crocodil.data.readers import records_of

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024

skipped, before = SkipCount(), peak()
files = [SourceFile(Path(path), Path(path).name) for path in sys.argv[1:]]
texts = [record["text"] for record in records_of(files, "text", [], skipped)]
print(texts, skipped, sep="; ")
print(peak() - before)
"""


def read_elsewhere(*paths: Path) -> tuple[str, int]:
    """What another process reads and leaves out, and by how many MiB its memory grew."""
    told = subprocess.run([sys.executable, "-c", MEASURE, *map(str, paths)], check=True, capture_output=True, text=True)
    read, growth = told.stdout.splitlines()
    return read, int(growth)


@pytest.mark.parametrize("num_bytes", [2**28, pytest.param(2**30, marks=pytest.mark.slow)])
def test_a_huge_line_and_a_huge_text_are_passed_over_in_little_memory(num_bytes: int, tmp_path: Path) -> None:
    lines, text = tmp_path / "a.jsonl", tmp_path / "b.txt"
    for path, end in ((lines, b'"}\n{"text": "behind"}\n'), (text, b"")):
        with path.open("wb") as file:
            file.write(b'{"text": "before"}\n{"text": "')
            file.seek(num_bytes)  # a hole, which takes no room on the disk
            file.write(end or b"x")
    read, growth = read_elsewhere(lines, text)
    lines.unlink()
    assert read == "['before', 'behind']; 2 too large"
    assert growth < 100


@pytest.mark.slow
def test_bombs_are_passed_over_in_little_memory(tmp_path: Path, compress: dict[str, Callable[[bytes], bytes]]) -> None:
    bombs = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": compress[".zst"]}
    paths, zeros = [], bytes(2**26)
    for how, pack in bombs.items():
        before, line, behind = map(pack, (b'{"text": "before"}\n', zeros, b'\n{"text": "behind"}\n'))
        paths.append(tmp_path / f"lines.jsonl{how}")
        paths[-1].write_bytes(before + line * 16 + behind)
        paths.append(tmp_path / f"text{how}")
        paths[-1].write_bytes(line * 16)
        info = tarfile.TarInfo("large")
        info.size = 2**30
        small = as_tar()
        paths.append(tmp_path / f"members.tar{how}")
        paths[-1].write_bytes(pack(info.tobuf()) + line * 16 + pack(small))
    paths.append(tmp_path / "a.zip")
    with zipfile.ZipFile(paths[-1], "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("large", "w") as member:
            for _ in range(16):
                member.write(zeros)
        archive.writestr("small", "behind")
    honest = paths[-1].read_bytes()
    paths.append(tmp_path / "b.zip")
    paths[-1].write_bytes(honest.replace((2**30).to_bytes(4, "little"), (9).to_bytes(4, "little")))
    read, growth = read_elsewhere(*paths)
    assert read.count("'before', 'behind'") == 4 and read.count("'d', 'e'") == 4 and read.count("'behind']") == 1
    assert read.endswith("; 4 null bytes, 4 empty, 13 too large, 1 damaged, 8 unsafe")
    assert growth < 200


@pytest.mark.slow
def test_a_row_group_of_a_gigabyte_is_read_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = pa.table({"text": [" " * 2**16] * 2**10})
    with pq.ParquetWriter(path, rows.schema, use_dictionary=False, compression="zstd") as writer:
        writer.write_table(pa.concat_tables([rows] * 16), row_group_size=2**20)
    assert pq.read_metadata(path).num_row_groups == 1
    read, growth = read_elsewhere(path)
    assert read == "[]; 16384 empty"
    assert growth < 200

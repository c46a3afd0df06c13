import io
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crocodil.data.corpora import SkipCount, SourceFile
from crocodil.data.readers import list_shards, read_shard

Put = Callable[[str, bytes], SourceFile]
GROUP = 30
ROWS = [
    {"text": f"text é {number} " * 9, "stars": number, "license": ["mit", None], "more": {"x": 1}}
    for number in range(4 * GROUP)
]


def table(rows: list[dict[str, Any]] | pa.Table = ROWS, **options: Any) -> bytes:
    content = io.BytesIO()
    whole = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows)
    pq.write_table(whole, content, row_group_size=GROUP, **options)
    return content.getvalue()


def without_pages_of_first_group(content: bytes) -> bytes:
    place = pq.ParquetFile(io.BytesIO(content)).metadata.row_group(0).column(0).data_page_offset
    return content[: place + 2] + b"\xff" * 60 + content[place + 62 :]


@pytest.mark.parametrize("options", [{}, {"compression": "zstd", "use_dictionary": False, "data_page_version": "2.0"}])
@pytest.mark.parametrize("shard_bytes", [1, 700, 2**20])
def test_rows_come_in_order_in_shards_of_row_groups(
    shard_bytes: int, options: dict[str, Any], put: Put, read: Callable[..., Any]
) -> None:
    file = put("a/b.parquet", table(**options))
    shards = list_shards([file], shard_bytes)
    assert [shard.start for shard in shards][1:] == [shard.stop for shard in shards][:-1]
    assert sum(shard.num_bytes for shard in shards) == pytest.approx(file.path.stat().st_size, abs=len(shards))
    assert len(shards) == 4 if shard_bytes == 1 else len(shards) <= 4
    records, skipped = read(file, ("stars", "license"), shard_bytes)
    assert records == [
        {
            "text": row["text"],
            "name": f"a/b.parquet:{number}",
            "folder": "a",
            "stars": number,
            "license": ["mit", None],
        }
        for number, row in enumerate(ROWS)
    ]
    assert skipped == SkipCount()


def test_resuming_reads_no_row_group_before(put: Put) -> None:
    content = table()
    whole, damaged = put("a.parquet", content), put("b.parquet", without_pages_of_first_group(content))
    expected = [text for _, text in texts(whole, GROUP, SkipCount())]
    skipped = SkipCount()
    assert [text for _, text in texts(damaged, GROUP, skipped)] == expected and len(expected) == 3 * GROUP
    assert skipped == SkipCount()


def texts(file: SourceFile, start: int, skipped: SkipCount) -> list[tuple[int, str]]:
    [shard] = list_shards([file])
    return [(index, record["text"]) for index, record in read_shard(shard, "text", [], skipped, start)]


def test_a_damaged_row_group_costs_itself_alone(put: Put) -> None:
    skipped = SkipCount()
    found = texts(put("a.parquet", without_pages_of_first_group(table())), 0, skipped)
    assert found == [(number, row["text"]) for number, row in enumerate(ROWS)][GROUP:]
    assert skipped == SkipCount(damaged=1)


def test_a_flipped_bit_is_seen_where_the_file_has_checksums(put: Put) -> None:
    content = bytearray(table(compression="none", use_dictionary=False, write_page_checksum=True))
    content[content.index(b"text \xc3\xa9 3 ")] = ord("T")
    skipped = SkipCount()
    assert len(texts(put("a.parquet", bytes(content)), 0, skipped)) == 3 * GROUP
    assert skipped == SkipCount(damaged=1)


def test_half_written_files_are_counted(put: Put, read: Callable[..., Any]) -> None:
    content = table()
    for stop in [*range(0, len(content), 97), len(content) - 1]:
        assert read(put("a.parquet", content[:stop]), shard_bytes=50) == ([], SkipCount(damaged=1))


def test_a_file_that_is_replaced_by_a_shorter_one_is_counted(put: Put) -> None:
    shards = list_shards([put("a.parquet", table())], 1)
    put("a.parquet", table(ROWS[:GROUP]))
    skipped = SkipCount()
    assert [len(list(read_shard(shard, "text", [], skipped))) for shard in shards] == [GROUP, 0, 0, 0]
    assert skipped == SkipCount(damaged=3)


def test_unfit_rows_are_counted(put: Put, read: Callable[..., Any]) -> None:
    texts = pa.array([b"a", b"\xff", None, b"b\0", b" ", b"x" * 99, b"\xef\xbb\xbfc", b"d"])
    licenses = pa.array([b"mit", b"mit", b"mit", b"mit", b"mit", b"mit", b"mit", b"\xff"])
    strings = {"text": texts.view(pa.string()), "license": licenses.view(pa.string())}
    records, skipped = read(put("a.parquet", table(pa.table(strings))), ("license",), max_document_bytes=98)
    assert [(record["text"], record["name"]) for record in records] == [("a", "a.parquet:0"), ("c", "a.parquet:6")]
    assert skipped == SkipCount(not_utf8=2, missing_values=1, null_bytes=1, empty=1, too_large=1)


STRINGS = [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.dictionary(pa.int8(), pa.string())]


@pytest.mark.parametrize("kind", STRINGS)
def test_every_kind_of_string_is_text(kind: pa.DataType, put: Put, read: Callable[..., Any]) -> None:
    strings = pa.array(["é", None, "a"]).cast(kind)
    records, skipped = read(put("a.parquet", table(pa.table({"text": strings, "license": strings}))), ("license",))
    assert [(record["text"], record["license"]) for record in records] == [("é", "é"), ("a", "a")]
    assert skipped == SkipCount(missing_values=1)


@pytest.mark.parametrize("in_a", ["list", "dictionary"])
def test_one_bad_string_costs_one_row(in_a: str, put: Put, read: Callable[..., Any]) -> None:
    strings = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    tags = strings.dictionary_encode() if in_a == "dictionary" else pa.ListArray.from_arrays([0, 1, 2, 3], strings)
    records, skipped = read(put("a.parquet", table(pa.table({"text": ["a", "b", "c"], "tags": tags}))), ("tags",))
    assert [record["text"] for record in records] == ["a", "c"] and skipped == SkipCount(not_utf8=1)


def test_resuming_within_a_large_row_group_gives_the_rest(put: Put) -> None:
    content = io.BytesIO()
    pq.write_table(pa.table({"text": [str(number) for number in range(3000)]}), content)
    file = put("a.parquet", content.getvalue())
    for start in (1, 1023, 1024, 1500, 2999, 3000):
        assert texts(file, start, SkipCount()) == [(number, str(number)) for number in range(start, 3000)]


@pytest.mark.parametrize("kind", [pa.list_(pa.string()), pa.large_list(pa.large_string()), pa.list_(pa.int8())])
def test_lists_of_plain_values_are_plain(kind: pa.DataType, put: Put, read: Callable[..., Any]) -> None:
    value = [1, 2] if kind == pa.list_(pa.int8()) else ["é", None]
    rows = pa.table({"text": ["a", "b"], "tags": pa.array([value, None], kind)})
    records, _ = read(put("a.parquet", table(rows)), ("tags",))
    assert [record["tags"] for record in records] == [value, None]


def test_a_column_that_a_file_lacks_is_the_users_mistake(put: Put) -> None:
    [shard] = list_shards([put("a.parquet", table())])
    message = r"a\.parquet must have one column 'content', got text, stars, license, more: name another"
    with pytest.raises(ValueError, match=message):
        list(read_shard(shard, "content", [], SkipCount()))
    with pytest.raises(ValueError, match=message):
        list(read_shard(shard, "text", ["stars", "content"], SkipCount()))
    with pytest.raises(ValueError, match=r"'stars' of .* must hold text, got int64"):
        list(read_shard(shard, "stars", [], SkipCount()))
    with pytest.raises(ValueError, match=r"'more' of .* must hold strings, numbers or lists of them, got struct"):
        list(read_shard(shard, "text", ["more"], SkipCount()))


def test_a_name_that_two_columns_have_is_refused(put: Put) -> None:
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    [shard] = list_shards([put("a.parquet", table(twice))])
    with pytest.raises(ValueError, match="must have one column 'text', got text, text"):
        list(read_shard(shard, "text", [], SkipCount()))


def test_a_file_without_rows_has_no_records(put: Put, read: Callable[..., Any]) -> None:
    empty = table(pa.table({"text": pa.array([], pa.string())}))
    assert read(put("a.parquet", empty), shard_bytes=1) == ([], SkipCount())

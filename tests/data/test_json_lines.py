import json
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from crocodil.data import json_lines
from crocodil.data.corpora import SkipCount, SourceFile
from crocodil.data.readers import list_shards, read_shard

Put = Callable[[str, bytes], SourceFile]
DEEP = b"[" * 100_000
HOSTILE_LINES = {
    b'{"text": "\xff"}': "not_utf8",
    rb'{"text": "\ud800"}': "not_utf8",
    b'{"text": "a\0b"}': "null_bytes",
    rb'{"text": "a\u0000b"}': "null_bytes",
    b'{"text": ""}': "empty",
    rb'{"text": " \n\u3000"}': "empty",
    b"": "empty",
    b" \r": "empty",
    b'{"text": "cut': "not_json",
    b"plain words": "not_json",
    b'["text"]': "not_json",
    b"17": "not_json",
    b'{"text": ' + b"1" * 5000 + b"}": "not_json",
    DEEP: "not_json",
    b'{"text": ' + DEEP: "not_json",
    b'{"content": "a"}': "missing_values",
    b'{"text": null}': "missing_values",
    b'{"text": ["a"]}': "missing_values",
    b'{"text": "' + b"x" * 150_000 + b'"}': "too_large",
}


@pytest.mark.parametrize("line", HOSTILE_LINES, ids=lambda line: repr(line[:20]))
def test_an_unfit_line_costs_itself_alone(line: bytes, put: Put, read: Callable[..., Any]) -> None:
    file = put("a.jsonl", b'{"text": "before"}\n' + line + b'\n{"text": "behind"}\n')
    records, skipped = read(file, max_document_bytes=120_000)
    names = {record["text"]: record["name"] for record in records}
    assert names == {"before": "a.jsonl@0", "behind": f"a.jsonl@{20 + len(line)}"}
    assert skipped == SkipCount(**{HOSTILE_LINES[line]: 1})


def test_a_text_comes_as_it_is(put: Put, read: Callable[..., Any]) -> None:
    texts = ["a\r\nb", "\u2028\x85\x0bé", "𝄞", " c \t"]
    lines = [json.dumps({"text": text}, ensure_ascii=ascii).encode() for text in texts for ascii in (True, False)]
    file = put("a/b/c.ndjson", b"\xef\xbb\xbf" + b"\r\n".join(lines))
    records, skipped = read(file)
    assert [record["text"] for record in records] == [text for text in texts for _ in range(2)]
    assert {record["folder"] for record in records} == {"a"}
    assert skipped == SkipCount()


def test_a_byte_order_mark_within_a_text_is_dropped(put: Put, read: Callable[..., Any]) -> None:
    records, _ = read(put("a.jsonl", '{"text": "\ufeffa\ufeff"}'.encode()))
    assert records[0]["text"] == "a\ufeff"


def test_columns_come_with_the_text(put: Put, read: Callable[..., Any]) -> None:
    rows: list[dict[str, Any]] = [
        {"text": "a", "stars": 3, "license": ["mit", "bsd"], "more": {"x": 1}},
        {"text": "b", "stars": None, "license": "é"},
        {"text": "c", "stars": 1},
        {"text": "d", "stars": 1, "license": {"id": "mit"}},
        {"text": "e", "stars": 1, "license": [["mit"]]},
        {"text": "f", "stars": 1, "license": "\ud800"},
        {"text": "g", "stars": 1, "license": ["é\ud800"]},
    ]
    file = put("a.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    records, skipped = read(file, ("stars", "license"))
    assert records == [
        {"text": "a", "stars": 3, "license": ["mit", "bsd"], "name": "a.jsonl@0", "folder": ""},
        {"text": "b", "stars": None, "license": "é", "name": records[1]["name"], "folder": ""},
    ]
    assert skipped == SkipCount(missing_values=5)


ROWS: dict[str, tuple[bytes, list[str]]] = {
    "array": (b' [{"text": "a"},\n {"text": "b"}, 3, {"text": 4}]', ["a.json:0", "a.json:1"]),
    "array, byte order mark": (b'\xef\xbb\xbf[\n{"text": "a"}, {"text": "b"}, {}, 1]', ["a.json:0", "a.json:1"]),
    "object": (b'{\n"text":\n"a"}', ["a.json:0"]),
    "object in one line": (b'{"text": "a"}', ["a.json@0"]),
    "lines": (b'{"text": "a"}\n{"text": "b"}\n{}\n3\n', ["a.json@0", "a.json@14"]),
    "lines, the first one bad": (b'"x" 3\n{"text": "a"}\n{"text": "b"}\n{}', ["a.json@6", "a.json@20"]),
}


@pytest.mark.parametrize("layout", ROWS)
def test_a_json_file_is_an_array_an_object_or_lines(layout: str, put: Put, read: Callable[..., Any]) -> None:
    content, names = ROWS[layout]
    records, skipped = read(put("a.json", content))
    assert [record["name"] for record in records] == names
    assert [record["text"] for record in records] == ["a", "b"][: len(names)]
    assert skipped.total == (0 if "object" in layout else 2)


@pytest.mark.parametrize("content", [b'[\n{"text": "%s"}]', b'[{"text": "%s"}]', b'{\n"text": "%s"}'])
def test_one_large_value_is_refused(
    content: bytes, put: Put, read: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_lines, "MAX_ARRAY_BYTES", 1000)
    read(put("a.json", content % (b"x" * 900)))
    with pytest.raises(ValueError, match=r"a\.json must have one JSON object a line, got one array or object of more"):
        read(put("a.json", content % (b"x" * 1000)))


def test_large_files_of_lines_are_never_refused(
    put: Put, read: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_lines, "MAX_ARRAY_BYTES", 100)
    for first in (b'{"text": "a"}', b"garbage", b'{"text": "cut', b'{"text": "' + b"a" * 200 + b'"}'):
        records, skipped = read(put("a.json", first + b'\n{"text": "b"}' * 50))
        assert len(records) + skipped.total == 51


line_of_text = st.text(max_size=6).map(lambda text: json.dumps({"text": text + "x"}, ensure_ascii=False).encode())
lines = st.lists(line_of_text | st.sampled_from([b"", b"\r", b"{", "é".encode()]), max_size=12)


@settings(deadline=None)
@given(lines=lines, shard_bytes=st.integers(1, 200), ends=st.booleans())
@example(lines=[b'{"text": "' + b"x" * 300_000 + b'"}', b'{"text": "y"}'] * 2, shard_bytes=70_000, ends=True)
def test_shards_of_any_size_hold_the_records_of_the_file_in_order(
    lines: list[bytes], shard_bytes: int, ends: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = b"\n".join(lines) + b"\n" * ends
    path = tmp_path_factory.mktemp("corpus") / "a.jsonl"
    path.write_bytes(content)
    found, skipped = [], SkipCount()
    shards = list_shards([SourceFile(path, "a.jsonl")], shard_bytes)
    for shard in shards:
        records = list(read_shard(shard, "text", [], skipped, max_document_bytes=100_000))
        found += [(record["name"], record["text"]) for _, record in records]
        for place, (index, _) in enumerate(records):
            rest = read_shard(shard, "text", [], SkipCount(), start=index, max_document_bytes=100_000)
            assert list(rest) == records[place:]
    starts = accumulate((len(line) + 1 for line in lines), initial=0)
    assert found == [
        (f"a.jsonl@{start}", json.loads(line)["text"].removeprefix("\ufeff"))
        for start, line in zip(starts, lines, strict=False)
        if line.startswith(b'{"') and b"\\u0000" not in line and len(line) <= 100_000
    ]
    assert len(found) + skipped.total == content.count(b"\n") + (content[-1:] not in (b"", b"\n"))
    assert sum(shard.num_bytes for shard in shards) == len(content)

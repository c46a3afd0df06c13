import gzip
import io
import json
import pickle
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from jsonargparse import ArgumentParser

from crocodil.data.corpora import SkipCount, SourceFile, split_of
from crocodil.data.sources import Corpus, Document, HubReader, Source, Splitting, keeps
from crocodil.data.text_corpus import TextCorpus
from crocodil.trainer_cli import run_trainer


def corpus(*sources: Source, split_by: str = "text") -> Corpus:
    return Corpus(sources, Splitting(split_by, 10, 10))


def read(corpus: Corpus) -> tuple[list[Document], SkipCount]:
    skipped = SkipCount()
    return [document for shard in range(len(corpus.shards)) for document in corpus.documents(shard, skipped)], skipped


def texts(corpus: Corpus) -> list[str]:
    return [document.text for document in read(corpus)[0]]


def tar_of(members: dict[str, str]) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w:gz") as archive:
        for name, text in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return target.getvalue()


@pytest.fixture
def folder(put: Callable[[str, bytes], SourceFile], tmp_path: Path) -> Path:
    """One text in every format, and hidden files, which are not read."""
    rows = b'{"text": "of lines"}\n{"text": "of other lines"}\n'
    put("a/one.txt", b"of a file")
    put("a/two.py.gz", gzip.compress(b"of a compressed file"))
    put("rows.jsonl", rows)
    put("rows.jsonl.gz", gzip.compress(rows.replace(b"of", b"compressed:")))
    put("code.tar.gz", tar_of({"x/y.py": "of a member", "z.py": "of a second member"}))
    for hidden in (".git/config", "a/.DS_Store", ".rows.jsonl"):
        put(hidden, b'{"text": "hidden"}')
    pq.write_table(pa.table({"text": ["of a row", "of a second row"]}), tmp_path / "corpus" / "t.parquet")
    return tmp_path / "corpus"


ALL = [
    "of a file", "of a compressed file", "of lines", "of other lines", "compressed: lines", "compressed: other lines",
    "of a member", "of a second member", "of a row", "of a second row",
]  # fmt: skip


def test_a_folder_is_read_in_all_formats_but_for_hidden_files(folder: Path) -> None:
    found = corpus(Source(path=str(folder)))
    assert sorted(texts(found)) == sorted(ALL)
    assert [name for name in found.names if "." in name] == sorted(found.names)
    assert len(found.sizes) == len(found.names) == 6 and all(found.sizes)
    again = pickle.loads(pickle.dumps(found))
    assert texts(again) == texts(found)


def test_a_file_and_a_pattern_read_what_they_name(folder: Path, tmp_path: Path) -> None:
    assert texts(corpus(Source(path=str(folder / "rows.jsonl")))) == ["of lines", "of other lines"]
    assert texts(corpus(Source(path=str(folder), pattern="a/*"))) == ["of a file", "of a compressed file"]
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "l.jsonl").symlink_to(folder / "rows.jsonl")
    assert texts(corpus(Source(path=str(tmp_path / "links" / "l.jsonl")))) == ["of lines", "of other lines"]
    for path, pattern in [(str(folder), "*.nothing"), (str(folder / ".git"), "none"), (str(folder / "absent"), "*")]:
        with pytest.raises(ValueError, match=r"folder must "):
            Source(path=path, pattern=pattern).files()
    with pytest.raises(ValueError, match=r"path must hold files that match '\*\*/\.rows\.jsonl', got none in"):
        Source(path=str(folder), pattern="**/.rows.jsonl").files()


def test_without_path_and_hub_the_standard_library_is_read() -> None:
    names = [file.name for file in Source().files()]
    assert "json/decoder.py" in names and not any(name.startswith("test/") for name in names)


def test_shards_are_counted_over_all_sources(folder: Path) -> None:
    found = corpus(*(Source(path=str(folder), pattern=pattern) for pattern in ("a/*", "*.jsonl", "*.parquet")))
    assert found.names == ["a/one.txt", "a/two.py.gz", "rows.jsonl", "t.parquet"]
    assert [found.shards_of(source) for source in range(3)] == [[0, 1], [2], [3]]
    assert [(d.text, d.shard, d.record) for d in read(found)[0]][2:] == [
        ("of lines", 2, 0), ("of other lines", 2, 1), ("of a row", 3, 0), ("of a second row", 3, 1)
    ]  # fmt: skip


def test_reading_may_begin_at_any_record(folder: Path) -> None:
    found = corpus(Source(path=str(folder)))
    for shard in range(len(found.shards)):
        everything = list(found.documents(shard, SkipCount()))
        for start in range(4):
            later = list(found.documents(shard, SkipCount(), start))
            assert later == [document for document in everything if document.record >= start]


def rows(path: Path, *values: dict[str, Any]) -> Source:
    path.write_text("".join(json.dumps(row) + "\n" for row in values))
    return Source(path=str(path))


@pytest.mark.parametrize("split_by", ["text", "name", "folder", "repo", "body"])
def test_a_value_of_the_record_decides_its_split(split_by: str, tmp_path: Path) -> None:
    values = [{"body": f"text {i}", "repo": f"repo {i % 30}", "text": "not this column"} for i in range(300)]
    (tmp_path / "in").mkdir()
    rows(tmp_path / "in" / "a.jsonl", *values)
    found, _ = read(corpus(Source(path=str(tmp_path / "in"), column="body"), split_by=split_by))
    place, key = 0, ""
    for document, value in zip(found, values, strict=True):
        key = {"text": value["body"], "name": f"a.jsonl@{place}", "folder": "", **value}[split_by]
        key = value["body"] if split_by == "text" else key
        assert document == (value["body"], split_of(key, 10, 10), 0, document.record)
        place += len(json.dumps(value)) + 1


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        ({}, [0, 1, 2, 3]),
        ({"license": ["mit", "bsd"]}, [0, 2]),
        ({"tags": ["b"]}, [0, 1]),
        ({"tags": ["b"], "license": ["gpl"]}, [1]),
        ({"year": ["2020"]}, [1, 3]),
        ({"content": ["text 2"]}, [2]),
        ({"folder": ["x"]}, []),
        ({"license": []}, []),
    ],
)
def test_filters_keep_rows_of_which_every_column_has_a_kept_value(
    keep: dict[str, list[str]], kept: list[int], tmp_path: Path
) -> None:
    values = [
        {"content": f"text {i}", "license": ["mit", "gpl"][i % 2], "tags": [["a", "b"], ["b"], [], ["c"]][i]}
        | {"year": 2019 + i % 2}
        for i in range(4)
    ]
    path = rows(tmp_path / "a.jsonl", *values).path
    pq.write_table(pa.Table.from_pylist(values), tmp_path / "a.parquet")
    sources = [Source(path=path, column="content", keep=keep), Source(path=str(tmp_path / "a.parquet"))]
    sources[1] = Source(path=sources[1].path, column="content", keep=keep)
    sources.append(Source(hub="parquet", data_files=[sources[1].path or ""], column="content", keep=keep))
    for source in sources:
        found, skipped = read(corpus(source))
        assert [document.record for document in found] == kept
        assert skipped.filtered == skipped.total == 4 - len(kept)


def test_a_list_is_kept_for_one_of_its_values() -> None:
    assert keeps({"tags": ("a", "b")}, {"tags": ["b", "z"]}) and not keeps({"tags": ["a"]}, {"tags": ["b"]})
    assert not keeps({"tags": "ab"}, {"tags": ["a"]})  # a string is one value


def test_a_missing_column_is_one_sentence(tmp_path: Path) -> None:
    pq.write_table(pa.table({"content": ["a"]}), tmp_path / "a.parquet")
    for source in (Source(path=str(tmp_path / "a.parquet")), Source(hub="parquet", data_files=[f"{tmp_path}/*"])):
        with pytest.raises(ValueError, match=r"must have (the|one) column 'text', got content: name another"):
            read(corpus(source))
    source = rows(tmp_path / "a.jsonl", {"content": "a"}, {"text": "b"})
    found, skipped = read(corpus(source))
    assert [document.text for document in found] == ["b"] and skipped.missing_values == 1
    assert read(corpus(source, split_by="repo"))[1].missing_values == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "a", "hub": "b"}, "a source is local or of the hub, got path 'a' and hub 'b'"),
        ({"weight": -1.0}, "finite and at least 0, got -1.0"),
        ({"weight": float("nan")}, "finite and at least 0, got nan"),
        ({"weight": float("inf")}, "finite and at least 0, got inf"),
    ],
)
def test_settings_that_contradict_one_another_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Source(**settings)


# The hub, from local files and from a server that refuses.


def test_a_hub_dataset_is_read_shard_by_shard_from_any_record(tmp_path: Path) -> None:
    for shard in range(3):
        values = [f"text {shard}, {i}" if i != 2 else None for i in range(5)]
        pq.write_table(pa.table({"content": values, "year": range(5)}), tmp_path / f"{shard}.parquet")
    reader = pickle.loads(pickle.dumps(Source(hub="parquet", data_files=[f"{tmp_path}/*.parquet"]).open()))
    assert isinstance(reader, HubReader)
    assert reader.names() == ["parquet, shard 0", "parquet, shard 1", "parquet, shard 2"] and len(reader.sizes()) == 3
    for shard in range(3):
        for start in range(6):
            skipped = SkipCount()
            found = list(reader.read(shard, "content", ["year"], skipped, start))
            assert [index for index, _ in found] == [i for i in (0, 1, 3, 4) if i >= start]
            assert [(r["text"], r["year"]) for _, r in found] == [(f"text {shard}, {i}", i) for i, _ in found]
            assert skipped.missing_values == skipped.total == (start <= 2)
    assert found == [] and next(reader.read(1, "content", [], SkipCount()))[1]["name"] == "parquet, shard 1:0"


def test_what_breaks_off_is_one_sentence(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "a.parquet")
    reader = Source(hub="parquet", data_files=[f"{tmp_path}/a.parquet"]).open()
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"the dataset parquet cannot be read \(.*\): check its name, or download it"):
        list(reader.read(0, "text", [], SkipCount()))
    with pytest.raises(ValueError, match=r"the dataset parquet cannot be read \(Unable to find .*absent.*\)"):
        Source(hub="parquet", data_files=[f"{tmp_path}/absent.parquet"]).open()


class Refusal(BaseHTTPRequestHandler):
    """Answers as the hub does: 401 or 403, and why in a header."""

    def do_HEAD(self) -> None:
        status, reason = (401, "RepoNotFound") if "/absent" in self.path else (403, "GatedRepo")
        if "/anonymous" in self.path:
            status = 401
        self.send_response(status)
        self.send_header("X-Error-Code", reason)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def refusing_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusal)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    yield
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("hub", "message"),
    [
        (
            "lab/anonymous-code",
            r"lab/anonymous-code is gated: accept its terms at https://huggingface\.co/datasets/lab/",
        ),
        ("lab/forbidden-code", r"is gated: .* run `hf auth login` or set HF_TOKEN .*\(Dataset '.*' is a gated dataset"),
        (
            "lab/absent-aggregated",
            r"there is no dataset lab/absent-aggregated, or it is private: check its name, or run",
        ),
    ],
)
@pytest.mark.usefixtures("refusing_hub")
def test_a_gated_dataset_and_one_that_is_not_there_are_told_apart(hub: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Source(hub=hub).open()
    assert "\n" not in str(caught.value)


def test_a_hub_that_cannot_be_reached_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"the dataset lab/aggregated cannot be read \(Couldn't reach .*give its folder"
    ):
        Source(hub="lab/aggregated").open()


# Configurations and caches.


def parsed(*arguments: str) -> list[Source]:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(TextCorpus, "data")
    config = parser.parse_args(["--data=crocodil.data.TextCorpus", *arguments])
    return parser.instantiate_classes(config).data.sources


def test_sources_are_given_on_the_command_line_and_in_a_file(tmp_path: Path) -> None:
    assert parsed() == [Source()]
    assert parsed("--data.init_args.sources=some/folder") == [Source(path="some/folder")]
    sources = [
        {"path": "code", "pattern": "**/*.py", "weight": 2.0},
        {"hub": "bigcode/x", "data_dir": "python", "column": "content", "keep": {"license": ["mit"]}, "weight": 1},
    ]
    content = {"data": {"class_path": "crocodil.data.TextCorpus", "init_args": {"sources": sources}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(TextCorpus, "data")
    config = parser.parse_args([f"--config={tmp_path / 'config.yaml'}"])
    assert parser.instantiate_classes(config).data.sources == [Source(**source) for source in sources]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{path: a, bogus: 1}", "bogus"),
        ("{path: a, keep: [mit]}", "keep"),
        ("{path: a, hub: b}", "a source is local or of the hub"),
        ("{path: a, weight: much}", "weight"),
    ],
)
def test_a_wrong_source_is_a_sentence_that_tells_the_key(source: str, message: str, tmp_path: Path) -> None:
    config = Path(__file__).parents[2] / "lightning_configs" / "source_demasker.yaml"
    with pytest.raises(ValueError, match=message) as caught:
        run_trainer(
            [
                "fit",
                f"--config={config}",
                f"--trainer.default_root_dir={tmp_path}",
                f"--data.init_args.sources=[{source}]",
            ]
        )
    assert len(str(caught.value)) < 400


def key(cache: Path, *sources: Source) -> str:
    return TextCorpus(32, 4, list(sources), vocab_size=262, cache_dir=str(cache))._prepared_folder().name


def test_the_cache_notices_files_settings_and_revisions_but_not_what_a_revision_names(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    source = rows(tmp_path / "in" / "a.jsonl", *({"text": f"text {i} " * 9} for i in range(50)))
    pq.write_table(pa.table({"text": [f"text {i} " * 9 for i in range(50)]}), tmp_path / "a.parquet")
    hub = {"hub": "parquet", "data_files": [f"{tmp_path}/a.parquet"]}
    cache = tmp_path / "cache"
    keys = [
        key(cache, source), key(cache, Source(**hub)), key(cache, Source(**hub, keep={"text": ["x", "text 1 " * 9]}))
    ]  # fmt: skip
    assert len(set(keys)) == 3
    assert key(cache, Source(path=source.path, weight=2.0)) == keys[0]  # weights are of the reading
    rows(tmp_path / "in" / "a.jsonl", *({"text": f"text {i} " * 8} for i in range(50)))
    assert key(cache, source) not in keys
    pq.write_table(pa.table({"text": [f"other {i} " * 9 for i in range(60)]}), tmp_path / "a.parquet")
    assert key(cache, Source(**hub)) == keys[1]  # what a hub's name stands for is asked for once


def test_names_of_all_documents_differ(folder: Path) -> None:
    reader = Source(path=str(folder)).open()
    names = [r["name"] for s in range(6) for _, r in reader.read(s, "text", [], SkipCount())]
    assert Counter(names).most_common(1)[0][1] == 1 and len(names) == 10

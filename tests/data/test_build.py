import json
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from crocodil.data import build as module
from crocodil.data.build import SKIPPED_FILE, SPLITS, Recipe, build, chunks, text_hash
from crocodil.data.codec import TextCodec, byte_level_bpe
from crocodil.data.corpora import SkipCount, split_of
from crocodil.data.sources import Corpus, Document, Source, Splitting
from crocodil.data.text_corpus import TextCorpus
from crocodil.data.tokens import TokenStore

LENGTH = 24
FORK = multiprocessing.get_context("fork")  # the children see what the test has put in the place of something else


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    return byte_level_bpe(["the quick brown fox jumps over the lazy dog "] * 20, 290)


Built = tuple[dict[str, TokenStore], dict[str, Any]]


@pytest.fixture
def made(codec: TextCodec, tmp_path: Path) -> Callable[..., Built]:
    """Builds a corpus; the stores of its splits, and the counts."""

    def make(corpus: Corpus, name: str = "built", codec: TextCodec = codec, **recipe: Any) -> Built:
        (tmp_path / name).mkdir()
        counts = build(tmp_path / name, tmp_path / f"{name}-parts", corpus, codec, Recipe(LENGTH, **recipe))
        return {split: TokenStore(tmp_path / name, split) for split in SPLITS}, counts

    return make


def lines(path: Path, rows: Sequence[dict[str, Any]]) -> Source:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(path=str(path))


def documents(store: TokenStore) -> dict[tuple[int, int], list[int]]:
    """The tokens of each document of a split by its origin, pieces joined."""
    found: dict[tuple[int, int], list[int]] = {}
    for origin, text in zip(store.origins.tolist(), map(store.__getitem__, range(len(store))), strict=True):
        found.setdefault(tuple(origin), []).extend(text.tolist())
    return found


HOSTILE = [
    "a",
    "é" * 30,
    "<|eos|> <|mask|>",
    "\r\n\r\n x",
    "日本語 🙂",
    "a\u2028b",
    "  lead",
    "tail  ",
    "\ufffd",
    "x" * 500,
]


def test_tokens_are_those_of_the_text_with_its_ends(
    codec: TextCodec, made: Callable[..., Built], tmp_path: Path
) -> None:
    texts = HOSTILE + [f"the fox {i} " * (i % 9) + "end" for i in range(300)]
    corpus = Corpus([lines(tmp_path / "a.jsonl", [{"text": text} for text in texts])], Splitting())
    stores, _ = made(corpus)
    vocabulary, seen = codec.vocabulary, 0
    for split, store in stores.items():
        assert store.lengths.max() <= LENGTH
        for (shard, record), tokens in documents(store).items():
            expected = [vocabulary.bos_token_id, *codec.encode(texts[record]), vocabulary.eos_token_id]
            assert tokens == expected[: -1 if len(expected) % LENGTH == 1 else None]
            assert shard == 0 and split_of(texts[record]) == split
            seen += 1
    assert seen == len(set(texts))


def test_equal_texts_stay_once_in_a_held_out_split_if_one_is_there(made: Callable[..., Built], tmp_path: Path) -> None:
    rows = [{"text": f"text {i % 40}", "key": f"key {i}"} for i in range(800)]
    corpus = Corpus([lines(tmp_path / "a.jsonl", rows)], Splitting("key", 20, 20))
    stores, counts = made(corpus)
    found = {split: documents(store) for split, store in stores.items()}
    where = {record: split for split in ("train", "val", "test") for _, record in found[split]}
    assert len({rows[record]["text"] for record in where}) == len(where) == 40
    for record, split in where.items():
        copies = [i for i in range(800) if rows[i]["text"] == rows[record]["text"]]
        of_copies = [split_of(rows[i]["key"], 20, 20) for i in copies]
        best = next(name for name in ("test", "val", "train") if name in of_copies)
        assert (split, record) == (best, copies[of_copies.index(best)])
    assert counts["duplicates"] == 760 and counts["documents"] == 800


def test_near_duplicates_of_held_out_texts_leave_the_training_split(
    codec: TextCodec, made: Callable[..., Built], tmp_path: Path
) -> None:
    generator = np.random.default_rng(0)
    rows = []
    for group in range(40):
        words = generator.integers(1000, 9999, 60).tolist()
        for copy in range(5):
            words[copy * 11] = copy
            rows.append({"text": " ".join(map(str, words)), "key": f"{group}, {copy}"})
    corpus = Corpus([lines(tmp_path / "a.jsonl", rows)], Splitting("key", 15, 15))
    alike, counts = made(corpus, "alike", near_duplicates=0.7)
    everything, _ = made(corpus, "everything")
    kept = [(record // 5, split) for split, store in alike.items() for _, record in documents(store)]
    assert len(kept) == 40 and {group for group, _ in kept} == set(range(40))
    for group, split in kept:
        of_copies = {split_of(f"{group}, {copy}", 15, 15) for copy in range(5)}
        assert split == next(name for name in ("test", "val", "train") if name in of_copies)
    assert counts["near duplicates"] == 160
    assert sum(len(documents(store)) for store in everything.values()) == 200


def test_new_files_move_no_old_document(made: Callable[..., Built], tmp_path: Path) -> None:
    def rows(first: int) -> list[dict[str, Any]]:
        return [{"text": f"document {i}", "key": str(i)} for i in range(first, first + 200)]

    lines(tmp_path / "in" / "m.jsonl", rows(200))
    source = Source(path=str(tmp_path / "in"))

    def texts(name: str) -> dict[str, set[tuple[int, ...]]]:
        stores, _ = made(Corpus([source], Splitting("key", 10, 10)), name)
        return {split: {tuple(tokens) for tokens in documents(store).values()} for split, store in stores.items()}

    before = texts("before")
    lines(tmp_path / "in" / "a.jsonl", rows(0))
    lines(tmp_path / "in" / "z" / "z.jsonl", rows(400))
    after = texts("after")
    for split in SPLITS:
        assert len(before[split]) > 5 and before[split] < after[split]
    assert not after["train"] & (after["val"] | after["test"])


def test_filters_and_lengths_leave_out_what_they_say(
    codec: TextCodec, made: Callable[..., Built], tmp_path: Path
) -> None:
    rows = [
        {"text": f"{'x' * (i % 20 + 1)} {i}", "license": ["mit", "gpl"][i % 2], "tags": [["a"], ["b", "c"], []][i % 3]}
        for i in range(240)
    ]
    source = lines(tmp_path / "a.jsonl", rows)
    keep = {"license": ["mit", "bsd"], "tags": ["c", "a"]}
    corpus = Corpus([Source(path=source.path, keep=keep)], Splitting())
    stores, counts = made(corpus, min_tokens=8, max_tokens=20)
    kept = {record for store in stores.values() for _, record in documents(store)}
    sizes = [len(codec.encode(row["text"])) + 2 for row in rows]
    fits = [rows[i]["license"] == "mit" and bool(rows[i]["tags"]) for i in range(240)]
    assert kept == {i for i in range(240) if fits[i] and 8 <= sizes[i] <= 20}
    too_few, too_many = (sum(f and test for f, test in zip(fits, tests, strict=True)) for tests in (
        [size < 8 for size in sizes], [size > 20 for size in sizes]
    ))  # fmt: skip
    assert too_few > 5 and too_many > 5
    left_out = f"{240 - sum(fits)} filtered, {too_few} too few tokens, {too_many} too many tokens"
    assert counts["left out"] == left_out


def test_the_counts_of_a_hostile_corpus_add_up(
    made: Callable[..., Built], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PART_BYTES", 1)  # a part for each file
    folder = tmp_path / "in"
    good = [json.dumps({"text": f"text {i % 50}"}).encode() for i in range(80)]
    bad = [
        b"{",
        b"[1]",
        b"\xff\xfe",
        b'{"text": 3}',
        b'{"text": "a\\u0000"}',
        b'{"text": "\\ud800"}',
        b'{"text": " "}',
        b"",
    ]
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(b"\n".join(good + bad) + b"\n")
    (folder / "b.txt").write_bytes(b"caf\xe9")
    (folder / "c.txt").write_text("text 1")
    (folder / ".hidden.txt").write_text("not read")
    (folder / "d.parquet").write_bytes(b"PAR1 no more")
    stores, counts = made(Corpus([Source(path=str(folder))], Splitting()))
    left_out = SkipCount()
    for path in (tmp_path / "built-parts").glob(f"*/{SKIPPED_FILE}"):
        left_out.add(SkipCount(**json.loads(path.read_text())))
    assert counts["documents"] == 81 and counts["duplicates"] == 31
    assert left_out.total == len(bad) + 2
    assert asdict(left_out) == asdict(
        SkipCount(not_json=2, not_utf8=3, missing_values=1, null_bytes=1, empty=2, damaged=1)
    )
    assert sum(len(documents(store)) for store in stores.values()) == 81 - 31
    assert [counts[split] for split in SPLITS] == [len(stores[split]) for split in SPLITS]
    assert counts["files"] == 4 and counts["left out"] == str(left_out)


def test_texts_of_many_sources_stand_source_by_source(made: Callable[..., Built], tmp_path: Path) -> None:
    sources = [
        lines(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i} " * 9} for i in range(size)])
        for name, size in [("one", 50), ("two", 3), ("three", 90)]
    ]
    stores, _ = made(Corpus(sources, Splitting(val_percent=0, test_percent=10)))
    for store in stores.values():
        of_source = [
            store.origins[first:last, 0] for first, last in zip(store.bounds[:-1], store.bounds[1:], strict=True)
        ]
        assert all((shards == number).all() for number, shards in enumerate(of_source))
        assert store.bounds[0] == 0 and store.bounds[-1] == len(store)
    assert len(stores["val"]) == 0 and stores["val"].bounds.tolist() == [0, 0, 0, 0]
    assert all(np.diff(stores["train"].bounds) > 0)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(200, np.uint8), (1000, np.uint16), (70_000, np.uint32)])
def test_large_vocabularies_take_wider_tokens(
    vocab_size: int, dtype: type, made: Callable[..., Built], tmp_path: Path
) -> None:
    names = ["<e>", "<b>", "<m>", "<u>", *map(str, range(4, vocab_size))]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<u>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "<e>", "pad_token": "<e>", "bos_token": "<b>", "mask_token": "<m>", "unk_token": "<u>"}
    codec = TextCodec(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special))
    corpus = Corpus([lines(tmp_path / "a.jsonl", [{"text": f"{vocab_size - 1} 5"}])], Splitting("text", 0, 0))
    stores, _ = made(corpus, codec=codec)
    assert stores["train"].tokens.dtype == dtype
    assert stores["train"].tokens.tolist() == [1, vocab_size - 1, 5, 0]


def test_the_tokens_of_any_document_are_found_in_its_part(
    codec: TextCodec, made: Callable[..., Built], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PART_BYTES", 1)
    texts = [[f"{shard} and {i} " * (i % 5 + 1) for i in range(20)] for shard in range(4)]
    for shard in range(4):
        lines(tmp_path / "in" / f"{shard}.jsonl", [{"text": text} for text in texts[shard] if shard != 1])
    (tmp_path / "in" / "1.jsonl").write_text("{}\n")  # a part without documents
    made(Corpus([Source(path=str(tmp_path / "in"))], Splitting()))
    parts = module._Parts.open(sorted((tmp_path / "built-parts").iterdir()))
    order = np.random.default_rng(0).permutation(60)
    for document, tokens in zip(order, parts.texts(order), strict=True):
        _, _, shard, record = parts.kept[document]
        assert tokens.tolist() == [1, *codec.encode(texts[shard][record]), 0]


def test_a_tokenizer_that_cuts_and_pads_by_itself_does_neither(made: Callable[..., Built], tmp_path: Path) -> None:
    codec = byte_level_bpe(["a"], 260)
    codec.tokenizer.backend_tokenizer.enable_truncation(3)
    codec.tokenizer.backend_tokenizer.enable_padding(length=9)
    corpus = Corpus([lines(tmp_path / "a.jsonl", [{"text": "abcdef"}, {"text": "b"}])], Splitting("text", 0, 0))
    stores, _ = made(corpus, codec=codec)
    assert stores["train"].lengths.tolist() == [8, 3]


def test_chunks_are_bounded_in_number_and_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 3)
    monkeypatch.setattr(module, "CHUNK_CHARACTERS", 10)
    documents = [Document("x" * size, "train", 0, i) for i, size in enumerate((1, 1, 1, 9, 1, 30, 4, 5))]
    found = list(chunks(documents))
    assert [len(chunk) for chunk in found] == [3, 2, 1, 2]
    assert [document for chunk in found for document in chunk] == documents
    assert list(chunks([])) == []


def test_hostile_texts_are_told_apart() -> None:
    assert len({text_hash(text) for text in HOSTILE}) == len(HOSTILE)


def test_what_cannot_find_near_duplicates_is_refused_before_the_corpus_is_read() -> None:
    with pytest.raises(ValueError, match=r"near_duplicates must be in \(0, 1\], got 1.5"):
        Recipe(LENGTH, near_duplicates=1.5)


@pytest.fixture
def many_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], TextCorpus]:
    """Makes a data module of 12 files, one a part, whose cache has the name that it is given."""
    for number in range(12):
        rows = [{"text": f"the dog {number} and fox {i % 30} " * 2} for i in range(40)]
        lines(tmp_path / "in" / f"{number:02d}.jsonl", rows)
    monkeypatch.setattr(module, "PART_BYTES", 1)
    return lambda name: TextCorpus(
        LENGTH, 4, str(tmp_path / "in"), vocab_size=300, layout="packed", cache_dir=str(tmp_path / name)
    )


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


class Interrupted(Corpus):
    """Ends in the middle of its seventh file, when that is read for the second time: for its tokens."""

    kills = False

    def documents(self, shard: int, skipped: SkipCount, start: int = 0) -> Iterator[Document]:
        self.times = Counter([*getattr(self, "times", Counter()).elements(), shard])
        for number, document in enumerate(super().documents(shard, skipped, start)):
            if (shard, number, self.times[shard]) == (6, 20, 2):
                if self.kills:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError("the disk is gone")
            yield document


class Killed(Interrupted):
    kills = True


@pytest.mark.parametrize("ending", [Interrupted, Killed])
def test_a_build_that_was_interrupted_goes_on_from_its_parts(
    ending: type[Interrupted],
    many_parts: Callable[[str], TextCorpus],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    many_parts("undisturbed").prepare_data()
    with monkeypatch.context() as patch:
        patch.setattr("crocodil.data.text_corpus.Corpus", ending)
        if ending.kills:
            child = FORK.Process(target=lambda: many_parts("cache").prepare_data())
            child.start()
            child.join(60)
            assert child.exitcode == -signal.SIGKILL
        else:
            with pytest.raises(OSError, match="the disk is gone"):
                many_parts("cache").prepare_data()
    (parts,) = (tmp_path / "cache").glob(".*.parts")
    assert sorted(path.name for path in parts.iterdir() if "-" not in path.name) == [
        *(f"{number:06d}" for number in range(6)), "codec"
    ]  # fmt: skip
    read: list[int] = []
    original = Corpus.documents

    def remembering(self: Corpus, shard: int, skipped: SkipCount, start: int = 0) -> Iterator[Document]:
        read.append(shard)
        return original(self, shard, skipped, start)

    monkeypatch.setattr(Corpus, "documents", remembering)
    many_parts("cache").prepare_data()
    assert read == [6, 7, 8, 9, 10, 11]
    (undisturbed,), (folder,) = (tmp_path / "undisturbed").glob("T*"), (tmp_path / "cache").glob("T*")
    assert contents(undisturbed) == contents(folder)
    assert len(contents(folder)) > 15 and not parts.exists()


def build_at_once(many_parts: Callable[[str], TextCorpus], barrier: Barrier) -> None:
    barrier.wait(30)
    many_parts("cache").prepare_data()


def test_of_two_builders_at_once_both_get_the_same_folder(
    many_parts: Callable[[str], TextCorpus], tmp_path: Path
) -> None:
    many_parts("undisturbed").prepare_data()
    barrier = FORK.Barrier(2)
    children = [FORK.Process(target=build_at_once, args=(many_parts, barrier)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    (folder,) = (tmp_path / "cache").iterdir()  # nothing half-written is left
    (undisturbed,) = (tmp_path / "undisturbed").iterdir()
    assert contents(folder) == contents(undisturbed)


def test_a_part_is_consecutive_shards_of_one_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in [("a/1", 10), ("a/2", 10), ("a/3", 200), ("a/4", 10), ("b/1", 10)]:
        lines(tmp_path / f"{name}.jsonl", [{"text": "x" * size}])
    corpus = Corpus([Source(path=str(tmp_path / "a")), Source(path=str(tmp_path / "b"))], Splitting())
    monkeypatch.setattr(module, "PART_BYTES", 60)
    assert module._parts(corpus) == [[0, 1], [2], [3], [4]]

import json
import multiprocessing
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, distributed

from crocodil.data import text_corpus, token_stream
from crocodil.data.build import Recipe
from crocodil.data.codec import TextCodec, byte_level_bpe
from crocodil.data.corpora import SkipCount
from crocodil.data.rows import RowFormat, cut
from crocodil.data.sources import Corpus, Document, Source, Splitting
from crocodil.data.text_corpus import TextCorpus
from crocodil.data.token_stream import EMPTY_PASSES, Lane, LaneState, StreamLoader, TokenStream

LENGTH, BATCH = 24, 4
LAYOUTS = ("padded", "grouped", "packed")
Batch = dict[str, Tensor]


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    return byte_level_bpe(["the quick brown fox jumps over the lazy dog "] * 20, 290)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven files of 5 to 35 documents of 1 to 60 tokens, in folders a and b."""
    root = tmp_path_factory.mktemp("stream")
    generator = np.random.default_rng(0)
    for number, size in enumerate([25, 5, 35, 10, 20, 15, 30]):
        (root / "ab"[number // 4]).mkdir(exist_ok=True)
        rows = [{"text": f"{number} {i} " + "fox the " * int(generator.integers(0, 14))} for i in range(size)]
        path = root / "ab"[number // 4] / f"{number}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def corpus_of(folder: Path, weights: Sequence[float] = (), splitting: Splitting | None = None) -> Corpus:
    """All files as one source, or those of "a", of "b" and one more of "a" as sources with weights."""
    patterns = ("a/*", "b/*", "a/1*")[: len(weights)]
    sources = [Source(str(folder), pattern, weight=weight) for pattern, weight in zip(patterns, weights, strict=True)]
    return Corpus(sources or [Source(str(folder))], splitting or Splitting("text", 10, 10))


@pytest.fixture
def lane(codec: TextCodec, folder: Path) -> Callable[..., Lane]:
    def make(
        number: int = 0,
        num_lanes: int = 1,
        layout: str = "padded",
        passes: int | None = None,
        seed: int = 0,
        **options: Any,
    ) -> Lane:
        recipe = options.pop("recipe", Recipe(LENGTH))
        corpus = options.pop("corpus", None) or corpus_of(folder, **options)
        row_format = RowFormat(LENGTH, 0, layout, hide_padding=True)  # type: ignore[arg-type]
        return Lane(corpus, codec, recipe, row_format, BATCH, number, num_lanes, seed, shuffle_buffer=13, passes=passes)

    return make


def texts(batches: Iterable[Batch]) -> Iterator[tuple[int, ...]]:
    """The token ids of each text of each row."""
    for batch in batches:
        for ids, numbers in zip(batch["token_ids"], batch["document_ids"], strict=True):
            for number in range(1, int(numbers.max()) + 1):
                yield tuple(ids[numbers == number].tolist())


def training_texts(corpus: Corpus, codec: TextCodec) -> Counter[tuple[int, ...]]:
    found: Counter[tuple[int, ...]] = Counter()
    for document in chain.from_iterable(corpus.documents(shard, SkipCount()) for shard in range(len(corpus.shards))):
        if document.split == "train":
            ids = [1, *codec.encode(document.text), 0]
            found.update(
                tuple(ids[start : start + size]) for start, size, _ in cut(np.array([len(ids)]), LENGTH).tolist()
            )
    return found


def same(one: Sequence[Batch], other: Sequence[Batch]) -> bool:
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(one, other, strict=True)
    )


# Every document once in a pass.


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_lanes", [1, 4, 9])  # of seven shards: at 9, all lanes read all of them
def test_lanes_together_read_every_document_once_a_pass(
    num_lanes: int, layout: str, lane: Callable[..., Lane], codec: TextCodec, folder: Path
) -> None:
    expected = training_texts(corpus_of(folder), codec)
    assert 100 < expected.total() < 200 and max(expected.values()) < 20
    lanes = [lane(number, num_lanes, layout, passes=2) for number in range(num_lanes)]
    found = Counter(texts(batch for each in lanes for batch, _ in each.batches(each.start())))
    assert found == Counter({text: 2 * count for text, count in expected.items()})


def test_sources_without_weights_are_read_as_one(lane: Callable[..., Lane], codec: TextCodec, folder: Path) -> None:
    corpus = Corpus([Source(str(folder), "a/*"), Source(str(folder), "b/4*")], Splitting("text", 10, 10))
    expected = training_texts(corpus, codec)
    found: Counter[tuple[int, ...]] = Counter()
    for number in range(2):
        endless = lane(number, 2, corpus=corpus)
        rows = ((row, state) for row, state in endless.rows(endless.start()))
        while True:
            row, state = next(rows)
            if state.cursors[0].passes == 1:  # the chunk began behind the first pass
                break
            found.update(tuple(text.tolist()) for text in row.texts)
    assert all(0 <= count - expected[text] <= 2 for text, count in found.items())
    assert not expected - found  # all came before any lane began its second chunk of the second pass


@pytest.mark.parametrize("layout", LAYOUTS)
def test_origins_tell_the_first_text_of_a_row(layout: str, lane: Callable[..., Lane], codec: TextCodec) -> None:
    each = lane(layout=layout, passes=1)
    documents = {
        (shard, document.record): document
        for shard in range(7)
        for document in each.corpus.documents(shard, SkipCount())
    }
    for batch, _ in each.batches(each.start()):
        for ids, numbers, origin in zip(batch["token_ids"], batch["document_ids"], batch["origins"], strict=True):
            document = documents[tuple(origin.tolist())]  # type: ignore[index]
            first = ids[numbers == 1].tolist()
            whole = [1, *codec.encode(document.text), 0]
            assert document.split == "train"
            assert any(whole[i : i + len(first)] == first for i in range(0, len(whole), LENGTH))


@pytest.mark.parametrize("layout", ["padded", "grouped"])
def test_batches_of_a_lane_are_full_and_grouped_ones_of_similar_length(layout: str, lane: Callable[..., Lane]) -> None:
    each = lane(layout=layout)
    batches = [batch for batch, _ in islice(each.batches(each.start()), 200)]
    assert {len(batch["token_ids"]) for batch in batches} == {BATCH}
    sizes = np.array([(batch["document_ids"] > 0).sum(dim=1).tolist() for batch in batches])
    spread = np.median(sizes.max(axis=1) - sizes.min(axis=1))
    assert spread <= 4 if layout == "grouped" else spread > 10


# Going on exactly.

MIXTURES = {"one": (), "weighted": (1.0, 3.0, 0.5), "one of none": (1.0, 0.0, 2.0)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weights", MIXTURES.values(), ids=MIXTURES)
@pytest.mark.parametrize("passes", [None, 2])
def test_a_lane_goes_on_from_any_state_as_if_it_had_never_stopped(
    passes: int | None, weights: tuple[float, ...], layout: str, lane: Callable[..., Lane]
) -> None:
    make = partial(lane, 1, 2, layout, passes, weights=weights)
    undisturbed = list(islice(make().batches(make().start()), 60))
    chunks = {state.drawn for _, state in undisturbed}
    ends = {cursor.passes for cursor in undisturbed[-1][1].cursors}
    assert len(chunks) >= 5 and max(ends) > 0
    for stop in np.random.default_rng(0).permutation(len(undisturbed) - 1)[:5].tolist():
        plain = json.loads(json.dumps(undisturbed[stop][1].to_plain()))
        again = islice(make().batches(LaneState.from_plain(plain)), len(undisturbed) - 1 - stop)
        batches, states = zip(*again, strict=True)
        assert same(batches, [batch for batch, _ in undisturbed[stop + 1 :]]), stop
        assert list(states) == [state for _, state in undisturbed[stop + 1 :]]


def loader(lanes: Sequence[Lane], num_workers: int, batches_per_epoch: int | None = 10) -> StreamLoader:
    return StreamLoader(TokenStream(lanes), batches_per_epoch, num_workers=num_workers)


@pytest.mark.parametrize(("layout", "num_workers"), [("padded", 0), ("packed", 2)])
def test_a_loader_goes_on_within_and_between_epochs(layout: str, num_workers: int, lane: Callable[..., Lane]) -> None:
    lanes = max(1, num_workers)
    make = lambda: loader([lane(i, lanes, layout, weights=(1.0, 2.0)) for i in range(lanes)], num_workers)  # noqa: E731  # short
    stopped = make()
    undisturbed, states = [], []
    for _ in range(3):
        for batch in stopped:
            undisturbed.append(batch)
            states.append(json.loads(json.dumps(stopped.state_dict())))
    assert len(undisturbed) == 30
    for stop in (1, 10, 17):
        again = make()
        again.load_state_dict(states[stop - 1])
        assert again.state_dict() == states[stop - 1]
        rest = list(again)
        assert len(rest) == 10 - stop % 10  # up to the end of its epoch
        rest += list(again)
        assert same(rest, undisturbed[stop : stop + len(rest)])


def test_a_loader_that_was_left_in_the_middle_of_an_epoch_loses_nothing(lane: Callable[..., Lane]) -> None:
    left, whole = loader([lane()], 0), loader([lane()], 0)
    found = [batch for count in (3, 4, 5) for batch in islice(left, count)]
    assert same(found, list(whole) + list(islice(whole, 2)))
    assert len(list(left)) == 10  # an epoch that was left counts for nothing


def test_another_number_of_workers_begins_the_next_pass(lane: Callable[..., Lane]) -> None:
    stopped = loader([lane()], 0, None)
    batches = iter(stopped)
    while stopped.stream.states[0].cursors[0].passes < 2:
        next(batches)
    again = loader([lane(i, 2) for i in range(2)], 2, None)
    with pytest.warns(UserWarning, match=r"by 1 processes in 1 lanes each, now by 1 in 2: .*begins its next pass"):
        again.load_state_dict(stopped.state_dict())
    assert [state.cursors[0] for state in again.stream.states] == [token_stream.Cursor(3)] * 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.load_state_dict(again.state_dict())  # as many as before


# What is drawn.


def test_sources_have_their_shares_of_the_documents(lane: Callable[..., Lane]) -> None:
    each = lane(weights=(1.0, 3.0, 0.5))
    count, shares = 4000, np.array([1.0, 3.0, 0.5]) / 4.5
    found: Counter[int] = Counter()
    for document, _ in islice(each._documents(each.start()), count):
        found[each.corpus.shards[document.shard][0]] += 1
    errors = [abs(found[source] - count * share) for source, share in enumerate(shares)]
    assert all(error < 4 * np.sqrt(count * share * (1 - share)) for error, share in zip(errors, shares, strict=True))


def test_a_source_of_weight_zero_is_never_read(lane: Callable[..., Lane]) -> None:
    each = lane(weights=(1.0, 0.0, 2.0))
    shards = {document.shard for document, _ in islice(each._documents(each.start()), 500)}
    assert {each.corpus.shards[shard][0] for shard in shards} == {0, 2}


def test_the_order_depends_on_the_seed_and_differs_from_pass_to_pass(lane: Callable[..., Lane], folder: Path) -> None:
    def order(seed: int) -> list[tuple[int, int]]:
        each = lane(seed=seed, passes=2)
        return [(document.shard, document.record) for document, _ in each._documents(each.start())]

    def rows(seed: int) -> list[tuple[int, int]]:
        each = lane(seed=seed, passes=1)
        return [row.origin for row, _ in each.rows(each.start())]

    first, second = np.split(np.array(order(0)), 2)
    assert sorted(first.tolist()) == sorted(second.tolist()) and first.tolist() != second.tolist()
    assert order(0) == order(0) != order(1)
    assert rows(0) == rows(0) != rows(1)
    shard = {"corpus": Corpus([Source(str(folder), "a/0*")], Splitting()), "passes": 1}
    alone = [
        [row.origin for row, _ in each.rows(each.start())] for each in (lane(seed=0, **shard), lane(seed=1, **shard))
    ]
    assert sorted(alone[0]) == sorted(alone[1]) and alone[0] != alone[1]  # rows of a chunk have an order of their own


def test_rows_of_a_chunk_are_shuffled(lane: Callable[..., Lane]) -> None:
    each = lane(passes=1)
    chunks: dict[int, list[tuple[int, int]]] = {}
    for row, state in each.rows(each.start()):
        chunks.setdefault(state.drawn, []).append(row.origin)
    in_order = np.concatenate([np.diff([record for _, record in chunk]) > 0 for chunk in chunks.values()])
    assert 0.3 < in_order.mean() < 0.65
    assert {len(set(chunk)) for chunk in chunks.values()} >= {13}


class Counting(Corpus):
    """Counts the documents that were read."""

    num_read = 0

    def documents(self, shard: int, skipped: SkipCount, start: int = 0) -> Iterator[Document]:
        for document in super().documents(shard, skipped, start):
            self.num_read += 1
            yield document


def test_a_chunk_has_few_documents_where_they_are_long(
    lane: Callable[..., Lane], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_stream, "CHUNK_CHARACTERS", 350)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{i:0100d}"}) + "\n" for i in range(40)))
    corpus = Counting([Source(str(tmp_path))], Splitting("text", 0, 0))
    each = lane(corpus=corpus)
    for _, state in islice(each.rows(each.start()), 100):
        assert corpus.num_read - state.drawn == 4  # of 13 that a chunk may have


# Nothing to read.


def assert_ends(each: Lane, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(each.batches(each.start()))


def test_a_lane_without_a_training_document_is_one_sentence(lane: Callable[..., Lane], folder: Path) -> None:
    assert_ends(
        lane(splitting=Splitting("text", 50, 50)), r"training document in each of its sources .*lane 1 in 8 passes"
    )
    nothing = Corpus([Source(str(folder), keep={"text": ["absent"]})], Splitting())
    assert_ends(lane(corpus=nothing), r"left out: 1120 filtered\): give more files, or fewer num_workers")
    few = Corpus([Source(str(folder), "a/1*")], Splitting("text", 0, 0))
    assert len(list(lane(4, 5, corpus=few, passes=1).rows(lane().start()))) > 0
    assert_ends(lane(5, 6, corpus=few), r"each of 6 lanes \(processes times workers\), got none for lane 6")


@pytest.mark.parametrize("weights", [(), (1.0, 2.0), (1.0, 0.0)])
def test_documents_of_which_none_has_the_length_asked_for_are_one_sentence(
    weights: tuple[float, ...], lane: Callable[..., Lane]
) -> None:
    each = lane(weights=weights, recipe=Recipe(LENGTH, min_tokens=10_000))
    assert_ends(
        each, r"has the length asked for \(min_tokens, max_tokens\) .* in 8 passes \(left out: .* too few tokens"
    )
    finite = lane(weights=weights, recipe=Recipe(LENGTH, min_tokens=10_000), passes=2)
    assert list(finite.batches(finite.start())) == []


def rows_of(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_source_of_short_documents_does_not_end_a_stream_that_has_others(
    lane: Callable[..., Lane], tmp_path: Path
) -> None:
    sources = [
        Source(rows_of(tmp_path / "short.jsonl", {"text": "a"}, {"text": "b"}), weight=100.0),
        Source(rows_of(tmp_path / "long.jsonl", {"text": "long " * 9}), weight=1.0),
    ]
    each = lane(corpus=Corpus(sources, Splitting("text", 0, 0)), recipe=Recipe(LENGTH, min_tokens=10))
    rows = [state for _, state in islice(each.rows(each.start()), 30)]
    assert rows[-1].cursors[0].passes > 10 * EMPTY_PASSES


def test_a_lane_of_few_shards_may_find_nothing_in_some_passes(lane: Callable[..., Lane], tmp_path: Path) -> None:
    for name, split in [("a", "train"), ("b", "val"), ("c", "train")]:
        key = next(str(i) for i in range(100) if Splitting("k", 20, 20)({"k": str(i)}) == split)
        rows_of(tmp_path / f"{name}.jsonl", {"text": f"of {name}", "k": key})
    each = lane(1, 2, corpus=Corpus([Source(str(tmp_path))], Splitting("k", 20, 20)))
    states = [state for _, state in islice(each.rows(each.start()), 60)]
    assert states[-1].cursors[0].passes > 60  # the one shard that it has of three is the empty one in a third of them


# With the Trainer.


class Recorder(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[Tensor] = []

    def training_step(self, batch: Batch, index: int) -> Tensor:
        self.seen.append(batch["token_ids"])
        return self.weight * batch["token_ids"].float().mean()

    def validation_step(self, batch: Batch, index: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def module(folder: Path, tmp_path: Path) -> Callable[..., TextCorpus]:
    def make(**options: Any) -> TextCorpus:
        settings = {"vocab_size": 290, "shuffle_buffer": 13, "batches_per_epoch": 5, "layout": "grouped"}
        return TextCorpus(
            LENGTH,
            BATCH,
            streaming=True,
            cache_dir=str(tmp_path / "cache"),
            held_out_documents=4,
            **{"sources": str(folder), **settings, **options},
        )

    return make


@pytest.fixture
def trained(module: Callable[..., TextCorpus], tmp_path: Path) -> Callable[..., list[Tensor]]:
    """The batches that a run sees, from its beginning or from a checkpoint; each step leaves a checkpoint."""

    def run(
        ckpt_path: Path | None = None, name: str = "run", data: dict[str, Any] | None = None, **options: Any
    ) -> list[Tensor]:
        saving = {"dirpath": tmp_path / name, "filename": "{step}", "save_top_k": -1}
        trainer = Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            default_root_dir=tmp_path,
            callbacks=[
                ModelCheckpoint(**saving, every_n_train_steps=1),
                ModelCheckpoint(**saving | {"filename": "end-{step}"}, save_on_train_epoch_end=True),
            ],
            **options,
        )
        recorder = Recorder()
        trainer.fit(recorder, datamodule=module(**(data or {})), ckpt_path=ckpt_path)
        return recorder.seen

    return run


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*isinstance", "ignore:Checkpoint directory")
@pytest.mark.parametrize("limit", [{"max_steps": 13, "max_epochs": -1}, {"max_epochs": 3, "val_check_interval": 2}])
@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_goes_on_from_each_checkpoint_as_if_it_had_never_stopped(
    limit: dict[str, Any], num_workers: int, trained: Callable[..., list[Tensor]], tmp_path: Path
) -> None:
    data = {"num_workers": num_workers}
    undisturbed = trained(data=data, **limit)
    assert len(undisturbed) == limit.get("max_steps", 15)
    checkpoints = [f"step={step}" for step in (2, 5, 8)] + ["end-step=5", "end-step=10"]
    for name in checkpoints:
        step = int(name.rpartition("=")[2])
        rest = trained(tmp_path / "run" / f"{name}.ckpt", "again", data, **limit)
        assert len(rest) == len(undisturbed) - step, name
        assert all(torch.equal(one, other) for one, other in zip(rest, undisturbed[step:], strict=True)), name


def test_the_stream_of_a_run_is_not_that_of_an_epoch_over_and_over(trained: Callable[..., list[Tensor]]) -> None:
    seen = trained(max_epochs=3, limit_train_batches=3, data={"layout": "padded"})
    assert len(seen) == 9 and len({tuple(batch.flatten().tolist()) for batch in seen}) == 9


def test_a_stream_prepares_held_out_splits_alone(module: Callable[..., TextCorpus]) -> None:
    data = module()
    data.prepare_data()
    data.setup("fit")
    held_out = [data.dataset(split).store for split in ("val", "test")]  # type: ignore[arg-type]
    for store in held_out:
        assert len({tuple(origin) for origin in store.origins.tolist()}) == 4
    with pytest.raises(ValueError, match="the training split of a stream is not stored"):
        data.dataset("train")
    trained_on = set(texts(data_with_ids(data.stream(None, passes=1))))
    assert trained_on.isdisjoint(tuple(store[i].tolist()) for store in held_out for i in range(len(store)))


@pytest.mark.parametrize(("percents", "most"), [((20, 0), 60), ((0, 20), 60), ((20, 20), 90), ((0, 0), 1)])
def test_no_more_is_read_than_held_out_splits_need(
    percents: tuple[int, int], most: int, folder: Path, codec: TextCodec, tmp_path: Path
) -> None:
    corpus = Counting([Source(str(folder))], Splitting("text", *percents))
    counts = text_corpus.hold_out(tmp_path, corpus, codec, Recipe(1000), 4)
    assert [counts["val"], counts["test"]] == [4 * (percent > 0) for percent in percents]
    assert corpus.num_read <= most  # of 140


@pytest.mark.parametrize(("name", "most"), [("BPE_DOCUMENTS", 8), ("BPE_CHARACTERS", 8 * 60)])
def test_a_tokenizer_is_learned_from_a_part_of_the_corpus(
    name: str, most: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_corpus, name, most)
    corpus = Counting([Source(str(folder))], Splitting("text", 0, 0))
    assert text_corpus.learn_codec(corpus, 262).vocabulary.size == 262
    assert 5 < corpus.num_read < 20


def data_with_ids(batches: Iterable[Batch]) -> Iterator[Batch]:
    for batch in batches:
        yield {**batch, "document_ids": torch.ones_like(batch["token_ids"])}


# With processes.


def of_ranks(make: Callable[[], TextCorpus], size: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[StreamLoader]:
    """The loaders of several processes, one after the other."""
    for rank in range(size):
        monkeypatch.setattr(text_corpus, "rank_and_size", lambda rank=rank: (rank, size))
        yield make().stream(None, passes=1)


@pytest.mark.parametrize(("size", "num_workers"), [(1, 0), (2, 1), (3, 2)])
def test_processes_and_workers_read_every_document_once(
    size: int,
    num_workers: int,
    module: Callable[..., TextCorpus],
    codec: TextCodec,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make = partial(module, num_workers=num_workers, layout="packed")
    expected = training_texts(make().corpus, make().codec)
    found = Counter(texts(chain.from_iterable(of_ranks(make, size, monkeypatch))))
    assert found == expected and found.total() > 100


def test_workers_share_the_shards_of_a_hub_dataset(module: Callable[..., TextCorpus], tmp_path: Path) -> None:
    for shard in range(3):
        pq.write_table(pa.table({"text": [f"text {shard}, {i}" for i in range(30)]}), tmp_path / f"{shard}.parquet")
    sources = [Source(hub="parquet", data_files=[f"{tmp_path}/*.parquet"])]
    found = []
    for num_workers in (0, 2):
        stream = module(sources=sources, num_workers=num_workers, vocab_size=262).stream(None, passes=1)
        found.append(sorted(tuple(origin) for batch in stream for origin in batch["origins"].tolist()))
    assert found[0] == found[1] and len(found[0]) > 70


def process(rank: int, root: Path, make: Callable[[], TextCorpus], results: Any) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{root}/store", rank=rank, world_size=2)
    stream = make().stream(10)
    batches, states = [], []
    for _ in range(2):
        for batch in stream:
            batches.append(batch["token_ids"])
            states.append(stream.state_dict())
    is_same = []
    for stop in (3, 10, 14):
        again = make().stream(10)
        again.load_state_dict(states[stop - 1])
        rest = [batch["token_ids"] for batch in chain(again, again)]
        compared = zip(rest, batches[stop:], strict=False)
        is_same.append(all(torch.equal(one, other) for one, other in compared) and len(rest) >= 10)
    rows = [tuple(row) for batch in batches[:4] for row in batch.tolist() if row[0] == 1]
    results.put((rank, is_same, rows))
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_go_on_exactly_each_with_its_own_lanes(module: Callable[..., TextCorpus], tmp_path: Path) -> None:
    module().prepare_data()
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    make = partial(module, num_workers=2)
    children = [context.Process(target=process, args=(rank, tmp_path, make, results)) for rank in range(2)]
    for child in children:
        child.start()
    found = dict((rank, rest) for rank, *rest in (results.get(timeout=120) for _ in children))
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    assert found[0][0] == found[1][0] == [True, True, True]
    assert found[0][1] and found[1][1] and not set(found[0][1]) & set(found[1][1])

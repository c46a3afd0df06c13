"""A corpus read on the fly, in lanes: one for each worker of each process, together every document once in a pass.

What a lane gives next is a function of the seed and of its `LaneState`, a few integers that travel with every batch.
So a run that goes on from a checkpoint sees the batches that it would have seen.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from crocodil.data.build import CHUNK_CHARACTERS, Recipe, tokenize
from crocodil.data.codec import TextCodec
from crocodil.data.corpora import SkipCount
from crocodil.data.rows import RowFormat, cut, grouped_order, pack
from crocodil.data.sources import Corpus, Document
from crocodil.data.tokens import flat
from crocodil.ranks import rank_and_size

EMPTY_PASSES = 8
"""Passes without anything to train on after which a lane gives up; of few shards each pass gives it others."""


@dataclass(frozen=True)
class Cursor:
    """How far a lane has read a pool of shards.

    Args:
        passes: times it was read to the end.
        shard: shards of this pass that were read to the end.
        record: records of the next shard that were read.
    """

    passes: int = 0
    shard: int = 0
    record: int = 0


@dataclass(frozen=True)
class LaneState:
    """Where a lane stands: before the first row of a chunk of documents, and how many rows of it were given.

    Args:
        cursors: of the pools, before the chunk.
        drawn: draws of a pool before the chunk.
        rows: rows of the chunk that were given.
        begun: rows before the chunk that belong to a batch the chunk is to complete.
    """

    cursors: tuple[Cursor, ...]
    drawn: int = 0
    rows: int = 0
    begun: int = 0

    def to_plain(self) -> dict[str, Any]:
        """Integers and lists, fit for a checkpoint."""
        return {**asdict(self), "cursors": [list(asdict(cursor).values()) for cursor in self.cursors]}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "LaneState":
        """The inverse of `to_plain`."""
        return cls(**{**plain, "cursors": tuple(Cursor(*numbers) for numbers in plain["cursors"])})


@dataclass(frozen=True)
class Row:
    """Token ids of one text or several, and where the first is from."""

    texts: list[np.ndarray]
    origin: tuple[int, int]


class Lane:
    """One of several readers that share a corpus.

    It reads pools of shards: one that holds the whole corpus, or one for each source where sources have weights, which
    are their shares of the documents.

    Args:
        corpus: all of it.
        codec: of the tokens.
        recipe: which documents are read; `near_duplicates` is not looked at.
        row_format: of the rows.
        batch_size: rows of a batch.
        number: of this lane, from 0 on.
        num_lanes: of all.
        seed: of the order.
        shuffle_buffer: documents that are read at a time and whose rows are put in random order.
        passes: after which the lane ends; None for none.
    """

    def __init__(
        self,
        corpus: Corpus,
        codec: TextCodec,
        recipe: Recipe,
        row_format: RowFormat,
        batch_size: int,
        number: int,
        num_lanes: int,
        seed: int,
        shuffle_buffer: int,
        passes: int | None,
    ) -> None:
        self.corpus, self.codec, self.recipe, self.row_format = corpus, codec, recipe, row_format
        self.batch_size, self.number, self.num_lanes, self.seed = batch_size, number, num_lanes, seed
        self.shuffle_buffer, self.passes = shuffle_buffer, passes
        self.skipped = SkipCount()
        weights = [source.weight for source in corpus.sources if source.weight is not None]
        sources = range(len(corpus.sources))
        self.pools = [corpus.shards_of(source) for source in sources] if weights else [list(range(len(corpus.shards)))]
        self.shares = np.array(weights or [1.0]) / sum(weights or [1.0])

    def start(self) -> LaneState:
        """Before the first document."""
        return LaneState((Cursor(),) * len(self.pools))

    def batches(self, state: LaneState) -> Iterator[tuple[dict[str, Tensor], LaneState]]:
        """Batches from a state on, each with the state behind it."""
        pending: list[Row] = []
        behind = state
        for row, behind in self.rows(state):
            pending.append(row)
            if len(pending) == self.batch_size:
                yield self._batch(pending), behind
                pending = []
        if pending:
            yield self._batch(pending), behind

    def _batch(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        batch = self.row_format.collate([row.texts for row in rows])
        return {**batch, "origins": torch.tensor([row.origin for row in rows], dtype=torch.int64)}

    def rows(self, state: LaneState) -> Iterator[tuple[Row, LaneState]]:
        """Rows from a state on, each with the state behind it."""
        read = self._documents(state)
        last_row = state.cursors
        while True:
            documents, behind = self._take(read, state)
            if not documents:
                return
            rows = self._chunk(documents, state)
            for given, row in enumerate(rows[state.rows :], state.rows + 1):
                yield row, replace(state, rows=given)
            if rows:
                last_row = behind.cursors
            elif self.passes is None:
                self._check_progress(last_row, behind.cursors)
            state = replace(behind, begun=(state.begun + len(rows)) % self.batch_size)

    def _take(self, read: Iterator[tuple[Document, LaneState]], state: LaneState) -> tuple[list[Document], LaneState]:
        """The documents of the next chunk, and the state behind it."""
        documents, behind, size = [], state, 0
        for document, after in read:
            documents.append(document)
            behind = after
            size += len(document.text)
            if len(documents) == self.shuffle_buffer or size >= CHUNK_CHARACTERS:
                break
        return documents, behind

    def _check_progress(self, before: Sequence[Cursor], now: Sequence[Cursor]) -> None:
        passes = [n.passes - b.passes for b, n, share in zip(before, now, self.shares, strict=True) if share > 0]
        if min(passes) > EMPTY_PASSES:
            raise ValueError(self._nothing("that has the length asked for (min_tokens, max_tokens)"))

    def _nothing(self, what: str) -> str:
        return (
            f"the stream must have a training document {what} for each of {self.num_lanes} lanes (processes times "
            f"workers), got none for lane {self.number + 1} in {EMPTY_PASSES} passes (left out: {self.skipped}): "
            "give more files, or fewer num_workers."
        )

    def _chunk(self, documents: Sequence[Document], state: LaneState) -> list[Row]:
        """The rows of a chunk in the order in which they are given: a function of the documents and the state."""
        kept, ids = tokenize(documents, self.codec, self.recipe, self.skipped)
        generator = np.random.default_rng((self.seed, self.number, state.drawn))
        tokens, lengths = flat(ids, self.codec.vocabulary.size)
        pieces = cut(lengths, self.row_format.length)
        pieces = pieces[generator.permutation(len(pieces))]
        texts = [tokens[start : start + length] for start, length, _ in pieces.tolist()]
        origins = [(kept[document].shard, kept[document].record) for document in pieces[:, 2].tolist()]
        if self.row_format.layout == "packed":
            packed = pack(pieces[:, 1], self.row_format.length)
            shuffled = (packed[row] for row in generator.permutation(len(packed)))
            return [Row([texts[i] for i in row], origins[row[0]]) for row in shuffled]
        rows = [Row([text], origin) for text, origin in zip(texts, origins, strict=True)]
        if self.row_format.layout == "grouped":
            first = (-state.begun) % self.batch_size
            rows = [rows[i] for i in grouped_order(pieces[:, 1], self.batch_size, generator, min(first, len(rows)))]
        return rows

    def _documents(self, state: LaneState) -> Iterator[tuple[Document, LaneState]]:
        """Training documents from a state on, each with the state behind it."""
        pools = [self._pool(number, cursor) for number, cursor in enumerate(state.cursors)]
        cursors, is_open = list(state.cursors), self.shares > 0
        for drawn in count(state.drawn):
            if not is_open.any():
                return
            chosen = self._draw(drawn)
            if (found := next(pools[chosen], None)) is None:
                is_open[chosen] = False
                continue
            document, cursors[chosen] = found
            yield document, LaneState(tuple(cursors), drawn + 1)

    def _draw(self, number: int) -> int:
        if len(self.pools) == 1:
            return 0
        point = np.random.default_rng((self.seed, self.number, number, 1)).random()
        ends = self.shares.cumsum()
        return int(np.searchsorted(ends / ends[-1], point, "right"))

    def _pool(self, pool: int, cursor: Cursor) -> Iterator[tuple[Document, Cursor]]:
        """This lane's training documents of one pool, pass after pass."""
        shards, num_empty = self.pools[pool], 0
        while self.passes is None or cursor.passes < self.passes:
            order = np.random.default_rng((self.seed, pool, cursor.passes)).permutation(shards).tolist()
            whole = len(order) >= self.num_lanes  # else every lane reads all shards, and takes its part of the records
            mine = order[self.number :: self.num_lanes] if whole else order
            num_empty = num_empty + 1 if cursor == Cursor(cursor.passes) else 0
            for place in range(cursor.shard, len(mine)):
                start = cursor.record if place == cursor.shard else 0
                for document in self.corpus.documents(mine[place], self.skipped, start):
                    if document.split == "train" and (whole or document.record % self.num_lanes == self.number):
                        num_empty = 0
                        yield document, Cursor(cursor.passes, place, document.record + 1)
            if num_empty == EMPTY_PASSES and self.passes is None:
                raise ValueError(self._nothing("in each of its sources"))
            cursor = Cursor(cursor.passes + 1)


Item = tuple[int, dict[str, Any], dict[str, int], dict[str, Tensor]]
"""The lane of a batch, its state behind the batch, what it has left out so far, and the batch."""


class TokenStream(IterableDataset[Item]):
    """The lanes of one process as a dataset: each of its workers reads one.

    Args:
        lanes: one for each worker, or one.
    """

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self.lanes = lanes
        self.states = [lane.start() for lane in lanes]
        self.first = 0
        """The lane of the next batch; the others follow in turn."""

    def __iter__(self) -> Iterator[Item]:
        worker = get_worker_info()
        number = (self.first + (0 if worker is None else worker.id)) % len(self.lanes)
        lane = self.lanes[number]
        for batch, state in lane.batches(self.states[number]):
            yield number, state.to_plain(), asdict(lane.skipped), batch


class StreamLoader(DataLoader[Any]):
    """Batches of a `TokenStream`, lane by lane in turn; Lightning keeps its state in every checkpoint.

    The Trainer is told of epochs of `batches_per_epoch`; the stream runs on from one to the next.

    Args:
        stream: of this process.
        batches_per_epoch: see above; None for one iteration to the end of a stream that ends.
        options: of `DataLoader`.
    """

    def __init__(self, stream: TokenStream, batches_per_epoch: int | None, **options: Any) -> None:
        super().__init__(stream, batch_size=None, **options)
        self.stream, self.batches_per_epoch = stream, batches_per_epoch
        self._given = self._begin_at = 0
        self._skipped: dict[int, dict[str, int]] = {}

    def __len__(self) -> int:
        if self.batches_per_epoch is None:
            raise TypeError("a stream that ends has no known length")
        return self.batches_per_epoch

    @property
    def skipped(self) -> SkipCount:
        """What this process has left out since it began to iterate."""
        total = SkipCount()
        for counts in self._skipped.values():
            total.add(SkipCount(**counts))
        return total

    def state_dict(self) -> dict[str, Any]:
        """Batches given in this epoch, and the lanes of all processes; all processes must call this."""
        mine = {"first": self.stream.first, "lanes": [state.to_plain() for state in self.stream.states]}
        size = rank_and_size()[1]
        everyone: list[Any] = [mine] * size
        if size > 1:
            distributed.all_gather_object(everyone, mine)
        return {"given": self._given, "processes": everyone}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there, if the processes and workers are as many as then; else from the next pass on.

        Args:
            state: of `state_dict`.
        """
        rank, size = rank_and_size()
        processes = state["processes"]
        self._given = state["given"]
        self._begin_at = 0 if self._given == self.batches_per_epoch else self._given
        if len(processes) != size or len(processes[0]["lanes"]) != len(self.stream.lanes):
            warnings.warn(
                f"the stream was read by {len(processes)} processes in {len(processes[0]['lanes'])} lanes each, now by "
                f"{size} in {len(self.stream.lanes)}: it cannot go on exactly, and begins its next pass",
                stacklevel=2,
            )
            lanes = [lane for process in processes for lane in process["lanes"]]
            passes = 1 + max(cursor[0] for lane in lanes for cursor in lane["cursors"])
            fresh = [lane.start() for lane in self.stream.lanes]
            cursors = (Cursor(passes),) * len(fresh[0].cursors)
            self.stream.states = [replace(lane, cursors=cursors) for lane in fresh]
            return
        self.stream.first = processes[rank]["first"]
        self.stream.states = [LaneState.from_plain(plain) for plain in processes[rank]["lanes"]]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:  # type: ignore[override]
        self._given, self._begin_at = self._begin_at, 0
        for number, state, skipped, batch in super().__iter__():
            self.stream.states[number] = LaneState.from_plain(state)
            self.stream.first = (number + 1) % len(self.stream.lanes)
            self._skipped[number] = skipped
            self._given += 1
            yield batch
            if self._given == self.batches_per_epoch:
                return

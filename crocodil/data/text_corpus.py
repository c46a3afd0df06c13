"""A LightningDataModule of plain text from any sources, memory-mapped or streamed."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader

from crocodil.data.block_datamodule import NAMES_FILE, BlockDataModule, require_at_least
from crocodil.data.build import Recipe, build, tokenize
from crocodil.data.cache import write_whole
from crocodil.data.codec import BOS_ID, EOS_ID, MASK_ID, MIN_BPE_SIZE, TextCodec, byte_level_bpe
from crocodil.data.corpora import SkipCount, SourceFile, Split
from crocodil.data.rows import Layout, cut
from crocodil.data.sources import Corpus, Document, Source, Splitting
from crocodil.data.token_stream import Lane, StreamLoader, TokenStream
from crocodil.data.tokens import TokenDataset, flat, tokens_file, write_split
from crocodil.data.vocabulary import Vocabulary
from crocodil.ranks import rank_and_size

BPE_DOCUMENTS = 100_000
"""Training documents from which a tokenizer is learned at most."""
BPE_CHARACTERS = 2**28
"""And their characters, about: they are held in memory."""


class TextCorpus(BlockDataModule):
    """Documents of one source or many: BOS, the tokens, EOS; what is longer than a row is cut into several.

    Equal documents are kept once, in a held-out split if one of them is there. A streamed corpus is not stored: the
    training split is read on the fly, in an order of its own, without end and with equal documents as they come.

    Args:
        length: tokens in a row at most.
        batch_size: rows in a batch.
        sources: where the text is from, see `Source`; a string is one local file or folder; None is the standard
            library of this Python.
        streaming: read the training split on the fly instead of from a cache.
        tokenizer: folder or hub id of a published checkpoint whose tokenizer is used instead of learning one.
        family: of that checkpoint; None tells it from its `config.json`.
        vocab_size: token types of a learned byte-level BPE, special ones included, at least 260; it is learned from
            the training split alone, from 100,000 documents at most.
        min_tokens: documents with fewer tokens, BOS and EOS counted, are left out.
        max_tokens: documents with more tokens are left out; None for no limit.
        near_duplicates: estimated Jaccard similarity of shingles (MinHash) from which on a document counts as a copy
            and is left out; None keeps all that are not equal. Not for streams.
        split_by: what decides the split of a document, see `Splitting`.
        val_percent: share of documents held out for validation, in [0, 100].
        test_percent: share of documents held out for tests, likewise.
        held_out_documents: validation and test documents of a stream; the first ones found are kept, the others go
            unused.
        shuffle_buffer: documents of a stream that are read, and whose rows are put in random order, at a time; fewer
            where they are long (`CHUNK_CHARACTERS`).
        batches_per_epoch: what the Trainer is told is an epoch of a stream.
        cache_dir: folder of prepared corpora; None for `$XDG_CACHE_HOME/crocodil` or `~/.cache/crocodil`.
        num_workers: processes that read batches.
        seed: seed of the shuffle.
        layout: of the training batches, see `RowFormat`.
        hide_padding: see `RowFormat`.
        latents: folder of `crocodil encode`; see `BlockDataModule`.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        length: int = 64,
        batch_size: int = 64,
        sources: list[Source] | str | None = None,
        streaming: bool = False,
        tokenizer: str | None = None,
        family: str | None = None,
        vocab_size: int = 2048,
        min_tokens: int = 3,
        max_tokens: int | None = None,
        near_duplicates: float | None = None,
        split_by: str = "text",
        val_percent: float = 5.0,
        test_percent: float = 5.0,
        held_out_documents: int = 2000,
        shuffle_buffer: int = 2048,
        batches_per_epoch: int = 1000,
        cache_dir: str | None = None,
        num_workers: int = 0,
        seed: int = 0,
        layout: Layout = "padded",
        hide_padding: bool = False,
        latents: str | None = None,
    ) -> None:
        require_at_least("vocab_size", vocab_size, MIN_BPE_SIZE)
        self.vocab_size = vocab_size
        self.published = None if tokenizer is None else TextCodec.published(tokenizer, family)
        super().__init__(length, batch_size, cache_dir, num_workers, seed, layout, hide_padding, latents)
        for name, value in (("shuffle_buffer", shuffle_buffer), ("batches_per_epoch", batches_per_epoch)):
            require_at_least(name, value, 1)
        if streaming and near_duplicates is not None:
            raise ValueError(
                "near_duplicates needs to see the whole corpus: set streaming=false, or stream deduplicated data."
            )
        if streaming and latents is not None:
            raise ValueError("stored latents are of a stored corpus: set streaming=false.")
        if val_percent < 0 or test_percent < 0 or val_percent + test_percent >= 100:
            raise ValueError(
                f"val_percent and test_percent must leave a rest of 100, got {val_percent}, {test_percent}."
            )
        if sources is None or isinstance(sources, str):
            sources = [Source(path=sources)]
        if len({source.weight is None for source in sources}) != 1:
            raise ValueError("give a weight to every source or to none, and at least one source.")
        if all(source.weight == 0 for source in sources):
            raise ValueError("at least one source must have a weight above 0, got none.")
        self.sources = sources
        self.streaming = streaming
        self.recipe = Recipe(length, min_tokens, max_tokens, near_duplicates)
        self.splitting = Splitting(split_by, val_percent, test_percent)
        self.held_out_documents = held_out_documents
        self.shuffle_buffer = shuffle_buffer
        self.batches_per_epoch = batches_per_epoch
        self._stream: StreamLoader | None = None
        self._stream_state: dict[str, Any] | None = None

    @property
    def vocabulary(self) -> Vocabulary:
        """That of the published tokenizer, or the size as asked for and the special ids that all of ours share."""
        if self.published is not None:
            return self.published.vocabulary
        return Vocabulary(self.vocab_size, EOS_ID, BOS_ID, EOS_ID, MASK_ID)

    @cached_property
    def codec(self) -> TextCodec:  # type: ignore[override]
        """The published tokenizer, or the byte-level BPE of this corpus."""
        return self.published or TextCodec.from_pretrained(self._prepared_folder() / "codec")

    @cached_property
    def corpus(self) -> Corpus:
        """All documents; opened on first use."""
        return Corpus(self.sources, self.splitting)

    def _configuration(self) -> dict[str, Any]:
        codec = {"vocab_size": self.vocab_size} if self.published is None else self.published.to_state()
        held_out = {"held_out_documents": self.held_out_documents} if self.streaming else {}
        sources = [{**asdict(source), "weight": None} for source in self.sources]
        return {"sources": sources, **asdict(self.recipe), **asdict(self.splitting), **held_out, **codec}

    def _source_files(self) -> list[SourceFile]:
        return [file for source in self.sources for file in source.files()]

    def _build(self, folder: Path, aside: Path, files: Sequence[SourceFile]) -> dict[str, int | str]:
        codec = self.published or self._learned_codec(aside)
        codec.save_pretrained(folder / "codec")
        (folder / NAMES_FILE).write_text(json.dumps(self.corpus.names))
        if self.streaming:
            return hold_out(folder, self.corpus, codec, self.recipe, self.held_out_documents)
        return build(folder, aside, self.corpus, codec, self.recipe)

    def _learned_codec(self, aside: Path) -> TextCodec:
        """Learned once, even if a kill comes in between: finished parts hold tokens of this one."""
        path = aside / "codec"
        if not path.is_dir():
            write_whole(path, learn_codec(self.corpus, self.vocab_size).save_pretrained)
        return TextCodec.from_pretrained(path)

    def _weights(self) -> list[float] | None:
        weights = [source.weight for source in self.sources if source.weight is not None]
        return weights or None

    def prepare_data(self) -> None:
        """See `BlockDataModule`; of a stream only the tokenizer and the held-out splits are prepared."""
        if self.streaming:
            self._prepared_folder()
        else:
            super().prepare_data()

    def dataset(self, split: Split) -> TokenDataset:
        """See `BlockDataModule`; the training split of a stream is not stored.

        Raises:
            ValueError: if it is asked for nevertheless.
        """
        if self.streaming and split == "train":
            raise ValueError("the training split of a stream is not stored: set streaming=false to look at it.")
        return super().dataset(split)

    def setup(self, stage: str | None = None) -> None:
        """See `BlockDataModule`."""
        if self.streaming and stage in ("fit", None):
            stage = "validate"
        super().setup(stage)

    def train_dataloader(self) -> DataLoader[Any]:
        """See `BlockDataModule`; batches of a stream carry the place up to which it was read."""
        if not self.streaming:
            return super().train_dataloader()
        self._stream = self.stream(self.batches_per_epoch)
        if self._stream_state is not None:
            self._stream.load_state_dict(self._stream_state)
        return self._stream

    def state_dict(self) -> dict[str, Any]:
        """How far a stream was read; of the state of a loader the Trainer makes nothing between two epochs."""
        return {} if self._stream is None else {"stream": self._stream.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lets the next stream go on from there.

        Args:
            state_dict: of `state_dict`.
        """
        self._stream_state = state_dict.get("stream")

    def stream(self, batches_per_epoch: int | None = None, passes: int | None = None) -> StreamLoader:
        """The training documents of this process, on the fly.

        Args:
            batches_per_epoch: batches of one iteration; None for all of a stream that ends.
            passes: times that every document comes; None for no end.
        """
        rank, size = rank_and_size()
        workers = max(1, self.num_workers)
        lanes = [
            Lane(
                self.corpus,
                self.codec,
                self.recipe,
                self.row_format,
                self.batch_size,
                number=rank * workers + worker,
                num_lanes=size * workers,
                seed=self.seed,
                shuffle_buffer=self.shuffle_buffer,
                passes=passes,
            )
            for worker in range(workers)
        ]
        return StreamLoader(
            TokenStream(lanes), batches_per_epoch, num_workers=self.num_workers, pin_memory=torch.cuda.is_available()
        )

    def teardown(self, stage: str) -> None:
        """Tells what a stream has left out."""
        if self._stream is not None and self._stream.skipped.total:
            rank_zero_info(f"{type(self).__name__}: left out of the stream on this process: {self._stream.skipped}.")


def learn_codec(corpus: Corpus, vocab_size: int) -> TextCodec:
    """A byte-level BPE of the training documents, from shards anywhere in the corpus, up to `BPE_DOCUMENTS` of them or
    `BPE_CHARACTERS`.

    Args:
        corpus: to learn from.
        vocab_size: token types.

    Raises:
        ValueError: if there is too little text.
    """
    texts, size = [], 0
    for document in islice(_training_documents(corpus), BPE_DOCUMENTS):
        texts.append(document.text)
        size += len(document.text)
        if size >= BPE_CHARACTERS:
            break
    codec = byte_level_bpe(texts, vocab_size)
    if codec.vocabulary.size < vocab_size:
        raise ValueError(
            f"the training files must hold enough text for vocab_size {vocab_size}, got {len(texts)} documents that "
            f"give {codec.vocabulary.size}: give more files or a smaller vocab_size."
        )
    return codec


def _training_documents(corpus: Corpus) -> Iterator[Document]:
    order = np.random.default_rng(0).permutation(len(corpus.shards)).tolist()
    documents = chain.from_iterable(corpus.documents(shard, SkipCount()) for shard in order)
    return (document for document in documents if document.split == "train")


def hold_out(
    folder: Path, corpus: Corpus, codec: TextCodec, recipe: Recipe, num_documents: int
) -> dict[str, int | str]:
    """Writes the first validation and test documents that a fixed order of the shards has.

    Args:
        folder: where the splits go.
        corpus: to be read.
        codec: of the tokens.
        recipe: which documents are kept, and how they are cut.
        num_documents: of each split; a corpus may have fewer.

    Returns:
        Counts to report.
    """
    wanted: dict[Split, dict[str, Document]] = {"val": {}, "test": {}}
    percents = {"val": corpus.splitting.val_percent, "test": corpus.splitting.test_percent}
    skipped = SkipCount()
    order = np.random.default_rng(1).permutation(len(corpus.shards)).tolist()
    for document in chain.from_iterable(corpus.documents(shard, skipped) for shard in order):
        if document.split != "train" and len(wanted[document.split]) < num_documents:
            wanted[document.split].setdefault(document.text, document)
        if all(len(found) == num_documents for split, found in wanted.items() if percents[split]):
            break
    counts: dict[str, int | str] = {"shards": len(corpus.names)}
    for split, found in wanted.items():
        documents, rows = tokenize(list(found.values()), codec, recipe, skipped)
        tokens, lengths = flat(rows, codec.vocabulary.size)
        np.save(tokens_file(folder, split), tokens)
        pieces = cut(lengths, recipe.length)
        origins = np.array([(d.shard, d.record) for d in documents]).reshape(-1, 2)[pieces[:, 2]]
        write_split(folder, split, pieces[:, :2], origins, (0, len(pieces)))
        counts[split] = len(pieces)
    return {**counts, "train": "streamed", "left out": str(skipped)}

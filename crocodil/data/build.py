"""A corpus of any size to memory-mapped token ids: read and tokenised part by part, so that a kill costs one part."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import get_args

import numpy as np

from crocodil.data.cache import write_whole
from crocodil.data.codec import TextCodec
from crocodil.data.corpora import HELD_OUT_FIRST, SkipCount, Split, with_progress
from crocodil.data.near_duplicates import check_threshold, is_near_duplicate
from crocodil.data.rows import cut
from crocodil.data.sources import Corpus, Document
from crocodil.data.tokens import flat, token_dtype, tokens_file, write_split

PART_BYTES = 2**24
CHUNK, CHUNK_CHARACTERS = 512, 2**22
"""Documents, and about how many characters, that are tokenised at a time: memory stays flat however long they are."""
SPLITS: tuple[Split, ...] = get_args(Split)
SKIPPED_FILE = "skipped.json"


@dataclass(frozen=True)
class Recipe:
    """What becomes of the texts.

    Args:
        length: tokens of a piece at most.
        min_tokens: shorter documents are left out, BOS and EOS counted.
        max_tokens: longer ones are left out; None for no limit.
        near_duplicates: estimated Jaccard similarity from which on a document counts as a copy; None keeps all that are
            not equal.

    Raises:
        ValueError: if near duplicates are to be found, but cannot be.
    """

    length: int
    min_tokens: int = 2
    max_tokens: int | None = None
    near_duplicates: float | None = None

    def __post_init__(self) -> None:
        if self.near_duplicates is not None:
            check_threshold(self.near_duplicates)


def build(folder: Path, aside: Path, corpus: Corpus, codec: TextCodec, recipe: Recipe) -> dict[str, int | str]:
    """Writes the three splits of a corpus into a folder; equal texts are kept once, in a held-out split if any.

    Args:
        folder: where the splits go.
        aside: folder of the parts, which are taken up again by the next call if this one is killed.
        corpus: to be read.
        codec: of the tokens.
        recipe: which documents are kept, and how they are cut.

    Returns:
        Counts to report.
    """
    parts = _parts(corpus)
    done = [aside / f"{number:06d}" for number in range(len(parts))]
    for path, shards in with_progress(len(parts), zip(done, parts, strict=True), "Tokenising"):
        if not path.is_dir():
            write = partial(_write_part, corpus=corpus, shards=shards, codec=codec, recipe=recipe)
            write_whole(path, write)
    return _merge(folder, corpus, done, codec.vocabulary.size, recipe)


def _parts(corpus: Corpus) -> list[list[int]]:
    """Consecutive shards of one source, together of `PART_BYTES` or one large shard."""
    parts: list[list[int]] = []
    filled, source_before = 0, -1
    for shard, ((source, _), size) in enumerate(zip(corpus.shards, corpus.sizes, strict=True)):
        if source != source_before or filled + size > PART_BYTES:
            parts.append([])
            filled, source_before = 0, source
        parts[-1].append(shard)
        filled += size
    return parts


def _write_part(folder: Path, corpus: Corpus, shards: Sequence[int], codec: TextCodec, recipe: Recipe) -> None:
    skipped = SkipCount()
    found = (document for shard in shards for document in corpus.documents(shard, skipped))
    texts: list[np.ndarray] = []
    lengths: list[np.ndarray] = []
    kept: list[tuple[int, int, int, int]] = []
    for chunk in chunks(found):
        chunk, rows = tokenize(chunk, codec, recipe, skipped)
        tokens, sizes = flat(rows, codec.vocabulary.size)
        texts.append(tokens)
        lengths.append(sizes)
        kept += [(text_hash(d.text), SPLITS.index(d.split), d.shard, d.record) for d in chunk]
    np.save(folder / "tokens.npy", np.concatenate(texts or [np.empty(0, token_dtype(codec.vocabulary.size))]))
    np.save(folder / "lengths.npy", np.concatenate(lengths or [np.empty(0, np.int64)]))
    np.save(folder / "kept.npy", np.array(kept, dtype=np.int64).reshape(-1, 4))
    (folder / SKIPPED_FILE).write_text(json.dumps(asdict(skipped)))


def tokenize(
    documents: Sequence[Document], codec: TextCodec, recipe: Recipe, skipped: SkipCount
) -> tuple[list[Document], list[list[int]]]:
    """BOS, tokens and EOS of the documents that are neither too short nor too long.

    Args:
        documents: in a fixed order.
        codec: of the tokens.
        recipe: the limits.
        skipped: what is left out is counted here.

    Returns:
        The documents that are left, and their token ids.
    """
    vocabulary = codec.vocabulary
    kept, rows = [], []
    for document, ids in zip(documents, codec.encode_batch([d.text for d in documents]), strict=True):
        row = [vocabulary.bos_token_id, *ids, vocabulary.eos_token_id]
        if len(row) < recipe.min_tokens:
            skipped.too_few_tokens += 1
        elif recipe.max_tokens is not None and len(row) > recipe.max_tokens:
            skipped.too_many_tokens += 1
        else:
            kept.append(document)
            rows.append(row)
    return kept, rows


def text_hash(text: str) -> int:
    """64 bits of a text, as a signed integer."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big", signed=True)


@dataclass(frozen=True)
class _Parts:
    """What the parts hold together: (N, 4) documents, (N,) tokens of each, and (P + 1,) where each part begins."""

    paths: Sequence[Path]
    kept: np.ndarray
    lengths: np.ndarray
    bounds: np.ndarray

    @classmethod
    def open(cls, paths: Sequence[Path]) -> "_Parts":
        lengths = [np.load(path / "lengths.npy") for path in paths]
        kept = np.concatenate([np.load(path / "kept.npy") for path in paths])
        return cls(paths, kept, np.concatenate(lengths), np.cumsum([0, *map(len, lengths)]))

    def tokens(self, number: int) -> np.ndarray:
        return np.load(self.paths[number] / "tokens.npy", mmap_mode="r")

    def texts(self, order: np.ndarray) -> Iterator[np.ndarray]:
        """Token ids of documents in any order that seldom changes the part."""
        ends = np.concatenate([[0], np.cumsum(self.lengths)])
        part_of = np.searchsorted(self.bounds, order, "right") - 1
        opened, tokens = -1, np.empty(0)
        for document, part in zip(order.tolist(), part_of.tolist(), strict=True):
            if part != opened:
                opened, tokens = part, self.tokens(part)
            start = ends[document] - ends[self.bounds[part]]
            yield np.asarray(tokens[start : start + self.lengths[document]])

    def copy(self, path: Path, mine: np.ndarray, dtype: np.dtype) -> None:
        """Writes the tokens of some documents (N,) bool as one file; memory holds one part of them."""
        shape = (int(self.lengths[mine].sum()),)
        target = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        end = 0
        for part, (first, last) in enumerate(pairwise(self.bounds.tolist())):
            tokens = self.tokens(part)[np.repeat(mine[first:last], self.lengths[first:last])]
            target[end : end + len(tokens)] = tokens
            end += len(tokens)
        target.flush()


def _merge(
    folder: Path, corpus: Corpus, paths: Sequence[Path], vocab_size: int, recipe: Recipe
) -> dict[str, int | str]:
    parts = _Parts.open(paths)
    split = parts.kept[:, 1]
    order = np.argsort(np.array([HELD_OUT_FIRST.index(name) for name in SPLITS])[split], kind="stable")
    is_first = np.zeros(len(split), dtype=bool)
    is_first[order[np.unique(parts.kept[order, 0], return_index=True)[1]]] = True
    counts: dict[str, int | str] = {"files": len(corpus.names), "documents": len(split)}
    counts["duplicates"] = int((~is_first).sum())
    chosen = is_first.copy()
    if recipe.near_duplicates is not None:
        distinct = order[is_first[order]]
        chosen[distinct[is_near_duplicate(parts.texts(distinct), recipe.near_duplicates)]] = False
        counts["near duplicates"] = int((is_first & ~chosen).sum())
    source_of = np.array([source for source, _ in corpus.shards])
    for number, name in enumerate(SPLITS):
        mine = chosen & (split == number)
        pieces = cut(parts.lengths[mine], recipe.length)
        origins = parts.kept[mine][pieces[:, 2], 2:]
        bounds = np.searchsorted(source_of[origins[:, 0]], np.arange(len(corpus.sources) + 1))
        parts.copy(tokens_file(folder, name), mine, token_dtype(vocab_size))
        write_split(folder, name, pieces[:, :2], origins, bounds)
        counts[name] = len(pieces)
    skipped = SkipCount()
    for path in paths:
        skipped.add(SkipCount(**json.loads((path / SKIPPED_FILE).read_text())))
    return {**counts, "left out": str(skipped)}


def chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Consecutive documents: `CHUNK` of them, or fewer if these have `CHUNK_CHARACTERS` already."""
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document.text)
        if len(chunk) == CHUNK or size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk

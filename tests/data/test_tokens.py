import pickle
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from crocodil.data.block_datamodule import packed_rows
from crocodil.data.rows import RowFormat, cut
from crocodil.data.tokens import (
    Packs,
    TokenDataset,
    TokenStore,
    flat,
    token_dtype,
    tokens_file,
    write_packs,
    write_split,
)

EOS = 0


def written(folder: Path, texts: list[list[int]], num_of_source: list[int], vocab_size: int = 400) -> TokenStore:
    """A store of texts of at most eight tokens."""
    tokens, lengths = flat(texts, vocab_size)
    np.save(tokens_file(folder, "train"), tokens)
    pieces = cut(lengths, 8)
    assert len(pieces) == len(texts)
    origins = np.stack([np.arange(len(texts)), 100 + np.arange(len(texts))], axis=1)
    write_split(folder, "train", pieces[:, :2], origins, np.cumsum([0, *num_of_source]))
    return TokenStore(folder, "train")


@pytest.fixture
def texts() -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [[1, *generator.integers(4, 400, size).tolist(), EOS] for size in generator.integers(0, 7, 60)]


def test_a_store_gives_back_what_was_written_also_to_another_process(texts: list[list[int]], tmp_path: Path) -> None:
    store = written(tmp_path, texts, [20, 0, 40])
    for reader in (store, pickle.loads(pickle.dumps(store))):
        assert [text.tolist() for text in map(reader.__getitem__, range(len(reader)))] == texts
        assert reader.lengths.tolist() == [len(text) for text in texts]
        assert reader.bounds.tolist() == [0, 20, 20, 60]
        assert reader.origins[7].tolist() == [7, 107]
    assert len(pickle.dumps(store)) < 1000  # the files are mapped, not sent
    padded = store.padded(8, EOS)
    assert padded.dtype == np.int32 and padded.shape == (60, 8)
    assert [row[: len(text)].tolist() for row, text in zip(padded, texts, strict=True)] == texts
    assert all(not row[len(text) :].any() for row, text in zip(padded, texts, strict=True))


def test_an_empty_split_is_a_store_without_texts(tmp_path: Path) -> None:
    store = written(tmp_path, [], [0])
    assert len(store) == 0 and store.padded(8, EOS).shape == (0, 8)
    packs = write_packs(store, packed_rows(store, 8))
    assert len(packs) == 0 and packs.bounds.tolist() == [0, 0]
    assert store.packs is not None and len(store.packs) == 0


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(256, np.uint8), (257, np.uint16), (2**16, np.uint16), (2**16 + 1, np.uint32)]
)
def test_tokens_take_the_fewest_bytes_that_hold_the_vocabulary(vocab_size: int, dtype: type) -> None:
    assert token_dtype(vocab_size) == dtype
    tokens, lengths = flat([[0, vocab_size - 1], [], [3]], vocab_size)
    assert tokens.dtype == dtype and tokens.tolist() == [0, vocab_size - 1, 3] and lengths.tolist() == [2, 0, 1]
    with pytest.raises(OverflowError):
        flat([[np.iinfo(dtype).max + 1]], vocab_size)


def test_texts_of_two_sources_share_no_row(texts: list[list[int]], tmp_path: Path) -> None:
    store = written(tmp_path, texts, [20, 0, 40])
    assert store.packs is None
    rows = packed_rows(store, 16)
    kept = write_packs(store, rows)
    for packs in (kept, store.packs):
        assert isinstance(packs, Packs)
        found = [packs[row] for row in range(len(packs))]
        assert found == [row.tolist() for row in rows]
        assert sorted(chain.from_iterable(found)) == list(range(60))
        assert len({text < 20 for row in found for text in row}) == 2
        assert all(len({text < 20 for text in row}) == 1 for row in found)
        first, second = packs.bounds[1], packs.bounds[2]
        assert packs.bounds.tolist() == [0, first, first, len(found)] and first == second
        assert max(map(max, found[:first])) < 20 <= min(map(min, found[first:]))


def test_packs_are_readable_for_all_who_may_read_the_rest(texts: list[list[int]], tmp_path: Path) -> None:
    write_packs(written(tmp_path, texts, [60]), packed_rows(TokenStore(tmp_path, "train"), 16))
    assert {path.stat().st_mode & 0o044 for path in tmp_path.iterdir()} == {0o044}


@pytest.mark.parametrize("layout", ["padded", "grouped", "packed"])
def test_a_dataset_gives_each_text_once_with_its_origin(layout: str, texts: list[list[int]], tmp_path: Path) -> None:
    store = written(tmp_path, texts, [20, 0, 40])
    packs = write_packs(store, packed_rows(store, 16)) if layout == "packed" else None
    length = 16 if layout == "packed" else 8
    dataset = TokenDataset(store, RowFormat(length, EOS, layout, hide_padding=True), packs)  # type: ignore[arg-type]
    found = []
    for start in range(0, len(dataset), 7):
        indices = list(range(start, min(start + 7, len(dataset))))
        batch = dataset.__getitems__(indices)
        for token_ids, numbers, origin in zip(batch["token_ids"], batch["document_ids"], batch["origins"], strict=True):
            parts = [token_ids[numbers == number].tolist() for number in range(1, int(numbers.max()) + 1)]
            assert texts[origin[0]] == parts[0] and origin[1] == 100 + origin[0]
            found += parts
        assert batch["origins"].dtype == torch.int64
    assert sorted(found) == sorted(texts)
    one, many = dataset[3], dataset.__getitems__([3])
    assert all(torch.equal(one[name], many[name][0]) for name in many)

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crocodil.data.rows import MAX_DOCUMENTS, PACK_WINDOW, RowFormat, cut, grouped_order, pack, windows

LENGTHS = st.lists(st.integers(2, 40), max_size=60).map(lambda values: np.array(values, dtype=np.int64))
few = settings(max_examples=60, deadline=None)


@few
@given(LENGTHS, st.integers(2, 20))
def test_pieces_join_to_the_documents_but_for_end_tokens_that_would_be_alone(lengths: np.ndarray, length: int) -> None:
    pieces = cut(lengths, length)
    starts = np.cumsum(lengths) - lengths
    covered: dict[int, list[int]] = {document: [] for document in range(len(lengths))}
    for start, size, document in pieces.tolist():
        assert 1 <= size <= length
        covered[document] += range(start, start + size)
    assert (np.diff(pieces[:, 0]) > 0).all()
    for document, places in covered.items():
        first, size = int(starts[document]), int(lengths[document])
        is_alone = size % length == 1
        assert places == list(range(first, first + size - is_alone))


def test_all_pieces_of_a_document_but_its_last_are_full() -> None:
    assert cut(np.array([9, 2, 8]), 4).tolist() == [[0, 4, 0], [4, 4, 0], [9, 2, 1], [11, 4, 2], [15, 4, 2]]
    assert cut(np.array([], dtype=np.int64), 4).shape == (0, 3)


@few
@given(st.lists(st.integers(1, 32), max_size=120), st.integers(1, 6))
def test_packs_hold_every_piece_once_and_no_more_than_fits(lengths: list[int], max_documents: int) -> None:
    rows = pack(np.array(lengths, dtype=np.int64), 32, max_documents)
    assert Counter(np.concatenate([*rows, []]).tolist()) == Counter(range(len(lengths)))
    for row in rows:
        assert 1 <= len(row) <= max_documents
        assert sum(lengths[piece] for piece in row) <= 32
        assert row.tolist() == sorted(row.tolist())
    firsts = [int(row[0]) for row in rows]
    assert firsts == sorted(firsts)


def test_pieces_share_rows_within_a_window_alone() -> None:
    lengths = np.random.default_rng(0).integers(1, 65, 2 * PACK_WINDOW + 100)
    rows = pack(lengths, 64)
    assert all(row[0] // PACK_WINDOW == row[-1] // PACK_WINDOW for row in rows)
    assert len(np.unique(np.concatenate(rows))) == len(lengths)


@pytest.mark.parametrize(("draw", "least"), [("uniform", 0.99), ("lognormal", 0.995), ("halves", 0.98), ("pairs", 1.0)])
def test_packed_rows_are_nearly_full(draw: str, least: float) -> None:
    generator = np.random.default_rng(0)
    lengths = {
        "uniform": generator.integers(2, 129, 4000),
        "lognormal": np.clip(generator.lognormal(3.3, 0.8, 4000), 3, 128).astype(int),
        "halves": generator.integers(20, 80, 4000),
        "pairs": np.tile([77, 51], 2000),
    }[draw]
    assert lengths.sum() / (len(pack(lengths, 128)) * 128) >= least


def test_short_pieces_fill_rows_up_to_the_number_of_documents() -> None:
    assert [len(row) for row in pack(np.full(50, 2), 128)] == [MAX_DOCUMENTS] * 3 + [2]


@few
@given(st.lists(st.integers(1, 99), max_size=120), st.integers(1, 9), st.integers(0, 8), st.integers(0, 99))
def test_a_grouped_order_has_batches_of_neighbours_behind_its_first_rows(
    lengths: list[int], batch_size: int, first: int, seed: int
) -> None:
    first = min(first, batch_size - 1)
    sizes = np.array(lengths, dtype=np.int64)
    order = grouped_order(sizes, batch_size, np.random.default_rng(seed), first)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    assert order[:first].tolist() == list(range(min(first, len(lengths))))
    whole = (len(order) - first) // batch_size * batch_size if len(order) > first else 0
    batches = sizes[order[first : first + whole]].reshape(-1, batch_size)
    low, high = batches.min(axis=1), batches.max(axis=1)
    by_length = np.argsort(low + high, kind="stable")
    assert (high[by_length][:-1] <= low[by_length][1:]).all()  # no two batches overlap in length
    rest = sizes[order[first + whole :]]
    assert all(not ((rest > least) & (rest < most)).any() for least, most in zip(low, high, strict=True))


def test_a_grouped_order_mixes_batches_rows_and_what_is_left_over() -> None:
    sizes = np.repeat(np.arange(1, 41), 5)  # 200 rows: 12 batches of 16 and 8 left over
    orders = [grouped_order(sizes, 16, np.random.default_rng(seed)) for seed in range(40)]
    firsts = {int(sizes[order[:16]].min()) for order in orders}
    rests = {int(sizes[order[-8:]].min()) for order in orders}
    assert len(firsts) > 6 and len(rests) > 6  # neither the shortest come first nor the longest are left over
    spreads = np.array([np.ptp(sizes[order[:192]].reshape(-1, 16), axis=1).max() for order in orders])
    assert spreads.max() <= 4  # what is left over was not taken out of the middle of a batch
    inside = np.stack([np.diff(order[:16]) for order in orders])
    assert 0.3 < (inside > 0).mean() < 0.7


def test_grouping_by_length_saves_most_of_the_padding() -> None:
    generator = np.random.default_rng(0)
    sizes = np.clip(generator.lognormal(4, 1, 32 * 64), 3, 512).astype(int)

    def padding(order: np.ndarray) -> float:
        batches = sizes[order].reshape(-1, 32)
        return 1 - batches.sum() / (batches.max(axis=1) * 32).sum()

    assert padding(np.arange(len(sizes))) > 0.7
    assert padding(grouped_order(sizes, 32, generator)) < 0.05


ROWS = st.lists(st.lists(st.integers(1, 10), min_size=1, max_size=4), min_size=1, max_size=5)


@few
@given(ROWS, st.sampled_from(["padded", "grouped", "packed"]), st.booleans())
def test_a_batch_has_all_tokens_in_order_and_numbers_its_texts(rows: list, layout: str, hide_padding: bool) -> None:
    values = iter(range(1, 10_000))
    texts = [[np.array([next(values) for _ in range(size)], np.uint16) for size in row] for row in rows]
    batch = RowFormat(41, 0, layout, hide_padding).collate(texts)
    token_ids = batch["token_ids"]
    assert token_ids.dtype.is_signed and token_ids.element_size() == 8
    longest = max(sum(row) for row in rows)
    assert token_ids.shape == (len(rows), min(41, -(-longest // 8) * 8) if layout == "grouped" else 41)
    assert ("document_ids" in batch) == (hide_padding or layout == "packed")
    for number, row in enumerate(texts):
        joined = np.concatenate(row).tolist()
        assert token_ids[number, : len(joined)].tolist() == joined
        assert not token_ids[number, len(joined) :].any()
        if "document_ids" in batch:
            expected = np.repeat(np.arange(1, len(row) + 1), [len(text) for text in row]).tolist()
            ids = batch["document_ids"][number].tolist()
            assert ids == expected + [0] * (len(ids) - len(expected))


def test_held_out_rows_have_one_text_each() -> None:
    assert RowFormat(8, 5, "packed").held_out() == RowFormat(8, 5, "grouped", hide_padding=True)
    assert RowFormat(8, 5, "grouped").held_out() == RowFormat(8, 5, "grouped")
    with pytest.raises(ValueError, match="layout must be one of padded, grouped, packed, got 'dense'"):
        RowFormat(8, 5, "dense")  # type: ignore[arg-type]


def test_windows_join_to_the_order() -> None:
    parts = list(windows(np.arange(10), 4))
    assert [len(part) for part in parts] == [4, 4, 2]
    assert np.concatenate(parts).tolist() == list(range(10))

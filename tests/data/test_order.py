from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crocodil.data import order as module
from crocodil.data.order import EpochOrder, ResumableLoader, mixture, shares
from crocodil.data.rows import GROUP_BATCHES, RowFormat
from crocodil.data.tokens import TokenDataset, TokenStore, flat, tokens_file, whole_batch, write_split

Made = Callable[..., TokenDataset]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """A dataset of N rows of 2 to 65 tokens; the first tokens of a row tell which it is."""

    def make(sizes: list[int], layout: str = "padded", seed: int = 0) -> TokenDataset:
        num = sum(sizes)
        lengths = np.random.default_rng(seed).integers(2, 66, num)
        tokens, _ = flat([[number] * length for number, length in enumerate(lengths)], 2**16)
        np.save(tokens_file(tmp_path, "train"), tokens)
        pieces = np.stack([np.cumsum(lengths) - lengths, lengths], axis=1)
        write_split(tmp_path, "train", pieces, np.zeros((num, 2)), np.cumsum([0, *sizes]))
        return TokenDataset(TokenStore(tmp_path, "train"), RowFormat(65, 0, layout))  # type: ignore[arg-type]

    return make


@pytest.fixture
def of_ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[int]]]:
    """What each of several processes reads in an epoch."""

    def read(dataset: TokenDataset, size: int, epoch: int = 0, weights: list[float] | None = None) -> list[list[int]]:
        found = []
        for rank in range(size):
            monkeypatch.setattr(module, "rank_and_size", lambda rank=rank: (rank, size))
            order = EpochOrder(dataset, 3, 4, weights)
            order.set_epoch(epoch)
            found.append(list(order))
            assert len(found[-1]) == len(order)
        return found

    return read


@pytest.mark.parametrize("layout", ["padded", "grouped"])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_processes_read_all_rows_once_but_for_a_rest_smaller_than_their_number(
    layout: str, size: int, made: Made, of_ranks: Callable[..., list[list[int]]]
) -> None:
    dataset = made([1003], layout)
    for epoch in range(3):
        read = of_ranks(dataset, size, epoch)
        assert {len(rows) for rows in read} == {1003 // size}
        assert len(set(list(chain.from_iterable(read)))) == 1003 // size * size


def test_n_processes_read_what_one_with_batches_n_times_as_large_would(
    made: Made, of_ranks: Callable[..., list[list[int]]]
) -> None:
    dataset = made([600])
    (alone,) = of_ranks(dataset, 1)
    assert alone != sorted(alone)
    for size in (2, 3):
        read = of_ranks(dataset, size)
        assert [rows[i] for i in range(600 // size) for rows in read] == alone
    assert of_ranks(dataset, 1, epoch=1) != [alone]
    assert len(set(alone[:100]) & set(of_ranks(dataset, 1, epoch=1)[0][:100])) < 50


@pytest.mark.parametrize("size", [1, 2])
def test_grouped_batches_are_of_similar_length_on_all_processes_together(
    size: int, made: Made, of_ranks: Callable[..., list[list[int]]]
) -> None:
    dataset = made([GROUP_BATCHES * 4 * size * 2 + 37], "grouped")
    read = np.array(of_ranks(dataset, size))
    steps = dataset.store.lengths[read[:, : GROUP_BATCHES * 4 * 2]].reshape(size, -1, 4)
    spread = steps.max(axis=(0, 2)) - steps.min(axis=(0, 2))
    assert spread.mean() < 3 and spread.max() <= 8  # of 2 to 65
    firsts = steps[0].mean(axis=1)
    assert abs(np.corrcoef(firsts[:-1], firsts[1:])[0, 1]) < 0.4  # batches follow one another at random


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.sampled_from([0.0, 0.5, 1.0, 3.0])), min_size=1, max_size=4),
    st.integers(0, 5),
)
def test_each_source_has_its_share_and_repeats_no_row_before_all_others_came(
    sources: list[tuple[int, float]], epochs: int
) -> None:
    sizes, weights = [size for size, _ in sources], [weight for _, weight in sources]
    bounds = np.cumsum([0, *sizes])
    total = sum(weight for size, weight in sources if size)
    read: list[list[int]] = [[] for _ in sources]
    for epoch in range(epochs):
        rows = mixture(bounds, weights, 7, epoch)
        source_of = np.searchsorted(bounds, rows, "right") - 1
        for source, (size, weight) in enumerate(sources):
            mine = rows[source_of == source].tolist()
            exact = sum(sizes) * weight / total if size and total else 0.0
            assert exact - 1 < len(mine) <= exact + 1e-9
            read[source] += mine
    for source, (size, _) in enumerate(sources):
        for start in range(0, len(read[source]), max(size, 1)):
            passed = read[source][start : start + size]
            assert len(set(passed)) == len(passed)
        counts = Counter(read[source]).values()
        assert not counts or len(read[source]) < size or max(counts) - min(counts) <= 1


def test_a_source_comes_in_another_order_in_each_pass() -> None:
    passes = [mixture(np.array([0, 50]), [1.0], 0, epoch).tolist() for epoch in range(3)]
    assert passes[0] != passes[1] != passes[2] and passes[0] != sorted(passes[0])
    assert mixture(np.array([0, 50]), [1.0], 1, 0).tolist() != passes[0]


def test_shares_are_exact_where_they_come_out_even() -> None:
    assert shares(np.array([0, 10, 40]), [1, 3]).tolist() == [10, 30]
    assert shares(np.array([0, 10, 40]), [3, 1]).tolist() == [30, 10]
    assert shares(np.array([0, 10, 10, 40]), [1, 5, 1]).tolist() == [20, 0, 20]


def test_a_mixture_is_shuffled_and_dealt_out_to_processes(made: Made, of_ranks: Callable[..., list[list[int]]]) -> None:
    dataset = made([100, 300])
    (alone,) = of_ranks(dataset, 1, weights=[1, 1])
    assert Counter(row < 100 for row in alone) == {True: 200, False: 200}
    assert set(Counter(row for row in alone if row < 100).values()) == {2}
    assert 70 < sum(row < 100 for row in alone[:200]) < 130
    read = of_ranks(dataset, 2, weights=[1, 1])
    assert sorted(list(chain.from_iterable(read))) == sorted(alone)
    with pytest.raises(ValueError, match=r"sources with a weight above 0 must have rows"):
        of_ranks(made([0, 50]), 1, weights=[1, 0])


class Reads(TokenDataset):
    """Remembers which rows were read."""

    def __init__(self, dataset: TokenDataset) -> None:
        super().__init__(dataset.store, dataset.row_format)
        self.seen: list[int] = []

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        self.seen += indices
        return super().__getitems__(indices)


def loader(dataset: TokenDataset, num_workers: int = 0, epoch: int = 0) -> ResumableLoader:
    order = EpochOrder(dataset, 5, 8)
    order.set_epoch(epoch)
    options = {"sampler": order, "collate_fn": whole_batch, "drop_last": True, "num_workers": num_workers}
    return ResumableLoader(dataset, batch_size=8, persistent_workers=num_workers > 0, **options)  # type: ignore[arg-type]


def rows(batches: Iterator[dict[str, torch.Tensor]]) -> list[list[int]]:
    return [batch["token_ids"][:, 0].tolist() for batch in batches]


@pytest.mark.parametrize(("layout", "num_workers"), [("padded", 0), ("grouped", 0), ("grouped", 2)])
def test_a_loader_goes_on_within_an_epoch_and_then_begins_the_next(layout: str, num_workers: int, made: Made) -> None:
    dataset = made([203], layout)
    undisturbed = [rows(loader(dataset, epoch=epoch)) for epoch in range(3)]
    assert [len(batches) for batches in undisturbed] == [25] * 3
    stopped = loader(dataset, num_workers, epoch=1)
    batches = iter(stopped)
    for given_before in range(1, 26):
        assert rows(islice(batches, 1)) == [undisturbed[1][given_before - 1]]
        if given_before not in (1, 9, 25):
            continue
        state = stopped.state_dict()
        assert state == {"epoch": 1, "batches": given_before}
        again = loader(dataset, num_workers, epoch=1)
        again.load_state_dict(state)
        assert rows(again) == undisturbed[1][given_before:]
        assert again.state_dict() == {"epoch": 1, "batches": 25}
        again.sampler.set_epoch(2)
        assert rows(again) == undisturbed[2]


def test_a_loader_reads_nothing_that_it_leaves_out(made: Made) -> None:
    dataset = Reads(made([200]))
    again = loader(dataset, epoch=1)
    again.load_state_dict({"epoch": 1, "batches": 20})
    assert list(chain.from_iterable(rows(again))) == dataset.seen and len(dataset.seen) == 5 * 8


def test_each_process_leaves_out_what_it_has_read_itself(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = made([200])
    for rank in range(2):
        monkeypatch.setattr(module, "rank_and_size", lambda rank=rank: (rank, 2))
        again = loader(dataset)
        again.load_state_dict({"epoch": 0, "batches": 5})
        assert rows(again) == rows(loader(dataset))[5:]


def test_a_state_of_another_epoch_leaves_out_nothing(made: Made) -> None:
    dataset = made([200])
    again = loader(dataset, epoch=2)
    again.load_state_dict({"epoch": 1, "batches": 20})
    assert rows(again) == rows(loader(dataset, epoch=2))


def test_each_epoch_of_a_loader_counts_anew(made: Made) -> None:
    stopped = loader(made([200]))
    rows(islice(iter(stopped), 7))
    assert rows(islice(iter(stopped), 2)) == rows(islice(iter(loader(stopped.dataset)), 2))  # type: ignore[arg-type]
    assert stopped.state_dict()["batches"] == 2

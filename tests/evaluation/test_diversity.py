import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from crocodil.evaluation.diversity import DistinctNgrams, DuplicateRate, UnigramEntropy, ngram_hashes, unigram_entropies

ROWS = [[1, 5, 5, 6, 0, 9, 9, 9], [1, 3, 4, 5, 6, 7, 8, 9], [1, 4, 4, 4, 4, 4, 4, 4], [1, 0, 0, 0, 0, 0, 0, 0]]
COUNTED = [[5, 5, 6, 0], [3, 4, 5, 6, 7, 8, 9], [4] * 7, [0]]


def entropy(tokens: list[int]) -> float:
    return -sum(n / len(tokens) * math.log(n / len(tokens)) for n in Counter(tokens).values())


def test_entropy_by_counting() -> None:
    found = unigram_entropies(torch.tensor(ROWS), 0)
    assert found.tolist() == pytest.approx([entropy(tokens) for tokens in COUNTED], rel=1e-12)
    assert entropy(COUNTED[1]) == pytest.approx(math.log(7))
    metric = UnigramEntropy(0)
    for batch in torch.tensor(ROWS).split(3):
        metric.update(batch)
    assert metric.compute()["entropy"].item() == pytest.approx(sum(map(entropy, COUNTED)) / 4, rel=1e-12)


def test_leaving_the_padding_in_changes_the_entropy() -> None:
    """The trap: end tokens that fill a text up look like one very frequent token."""
    whole = [entropy(row[1:]) for row in ROWS]
    right = unigram_entropies(torch.tensor(ROWS), 0).tolist()
    assert abs(whole[0] - right[0]) > 0.1
    shorter = torch.tensor(ROWS[:1])[:, :5]
    assert unigram_entropies(shorter, 0).item() == pytest.approx(right[0])


@pytest.mark.parametrize("n", [1, 2, 3])
def test_distinct_ngrams_by_counting(n: int) -> None:
    inside = [[5, 5, 6], [3, 4, 5, 6, 7, 8, 9], [4] * 7, []]
    grams = [tuple(tokens[i : i + n]) for tokens in inside for i in range(len(tokens) - n + 1)]
    metric = DistinctNgrams(n, 0)
    for batch in torch.tensor(ROWS).split(3):
        metric.update(batch)
    assert metric.compute()[f"distinct_{n}"].item() == pytest.approx(len(set(grams)) / len(grams))


def test_hashes_tell_orders_and_places_apart() -> None:
    rows = torch.tensor([[1, 2, 1, 2, 3], [2, 1, 2, 1, 3]])
    hashes = ngram_hashes(rows, 2)
    assert hashes.shape == (2, 4)
    assert hashes[0, 0] == hashes[0, 2] == hashes[1, 1] != hashes[1, 0]


def test_texts_too_short_for_an_ngram_have_none() -> None:
    metric = DistinctNgrams(9, 0)
    metric.update(torch.tensor(ROWS))
    assert math.isnan(metric.compute()["distinct_9"])


def test_duplicates_are_counted_over_all_batches() -> None:
    metric = DuplicateRate()
    for batch in (["a", "b"], ["a", "\ud800"], ["c"]):
        metric.update(batch)
    assert metric.compute()["duplicate_rate"].item() == pytest.approx(1 / 5)


def test_entropy_of_a_large_vocabulary_needs_no_table_of_it() -> None:
    rows = torch.tensor([[1, 10**15, 10**15, 7]])
    assert unigram_entropies(rows, 0).item() == pytest.approx(entropy([1, 1, 2]))
    assert isinstance(UnigramEntropy(0).total, Tensor)

import numpy as np
import pytest

from crocodil.data.near_duplicates import SHINGLE, is_near_duplicate, shingles


def text(seed: int, size: int = 400) -> np.ndarray:
    return np.random.default_rng(seed).integers(4, 1000, size).astype(np.uint16)


def similarity(one: np.ndarray, other: np.ndarray) -> float:
    first, second = set(shingles(one)), set(shingles(other))
    return len(first & second) / len(first | second)


def altered(tokens: np.ndarray, places: int, seed: int = 0) -> np.ndarray:
    """A copy with some tokens replaced, far apart, so that each costs five shingles."""
    changed = tokens.copy()
    changed[np.arange(1, places + 1) * (len(tokens) // (places + 1))] = 1000 + seed
    return changed


def test_shingles_are_all_runs_of_five_tokens() -> None:
    tokens = np.array([7, 8, 9, 10, 11, 12, 13], np.uint16)
    assert shingles(tokens) == [tokens[i : i + SHINGLE].tobytes() for i in range(3)]
    assert shingles(tokens[:5]) == [tokens[:5].tobytes()]
    assert shingles(tokens[:3]) == [tokens[:3].tobytes()]
    assert len(set(shingles(text(0)))) == 396


def test_a_similar_text_is_a_copy_of_the_one_before_it() -> None:
    original = text(0)
    close, far = altered(original, 2), altered(original, 25)
    assert similarity(original, close) > 0.93 and similarity(original, far) < 0.6
    assert is_near_duplicate([original, text(1), close, far, original], 0.8).tolist() == [
        False,
        False,
        True,
        False,
        True,
    ]
    assert is_near_duplicate([close, original], 0.8).tolist() == [False, True]  # whoever comes first stays


def test_what_is_left_out_does_not_leave_out_others() -> None:
    first = text(0)
    second, third = first.copy(), first.copy()
    second[12:400:24] = third[12:400:24] = 1000
    third[:400:24] = 1001
    assert similarity(first, second) > 0.63 and similarity(second, third) > 0.63 and similarity(first, third) < 0.45
    assert is_near_duplicate([first, second, third], 0.54).tolist() == [False, True, False]


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_pairs_are_told_apart_at_the_threshold(threshold: float) -> None:
    wrong = 0
    for seed in range(60):
        original = text(seed, 600)
        copy = altered(original, 5 + seed, seed)
        exact = similarity(original, copy)
        if abs(exact - threshold) > 0.12:  # four standard errors at .5
            wrong += is_near_duplicate([original, copy], threshold)[1] != (exact > threshold)
    assert wrong == 0


def test_equal_short_texts_are_copies_and_different_ones_are_not() -> None:
    short = [np.array(tokens, np.uint16) for tokens in ([1, 5, 0], [1, 6, 0], [1, 5, 0])]
    assert is_near_duplicate(short, 0.9).tolist() == [False, False, True]
    assert is_near_duplicate([], 0.9).tolist() == []


@pytest.mark.parametrize("threshold", [0, -0.5, 1.5, float("nan")])
def test_a_threshold_that_means_nothing_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"near_duplicates must be in \(0, 1\], got"):
        is_near_duplicate([text(0)], threshold)

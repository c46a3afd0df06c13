"""Near duplicates by MinHash (Broder, 1997) with locality-sensitive hashing; the library `rensa` does both."""

from collections.abc import Iterable
from importlib.util import find_spec

import numpy as np

SHINGLE = 5
NUM_PERM = 128
NUM_BANDS = 32
"""Bands of four hashes: a pair at the threshold .8 is looked at with a probability above .9999."""


def check_threshold(threshold: float) -> None:
    """Refuses before a corpus is read what would be refused behind it.

    Args:
        threshold: in (0, 1].

    Raises:
        ValueError: if the threshold is out of range or the library is absent.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"near_duplicates must be in (0, 1], got {threshold}.")
    if find_spec("rensa") is None:
        raise ValueError("near_duplicates needs the package rensa: pip install 'crocodil[data]'.")


def is_near_duplicate(texts: Iterable[np.ndarray], threshold: float) -> np.ndarray:
    """Which texts resemble one before them that was kept: their sets of shingles have a Jaccard similarity of at least
    the threshold, estimated from `NUM_PERM` minimal hashes (standard error about .03 near .8).

    Args:
        texts: token ids of each text; a shingle is `SHINGLE` tokens in a row.
        threshold: in (0, 1].

    Returns:
        (N,) bool.

    Raises:
        ValueError: see `check_threshold`.
    """
    check_threshold(threshold)
    from rensa import RMinHash, RMinHashDeduplicator

    index = RMinHashDeduplicator(threshold, num_perm=NUM_PERM, use_lsh=True, num_bands=NUM_BANDS, seed=0)
    found = []
    for number, tokens in enumerate(texts):
        sketch = RMinHash(num_perm=NUM_PERM, seed=0)
        sketch.update(shingles(tokens))
        found.append(not index.add(str(number), sketch))
    return np.array(found, dtype=bool)


def shingles(tokens: np.ndarray) -> list[bytes]:
    """All runs of `SHINGLE` tokens; a shorter text is one run."""
    if len(tokens) < SHINGLE:
        return [tokens.tobytes()]
    runs = np.lib.stride_tricks.sliding_window_view(tokens, SHINGLE)
    return np.ascontiguousarray(runs).view(f"V{SHINGLE * tokens.itemsize}").ravel().tolist()

"""Canonical functions of many files: read in parallel, divided into splits, duplicates removed."""

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Literal

from crocodil.data.canonical import CANONICAL_TOKENS, canonical_functions
from crocodil.data.corpora import SkipCount, SourceFile, Split, read_text, split_of, with_progress

SplitBy = Literal["name", "folder"]
MIN_FILES_FOR_POOL = 256
_TOKEN_IDS = {token: token_id for token_id, token in enumerate(CANONICAL_TOKENS)}
assert len(_TOKEN_IDS) <= 256  # a function travels between processes as one byte a token


def functions_of_file(file: SourceFile, min_tokens: int, max_tokens: int) -> tuple[list[bytes], SkipCount]:
    """Token ids (one byte a token) of the canonical functions of one file, and whether the file was skipped.

    Args:
        file: the file to read.
        min_tokens: shorter functions are left out.
        max_tokens: longer functions are left out.
    """
    skipped = SkipCount()
    text = read_text(file.path, skipped)
    if text is None:
        return [], skipped
    try:
        functions = [function for function in canonical_functions(text, max_tokens) if len(function) >= min_tokens]
    except ValueError:
        skipped.unparsable += 1
        return [], skipped
    return [bytes(_TOKEN_IDS[token] for token in function) for function in functions], skipped


def read_functions(
    files: Sequence[SourceFile], min_tokens: int, max_tokens: int, split_by: SplitBy = "name"
) -> tuple[dict[Split, dict[bytes, tuple[int, int]]], int, SkipCount]:
    """Canonical functions of many files by split, how many there are, and the files that were skipped.

    Args:
        files: files in a fixed order.
        min_tokens: shorter functions are left out.
        max_tokens: longer functions are left out.
        split_by: what of a file decides the split: its "name", or its "folder", the first part of the name, so that the
            files of a package stay together.

    Returns:
        For each split, token ids of each distinct function, one byte a token, in order of file and of place in the
        file, with the file and the place where it stands first; the number of functions, equal ones counted; the
        skipped files.

    Raises:
        RuntimeError: if worker processes cannot start.
    """
    found: dict[Split, dict[bytes, tuple[int, int]]] = {"train": {}, "val": {}, "test": {}}
    total, all_skipped = 0, SkipCount()
    results = with_progress(len(files), _read_all(files, min_tokens, max_tokens), "Reading Python functions")
    for number, (file, (functions, skipped)) in enumerate(zip(files, results, strict=True)):
        of_split = found[split_of(file.name if split_by == "name" else file.name.partition("/")[0])]
        for place, function in enumerate(functions):
            of_split.setdefault(function, (number, place))
        total += len(functions)
        all_skipped.add(skipped)
    return found, total, all_skipped


def _read_all(files: Sequence[SourceFile], min_tokens: int, max_tokens: int) -> Iterator[tuple[list[bytes], SkipCount]]:
    read = partial(functions_of_file, min_tokens=min_tokens, max_tokens=max_tokens)
    if len(files) < MIN_FILES_FOR_POOL:
        yield from map(read, files)
        return
    context = multiprocessing.get_context("spawn")  # fork would copy the threads' locks of a running trainer
    try:
        with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
            yield from pool.map(read, files, chunksize=16)
    except BrokenProcessPool as error:
        raise RuntimeError(
            "worker processes could not start: the program must be a file whose main part stands under "
            '`if __name__ == "__main__":`.'
        ) from error

"""Texts for the latent tools: from options, files and folders, in the form that a pipeline's codec reads."""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import torch
from torch import Tensor

from crocodil.data.canonical import canonical_functions, render
from crocodil.data.codec import TextCodec
from crocodil.data.corpora import SkipCount, folder_files, read_text, with_progress
from crocodil.latents.tools import text_blocks
from crocodil.pipeline import CrocodilPipeline


def read_text_option(codec: TextCodec, option: str, value: str) -> str:
    """The text of an option, in the form the codec reads; what was done to it is told on standard error.

    Args:
        codec: of the pipeline.
        option: its name.
        value: the text, or "@" and the path of a UTF-8 file that holds it.

    Raises:
        ValueError: if there is no such file, or the codec cannot read the text.
    """
    text: str | None = value
    if value.startswith("@"):
        path, skipped = Path(value[1:]), SkipCount()
        if not path.is_file():
            raise ValueError(f"--{option}: there is no file {path} (a text that begins with @ must be in a file)")
        text = read_text(path, skipped)
        if text is None:
            raise ValueError(f"--{option}: {path} must be a UTF-8 text file, got a file that counts as {skipped}")
    assert text is not None
    try:
        forms = readable_forms(codec, text)
    except ValueError as error:
        raise ValueError(f"--{option}: {error}") from error
    if forms != [text] and forms != [f"{text}\n"]:
        which = "it" if len(forms) == 1 else f"the first of its {len(forms)} functions"
        print(
            f"--{option} is ordinary Python; {which} is read in canonical names:\n{forms[0]}", end="", file=sys.stderr
        )
    return forms[0]


def readable_forms(codec: TextCodec, text: str) -> list[str]:
    """A text as the codec reads it: itself, or the functions of ordinary Python where only canonical ones are known.

    Args:
        codec: of the pipeline.
        text: any text.

    Returns:
        One text, or the canonical text of each function that has one, at least one.

    Raises:
        ValueError: if the codec can read nothing of it.
    """
    if codec.text_format != "canonical":
        return [text]
    ended = text if text.endswith("\n") else f"{text}\n"  # as every function of the training data
    try:
        codec.encode(ended)
    except ValueError as error:
        try:
            functions = [render(tokens) for tokens in canonical_functions(dedent(text))]
        except ValueError:
            functions = []
        if not functions:
            reason = str(error).rstrip(".")
            raise ValueError(f"{reason}, and found no Python function with a canonical form in it") from error
        return functions
    return [ended]


def read_corpus(pipeline: CrocodilPipeline, corpus: str, pattern: str, length: int | None) -> tuple[Tensor, list[str]]:
    """The different texts of a corpus as token ids; how many were left out, and why, is told on standard error.

    Args:
        pipeline: whose codec reads them.
        corpus: a file of JSON lines with a text each under "text", as `crocodil sample` writes, or a folder.
        pattern: glob pattern of the files of a folder.
        length: see `tools.text_blocks`.

    Returns:
        (N, L) int64, and where each text stands.

    Raises:
        ValueError: if there is no such corpus, a line of it is no such object, or no text is left.
    """
    found: dict[tuple[int, ...], str] = {}
    left_out, skipped = Counter[str](), SkipCount()
    for source, text in _entries(Path(corpus), pattern, skipped):
        try:
            forms = readable_forms(pipeline.codec, text)
        except ValueError:
            left_out["not readable by the codec"] += 1
            continue
        for i, form in enumerate(forms):
            try:
                block = tuple(text_blocks(pipeline, [form], length)[0].tolist())
            except ValueError:
                left_out["too long"] += 1
                continue
            left_out["repeated"] += block in found
            found.setdefault(block, source if len(forms) == 1 else f"{source}, function {i + 1}")
    reasons = [f"{count} {reason}" for reason, count in left_out.items() if count]
    reasons += [f"files: {skipped}"] if skipped.total else []
    summary = f"{len(found)} texts in {corpus}; left out: {', '.join(reasons) or 'none'}"
    if not found:
        raise ValueError(f"--corpus must hold texts that fit, got {summary}")
    print(summary, file=sys.stderr)
    return torch.tensor(list(found)), list(found.values())


def _entries(corpus: Path, pattern: str, skipped: SkipCount) -> Iterator[tuple[str, str]]:
    """Where each text of a corpus stands, and the text."""
    if corpus.is_dir():
        all_files = folder_files(corpus, pattern)
        for file in with_progress(len(all_files), all_files, "Reading files"):
            if (text := read_text(file.path, skipped)) is not None:
                yield file.name, text
        return
    if not corpus.is_file():
        raise ValueError(f"--corpus must be a folder or a file of JSON lines, but there is no {corpus}")
    with corpus.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = json.loads(line)["text"]
            except (ValueError, TypeError, KeyError):
                text = None
            if not isinstance(text, str):
                raise ValueError(
                    f'--corpus: each line must be an object {{"text": ...}}, got line {number} of {corpus}'
                )
            yield f"{corpus.name}, line {number}", text

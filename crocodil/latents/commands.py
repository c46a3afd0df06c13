"""`crocodil interpolate`, `crocodil registers` and `crocodil neighbours`: what the registers of a pipeline hold."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from crocodil.commands import open_pipeline, progress_bar
from crocodil.latents import tools
from crocodil.latents.page import save_page
from crocodil.latents.reading import read_corpus, read_text_option


def interpolate(
    pipeline: str | None,
    first: str,
    second: str,
    num_points: int,
    kind: Any,
    device: str,
    output: str | None,
    **settings: Any,
) -> None:
    """Writes the texts between two texts' latents.

    Args:
        pipeline: folder of a pipeline; None for the one that comes with the project.
        first: a text, or "@" and the file that holds it.
        second: likewise.
        num_points: see `tools.interpolate`.
        kind: likewise.
        device: "auto" takes a GPU if there is one.
        output: file to write, a page if it ends in .html; None for JSON lines on standard output.
        settings: further arguments of `tools.interpolate`.

    Raises:
        ValueError: if a setting is out of range or a text cannot be read.
    """
    pipe = open_pipeline(pipeline, device, output=output)
    ends = (read_text_option(pipe.codec, "first", first), read_text_option(pipe.codec, "second", second))
    with progress_bar() as (progress, _):
        points = tools.interpolate(pipe, *ends, num_points, kind, progress=progress, **settings)
    title = f"Between two texts: {kind}, {settings['num_steps']} demasker calls a text"
    _report(output, map(_plain, points), lambda path: save_page(path, title, pipe, interpolation=points))


def registers(
    pipeline: str | None,
    text: str,
    other: str | None,
    device: str,
    output: str | None,
    length: int | None,
    **settings: Any,
) -> None:
    """Writes what each register of a text holds; arguments as those of `interpolate` and `tools`."""
    pipe = open_pipeline(pipeline, device, output=output)
    source = read_text_option(pipe.codec, "text", text)
    swapped = None if other is None else read_text_option(pipe.codec, "other", other)
    effects = tools.register_effects(pipe, source, swapped, length=length)
    with progress_bar() as (progress, _):
        counts = tools.by_register_count(pipe, source, length=length, progress=progress, **settings)
    rows = (
        {
            "register": step.num_registers,
            "text": step.text,
            "token_ids": step.token_ids.tolist(),
            "token_accuracy": step.token_accuracy,
            "gained": step.is_gained.nonzero().flatten().tolist(),
            "rises": [round(rise, 4) for rise in rises],
        }
        for step, rises in zip(counts, effects.rises.tolist(), strict=True)
    )
    changed = "is hidden" if other is None else "is another text's"
    title = f"What the {len(counts)} registers of a text hold"
    _report(output, rows, lambda path: save_page(path, title, pipe, counts=counts, effects=effects, changed=changed))


def neighbours(
    pipeline: str | None,
    text: str,
    corpus: str,
    pattern: str,
    device: str,
    output: str | None,
    length: int | None,
    **settings: Any,
) -> None:
    """Writes the nearest texts of a corpus; arguments as those of `interpolate`, `read_corpus` and `tools`."""
    pipe = open_pipeline(pipeline, device, output=output)
    query = read_text_option(pipe.codec, "text", text)
    tools.text_blocks(pipe, [query], length)  # refuses it before a long corpus is read
    corpus_ids, sources = read_corpus(pipe, corpus, pattern, length)
    with progress_bar() as (progress, _):
        found = tools.nearest(pipe, query, corpus_ids, progress=progress, **settings)
    named = [(sources[neighbour.index], neighbour) for neighbour in found]
    rows = ({"source": source, **_plain(neighbour)} for source, neighbour in named)
    title = f"The nearest of {len(sources)} texts"
    _report(output, rows, lambda path: save_page(path, title, pipe, neighbours=named, query=query))


def _plain(entry: Any) -> dict[str, Any]:
    """The fields of an entry as JSON has them."""
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in vars(entry).items()}


def _report(output: str | None, rows: Iterator[dict[str, Any]], save: Callable[[str], None]) -> None:
    """JSON lines on standard output or in a file, or the page."""
    if output is not None and output.lower().endswith(".html"):
        save(output)
    else:
        lines = "".join(f"{json.dumps(row)}\n" for row in rows)
        if output is None:
            print(lines, end="")
            return
        Path(output).write_text(lines)
    print(f"written to {output}", file=sys.stderr)

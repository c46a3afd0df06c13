"""The tables and the page of an evaluation: generation, reconstruction, conditioning, or all of them."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich import box
from rich.table import Table

from crocodil.evaluation import figures, page
from crocodil.evaluation.frontier import sentence, speedups
from crocodil.evaluation.tables import plain_numbers, write_tables
from crocodil.evaluation.tables import summary as summary_of
from crocodil.evaluation.verdict import (
    CALLS,
    ENTROPY_SLACK,
    MISSING,
    NAMES,
    SETTING,
    Row,
    best,
    collapsed,
    data_row,
    milliseconds,
    number,
    sketch_words,
    spread,
    summarise,
    verdict,
    verdict_sentences,
)

GENERATION_COLUMNS = (
    *("demasker_calls", "nfe", "seconds_per_sample", "tokens_per_call", "judge_nll", "perplexity", "entropy"),
    *("mauve", "mauve_kmeans_std", "distance", "parse_rate", "compile_rate", "undefined_names"),
    *("distinct_2", "distinct_4", "duplicate_rate", "copied_run", "copied_share", "longest_copied_run"),
)
RECONSTRUCTION_KEYS = ("block_size", "num_steps", "num_registers", "remasking", "temperature")
RECONSTRUCTION_COLUMNS = {
    "num_registers": "Registers",
    "block_size": "Block",
    "num_steps": "Calls",
    "nfe": "NFE",
    "perplexity": "Gen-PPL",
    "codebertscore": "CodeBERTScore",
    "cer": "CER",
    "token_accuracy": "Token accuracy",
    "parse_rate": "Parse rate",
    "entropy": "Entropy",
}


@dataclass
class Report:
    """Everything a page can show; what is empty is left out.

    Args:
        machine: What it ran on: `processor`, `cores`, versions.
        settings: Shown by name, dicts inside as lists of their entries; `parameters` (network name to count) is shown
            in millions. `corpus` (str), `num_registers`, `latent_dim` and `minutes` (part of the work to minutes)
            also enter the introduction when present.
        length: Program length L in tokens.
        rows: Generation: one dict per setting and seed: `algorithm` (a key of `NAMES`), `remasking` (str or None),
            `temperature` (float or None), `num_registers` (how many the demasker reads; None for all), `num_steps`,
            `length`, `demasker_calls`, `prior_calls`, `encoder_calls`, `nfe` (all of them in demasker calls),
            `seconds_per_sample`, optionally `seconds_batch_B`, `judge_nll` (nats per token), `entropy` (of the tokens
            within a text, through its first end token, averaged over texts, in nats), `distance`, `parse_rate` and
            `duplicate_rate` (0 to 1), and any other of `MEASURES`; `seed`. A number that could not be measured is NaN
            or None.
        quality: The measure at which speed-ups are matched.
        reconstruction_rows: Rows of `crocodil.experiments.Reconstruction`.
        conditioning: Rows of `crocodil.experiments.Conditioning`.
        curves: Stage name to its points, dicts of `step`, `train_loss`, `val_loss` and any further validation metric.
        texts: Label to a few sampled programs.
        example: A reconstruction in full: `source`, `output`, `token_accuracy` (0 to 1), `num_steps`, optionally
            `with fewer registers`, a list of dicts of `num_registers`, `output`, `token_accuracy`.
        seeds: Sampling seeds.
    """

    machine: dict[str, str]
    settings: dict[str, Any]
    length: int
    rows: list[Row] = field(default_factory=list)
    quality: str = "judge_nll"
    reconstruction_rows: list[Row] = field(default_factory=list)
    conditioning: list[Row] = field(default_factory=list)
    curves: dict[str, list[Row]] = field(default_factory=dict)
    texts: dict[str, list[str]] = field(default_factory=dict)
    example: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)


def _percent(row: Row, measure: str) -> str:
    return number(row[measure] * 100, 1)


def _cells(row: Row) -> list[str]:
    """One row under the headers of `page.GLOSSARY`."""
    cost = ["", "", ""]
    if row["algorithm"] != "data":
        calls = "/".join(MISSING if math.isnan(row[key]) else f"{round(row[key], 1):g}" for key in CALLS)
        cost = [calls, number(row["nfe"], 1), milliseconds(row)]
    temperature = "" if row["temperature"] is None else f"{row['temperature']:g}"
    registers = "" if row["num_registers"] is None else f" k={row['num_registers']}"
    return [
        NAMES[row["algorithm"]],
        (row["remasking"] or "").replace("_", " ") + registers + (f" {words}" if (words := sketch_words(row)) else ""),
        temperature,
        *cost,
        spread(row, "judge_nll"),
        number(row["entropy"]),
        spread(row, "distance"),
        spread(row, "parse_rate", 1, 100),
        _percent(row, "duplicate_rate"),
        spread(row, "mauve", 3),
        _percent(row, "compile_rate"),
        number(row["undefined_names"], 2),
        number(row["distinct_2"], 3),
        number(row["distinct_4"], 3),
        number(row["copied_run"], 1),
    ]


def results_table(rows: list[Row]) -> Table:
    """The comparison for a terminal of 120 columns.

    Args:
        rows: Rows as in `Report`.

    Returns:
        A table of one line per setting, grouped by algorithm; collapsed settings are dim.
    """
    summary = summarise(rows)
    data = data_row(summary)
    table = Table(
        title="Quality against cost",
        caption="Mean ± standard deviation over seeds. Calls: demasker/prior/encoder. NFE: all calls by FLOPs, in "
        "demasker calls. Dim: collapsed entropy.",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for index, (header, _, _) in enumerate(page.GLOSSARY[: page.TERMINAL_COLUMNS]):
        table.add_column(header.replace(" ", "\n"), justify="left" if index < 2 else "right", no_wrap=True)
    for row, following in zip(summary, [*summary[1:], None], strict=False):
        cells = [cell.replace("± ", "±") for cell in _cells(row)[: page.TERMINAL_COLUMNS]]
        last = following is None or following["algorithm"] != row["algorithm"]
        table.add_row(*cells, end_section=last, style="dim" if collapsed(row, data) else None)
    return table


def write_results(output_dir: str | Path, rows: list[Row]) -> Path:
    """Writes the rows as `results.json`, a list of objects; NaN becomes null, as JSON has no NaN.

    Args:
        output_dir: Folder, created if absent.
        rows: Written as they are.

    Returns:
        Path of the file.
    """
    path = Path(output_dir) / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plain_numbers(rows), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return path


def write_generation(folder: str | Path, rows: list[Row], context: dict[str, Any], quality: str) -> Path:
    """Writes the tables of generation and of its speed-ups, and the page.

    Args:
        folder: Created if absent.
        rows: Of `crocodil.experiments.Generation`.
        context: What all rows share.
        quality: The measure at which speed-ups are matched.

    Returns:
        Path of the page.
    """
    bare = [{key: value for key, value in row.items() if key != "examples"} for row in rows]
    timings = [key for key in dict.fromkeys(key for row in bare for key in row) if key.startswith("seconds_batch_")]
    write_tables(folder, "generation", bare, SETTING, [*GENERATION_COLUMNS, *timings], context)
    found = [item.to_row() for item in speedups(rows, quality)]
    keys = list(dict.fromkeys(key for row in found for key in row))
    write_tables(folder, "speedups", found, keys, [], context)
    examples: dict[str, list[str]] = {}
    for row in rows:
        examples.setdefault(f"{NAMES[row['algorithm']]}, {row['num_steps']} calls", row["examples"])
    return write_page(folder, context, rows=rows, quality=quality, texts=examples)


def write_reconstruction(folder: str | Path, rows: list[Row], context: dict[str, Any]) -> Path:
    """Writes the table and the page of `crocodil.experiments.Reconstruction`; arguments as of `write_generation`."""
    columns = [name for name in RECONSTRUCTION_COLUMNS if name not in RECONSTRUCTION_KEYS]
    write_tables(folder, "reconstruction", rows, RECONSTRUCTION_KEYS, [*columns, "seconds_per_sample"], context)
    return write_page(folder, context, reconstruction_rows=rows)


def write_conditioning(folder: str | Path, rows: list[Row], context: dict[str, Any]) -> Path:
    """Writes the table and the page of `crocodil.experiments.Conditioning`; arguments as of `write_generation`."""
    columns = ("cross_entropy", "standard_error", "top1", "num_tokens")
    write_tables(folder, "conditioning", rows, ("system", "num_registers", "mask_ratio"), columns, context)
    return write_page(folder, context, conditioning=rows)


def write_page(folder: str | Path, context: dict[str, Any], **content: Any) -> Path:
    """Writes the page of an evaluation.

    Args:
        folder: Created if absent.
        context: What all rows share; entries "machine: x" are shown as the machine's.
        content: Further fields of `Report`.

    Returns:
        Path of the page.
    """
    prefix = "machine: "
    machine = {key.removeprefix(prefix): value for key, value in context.items() if key.startswith(prefix)}
    settings = {key: value for key, value in context.items() if not key.startswith(prefix)}
    seeds = settings.pop("seeds", [])
    return write_report(folder, Report(machine, settings, settings["length"], seeds=seeds, **content))


def _line(name: str, summary: list[Row], data: Row) -> list[Row]:
    """The settings one line of the figures joins: per number of calls the best that has not collapsed."""
    algorithm = name.removesuffix("_random")
    members = [row for row in summary if row["algorithm"] == algorithm and not collapsed(row, data)]
    if algorithm != name:
        members = [row for row in members if row["remasking"] == "random"]
    budgets = {row["demasker_calls"] for row in members}
    points = (best(row for row in members if row["demasker_calls"] == budget) for budget in budgets)
    return sorted(filter(None, points), key=lambda row: row["nfe"])


def _curve_panels(curves: dict[str, list[Row]]) -> list[tuple[Markup, str]]:
    panels = []
    for stage, points in curves.items():
        last = {key: value for point in points for key, value in point.items() if number(value) != MISSING}
        text = ", ".join(f"{key.replace('_', ' ')} {page.plain(round(value, 3))}" for key, value in last.items())
        panels.append(
            (figures.curve_panel(stage, points), f"Last values: {text}." if text else "Nothing was recorded.")
        )
    return panels


def write_report(output_dir: str | Path, content: Report) -> Path:
    """Writes `report.html`, one page that needs nothing beside it.

    Args:
        output_dir: Folder, created if absent.
        content: What to show.

    Returns:
        Path of the file.
    """
    html = page.render(
        lead=page.introduce(content.settings, content.machine, content.length),
        **_generation_parts(content),
        conditioning_panels=[
            figures.conditioning_panel(content.conditioning, y)
            for y in ("cross_entropy", "top1")
            if content.conditioning
        ],
        **_reconstruction_parts(content.reconstruction_rows),
        curve_panels=_curve_panels(content.curves),
        texts={label: [page.highlight(code) for code in codes] for label, codes in content.texts.items()},
        example=page.reconstruction_cards(content.example),
        num_steps=content.example.get("num_steps"),
        settings=page.plain_settings(content.settings),
        machine=({"seeds": page.plain(content.seeds)} if content.seeds else {})
        | {key: page.plain(value) for key, value in content.machine.items()},
    )
    path = Path(output_dir) / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8")
    return path


def _generation_parts(content: Report) -> dict[str, Any]:
    """Verdict, speed-ups, frontier and table of generation; all empty if there is none."""
    summary = summarise(content.rows)
    data = data_row(summary)
    grey = [row for row in summary if collapsed(row, data)]
    lines = {name: _line(name, summary, data) for name in figures.LINES}

    def panel(x: str, y: str) -> Markup:
        return figures.cost_panel(x, y, lines, grey, data, data["entropy"] - ENTROPY_SLACK)

    judged = verdict(content.rows, content.length) if content.rows else []
    faster = speedups(content.rows, content.quality)
    cost_panels, entropy_panels = [], []
    if content.rows:
        qualities = ["parse_rate", "judge_nll"]
        qualities += ["mauve"] if any(math.isfinite(row["mauve"]) for row in summary) else []
        cost_panels = [panel(x, y) for y in qualities for x in ("nfe", "seconds_per_sample")]
        entropy_panels = [panel("nfe", "entropy"), panel("entropy", "judge_nll")]
        entropy_panels.append(figures.temperature_panel(summary, data))
    return {
        "verdict": [(item["holds"], text) for item, text in zip(judged, verdict_sentences(judged), strict=True)],
        "speedups": [(item.claimed, sentence(item)) for item in faster],
        "slack": ENTROPY_SLACK,
        "cost_panels": cost_panels,
        "entropy_panels": entropy_panels,
        **_results(summary, grey),
    }


def _results(summary: list[Row], grey: list[Row]) -> dict[str, Any]:
    """The table of the page: the columns that were measured, and its rows with their classes."""
    cells = [_cells(row) for row in summary]
    shown = [i for i in range(len(page.GLOSSARY)) if any(row[i] not in ("", MISSING) for row in cells)]
    table, above = [], None
    for row, line in zip(summary, cells, strict=True):
        classes = {"first": row["algorithm"] != above, "collapsed": row in grey}
        table.append((" ".join(name for name, applies in classes.items() if applies), [line[i] for i in shown]))
        above = row["algorithm"]
    return {"glossary": [page.GLOSSARY[i] for i in shown], "table": table}


def _reconstruction_parts(rows: list[Row]) -> dict[str, Any]:
    """Figures and table of reconstruction; empty if there is none."""
    items = summary_of(rows, RECONSTRUCTION_KEYS)
    panels = [figures.reconstruction_panel(items, y) for y in ("cer", "token_accuracy", "parse_rate") if rows]
    columns = [name for name in RECONSTRUCTION_COLUMNS if any(item.get(name) is not None for item in items)]
    table = [[_words(item, name) for name in columns] for item in items]
    return {
        "reconstruction_panels": panels,
        "reconstruction_headers": [RECONSTRUCTION_COLUMNS[name] for name in columns],
        "reconstruction_table": table,
    }


def _words(item: Row, name: str) -> str:
    value = item.get(name)
    if name == "num_steps" and not value:
        return "originals"
    if not isinstance(value, float):
        return "" if value is None else str(value)
    std = item.get(f"{name}_std")
    return number(value, 3) + (f" ± {number(std, 3)}" if std else "")

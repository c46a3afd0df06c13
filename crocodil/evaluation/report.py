"""The comparison of base, ConThenDisc and ConWithinDisc: its table, `results.json` and `report.html`."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich import box
from rich.table import Table

from crocodil.evaluation import figures, page
from crocodil.evaluation.verdict import (
    CALLS,
    ENTROPY_SLACK,
    MISSING,
    NAMES,
    Row,
    best,
    collapsed,
    data_row,
    milliseconds,
    number,
    spread,
    summarise,
    verdict,
    verdict_sentences,
)


@dataclass
class Comparison:
    """Everything a report shows.

    Args:
        rows: One dict per setting and seed: `algorithm` (a key of `NAMES`), `remasking` (str or None), `temperature`
            (float or None), `num_registers` (how many the demasker reads; None for all), `num_steps`,
            `demasker_calls`, `prior_calls`, `encoder_calls`, `nfe` (all of them in demasker calls),
            `seconds_per_sample`, `judge_nll` (nats per token), `entropy` (of the tokens within a text, through its
            first end token, averaged over texts, in nats), `distance`, `parse_rate` and `unique_rate` (0 to 1),
            `seed`. A number that could not be measured is NaN or None.
        curves: Stage name to its points, dicts of `step`, `train_loss`, `val_loss` and any further validation metric.
        latent_use: Dicts of `mask_ratio` (0 to 1), `with_latents`, `without_latents` and optionally `base`, the model
            without latents (nats per masked token).
        texts: Label to a few sampled programs.
        reconstruction: `source`, `output`, `token_accuracy` (0 to 1), `num_steps`, optionally `with fewer registers`,
            a list of dicts of `num_registers`, `output`, `token_accuracy`. Empty if there is none.
        machine: What it ran on: `processor`, `cores`, versions.
        seeds: Sampling seeds.
        settings: Shown by name, dicts inside as lists of their entries; `parameters` (network name to count) is shown
            in millions. `corpus` (str), `num_registers`, `latent_dim` and `minutes` (part of the work to minutes)
            also enter the introduction when present.
        length: Program length L in tokens.
    """

    rows: list[Row]
    curves: dict[str, list[Row]]
    latent_use: list[Row]
    texts: dict[str, list[str]]
    reconstruction: dict[str, Any]
    machine: dict[str, str]
    seeds: list[int]
    settings: dict[str, Any]
    length: int


def _cells(row: Row) -> list[str]:
    """One row under the headers of `page.GLOSSARY`."""
    cost = ["", "", ""]
    if row["algorithm"] != "data":
        calls = "/".join(MISSING if math.isnan(row[key]) else f"{row[key]:g}" for key in CALLS)
        cost = [calls, number(row["nfe"], 1), milliseconds(row)]
    temperature = "" if row["temperature"] is None else f"{row['temperature']:g}"
    registers = "" if row["num_registers"] is None else f" k={row['num_registers']}"
    return [
        NAMES[row["algorithm"]],
        (row["remasking"] or "").replace("_", " ") + registers,
        temperature,
        *cost,
        spread(row, "judge_nll"),
        number(row["entropy"]),
        spread(row, "distance"),
        spread(row, "parse_rate", 1, 100),
        number(row["unique_rate"] * 100, 1),
    ]


def results_table(rows: list[Row]) -> Table:
    """The comparison for a terminal of 120 columns.

    Args:
        rows: Rows as in `Comparison`.

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
    for index, (header, _, _) in enumerate(page.GLOSSARY):
        table.add_column(header.replace(" ", "\n"), justify="left" if index < 2 else "right", no_wrap=True)
    for row, following in zip(summary, [*summary[1:], None], strict=False):
        cells = [cell.replace("± ", "±") for cell in _cells(row)]
        last = following is None or following["algorithm"] != row["algorithm"]
        table.add_row(*cells, end_section=last, style="dim" if collapsed(row, data) else None)
    return table


def write_results(output_dir: str | Path, comparison: Comparison) -> Path:
    """Writes the rows as `results.json`, a list of objects; NaN becomes null, as JSON has no NaN.

    Args:
        output_dir: Folder, created if absent.
        comparison: Its `rows` are written as they are.

    Returns:
        Path of the file.
    """
    path = Path(output_dir) / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
        for row in comparison.rows
    ]
    path.write_text(json.dumps(rows, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return path


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


def write_report(output_dir: str | Path, comparison: Comparison) -> Path:
    """Writes `report.html`, one page that needs nothing beside it.

    Args:
        output_dir: Folder, created if absent.
        comparison: What to show.

    Returns:
        Path of the file.
    """
    summary = summarise(comparison.rows)
    data = data_row(summary)
    grey = [row for row in summary if collapsed(row, data)]
    lines = {name: _line(name, summary, data) for name in figures.LINES}

    def panel(x: str, y: str) -> Markup:
        return figures.cost_panel(x, y, lines, grey, data, data["entropy"] - ENTROPY_SLACK)

    judged = verdict(comparison.rows, comparison.length)
    groups = [row["algorithm"] for row in summary]
    table = []
    for row, above in zip(summary, [None, *groups], strict=False):
        classes = {"first": row["algorithm"] != above, "collapsed": row in grey}
        table.append((" ".join(name for name, applies in classes.items() if applies), _cells(row)))
    html = page.render(
        lead=page.introduce(comparison.settings, comparison.machine, comparison.length),
        verdict=[(item["holds"], text) for item, text in zip(judged, verdict_sentences(judged), strict=True)],
        slack=ENTROPY_SLACK,
        cost_panels=[panel(x, y) for y in ("parse_rate", "judge_nll") for x in ("nfe", "seconds_per_sample")],
        entropy_panels=[panel("nfe", "entropy"), panel("entropy", "judge_nll")],
        base_in_latent_panel=figures.has_base(comparison.latent_use),
        latent_panel=figures.latent_panel(comparison.latent_use),
        curve_panels=_curve_panels(comparison.curves),
        texts={label: [page.highlight(code) for code in codes] for label, codes in comparison.texts.items()},
        reconstruction=page.reconstruction_cards(comparison.reconstruction),
        num_steps=comparison.reconstruction.get("num_steps"),
        table=table,
        settings=page.plain_settings(comparison.settings),
        machine={"seeds": page.plain(comparison.seeds)}
        | {key: page.plain(value) for key, value in comparison.machine.items()},
    )
    path = Path(output_dir) / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8")
    return path

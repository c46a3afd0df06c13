"""The comparison of base, ConThenDisc and ConWithinDisc: table, verdict, `results.json` and `report.html`.

The numbers of a setting (algorithm, remasking, temperature, number of steps) are means and sample standard deviations
over seeds. A mean with a missing part is missing: it is shown as a dash and wins no comparison.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from markupsafe import Markup
from rich import box
from rich.table import Table

from crocodil.evaluation import figures

Row = dict[str, Any]

ENTROPY_TOLERANCE = 0.05
"""Nats by which a base setting may lie below the latent system's entropy and still count as its equal in diversity."""

ENTROPY_SLACK = 0.2
"""Nats below the data's entropy from which samples count as collapsed."""

NAMES = {
    "data": "Data",
    "base": "Base",
    "conthendisc": "ConThenDisc",
    "conwithindisc": "ConWithinDisc",
    "oracle": "Oracle",
}
MISSING = "\N{EN DASH}"
SETTING = ("algorithm", "remasking", "temperature", "num_steps")
CALLS = ("demasker_calls", "prior_calls", "encoder_calls")
MEASURES = (*CALLS, "nfe", "seconds_per_sample", "judge_nll", "entropy", "distance", "parse_rate", "unique_rate")


@dataclass
class Comparison:
    """Everything a report shows.

    Args:
        rows: One dict per setting and seed: `algorithm` (a key of `NAMES`), `remasking` (str or None),
            `temperature` (float or None), `num_steps`, `demasker_calls`, `prior_calls`, `encoder_calls`, `nfe` (all of
            them in demasker calls), `seconds_per_sample`, `judge_nll` and `entropy` (nats), `distance`, `parse_rate`
            and `unique_rate` (0 to 1), `seed`. A number that could not be measured is NaN or None.
        curves: Stage name to its points, dicts of `step`, `train_loss`, `val_loss` and any further validation metric.
        latent_use: Dicts of `mask_ratio` (0 to 1), `with_latents` and `without_latents` (nats per masked token).
        texts: Label to a few sampled programs.
        reconstruction: `source`, `output`, `token_accuracy` (0 to 1), `num_steps`, optionally `with fewer registers`,
            a list of dicts of `num_registers`, `output`, `token_accuracy`. Empty if there is none.
        machine: What it ran on: `processor`, `cores`, versions.
        seeds: Sampling seeds.
        settings: Shown as they are; `corpus` (str), `num_registers`, `latent_dim` and `minutes` (stage name to minutes)
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


def _mean_and_std(values: list[float | None]) -> tuple[float, float]:
    numbers = [math.nan if value is None else float(value) for value in values]
    if not all(map(math.isfinite, numbers)):
        return math.nan, math.nan
    return fmean(numbers), stdev(numbers) if len(numbers) > 1 else math.nan


def summarise(rows: list[Row]) -> list[Row]:
    """Mean and sample standard deviation over seeds of every setting.

    Args:
        rows: Rows as in `Comparison`.

    Returns:
        One dict per setting: `algorithm`, `remasking`, `temperature`, `num_steps`, `num_seeds`, and each measure `m` as
        `m` (mean) and `m_std` (NaN for a single seed). Order: data, base, conthendisc, conwithindisc, oracle, each by
        descending steps.

    Raises:
        ValueError: If a row names an unknown algorithm.
    """
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if row["algorithm"] not in NAMES:
            raise ValueError(
                f"Expected an algorithm of {', '.join(NAMES)}, got {row['algorithm']!r}; rename the row's."
            )
        groups[tuple(row.get(key) for key in SETTING)].append(row)
    summary = []
    for setting, members in groups.items():
        item: Row = dict(zip(SETTING, setting, strict=True)) | {"num_seeds": len(members)}
        for measure in MEASURES:
            item[measure], item[f"{measure}_std"] = _mean_and_std([row.get(measure) for row in members])
        summary.append(item)

    def place(row: Row) -> tuple[int, int, str, float]:
        return (
            list(NAMES).index(row["algorithm"]),
            -row["num_steps"],
            row["remasking"] or "",
            -(row["temperature"] or 0),
        )

    return sorted(summary, key=place)


def _data_row(summary: list[Row]) -> Row:
    missing = {"algorithm": "data", **{f"{m}{suffix}": math.nan for m in MEASURES for suffix in ("", "_std")}}
    return next((row for row in summary if row["algorithm"] == "data"), missing)


def _collapsed(row: Row, data: Row) -> bool:
    return row["entropy"] < data["entropy"] - ENTROPY_SLACK


def _best(candidates: Iterable[Row]) -> Row | None:
    """The highest parse rate; ties go to the judge."""
    measured = [row for row in candidates if math.isfinite(row["parse_rate"])]

    def rank(row: Row) -> tuple[float, bool, float]:
        return row["parse_rate"], math.isfinite(row["judge_nll"]), -row["judge_nll"]

    return max(measured, key=rank, default=None)


def verdict(rows: list[Row], length: int) -> list[Row]:
    """Compares the latent system with the base at the same number of demasker calls.

    The budgets are length // 8, length // 16 and length // 32. At each, the latent system is the setting of ConThenDisc
    or ConWithinDisc with the highest mean parse rate; the base is its own best setting by parse rate among those whose
    entropy is not below the latent system's minus `ENTROPY_TOLERANCE`, so that repetition cannot win.

    Args:
        rows: Rows as in `Comparison`.
        length: Program length L in tokens.

    Returns:
        One dict per budget. `num_steps`: demasker calls. `latent`, `base`: rows of `summarise` with means, spreads and
        total costs (`nfe`, `seconds_per_sample`), or None if nothing fits. `matching_base`: the base row with the
        fewest calls that has at least the latent system's parse rate at no less entropy, or None. `data_entropy`:
        nats. `better_parse`, `better_judge`: the latent mean is strictly better. `entropy_kept`: its entropy is at
        least the data's minus `ENTROPY_SLACK`. `holds`: all three.
    """
    summary = summarise(rows)
    data = _data_row(summary)
    bases = [row for row in summary if row["algorithm"] == "base"]
    items = []
    for budget in filter(None, (length // 8, length // 16, length // 32)):
        here = [row for row in summary if row["demasker_calls"] == budget]
        latent = _best(row for row in here if row["algorithm"] in ("conthendisc", "conwithindisc"))
        item: Row = {"num_steps": budget, "latent": latent, "base": None, "matching_base": None}
        item |= {"data_entropy": data["entropy"], "better_parse": False, "better_judge": False, "entropy_kept": False}
        if latent is not None:
            diverse = [row for row in bases if row["entropy"] >= latent["entropy"] - ENTROPY_TOLERANCE]
            base = _best(row for row in diverse if row["demasker_calls"] == budget)
            matching = [row for row in diverse if row["parse_rate"] >= latent["parse_rate"]]
            item["base"] = base
            item["matching_base"] = min(matching, key=lambda row: row["demasker_calls"], default=None)
            item["better_parse"] = base is not None and latent["parse_rate"] > base["parse_rate"]
            item["better_judge"] = base is not None and latent["judge_nll"] < base["judge_nll"]
            item["entropy_kept"] = latent["entropy"] >= data["entropy"] - ENTROPY_SLACK
        item["holds"] = item["better_parse"] and item["better_judge"] and item["entropy_kept"]
        items.append(item)
    return items


def _number(value: float | None, digits: int = 2) -> str:
    return MISSING if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def _spread(row: Row, measure: str, digits: int = 2, scale: float = 1.0) -> str:
    mean, std = row[measure] * scale, row[f"{measure}_std"] * scale
    return _number(mean, digits) + (f" ± {_number(std, digits)}" if math.isfinite(std) else "")


def _setting(row: Row) -> str:
    order = (row["remasking"] or "unknown").replace("_", " ")
    return f"{order} order" + (f", T = {row['temperature']:g}" if row["temperature"] is not None else "")


def _ratio(row: Row, other: Row, measure: str) -> str:
    return _number(row[measure] / other[measure], 1) if other[measure] else MISSING


def verdict_sentences(items: list[Row]) -> list[str]:
    """Says each item of `verdict` in plain words, won or lost.

    Args:
        items: What `verdict` returned.

    Returns:
        One paragraph per item, in the same order.
    """
    return [_say(item) for item in items]


def _say(item: Row) -> str:
    calls = f"{item['num_steps']} demasker call{'s' if item['num_steps'] > 1 else ''}"
    latent, base, match = item["latent"], item["base"], item["matching_base"]
    if latent is None:
        return f"At {calls} neither ConThenDisc nor ConWithinDisc was measured, so nothing is claimed."
    name = NAMES[latent["algorithm"]]
    entropies = f"{_number(latent['entropy'])} nats, the data's {_number(item['data_entropy'])}"
    if base is None:
        return (
            f"At {calls} {name} has no base to stand against: no base setting with so many calls has its entropy "
            f"({entropies}), so nothing is claimed. {name} parses {_spread(latent, 'parse_rate', 1, 100)} %."
        )
    faults = [
        fault
        for good, fault in (
            (item["better_parse"], "it does not parse more often"),
            (item["better_judge"], "the judge does not prefer it"),
            (item["entropy_kept"], "its entropy does not stay near the data's"),
        )
        if not good
    ]
    head = f"At {calls} {name} " + (
        f"does not beat the base: {', and '.join(faults)}." if faults else "beats the base."
    )
    quality = (
        f"It parses {_spread(latent, 'parse_rate', 1, 100)} % against {_spread(base, 'parse_rate', 1, 100)} % for the "
        f"base; the judge gives it {_spread(latent, 'judge_nll')} against {_spread(base, 'judge_nll')} nats per token "
        f"(lower is better); its entropy is {entropies}. ({name}: {_setting(latent)}; base: {_setting(base)}.)"
    )
    cost = (
        f"With the prior it costs {_number(latent['nfe'], 1)} demasker-call equivalents against "
        f"{_number(base['nfe'], 1)} for the base, and {_ratio(latent, base, 'seconds_per_sample')} times the wall time."
    )
    return f"{head} {quality} {cost} {_say_match(match, latent, name)}"


def _say_match(match: Row | None, latent: Row, name: str) -> str:
    if match is None:
        return "Base budget with the same parse rate and no less entropy: none measured."
    cost, time = (_ratio(match, latent, measure) for measure in ("nfe", "seconds_per_sample"))
    return (
        f"The base reaches that parse rate with no less entropy at {match['demasker_calls']:g} calls: {cost} times the "
        f"network cost and {time} times the wall time of {name}."
    )


def _cells(row: Row) -> list[str]:
    """One row under the headers of `figures.GLOSSARY`."""
    cost = ["", "", ""]
    if row["algorithm"] != "data":
        calls = "/".join(MISSING if math.isnan(row[key]) else f"{row[key]:g}" for key in CALLS)
        milliseconds = row["seconds_per_sample"] * 1000
        cost = [calls, _number(row["nfe"], 1), _number(milliseconds, 2 if milliseconds < 100 else 0)]
    temperature = "" if row["temperature"] is None else f"{row['temperature']:g}"
    return [
        NAMES[row["algorithm"]],
        (row["remasking"] or "").replace("_", " "),
        temperature,
        *cost,
        _spread(row, "judge_nll"),
        _number(row["entropy"]),
        _spread(row, "distance"),
        _spread(row, "parse_rate", 1, 100),
        _number(row["unique_rate"] * 100, 1),
    ]


def results_table(rows: list[Row]) -> Table:
    """The comparison for a terminal of 120 columns.

    Args:
        rows: Rows as in `Comparison`.

    Returns:
        A table of one line per setting, grouped by algorithm; collapsed settings are dim.
    """
    summary = summarise(rows)
    data = _data_row(summary)
    table = Table(
        title="Quality against cost",
        caption="Mean ± standard deviation over seeds. Calls: demasker/prior/encoder. NFE: all calls by FLOPs, in "
        "demasker calls. Dim: collapsed entropy.",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for index, (header, _, _) in enumerate(figures.GLOSSARY):
        table.add_column(header.replace(" ", "\n"), justify="left" if index < 2 else "right", no_wrap=True)
    for row, following in zip(summary, [*summary[1:], None], strict=False):
        cells = [cell.replace("± ", "±") for cell in _cells(row)]
        last = following is None or following["algorithm"] != row["algorithm"]
        table.add_row(*cells, end_section=last, style="dim" if _collapsed(row, data) else None)
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
    members = [row for row in summary if row["algorithm"] == algorithm and not _collapsed(row, data)]
    if algorithm != name:
        members = [row for row in members if row["remasking"] == "random"]
    budgets = {row["demasker_calls"] for row in members}
    best = (_best(row for row in members if row["demasker_calls"] == budget) for budget in budgets)
    return sorted(filter(None, best), key=lambda row: row["nfe"])


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(part)}" for key, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _introduce(comparison: Comparison) -> list[str]:
    settings, machine = comparison.settings, comparison.machine
    sketch = f"{settings.get('num_registers', 'a few')} registers of {settings.get('latent_dim', 'several')} numbers"
    minutes = settings.get("minutes", {})
    duration = f" Training took {sum(minutes.values()):.0f} minutes ({_plain(minutes)})." if minutes else ""
    cores = f", {machine['cores']} cores" if "cores" in machine else ""
    host = machine.get("processor", "an unnamed processor") + cores
    return [
        "A masked-diffusion language model (the base) writes a program by filling masked tokens, many in one network "
        "call: fewer calls are faster, and worse. Here it is compared with itself guided by a sketch of the whole "
        "program. ConThenDisc draws the sketch first and then fills in tokens; ConWithinDisc draws it again half-way.",
        f"Trained on {settings.get('corpus', 'Python functions')}: programs of up to {comparison.length} tokens, "
        f"sketches of {sketch}. Machine: {host}.{duration}",
    ]


def _curve_panels(curves: dict[str, list[Row]]) -> list[tuple[Markup, str]]:
    panels = []
    for stage, points in curves.items():
        last = {key: value for point in points for key, value in point.items() if _number(value) != MISSING}
        text = ", ".join(f"{key.replace('_', ' ')} {_plain(round(value, 3))}" for key, value in last.items())
        panels.append(
            (figures.curve_panel(stage, points), f"Last values: {text}." if text else "Nothing was recorded.")
        )
    return panels


def _reconstructions(reconstruction: Row) -> list[tuple[str, Markup]]:
    if not reconstruction:
        return []
    source = reconstruction["source"]
    versions = [("All registers", reconstruction)]
    for version in reconstruction.get("with fewer registers", []):
        versions.append((f"First {version['num_registers']} of the registers", version))
    programs = [("Source", Markup.escape(source))]
    for label, version in versions:
        accuracy = version.get("token_accuracy")
        right = _number(accuracy and 100 * accuracy, 1)
        programs.append((f"{label}: {right} % of tokens right", figures.mark_differences(source, version["output"])[1]))
    return programs


def write_report(output_dir: str | Path, comparison: Comparison) -> Path:
    """Writes `report.html`, one page that needs nothing beside it.

    Args:
        output_dir: Folder, created if absent.
        comparison: What to show.

    Returns:
        Path of the file.
    """
    summary = summarise(comparison.rows)
    data = _data_row(summary)
    collapsed = [row for row in summary if _collapsed(row, data)]
    lines = {name: _line(name, summary, data) for name in figures.LINES}

    def panel(x: str, y: str) -> Markup:
        return figures.cost_panel(x, y, lines, collapsed, data, data["entropy"] - ENTROPY_SLACK)

    judged = verdict(comparison.rows, comparison.length)
    groups = [row["algorithm"] for row in summary]
    table = []
    for row, above in zip(summary, [None, *groups], strict=False):
        classes = {"first": row["algorithm"] != above, "collapsed": row in collapsed}
        table.append((" ".join(name for name, applies in classes.items() if applies), _cells(row)))
    page = figures.render(
        lead=_introduce(comparison),
        verdict=[(item["holds"], text) for item, text in zip(judged, verdict_sentences(judged), strict=True)],
        slack=ENTROPY_SLACK,
        cost_panels=[panel(x, y) for y in ("parse_rate", "judge_nll") for x in ("nfe", "seconds_per_sample")],
        entropy_panels=[panel("nfe", "entropy"), panel("entropy", "judge_nll")],
        latent_panel=figures.latent_panel(comparison.latent_use),
        curve_panels=_curve_panels(comparison.curves),
        texts={label: [figures.highlight(code) for code in codes] for label, codes in comparison.texts.items()},
        reconstruction=_reconstructions(comparison.reconstruction),
        num_steps=comparison.reconstruction.get("num_steps"),
        table=table,
        settings={key.replace("_", " "): _plain(value) for key, value in comparison.settings.items()},
        machine={"seeds": _plain(comparison.seeds)} | {key: _plain(value) for key, value in comparison.machine.items()},
    )
    path = Path(output_dir) / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path

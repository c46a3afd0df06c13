"""The figures of the report.

They are SVG made to stand inside HTML: their colours become CSS variables and follow it into dark mode.
"""

import io
import math
import re
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from crocodil.evaluation.intervals import half_width
from crocodil.evaluation.verdict import Row


class Line(NamedTuple):
    """How one system is drawn, in the figures and in their common legend."""

    label: str
    marker: str
    symbol: str
    style: str
    size: float = 6.5


LINES = {
    "base": Line("Base, best rule", "s", "■", "-", 7.5),
    "base_random": Line("Base, random order", "o", "●", "--", 4.5),
    "conthendisc": Line("ConThenDisc", "^", "▲", "-"),
    "conwithindisc": Line("ConWithinDisc", "D", "◆", "-"),
    "oracle": Line("Oracle sketch", "v", "▼", ":"),
}
PALETTE = {  # name: (light, dark)
    "base": ("#1f5fa8", "#6aa8f0"),
    "base_random": ("#7eb2e3", "#3f78b5"),
    "conthendisc": ("#d9730d", "#f59e4b"),
    "conwithindisc": ("#2e8b57", "#52c98a"),
    "oracle": ("#8b5fbf", "#b794f4"),
    "ink": ("#1f2937", "#e6e9ef"),
    "muted": ("#667085", "#9aa4b5"),
    "grid": ("#e3e6eb", "#333b49"),
    "faded": ("#8e97a6", "#7d8798"),
    "good": ("#15803d", "#4ade80"),
    "bad": ("#c2410c", "#fb923c"),
    "paper": ("#f7f8fa", "#12161d"),
    "card": ("#ffffff", "#1b212b"),
}
INK, MUTED, GRID, FADED = (PALETTE[name][0] for name in ("ink", "muted", "grid", "faded"))
STYLE: dict[Any, Any] = {
    "font.size": 10.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 6.5,
    "legend.frameon": False,
    "svg.hashsalt": "crocodil",
    "text.parse_math": False,
}
QUANTITIES = {  # key: (label, factor)
    "nfe": ("Network cost, in demasker calls", 1),
    "seconds_per_sample": ("Milliseconds per sample", 1000),
    "mauve": ("MAUVE", 1),
    "parse_rate": ("Parse rate (square-root scale)", 1),
    "judge_nll": ("Judge NLL, nats per token", 1),
    "entropy": ("Entropy within a text, nats", 1),
}


def _axes(title: str, xlabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.6, 3.9), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.set_xlabel(xlabel)
    return figure, axes


def _svg(figure: Figure, description: str) -> Markup:
    """The figure as inline SVG: no prologue, identifiers of its own, colours as CSS variables."""
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
    )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    prefix = re.sub(r"\W+", "-", description) + "-"
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", svg)
    for name, (light, _) in PALETTE.items():
        svg = svg.replace(light, f"var(--{name})")
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(description)}"', 1))


def _missing_as_nan(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _scale_x(axes: Axes, x: str) -> None:
    if x == "entropy":
        return
    base, subs = (2, (1.0,)) if x == "nfe" else (10, (1.0, 2.0, 5.0))
    axes.set_xscale("log", base=base)
    axes.xaxis.set_major_locator(LogLocator(base=base, subs=subs))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _scale_y(axes: Axes, y: str) -> None:
    if y != "parse_rate":
        return
    axes.set_yscale("function", functions=(lambda p: np.sqrt(np.maximum(p, 0)), np.square))
    axes.set_yticks([0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1])
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


@rc_context(STYLE)
def cost_panel(x: str, y: str, lines: dict[str, list[Row]], collapsed: list[Row], data: Row, floor: float) -> Markup:
    """One quantity of the comparison against another.

    Args:
        x: Key of `QUANTITIES` on the horizontal axis.
        y: Key of `QUANTITIES` on the vertical axis.
        lines: Name of `LINES` to the summary rows it joins.
        collapsed: Summary rows drawn hollow and grey.
        data: Summary row of the held-out programs.
        floor: Entropy in nats below which samples count as collapsed.

    Returns:
        The panel as inline SVG.
    """
    (xlabel, xfactor), (ylabel, yfactor) = QUANTITIES[x], QUANTITIES[y]
    figure, axes = _axes(ylabel, xlabel)
    _scale_x(axes, x)
    _scale_y(axes, y)
    for row in collapsed:
        marker = LINES[row["algorithm"]].marker
        axes.plot(row[x] * xfactor, row[y] * yfactor, marker, mfc="none", mec=FADED, clip_on=False)
    for name, rows in lines.items():
        line, color = LINES[name], PALETTE[name][0]
        values = np.array([row[y] for row in rows]) * yfactor
        spread = np.nan_to_num([half_width(row[f"{y}_std"], row["num_seeds"]) for row in rows]) * yfactor
        lower = np.minimum(spread, values) if y == "parse_rate" else spread
        axes.errorbar(
            [row[x] * xfactor for row in rows],
            values,
            yerr=[lower, spread] if rows else None,
            color=color,
            fmt=line.marker,
            linestyle=line.style,
            markersize=line.size,
            capsize=2.5,
            elinewidth=1.2,
            clip_on=False,
        )
    if x == "entropy":
        axes.plot(data[x], data[y], "*", color=INK, markersize=12)
    elif math.isfinite(data[y]):
        axes.axhline(data[y] * yfactor, color=INK, linestyle=(0, (5, 3)), linewidth=1.2)
    if y == "parse_rate":
        axes.set_ylim(bottom=0)
    if y == "entropy" and math.isfinite(floor):
        bottom, top = axes.get_ylim()
        bottom = min(bottom, floor - 0.3)
        axes.axhspan(bottom, floor, color=GRID, alpha=0.5, linewidth=0)
        axes.set_ylim(bottom, top)
    return _svg(figure, f"{ylabel} against {xlabel}")


@rc_context(STYLE)
def temperature_panel(summary: list[Row], data: Row) -> Markup:
    """Judge NLL against entropy, each line one system at one budget over its temperatures.

    Args:
        summary: of `summarise`; settings with a single temperature are points.
        data: Summary row of the held-out programs.

    Returns:
        The panel as inline SVG.
    """
    figure, axes = _axes("Judge NLL against entropy, over temperatures", QUANTITIES["entropy"][0])
    axes.set_ylabel(QUANTITIES["judge_nll"][0])
    lines: dict[tuple[Any, ...], list[Row]] = {}
    for row in summary:
        if row["algorithm"] != "data":
            lines.setdefault((row["algorithm"], row["remasking"], row["num_registers"], row["num_steps"]), []).append(
                row
            )
    for (algorithm, *_), rows in lines.items():
        line, color = LINES[algorithm], PALETTE[algorithm][0]
        rows = sorted(rows, key=lambda row: row["temperature"])
        axes.errorbar(
            [row["entropy"] for row in rows],
            [row["judge_nll"] for row in rows],
            yerr=np.nan_to_num([half_width(row["judge_nll_std"], row["num_seeds"]) for row in rows]),
            color=color,
            fmt=line.marker,
            linestyle=line.style,
            markersize=4,
            linewidth=1.0,
            elinewidth=0.8,
            alpha=0.8,
        )
        axes.annotate(f"{rows[-1]['num_steps']}", (rows[-1]["entropy"], rows[-1]["judge_nll"]), color=MUTED, fontsize=8)
    axes.plot(data["entropy"], data["judge_nll"], "*", color=INK, markersize=12)
    return _svg(figure, "Judge NLL against entropy over temperatures, by number of calls")


@rc_context(STYLE)
def conditioning_panel(rows: list[Row], y: str) -> Markup:
    """Cross-entropy or top-1 accuracy against the mask ratio, a line for each number of true registers.

    Args:
        rows: Dicts of `system`, `num_registers` (0 for none), `mask_ratio` (0 to 1), `cross_entropy` (nats), `top1`.
        y: "cross_entropy" or "top1".

    Returns:
        The panel as inline SVG.
    """
    title = {"cross_entropy": "Cross-entropy, nats per masked token", "top1": "Top-1 accuracy at masked tokens"}[y]
    figure, axes = _axes(title, "Share of tokens masked")
    lines: dict[tuple[str, int], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["mask_ratio"]):
        lines.setdefault((row["system"], row["num_registers"]), []).append(row)
    counts = sorted({count for system, count in lines if system == "demasker" and count}, reverse=True)
    for (system, count), points in lines.items():
        color, style, label = MUTED, "o-", "without the sketch"
        if system == "base":
            color, style, label = PALETTE["base"][0], "s--", "base model"
        elif count:
            color, label = PALETTE["conthendisc"][0], f"{count} register{'s' if count > 1 else ''}"
            style = "^vD<>p"[counts.index(count) % 6] + ("-", "--", "-.", ":")[counts.index(count) % 4]
        values = [_missing_as_nan(point.get(y)) for point in points]
        axes.plot([point["mask_ratio"] for point in points], values, style, color=color, label=label, markersize=5)
    axes.set_ylim(bottom=0, top=1 if y == "top1" else None)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    if y == "top1":
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    figure.legend(loc="outside lower center", ncols=3)
    return _svg(figure, f"{title}, against share of tokens masked, by number of registers")


@rc_context(STYLE)
def reconstruction_panel(items: list[Row], y: str) -> Markup:
    """A figure of reconstruction against demasker calls, a line for each block size and number of registers.

    Args:
        items: summarised rows of `Reconstruction`.
        y: "cer", "token_accuracy" or "parse_rate".

    Returns:
        The panel as inline SVG.
    """
    title = {"cer": "Character error rate", "token_accuracy": "Token accuracy", "parse_rate": "Parse rate"}[y]
    figure, axes = _axes(title, "Demasker calls")
    lines: dict[tuple[Any, Any], list[Row]] = {}
    for item in items:
        if item["num_steps"]:
            lines.setdefault((item["num_registers"], item["block_size"]), []).append(item)
    colors = [PALETTE[name][0] for name in ("conthendisc", "base", "conwithindisc", "oracle")]
    blocks = list(dict.fromkeys(block for _, block in lines))
    counts = list(dict.fromkeys(count for count, _ in lines))
    for (count, block), points in lines.items():
        points = sorted(points, key=lambda point: point["num_steps"])
        registers = "all registers" if count is None else f"{count} register{'s' if count > 1 else ''}"
        axes.plot(
            [point["num_steps"] for point in points],
            [_missing_as_nan(point.get(y)) for point in points],
            "o^sDv"[counts.index(count) % 5] + ("-", "--", "-.", ":")[counts.index(count) % 4],
            color=colors[blocks.index(block) % 4],
            label=registers + ("" if block is None else f", blocks of {block}"),
            markersize=5,
        )
    _scale_x(axes, "nfe")
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return _svg(figure, f"{title} of reconstructions against demasker calls")


@rc_context(STYLE)
def curve_panel(stage: str, points: list[Row]) -> Markup:
    """Training and validation loss of one stage.

    Args:
        stage: Name of the stage.
        points: Dicts of `step`, `train_loss`, `val_loss`; a loss may be None.

    Returns:
        The panel as inline SVG.
    """
    figure, axes = _axes(stage.replace("_", " ").capitalize(), "Training step")
    for key, label, color, style in (
        ("train_loss", "training", FADED, "-"),
        ("val_loss", "validation", PALETTE["conthendisc"][0], "o-"),
    ):
        known = [(p["step"], p[key]) for p in points if math.isfinite(_missing_as_nan(p.get(key)))]
        axes.plot(
            [step for step, _ in known], [loss for _, loss in known], style, color=color, label=label, markersize=4
        )
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    figure.legend(loc="outside lower center", ncols=2)
    return _svg(figure, f"Loss of the stage {stage} against training step")

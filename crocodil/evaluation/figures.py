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
        spread = np.nan_to_num([row[f"{y}_std"] for row in rows]) * yfactor
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


def has_base(points: list[Row]) -> bool:
    """Whether any point of the use of latents tells the cross-entropy of the base model."""
    return any(math.isfinite(_missing_as_nan(point.get("base"))) for point in points)


@rc_context(STYLE)
def latent_panel(points: list[Row]) -> Markup:
    """Cross-entropy against mask ratio, with and without latents, and that of the base model where it is given.

    Args:
        points: Dicts of `mask_ratio` (0 to 1), `with_latents`, `without_latents` and optionally `base` (nats per masked
            token).

    Returns:
        The panel as inline SVG.
    """
    points = sorted(points, key=lambda point: point["mask_ratio"])
    title = "Cross-entropy, nats per masked token"
    figure, axes = _axes(title, "Share of tokens masked")
    ratios = [point["mask_ratio"] for point in points]
    without, with_latents, base = (
        [_missing_as_nan(point.get(key)) for point in points] for key in ("without_latents", "with_latents", "base")
    )
    axes.fill_between(ratios, with_latents, without, color=PALETTE["conthendisc"][0], alpha=0.12, linewidth=0)
    if has_base(points):
        axes.plot(ratios, base, "s--", color=PALETTE["base"][0], label="base model")
    axes.plot(ratios, without, "o-", color=MUTED, label="without the sketch")
    axes.plot(ratios, with_latents, "^-", color=PALETTE["conthendisc"][0], label="with the sketch")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    figure.legend(loc="outside lower center", ncols=3)
    base_too = ", and of the base" if has_base(points) else ""
    return _svg(figure, f"{title}, against share of tokens masked, with and without latents{base_too}")


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

"""How the report looks: its figures, its marked-up code, its style sheet and its page.

Figures are SVG made to stand inside HTML: their colours become CSS variables and follow it into dark mode.
"""

import difflib
import io
import math
import re
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter
from pygments import highlight as pygments_highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

Row = dict[str, Any]


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
    "entropy": ("Unigram entropy, nats", 1),
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


@rc_context(STYLE)
def latent_panel(points: list[Row]) -> Markup:
    """Cross-entropy against mask ratio, with and without latents.

    Args:
        points: Dicts of `mask_ratio` (0 to 1), `with_latents` and `without_latents` (nats per masked token).

    Returns:
        The panel as inline SVG.
    """
    points = sorted(points, key=lambda point: point["mask_ratio"])
    title = "Cross-entropy, nats per masked token"
    figure, axes = _axes(title, "Share of tokens masked")
    ratios = [point["mask_ratio"] for point in points]
    without, with_latents = (
        [_missing_as_nan(point.get(key)) for point in points] for key in ("without_latents", "with_latents")
    )
    axes.fill_between(ratios, with_latents, without, color=PALETTE["conthendisc"][0], alpha=0.12, linewidth=0)
    axes.plot(ratios, without, "s-", color=PALETTE["base"][0], label="without the sketch")
    axes.plot(ratios, with_latents, "^-", color=PALETTE["conthendisc"][0], label="with the sketch")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    figure.legend(loc="outside lower center", ncols=2)
    return _svg(figure, f"{title}, against share of tokens masked, with and without latents")


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


def highlight(code: str) -> Markup:
    """Python code with its syntax coloured.

    Args:
        code: Any text; it need not be valid Python.

    Returns:
        Escaped HTML, to be placed in a `pre` of class `code`.
    """
    return Markup(pygments_highlight(code, PythonLexer(stripnl=False), HtmlFormatter(nowrap=True)))


def mark_differences(source: str, output: str) -> tuple[Markup, Markup]:
    """Marks the tokens in which two programs differ.

    Args:
        source: The original program.
        output: Its reconstruction.

    Returns:
        Both as escaped HTML, differing tokens in `mark` elements.
    """
    before, after = (re.findall(r"\w+|\s|[^\w\s]", text) for text in (source, output))
    marked: tuple[list[Markup], list[Markup]] = ([], [])
    for tag, *ends in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        for side, tokens in enumerate((before[ends[0] : ends[1]], after[ends[2] : ends[3]])):
            text = "".join(tokens)
            marked[side].append(Markup("<mark>{}</mark>").format(text) if text and tag != "equal" else escape(text))
    return Markup("").join(marked[0]), Markup("").join(marked[1])


GLOSSARY = (  # header, meaning, what it hides
    ("System", "Base: the masked-diffusion model alone. ConThenDisc: a sketch from the prior, then tokens. "
     "ConWithinDisc: the sketch is drawn again half-way. Oracle: true sketches of held-out programs.",
     "Oracle is a ceiling for the prior, not a generator: it has read the programs it writes."),
    ("Order", "The rule that picks which tokens each call commits.",
     "Confident-first rules tend to write the commonest program again and again: see entropy."),
    ("T", "Temperature of the token distribution; at 1 it is the one the model learned.",
     "A lower one trades diversity for likelihood."),
    ("Calls D/P/E", "Calls of demasker, prior and encoder.", "They differ in price: see NFE."),
    ("NFE", "All network calls by counted FLOPs, in calls of the base demasker.",
     "Memory traffic, and the cost of drawing tokens."),
    ("ms", "Milliseconds per sample, measured on this machine.", "Other machines and batch sizes rank differently."),
    ("Judge NLL", "Nats per token under a small causal model; lower is likelier.",
     "Repetition: a low NLL with a low entropy means collapse, not quality."),
    ("Entropy", "Unigram entropy in nats of all samples pooled; close to the data is good.",
     "Word order: shuffled tokens score the same."),
    ("Fréchet", "Fréchet distance between judge features of samples and of held-out programs; lower is better.",
     "It is never zero for a finite number of samples: the data row is the floor."),
    ("Parse %", "Share of samples that Python can parse.", "Meaning: short and trivial programs parse easily."),
    ("Unique %", "Share of distinct samples.", "Near-copies, and copies of the training data."),
)  # fmt: skip
THEME, DARK_THEME = (" ".join(f"--{name}: {pair[side]};" for name, pair in PALETTE.items()) for side in (0, 1))
CODE, DARK_CODE = (HtmlFormatter(style=style).get_style_defs(".code") for style in ("friendly", "github-dark"))
STYLE_SHEET = (
    f":root {{ {THEME} }}\n{CODE}\n@media (prefers-color-scheme: dark) {{ :root {{ {DARK_THEME} }}\n{DARK_CODE} }}"
)
STYLE_SHEET += """
:root { color-scheme: light dark; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.6 system-ui, sans-serif; }
header, section, footer { max-width: 74rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 3rem; }
h1 { font-size: clamp(1.7rem, 5vw, 2.4rem); line-height: 1.15; letter-spacing: -.02em; margin: 0 0 1rem; }
h2 { font-size: 1.3rem; margin: 3rem 0 .6rem; }
h3 { font-size: 1rem; margin: 0 0 .5rem; }
p, ul, figcaption { max-width: 48rem; }
small, figcaption, .legend, footer { color: var(--muted); font-size: .9rem; }
ul { list-style: none; padding: 0; }
li strong { display: block; }
.verdict li { background: var(--card); border-left: 4px solid var(--bad); border-radius: 6px;
  padding: .8rem 1.1rem; margin: .8rem 0; }
.verdict .holds { border-color: var(--good); }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1.3rem; max-width: none; margin: .5rem 0; }
figure { margin: 0; }
figcaption { margin-top: .6rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 1.25rem;
  align-items: start; }
.card { background: var(--card); border-radius: 8px; padding: 1rem; min-width: 0; }
svg { display: block; width: 100%; max-width: 36rem; height: auto; margin: auto; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: left; vertical-align: top; }
.results :is(th, td) { white-space: nowrap; }
.results :is(th, td):nth-child(n + 3) { text-align: right; }
tbody th { white-space: nowrap; }
tr + tr > * { border-top: 1px solid var(--grid); }
.first > * { border-top: 1px solid var(--muted) !important; }
.collapsed { color: var(--muted); font-style: italic; }
caption { text-align: left; color: var(--muted); padding: 0 .7rem .6rem; }
pre { margin: 0; overflow-x: auto; font: .8rem/1.5 ui-monospace, monospace; background: none !important; }
pre + pre { border-top: 1px solid var(--grid); padding-top: .8rem; margin-top: .8rem; }
mark { background: #ffd8a8; color: #5a2d00; border-radius: 2px; }
.code .err { border: none; color: inherit; background: none; }
footer { padding-block: 3rem 2rem; }
"""
PAGE = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string("""
{%- macro pairs(mapping) %}
<table>
{% for key, value in mapping.items() %}
<tr><th scope="row">{{ key }}</th><td>{{ value }}</td></tr>
{% endfor %}
</table>
{% endmacro %}
{% macro legend() %}
<ul class="legend" aria-label="Legend">
{% for name, line in lines.items() %}
<li><span style="color: var(--{{ name }})">{{ line.symbol }}</span> {{ line.label }}</li>
{% endfor %}
<li>╌ ★ Held-out programs</li>
<li><span style="color: var(--faded)">□</span> Collapsed</li>
</ul>
{% endmacro %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>crocodil: sketch first, then tokens</title>
<style>{{ style_sheet }}</style>
</head>
<body>
<header>
<h1>Sketch first, then tokens</h1>
{% for paragraph in lead %}
<p>{{ paragraph }}</p>
{% endfor %}
</header>
<section id="verdict">
{% set wins = verdict | selectattr(0) | list | length %}
<h2>Verdict: at equal demasker calls the sketch wins {{ wins }} of {{ verdict | length }} times</h2>
<p>To win, it must parse more often than the base, please the judge more, and keep the entropy of the data, each by the
mean over seeds. The base may use its best rule of no less entropy. The prior comes on top: its cost is told too.</p>
<ul class="verdict">
{% for holds, text in verdict %}
{% set head, stop, rest = (text | replace(" ± ", "\u00a0±\u00a0") | replace(" %", "\u00a0%")).partition(". ") %}
<li{% if holds %} class="holds"{% endif %}><strong>{{ head }}{{ stop }}</strong> {{ rest }}</li>
{% endfor %}
</ul>
</section>
<section id="cost">
<h2>Quality against cost</h2>
<figure>
{{ legend() }}
<div class="grid">{% for svg in cost_panels %}<div class="card">{{ svg }}</div>{% endfor %}</div>
<figcaption>Each line joins, for each number of calls, the setting that parses best among those that keep the entropy of
the data; bars are one standard deviation over seeds. The cost includes prior and encoder. Hollow grey points have
collapsed: their entropy lies more than {{ slack }} nats below the data, as confident-first orders of the base tend to.
They can look good in one figure because they repeat a few programs.</figcaption>
</figure>
</section>
<section id="entropy">
<h2>Entropy: is it still diverse?</h2>
<figure>
{{ legend() }}
<div class="grid">{% for svg in entropy_panels %}<div class="card">{{ svg }}</div>{% endfor %}</div>
<figcaption>The shaded band counts as collapse. Likelihood can be bought with repetition, so read the two together: near
the star is good, low but far to its left is collapse.</figcaption>
</figure>
</section>
<section id="latent-use">
<h2>Does the demasker use the sketch?</h2>
<figure class="grid">
<div class="card">{{ latent_panel }}</div>
<figcaption>Cross-entropy on masked tokens of held-out programs, with the sketch of the program itself and without. The
shaded gap is what the sketch tells; if there is none, it is ignored.</figcaption>
</figure>
</section>
<section id="training">
<h2>Training</h2>
<div class="grid">
{% for svg, caption in curve_panels %}
<figure class="card">{{ svg }}<figcaption>{{ caption }}</figcaption></figure>
{% else %}
<p>No curves were recorded.</p>
{% endfor %}
</div>
</section>
<section id="texts">
<h2>What they write</h2>
<div class="grid">
{% for label, programs in texts.items() %}
<article class="card"><h3>{{ label }}</h3>
{% for code in programs %}<pre class="code">{{ code }}</pre>{% endfor %}
</article>
{% else %}
<p>No samples were kept.</p>
{% endfor %}
</div>
</section>
<section id="reconstruction">
<h2>Reconstruction: what a sketch holds</h2>
{% if reconstruction %}
<p>A held-out program is turned into its sketch and written again from masks alone in {{ num_steps }} demasker
call{{ "" if num_steps == 1 else "s" }}. Differing tokens are marked.</p>
<div class="grid">
{% for label, code in reconstruction %}
<article class="card"><h3>{{ label }}</h3><pre>{{ code }}</pre></article>
{% endfor %}
</div>
{% else %}
<p>None was made.</p>
{% endif %}
</section>
<section id="results">
<h2>All results</h2>
<div class="scroll card">
<table class="results">
<caption>Mean ± standard deviation over seeds. D/P/E: demasker, prior, encoder. Rows in italics: collapsed.</caption>
<thead><tr>{% for header, _, _ in glossary %}<th scope="col">{{ header }}</th>{% endfor %}</tr></thead>
<tbody>
{% for classes, cells in table %}
<tr class="{{ classes }}">{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
</section>
<section id="glossary">
<h2>How to read the numbers</h2>
<div class="scroll card">
<table>
<thead><tr><th scope="col">Column</th><th scope="col">What it is</th><th scope="col">What it hides</th></tr></thead>
{% for header, meaning, hides in glossary %}
<tr><th scope="row">{{ header }}</th><td>{{ meaning }}</td><td>{{ hides }}</td></tr>
{% endfor %}
</table>
</div>
</section>
<section id="settings">
<h2>Settings, seeds and machine</h2>
<div class="grid">
<div class="card scroll"><h3>Settings</h3>{{ pairs(settings) }}</div>
<div class="card scroll"><h3>Machine</h3>{{ pairs(machine) }}</div>
</div>
</section>
<footer>Made by crocodil. The rows of every seed are in results.json beside this page.</footer>
</body>
</html>
""")


def render(**context: Any) -> str:
    """Fills the page; every text is escaped.

    Args:
        **context: The variables of `PAGE` besides its style sheet, legend and glossary.

    Returns:
        The HTML document.

    Raises:
        jinja2.UndefinedError: If a variable is missing.
    """
    return PAGE.render(style_sheet=Markup(STYLE_SHEET), lines=LINES, glossary=GLOSSARY, **context).strip() + "\n"

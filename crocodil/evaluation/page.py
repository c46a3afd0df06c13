"""The page of the report: its template filled in, its code coloured and compared, its settings and columns in words."""

import difflib
import re
from collections.abc import Callable
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape
from pygments import highlight as pygments_highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from crocodil.evaluation.figures import LINES, PALETTE
from crocodil.evaluation.verdict import Row, number

GLOSSARY = (  # header, meaning, what it hides
    ("System", "Base: the masked-diffusion model alone. ConThenDisc: a sketch from the prior, then tokens. "
     "ConWithinDisc: the sketch is drawn again half-way. Oracle: true sketches of held-out programs.",
     "Oracle is a ceiling for the prior, not a generator: it has read the programs it writes."),
    ("Order", "The rule that picks which tokens each call commits.",
     "Confident-first rules tend to write a few tokens again and again: see entropy."),
    ("T", "Temperature of the token distribution; at 1 it is the one the model learned.",
     "A lower one trades diversity for likelihood."),
    ("Calls D/P/E", "Calls of demasker, prior and encoder.", "They differ in price: see NFE."),
    ("NFE", "All network calls by counted FLOPs, in calls of the base demasker.",
     "Memory traffic, and the cost of drawing tokens."),
    ("ms", "Milliseconds per sample, measured on this machine.", "Other machines and batch sizes rank differently."),
    ("Judge NLL", "Nats per token under a small causal model; lower is likelier.",
     "Repetition: a low NLL with a low entropy means collapse, not quality."),
    ("Entropy", "Entropy of the tokens within a text (through its first end token), averaged over texts, in nats; "
     "close to the data is good.",
     "Word order: shuffled tokens score the same. Short texts have less of it, and copies of a text as much."),
    ("Fréchet", "Fréchet distance between judge features of samples and of held-out programs; lower is better.",
     "It is never zero for a finite number of samples: the data row is the floor."),
    ("Parse %", "Share of samples that Python can parse.", "Meaning: short and trivial programs parse easily."),
    ("Copies %", "Share of samples that are copies of another one.", "Near-copies, and copies of the training data."),
    ("MAUVE", "Agreement with held-out programs in the judge's features (mauve-text), mean over its k-means seeds.",
     "It moves by .01 with the k-means seed, and depends on the number of samples: compare with the data row."),
    ("Compile %", "Share of samples that Python can compile.", "Unknown names, and what happens at run time."),
    ("Undefined", "Undefined names a sample, of those that parse (pyflakes).", "Samples that do not parse."),
    ("Distinct-2", "Distinct pairs of tokens over all pairs, of all samples together.",
     "It falls with the number of samples."),
    ("Distinct-4", "Likewise for runs of four tokens.", "It falls with the number of samples."),
    ("Copied run", "Longest run of tokens that also stands in the training data, mean over samples.",
     "Short programs are copied whole by chance: compare with the data row."),
)  # fmt: skip
TERMINAL_COLUMNS = 11
"""So many columns, from the left, fit a terminal of 120; the page shows all that were measured."""


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


def reconstruction_cards(reconstruction: Row) -> list[tuple[str, Markup]]:
    """The source and what was written from its sketch, with all registers and with fewer.

    Args:
        reconstruction: As in `report.Report`.

    Returns:
        Titles and escaped HTML, tokens that differ from the source marked; empty if there is none.
    """
    if not reconstruction:
        return []
    source = reconstruction["source"]
    versions = [("All registers", reconstruction)]
    for version in reconstruction.get("with fewer registers", []):
        versions.append((f"First {version['num_registers']} of the registers", version))
    programs = [("Source", Markup.escape(source))]
    for label, version in versions:
        accuracy = version.get("token_accuracy")
        right = number(accuracy and 100 * accuracy, 1)
        programs.append((f"{label}: {right} % of tokens right", mark_differences(source, version["output"])[1]))
    return programs


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _count(count: float) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count:,}"


FORMATS: dict[str, Callable[[Any], str]] = {"parameters": _count, "minutes": lambda minutes: f"{minutes:.1f}"}


def plain(value: Any, write: Callable[[Any], str] = _short) -> str:
    """A setting in words.

    Args:
        value: A number or text, or lists and dicts of them.
        write: Turns each innermost value into text.

    Returns:
        Entries of a dict as "name value", all parts joined by commas.
    """
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(part, write)}" for key, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(plain(part, write) for part in value)
    return write(value)


def plain_settings(settings: dict[str, Any]) -> dict[str, str]:
    """Each setting in words: `parameters` in millions, `minutes` with one decimal, all others as they are."""
    return {key.replace("_", " "): plain(value, FORMATS.get(key, _short)) for key, value in settings.items()}


def introduce(settings: dict[str, Any], machine: dict[str, str], length: int) -> list[str]:
    """What is compared, what it was trained on and where.

    Args:
        settings: As in `report.Report`.
        machine: As in `report.Report`.
        length: Program length L in tokens.

    Returns:
        Two paragraphs, or one where nothing is known of the training.
    """
    cores = f", {machine['cores']} cores" if "cores" in machine else ""
    host = machine.get("gpu", machine.get("processor", "an unnamed processor")) + cores
    if "corpus" not in settings:
        return [
            f"The pipeline {settings.get('pipeline', '')} on held-out texts of up to {length} tokens. Machine: {host}."
        ]
    known = {key: settings[key] for key in ("num_registers", "latent_dim") if settings.get(key) is not None}
    sketch = f"{known.get('num_registers', 'a few')} registers of {known.get('latent_dim', 'several')} numbers"
    minutes = settings.get("minutes", {})
    parts = plain(minutes, FORMATS["minutes"])
    duration = f" Data and training took {sum(minutes.values()):.1f} minutes ({parts})." if minutes else ""
    return [
        "A masked-diffusion language model (the base) writes a program by filling masked tokens, many in one network "
        "call: fewer calls are faster, and worse. Here it is compared with itself guided by a sketch of the whole "
        "program. ConThenDisc draws the sketch first and then fills in tokens; ConWithinDisc draws it again half-way.",
        f"Trained on {settings['corpus']}: programs of up to {length} tokens, "
        f"sketches of {sketch}. Machine: {host}.{duration}",
    ]


def _theme() -> dict[str, Markup]:
    """Colours of the page and of code, in light and in dark."""
    styles = {}
    for side, (prefix, code_style) in enumerate((("", "friendly"), ("dark_", "github-dark"))):
        variables = " ".join(f"--{name}: {pair[side]};" for name, pair in PALETTE.items())
        styles[f"{prefix}theme"] = Markup(variables)
        styles[f"{prefix}code_style"] = Markup(HtmlFormatter(style=code_style).get_style_defs(".code"))
    return styles


def render(**context: Any) -> str:
    """Fills the page; every text is escaped.

    Args:
        **context: The variables of `report.html.jinja` besides its colours and legend.

    Returns:
        The HTML document.

    Raises:
        jinja2.UndefinedError: If a variable is missing.
    """
    template = (files("crocodil.evaluation") / "report.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(template)
    return page.render(lines=LINES, **_theme(), **context).strip() + "\n"

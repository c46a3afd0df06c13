"""Tables of an evaluation: every cell with all its settings as JSON lines, their summary as Markdown and CSV."""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crocodil.evaluation.intervals import mean_and_std
from crocodil.evaluation.verdict import MISSING, Row


def summary(rows: Sequence[Row], keys: Sequence[str], seed: str = "seed") -> list[Row]:
    """Mean and sample standard deviation over seeds of every other number of the rows.

    Args:
        rows: flat dicts.
        keys: what tells settings apart; the order of first appearance is kept.
        seed: the key that is averaged over.

    Returns:
        One dict for each setting: the keys, `num_seeds`, and each measure `m` as `m` and, of several seeds, `m_std`.
        What is missing (None, NaN) in one seed is left out.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    found = []
    for setting, members in groups.items():
        item: Row = dict(zip(keys, setting, strict=True)) | {"num_seeds": len(members)}
        measures = dict.fromkeys(name for row in members for name in row if name not in keys and name != seed)
        for name in measures:
            values = [row.get(name) for row in members]
            if all(isinstance(value, int | float | None) for value in values):
                figures = dict(zip((name, f"{name}_std"), mean_and_std(values), strict=True))
                item |= {key: value for key, value in figures.items() if math.isfinite(value)}
        found.append(item)
    return found


def markdown(items: Sequence[Row], columns: Sequence[str]) -> str:
    """A table of summarised rows: one line each, mean ± deviation.

    Args:
        items: of `summary`.
        columns: keys to show, in order; those that no row has are left out.
    """
    shown = [name for name in columns if any(item.get(name) is not None for item in items)]
    lines = [f"| {' | '.join(name.replace('_', ' ') for name in shown)} |", "|" + "---|" * len(shown)]
    lines += [f"| {' | '.join(_cell(item, name) for name in shown)} |" for item in items]
    return "\n".join(lines) + "\n"


def _cell(item: Row, name: str) -> str:
    value = item.get(name)
    if value is None or value == "":
        return "" if value == "" else MISSING
    if not isinstance(value, float):
        return str(value).replace("|", "\\|")
    std = item.get(f"{name}_std")
    return _short(value) + (f" ± {_short(std)}" if std is not None else "")


def _short(value: float) -> str:
    if not math.isfinite(value):
        return MISSING
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def write_tables(
    folder: str | Path,
    name: str,
    rows: Sequence[Row],
    keys: Sequence[str],
    columns: Sequence[str],
    context: dict[str, Any],
) -> list[Path]:
    """Writes `name.jsonl`, `name.csv` and `name.md`.

    Args:
        folder: created if absent.
        name: stem of the files.
        rows: one for each cell and seed.
        keys: what tells settings apart.
        columns: measures of the Markdown table, behind the keys.
        context: what all rows share: versions, machine, judge, dtype, numbers of texts. Each JSON line carries it.

    Returns:
        The paths.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    items = summary(rows, keys)
    lines = folder / f"{name}.jsonl"
    lines.write_text("".join(json.dumps(plain_numbers({**row, "context": context})) + "\n" for row in rows))
    sheet = folder / f"{name}.csv"
    with sheet.open("w", newline="") as file:
        names = dict.fromkeys(key for item in items for key in item)
        writer = csv.DictWriter(file, list(names))
        writer.writeheader()
        writer.writerows(items)
    page = folder / f"{name}.md"
    facts = "".join(f"- {key}: {value}\n" for key, value in context.items())
    page.write_text(f"# {name.replace('_', ' ').capitalize()}\n\n{markdown(items, [*keys, *columns])}\n{facts}")
    return [lines, sheet, page]


def plain_numbers(value: Any) -> Any:
    """The same data with NaN and infinities as None, which JSON can say."""
    if isinstance(value, dict):
        return {key: plain_numbers(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain_numbers(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

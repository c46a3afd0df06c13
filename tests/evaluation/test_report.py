import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from crocodil.evaluation.report import Report, results_table, write_report, write_results
from crocodil.evaluation.verdict import MISSING, Row, verdict, verdict_sentences

SECTIONS = (
    "verdict speedups cost entropy conditioning reconstructions training texts reconstruction results glossary settings"
)


def conditioning(value: float = 0.25, base: float | None = None) -> list[Row]:
    """Curves with four registers, without, and of the base if there is one."""
    settings = [("demasker", 4, value), ("demasker", 0, 1.0), *([("base", 0, base)] if base else [])]
    return [
        {"system": system, "num_registers": count, "mask_ratio": x, "cross_entropy": x * slope, "top1": 1 - x / 2}
        for system, count, slope in settings
        for x in (0.2, 0.6, 1.0)
    ]


RECONSTRUCTIONS = [
    {
        "block_size": block,
        "num_steps": steps,
        "num_registers": None,
        "remasking": "random",
        "temperature": 0.0,
        "seed": 0,
        "cer": 0.5 / (steps + 1),
        "token_accuracy": 0.7,
        "parse_rate": 0.3,
        "nfe": 9.5,
    }
    for block in (None, 8)
    for steps in (0, 4, 8)
]


def make_comparison(rows: list[Row], **changes: Any) -> Report:
    contents: dict[str, Any] = {
        "rows": rows,
        "curves": {"base": [{"step": 0, "train_loss": 7.0, "val_loss": None}, {"step": 9, "val_loss": 2.5}]},
        "conditioning": conditioning(),
        "reconstruction_rows": RECONSTRUCTIONS,
        "texts": {"ConThenDisc": ["def f(x):\n    return x"]},
        "example": {
            "source": "return low",
            "output": "return low",
            "token_accuracy": 1.0,
            "num_steps": 8,
            "with fewer registers": [{"num_registers": 1, "output": "return high", "token_accuracy": 0.5}],
        },
        "machine": {"processor": "abacus", "cores": "2"},
        "seeds": [11, 12],
        "settings": {"corpus": "the standard library", "num_registers": 8, "minutes": {"base": 9.0, "prior": 7.0}},
        "length": 64,
    }
    return Report(**(contents | changes))


def report(tmp_path: Path, comparison: Report) -> str:
    return write_report(tmp_path, comparison).read_text(encoding="utf-8")


def test_table_keeps_every_number_at_120_columns(data: Row, base: Row, make_row: Callable[..., Row]) -> None:
    costs = {"prior_calls": 128, "encoder_calls": 1, "nfe": 172.25, "seconds_per_sample": 12.345}
    wide = make_row("conwithindisc", 128, 1.0, 12.34, distance=107.55, duplicate_rate=0.0, **costs)
    wide |= {"remasking": "low_confidence", "temperature": 0.85}
    other = wide | {"seed": 1, "parse_rate": 0.8, "judge_nll": 10.34, "distance": 97.55}
    output = StringIO()
    Console(width=120, file=output).print(results_table([data, base | {"judge_nll": math.nan}, wide, other]))
    lines = output.getvalue().splitlines()
    row = next(line for line in lines if "ConWithinDisc" in line)
    numbers = "0.85|128/128/1|172.2|12345|11.34 ±1.41|5.00|102.55 ±7.07|90.0 ±14.1|0.0"
    assert re.sub(r" {2,}", "|", row.strip()) == f"ConWithinDisc|low confidence|{numbers}"
    assert MISSING in next(line for line in lines if "Base" in line)
    assert "…" not in output.getvalue()


def test_results_json_is_the_list_of_rows(data: Row, base: Row, latent: Row, tmp_path: Path) -> None:
    path = write_results(tmp_path / "new", [data, base, latent])
    assert path == tmp_path / "new" / "results.json"
    assert json.loads(path.read_text()) == [data, base, latent]


def test_results_json_is_strict_json(base: Row, tmp_path: Path) -> None:
    path = write_results(tmp_path, [base | {"judge_nll": math.nan}])
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == [base | {"judge_nll": None}]


class Page(HTMLParser):
    """Collects what a page refers to, the elements it has and its text outside figures and style sheets."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.sections: list[str] = []
        self.links: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
                self.sections += [value or ""] if tag == "section" else []
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                self.links.append(value or "")

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] != ["style"]:
            self.words += data


def test_report_needs_nothing_beside_it(data: Row, base: Row, latent: Row, tmp_path: Path) -> None:
    text = report(tmp_path, make_comparison([data, base, latent]))
    page = Page(text)
    assert page.links and all(link.startswith("#") for link in page.links)
    assert all(target.startswith("#") for target in re.findall(r"url\([\"']?([^)]*)\)", text))
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not any(part in text for part in ("@import", "<!DOCTYPE svg", "<metadata"))
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_report_has_every_section_and_figure(data: Row, base: Row, latent: Row, tmp_path: Path) -> None:
    text = report(tmp_path, make_comparison([data, base, latent]))
    page = Page(text)
    assert " ".join(page.sections) == SECTIONS
    assert page.tags.count("svg") == 13 == text.count('<svg role="img" aria-label="')
    assert page.tags.count("figcaption") == 5
    sentences = verdict_sentences(verdict([data, base, latent], 64))
    shown = page.words.replace("\N{NO-BREAK SPACE}", " ")
    assert all(re.sub(r"\s+", " ", sentence) in re.sub(r"\s+", " ", shown) for sentence in sentences)
    for part in (
        "wins 1 of 3 times",
        "the standard library",
        "abacus, 2 cores",
        "16.0 minutes (base 9.0, prior 7.0)",
        "11, 12",
    ):
        assert part in shown


def test_report_figures_follow_the_theme(data: Row, base: Row, latent: Row, tmp_path: Path) -> None:
    text = report(tmp_path, make_comparison([data, base, latent]))
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.S))
    assert "var(--ink)" in drawn and "var(--conthendisc)" in drawn
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawn)) <= {"#000000", "#ffffff"}


def test_report_greys_only_collapsed_settings(data: Row, base: Row, latent: Row, tmp_path: Path) -> None:
    collapsed = base | {"remasking": "low_confidence", "entropy": 4.7}
    for rows, expected in (([data, base, latent], 0), ([data, base, latent, collapsed], 1)):
        text = report(tmp_path, make_comparison(rows))
        panel = re.search(r"<svg.*?</svg>", text, flags=re.S)
        assert panel and len(re.findall(r"<use [^>]*var\(--faded\)", panel[0])) == expected
        assert len(re.findall(r'<tr class="[^"]*collapsed', text)) == expected


def test_report_escapes_every_text(data: Row, base: Row, latent: Row, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    reconstruction = {"source": evil, "output": f"{evil} x", "token_accuracy": 0.5, "num_steps": 2}
    comparison = make_comparison(
        [data, base | {"remasking": evil}, latent],
        curves={evil: [{"step": 1, "train_loss": 1.0, "val_loss": 1.0, evil: 1.0}]},
        texts={evil: [evil]},
        example=reconstruction,
        machine={"processor": evil, evil: evil},
        settings={"corpus": evil, evil: evil},
    )
    page = Page(report(tmp_path, comparison))
    assert "script" not in page.tags
    assert page.words.count("alert") >= 9


def test_report_tolerates_missing_values(data: Row, base: Row, latent: Row, tmp_path: Path) -> None:
    unknown = dict.fromkeys(("judge_nll", "entropy", "distance", "parse_rate", "nfe"), math.nan)
    rows = [
        data,
        base | {"judge_nll": math.nan},
        latent | unknown | {"seconds_per_sample": None, "duplicate_rate": None},
    ]
    curves: dict[str, list[Row]] = {"base": [{"step": 1, "train_loss": math.nan, "val_loss": None}], "prior": []}
    unknown_curve = [{"system": "demasker", "num_registers": 4, "mask_ratio": 0.5, "cross_entropy": math.nan}]
    comparison = make_comparison(rows, curves=curves, conditioning=unknown_curve)
    comparison.example["token_accuracy"] = None
    words = Page(report(tmp_path, comparison)).words
    assert f"All registers: {MISSING} % of tokens right" in words
    assert MISSING in words
    assert not re.search(r"\b(nan|None)\b", words)


def test_report_of_nothing_is_still_a_page(tmp_path: Path) -> None:
    page = Page(report(tmp_path, Report({}, {}, 64)))
    assert page.sections == ["settings"]


def test_conditioning_has_a_line_for_each_number_of_registers(tmp_path: Path) -> None:
    for base, lines in ((None, 2), (0.8, 3)):
        text = report(tmp_path, Report({}, {}, 64, conditioning=conditioning(base=base)))
        assert len(re.findall(r"<!-- (?:base model|without the sketch|4 registers) -->", text)) == 2 * lines


def test_speedups_are_told_with_their_intervals(make_row: Callable[..., Row], tmp_path: Path) -> None:
    rows = [make_row("data", 0, 1.0, 1.0, seed=seed) for seed in (0, 1)]
    rows += [make_row("base", 32, 0.1, 2.0 + seed / 10, seed=seed) for seed in (0, 1)]
    rows += [make_row("conthendisc", n, 0.1, nll, seed=seed) for seed in (0, 1) for n, nll in ((2, 3.0), (8, 1.0))]
    words = Page(report(tmp_path, Report({}, {}, 64, rows=rows))).words
    assert re.search(r"1 of 1 comparisons show a speed-up", words)
    assert re.search(
        r"reaches the base's judge nats per token at 32 calls with \d\.\d calls\.\s+That is .* times fewer", words
    )


def test_originals_stand_beside_the_reconstructions(tmp_path: Path) -> None:
    words = Page(report(tmp_path, Report({}, {}, 64, reconstruction_rows=RECONSTRUCTIONS))).words
    assert "originals" in words and "0.056" in words

import json
import math
import re
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from crocodil.evaluation.figures import mark_differences
from crocodil.evaluation.report import (
    Comparison,
    results_table,
    summarise,
    verdict,
    verdict_sentences,
    write_report,
    write_results,
)

Row = dict[str, Any]
MISSING = "\N{EN DASH}"
SECTIONS = "verdict cost entropy latent-use training texts reconstruction results glossary settings"


def make_row(
    algorithm: str, calls: int, parse_rate: float, judge_nll: float, entropy: float = 5.0, **changes: Any
) -> Row:
    row = {
        "algorithm": algorithm,
        "remasking": None if algorithm == "data" else "random",
        "temperature": None if algorithm == "data" else 1.0,
        "num_steps": calls,
        "demasker_calls": calls,
        "prior_calls": 0,
        "encoder_calls": 0,
        "nfe": float(calls),
        "seconds_per_sample": calls / 1000,
        "judge_nll": judge_nll,
        "entropy": entropy,
        "distance": 2.0,
        "parse_rate": parse_rate,
        "unique_rate": 0.99,
        "seed": 0,
    }
    return row | changes


DATA = make_row("data", 0, 1.0, 1.3)
BASE = make_row("base", 8, 0.04, 2.6)
LATENT = make_row("conthendisc", 8, 0.12, 2.3, prior_calls=32, nfe=9.3, seconds_per_sample=0.0112)


def make_comparison(rows: list[Row], **changes: Any) -> Comparison:
    contents: dict[str, Any] = {
        "rows": rows,
        "curves": {"base": [{"step": 0, "train_loss": 7.0, "val_loss": None}, {"step": 9, "val_loss": 2.5}]},
        "latent_use": [{"mask_ratio": x, "with_latents": x / 4, "without_latents": x} for x in (0.2, 0.6, 1.0)],
        "texts": {"ConThenDisc": ["def f(x):\n    return x"]},
        "reconstruction": {
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
    return Comparison(**(contents | changes))


def report(tmp_path: Path, comparison: Comparison) -> str:
    return write_report(tmp_path, comparison).read_text(encoding="utf-8")


def at(budget: int, rows: list[Row]) -> Row:
    return next(item for item in verdict(rows, 64) if item["num_steps"] == budget)


def say(item: Row) -> str:
    return verdict_sentences([item])[0]


def test_summary_is_mean_and_sample_deviation_over_seeds() -> None:
    item = summarise([BASE | {"parse_rate": 0.1}, BASE | {"parse_rate": 0.3, "seed": 1}])[0]
    assert item["num_seeds"] == 2
    assert item["parse_rate"] == pytest.approx(0.2)
    assert item["parse_rate_std"] == pytest.approx(math.sqrt(0.02))
    assert math.isnan(summarise([BASE])[0]["parse_rate_std"])


def test_summary_separates_settings_and_orders_them() -> None:
    rows = [make_row(name, 8, 0.1, 2.0) for name in ("oracle", "conwithindisc", "conthendisc")]
    rows += [make_row("base", calls, 0.1, 2.0, temperature=t) for calls in (8, 64) for t in (0.7, 1.0)] + [DATA]
    order = [(item["algorithm"], item["num_steps"], item["temperature"]) for item in summarise(rows)]
    base = [("base", 64, 1.0), ("base", 64, 0.7), ("base", 8, 1.0), ("base", 8, 0.7)]
    assert order == [("data", 0, None), *base, *((name, 8, 1.0) for name in ("conthendisc", "conwithindisc", "oracle"))]


def test_a_mean_with_a_missing_part_is_missing() -> None:
    item = summarise([BASE, BASE | {"judge_nll": math.nan}, BASE | {"distance": None}])[0]
    assert math.isnan(item["judge_nll"]) and math.isnan(item["distance"])
    assert item["parse_rate"] == pytest.approx(0.04)


def test_unknown_algorithm_is_refused() -> None:
    with pytest.raises(ValueError, match="got 'magic'"):
        summarise([BASE | {"algorithm": "magic"}])


def test_verdict_of_a_win_names_both_sides_and_all_costs() -> None:
    worse = make_row("conwithindisc", 8, 0.10, 2.2)
    item = at(8, [DATA, BASE, worse, LATENT])
    assert item["latent"]["algorithm"] == "conthendisc"
    assert (item["latent"]["parse_rate"], item["base"]["parse_rate"]) == pytest.approx((0.12, 0.04))
    assert item["better_parse"] and item["better_judge"] and item["entropy_kept"] and item["holds"]
    text = say(item)
    assert text.startswith("At 8 demasker calls ConThenDisc beats the base.")
    for part in ("12.0 % against 4.0 %", "2.30 against 2.60", "9.3 demasker-call equivalents against 8.0", "1.4 times"):
        assert part in text


def test_budgets_follow_the_length() -> None:
    assert [item["num_steps"] for item in verdict([DATA], 64)] == [8, 4, 2]
    assert [item["num_steps"] for item in verdict([DATA], 16)] == [2, 1]


@pytest.mark.parametrize(
    ("changes", "flag", "fault"),
    [
        ({"parse_rate": 0.04}, "better_parse", "it does not parse more often"),
        ({"judge_nll": 2.6}, "better_judge", "the judge does not prefer it"),
        ({"entropy": 4.79}, "entropy_kept", "its entropy does not stay near the data's"),
    ],
)
def test_verdict_of_a_loss_says_so(changes: Row, flag: str, fault: str) -> None:
    item = at(8, [DATA, BASE, LATENT | changes])
    flags = {name: item[name] for name in ("better_parse", "better_judge", "entropy_kept")}
    assert flags == dict.fromkeys(flags, True) | {flag: False}
    assert not item["holds"]
    assert say(item).startswith(f"At 8 demasker calls ConThenDisc does not beat the base: {fault}.")


def test_entropy_is_kept_within_the_slack() -> None:
    assert at(8, [DATA, BASE, LATENT | {"entropy": 4.81}])["entropy_kept"]


def test_collapsed_base_rule_is_not_chosen_but_a_diverse_one_is() -> None:
    collapsed = BASE | {"remasking": "low_confidence", "parse_rate": 0.9, "entropy": 4.94}
    assert at(8, [DATA, BASE, collapsed, LATENT])["base"]["remasking"] == "random"
    diverse = collapsed | {"entropy": 4.96}
    item = at(8, [DATA, BASE, diverse, LATENT])
    assert item["base"]["remasking"] == "low_confidence" and not item["better_parse"]


def test_ties_in_parse_rate_go_to_the_judge() -> None:
    better = BASE | {"temperature": 0.9, "judge_nll": 2.5}
    unjudged = BASE | {"temperature": 0.8, "judge_nll": math.nan}
    assert at(8, [DATA, unjudged, BASE, better, LATENT])["base"]["temperature"] == 0.9


def test_matching_base_is_the_cheapest_of_no_less_entropy() -> None:
    collapsed = make_row("base", 16, 0.9, 1.0, entropy=3.0)
    rows = [DATA, BASE, LATENT, collapsed, make_row("base", 64, 0.2, 2.0), make_row("base", 32, 0.12, 2.1)]
    item = at(8, rows)
    assert item["base"]["demasker_calls"] == 8
    assert item["matching_base"]["demasker_calls"] == 32
    assert "at 32 calls: 3.4 times the network cost and 2.9 times the wall time" in say(item)
    assert "none measured" in say(at(8, [DATA, BASE, LATENT, collapsed]))


def test_nothing_is_claimed_without_both_sides() -> None:
    for rows in ([DATA, BASE], [DATA, LATENT, BASE | {"entropy": 3.0}]):
        item = at(8, rows)
        assert not item["holds"]
        assert "nothing is claimed" in say(item)


def test_missing_numbers_win_nothing() -> None:
    item = at(8, [DATA, BASE, LATENT | {"judge_nll": math.nan, "seconds_per_sample": None}])
    assert not item["holds"]
    assert f"gives it {MISSING} against 2.60" in say(item)
    assert f"{MISSING} times the wall time" in say(item)
    assert not at(8, [BASE, LATENT])["entropy_kept"]
    unparsed = BASE | {"temperature": 1.5, "parse_rate": math.nan}
    assert at(8, [DATA, unparsed, BASE, LATENT])["base"]["temperature"] == 1.0


def test_table_keeps_every_number_at_120_columns() -> None:
    costs = {"prior_calls": 128, "encoder_calls": 1, "nfe": 172.25, "seconds_per_sample": 12.345}
    wide = make_row("conwithindisc", 128, 1.0, 12.34, distance=107.55, unique_rate=1.0, **costs)
    wide |= {"remasking": "low_confidence", "temperature": 0.85}
    other = wide | {"seed": 1, "parse_rate": 0.8, "judge_nll": 10.34, "distance": 97.55}
    output = StringIO()
    Console(width=120, file=output).print(results_table([DATA, BASE | {"judge_nll": math.nan}, wide, other]))
    lines = output.getvalue().splitlines()
    row = next(line for line in lines if "ConWithinDisc" in line)
    numbers = "0.85|128/128/1|172.2|12345|11.34 ±1.41|5.00|102.55 ±7.07|90.0 ±14.1|100.0"
    assert re.sub(r" {2,}", "|", row.strip()) == f"ConWithinDisc|low confidence|{numbers}"
    assert MISSING in next(line for line in lines if "Base" in line)
    assert "…" not in output.getvalue()


def test_results_json_is_the_list_of_rows(tmp_path: Path) -> None:
    path = write_results(tmp_path / "new", make_comparison([DATA, BASE, LATENT]))
    assert path == tmp_path / "new" / "results.json"
    assert json.loads(path.read_text()) == [DATA, BASE, LATENT]


def test_results_json_is_strict_json(tmp_path: Path) -> None:
    path = write_results(tmp_path, make_comparison([BASE | {"judge_nll": math.nan}]))
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == [BASE | {"judge_nll": None}]


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


def test_report_needs_nothing_beside_it(tmp_path: Path) -> None:
    text = report(tmp_path, make_comparison([DATA, BASE, LATENT]))
    page = Page(text)
    assert page.links and all(link.startswith("#") for link in page.links)
    assert all(target.startswith("#") for target in re.findall(r"url\([\"']?([^)]*)\)", text))
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not any(part in text for part in ("@import", "<!DOCTYPE svg", "<metadata"))
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_report_has_every_section_and_figure(tmp_path: Path) -> None:
    text = report(tmp_path, make_comparison([DATA, BASE, LATENT]))
    page = Page(text)
    assert " ".join(page.sections) == SECTIONS
    assert page.tags.count("svg") == 8 == text.count('<svg role="img" aria-label="')
    assert page.tags.count("figcaption") == 4
    sentences = verdict_sentences(verdict([DATA, BASE, LATENT], 64))
    shown = page.words.replace("\N{NO-BREAK SPACE}", " ")
    assert all(re.sub(r"\s+", " ", sentence) in re.sub(r"\s+", " ", shown) for sentence in sentences)
    for part in (
        "wins 1 of 3 times",
        "the standard library",
        "abacus, 2 cores",
        "16 minutes (base 9, prior 7)",
        "11, 12",
    ):
        assert part in shown


def test_report_figures_follow_the_theme(tmp_path: Path) -> None:
    text = report(tmp_path, make_comparison([DATA, BASE, LATENT]))
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.S))
    assert "var(--ink)" in drawn and "var(--conthendisc)" in drawn
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawn)) <= {"#000000", "#ffffff"}


def test_report_greys_only_collapsed_settings(tmp_path: Path) -> None:
    collapsed = BASE | {"remasking": "low_confidence", "entropy": 4.7}
    for rows, expected in (([DATA, BASE, LATENT], 0), ([DATA, BASE, LATENT, collapsed], 1)):
        text = report(tmp_path, make_comparison(rows))
        panel = re.search(r"<svg.*?</svg>", text, flags=re.S)
        assert panel and len(re.findall(r"<use [^>]*var\(--faded\)", panel[0])) == expected
        assert len(re.findall(r'<tr class="[^"]*collapsed', text)) == expected


def test_report_escapes_every_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    reconstruction = {"source": evil, "output": f"{evil} x", "token_accuracy": 0.5, "num_steps": 2}
    comparison = make_comparison(
        [DATA, BASE | {"remasking": evil}, LATENT],
        curves={evil: [{"step": 1, "train_loss": 1.0, "val_loss": 1.0, evil: 1.0}]},
        texts={evil: [evil]},
        reconstruction=reconstruction,
        machine={"processor": evil, evil: evil},
        settings={"corpus": evil, evil: evil},
    )
    page = Page(report(tmp_path, comparison))
    assert "script" not in page.tags
    assert page.words.count("alert") >= 9


def test_report_tolerates_missing_values(tmp_path: Path) -> None:
    unknown = dict.fromkeys(("judge_nll", "entropy", "distance", "parse_rate", "nfe"), math.nan)
    rows = [DATA, BASE | {"judge_nll": math.nan}, LATENT | unknown | {"seconds_per_sample": None, "unique_rate": None}]
    curves: dict[str, list[Row]] = {"base": [{"step": 1, "train_loss": math.nan, "val_loss": None}], "prior": []}
    latent_use = [{"mask_ratio": 0.5, "with_latents": math.nan}]
    comparison = make_comparison(rows, curves=curves, latent_use=latent_use)
    comparison.reconstruction["token_accuracy"] = None
    words = Page(report(tmp_path, comparison)).words
    assert f"All registers: {MISSING} % of tokens right" in words
    assert MISSING in words
    assert not re.search(r"\b(nan|None)\b", words)


def test_report_of_nothing_is_still_a_page(tmp_path: Path) -> None:
    nothing: dict[str, Any] = {key: {} for key in ("curves", "texts", "reconstruction", "machine", "settings")}
    page = Page(report(tmp_path, make_comparison([], latent_use=[], **nothing)))
    assert " ".join(page.sections) == SECTIONS


def test_differing_tokens_are_marked() -> None:
    source, output = mark_differences("if a < low:", "if a < high + 1:")
    assert source == "if a &lt; <mark>low</mark>:"
    assert output == "if a &lt; <mark>high + 1</mark>:"

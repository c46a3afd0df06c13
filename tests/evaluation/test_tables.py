import csv
import json
import math
from pathlib import Path
from statistics import stdev

import pytest

from crocodil.evaluation.tables import markdown, summary, write_tables

ROWS = [
    {"rule": "a|b", "steps": 8, "seed": 0, "nll": 1.0, "mauve": 0.5},
    {"rule": "a|b", "steps": 8, "seed": 1, "nll": 2.0, "mauve": math.nan},
    {"rule": "c", "steps": 4, "seed": 0, "nll": 3.0},
]


def test_means_and_deviations_over_seeds() -> None:
    first, second = summary(ROWS, ("rule", "steps"))
    assert (first["nll"], first["nll_std"], first["num_seeds"]) == (1.5, pytest.approx(stdev([1, 2])), 2)
    assert "mauve" not in first  # missing in one seed
    assert second["nll"] == 3.0 and "nll_std" not in second


def test_files_carry_every_setting(tmp_path: Path) -> None:
    lines, sheet, page = write_tables(
        tmp_path / "new", "table", ROWS, ("rule", "steps"), ("nll", "mauve"), {"judge": "j"}
    )
    read = [json.loads(line, parse_constant=pytest.fail) for line in lines.read_text().splitlines()]
    assert len(read) == 3 and all(row["context"] == {"judge": "j"} for row in read)
    assert read[1] == {"rule": "a|b", "steps": 8, "seed": 1, "nll": 2.0, "mauve": None, "context": {"judge": "j"}}
    with sheet.open() as file:
        cells = list(csv.DictReader(file))
    assert [(row["rule"], float(row["nll"])) for row in cells] == [("a|b", 1.5), ("c", 3.0)]
    text = page.read_text()
    assert "| a\\|b | 8 | 1.5 ± 0.7071 |" in text and "- judge: j" in text and "nan" not in text


def test_columns_nobody_has_are_left_out() -> None:
    table = markdown(summary(ROWS, ("rule", "steps")), ("rule", "nll", "absent"))
    assert "absent" not in table and table.count("\n") == 4

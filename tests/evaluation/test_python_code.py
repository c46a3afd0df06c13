import math
import sys
from pathlib import Path

import pytest
import torch

from crocodil.evaluation.python_code import LONG_TEXT, CompileRate, ParseRate, UndefinedNames, compiles, parses

DEEP = 10**5
TEXTS = [
    ("def f(v0):\n    return v0", 1, 1),
    ("x = 1", 1, 1),
    ("'\\d'", 1, 1),  # the parser warns of the escape, and accepts it
    ("x is 1", 1, 1),  # the compiler warns of the literal
    ("raise SystemExit", 1, 1),
    ("from __future__ import braces", 1, 0),
    ("return 1", 1, 0),
    ("break", 1, 0),
    ("def f(a, a): pass", 1, 0),
    ("x = yield", 1, 0),
    ("print 'x'", 0, 0),
    ("", 0, 0),
    (" \n ", 0, 0),
    ("def f(v0:\n    return v0", 0, 0),
    ("def f():\nreturn 1", 0, 0),
    ("x = \0", 0, 0),
    ("x = '\ud800'", 0, 0),
    ("x = " + "9" * 5000, 0, 0),
    ("(" * 190 + ")" * 190, 1, 1),
    ("(" * 10_000 + ")" * 10_000, 0, 0),
    ("(" * DEEP + ")" * DEEP, 0, 0),
    ("[" * DEEP + "]" * DEEP, 0, 0),
    ("-" * 10_000 + "1", 0, 0),
    ("-" * DEEP + "1", 0, 0),
    ("x" + ".x" * 9_000, 0, 0),
    ("[x " + "for x in x " * DEEP + "]", 1, 0),  # crashes the compiler
    ("x = 1\n" * 10_000, 1, 1),
    ("return 1\n" * 10_000, 1, 0),
    ("x = '\ud800'\n" * 10_000, 0, 0),
]


@pytest.mark.parametrize(("text", "parsed", "compiled"), TEXTS)
@pytest.mark.filterwarnings("error")
def test_one_text(text: str, parsed: int, compiled: int) -> None:
    assert (parses(text), compiles(text)) == (parsed, compiled)


def test_a_text_that_takes_minutes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crocodil.evaluation.python_code._PATIENCE", 0.3)
    assert not parses("import " + "x." * DEEP + "x")
    assert parses("import " + "x." * (LONG_TEXT // 2 - 4) + "x")


def test_no_text_is_run(tmp_path: Path) -> None:
    deed = f"open({str(tmp_path / 'x')!r}, 'w')\n"
    assert compiles(deed) and compiles(deed * 2000)
    assert not list(tmp_path.iterdir())


def test_rates_are_shares_of_all_texts() -> None:
    metrics = ParseRate(), CompileRate()
    for metric, name, column in zip(metrics, ("parse_rate", "compile_rate"), (1, 2), strict=True):
        metric.update([case[0] for case in TEXTS[:7]])
        metric.update([case[0] for case in TEXTS[7:15]])
        expected = sum(case[column] for case in TEXTS[:15]) / 15
        found = metric.compute()
        assert list(found) == [name] and found[name].item() == expected and found[name].dtype == torch.float64
        metric.reset()
        assert metric(["x = 1"])[name] == 1


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_no_text_gives_nan() -> None:
    assert math.isnan(ParseRate().compute()["parse_rate"])
    assert math.isnan(UndefinedNames().compute()["undefined_names"])
    assert math.isnan(UndefinedNames()(["x =", ""])["undefined_names"])


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("x = 1\nprint(x)", 0),
        ("import m", 0),  # a message of another kind
        ("y = x", 1),
        ("y = x + x\nz = x", 1),
        ("y = x + z", 2),
        ("def f(a):\n    return a + b\n\ndef g():\n    return f(c) + b", 2),
        ("def f():\n    return g()\n\ndef g():\n    return 1", 0),
        ("def f():\n    x = x0\n    x0 = 1", 1),  # bound too late
        ("[i for i in range(3)]\ni", 1),
        ("from m import *\ny = x", 0),
        ("import m\nm.x\n__name__\n__file__", 0),
        ("'\\d'", 0),
    ],
)
@pytest.mark.filterwarnings("error")
def test_undefined_names_of_one_text(text: str, count: int) -> None:
    assert UndefinedNames()([text])["undefined_names"] == count


def test_undefined_names_are_averaged_over_texts_that_parse() -> None:
    metric = UndefinedNames()
    metric.update(["y = x + z", "y = ", "", "x = 1"])
    assert metric.compute()["undefined_names"] == 1
    metric.update(["x" + " + x" * 900])  # nests too deeply for pyflakes
    assert metric.compute()["undefined_names"] == 1
    metric.update(["y = x"])
    assert metric.compute()["undefined_names"] == 1


def test_without_pyflakes_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyflakes", None)
    with pytest.raises(ValueError, match=r"needs pyflakes; install it with pip install 'crocodil\[eval\]'"):
        UndefinedNames()

"""Rows of a comparison in which the latent system wins at 8 of 64 demasker calls."""

from collections.abc import Callable
from typing import Any

import pytest

from crocodil.evaluation.verdict import Row


def row_of(
    algorithm: str, calls: int, parse_rate: float, judge_nll: float, entropy: float = 5.0, **changes: Any
) -> Row:
    row = {
        "algorithm": algorithm,
        "remasking": None if algorithm == "data" else "random",
        "temperature": None if algorithm == "data" else 1.0,
        "num_registers": None,
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


@pytest.fixture
def make_row() -> Callable[..., Row]:
    """Builds a row from its algorithm, demasker calls, parse rate and judge NLL; keywords change the rest."""
    return row_of


@pytest.fixture
def data() -> Row:
    """The held-out programs, of entropy 5."""
    return row_of("data", 0, 1.0, 1.3)


@pytest.fixture
def base() -> Row:
    """The base at 8 calls."""
    return row_of("base", 8, 0.04, 2.6)


@pytest.fixture
def latent() -> Row:
    """ConThenDisc at 8 calls, better and dearer than the base."""
    return row_of("conthendisc", 8, 0.12, 2.3, prior_calls=32, nfe=9.3, seconds_per_sample=0.0112)

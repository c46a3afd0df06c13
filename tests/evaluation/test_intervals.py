import math
from statistics import stdev

import pytest
import torch

from crocodil.evaluation.intervals import Interval, half_width, interval, ratio_interval


def test_the_interval_of_three_values() -> None:
    """4.303 is the 97.5 % quantile of Student's t with two degrees of freedom (any statistical table)."""
    found = interval([1.0, 2.0, 4.0])
    half = 4.3027 * stdev([1.0, 2.0, 4.0]) / math.sqrt(3)
    assert (found.mean, found.low, found.high) == pytest.approx((7 / 3, 7 / 3 - half, 7 / 3 + half), rel=1e-4)


def test_the_interval_covers_as_often_as_it_says() -> None:
    values = torch.randn(4000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 5
    covered = [(found := interval(row)).low <= 5 <= found.high for row in values.tolist()]
    assert sum(covered) / 4000 == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / 4000))


def test_ratios_are_averaged_geometrically() -> None:
    found = ratio_interval([2.0, 8.0])
    assert found.mean == pytest.approx(4.0) and found.low * found.high == pytest.approx(16.0)


def test_one_value_has_no_interval() -> None:
    assert math.isnan(half_width(1.0, 1)) and math.isnan(interval([3.0]).low)
    assert str(interval([3.0])) == "3.0" and str(Interval(2.0, 1.0, 3.0)) == "2.0 (1.0 to 3.0)"

"""Confidence intervals over seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its confidence interval; without bounds (NaN) where one seed is all there is."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.1f}" + (f" ({self.low:.1f} to {self.high:.1f})" if math.isfinite(self.low) else "")


def mean_and_std(values: Sequence[float | None]) -> tuple[float, float]:
    """Mean and sample standard deviation; NaN where a value is missing (None, NaN), or where one is all there is."""
    numbers = [math.nan if value is None else float(value) for value in values]
    if not all(map(math.isfinite, numbers)):
        return math.nan, math.nan
    return fmean(numbers), stdev(numbers) if len(numbers) > 1 else math.nan


def half_width(std: float, count: int) -> float:
    """Half of Student's t interval of a mean, at the level `CONFIDENCE`; NaN for a single value.

    Args:
        std: sample standard deviation.
        count: number of values.
    """
    return math.nan if count < 2 else float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * std / math.sqrt(count)


def interval(values: Sequence[float]) -> Interval:
    """The mean with Student's t interval."""
    mean, std = mean_and_std(values)
    half = half_width(std, len(values))
    return Interval(mean, mean - half, mean + half)


def ratio_interval(ratios: Sequence[float]) -> Interval:
    """The geometric mean of ratios above zero, with the t interval of their logarithms."""
    logs = interval([math.log(ratio) for ratio in ratios])
    return Interval(*(math.exp(value) for value in (logs.mean, logs.low, logs.high)))

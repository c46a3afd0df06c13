"""Speed-up at matched quality: how many calls a system needs for what another one does with N.

A curve is one setting (rule, temperature, registers) over its step budgets, for one seed. The number of calls at which
it reaches a quality is found on it by interpolation, linear in the quality and in the logarithm of the calls.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

from crocodil.evaluation.intervals import Interval, interval, mean_and_std, ratio_interval
from crocodil.evaluation.verdict import DRAWING, ENTROPY_SLACK, NAMES, PRIOR, Row, number, setting_words

HIGHER_IS_BETTER = {"parse_rate", "compile_rate", "mauve", "token_accuracy"}
QUALITY_NAMES = {
    "judge_nll": "judge nats per token",
    "parse_rate": "parse rate",
    "mauve": "MAUVE",
    "distance": "Fréchet distance",
}
SYSTEMS = ("conthendisc", "conwithindisc")
CURVE = ("algorithm", *DRAWING, "num_registers", *PRIOR, "length")


@dataclass(frozen=True)
class Speedup:
    """What a system saves at the quality that the base has at one budget.

    Attributes:
        quality: name of the measure that is matched.
        also: further measures that are at least the base's.
        base: a row of the base at that budget, without what differs by seed.
        system: a row of the system, likewise.
        base_calls: N, demasker calls of the base.
        calls: demasker calls of the system at the same quality.
        factors: base over system, by cost: "demasker_calls", "nfe", and "seconds_per_sample" or "seconds_batch_B".
        num_seeds: seeds that were compared.
        num_reached: seeds in which the system reaches the quality at all; `calls` and `factors` are over these.
        at_most: in some seed its fewest calls already did, so that the savings are lower bounds.
        entropy: of the system at the match, mean over seeds, in nats.
        base_entropy: mean over seeds, and its standard deviation.
    """

    quality: str
    also: tuple[str, ...]
    base: Row
    system: Row
    base_calls: float
    calls: Interval | None
    factors: dict[str, Interval]
    num_seeds: int
    num_reached: int
    at_most: bool
    entropy: float
    base_entropy: tuple[float, float]

    @property
    def entropy_kept(self) -> bool:
        """Whether the system's entropy is not below the base's by more than the base's own spread over seeds."""
        mean, spread = self.base_entropy
        return self.entropy >= mean - (spread if math.isfinite(spread) else 0.0)

    @property
    def claimed(self) -> bool:
        """Whether there is a speed-up to claim: reached in every seed, entropy kept, fewer calls and less cost in all.

        The intervals of both must lie above 1; the cost in all (`nfe`) counts prior and encoder, too.
        """
        saves = [self.factors[cost].low > 1.0 for cost in ("demasker_calls", "nfe") if cost in self.factors]
        return self.num_reached == self.num_seeds and self.entropy_kept and bool(saves) and all(saves)

    def to_row(self) -> Row:
        """As a flat row for tables."""
        row: Row = {
            "quality": self.quality,
            "base_calls": self.base_calls,
            **{f"base_{key}": self.base.get(key) for key in DRAWING},
            **{key: self.system.get(key) for key in CURVE},
            "calls": self.calls.mean if self.calls else None,
            "reached": f"{self.num_reached} of {self.num_seeds}",
            "entropy": self.entropy,
            "base_entropy": self.base_entropy[0],
            "base_entropy_std": self.base_entropy[1],
            "claimed": self.claimed,
        }
        for cost, factor in self.factors.items():
            row |= {f"{cost}_factor": factor.mean, f"{cost}_low": factor.low, f"{cost}_high": factor.high}
        return row


def value_at(calls: float, curve: Sequence[tuple[float, float]]) -> float:
    """A quantity at a number of calls, linear in their logarithm between the points (calls, value), ascending."""
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x0 <= calls <= x1 and x0 < x1:
            return y0 + (y1 - y0) * math.log(calls / x0) / math.log(x1 / x0)
    return curve[0][1] if calls < curve[0][0] else curve[-1][1]


def calls_to_reach(target: float, curve: Sequence[tuple[float, float]], higher_is_better: bool) -> float | None:
    """The fewest calls at which a curve reaches a quality; None if it never does.

    Args:
        target: the quality.
        curve: (calls, quality), calls ascending and above 0.
        higher_is_better: which way quality grows.

    Returns:
        Calls, interpolated between the last point that falls short and the first that does not; of a curve that starts
        good enough, its fewest calls.
    """
    sign = 1 if higher_is_better else -1
    before: tuple[float, float] | None = None
    for calls, quality in curve:
        if sign * quality >= sign * target:
            if before is None or quality == target:
                return calls
            share = (target - before[1]) / (quality - before[1])
            return math.exp(math.log(before[0]) + share * math.log(calls / before[0]))
        before = (calls, quality)
    return None


def calls_to_reach_all(targets: Mapping[str, float], rows: Sequence[Row]) -> float | None:
    """The fewest calls at which a curve reaches several qualities at once; None if it never does.

    Args:
        targets: measures and what is asked of each.
        rows: of one setting and seed, `demasker_calls` ascending.

    Returns:
        Where the last of them is reached, if the others are still held there; else the next budget where all are.
    """
    ladders = {name: [(row["demasker_calls"], row[name]) for row in rows] for name in targets}
    reached = [calls_to_reach(targets[name], ladder, name in HIGHER_IS_BETTER) for name, ladder in ladders.items()]
    found = [calls for calls in reached if calls is not None]
    if len(found) < len(targets):
        return None
    latest = max(found)
    for calls in (latest, *(row["demasker_calls"] for row in rows if row["demasker_calls"] > latest)):
        held = {name: value_at(calls, ladder) for name, ladder in ladders.items()}
        if all(_reaches(held[name], target, name) for name, target in targets.items()):
            return calls
    return None


def _reaches(value: float, target: float, measure: str) -> bool:
    sign = 1 if measure in HIGHER_IS_BETTER else -1
    return sign * (value - target) >= -1e-9 * abs(target)  # interpolation rounds


def speedups(
    rows: Sequence[Row], quality: str, systems: Iterable[str] = SYSTEMS, also: Sequence[str] = ()
) -> list[Speedup]:
    """What each system saves at the quality of each budget of the base.

    At each budget the base has its best setting by the mean quality, and where that has collapsed (its entropy lies
    more than `ENTROPY_SLACK` below the data's), also its best one that has not. Of a system's settings the one counts
    that reaches it with the fewest calls, those that keep the entropy first.

    Args:
        rows: one for each setting, number of steps and seed; see `report.Report`.
        quality: name of the measure that is matched.
        systems: algorithms to compare with the base.
        also: further measures that must not be worse than the base's mean by more than its own deviation over seeds.

    Returns:
        `Speedup`s by system and falling budget; budgets without a finite quality are left out.
    """
    higher = quality in HIGHER_IS_BETTER
    curves = _curves(rows, (quality, *also))
    found = []
    for length in sorted({key[-1] for key in curves}, key=lambda value: value or 0):
        ours = {key: curve for key, curve in curves.items() if key[-1] == length}
        data = [row["entropy"] for row in rows if row["algorithm"] == "data" and row.get("length") == length]
        floor = fmean(data) - ENTROPY_SLACK if data else -math.inf
        for algorithm in systems:
            settings = {key: curve for key, curve in ours.items() if key[0] == algorithm}
            if settings:
                bases = {key: curve for key, curve in ours.items() if key[0] == "base"}
                points = _base_points(bases, quality, higher, floor)
                found += [_best(point, settings, quality, tuple(also)) for point in points]
    return found


Curve = dict[Any, list[Row]]  # seed -> rows, calls ascending


def _curves(rows: Sequence[Row], measures: Sequence[str]) -> dict[tuple[Any, ...], Curve]:
    curves: dict[tuple[Any, ...], Curve] = defaultdict(lambda: defaultdict(list))
    for row in sorted(rows, key=lambda row: row.get("demasker_calls") or 0):
        values = [row.get(measure) for measure in measures]
        if row["algorithm"] != "data" and all(value is not None and math.isfinite(value) for value in values):
            curves[tuple(row.get(key) for key in CURVE)][row["seed"]].append(row)
    return {key: dict(curve) for key, curve in curves.items()}


def _base_points(bases: dict[tuple[Any, ...], Curve], quality: str, higher: bool, floor: float) -> list[dict[Any, Row]]:
    """For each budget, by falling calls, the rows by seed of the base's best setting, and of the best above a floor."""
    budgets: dict[int, list[dict[Any, Row]]] = defaultdict(list)
    for curve in bases.values():
        by_steps: dict[int, dict[Any, Row]] = defaultdict(dict)
        for seed, rows in curve.items():
            for row in rows:
                by_steps[row["num_steps"]][seed] = row
        for num_steps, members in by_steps.items():
            budgets[num_steps].append(members)
    sign = 1 if higher else -1

    def mean(members: dict[Any, Row]) -> float:
        return sign * fmean(row[quality] for row in members.values())

    points = []
    for num_steps in sorted(budgets, reverse=True):
        best = max(budgets[num_steps], key=mean)
        kept = [members for members in budgets[num_steps] if _entropy(members) >= floor]
        points += [best] if best in kept or not kept else [best, max(kept, key=mean)]
    return points


def _entropy(members: dict[Any, Row]) -> float:
    return fmean(row["entropy"] for row in members.values())


def _best(
    point: dict[Any, Row], settings: dict[tuple[Any, ...], Curve], quality: str, also: tuple[str, ...]
) -> Speedup:
    candidates = [_compare(point, curve, quality, also) for curve in settings.values()]

    def rank(item: Speedup) -> tuple[bool, bool, float]:
        return (
            item.num_reached < item.num_seeds,
            not item.entropy_kept,
            item.calls.mean if item.calls else math.inf,
        )

    return min(candidates, key=rank)


def _compare(point: dict[Any, Row], curve: Curve, quality: str, also: tuple[str, ...]) -> Speedup:
    seeds = sorted(point.keys() & curve.keys())
    costs = [key for key in next(iter(point.values())) if key in ("demasker_calls", "nfe") or key.startswith("seconds")]
    floors = {measure: _with_slack(list(point.values()), measure) for measure in also}
    reached, at_most = {}, False
    for seed in seeds:
        calls = calls_to_reach_all({quality: point[seed][quality], **floors}, curve[seed])
        if calls is not None:
            reached[seed] = calls
            at_most |= calls == curve[seed][0]["demasker_calls"]
    factors = {}
    for cost in costs:
        pairs = [(point[seed].get(cost), _cost_at(calls, curve[seed], cost)) for seed, calls in reached.items()]
        ratios = [base / own for base, own in pairs if base and own]
        if ratios and len(ratios) == len(pairs):
            factors[cost] = ratio_interval(ratios)
    entropies = [_cost_at(calls, curve[seed], "entropy") or math.nan for seed, calls in reached.items()]
    base_entropies = [row["entropy"] for row in point.values()]
    return Speedup(
        quality=quality,
        also=also,
        base=next(iter(point.values())),
        system=next(iter(curve.values()))[0],
        base_calls=fmean(row["demasker_calls"] for row in point.values()),
        calls=interval(list(reached.values())) if reached else None,
        factors=factors,
        num_seeds=len(seeds),
        num_reached=len(reached),
        at_most=at_most,
        entropy=fmean(entropies) if entropies else math.nan,
        base_entropy=(fmean(base_entropies), stdev(base_entropies) if len(base_entropies) > 1 else math.nan),
    )


def _with_slack(rows: list[Row], measure: str) -> float:
    """The mean of a measure, made worse by its deviation over seeds."""
    mean, std = mean_and_std([row[measure] for row in rows])
    slack = std if math.isfinite(std) else 0.0
    return mean - slack if measure in HIGHER_IS_BETTER else mean + slack


def _cost_at(calls: float, rows: list[Row], cost: str) -> float | None:
    values = [(row["demasker_calls"], row[cost]) for row in rows if row.get(cost) is not None]
    if len(values) < len(rows) or not all(math.isfinite(value) for _, value in values):
        return None
    return calls if cost == "demasker_calls" else value_at(calls, values)


def sentence(item: Speedup) -> str:
    """A speed-up in plain words, claimed or not, with its reason."""
    name, measure = NAMES[item.system["algorithm"]], _measure_name(item.quality)
    calls = f"{item.base_calls:g} call{'s' if item.base_calls != 1 else ''}"
    what = f"the base's {measure} at {calls}" + "".join(f", with no worse {_measure_name(name)}" for name in item.also)
    if item.calls is None:
        return f"{name} does not reach {what} with any number of calls that was measured. {_both(item)}"
    at_most, at_least = ("at most ", "at least ") if item.at_most else ("", "")
    text = f"{name} reaches {what} with {at_most}{number(item.calls.mean, 1)} calls. "
    text += f"That is {at_least}{item.factors['demasker_calls']} times fewer"
    if "nfe" in item.factors:
        text += f", and {item.factors['nfe']} times less network cost in all"
    batches = [key for key in item.factors if key.startswith("seconds_batch_")]
    times = [f"{item.factors[key]} at batch {key.removeprefix('seconds_batch_')}" for key in batches]
    if not times and "seconds_per_sample" in item.factors:
        times = [str(item.factors["seconds_per_sample"])]
    text += f"; wall-clock: {', '.join(times)} times less. " if times else ". "
    faults = _faults(item)
    return text + (f"No speed-up is claimed: {', and '.join(faults)}. " if faults else "") + _both(item)


def _measure_name(measure: str) -> str:
    return QUALITY_NAMES.get(measure, measure.replace("_", " "))


def _both(item: Speedup) -> str:
    base_entropy = f"entropy {number(item.base_entropy[0])}"
    own = f"; {NAMES[item.system['algorithm']]}: {setting_words(item.system)}, entropy {number(item.entropy)}"
    return f"(Base: {setting_words(item.base)}, {base_entropy}{own if item.calls else ''}.)"


def _faults(item: Speedup) -> list[str]:
    """Why no speed-up is claimed."""
    faults = []
    if item.num_reached < item.num_seeds:
        faults.append(f"only {item.num_reached} of {item.num_seeds} seeds reach it")
    if not item.entropy_kept:
        faults.append(
            f"its entropy is {number(item.entropy)} against {number(item.base_entropy[0])} nats, lower by more than "
            f"the base's own spread of {number(item.base_entropy[1])}"
        )
    calls, cost = (item.factors.get(name) for name in ("demasker_calls", "nfe"))
    if calls is not None and not calls.low > 1:
        faults.append("the interval of its calls does not exclude 1")
    elif cost is not None and not cost.low > 1:
        faults.append("prior and encoder cost as much as the calls they save, or more")
    return faults

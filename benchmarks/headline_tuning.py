"""Settings of the headline, chosen on the validation split: for the base as for the sketched systems.

A reference is the base at one call a token: "tuned", the setting of it that the judge likes best among those that keep
the data's entropy; "nearest", the one of these of highest MAUVE; and "plain", random order at temperature 1. For each
the fewest calls are sought at which the base itself, ConThenDisc and ConWithinDisc are as good: judge no worse, MAUVE
within its noise, entropy kept. Everything is tried on few texts, sketches drawn by the teacher. The best of each budget
are finalists: these are measured again, on more texts and with sketches of the student, as the best of many noisy
figures is better than it will be again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

from crocodil.evaluation.verdict import ENTROPY_SLACK, Row
from crocodil.experiments import SystemGrid
from crocodil.pipeline import PriorNetwork

SKETCHED = ("conthendisc", "conwithindisc")
ADAPTIVE = ("threshold", "factor")
TEACHER_STEPS, TEACHER_LADDER = 16, (16, 8, 4, 2)
MAUVE_SLACK = 0.05
"""MAUVE of some hundred texts differs by as much from seed to seed, of the base as of the others."""
STUDENT_STEPS, FINALIST_STEPS = (1, 2, 4), 1

Measure = Callable[[str, Sequence[SystemGrid]], list[Row]]
"""The rows of some settings on the validation split, under a name to keep them by."""


@dataclass(frozen=True)
class Grids:
    """What is tried.

    Args:
        base: of the plain model; the first budget is one call a token.
        sketched: of ConThenDisc and ConWithinDisc, without what draws the sketch.
    """

    base: tuple[SystemGrid, ...] = field(default_factory=lambda: base_grids([64, 32, 16, 8, 6, 5, 4, 3]))
    sketched: tuple[SystemGrid, ...] = field(default_factory=lambda: sketched_grids([8, 6, 5, 4, 3, 2]))


def base_grids(budgets: list[int]) -> tuple[SystemGrid, ...]:
    """Rules, temperatures and nuclei of the base; with one token a step both schedules are the same."""
    return (
        SystemGrid("base", budgets, "random", [0.7, 0.8, 0.9, 1.0, 1.2]),
        SystemGrid("base", budgets, "random", [1.0, 1.2], top_p=0.9),
        SystemGrid("base", budgets, "p2:1", [1.2, 1.6, 2.0, 2.4]),
        SystemGrid("base", budgets, "low_confidence", [1.0, 2.0]),
        SystemGrid("base", budgets[1:], "random", [0.7, 0.8, 0.9, 1.0], unmasking_schedule="cosine"),
        SystemGrid("base", budgets[1:], "random", [1.0], top_p=0.9, unmasking_schedule="cosine"),
        *adaptive_grids("base", budgets[0], [1.0, 1.3]),
    )


def sketched_grids(budgets: list[int]) -> tuple[SystemGrid, ...]:
    """Rules, temperatures and registers of the sketched systems, and the temperature of the sketch."""
    grids = [
        SystemGrid("conthendisc", budgets, "random", [0.1, 0.4], registers, None, "cosine", prior_temperature=heat)
        for registers in (None, 3)
        for heat in (None, 0.8, 0.7, 0.6, 0.5)
    ]
    grids += [
        SystemGrid("conthendisc", budgets, rule, [heat], registers, prior_temperature=0.6)
        for registers in (None, 3)
        for rule, heat in (("random", 0.3), ("p2:1", 0.4))
    ]
    grids += [
        SystemGrid("conwithindisc", budgets, "random", [0.1, 0.4], registers, None, "cosine", prior_temperature=heat)
        for registers, heat in ((None, None), (None, 0.7), (None, 0.5), (3, 0.6), (3, 0.7))
    ]
    return tuple(grids)


def adaptive_grids(algorithm: str, most: int, temperatures: list[float]) -> tuple[SystemGrid, ...]:
    """Rules that commit whatever they are sure of."""
    rules = ("threshold:0.9", "threshold:0.6", "factor:1", "factor:2")
    return tuple(SystemGrid(algorithm, [most], rule, temperatures) for rule in rules)


def is_adaptive(grid: SystemGrid) -> bool:
    """Whether the number of calls depends on the text, so that texts must be written one at a time."""
    return grid.remasking.startswith(ADAPTIVE)


@dataclass(frozen=True)
class Choice:
    """What was chosen for one reference.

    Attributes:
        reference: setting of the base at one call a token.
        cheapest: for each algorithm, base included, its setting with the fewest calls that is as good on the
            validation split; absent where none is.
        closest: for each sketched algorithm the setting of highest MAUVE among those the judge likes as much as the
            reference; stands in where `cheapest` has none.
    """

    reference: SystemGrid
    cheapest: dict[str, SystemGrid]
    closest: dict[str, SystemGrid]

    def of(self, algorithm: str) -> SystemGrid:
        """The setting that speaks for an algorithm."""
        return self.cheapest.get(algorithm) or self.closest[algorithm]


@dataclass(frozen=True)
class Tuned:
    """What was chosen.

    Attributes:
        choices: by the name of the reference.
        frontier: for each system and budget the setting that the judge likes best among those that keep the entropy.
        floor: see `entropy_floor`.
    """

    choices: dict[str, Choice]
    frontier: list[SystemGrid]
    floor: float


def tune(grids: Grids, measure: Measure, measure_well: Measure) -> Tuned:
    """Chooses every setting on the validation split.

    Args:
        grids: what is tried.
        measure: takes the figures of all of it.
        measure_well: takes those of the finalists, on more texts.
    """
    rows = measure("base", grids.base)
    rows += measure("sketched", [drawn_by(grid, "prior", TEACHER_STEPS) for grid in grids.sketched])
    floor = entropy_floor(rows)
    most = grids.base[0].num_steps[0]
    bases = [row for row in rows if row["algorithm"] == "base" and not is_adaptive(only(row))]
    at_most = [row for row in bases if row["num_steps"] == most]
    plain = next(row for row in at_most if only(row) == SystemGrid("base", [most]))
    kept = [row for row in at_most if row["entropy"] >= floor] or [plain]
    references = {"tuned": min(kept, key=judged), "nearest": max(kept, key=likeness), "plain": plain}
    choices = {name: choose(rows, reference, floor, measure_well) for name, reference in references.items()}
    return Tuned(choices, frontier(rows, floor), floor)


def choose(rows: Sequence[Row], reference: Row, floor: float, measure_well: Measure) -> Choice:
    """The cheapest settings that are as good as a reference."""
    promising = [row for row in rows if is_as_good(row, reference, floor) and row["nfe"] < reference["nfe"]]
    found = measure_well("finalists", [only(reference), *finalists(promising)])
    again = next(row for row in found if row["algorithm"] == "base" and only(row) == only(reference))
    confirmed = sorted((row for row in found if is_as_good(row, again, floor)), key=cost, reverse=True)
    cheapest = {row["algorithm"]: only(row) for row in confirmed}
    closest = {}
    for algorithm in SKETCHED:
        tried = [row for row in found if row["algorithm"] == algorithm]
        yardstick = again if tried else reference
        tried = tried or [row for row in rows if row["algorithm"] == algorithm]
        grid = close(tried, yardstick, floor)
        closest[algorithm] = grid if grid.prior_network == "student" else drawn_by(grid, "student", FINALIST_STEPS)
    return Choice(only(reference), cheapest, closest)


def close(rows: Sequence[Row], reference: Row, floor: float) -> SystemGrid:
    """The setting of highest MAUVE among those as likely as a reference; the likeliest if none is."""
    kept = [row for row in rows if row["entropy"] >= floor] or rows
    likely = [row for row in kept if row["judge_nll"] <= reference["judge_nll"]]
    return only(max(likely, key=likeness) if likely else min(kept, key=judged))


def finalists(promising: Sequence[Row]) -> list[SystemGrid]:
    """Of each system and number of calls the likeliest, the one of highest MAUVE, and one between; by the student."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in promising:
        groups.setdefault((row["algorithm"], round(row["demasker_calls"])), []).append(row)
    found: list[SystemGrid] = []
    for rows in groups.values():
        between = sorted(rows, key=judged)[len(rows) // 2]
        for row in (min(rows, key=judged), max(rows, key=likeness), between):
            grid = only(row)
            way = grid if grid.algorithm == "base" else drawn_by(grid, "student", FINALIST_STEPS)
            found += [way] if way not in found else []
    return found


def frontier(rows: Sequence[Row], floor: float) -> list[SystemGrid]:
    """For each system and budget, the likeliest setting that keeps the entropy; sketches drawn by the student.

    Where no setting of the base keeps it, the likeliest of all: what a sketch gains at equal calls is told against it.
    """
    budgets = {(row["algorithm"], row["num_steps"]): None for row in rows if row["algorithm"] != "data"}
    found = []
    for algorithm, num_steps in budgets:
        at_it = [row for row in rows if (row["algorithm"], row["num_steps"]) == (algorithm, num_steps)]
        even = [row for row in at_it if not is_adaptive(only(row))]
        best = likeliest(even, floor)
        if algorithm == "base":
            found += [only(best or min(even, key=judged))] if even else []
        elif best is not None:
            found.append(drawn_by(only(best), "student", 2))
    return found


def entropy_floor(rows: Sequence[Row]) -> float:
    """The entropy of the data among these rows minus `ENTROPY_SLACK`, in nats."""
    return fmean(row["entropy"] for row in rows if row["algorithm"] == "data") - ENTROPY_SLACK


def is_as_good(row: Row, reference: Row, floor: float) -> bool:
    """Judge no worse than the reference's, MAUVE within the noise, entropy kept; the reference is as good as itself."""
    if row["algorithm"] == "data":
        return False
    is_kept = row["entropy"] >= floor or row is reference
    is_near = row["mauve"] >= reference["mauve"] - MAUVE_SLACK
    return is_kept and is_near and row["judge_nll"] <= reference["judge_nll"]


def likeliest(rows: Sequence[Row], floor: float) -> Row | None:
    """The row with the fewest judge nats among those that keep the entropy; None if none does."""
    return min((row for row in rows if row["entropy"] >= floor), key=judged, default=None)


def judged(row: Row) -> float:
    """Nats per token under the judge."""
    return row["judge_nll"]


def likeness(row: Row) -> float:
    """MAUVE with the data."""
    return row["mauve"]


def cost(row: Row) -> tuple[float, float]:
    """The cost of all networks in demasker calls; the likelier of two that cost the same comes first."""
    return row["nfe"], row["judge_nll"]


def only(row: Row) -> SystemGrid:
    """The one setting of a row."""
    names = ("num_registers", "top_p", "unmasking_schedule", "prior_network", "prior_steps", "prior_temperature")
    setting = {name: row[name] for name in names}
    return SystemGrid(row["algorithm"], [row["num_steps"]], row["remasking"], [row["temperature"]], **setting)


def drawn_by(grid: SystemGrid, network: PriorNetwork, steps: int) -> SystemGrid:
    """The same settings with sketches drawn in another way."""
    return replace(grid, prior_network=network, prior_steps=steps)

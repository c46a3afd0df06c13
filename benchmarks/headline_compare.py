"""How the headline's systems compare with a reference: quality, cost, wall-clock, and what the student keeps."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from statistics import fmean, median

from headline_bench import Bench
from headline_tuning import STUDENT_STEPS, TEACHER_LADDER, Choice, drawn_by, entropy_floor, is_as_good

from crocodil.evaluation.intervals import interval, ratio_interval
from crocodil.evaluation.verdict import DRAWING, Row
from crocodil.experiments import SystemGrid

MEASURES = ("judge_nll", "mauve", "entropy", "parse_rate", "distance")


def compare(bench: Bench, rows: Sequence[Row], name: str, choice: Choice, algorithm: str) -> Row:
    """An algorithm against a reference: quality, cost, wall-clock, with 95 % intervals over seeds and rounds."""
    reference, grid = choice.reference, choice.of(algorithm)
    theirs, ours = rows_of(rows, reference), rows_of(rows, grid)
    differences = {
        measure: asdict(interval([own[measure] - base[measure] for own, base in zip(ours, theirs, strict=True)]))
        for measure in MEASURES
    }
    costs = {
        key: asdict(ratio_interval([base[key] / own[key] for own, base in zip(ours, theirs, strict=True)]))
        for key in ("demasker_calls", "nfe")
    }
    return {
        "reference": name,
        "algorithm": algorithm,
        "as_good_on_validation": algorithm in choice.cheapest,
        "as_good_on_test": is_as_good(means(ours), means(theirs), entropy_floor(rows)),
        "base": asdict(reference),
        "system": asdict(grid),
        "differences": differences,
        "times_fewer": costs,
        "times_faster": times_faster(bench, reference, grid) if algorithm in bench.effort.timed else {},
    }


def means(rows: Sequence[Row]) -> Row:
    """Figures of a setting over its seeds."""
    return {"algorithm": rows[0]["algorithm"]} | {name: fmean(row[name] for row in rows) for name in MEASURES}


def rows_of(rows: Sequence[Row], grid: SystemGrid) -> list[Row]:
    """The rows of one setting, by seed."""
    wanted = {**asdict(grid), "num_steps": grid.num_steps[0], "temperature": grid.temperature[0]}
    return sorted(
        (row for row in rows if all(row[key] == value for key, value in wanted.items())), key=lambda row: row["seed"]
    )


def times_faster(bench: Bench, reference: SystemGrid, grid: SystemGrid) -> Row:
    """Wall-clock of the reference over a setting's by batch size, timed in turn; a first round does not count."""
    found = {}
    for batch in bench.effort.batches:
        rounds = [
            [bench.write(setting, batch, seed).cost.seconds for setting in (reference, grid)]
            for seed in range(1 + bench.effort.rounds)
        ][1:]
        found[f"batch {batch}"] = asdict(ratio_interval([base / own for base, own in rounds])) | {
            f"{name}_ms": 1000 * median(of_it) / batch
            for name, of_it in zip(("base", "system"), zip(*rounds, strict=True), strict=True)
        }
    return found


def students(bench: Bench, rows: Sequence[Row], choice: Choice) -> Row:
    """How much of the teacher's gain over the base at equal calls the student keeps, and its share of the time."""
    grid = choice.of("conthendisc")
    bases = [row for row in rows if row["algorithm"] == "base" and row["num_steps"] == grid.num_steps[0]]
    found: Row = {"setting": asdict(grid), "kept": {}, "share": {}}
    for steps in STUDENT_STEPS:
        student = drawn_by(grid, "student", steps)
        runs = [bench.write(student, 1, seed).cost for seed in range(1 + bench.effort.single_texts)][1:]
        found["share"][steps] = median(run.seconds_by_part.get("student", 0.0) / run.seconds for run in runs)
        if bases:
            found["kept"][steps] = asdict(interval(kept_gains(rows, bases, grid, student)))
    return found


def kept_gains(rows: Sequence[Row], bases: Sequence[Row], grid: SystemGrid, student: SystemGrid) -> list[float]:
    """(base - student) / (base - teacher) in judge nats by seed, the teacher with the steps that suit it best."""

    def nats(of_it: Iterable[Row]) -> float:
        return fmean(row["judge_nll"] for row in of_it)

    settings = {tuple(row[name] for name in DRAWING) for row in bases}
    by_setting = [[row for row in bases if tuple(row[name] for name in DRAWING) == key] for key in settings]
    base = sorted(min(by_setting, key=nats), key=lambda row: row["seed"])
    teacher = min((rows_of(rows, drawn_by(grid, "prior", steps)) for steps in TEACHER_LADDER), key=nats)
    return [
        (plain["judge_nll"] - own["judge_nll"]) / (plain["judge_nll"] - taught["judge_nll"])
        for plain, own, taught in zip(base, rows_of(rows, student), teacher, strict=True)
    ]


def says(comparison: Row) -> str:
    """A comparison in words."""
    base, system = comparison["base"], comparison["system"]
    faster = ", ".join(f"{ratio['mean']:.1f} at {batch}" for batch, ratio in comparison["times_faster"].items())
    return (
        f"{comparison['algorithm']} with {system['num_steps'][0]} calls against the {comparison['reference']} base "
        f"with {base['num_steps'][0]}: {_differences(comparison['differences'])}; "
        f"{comparison['times_fewer']['demasker_calls']['mean']:.1f} times fewer demasker calls, "
        f"{comparison['times_fewer']['nfe']['mean']:.1f} times less in all; times faster: {faster or 'not timed'}"
    )


def _differences(quality: Row) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {value['mean']:+.3f} ({value['low']:+.3f} to {value['high']:+.3f})"
        for name, value in quality.items()
    )

"""How many times faster than the plain model does a sketch write, at equal quality? From packages to figures.

    python benchmarks/headline.py [train | tune | measure] [--output benchmarks/results/headline.json]

Without a word all three, in order; each goes on where it was stopped. `train` downloads the corpus, fits every stage of
`lightning_configs/headline_*.yaml` into runs/headline and exports pipeline and judge. `tune` chooses the settings of
all systems on the validation split (headline_tuning.py). `measure` writes with these, and no others, on the test split,
times them, and tells how they compare (headline_compare.py); the last line printed is one JSON object.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import headline_corpus
from headline_bench import FOLDER, Bench, Effort, headline_data
from headline_compare import compare, says, students
from headline_tuning import SKETCHED, STUDENT_STEPS, TEACHER_LADDER, Choice, Tuned, drawn_by, tune
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from crocodil.commands import build_judge, build_pipeline
from crocodil.encode import encode
from crocodil.evaluation.machine import machine
from crocodil.evaluation.tables import plain_numbers, summary, write_tables
from crocodil.evaluation.verdict import SETTING, Row
from crocodil.experiments import SystemGrid
from crocodil.trainer_cli import run_trainer

CONFIGS = Path(__file__).parent.parent / "lightning_configs"
STAGES = ("start", "judge", "demasker", "base", "autoencoder", "prior", "student")
ENCODE_BATCH = "--data.init_args.batch_size=64"
VALIDATION_SEED = 100
COLUMNS = (
    *("demasker_calls", "nfe", "judge_nll", "mauve", "entropy", "parse_rate", "distance", "distinct_4"),
    *("duplicate_rate", "copied_share", "seconds_per_sample"),
)


def train(effort: Effort) -> None:
    """Corpus, stages, pipeline and judge; what is finished is not done again."""
    headline_corpus.build(FOLDER / "corpus")
    for stage in STAGES:
        config = CONFIGS / f"headline_{stage}.yaml"
        if stage == "prior":
            encode([str(config)], [ENCODE_BATCH, *effort.overrides], str(FOLDER / "latents"))
        run_trainer(["fit", f"--config={config}", *effort.overrides])
    parts = [str(checkpoint(stage)) for stage in ("autoencoder", "prior", "base", "student")]
    build_pipeline(*parts).save_pretrained(FOLDER / "pipeline")
    build_judge(str(checkpoint("judge")), score_end=True).save_pretrained(FOLDER / "judge-lm")


def checkpoint(stage: str) -> Path:
    """The newest checkpoint of a stage."""
    return FOLDER / stage / "checkpoints" / "last.ckpt"


def tuned_on_validation(bench: Bench) -> Tuned:
    """Chooses the settings; what was tried lies in runs/headline/results."""
    effort, tried = bench.effort, []

    def measure(name: str, systems: Sequence[SystemGrid]) -> list[Row]:
        options = {"num_samples": effort.tuning_texts, "seeds": (VALIDATION_SEED,), "mauve_seeds": (0, 1)}
        rows = bench.rows(name, "val", systems, **options)
        tried.extend(rows)
        return rows

    def measure_well(name: str, systems: Sequence[SystemGrid]) -> list[Row]:
        return bench.rows(name, "val", systems, num_samples=effort.finalist_texts, seeds=(VALIDATION_SEED + 1,))

    tuned = tune(effort.grids, measure, measure_well)
    write_tables(FOLDER / "results", "tried", tried, SETTING, COLUMNS, {"num_samples": effort.tuning_texts})
    return tuned


def measured_settings(tuned: Tuned) -> list[SystemGrid]:
    """Everything that is written with on the test split, each setting once."""
    settings: list[SystemGrid] = []
    for choice in tuned.choices.values():
        settings += [choice.reference, *choice.cheapest.values(), *(choice.of(algorithm) for algorithm in SKETCHED)]
    settings += ladder(tuned.choices["tuned"])
    settings += tuned.frontier
    settings += [
        replace(grid, algorithm="oracle", prior_network=None, prior_steps=None, prior_temperature=None)
        for grid in settings
        if grid.algorithm == "conthendisc"
    ]
    return [grid for place, grid in enumerate(settings) if grid not in settings[:place]]


def ladder(choice: Choice) -> list[SystemGrid]:
    """ConThenDisc's setting under teacher and student in every number of steps."""
    grid = choice.of("conthendisc")
    taught = [drawn_by(grid, "prior", steps) for steps in TEACHER_LADDER]
    return taught + [drawn_by(grid, "student", steps) for steps in STUDENT_STEPS]


def measure(bench: Bench, tuned: Tuned) -> dict[str, Any]:
    """Writes with the chosen settings on the test split; tables go to runs/headline/results."""
    effort = bench.effort
    train_texts = bench.data.array("train")
    options = {"num_samples": effort.texts, "seeds": effort.seeds, "train": train_texts}
    rows = bench.rows("measured", "test", measured_settings(tuned), **options)
    context = {
        "num_samples": effort.texts,
        "length": bench.data.length,
        "seeds": list(effort.seeds),
        **{f"machine: {key}": value for key, value in machine().items()},
    }
    write_tables(FOLDER / "results", "headline", rows, SETTING, COLUMNS, context)
    return {
        "benchmark": "headline",
        **context,
        "parameters": {
            name: sum(p.numel() for p in network.parameters()) for name, network in bench.pipeline.networks().items()
        },
        "minutes": {stage: minutes(stage) for stage in STAGES},
        "entropy_floor": tuned.floor,
        "comparisons": [
            compare(bench, rows, name, choice, algorithm)
            for name, choice in tuned.choices.items()
            for algorithm in ("base", *SKETCHED)
            if algorithm in choice.cheapest or algorithm in choice.closest
        ],
        "student": students(bench, rows, tuned.choices["tuned"]),
        "rows": summary(rows, SETTING),
    }


def minutes(stage: str) -> float:
    """Minutes a stage trained, by its own step times: a pause between two runs does not count."""
    events = EventAccumulator(str(FOLDER / stage))
    events.Reload()
    steps = events.Scalars("step_seconds")
    return fmean(event.value for event in steps) * (steps[-1].step + 1) / 60


def run(effort: Effort, parts: Sequence[str], output: Path) -> None:
    """Does the parts asked for.

    Args:
        effort: how much is measured.
        parts: of "train", "tune", "measure".
        output: file of the figures.
    """
    if "train" in parts:
        train(effort)
    if "tune" not in parts and "measure" not in parts:
        return
    bench = Bench(effort, headline_data())
    tuned = tuned_on_validation(bench)
    if "measure" in parts:
        figures = plain_numbers(measure(bench, tuned))
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(figures, indent=1) + "\n")
        for comparison in figures["comparisons"]:
            print(f"- {says(comparison)}", file=sys.stderr)
        print(json.dumps(figures))


def main() -> None:
    """Runs the benchmark with the whole effort."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", choices=("train", "tune", "measure"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/headline.json"))
    options = parser.parse_args()
    run(Effort(), (options.part,) if options.part else ("train", "tune", "measure"), options.output)


if __name__ == "__main__":
    main()

"""How many times faster than the plain model does a sketch write, at equal quality? From packages to docs/results.md.

    python benchmarks/headline.py [train | tune | measure]

Without a word all three, in order; each goes on where it was stopped. `train` downloads the corpus, fits every stage of
`lightning_configs/headline_*.yaml` into runs/headline and exports pipeline and judge. `tune` tries settings of every
system on the validation split and keeps, for each system and budget, the one the judge likes best among those that keep
the data's entropy. `measure` writes with these on the test split, three seeds, times them, and matches them with the
base.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import headline_corpus

from crocodil.commands import build_judge, build_pipeline
from crocodil.data import CanonicalFunctions
from crocodil.encode import encode
from crocodil.evaluation.frontier import sentence, speedups
from crocodil.evaluation.judge import Judge
from crocodil.evaluation.machine import machine
from crocodil.evaluation.report import write_generation
from crocodil.evaluation.tables import plain_numbers, summary
from crocodil.evaluation.verdict import ENTROPY_SLACK, SETTING, Row
from crocodil.experiments import Generation, SystemGrid
from crocodil.experiments.cells import Ledger, array_fingerprint, fingerprint
from crocodil.pipeline import CrocodilPipeline
from crocodil.trainer_cli import run_trainer

FOLDER = Path("runs/headline")
CONFIGS = Path(__file__).parent.parent / "lightning_configs"
STAGES = ("start", "judge", "demasker", "autoencoder", "prior", "student")
SKETCHED = ("conthendisc", "conwithindisc")


@dataclass(frozen=True)
class Effort:
    """How much is measured; the defaults are those of docs/results.md.

    Args:
        overrides: options of `crocodil fit` for every stage.
        tuning_texts: texts of a setting that is tried.
        texts: of a setting that is measured, for each seed.
        seeds: of the measured texts.
        batches: batch sizes whose wall-clock is measured.
        base_grid: settings of the base that are tried.
        sketch_grid: settings of the sketched systems that are tried.
        oracle_grid: settings with true latents; measured, not tried.
    """

    overrides: tuple[str, ...] = ()
    tuning_texts: int = 128
    texts: int = 256
    seeds: tuple[int, ...] = (0, 1, 2)
    batches: tuple[int, ...] = (1, 8, 32)
    base_grid: tuple[SystemGrid, ...] = field(default_factory=lambda: base_grid((64, 32, 16, 8, 4)))
    sketch_grid: tuple[SystemGrid, ...] = field(default_factory=lambda: sketch_grid((16, 8, 6, 5, 4, 3, 2)))
    oracle_grid: tuple[SystemGrid, ...] = (SystemGrid("oracle", [16, 8, 5, 4, 3, 2], temperature=[0.4]),)


def base_grid(budgets: Sequence[int]) -> tuple[SystemGrid, ...]:
    """Rules, temperatures and nuclei of the base."""
    budgets = list(budgets)
    return (
        SystemGrid("base", budgets, "random", [0.8, 0.9, 1.0, 1.2, 1.6]),
        SystemGrid("base", budgets, "random", [1.0, 1.2], top_p=0.95),
        SystemGrid("base", budgets, "random", [1.0, 1.2], top_p=0.9),
        SystemGrid("base", budgets, "p2:1", [1.0, 1.2, 1.4, 1.6]),
        SystemGrid("base", budgets, "p2:1", [1.4], top_p=0.95),
        SystemGrid("base", budgets, "low_confidence", [1.2, 1.6, 2.0]),
        SystemGrid("base", budgets[:1], "threshold:0.6", [1.0, 1.4]),
        SystemGrid("base", budgets[:1], "factor:2", [1.0, 1.4]),
    )


def sketch_grid(budgets: Sequence[int]) -> tuple[SystemGrid, ...]:
    """Rules, temperatures and registers of ConThenDisc and ConWithinDisc, drawn by the student in two steps."""
    budgets = list(budgets)
    return tuple(
        SystemGrid(algorithm, budgets, rule, temperatures, registers, prior_network="student", prior_steps=2)
        for algorithm in SKETCHED
        for registers in (None, 6, 4)
        for rule, temperatures in (("random", [0.2, 0.5, 0.8]), ("p2:1", [0.5, 0.8, 1.0]))
    )


def train(effort: Effort) -> None:
    """Corpus, stages, pipeline and judge; what is finished is not done again."""
    headline_corpus.build(FOLDER / "corpus")
    for stage in STAGES:
        config = CONFIGS / f"headline_{stage}.yaml"
        if stage == "prior":
            encode([str(config)], effort.overrides, str(FOLDER / "latents"))
        run_trainer(["fit", f"--config={config}", *effort.overrides])
    parts = [str(checkpoint(stage)) for stage in ("autoencoder", "prior", "demasker", "student")]
    build_pipeline(*parts).save_pretrained(FOLDER / "pipeline")
    build_judge(str(checkpoint("judge")), score_end=True).save_pretrained(FOLDER / "judge-lm")


def checkpoint(stage: str) -> Path:
    """The newest checkpoint of a stage."""
    return FOLDER / stage / "checkpoints" / "last.ckpt"


class Bench:
    """The trained system, its judge and its texts.

    Args:
        effort: how much is measured.
        data: the corpus it was trained on.
    """

    def __init__(self, effort: Effort, data: CanonicalFunctions) -> None:
        self.effort, self.data = effort, data
        self.pipeline = CrocodilPipeline.from_pretrained(FOLDER / "pipeline")
        self.judge = Judge.from_pretrained(FOLDER / "judge-lm", self.pipeline.codec, score_end=True)

    def table(self, split: str, systems: Sequence[SystemGrid], num_samples: int, **options: Any) -> Generation:
        """The systems on a split."""
        texts = self.data.blocks(split)
        return Generation(self.pipeline, self.judge, texts, systems, num_samples=num_samples, **options)

    def ledger(self, name: str, table: Generation) -> Ledger:
        """Where the cells of a table are kept; other weights or texts have another file."""
        context = {
            "system": fingerprint(FOLDER / "pipeline"),
            "judge": fingerprint(FOLDER / "judge-lm"),
            "texts": array_fingerprint(table.held_out.numpy()),
            "num_samples": table.num_samples,
        }
        return Ledger(FOLDER / "cells", name, context)


def tune(bench: Bench) -> list[SystemGrid]:
    """Tries all settings on the validation split, and writes down and returns those that are best at some budget."""
    effort = bench.effort
    table = bench.table(
        "val", [*effort.base_grid, *effort.sketch_grid], effort.tuning_texts, seeds=(100,), mauve_seeds=(0, 1)
    )
    rows = table.rows(bench.ledger("tuning", table))
    (FOLDER / "tuning.json").write_text(
        json.dumps(plain_numbers([_without_texts(row) for row in rows]), indent=1) + "\n"
    )
    chosen = chosen_settings(rows)
    (FOLDER / "tuned.json").write_text(json.dumps([asdict(grid) for grid in chosen], indent=1) + "\n")
    return chosen


def chosen_settings(rows: Sequence[Row]) -> list[SystemGrid]:
    """For each system and budget the setting with the fewest judge nats that keeps the data's entropy.

    Args:
        rows: of `Generation`, data among them.

    Returns:
        The settings, each once, with the budgets at which they are the best.
    """
    floor = fmean(row["entropy"] for row in rows if row["algorithm"] == "data") - ENTROPY_SLACK
    kept = [row for row in rows if row["algorithm"] != "data" and row["entropy"] >= floor]
    best: dict[tuple[str, int], Row] = {}
    for row in sorted(kept, key=lambda row: row["judge_nll"], reverse=True):
        best[row["algorithm"], row["num_steps"]] = row
    grids: dict[tuple[Any, ...], list[int]] = {}
    for (_, num_steps), row in sorted(best.items(), key=lambda item: (item[0][0], -item[0][1])):
        grids.setdefault(_setting(row), []).append(num_steps)
    return [_grid(setting, budgets) for setting, budgets in grids.items()]


def _setting(row: Row) -> tuple[Any, ...]:
    names = ("algorithm", "remasking", "temperature", "num_registers", "top_p", "prior_network", "prior_steps")
    return tuple(row[name] for name in names)


def _grid(setting: tuple[Any, ...], budgets: list[int]) -> SystemGrid:
    algorithm, remasking, temperature, *rest = setting
    return SystemGrid(algorithm, budgets, remasking, [temperature], *rest)


def measured_systems(effort: Effort, chosen: Sequence[SystemGrid]) -> list[SystemGrid]:
    """What is written with on the test split.

    The base has each of its settings at the budgets where it is best, and the untempered one at all. A sketched system
    is cheap and has each at all budgets, so that its curve can be followed. One of ConThenDisc's is also drawn by the
    prior and the student in other numbers of steps.
    """
    budgets = list(effort.sketch_grid[0].num_steps)
    systems = [SystemGrid("base", list(effort.base_grid[0].num_steps), "random", [1.0])]
    systems += [grid for grid in chosen if grid.algorithm == "base" and _key(grid) != _key(systems[0])]
    systems += [replace(grid, num_steps=budgets) for grid in chosen if grid.algorithm != "base"]
    return [*systems, *(draw for grid in _middle(chosen) for draw in draws(grid)), *effort.oracle_grid]


def draws(grid: SystemGrid) -> list[SystemGrid]:
    """The same setting under sketches drawn in other ways."""
    ways = [("prior", steps) for steps in (32, 16, 8, 4, 2, 1)] + [("student", steps) for steps in (4, 1)]
    return [replace(grid, prior_network=network, prior_steps=steps) for network, steps in ways]


def _middle(chosen: Sequence[SystemGrid]) -> list[SystemGrid]:
    """ConThenDisc's setting at the middle one of its budgets, at that budget alone."""
    own = [(place, grid) for place, grid in enumerate(chosen) if grid.algorithm == "conthendisc"]
    options = sorted((steps, place) for place, grid in own for steps in grid.num_steps)
    if not options:
        return []
    num_steps, place = options[len(options) // 2]
    return [replace(chosen[place], num_steps=[num_steps])]


def _key(grid: SystemGrid) -> tuple[Any, ...]:
    return _setting({**asdict(grid), "temperature": grid.temperature[0]})


def measure(bench: Bench, chosen: Sequence[SystemGrid]) -> dict[str, Any]:
    """Writes with the chosen settings on the test split; tables, page and figures go to runs/headline/results."""
    effort = bench.effort
    table = bench.table(
        "test",
        measured_systems(effort, chosen),
        effort.texts,
        seeds=effort.seeds,
        timed_batches=effort.batches,
        train=bench.data.array("train"),
    )
    rows = table.rows(bench.ledger("measured", table))
    context = {
        "num_samples": table.num_samples,
        "length": bench.data.length,
        "seeds": list(effort.seeds),
        **{f"machine: {key}": value for key, value in machine().items()},
    }
    write_generation(FOLDER / "results", rows, context, "judge_nll")
    matches = [item for measure in ((), ("mauve",)) for item in speedups(rows, "judge_nll", also=measure)]
    networks = bench.pipeline.networks()
    figures = {
        "benchmark": "headline",
        **context,
        "parameters": {name: sum(p.numel() for p in net.parameters()) for name, net in networks.items()},
        "rows": summary([_without_texts(row) for row in rows], SETTING),
        "speedups": [item.to_row() | {"also": item.also, "says": sentence(item)} for item in matches],
        "shares": shares(bench.pipeline, [grid for grid in table.systems if grid.algorithm in SKETCHED]),
    }
    _write("headline", figures)
    return figures


def shares(pipeline: CrocodilPipeline, grids: Iterable[SystemGrid], repeats: int = 16) -> list[Row]:
    """Share of the wall-clock at batch 1 in which sketches are drawn, median over texts, for each setting."""
    found = []
    for grid in grids:
        for num_steps in grid.num_steps:
            runs = [
                pipeline(
                    1,
                    algorithm=grid.algorithm,  # type: ignore[arg-type]
                    num_steps=num_steps,
                    seed=seed,
                    num_registers=grid.num_registers,
                    prior_network=grid.prior_network,
                    prior_steps=grid.prior_steps,
                    refresh_prior_steps=grid.prior_steps,
                    remasking=grid.remasking,
                    temperature=grid.temperature[0],
                ).cost
                for seed in range(1 + repeats)
            ][1:]
            share = median(run.seconds_by_part.get(grid.prior_network or "prior", 0.0) / run.seconds for run in runs)
            found.append({**asdict(grid), "num_steps": num_steps, "share": share})
    return found


def _write(name: str, figures: Any) -> None:
    (FOLDER / f"{name}.json").write_text(json.dumps(plain_numbers(figures), indent=1) + "\n")


def _without_texts(row: Row) -> Row:
    return {key: value for key, value in row.items() if key != "examples"}


def run(effort: Effort, parts: Sequence[str]) -> None:
    """Does the parts asked for.

    Args:
        effort: how much is measured.
        parts: of "train", "tune", "measure".
    """
    if "train" in parts:
        train(effort)
    if "tune" not in parts and "measure" not in parts:
        return
    data = CanonicalFunctions(folder=str(FOLDER / "corpus" / "packages"), split_by="folder", length=64)
    data.prepare_data()
    bench = Bench(effort, data)
    chosen = tune(bench)
    if "measure" in parts:
        for match in measure(bench, chosen)["speedups"]:
            print(f"- {match['says']}")


def main() -> None:
    """Runs the benchmark with the effort of docs/results.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", choices=("train", "tune", "measure"))
    part = parser.parse_args().part
    run(Effort(), (part,) if part else ("train", "tune", "measure"))


if __name__ == "__main__":
    main()

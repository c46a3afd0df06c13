"""`crocodil quickstart`: the three fits, the comparison and the report, on the machine at hand."""

import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from crocodil.commands import build_judge, build_pipeline
from crocodil.data import CanonicalFunctions
from crocodil.evaluation import report
from crocodil.evaluation.machine import machine
from crocodil.evaluation.verdict import latent_use_sentence, verdict, verdict_sentences
from crocodil.experiments import Conditioning, Generation, SystemGrid
from crocodil.experiments.cells import Ledger, array_fingerprint, fingerprint
from crocodil.output import check_writable
from crocodil.pipeline import CrocodilPipeline
from crocodil.trainer_cli import run_trainer

SEEDS = (0, 1, 2)
TABLE_WIDTH = 120
PRIOR_STEPS, REFRESH_PRIOR_STEPS = 8, 8
JUDGE_FOLDER = "judge-lm"
Rule = tuple[str, float, int | None]
"""Order, temperature, and how many registers are read (None for all)."""
BASE_RULES: tuple[Rule, ...] = (("random", 1.0, None), ("p2", 1.0, None))
HOT_BASE_RULE: Rule = ("random", 3.0, None)
"""With few calls the base keeps the data's entropy only if it is heated; this gives it rows of no less entropy."""
COARSE: Rule = ("random", 0.2, 4)
WHOLE: Rule = ("random", 0.0, None)
"""A coarse sketch leaves more to the demasker; where this has two calls only, the whole one is needed."""


@dataclass(frozen=True)
class Stage:
    """A fit of the quickstart: its config, its optimizer steps, and its share of the time on two cores, in minutes."""

    name: str
    num_steps: int
    minutes: float
    previous: str | None = None
    argument: str | None = None


STAGES = (
    Stage("demasker", 600, 2.8),
    Stage("autoencoder", 700, 4.1, "demasker", "demasker_checkpoint"),
    Stage("prior", 550, 3.5, "autoencoder", "autoencoder_checkpoint"),
    Stage("judge", 400, 1.0),
)
DATA_MINUTES, COMPARISON_MINUTES = 0.4, 2.4
SOURCES = {"demasker": "base", "autoencoder": "encoder and demasker", "prior": "latent prior", "judge": "judge"}


def quickstart(output_dir: str, seed: int = 0, num_samples: int | None = None, scale: float = 1.0) -> Path:
    """Trains, compares and reports; finished parts are not done again.

    Args:
        output_dir: folder of everything that is written.
        seed: of training and data order.
        num_samples: texts for each row and seed of the comparison; None for 72.
        scale: multiplies all training steps.

    Returns:
        The path of the report.

    Raises:
        ValueError: if the folder cannot be written to.
    """
    folder = Path(output_dir)
    check_writable(folder)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # the bars and our own lines tell enough
    console = Console(stderr=True)
    clock = Clock(console, scale)
    console.print(f"[bold]crocodil quickstart[/bold] in {folder}: about {clock.total:.0f} minutes on two cores")
    data = CanonicalFunctions(seed=seed)
    with clock.part("reading Python functions from this machine", DATA_MINUTES):
        data.prepare_data()
    for stage in STAGES:
        with clock.part(f"training the {SOURCES[stage.name]}", stage.minutes * scale):
            train(stage, folder, seed, scale)
    with clock.part("comparing the samplers", COMPARISON_MINUTES):
        content = compare(folder, data, num_samples or 72, seed, clock.minutes)
    rows = [{key: value for key, value in row.items() if key != "examples"} for row in content.rows]
    report.write_results(folder, rows)
    path = report.write_report(folder, content)
    # A table that is cut off tells nothing: where the width is unknown or too small, lines wrap instead.
    Console(stderr=True, width=max(console.width, TABLE_WIDTH)).print(report.results_table(content.rows))
    sentences = verdict_sentences(verdict(content.rows, content.length))
    for sentence in (*sentences, latent_use_sentence(content.conditioning)):
        console.print("- " + sentence)
    console.print(f"\ntable: {folder / 'results.json'}   report: {path}   pipeline: {folder / 'pipeline'}")
    console.print(f"write texts with it: crocodil sample --pipeline {folder / 'pipeline'}")
    return path


class Clock:
    """Says which part runs and how long is left, by the parts' usual minutes corrected by the pace so far."""

    def __init__(self, console: Console, scale: float) -> None:
        self.console = console
        self.total = DATA_MINUTES + sum(stage.minutes for stage in STAGES) * scale + COMPARISON_MINUTES
        self.left = self.total
        self.pace = 1.0
        self.minutes: dict[str, float] = {}

    @contextmanager
    def part(self, title: str, usual: float) -> Iterator[None]:
        """Announces a part of `usual` minutes, and learns from it how fast this machine is."""
        self.console.print(f"[bold]{title}[/bold], about {max(self.left * self.pace, 0.1):.1f} minutes left in all")
        start = time.perf_counter()
        yield
        spent = (time.perf_counter() - start) / 60
        self.left -= usual
        if spent > 0.3 * usual and usual >= 1:  # a part found finished, or a short one, tells nothing of the pace
            self.pace = spent / usual
        self.minutes[title] = round(spent, 2)


def train(stage: Stage, folder: Path, seed: int, scale: float) -> None:
    """Runs `crocodil fit` for a stage, which goes on from its last checkpoint and leaves a finished run alone."""
    num_steps = max(2, round(stage.num_steps * scale))
    every = max(1, num_steps // 4)
    with as_file(files("crocodil_configs") / f"quickstart_{stage.name}.yaml") as config:
        arguments = [
            "fit",
            f"--config={config}",
            f"--trainer.default_root_dir={folder / stage.name}",
            f"--trainer.max_steps={num_steps}",
            f"--trainer.val_check_interval={every}",
            f"--seed_everything={seed if stage.name != 'judge' else seed + 1000}",
            f"--model.init_args.seed={seed if stage.name != 'judge' else seed + 1000}",
            f"--data.init_args.seed={seed if stage.name != 'judge' else seed + 1000}",
        ]
        if not has_compiler():
            arguments.append("--model.init_args.compile=false")
        if stage.previous is not None:
            arguments.append(f"--model.init_args.{stage.argument}={last_checkpoint(folder, stage.previous)}")
        run_trainer(arguments)


def last_checkpoint(folder: Path, stage: str) -> Path:
    """Where a stage's newest checkpoint lies."""
    return folder / stage / "checkpoints" / "last.ckpt"


def has_compiler() -> bool:
    """Whether torch.compile can build its kernels here: it needs a C++ compiler on the CPU."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++"))


def systems(length: int) -> list[SystemGrid]:
    """What the table compares."""
    all_steps = [length // n for n in (1, 2, 4, 8, 16, 32)]
    few_steps = all_steps[3:]
    return [
        SystemGrid(algorithm, steps, order, [temperature], num_registers)
        for algorithm, steps, rules in (
            ("base", all_steps, BASE_RULES),
            ("base", few_steps, (HOT_BASE_RULE,)),
            ("conthendisc", few_steps, (COARSE, WHOLE)),
            ("conwithindisc", few_steps, (COARSE,)),
            ("oracle", few_steps, (WHOLE,)),
        )
        for order, temperature, num_registers in rules
    ]


def compare(
    folder: Path, data: CanonicalFunctions, num_samples: int, seed: int, minutes: dict[str, float]
) -> report.Report:
    """Exports pipeline and judge, fills the tables, and gathers what the page shows beside them."""
    checkpoints = {stage.name: last_checkpoint(folder, stage.name) for stage in STAGES}
    pipeline = build_pipeline(str(checkpoints["autoencoder"]), str(checkpoints["prior"]), str(checkpoints["demasker"]))
    pipeline.save_pretrained(folder / "pipeline")
    judge = build_judge(str(checkpoints["judge"]), score_end=True)
    judge.save_pretrained(folder / JUDGE_FOLDER)
    held_out = data.blocks("test")
    num_samples = min(num_samples, len(held_out) // 2)
    context = {
        "system": fingerprint(folder / "pipeline"),
        "judge": fingerprint(folder / JUDGE_FOLDER),
        "texts": array_fingerprint(held_out.numpy()),
        "num_samples": num_samples,
    }
    table = Generation(
        pipeline,
        judge,
        held_out,
        systems(data.length),
        num_samples=num_samples,
        seeds=SEEDS,
        prior_steps=PRIOR_STEPS,
        refresh_prior_steps=REFRESH_PRIOR_STEPS,
        mauve_seeds=(),
    )
    rows = table.rows(Ledger(folder / "cells", "generation", context))
    use = Conditioning(pipeline, held_out, [pipeline.encoder.num_registers], num_texts=512)  # type: ignore[union-attr]
    return report.Report(
        rows=rows,
        curves={SOURCES[stage.name]: loss_curve(folder / stage.name) for stage in STAGES},
        conditioning=use.rows(Ledger(folder / "cells", "conditioning", context)),
        texts=example_texts(rows, data.length),
        example=reconstruction(pipeline, held_out),
        machine=machine(),
        seeds=list(SEEDS),
        settings={
            "corpus": "canonical Python functions of the standard library and the installed packages",
            "functions in training / held out": f"{len(data.blocks('train'))} / {len(held_out)}",
            "num_registers": pipeline.encoder.num_registers if pipeline.encoder else None,
            "latent_dim": pipeline.encoder.latent_dim if pipeline.encoder else None,
            "samples per row and seed": num_samples,
            "prior steps (refresh)": f"{PRIOR_STEPS} ({REFRESH_PRIOR_STEPS})",
            "training seed": seed,
            "parameters": {name: sum(p.numel() for p in net.parameters()) for name, net in pipeline.networks().items()},
            "minutes": minutes,
        },
        length=data.length,
    )


def loss_curve(folder: Path) -> list[dict[str, Any]]:
    """Losses of a stage from its TensorBoard events."""
    events = EventAccumulator(str(folder))
    events.Reload()
    known = events.Tags()["scalars"]
    points: dict[int, dict[str, Any]] = {}
    for tag in ("train_loss", "val_loss"):
        for event in events.Scalars(tag) if tag in known else ():
            points.setdefault(event.step, {"step": event.step, "train_loss": None, "val_loss": None})[tag] = event.value
    return [points[step] for step in sorted(points)]


def example_texts(rows: list[dict[str, Any]], length: int) -> dict[str, list[str]]:
    """A few texts of each kind, the first of their seeds and not chosen by quality."""
    few = length // 16
    chosen = {
        "held-out data": ("data", 0, None),
        f"base, {length} calls": ("base", length, BASE_RULES[0][0]),
        f"base, {few} calls": ("base", few, BASE_RULES[0][0]),
        f"ConThenDisc, {few} calls": ("conthendisc", few, COARSE[0]),
        f"ConWithinDisc, {few} calls": ("conwithindisc", few, COARSE[0]),
    }
    found: dict[tuple[Any, ...], list[str]] = {}
    for row in rows:
        found.setdefault((row["algorithm"], row["num_steps"], row["remasking"]), row["examples"])
    return {label: found[key] for label, key in chosen.items()}


def reconstruction(pipeline: CrocodilPipeline, held_out: Tensor) -> dict[str, Any]:
    """A held-out text beside what the demasker writes from its registers, with all of them and with fewer."""
    assert pipeline.encoder is not None
    source = held_out[held_out.count_nonzero(1).argmax()][None]  # the longest: EOS, which fills the tail, is id 0
    num_steps = source.shape[1] // 8

    def write(num_registers: int) -> dict[str, Any]:
        result = pipeline.reconstruct(source, num_steps, num_registers=num_registers)
        accuracy = float((result.token_ids == source).float().mean())
        return {"num_registers": num_registers, "output": result.texts[0], "token_accuracy": accuracy}

    counts = [2**i for i in range(10) if 2**i < pipeline.encoder.num_registers]
    return {
        **write(pipeline.encoder.num_registers),
        "source": pipeline.codec.decode(source[0]),
        "num_steps": num_steps,
        "with fewer registers": [write(count) for count in counts],
    }

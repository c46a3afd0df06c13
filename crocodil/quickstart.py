"""`crocodil quickstart`: the three fits, the comparison and the report, on the machine at hand."""

import logging
import os
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from crocodil.commands import build_pipeline
from crocodil.comparison import Comparison, Setting
from crocodil.data import CanonicalFunctions
from crocodil.diffusion.noise import RowNoise
from crocodil.evaluation import report
from crocodil.evaluation.verdict import latent_use_sentence, verdict, verdict_sentences
from crocodil.modules.autoencoder import MASK_RATIOS, losses_by_mask_ratio
from crocodil.modules.checkpoints import StageCheckpoint
from crocodil.output import check_writable
from crocodil.pipeline import CrocodilPipeline
from crocodil.samplers import MaskedSampler
from crocodil.trainer_cli import run_trainer

SEEDS = (0, 1, 2)
TABLE_WIDTH = 120
PRIOR_STEPS, REFRESH_PRIOR_STEPS = 8, 8
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
        comparison = compare(folder, data, num_samples or 72, seed, clock.minutes)
    report.write_results(folder, comparison)
    path = report.write_report(folder, comparison)
    # A table that is cut off tells nothing: where the width is unknown or too small, lines wrap instead.
    Console(stderr=True, width=max(console.width, TABLE_WIDTH)).print(report.results_table(comparison.rows))
    sentences = verdict_sentences(verdict(comparison.rows, comparison.length))
    for sentence in (*sentences, latent_use_sentence(comparison.latent_use)):
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
    """Runs `crocodil fit` for a stage, on from its last checkpoint; a finished stage is left alone."""
    num_steps = max(2, round(stage.num_steps * scale))
    checkpoint = last_checkpoint(folder, stage.name)
    done = finished_steps(checkpoint)
    if done >= num_steps:
        return
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
        if done:
            arguments.append(f"--ckpt_path={checkpoint}")
        run_trainer(arguments)


def last_checkpoint(folder: Path, stage: str) -> Path:
    """Where a stage's newest checkpoint lies."""
    return folder / stage / "checkpoints" / "last.ckpt"


def finished_steps(checkpoint: Path) -> int:
    """Optimizer steps behind a checkpoint; 0 where there is none."""
    if not checkpoint.is_file():
        return 0
    return torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"]


def has_compiler() -> bool:
    """Whether torch.compile can build its kernels here: it needs a C++ compiler on the CPU."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++"))


def comparison_settings(length: int) -> list[Setting]:
    """The rows of the table, for each seed."""
    all_steps = [length // n for n in (1, 2, 4, 8, 16, 32)]
    few_steps = all_steps[3:]
    return [
        Setting(algorithm, num_steps, order, temperature, num_registers, seed)
        for seed in SEEDS
        for algorithm, steps, rules in (
            ("data", [0], ((None, None, None),)),
            ("base", all_steps, BASE_RULES),
            ("base", few_steps, (HOT_BASE_RULE,)),
            ("conthendisc", few_steps, (COARSE, WHOLE)),
            ("conwithindisc", few_steps, (COARSE,)),
            ("oracle", few_steps, (WHOLE,)),
        )
        for order, temperature, num_registers in rules
        for num_steps in steps
    ]


def compare(
    folder: Path, data: CanonicalFunctions, num_samples: int, seed: int, minutes: dict[str, float]
) -> report.Comparison:
    """Exports the pipeline, fills the table, and gathers what the report shows beside it."""
    checkpoints = {stage.name: last_checkpoint(folder, stage.name) for stage in STAGES}
    pipeline = build_pipeline(str(checkpoints["autoencoder"]), str(checkpoints["prior"]), str(checkpoints["demasker"]))
    pipeline.save_pretrained(folder / "pipeline")
    held_out = data.blocks("test")
    table = Comparison(
        pipeline,
        StageCheckpoint(checkpoints["judge"], "judge").judge(),
        held_out,
        num_samples,
        PRIOR_STEPS,
        REFRESH_PRIOR_STEPS,
        folder / f"rows-{fingerprint(checkpoints.values(), num_samples)}.jsonl",
    )
    settings = comparison_settings(data.length)
    with rows_progress() as bars:
        task = bars.add_task("rows of the table", total=len(settings))
        rows = table.rows(settings, lambda done, total: bars.update(task, completed=done))
    return report.Comparison(
        rows=rows,
        curves={SOURCES[stage.name]: loss_curve(folder / stage.name) for stage in STAGES},
        latent_use=latent_use(pipeline, held_out[:512]),
        texts=example_texts(table),
        reconstruction=reconstruction(pipeline, held_out),
        machine=machine(),
        seeds=list(SEEDS),
        settings={
            "corpus": "canonical Python functions of the standard library and the installed packages",
            "functions in training / held out": f"{len(data.blocks('train'))} / {len(held_out)}",
            "num_registers": pipeline.encoder.num_registers if pipeline.encoder else None,
            "latent_dim": pipeline.encoder.latent_dim if pipeline.encoder else None,
            "samples per row and seed": table.num_samples,
            "prior steps (refresh)": f"{PRIOR_STEPS} ({REFRESH_PRIOR_STEPS})",
            "training seed": seed,
            "parameters": {name: sum(p.numel() for p in net.parameters()) for name, net in pipeline.networks().items()},
            "minutes": minutes,
        },
        length=data.length,
    )


def fingerprint(checkpoints: Any, num_samples: int) -> str:
    """Names the rows of one trained system: other weights never reuse them."""
    return f"{num_samples}-" + "-".join(str(int(path.stat().st_mtime)) for path in checkpoints)


def rows_progress() -> Progress:
    """The bar of the comparison."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True), transient=True)


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


def latent_use(pipeline: CrocodilPipeline, token_ids: Tensor) -> list[dict[str, float]]:
    """Cross-entropy at masked positions against the mask ratio: true latents, none, and the base, which knows none."""
    assert pipeline.encoder is not None and pipeline.base is not None
    noise = RowNoise(torch.arange(len(token_ids)))
    with torch.no_grad():
        latents = pipeline.encoder(token_ids)
        with_latents = losses_by_mask_ratio(pipeline.demasker, token_ids, latents, noise)
        without_latents = losses_by_mask_ratio(pipeline.demasker, token_ids, None, noise)
        base = losses_by_mask_ratio(pipeline.base, token_ids, None, noise)
    return [
        {
            "mask_ratio": ratio,
            "with_latents": float(with_latents[ratio]),
            "without_latents": float(without_latents[ratio]),
            "base": float(base[ratio]),
        }
        for ratio in MASK_RATIOS
    ]


def example_texts(table: Comparison) -> dict[str, list[str]]:
    """A few texts of each kind, the first of their seeds and not chosen by quality."""
    length = table.held_out.shape[1]
    few = length // 16
    chosen = {
        "held-out data": Setting("data", 0, None, None, None, SEEDS[0]),
        f"base, {length} calls": Setting("base", length, *BASE_RULES[0], SEEDS[0]),
        f"base, {few} calls": Setting("base", few, *BASE_RULES[0], SEEDS[0]),
        f"ConThenDisc, {few} calls": Setting("conthendisc", few, *COARSE, SEEDS[0]),
        f"ConWithinDisc, {few} calls": Setting("conwithindisc", few, *COARSE, SEEDS[0]),
    }
    return {label: table.write(setting).texts[:4] for label, setting in chosen.items()}


@torch.no_grad()
def reconstruction(pipeline: CrocodilPipeline, held_out: Tensor) -> dict[str, Any]:
    """A held-out text beside what the demasker writes from its registers, with all of them and with fewer."""
    assert pipeline.encoder is not None
    source = held_out[held_out.count_nonzero(1).argmax()][None]  # the longest: EOS, which fills the tail, is id 0
    latents, num_steps = pipeline.encoder(source), source.shape[1] // 8

    def write(num_registers: int) -> tuple[str, float]:
        out = MaskedSampler(num_steps).sample(
            pipeline.demasker, length=source.shape[1], batch_size=1, latents=latents[:, :num_registers]
        )
        return pipeline.codec.decode(out.token_ids[0]), float((out.token_ids == source).float().mean())

    counts = [2**i for i in range(10) if 2**i < pipeline.encoder.num_registers]
    fewer = [dict(zip(("num_registers", "output", "token_accuracy"), (k, *write(k)), strict=True)) for k in counts]
    output, accuracy = write(pipeline.encoder.num_registers)
    return {
        "source": pipeline.codec.decode(source[0]),
        "output": output,
        "token_accuracy": accuracy,
        "num_steps": num_steps,
        "with fewer registers": fewer,
    }


def machine() -> dict[str, str]:
    """Processor, cores and versions."""
    return {
        "processor": processor_name(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "torch threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        **{name: version(name) for name in ("crocodil", "torch", "lightning", "transformers")},
    }


def processor_name() -> str:
    """The processor as the system names it."""
    info = Path("/proc/cpuinfo")
    names: Sequence[str] = info.read_text().splitlines() if info.is_file() else ()
    return next(
        (line.split(":", 1)[1].strip() for line in names if line.startswith("model name")), platform.processor()
    )

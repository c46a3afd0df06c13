"""`crocodil sample` and `crocodil export`."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from crocodil.data.codec import TextCodec
from crocodil.evaluation.film import Film
from crocodil.evaluation.judge import Judge
from crocodil.models.pretrained import named_dtype
from crocodil.modules.checkpoints import StageCheckpoint, check_autoencoder
from crocodil.output import check_writable
from crocodil.pipeline import Algorithm, CrocodilPipeline
from crocodil.pipeline_folder import is_pipeline
from crocodil.samplers.latent import LatentProcess
from crocodil.samplers.mean_flow import StudentProcess
from crocodil.samplers.protocols import ProgressCallback, StepCallback, StepEvent

SAMPLE_DEFAULTS: dict[str, Any] = {"num_steps": 8, "remasking": "low_confidence", "temperature": 0.7}
"""Of `crocodil sample`, where a pipeline has none of its own."""


def sample(
    pipeline: str | None,
    algorithm: Algorithm,
    num_samples: int,
    prompts: Sequence[str] | None,
    output: str | None,
    device: str,
    compile: bool = False,
    watch: bool = False,
    film: str | None = None,
    **settings: Any,
) -> None:
    """Writes texts as JSON lines, to a file or to standard output.

    Args:
        pipeline: folder of a pipeline; None for the one that comes with the project.
        algorithm: see `CrocodilPipeline.__call__`.
        num_samples: likewise.
        prompts: likewise.
        output: file to write; None for standard output.
        device: "auto" takes a GPU if there is one.
        compile: see `CrocodilPipeline.compile`.
        watch: show the first text on standard error while it is written.
        film: page to write, see `Film`.
        settings: further arguments of `CrocodilPipeline.__call__`; what is None here is taken from the defaults of the
            pipeline for this algorithm, then from `SAMPLE_DEFAULTS`.
    """
    pipe = open_pipeline(pipeline, device, output=output, film=film)
    given = {name: value for name, value in settings.items() if value is not None}
    settings = SAMPLE_DEFAULTS | pipe.defaults.get(algorithm, {}) | given
    if compile:
        pipe.compile()
    recorder = Film(pipe.codec, pipe.demasker.mask_token_id)
    with live_text(pipe.codec) if watch else progress_bar() as (progress, show):

        def on_step(event: StepEvent) -> None:
            recorder(event)
            if show is not None:
                show(event)

        result = pipe(
            num_samples,
            algorithm=algorithm,
            prompts=prompts,
            progress=progress,
            on_step=on_step if watch or film else None,
            **settings,
        )
    if film is not None:
        recorder.save(film, f"{algorithm}, {settings['num_steps']} steps, {settings['remasking']}")
    cost = result.cost.to_dict()
    lines = [
        json.dumps({"text": text, "token_ids": row.tolist(), "cost": cost})
        for text, row in zip(result.texts, result.token_ids, strict=True)
    ]
    if output is None:
        print("\n".join(lines))
        return
    Path(output).write_text("\n".join(lines) + "\n")
    Console(stderr=True).print(
        f"{len(lines)} texts written to {output}: {cost['nfe']:.2f} demasker-call equivalents a text, "
        f"{cost['tokens_per_second']:.0f} tokens per second"
    )


def shipped_pipeline() -> Path:
    """The folder of the small system that comes with the project.

    Raises:
        ValueError: if none has been put there yet.
    """
    folder = Path(str(files("crocodil_weights")))
    if not is_pipeline(folder):
        raise ValueError("this version comes without a trained system: name one with --pipeline")
    return folder


def open_pipeline(folder: str | None, device: str, **outputs: str | None) -> CrocodilPipeline:
    """A pipeline on its device, after a look at where the outputs go.

    On the CPU, which computes in it slowly, float16 is widened to float32.

    Args:
        folder: of the pipeline; None for the one that comes with the project.
        device: "auto" takes a GPU if there is one.
        outputs: the file of each option; None for none.

    Raises:
        ValueError: if there is no pipeline, an output cannot be written, or the device cannot be used.
    """
    for option, path in outputs.items():
        if path is not None:
            check_writable(Path(path).parent)
            if Path(path).is_dir():
                raise ValueError(f"--{option} must be a file, got the folder {path}")
    pipeline = CrocodilPipeline.from_pretrained(folder or shipped_pipeline())
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    is_half = next(pipeline.demasker.parameters()).dtype == torch.float16
    try:
        return pipeline.to(device, torch.float32 if is_half and device == "cpu" else None)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"the device {device} cannot be used: {str(error).splitlines()[0]}") from error


def export(
    autoencoder: str | None,
    prior: str | None,
    base: str | None,
    output: str,
    judge: str | None = None,
    student: str | None = None,
    dtype: str | None = None,
) -> None:
    """Collects checkpoints into a pipeline folder, or turns a judge's into a folder of transformers.

    Args:
        autoencoder: checkpoint of the autoencoder stage.
        prior: checkpoint of the prior stage, trained on that autoencoder.
        base: checkpoint of the demasker stage, which the algorithm "masked" samples from.
        output: folder to write.
        judge: checkpoint of the judge stage, instead of all others.
        student: checkpoint of the student stage, trained on that autoencoder.
        dtype: of the written weights, such as "float16"; None keeps that of the checkpoints.
    """
    check_writable(output)
    if judge is not None:
        if autoencoder or prior or base or student:
            raise ValueError("a judge has a folder of its own: give --judge and --output alone")
        build_judge(judge).save_pretrained(output)
        Console(stderr=True).print(f"judge written to {output}; name it in lightning_configs/eval_*.yaml")
        return
    torch_dtype = named_dtype(dtype)
    build_pipeline(autoencoder, prior, base, student).to("cpu", torch_dtype).save_pretrained(output)
    Console(stderr=True).print(f"pipeline written to {output}; try: crocodil sample --pipeline {output}")


def build_pipeline(
    autoencoder: str | None, prior: str | None, base: str | None, student: str | None = None
) -> CrocodilPipeline:
    """The pipeline of some checkpoints, on the CPU.

    Raises:
        ValueError: if the checkpoints are of the wrong stages or do not belong together.
    """
    base_checkpoint = None if base is None else StageCheckpoint(base, "demasker")
    if autoencoder is None:
        if base_checkpoint is None or prior is not None or student is not None:
            raise ValueError(
                "export needs --autoencoder (and --prior, --student or both), or --base alone for a plain model"
            )
        return CrocodilPipeline(base_checkpoint.demasker(), base_checkpoint.codec)
    checkpoint = StageCheckpoint(autoencoder, "autoencoder")
    parts: dict[str, Any] = {"encoder": checkpoint.encoder()}
    if prior is not None:
        prior_checkpoint = StageCheckpoint(prior, "prior")
        check_autoencoder(prior, prior_checkpoint.networks["autoencoder"], parts["encoder"], autoencoder)
        parts["prior"] = prior_checkpoint.prior()
        parts["latent_process"] = LatentProcess.from_dict(prior_checkpoint.networks["latent_process"])
    if student is not None:
        student_checkpoint = StageCheckpoint(student, "student")
        check_autoencoder(student, student_checkpoint.networks["autoencoder"], parts["encoder"], autoencoder)
        parts["student"] = student_checkpoint.student()
        parts["student_process"] = StudentProcess.from_dict(student_checkpoint.networks["student_process"])
    if base_checkpoint is not None:
        parts["base"] = base_checkpoint.demasker()
    return CrocodilPipeline(checkpoint.demasker(), checkpoint.codec, **parts)


def build_judge(checkpoint: str, score_end: bool = False) -> Judge:
    """The judge of a checkpoint, on the CPU.

    Args:
        checkpoint: of the judge stage.
        score_end: see `Judge`.

    Raises:
        ValueError: if the checkpoint is of another stage.
    """
    read = StageCheckpoint(checkpoint, "judge")
    return Judge(read.judge(), read.codec, read.codec, score_end)


Views = tuple[ProgressCallback | None, StepCallback | None]


@contextmanager
def progress_bar() -> Iterator[Views]:
    """A bar a network, on standard error, that follows a sampler's calls."""
    columns = (TextColumn("{task.description:>9}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def update(network: str, done: int, total: int) -> None:
            if network not in tasks:
                tasks[network] = bars.add_task(network, total=total)
            bars.update(tasks[network], completed=done, total=total)

        yield update, None


@contextmanager
def live_text(codec: TextCodec) -> Iterator[Views]:
    """The first text of each batch while it is written: masks dim, what a step writes bold."""
    with Live(console=Console(stderr=True), auto_refresh=False) as live:

        def show(event: StepEvent) -> None:
            text = Text(f"step {event.index + 1}{', sketch drawn anew' if event.refreshed else ''}\n", style="dim")
            ids, fresh = event.token_ids[0].tolist(), event.committed[0].tolist()
            for token_id, piece, is_fresh in zip(ids, codec.pieces(ids), fresh, strict=True):
                if token_id == codec.vocabulary.mask_token_id:
                    text.append("\u2591 ", style="dim")
                else:
                    text.append(piece, style="bold green" if is_fresh else "default")
            live.update(text, refresh=True)

        yield None, show

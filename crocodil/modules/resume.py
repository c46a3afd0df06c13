"""From which checkpoint a run goes on, and whether it is the same run."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crocodil.modules.checkpoints import RECORD_KEY, Stage, read_checkpoint
from crocodil.modules.integrity import is_whole, newest_first

EXECUTION = ("cache_dir", "compile", "gradient_checkpointing", "num_workers")
"""Settings of model and data that change how a step is carried out, not which step it is."""
NUMERICS = (
    "accumulate_grad_batches",
    "gradient_clip_algorithm",
    "gradient_clip_val",
    "limit_train_batches",
    "overfit_batches",
    "precision",
)
"""Settings of the Trainer that change what a step is."""
MAX_STEPS = "trainer.max_steps"
SHOWN = 4
"""Differing settings that a refusal names; it counts the others."""


@dataclass(frozen=True)
class Found:
    """A checkpoint to go on from.

    Args:
        path: file or folder.
        step: optimizer steps behind it.
        settings: of the run that wrote it; None if that was not `crocodil fit`.
        damaged: newer ones that cannot be gone on from.
    """

    path: Path
    step: int
    settings: dict[str, Any] | None
    damaged: tuple[Path, ...]


def newest_checkpoint(folders: Sequence[Path], stage: Stage) -> Found | None:
    """The newest whole checkpoint of a run; None if it has none at all.

    Args:
        folders: with files and folders `*.ckpt`; may be absent.
        stage: the stage it must be of.

    Raises:
        ValueError: if all checkpoints are damaged, or the newest whole one is of another stage.
    """
    damaged: list[Path] = []
    for path in newest_first([path for folder in folders for path in folder.glob("*.ckpt")]):
        if not is_whole(path):
            damaged.append(path)
            continue
        content = read_checkpoint(path, stage)
        if "lr_schedulers" in content:  # and not the weights alone
            return Found(path, content["global_step"], content[RECORD_KEY]["settings"], tuple(damaged))
    if damaged:
        names = ", ".join(path.name for path in damaged)
        raise ValueError(
            f"all checkpoints in {damaged[0].parent} are damaged ({names}): put a whole one there, or remove the "
            "folder to start anew"
        )
    return None


def run_settings(config: Mapping[str, Any], num_processes: int, kept: Sequence[Any] = ()) -> dict[str, Any]:
    """What makes a run this run, as plain data: dotted names and values.

    A number of the learning-rate schedule that equals `trainer.max_steps` is recorded as following it, so that a longer
    run is the same run.

    Args:
        config: of the CLI, as plain data, with the sections `model`, `data` and `trainer`.
        num_processes: of the run.
        kept: settings of the callbacks that keep weights of their own.
    """
    trainer = config["trainer"]
    found = {
        name: value
        for section in ("model", "data")
        for name, value in flatten(config[section], section)
        if name.rpartition(".")[2] not in EXECUTION
    }
    for name, value in found.items():
        if ".lr_scheduler." in name and value == trainer["max_steps"]:
            found[name] = MAX_STEPS
    found |= {f"trainer.{name}": trainer[name] for name in NUMERICS}
    return found | {
        "seed_everything": config["seed_everything"],
        "number of processes": num_processes,
        "averaging callbacks": list(kept),
    }


def flatten(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The values of nested dictionaries under their dotted names."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from flatten(inner, f"{name}.{key}")
    else:
        yield name, value


def check_same_run(found: Found, settings: dict[str, Any]) -> None:
    """Refuses to go on, unasked, from the checkpoint of a run with other settings.

    Args:
        found: the checkpoint.
        settings: of this run (`run_settings`).

    Raises:
        ValueError: if settings differ; it names them.
    """
    ways_out = (
        f"to go on from it all the same, give --ckpt_path={found.path}; to start anew, give another "
        f"--trainer.default_root_dir or remove {found.path.parent}"
    )
    if found.settings is None:
        raise ValueError(f"{found.path} does not tell the settings it was trained with; {ways_out}")
    names = [name for name in {**found.settings, **settings} if found.settings.get(name) != settings.get(name)]
    if names:
        shown = [f"{name} {found.settings.get(name)!r} (now {settings.get(name)!r})" for name in names[:SHOWN]]
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        raise ValueError(f"{found.path} was trained with other settings: {', '.join(shown)}{more}; {ways_out}")

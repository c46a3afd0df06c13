"""Every YAML of lightning_configs: complete, runnable in small, and no key of it without effect."""

from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "lightning_configs"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def tiny(name: str, config: Path, tiny_system: Any, folder: Path) -> list[str]:
    """Parses, builds everything, fits for no step."""
    family, _, stage = name.rpartition("_")
    arguments = tiny_system.arguments("fit", stage, "--trainer.max_steps=0", f"--trainer.default_root_dir={folder}")
    arguments[1] = f"--config={config}"
    if family == "source":
        arguments.append("--data.init_args.vocab_size=300")
    if family == "source" and stage != "demasker":
        previous = {"autoencoder": "demasker", "prior": "autoencoder"}[stage]
        arguments.append(f"--model.init_args.{previous}_checkpoint={folder}/none.ckpt")
    return arguments


def test_there_are_configs() -> None:
    assert len(NAMES) >= 7

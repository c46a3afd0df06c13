"""The folder of a pipeline: safetensors, tokenizer files and `crocodil.json`; nothing in it is run."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from crocodil.data.codec import TextCodec
from crocodil.data.retokenizer import Retokenizer
from crocodil.models import Demasker, LatentPrior, LatentStudent, RegisterEncoder
from crocodil.samplers.latent import LatentProcess
from crocodil.samplers.mean_flow import StudentProcess

PIPELINE_FILE = "crocodil.json"
ENCODER_TOKENIZER = "encoder_tokenizer"
FORMAT = 1
Network = Demasker | RegisterEncoder | LatentPrior | LatentStudent
NETWORKS: dict[str, type[Network]] = {
    "demasker": Demasker,
    "encoder": RegisterEncoder,
    "prior": LatentPrior,
    "student": LatentStudent,
    "base": Demasker,
}


def write_folder(
    folder: Path,
    networks: Mapping[str, Network],
    codec: TextCodec,
    latent_process: LatentProcess,
    student_process: StudentProcess,
    defaults: Mapping[str, Mapping[str, Any]],
) -> None:
    """Writes what a pipeline consists of.

    Args:
        folder: created if absent.
        networks: some of `NETWORKS`, by name.
        codec: text to token ids and back.
        latent_process: how the prior was trained.
        student_process: how the student was trained.
        defaults: see `CrocodilPipeline`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, network in networks.items():
        network.save_pretrained(folder / name)
    codec.save_pretrained(folder / "tokenizer")
    encoder = networks.get("encoder")
    if isinstance(encoder, RegisterEncoder) and isinstance(encoder.translate, Retokenizer):
        encoder.translate.target.save_pretrained(folder / ENCODER_TOKENIZER)
    description = {
        "format": FORMAT,
        "versions": {name: version(name) for name in ("crocodil", "torch", "transformers")},
        "networks": list(networks),
        "latent_process": asdict(latent_process),
        "defaults": defaults,
    }
    if "student" in networks:
        description["student_process"] = asdict(student_process)
    (folder / PIPELINE_FILE).write_text(json.dumps(description, indent=2) + "\n")


def read_folder(folder: Path) -> dict[str, Any]:
    """Reads what `write_folder` wrote: the arguments of `CrocodilPipeline`.

    Raises:
        ValueError: if the folder is no pipeline, or one of a later format.
    """
    if not is_pipeline(folder):
        raise ValueError(f"{folder} is no pipeline: it has no {PIPELINE_FILE} (write one with `crocodil export`)")
    description = json.loads((folder / PIPELINE_FILE).read_text())
    if description.get("format") != FORMAT:
        raise ValueError(f"{folder} has pipeline format {description.get('format')}, this version reads {FORMAT}")
    parts: dict[str, Any] = {name: NETWORKS[name].from_pretrained(folder / name) for name in description["networks"]}
    codec = TextCodec.from_pretrained(folder / "tokenizer")
    if (folder / ENCODER_TOKENIZER).is_dir():
        own = TextCodec.from_pretrained(folder / ENCODER_TOKENIZER)
        parts["encoder"].translate = Retokenizer(codec, own)
    parts |= {"codec": codec, "latent_process": LatentProcess.from_dict(description["latent_process"])}
    parts["defaults"] = description.get("defaults")
    if "student" in parts:
        parts["student_process"] = StudentProcess.from_dict(description["student_process"])
    return parts


def is_pipeline(folder: str | Path) -> bool:
    """Whether a folder was written by `write_folder`."""
    return (Path(folder) / PIPELINE_FILE).is_file()

"""From the checkpoint of one stage to the networks of the next; plain data only, no pickle."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from crocodil.data.codec import TextCodec
from crocodil.data.retokenizer import Retokenizer
from crocodil.evaluation.judge import build_judge
from crocodil.models import Demasker, LatentPrior, LatentStudent, RegisterEncoder
from crocodil.modules.checkpoint_io import load_verified
from crocodil.modules.sharded_checkpoint import read_folder, read_weights

Stage = Literal["demasker", "autoencoder", "prior", "student", "judge"]
RECORD_KEY = "crocodil"
FORMAT = 1


def stage_record(
    stage: Stage, networks: dict[str, Any], codec: TextCodec | None, settings: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What a checkpoint says about itself, beside Lightning's own entries.

    Args:
        stage: the stage that wrote it.
        networks: settings that rebuild its networks.
        codec: of its texts; None if it had none.
        settings: of its run (`crocodil.modules.resume`); None if it was not started by `crocodil fit`.
    """
    return {
        "format": FORMAT,
        "stage": stage,
        "networks": networks,
        "codec": None if codec is None else codec.to_state(),
        "settings": settings,
    }


def check_stage(record: dict[str, Any] | None, stage: Stage, source: str | Path) -> None:
    """Refuses a checkpoint of another stage, or none of ours.

    Raises:
        ValueError: if `record` is not that of the stage.
    """
    if record is None:
        raise ValueError(f"expected a checkpoint of the {stage} stage, but {source} was not written by `crocodil fit`")
    if record["stage"] != stage:
        raise ValueError(
            f"expected a checkpoint of the {stage} stage, got one of the {record['stage']} stage: {source}"
        )


def read_checkpoint(path: str | Path, stage: Stage) -> dict[str, Any]:
    """Verifies a checkpoint of the given stage and reads it as plain data; of a sharded one, all but its tensors.

    Args:
        path: a file or, of a sharded run, a folder.
        stage: the stage it must be of.

    Raises:
        ValueError: if the file is absent, damaged, not a crocodil checkpoint, or of another stage.
    """
    path, kind = Path(path), f"a checkpoint of the {stage} stage"
    read = read_folder if path.is_dir() else load_verified
    content = read(path, kind, map_location="cpu", mmap=True)
    # Our checkpoints have no hyperparameters, which Lightning's CLI would take for options of the command line.
    is_ours = isinstance(content, dict) and "hyper_parameters" not in content
    check_stage(content.get(RECORD_KEY) if is_ours else None, stage, path)
    return content


def check_autoencoder(path: str | Path, trained_on: str, encoder: RegisterEncoder, source: str | Path) -> None:
    """Refuses an autoencoder that a prior or student was not trained on.

    Args:
        path: of the checkpoint of the prior or student.
        trained_on: the fingerprint in its record.
        encoder: of the autoencoder.
        source: the autoencoder's checkpoint.

    Raises:
        ValueError: if it is another one.
    """
    if trained_on != encoder.fingerprint():
        raise ValueError(f"{path} was trained on another autoencoder than {source}; give the one it belongs to")


def is_kept(network: nn.Module, key: str) -> bool:
    """Whether an entry of a network's `state_dict` is trained, so that checkpoints hold it.

    The frozen weights under adapters are not: they stay where they came from (`pretrained` in the record).
    """
    if not (getattr(network, "lora", None) and getattr(network, "pretrained", None)):
        return True
    return not key.startswith("network.") or ".lora_" in key or key.endswith("register_gate")


class StageCheckpoint:
    """A checkpoint of one stage, read as plain data, and no more of it than is asked for.

    Args:
        path: a `.ckpt` file or folder of `crocodil fit`.
        stage: the stage it must be of.

    Raises:
        ValueError: see `read_checkpoint`.
    """

    def __init__(self, path: str | Path, stage: Stage) -> None:
        self.path = Path(path)
        self._content = read_checkpoint(path, stage)
        record = self._content[RECORD_KEY]
        self.networks: dict[str, Any] = record["networks"]
        self.codec_state: dict[str, Any] | None = record["codec"]

    def weights(self, prefix: str) -> dict[str, torch.Tensor]:
        """The entries of the `state_dict` whose names begin with `prefix`, under their full names."""
        if self.path.is_dir():
            return read_weights(self.path, prefix)
        return {key: value for key, value in self._content["state_dict"].items() if key.startswith(prefix)}

    @property
    def codec(self) -> TextCodec:
        """The text codec the stage was trained with."""
        if self.codec_state is None:
            raise ValueError(f"{self.path} holds no text codec: it was trained without a crocodil DataModule")
        return TextCodec.from_state(self.codec_state)

    def _load(self, network: nn.Module, prefix: str) -> None:
        own = {key.removeprefix(prefix): value for key, value in self.weights(prefix).items()}
        if not own:
            raise ValueError(f"{self.path} holds no weights of the {prefix.rstrip('.')}")
        missing, unexpected = network.load_state_dict(own, strict=False)
        missing = [key for key in missing if is_kept(network, key)]
        if missing or unexpected:
            raise ValueError(f"{self.path} does not fit its own record: missing {missing}, left over {unexpected}")

    def demasker(self) -> Demasker:
        """f_theta with its trained weights."""
        demasker = Demasker.from_config(self.networks["demasker"])
        self._load(demasker, "demasker.")
        return demasker

    def encoder(self) -> RegisterEncoder:
        """h_phi with its trained weights and statistics."""
        encoder = RegisterEncoder.from_config(self.networks["encoder"])
        self._load(encoder, "encoder.")
        if own := self.networks.get("encoder_codec"):
            encoder.translate = Retokenizer(self.codec, TextCodec.from_state(own))
        return encoder

    def prior(self) -> LatentPrior:
        """G_psi with its trained weights."""
        prior = LatentPrior(**self.networks["prior"])
        self._load(prior, "prior.")
        return prior

    def student(self) -> LatentStudent:
        """The distilled prior with its trained weights."""
        student = LatentStudent(**self.networks["student"])
        self._load(student, "student.")
        return student

    def judge(self) -> PreTrainedModel:
        """The causal network of the judge."""
        judge = build_judge(self.networks["judge"])
        self._load(judge, "judge.")
        return judge

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from crocodil.modules.checkpoints import RECORD_KEY, StageCheckpoint

STAGES = ("demasker", "autoencoder", "prior", "judge")


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_holds_plain_data_and_says_what_it_is(stage: str, tiny_system: Any) -> None:
    content = torch.load(tiny_system.checkpoint(stage), weights_only=True)
    assert content[RECORD_KEY]["stage"] == stage
    assert content["global_step"] == 2


@pytest.mark.parametrize(
    ("stage", "network"),
    [
        ("demasker", "demasker"),
        ("autoencoder", "demasker"),
        ("autoencoder", "encoder"),
        ("prior", "prior"),
        ("judge", "judge"),
    ],
)
def test_a_network_comes_back_with_its_weights(stage: str, network: str, tiny_system: Any) -> None:
    checkpoint = StageCheckpoint(tiny_system.checkpoint(stage), stage)
    weights = getattr(checkpoint, network)().state_dict()
    saved = checkpoint.weights(f"{network}.")
    assert {f"{network}.{key}" for key in weights} == set(saved)
    assert all(torch.equal(weights[key.removeprefix(f"{network}.")], value) for key, value in saved.items())


def test_the_codec_comes_back(tiny_system: Any) -> None:
    codec = StageCheckpoint(tiny_system.checkpoint("demasker"), "demasker").codec
    text = "def f(v0, v1):\n    v2 = v0 + v1\n    return v2 * v0"
    token_ids = codec.encode(text)
    assert token_ids == tiny_system.data().codec.encode(text)
    assert codec.decode(token_ids) == text


@pytest.mark.parametrize("wanted", STAGES)
@pytest.mark.parametrize("given", STAGES)
def test_only_the_right_stage_is_taken(wanted: str, given: str, tiny_system: Any) -> None:
    path = tiny_system.checkpoint(given)
    if given == wanted:
        assert StageCheckpoint(path, wanted).path == path
        return
    with pytest.raises(ValueError, match=f"expected .* {wanted} stage, got one of the {given} stage: {path}$"):
        StageCheckpoint(path, wanted)


def test_an_absent_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.ckpt", tmp_path):
        with pytest.raises(ValueError, match=f"^expected a checkpoint of the prior stage at {path}, but there is no"):
            StageCheckpoint(path, "prior")


@pytest.mark.parametrize("content", [{"state_dict": {}}, [1, 2], torch.zeros(3)])
def test_files_of_others_are_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"^expected .*/other\.ckpt was not written by `crocodil fit`$"):
        StageCheckpoint(tmp_path / "other.ckpt", "demasker")


def damaged(kind: str, whole: Path) -> bytes:
    content = whole.read_bytes()
    return {
        "empty": b"",
        "text": b"hello, this is no checkpoint\n",
        "bytes": bytes(range(256)) * 20,
        "half": content[: len(content) // 2],
        "without its head": content[1000:],
        "pickle of a class": pickle.dumps({"path": Path("x")}, protocol=2),
    }[kind]


@pytest.mark.parametrize("kind", ["empty", "text", "bytes", "half", "without its head", "pickle of a class"])
def test_damaged_files_are_refused_in_one_sentence(kind: str, tiny_system: Any, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(damaged(kind, tiny_system.checkpoint("demasker")))
    with pytest.raises(
        ValueError, match=f"^expected a checkpoint of the demasker stage, but {path} is damaged"
    ) as error:
        StageCheckpoint(path, "demasker")
    assert "\n" not in str(error.value)


def test_missing_parts_are_named(tiny_system: Any, tmp_path: Path) -> None:
    content = torch.load(tiny_system.checkpoint("demasker"), weights_only=True)
    content["state_dict"] = {}
    content[RECORD_KEY]["codec"] = None
    torch.save(content, tmp_path / "hollow.ckpt")
    checkpoint = StageCheckpoint(tmp_path / "hollow.ckpt", "demasker")
    with pytest.raises(ValueError, match="holds no weights of the demasker"):
        checkpoint.demasker()
    with pytest.raises(ValueError, match="holds no text codec"):
        _ = checkpoint.codec


def test_reading_runs_no_code(tmp_path: Path, tiny_system: Any) -> None:
    """A pickle that would make a folder when loaded is refused before it does."""

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.mkdir, (tmp_path / "made",)

    path = tmp_path / "evil.ckpt"
    shutil.copy(tiny_system.checkpoint("demasker"), path)
    torch.save({**torch.load(path, weights_only=True), "extra": Evil()}, path)
    with pytest.raises(ValueError, match="damaged"):
        StageCheckpoint(path, "demasker")
    assert not (tmp_path / "made").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "made").exists()  # the trap works

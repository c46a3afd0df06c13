"""Two processes (gloo, CPU) train the tiny system through the CLI; one process with twice the batch is the truth."""

import csv
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from crocodil.cli import run
from crocodil.modules.checkpoints import StageCheckpoint
from crocodil.modules.sharding import blocks
from crocodil.pipeline import CrocodilPipeline
from crocodil.trainer_cli import run_trainer

RUN = """
trainer:
  max_steps: 20
  val_check_interval: 10
  log_every_n_steps: 1
  gradient_clip_val: 0.5
  logger:
    class_path: lightning.pytorch.loggers.CSVLogger
    init_args: {{save_dir: {folder}, name: "", version: "", flush_logs_every_n_steps: 1}}
  callbacks:
    - class_path: crocodil_callbacks.EMA
      init_args: {{decay: 0.8}}
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {{dirpath: {folder}, filename: "{{step}}", every_n_train_steps: 10, save_top_k: -1}}
model:
  init_args:
    optimizer:
      class_path: torch.optim.AdamW
      init_args: {{lr: 0.003}}
    lr_scheduler:
      class_path: crocodil.modules.optimizers.WarmupCosine
      init_args: {{num_steps: 20, warmup_steps: 3}}
"""
ONE = ["--data.init_args.batch_size=16"]
TWO = ["--data.init_args.batch_size=8", "--trainer.strategy=fsdp2", "--trainer.devices=2"]
SAMPLES = ["--trainer.callbacks+=SampleTexts", "--trainer.callbacks.num_samples=2", "--trainer.callbacks.num_steps=2"]
MUON = ["--model.init_args.optimizer=crocodil.modules.optimizers.MuonAdamW"]
pytestmark = pytest.mark.filterwarnings("ignore:Found .* in eval mode", "ignore:Checkpoint dir", "ignore:The dirpath")


def arguments(system: Any, stage: str, folder: Path, *more: str) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(RUN.format(folder=folder))
    return system.arguments(
        "fit", stage, f"--config={folder / 'run.yaml'}", f"--trainer.default_root_dir={folder}", *more
    )


def start(arguments: list[str], *launcher: str) -> subprocess.Popen[bytes]:
    command = [*(launcher or (sys.executable,)), "-m", "crocodil.cli", *arguments]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)


def finish(process: subprocess.Popen[bytes]) -> None:
    try:
        assert process.wait(timeout=200) == 0
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)


def losses(folder: Path) -> dict[int, float]:
    """The training loss at each step, and the held-out loss of the average at minus the step."""
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    train = {int(row["step"]): float(row["train_loss"]) for row in rows if row["train_loss"]}
    return train | {-int(row["step"]): float(row["val_loss"]) for row in rows if row.get("val_loss")}


def texts(folder: Path) -> dict[str, str]:
    """What the stage wrote at the last validation."""
    return {path.name: path.read_text() for path in (folder / "samples").glob("step-000020-*.txt")}


def assert_same_run(folder: Path, truth: Path, first: int = 0, atol: float = 1e-5) -> None:
    expected = {step: value for step, value in losses(truth).items() if abs(step) >= first}
    assert len(expected) == 20 - first + 2 - first // 10
    assert losses(folder) == pytest.approx(expected, rel=0, abs=atol)
    assert texts(folder) == texts(truth)


def assert_same_weights(folder: Path, truth: Path, stage: str, prefix: str) -> None:
    one = StageCheckpoint(truth / "step=20.ckpt", stage).weights(prefix)  # type: ignore[arg-type]
    two = StageCheckpoint(folder / "step=20.ckpt", stage).weights(prefix)  # type: ignore[arg-type]
    assert len(one) > 3
    torch.testing.assert_close(two, one, rtol=0, atol=3e-5)


@pytest.fixture(scope="module")
def truth(tiny_system: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The autoencoder stage in one process."""
    folder = tmp_path_factory.mktemp("truth")
    run_trainer(arguments(tiny_system, "autoencoder", folder, *ONE, *SAMPLES))
    assert list(texts(folder)) == ["step-000020-reconstruction.txt"]
    return folder


@pytest.fixture(scope="module")
def killed(tiny_system: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in two processes, which die without warning once the checkpoint of step 10 is there."""
    folder = tmp_path_factory.mktemp("killed")
    process = start(arguments(tiny_system, "autoencoder", folder, *TWO, "--trainer.max_steps=100000"))
    try:
        deadline = time.monotonic() + 200
        while not (folder / "step=10.ckpt").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    return folder


@pytest.fixture(scope="module")
def resumed(tiny_system: Any, killed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two new processes go on from there to step 20."""
    folder = tmp_path_factory.mktemp("resumed")
    options = [*TWO, *SAMPLES, f"--ckpt_path={killed / 'step=10.ckpt'}"]
    finish(start(arguments(tiny_system, "autoencoder", folder, *options)))
    return folder


@pytest.fixture
def copy(killed: Path, tmp_path: Path) -> Path:
    """A sharded checkpoint to spoil."""
    return Path(shutil.copytree(killed / "step=10.ckpt", tmp_path / "copy.ckpt"))


@pytest.mark.slow
def test_two_processes_train_as_one(killed: Path, truth: Path) -> None:
    expected, found = losses(truth), losses(killed)
    assert [found[step] for step in range(9)] == pytest.approx([expected[step] for step in range(9)], rel=0, abs=1e-5)


@pytest.mark.slow
def test_a_killed_run_goes_on(resumed: Path, truth: Path) -> None:
    """Weights, optimizer state, averages and statistics all come back: the losses and the last weights tell."""
    assert_same_run(resumed, truth, first=10)
    for prefix in ("demasker.", "encoder."):
        assert_same_weights(resumed, truth, "autoencoder", prefix)


@pytest.mark.slow
def test_a_folder_is_exported_as_a_file_is(resumed: Path, truth: Path, tmp_path: Path) -> None:
    pipelines = []
    for folder in (resumed, truth):
        run(["export", f"--autoencoder={folder / 'step=20.ckpt'}", f"--output={tmp_path / folder.name}"])
        pipelines.append(CrocodilPipeline.from_pretrained(tmp_path / folder.name))
    result, expected = (pipeline(2, 16, "masked", 4, temperature=0.0) for pipeline in pipelines)
    assert result.texts == expected.texts


@pytest.mark.slow
def test_only_what_is_asked_for_is_read(killed: Path) -> None:
    checkpoint = StageCheckpoint(killed / "step=10.ckpt", "autoencoder")
    assert set(checkpoint.weights("encoder.latent_")) == {"encoder.latent_mean", "encoder.latent_std"}
    assert checkpoint.codec.decode(checkpoint.codec.encode("def f(v0):")) == "def f(v0):"


@pytest.mark.slow
def test_a_folder_needs_the_strategy_that_wrote_it(killed: Path, truth: Path, tiny_system: Any, tmp_path: Path) -> None:
    for path, options, message in (
        (killed, ONE, "is a sharded checkpoint: go on from it with --trainer.strategy=fsdp2"),
        (truth, TWO, "is a whole checkpoint: go on from it without --trainer.strategy=fsdp2"),
    ):
        with pytest.raises(ValueError, match=message):
            run(arguments(tiny_system, "autoencoder", tmp_path, *options, f"--ckpt_path={path / 'step=10.ckpt'}"))


@pytest.mark.slow
def test_a_folder_of_another_stage_is_refused(killed: Path, tiny_system: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a checkpoint of the demasker stage, got one of the autoencoder"):
        run(arguments(tiny_system, "demasker", tmp_path, *TWO, f"--ckpt_path={killed / 'step=10.ckpt'}"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [".metadata", "meta.pt"])
def test_a_damaged_folder_is_refused(name: str, copy: Path) -> None:
    content = (copy / name).read_bytes()
    for damaged in (b"", content[: len(content) // 2]):
        (copy / name).write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged or no checkpoint"):
            StageCheckpoint(copy, "autoencoder")


@pytest.mark.slow
def test_reading_a_folder_runs_no_code(copy: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.mkdir, (tmp_path / "made",)

    metadata = pickle.loads((copy / ".metadata").read_bytes())
    metadata.planner_data["extra"] = Evil()
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="is damaged or no checkpoint"):
        StageCheckpoint(copy, "autoencoder")
    assert not (tmp_path / "made").exists()
    pickle.loads((copy / ".metadata").read_bytes())
    assert (tmp_path / "made").exists()  # the trap works


def test_blocks_are_those_of_the_transformers(
    make_demasker: Callable[..., nn.Module], make_encoder: Callable[..., nn.Module], make_prior: Callable[..., Any]
) -> None:
    demasker, encoder, prior = make_demasker(), make_encoder(model_type="bert"), make_prior()
    assert list(blocks(demasker)) == list(demasker.get_submodule("network.model.layers"))
    assert list(blocks(encoder)) == list(encoder.get_submodule("network.encoder.layer"))
    assert list(blocks(prior)) == list(prior.blocks)


# every stage and every way to start

STAGES = [
    ("demasker", SAMPLES),
    ("demasker", ["--model.init_args.loss_weight=elbo"]),
    ("demasker", [*MUON, *SAMPLES]),
    ("autoencoder", ["--model.init_args.lora.r=2", "--model.init_args.gradient_checkpointing=true"]),
    ("prior", [*MUON, *SAMPLES]),
    ("judge", []),
]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "options"), STAGES)
def test_a_stage_trains_and_goes_on_as_in_one_process(
    stage: str, options: list[str], tiny_system: Any, tmp_path: Path
) -> None:
    run_trainer(arguments(tiny_system, stage, tmp_path / "truth", *ONE, *options))
    finish(start(arguments(tiny_system, stage, tmp_path / "whole", *TWO, *options)))
    atol = 1e-4 if MUON[0] in options else 1e-5  # Muon iterates in bfloat16
    assert_same_run(tmp_path / "whole", tmp_path / "truth", atol=atol)
    resume = [*options, f"--ckpt_path={tmp_path / 'whole' / 'step=10.ckpt'}"]
    finish(start(arguments(tiny_system, stage, tmp_path / "resumed", *TWO, *resume)))
    assert_same_run(tmp_path / "resumed", tmp_path / "whole", first=10, atol=1e-6)


@pytest.mark.slow
def test_torchrun_starts_it_too(killed: Path, truth: Path, tiny_system: Any, tmp_path: Path) -> None:
    options = [*TWO, *SAMPLES, f"--ckpt_path={killed / 'step=10.ckpt'}"]
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    finish(start(arguments(tiny_system, "autoencoder", tmp_path, *options), *launcher))
    assert_same_run(tmp_path, truth, first=10)


@pytest.mark.slow
def test_another_number_of_processes_goes_on(killed: Path, truth: Path, tiny_system: Any, tmp_path: Path) -> None:
    options = [*ONE, *SAMPLES, "--trainer.strategy=fsdp2", f"--ckpt_path={killed / 'step=10.ckpt'}"]
    finish(start(arguments(tiny_system, "autoencoder", tmp_path, *options)))
    assert_same_run(tmp_path, truth, first=10)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_stays_close(precision: str, tiny_system: Any, tmp_path: Path) -> None:
    options = [f"--trainer.precision={precision}"]
    run_trainer(arguments(tiny_system, "autoencoder", tmp_path / "truth", *ONE, *options))
    finish(start(arguments(tiny_system, "autoencoder", tmp_path / "two", *TWO, *options)))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "truth"), rel=0, abs=2e-3)


@pytest.mark.slow
def test_compiled_networks_are_sharded(tiny_system: Any, truth: Path, tmp_path: Path) -> None:
    finish(start(arguments(tiny_system, "autoencoder", tmp_path, *TWO, *SAMPLES, "--model.init_args.compile=true")))
    assert_same_run(tmp_path, truth)


@pytest.mark.slow
def test_a_prior_on_a_sharded_autoencoder(resumed: Path, tiny_system: Any, tmp_path: Path) -> None:
    """The frozen networks are sharded and left out of the checkpoint; the pipeline of both folders writes texts."""
    autoencoder = resumed / "step=20.ckpt"
    options = [*TWO, f"--model.init_args.autoencoder_checkpoint={autoencoder}"]
    finish(start(arguments(tiny_system, "prior", tmp_path, *options)))
    prior = StageCheckpoint(tmp_path / "step=20.ckpt", "prior")
    assert not prior.weights("demasker.") and not prior.weights("encoder.")
    run(["export", f"--autoencoder={autoencoder}", f"--prior={prior.path}", f"--output={tmp_path / 'pipe'}"])
    pipeline = CrocodilPipeline.from_pretrained(tmp_path / "pipe")
    assert len(pipeline(2, 16, "conwithindisc", 4, prior_steps=2).texts) == 2

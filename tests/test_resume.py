"""A run that is killed and started again with the same command ends with the weights of one that never was."""

import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from crocodil.cli import run
from crocodil.modules import LastCheckpoint
from crocodil.modules.checkpoints import RECORD_KEY, StageCheckpoint
from crocodil.modules.integrity import SUMS_FILE, is_whole
from crocodil.modules.sharded_checkpoint import read_weights
from crocodil.pipeline import CrocodilPipeline
from crocodil.trainer_cli import run_trainer

SEED = int(os.environ.get("CROCODIL_KILL_SEED", time.time_ns() % 2**32))
RUN = """
trainer:
  max_steps: 240
  val_check_interval: 15
  log_every_n_steps: 5
  callbacks:
    - class_path: crocodil_callbacks.EMA
      init_args: {{decay: 0.9}}
    - class_path: crocodil_callbacks.SampleTexts
      init_args: {{num_samples: 2, num_steps: 2}}
    - class_path: crocodil.modules.LastCheckpoint
      init_args: {{dirpath: {folder}/checkpoints, every_n_train_steps: 7}}
"""
DROPOUT = ["--model.init_args.network.attention_dropout=0.2"]
SHORT = ["--trainer.max_steps=60"]
PREVIOUS = {"autoencoder": ("demasker_checkpoint", "demasker"), "prior": ("autoencoder_checkpoint", "autoencoder")}
FEW_BATCHES = ["--data.init_args.batch_size=40"]  # 8 an epoch: kills meet the ends of epochs, too
SAVING: dict[str, Any] = {"enable_checkpointing": True}
pytestmark = pytest.mark.filterwarnings("ignore:Found .* in eval mode", "ignore:.*smaller than the logging interval")


def arguments(system: Any, stage: str, folder: Path, *more: str, family: str = "quickstart") -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(RUN.format(folder=folder))
    return system.arguments(
        "fit", stage, f"--config={folder / 'run.yaml'}", f"--trainer.default_root_dir={folder}", *FEW_BATCHES,
        "--trainer.max_steps=240", "--trainer.val_check_interval=15", *more, family=family
    )  # fmt: skip


@contextmanager
def started(command: list[str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The command in a process of its own, with one thread, its errors in a file; in the end all of it is killed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (folder / "errors.txt").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "crocodil.cli", *command],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(process: subprocess.Popen[bytes], folder: Path, num_checkpoints: int) -> None:
    """Until a running process has written that many checkpoints, or has ended."""
    last, seen, deadline = folder / "checkpoints" / "last.ckpt", set(), time.monotonic() + 120
    before = last.stat().st_mtime_ns if last.exists() else 0
    while len(seen) < num_checkpoints and process.poll() is None:
        assert time.monotonic() < deadline, "no checkpoint in two minutes"
        with suppress(FileNotFoundError):
            seen |= {last.stat().st_mtime_ns} - {before}
        time.sleep(0.002)


def kill_again_and_again(
    command: list[str], folder: Path, num_kills: int, rng: random.Random, workers: tuple[int, ...] = (0, 2)
) -> list[int]:
    """Starts the command so often and kills it at random moments; the steps that were saved each time."""
    steps = []
    for attempt in range(num_kills):
        reading = f"--data.init_args.num_workers={workers[attempt % len(workers)]}"
        with started([*command, reading], folder) as process:
            wait_for(process, folder, rng.randrange(1, 4))
            time.sleep(rng.uniform(0, 0.15))
            assert process.poll() is None, f"ended before it was killed: {(folder / 'errors.txt').read_text()}"
            os.killpg(process.pid, signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        steps.append(newest(folder)["global_step"])
    return steps


def newest(folder: Path) -> dict[str, Any]:
    path = folder / "checkpoints" / "last.ckpt"
    path = path if path.exists() else path.with_name("previous.ckpt")
    assert is_whole(path)
    if path.is_file():
        return torch.load(path, weights_only=True)
    return torch.load(path / "meta.pt", weights_only=True) | {"state_dict": read_weights(path, "")}  # averages too


def differences(one: Any, two: Any, name: str) -> Iterator[str]:
    """Where two nested structures differ, be it in a bit."""
    if isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        for key in one:
            yield from differences(one[key], two[key], f"{name}.{key}")
    elif isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        for i, (left, right) in enumerate(zip(one, two, strict=True)):
            yield from differences(left, right, f"{name}.{i}")
    elif isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        if one.dtype != two.dtype or not torch.equal(one, two):
            yield name
    elif one != two:
        yield name


def assert_same_end(folder: Path, truth: Path) -> None:
    """Weights, averages, optimizer and schedule, positions of loops and loaders: all bit for bit."""
    one, two = newest(folder), newest(truth)
    assert one.keys() == two.keys()
    for name in one.keys() - {"callbacks", "loops", RECORD_KEY}:
        assert not list(differences(one[name], two[name], name))
    loaders = [content["loops"]["fit_loop"]["state_dict"]["combined_loader"] for content in (one, two)]
    assert loaders[0] == loaders[1]


@pytest.fixture(scope="module")
def truth(tiny_system: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 60 steps that never stopped, with dropout."""
    folder = tmp_path_factory.mktemp("truth")
    run_trainer(arguments(tiny_system, "demasker", folder, *DROPOUT, *SHORT))
    assert newest(folder)["global_step"] == 60
    return folder


@pytest.fixture
def copy(truth: Path, tmp_path: Path) -> Path:
    """Its folder of checkpoints, to spoil, as that of a run of its own."""
    shutil.copytree(truth / "checkpoints", tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


# killed


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(
    tiny_system: Any, truth: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One real SIGKILL at a random moment, data read by two processes before it and by none after it."""
    print("CROCODIL_KILL_SEED", SEED)
    command = arguments(tiny_system, "demasker", tmp_path, *DROPOUT, *SHORT)
    with started([*command, "--data.init_args.num_workers=2"], tmp_path) as process:
        wait_for(process, tmp_path, random.Random(SEED).randrange(1, 4))
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    step = newest(tmp_path)["global_step"]
    assert 0 < step < 60 and step % 7 == 0
    run_trainer(command)
    told = capsys.readouterr().err
    assert f"crocodil: going on from step {step} of {tmp_path}/checkpoints/" in told and "to start anew" in told
    assert_same_end(tmp_path, truth)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["demasker", "autoencoder", "prior"])
def test_ten_kills_change_nothing(stage: str, tiny_system: Any, tmp_path: Path) -> None:
    print("CROCODIL_KILL_SEED", SEED)
    options = DROPOUT if stage == "demasker" else []
    run_trainer(arguments(tiny_system, stage, tmp_path / "truth", *options))
    command = arguments(tiny_system, stage, tmp_path / "killed", *options)
    steps = kill_again_and_again(command, tmp_path / "killed", 10, random.Random(f"{SEED} {stage}"))
    assert len(set(steps)) > 5 and steps == sorted(steps) and steps[-1] < 240
    run_trainer(command)
    assert_same_end(tmp_path / "killed", tmp_path / "truth")


def streamed(system: Any, stage: str, folder: Path, layout: str, *more: str) -> list[str]:
    """A run that reads its texts on the fly: chunks, passes and epochs of the Trainer end at places of their own."""
    settings = {
        "streaming": "true",
        "vocab_size": 280,
        "layout": layout,
        "shuffle_buffer": 20,
        "batches_per_epoch": 9,
        "num_workers": 2,
        "batch_size": 16,
    }
    options = [f"--data.init_args.{name}={value}" for name, value in settings.items()]
    if stage in PREVIOUS:
        argument, before = PREVIOUS[stage]
        path = folder.parent.parent / before / "truth" / "checkpoints" / "last.ckpt"
        options.append(f"--model.init_args.{argument}={path}")
    return arguments(system, stage, folder, *options, *more, family="source")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["grouped", "packed"])
def test_kills_change_nothing_where_data_are_streamed(layout: str, tiny_system: Any, tmp_path: Path) -> None:
    print("CROCODIL_KILL_SEED", SEED)
    for stage in ("demasker", "autoencoder", "prior"):
        truth, killed = tmp_path / stage / "truth", tmp_path / stage / "killed"
        with started(streamed(tiny_system, stage, truth, layout), truth) as process:
            assert process.wait() == 0, (truth / "errors.txt").read_text()
        command = streamed(tiny_system, stage, killed, layout)
        steps = kill_again_and_again(command, killed, 2, random.Random(f"{SEED} {stage} {layout}"), workers=(2,))
        assert 0 < steps[0] <= steps[1] < 240
        with started(command, killed) as process:
            assert process.wait() == 0, (killed / "errors.txt").read_text()
        assert_same_end(killed, truth)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_go_on_too(strategy: str, tiny_system: Any, tmp_path: Path) -> None:
    print("CROCODIL_KILL_SEED", SEED)
    options = [f"--trainer.strategy={strategy}", "--trainer.devices=2", "--trainer.max_steps=60"]
    options += ["--data.init_args.batch_size=20", "--model.init_args.optimizer=torch.optim.AdamW"]
    options += ["--model.init_args.optimizer.lr=0.003", *DROPOUT]
    with started(arguments(tiny_system, "demasker", tmp_path / "truth", *options), tmp_path / "truth") as process:
        assert process.wait() == 0
    command = arguments(tiny_system, "demasker", tmp_path / "killed", *options)
    steps = kill_again_and_again(command, tmp_path / "killed", 1, random.Random(f"{SEED} {strategy}"))
    with started(command, tmp_path / "killed") as process:
        wait_for(process, tmp_path / "killed", 1)
        process.terminate()  # the first process alone, which the other one must learn of
        assert process.wait() == 143
    assert steps[-1] < newest(tmp_path / "killed")["global_step"] < 60
    with started(command, tmp_path / "killed") as process:
        assert process.wait() == 0
    assert_same_end(tmp_path / "killed", tmp_path / "truth")


# asked to stop


class Ask(Callback):
    """Sends a signal to its own process while a batch is worked on."""

    def __init__(self, batch: int, number: signal.Signals) -> None:
        self.batch, self.number = batch, number

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch:
            signal.raise_signal(self.number)


class AskInValidation(Callback):
    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        signal.raise_signal(signal.SIGTERM)


def test_sigterm_saves_after_the_step(tiny_system: Any, fit: Any, tmp_path: Path, capsys: Any) -> None:
    saves = LastCheckpoint(str(tmp_path), every_n_train_steps=100)
    with pytest.raises(SystemExit) as stopped:
        fit(tiny_system.module("demasker"), tiny_system.data(), Ask(3, signal.SIGTERM), saves, max_steps=9, **SAVING)
    assert stopped.value.code == 143
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("crocodil")]
    place = f"{tmp_path / 'last.ckpt'}; the same command goes on from there"
    assert told == [f"crocodil: stopped by SIGTERM after step 4, saved in {place}"]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4


@pytest.mark.parametrize(("every", "step"), [(2, 2), (3, 3)])
def test_within_a_validation_it_stops_at_once_if_the_step_is_saved(
    every: int, step: int, tiny_system: Any, fit: Any, tmp_path: Path
) -> None:
    """Validation is behind step 2; where that is not saved, it stops after step 3."""
    saves = LastCheckpoint(str(tmp_path), every_n_train_steps=every)
    options = SAVING | {"limit_val_batches": 1, "val_check_interval": 2, "max_steps": 9}
    with pytest.raises(SystemExit):
        fit(tiny_system.module("demasker"), tiny_system.data(), AskInValidation(), saves, **options)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == step
    assert os.listdir(tmp_path) == ["last.ckpt"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_process_that_is_asked_to_stop_goes_on_bit_for_bit(
    number: signal.Signals, tiny_system: Any, truth: Path, tmp_path: Path
) -> None:
    command = arguments(tiny_system, "demasker", tmp_path, *DROPOUT, *SHORT)
    with started([*command, "--data.init_args.num_workers=2"], tmp_path) as process:
        wait_for(process, tmp_path, 1)
        process.send_signal(number)
        assert process.wait() == 128 + number
    told = (tmp_path / "errors.txt").read_text()
    step = newest(tmp_path)["global_step"]
    assert (
        f"\ncrocodil: stopped by {number.name} after step {step}, saved in {tmp_path}/checkpoints/last.ckpt; " in told
    )
    assert "Traceback" not in told and step < 60
    run_trainer(command)
    assert_same_end(tmp_path, truth)


@pytest.mark.parametrize("stopped", [False, True])
def test_the_signals_are_given_back(stopped: bool, tiny_system: Any, fit: Any, tmp_path: Path) -> None:
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    ask = Ask(0 if stopped else 99, signal.SIGINT)
    with pytest.raises(SystemExit) if stopped else nullcontext():
        fit(tiny_system.module("judge"), tiny_system.data(), ask, LastCheckpoint(str(tmp_path), 1), **SAVING)
    assert [signal.getsignal(number) for number in numbers] == before


def test_it_stops_between_optimizer_steps_alone(tiny_system: Any, fit: Any, tmp_path: Path) -> None:
    """The signal comes within the second of three batches of a step, whose gradients no checkpoint holds."""
    saves = LastCheckpoint(str(tmp_path), every_n_train_steps=100)
    options = SAVING | {"accumulate_grad_batches": 3, "max_steps": 5}
    with pytest.raises(SystemExit) as stopped:
        fit(tiny_system.module("demasker"), tiny_system.data(), Ask(4, signal.SIGUSR1), saves, **options)
    assert stopped.value.code == 128 + signal.SIGUSR1
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert content["global_step"] == 2
    assert content["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["batches"] == 6


def test_a_run_that_ends_by_epochs_saves_its_last_step(tiny_system: Any, fit: Any, tmp_path: Path) -> None:
    saves = LastCheckpoint(str(tmp_path), every_n_train_steps=6)
    fit(tiny_system.module("judge"), tiny_system.data(100), saves, max_steps=-1, max_epochs=3, **SAVING)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 9


# the same run or not


def test_a_finished_run_says_so(
    tiny_system: Any, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (copy / "last.ckpt").stat().st_mtime_ns
    run_trainer(arguments(tiny_system, "demasker", tmp_path, *DROPOUT, *SHORT))
    assert (
        f"crocodil: the 60 steps of this run are done: {copy / 'last.ckpt'}; for a longer run"
        in capsys.readouterr().err
    )
    assert (copy / "last.ckpt").stat().st_mtime_ns == before


def test_a_longer_run_is_the_same_run(tiny_system: Any, copy: Path, tmp_path: Path) -> None:
    run_trainer(arguments(tiny_system, "demasker", tmp_path, *DROPOUT, "--trainer.max_steps=63"))
    assert newest(tmp_path)["global_step"] == 63


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--model.init_args.seed=5"], "model.init_args.seed 0 (now 5)"),
        pytest.param(["--data.init_args.seed=5"], "data.init_args.seed 0 (now 5)", marks=pytest.mark.slow),
        pytest.param(
            ["--data.init_args.batch_size=20"], "data.init_args.batch_size 40 (now 20)", marks=pytest.mark.slow
        ),
        (["--model.init_args.optimizer.lr=0.1"], "model.init_args.optimizer.init_args.lr 0.003 (now 0.1)"),
        (["--model.init_args.lr_scheduler.num_steps=50"], "num_steps 'trainer.max_steps' (now 50)"),
        (["--model.init_args.network.rms_norm_eps=0.1"], "model.init_args.network.rms_norm_eps None (now 0.1)"),
        pytest.param(
            ["--trainer.gradient_clip_val=0.5"], "trainer.gradient_clip_val 1.0 (now 0.5)", marks=pytest.mark.slow
        ),
        pytest.param(
            ["--trainer.accumulate_grad_batches=2"], "trainer.accumulate_grad_batches 1 (now 2)", marks=pytest.mark.slow
        ),
        pytest.param(["--seed_everything=1"], "seed_everything 0 (now 1)", marks=pytest.mark.slow),
        (["--trainer.callbacks+=EMA", "--trainer.callbacks.decay=0.5"], "averaging callbacks"),
    ],
)
def test_another_run_is_refused(options: list[str], told: str, tiny_system: Any, copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(told)) as error:
        run(arguments(tiny_system, "demasker", tmp_path, *DROPOUT, "--trainer.max_steps=63", *options))
    message = str(error.value)
    assert message.startswith(f"{copy / 'last.ckpt'} was trained with other settings: ") and "\n" not in message
    assert f"--ckpt_path={copy / 'last.ckpt'}; to start anew, give another --trainer.default_root_dir or" in message
    assert newest(tmp_path)["global_step"] == 60


def test_a_prior_does_not_go_on_with_another_autoencoder(tiny_system: Any, tmp_path: Path) -> None:
    autoencoder = tmp_path / "autoencoder.ckpt"
    shutil.copy(tiny_system.checkpoint("autoencoder"), autoencoder)
    command = arguments(tiny_system, "prior", tmp_path, f"--model.init_args.autoencoder_checkpoint={autoencoder}")
    run([*command, "--trainer.max_steps=3"])
    content = torch.load(autoencoder, weights_only=True)
    content["state_dict"]["encoder.latent_mean"] += 0.1
    torch.save(content, autoencoder)
    with pytest.raises(ValueError, match=r"other settings: autoencoder '\w+' \(now '\w+'\); to go on"):
        run([*command, "--trainer.max_steps=6"])


def test_a_file_is_not_gone_on_from_with_shards(tiny_system: Any, copy: Path, tmp_path: Path) -> None:
    options = [*DROPOUT, "--trainer.max_steps=63", "--trainer.strategy=fsdp2", "--trainer.devices=1"]
    with pytest.raises(ValueError, match=r"is a whole checkpoint: go on from it without --trainer.strategy=fsdp2"):
        run(arguments(tiny_system, "demasker", tmp_path, *options))


def test_on_purpose_another_run_goes_on(tiny_system: Any, copy: Path, tmp_path: Path) -> None:
    options = ["--model.init_args.seed=5", f"--ckpt_path={copy / 'last.ckpt'}", "--trainer.max_steps=63"]
    run(arguments(tiny_system, "demasker", tmp_path, *DROPOUT, *options))
    assert newest(tmp_path)["global_step"] == 63


def test_how_a_step_is_carried_out_may_change(tiny_system: Any, copy: Path, tmp_path: Path) -> None:
    options = ["--data.init_args.num_workers=1", "--model.init_args.gradient_checkpointing=true"]
    options += ["--trainer.max_steps=63", "--trainer.val_check_interval=5", "--trainer.log_every_n_steps=1"]
    run(arguments(tiny_system, "demasker", tmp_path, *DROPOUT, *options))
    assert newest(tmp_path)["global_step"] == 63


def test_another_stage_in_the_same_folder_is_refused(tiny_system: Any, copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a checkpoint of the judge stage, got one of the demasker stage"):
        run(arguments(tiny_system, "judge", tmp_path))


# damaged


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for place in range(len(content) // 3, len(content) // 3 + 50):
        content[place] ^= 255
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_not_gone_on_from_but_the_one_before(
    tiny_system: Any, truth: Path, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(copy / "last.ckpt")
    run(arguments(tiny_system, "demasker", tmp_path, *DROPOUT, *SHORT))
    told = capsys.readouterr().err
    assert f"crocodil: {copy / 'last.ckpt'} is damaged, and will be {copy / 'last.ckpt.damaged'}\n" in told
    assert f"crocodil: going on from step 56 of {copy / 'previous.ckpt'}" in told
    assert_same_end(tmp_path, truth)
    assert sorted(os.listdir(copy)) == ["last.ckpt", "last.ckpt.damaged", "previous.ckpt"]
    assert is_whole(copy / "last.ckpt") and is_whole(copy / "previous.ckpt")


def test_if_all_are_damaged_nothing_starts(tiny_system: Any, copy: Path, tmp_path: Path) -> None:
    for name in ("last.ckpt", "previous.ckpt"):
        damage(copy / name)
    with pytest.raises(ValueError, match=f"^all checkpoints in {copy} are damaged .*put a whole one there, or remove"):
        run(arguments(tiny_system, "demasker", tmp_path, *DROPOUT, *SHORT))


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_a_damaged_checkpoint_is_refused_by_every_command(
    command: str, tiny_system: Any, copy: Path, tmp_path: Path
) -> None:
    damage(copy / "last.ckpt")
    given = arguments(tiny_system, "demasker", tmp_path, *DROPOUT, f"--ckpt_path={copy / 'last.ckpt'}")
    with pytest.raises(ValueError, match=f"is damaged or no checkpoint; the checkpoint before it is whole: {copy}"):
        run([command, *given[1:]])


def test_a_damaged_checkpoint_is_refused_by_later_stages_and_export(
    tiny_system: Any, copy: Path, tmp_path: Path
) -> None:
    damage(copy / "last.ckpt")
    offer = f"is damaged or no checkpoint; the checkpoint before it is whole: {copy / 'previous.ckpt'}$"
    given = f"--model.init_args.demasker_checkpoint={copy / 'last.ckpt'}"
    with pytest.raises(ValueError, match=offer):
        run(tiny_system.arguments("fit", "autoencoder", given, f"--trainer.default_root_dir={tmp_path / 'a'}"))
    with pytest.raises(ValueError, match=offer):
        run(["export", f"--base={copy / 'last.ckpt'}", f"--output={tmp_path / 'pipeline'}"])
    run(["export", f"--base={copy / 'previous.ckpt'}", f"--output={tmp_path / 'pipeline'}"])


# hostile


class Evil:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.folder,)


def test_a_hostile_checkpoint_runs_no_code(tiny_system: Any, copy: Path, tmp_path: Path) -> None:
    """Not with --ckpt_path, not when a run goes on by itself, not as input of a stage or of export."""
    made, path = tmp_path / "made", copy / "last.ckpt"
    torch.save({**torch.load(path, weights_only=True), "extra": Evil(made)}, path)
    mine = arguments(tiny_system, "demasker", tmp_path, *DROPOUT)
    later = tiny_system.arguments("fit", "autoencoder", f"--trainer.default_root_dir={tmp_path / 'a'}")
    for command in (
        [*mine, f"--ckpt_path={path}"],
        [*mine, "--ckpt_path=last"],
        mine,
        ["test", *mine[1:], f"--ckpt_path={path}"],
        [*later, f"--model.init_args.demasker_checkpoint={path}"],
        ["export", f"--base={path}", f"--output={tmp_path / 'pipeline'}"],
    ):
        with pytest.raises(ValueError, match="is damaged or no checkpoint"):
            run(command)
    assert not made.exists()
    torch.load(path, weights_only=False)
    assert made.exists()  # the trap works


def test_a_checkpoint_does_not_choose_the_model(tiny_system: Any, copy: Path, tmp_path: Path) -> None:
    """Lightning's CLI would build what the hyperparameters of a checkpoint name."""
    path = copy / "last.ckpt"
    hyperparameters = {"_class_path": "crocodil.modules.JudgeModule", "network": {}}
    torch.save({**torch.load(path, weights_only=True), "hyper_parameters": hyperparameters}, path)
    with pytest.raises(ValueError, match="was not written by `crocodil fit`"):
        run(arguments(tiny_system, "demasker", tmp_path, *DROPOUT, f"--ckpt_path={path}"))


def test_pickles_cannot_be_asked_for(tiny_system: Any, copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="weights_only"):
        run(arguments(tiny_system, "demasker", tmp_path, f"--ckpt_path={copy / 'last.ckpt'}", "--weights_only=false"))


def test_extra_files_of_a_pipeline_folder_do_nothing(tiny_pipeline: Any, tmp_path: Path) -> None:
    made = tmp_path / "made"
    tiny_pipeline.save_pretrained(tmp_path / "pipeline")
    code = f"from pathlib import Path; Path({str(made)!r}).mkdir(exist_ok=True)\n"
    for folder in [path for path in (tmp_path / "pipeline").rglob("*") if path.is_dir()] + [tmp_path / "pipeline"]:
        for name in ("__init__.py", "modeling.py", "configuration_llama.py", "tokenization.py", "setup.py"):
            (folder / name).write_text(code)
        for name in ("pytorch_model.bin", "training_args.bin", "adapter_model.bin", "model.pkl", "optimizer.pt"):
            torch.save(Evil(made), folder / name)
    pipeline = CrocodilPipeline.from_pretrained(tmp_path / "pipeline")
    assert len(pipeline(1, algorithm="masked", num_steps=2).texts) == 1
    assert not made.exists()


# troubles of the machine


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_later(
    tiny_system: Any, truth: Path, copy: Path, tmp_path: Path
) -> None:
    """Files may not grow beyond what a checkpoint needs, which fails as on a full disk."""
    shutil.move(copy / "previous.ckpt", copy / "last.ckpt")
    before, limits = (copy / "last.ckpt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    command = arguments(tiny_system, "demasker", tmp_path, *DROPOUT, *SHORT)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
        with pytest.raises(OSError, match=f"^the checkpoint {copy / 'last.ckpt'} cannot be written: File too large; "):
            run(command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(copy) == ["last.ckpt"] and (copy / "last.ckpt").read_bytes() == before
    run(command)
    assert_same_end(tmp_path, truth)


def test_a_folder_that_cannot_be_written_to_is_refused_at_once(tiny_system: Any, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(ValueError, match=f"the output folder {tmp_path}/checkpoints cannot be written to"):
        run(arguments(tiny_system, "demasker", tmp_path))


@pytest.mark.slow
def test_a_lost_process_that_reads_data_is_one_sentence(tiny_system: Any, tmp_path: Path) -> None:
    """Killed as by the system when memory runs out."""

    def kill() -> None:
        while (
            not (children := multiprocessing.active_children()) or not (tmp_path / "checkpoints" / "last.ckpt").exists()
        ):
            time.sleep(0.01)
        os.kill(children[0].pid or 0, signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    command = arguments(tiny_system, "demasker", tmp_path, "--data.init_args.num_workers=2")
    with pytest.raises(
        ValueError, match=r"^a process that reads data was lost .*: give fewer --data.init_args.num_wor"
    ):
        run([*command, "--trainer.max_steps=100000"])
    assert is_whole(tmp_path / "checkpoints" / "last.ckpt")


def test_the_record_is_plain_data_and_names_the_settings(truth: Path) -> None:
    settings = newest(truth)[RECORD_KEY]["settings"]
    assert settings["data.init_args.batch_size"] == 40 and settings["number of processes"] == 1
    assert settings["model.init_args.lr_scheduler.init_args.num_steps"] == "trainer.max_steps"
    assert not any(name.endswith((".num_workers", ".compile", "cache_dir")) for name in settings)
    assert StageCheckpoint(truth / "checkpoints" / "previous.ckpt", "demasker").networks
    assert SUMS_FILE not in os.listdir(truth / "checkpoints")

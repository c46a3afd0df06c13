"""`crocodil encode`, and `crocodil fit` from what it has stored."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from crocodil.cli import run
from crocodil.data.latent_store import INDEX_FILE, SHARDS, LatentStore, is_whole_shard
from crocodil.encode import told_sizes
from crocodil.modules.checkpoints import StageCheckpoint

SEED = int(os.environ.get("CROCODIL_KILL_SEED", time.time_ns() % 2**32))
TWO = ["--trainer.devices=2", "--trainer.strategy=ddp"]
pytestmark = pytest.mark.filterwarnings("ignore:Found .* in eval mode", "ignore:.*does not have many workers")


def arguments(system: Any, folder: Path, *more: str) -> list[str]:
    """The command line over a tiny prior: that of `fit`, and where the latents go."""
    return ["encode", *system.arguments("fit", "prior")[1:], f"--output={folder}", "--dtype=float32", *more]


@pytest.fixture(scope="module")
def latents(tiny_system: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    run(arguments(tiny_system, folder, "--shard_rows=100"))
    return folder


def test_what_is_stored_is_what_the_encoder_gives(tiny_system: Any, latents: Path) -> None:
    store, encoder = LatentStore(latents / "train"), tiny_system.module("prior").encoder
    blocks = tiny_system.data().blocks("train")
    with torch.no_grad():
        expected = encoder(blocks)
    torch.testing.assert_close(store[range(len(store))], expected, rtol=1e-3, atol=1e-4)
    record = store.record
    assert (record.encoder, record.corpus) == (encoder.fingerprint(), tiny_system.data().corpus_name)
    assert len(list((latents / "train").iterdir())) == 1 + -(-len(blocks) // 100)


def test_fit_takes_the_folder_as_an_option(tiny_system: Any, latents: Path, tmp_path: Path) -> None:
    options = [f"--data.init_args.latents={latents}", f"--trainer.default_root_dir={tmp_path}"]
    run(tiny_system.arguments("fit", "prior", *options))
    expected = StageCheckpoint(tiny_system.checkpoint("prior"), "prior").prior()
    found = StageCheckpoint(tmp_path / "checkpoints" / "last.ckpt", "prior").prior()
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=1e-3, atol=1e-4)


def test_a_dry_run_tells_and_writes_nothing(tiny_system: Any, tmp_path: Path, capsys: Any) -> None:
    run(arguments(tiny_system, tmp_path / "latents", "--dry_run", "--split=val"))
    told = capsys.readouterr().out
    assert "texts of 4 x 8 in float32" in told and "a second" in told and "1 of them to be written" in told
    assert not (tmp_path / "latents").exists()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--dtype=float16", "--shard_rows=100"], r"holds other latents: dtype 'float32' \(now 'float16'\); give an"),
        (["--data.init_args.layout=grouped"], "layout=grouped to go with hide_padding=true"),
    ],
)
def test_another_encoding_in_the_same_folder_is_refused(
    more: list[str], told: str, tiny_system: Any, latents: Path
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in (latents / "train").iterdir()}
    with pytest.raises(ValueError, match=told):
        run(arguments(tiny_system, latents, *more))
    assert {path.name: path.stat().st_mtime_ns for path in (latents / "train").iterdir()} == before


def test_only_a_prior_has_latents_to_encode(tiny_system: Any, tmp_path: Path) -> None:
    command = ["encode", *tiny_system.arguments("fit", "autoencoder")[1:], f"--output={tmp_path}"]
    with pytest.raises(ValueError, match=r"expected the configuration of a prior, got one of .*AutoencoderModule"):
        run(command)


def test_a_disk_that_is_too_small_is_told_before_the_work(latents: Path, tmp_path: Path) -> None:
    record = LatentStore(latents / "train").record
    assert "0 of them to be written; 0.0 kB needed" in told_sizes(latents / "train", record)
    with pytest.raises(ValueError, match=r"no room in .*: train: 1000000000000000 texts .* PB needed"):
        told_sizes(tmp_path / "absent", replace(record, rows=10**15, shard_rows=10**15))


@pytest.mark.slow
def test_tokens_of_another_codec_are_refused(tiny_system: Any, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for number in range(60):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"text number {number}, which is long enough\n" * 5)
    data = ["--data=crocodil.data.TextCorpus", f"--data.init_args.sources={tmp_path / 'texts'}"]
    options = [*data, "--data.init_args.vocab_size=262", f"--data.init_args.cache_dir={tmp_path / 'cache'}"]
    command = [option for option in arguments(tiny_system, tmp_path / "latents", *options) if ".folder=" not in option]
    with pytest.raises(ValueError, match="was trained with other tokens than the data has"):
        run(command)


def start(command: list[str], *launcher: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "crocodil.cli", *command],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    try:
        told, _ = process.communicate(timeout=180)
        assert process.returncode == 0, told
        return told
    finally:
        kill(process)


def kill(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "train").iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
def test_two_processes_write_what_one_does(launcher: str, tiny_system: Any, latents: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    command = arguments(tiny_system, tmp_path, "--shard_rows=100", *TWO)
    told = finish(start(command, *(torchrun if launcher == "torchrun" else [])))
    assert "on each of 2 processes" in told and told.count("done: ") == 1
    assert content(tmp_path) == content(latents)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [[], TWO], ids=["one", "two"])
def test_a_killed_encoding_goes_on(processes: list[str], tiny_system: Any, tmp_path: Path) -> None:
    options = ["--shard_rows=4", "--data.init_args.batch_size=1"]
    run(arguments(tiny_system, tmp_path / "truth", *options))
    record, rng = LatentStore(tmp_path / "truth" / "train").record, random.Random(SEED)
    folder, known = tmp_path / "killed" / "train", {}
    for _ in range(4):
        process = start(arguments(tiny_system, tmp_path / "killed", *options, *processes))
        wanted = len(known) + rng.randrange(1, 12)
        while len(list(folder.glob(SHARDS))) < wanted and process.poll() is None:
            time.sleep(0.002)
        kill(process)
        assert process.returncode == -signal.SIGKILL and not (folder / INDEX_FILE).exists(), SEED
        there = {int(path.stem.split("-")[1]): path.stat().st_mtime_ns for path in folder.glob(SHARDS)}
        assert all(is_whole_shard(folder, record, number) for number in there), SEED
        assert known.items() <= there.items(), SEED  # what was there was not written again
        known = there
        with pytest.raises(ValueError, match="holds no complete latents"):
            LatentStore(folder)
    assert len(known) < record.num_shards
    finish(start(arguments(tiny_system, tmp_path / "killed", *options, *processes)))
    assert content(tmp_path / "killed") == content(tmp_path / "truth")


@pytest.mark.slow
def test_a_sharded_autoencoder_encodes_as_it_is_read(tiny_system: Any, tmp_path: Path) -> None:
    checkpoint = tmp_path / "autoencoder" / "checkpoints" / "last.ckpt"
    sharded = [f"--trainer.default_root_dir={tmp_path / 'autoencoder'}", "--trainer.strategy=fsdp2"]
    finish(start(tiny_system.arguments("fit", "autoencoder", *sharded, "--trainer.devices=2")))
    assert checkpoint.is_dir()
    of_prior = [f"--model.init_args.autoencoder_checkpoint={checkpoint}", "--shard_rows=100", *TWO]
    finish(start(arguments(tiny_system, tmp_path / "latents", *of_prior)))
    encoder = StageCheckpoint(checkpoint, "autoencoder").encoder().eval()
    store = LatentStore(tmp_path / "latents" / "train")
    with torch.no_grad():
        expected = encoder(tiny_system.data().blocks("train"))
    torch.testing.assert_close(store[range(len(store))], expected, rtol=1e-3, atol=1e-4)
    assert store.record.encoder == encoder.fingerprint()

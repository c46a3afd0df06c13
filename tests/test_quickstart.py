"""The quickstart in small: a real subprocess, killed after its first stage and started again."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crocodil.pipeline import CrocodilPipeline
from crocodil.quickstart import SEEDS, systems

KEYS = {
    "algorithm",
    "num_steps",
    "demasker_calls",
    "nfe",
    "seconds_per_sample",
    "judge_nll",
    "entropy",
    "distance",
    "parse_rate",
    "duplicate_rate",
    "seed",
}


def start(output: Path, cache: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "crocodil.cli", "quickstart", f"--output_dir={output}"]
    # No compiler: a handful of steps is over before the first kernel would be built.
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "CXX": "no-compiler"}
    return subprocess.Popen([*command, "--scale=0.004", "--num_samples=4"], env=environment, stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_killed_and_started_again_it_goes_on_and_tells_everything(tmp_path):
    output, cache = tmp_path / "out", tmp_path / "cache"
    first_stage = output / "demasker" / "checkpoints" / "last.ckpt"
    process = start(output, cache)
    while not (output / "autoencoder" / "config.yaml").exists():
        assert process.poll() is None, "the first run ended before it could be killed"
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    written = first_stage.stat().st_mtime_ns

    assert start(output, cache).wait() == 0
    assert first_stage.stat().st_mtime_ns == written, "a finished stage was trained again"

    rows = json.loads((output / "results.json").read_text())
    cells = 1 + sum(len(grid.num_steps) * len(grid.temperature) for grid in systems(64))
    assert len(rows) == cells * len(SEEDS) and all(row.keys() >= KEYS for row in rows)
    assert {row["seed"] for row in rows} == set(SEEDS)
    base = {row["num_steps"] for row in rows if row["algorithm"] == "base"}
    assert base == {64, 32, 16, 8, 4, 2}
    assert all(math.isclose(row["nfe"], row["demasker_calls"]) for row in rows if row["algorithm"] == "base")
    assert all(row["parse_rate"] == 1 for row in rows if row["algorithm"] == "data")
    page = (output / "report.html").read_text()
    assert "<svg" in page and 'src="http' not in page and 'href="http' not in page

    pipeline = CrocodilPipeline.from_pretrained(output / "pipeline")
    assert pipeline(2, algorithm="conwithindisc", num_steps=2).token_ids.shape == (2, 64)

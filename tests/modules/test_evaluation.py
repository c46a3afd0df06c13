"""`crocodil test` with the evaluations' own YAMLs on the tiny system: tables, page, kill, two processes."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from crocodil.cli import run
from crocodil.commands import build_judge
from crocodil.trainer_cli import run_trainer

FOLDER = Path(__file__).parents[2] / "lightning_configs"
SYSTEMS = [
    {"algorithm": "base", "num_steps": [8, 4, 2], "temperature": [1.0, 0.5]},
    {"algorithm": "conthendisc", "num_steps": [4, 2], "temperature": [0.5], "num_registers": 2},
    {"algorithm": "oracle", "num_steps": [2], "remasking": "low_confidence", "temperature": [0.0]},
]
SMALL: dict[str, dict[str, Any]] = {
    "generation": {"num_samples": 4, "seeds": [0, 1], "timed_batches": [1], "mauve_seeds": [0], "systems": SYSTEMS},
    "reconstruction": {"num_texts": 4, "block_sizes": [None, 8], "num_steps": [2, 4], "register_counts": [None, 1]},
    "conditioning": {"num_texts": 5, "register_counts": [1, 4], "mask_ratios": [0.5, 1.0]},
}


@pytest.fixture(scope="module")
def parts(tiny_system: Any, tiny_pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("parts")
    tiny_pipeline.save_pretrained(folder / "pipeline")
    build_judge(str(tiny_system.checkpoint("judge"))).save_pretrained(folder / "judge")
    return {"pipeline": folder / "pipeline", "judge": folder / "judge"}


@pytest.fixture
def arguments(tiny_system: Any, parts: dict[str, Path]):
    def build(name: str, output: Path, *more: str, **changes: Any) -> list[str]:
        options = SMALL[name] | {"pipeline": str(parts["pipeline"]), "batch_size": 3} | changes
        if name != "conditioning":
            options["judge"] = str(parts["judge"])
        return [
            "test",
            f"--config={FOLDER / f'eval_{name}.yaml'}",
            f"--trainer.default_root_dir={output}",
            "--trainer.accelerator=cpu",
            "--data.init_args.length=32",
            f"--data.init_args.folder={tiny_system.root / 'corpus'}",
            f"--data.init_args.cache_dir={tiny_system.root / 'cache'}",
            *(
                f"--model.init_args.{key}={value if isinstance(value, str) else json.dumps(value)}"
                for key, value in options.items()
            ),
            *more,
        ]

    return build


def table(folder: Path, name: str) -> list[dict[str, Any]]:
    """Rows without what differs from run to run."""
    rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "seconds" not in k and k != "context"} for row in rows]


@pytest.mark.parametrize(
    ("name", "num_rows", "sections"),
    [
        ("generation", 20, ["verdict", "speedups", "cost", "entropy", "texts", "results", "glossary"]),
        ("reconstruction", 7, ["reconstructions"]),
        ("conditioning", 8, ["conditioning"]),
    ],
)
def test_tables_and_page(name: str, num_rows: int, sections: list[str], arguments: Any, tmp_path: Path) -> None:
    if name == "generation":
        pytest.importorskip("mauve")
    run_trainer(arguments(name, tmp_path))
    rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    assert len(rows) == num_rows
    context = rows[0]["context"]
    assert context["dtype"] == "float32" and context["machine: torch"] and context["pipeline"].endswith("pipeline")
    assert all(row["context"] == context for row in rows)
    with (tmp_path / f"{name}.csv").open() as file:
        assert len(list(csv.DictReader(file))) == (10 if name == "generation" else num_rows)
    assert (tmp_path / f"{name}.md").read_text().count("\n| ") >= num_rows / 2
    page = (tmp_path / "report.html").read_text()
    assert [part.split('"')[0] for part in page.split('<section id="')[1:]] == [*sections, "settings"]
    assert "<svg" in page and 'src="http' not in page
    if name == "generation":
        speedups = table(tmp_path, "speedups")
        assert {row["base_calls"] for row in speedups} == {8, 4, 2}
        assert {row["algorithm"] for row in speedups} == {"conthendisc"}


def start(arguments: list[str], **environment: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "crocodil.cli", *arguments]
    return subprocess.Popen(
        command,
        env=os.environ | environment,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )


@pytest.mark.slow
def test_killed_and_started_again_it_ends_with_the_same_table(arguments: Any, tmp_path: Path) -> None:
    pytest.importorskip("mauve")
    one_thread = {"OMP_NUM_THREADS": "1"}  # as many threads in all three runs: sums are then the same to the last digit
    assert start(arguments("generation", tmp_path / "whole"), **one_thread).wait() == 0
    process = start(arguments("generation", tmp_path / "killed"), **one_thread)
    cells = tmp_path / "killed" / "cells"
    while not (files := list(cells.glob("*.jsonl"))) or files[0].read_text().count("\n") < 5:
        assert process.poll() is None, "the first run ended before it could be killed"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = files[0].read_text()
    assert 5 <= kept.count("\n") < 20 and not (tmp_path / "killed" / "generation.jsonl").exists()
    assert start(arguments("generation", tmp_path / "killed"), **one_thread).wait() == 0
    finished = kept[: kept.rindex("\n") + 1]
    assert files[0].read_text().startswith(finished), "finished cells were measured again"
    assert table(tmp_path / "killed", "generation") == table(tmp_path / "whole", "generation")


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_two_processes_give_the_table_of_one(name: str, arguments: Any, tmp_path: Path) -> None:
    pytest.importorskip("mauve")
    run_trainer(arguments(name, tmp_path / "one"))
    two = arguments(name, tmp_path / "two", "--trainer.devices=2", "--trainer.strategy=ddp")
    assert start(two, OMP_NUM_THREADS="1").wait(timeout=200) == 0
    for one, other in zip(table(tmp_path / "one", name), table(tmp_path / "two", name), strict=True):
        assert one.keys() == other.keys()
        for figure, value in one.items():
            is_float = isinstance(value, float)
            assert other[figure] == (pytest.approx(value, rel=1e-4, abs=1e-6) if is_float else value), figure


def test_other_weights_or_another_judge_share_no_cells(arguments: Any, tmp_path: Path) -> None:
    run_trainer(arguments("conditioning", tmp_path))
    run_trainer(arguments("conditioning", tmp_path, dtype="float64"))
    assert len(list((tmp_path / "cells").iterdir())) == 2


def test_wrong_use_is_one_sentence(arguments: Any, tmp_path: Path, tiny_system: Any) -> None:
    wrong = arguments("conditioning", tmp_path)
    with pytest.raises(ValueError, match="run it with `crocodil test`, without --ckpt_path"):
        run_trainer(["fit", *wrong[1:]])
    with pytest.raises(ValueError, match="run it with `crocodil test`, without --ckpt_path"):
        run_trainer([*wrong, f"--ckpt_path={tiny_system.checkpoint('prior')}"])
    with pytest.raises(ValueError, match="is no pipeline"):
        run_trainer(arguments("conditioning", tmp_path, pipeline=str(tmp_path)))
    with pytest.raises(ValueError, match="expected a causal language model"):
        run_trainer(arguments("reconstruction", tmp_path, "--model.init_args.judge=" + str(tmp_path)))


def test_a_judge_is_exported_for_evaluations(
    tiny_system: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = str(tiny_system.checkpoint("judge"))
    run(["export", f"--judge={judge}", f"--output={tmp_path / 'judge'}"])
    assert (tmp_path / "judge" / "model.safetensors").is_file()
    with pytest.raises(ValueError, match="give --judge and --output alone"):
        run(["export", f"--judge={judge}", f"--base={judge}", f"--output={tmp_path}"])
    with pytest.raises(ValueError, match="expected a checkpoint of the judge stage"):
        run(["export", f"--judge={tiny_system.checkpoint('prior')}", f"--output={tmp_path}"])

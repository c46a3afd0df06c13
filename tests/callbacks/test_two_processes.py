"""Two processes (gloo, CPU): the figures are those of one with the batches of both, and both stop together."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from crocodil_callbacks import GradientNorm, LatentStatistics, LossByMaskRatio, StopAtNonFinite, Throughput
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
TWO = {"strategy": "ddp_fork", "devices": 2}
Batch = dict[str, Tensor]


def batches(rank: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(rank)
    return [
        {
            "token_ids": torch.randint(1, 9, (4, 3), generator=generator),
            "document_ids": torch.randint(0, 2, (4, 3), generator=generator),
            "out_mask_prob": torch.rand(4, generator=generator),
            "out_num_masked": torch.randint(1, 4, (4,), generator=generator),
            "out_latents": torch.randn(4, 2, 3, generator=generator),
        }
        for _ in range(4)
    ]


class OwnBatches(IterableDataset[Batch]):
    """The batches of this process; `bad` is (rank, batch) whose second row is to be spoilt."""

    def __init__(self, bad: tuple[int, int] | None = None) -> None:
        self.bad = bad

    def __iter__(self) -> Iterator[Batch]:
        rank = torch.distributed.get_rank()
        for i, batch in enumerate(batches(rank)):
            if (rank, i) == self.bad:
                batch["token_ids"][1] = 99
            yield batch


def figures(folder: Path) -> dict[str, float]:
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {name: float(value) for row in rows for name, value in row.items() if value}


def test_figures_are_those_of_one_process(toy: Any, train: Callable[..., Any], tmp_path: Path) -> None:
    def callbacks() -> list[L.Callback]:
        return [GradientNorm(), LossByMaskRatio(2), LatentStatistics(4), Throughput(1, peak_flops=1000)]

    both = [{name: torch.cat([a[name], b[name]]) for name in a} for a, b in zip(batches(0), batches(1), strict=True)]
    one, two = tmp_path / "one", tmp_path / "two"
    train(toy(), both, *callbacks(), log_every_n_steps=4, logger=CSVLogger(one, "", ""))
    own = DataLoader(OwnBatches(), batch_size=None)
    train(toy(), own, *callbacks(), log_every_n_steps=4, logger=CSVLogger(two, "", ""), **TWO)
    expected, found = figures(one), figures(two)
    assert expected.keys() == found.keys() and len(found) > 15
    tokens, texts, work = (
        [f[name] * f["step_seconds"] for f in (expected, found)]
        for name in ("tokens_per_second", "texts_per_second", "flop_utilisation")
    )
    assert tokens[0] == pytest.approx(tokens[1]) and texts[0] == pytest.approx(texts[1])
    assert work[0] == pytest.approx(2 * work[1])  # there are twice as many devices
    timed = {"step_seconds", "data_wait_share", "tokens_per_second", "texts_per_second", "flop_utilisation"}
    same = expected.keys() - timed
    assert {n: found[n] for n in same} == pytest.approx({n: expected[n] for n in same}, rel=1e-4, abs=1e-6)


class Recorded(StopAtNonFinite):
    """Writes down what each process stops with, and whether its weights are those before the step."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.before = {name: value.clone() for name, value in pl_module.state_dict().items()}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        try:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        except FloatingPointError as error:
            same = all(torch.equal(value, self.before[name]) for name, value in pl_module.state_dict().items())
            content = json.dumps({"error": str(error), "same": same})
            (self.folder / f"rank{trainer.global_rank}.json").write_text(content)
            torch.distributed.monitored_barrier(timeout=timedelta(seconds=20))  # the first to end ends the other
            raise


@pytest.mark.parametrize("accumulate", [1, 2])
def test_both_stop_at_a_batch_of_one(accumulate: int, toy: Any, train: Callable[..., Any], tmp_path: Path) -> None:
    own = DataLoader(OwnBatches(bad=(1, 2)), batch_size=None)
    with pytest.raises(Exception, match="training stopped"):
        train(toy(), own, Recorded(tmp_path), accumulate_grad_batches=accumulate, **TWO)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    step = 2 // accumulate + 1
    start = f"training stopped at step {step}: the loss is -inf in process 1; texts without a "
    assert first["error"].startswith(start + "finite loss: row 1 of process 1;")
    assert first["same"] and second["same"]
    assert first["error"] == second["error"]
    assert f"The batch is in {tmp_path}/nonfinite-step-{step}-rank*.safetensors, and" in first["error"]
    for rank in (0, 1):
        content = load_file(tmp_path / f"nonfinite-step-{step}-rank{rank}.safetensors")
        assert content["token_ids"].eq(99).any() == (rank == 1)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["autoencoder", "prior"])
def test_sharded_networks_have_the_same_figures(stage: str, tiny_system: Any, tmp_path: Path) -> None:
    """FSDP2: norms of shards, gathered losses; the step is counted in shards as well."""

    def run(name: str, *options: str) -> dict[str, float]:
        logger = f"""
trainer:
  max_steps: 6
  log_every_n_steps: 6
  gradient_clip_val: 0.5
  logger:
    class_path: lightning.pytorch.loggers.CSVLogger
    init_args: {{save_dir: {tmp_path / name}, name: "", version: ""}}
  callbacks:
    - class_path: crocodil_callbacks.GradientNorm
    - class_path: crocodil_callbacks.LossByMaskRatio
      init_args: {{num_bins: 2}}
    - class_path: crocodil_callbacks.LatentStatistics
    - class_path: crocodil_callbacks.StopAtNonFinite
    - class_path: crocodil_callbacks.Throughput
      init_args: {{warmup_steps: 2, peak_flops: 1.0e+9}}
"""
        (tmp_path / f"{name}.yaml").write_text(logger)
        given = [f"--config={tmp_path / f'{name}.yaml'}", f"--trainer.default_root_dir={tmp_path / name}", *options]
        command = [sys.executable, "-m", "crocodil.cli", *tiny_system.arguments("fit", stage, *given)]
        subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, timeout=200)
        return figures(tmp_path / name)

    one = run("one", "--data.init_args.batch_size=16")
    two = run("two", "--data.init_args.batch_size=8", "--trainer.strategy=fsdp2", "--trainer.devices=2")
    assert one.keys() == two.keys()
    timed = {"step_seconds", "data_wait_share", "tokens_per_second", "texts_per_second", "flop_utilisation"}
    same = {name for name in one if name not in timed and "val" not in name}
    assert {n: two[n] for n in same} == pytest.approx({n: one[n] for n in same}, rel=2e-3, abs=1e-4)
    work = [found["flop_utilisation"] * found["step_seconds"] for found in (one, two)]
    assert work[0] == pytest.approx(2 * work[1], rel=0.05)  # twice as many devices

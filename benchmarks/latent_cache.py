"""What does a training step of the prior cost with stored latents, against one that encodes its texts? In one run.

    python benchmarks/latent_cache.py [--steps 40] [--repeats 3] [--max_functions N] [--work_dir DIR]

The system is the quickstart's: its encoder is trained for a single step, which costs as much as a trained one. Its
corpus is encoded by `crocodil encode`, then the quickstart's prior is trained with and without the stored latents,
alternating, with a quarter of the rows under a condition (as configured) and with none. The first steps of a training
do not count. It also reads random rows from the store. The last line printed is one JSON object: median seconds of a
step, the ratios, and rows read a second.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer

from crocodil.cli import run
from crocodil.data import CanonicalFunctions
from crocodil.data.latent_store import LatentStore
from crocodil.diffusion.gaussian import TangentSchedule
from crocodil.modules import PriorModule

CONFIGS = Path(__file__).parents[1] / "lightning_configs"
NETWORK = {"hidden_size": 192, "num_layers": 6, "num_heads": 6}
WARM_UP = 5


class StepSeconds(Callback):
    """Wall-clock from the end of a step to the end of the next one, data included."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Notes the time."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    @property
    def median(self) -> float:
        """Of all steps but the first ones."""
        return statistics.median(np.diff(self.ends)[WARM_UP:].tolist())


@dataclass(frozen=True)
class Bench:
    """Where everything lies, and on how much of the corpus it runs."""

    work_dir: Path
    max_functions: int | None

    @property
    def data_options(self) -> list[str]:
        """For the command line."""
        most = "null" if self.max_functions is None else self.max_functions
        return [f"--data.init_args.cache_dir={self.work_dir / 'cache'}", f"--data.init_args.max_functions={most}"]

    def checkpoint(self, stage: str) -> Path:
        """Of a stage."""
        return self.work_dir / stage / "checkpoints" / "last.ckpt"

    def train_autoencoder(self) -> None:
        """One step of the quickstart's demasker, and one of its autoencoder."""
        base = f"--model.init_args.demasker_checkpoint={self.checkpoint('demasker')}"
        for stage, more in (("demasker", []), ("autoencoder", [base])):
            folder = f"--trainer.default_root_dir={self.work_dir / stage}"
            config = f"--config={CONFIGS / f'quickstart_{stage}.yaml'}"
            run(["fit", config, folder, "--trainer.max_steps=1", *self.data_options, *more])

    def store_latents(self) -> float:
        """Encodes the training split; the seconds it took."""
        start = time.perf_counter()
        autoencoder = f"--model.init_args.autoencoder_checkpoint={self.checkpoint('autoencoder')}"
        config, output = f"--config={CONFIGS / 'quickstart_prior.yaml'}", f"--output={self.work_dir / 'latents'}"
        run(["encode", config, output, autoencoder, *self.data_options])
        return time.perf_counter() - start

    def seconds_per_step(self, is_stored: bool, condition_share: float, steps: int) -> float:
        """Median wall-clock of a training step."""
        latents = str(self.work_dir / "latents") if is_stored else None
        cache = str(self.work_dir / "cache")
        data = CanonicalFunctions(64, 64, max_functions=self.max_functions, cache_dir=cache, latents=latents)
        module = PriorModule(
            data.vocabulary,
            str(self.checkpoint("autoencoder")),
            NETWORK,
            noise_schedule=TangentSchedule(d=3.0),
            condition_share=condition_share,
        )
        seconds = StepSeconds()
        trainer = Trainer(
            max_steps=steps + WARM_UP,
            callbacks=[seconds],
            gradient_clip_val=1.0,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=data)
        return seconds.median


def rows_per_second(store: LatentStore, batch_size: int = 64, seconds: float = 2.0) -> float:
    """Random rows read in batches, the files in the page cache."""
    generator, count = np.random.default_rng(0), 0
    store[np.arange(len(store))]
    start = time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds:
        store[generator.integers(len(store), size=batch_size)]
        count += batch_size
    return count / spent


def measure(bench: Bench, steps: int, repeats: int) -> dict[str, Any]:
    """All figures."""
    bench.train_autoencoder()
    figures: dict[str, Any] = {"encode_seconds": bench.store_latents()}
    for share in (0.25, 0.0):
        found: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(repeats):
            for is_stored, values in found.items():
                values.append(bench.seconds_per_step(is_stored, share, steps))
        encodes, stored = (statistics.median(values) for values in found.values())
        figures[f"condition_share_{share}"] = {"encodes": encodes, "stored": stored, "ratio": encodes / stored}
    store = LatentStore(bench.work_dir / "latents" / "train")
    return figures | {"rows": len(store), "rows_read_per_second": rows_per_second(store)}


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max_functions", type=int, help="of the corpus, for a quick look; default: all")
    parser.add_argument("--work_dir", help="keeps corpus, checkpoints and latents; default: a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(Path(options.work_dir or temporary), options.max_functions)
        figures = measure(bench, options.steps, options.repeats)
    machine = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
    }
    print(json.dumps({"benchmark": "latent_cache", **vars(options), **figures, **machine}))


if __name__ == "__main__":
    main()

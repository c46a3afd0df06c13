"""Which way of training autoencoder and prior writes the best texts? Short trials from one base, told by generation.

    python benchmarks/recipe.py [--trials default replacement ...] [--output benchmarks/results/recipe.json]

Each trial trains an autoencoder and a prior with `lightning_configs/headline_*.yaml`, shorter and with a change or two,
from the headline's demasker (`headline.py train`), and writes on the validation split with both samplers, with all
registers and with few. The trial "other seeds" changes nothing else: what differs less than it does is noise. Trials
that are finished are not done again. The table goes to standard error; the last line printed is one JSON object.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headline import CONFIGS, checkpoint
from headline_bench import headline_data, held_out
from torch import Tensor

from crocodil.commands import build_judge, build_pipeline
from crocodil.evaluation.judge import Judge
from crocodil.evaluation.machine import machine
from crocodil.evaluation.tables import plain_numbers, summary
from crocodil.evaluation.verdict import SETTING
from crocodil.experiments import Generation, SystemGrid
from crocodil.experiments.cells import Ledger, array_fingerprint, fingerprint
from crocodil.trainer_cli import run_trainer

FOLDER = Path("runs/recipe")
FEW = 3
STEPS = {"autoencoder": 350, "prior": 300}
SHORT = {
    "autoencoder": (f"--trainer.max_steps={STEPS['autoencoder']}",),
    "prior": (
        f"--trainer.max_steps={STEPS['prior']}",
        "--data.init_args.latents=null",
        "--data.init_args.batch_size=64",
    ),
}
SEEDS = (0, 1)
COLUMNS = ("judge_nll", "entropy", "parse_rate", "nfe")
OTHER_SEEDS = ("--seed_everything=11", "--model.init_args.seed=11", "--data.init_args.seed=11")
"""Of new weights, of noise and dropout, and of the order of the data."""
REGULARISATION = "--model.init_args.regularisation"
SYSTEMS = tuple(
    SystemGrid(algorithm, [5], "random", [0.1], registers, unmasking_schedule="cosine")
    for algorithm in ("conthendisc", "conwithindisc", "oracle")
    for registers in (None, FEW)
)


@dataclass(frozen=True)
class Trial:
    """A change of the recipe, as options of `crocodil fit`.

    Attributes:
        autoencoder: of the autoencoder; trials with the same options share it.
        prior: of the prior.
    """

    autoencoder: tuple[str, ...] = ()
    prior: tuple[str, ...] = ()


TRIALS = {
    "default": Trial(),
    "other seeds": Trial(OTHER_SEEDS, OTHER_SEEDS),
    "replacement": Trial((f"{REGULARISATION}.replacement=0.5",)),
    "input masking": Trial((f"{REGULARISATION}.input_masking=0.5",)),
    "masking": Trial((f"{REGULARISATION}.masking=0.3",)),
    "elbo weight": Trial(("--model.init_args.loss_weight=elbo",)),
    "sigma 1": Trial((f"{REGULARISATION}.noise_std=1.0",)),
    "sigma 0.4": Trial((f"{REGULARISATION}.noise_std=0.4",)),
    "K = 8": Trial(("--model.init_args.num_registers=8", "--model.init_args.register_spacing=8")),
    "D = 8": Trial(("--model.init_args.latent_dim=8",)),
    "D = 32": Trial(("--model.init_args.latent_dim=32",)),
    "d = 10": Trial(prior=("--model.init_args.noise_schedule.d=10",)),
}


def folder_of(stage: str, options: tuple[str, ...]) -> Path:
    """Where a fit with these options lies."""
    changes = [option.lstrip("-").split("=") for option in options]
    words = [f"{name.rpartition('.')[2]}-{value}" for name, value in changes]
    return FOLDER / stage / ("_".join(words) or "default")


def fit(trial: Trial, overrides: tuple[str, ...]) -> tuple[Path, Path]:
    """The checkpoints of a trial's autoencoder and prior.

    Args:
        trial: what is changed.
        overrides: further options of both fits.
    """
    autoencoder = folder_of("autoencoder", trial.autoencoder)
    prior = folder_of("prior", trial.autoencoder + trial.prior)
    trained = autoencoder / "checkpoints/last.ckpt"
    read = f"--model.init_args.autoencoder_checkpoint={trained}"
    for stage, folder, options in (
        ("autoencoder", autoencoder, trial.autoencoder),
        ("prior", prior, (read, *trial.prior)),
    ):
        config = f"--config={CONFIGS}/headline_{stage}.yaml"
        run_trainer(["fit", config, f"--trainer.default_root_dir={folder}", *SHORT[stage], *options, *overrides])
    return trained, prior / "checkpoints/last.ckpt"


def measure(
    trial: Trial, judge: Judge, texts: Tensor, num_samples: int, overrides: tuple[str, ...]
) -> list[dict[str, Any]]:
    """The figures of a trial on the validation split.

    Args:
        trial: what is changed.
        judge: of the texts.
        texts: (R, L) int64, held out.
        num_samples: texts of each setting and seed.
        overrides: further options of both fits.
    """
    autoencoder, prior = fit(trial, overrides)
    pipeline = build_pipeline(str(autoencoder), str(prior), None)
    options = {"num_samples": num_samples, "seeds": SEEDS, "prior_steps": 8, "mauve_seeds": ()}
    context = {
        "prior": fingerprint(prior.parent),
        "judge": fingerprint(checkpoint("judge").parent),
        "texts": array_fingerprint(texts.numpy()),
        "options": options,
    }
    ledger = Ledger(FOLDER / "cells", prior.parent.parent.name, context)
    return Generation(pipeline, judge, texts, SYSTEMS, **options).rows(ledger)  # type: ignore[arg-type]


def as_markdown(entries: list[dict[str, Any]]) -> str:
    """Judge, entropy and share that parses, for each trial and setting."""
    lines = ["| trial | system | registers | calls | judge | entropy | parses % |", "|---|---|---|---|---|---|---|"]
    lines += [
        f"| {row['trial']} | {row['algorithm']} | {row['num_registers'] or 'all'} | {row['num_steps']} "
        f"| {row['judge_nll']:.2f} | {row['entropy']:.2f} | {100 * row['parse_rate']:.1f} |"
        for row in entries
    ]
    return "\n".join(lines)


def run(names: Sequence[str], num_samples: int, overrides: tuple[str, ...] = ()) -> dict[str, Any]:
    """Does the trials.

    Args:
        names: of `TRIALS`.
        num_samples: texts of each setting and seed.
        overrides: further options of all fits.

    Returns:
        The figures.
    """
    data = headline_data()
    judge = build_judge(str(checkpoint("judge")), score_end=True)
    texts = held_out(data, "val", num_samples)
    entries: list[dict[str, Any]] = []
    for name in names:
        rows = measure(TRIALS[name], judge, texts, num_samples, overrides)
        figures = [{key: row[key] for key in (*SETTING, "seed", *COLUMNS)} for row in rows]
        entries += [{"trial": name, **row} for row in summary(figures, SETTING)]
    return {
        "benchmark": "recipe",
        "num_samples": num_samples,
        "seeds": list(SEEDS),
        "steps": STEPS,
        "trials": {name: asdict(TRIALS[name]) for name in names},
        "rows": entries,
        **{f"machine: {key}": value for key, value in machine().items()},
    }


def main() -> None:
    """Fills the table and prints it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", nargs="+", choices=TRIALS, default=list(TRIALS))
    parser.add_argument("--num_samples", type=int, default=144, help="texts of each setting and seed")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/recipe.json"))
    options = parser.parse_args()
    figures = plain_numbers(run(options.trials, options.num_samples))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(figures, indent=1) + "\n")
    print(as_markdown(figures["rows"]), file=sys.stderr)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

"""Which unmasking rule writes the best texts at equal budgets? Every rule on the quickstart's system, three seeds.

    python benchmarks/sampler_rules.py --quickstart quickstart [--output benchmarks/results/sampler_rules.json]

Base and ConThenDisc write texts under every rule with at most 32, 16, 8 and 4 demasker calls; rules that commit as many
tokens as they dare are run with several numbers instead and make as many calls as their slowest text needs. Quality:
share that parses, nats per token under the quickstart's judge; beside it entropy, which collapse lowers. The table goes
to standard error; the last line printed is one JSON object with the rows.
"""

import argparse
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from crocodil.commands import build_judge
from crocodil.data import CanonicalFunctions
from crocodil.evaluation.tables import summary
from crocodil.experiments import Generation, SystemGrid
from crocodil.experiments.cells import Ledger
from crocodil.pipeline import CrocodilPipeline
from crocodil.quickstart import PRIOR_STEPS, last_checkpoint

SEEDS = (0, 1, 2)
BUDGETS = (32, 16, 8, 4)
PLANNED = ("random", "ancestral", "low_confidence", "margin", "entropy", "remdm_cap:0.05", "remdm_rescale:0.2", "p2:1")
ADAPTIVE = (
    *("threshold:0.9", "threshold:0.6", "threshold:0.3"),
    *("factor:1", "factor:2", "factor:6"),
    *("entropy_bound:0.1", "entropy_bound:0.5", "entropy_bound:2"),
)
TEMPERATURES = {"base": 1.0, "conthendisc": 0.2}
KEYS = ("algorithm", "num_steps", "remasking")
COLUMNS = ("demasker_calls", "nfe", "parse_rate", "judge_nll", "entropy", "duplicate_rate")


def systems(length: int) -> list[SystemGrid]:
    """All rules and budgets of both systems; adaptive rules may take one call for each token."""
    return [
        SystemGrid(algorithm, steps, rule, [temperature])
        for algorithm, temperature in TEMPERATURES.items()
        for rules, steps in ((PLANNED, list(BUDGETS)), (ADAPTIVE, [length]))
        for rule in rules
    ]


def as_markdown(entries: list[dict[str, Any]], algorithm: str) -> str:
    """The table of one algorithm."""
    lines = ["| rule | calls | NFE | parses % | judge nats | entropy | copies % |", "|---|---|---|---|---|---|---|"]
    for entry in entries:
        if entry["algorithm"] == algorithm:
            parses, spread = 100 * entry["parse_rate"], 100 * entry["parse_rate_std"]
            lines.append(
                f"| {entry['remasking']} | {entry['demasker_calls']:.0f} | {entry['nfe']:.1f} "
                f"| {parses:.1f} ± {spread:.1f} | {entry['judge_nll']:.2f} ± {entry['judge_nll_std']:.2f} "
                f"| {entry['entropy']:.2f} | {100 * entry['duplicate_rate']:.0f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Fills the table and prints it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quickstart", default="quickstart", metavar="DIR", help="folder of a finished quickstart")
    parser.add_argument("--num_samples", type=int, default=64, help="texts of each rule, budget and seed")
    parser.add_argument("--output", default="benchmarks/results/sampler_rules.json")
    options = parser.parse_args()
    folder = Path(options.quickstart)
    data = CanonicalFunctions()
    data.prepare_data()
    judge = build_judge(str(last_checkpoint(folder, "judge")), score_end=True)
    table = Generation(
        CrocodilPipeline.from_pretrained(folder / "pipeline"),
        judge,
        data.blocks("test"),
        systems(data.length),
        num_samples=options.num_samples,
        seeds=SEEDS,
        prior_steps=PRIOR_STEPS,
        mauve_seeds=(),
    )
    with tempfile.TemporaryDirectory() as scratch:
        rows = table.rows(Ledger(scratch, "rules", {}))
    entries = summary([{key: row[key] for key in (*KEYS, "seed", *COLUMNS)} for row in rows], KEYS)
    for algorithm in ("data", *TEMPERATURES):
        print(f"\n{algorithm}\n{as_markdown(entries, algorithm)}", file=sys.stderr)
    figures = {
        "benchmark": "sampler_rules",
        "num_samples": table.num_samples,
        "seeds": SEEDS,
        "length": data.length,
        "temperatures": TEMPERATURES,
        "prior_steps": PRIOR_STEPS,
        "rows": entries,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
    }
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    Path(options.output).write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

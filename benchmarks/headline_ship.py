"""Puts the headline's sketched system into weights/, from where `crocodil sample` takes it: half precision, no base.

    python benchmarks/headline_ship.py [--figures benchmarks/results/headline.json] [--output weights]

Needs runs/headline/pipeline (headline.py train) and the measured figures, whose settings become the defaults.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from headline_bench import FOLDER

from crocodil import CrocodilPipeline
from crocodil.experiments import SystemGrid

REFERENCE = "tuned"


def defaults(figures: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Arguments of the pipeline by algorithm: the settings that were compared with the tuned base, and the base's own.

    Args:
        figures: what headline.py wrote.
    """
    compared = [item for item in figures["comparisons"] if item["reference"] == REFERENCE]
    grids = {"masked": compared[0]["base"]} | {
        item["algorithm"]: item["system"] for item in compared if item["algorithm"] != "base"
    }
    settings = {name: SystemGrid(**grid).settings(figures["length"])[0] for name, grid in grids.items()}
    return {
        algorithm: {name: value for name, value in setting.arguments().items() if name != "algorithm"}
        for algorithm, setting in settings.items()
    }


def main() -> None:
    """Prints how many bytes there are now."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figures", type=Path, default=Path("benchmarks/results/headline.json"))
    parser.add_argument("--output", type=Path, default=Path("weights"))
    options = parser.parse_args()
    pipeline = CrocodilPipeline.from_pretrained(FOLDER / "pipeline")
    CrocodilPipeline(
        pipeline.demasker,
        pipeline.codec,
        encoder=pipeline.encoder,
        latent_process=pipeline.latent_process,
        student=pipeline.student,
        student_process=pipeline.student_process,
        defaults=defaults(json.loads(options.figures.read_text())),
    ).to("cpu", torch.float16).save_pretrained(options.output)
    held = sum(path.stat().st_size for path in options.output.rglob("*") if path.is_file())
    print(f"{held / 1e6:.2f} MB in {options.output}")


if __name__ == "__main__":
    main()

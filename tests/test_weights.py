"""The small system in weights/: what `crocodil sample` writes with when no pipeline is named."""

import json
from pathlib import Path

import pytest
import torch

from crocodil import CrocodilPipeline
from crocodil.cli import run
from crocodil.commands import shipped_pipeline
from crocodil.evaluation.python_code import parses

MOST_BYTES = 16_000_000
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def shipped() -> CrocodilPipeline:
    return CrocodilPipeline.from_pretrained(shipped_pipeline()).to("cpu", torch.float32)


def test_it_is_small_and_has_a_card() -> None:
    folder = shipped_pipeline()
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= MOST_BYTES
    assert (folder / "README.md").exists()


def test_its_card_tells_the_measured_figures(shipped: CrocodilPipeline) -> None:
    """The row of the shipped weights under their defaults, docs/results.md's star."""
    rows = json.loads((BENCHMARKS / "results/headline.json").read_text())["rows"]
    defaults = shipped.defaults["conthendisc"]
    mine = [row for row in rows if "weights" in row and row["algorithm"] == "conthendisc"]
    (row,) = [row for row in mine if all(row[name] == value for name, value in defaults.items())]
    card = " ".join((shipped_pipeline() / "README.md").read_text().split())
    mauve = f"MAUVE {row['mauve']:.2f} ± {row['mauve_std']:.2f}".replace(" 0.", " .")
    assert f"judge {row['judge_nll']:.2f} ± {row['judge_nll_std']:.2f} nats" in card
    assert mauve in card and f"{100 * row['parse_rate']:.0f} % parse" in card and f"{row['nfe']:.1f} calls" in card
    for name, network in shipped.networks().items():
        millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
        assert f"{millions:.2f} million" in card, name


def test_it_ships_a_student_in_place_of_the_prior(shipped: CrocodilPipeline) -> None:
    assert set(shipped.networks()) == {"demasker", "encoder", "student"}
    assert shipped.defaults["conthendisc"]["prior_network"] == "student"


def test_programs_under_a_sketch_parse_more_often_than_chance(shipped: CrocodilPipeline) -> None:
    """Its defaults; docs/results.md has the share over many texts, of which this bound is about two thirds."""
    texts = shipped(64, seed=0, **shipped.defaults["conthendisc"]).texts
    assert len(set(texts)) > 56
    assert sum(parses(text) for text in texts) >= 12


@pytest.mark.parametrize("algorithm", ["conthendisc", "conwithindisc"])
def test_sample_needs_no_pipeline(algorithm: str, tmp_path: Path) -> None:
    output = tmp_path / "texts.jsonl"
    run(["sample", "--algorithm", algorithm, "--num_samples", "2", "--output", str(output)])
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(lines) == 2 and all(line["text"] for line in lines)
    assert set(lines[0]["cost"]["calls"]) >= {"demasker", "student"}


def test_a_prompt_is_continued(shipped: CrocodilPipeline) -> None:
    prompt = "def f(self, v0):"
    text = shipped(1, prompts=[prompt], seed=0, **shipped.defaults["conthendisc"]).texts[0]
    assert text.startswith(prompt) and text.removeprefix(prompt).strip()

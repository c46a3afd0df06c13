"""The small system that comes with the project: it fits, it writes programs, and its card says what it is."""

import json
from pathlib import Path

import pytest

from crocodil import CrocodilPipeline
from crocodil.cli import main
from crocodil.commands import open_pipeline, shipped_pipeline
from crocodil.evaluation.python_code import ParseRate

MAX_BYTES = 16_000_000


@pytest.fixture(scope="module")
def pipeline() -> CrocodilPipeline:
    return open_pipeline(None, "cpu")


def test_it_is_small_enough_to_come_along() -> None:
    files = [path for path in shipped_pipeline().rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert 1_000_000 < sum(path.stat().st_size for path in files) <= MAX_BYTES


def test_a_word_is_enough(capsys: pytest.CaptureFixture[str]) -> None:
    """Without --pipeline, and with the settings that were chosen for it: few calls of student and demasker."""
    assert not main(["sample", "--num_samples", "2"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2 and all(line["text"].startswith("def ") for line in lines)
    calls = lines[0]["cost"]["calls"]
    assert calls["demasker"] <= 8 and calls["student"] <= 4


@pytest.mark.parametrize("algorithm", ["conthendisc", "conwithindisc", "masked"])
def test_every_algorithm_has_settings_of_its_own(pipeline: CrocodilPipeline, algorithm: str) -> None:
    settings = pipeline.defaults[algorithm]
    assert {"num_steps", "remasking", "temperature"} <= settings.keys()
    assert len(pipeline(2, algorithm=algorithm, **settings | {"num_steps": 2}).texts) == 2  # type: ignore[arg-type]


def test_it_writes_programs(pipeline: CrocodilPipeline) -> None:
    """A far cry from the measured rate (weights/README.md), and far above what damaged weights write."""
    metric = ParseRate()
    metric.update(texts=pipeline(64, algorithm="conthendisc", **pipeline.defaults["conthendisc"]).texts)
    assert metric.compute() > 0.3


def test_a_prompt_is_kept(pipeline: CrocodilPipeline) -> None:
    prompt = "def f(self, v0):"
    result = pipeline(1, prompts=[prompt], length=40, algorithm="conthendisc", **pipeline.defaults["conthendisc"])
    assert result.texts[0].startswith(prompt) and len(result.texts[0]) > len(prompt)


def test_the_card_tells_what_one_must_know(pipeline: CrocodilPipeline) -> None:
    card = (shipped_pipeline() / "README.md").read_text()
    assert all(word in card for word in ("licence", "Limits", "Figures", "crocodil sample", "headline_packages.txt"))
    total = sum(p.numel() for network in pipeline.networks().values() for p in network.parameters())
    assert f"{total / 1e6:.1f} million parameters" in card


def test_the_folder_is_where_the_repository_has_it() -> None:
    assert shipped_pipeline() == Path(__file__).parents[1] / "weights"

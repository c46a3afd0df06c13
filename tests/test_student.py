"""The distilled prior wherever a prior is used: pipeline, folder, command line, cost, table."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from crocodil.cli import run
from crocodil.commands import build_judge, build_pipeline
from crocodil.diffusion.noise import RowNoise
from crocodil.evaluation.cost import count_flops
from crocodil.evaluation.report import results_table
from crocodil.evaluation.verdict import summarise
from crocodil.experiments import Generation, SystemGrid
from crocodil.experiments.cells import Ledger
from crocodil.harness.writer import Writer
from crocodil.pipeline import CrocodilPipeline
from crocodil.samplers import ConThenDisc, ConWithinDisc, MaskedSampler
from crocodil.samplers.mean_flow import MeanFlowSampler

FEW: dict[str, Any] = {"num_steps": 4, "temperature": 1.0}
PARTS = {"autoencoder": "autoencoder", "prior": "prior", "base": "demasker"}


@pytest.fixture(scope="module")
def both(tiny_system: Any, student_checkpoint: Path) -> CrocodilPipeline:
    """A pipeline with prior and student, far from each other, and a demasker that heeds them."""
    parts = {option: str(tiny_system.checkpoint(stage)) for option, stage in PARTS.items()}
    pipeline = build_pipeline(**parts, student=str(student_checkpoint))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in [p for network in pipeline.networks().values() for p in network.parameters()]:
            weight += 0.2 * torch.randn(weight.shape, generator=generator)
    return pipeline


@pytest.fixture(scope="module")
def alone(both: CrocodilPipeline) -> CrocodilPipeline:
    """The same without prior."""
    settings = {"student": both.student, "student_process": both.student_process}
    return CrocodilPipeline(both.demasker, both.codec, both.encoder, **settings)


def test_the_prior_is_taken_unless_the_student_is_asked_for(both: CrocodilPipeline, alone: CrocodilPipeline) -> None:
    usual, student = both(2, **FEW), both(2, prior_network="student", **FEW)
    assert usual.cost.calls["prior"] == 32 and "student" not in usual.cost.calls
    assert student.cost.calls == {"demasker": 4, "student": 4} and usual.texts != student.texts
    assert torch.equal(alone(2, **FEW).token_ids, student.token_ids)
    with pytest.raises(ValueError, match="prior_network must be student, which this pipeline has, got 'prior'"):
        alone(prior_network="prior")
    with pytest.raises(ValueError, match=r"prior_network must be prior or student, which .* got 'teacher'"):
        both(prior_network="teacher")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prior_network must be prior or student, got 'teacher'"):
        both(algorithm="masked", prior_network="teacher")  # type: ignore[arg-type]


@torch.no_grad()
def test_both_algorithms_draw_and_refresh_with_the_student(both: CrocodilPipeline) -> None:
    sampler, noise = MaskedSampler(4, temperature=1.0), RowNoise(torch.arange(2))
    first, later = both.student_process.sampler(3), both.student_process.sampler(2)
    given: dict[str, Any] = {"length": 20, "batch_size": 2, "generator": noise}
    settings = {"prior_network": "student", "prior_steps": 3, "refresh_prior_steps": 2, **FEW}
    then = ConThenDisc(sampler, first).sample(both.demasker, both.student, **given)
    result = both(2, 20, "conthendisc", **settings)
    assert torch.equal(result.token_ids, then.token_ids)
    within = ConWithinDisc(sampler, first, later).sample(both.demasker, both.student, both.encoder, **given)
    result = both(2, 20, "conwithindisc", **settings)
    assert torch.equal(result.token_ids, within.token_ids)
    assert result.cost.calls == within.calls == {"demasker": 4, "student": 5, "encoder": 1}


def test_the_student_has_a_bill_of_its_own(both: CrocodilPipeline) -> None:
    cost = both(2, algorithm="conwithindisc", prior_network="student", **FEW).cost
    assert cost.calls["student"] == 4 + 2 and cost.seconds_by_part["student"] > 0
    assert "prior" not in cost.calls and "prior" not in cost.seconds_by_part
    level = torch.zeros(1)
    assert cost.flops["student"] == count_flops(both.student, torch.zeros(1, 4, 8), level, level)
    assert cost.flops["prior"] < cost.flops["student"] < 1.2 * cost.flops["prior"]  # one more embedding
    calls = {name: count * cost.flops[name] for name, count in cost.calls.items()}
    assert cost.nfe == pytest.approx(sum(calls.values()) / cost.flops["unit"])


def test_guidance_is_in_the_weights(both: CrocodilPipeline) -> None:
    with pytest.raises(ValueError, match=r"prior_guidance_scale must be 1.0 or 1.0, .* got 2.0"):
        both(prior_network="student", prior_guidance_scale=2.0, **FEW)


def test_a_folder_keeps_the_student_and_how_to_sample_it(both: CrocodilPipeline, tmp_path: Path) -> None:
    both.save_pretrained(tmp_path)
    loaded = CrocodilPipeline.from_pretrained(tmp_path)
    assert loaded.student_process == both.student_process and loaded.networks().keys() == both.networks().keys()
    one, other = (pipe(2, prior_network="student", **FEW) for pipe in (both, loaded))
    assert torch.equal(one.token_ids, other.token_ids)
    assert {path.suffix for path in (tmp_path / "student").iterdir()} == {".json", ".safetensors"}


def test_export_and_sample(tiny_system: Any, student_checkpoint: Path, tmp_path: Path) -> None:
    folder, output = tmp_path / "pipe", tmp_path / "texts.jsonl"
    parts = [f"--{option}={tiny_system.checkpoint(stage)}" for option, stage in PARTS.items()]
    run(["export", *parts, f"--student={student_checkpoint}", f"--output={folder}"])
    options = ["--num_samples=2", "--num_steps=4", "--prior_network=student", "--prior_steps=2"]
    run(["sample", f"--pipeline={folder}", *options, f"--output={output}"])
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["cost"]["calls"] for row in rows] == [{"demasker": 4.0, "student": 2.0}] * 2


def test_a_student_is_not_exported_with_another_autoencoder(
    tiny_system: Any, student_checkpoint: Path, tmp_path: Path
) -> None:
    content = torch.load(tiny_system.checkpoint("autoencoder"), weights_only=True)
    content["state_dict"]["encoder.latent_mean"][0, 0] += 1e-3
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"was trained on another autoencoder than .*other.ckpt"):
        build_pipeline(str(tmp_path / "other.ckpt"), None, None, str(student_checkpoint))
    with pytest.raises(ValueError, match="export needs --autoencoder"):
        build_pipeline(None, None, None, str(student_checkpoint))


def test_the_harness_writes_with_a_student(both: CrocodilPipeline, alone: CrocodilPipeline) -> None:
    settings = {"student": both.student, "student_process": both.student_process}
    writer = Writer(both.demasker, both.codec, both.encoder, **settings)
    (written,) = writer.write([[1]], [0], 8, "conthendisc", MaskedSampler(2), prior_steps=2)
    assert written.shape == (8,)


def test_the_temperature_of_a_sketch_reaches_the_student(both: CrocodilPipeline) -> None:
    sampler = both.latent_sampler(2, "student", temperature=0.5)
    assert isinstance(sampler, MeanFlowSampler) and sampler.temperature == 0.5


def test_the_table_names_what_drew_the_sketch(both: CrocodilPipeline, tiny_system: Any, tmp_path: Path) -> None:
    systems = [
        SystemGrid("conthendisc", [2]),
        SystemGrid("conthendisc", [2], prior_network="student", prior_steps=1),
        SystemGrid("conwithindisc", [2], prior_network="student", prior_steps=2),
    ]
    judge = build_judge(str(tiny_system.checkpoint("judge")))
    options: dict[str, Any] = {"num_samples": 4, "seeds": (0, 1), "prior_steps": 3, "mauve_seeds": ()}
    table = Generation(both, judge, tiny_system.data().blocks("val")[:8], systems, **options)
    rows = table.rows(Ledger(tmp_path, "generation", {}))
    assert [row["prior_calls"] for row in rows[:4]] == [0, 3, 1, 4]
    assert [row["prior_network"] for row in rows[:4]] == [None, None, "student", "student"]
    summary = summarise(rows)
    assert len(summary) == 4 and all(row["num_seeds"] == 2 for row in summary)
    words = list(results_table(rows).columns[1].cells)
    assert sorted(words)[1:] == ["random", "random student of 1 steps", "random student of 2 steps"]
    with pytest.raises(ValueError, match="base draws no registers: leave out its prior_network, _steps, _temperature"):
        SystemGrid("base", [2], prior_steps=3)

"""The table of generation on the tiny system: what is written, what it costs, what is kept."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from crocodil.commands import build_judge
from crocodil.diffusion.noise import RowNoise
from crocodil.evaluation.frechet import frechet_distance
from crocodil.evaluation.report import GENERATION_COLUMNS
from crocodil.experiments import Generation, SystemGrid
from crocodil.experiments.cells import Ledger
from crocodil.experiments.generation import GenerationCell
from crocodil.samplers import MaskedSampler

SYSTEMS = [
    SystemGrid("base", [8, 2], "random", [1.0, 0.5]),
    SystemGrid("conthendisc", [2], "random", [0.5], 2),
    SystemGrid("conwithindisc", [2], "low_confidence"),
    SystemGrid("oracle", [2], "low_confidence", [0.0]),
]


@pytest.fixture(scope="module")
def judge(tiny_system: Any):
    return build_judge(str(tiny_system.checkpoint("judge")))


@pytest.fixture(scope="module")
def make(tiny_system: Any, tiny_pipeline: Any, judge: Any):
    def build(**changes: Any) -> Generation:
        data = tiny_system.data()
        held_out = torch.cat([data.blocks("test"), data.blocks("val")])[:20]
        options = {"num_samples": 6, "seeds": (0, 1), "prior_steps": 3, "refresh_prior_steps": 2, "mauve_seeds": ()}
        train = data.array("train")
        return Generation(tiny_pipeline, judge, held_out, **({"systems": SYSTEMS, "train": train} | options | changes))

    return build


def test_rows_of_the_whole_grid(make: Any, tmp_path: Path) -> None:
    table = make(timed_batches=(1, 2), repeats=1)
    rows = table.rows(Ledger(tmp_path, "generation", {}))
    assert [row["algorithm"] for row in rows[:8]] == ["data", *["base"] * 4, "conthendisc", "conwithindisc", "oracle"]
    assert len(rows) == 16 and [row["seed"] for row in rows] == [0] * 8 + [1] * 8
    by_name = {row["algorithm"]: row for row in rows[:8]}
    calls = {name: [row[f"{n}_calls"] for n in ("demasker", "prior", "encoder")] for name, row in by_name.items()}
    assert calls["data"] == [0, 0, 0] and calls["base"] == [2, 0, 0] and calls["oracle"] == [2, 0, 1]
    assert calls["conthendisc"][0] == 2 and calls["conthendisc"][1] >= 3 and calls["conthendisc"][2] == 0
    assert calls["conwithindisc"][2] == 1 and calls["conwithindisc"][1] > calls["conthendisc"][1]
    for row in rows:
        assert math.isfinite(row["judge_nll"]) and row["perplexity"] == pytest.approx(math.exp(row["judge_nll"]))
        assert len(row["examples"]) == 4
        assert row.keys() >= set(GENERATION_COLUMNS) - {
            "mauve",
            "mauve_kmeans_std",
            "undefined_names",
            "tokens_per_call",
        }
        timed = row["algorithm"] not in ("data", "oracle")
        assert ("seconds_batch_1" in row) == ("seconds_batch_2" in row) == timed
    assert by_name["data"]["parse_rate"] == 1
    assert by_name["base"]["nfe"] == 2


def test_finished_cells_are_not_measured_again(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    systems = SYSTEMS[:1]
    rows = make(systems=systems).rows(Ledger(tmp_path, "generation", {}))
    monkeypatch.setattr(Generation, "measure", pytest.fail)
    assert make(systems=systems).rows(Ledger(tmp_path, "generation", {})) == rows


def test_base_texts_are_those_of_the_sampler(make: Any, tiny_pipeline: Any) -> None:
    """Written by the sampler itself, text by text: in exact arithmetic, on the streams of (seed, i)."""
    for settings in ({}, {"top_p": 0.5}, {"unmasking_schedule": "cosine"}):
        cell = GenerationCell("base", 4, "random", 1.0, None, 32, 5, **settings)
        result = make().write(cell)
        for i in (0, 5):
            out = MaskedSampler(4, None, "random", 1.0, **settings).sample(
                tiny_pipeline.base, length=32, batch_size=1, generator=RowNoise(torch.tensor([(5 << 32) + i]))
            )
            assert torch.equal(result.token_ids[i], out.token_ids[0])


def test_a_grid_hands_all_its_settings_to_its_cells(make: Any) -> None:
    options: dict[str, Any] = {"top_p": 0.9, "unmasking_schedule": "cosine", "prior_temperature": 0.7}
    grid = SystemGrid("conthendisc", [2], "random", [0.5], 2, **options)
    found = make(systems=[grid], seeds=(3,)).cells[1]
    assert found == GenerationCell("conthendisc", 2, "random", 0.5, 2, 32, 3, **options)


@pytest.mark.parametrize(
    ("algorithm", "more"),
    [("conthendisc", {"refresh_prior_steps": 2}), ("conwithindisc", {"refresh_prior_steps": 5})],
)
def test_a_cell_is_written_with_all_its_settings(
    make: Any, algorithm: str, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"top_p": 0.9, "unmasking_schedule": "cosine", "prior_temperature": 0.5, "prior_steps": 5}
    table, asked = make(), {}
    monkeypatch.setattr(type(table.pipeline), "__call__", lambda pipeline, *_, **given: asked.update(given))
    table.write(GenerationCell(algorithm, 4, "random", 0.7, 2, 32, 1, prior_network="prior", **options))
    assert asked == {
        **{"algorithm": algorithm, "num_steps": 4, "remasking": "random", "temperature": 0.7, "num_registers": 2},
        **{"prior_network": "prior", "seed": 1, "first_sample": 0, "batch_size": 6, **options, **more},
    }


def test_data_is_judged_against_other_data(make: Any, judge: Any) -> None:
    table = make()
    row = table.measure(GenerationCell("data", 0, None, None, None, 32, 0))
    chosen = table.write(GenerationCell("data", 0, None, None, None, 32, 0)).token_ids
    reference = {tuple(text.tolist()) for text in table.reference}
    assert len(chosen) == 6 and not reference & {tuple(text.tolist()) for text in chosen}
    codec = table.pipeline.codec
    features = [judge.read([codec.decode(r) for r in ids], ids).mean_states for ids in (chosen, table.reference)]
    assert row["distance"] == pytest.approx(frechet_distance(*features), rel=1e-6)


def test_oracle_reads_the_registers_of_the_texts(make: Any, tiny_pipeline: Any) -> None:
    cell = GenerationCell("oracle", 2, "low_confidence", 0.0, 3, 32, 0)
    table = make()
    source = table.write(GenerationCell("data", 0, None, None, None, 32, 0)).token_ids
    out = MaskedSampler(2).sample(
        tiny_pipeline.demasker, length=32, batch_size=6, latents=tiny_pipeline.encoder(source)[:, :3]
    )
    assert torch.equal(table.write(cell).token_ids, out.token_ids)


def test_shorter_texts_are_compared_with_data_cut_as_short(make: Any) -> None:
    table = make(lengths=(16, 32), systems=SYSTEMS[:1], seeds=(0,))
    assert {cell.length for cell in table.cells} == {16, 32}
    data, base = table.write(table.cells[0]), table.write(table.cells[1])
    assert data.token_ids.shape == base.token_ids.shape == (6, 16)


def test_processes_share_the_texts_of_a_cell(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = GenerationCell("conthendisc", 2, "random", 1.0, None, 32, 1)
    whole = make().write(cell)
    parts = []
    for rank in range(2):
        monkeypatch.setattr("crocodil.experiments.cells.rank_and_size", lambda rank=rank: (rank, 2))
        parts.append(make().write(cell))
    assert whole.texts == parts[0].texts + parts[1].texts
    assert torch.equal(whole.token_ids, torch.cat([part.token_ids for part in parts]))


def test_what_cannot_be_is_refused(make: Any) -> None:
    with pytest.raises(ValueError, match="at most half of the 20 held-out texts, got 11"):
        make(num_samples=11)
    with pytest.raises(ValueError, match="lengths must be between 2 and the 32 of the data"):
        make(lengths=(64,))
    with pytest.raises(ValueError, match="algorithm must be base, conthendisc, conwithindisc or oracle, got 'magic'"):
        SystemGrid("magic", [8])


def test_the_ledger_holds_plain_json(make: Any, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "generation", {})
    make(systems=SYSTEMS[1:2], seeds=(0,)).rows(ledger)
    lines = [json.loads(line, parse_constant=pytest.fail) for line in ledger.path.read_text().splitlines()]
    assert [line["cell"]["algorithm"] for line in lines] == ["data", "conthendisc"]

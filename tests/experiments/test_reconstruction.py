import math
from pathlib import Path
from typing import Any

import pytest
import torch

from crocodil.commands import build_judge
from crocodil.experiments import Reconstruction
from crocodil.experiments.cells import Ledger
from crocodil.pipeline import CrocodilPipeline
from crocodil.samplers import MaskedSampler


def test_the_grid_of_blocks_and_steps(tiny_system: Any, tiny_pipeline: Any, tmp_path: Path) -> None:
    held_out = tiny_system.data().blocks("test")
    judge = build_judge(str(tiny_system.checkpoint("judge")))
    options = {"block_sizes": (None, 8), "num_steps": (2, 4), "register_counts": (None, 1), "num_texts": 5}
    table = Reconstruction(tiny_pipeline, held_out, judge, **options, batch_size=2)
    settings = [(cell.num_registers, cell.block_size, cell.num_steps) for cell in table.cells]
    grid = [(k, block, steps) for k in (None, 1) for block, steps in ((None, 2), (None, 4), (8, 4))]
    assert settings == [(None, None, 0), *grid]  # four blocks of eight need four steps
    rows = table.rows(Ledger(tmp_path, "reconstruction", {}))
    originals = rows[0]
    assert (originals["cer"], originals["token_accuracy"], originals["nfe"], originals["parse_rate"]) == (0, 1, 0, 1)
    latents = tiny_pipeline.encoder(held_out[:5]).detach()
    for row in rows[1:]:
        out = MaskedSampler(row["num_steps"], row["block_size"]).sample(
            tiny_pipeline.demasker, length=32, batch_size=5, latents=latents[:, : row["num_registers"]]
        )
        ends = (held_out[:5] == 0).int().argmax(1)
        counted = (torch.arange(32) <= ends[:, None]) & (torch.arange(32) > 0)
        hits = ((out.token_ids == held_out[:5]) & counted).sum() / counted.sum()
        assert row["token_accuracy"] == pytest.approx(hits.item())
        assert math.isfinite(row["perplexity"]) and row["cer"] > 0
        assert row["nfe"] > row["num_steps"]  # the encoder and the registers cost, too
    again = Reconstruction(tiny_pipeline, held_out, judge, **options, batch_size=3)
    for row, other in zip(rows, again.rows(Ledger(tmp_path / "other", "reconstruction", {})), strict=True):
        for name, value in row.items():
            if isinstance(value, float) and name != "seconds_per_sample":
                assert other[name] == pytest.approx(value, rel=1e-5), name


def test_what_cannot_be_is_refused(tiny_system: Any, tiny_pipeline: Any) -> None:
    held_out = tiny_system.data().blocks("test")
    with pytest.raises(ValueError, match="divides the length 32 into blocks"):
        Reconstruction(tiny_pipeline, held_out, block_sizes=(5,))
    with pytest.raises(ValueError, match="this pipeline has none"):
        Reconstruction(CrocodilPipeline(tiny_pipeline.demasker, tiny_pipeline.codec), held_out)

from pathlib import Path
from typing import Any

import pytest
import torch

from crocodil.diffusion.noise import RowNoise
from crocodil.evaluation.masked_prediction import MaskedPrediction
from crocodil.experiments import Conditioning
from crocodil.experiments.cells import Ledger
from crocodil.pipeline import CrocodilPipeline


def test_curves_for_several_numbers_of_registers(tiny_system: Any, tiny_pipeline: Any, tmp_path: Path) -> None:
    held_out = tiny_system.data().blocks("test")
    table = Conditioning(tiny_pipeline, held_out, [1, 4], (0.5, 1.0), num_texts=7, batch_size=3, seed=9)
    rows = table.rows(Ledger(tmp_path, "conditioning", {}))
    curves = [("demasker", 4), ("demasker", 1), ("demasker", 0), ("base", 0)]
    assert [(row["system"], row["num_registers"]) for row in rows[::2]] == curves
    latents = tiny_pipeline.encoder(held_out[:7]).detach()
    for (system, count), row in zip(curves, rows[::2], strict=True):
        metric = MaskedPrediction((0.5, 1.0))
        network = tiny_pipeline.base if system == "base" else tiny_pipeline.demasker
        given = latents[:, :count] if count else None
        metric.update(network, held_out[:7], given, RowNoise((9 << 32) + torch.arange(7)))
        assert row["mask_ratio"] == 0.5
        assert row["cross_entropy"] == pytest.approx(metric.compute()["cross_entropy"][0].item(), rel=1e-5)
        assert row["top1"] == pytest.approx(metric.compute()["top1"][0].item())
    again = Conditioning(tiny_pipeline, held_out, [1, 4], (0.5, 1.0), num_texts=7, batch_size=3, seed=9)
    again.measure = pytest.fail  # type: ignore[method-assign]
    assert again.rows(Ledger(tmp_path, "conditioning", {})) == rows


def test_what_cannot_be_is_refused(tiny_system: Any, tiny_pipeline: Any) -> None:
    held_out = tiny_system.data().blocks("test")
    with pytest.raises(ValueError, match="register_counts must be between 0 and the trained 4"):
        Conditioning(tiny_pipeline, held_out, [5])
    with pytest.raises(ValueError, match="mask_ratios must be above 0 and at most 1"):
        Conditioning(tiny_pipeline, held_out, mask_ratios=(0.0,))
    plain = CrocodilPipeline(tiny_pipeline.demasker, tiny_pipeline.codec)
    with pytest.raises(ValueError, match="this pipeline has no encoder"):
        Conditioning(plain, held_out)

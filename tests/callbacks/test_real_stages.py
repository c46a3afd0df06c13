"""The callbacks on the stages themselves, against what the stages return."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from crocodil_callbacks import GradientNorm, LatentStatistics, LossByMaskRatio, StopAtNonFinite, Throughput
from crocodil_callbacks.latent_statistics import latent_statistics
from lightning.pytorch.loggers import Logger
from safetensors.torch import load_file
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore:Found .* in eval mode", "ignore:.*does not have many workers")
STEPS = 3


class Outputs(L.Callback):
    """What the training step returned, and the gradient that it led to."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        gradients = [p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]
        self.norms.append(torch.cat(gradients).norm().item())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append(outputs)

    def column(self, name: str) -> Tensor:
        return torch.cat([step[name] for step in self.steps]).float()


@pytest.fixture
def figures(tiny_system: Any, fit: Callable[..., Any], memory: type[Logger]) -> Callable[..., Any]:
    """`found, outputs = figures(stage, *callbacks)`: what is logged at the end of three steps."""

    def run(stage: str, *callbacks: Any) -> tuple[dict[str, float], Outputs]:
        outputs, logger = Outputs(), memory()
        options = {"logger": logger, "log_every_n_steps": STEPS, "max_steps": STEPS}
        fit(tiny_system.module(stage), tiny_system.data(), outputs, *callbacks, **options)
        rows: Any = logger.rows  # type: ignore[attr-defined]
        assert all(step == STEPS - 1 for step, _ in rows)
        return {name: value for _, row in rows for name, value in row.items()}, outputs

    return run


@pytest.mark.parametrize("stage", ["demasker", "autoencoder"])
def test_masked_stages(stage: str, figures: Callable[..., Any]) -> None:
    callbacks = [GradientNorm(), LossByMaskRatio(1), Throughput(1), StopAtNonFinite()]
    found, outputs = figures(stage, *callbacks, *([LatentStatistics(STEPS)] if stage == "autoencoder" else []))
    nats, tokens = outputs.column("masked_nats").sum(), outputs.column("num_masked").sum()
    assert found["nats_at_mask_0.000-1.000"] == pytest.approx((nats / tokens).item())
    assert found["gradient_norm"] == pytest.approx(sum(outputs.norms) / STEPS, rel=1e-5)
    assert found["tokens_per_second"] / found["texts_per_second"] == pytest.approx(32)  # a padded row is all text
    if stage == "autoencoder":
        expected = latent_statistics(outputs.column("latents"), 0.1)
        assert {name: found[name] for name in expected} == pytest.approx({n: v.item() for n, v in expected.items()})
        assert 0 < found["latent_cosine_under_noise"] < 1
        assert {"gradient_norm_encoder", "gradient_norm_demasker"} <= found.keys()


def test_a_prior(figures: Callable[..., Any]) -> None:
    found, outputs = figures("prior", GradientNorm(), LossByMaskRatio(1), LatentStatistics(STEPS), StopAtNonFinite())
    assert found["loss_at_log_snr_-12.0_to_+8.0"] == pytest.approx(outputs.column("row_losses").mean().item())
    assert found["gradient_norm_prior"] == found["gradient_norm"] == pytest.approx(sum(outputs.norms) / STEPS, rel=1e-5)
    assert found["latent_norm"] == pytest.approx(outputs.column("latents").norm(dim=-1).mean().item())
    assert "latent_cosine_under_noise" not in found


class Spoil(L.Callback):
    """From the second batch on, the rarest token of that batch cannot be read by a network."""

    def __init__(self, network: str) -> None:
        self.network = network

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            counts = batch["token_ids"].flatten().bincount()
            self.token = int(counts.masked_fill(counts == 0, 10**6).argmin())
            embeddings = getattr(pl_module, self.network).network.get_input_embeddings()
            embeddings.weight.data[self.token] = math.nan
        self.before = {name: value.clone() for name, value in pl_module.state_dict().items()}


def test_texts_are_named_by_the_data_module(tiny_system: Any, fit: Callable[..., Any], tmp_path: Path) -> None:
    data, spoil = tiny_system.data(), Spoil("demasker")
    with pytest.raises(FloatingPointError, match=r"the loss is nan; .*; the largest weight is nan") as error:
        fit(tiny_system.module("demasker"), data, spoil, StopAtNonFinite(), max_steps=20)
    (path,) = tmp_path.glob("nonfinite-step-*.safetensors")
    content = load_file(path)
    named = [int(row) for row in re.findall(r"\(row (\d+)\)", str(error.value))]
    assert named and set(named) < set(range(8))
    assert (content["token_ids"][named] == spoil.token).any(1).all()
    places = ", ".join(f"{data.describe(tuple(content['origins'][row].tolist()))} (row {row})" for row in named)
    assert f"texts without a finite loss: {places};" in str(error.value)


def test_latent_statistics_come_back(tiny_system: Any, fit: Callable[..., Any]) -> None:
    """They hear of what the encoder cannot read before the loss does."""
    module, spoil = tiny_system.module("autoencoder"), Spoil("encoder")
    with pytest.raises(FloatingPointError, match="stopped at step 2: the loss is nan"):
        fit(module, tiny_system.data(), spoil, StopAtNonFinite())
    assert module.encoder.latent_mean.isfinite().all()
    torch.testing.assert_close(dict(module.state_dict()), spoil.before, rtol=0, atol=0, equal_nan=True)

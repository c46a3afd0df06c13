from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from crocodil_callbacks import GradientNorm
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:Found .* in eval mode")
Rows = list[tuple[int, dict[str, float]]]


def batches(count: int, rows: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"token_ids": torch.randint(1, 9, (rows, 3), generator=generator)} for _ in range(count)]


class Truth(L.Callback):
    """The gradients by autograd on all batches of a step at once, before the step is made."""

    def __init__(self, data: list[dict[str, Tensor]], batches_per_step: int = 1) -> None:
        self.data, self.per_step = data, batches_per_step
        self.squares: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % self.per_step == 0:
            rows = torch.cat([part["token_ids"] for part in self.data[batch_idx : batch_idx + self.per_step]])
            names, weights = zip(*((n, p) for n, p in pl_module.named_parameters() if p.requires_grad), strict=True)
            with torch.enable_grad():
                found = torch.autograd.grad(pl_module.row_losses(rows).mean(), weights)
            self.squares.append({n.split(".")[0]: g.square().sum().item() for n, g in zip(names, found, strict=True)})

    def norms(self, *networks: str) -> Tensor:
        return torch.tensor([sum(s[n] for n in networks) for s in self.squares]).sqrt()


def test_norms_are_those_of_autograd(toy: Any, train: Callable[..., Rows]) -> None:
    data = batches(6)
    truth = Truth(data)
    rows = train(toy(), data, truth, GradientNorm(), log_every_n_steps=3)
    assert [step for step, _ in rows] == [2, 5]
    for i, (_, figures) in enumerate(rows):
        window = slice(3 * i, 3 * i + 3)
        norms = truth.norms("encoder", "demasker")[window]
        assert figures == pytest.approx(
            {
                "gradient_norm": norms.mean().item(),
                "gradient_norm_max": norms.max().item(),
                "gradient_norm_encoder": truth.norms("encoder")[window].mean().item(),
                "gradient_norm_demasker": truth.norms("demasker")[window].mean().item(),
            }
        )


def test_clipping_comes_afterwards_and_is_counted(toy: Any, train: Callable[..., Rows]) -> None:
    data = batches(8)
    free = Truth(data)
    train(toy(), data, free)
    clip = free.norms("encoder", "demasker").median().item()
    truth = Truth(data)
    [(_, figures)] = train(toy(), data, truth, GradientNorm(), log_every_n_steps=8, gradient_clip_val=clip)
    norms = truth.norms("encoder", "demasker")
    assert figures["gradient_norm_max"] == pytest.approx(norms.max().item()) and norms.max() > clip
    assert figures["gradient_clipped_share"] == (norms > clip).float().mean() not in (0.0, 1.0)


def test_clipped_values_are_no_clipped_norms(toy: Any, train: Callable[..., Rows]) -> None:
    options = {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}
    assert "gradient_clipped_share" not in train(toy(), batches(1), GradientNorm(), **options)[0][1]


def test_summed_batches_are_one_step(toy: Any, train: Callable[..., Rows]) -> None:
    data = batches(6)
    truth = Truth(data, 3)
    rows = train(toy(), data, truth, GradientNorm(), accumulate_grad_batches=3)
    assert [step for step, _ in rows] == [0, 1]
    found = [figures["gradient_norm"] for _, figures in rows]
    assert found == pytest.approx(truth.norms("encoder", "demasker").tolist())


def test_a_frozen_network_has_no_norm(toy: Any, train: Callable[..., Rows]) -> None:
    [(_, figures)] = train(toy(frozen=True), batches(1), GradientNorm())
    assert "gradient_norm_encoder" not in figures
    assert figures["gradient_norm"] == figures["gradient_norm_demasker"] > 0


def test_the_scale_of_float16_is_taken_out(toy: Any, train: Callable[..., Rows]) -> None:
    """A real scaler on the CPU; its factor is 2^16."""
    from lightning.pytorch.plugins import MixedPrecision

    data, truth = batches(1), Truth(batches(1))
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    [(_, figures)] = train(toy(), data, truth, GradientNorm(), plugins=[plugin])
    assert figures["gradient_norm"] == pytest.approx(truth.norms("encoder", "demasker").item(), rel=0.02)


def test_without_log_points_nothing_is_kept(toy: Any, train: Callable[..., Rows]) -> None:
    callback = GradientNorm()
    assert train(toy(), batches(3), callback, log_every_n_steps=0) == []
    assert callback._norms == []

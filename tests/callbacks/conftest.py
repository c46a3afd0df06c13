"""A tiny stage whose losses and gradients are known by hand, and fits of it that keep what is logged."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader

Batch = dict[str, Tensor]
SPOILT_LOSS, SPOILT_GRADIENT = 99, 0


class Toy(L.LightningModule):
    """Row loss sqrt(|sum(A x)|) + log(99 - max x): a 99 makes it infinite, a row of zeros its gradient NaN.

    Each forward pass moves a buffer, as latent statistics do.
    """

    def __init__(self, lr: float = 0.1, frozen: bool = False) -> None:
        super().__init__()
        self.encoder, self.demasker = nn.Linear(3, 3, bias=False), nn.Linear(3, 1, bias=False)
        for i, weight in enumerate(self.parameters()):
            nn.init.constant_(weight, 0.5 + i)
        self.encoder.requires_grad_(not frozen)
        self.lr = lr
        self.register_buffer("statistics", torch.zeros(3))
        self.gradients: list[dict[str, Tensor]] = []

    def row_losses(self, token_ids: Tensor) -> Tensor:
        x = token_ids.float()
        return self.demasker(self.encoder(x)).squeeze(1).abs().sqrt() + (SPOILT_LOSS - x.amax(1)).log()

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        self.statistics += batch["token_ids"].float().mean(0)
        losses = self.row_losses(batch["token_ids"])
        return {"loss": losses.mean(), "masked_nats": losses.detach(), **self.extra(batch)}

    def extra(self, batch: Batch) -> Batch:
        return {name.removeprefix("out_"): value for name, value in batch.items() if name.startswith("out_")}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], self.lr, weight_decay=0.5)


class Memory(Logger):
    """Keeps what is logged: (step, figures)."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    name, version = "memory", 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((int(step or 0), dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


@pytest.fixture(scope="session")
def toy() -> type[Toy]:
    """The class `Toy`."""
    return Toy


@pytest.fixture(scope="session")
def memory() -> type[Memory]:
    """The class `Memory`."""
    return Memory


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., list[tuple[int, dict[str, float]]]]:
    """`rows = train(module, batches, *callbacks, **options)`: a fit on exactly these batches, and what was logged."""

    def run(module: Any, batches: Any, *callbacks: Any, **options: Any) -> list[tuple[int, dict[str, float]]]:
        memory = Memory()
        settings: dict[str, Any] = {
            "max_epochs": 1,
            "accelerator": "cpu",
            "logger": memory,
            "log_every_n_steps": 1,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "default_root_dir": tmp_path,
        }
        trainer = L.Trainer(**(settings | options), callbacks=list(callbacks))
        loader = batches if not isinstance(batches, Sequence) else DataLoader(list(batches), batch_size=None)
        trainer.fit(module, loader, loader if "val_check_interval" in options else None)
        return memory.rows

    return run

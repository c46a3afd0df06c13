"""What the stages share: optimizers, reproducible noise, compilation, and the record in the checkpoint."""

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from crocodil.data.codec import TextCodec
from crocodil.diffusion.noise import RowNoise
from crocodil.modules.checkpoints import RECORD_KEY, Stage, check_stage, stage_record
from crocodil.modules.optimizers import MuonAdamW, parameter_groups
from crocodil.pipeline import CrocodilPipeline

Batch = dict[str, Tensor]
STREAM_TIME, STREAM_MASK, STREAM_LATENT_NOISE, STREAM_CHOICE = 100, 101, 102, 103


class CrocodilModule(L.LightningModule):
    """Base class of the stages.

    Args:
        optimizer: called with the parameter groups of `parameter_groups`.
        lr_scheduler: called with the optimizer, stepped after every optimizer step; None for a constant rate.
        seed: of the corruption noise, which is a function of (seed, step, rank, row).
        compile: run the networks through `torch.compile` while they train.
    """

    stage: ClassVar[Stage]

    def __init__(
        self,
        optimizer: OptimizerCallable = MuonAdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.seed = seed
        self.compile_networks = compile

    @abstractmethod
    def trained_networks(self) -> Iterable[nn.Module]:
        """The networks this stage trains: those that are compiled."""

    @abstractmethod
    def network_configs(self) -> dict[str, Any]:
        """Plain data that rebuilds the networks; saved in the checkpoint."""

    @abstractmethod
    def pipeline(self, codec: TextCodec) -> CrocodilPipeline:
        """What can be sampled from at this stage, sharing the module's networks."""

    @abstractmethod
    def evaluate(self, batch: Batch, noise: RowNoise) -> dict[str, Tensor]:
        """Scalar figures of one held-out batch, `loss` among them."""

    def on_fit_start(self) -> None:
        """Compiles the networks."""
        if self.compile_networks:
            for network in self.trained_networks():
                network.compile()

    def configure_optimizers(self) -> Any:
        """Builds the optimizer over the trainable parameters, and the schedule that steps with it."""
        optimizer = self.optimizer(parameter_groups(self))
        if self.lr_scheduler is None:
            return optimizer
        scheduler = {"scheduler": self.lr_scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def training_noise(self, batch: Batch) -> RowNoise:
        """The noise of this step: the same again whenever the run is repeated or resumed."""
        return self._noise(batch, self.trainer.fit_loop.total_batch_idx + 1)

    def held_out_noise(self, batch: Batch, batch_idx: int) -> RowNoise:
        """The noise of a held-out batch: the same at every evaluation, so that curves are comparable."""
        return self._noise(batch, -1 - batch_idx)

    def _noise(self, batch: Batch, step: int) -> RowNoise:
        rows = torch.arange(batch["token_ids"].shape[0], device=batch["token_ids"].device)
        seed = torch.full_like(rows, self.seed)  # a tensor, so that large seeds wrap around
        return RowNoise(((seed * 1_000_003 + step) * 4099 + self.global_rank) * 65_537 + rows)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs the held-out figures as `val_*`."""
        self._log_figures("val", batch, batch_idx)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs the held-out figures as `test_*`."""
        self._log_figures("test", batch, batch_idx)

    def _log_figures(self, prefix: str, batch: Batch, batch_idx: int) -> None:
        with torch.compiler.set_stance("force_eager"):  # a last, smaller batch must not compile anew
            figures = self.evaluate(batch, self.held_out_noise(batch, batch_idx))
        for name, value in figures.items():
            self.log(
                f"{prefix}_{name}",
                value,
                prog_bar=name == "loss",
                sync_dist=True,
                batch_size=batch["token_ids"].shape[0],
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what the next stage needs: the stage's name, the networks' settings and the text codec."""
        codec = getattr(getattr(self.trainer, "datamodule", None), "codec", None)
        checkpoint[RECORD_KEY] = stage_record(self.stage, self.network_configs(), codec)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses to go on from another stage's checkpoint."""
        check_stage(checkpoint.get(RECORD_KEY), self.stage, "--ckpt_path")

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Steps the schedule (Lightning's default, which refuses schedules of unknown classes)."""
        scheduler.step()

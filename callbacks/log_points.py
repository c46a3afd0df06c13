"""What callbacks share that collect figures in every step and write them now and then."""

from abc import abstractmethod
from typing import Any

import lightning as L
import torch
from torch import Tensor, distributed

from crocodil.ranks import rank_and_size


class AtLogPoints(L.Callback):
    """Collects in every step, on the device and without waiting for it, and writes at the Trainer's log points.

    A log point is an optimizer step whose number is a multiple of `Trainer.log_every_n_steps`. The figures go straight
    to the loggers: one that is missing this time is not repeated from the last, as `LightningModule.log` would do it.
    """

    _step = 0

    @abstractmethod
    def collect(self, trainer: L.Trainer, outputs: Any, batch: dict[str, Tensor]) -> None:
        """Takes in a batch.

        Args:
            trainer: that runs.
            outputs: what `training_step` returned.
            batch: on the device.
        """

    @abstractmethod
    def figures(self, trainer: L.Trainer) -> dict[str, float]:
        """The figures since the last log point; all processes ask for them at the same time."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes where training starts."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collects, and writes at log points."""
        self.collect(trainer, outputs, batch)
        if trainer.global_step == self._step:  # gradients are still being summed
            return
        self._step = trainer.global_step
        if is_log_point(trainer):
            figures = self.figures(trainer)
            for logger in trainer.loggers if figures else ():
                logger.log_metrics(figures, step=self._step - 1)  # Lightning counts the steps of its axis from 0


def steps_between_log_points(trainer: L.Trainer) -> int:
    """`Trainer.log_every_n_steps`; 0 if there are no log points."""
    return trainer.log_every_n_steps  # type: ignore[attr-defined] # Lightning sets it outside the class


def is_log_point(trainer: L.Trainer) -> bool:
    """Whether the optimizer steps done so far end at a log point."""
    every = steps_between_log_points(trainer)
    return every > 0 and trainer.global_step % every == 0


@torch.no_grad()
def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of `value` over all processes, which must all call this.

    Args:
        value: of any shape, the same everywhere; it is left as it is.
    """
    total = value.clone()
    if rank_and_size()[1] > 1:
        distributed.all_reduce(total)
    return total

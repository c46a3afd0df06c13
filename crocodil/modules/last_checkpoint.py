"""The checkpoint a run goes on from: written every few steps, after the last one, and when the run is asked to stop."""

import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class LastCheckpoint(ModelCheckpoint):
    """Writes `last.ckpt` every few optimizer steps and after the last one; the one before it becomes `previous.ckpt`.

    At SIGTERM, SIGUSR1 or Ctrl-C it writes it after the step and ends the run with status 128 + signal. A signal to any
    process of the run stops all of them after the same step. Within a validation the run ends at once if the step is
    saved already, else after the next step. A second Ctrl-C ends it without a checkpoint.

    Lightning's own handlers are replaced while a run trains: the one for SIGTERM calls a collective operation from
    within the handler, where other processes may be in another one, and ends with status 0; the one for SLURM's signal
    saves in the middle of a step.

    Args:
        dirpath: folder of the checkpoints.
        every_n_train_steps: optimizer steps from one to the next.

    Raises:
        ValueError: if the number of steps is below 1.
    """

    def __init__(self, dirpath: str, every_n_train_steps: int) -> None:
        if every_n_train_steps < 1:
            raise ValueError(f"every_n_train_steps must be at least 1, got {every_n_train_steps}")
        super().__init__(dirpath, save_top_k=0, save_last=True, every_n_train_steps=every_n_train_steps)
        self.every_n_train_steps = every_n_train_steps
        self.received: int | None = None
        self._step = 0
        self._saved_step: int | None = None

    @property
    def path(self) -> Path:
        """Of the newest checkpoint."""
        return Path(self.format_checkpoint_name({}, self.CHECKPOINT_NAME_LAST))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes the signals over; when the run ends, the Trainer puts back all handlers that it found."""
        self._step = trainer.global_step
        if threading.current_thread() is threading.main_thread():  # the only one that may
            for number in SIGNALS:
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves, and stops, if it is time to; between the batches of one optimizer step nothing can be saved."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        is_asked = self._is_asked_to(trainer)
        is_due = self._step % self.every_n_train_steps == 0 or self._step == trainer.max_steps
        if is_asked or is_due:
            self._save(trainer)
        if is_asked:
            self._stop(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Stops, if asked to and the step is saved already."""
        if trainer.state.fn == "fit" and self._saved_step == trainer.global_step and self._is_asked_to(trainer):
            self._stop(trainer)

    def _is_asked_to(self, trainer: L.Trainer) -> bool:
        """Whether any process was: all must know of it at the same step, or they would wait for each other."""
        if trainer.received_sigterm and self.received is None:  # before the handler was ours
            self.received = signal.SIGTERM
        return trainer.strategy.reduce_boolean_decision(self.received is not None, all=False)

    def _stop(self, trainer: L.Trainer) -> None:
        number = signal.Signals(self.received or signal.SIGTERM)
        if trainer.is_global_zero:
            sentence = f"stopped by {number.name} after step {self._step}, saved in {self.path}"
            print(f"\ncrocodil: {sentence}; the same command goes on from there", file=sys.stderr)
        raise SIGTERMException(128 + number)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the last step of a run that ends by epochs or by another callback."""
        if self._saved_step != trainer.global_step:
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.path)
        self._saved_step = trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        """Nothing: a run whose folder was moved goes on as any other."""
        return {}

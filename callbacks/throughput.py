"""How fast a run trains, and what it waits for."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import lightning as L
import torch
from crocodil_callbacks.log_points import AtLogPoints, is_log_point, sum_over_ranks
from lightning.fabric.utilities.throughput import get_available_flops
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from crocodil.planner.meter import FLOP_FORMULAS

_DTYPES = {"bf16": torch.bfloat16, "16": torch.float16, "32": torch.float32, "64": torch.float64}


class Throughput(AtLogPoints):
    """Speed of training since the last log point, by the wall clock; validation and checkpoints are left out.

    - `tokens_per_second`, `texts_per_second`: of all processes. Padding is not counted; where a batch has no
      `document_ids`, nothing is padding and a row is a text.
    - `padding_share`: of the positions of a batch.
    - `step_seconds`: of an optimizer step, all batches that are summed for it.
    - `data_wait_share`: share of the time between the end of a batch and the start of the next. On a GPU, where the
      host runs ahead, an upper bound of what the device waits.
    - `flop_utilisation`: floating-point operations of the forward and backward passes over what the devices could do at
      their peak (MFU; recomputation of gradient checkpointing is not counted). They are counted, operator by operator,
      in the first half of the warm-up steps, which run uncompiled, and taken to be the same for each position of
      later batches. Left out where the peak is not known.

    The device is waited for at log points, and where a validation or a checkpoint begins.

    Args:
        warmup_steps: first optimizer steps of a run, which are left out: libraries and the compiler get ready.
        peak_flops: of one device, a second, in the precision of the run; None takes Lightning's table of devices.
        clock: tells the time in seconds.

    Raises:
        ValueError: if `warmup_steps` or `peak_flops` is below 1.
    """

    def __init__(
        self, warmup_steps: int = 10, peak_flops: float | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        if warmup_steps < 1:
            raise ValueError(f"warmup_steps must be at least 1, got {warmup_steps}")
        if peak_flops is not None and peak_flops < 1:
            raise ValueError(f"peak_flops must be at least 1, got {peak_flops}")
        self.warmup_steps = warmup_steps
        self.peak_flops = peak_flops
        self._clock = clock
        self._counter: _FlopCounter | None = None
        self._mark: float | None = None  # until when time is counted; None where there is none to count
        self._start()

    def _start(self) -> None:
        """Begins anew to count."""
        self._seconds = self._waited = 0.0
        self._steps = self._positions = 0
        self._counts: Tensor | None = None  # (2,): tokens and texts of this process

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Looks the peak of the device up."""
        super().on_train_start(trainer, pl_module)
        self._first_step = trainer.global_step
        self._mark = None
        dtype = _DTYPES.get(trainer.precision.split("-")[0])
        self._peak = self.peak_flops
        if self._peak is None and dtype is not None:
            self._peak = get_available_flops(pl_module.device, dtype)
        self._counter = _FlopCounter() if self._peak else None

    def _lap(self) -> float:
        """Counts the time since the last call, and returns it."""
        now = self._clock()
        passed = 0.0 if self._mark is None else now - self._mark
        self._mark = now
        self._seconds += passed
        return passed

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The data is there."""
        self._waited += self._lap()
        if self._counter and trainer.global_step - self._first_step < (self.warmup_steps + 1) // 2:
            self._counter.start(batch["token_ids"].numel())

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Tells the counter of FLOPs what comes."""
        if self._counter:
            self._counter.is_backward = True

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The optimizer's FLOPs are not the model's."""
        if self._counter:
            self._counter.stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leaves no counter behind."""
        if self._counter:
            self._counter.stop()

    def collect(self, trainer: L.Trainer, outputs: Any, batch: dict[str, Tensor]) -> None:
        """Counts a batch, and waits for the device where a figure begins or ends."""
        counts = count_tokens_and_texts(batch)
        self._counts = counts if self._counts is None else self._counts + counts
        self._positions += batch["token_ids"].numel()
        ends_step = trainer.global_step != self._step
        self._steps += ends_step
        is_warm = trainer.global_step - self._first_step == self.warmup_steps
        if ends_step and (is_warm or is_log_point(trainer)):
            _wait_for(trainer.strategy.root_device)
        self._lap()
        if ends_step and is_warm:
            self._start()

    def figures(self, trainer: L.Trainer) -> dict[str, float]:
        """See the class; nothing before the warm-up is over."""
        if trainer.global_step - self._first_step <= self.warmup_steps:
            return {}
        assert self._counts is not None
        own = torch.cat([self._counts, self._counts.new_full((1,), self._positions)])
        tokens, texts, positions = sum_over_ranks(own).tolist()
        found = {
            "tokens_per_second": tokens / self._seconds,
            "texts_per_second": texts / self._seconds,
            "padding_share": 1 - tokens / positions,
            "step_seconds": self._seconds / self._steps,
            "data_wait_share": self._waited / self._seconds,
        }
        if self._counter and self._peak:
            flops = self._counter.flops_per_position * positions
            found["flop_utilisation"] = flops / self._seconds / (self._peak * trainer.world_size)
        self._start()
        return found

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """No training until the next batch."""
        self._pause(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """No training until the next batch."""
        self._pause(trainer)

    def _pause(self, trainer: L.Trainer) -> None:
        if self._mark is not None:
            _wait_for(trainer.strategy.root_device)
            self._lap()
            self._mark = None


class _FlopCounter(TorchDispatchMode):
    """Counts floating-point operations between `start` and `stop`, those of a recomputation left out."""

    def __init__(self) -> None:
        super().__init__()
        self.is_backward = False
        self._flops = self._positions = 0
        self._entered = ExitStack()

    @property
    def flops_per_position(self) -> float:
        """Mean over all that was counted."""
        return self._flops / self._positions

    def start(self, num_positions: int) -> None:
        """Counts the batch to come, of this many positions."""
        self.is_backward = False
        self._positions += num_positions
        # Eager: what the compiler meets inside a mode as this one, it would never compile later on.
        self._entered.enter_context(torch.compiler.set_stance("force_eager"))
        self._entered.enter_context(self)

    def stop(self) -> None:
        """Ends it, if it goes on."""
        self._entered.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        is_repeated = self.is_backward and torch.is_grad_enabled()  # as only a recomputation has it
        if not is_repeated and (formula := FLOP_FORMULAS.get(func.overloadpacket)):
            self._flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


def count_tokens_and_texts(batch: dict[str, Tensor]) -> Tensor:
    """How many tokens and how many texts a batch holds, (2,) int64 on its device.

    Args:
        batch: "token_ids" (B, L) int64, and perhaps "document_ids" (B, L) int64, on any device, 0 at padding and n at
            the n-th text of its row; without them all tokens count, and a row is a text.
    """
    documents = batch.get("document_ids")
    if documents is None:
        token_ids = batch["token_ids"]
        return torch.stack([token_ids.new_full((), count) for count in (token_ids.numel(), len(token_ids))])
    counts = torch.stack([(documents > 0).sum(), documents.amax(1).sum()])
    return counts.to(batch["token_ids"].device, non_blocking=True)


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)

"""An end to training before a loss or a gradient that is not finite gets anywhere."""

import math
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

import lightning as L
import torch
from crocodil_callbacks.gradient_norm import gradient_norm
from crocodil_callbacks.log_points import sum_over_ranks
from lightning.pytorch.plugins import MixedPrecision
from safetensors.torch import save_file
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from crocodil.ranks import rank_and_size

MAX_NAMED = 8
_INPUTS = ("token_ids", "document_ids", "origins")


class StopAtNonFinite(L.Callback):
    """Ends training with a FloatingPointError at the first loss, or gradient norm, that is infinite or not a number.

    The error tells the step, the loss, which texts have no finite loss of their own, and the largest weight; the batch
    of each process is written to `nonfinite-step-N.safetensors` in the log folder (`-rankR` is added where there are
    several). All processes decide together.

    What is guaranteed, on any device and over any number of processes:

    - A step whose loss is not finite changes neither weights nor optimizer state nor buffers that are saved.
    - No checkpoint is written from the bad step on; the last one is as good as it was.
    - A finite loss with a gradient that is not finite: likewise on a CPU. On a GPU the norm is not waited for before
      the update is queued, so the weights in memory may be spoilt by then; no checkpoint is.

    The device is never drained: the host waits for the loss while the backward pass is queued, and for the norm while
    the update is. Under float16 a gradient that is not finite is left to the scaler, which skips the step.
    """

    def __init__(self) -> None:
        self._step = 0  # the one that goes on, counted from 1
        self._error: FloatingPointError | None = None
        self._buffers: list[Tensor] = []
        self._saved: list[Tensor] = []
        self._losses: _OnItsWay | None = None
        self._norm: _OnItsWay | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Finds the buffers that belong to the checkpoint."""
        self._step = 0
        kept = pl_module.state_dict().keys()
        self._buffers = [b for name, b in pl_module.named_buffers() if name in kept and b.is_floating_point()]
        self._saved = [buffer.clone() for buffer in self._buffers]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the buffers, which forward passes may change, where a step begins."""
        self._losses = self._norm = None
        if self._step == trainer.global_step + 1:
            return
        self._step = trainer.global_step + 1
        for saved, buffer in zip(self._saved, self._buffers, strict=True):
            saved.copy_(buffer)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Sends the losses of all processes on their way to the host."""
        self._losses = _OnItsWay(gather_scalars(loss))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Takes the gradients away from the optimizer if the loss is not finite; without them it does nothing."""
        precision = trainer.precision_plugin
        if not isinstance(precision, MixedPrecision) or precision.scaler is None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            self._norm = _OnItsWay(gradient_norm(parameters, pl_module.device))
        if self._is_bad(wait_for_norm=False):
            optimizer.zero_grad(set_to_none=True)

    def _is_bad(self, wait_for_norm: bool) -> bool:
        values = self._losses.values() if self._losses else []
        if self._norm and (wait_for_norm or self._norm.has_arrived()):
            values = values + self._norm.values()
        return not all(map(math.isfinite, values))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops; callbacks that save checkpoints come after all others.

        Raises:
            FloatingPointError: if the loss or the gradient norm is not finite.
        """
        if not self._is_bad(wait_for_norm=True):
            return
        for saved, buffer in zip(self._saved, self._buffers, strict=True):
            buffer.copy_(saved)
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # a broadcast: all processes ask
        path = write_batch(folder, self._step, trainer.fit_loop.total_batch_idx, batch)
        if trainer.world_size > 1:
            path = path.with_stem(path.stem.replace(f"-rank{trainer.global_rank}", "-rank*"))
        texts = gather_texts(_describe(trainer, batch, bad_rows(outputs, batch)))
        self._error = FloatingPointError(self._sentence(trainer, pl_module, texts, path))
        raise self._error

    def _sentence(self, trainer: L.Trainer, module: L.LightningModule, texts: list[str], path: Path) -> str:
        named = ", ".join(texts[:MAX_NAMED]) + (f" and {len(texts) - MAX_NAMED} more" if texts[MAX_NAMED:] else "")
        return (
            f"training stopped at step {self._step}: {self._what_is_bad(trainer.accumulate_grad_batches)}; texts "
            f"without a finite loss: {named or 'none known'}; the largest weight is {largest_weight(module):.4g}. The "
            f"batch is in {path}, and the last checkpoint is as it was: look at these texts, or go on from it with "
            "--ckpt_path and a lower learning rate, gradient clipping or a higher precision"
        )

    def _what_is_bad(self, scale: int) -> str:
        """The losses, by which Lightning's division through the number of summed batches is undone, or the norm."""
        assert self._losses is not None
        losses = [value * scale for value in self._losses.values()]
        bad = {rank: value for rank, value in enumerate(losses) if not math.isfinite(value)}
        if not bad:
            assert self._norm is not None
            return f"the loss is {fmean(losses):.4g}, but the gradient norm is {self._norm.values()[0]}"
        where = f" in process {', '.join(map(str, bad))}" if len(losses) > 1 else ""
        return f"the loss is {next(iter(bad.values()))}{where}"

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuses to save after the stop.

        Raises:
            FloatingPointError: the one that training stopped with.
        """
        if self._error is not None:
            raise self._error


class _OnItsWay:
    """A small tensor that is copied to the host; the device goes on with what is queued behind it."""

    def __init__(self, value: Tensor) -> None:
        value = value.detach().float().flatten()
        self._event = None
        if value.is_cuda:
            self._host = torch.empty(value.shape, pin_memory=True).copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = value.cpu()

    def has_arrived(self) -> bool:
        """Whether `values` would not wait."""
        return self._event is None or self._event.query()

    def values(self) -> list[float]:
        """The numbers, once they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()


@torch.no_grad()
def gather_scalars(value: Tensor) -> Tensor:
    """A number of each process, (number of processes,) float32; the host does not wait for it.

    Args:
        value: scalar.
    """
    rank, size = rank_and_size()
    own = torch.zeros(size, device=value.device)
    own[rank] = value
    return sum_over_ranks(own)


def bad_rows(outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> list[int]:
    """Rows of a batch with a loss that is not finite, as far as `training_step` tells.

    Args:
        outputs: of `training_step`; "masked_nats" or "row_losses", (N,), of the N rows or, row by row, of the N texts
            in them.
        batch: "token_ids" (B, L), and "document_ids" (B, L) where a row has several texts.
    """
    losses = outputs.get("masked_nats", outputs.get("row_losses"))
    if losses is None:
        return []
    rows = torch.arange(len(batch["token_ids"]))
    if len(losses) != len(rows):
        rows = rows.repeat_interleave(batch["document_ids"].amax(1).cpu())
    return rows[~losses.detach().isfinite().cpu()].unique().tolist()


def _describe(trainer: L.Trainer, batch: dict[str, Tensor], rows: list[int]) -> list[str]:
    """What the DataModule calls these rows, or where they are in the batch."""
    rank, size = rank_and_size()
    of_process = f" of process {rank}" if size > 1 else ""
    describe = getattr(getattr(trainer, "datamodule", None), "describe", None)
    if describe is None or "origins" not in batch:
        return [f"row {row}{of_process}" for row in rows]
    return [f"{describe(tuple(batch['origins'][row].tolist()))} (row {row}{of_process})" for row in rows]


def gather_texts(texts: list[str]) -> list[str]:
    """The texts of all processes, in the order of their ranks."""
    size = rank_and_size()[1]
    if size == 1:
        return texts
    found: list[list[str]] = [[]] * size
    distributed.all_gather_object(found, texts)
    return [*chain.from_iterable(found)]


@torch.no_grad()
def largest_weight(module: nn.Module) -> float:
    """The largest absolute value among all trainable parameters, NaN if one is NaN; all processes must call this.

    Args:
        module: sharded or whole.
    """
    local = [p.to_local() if isinstance(p, DTensor) else p for p in module.parameters() if p.requires_grad]
    largest = torch.stack([part.abs().max().float() for part in local if part.numel()]).max()
    return gather_scalars(largest).max().item()


def write_batch(folder: Path, step: int, batch_idx: int, batch: dict[str, Tensor]) -> Path:
    """Writes what a step read to `nonfinite-step-N.safetensors`.

    Args:
        folder: is made if need be.
        step: N, counted from 1.
        batch_idx: of the batch, counted from 0 over the whole run, which the noise of the step depends on.
        batch: the entries token_ids, document_ids and origins are kept.

    Returns:
        The file's path.
    """
    rank, size = rank_and_size()
    path = folder / f"nonfinite-step-{step}{f'-rank{rank}' if size > 1 else ''}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: batch[name].contiguous().cpu() for name in _INPUTS if name in batch}
    save_file(tensors, str(path), metadata={"step": str(step), "batch_idx": str(batch_idx)})
    return path

"""Where on the way from noise to data the training loss comes from."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import lightning as L
import torch
from crocodil_callbacks.log_points import AtLogPoints, sum_over_ranks
from torch import Tensor


@dataclass(frozen=True)
class _Scale:
    """A range of noise levels, and how a part of it is called."""

    pattern: str
    low: float
    high: float

    def position(self, level: Tensor) -> Tensor:
        """Where a level lies in the range: from 0, its lower end, to 1."""
        return (level - self.low) / (self.high - self.low)

    def bin_names(self, num_bins: int) -> list[str]:
        """A name for each of the bins of equal width, made of its two ends."""
        ends = [self.low + (self.high - self.low) * i / num_bins for i in range(num_bins + 1)]
        return [self.pattern.format(*pair) for pair in pairwise(ends)]


_MASK_RATIO = _Scale("nats_at_mask_{:.3f}-{:.3f}", 0.0, 1.0)


class LossByMaskRatio(AtLogPoints):
    """The training loss by noise level, over all rows of all processes since the last log point.

    Of a demasker, and of an autoencoder, `nats_at_mask_LOW-HIGH`: cross-entropy in nats a masked token of the texts
    whose mask probability lies in [LOW, HIGH). Of a prior, `loss_at_log_snr_LOW_to_HIGH`: the mean loss of the rows
    whose log SNR lies there; what is beyond the range counts to the outermost bins. Empty bins are not logged.

    Args:
        num_bins: of equal width, at least 1.
        log_snr_range: lower end of the first and upper end of the last bin of log SNR.

    Raises:
        ValueError: if there is no bin, the range is empty, or the stage returns no losses by row.
    """

    def __init__(self, num_bins: int = 8, log_snr_range: tuple[float, float] = (-12.0, 8.0)) -> None:
        if num_bins < 1:
            raise ValueError(f"num_bins must be at least 1, got {num_bins}")
        if log_snr_range[0] >= log_snr_range[1]:
            raise ValueError(f"log_snr_range must be (low, high) with low < high, got {tuple(log_snr_range)}")
        self.num_bins = num_bins
        self.log_snr_range = log_snr_range
        self._scale = _MASK_RATIO
        self._sums: Tensor | None = None  # (2, num_bins): losses, and what they are divided by

    def collect(self, trainer: L.Trainer, outputs: Any, batch: dict[str, Tensor]) -> None:
        """Adds the rows of a batch to their bins."""
        if "mask_prob" in outputs:
            self._scale = _MASK_RATIO
            level, losses, weights = (outputs[name] for name in ("mask_prob", "masked_nats", "num_masked"))
        elif "log_snr" in outputs:
            self._scale = _Scale("loss_at_log_snr_{:+.1f}_to_{:+.1f}", *self.log_snr_range)
            level, losses = outputs["log_snr"], outputs["row_losses"]
            weights = torch.ones_like(losses)
        else:
            raise ValueError(
                "LossByMaskRatio expects a stage whose training step returns mask_prob or log_snr, got only "
                f"{', '.join(outputs)}: leave the callback out"
            )
        level, weights = (x.to(losses.device, losses.dtype, non_blocking=True) for x in (level, weights))
        sums = binned_sums(self._scale.position(level), torch.stack([losses, weights]), self.num_bins)
        self._sums = sums if self._sums is None else self._sums + sums

    def figures(self, trainer: L.Trainer) -> dict[str, float]:
        """Losses of the bins that are not empty."""
        assert self._sums is not None
        sums, self._sums = sum_over_ranks(self._sums), None
        rows = zip(self._scale.bin_names(self.num_bins), *sums.tolist(), strict=True)
        return {name: loss / weight for name, loss, weight in rows if weight}


@torch.no_grad()
def binned_sums(position: Tensor, values: Tensor, num_bins: int) -> Tensor:
    """Sums of values by bins of equal width.

    Args:
        position: (N,) float, from 0, the lower end of the first bin, to 1, the upper end of the last; what is beyond
            counts to the outermost bins.
        values: (M, N) float.
        num_bins: number of bins.

    Returns:
        (M, num_bins) float32.
    """
    index = (position * num_bins).long().clamp(0, num_bins - 1)
    zeros = torch.zeros((values.shape[0], num_bins), device=values.device)
    return zeros.index_add(1, index, values.float())

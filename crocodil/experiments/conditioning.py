"""Does the sketch tell the demasker what is masked (the paper's figure 4)?"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crocodil.diffusion.noise import RowNoise
from crocodil.evaluation.masked_prediction import MASK_RATIOS, MaskedPrediction
from crocodil.experiments.cells import Ledger, Row, share_of, with_bar
from crocodil.pipeline import CrocodilPipeline


@dataclass(frozen=True)
class ConditioningCell:
    """The base or the demasker, and how many true registers it reads; 0 for none."""

    system: str
    num_registers: int


class Conditioning:
    """Cross-entropy and top-1 accuracy at masked tokens against the mask ratio, for several numbers of registers.

    All see the same masks. Every process asks about its share of the texts; the masks of a text depend on its place
    alone.

    Args:
        pipeline: with an encoder; its base is asked too, if it has one.
        held_out: (M, L) int64, texts no network was trained on.
        register_counts: numbers k of true registers, the first k of K; 0, the demasker without, is always asked.
        mask_ratios: in (0, 1].
        num_texts: how many of the texts; None for all.
        batch_size: texts at once.
        seed: of the masks.

    Raises:
        ValueError: if the pipeline has no encoder, or a number of registers is not between 0 and K.
    """

    def __init__(
        self,
        pipeline: CrocodilPipeline,
        held_out: Tensor,
        register_counts: Sequence[int] | None = None,
        mask_ratios: Sequence[float] = MASK_RATIOS,
        num_texts: int | None = None,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        if pipeline.encoder is None:
            raise ValueError("conditioning needs true latents, but this pipeline has no encoder: export an autoencoder")
        most = pipeline.encoder.num_registers
        counts = [most] if register_counts is None else list(register_counts)
        if not all(0 <= count <= most for count in counts):
            raise ValueError(f"register_counts must be between 0 and the trained {most}, got {counts}")
        if not all(0 < ratio <= 1 for ratio in mask_ratios):
            raise ValueError(f"mask_ratios must be above 0 and at most 1, got {list(mask_ratios)}")
        self.pipeline, self.held_out = pipeline, held_out[:num_texts]
        self.register_counts = sorted({0, *counts}, reverse=True)
        self.mask_ratios, self.batch_size, self.seed = tuple(mask_ratios), batch_size, seed

    @property
    def cells(self) -> list[ConditioningCell]:
        """The demasker with falling numbers of registers, then the base."""
        base = [] if self.pipeline.base is None else [ConditioningCell("base", 0)]
        return [*(ConditioningCell("demasker", count) for count in self.register_counts), *base]

    def rows(self, ledger: Ledger) -> list[Row]:
        """One row for each cell and mask ratio.

        Args:
            ledger: keeps finished cells.
        """
        found = []
        for cell in with_bar(self.cells, "conditioning"):
            curve = ledger.row(cell, lambda cell=cell: self.measure(cell))  # type: ignore[misc]
            for i, ratio in enumerate(self.mask_ratios):
                settings = {"system": cell.system, "num_registers": cell.num_registers, "mask_ratio": ratio}
                found.append(settings | {name: values[i] for name, values in curve.items()})
        return found

    @torch.no_grad()
    def measure(self, cell: ConditioningCell) -> Row:
        """The curve of a cell: one list for each figure."""
        network = self.pipeline.base if cell.system == "base" else self.pipeline.demasker
        assert network is not None and self.pipeline.encoder is not None
        metric = MaskedPrediction(self.mask_ratios).to(self.pipeline.device)
        for places in torch.tensor(list(share_of(len(self.held_out)))).split(self.batch_size):
            token_ids = self.held_out[places].to(self.pipeline.device)
            latents = None
            if cell.num_registers:
                latents = self.pipeline.encoder(token_ids)[:, : cell.num_registers]
            metric.update(network, token_ids, latents, RowNoise((self.seed << 32) + places))
        return {name: values.tolist() for name, values in metric.compute().items()}

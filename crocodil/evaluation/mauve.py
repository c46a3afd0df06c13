"""MAUVE between what was written and the data, in a judge's features."""

import warnings
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from crocodil.evaluation.judge import Judge


class Mauve(Metric):
    """MAUVE (arXiv 2102.01454) by the library `mauve-text`, over several seeds of its k-means, in (0, 1].

    Features are the judge's last hidden state at the last token of a text, as in the library. The value moves by .005
    to .01 with the seed of k-means alone, and depends on the number of texts, the features and the longest text:
    quote all of them, and the value of data against data.

    Args:
        judge: the causal language model.
        reference: (M, H) float, features of the data (`Judgement.last_states`).
        seeds: of k-means.

    Raises:
        ValueError: if the library is not installed.
    """

    features: list[Tensor]

    def __init__(self, judge: Judge, reference: Tensor, seeds: Sequence[int] = (0, 1, 2, 3, 4), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        try:
            from mauve import compute_mauve
        except ImportError as error:
            raise ValueError("Mauve needs mauve-text; install it with pip install 'crocodil[eval]'") from error
        self._compute_mauve = compute_mauve
        self.judge = judge
        self.reference = reference
        self.seeds = tuple(seeds)
        self.add_state("features", [], dist_reduce_fx="cat")

    def update(self, texts: Sequence[str], token_ids: Tensor | None = None) -> None:
        """Adds texts; arguments as of `Judge.read`."""
        self.features.append(self.judge.read(texts, token_ids).last_states.to(self.device))

    def compute(self) -> dict[str, Tensor]:
        """`mauve`, the mean over the seeds, and `mauve_kmeans_std`, their standard deviation."""
        features = dim_zero_cat(self.features).cpu()
        # Rows in a fixed order: k-means depends on it, and processes deliver theirs in turn.
        ours = features[torch.argsort(features[:, 0], stable=True)].double().numpy()
        data = self.reference.cpu().double().numpy()
        values = [self._once(data, ours, seed) for seed in self.seeds]
        spread = stdev(values) if len(values) > 1 else float("nan")
        return {"mauve": torch.tensor(fmean(values)).double(), "mauve_kmeans_std": torch.tensor(spread).double()}

    def _once(self, data: Any, ours: Any, seed: int) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # faiss would like more points; the docs tell how many a value needs
            return float(self._compute_mauve(data, ours, device_id=-1, seed=seed, verbose=False).mauve)

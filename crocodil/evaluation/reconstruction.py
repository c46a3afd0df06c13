"""How close a text written from its registers comes to the original."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.text import BERTScore

from crocodil.evaluation.ends import tokens_through_eos


class CharErrorRate(Metric):
    """Levenshtein distance in characters over the characters of the references, all texts together; 0 is exact.

    It can exceed 1. Renamed identifiers and other spacing count as errors, though the program may be the same.
    """

    errors: Tensor
    num_chars: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("errors", "num_chars"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, texts: Sequence[str], reference_texts: Sequence[str]) -> None:
        """Adds texts and what they should be."""
        pairs = zip(texts, reference_texts, strict=True)
        self.errors += sum(Levenshtein.distance(text, reference) for text, reference in pairs)
        self.num_chars += sum(map(len, reference_texts))

    def compute(self) -> dict[str, Tensor]:
        """`cer`; infinite or NaN if all references are empty."""
        return {"cer": self.errors.double() / self.num_chars}


class TokenAccuracy(Metric):
    """Share of tokens that are the reference's at the same place, in [0, 1].

    Places behind the reference's first end token do not count: padding is no achievement. The start token does not
    either. One token inserted early makes all that follows wrong.

    Args:
        eos_token_id: what ends a text.
    """

    hits: Tensor
    num_tokens: Tensor

    def __init__(self, eos_token_id: int | Sequence[int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.eos_token_id = eos_token_id
        for name in ("hits", "num_tokens"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, token_ids: Tensor, reference_ids: Tensor) -> None:
        """Adds texts and what they should be, both (N, L) int64."""
        counted = tokens_through_eos(reference_ids, self.eos_token_id)[:, 1:]
        self.hits += ((token_ids == reference_ids)[:, 1:] & counted).sum()
        self.num_tokens += counted.sum()

    def compute(self) -> dict[str, Tensor]:
        """`token_accuracy`."""
        return {"token_accuracy": self.hits.double() / self.num_tokens}


class CodeBertScore(Metric):
    """CodeBERTScore (arXiv 2302.05527): BERTScore, by torchmetrics, with contextual embeddings of a model of code.

    Args:
        model: an encoder of transformers, name or folder, such as `neulab/codebert-python`; names the figure.
        num_layers: hidden layer whose states are compared; None takes the last.
        max_length: tokens of a text that are read; what is behind is ignored.

    Raises:
        ValueError: if there is no such model.
    """

    def __init__(self, model: str | Path, num_layers: int | None = None, max_length: int = 512, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        try:
            self.score = BERTScore(str(model), num_layers=num_layers, max_length=max_length, truncation=True)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"expected a model of code for CodeBERTScore, but {model} is none: {reason}") from error

    def update(self, texts: Sequence[str], reference_texts: Sequence[str]) -> None:
        """Adds texts and what they should be."""
        self.score.update(list(texts), list(reference_texts))

    def compute(self) -> dict[str, Tensor]:
        """`codebertscore`, the F1 averaged over texts."""
        return {"codebertscore": torch.as_tensor(self.score.compute()["f1"]).double().mean()}

    def reset(self) -> None:
        """Forgets all texts."""
        super().reset()
        self.score.reset()

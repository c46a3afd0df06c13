"""Writes what `predict_step` returns as JSON lines."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor


class JsonLinesWriter(BasePredictionWriter):
    """One JSON object a text: its text, its token ids, and whatever else the stage's `predict_step` returns.

    Fields that end in `token_ids` are also decoded by the DataModule's codec: `token_ids` as `text`,
    `source_token_ids` as `source_text`.

    Args:
        output: the file, written anew by each run; processes beyond the first add their rank to the name.
    """

    def __init__(self, output: str = "predictions.jsonl") -> None:
        super().__init__(write_interval="batch")
        self.output = Path(output)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts an empty file."""
        if trainer.world_size > 1:
            self.output = self.output.with_stem(f"{self.output.stem}-rank{trainer.global_rank}")
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.output.write_text("")

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Appends the rows of a batch."""
        codec = trainer.datamodule.codec  # type: ignore[attr-defined]
        fields: dict[str, Tensor] = {name: value.cpu() for name, value in prediction.items()}
        with self.output.open("a") as file:
            for i in range(len(fields["token_ids"])):
                row: dict[str, Any] = {}
                for name, values in fields.items():
                    if name.endswith("token_ids"):
                        row[name.replace("token_ids", "text")] = codec.decode(values[i])
                    row[name] = values[i].tolist()
                file.write(json.dumps(row) + "\n")

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Says where the texts are."""
        print(f"texts written to {self.output}")

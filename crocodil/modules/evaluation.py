"""What the evaluations share: a pipeline, a judge, held-out texts, finished cells, and where tables go."""

from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Protocol

import lightning as L

from crocodil.data.block_datamodule import BlockDataModule
from crocodil.data.corpora import Split
from crocodil.evaluation.judge import Judge
from crocodil.evaluation.machine import machine
from crocodil.experiments.cells import Ledger, Row, array_fingerprint, fingerprint
from crocodil.models.pretrained import named_dtype
from crocodil.output import check_writable
from crocodil.pipeline import CrocodilPipeline


class Experiment(Protocol):
    """A grid of cells."""

    def rows(self, ledger: Ledger) -> list[Row]:
        """Measures the cells that the ledger lacks; the rows of all, in order."""
        ...


class EvaluationModule(L.LightningModule):
    """Base class of the evaluations: a pipeline, a judge, held-out texts, and a folder for what comes out.

    Finished cells are kept in `cells/`; started again, even after a kill, the evaluation goes on with the others.

    Args:
        pipeline: folder written by `crocodil export`; adapters in it are used.
        options: of the experiment.
        judge: name or folder of a causal language model, such as one written by `crocodil export --judge`.
        score_end: whether the judge counts end tokens; see `Judge`.
        dtype: of the networks, such as "bfloat16"; None keeps the pipeline's.
        batch_size: texts at once on each process.
        output_dir: where tables and page go; None for the Trainer's `default_root_dir`.
    """

    stage: ClassVar[str] = "evaluation"
    name: ClassVar[str]
    splits: ClassVar[tuple[Split, ...]] = ("test",)
    """Texts that the rows depend on."""
    shared: ClassVar[tuple[str, ...]]
    """Options that all rows share: those that the cells do not hold."""

    def __init__(
        self,
        pipeline: str,
        options: dict[str, Any],
        judge: str | None,
        score_end: bool,
        dtype: str | None,
        batch_size: int,
        output_dir: str | None,
    ) -> None:
        super().__init__()
        self.folder = pipeline
        self.system = CrocodilPipeline.from_pretrained(pipeline).to("cpu", named_dtype(dtype))
        self.judge = None if judge is None else Judge.from_pretrained(judge, self.system.codec, score_end)
        self.judge_folder, self.score_end = judge, score_end
        self.dtype_name = dtype
        self.options = options | {"batch_size": batch_size}
        self.output_dir = output_dir

    @abstractmethod
    def experiment(self, data: BlockDataModule) -> Experiment:
        """What is measured."""

    @abstractmethod
    def write(self, folder: Path, rows: list[Row], context: dict[str, Any]) -> Path:
        """Writes tables and page; the path of the page."""

    def on_test_start(self) -> None:
        """Runs the evaluation.

        It deals texts out itself: Lightning's loop repeats some to give every process as many, which would count twice.
        """
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        folder = Path(self.output_dir or self.trainer.default_root_dir)
        check_writable(folder)
        if self.system.codec.to_state() != data.codec.to_state():
            raise ValueError(f"{self.folder} was trained with another tokenizer than the data given: use its own data")
        self.system.to(self.device)
        if self.judge is not None:
            self.judge.to(self.device)
        is_first = self.trainer.is_global_zero
        rows = self.experiment(data).rows(Ledger(folder / "cells", self.name, self.source(data) if is_first else {}))
        if is_first:
            print(f"tables and page: {self.write(folder, rows, self.context(data))}")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing is left to do once the evaluation has run."""

    @property
    def settings(self) -> dict[str, Any]:
        """The options that all rows share."""
        return {name: self.options[name] for name in self.shared}

    def source(self, data: BlockDataModule) -> dict[str, Any]:
        """What the rows belong to: these weights, this judge, these texts and settings."""
        judge = self.judge_folder
        return {
            "system": fingerprint(self.folder),
            "judge": fingerprint(judge) if judge and Path(judge).is_dir() else judge,
            "score_end": self.score_end,
            "dtype": self.dtype_name,
            "texts": [array_fingerprint(data.array(split)) for split in self.splits],
            **self.settings,
        }

    def context(self, data: BlockDataModule) -> dict[str, Any]:
        """What a reader must know of every row."""
        return {
            "pipeline": self.folder,
            "judge": self.judge_folder,
            "judge_scores_end": self.score_end,
            "dtype": str(next(self.system.demasker.parameters()).dtype).removeprefix("torch."),
            "data": type(data).__name__,
            "length": data.length,
            "processes": self.trainer.world_size,
            **self.settings,
            **{f"machine: {key}": value for key, value in machine().items()},
        }

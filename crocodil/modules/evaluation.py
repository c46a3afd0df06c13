"""`crocodil test --config lightning_configs/eval_*.yaml`: the paper's tables and curves on a pipeline."""

from abc import abstractmethod
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch

from crocodil.data.block_datamodule import BlockDataModule
from crocodil.evaluation import report
from crocodil.evaluation.judge import Judge
from crocodil.evaluation.machine import machine
from crocodil.evaluation.masked_prediction import MASK_RATIOS
from crocodil.evaluation.tables import write_tables
from crocodil.experiments import Conditioning, Generation, Reconstruction, SystemGrid
from crocodil.experiments.cells import Ledger, Row, array_fingerprint, fingerprint
from crocodil.output import check_writable
from crocodil.pipeline import CrocodilPipeline

Dtype = str | None


class EvaluationModule(L.LightningModule):
    """Base class of the evaluations: a pipeline, a judge, held-out texts, and a folder for what comes out.

    Finished cells are kept in `cells/`; started again, even after a kill, the evaluation goes on with the others.

    Args:
        pipeline: folder written by `crocodil export`; adapters in it are used.
        judge: name or folder of a causal language model, such as one written by `crocodil export --judge`.
        score_end: whether the judge counts end tokens; see `Judge`.
        dtype: of the networks, such as "bfloat16"; None keeps the pipeline's.
        batch_size: texts at once on each process.
        output_dir: where tables and page go; None for the Trainer's `default_root_dir`.
    """

    name: str

    def __init__(
        self,
        pipeline: str,
        judge: str | None = None,
        score_end: bool = False,
        dtype: Dtype = None,
        batch_size: int = 64,
        output_dir: str | None = None,
    ) -> None:
        super().__init__()
        self.folder = pipeline
        self.system = CrocodilPipeline.from_pretrained(pipeline)
        self.judge = None if judge is None else Judge.from_pretrained(judge, self.system.codec, score_end)
        self.judge_folder, self.score_end = judge, score_end
        self.dtype_name = dtype
        if dtype is not None:
            for network in self.system.networks().values():
                network.to(getattr(torch, dtype))
        self.batch_size = batch_size
        self.output_dir = output_dir

    @abstractmethod
    def rows(self, data: BlockDataModule) -> list[Row]:
        """Measures what is not measured yet; all rows, in order."""

    @abstractmethod
    def write(self, folder: Path, rows: list[Row], context: dict[str, Any]) -> Path:
        """Writes tables and page; the path of the page."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What rows depend on beside their cells, and a reader must know."""

    def on_test_start(self) -> None:
        """Runs the evaluation.

        It deals texts out itself: Lightning's loop repeats some to give every process as many, which would count twice.
        """
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        folder = Path(self.output_dir or self.trainer.default_root_dir)
        check_writable(folder)
        own, given = self.system.codec.to_state(), data.codec.to_state()
        if own != given:
            raise ValueError(f"{self.folder} was trained with another tokenizer than the data given: use its own data")
        self.system.to(self.device)
        if self.judge is not None:
            self.judge.to(self.device)
        rows = self.rows(data)
        if self.trainer.is_global_zero:
            page = self.write(folder, rows, self.context(data))
            self.print(f"tables and page: {page}")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing is left to do once the evaluation has run."""

    def ledger(self, data: BlockDataModule) -> Ledger:
        """Where finished cells are kept, for these weights, this judge, these texts and settings alone."""
        folder = Path(self.output_dir or self.trainer.default_root_dir) / "cells"
        judge = self.judge_folder and Path(self.judge_folder)
        return Ledger(
            folder,
            self.name,
            {
                "system": fingerprint(self.folder),
                "judge": fingerprint(judge) if judge and judge.is_dir() else self.judge_folder,
                "score_end": self.score_end,
                "dtype": self.dtype_name,
                "texts": array_fingerprint(data.array("test")),
                **self.settings(),
            },
        )

    def context(self, data: BlockDataModule) -> dict[str, Any]:
        """What a reader must know of every row."""
        return {
            "pipeline": self.folder,
            "judge": self.judge_folder,
            "judge_scores_end": self.score_end,
            "dtype": self.dtype_name or str(next(self.system.demasker.parameters()).dtype).removeprefix("torch."),
            "data": type(data).__name__,
            "length": data.length,
            "processes": self.trainer.world_size,
            **self.settings(),
            **{f"machine: {key}": value for key, value in machine().items()},
        }


class GenerationEvaluation(EvaluationModule):
    """Base, ConThenDisc, ConWithinDisc, true latents and data: quality, diversity and cost (the paper's figure 6).

    Args:
        pipeline: see `EvaluationModule`.
        judge: likewise; needed.
        systems: what to compare.
        num_samples: texts of each cell.
        seeds: of the samples.
        lengths: tokens of a text; None for the data's.
        prior_steps: steps of the prior for a first draw.
        refresh_prior_steps: steps of the prior for the later draws of ConWithinDisc.
        timed_batches: batch sizes whose wall-clock is measured apart.
        mauve_seeds: seeds of MAUVE's k-means; none leaves MAUVE out.
        undefined_names: count undefined names.
        copies: look for copies of the training data.
        quality: the measure at which speed-ups are matched: "judge_nll", "parse_rate", "mauve" or "distance".
        score_end: see `EvaluationModule`.
        dtype: likewise.
        batch_size: likewise.
        output_dir: likewise.
    """

    name = "generation"

    def __init__(
        self,
        pipeline: str,
        judge: str,
        systems: list[SystemGrid],
        num_samples: int = 1000,
        seeds: tuple[int, ...] = (0, 1, 2),
        lengths: tuple[int, ...] | None = None,
        prior_steps: int = 32,
        refresh_prior_steps: int = 8,
        timed_batches: tuple[int, ...] = (1, 8, 32),
        mauve_seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
        undefined_names: bool = False,
        copies: bool = True,
        quality: str = "judge_nll",
        score_end: bool = False,
        dtype: Dtype = None,
        batch_size: int = 64,
        output_dir: str | None = None,
    ) -> None:
        super().__init__(pipeline, judge, score_end, dtype, batch_size, output_dir)
        self.systems = systems
        self.copies, self.quality = copies, quality
        self.options: dict[str, Any] = {
            "num_samples": num_samples,
            "seeds": seeds,
            "lengths": lengths,
            "prior_steps": prior_steps,
            "refresh_prior_steps": refresh_prior_steps,
            "timed_batches": timed_batches,
            "mauve_seeds": mauve_seeds,
            "undefined_names": undefined_names,
        }

    def settings(self) -> dict[str, Any]:
        """Everything but the systems, which are in the cells."""
        known = ("num_samples", "prior_steps", "refresh_prior_steps", "mauve_seeds", "undefined_names")
        return {key: self.options[key] for key in known} | {"batch_size": self.batch_size, "copies": self.copies}

    def rows(self, data: BlockDataModule) -> list[Row]:
        """See `Generation.rows`."""
        assert self.judge is not None
        train = data.array("train") if self.copies else None
        table = Generation(
            self.system,
            self.judge,
            data.blocks("test"),
            self.systems,
            train,
            batch_size=self.batch_size,
            **self.options,
        )
        return table.rows(self.ledger(data))

    def write(self, folder: Path, rows: list[Row], context: dict[str, Any]) -> Path:
        """The table of all settings, that of the speed-ups, and the page."""
        context |= {"seeds": self.options["seeds"], "systems": [asdict(grid) for grid in self.systems]}
        return report.write_generation(folder, rows, context, self.quality)


class ReconstructionEvaluation(EvaluationModule):
    """Held-out texts written again from their registers, block length against calls (the paper's table 1).

    Args:
        pipeline: see `EvaluationModule`.
        judge: likewise.
        code_model: name or folder of a model of code for CodeBERTScore; None for no such figure.
        code_model_layer: see `CodeBertScore`.
        block_sizes: see `Reconstruction`.
        num_steps: likewise.
        register_counts: likewise.
        remasking: likewise.
        temperature: likewise.
        num_texts: likewise.
        seeds: likewise.
        score_end: see `EvaluationModule`.
        dtype: likewise.
        batch_size: likewise.
        output_dir: likewise.
    """

    name = "reconstruction"

    def __init__(
        self,
        pipeline: str,
        judge: str | None = None,
        code_model: str | None = None,
        code_model_layer: int | None = None,
        block_sizes: tuple[int | None, ...] = (None,),
        num_steps: tuple[int, ...] = (4, 8, 16, 32, 64),
        register_counts: tuple[int | None, ...] = (None,),
        remasking: str = "low_confidence",
        temperature: float = 0.0,
        num_texts: int | None = 1000,
        seeds: tuple[int, ...] = (0,),
        score_end: bool = False,
        dtype: Dtype = None,
        batch_size: int = 64,
        output_dir: str | None = None,
    ) -> None:
        super().__init__(pipeline, judge, score_end, dtype, batch_size, output_dir)
        self.options: dict[str, Any] = {
            "code_model": code_model,
            "code_model_layer": code_model_layer,
            "block_sizes": block_sizes,
            "num_steps": num_steps,
            "register_counts": register_counts,
            "remasking": remasking,
            "temperature": temperature,
            "num_texts": num_texts,
            "seeds": seeds,
        }

    def settings(self) -> dict[str, Any]:
        """Everything but what is in the cells."""
        return {key: self.options[key] for key in ("code_model", "code_model_layer", "num_texts")}

    def rows(self, data: BlockDataModule) -> list[Row]:
        """See `Reconstruction.rows`."""
        texts = data.blocks("test")
        table = Reconstruction(self.system, texts, self.judge, batch_size=self.batch_size, **self.options)
        return table.rows(self.ledger(data))

    def write(self, folder: Path, rows: list[Row], context: dict[str, Any]) -> Path:
        """The table and the page."""
        columns = [name for name in report.RECONSTRUCTION_COLUMNS if name not in report.RECONSTRUCTION_KEYS]
        write_tables(folder, self.name, rows, report.RECONSTRUCTION_KEYS, [*columns, "seconds_per_sample"], context)
        return report.write_page(folder, context, reconstruction_rows=rows)


class ConditioningEvaluation(EvaluationModule):
    """Cross-entropy and top-1 against the mask ratio, with true registers and without (the paper's figure 4).

    Args:
        pipeline: see `EvaluationModule`.
        register_counts: see `Conditioning`.
        mask_ratios: likewise.
        num_texts: likewise.
        seed: of the masks.
        dtype: see `EvaluationModule`.
        batch_size: likewise.
        output_dir: likewise.
    """

    name = "conditioning"

    def __init__(
        self,
        pipeline: str,
        register_counts: tuple[int, ...] | None = None,
        mask_ratios: tuple[float, ...] = MASK_RATIOS,
        num_texts: int | None = 1000,
        seed: int = 0,
        dtype: Dtype = None,
        batch_size: int = 64,
        output_dir: str | None = None,
    ) -> None:
        super().__init__(pipeline, None, False, dtype, batch_size, output_dir)
        self.options: dict[str, Any] = {
            "register_counts": register_counts,
            "mask_ratios": mask_ratios,
            "num_texts": num_texts,
            "seed": seed,
        }

    def settings(self) -> dict[str, Any]:
        """Everything but what is in the cells."""
        return {key: self.options[key] for key in ("mask_ratios", "num_texts", "seed")}

    def rows(self, data: BlockDataModule) -> list[Row]:
        """See `Conditioning.rows`."""
        table = Conditioning(self.system, data.blocks("test"), batch_size=self.batch_size, **self.options)
        return table.rows(self.ledger(data))

    def write(self, folder: Path, rows: list[Row], context: dict[str, Any]) -> Path:
        """The table and the page."""
        columns = ("cross_entropy", "standard_error", "top1", "num_tokens")
        write_tables(folder, self.name, rows, ("system", "num_registers", "mask_ratio"), columns, context)
        return report.write_page(folder, context, conditioning=rows)

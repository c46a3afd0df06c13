"""`crocodil test --config lightning_configs/eval_*.yaml`: the paper's tables and curves on a pipeline."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from crocodil.data.block_datamodule import BlockDataModule
from crocodil.evaluation.masked_prediction import MASK_RATIOS
from crocodil.experiments import Conditioning, Generation, Reconstruction, SystemGrid
from crocodil.experiments.cells import Row
from crocodil.modules.evaluation import EvaluationModule


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
        quality: the measure at which speed-ups are matched.
        score_end: see `EvaluationModule`.
        dtype: likewise.
        batch_size: likewise.
        output_dir: likewise.
    """

    name = "generation"
    splits = ("test", "train")
    shared = (
        *("num_samples", "batch_size", "prior_steps", "refresh_prior_steps"),
        *("mauve_seeds", "undefined_names", "copies"),
    )

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
        quality: Literal["judge_nll", "parse_rate", "mauve", "distance"] = "judge_nll",
        score_end: bool = False,
        dtype: str | None = None,
        batch_size: int = 64,
        output_dir: str | None = None,
    ) -> None:
        options = {
            "systems": systems,
            "num_samples": num_samples,
            "seeds": seeds,
            "lengths": lengths,
            "prior_steps": prior_steps,
            "refresh_prior_steps": refresh_prior_steps,
            "timed_batches": timed_batches,
            "mauve_seeds": mauve_seeds,
            "undefined_names": undefined_names,
            "copies": copies,
        }
        super().__init__(pipeline, options, judge, score_end, dtype, batch_size, output_dir)
        self.quality: str = quality

    def experiment(self, data: BlockDataModule) -> Generation:
        """See `Generation`."""
        assert self.judge is not None
        options = {name: value for name, value in self.options.items() if name != "copies"}
        train = data.array("train") if self.options["copies"] else None
        return Generation(self.system, self.judge, data.blocks("test"), train=train, **options)

    def write(self, folder: Path, rows: list[Row], context: dict[str, Any]) -> Path:
        """The table of all settings, that of the speed-ups, and the page."""
        from crocodil.evaluation.report import write_generation  # it draws, which no training needs

        context |= {"seeds": self.options["seeds"], "systems": [asdict(grid) for grid in self.options["systems"]]}
        return write_generation(folder, rows, context, self.quality)


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
    shared = ("code_model", "code_model_layer", "num_texts")

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
        dtype: str | None = None,
        batch_size: int = 64,
        output_dir: str | None = None,
    ) -> None:
        options = {
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
        super().__init__(pipeline, options, judge, score_end, dtype, batch_size, output_dir)

    def experiment(self, data: BlockDataModule) -> Reconstruction:
        """See `Reconstruction`."""
        return Reconstruction(self.system, data.blocks("test"), self.judge, **self.options)

    def write(self, folder: Path, rows: list[Row], context: dict[str, Any]) -> Path:
        """The table and the page."""
        from crocodil.evaluation.report import write_reconstruction

        return write_reconstruction(folder, rows, context)


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
    shared = ("mask_ratios", "num_texts", "seed")

    def __init__(
        self,
        pipeline: str,
        register_counts: tuple[int, ...] | None = None,
        mask_ratios: tuple[float, ...] = MASK_RATIOS,
        num_texts: int | None = 1000,
        seed: int = 0,
        dtype: str | None = None,
        batch_size: int = 64,
        output_dir: str | None = None,
    ) -> None:
        options = {
            "register_counts": register_counts,
            "mask_ratios": mask_ratios,
            "num_texts": num_texts,
            "seed": seed,
        }
        super().__init__(pipeline, options, None, False, dtype, batch_size, output_dir)

    def experiment(self, data: BlockDataModule) -> Conditioning:
        """See `Conditioning`."""
        return Conditioning(self.system, data.blocks("test"), **self.options)

    def write(self, folder: Path, rows: list[Row], context: dict[str, Any]) -> Path:
        """The table and the page."""
        from crocodil.evaluation.report import write_conditioning

        return write_conditioning(folder, rows, context)

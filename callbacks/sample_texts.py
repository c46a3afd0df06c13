"""Texts, figures and costs while a stage is trained."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger

from crocodil.evaluation.diversity import unigram_entropies
from crocodil.evaluation.python_code import parses
from crocodil.modules import AutoencoderModule, CrocodilModule, PriorModule, StudentModule
from crocodil.pipeline import ALGORITHMS, PipelineResult
from crocodil.samplers import MaskedSampler

Algorithm = Literal["masked", "conthendisc", "conwithindisc", "reconstruction"]


class SampleTexts(L.Callback):
    """At chosen validations, writes texts and logs them with their figures and their cost.

    The texts go to TensorBoard if that is the logger, and always to `samples/step-N-ALGORITHM.txt` in the log folder;
    the figures are logged as `sample_ALGORITHM_parse_rate`, `_entropy`, `_duplicate_rate`, `_nfe`.

    Args:
        algorithms: which to run; None takes what the stage has: "masked" for a demasker, "reconstruction" for an
            autoencoder (held-out texts written again from their registers), "conthendisc" and "conwithindisc" for a
            prior.
        num_samples: texts for each algorithm.
        num_steps: demasker calls a text.
        every_n_validations: 1 samples at every validation.
        remasking: see `MaskedSampler`.
        temperature: see `MaskedSampler`.
        prior_steps: steps of the latent prior.
        seed: the same texts' noise at every validation.

    Raises:
        ValueError: if an algorithm is unknown.
    """

    def __init__(
        self,
        algorithms: Sequence[Algorithm] | None = None,
        num_samples: int = 8,
        num_steps: int = 8,
        every_n_validations: int = 1,
        remasking: str = "low_confidence",
        temperature: float = 0.7,
        prior_steps: int = 16,
        seed: int = 0,
    ) -> None:
        known = (*ALGORITHMS, "reconstruction")
        if unknown := [name for name in algorithms or () if name not in known]:
            raise ValueError(f"SampleTexts knows the algorithms {', '.join(known)}, got {', '.join(unknown)}")
        self.algorithms = algorithms
        self.num_samples = num_samples
        self.every_n_validations = every_n_validations
        self.remasking = remasking
        self.sampler = MaskedSampler(num_steps, remasking=remasking, temperature=temperature)
        self.prior_steps = prior_steps
        self.seed = seed
        self._validations = 0

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Samples, if it is the turn of this validation."""
        self._validations += 1
        if trainer.sanity_checking or (self._validations - 1) % self.every_n_validations:
            return
        assert isinstance(pl_module, CrocodilModule)
        for algorithm in self.algorithms or default_algorithms(pl_module):
            result = self._write(trainer, pl_module, algorithm)
            eos = trainer.datamodule.vocabulary.eos_token_id  # type: ignore[attr-defined]
            figures = {
                "parse_rate": fmean(map(parses, result.texts)),
                "duplicate_rate": 1 - len(set(result.texts)) / len(result.texts),
                "entropy": float(unigram_entropies(result.token_ids, eos).mean()),
                "nfe": result.cost.nfe,
            }
            pl_module.log_dict(
                {f"sample_{algorithm}_{name}": value for name, value in figures.items()}, rank_zero_only=True
            )
            self._log_texts(trainer, algorithm, result.texts)

    def _write(self, trainer: L.Trainer, pl_module: CrocodilModule, algorithm: Algorithm) -> PipelineResult:
        """Texts of one algorithm, with their cost."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        pipeline = pl_module.pipeline(data.codec)
        settings: dict[str, Any] = {
            "seed": self.seed,
            "remasking": self.remasking,
            "temperature": self.sampler.distribution.temperature,
        }
        if algorithm == "reconstruction":
            source = data.blocks("val")[: self.num_samples]
            result = pipeline.reconstruct(source, self.sampler.num_steps, **settings)
            accuracy = (result.token_ids == source).float().mean()
            pl_module.log("sample_reconstruction_token_accuracy", accuracy, rank_zero_only=True)
            return result
        return pipeline(
            self.num_samples, data.length, algorithm, self.sampler.num_steps, prior_steps=self.prior_steps, **settings
        )

    def _log_texts(self, trainer: L.Trainer, algorithm: str, texts: Sequence[str]) -> None:
        folder = Path(trainer.log_dir or trainer.default_root_dir) / "samples"  # a broadcast: all processes ask
        if not trainer.is_global_zero:
            return
        page = ("\n" + "-" * 60 + "\n").join(texts)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text(f"samples/{algorithm}", f"```python\n{page}\n```", trainer.global_step)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"step-{trainer.global_step:06d}-{algorithm}.txt").write_text(page + "\n")


def default_algorithms(module: CrocodilModule) -> tuple[Algorithm, ...]:
    """What makes sense at a stage."""
    if isinstance(module, PriorModule | StudentModule):
        return ("conthendisc", "conwithindisc") if module.condition_share else ("conthendisc",)
    return ("reconstruction",) if isinstance(module, AutoencoderModule) else ("masked",)

"""Texts written again from their registers (the paper's table 1): block length against demasker calls."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch import Tensor
from torchmetrics import Metric, MetricCollection

from crocodil.evaluation.diversity import UnigramEntropy
from crocodil.evaluation.judge import Judge
from crocodil.evaluation.perplexity import GenerativePerplexity
from crocodil.evaluation.python_code import ParseRate
from crocodil.evaluation.reconstruction import CharErrorRate, CodeBertScore, TokenAccuracy
from crocodil.experiments.cells import Ledger, Row, share_of, with_bar
from crocodil.pipeline import CrocodilPipeline
from crocodil.ranks import mean_over_items


@dataclass(frozen=True)
class ReconstructionCell:
    """One setting of the sampler and one seed; 0 steps are the originals themselves."""

    block_size: int | None
    num_steps: int
    num_registers: int | None
    remasking: str | None
    temperature: float | None
    seed: int


class Reconstruction:
    """Encodes held-out texts, writes them again from all masks, and compares.

    Every process writes its share of the texts. Settings whose steps are no multiple of their blocks do not exist.

    Args:
        pipeline: with an encoder.
        held_out: (M, L) int64, texts no network was trained on.
        judge: for the likelihood of what is written; None for no such figure.
        code_model: name or folder of a model of code for CodeBERTScore; None for no such figure.
        code_model_layer: see `CodeBertScore`.
        block_sizes: tokens that are finished before the next ones begin; None is the whole text.
        num_steps: demasker calls.
        register_counts: numbers k of registers read, the first k of K; None for all.
        remasking: unmasking rule.
        temperature: of the drawn tokens; 0 takes the most probable.
        num_texts: how many of the texts; None for all.
        batch_size: texts at once.
        seeds: of the samples, which matter where the temperature is above 0 or the rule is random.

    Raises:
        ValueError: if the pipeline has no encoder, or no setting fits the length.
    """

    def __init__(
        self,
        pipeline: CrocodilPipeline,
        held_out: Tensor,
        judge: Judge | None = None,
        code_model: str | None = None,
        code_model_layer: int | None = None,
        block_sizes: Sequence[int | None] = (None,),
        num_steps: Sequence[int] = (4, 8, 16, 32, 64),
        register_counts: Sequence[int | None] = (None,),
        remasking: str = "low_confidence",
        temperature: float = 0.0,
        num_texts: int | None = None,
        batch_size: int = 64,
        seeds: Sequence[int] = (0,),
    ) -> None:
        if pipeline.encoder is None:
            raise ValueError("reconstruction needs an encoder, but this pipeline has none: export an autoencoder")
        self.pipeline, self.held_out, self.judge = pipeline, held_out[:num_texts], judge
        self.code_model, self.code_model_layer = code_model, code_model_layer
        self.batch_size = batch_size
        length = held_out.shape[1]
        written = [
            ReconstructionCell(block, steps, count, remasking, temperature, seed)
            for count in register_counts
            for block in block_sizes
            for steps in num_steps
            for seed in seeds
            if length % (block or length) == 0 and steps % (length // (block or length)) == 0
        ]
        if not written:
            raise ValueError(
                f"no block size of {list(block_sizes)} divides the length {length} into blocks whose number divides "
                f"num_steps {list(num_steps)}"
            )
        self.cells = [ReconstructionCell(None, 0, None, None, None, seed) for seed in seeds] + written

    def rows(self, ledger: Ledger) -> list[Row]:
        """One row for each cell.

        Args:
            ledger: keeps finished cells.
        """
        return [
            ledger.row(cell, lambda cell=cell: self.measure(cell))  # type: ignore[misc]
            for cell in with_bar(self.cells, "reconstruction")
        ]

    def measure(self, cell: ReconstructionCell) -> Row:
        """Writes the texts of a cell and compares them with the originals."""
        share = share_of(len(self.held_out))
        source = self.held_out[list(share)]
        originals = [self.pipeline.codec.decode(row) for row in source]
        texts, token_ids, costs = originals, source, {"nfe": 0.0, "seconds_per_sample": 0.0}
        if cell.num_steps:
            result = self.pipeline.reconstruct(
                source,
                cell.num_steps,
                num_registers=cell.num_registers,
                seed=cell.seed,
                first_sample=share.start,
                batch_size=self.batch_size,
                block_size=cell.block_size,
                remasking=cell.remasking,
                temperature=cell.temperature,
            )
            texts, token_ids = result.texts, result.token_ids
            costs = {"nfe": result.cost.nfe, "seconds_per_sample": result.cost.seconds / len(share)}
        metrics = MetricCollection(self._metrics(), compute_groups=False).to(self.pipeline.device)
        metrics.update(texts=texts, token_ids=token_ids, reference_texts=originals, reference_ids=source)
        return {
            **asdict(cell),
            **mean_over_items(costs, len(share), self.pipeline.device),
            **{name: float(value) for name, value in metrics.compute().items()},
        }

    def _metrics(self) -> dict[str, Metric | MetricCollection]:
        ends = self.pipeline.demasker.stop_token_ids
        found: dict[str, Metric | MetricCollection] = {
            "cer": CharErrorRate(),
            "token_accuracy": TokenAccuracy(ends),
            "entropy": UnigramEntropy(ends),
            "parse_rate": ParseRate(),
        }
        if self.judge is not None:
            found["perplexity"] = GenerativePerplexity(self.judge)
        if self.code_model is not None:
            found["codebertscore"] = CodeBertScore(self.code_model, self.code_model_layer)
        return found

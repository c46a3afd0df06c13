"""Unconditional generation (the paper's figure 6): quality, diversity and cost of every system, over step budgets."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, field
from functools import cached_property, partial
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from crocodil.evaluation.copying import LongestCopiedRun, SuffixArray
from crocodil.evaluation.cost import Cost
from crocodil.evaluation.diversity import DistinctNgrams, DuplicateRate, UnigramEntropy
from crocodil.evaluation.frechet import FrechetDistance
from crocodil.evaluation.judge import Judge
from crocodil.evaluation.mauve import Mauve
from crocodil.evaluation.perplexity import GenerativePerplexity
from crocodil.evaluation.python_code import CompileRate, ParseRate, UndefinedNames
from crocodil.experiments.cells import Ledger, Row, share_of, with_bar
from crocodil.pipeline import CrocodilPipeline, PipelineResult, PriorNetwork
from crocodil.ranks import gather_rows, mean_over_items, rank_and_size
from crocodil.samplers.unmasking import UnmaskingSchedule

NUM_EXAMPLES = 4
PASSED_ON = (
    *("num_steps", "remasking", "temperature", "top_p", "unmasking_schedule"),
    *("num_registers", "prior_network", "prior_steps", "prior_temperature"),
)
NOTHING = Cost(0.0, 0.0, 0.0, 0.0, {}, {}, {})
"""What texts cost that nobody wrote."""


@dataclass(frozen=True)
class Setting:
    """One setting of one system; fields as of `SystemGrid`, 0 steps and no rule for "data"."""

    algorithm: str
    num_steps: int
    remasking: str | None
    temperature: float | None
    num_registers: int | None
    length: int
    top_p: float | None = field(default=None, kw_only=True)
    unmasking_schedule: UnmaskingSchedule | None = field(default=None, kw_only=True)
    prior_network: PriorNetwork | None = field(default=None, kw_only=True)
    prior_steps: int | None = field(default=None, kw_only=True)
    prior_temperature: float | None = field(default=None, kw_only=True)

    def arguments(self) -> dict[str, Any]:
        """What `CrocodilPipeline` takes to write with it, or to reconstruct; what is None is left to the pipeline."""
        found = {name: value for name, value in asdict(self).items() if name in PASSED_ON and value is not None}
        if self.algorithm == "conwithindisc" and self.prior_steps is not None:
            found["refresh_prior_steps"] = self.prior_steps
        if self.algorithm != "oracle":
            found["algorithm"] = "masked" if self.algorithm == "base" else self.algorithm
        return found


@dataclass(frozen=True)
class SystemGrid:
    """A system with all the settings it is to be tried under.

    Attributes:
        algorithm: "base", "conthendisc", "conwithindisc", or "oracle" (true latents of held-out texts).
        num_steps: step budgets, in demasker calls.
        remasking: unmasking rule.
        temperature: of the drawn tokens.
        num_registers: how many registers the demasker reads; None for all.
        top_p: nucleus of the drawn tokens; None for all of them.
        unmasking_schedule: how many tokens a step commits; None for equal shares.
        prior_network: what draws them, "prior" or "student"; None takes the prior if there is one.
        prior_steps: its steps for each draw; None takes those of the table.
        prior_temperature: of the noise they are drawn from; None for 1.
    """

    algorithm: str
    num_steps: list[int]
    remasking: str = "random"
    temperature: list[float] = field(default_factory=lambda: [1.0])
    num_registers: int | None = None
    top_p: float | None = None
    unmasking_schedule: UnmaskingSchedule | None = None
    prior_network: PriorNetwork | None = None
    prior_steps: int | None = None
    prior_temperature: float | None = None

    def __post_init__(self) -> None:
        if self.algorithm not in ("base", "conthendisc", "conwithindisc", "oracle"):
            raise ValueError(
                f"algorithm must be base, conthendisc, conwithindisc or oracle, got {self.algorithm!r}; data is always "
                "measured"
            )
        drawing = (self.prior_network, self.prior_steps, self.prior_temperature)
        if self.algorithm in ("base", "oracle") and any(setting is not None for setting in drawing):
            raise ValueError(f"{self.algorithm} draws no registers: leave out its prior_network, _steps, _temperature")

    def settings(self, length: int) -> list[Setting]:
        """Each of its settings, for texts of a length: temperatures in the order given, budgets within."""
        same = {name: value for name, value in asdict(self).items() if name not in ("num_steps", "temperature")}
        return [
            Setting(num_steps=num_steps, temperature=temperature, length=length, **same)
            for temperature in self.temperature
            for num_steps in self.num_steps
        ]


@dataclass(frozen=True)
class GenerationCell(Setting):
    """A setting and the seed of its texts."""

    seed: int


@dataclass(frozen=True)
class TimingCell(Setting):
    """The wall-clock of a setting at one batch size."""

    batch_size: int


class Generation:
    """Writes texts with every system and takes their figures.

    "data" is held-out texts against other held-out texts: what no system can beat. "oracle" writes held-out texts again
    from their true latents: what the demasker could do under a perfect prior. Every process writes its share of the
    texts of a cell; since text i depends on the seed and i alone, the table does not depend on their number.

    Args:
        pipeline: with what the systems need.
        judge: for likelihood and features.
        held_out: (M, L) int64, texts no network was trained on; the even rows are the reference, the odd ones "data".
        systems: what to compare.
        train: (T, L) integers, training texts to look for copies in; None for no such figure.
        num_samples: texts of each cell; at most half of M.
        seeds: of the samples.
        lengths: tokens of a text; None for L. Held-out texts are cut at it.
        prior_steps: steps of the prior for a first draw.
        refresh_prior_steps: steps of the prior for the later draws of ConWithinDisc.
        batch_size: texts written at once; None for all of a process.
        timed_batches: batch sizes whose wall-clock is measured apart, on the first process.
        repeats: timings of each, of which the median counts.
        mauve_seeds: seeds of MAUVE's k-means; none leaves MAUVE out.
        undefined_names: count undefined names, too; of no use for canonical functions, whose free names are unbound.

    Raises:
        ValueError: if there are too few held-out texts or a length is out of range.
    """

    def __init__(
        self,
        pipeline: CrocodilPipeline,
        judge: Judge,
        held_out: Tensor,
        systems: Sequence[SystemGrid],
        train: np.ndarray | None = None,
        num_samples: int = 1000,
        seeds: Sequence[int] = (0, 1, 2),
        lengths: Sequence[int] | None = None,
        prior_steps: int = 32,
        refresh_prior_steps: int = 8,
        batch_size: int | None = None,
        timed_batches: Sequence[int] = (),
        repeats: int = 3,
        mauve_seeds: Sequence[int] = (0, 1, 2, 3, 4),
        undefined_names: bool = False,
    ) -> None:
        if len(held_out) // 2 < num_samples:
            raise ValueError(
                f"num_samples must be at most half of the {len(held_out)} held-out texts, got {num_samples}: the other "
                "half stands for the data"
            )
        if num_samples < 2 * rank_and_size()[1]:
            raise ValueError(f"num_samples must be at least 2 for each process, got {num_samples}")
        self.pipeline, self.judge, self._train = pipeline, judge, train
        self.systems, self.seeds, self.num_samples = systems, seeds, num_samples
        self.lengths = list(lengths or [held_out.shape[1]])
        if not all(2 <= length <= held_out.shape[1] for length in self.lengths):
            raise ValueError(f"lengths must be between 2 and the {held_out.shape[1]} of the data, got {self.lengths}")
        self.prior_steps, self.refresh_prior_steps = prior_steps, refresh_prior_steps
        self.batch_size = batch_size or len(share_of(num_samples))
        self.timed_batches, self.repeats = timed_batches, repeats
        self.mauve_seeds, self.undefined_names = tuple(mauve_seeds), undefined_names
        self.reference, self.held_out = held_out[::2], held_out[1::2]
        self._collections: dict[int, MetricCollection] = {}

    @cached_property
    def settings(self) -> list[Setting]:
        """Data first, then the systems in the order given, for each length."""
        return [
            setting
            for length in self.lengths
            for setting in (
                Setting("data", 0, None, None, None, length),
                *(setting for grid in self.systems for setting in grid.settings(length)),
            )
        ]

    @property
    def cells(self) -> list[GenerationCell]:
        """Every setting for every seed."""
        return [GenerationCell(**asdict(setting), seed=seed) for seed in self.seeds for setting in self.settings]

    @property
    def timing_cells(self) -> list[TimingCell]:
        """What is timed: every setting that writes from noise, at every batch size."""
        written = [setting for setting in self.settings if setting.algorithm not in ("data", "oracle")]
        return [TimingCell(**asdict(setting), batch_size=batch) for batch in self.timed_batches for setting in written]

    def rows(self, ledger: Ledger) -> list[Row]:
        """One row for each cell: its settings, figures, and wall-clock at the timed batch sizes.

        Args:
            ledger: keeps finished cells.
        """
        cells, rows = self.cells, []
        seconds: dict[tuple[Any, ...], Row] = defaultdict(dict)
        for cell in with_bar([*cells, *self.timing_cells], "generation"):
            if isinstance(cell, GenerationCell):
                rows.append(ledger.row(cell, partial(self.measure, cell)))
            else:
                seconds[astuple(cell)[:-1]] |= ledger.row(cell, partial(self.time, cell))
        return [row | seconds[astuple(cell)[:-1]] for cell, row in zip(cells, rows, strict=True)]

    def measure(self, cell: GenerationCell) -> Row:
        """Writes the texts of a cell and takes their figures."""
        result = self.write(cell)
        metrics = self._metrics(cell.length)
        metrics.reset()
        metrics.update(texts=result.texts, token_ids=result.token_ids)
        figures = {name: float(value) for name, value in metrics.compute().items()}
        return asdict(cell) | self._costs(result) | figures | {"examples": result.texts[:NUM_EXAMPLES]}

    def _metrics(self, length: int) -> MetricCollection:
        """The figures of a set of texts, which remember the reference from cell to cell."""
        if length not in self._collections:
            metrics = MetricCollection(self._new_metrics(length), compute_groups=False)
            self._collections[length] = metrics.to(self.pipeline.device)
        return self._collections[length]

    def _new_metrics(self, length: int) -> dict[str, Metric | MetricCollection]:
        ends = self.pipeline.demasker.stop_token_ids
        vocabulary = self.pipeline.codec.vocabulary
        mean_states, last_states = self._reference(length)
        found: dict[str, Metric | MetricCollection] = {
            "perplexity": GenerativePerplexity(self.judge),
            "entropy": UnigramEntropy(ends),
            "distinct_2": DistinctNgrams(2, ends),
            "distinct_4": DistinctNgrams(4, ends),
            "duplicates": DuplicateRate(),
            "distance": FrechetDistance(self.judge, mean_states),
            "parse_rate": ParseRate(),
            "compile_rate": CompileRate(),
        }
        if self.mauve_seeds:
            found["mauve"] = Mauve(self.judge, last_states, self.mauve_seeds)
        if self.train is not None:
            found["copying"] = LongestCopiedRun(self.train, vocabulary.bos_token_id, vocabulary.eos_token_id)
        if self.undefined_names:
            found["undefined_names"] = UndefinedNames()
        return found

    @cached_property
    def train(self) -> SuffixArray | None:
        """The training texts, in an order to look up runs in."""
        vocabulary = self.pipeline.codec.vocabulary
        boundaries = (vocabulary.bos_token_id, vocabulary.eos_token_id)
        return None if self._train is None else SuffixArray(self._train, boundaries)

    def _reference(self, length: int) -> tuple[Tensor, Tensor]:
        """Features of the reference, of which every process reads its share."""
        rows = self.reference[list(share_of(len(self.reference))), :length]
        judgement = self.judge.read(self._decode(rows), rows)
        mean_states, last_states = (
            gather_rows(states.to(self.pipeline.device)) for states in (judgement.mean_states, judgement.last_states)
        )
        return mean_states, last_states

    def write(self, cell: GenerationCell) -> PipelineResult:
        """The texts of a cell that fall to this process."""
        share = share_of(self.num_samples)
        if cell.algorithm in ("data", "oracle"):
            order = torch.randperm(len(self.held_out), generator=torch.Generator().manual_seed(cell.seed))
            chosen = self.held_out[order[list(share)], : cell.length]
            if cell.algorithm == "data":
                return PipelineResult(self._decode(chosen), chosen, NOTHING)
            return self.pipeline.reconstruct(
                chosen, seed=cell.seed, first_sample=share.start, batch_size=self.batch_size, **cell.arguments()
            )
        return self._sample(cell, len(share), self.batch_size, cell.seed, share.start)

    def _sample(
        self, setting: Setting, num_samples: int, batch_size: int, seed: int = 0, first_sample: int = 0
    ) -> PipelineResult:
        steps = {"prior_steps": self.prior_steps, "refresh_prior_steps": self.refresh_prior_steps}
        arguments = steps | setting.arguments()
        return self.pipeline(
            num_samples,
            setting.length,
            seed=seed,
            first_sample=first_sample,
            batch_size=batch_size,
            **arguments,
        )

    def time(self, cell: TimingCell) -> Row:
        """Median seconds a text at a batch size, after one run to warm up; on the first process alone."""
        if rank_and_size()[0] > 0:
            return {}
        runs = [self._sample(cell, cell.batch_size, cell.batch_size) for _ in range(1 + self.repeats)]
        return {f"seconds_batch_{cell.batch_size}": median(run.cost.seconds / cell.batch_size for run in runs[1:])}

    def _decode(self, token_ids: Tensor) -> list[str]:
        return [self.pipeline.codec.decode(row) for row in token_ids]

    def _costs(self, result: PipelineResult) -> Row:
        """Calls of each network, equivalents and seconds of a text, as means over the texts of all processes.

        Those of a student stand in the place of the prior's: the row's `prior_network` tells which.
        """
        calls = dict.fromkeys(("demasker_calls", "prior_calls", "encoder_calls"), 0.0)
        for name, count in result.cost.calls.items():
            network = name.partition("[")[0]
            calls[f"{'prior' if network == 'student' else network}_calls"] += count
        costs = calls | {"nfe": result.cost.nfe, "seconds_per_sample": result.cost.seconds / len(result.texts)}
        if result.cost.calls:
            costs["tokens_per_call"] = result.cost.tokens_per_call
        return mean_over_items(costs, len(result.texts), self.pipeline.device)

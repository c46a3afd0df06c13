"""Base, ConThenDisc, ConWithinDisc and true latents side by side: quality, diversity and cost of each."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from crocodil.diffusion.noise import RowNoise
from crocodil.evaluation.cost import demasker_call_equivalents
from crocodil.evaluation.judge import judge_texts
from crocodil.evaluation.metrics import frechet_distance, parse_rate, unigram_entropy, unique_rate
from crocodil.pipeline import Algorithm, CrocodilPipeline
from crocodil.samplers import MaskedSampler


@dataclass(frozen=True)
class Setting:
    """One row of the comparison for each seed.

    Attributes:
        algorithm: "data", "base", "conthendisc", "conwithindisc" or "oracle" (true latents of held-out texts).
        num_steps: demasker calls asked for; 0 for data.
        remasking: unmasking rule.
        temperature: of the drawn tokens.
        num_registers: how many registers the demasker reads; None for all, or where there are none.
        seed: of the samples.
    """

    algorithm: str
    num_steps: int
    remasking: str | None
    temperature: float | None
    num_registers: int | None
    seed: int


@dataclass
class Samples:
    """What one setting wrote: token ids (N, L), texts, calls of each network a text, equivalents, and seconds."""

    token_ids: Tensor
    texts: list[str]
    calls: dict[str, float]
    nfe: float
    seconds: float


class Comparison:
    """Fills the table of the quickstart, row by row; finished rows are kept in a file and not made again.

    Args:
        pipeline: with base, encoder and prior.
        judge: a causal language model over the same tokens, trained apart from the systems judged.
        held_out: (M, L) int64, texts no network was trained on.
        num_samples: texts for each row; at most M.
        prior_steps: steps of the prior for a first draw.
        refresh_prior_steps: steps of the prior for the later draw of ConWithinDisc.
        rows_file: JSON lines of finished rows.
    """

    def __init__(
        self,
        pipeline: CrocodilPipeline,
        judge: PreTrainedModel,
        held_out: Tensor,
        num_samples: int,
        prior_steps: int,
        refresh_prior_steps: int,
        rows_file: Path,
    ) -> None:
        self.pipeline = pipeline
        self.judge = judge.eval()
        self.num_samples = min(num_samples, len(held_out) // 2)
        self.prior_steps = prior_steps
        self.refresh_prior_steps = refresh_prior_steps
        self.rows_file = rows_file
        # Two halves that share no text: one stands for the data in the distance, the other is sampled as "data".
        self.reference, self.held_out = held_out[::2], held_out[1::2]
        self._reference_features = judge_texts(self.judge, self.reference, self._eos)[1]

    @property
    def _eos(self) -> int:
        return self.pipeline.demasker.eos_token_id

    def rows(self, settings: Sequence[Setting], progress: Callable[[int, int], None]) -> list[dict[str, Any]]:
        """One row for each setting, in order.

        Args:
            settings: what to measure.
            progress: called as `progress(done, total)`.
        """
        done = {json.dumps(row["setting"]): row["row"] for row in self._finished()}
        rows = []
        for i, setting in enumerate(settings):
            key = json.dumps(asdict(setting))
            if key not in done:
                done[key] = self.measure(setting)
                with self.rows_file.open("a") as file:
                    file.write(json.dumps({"setting": asdict(setting), "row": done[key]}) + "\n")
            rows.append(done[key])
            progress(i + 1, len(settings))
        return rows

    def _finished(self) -> Iterator[dict[str, Any]]:
        if self.rows_file.is_file():
            for line in self.rows_file.read_text().splitlines():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError:  # the run was killed while it wrote its last line
                    continue

    def measure(self, setting: Setting) -> dict[str, Any]:
        """Writes the texts of a setting and takes their figures."""
        samples = self.write(setting)
        judge_nll, features = judge_texts(self.judge, samples.token_ids, self._eos)
        return {
            "algorithm": setting.algorithm,
            "remasking": setting.remasking,
            "temperature": setting.temperature,
            "num_registers": setting.num_registers,
            "num_steps": setting.num_steps,
            "demasker_calls": samples.calls.get("demasker", 0),
            "prior_calls": samples.calls.get("prior", 0),
            "encoder_calls": samples.calls.get("encoder", 0),
            "nfe": samples.nfe,
            "seconds_per_sample": samples.seconds / len(samples.texts),
            "judge_nll": judge_nll,
            "entropy": unigram_entropy(samples.token_ids, self._eos),
            "distance": frechet_distance(features, self._reference_features),
            "parse_rate": parse_rate(samples.texts),
            "unique_rate": unique_rate(samples.texts),
            "seed": setting.seed,
        }

    def write(self, setting: Setting) -> Samples:
        """The texts of a setting."""
        if setting.algorithm == "data":
            token_ids = self._chosen(setting.seed)
            return Samples(token_ids, self._decode(token_ids), {}, 0.0, 0.0)
        if setting.algorithm == "oracle":
            return self._reconstruct(setting)
        assert setting.remasking is not None and setting.temperature is not None
        algorithm: Algorithm = "masked" if setting.algorithm == "base" else setting.algorithm  # type: ignore[assignment]
        result = self.pipeline(
            self.num_samples,
            self.held_out.shape[1],
            algorithm,
            setting.num_steps,
            seed=setting.seed,
            remasking=setting.remasking,
            temperature=setting.temperature,
            num_registers=setting.num_registers,
            prior_steps=self.prior_steps,
            refresh_prior_steps=self.refresh_prior_steps,
            batch_size=self.num_samples,
        )
        return Samples(result.token_ids, result.texts, result.cost.calls, result.cost.nfe, result.cost.seconds)

    def _chosen(self, seed: int) -> Tensor:
        order = torch.randperm(len(self.held_out), generator=torch.Generator().manual_seed(seed))
        return self.held_out[order[: self.num_samples]]

    @torch.no_grad()
    def _reconstruct(self, setting: Setting) -> Samples:
        """Held-out texts written again from their true latents: what the demasker could do under a perfect prior."""
        assert self.pipeline.encoder is not None
        assert setting.remasking is not None and setting.temperature is not None
        source = self._chosen(setting.seed)
        start = time.perf_counter()
        out = MaskedSampler(setting.num_steps, None, setting.remasking, setting.temperature).sample(
            self.pipeline.demasker,
            length=source.shape[1],
            batch_size=len(source),
            latents=self.pipeline.encoder(source)[:, : setting.num_registers],
            generator=RowNoise((setting.seed << 32) + torch.arange(len(source))),
        )
        seconds = time.perf_counter() - start
        calls: dict[str, float] = {**out.calls, "encoder": 1}
        flops = self.pipeline.flops(source.shape[1], "conwithindisc", setting.num_registers)
        nfe = demasker_call_equivalents(calls, flops)
        return Samples(out.token_ids, self._decode(out.token_ids), calls, nfe, seconds)

    def _decode(self, token_ids: Tensor) -> list[str]:
        return [self.pipeline.codec.decode(row) for row in token_ids]

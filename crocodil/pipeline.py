"""A trained system as one folder, and text out of it."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from crocodil.data.codec import TextCodec
from crocodil.data.retokenizer import Retokenizer
from crocodil.diffusion.gaussian import PredictionType, TangentSchedule
from crocodil.diffusion.noise import RowNoise
from crocodil.evaluation.cost import Cost, demasker_call_equivalents, network_flops, synchronised
from crocodil.models import Demasker, LatentPrior, RegisterEncoder
from crocodil.samplers import ConThenDisc, ConWithinDisc, LatentSampler, MaskedSampler, SampleOutput
from crocodil.samplers.latent import Solver
from crocodil.samplers.masked import ProgressCallback
from crocodil.samplers.unmasking import Remasking

Algorithm = Literal["masked", "conthendisc", "conwithindisc"]
ALGORITHMS: tuple[str, ...] = get_args(Algorithm)
PIPELINE_FILE = "crocodil.json"
ENCODER_TOKENIZER = "encoder_tokenizer"
FORMAT = 1
Network = Demasker | RegisterEncoder | LatentPrior
NETWORKS: dict[str, type[Network]] = {
    "demasker": Demasker,
    "encoder": RegisterEncoder,
    "prior": LatentPrior,
    "base": Demasker,
}


@dataclass(frozen=True)
class LatentProcess:
    """How the prior was trained, which is how it must be sampled."""

    noise_schedule: TangentSchedule = field(default_factory=TangentSchedule)
    prediction_type: PredictionType = "x0"
    self_conditioning: bool = True
    conditional: bool = True

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> "LatentProcess":
        """Rebuilds what `dataclasses.asdict` made."""
        return cls(**{**settings, "noise_schedule": TangentSchedule(**settings["noise_schedule"])})


@dataclass(frozen=True)
class PipelineResult:
    """What a pipeline returns.

    Attributes:
        texts: the decoded texts, the prompt included, each cut at its first end token.
        token_ids: (B, P + L) int64; shorter prompts are padded with the end token behind the text.
        cost: what the run cost.
    """

    texts: list[str]
    token_ids: Tensor
    cost: Cost


class CrocodilPipeline:
    """Demasker, and where there are latents encoder and prior, with their text codec.

    Args:
        demasker: f_theta.
        codec: text to token ids and back.
        encoder: h_phi; needed for ConWithinDisc.
        prior: G_psi; needed for ConThenDisc and ConWithinDisc.
        latent_process: how the prior was trained.
        base: the plain masked-diffusion model that "masked" samples from; None samples the demasker without latents.
    """

    def __init__(
        self,
        demasker: Demasker,
        codec: TextCodec,
        encoder: RegisterEncoder | None = None,
        prior: LatentPrior | None = None,
        latent_process: LatentProcess | None = None,
        base: Demasker | None = None,
    ) -> None:
        self.demasker = demasker
        self.codec = codec
        self.encoder = encoder
        self.prior = prior
        self.latent_process = latent_process or LatentProcess()
        self.base = base
        for network in self.networks().values():
            network.eval()

    def networks(self) -> dict[str, Network]:
        """The networks the pipeline has, by name."""
        given = {"demasker": self.demasker, "encoder": self.encoder, "prior": self.prior, "base": self.base}
        return {name: network for name, network in given.items() if network is not None}

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.demasker.parameters()).device

    def to(self, device: torch.device | str) -> "CrocodilPipeline":
        """Moves all networks, in place."""
        for network in self.networks().values():
            network.to(device)
        return self

    def __call__(
        self,
        num_samples: int = 1,
        length: int | None = None,
        algorithm: Algorithm = "conthendisc",
        num_steps: int = 8,
        prompts: str | Sequence[str] | None = None,
        seed: int = 0,
        *,
        remasking: Remasking = "low_confidence",
        temperature: float = 0.7,
        block_size: int | None = None,
        num_registers: int | None = None,
        prior_steps: int = 32,
        refresh_steps: Sequence[int] | None = None,
        refresh_prior_steps: int = 8,
        solver: Solver = "dpmpp_2m",
        guidance_scale: float = 1.0,
        batch_size: int = 64,
        progress: ProgressCallback | None = None,
    ) -> PipelineResult:
        """Writes texts.

        Args:
            num_samples: how many; with prompts, how many for each prompt.
            length: tokens to write behind the prompt; None fills the longest text the demasker reads.
            algorithm: "masked" (the plain model), "conthendisc" or "conwithindisc".
            num_steps: demasker calls a text.
            prompts: one text or several, kept in front of what is written; None for none.
            seed: sample i draws from the stream of `seed` and i alone, whatever the batch size.
            remasking: which positions are committed first; see `MaskedSampler`.
            temperature: of the drawn tokens; see `MaskedSampler`.
            block_size: see `MaskedSampler`.
            num_registers: registers the demasker reads, the first k of K; None for all.
            prior_steps: steps of the prior for the first draw.
            refresh_steps: see `ConWithinDisc`; with prompts the default adds step 0, which tells the prior of them.
            refresh_prior_steps: steps of the prior for the later draws.
            solver: see `LatentSampler`.
            guidance_scale: of conditional draws; 1.0 is off.
            batch_size: texts written at once.
            progress: called as `progress(network, done, total)` over all batches.

        Raises:
            ValueError: if a setting is out of range or the pipeline lacks a network the algorithm needs.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not -(2**31) <= seed < 2**31:
            raise ValueError(f"seed must be at least -2^31 and below 2^31, got {seed}")
        prompt_ids = self._prompt_ids(prompts, num_samples)
        length = self._checked_length(length, max(map(len, prompt_ids)))
        self._check_networks(algorithm, num_registers)
        sampler = MaskedSampler(num_steps, block_size, remasking, temperature)
        if refresh_steps is None and prompts is not None:
            refresh_steps = sorted({0, num_steps // 2})
        draw = self._sampler(
            algorithm,
            sampler,
            self._latent_sampler(prior_steps, solver, guidance_scale),
            self._latent_sampler(refresh_prior_steps, solver, guidance_scale),
            refresh_steps,
            num_registers,
        )
        start = synchronised(time.perf_counter, self.device)
        rows: list[Tensor | None] = [None] * len(prompt_ids)
        calls: dict[str, int] = {}
        for batch in batches(prompt_ids, batch_size):
            seeds = torch.tensor([(seed << 32) + i for i in batch])
            out = draw(
                length=length,
                batch_size=len(batch),
                prompt_ids=torch.tensor([prompt_ids[i] for i in batch], dtype=torch.int64),
                generator=RowNoise(seeds.to(self.device)),
                progress=progress,
            )
            calls = out.calls
            for i, row in zip(batch, out.token_ids.cpu(), strict=True):
                rows[i] = row
        seconds = synchronised(time.perf_counter, self.device) - start
        token_ids = nn.utils.rnn.pad_sequence(
            [row for row in rows if row is not None], batch_first=True, padding_value=self.demasker.eos_token_id
        )
        return PipelineResult(
            texts=[self.codec.decode(row) for row in token_ids],
            token_ids=token_ids,
            cost=self._cost(token_ids.shape[1], algorithm, num_registers, calls, seconds, len(rows) * length),
        )

    def _prompt_ids(self, prompts: str | Sequence[str] | None, num_samples: int) -> list[list[int]]:
        """One list of token ids for each text to write: nothing, or BOS and the prompt."""
        if prompts is None:
            return [[]] * num_samples
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not texts:
            raise ValueError("prompts must hold at least one text, or be None for no prompt, got an empty list")
        bos = self.codec.vocabulary.bos_token_id
        return [[bos, *self.codec.encode(text)] for text in texts for _ in range(num_samples)]

    def _checked_length(self, length: int | None, prompt_length: int) -> int:
        room = self.demasker.max_length - prompt_length
        if length is None:
            length = room
        if not 1 <= length <= room:
            behind = f" behind a prompt of {prompt_length} tokens" if prompt_length else ""
            raise ValueError(
                f"length must be between 1 and {room}{behind} (the demasker reads {self.demasker.max_length} tokens), "
                f"got {length}"
            )
        return length

    def _check_networks(self, algorithm: str, num_registers: int | None) -> None:
        if algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
        if algorithm == "masked":
            return
        if self.prior is None or self.encoder is None:
            raise ValueError(f"{algorithm} needs an encoder and a prior, but this pipeline has none; use masked")
        if algorithm == "conwithindisc" and not self.latent_process.conditional:
            raise ValueError("conwithindisc needs a prior trained with condition_share above 0; use conthendisc")
        if num_registers is not None and not 1 <= num_registers <= self.prior.num_registers:
            raise ValueError(
                f"num_registers must be between 1 and the trained {self.prior.num_registers}, got {num_registers}"
            )

    def _latent_sampler(self, num_steps: int, solver: Solver, guidance_scale: float) -> LatentSampler:
        process = self.latent_process
        return LatentSampler(
            num_steps,
            solver,
            process.noise_schedule,
            process.prediction_type,
            process.self_conditioning,
            guidance_scale,
        )

    def _sampler(
        self,
        algorithm: Algorithm,
        sampler: MaskedSampler,
        first: LatentSampler,
        later: LatentSampler,
        refresh_steps: Sequence[int] | None,
        num_registers: int | None,
    ) -> Callable[..., SampleOutput]:
        """The chosen algorithm with its networks, to be called with what changes from batch to batch."""
        if algorithm == "masked":
            return partial(sampler.sample, self.base or self.demasker, device=self.device)
        assert self.prior is not None and self.encoder is not None
        if algorithm == "conthendisc":
            then = ConThenDisc(sampler, first, num_registers)
            return partial(then.sample, self.demasker, self.prior, device=self.device)
        within = ConWithinDisc(sampler, first, later, refresh_steps, num_registers)
        return partial(within.sample, self.demasker, self.prior, self.encoder, device=self.device)

    def flops(self, length: int, algorithm: Algorithm, num_registers: int | None = None) -> dict[str, int]:
        """FLOPs of one call of each network the algorithm uses; `length` counts the prompt."""
        unit = self.base or self.demasker
        if algorithm == "masked":
            return network_flops(length, unit)
        assert self.prior is not None
        registers = num_registers or self.prior.num_registers
        return network_flops(length, self.demasker, registers, self.prior, self.encoder, unit)

    def _cost(
        self,
        length: int,
        algorithm: Algorithm,
        num_registers: int | None,
        calls: dict[str, int],
        seconds: float,
        num_tokens: int,
    ) -> Cost:
        flops = self.flops(length, algorithm, num_registers)
        return Cost(demasker_call_equivalents(calls, flops), seconds, num_tokens / seconds, calls, flops)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the pipeline as safetensors, tokenizer files and `crocodil.json`.

        Args:
            folder: created if absent.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, network in self.networks().items():
            network.save_pretrained(folder / name)
        self.codec.save_pretrained(folder / "tokenizer")
        if self.encoder is not None and isinstance(self.encoder.translate, Retokenizer):
            self.encoder.translate.target.save_pretrained(folder / ENCODER_TOKENIZER)
        description = {
            "format": FORMAT,
            "versions": {name: version(name) for name in ("crocodil", "torch", "transformers")},
            "networks": list(self.networks()),
            "latent_process": asdict(self.latent_process),
        }
        (folder / PIPELINE_FILE).write_text(json.dumps(description, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "CrocodilPipeline":
        """Reads what `save_pretrained` wrote; runs no code from the folder.

        Raises:
            ValueError: if the folder is no pipeline, or one of a later format.
        """
        folder = Path(folder)
        if not (folder / PIPELINE_FILE).is_file():
            raise ValueError(f"{folder} is no pipeline: it has no {PIPELINE_FILE} (write one with `crocodil export`)")
        description = json.loads((folder / PIPELINE_FILE).read_text())
        if description.get("format") != FORMAT:
            raise ValueError(f"{folder} has pipeline format {description.get('format')}, this version reads {FORMAT}")
        networks: dict[str, Any] = {
            name: NETWORKS[name].from_pretrained(folder / name) for name in description["networks"]
        }
        codec = TextCodec.from_pretrained(folder / "tokenizer")
        if (folder / ENCODER_TOKENIZER).is_dir():
            own = TextCodec.from_pretrained(folder / ENCODER_TOKENIZER)
            networks["encoder"].translate = Retokenizer(codec, own)
        return cls(
            codec=codec,
            latent_process=LatentProcess.from_dict(description["latent_process"]),
            **networks,
        )


def batches(prompt_ids: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """Indices of texts in batches whose prompts are equally long, so that no row is padded."""
    by_length: dict[int, list[int]] = {}
    for i, ids in enumerate(prompt_ids):
        by_length.setdefault(len(ids), []).append(i)
    return [rows[at : at + batch_size] for rows in by_length.values() for at in range(0, len(rows), batch_size)]

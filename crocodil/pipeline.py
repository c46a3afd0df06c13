"""A trained system as one folder, and text out of it."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from crocodil.data.codec import TextCodec
from crocodil.diffusion.noise import RowNoise
from crocodil.evaluation.cost import Cost, bill, network_flops
from crocodil.evaluation.stopwatch import Stopwatch
from crocodil.models import Demasker, LatentPrior, LatentStudent, RegisterEncoder
from crocodil.pipeline_folder import Network, read_folder, write_folder
from crocodil.samplers import ConThenDisc, ConWithinDisc, MaskedSampler, SampleOutput
from crocodil.samplers.conthendisc import first_registers
from crocodil.samplers.latent import LatentProcess, RegisterSampler, Solver
from crocodil.samplers.mean_flow import StudentProcess
from crocodil.samplers.protocols import ProgressCallback, StepCallback

Algorithm = Literal["masked", "conthendisc", "conwithindisc"]
ALGORITHMS: tuple[str, ...] = get_args(Algorithm)
PriorNetwork = Literal["prior", "student"]
DEFAULT_STEPS: dict[PriorNetwork, tuple[int, int]] = {"prior": (32, 8), "student": (4, 2)}
"""Of a first draw and of a later one."""


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
        prior: G_psi; needed for ConThenDisc and ConWithinDisc, unless there is a student.
        latent_process: how the prior was trained.
        base: the plain masked-diffusion model that "masked" samples from; None samples the demasker without latents.
        student: the distilled prior, which needs few steps.
        student_process: how it was trained.
        defaults: for some algorithms, the arguments of `__call__` that suit this system; `crocodil sample` starts from
            them.
    """

    def __init__(
        self,
        demasker: Demasker,
        codec: TextCodec,
        encoder: RegisterEncoder | None = None,
        prior: LatentPrior | None = None,
        latent_process: LatentProcess | None = None,
        base: Demasker | None = None,
        student: LatentStudent | None = None,
        student_process: StudentProcess | None = None,
        defaults: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.demasker = demasker
        self.codec = codec
        self.encoder = encoder
        self.prior = prior
        self.latent_process = latent_process or LatentProcess()
        self.base = base
        self.student = student
        self.student_process = student_process or StudentProcess()
        self.defaults = {name: dict(settings) for name, settings in (defaults or {}).items()}
        self.is_compiled = False
        self._flops: dict[tuple[Any, ...], dict[str, int]] = {}
        for network in self.networks().values():
            network.eval()

    def networks(self) -> dict[str, Network]:
        """The networks the pipeline has, by name."""
        given = {
            "demasker": self.demasker,
            "encoder": self.encoder,
            "prior": self.prior,
            "student": self.student,
            "base": self.base,
        }
        return {name: network for name, network in given.items() if network is not None}

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.demasker.parameters()).device

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "CrocodilPipeline":
        """Moves all networks, in place.

        Args:
            device: where to.
            dtype: of their weights; None keeps it.
        """
        for network in self.networks().values():
            network.to(device, dtype)
        return self

    def compile(self) -> "CrocodilPipeline":
        """Compiles all networks, in place; on a GPU the steps of prior and student become CUDA graphs.

        The first texts of each length and batch size then take minutes.
        """
        for name, network in self.networks().items():
            draws = name in ("prior", "student")
            network.compile(mode="reduce-overhead" if draws and self.device.type == "cuda" else None)
        self.is_compiled = True
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
        first_sample: int = 0,
        num_registers: int | None = None,
        prior_network: PriorNetwork | None = None,
        prior_steps: int | None = None,
        refresh_steps: Sequence[int] | None = None,
        refresh_prior_steps: int | None = None,
        solver: Solver = "dpmpp_2m",
        prior_guidance_scale: float = 1.0,
        prior_temperature: float = 1.0,
        stop: str | Sequence[str] | None = None,
        batch_size: int = 64,
        progress: ProgressCallback | None = None,
        on_step: StepCallback | None = None,
        **sampler: Any,
    ) -> PipelineResult:
        """Writes texts.

        Args:
            num_samples: how many; with prompts, how many for each prompt.
            length: tokens to write behind the prompt; None fills the longest text the demasker reads.
            algorithm: "masked" (the plain model), "conthendisc" or "conwithindisc".
            num_steps: demasker calls a text.
            prompts: one text or several, of any lengths, kept in front of what is written; None for none. A prior that
                was trained with conditions is told of them.
            seed: sample i draws from the stream of `seed` and i alone, whatever the batch size.
            first_sample: the i of the first sample, so that several processes can each write a share.
            num_registers: registers the demasker reads, the first k of K; None for all.
            prior_network: what draws the registers, "prior" or "student"; None takes the prior if there is one.
            prior_steps: its steps for the first draw; None takes 32 of the prior, 4 of the student.
            refresh_steps: see `ConWithinDisc`.
            refresh_prior_steps: its steps for the later draws; None takes 8 of the prior, 2 of the student.
            solver: see `LatentSampler`; a student has none.
            prior_guidance_scale: of conditional draws of the prior; 1.0 is off. A student has its own in its weights.
            prior_temperature: of the noise a sketch is drawn from; below 1 sketches are likelier and more alike.
            stop: texts are cut before the first of these strings behind the prompt.
            batch_size: texts written at once.
            progress: called as `progress(network, done, total)` over all batches.
            on_step: called after each step of each batch; see `StepEvent`.
            sampler: further arguments of `MaskedSampler`: `remasking`, `temperature` (here 0.7 if not given),
                `block_size`, `top_p`, `top_k`, `eos`, `early_stop`, `guidance_scale`, `guided_by`, `cache`.

        Raises:
            ValueError: if a setting is out of range or the pipeline lacks a network the algorithm needs.
            FloatingPointError: if the demasker returns something that is no distribution.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        check_batch_and_seed(batch_size, seed)
        prompt_ids = self._prompt_ids(prompts, num_samples)
        length = self._checked_length(length, max(map(len, prompt_ids)))
        self.check_networks(algorithm, num_registers, prior_network)
        stopwatch = Stopwatch(self.device)
        registers = partial(
            self.latent_sampler,
            prior_network=prior_network,
            solver=solver,
            guidance_scale=prior_guidance_scale,
            temperature=prior_temperature,
        )
        draw = self.bound_sampler(
            algorithm,
            masked_sampler(num_steps, static_shapes=self.is_compiled, **sampler),
            registers(prior_steps),
            registers(refresh_prior_steps, refresh=True),
            refresh_steps,
            num_registers,
            stopwatch,
        )
        rows: list[Tensor] = [torch.empty(0)] * len(prompt_ids)
        calls: Counter[str] = Counter()
        for batch in batches(prompt_ids, batch_size):
            out = draw(
                length=length,
                batch_size=len(batch),
                prompt_ids=[torch.tensor(prompt_ids[i], dtype=torch.int64) for i in batch] if prompts else None,
                generator=self._noise(seed, [first_sample + i for i in batch]),
                progress=progress,
                on_step=on_step,
            )
            calls.update({name: count * len(batch) for name, count in out.calls.items()})
            for i, row in zip(batch, out.token_ids.cpu(), strict=True):
                rows[i] = row[: len(prompt_ids[i]) + length]
        stops = [stop] if isinstance(stop, str) else stop or []
        return self._result(rows, prompt_ids, stops, calls, stopwatch.read(), algorithm, num_registers)

    @torch.no_grad()
    def reconstruct(
        self,
        token_ids: Tensor,
        num_steps: int = 8,
        *,
        num_registers: int | None = None,
        seed: int = 0,
        first_sample: int = 0,
        batch_size: int = 64,
        **sampler: Any,
    ) -> PipelineResult:
        """Writes texts again from their own registers: z_0 = h_phi(x_0), then all masks (CRoCoDiL's autoencoding).

        Args:
            token_ids: (N, L) int64, the texts.
            num_steps: demasker calls a text.
            num_registers: registers the demasker reads, the first k of K; None for all.
            seed: see `__call__`.
            first_sample: see `__call__`.
            batch_size: texts written at once.
            sampler: further arguments of `MaskedSampler`; `temperature` is 0 if not given.

        Raises:
            ValueError: if a setting is out of range or the pipeline has no encoder.
        """
        if self.encoder is None:
            raise ValueError(
                "to reconstruct, a pipeline needs an encoder, but this one has none: export an autoencoder"
            )
        check_batch_and_seed(batch_size, seed)
        masked = masked_sampler(num_steps, **{"temperature": 0.0, "static_shapes": self.is_compiled, **sampler})
        stopwatch = Stopwatch(self.device)
        encoder, demasker = stopwatch.timed("encoder", self.encoder), stopwatch.timed("demasker", self.demasker)
        rows: list[Tensor] = []
        calls: Counter[str] = Counter()
        for places in torch.arange(len(token_ids)).split(batch_size):
            source = token_ids[places].to(self.device)
            out = masked.sample(
                demasker,
                length=source.shape[1],
                batch_size=len(source),
                latents=first_registers(encoder(source), num_registers),
                generator=self._noise(seed, (first_sample + places).tolist()),
                device=self.device,
            )
            calls.update({name: count * len(source) for name, count in (out.calls | {"encoder": 1}).items()})
            rows += out.token_ids.cpu()
        return self._result(rows, [[]] * len(rows), [], calls, stopwatch.read(), "reconstruct", num_registers)

    def _noise(self, seed: int, samples: Sequence[int]) -> RowNoise:
        """The streams of some samples."""
        return RowNoise(torch.tensor([(seed << 32) + i for i in samples]).to(self.device))

    def _result(
        self,
        rows: Sequence[Tensor],
        prompt_ids: Sequence[Sequence[int]],
        stops: Sequence[str],
        calls: Counter[str],
        seconds: dict[str, float],
        algorithm: Algorithm | Literal["reconstruct"],
        num_registers: int | None,
    ) -> PipelineResult:
        """Texts and bill of what was written; `calls` are sums over texts."""
        texts, num_tokens = self._texts(rows, prompt_ids, stops)
        token_ids = nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=self.demasker.eos_token_id)
        mean_calls = {name: count / len(rows) for name, count in calls.items()}
        windows = [int(name[len("demasker[") : -1]) for name in calls if name.startswith("demasker[")]
        flops = self.flops(token_ids.shape[1], algorithm, num_registers, windows)
        return PipelineResult(texts, token_ids, bill(mean_calls, flops, seconds, num_tokens, len(rows)))

    def _texts(
        self, rows: Sequence[Tensor], prompt_ids: Sequence[Sequence[int]], stops: Sequence[str]
    ) -> tuple[list[str], int]:
        """The texts, each cut at its first stop token or string, and how many tokens were written up to there."""
        stop_ids = torch.tensor(self.demasker.stop_token_ids)
        texts, num_tokens = [], 0
        for row, prompt in zip(rows, prompt_ids, strict=True):
            is_stop = torch.isin(row[len(prompt) :], stop_ids)
            written = int(is_stop.int().argmax()) if is_stop.any() else len(is_stop)
            num_tokens += written + bool(is_stop.any())
            text, behind = self.codec.decode(row[: len(prompt) + written]), len(self.codec.decode(torch.tensor(prompt)))
            found = [at for stop in stops if (at := text.find(stop, behind)) >= 0]
            texts.append(text[: min(found, default=len(text))])
        return texts, num_tokens

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

    def latent_sampler(
        self,
        num_steps: int | None = None,
        prior_network: PriorNetwork | None = None,
        solver: Solver = "dpmpp_2m",
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        refresh: bool = False,
    ) -> RegisterSampler:
        """What draws the registers.

        Args:
            num_steps: see `__call__`, as for what follows.
            prior_network: likewise.
            solver: likewise.
            guidance_scale: likewise.
            temperature: likewise.
            refresh: take the usual steps of a later draw.

        Raises:
            ValueError: if a setting is out of range.
        """
        network = prior_network or self._usual_network()
        if network not in DEFAULT_STEPS:
            raise ValueError(f"prior_network must be {' or '.join(DEFAULT_STEPS)}, got {network!r}")
        num_steps = DEFAULT_STEPS[network][refresh] if num_steps is None else num_steps
        if network == "prior":
            return self.latent_process.sampler(num_steps, solver, guidance_scale, temperature)
        own = self.student_process.guidance_scale
        if guidance_scale not in (1.0, own):
            raise ValueError(
                f"prior_guidance_scale must be 1.0 or {own}, which is in the student's weights, got {guidance_scale}"
            )
        return self.student_process.sampler(num_steps, temperature=temperature)

    def _usual_network(self) -> PriorNetwork:
        return "student" if self.prior is None and self.student is not None else "prior"

    def _is_conditional(self, network: str) -> bool:
        """Whether a prior or student was trained with conditions."""
        return (self.latent_process if network == "prior" else self.student_process).conditional

    def check_networks(
        self, algorithm: str, num_registers: int | None, prior_network: PriorNetwork | None = None
    ) -> None:
        """Refuses an algorithm that is unknown or lacks a network, and a number of registers that was not trained.

        Raises:
            ValueError: in these cases.
        """
        if algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
        if algorithm == "masked":
            return
        if self.encoder is None or self.prior is self.student is None:
            raise ValueError(f"{algorithm} needs an encoder and a prior, but this pipeline has none; use masked")
        network = prior_network or self._usual_network()
        has = [name for name in DEFAULT_STEPS if name in self.networks()]
        if network not in has:
            raise ValueError(f"prior_network must be {' or '.join(has)}, which this pipeline has, got {network!r}")
        if algorithm == "conwithindisc" and not self._is_conditional(network):
            raise ValueError(f"conwithindisc needs a {network} trained with condition_share above 0; use conthendisc")
        if num_registers is not None and not 1 <= num_registers <= self.encoder.num_registers:
            raise ValueError(
                f"num_registers must be between 1 and the trained {self.encoder.num_registers}, got {num_registers}"
            )

    def bound_sampler(
        self,
        algorithm: Algorithm,
        sampler: MaskedSampler,
        first: RegisterSampler,
        later: RegisterSampler,
        refresh_steps: Sequence[int] | None,
        num_registers: int | None,
        stopwatch: Stopwatch,
    ) -> Callable[..., SampleOutput]:
        """An algorithm with its networks, to be called with what changes from batch to batch.

        Args:
            algorithm: see `__call__`.
            sampler: fills the tokens in.
            first: draws the registers; see `latent_sampler`.
            later: draws those of ConWithinDisc's refreshes, with the same network.
            refresh_steps: see `ConWithinDisc`.
            num_registers: see `__call__`.
            stopwatch: times the networks.
        """
        timed = {name: stopwatch.timed(name, network) for name, network in self.networks().items()}
        if algorithm == "masked":
            plain = stopwatch.timed("demasker", self.base or self.demasker)
            return partial(sampler.sample, plain, device=self.device)
        demasker, prior, encoder = timed["demasker"], timed[first.network], timed["encoder"]
        if algorithm == "conthendisc":
            then = ConThenDisc(sampler, first, num_registers)
            reader = encoder if self._is_conditional(first.network) else None
            return partial(then.sample, demasker, prior, reader, device=self.device)
        within = ConWithinDisc(sampler, first, later, refresh_steps, num_registers)
        return partial(within.sample, demasker, prior, encoder, device=self.device)

    def flops(
        self,
        length: int,
        algorithm: Algorithm | Literal["reconstruct"],
        num_registers: int | None = None,
        windows: Sequence[int] = (),
    ) -> dict[str, int]:
        """FLOPs of one call of each network the algorithm may use; `length` counts the prompt. See `network_flops`.

        They depend on shapes alone, so each is counted once.
        """
        key = (length, algorithm, num_registers, *windows)
        if key not in self._flops:
            unit = self.base or self.demasker
            if algorithm == "masked":
                self._flops[key] = network_flops(length, unit, windows=windows)
            else:
                assert self.encoder is not None
                registers = num_registers or self.encoder.num_registers
                prior, student = (None, None) if algorithm == "reconstruct" else (self.prior, self.student)
                self._flops[key] = network_flops(
                    length, self.demasker, registers, prior, self.encoder, unit, windows, student
                )
        return self._flops[key]

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the pipeline as safetensors, tokenizer files and `crocodil.json`.

        Args:
            folder: created if absent.
        """
        write_folder(
            Path(folder), self.networks(), self.codec, self.latent_process, self.student_process, self.defaults
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Reads what `save_pretrained` wrote; runs no code from the folder.

        Raises:
            ValueError: if the folder is no pipeline, or one of a later format.
        """
        return cls(**read_folder(Path(folder)))


def check_batch_and_seed(batch_size: int, seed: int) -> None:
    """Refuses a batch size below 1 and a seed outside 32 bits, with a ValueError."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not -(2**31) <= seed < 2**31:
        raise ValueError(f"seed must be at least -2^31 and below 2^31, got {seed}")


def masked_sampler(num_steps: int, **settings: Any) -> MaskedSampler:
    """A sampler of texts; see `MaskedSampler`.

    Raises:
        ValueError: if there is no such setting, or one is out of range.
    """
    known = signature(MaskedSampler).parameters
    if unknown := sorted(settings.keys() - known):
        raise ValueError(f"there is no setting {', '.join(unknown)}; those of the sampler are {', '.join(known)}")
    return MaskedSampler(num_steps, **{"temperature": 0.7, **settings})


def batches(prompt_ids: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """Indices of texts in batches of prompts of like lengths, so that little is padded."""
    order = sorted(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i]))
    return [order[at : at + batch_size] for at in range(0, len(order), batch_size)]

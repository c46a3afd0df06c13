"""The sampler of the distilled prior: from noise to K registers in a few jumps."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from crocodil.diffusion.gaussian import NoiseLevel, PredictionType, TangentSchedule, to_x0
from crocodil.diffusion.noise import RowNoise
from crocodil.samplers.decoding import STREAM_LATENTS
from crocodil.samplers.latent import check_temperature, ddim_step
from crocodil.samplers.masked import as_row_noise
from crocodil.samplers.protocols import ProgressCallback


class StudentLike(Protocol):
    """What a sampler needs of the distilled prior."""

    num_registers: int
    latent_dim: int

    def __call__(
        self, noisy_latents: Tensor, log_snr: Tensor, end_log_snr: Tensor, *, condition: Tensor | None = None
    ) -> Tensor:
        """The network's output (B, K, D) for z_t at (B,) log SNRs and a step that ends at others."""
        ...


@dataclass(frozen=True)
class StudentProcess:
    """How a student was trained, which is how it must be sampled.

    Attributes:
        noise_schedule: of its teacher; the steps divide its time evenly.
        prediction_type: of its teacher.
        conditional: whether it knows conditions.
        start_log_snr: where the flow begins; the latents there are taken for pure noise.
        guidance_scale: of its teacher, for conditional draws; 1.0 is off.
    """

    noise_schedule: TangentSchedule = field(default_factory=TangentSchedule)
    prediction_type: PredictionType = "x0"
    conditional: bool = True
    start_log_snr: float = -8.0
    guidance_scale: float = 1.0

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> "StudentProcess":
        """Rebuilds what `dataclasses.asdict` made."""
        return cls(**{**settings, "noise_schedule": TangentSchedule(**settings["noise_schedule"])})

    def log_snrs(self, t: Tensor) -> Tensor:
        """Log SNR at times t of any shape: from `start_log_snr`, and infinite where the schedule ends."""
        levels = self.noise_schedule(t).log_snr.clamp(min=self.start_log_snr)
        return torch.where(t <= self.noise_schedule.eps, torch.inf, levels)

    def sampler(self, num_steps: int = 4, gamma: float = 0.0, temperature: float = 1.0) -> "MeanFlowSampler":
        """The sampler of such a student; arguments as of `MeanFlowSampler`."""
        return MeanFlowSampler(num_steps, self, gamma, temperature)


class MeanFlowSampler:
    """Jumps along the probability flow, y_r = y_s - (s - r) u(y_s, s, r), from noise to clean latents.

    Args:
        num_steps: jumps, each a single evaluation of the network.
        process: how the student was trained.
        gamma: share of the noise that is drawn anew after each jump but the last, in [0, 1] (gamma-sampling, arXiv
            2310.02279): a jump then goes on to sqrt(1 - gamma^2) of the noise, and fresh noise makes up for the rest. 0
            follows the flow, 1 starts from clean latents every time.
        temperature: see `LatentSampler`.

    Raises:
        ValueError: if a setting is out of range.
    """

    network: ClassVar[str] = "student"

    def __init__(
        self, num_steps: int = 4, process: StudentProcess | None = None, gamma: float = 0.0, temperature: float = 1.0
    ) -> None:
        if num_steps < 1:
            raise ValueError(f"the student needs num_steps of at least 1, got {num_steps}")
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma must be between 0 and 1, got {gamma}")
        check_temperature(temperature)
        self.num_steps = num_steps
        self.process = process or StudentProcess()
        self.gamma = gamma
        self.temperature = temperature

    def num_calls(self, conditional: bool) -> int:
        """Network evaluations of one draw; guidance, if any, is in the weights."""
        return self.num_steps

    @torch.no_grad()
    def sample(
        self,
        network: StudentLike,
        *,
        batch_size: int,
        condition: Tensor | None = None,
        generator: torch.Generator | RowNoise | None = None,
        draw: int = 0,
        device: torch.device | str = "cpu",
        progress: ProgressCallback | None = None,
    ) -> Tensor:
        """Draws latents; arguments as of `LatentSampler.sample`.

        Returns:
            (B, K, D) float32, standardised latents.
        """
        noise = as_row_noise(generator, batch_size, device)
        shape = (network.num_registers, network.latent_dim)
        eps = self.process.noise_schedule.eps
        # On the CPU, as in `LatentSampler`.
        levels = self.process.log_snrs(torch.linspace(1 - eps, eps, self.num_steps + 1, dtype=torch.float64))
        stream = STREAM_LATENTS + draw
        z = self.temperature * noise.normal(stream, 0, shape)
        for i in range(self.num_steps):
            now, after = NoiseLevel.at(levels[i]), NoiseLevel.at(levels[i + 1])
            end = less_noise(after, self.gamma)
            log_snr, end_log_snr = (z.new_full((batch_size,), level.log_snr.item()) for level in (now, end))
            output = network(z, log_snr, end_log_snr, condition=condition)
            z = ddim_step(z, to_x0(output, z, now, self.process.prediction_type), now, end)
            if self.gamma and i + 1 < self.num_steps:
                z = renoise(z, self.temperature * noise.normal(stream, i + 1, shape), end, after)
            if progress is not None:
                progress(self.network, i + 1, self.num_steps)
        return z


def less_noise(level: NoiseLevel, gamma: float) -> NoiseLevel:
    """The level with sqrt(1 - gamma^2) of the ratio of noise to signal."""
    return NoiseLevel.at(level.log_snr - torch.log1p(torch.tensor(-(gamma**2), dtype=level.log_snr.dtype)))


def renoise(z: Tensor, fresh: Tensor, now: NoiseLevel, after: NoiseLevel) -> Tensor:
    """The forward process: z_t given z_s with less noise, and fresh noise (B, K, D)."""
    gain = after.alpha_t / now.alpha_t
    added = (after.sigma_t**2 - (gain * now.sigma_t) ** 2).sqrt()
    return (gain * z + added * fresh).to(z.dtype)

"""The sampler of the latent prior: from noise to K registers."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, get_args

import torch
from torch import Tensor

from crocodil.diffusion.gaussian import GaussianPoint, NoiseLevel, PredictionType, TangentSchedule, to_x0
from crocodil.diffusion.noise import RowNoise
from crocodil.samplers.decoding import STREAM_LATENTS
from crocodil.samplers.masked import as_row_noise
from crocodil.samplers.protocols import ProgressCallback

Solver = Literal["ddim", "dpmpp_2m", "ancestral"]


class PriorLike(Protocol):
    """What a sampler needs of G_psi."""

    num_registers: int
    latent_dim: int

    def __call__(
        self,
        noisy_latents: Tensor,
        log_snr: Tensor,
        *,
        self_condition: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """The network's output (B, K, D) for z_t at (B,) log SNRs."""
        ...


class RegisterSampler(Protocol):
    """Draws registers with one network: `LatentSampler` with the prior, `MeanFlowSampler` with its student.

    Attributes:
        network: name of the network, under which its calls are counted.
    """

    network: ClassVar[str]

    def num_calls(self, conditional: bool) -> int:
        """Network evaluations of one draw."""
        ...

    def sample(
        self,
        network: Any,
        /,
        *,
        batch_size: int,
        condition: Tensor | None = None,
        generator: torch.Generator | RowNoise | None = None,
        draw: int = 0,
        device: torch.device | str = "cpu",
        progress: ProgressCallback | None = None,
    ) -> Tensor:
        """Latents (B, K, D); see `LatentSampler.sample`."""
        ...


class LatentSampler:
    r"""Integrates the latent diffusion from t = 1 to t = 0.

    With lambda = log SNR / 2 and h the step in lambda, from z_t and the estimate x of z_0:

    - "ddim" (arXiv 2010.02502), order 1: z_s = (sigma_s / sigma_t) z_t + alpha_s (1 - e^-h) x.
    - "dpmpp_2m" (DPM-Solver++ 2M, arXiv 2211.01095), order 2: the same with x extrapolated from the last two
      estimates, x + (x - x_previous) h / (2 h_previous).
    - "ancestral" (DDPM, arXiv 2006.11239): z_s drawn from q(z_s | z_t, z_0 = x).

    The last step returns the estimate itself.

    Args:
        num_steps: network steps; with guidance each costs two evaluations.
        solver: see above.
        noise_schedule: the schedule the prior was trained with.
        prediction_type: what the prior predicts.
        self_conditioning: feed each step's estimate to the next.
        guidance_scale: classifier-free guidance (arXiv 2207.12598) of a conditional draw, x_none + scale (x_cond -
            x_none); 1.0 is off.
        temperature: standard deviation of the noise, at least 0; below 1 sketches are likelier and more alike, at 0 all
            are the same.

    Raises:
        ValueError: if a setting is out of range.
    """

    network: ClassVar[str] = "prior"

    def __init__(
        self,
        num_steps: int = 32,
        solver: Solver = "dpmpp_2m",
        noise_schedule: TangentSchedule | None = None,
        prediction_type: PredictionType = "x0",
        self_conditioning: bool = True,
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
    ) -> None:
        if num_steps < 1:
            raise ValueError(f"the prior needs num_steps of at least 1, got {num_steps}")
        if solver not in get_args(Solver):
            raise ValueError(f"solver must be one of {', '.join(get_args(Solver))}, got {solver!r}")
        if prediction_type not in get_args(PredictionType):
            raise ValueError(
                f"prediction_type must be one of {', '.join(get_args(PredictionType))}, got {prediction_type!r}"
            )
        check_temperature(temperature)
        self.num_steps = num_steps
        self.solver: Solver = solver
        self.noise_schedule = noise_schedule or TangentSchedule()
        self.prediction_type: PredictionType = prediction_type
        self.self_conditioning = self_conditioning
        self.guidance_scale = guidance_scale
        self.temperature = temperature

    @property
    def calls_per_step(self) -> int:
        """Network evaluations of one guided step."""
        return 1 if self.guidance_scale == 1.0 else 2

    def num_calls(self, conditional: bool) -> int:
        """Network evaluations of one draw."""
        return self.num_steps * (self.calls_per_step if conditional else 1)

    @torch.no_grad()
    def sample(
        self,
        prior: PriorLike,
        *,
        batch_size: int,
        condition: Tensor | None = None,
        generator: torch.Generator | RowNoise | None = None,
        draw: int = 0,
        device: torch.device | str = "cpu",
        progress: ProgressCallback | None = None,
    ) -> Tensor:
        """Draws latents.

        Args:
            prior: G_psi.
            batch_size: B.
            condition: (B, K, D), h_phi(x_t); None draws without condition.
            generator: source of randomness.
            draw: number of this draw within a run; each has noise of its own.
            device: where the latents lie.
            progress: called after each step.

        Returns:
            (B, K, D) float32, standardised latents.
        """
        noise = as_row_noise(generator, batch_size, device)
        shape = (prior.num_registers, prior.latent_dim)
        eps = self.noise_schedule.eps  # within [eps, 1 - eps] no two times share a log SNR
        # On the CPU: numbers, which a GPU takes as they are, instead of many small kernels on it in every step.
        times = torch.linspace(1 - eps, eps, self.num_steps + 1, dtype=torch.float64)
        points = [self.noise_schedule(t) for t in times]
        stream = STREAM_LATENTS + draw
        z = self.temperature * noise.normal(stream, 0, shape)
        estimate: Tensor | None = None
        for i in range(self.num_steps):
            previous, estimate = estimate, self._estimate(prior, z, points[i], estimate, condition)
            if i + 1 == self.num_steps:
                break
            if self.solver == "ancestral":
                fresh = self.temperature * noise.normal(stream, i + 1, shape)
                z = ancestral_step(z, estimate, fresh, points[i], points[i + 1])
            elif self.solver == "dpmpp_2m" and previous is not None:
                z = ddim_step(z, extrapolate(estimate, previous, points[i - 1 : i + 2]), points[i], points[i + 1])
            else:
                z = ddim_step(z, estimate, points[i], points[i + 1])
            if progress is not None:
                progress(self.network, i + 1, self.num_steps)
        if progress is not None:
            progress(self.network, self.num_steps, self.num_steps)
        assert estimate is not None
        return estimate

    def _estimate(
        self, prior: PriorLike, z: Tensor, point: GaussianPoint, previous: Tensor | None, condition: Tensor | None
    ) -> Tensor:
        """The estimate of z_0 at one point, guided if asked for."""
        log_snr = z.new_full((z.shape[0],), point.log_snr.item())
        previous = previous if self.self_conditioning else None

        def x0(given: Tensor | None) -> Tensor:
            output = prior(z, log_snr, self_condition=previous, condition=given)
            return to_x0(output, z, point, self.prediction_type)

        if condition is None or self.guidance_scale == 1.0:
            return x0(condition)
        unconditional = x0(None)
        return unconditional + self.guidance_scale * (x0(condition) - unconditional)


def check_temperature(temperature: float) -> None:
    """Refuses a temperature of the noise that is negative, infinite or no number, with a ValueError."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"the temperature of a sketch must be a number of at least 0, got {temperature}")


def ddim_step(z: Tensor, estimate: Tensor, now: NoiseLevel, after: NoiseLevel) -> Tensor:
    """z_s = (sigma_s / sigma_t) (z_t - alpha_t x) + alpha_s x."""
    ratio = after.sigma_t / now.sigma_t
    return (ratio * z + (after.alpha_t - ratio * now.alpha_t) * estimate).to(z.dtype)


def extrapolate(estimate: Tensor, previous: Tensor, points: list[GaussianPoint]) -> Tensor:
    """X + (x - x_previous) h / (2 h_previous): the second-order estimate between three consecutive points."""
    before, now, after = (point.log_snr for point in points)
    ratio = (after - now) / (now - before)
    return (estimate + (estimate - previous) * (ratio / 2)).to(estimate.dtype)


def ancestral_step(z: Tensor, estimate: Tensor, fresh: Tensor, now: GaussianPoint, after: GaussianPoint) -> Tensor:
    """A draw from q(z_s | z_t, z_0 = x), the Gaussian posterior of a variance-preserving process."""
    share = -torch.expm1(now.log_snr - after.log_snr)  # 1 - SNR_t / SNR_s, the variance the step removes
    mean = (1 - share) * (after.alpha_t / now.alpha_t) * z + share * after.alpha_t * estimate
    return (mean + after.sigma_t * share.sqrt() * fresh).to(z.dtype)


@dataclass(frozen=True)
class LatentProcess:
    """How a prior was trained, which is how it must be sampled."""

    noise_schedule: TangentSchedule = field(default_factory=TangentSchedule)
    prediction_type: PredictionType = "x0"
    self_conditioning: bool = True
    conditional: bool = True

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> "LatentProcess":
        """Rebuilds what `dataclasses.asdict` made."""
        return cls(**{**settings, "noise_schedule": TangentSchedule(**settings["noise_schedule"])})

    def sampler(
        self,
        num_steps: int = 32,
        solver: Solver = "dpmpp_2m",
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
    ) -> LatentSampler:
        """The sampler of such a prior; arguments as of `LatentSampler`."""
        return LatentSampler(
            num_steps,
            solver,
            self.noise_schedule,
            self.prediction_type,
            self.self_conditioning,
            guidance_scale,
            temperature,
        )

r"""The Gaussian process of the latents: z_t = alpha_t z_0 + sigma_t noise with alpha_t^2 + sigma_t^2 = 1."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

PredictionType = Literal["x0", "eps", "v"]


@dataclass(frozen=True)
class NoiseLevel:
    """log SNR = log(alpha_t^2 / sigma_t^2), signal and noise of a variance-preserving process; all of one shape."""

    log_snr: Tensor
    alpha_t: Tensor
    sigma_t: Tensor

    @staticmethod
    def at(log_snr: Tensor) -> "NoiseLevel":
        """The level of a log SNR, any float shape; infinity is no noise."""
        return NoiseLevel(log_snr, torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt())


@dataclass(frozen=True)
class GaussianPoint(NoiseLevel):
    """A schedule at t; every field has the shape and dtype of t. `d_` is the derivative with respect to t."""

    d_log_snr: Tensor
    d_alpha_t: Tensor
    d_sigma_t: Tensor


@dataclass(frozen=True)
class TangentSchedule:
    r"""log SNR(t) = -slope log tan(pi t / 2) - 2 log d, variance-preserving.

    slope = 2 with d = 1 is the cosine schedule; d > 1 moves the effort to high noise (tan-d of TEncDM, arXiv
    2402.19097, used by DiLaDiff with d = 10 and here). A slope above 2 spreads log SNR wider on both sides.

    Args:
        d: ratio of noise to signal at t = 1/2, above 0.
        slope: steepness of log SNR in log tan, above 0.
        eps: times are kept in [eps, 1 - eps], where log SNR is finite.
    """

    d: float = 10.0
    slope: float = 2.0
    eps: float = 1e-3

    def __call__(self, t: Tensor) -> GaussianPoint:
        """The schedule at t in [0, 1], any float shape."""
        angle = math.pi / 2 * t.clamp(self.eps, 1 - self.eps)
        log_snr = -self.slope * angle.tan().log() - 2 * math.log(self.d)
        alpha_t, sigma_t = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
        d_log_snr = -self.slope * math.pi / torch.sin(2 * angle)
        return GaussianPoint(
            log_snr=log_snr,
            alpha_t=alpha_t,
            sigma_t=sigma_t,
            d_log_snr=d_log_snr,
            d_alpha_t=0.5 * alpha_t * sigma_t**2 * d_log_snr,
            d_sigma_t=-0.5 * sigma_t * alpha_t**2 * d_log_snr,
        )


def add_noise(latents: Tensor, noise: Tensor, point: NoiseLevel) -> Tensor:
    """z_t = alpha_t z_0 + sigma_t noise; latents and noise (B, K, D), the schedule at (B,) times."""
    return _expand(point.alpha_t, latents) * latents + _expand(point.sigma_t, latents) * noise


def to_x0(output: Tensor, noisy_latents: Tensor, point: NoiseLevel, prediction_type: PredictionType) -> Tensor:
    """The estimate of z_0 in a network's output.

    Args:
        output: (B, K, D), what the network returned.
        noisy_latents: (B, K, D), z_t.
        point: the schedule at (B,) times.
        prediction_type: "x0", "eps" or "v" (v = alpha_t noise - sigma_t z_0, arXiv 2202.00512).
    """
    alpha_t, sigma_t = _expand(point.alpha_t, output), _expand(point.sigma_t, output)
    if prediction_type == "x0":
        return output
    if prediction_type == "eps":
        return (noisy_latents - sigma_t * output) / alpha_t
    return alpha_t * noisy_latents - sigma_t * output


def prediction_target(latents: Tensor, noise: Tensor, point: GaussianPoint, prediction_type: PredictionType) -> Tensor:
    """What a network of the given prediction type is asked for: z_0, noise, or v; all (B, K, D)."""
    if prediction_type == "x0":
        return latents
    if prediction_type == "eps":
        return noise
    return _expand(point.alpha_t, latents) * noise - _expand(point.sigma_t, latents) * latents


def denoising_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error for each row: (B, K, D), (B, K, D) -> (B,)."""
    return F.mse_loss(output, target, reduction="none").flatten(1).mean(1)


def disturb(latents: Tensor, noise: Tensor, noise_std: float | Tensor) -> Tensor:
    """z~ = (z + sigma noise) / sqrt(1 + sigma^2), the robustness noise of the autoencoder stage (CRoCoDiL, section 3).

    On unit-variance latents the variance stays one and cos(z~, z) = 1 / sqrt(1 + sigma^2): sigma = 0.75 is the
    paper's target of 0.8.

    Args:
        latents: (B, K, D), standardised.
        noise: (B, K, D), standard normal.
        noise_std: sigma, a number or anything that broadcasts to (B, K, D).
    """
    sigma = torch.as_tensor(noise_std, dtype=latents.dtype, device=latents.device)
    return (latents + sigma * noise) * torch.rsqrt(1 + sigma**2)


def _expand(value: Tensor, like: Tensor) -> Tensor:
    value = value.to(like.dtype)
    return value.view(-1, *[1] * (like.ndim - 1)) if value.ndim else value

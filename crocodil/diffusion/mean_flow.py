r"""MeanFlow (arXiv 2505.13447) along the probability flow of the latents: the maths of the distilled prior.

In straight coordinates y = z_t / (alpha + sigma) and s = sigma / (alpha + sigma), the noisy latents of any
variance-preserving schedule are y = (1 - s) z_0 + s noise, and the flow is dy/ds = v = (y - x) / s, with x the
teacher's estimate of z_0. The student tells the mean velocity u over [r, s] by an estimate X of its own,
u = (y - X) / s, so that y_r = y_s - (s - r) u is one DDIM step with X in the place of x. At r = s, X = x.

MeanFlow's identity u = v - (s - r) du/ds becomes, with rho = r / s and the derivative taken along the flow,

    X = x + (1 - rho) (X - x + 2 / (1 - s) dX/dlambda),   lambda = log SNR = 2 log((1 - s) / s),

in which no quantity grows without bound as s goes to 0, and which can be told in the network's own coordinates:
dz_t/dlambda = alpha / 2 (x - alpha z_t). But as s goes to 1, 2 / (1 - s) magnifies whatever the network says of lambda
by mistake, and a student may chase its own errors. The identity over a finite leg from s to m (arXiv 2507.16884),

    (s - r) u(s, r) = (s - m) u(s, m) + (m - r) u(m, r),

with the teacher for the first leg and the student for the second, asks for a mean of estimates, which cannot grow:

    X(s, r) = w X(m, r) + (1 - w) x,   w = (1 - r / m) / (1 - r / s).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from crocodil.diffusion.gaussian import NoiseLevel


def noise_share(log_snr: Tensor) -> Tensor:
    """S = sigma / (alpha + sigma) of log SNRs, any shape; 0 at infinity."""
    return torch.sigmoid(-log_snr / 2)


def flow_slope(noisy_latents: Tensor, estimate: Tensor, log_snr: Tensor) -> Tensor:
    """dz_t / dlambda along the probability flow.

    Args:
        noisy_latents: (B, ...) float, z_t.
        estimate: (B, ...), the teacher's x.
        log_snr: (B,), lambda.
    """
    alpha_t = _expand(torch.sigmoid(log_snr).sqrt(), noisy_latents)
    return alpha_t / 2 * (estimate - alpha_t * noisy_latents)


@torch.no_grad()
def mean_flow_target(
    student: Callable[[Tensor, NoiseLevel], Tensor],
    noisy_latents: Tensor,
    estimate: Tensor,
    log_snr: Tensor,
    end_log_snr: Tensor,
    tangent_scale: float = 1.0,
) -> Tensor:
    """What the student's estimate X(z_t, lambda, lambda_r) is asked for, by one forward-mode derivative.

    Args:
        student: X as a function of z_t and its level, with lambda_r held fixed.
        noisy_latents: (B, ...) float, z_t.
        estimate: (B, ...), the teacher's x at z_t, which gives the direction of the flow.
        log_snr: (B,), lambda at s, finite.
        end_log_snr: (B,), at r; at least `log_snr`, infinite for r = 0.
        tangent_scale: factor of the derivative's term; below 1 while training warms up, 0 asks for x itself.

    Returns:
        (B, ...), without gradient.
    """
    tangents = flow_slope(noisy_latents, estimate, log_snr), torch.ones_like(log_snr)

    def output_at(noisy: Tensor, log_snr: Tensor) -> Tensor:
        return student(noisy, NoiseLevel.at(log_snr))

    with forward_mode(noisy_latents.device):
        output, slope = jvp(output_at, (noisy_latents, log_snr), tangents)  # type: ignore[misc]  # 3 with has_aux
    share = noise_share(log_snr)
    jump = _expand(1 - noise_share(end_log_snr) / share, output)
    return estimate + tangent_scale * jump * (output - estimate + 2 / _expand(1 - share, output) * slope)


@torch.no_grad()
def split_target(
    student: Callable[[Tensor, NoiseLevel], Tensor],
    teacher: Callable[[Tensor, NoiseLevel, Tensor], Tensor],
    noisy_latents: Tensor,
    estimate: Tensor,
    level: NoiseLevel,
    end_log_snr: Tensor,
    first_leg: float,
) -> Tensor:
    """What the student's estimate X(z_t, lambda, lambda_r) is asked for, by a leg of the teacher and a leg of its own.

    The teacher goes to m = max((1 - first_leg) s, r) by Heun's method, whose error is of third order in the leg.

    Args:
        student: X as a function of z_t and its level, with lambda_r held fixed.
        teacher: x as a function of z_t, its level and the estimate before.
        noisy_latents: (B, ...) float, z_t.
        estimate: (B, ...), the teacher's x at z_t.
        level: of z_t, (B,), finite.
        end_log_snr: (B,), at r; at least that of `level`, infinite for r = 0.
        first_leg: share of s that the teacher goes, in (0, 1].

    Returns:
        (B, ...), without gradient; where r = s, `estimate`.
    """
    start, end = noise_share(level.log_snr), noise_share(end_log_snr)
    middle = torch.maximum((1 - first_leg) * start, end)
    between = NoiseLevel.at(torch.where(end < start, -2 * torch.logit(middle), level.log_snr))
    ahead = teacher(jump(noisy_latents, estimate, level, between), between, estimate)
    mean = estimate + _expand(end < start, ahead) / 2 * (ahead - estimate)
    rest = student(jump(noisy_latents, mean, level, between), between)
    tiny = torch.finfo(start.dtype).tiny
    weight = _expand((middle - end) * start / (middle * (start - end)).clamp(min=tiny), rest)
    return weight * rest + (1 - weight) * mean


def jump(noisy_latents: Tensor, estimate: Tensor, now: NoiseLevel, after: NoiseLevel) -> Tensor:
    """One DDIM step, y_r = (r / s) y_s + (1 - r / s) x, of rows at levels of their own.

    Args:
        noisy_latents: (B, ...) float, z_t.
        estimate: (B, ...), x.
        now: (B,), level of z_t.
        after: (B,), where the step ends.
    """
    ratio = _expand(after.sigma_t / now.sigma_t, noisy_latents)
    alpha_t, alpha_end = _expand(now.alpha_t, estimate), _expand(after.alpha_t, estimate)
    return ratio * noisy_latents + (alpha_end - ratio * alpha_t) * estimate


@contextmanager
def forward_mode(device: torch.device) -> Iterator[None]:
    """Where networks have a forward-mode derivative: attention by its formula, nothing compiled.

    Half precision is off, too: 2 / (1 - s) would magnify its errors a hundredfold.

    Args:
        device: of the networks.
    """
    whole_precision = torch.autocast(device.type, enabled=False)
    with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"), whole_precision:
        yield


def adaptive_loss(losses: Tensor, power: float, floor: float = 1e-3) -> Tensor:
    """Losses over a power of themselves that has no gradient (MeanFlow, section 4.3): rows of large loss count less.

    Args:
        losses: (B,) float, squared errors.
        power: 0 leaves them as they are; near 1 each row pulls as strongly as any other.
        floor: added to a loss before the power is taken.
    """
    return losses / (losses.detach() + floor) ** power


def step_ends(t: Tensor, uniform: Tensor, instant_share: float, final_share: float) -> Tensor:
    """Times at which training steps end: t_r = t clip((u - final_share) / (1 - final_share - instant_share), 0, 1).

    Args:
        t: (B,), times at which they begin.
        uniform: (B,), u, uniform on (0, 1).
        instant_share: share of steps of no length, which end where they begin.
        final_share: share of steps that end at time 0.
    """
    return t * ((uniform - final_share) / (1 - final_share - instant_share)).clamp(0, 1)


def _expand(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.dtype).view(-1, *[1] * (like.ndim - 1))

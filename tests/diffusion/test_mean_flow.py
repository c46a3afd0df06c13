"""The flow in straight coordinates, both targets of the student against known flows, and what rows are drawn."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from crocodil.diffusion.gaussian import NoiseLevel, TangentSchedule
from crocodil.diffusion.mean_flow import (
    adaptive_loss,
    flow_slope,
    jump,
    mean_flow_target,
    noise_share,
    split_target,
    step_ends,
)
from crocodil.models import LatentStudent

MEAN, VARIANCE = 0.7, torch.tensor([0.3, 2.0], dtype=torch.float64)
"""Two coordinates, each normally distributed."""
LOG_SNR = torch.tensor([-7.0, -3.0, -1.0, 0.5, 4.0], dtype=torch.float64)
END = torch.tensor([-2.0, torch.inf, 1.0, 0.5, torch.inf], dtype=torch.float64)


def posterior_mean(z: Tensor, level: NoiseLevel, *_: Any) -> Tensor:
    """E[z_0 | z_t]."""
    alpha, sigma = level.alpha_t[:, None], level.sigma_t[:, None]
    return MEAN + alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2) * (z - alpha * MEAN)


def deviation(share: Tensor) -> Tensor:
    """Of y_s, which moves along the flow as (1 - s) mean + deviation times a constant."""
    return ((1 - share[:, None]) ** 2 * VARIANCE + share[:, None] ** 2).sqrt()


def exact(end_log_snr: Tensor) -> Callable[..., Tensor]:
    """The mean estimate X of the exact flow map; the posterior mean where the step has no length."""

    def estimate(z: Tensor, level: NoiseLevel) -> Tensor:
        s, r = noise_share(level.log_snr), noise_share(end_log_snr)
        y = z / (level.alpha_t + level.sigma_t)[:, None]
        constant = (y - (1 - s[:, None]) * MEAN) / deviation(s)
        y_r = (1 - r[:, None]) * MEAN + deviation(r) * constant
        rho = (r / s)[:, None]
        flows = (rho < 1).expand_as(y)
        return torch.where(flows, (y_r - rho * y) / (1 - rho).clamp(min=1e-12), posterior_mean(z, level))

    return estimate


@pytest.fixture
def noisy() -> Tensor:
    return torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_straight_coordinates_do_not_depend_on_the_schedule(noisy: Tensor) -> None:
    """dy/ds = (y - x) / s by Runge-Kutta against fine DDIM steps of two schedules, and the flow in closed form."""
    first, last = -6.0, 6.0
    ends = [NoiseLevel.at(torch.full((5,), value, dtype=torch.float64)) for value in (first, last)]
    y = noisy / (ends[0].alpha_t + ends[0].sigma_t)[:, None]

    def velocity(y: Tensor, s: Tensor) -> Tensor:
        level = NoiseLevel.at(-2 * torch.logit(s).expand(5))
        return (y - posterior_mean(y * (level.alpha_t + level.sigma_t)[:, None], level)) / s

    grid = torch.linspace(*(noise_share(end.log_snr)[0].item() for end in ends), 201, dtype=torch.float64)
    for s, step in zip(grid[:-1], grid.diff(), strict=True):
        one = velocity(y, s)
        two = velocity(y + step / 2 * one, s + step / 2)
        three = velocity(y + step / 2 * two, s + step / 2)
        y = y + step / 6 * (one + 2 * two + 2 * three + velocity(y + step * three, s + step))
    constant = exact(ends[1].log_snr)(noisy, ends[0])
    torch.testing.assert_close(jump(noisy, constant, *ends), y * (ends[1].alpha_t + ends[1].sigma_t)[:, None])
    for schedule in (TangentSchedule(d=1.0), TangentSchedule(d=5.0, slope=3.0)):
        levels = schedule(torch.linspace(1, 0, 4001, dtype=torch.float64)).log_snr
        levels = [first, *levels[(levels > first) & (levels < last)].tolist(), last]
        z = noisy
        points = [NoiseLevel.at(torch.full((5,), value, dtype=torch.float64)) for value in levels]
        for now, after in pairwise(points):
            z = jump(z, posterior_mean(z, now), now, after)
        torch.testing.assert_close(z, jump(noisy, constant, *ends), rtol=2e-3, atol=2e-3)


def test_the_slope_is_that_of_a_small_jump(noisy: Tensor) -> None:
    now, after = NoiseLevel.at(LOG_SNR), NoiseLevel.at(LOG_SNR + 1e-6)
    estimate = posterior_mean(noisy, now)
    difference = (jump(noisy, estimate, now, after) - noisy) / 1e-6
    torch.testing.assert_close(flow_slope(noisy, estimate, LOG_SNR), difference, rtol=1e-5, atol=1e-8)


def test_the_exact_flow_is_its_own_target(noisy: Tensor) -> None:
    level, student = NoiseLevel.at(LOG_SNR), exact(END)
    estimate, expected = posterior_mean(noisy, level), student(noisy, level)
    target = mean_flow_target(student, noisy, estimate, LOG_SNR, END)
    torch.testing.assert_close(target, expected, rtol=1e-9, atol=1e-9)
    assert (expected - estimate)[0].abs().max() > 0.05  # the posterior mean would not do
    other = exact(END + 0.1)
    assert (mean_flow_target(other, noisy, estimate, LOG_SNR, END) - other(noisy, level))[0].abs().max() > 1e-3


def test_the_teacher_s_leg_has_an_error_of_third_order(noisy: Tensor) -> None:
    level, student = NoiseLevel.at(LOG_SNR), exact(END)
    estimate, expected = posterior_mean(noisy, level), student(noisy, level)
    errors = []
    for leg in (0.025, 0.0125, 0.00625):
        target = split_target(student, posterior_mean, noisy, estimate, level, END, leg)
        errors.append((target - expected).abs().amax(1))
    moves = END > LOG_SNR
    orders = torch.log2(torch.stack(errors[:-1]) / torch.stack(errors[1:]))[:, moves]
    assert (errors[-1] < 1e-3).all() and (errors[-1][~moves] == 0).all()
    assert ((orders > 2.5) & (orders < 3.5)).all()


def test_a_leg_that_reaches_the_end_leaves_nothing_to_the_student(noisy: Tensor) -> None:
    level = NoiseLevel.at(LOG_SNR[:3])
    estimate, ends = posterior_mean(noisy[:3], level), LOG_SNR[:3] + 0.02
    target = split_target(lambda z, _: z * torch.inf, posterior_mean, noisy[:3], estimate, level, ends, 0.5)
    assert not target.isfinite().any()  # infinity times no weight: the student is asked all the same
    target = split_target(lambda z, _: z + 1e6, posterior_mean, noisy[:3], estimate, level, ends, 0.5)
    torch.testing.assert_close(target, exact(ends)(noisy[:3], level), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("first_leg", [0.0, 0.1])
def test_a_step_of_no_length_asks_for_the_teacher(first_leg: float, noisy: Tensor) -> None:
    level, wrong = NoiseLevel.at(LOG_SNR), torch.randn(5, 2, dtype=torch.float64)

    def student(z: Tensor, level: NoiseLevel) -> Tensor:
        return z * level.sigma_t[:, None] + 3

    if first_leg:
        target = split_target(student, posterior_mean, noisy, wrong, level, LOG_SNR, first_leg)
    else:
        target = mean_flow_target(student, noisy, wrong, LOG_SNR, LOG_SNR)
    torch.testing.assert_close(target, wrong, rtol=0, atol=1e-15)


@pytest.fixture(scope="module")
def student(make_prior: Callable) -> LatentStudent:
    network = LatentStudent.of(make_prior()).double()
    with torch.no_grad():
        for weight in network.end_embedding.parameters():
            weight += 0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    return network


def test_the_derivative_equals_finite_differences_through_attention(student: LatentStudent) -> None:
    z, estimate = torch.randn(2, 5, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).unbind(0)

    def output(z: Tensor, level: NoiseLevel) -> Tensor:
        return student(z, level.log_snr, END)

    target = mean_flow_target(output, z, estimate, LOG_SNR, END, tangent_scale=0.6)
    step = 1e-5
    slope = flow_slope(z, estimate, LOG_SNR)
    ahead, behind = (output(z + h * slope, NoiseLevel.at(LOG_SNR + h)).detach() for h in (step, -step))
    share, end = noise_share(LOG_SNR)[:, None, None], noise_share(END)[:, None, None]
    # u = (y - X) / s and its derivative with respect to s, by the chain rule from that with respect to lambda
    x, dx_ds = output(z, NoiseLevel.at(LOG_SNR)).detach(), (ahead - behind) / (2 * step) * -2 / (share * (1 - share))
    y = z / (NoiseLevel.at(LOG_SNR).alpha_t + NoiseLevel.at(LOG_SNR).sigma_t)[:, None, None]
    v, u = (y - estimate) / share, (y - x) / share
    du_ds = (v - dx_ds - u) / share
    expected = y - share * (v - 0.6 * (share - end) * du_ds)
    torch.testing.assert_close(target, expected, rtol=1e-6, atol=1e-6)


def test_targets_have_no_gradient_and_derivatives_leave_attention_as_it_was(student: LatentStudent) -> None:
    z = torch.randn(5, 4, 3, dtype=torch.float64)

    def output(z: Tensor, level: NoiseLevel) -> Tensor:
        return student(z, level.log_snr, END)

    level, before = NoiseLevel.at(LOG_SNR), torch.backends.cuda.flash_sdp_enabled()
    assert not mean_flow_target(output, z, z, LOG_SNR, END).requires_grad
    assert not split_target(output, lambda z, _, __: z, z, z, level, END, 0.1).requires_grad
    assert torch.backends.cuda.flash_sdp_enabled() == before and output(z, level).requires_grad


def test_half_precision_is_off_where_a_derivative_is_taken(student: LatentStudent) -> None:
    network = LatentStudent.of(student).float()
    z = torch.randn(5, 4, 3)

    def output(z: Tensor, level: NoiseLevel) -> Tensor:
        return network(z, level.log_snr, END.float())

    plain = mean_flow_target(output, z, z, LOG_SNR.float(), END.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(mean_flow_target(output, z, z, LOG_SNR.float(), END.float()), plain)


def test_ends_of_steps() -> None:
    t, uniform = torch.full((1000,), 0.8), (torch.arange(1000) + 0.5) / 1000
    ends = step_ends(t, uniform, instant_share=0.25, final_share=0.15)
    assert (ends == 0).sum() == 150 and (ends == t).sum() == 250
    torch.testing.assert_close(ends[150:750], 0.8 * (torch.arange(600) + 0.5) / 600)


def test_adaptive_loss_scales_gradients_and_nothing_else() -> None:
    losses = torch.tensor([0.01, 1.0, 100.0], requires_grad=True)
    assert torch.equal(adaptive_loss(losses, 0.0), losses)
    (gradient,) = torch.autograd.grad(adaptive_loss(losses, 0.5, floor=0.0).sum(), losses)
    torch.testing.assert_close(gradient, torch.tensor([10.0, 1.0, 0.1]))

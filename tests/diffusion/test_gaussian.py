import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from crocodil.diffusion.gaussian import (
    PredictionType,
    TangentSchedule,
    add_noise,
    denoising_loss,
    disturb,
    prediction_target,
    to_x0,
)

SCHEDULES = [TangentSchedule(), TangentSchedule(d=1.0), TangentSchedule(d=3.0, slope=3.5)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("name", ["log_snr", "alpha_t", "sigma_t"])
def test_derivatives_are_those_of_autograd(schedule: TangentSchedule, name: str) -> None:
    t = torch.linspace(0.002, 0.998, 57, dtype=torch.float64, requires_grad=True)
    point = schedule(t)
    (derivative,) = torch.autograd.grad(getattr(point, name).sum(), t)
    torch.testing.assert_close(getattr(point, f"d_{name}"), derivative)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_schedule_preserves_variance_and_falls_monotonically(schedule: TangentSchedule) -> None:
    point = schedule(torch.linspace(0.001, 0.999, 500, dtype=torch.float64))
    torch.testing.assert_close(point.alpha_t**2 + point.sigma_t**2, torch.ones(500, dtype=torch.float64))
    torch.testing.assert_close(point.log_snr, 2 * (point.alpha_t / point.sigma_t).log())
    assert (point.log_snr.diff() < 0).all()
    assert (point.alpha_t.diff() < 0).all()
    assert (point.sigma_t.diff() > 0).all()


def test_schedule_is_the_cosine_schedule_at_slope_2_and_d_1() -> None:
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    point = TangentSchedule(d=1.0, slope=2.0)(t)
    torch.testing.assert_close(point.alpha_t, torch.cos(math.pi / 2 * t))
    torch.testing.assert_close(point.sigma_t, torch.sin(math.pi / 2 * t))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_d_is_the_noise_to_signal_ratio_half_way_and_slope_the_steepness(schedule: TangentSchedule) -> None:
    middle = schedule(torch.tensor(0.5, dtype=torch.float64))
    assert (middle.sigma_t / middle.alpha_t).item() == pytest.approx(schedule.d)
    assert middle.d_log_snr.item() == pytest.approx(-schedule.slope * math.pi)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_schedule_is_finite_at_both_ends_and_stands_still_there(schedule: TangentSchedule, dtype: torch.dtype) -> None:
    ends, kept = schedule(torch.tensor([0.0, 1.0], dtype=dtype)), schedule(torch.tensor([1e-3, 1 - 1e-3], dtype=dtype))
    for name, values in vars(ends).items():
        assert values.isfinite().all(), name
        torch.testing.assert_close(values, getattr(kept, name))
    assert ends.alpha_t[0] > 0.99
    assert ends.sigma_t[1] > 0.9999


@pytest.mark.parametrize("prediction_type", get_args(PredictionType))
def test_a_perfect_prediction_gives_back_the_clean_latents(prediction_type: PredictionType) -> None:
    z_0, noise = normal(7, 4, 3), normal(7, 4, 3, seed=1)
    point = TangentSchedule()(torch.linspace(0, 1, 7, dtype=torch.float64))
    z_t = add_noise(z_0, noise, point)
    target = prediction_target(z_0, noise, point, prediction_type)
    torch.testing.assert_close(to_x0(target, z_t, point, prediction_type), z_0)


def test_each_row_is_noised_at_its_own_time() -> None:
    z_0, noise = normal(3, 2, 2), normal(3, 2, 2, seed=1)
    point = TangentSchedule()(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    for i, row in enumerate(add_noise(z_0, noise, point)):
        torch.testing.assert_close(row, point.alpha_t[i] * z_0[i] + point.sigma_t[i] * noise[i])


def test_prediction_targets_are_the_definitions() -> None:
    z_0, noise = normal(2, 1, 2), normal(2, 1, 2, seed=1)
    point = TangentSchedule(d=1.0)(torch.tensor([0.3, 0.8], dtype=torch.float64))
    assert prediction_target(z_0, noise, point, "x0") is z_0
    assert prediction_target(z_0, noise, point, "eps") is noise
    # v is the velocity of the circle z(angle) = cos z_0 + sin noise
    angle = torch.tensor([0.3, 0.8], dtype=torch.float64)[:, None, None] * math.pi / 2
    torch.testing.assert_close(prediction_target(z_0, noise, point, "v"), angle.cos() * noise - angle.sin() * z_0)


def test_denoising_loss_is_the_mean_square_of_each_row() -> None:
    output = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [0.0, 6.0]]])
    torch.testing.assert_close(denoising_loss(output, torch.zeros(2, 2, 2)), torch.tensor([30 / 4, 36 / 4]))


@pytest.mark.parametrize("sigma", [0.0, 0.3, 0.75, 2.0])
def test_disturbed_latents_have_the_promised_cosine(sigma: float) -> None:
    # Orthogonal noise of the same length makes the statistical promise an identity.
    z = torch.tensor([[[3.0, 4.0], [1.0, 2.0]]], dtype=torch.float64)
    noise = torch.tensor([[[-4.0, 3.0], [-2.0, 1.0]]], dtype=torch.float64)
    disturbed = disturb(z, noise, sigma)
    cosine = torch.cosine_similarity(disturbed, z, dim=-1)
    torch.testing.assert_close(cosine, torch.full((1, 2), 1 / math.sqrt(1 + sigma**2), dtype=torch.float64))
    torch.testing.assert_close(disturbed.norm(dim=-1), z.norm(dim=-1))


def test_disturbed_unit_variance_latents_stay_so() -> None:
    z, noise = normal(200, 16, 32), normal(200, 16, 32, seed=1)
    disturbed = disturb(z, noise, 0.75)
    assert disturbed.var().item() == pytest.approx(1, abs=0.02)
    assert torch.cosine_similarity(disturbed.flatten(), z.flatten(), dim=0).item() == pytest.approx(0.8, abs=0.01)


def test_disturb_takes_a_standard_deviation_for_each_row() -> None:
    z, noise = normal(2, 3, 2), normal(2, 3, 2, seed=1)
    both = disturb(z, noise, torch.tensor([0.2, 1.5])[:, None, None])
    for i, sigma in enumerate([0.2, 1.5]):
        torch.testing.assert_close(both[i], disturb(z[i], noise[i], sigma), rtol=1e-6, atol=1e-6)

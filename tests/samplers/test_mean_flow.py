"""The student's sampler against the exact flow of a normal distribution, and a student trained on a mixture."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crocodil.diffusion.gaussian import NoiseLevel, TangentSchedule, add_noise
from crocodil.diffusion.mean_flow import noise_share, split_target, step_ends
from crocodil.diffusion.noise import RowNoise
from crocodil.models import LatentPrior, LatentStudent
from crocodil.samplers import LatentSampler, MeanFlowSampler
from crocodil.samplers.mean_flow import StudentProcess

K, D = 4, 3
MEAN, DEVIATION = 0.8, 0.5


class ExactStudent:
    """The mean estimate of the flow map of one register of one coordinate that is normally distributed."""

    num_registers = latent_dim = 1

    def __call__(
        self, noisy_latents: Tensor, log_snr: Tensor, end_log_snr: Tensor, *, condition: Tensor | None = None
    ) -> Tensor:
        level = NoiseLevel.at(log_snr)
        s, r = (noise_share(value)[:, None, None] for value in (log_snr, end_log_snr))
        y = noisy_latents / (level.alpha_t + level.sigma_t)[:, None, None]
        deviation, end_deviation = ((((1 - x) * DEVIATION) ** 2 + x**2).sqrt() for x in (s, r))
        y_r = (1 - r) * MEAN + end_deviation * (y - (1 - s) * MEAN) / deviation
        return (y_r - r / s * y) / (1 - r / s)


@pytest.mark.parametrize("num_steps", [1, 2, 5])
@pytest.mark.parametrize("gamma", [0.0, 0.8, 1.0])
def test_the_exact_flow_gives_the_distribution_in_any_number_of_steps(num_steps: int, gamma: float) -> None:
    process, size = StudentProcess(TangentSchedule(d=2.0), start_log_snr=-12.0), 4000
    sampler, noise = process.sampler(num_steps, gamma), RowNoise(torch.arange(size))
    samples = sampler.sample(ExactStudent(), batch_size=size, generator=noise).flatten()
    cdf = torch.special.ndtr((samples.sort().values - MEAN) / DEVIATION)
    assert (cdf - (torch.arange(size) + 0.5) / size).abs().max() < 1.95 / size**0.5  # Kolmogorov-Smirnov at 0.1%
    follows = torch.corrcoef(torch.stack([samples, noise.normal(2, 0, (1,)).flatten()]))[0, 1].item()
    assert (follows > 0.999) == (gamma == 0 or num_steps == 1)  # one noise, one sample
    if gamma == 1 and num_steps > 1:
        assert abs(follows) < 0.7


@pytest.mark.parametrize("gamma", [0.0, 0.8])
def test_temperature_scales_the_spread(gamma: float) -> None:
    process = StudentProcess(TangentSchedule(d=2.0), start_log_snr=-12.0)
    samples = process.sampler(3, gamma, temperature=0.5).sample(ExactStudent(), batch_size=4000)
    assert samples.mean().item() == pytest.approx(MEAN, abs=0.05 * DEVIATION)
    assert samples.std().item() == pytest.approx(0.5 * DEVIATION, rel=0.05)


@pytest.mark.parametrize("prediction_type", ["x0", "eps", "v"])
@pytest.mark.parametrize("num_steps", [1, 2, 5])
@torch.no_grad()
def test_an_untrained_student_takes_the_ddim_steps_of_its_teacher(
    num_steps: int, prediction_type: Any, make_prior: Callable[..., LatentPrior]
) -> None:
    """Of one without self-conditioning; one step is one estimate from pure noise."""
    prior, schedule, noise = make_prior(), TangentSchedule(d=2.0), RowNoise(torch.arange(3))
    student, given = LatentStudent.of(prior), {"condition": torch.randn(3, K, D), "batch_size": 3, "generator": noise}
    process = StudentProcess(schedule, prediction_type, start_log_snr=-math.inf)
    expected = LatentSampler(num_steps, "ddim", schedule, prediction_type, self_conditioning=False).sample(
        prior, **given
    )
    torch.testing.assert_close(process.sampler(num_steps).sample(student, **given), expected)


class Recorder(nn.Module):
    """An untrained student that keeps what it is asked."""

    num_registers, latent_dim = K, D

    def __init__(self) -> None:
        super().__init__()
        self.levels: list[tuple[float, float]] = []
        self.given: list[Tensor | None] = []

    def forward(self, z: Tensor, log_snr: Tensor, end_log_snr: Tensor, *, condition: Tensor | None = None) -> Tensor:
        assert log_snr.shape == end_log_snr.shape == (len(z),) and z.dtype == log_snr.dtype
        self.levels.append((log_snr[0].item(), end_log_snr[0].item()))
        self.given.append(condition)
        return z * 0.5


@pytest.mark.parametrize("gamma", [0.0, 0.6])
def test_steps_begin_where_the_flow_does_and_end_at_clean_latents(gamma: float) -> None:
    network, condition, seen = Recorder(), torch.ones(2, K, D), []
    sampler = StudentProcess(TangentSchedule(d=3.0), start_log_snr=-8.0).sampler(4, gamma)
    sampler.sample(network, batch_size=2, condition=condition, progress=lambda *event: seen.append(event))
    assert len(network.levels) == 4 == sampler.num_calls(True) == sampler.num_calls(False)
    assert network.levels[0][0] == -8.0 and network.levels[-1][1] == math.inf
    for (_, end), (start, _) in pairwise(network.levels):
        assert end - start == pytest.approx(-math.log(1 - gamma**2), abs=1e-5)
    middle = TangentSchedule(d=3.0)(torch.tensor(0.5)).log_snr.item()
    assert network.levels[2][0] == pytest.approx(middle, abs=1e-5)
    assert all(given is condition for given in network.given)
    assert seen == [("student", i + 1, 4) for i in range(4)]


@pytest.mark.parametrize("gamma", [0.0, 0.8])
@torch.no_grad()
def test_latents_depend_on_seed_and_draw_and_not_on_the_batch(gamma: float, make_prior: Callable) -> None:
    student, seeds = LatentStudent.of(make_prior()), torch.tensor([4, 5, 6])
    sampler = MeanFlowSampler(3, gamma=gamma)

    def draw(rows: slice, number: int = 0) -> Tensor:
        noise = RowNoise(seeds[rows])
        return sampler.sample(student, batch_size=len(seeds[rows]), generator=noise, draw=number)

    whole = draw(slice(None))
    torch.testing.assert_close(whole, torch.cat([draw(slice(i, i + 1)) for i in range(3)]))
    assert (draw(slice(None), 1) - whole).abs().max() > 1e-3 and (whole[0] - whole[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, "num_steps of at least 1, got 0"),
        ({"gamma": 1.5}, "gamma must be between 0 and 1, got 1.5"),
        ({"gamma": -0.1}, "gamma must be between 0 and 1"),
        ({"temperature": -0.5}, "temperature of a sketch must be a number of at least 0, got -0.5"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MeanFlowSampler(**settings)


MEANS, WEIGHTS, VARIANCE = torch.tensor([[-1.2, 0.6], [1.0, 1.0], [0.3, -1.3]]), torch.tensor([0.3, 0.3, 0.4]), 0.04
SCHEDULE = TangentSchedule(d=1.0)


class Teacher:
    """The exact E[z_0 | z_t] of a mixture in the plane, as two registers of one coordinate."""

    num_registers, latent_dim = 2, 1

    def __call__(self, z: Tensor, log_snr: Tensor, **_: Any) -> Tensor:
        level = NoiseLevel.at(log_snr)
        alpha = level.alpha_t[:, None]
        variance = alpha**2 * VARIANCE + level.sigma_t[:, None] ** 2
        distance = z.view(-1, 1, 2) - alpha[..., None] * MEANS
        posterior = (WEIGHTS.log() - (distance**2).sum(-1) / (2 * variance)).softmax(-1)
        return (posterior[..., None] * (MEANS + (alpha * VARIANCE / variance)[..., None] * distance)).sum(1)[..., None]


class SmallStudent(nn.Module):
    """Two levels as shares of noise, and a network of three layers."""

    num_registers, latent_dim = 2, 1

    def __init__(self) -> None:
        super().__init__()
        sizes = [2 + 4, 64, 64, 64]
        layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(64, 2))

    def forward(self, z: Tensor, log_snr: Tensor, end_log_snr: Tensor, *, condition: Tensor | None = None) -> Tensor:
        levels = [value for x in (log_snr, end_log_snr) for value in (noise_share(x), x.clamp(-20, 20) / 8)]
        return self.layers(torch.cat([z.flatten(1), torch.stack(levels, -1)], -1))[..., None]


def train(process: StudentProcess, num_steps: int, batch_size: int = 256) -> SmallStudent:
    """What `StudentModule` does, on the mixture; rows from log SNR 4 on learn the teacher's estimate."""
    student, teacher = SmallStudent(), Teacher()
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for _ in range(num_steps):
        clean = draw_mixture(batch_size)
        t = (torch.rand(()) + torch.arange(batch_size) / batch_size) % 1
        level = NoiseLevel.at(SCHEDULE(t).log_snr.clamp(min=process.start_log_snr))
        ends = process.log_snrs(step_ends(t, torch.rand(batch_size), 0.25, 0.25))
        z = add_noise(clean, torch.randn_like(clean), level)
        estimate = teacher(z, level.log_snr)
        target = split_target(
            lambda z, level, ends=ends: student(z, level.log_snr, ends),
            lambda z, level, _: teacher(z, level.log_snr),
            z,
            estimate,
            level,
            ends,
            first_leg=0.2,
        )
        target = torch.where((level.log_snr >= 4)[:, None, None], estimate, target)
        losses = (student(z, level.log_snr, ends) - target).square().flatten(1).mean(1)
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        schedule.step()
    return student


def draw_mixture(size: int) -> Tensor:
    chosen = torch.multinomial(WEIGHTS, size, replacement=True)
    return (MEANS[chosen] + VARIANCE**0.5 * torch.randn(size, 2))[..., None]


def energy_distance(x: Tensor, y: Tensor) -> float:
    x, y = x.flatten(1), y.flatten(1)
    return (2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean()).item()


def test_a_trained_student_beats_as_many_steps_of_its_exact_teacher() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        process = StudentProcess(SCHEDULE)
        student, data = train(process, 800), draw_mixture(2000)
    given: dict[str, Any] = {"batch_size": 2000, "generator": RowNoise(torch.arange(2000))}
    endpoint = LatentSampler(200, "ddim", SCHEDULE).sample(Teacher(), **given)
    for num_steps in (1, 2, 4):
        ours = process.sampler(num_steps).sample(student, **given)
        theirs = LatentSampler(num_steps, "ddim", SCHEDULE).sample(Teacher(), **given)
        assert energy_distance(ours, data) < 0.4 * energy_distance(theirs, data)
        assert (ours - endpoint).square().mean() < 0.8 * (theirs - endpoint).square().mean()
        torch.testing.assert_close(ours.mean(0), data.mean(0), atol=0.1, rtol=0)
        torch.testing.assert_close(ours.flatten(1).T.cov(), data.flatten(1).T.cov(), atol=0.1, rtol=0)

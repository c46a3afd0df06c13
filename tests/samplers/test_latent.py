import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from crocodil.diffusion.gaussian import PredictionType, TangentSchedule, add_noise, to_x0
from crocodil.diffusion.noise import RowNoise
from crocodil.samplers import LatentSampler
from crocodil.samplers.latent import Solver, ancestral_step, ddim_step, extrapolate

SOLVERS = get_args(Solver)
K, D = 4, 3
WEIGHTS, MEANS, VARIANCE = torch.tensor([0.4, 0.6]), torch.tensor([-1.2, 0.8]), 0.3
"""A mixture of two normal distributions; its mean is 0."""


class MixturePrior:
    """The exact E[z_0 | z_t] of one register of one coordinate that is distributed as the mixture."""

    num_registers = latent_dim = 1

    def __call__(
        self,
        noisy_latents: Tensor,
        log_snr: Tensor,
        *,
        self_condition: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        alpha, sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
        z, alpha = noisy_latents, alpha[:, None, None].to(noisy_latents.dtype)
        variance = alpha**2 * VARIANCE + sigma[:, None, None].to(z.dtype) ** 2
        distance = z - alpha * MEANS.to(z.dtype)  # (B, 1, 2): to each component
        posterior = (WEIGHTS.log() - distance**2 / (2 * variance)).softmax(-1)
        return (posterior * (MEANS + alpha * VARIANCE / variance * distance)).sum(-1, keepdim=True)


def exact_solution(z: Tensor, schedule: TangentSchedule, num_steps: int = 800) -> Tensor:
    """The probability-flow ODE by classical Runge-Kutta: with y = z / alpha and u = log(sigma / alpha), y' = y - x."""
    ends = schedule(torch.tensor([1.0, 0.0], dtype=torch.float64))
    grid = torch.linspace(*(-ends.log_snr / 2).tolist(), num_steps + 1, dtype=torch.float64)
    step = grid[1] - grid[0]

    def slope(y: Tensor, u: Tensor) -> Tensor:
        log_snr = (-2 * u).expand(len(y))
        return y - MixturePrior()(y * torch.sigmoid(-2 * u).sqrt(), log_snr)

    y = z.double() / ends.alpha_t[0]
    for u in grid[:-1]:
        first = slope(y, u)
        second = slope(y + step / 2 * first, u + step / 2)
        third = slope(y + step / 2 * second, u + step / 2)
        fourth = slope(y + step * third, u + step)
        y = y + step / 6 * (first + 2 * second + 2 * third + fourth)
    return y


@pytest.mark.parametrize(("solver", "order", "tolerance"), [("ddim", 1, 0.1), ("dpmpp_2m", 2, 0.25)])
def test_order_of_convergence(solver: Solver, order: int, tolerance: float) -> None:
    # At slope 3 the ends of the schedule cost O(1 / N^3), so that the order of the solver is what shows.
    schedule, noise = TangentSchedule(d=1.0, slope=3.0), RowNoise(torch.arange(64))
    exact = exact_solution(noise.normal(2, 0, (1, 1)), schedule)
    counts = [24, 32, 48, 64, 96]
    errors = []
    for num_steps in counts:
        sampler = LatentSampler(num_steps, solver, schedule)
        estimate = sampler.sample(MixturePrior(), batch_size=64, generator=noise)
        errors.append((estimate - exact).abs().mean().item())
    x, y = torch.tensor(counts).double().log(), torch.tensor(errors).double().log()
    slope = -((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    assert slope.item() == pytest.approx(order, abs=tolerance)
    assert all(later < earlier for earlier, later in pairwise(errors))
    assert errors[-1] < {1: 2e-2, 2: 1e-3}[order]


@pytest.mark.parametrize(("solver", "d"), [("ddim", 1.0), ("dpmpp_2m", 1.0), ("dpmpp_2m", 10.0), ("ancestral", 1.0)])
def test_samples_follow_the_mixture(solver: Solver, d: float) -> None:
    size = 3000
    sampler = LatentSampler(100, solver, TangentSchedule(d=d))
    samples = sampler.sample(MixturePrior(), batch_size=size, generator=RowNoise(torch.arange(size))).flatten()
    cdf = (WEIGHTS * torch.special.ndtr((samples.sort().values[:, None] - MEANS) / VARIANCE**0.5)).sum(-1)
    assert (cdf - (torch.arange(size) + 0.5) / size).abs().max() < 1.95 / size**0.5  # Kolmogorov-Smirnov at 0.1%
    assert samples.var().item() == pytest.approx(VARIANCE + (WEIGHTS * MEANS**2).sum().item(), abs=0.08)


class NormalPrior:
    """The exact E[z_0 | z_t] of registers that are normal with mean 0.5 and standard deviation 0.8."""

    num_registers, latent_dim = 2, 3

    def __call__(self, noisy_latents: Tensor, log_snr: Tensor, **_: Any) -> Tensor:
        alpha, sigma = (torch.sigmoid(sign * log_snr).sqrt()[:, None, None] for sign in (1, -1))
        gain = 0.64 * alpha / (0.64 * alpha**2 + sigma**2)
        return 0.5 + gain * (noisy_latents - alpha * 0.5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_temperature_scales_the_spread_of_a_normal_prior(solver: Solver) -> None:
    """Its process is linear in the noise: around the same mean each draw deviates by the temperature times as much."""

    def drawn(temperature: float) -> Tensor:
        sampler = LatentSampler(100, solver, TangentSchedule(d=2.0), self_conditioning=False, temperature=temperature)
        return sampler.sample(NormalPrior(), batch_size=2000, generator=RowNoise(torch.arange(2000)))

    mean, whole, half = drawn(0.0), drawn(1.0), drawn(0.5)
    assert mean.std().item() == pytest.approx(0, abs=1e-6) and mean.mean().item() == pytest.approx(0.5, abs=0.01)
    assert whole.std().item() == pytest.approx(0.8, abs=0.03)
    torch.testing.assert_close(half - mean, (whole - mean) / 2, atol=1e-4, rtol=1e-4)


def three_points(schedule: TangentSchedule) -> list[Any]:
    return [schedule(torch.tensor(t, dtype=torch.float64)) for t in (0.8, 0.65, 0.3)]


def test_ddim_step_keeps_the_noise_of_a_perfect_estimate() -> None:
    z_0, noise = torch.randn(2, 5, K, D, dtype=torch.float64).unbind(0)
    _, now, after = three_points(TangentSchedule(d=2.0))
    z_s = ddim_step(add_noise(z_0, noise, now), z_0, now, after)
    torch.testing.assert_close(z_s, add_noise(z_0, noise, after))


def test_second_order_step_is_the_formula_of_the_paper() -> None:
    z, estimate, previous = torch.randn(3, 5, K, D, dtype=torch.float64).unbind(0)
    before, now, after = points = three_points(TangentSchedule(d=2.0))
    lambdas = [(point.alpha_t / point.sigma_t).log() for point in points]
    h, ratio = lambdas[2] - lambdas[1], (lambdas[1] - lambdas[0]) / (lambdas[2] - lambdas[1])
    combined = (1 + 1 / (2 * ratio)) * estimate - 1 / (2 * ratio) * previous
    expected = after.sigma_t / now.sigma_t * z - after.alpha_t * torch.expm1(-h) * combined
    torch.testing.assert_close(ddim_step(z, extrapolate(estimate, previous, points), now, after), expected)
    assert before.log_snr < now.log_snr


def test_ancestral_step_is_bayes_rule_for_gaussians() -> None:
    z, x, fresh = torch.randn(3, 5, K, D, dtype=torch.float64).unbind(0)
    _, now, after = three_points(TangentSchedule(d=2.0))
    gain = now.alpha_t / after.alpha_t  # z_t = gain z_s + noise of variance `added`
    added = now.sigma_t**2 - gain**2 * after.sigma_t**2
    precision = 1 / after.sigma_t**2 + gain**2 / added
    mean = (after.alpha_t * x / after.sigma_t**2 + gain * z / added) / precision
    torch.testing.assert_close(ancestral_step(z, x, fresh, now, after), mean + fresh / precision.sqrt())


@pytest.mark.parametrize("prediction_type", get_args(PredictionType))
@torch.no_grad()
def test_one_step_is_one_estimate_from_pure_noise(make_prior: Callable, prediction_type: PredictionType) -> None:
    prior, schedule, noise = make_prior(), TangentSchedule(d=2.0), RowNoise(torch.arange(3))
    sampler = LatentSampler(1, noise_schedule=schedule, prediction_type=prediction_type)
    z, start = noise.normal(2, 0, (K, D)), schedule(torch.tensor(1.0, dtype=torch.float64))
    expected = to_x0(prior(z, start.log_snr.float().expand(3)), z, start, prediction_type)
    torch.testing.assert_close(sampler.sample(prior, batch_size=3, generator=noise), expected)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("self_conditioning", [True, False])
def test_each_estimate_is_fed_to_the_next_step_and_the_last_is_returned(
    make_prior: Callable, solver: Solver, self_conditioning: bool
) -> None:
    prior, estimates, fed, log_snrs = make_prior(), [], [], []

    def record(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        estimates.append(output)
        fed.append(kwargs["self_condition"])
        log_snrs.append(args[1])

    prior.register_forward_hook(record, with_kwargs=True)
    sampler = LatentSampler(5, solver, self_conditioning=self_conditioning)
    latents = sampler.sample(prior, batch_size=2, generator=RowNoise(torch.arange(2)))
    assert latents.shape == (2, K, D)
    assert torch.equal(latents, estimates[-1])
    assert fed[0] is None
    for previous, given in zip(estimates, fed[1:], strict=False):
        assert given is previous if self_conditioning else given is None
    assert all((later > earlier).all() for earlier, later in pairwise(log_snrs))
    assert all(level.shape == (2,) for level in log_snrs)


@pytest.mark.parametrize(("num_steps", "eps"), [(100, 0.01), (150, 0.01), (1000, 1e-3)])
@pytest.mark.parametrize("solver", SOLVERS)
def test_steps_finer_than_eps_stay_finite(solver: Solver, num_steps: int, eps: float) -> None:
    sampler = LatentSampler(num_steps, solver, TangentSchedule(d=1.0, eps=eps))
    latents = sampler.sample(MixturePrior(), batch_size=1, generator=RowNoise(torch.arange(1)))
    assert latents.isfinite().all()


class GuidedPrior:
    """The extrapolation between the outputs of a prior with and without condition, written out."""

    num_registers, latent_dim = K, D

    def __init__(self, prior: Callable[..., Tensor], condition: Tensor, scale: float) -> None:
        self.prior, self.given, self.scale = prior, condition, scale

    def __call__(
        self,
        noisy_latents: Tensor,
        log_snr: Tensor,
        *,
        self_condition: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        without = self.prior(noisy_latents, log_snr, self_condition=self_condition)
        given = self.prior(noisy_latents, log_snr, self_condition=self_condition, condition=self.given)
        return (1 - self.scale) * without + self.scale * given


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, 4.0])
def test_guidance_is_the_extrapolation_by_hand(make_prior: Callable, solver: Solver, scale: float) -> None:
    prior, noise = make_prior(), RowNoise(torch.arange(3))
    condition = torch.randn(3, K, D, generator=torch.Generator().manual_seed(0))
    guided = LatentSampler(4, solver, guidance_scale=scale)
    latents = guided.sample(prior, batch_size=3, condition=condition, generator=noise)
    by_hand = LatentSampler(4, solver).sample(GuidedPrior(prior, condition, scale), batch_size=3, generator=noise)
    torch.testing.assert_close(latents, by_hand, rtol=1e-4, atol=1e-4)
    plain = LatentSampler(4, solver).sample(prior, batch_size=3, condition=condition, generator=noise)
    assert (latents - plain).abs().max() > 1e-3
    if scale == 0:
        torch.testing.assert_close(latents, guided.sample(prior, batch_size=3, generator=noise))


class ConditionalPrior(GuidedPrior):
    """The conditional network alone."""

    def __call__(self, noisy_latents: Tensor, log_snr: Tensor, **given: Any) -> Tensor:
        return self.prior(noisy_latents, log_snr, **given | {"condition": self.given})


@pytest.mark.parametrize("solver", SOLVERS)
def test_guidance_of_scale_1_is_bitwise_the_conditional_model(make_prior: Callable, solver: Solver) -> None:
    prior, noise = make_prior(), RowNoise(torch.arange(3))
    condition = torch.randn(3, K, D, generator=torch.Generator().manual_seed(0))
    sampler = LatentSampler(4, solver, guidance_scale=1.0)
    latents = sampler.sample(prior, batch_size=3, condition=condition, generator=noise)
    conditional = sampler.sample(ConditionalPrior(prior, condition, 1.0), batch_size=3, generator=noise)
    assert torch.equal(latents, conditional)
    assert (latents - sampler.sample(prior, batch_size=3, generator=noise)).abs().max() > 1e-3


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("conditional", [False, True])
def test_calls_are_as_announced(
    make_prior: Callable, count_calls: Callable, solver: Solver, scale: float, conditional: bool
) -> None:
    prior, sampler = make_prior(), LatentSampler(5, solver, guidance_scale=scale)
    seen, condition = count_calls(prior), torch.zeros(2, K, D) if conditional else None
    sampler.sample(prior, batch_size=2, condition=condition)
    assert len(seen) == sampler.num_calls(conditional) == (10 if conditional and scale != 1.0 else 5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_latents_do_not_depend_on_the_split_into_batches(make_prior: Callable, solver: Solver) -> None:
    prior, seeds = make_prior(), torch.tensor([4, 5, 6, 7])
    condition = torch.randn(4, K, D, generator=torch.Generator().manual_seed(0))
    sampler = LatentSampler(4, solver, guidance_scale=2.0)

    def draw(rows: slice) -> Tensor:
        size = len(seeds[rows])
        return sampler.sample(prior, batch_size=size, condition=condition[rows], generator=RowNoise(seeds[rows]))

    torch.testing.assert_close(draw(slice(None)), torch.cat([draw(slice(i, i + 1)) for i in range(4)]))


def test_a_torch_generator_is_reproducible_and_splits_evenly(make_prior: Callable) -> None:
    prior, sampler = make_prior(), LatentSampler(4, "ancestral")

    def draw(*sizes: int) -> Tensor:
        source = torch.Generator().manual_seed(0)
        return torch.cat([sampler.sample(prior, batch_size=n, generator=source) for n in sizes])

    torch.testing.assert_close(draw(4), draw(1, 3))
    assert (draw(4)[0] - draw(4)[1]).abs().max() > 1e-3


@pytest.mark.parametrize("solver", SOLVERS)
def test_each_draw_of_a_run_has_noise_of_its_own(make_prior: Callable, solver: Solver) -> None:
    prior, sampler, noise = make_prior(), LatentSampler(4, solver), RowNoise(torch.arange(2))
    first, again, second = (sampler.sample(prior, batch_size=2, generator=noise, draw=draw) for draw in (0, 0, 1))
    assert torch.equal(first, again)
    assert (first - second).abs().max() > 1e-3


def test_progress_counts_the_steps(make_prior: Callable) -> None:
    events: list[tuple[str, int, int]] = []
    LatentSampler(3).sample(make_prior(), batch_size=1, progress=lambda *event: events.append(event))
    assert events == [("prior", 1, 3), ("prior", 2, 3), ("prior", 3, 3)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, "num_steps of at least 1, got 0"),
        ({"solver": "heun"}, "solver must be one of ddim, dpmpp_2m, ancestral, got 'heun'"),
        ({"prediction_type": "score"}, "prediction_type must be one of x0, eps, v, got 'score'"),
        ({"temperature": -0.5}, "temperature of a sketch must be a number of at least 0, got -0.5"),
        ({"temperature": math.nan}, "temperature of a sketch must be a number of at least 0, got nan"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LatentSampler(**settings)


def test_the_mixture_prior_is_the_posterior_mean() -> None:
    """The toy's denoiser against an integral over z_0."""
    z_0 = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    density = (WEIGHTS * torch.exp(-((z_0[:, None] - MEANS) ** 2) / (2 * VARIANCE))).sum(-1)
    for log_snr in (-3.0, 0.0, 2.0):
        alpha, sigma = (math.sqrt(1 / (1 + math.exp(sign * log_snr))) for sign in (-1, 1))
        for z_t in (-1.5, 0.1, 2.0):
            weight = density * torch.exp(-((z_t - alpha * z_0) ** 2) / (2 * sigma**2))
            given = torch.tensor([[[z_t]]], dtype=torch.float64), torch.tensor([log_snr], dtype=torch.float64)
            assert MixturePrior()(*given).item() == pytest.approx((weight @ z_0 / weight.sum()).item(), abs=1e-5)

import math

import pytest
import torch
from torch import Tensor

from crocodil.evaluation.frechet import FrechetDistance, frechet_distance
from crocodil.evaluation.judge import Judge


def exact(mean: list[float], covariance: list[list[float]], count: int = 40, seed: int = 0) -> Tensor:
    """Points whose sample mean and covariance are exactly the given ones."""
    points = torch.randn(count, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    points = points - points.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(points.T)), points.T, upper=False)
    return (torch.linalg.cholesky(torch.tensor(covariance, dtype=torch.float64)) @ white).T + torch.tensor(mean)


def test_distance_of_equal_sets_is_nought() -> None:
    points = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(points, points) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(points, points.flip(0)) == pytest.approx(0.0, abs=1e-9)


def test_distance_of_shifted_sets_is_the_square_of_the_shift() -> None:
    points = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shift = torch.tensor([1.0, -2.0, 0.5])
    assert frechet_distance(points + shift, points) == pytest.approx(5.25, rel=1e-9)


def test_distance_of_axis_parallel_gaussians() -> None:
    """The sum of squared differences of means and of deviations, from samples of different sizes."""
    one = exact([0.0, 1.0], [[4.0, 0.0], [0.0, 9.0]])
    other = exact([3.0, 1.0], [[1.0, 0.0], [0.0, 25.0]], count=70, seed=1)
    assert frechet_distance(one, other) == pytest.approx(9 + 1 + 4, rel=1e-9)


def test_distance_of_gaussians_that_do_not_commute() -> None:
    """In two dimensions tr (C C')^1/2 = (tr C C' + 2 (det C C')^1/2)^1/2."""
    one, other = [[2.0, 0.9], [0.9, 1.0]], [[1.0, -0.4], [-0.4, 3.0]]
    product = torch.tensor(one).double() @ torch.tensor(other).double()
    assert not torch.allclose(product, product.T)
    cross = math.sqrt(product.trace().item() + 2 * math.sqrt(torch.linalg.det(product).item()))
    found = frechet_distance(exact([0.0, 0.0], one), exact([0.0, 0.0], other, seed=1))
    assert found == pytest.approx(3 + 4 - 2 * cross, rel=1e-6)


def test_distance_is_defined_for_fewer_points_than_dimensions() -> None:
    few, more = torch.randn(5, 9, generator=torch.Generator().manual_seed(0)).double().split([2, 3])
    assert math.isfinite(frechet_distance(few, more)) and frechet_distance(few, more) > 0


@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_sums_over_batches_give_the_distance_of_all(
    batch_size: int, own_judge: Judge, token_ids: Tensor, texts: list[str]
) -> None:
    reference = torch.randn(30, 16, generator=torch.Generator().manual_seed(0)) + 100.0  # far off: no digits are lost
    metric = FrechetDistance(own_judge, reference)
    for start in range(0, 9, batch_size):
        metric.update(texts[start : start + batch_size], token_ids[start : start + batch_size])
    features = own_judge.read(texts, token_ids).mean_states
    assert metric.compute()["distance"].item() == pytest.approx(frechet_distance(features, reference), rel=1e-6)

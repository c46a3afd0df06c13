import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from crocodil.evaluation.metrics import frechet_distance, parse_rate, unigram_entropy, unique_rate


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("def f(v0):\n    return v0", 1),
        ("x = 1", 1),
        ("'\\d'", 1),  # the parser warns of the escape, and accepts it
        ("", 0),
        (" \n ", 0),
        ("def f(v0:\n    return v0", 0),
        ("x = \0", 0),
        ("(" * 10_000 + ")" * 10_000, 0),
        ("def f():\nreturn 1", 0),
    ],
)
@pytest.mark.filterwarnings("error")
def test_parse_rate_of_one_text(text: str, share: int) -> None:
    assert parse_rate([text]) == share


def test_rates_are_shares_of_the_texts() -> None:
    texts = ["x = 1", "x = 1", "x =", "y = 2"]
    assert parse_rate(texts) == 0.75
    assert unique_rate(texts) == 0.75
    assert unique_rate(["a", "a"]) == 0.5


def entropy(tokens: list[int]) -> float:
    return -sum(n / len(tokens) * math.log(n / len(tokens)) for n in Counter(tokens).values())


def test_entropy_by_counting() -> None:
    rows = [[1, 5, 5, 6, 0, 9, 9, 9], [1, 3, 4, 5, 6, 7, 8, 9], [1, 4, 4, 4, 4, 4, 4, 4], [1, 0, 0, 0, 0, 0, 0, 0]]
    counted = [[5, 5, 6, 0], [3, 4, 5, 6, 7, 8, 9], [4] * 7, [0]]
    expected = sum(map(entropy, counted)) / 4
    assert unigram_entropy(torch.tensor(rows), 0) == pytest.approx(expected, rel=1e-12)
    assert entropy(counted[1]) == pytest.approx(math.log(7))


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

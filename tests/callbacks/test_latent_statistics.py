import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from crocodil_callbacks import LatentStatistics
from crocodil_callbacks.latent_statistics import (
    covariance_eigenvalues,
    effective_rank,
    latent_statistics,
    mean_cosine,
    participation_ratio,
)
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*validation_step")
Rows = list[tuple[int, dict[str, float]]]
N, K, D = 4000, 4, 6


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def figures(latents: Tensor) -> dict[str, float]:
    return {name: value.item() for name, value in latent_statistics(latents, 0.1).items()}


@pytest.mark.parametrize(
    ("eigenvalues", "rank", "ratio"),
    [
        ([3.0, 3.0, 3.0, 3.0], 4, 4),
        ([5.0, 0.0, 0.0, 0.0], 1, 1),
        ([2.0, 1.0, 1.0, 0.0], math.exp(1.5 * math.log(2)), 16 / 6),  # entropy of (1/2, 1/4, 1/4)
    ],
)
def test_ranks_of_known_spectra(eigenvalues: list[float], rank: float, ratio: float) -> None:
    assert effective_rank(torch.tensor(eigenvalues)).item() == pytest.approx(rank)
    assert participation_ratio(torch.tensor(eigenvalues)).item() == pytest.approx(ratio)


def test_ranks_do_not_depend_on_the_axes_or_the_scale() -> None:
    rotation, _ = torch.linalg.qr(normal(4, 4))
    covariance = 7 * rotation @ torch.diag(torch.tensor([2.0, 1.0, 1.0, 0.0])) @ rotation.T
    assert effective_rank(covariance_eigenvalues(covariance)).item() == pytest.approx(2**1.5, rel=1e-3)


def test_the_entropy_is_that_of_the_definition() -> None:
    eigenvalues = normal(9).square()
    share = (eigenvalues / eigenvalues.sum()).tolist()
    assert effective_rank(eigenvalues).item() == pytest.approx(math.exp(-sum(p * math.log(p) for p in share)))


def test_independent_standard_latents() -> None:
    found = figures(normal(N, K, D))
    assert found["latent_effective_rank"] == pytest.approx(D, rel=0.01)
    assert found["latent_participation_ratio"] == pytest.approx(D, rel=0.01)
    norm = math.sqrt(2) * math.exp(math.lgamma((D + 1) / 2) - math.lgamma(D / 2))  # of the chi distribution
    assert found["latent_norm"] == pytest.approx(norm, rel=0.01)
    assert found["latent_cosine_between_texts"] == pytest.approx(0, abs=0.002)
    assert found["latent_mean_error"] == pytest.approx(1 / math.sqrt(N), rel=0.4)
    assert found["latent_std_error"] == pytest.approx(1 / math.sqrt(2 * N), rel=0.4)
    assert found["latent_dead_share"] == 0


def test_a_mean_of_its_own_in_each_register_is_no_direction_in_use() -> None:
    """Texts differ along three axes, with variances 2, 1 and 1; the registers' means point elsewhere."""
    latents = normal(N, K, D) * torch.tensor([2.0, 1.0, 1.0, 0.0, 0.0, 0.0]).sqrt()
    found = figures(latents + 5 * normal(K, D, seed=1))
    assert found["latent_effective_rank"] == pytest.approx(2**1.5, rel=0.01)
    assert found["latent_participation_ratio"] == pytest.approx(16 / 6, rel=0.02)


def test_deviations_from_standard_latents() -> None:
    found = figures(1.5 * normal(N, K, D) + 0.25)
    assert found["latent_mean_error"] == pytest.approx(0.25, rel=0.1)
    assert found["latent_std_error"] == pytest.approx(0.5, rel=0.05)


def test_dead_coordinates() -> None:
    latents = normal(N, K, D)
    latents[:, 1, :3] = 0.7
    latents[:, 2, 5] *= 0.05
    assert figures(latents)["latent_dead_share"] == pytest.approx(4 / (K * D))


def test_mean_cosine_is_that_of_all_pairs() -> None:
    vectors = normal(7, 5) + 0.5
    pairs = [
        torch.cosine_similarity(vectors[i], vectors[j], dim=0).item() for i in range(7) for j in range(7) if i != j
    ]
    assert mean_cosine(vectors).item() == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
    assert mean_cosine(vectors[:1].expand(3, 5) * torch.tensor([[1.0], [2.0], [3.0]])).item() == pytest.approx(1)


def test_latents_that_are_not_finite_show() -> None:
    latents = normal(9, K, D)
    latents[3, 1, 2] = math.nan
    found = figures(latents)
    assert math.isnan(found["latent_effective_rank"]) and math.isnan(found["latent_norm"])


def batches(latents: Tensor, disturbed: Tensor | None = None) -> list[dict[str, Tensor]]:
    """One batch of 100 texts after the other."""
    columns = {"out_latents": latents} | ({} if disturbed is None else {"out_disturbed": disturbed})
    parts = zip(*(column.split(100) for column in columns.values()), strict=True)
    token_ids = torch.ones(2, 3, dtype=torch.int64)
    return [{"token_ids": token_ids, **dict(zip(columns, part, strict=True))} for part in parts]


def test_the_last_batches_at_log_points(toy: Any, train: Callable[..., Rows]) -> None:
    latents = normal(600, K, D)
    rows = train(toy(), batches(latents), LatentStatistics(2), log_every_n_steps=3)
    assert [step for step, _ in rows] == [2, 5]
    assert rows[0][1] == pytest.approx(figures(latents[100:300]), rel=1e-4)
    assert rows[1][1] == pytest.approx(figures(latents[400:600]), rel=1e-4)


def test_the_cosine_under_noise_is_that_of_the_paper(toy: Any, train: Callable[..., Rows]) -> None:
    latents = normal(400, 16, 32)
    disturbed = latents + 0.75 * normal(400, 16, 32, seed=1)
    rows = train(toy(), batches(latents, disturbed), LatentStatistics(), log_every_n_steps=4)
    assert rows[0][1]["latent_cosine_under_noise"] == pytest.approx(0.8, abs=0.005)


def test_a_single_text_says_nothing(toy: Any, train: Callable[..., Rows]) -> None:
    assert train(toy(), batches(normal(1, K, D)), LatentStatistics()) == []


def test_other_stages_and_bad_arguments_are_refused(toy: Any, train: Callable[..., Rows]) -> None:
    with pytest.raises(ValueError, match="expects a stage whose training step returns latents"):
        train(toy(), [{"token_ids": torch.ones(2, 3, dtype=torch.int64)}], LatentStatistics())
    with pytest.raises(ValueError, match="num_batches must be at least 1, got 0"):
        LatentStatistics(0)
    with pytest.raises(ValueError, match="dead_std must be above 0, got 0"):
        LatentStatistics(dead_std=0)

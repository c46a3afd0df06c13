"""Whether the latents still tell texts apart: their spread, rank and likeness."""

import math
from collections import deque
from typing import Any

import lightning as L
import torch
from crocodil_callbacks.log_points import AtLogPoints
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from crocodil.ranks import gather_rows


class LatentStatistics(AtLogPoints):
    """Figures of the standardised latents z (N, K, D) of the last batches of all processes, at log points.

    - `latent_norm`: mean of |z_nk|, which is about sqrt(D) for standardised latents.
    - `latent_effective_rank`, `latent_participation_ratio`: how many of the D directions are in use; of the eigenvalues
      of the covariance of the D coordinates over texts, summed over registers that are each centred. See
      `effective_rank` and `participation_ratio`.
    - `latent_dead_share`: share of the K D coordinates whose deviation over texts is below `dead_std`.
    - `latent_cosine_between_texts`: mean cosine between the latents of different texts, as vectors of K D numbers. 0 if
      they are unrelated, 1 if they have collapsed.
    - `latent_cosine_under_noise`: mean cosine between latents and what the demasker saw of them. Noise of deviation
      sigma alone makes it 1 / sqrt(1 + sigma^2), 0.8 at 0.75.
    - `latent_mean_error`, `latent_std_error`: root mean square over the coordinates of the mean over texts, and of the
      deviation minus 1. N texts leave about 1 / sqrt(N) and 1 / sqrt(2 N) to chance.

    Args:
        num_batches: how many batches are looked at, at least 1; earlier ones are of older weights.
        dead_std: see `latent_dead_share`, above 0.

    Raises:
        ValueError: if an argument is out of range, or the stage returns no latents.
    """

    def __init__(self, num_batches: int = 4, dead_std: float = 0.1) -> None:
        if num_batches < 1:
            raise ValueError(f"num_batches must be at least 1, got {num_batches}")
        if dead_std <= 0:
            raise ValueError(f"dead_std must be above 0, got {dead_std}")
        self.dead_std = dead_std
        self._batches: deque[dict[str, Tensor]] = deque(maxlen=num_batches)

    def collect(self, trainer: L.Trainer, outputs: Any, batch: dict[str, Tensor]) -> None:
        """Keeps the latents of a batch, and lets go of the oldest."""
        if "latents" not in outputs:
            raise ValueError(
                "LatentStatistics expects a stage whose training step returns latents (autoencoder or prior), got only "
                f"{', '.join(outputs)}: leave the callback out"
            )
        self._batches.append({name: outputs[name].detach() for name in ("latents", "disturbed") if name in outputs})

    def figures(self, trainer: L.Trainer) -> dict[str, float]:
        """See the class; nothing if there is a single text."""
        names = self._batches[0].keys()
        kept = {name: gather_rows(torch.cat([part[name] for part in self._batches]).float()) for name in names}
        if len(kept["latents"]) < 2:
            return {}
        found = latent_statistics(kept["latents"], self.dead_std)
        if "disturbed" in kept:
            cosines = cosine_similarity(kept["latents"].flatten(1), kept["disturbed"].flatten(1))
            found["latent_cosine_under_noise"] = cosines.mean()
        return dict(zip(found, torch.stack([*found.values()]).tolist(), strict=True))


@torch.no_grad()
def latent_statistics(latents: Tensor, dead_std: float) -> dict[str, Tensor]:
    """The figures of `LatentStatistics` that need latents alone, scalars by name.

    Args:
        latents: (N, K, D) float, N at least 2.
        dead_std: deviation below which a coordinate counts as dead.
    """
    mean, std = latents.mean(0), latents.std(0)
    centred = (latents - mean).flatten(0, 1)
    eigenvalues = covariance_eigenvalues(centred.T @ centred / len(latents))
    return {
        "latent_norm": latents.norm(dim=-1).mean(),
        "latent_effective_rank": effective_rank(eigenvalues),
        "latent_participation_ratio": participation_ratio(eigenvalues),
        "latent_dead_share": (std < dead_std).float().mean(),
        "latent_cosine_between_texts": mean_cosine(latents.flatten(1)),
        "latent_mean_error": mean.square().mean().sqrt(),
        "latent_std_error": (std - 1).square().mean().sqrt(),
    }


def covariance_eigenvalues(covariance: Tensor) -> Tensor:
    """Eigenvalues (D,) of a covariance matrix (D, D), rounding below zero cut off; NaN if the matrix is not finite."""
    if not covariance.isfinite().all():  # the decomposition would raise
        return torch.full_like(covariance[0], math.nan)
    return torch.linalg.eigvalsh(covariance).clamp(min=0)


def effective_rank(eigenvalues: Tensor) -> Tensor:
    """exp(-sum_i p_i log p_i) with p_i = lambda_i / sum_j lambda_j (Roy and Vetterli, 2007), of the covariance matrix.

    D equal eigenvalues give D, a single one gives 1; NaN if all are zero.

    Args:
        eigenvalues: (D,) float, at least 0.
    """
    share = eigenvalues / eigenvalues.sum()
    return torch.special.entr(share).sum().exp()


def participation_ratio(eigenvalues: Tensor) -> Tensor:
    """(sum_i lambda_i)^2 / sum_i lambda_i^2: as `effective_rank`, but counting small eigenvalues less."""
    return eigenvalues.sum() ** 2 / eigenvalues.square().sum()


def mean_cosine(vectors: Tensor) -> Tensor:
    """The mean cosine over all pairs of different rows.

    Args:
        vectors: (N, M) float, N at least 2.
    """
    count = len(vectors)
    unit = normalize(vectors, dim=1)
    return (unit.sum(0).square().sum() - unit.square().sum()) / (count * (count - 1))

"""Gumbel noise in float32 cuts the tail (arXiv 2409.02908); drawing here does not. Other traps: test_perplexity.py."""

import math

import pytest
import torch

from crocodil.samplers.drawing import TokenDistribution

VOCABULARY, TAIL = 1 << 17, 0.01
"""One token of probability 0.99; all others share the rest."""


def entropy_of_share(tail: float) -> float:
    """Entropy in nats where the tail has this probability in all."""
    return -(1 - tail) * math.log(1 - tail) - tail * math.log(tail / VOCABULARY)


def gumbel_share(draws: int, bits: int | None) -> float:
    """How often any of the rare tokens wins under Gumbel noise from uniforms of so many bits; None for exact ones.

    Of V noises only the largest matters, and that of V uniforms is distributed as U^(1/V).
    """
    generator = torch.Generator().manual_seed(0)
    first, largest = torch.rand(2, draws, dtype=torch.float64, generator=generator)
    largest = largest ** (1 / VOCABULARY)
    if bits is not None:
        first, largest = ((u * 2**bits).floor().clamp(min=0.5) / 2**bits for u in (first, largest))
    rare = math.log(TAIL / VOCABULARY) - (-largest.log()).log()
    common = math.log(1 - TAIL) - (-first.log()).log()
    return float((rare > common).double().mean())


def test_float32_gumbel_noise_lowers_the_entropy() -> None:
    """24 bits of a float32 uniform end at 1 - 2^-24, so that no noise exceeds 16.6."""
    exact, cut = gumbel_share(2_000_000, None), gumbel_share(2_000_000, 24)
    assert exact == pytest.approx(TAIL, abs=4 * math.sqrt(TAIL / 2_000_000))
    assert cut < 0.7 * TAIL
    assert entropy_of_share(cut) < 0.8 * entropy_of_share(TAIL)


def test_drawing_keeps_the_tail_in_float32() -> None:
    """By inversion: uniforms on both sides of 0.99 give the common token and rare ones, to the last of them."""
    logits = torch.full((VOCABULARY + 1,), math.log(TAIL / VOCABULARY))
    logits[0] = math.log(1 - TAIL)
    share = torch.tensor([0.5, 1 - 1.0001 * TAIL, 1 - 0.9999 * TAIL, 1 - 0.5 * TAIL, 1 - 1e-9], dtype=torch.float64)
    tokens = TokenDistribution(1.0).draw(logits.expand(5, -1), share)
    assert tokens[:2].tolist() == [0, 0]
    places = (share[2:] - (1 - TAIL)) / TAIL * VOCABULARY
    assert tokens[2:].tolist() == pytest.approx(places.tolist(), abs=2)

import math
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from crocodil.diffusion.noise import RowNoise
from crocodil.samplers import drawing
from crocodil.samplers.drawing import GROUP, TokenDistribution, confidence, margin, negative_entropy

SMALLEST, LARGEST = 2.0**-53, 1 - 2.0**-53  # of `RowNoise.uniform`
SIZES = (1, 2, 9, GROUP - 1, GROUP, GROUP + 1, 2 * GROUP - 1, 2 * GROUP, 2 * GROUP + 1, 3 * GROUP + 16)
DISTRIBUTIONS = (
    TokenDistribution(0.0),
    TokenDistribution(1.0),
    TokenDistribution(1.0, top_p=0.5),
    TokenDistribution(1.0, top_k=2),
    TokenDistribution(1.0, top_p=0.9, top_k=4),
)

each_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=str)


def some_logits(*shape: int) -> Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def even_counts(distribution: TokenDistribution, logits: Tensor, size: int = 5_000) -> Tensor:
    """How often each token is drawn by `size` uniform numbers that lie evenly on (0, 1)."""
    uniform = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    return distribution.draw(logits.expand(size, -1), uniform).bincount(minlength=len(logits))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_tokens_follow_the_tempered_softmax(chi_square: Callable, temperature: float) -> None:
    logits, size = 0.3 * some_logits(6), 20_000
    uniform = RowNoise(torch.tensor([1])).uniform(0, 0, size)
    tokens = TokenDistribution(temperature).draw(logits.expand(1, size, -1), uniform)
    assert tokens.shape == (1, size)
    counts = tokens.flatten().bincount(minlength=6)
    assert chi_square(counts, (logits / temperature).softmax(-1)) > 1e-3
    assert chi_square(counts, (logits / (1.2 * temperature)).softmax(-1)) < 1e-6  # the test can tell


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("vocab_size", SIZES)
def test_an_even_grid_of_uniforms_gives_each_token_its_share_exactly(temperature: float, vocab_size: int) -> None:
    logits = some_logits(vocab_size)
    counts = even_counts(TokenDistribution(temperature), logits)
    assert len(counts) == vocab_size
    assert ((counts - 5_000 * (logits / temperature).softmax(-1)).abs() <= 1 + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_logits_are_taken_at_their_word(dtype: torch.dtype) -> None:
    logits = some_logits(200).to(dtype)
    counts = even_counts(TokenDistribution(0.7), logits)
    assert ((counts - 5_000 * (logits.double() / 0.7).softmax(-1)).abs() <= 1 + 1e-2).all()


@pytest.mark.parametrize("tail", [1e-4, 1e-7, 1e-9, 1e-12])
def test_no_tail_of_float64_logits_is_cut_off(tail: float) -> None:
    logits = torch.tensor([tail, 1 - 2 * tail, tail], dtype=torch.float64).log()
    uniform = torch.tensor([0.9 * tail, 1.1 * tail, 1 - 1.1 * tail, 1 - 0.9 * tail], dtype=torch.float64)
    for temperature in (1.0, 0.25):
        drawn = TokenDistribution(temperature).draw((temperature * logits).expand(4, -1), uniform)
        assert drawn.tolist() == [0, 1, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 64.0, -256.0])
@pytest.mark.parametrize("places", [(0, 1, 2, 3), (3, 0, 1, 2), (5, 140, 141, 299), (299, 5, 140, 141)])
def test_no_tail_of_low_precision_logits_is_cut_off(dtype: torch.dtype, offset: float, places: tuple[int, ...]) -> None:
    # The weights are 1 and those of the tails, 1e-7, 2e-9 and 3e-10: all logits are exact in bfloat16.
    weights = {place: math.exp(logit) for place, logit in zip(places, (0, -16, -20, -22), strict=True)}
    logits = torch.full((300,), -torch.inf)
    for place, weight in weights.items():
        logits[place] = offset + round(math.log(weight))
    total, below = sum(weights.values()), 0.0
    for place in sorted(places):
        inside = [below + share * weights[place] for share in (0.01, 0.5, 0.99)]
        uniform = torch.tensor(inside, dtype=torch.float64) / total
        assert TokenDistribution(1.0).draw(logits.to(dtype).expand(3, -1), uniform).tolist() == [place] * 3
        below += weights[place]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("large_first", [1, 0])
def test_many_small_weights_are_summed_exactly(dtype: torch.dtype, large_first: int) -> None:
    # A running float32 sum behind the large weight would not move at all: each small one is 1.5e-8 of it.
    num_small, small, asked = 100_000, math.exp(-18), [0, 1, 12_345, 99_999]
    logits = torch.full((num_small + 1,), -18.0)
    logits[0 if large_first else -1] = 0.0
    below = torch.tensor([large_first + small * (k + 0.5) for k in asked], dtype=torch.float64)
    tokens = TokenDistribution(1.0).draw(logits.to(dtype).expand(4, -1), below / (1 + num_small * small))
    assert (tokens - large_first).tolist() == asked


@pytest.mark.parametrize("vocab_size", SIZES[1:])
def test_tokens_of_probability_zero_are_never_drawn(vocab_size: int) -> None:
    num_rows, generator = 60, torch.Generator().manual_seed(0)
    possible = torch.rand(num_rows, vocab_size, generator=generator) < torch.rand(num_rows, 1, generator=generator)
    possible[:, -1] &= torch.arange(num_rows) % 2 == 0
    possible[torch.arange(num_rows), torch.randint(vocab_size - 1, (num_rows,), generator=generator)] = True
    logits = some_logits(num_rows, vocab_size).masked_fill(~possible, -torch.inf)
    first, last = possible.int().argmax(1), vocab_size - 1 - possible.int().flip(1).argmax(1)
    for dtype in (torch.float64, torch.float32):
        for value in (SMALLEST, 0.5, LARGEST):
            uniform = torch.full((num_rows,), value, dtype=torch.float64)
            for distribution in DISTRIBUTIONS:
                tokens = distribution.draw(logits.to(dtype), uniform)
                assert possible.gather(1, tokens[:, None]).all()
            tokens = TokenDistribution(1.0).draw(logits.to(dtype), uniform)
            if value in (SMALLEST, LARGEST):
                assert torch.equal(tokens, first if value == SMALLEST else last)


def test_a_uniform_on_a_boundary_steps_over_impossible_tokens() -> None:
    logits = torch.full((2 * GROUP + 3,), -torch.inf)
    possible = [1, 3, 2 * GROUP, 2 * GROUP + 1]  # of a quarter each; no group between them
    logits[possible] = 0.0
    uniform = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    assert TokenDistribution(1.0).draw(logits.expand(3, -1), uniform).tolist() == possible[1:]


def test_temperature_zero_is_greedy_and_the_limit_of_low_ones() -> None:
    logits = some_logits(3, 4, 6)
    uniform = torch.rand(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for distribution in (
        TokenDistribution(0.0),
        TokenDistribution(0.0, top_p=0.5, top_k=3),
        TokenDistribution(1e-4),
        TokenDistribution(2.0, top_k=1),
        TokenDistribution(2.0, top_p=1e-6),
    ):
        for dtype in (torch.float64, torch.bfloat16):
            given = logits.to(dtype)
            assert torch.equal(distribution.draw(given, uniform), given.argmax(-1))
            assert torch.equal(given, logits.to(dtype))  # nothing is written to them


def smallest_nucleus(probabilities: list[float], top_p: float) -> tuple[int, ...]:
    """The smallest set of tokens whose mass reaches `top_p`, and of those of its size the one of most mass."""

    def mass(tokens: tuple[int, ...]) -> float:
        return math.fsum(probabilities[token] for token in tokens)

    sizes = range(1, len(probabilities) + 1)
    best = (max(combinations(range(len(probabilities)), size), key=mass) for size in sizes)
    return next(tokens for tokens in best if mass(tokens) >= top_p)


def renormalised(probabilities: list[float], tokens: tuple[int, ...]) -> list[float]:
    total = sum(probabilities[token] for token in tokens)
    return [p / total if token in tokens else 0.0 for token, p in enumerate(probabilities)]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [None, 1, 2, 5, 7, 100])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.6, 0.9, 0.99, 1.0])
def test_top_k_and_top_p_by_enumeration(temperature: float, top_k: int | None, top_p: float) -> None:
    logits = some_logits(7)
    expected = (logits / temperature).softmax(-1).tolist()
    best = sorted(range(7), key=expected.__getitem__, reverse=True)
    expected = renormalised(expected, tuple(best[:top_k]))
    if top_p < 1:
        expected = renormalised(expected, smallest_nucleus(expected, top_p))
    counts = even_counts(TokenDistribution(temperature, top_p, top_k), logits)
    assert ((counts - 5_000 * torch.tensor(expected)).abs() <= 1 + 1e-3).all()
    assert not counts[torch.tensor(expected) == 0].any()


def test_a_nucleus_ends_where_its_mass_is_reached_exactly() -> None:
    logits = torch.tensor([4.0, 2.0, 1.0, 1.0]).log()[[2, 0, 3, 1]]  # 1/8, 1/2, 1/8, 1/4
    for top_p, kept in ((0.5, [1]), (0.5001, [1, 3]), (0.7499, [1, 3])):
        assert even_counts(TokenDistribution(1.0, top_p), logits, 64).nonzero().flatten().tolist() == kept


@pytest.mark.parametrize("vocab_size", [GROUP - 1, GROUP + 1, 3 * GROUP])
def test_cut_distributions_over_large_vocabularies(vocab_size: int) -> None:
    logits = some_logits(vocab_size)
    falling = logits.softmax(-1).sort(descending=True)
    for distribution, size in (
        (TokenDistribution(1.0, top_k=GROUP - 2), GROUP - 2),
        (TokenDistribution(1.0, top_p=0.8), int((falling.values.cumsum(0) < 0.8).sum()) + 1),
    ):
        kept = falling.indices[:size]
        expected = torch.zeros_like(logits).scatter(0, kept, falling.values[:size] / falling.values[:size].sum())
        counts = even_counts(distribution, logits)
        assert ((counts - 5_000 * expected).abs() <= 1 + 1e-3).all()
        assert not counts[expected == 0].any()


@each_distribution
@pytest.mark.parametrize("vocab_size", [2, 5, GROUP, GROUP + 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_no_distribution_gives_minus_one(
    distribution: TokenDistribution, vocab_size: int, dtype: torch.dtype
) -> None:
    logits = some_logits(8, vocab_size).to(dtype)
    uniform = torch.full((8,), 0.5, dtype=torch.float64)
    expected = distribution.draw(logits, uniform)
    assert (expected >= 0).all()
    logits[1, 0], logits[2, -1], logits[3] = torch.nan, torch.nan, torch.nan
    logits[4, 0], logits[5, -1], logits[6] = torch.inf, torch.inf, -torch.inf
    expected[1:7] = -1  # and the rows beside them are as they were
    assert torch.equal(distribution.draw(logits, uniform), expected)


@each_distribution
@pytest.mark.parametrize("chunk_elements", [1, 7, 12, 35, 36, 1000])
def test_chunks_do_not_show(
    monkeypatch: pytest.MonkeyPatch, distribution: TokenDistribution, chunk_elements: int
) -> None:
    logits, uniform = some_logits(3, 4, 3), RowNoise(torch.arange(3)).uniform(0, 0, 4)
    tokens = distribution.draw(logits, uniform)
    scores = [score(logits, tokens) for score in (confidence, margin, negative_entropy)]
    monkeypatch.setattr(drawing, "CHUNK_ELEMENTS", chunk_elements)
    assert tokens.shape == (3, 4)
    assert torch.equal(distribution.draw(logits, uniform), tokens)
    for score, expected in zip((confidence, margin, negative_entropy), scores, strict=True):
        assert expected.shape == (3, 4)
        assert torch.equal(score(logits, tokens), expected)


class Results(TorchDispatchMode):
    """Remembers the type and size of every tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.dtype, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen += [(x.dtype, x.numel()) for x in tree_leaves(result) if isinstance(x, Tensor)]
        return result

    def largest(self, dtype: torch.dtype) -> int:
        return max((size for seen, size in self.seen if seen == dtype), default=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_as_large_as_the_logits_is_never_float64(dtype: torch.dtype) -> None:
    logits, uniform = some_logits(16, 4000).to(dtype), torch.full((16,), 0.5, dtype=torch.float64)
    with Results() as results:
        tokens = TokenDistribution(1.0).draw(logits, uniform)
        TokenDistribution(1.0, top_k=50).draw(logits, uniform)
        for score in (confidence, margin, negative_entropy):
            assert score(logits, tokens).dtype == torch.float32
    assert results.largest(torch.float32) >= logits.numel()
    assert 0 < results.largest(torch.float64) <= 16 * GROUP


def test_copies_are_no_larger_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, uniform = some_logits(64, 1000).bfloat16(), torch.full((64,), 0.5, dtype=torch.float64)
    monkeypatch.setattr(drawing, "CHUNK_ELEMENTS", 3000)
    with Results() as results:
        for distribution in DISTRIBUTIONS:
            tokens = distribution.draw(logits, uniform)
        for score in (confidence, margin, negative_entropy):
            score(logits, tokens)
    padded = 3 * 8 * GROUP
    assert max(results.largest(dtype) for dtype in (torch.float32, torch.float64, torch.int64)) <= padded


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature must not be negative, got -0.1"),
        ({"temperature": math.nan}, "temperature must not be negative, got nan"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1, got 1.1"),
        ({"top_p": math.nan}, "top_p must be above 0 and at most 1, got nan"),
        ({"top_k": 0}, "top_k must be at least 1, or None for all tokens, got 0"),
        ({"top_k": -4}, "top_k must be at least 1, or None for all tokens, got -4"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        TokenDistribution(**settings)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scores_by_hand(dtype: torch.dtype) -> None:
    probabilities = torch.tensor([[[0.5, 0.25, 0.25, 0.0], [0.125, 0.75, 0.125, 0.0], [1.0, 0.0, 0.0, 0.0]]])
    tokens = torch.tensor([[1, 1, 0]])
    entropies = [0.5 * math.log(0.5) + 0.5 * math.log(0.25), 0.75 * math.log(0.75) + 0.25 * math.log(0.125), 0.0]
    tolerance = {"atol": 0.02, "rtol": 0.01} if dtype == torch.bfloat16 else {"atol": 1e-6, "rtol": 1e-6}
    for score, expected in (
        (confidence, [math.log(0.25), math.log(0.75), 0.0]),
        (margin, [0.25, 0.625, 1.0]),
        (negative_entropy, entropies),
    ):
        logits = (probabilities.double().log() + 3.0).to(dtype)  # free of a constant
        scores = score(logits, tokens)
        assert scores.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(scores.double(), torch.tensor([expected], dtype=torch.float64), **tolerance)
        assert torch.equal(logits, (probabilities.double().log() + 3.0).to(dtype))  # nothing is written to them


@pytest.mark.parametrize("offset", [0.0, 1000.0, -1000.0])
def test_scores_against_log_softmax(offset: float) -> None:
    logits = some_logits(2, 5, 333) + offset
    logits[..., 7] = -torch.inf
    tokens = torch.randint(0, 333, (2, 5), generator=torch.Generator().manual_seed(0))
    tokens[0, 0], tokens[0, 1] = 7, logits[0, 1].argmax()
    log_p = logits.log_softmax(-1)
    best, second = log_p.exp().sort(-1, descending=True).values[..., :2].unbind(-1)
    expected = log_p.gather(-1, tokens[..., None]).squeeze(-1)
    assert expected[0, 0] == -torch.inf
    torch.testing.assert_close(confidence(logits, tokens), expected)
    torch.testing.assert_close(margin(logits, tokens), best - second)
    torch.testing.assert_close(negative_entropy(logits, tokens), -torch.special.entr(log_p.exp()).sum(-1))


def test_scores_of_a_certain_token_are_exact() -> None:
    logits, token = torch.full((1, 200), -torch.inf), torch.tensor([150])
    logits[0, 150] = -3.7
    assert confidence(logits, token).tolist() == [0.0]
    assert margin(logits, token).tolist() == [1.0]
    assert negative_entropy(logits, token).tolist() == [0.0]

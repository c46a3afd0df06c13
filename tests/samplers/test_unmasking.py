import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from crocodil.diffusion.noise import RowNoise
from crocodil.samplers import unmasking
from crocodil.samplers.unmasking import REMASKING_RULES, commit_scores, draw_tokens, keep_best, step_quotas

SMALLEST, LARGEST = 2.0**-53, 1 - 2.0**-53  # of `RowNoise.uniform`


def some_logits(*shape: int) -> Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_tokens_follow_the_tempered_softmax(chi_square: Callable, temperature: float) -> None:
    logits, size = 0.3 * some_logits(6), 20_000
    uniform = RowNoise(torch.tensor([1])).uniform(0, 0, size)
    counts = draw_tokens(logits.expand(1, size, -1), temperature, uniform).flatten().bincount(minlength=6)
    assert chi_square(counts, (logits / temperature).softmax(-1)) > 1e-3
    assert chi_square(counts, (logits / (1.2 * temperature)).softmax(-1)) < 1e-6  # the test can tell


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_an_even_grid_of_uniforms_gives_each_token_its_share_exactly(temperature: float) -> None:
    logits, size = some_logits(9), 10_000
    uniform = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    counts = draw_tokens(logits.expand(size, -1), temperature, uniform).bincount(minlength=9)
    assert ((counts - (logits / temperature).softmax(-1) * size).abs() <= 1).all()


@pytest.mark.parametrize("tail", [1e-4, 1e-7, 1e-9, 1e-12])
def test_no_tail_is_cut_off(tail: float) -> None:
    logits = torch.tensor([tail, 1 - 2 * tail, tail], dtype=torch.float64).log()
    uniform = torch.tensor([0.5 * tail, 1.5 * tail, 1 - 1.5 * tail, 1 - 0.5 * tail], dtype=torch.float64)
    assert draw_tokens(logits.expand(4, -1), 1.0, uniform).tolist() == [0, 1, 1, 2]


def test_many_small_probabilities_are_summed_exactly() -> None:
    vocab_size = 100_000  # a running float32 sum of these is off by far more than one token
    probabilities = torch.cat([torch.full((vocab_size - 1,), 1e-8), torch.tensor([1 - 1e-8 * (vocab_size - 1)])])
    uniform = torch.tensor([[1e-8 * (k + 0.5) for k in (0, 1, 12_345, 99_998)]], dtype=torch.float64)
    logits = probabilities.double().log().expand(1, 4, -1)
    assert draw_tokens(logits, 1.0, uniform).tolist() == [[0, 1, 12_345, 99_998]]


@pytest.mark.parametrize("impossible", [[0], [4], [0, 1], [3, 4], [2], [0, 2, 4], [1, 2, 3, 4], [0, 1, 2, 3]])
def test_tokens_of_probability_zero_are_never_drawn(impossible: list[int]) -> None:
    logits = some_logits(5)
    logits[impossible] = -torch.inf
    uniform = torch.cat([torch.tensor([SMALLEST, LARGEST]), torch.linspace(0.001, 0.999, 999)]).double()
    uniform[1] = LARGEST
    tokens = draw_tokens(logits.expand(len(uniform), -1), 1.0, uniform)
    possible = sorted(set(range(5)) - set(impossible))
    assert tokens[0] == possible[0]
    assert tokens[1] == possible[-1]
    assert set(tokens.tolist()) <= set(possible)


def test_temperature_zero_is_greedy() -> None:
    logits = some_logits(3, 4, 6)
    uniform = torch.rand(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.equal(draw_tokens(logits, 0.0, uniform), logits.argmax(-1))
    assert torch.equal(draw_tokens(logits, 1e-4, uniform), logits.argmax(-1))  # and the limit of low temperatures


@pytest.mark.parametrize("chunk_elements", [1, 7, 12, 35, 36, 1000])
def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch, chunk_elements: int) -> None:
    logits, uniform = some_logits(3, 4, 3), RowNoise(torch.arange(3)).uniform(0, 0, 4)
    whole = draw_tokens(logits, 1.0, uniform)
    monkeypatch.setattr(unmasking, "CHUNK_ELEMENTS", chunk_elements)
    chunked = draw_tokens(logits, 1.0, uniform)
    assert chunked.shape == (3, 4)
    assert torch.equal(chunked, whole)


def test_commit_scores_by_hand() -> None:
    probabilities = torch.tensor([[[0.5, 0.3, 0.2, 0.0], [0.1, 0.8, 0.1, 0.0], [1.0, 0.0, 0.0, 0.0]]])
    tokens = torch.tensor([[1, 1, 0]])
    entropies = [
        sum(p * math.log(p) for p in (0.5, 0.3, 0.2)),
        0.8 * math.log(0.8) + 0.2 * math.log(0.1),
        0.0,
    ]
    for rule, expected in [
        ("low_confidence", [math.log(0.3), math.log(0.8), 0.0]),
        ("margin", [0.2, 0.7, 1.0]),
        ("entropy", entropies),
    ]:
        scores = commit_scores(rule, probabilities.log() + 3.0, tokens)  # logits are free of a constant
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, torch.tensor([expected]))


def test_every_rule_but_random_has_scores() -> None:
    logits, tokens = some_logits(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
    for rule in REMASKING_RULES:
        if rule != "random":
            assert commit_scores(rule, logits, tokens).shape == (2, 3)


def test_keep_best_by_brute_force() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, (200, 6), generator=generator).float()  # many ties
    allowed = torch.rand(200, 6, generator=generator) < 0.7
    quota = torch.randint(0, 7, (200,), generator=generator)
    kept = keep_best(scores, allowed, quota)
    for row in range(200):
        candidates = [i for i in range(6) if allowed[row, i]]
        best = sorted(candidates, key=lambda i: (-scores[row, i].item(), i))[: quota[row]]
        assert kept[row].nonzero().flatten().tolist() == sorted(best)


def test_keep_best_copes_with_infinite_scores() -> None:
    scores = torch.tensor([[-torch.inf, -torch.inf, 0.0, torch.inf]])
    allowed = torch.tensor([[False, True, True, False]])
    assert keep_best(scores, allowed, torch.tensor([1])).tolist() == [[False, False, True, False]]


@pytest.mark.parametrize(("num_masked", "num_steps"), product([0, 1, 5, 8, 13], [1, 3, 8, 20]))
def test_step_quotas_are_equal_shares_with_the_remainder_first(num_masked: int, num_steps: int) -> None:
    quotas = step_quotas(torch.tensor([num_masked, 2 * num_masked]), num_steps)
    assert quotas.shape == (num_steps, 2)
    assert quotas.sum(0).tolist() == [num_masked, 2 * num_masked]
    assert (quotas.diff(dim=0) <= 0).all()
    assert (quotas.amax(0) - quotas.amin(0) <= 1).all()

import math
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from crocodil.evaluation.likelihood import draw_masks, is_greedy, log_likelihood, score, score_single_tokens
from crocodil.models import Demasker
from crocodil.samplers import MaskedSampler

PROMPT, ANSWER = [3, 7, 1], [4, 9, 2, 6, 4]


@pytest.fixture(scope="module")
def demasker(make_demasker: Callable[..., Demasker]) -> Demasker:
    return make_demasker()


def enumerated(demasker: Any, prompt: list[int], answer: list[int], latents: Tensor | None = None) -> float:
    """E over l uniform and subsets uniform of (L'/l) sum of log p at masked positions, term by term."""
    length, total = len(answer), 0.0
    for count in range(1, length + 1):
        for subset in combinations(range(length), count):
            noisy = torch.tensor([prompt + answer])
            places = [len(prompt) + i for i in subset]
            noisy[0, places] = demasker.mask_token_id
            log_p = demasker(noisy, latents)[0].log_softmax(-1)
            value = sum(log_p[place, answer[i]].item() for place, i in zip(places, subset, strict=True))
            total += length / count * value / (length * math.comb(length, count))
    return total


def estimates(demasker: Demasker, num_seeds: int, num_samples: int, **given: Any) -> Tensor:
    prompts, answers = (torch.tensor([ids]).expand(num_seeds, -1) for ids in (PROMPT, ANSWER))
    seeds = torch.arange(num_seeds)
    return log_likelihood(demasker, prompts, answers, seeds, num_samples, batch_size=1000, **given)


def test_the_expectation_is_log_p_where_conditionals_belong_to_one_joint(tabulated_demasker: Any) -> None:
    """What is enumerated below is the right thing: any-order chain rule, exactly."""
    table = torch.rand(3, 3, 3, 3, generator=torch.Generator().manual_seed(0)).double() + 0.05
    demasker = tabulated_demasker(table)

    def conditionals(token_ids: Tensor, _: None) -> Tensor:
        return demasker(token_ids)[..., : demasker.mask_token_id]

    conditionals.mask_token_id = demasker.mask_token_id  # type: ignore[attr-defined]
    joint = table / table.sum()
    assert enumerated(conditionals, [], [2, 0, 1, 1]) == pytest.approx(joint[2, 0, 1, 1].log().item())
    conditional = joint[2, 0, 1, 1] / joint[2].sum()
    assert enumerated(conditionals, [2], [0, 1, 1]) == pytest.approx(conditional.log().item())


@pytest.mark.parametrize("num_samples", [1, 3, 16])
def test_estimates_scatter_around_the_enumerated_expectation(demasker: Demasker, num_samples: int) -> None:
    values = estimates(demasker, 3000 // num_samples, num_samples)
    error = values.std() / len(values) ** 0.5
    assert error > 0
    assert abs(values.mean() - enumerated(demasker, PROMPT, ANSWER)) < 4 * error


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_as_many_samples_as_masked_forms_are_exact(demasker: Demasker, length: int, count_calls: Any) -> None:
    forms = 2**length - 1
    calls = count_calls(demasker.decoder)
    prompts, answers = torch.tensor([PROMPT] * 2), torch.tensor([ANSWER[:length]] * 2)
    values = log_likelihood(demasker, prompts, answers, torch.arange(2), num_samples=forms + 1, batch_size=1)
    assert len(calls) == 2 * forms
    expected = enumerated(demasker, PROMPT, ANSWER[:length])
    torch.testing.assert_close(values, torch.full((2,), expected, dtype=torch.float64), rtol=1e-12, atol=0)
    if length > 1:
        drawn = log_likelihood(demasker, prompts, answers, torch.arange(2), num_samples=forms - 1)
        assert len(set(drawn.tolist())) == 2


@pytest.mark.parametrize("sample", range(5))
def test_each_sample_masks_uniformly(sample: int, chi_square: Callable[[Tensor, Tensor], float]) -> None:
    """P(subset) = 1 / (L' binom(L', l)); 5 samples of 3 tokens do not divide, and every one is unbiased by itself."""
    seeds = torch.arange(7000)
    masks = draw_masks(seeds, torch.full_like(seeds, sample), num_samples=5, length=3)
    codes = (masks * torch.tensor([1, 2, 4])).sum(1)
    sizes = torch.tensor([bin(code).count("1") for code in range(1, 8)])
    probabilities = 1 / (3 * torch.tensor([math.comb(3, int(size)) for size in sizes]))
    assert chi_square(codes.bincount(minlength=8)[1:], probabilities) > 1e-3
    assert not (codes == 0).any()


def test_counts_are_stratified() -> None:
    """8 samples of 4 tokens mask 1, 2, 3 and 4 tokens twice each, whatever the seed."""
    sample = torch.arange(8).repeat(50)
    masks = draw_masks(torch.arange(50).repeat_interleave(8), sample, num_samples=8, length=4)
    counts = masks.sum(1).view(50, 8).sort(1).values
    assert (counts == torch.tensor([1, 1, 2, 2, 3, 3, 4, 4])).all()


def test_latents_are_those_of_each_answer(demasker: Demasker) -> None:
    latents = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(0)).double()
    values = estimates(demasker, 3, 31, latents=latents)
    expected = [enumerated(demasker, PROMPT, ANSWER, latents[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("batch_size", [1, 5, 1000])
def test_neither_batch_nor_company_nor_order_matters(demasker: Demasker, batch_size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    prompts, answers = (torch.randint(1, 11, (6, size), generator=generator) for size in (2, 4))
    seeds = torch.tensor([5, 1, 4, 2, 8, 5])
    together = log_likelihood(demasker, prompts, answers, seeds, 7, batch_size=4)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = log_likelihood(demasker, prompts[order], answers[order], seeds[order], 7, batch_size)
    torch.testing.assert_close(shuffled, together[order], rtol=0, atol=1e-12)
    alone = log_likelihood(demasker, prompts[2:3], answers[2:3], seeds[2:3], 7, batch_size)
    torch.testing.assert_close(alone, together[2:3], rtol=0, atol=1e-12)
    assert not torch.allclose(log_likelihood(demasker, prompts, answers, seeds + 1, 7), together)


def test_single_tokens_by_one_call_for_each_prompt(demasker: Demasker, count_calls: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    prompts = torch.randint(1, 11, (5, 3), generator=generator).repeat_interleave(11, 0)
    answers = torch.arange(11).repeat(5)[:, None]
    order = torch.randperm(55, generator=generator)
    prompts, answers = prompts[order], answers[order]
    calls = count_calls(demasker)
    log_p, is_first = score_single_tokens(demasker, prompts, answers, batch_size=2)
    assert [len(args[0]) for args in calls] == [2, 2, 1]
    torch.testing.assert_close(log_p, log_likelihood(demasker, prompts, answers, torch.arange(55)))
    assert torch.equal(is_first, is_greedy(demasker, prompts, answers)) and is_first.sum() == 5


def test_scores_are_both_quantities(demasker: Demasker, count_calls: Any) -> None:
    prompts, answers = torch.tensor([PROMPT] * 2), torch.tensor([ANSWER, ANSWER[::-1]])
    seeds = torch.arange(2)
    log_p, greedy = score(demasker, prompts, answers, seeds, 9)
    assert torch.equal(log_p, log_likelihood(demasker, prompts, answers, seeds, 9))
    assert torch.equal(greedy, is_greedy(demasker, prompts, answers))
    calls = count_calls(demasker)
    short, is_first = score(demasker, prompts, answers[:, :1], seeds, 9)
    assert [len(args[0]) for args in calls] == [1], "both are told by one row"
    torch.testing.assert_close(short, log_likelihood(demasker, prompts, answers[:, :1], seeds))
    assert torch.equal(is_first, is_greedy(demasker, prompts, answers[:, :1]))


def test_the_greedy_answer_is_that_of_the_sampler_and_no_other(demasker: Demasker) -> None:
    prompts = torch.randint(1, 11, (8, 3), generator=torch.Generator().manual_seed(3))
    sampler = MaskedSampler(num_steps=5, remasking="low_confidence", temperature=0.0)
    answers = sampler.sample(demasker, length=5, batch_size=8, prompt_ids=prompts).token_ids[:, 3:]
    assert is_greedy(demasker, prompts, answers, batch_size=3).tolist() == [True] * 8
    for place in range(5):
        other = answers.clone()
        other[:, place] = (other[:, place] + 1) % 11
        assert not is_greedy(demasker, prompts, other).any()
    mixed = torch.where(torch.arange(8)[:, None] % 2 == 0, answers, (answers + 1) % 11)
    assert is_greedy(demasker, prompts, mixed).tolist() == [True, False] * 4


def test_greedy_decoding_stops_where_no_row_agrees(demasker: Demasker, count_calls: Any) -> None:
    prompts = torch.tensor([PROMPT] * 2)
    sampler = MaskedSampler(num_steps=5, remasking="low_confidence", temperature=0.0)
    answers = sampler.sample(demasker, length=5, batch_size=2, prompt_ids=prompts).token_ids[:, 3:]
    wrong = (answers + 1) % 11
    calls = count_calls(demasker)
    assert not is_greedy(demasker, prompts, wrong).any()
    assert len(calls) == 1
    assert is_greedy(demasker, prompts, torch.stack([answers[0], wrong[0]])).tolist() == [True, False]
    assert [len(args[0]) for args in calls[1:]] == [2, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"answer_ids": torch.empty(1, 0, dtype=torch.int64)}, "the length of answers must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(demasker: Demasker, change: dict[str, Any], message: str) -> None:
    given = {"prompt_ids": torch.tensor([PROMPT]), "answer_ids": torch.tensor([ANSWER]), "seeds": torch.zeros(1).long()}
    with pytest.raises(ValueError, match=message):
        log_likelihood(demasker, **{**given, **change})


def test_nan_is_told(make_demasker: Callable[..., Demasker]) -> None:
    broken = make_demasker(seed=5)
    with torch.no_grad():
        broken.network.get_output_embeddings().weight[0] = torch.nan
    prompts, seeds = torch.tensor([PROMPT] * 2), torch.arange(2)
    for answers in (torch.tensor([ANSWER] * 2), torch.tensor([[4], [4]])):
        with pytest.raises(FloatingPointError, match="the demasker returned NaN for 2 of 2 answers"):
            score(broken, prompts, answers, seeds, 3)

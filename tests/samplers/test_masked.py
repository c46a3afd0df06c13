from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from crocodil.diffusion.noise import RowNoise
from crocodil.samplers import MaskedSampler
from crocodil.samplers.canvas import canvas_to_fill
from crocodil.samplers.decoding import Decoding
from crocodil.samplers.protocols import DemaskerLike

REMASKING_RULES = ("random", "low_confidence", "margin", "entropy")

MASK = 11
PROMPT = torch.tensor([3, 1, 4])
RAGGED = torch.tensor([[3, MASK, MASK, 1], [MASK, MASK, MASK, MASK], [5, 6, 7, 8], [2, MASK, 9, 9]])

each_rule = pytest.mark.parametrize("rule", REMASKING_RULES)
each_temperature = pytest.mark.parametrize("temperature", [0.0, 1.0])


def trajectory(demasker: Any, count_calls: Callable, sampler: MaskedSampler, **settings: Any) -> list[Tensor]:
    """The canvas before each call of the demasker, and the text at the end; its calls must be as reported."""
    seen = count_calls(demasker)
    out = sampler.sample(demasker, generator=RowNoise(torch.arange(settings["batch_size"])), **settings)
    assert out.num_calls == out.calls["demasker"] == len(seen)
    return [args[0] for args in seen] + [out.token_ids]


@each_rule
@each_temperature
@pytest.mark.parametrize(("num_steps", "block_size"), [(1, None), (5, None), (8, None), (4, 4), (6, 4), (8, 1)])
def test_invariants_of_a_run(
    make_demasker: Callable,
    count_calls: Callable,
    rule: str,
    temperature: float,
    num_steps: int,
    block_size: int | None,
) -> None:
    sampler = MaskedSampler(num_steps, block_size, rule, temperature)
    canvases = trajectory(make_demasker(), count_calls, sampler, length=8, batch_size=3, prompt_ids=PROMPT)
    num_blocks = 8 // (block_size or 8)
    per_block = num_steps // num_blocks
    shares = [8 // num_blocks // per_block + (i < 8 // num_blocks % per_block) for i in range(per_block)]
    assert len(canvases) == num_steps + 1
    assert (canvases[0][:, 3:] == MASK).all()
    assert (canvases[-1] != MASK).all()
    for step, (before, after) in enumerate(pairwise(canvases)):
        committed = (before == MASK) & (after != MASK)
        assert (committed.sum(1) == shares[step % per_block]).all()
        assert torch.equal(after[before != MASK], before[before != MASK])  # the prompt and all that was committed
        start = 3 + step // per_block * (8 // num_blocks)
        assert (before[:, :start] != MASK).all()  # blocks to the left are finished
        assert not committed[:, start + 8 // num_blocks :].any()  # and those to the right untouched


@each_rule
@each_temperature
@pytest.mark.parametrize(("num_steps", "block_size"), [(4, None), (16, None), (4, 4), (12, 2)])
def test_masks_of_ragged_prompts_are_filled(
    make_demasker: Callable,
    count_calls: Callable,
    rule: str,
    temperature: float,
    num_steps: int,
    block_size: int | None,
) -> None:
    sampler = MaskedSampler(num_steps, block_size, rule, temperature)
    canvases = trajectory(make_demasker(), count_calls, sampler, length=8, batch_size=4, prompt_ids=RAGGED)
    first_end = 4 + (block_size or 8)
    per_block = num_steps // (8 // (block_size or 8))
    assert (canvases[-1] != MASK).all()
    for before, after in pairwise(canvases):
        assert torch.equal(after[before != MASK], before[before != MASK])
        assert (before != after).any()  # no call is in vain
    for row in range(4):
        num_masked = int((canvases[0][row, :first_end] == MASK).sum())
        expected = [num_masked // per_block + (i < num_masked % per_block) for i in range(per_block)]
        committed = [
            int(((before != after)[row, :first_end]).sum()) for before, after in list(pairwise(canvases))[:per_block]
        ]
        assert committed == expected[: len(committed)]


@each_rule
def test_fill_writes_into_the_masks_and_nowhere_else(make_demasker: Callable, count_calls: Callable, rule: str) -> None:
    demasker, canvas = make_demasker(), RAGGED.repeat(1, 2)
    seen = count_calls(demasker)
    noise = RowNoise(torch.arange(4))
    out = MaskedSampler(5, None, rule, temperature=1.0).fill(demasker, canvas, generator=noise)
    assert out.num_calls == len(seen) == 5
    assert (out.token_ids != MASK).all()
    assert torch.equal(out.token_ids[canvas != MASK], canvas[canvas != MASK])
    again = MaskedSampler(5, None, rule).fill(demasker, out.token_ids, generator=noise)
    assert again.num_calls == 0
    assert torch.equal(again.token_ids, out.token_ids)


def test_fill_of_masks_behind_a_prompt_is_sample(make_demasker: Callable) -> None:
    sampler, demasker, noise = MaskedSampler(4, temperature=1.0), make_demasker(), RowNoise(torch.arange(2))
    canvas = torch.cat([PROMPT, torch.full((8,), MASK)]).expand(2, -1)
    filled = sampler.fill(demasker, canvas, generator=noise)
    written = sampler.sample(demasker, length=8, batch_size=2, prompt_ids=PROMPT, generator=noise)
    assert torch.equal(filled.token_ids, written.token_ids)


def test_steps_beyond_the_masked_tokens_are_not_made(make_demasker: Callable, count_calls: Callable) -> None:
    for num_steps, block_size in ((8, None), (9, None), (64, None), (64, 2)):
        sampler = MaskedSampler(num_steps, block_size)
        canvases = trajectory(make_demasker(), count_calls, sampler, length=8, batch_size=2)
        assert len(canvases) == 8 + 1


def test_the_mask_is_never_drawn_however_probable(tabulated_demasker: Callable) -> None:
    model = tabulated_demasker(torch.ones(2, 2, 2, dtype=torch.float64))
    for rule in REMASKING_RULES:
        for temperature in (0.0, 1.0, 5.0):
            out = MaskedSampler(2, None, rule, temperature).sample(model, length=3, batch_size=50)
            assert (out.token_ids < 2).all()


def sampled_joint(model: Any, num_steps: int, size: int = 5000) -> Tensor:
    """Counts (V^L,) of the texts drawn, in the order of the model's states."""
    sampler, length = MaskedSampler(num_steps, remasking="random", temperature=1.0), model.table.ndim
    out = sampler.sample(model, length=length, batch_size=size, generator=RowNoise(torch.arange(size)))
    counts = (out.token_ids[:, None] == model.states).all(-1).sum(0)
    assert counts.sum() == size
    return counts


@pytest.fixture
def toy(tabulated_demasker: Callable) -> Any:
    """A joint of three dependent ternary tokens: equal neighbours are three times as probable."""
    table = 0.5 + torch.rand(3, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    equal = torch.eye(3, dtype=torch.float64)
    return tabulated_demasker(table * (1 + 2 * equal[:, :, None]) * (1 + 2 * equal[None]))


def test_one_token_a_step_samples_the_exact_joint(toy: Any, chi_square: Callable) -> None:
    assert chi_square(sampled_joint(toy, num_steps=3), toy.joint) > 1e-3


def test_one_step_samples_the_product_of_the_marginals(toy: Any, chi_square: Callable) -> None:
    counts = sampled_joint(toy, num_steps=1)
    first, second, third = (toy.table.sum([axis for axis in range(3) if axis != kept]) for kept in range(3))
    product = (first[:, None, None] * second[:, None] * third).flatten()
    assert chi_square(counts, product) > 1e-3
    assert chi_square(counts, toy.joint) < 1e-9  # the factorisation error


def test_random_remasking_commits_a_uniform_subset(make_demasker: Callable, chi_square: Callable) -> None:
    size, demasker, sampler = 3000, make_demasker(latent_dim=None), MaskedSampler(2, remasking="random")
    decoding = Decoding(
        sampler, demasker, canvas_to_fill(torch.full((size, 4), MASK), MASK), RowNoise(torch.arange(size))
    )
    decoding.take(next(decoding.steps()))
    written = decoding.output().token_ids
    subsets = ((written != MASK) * torch.tensor([8, 4, 2, 1])).sum(1).bincount(minlength=16)
    pairs = torch.tensor([3, 5, 6, 9, 10, 12])
    assert subsets[pairs].sum() == size
    assert chi_square(subsets[pairs], torch.full((6,), 1 / 6)) > 1e-3


def test_what_is_not_committed_is_drawn_afresh(tabulated_demasker: Callable, chi_square: Callable) -> None:
    # Two independent tokens, 0 with probability 0.7: the first step commits a 0 if it drew one, the left one if two.
    size, one = 5000, torch.tensor([0.7, 0.3], dtype=torch.float64)
    model = tabulated_demasker(one[:, None] * one)
    sampler = MaskedSampler(2, remasking="low_confidence", temperature=1.0)
    texts = sampler.sample(model, length=2, batch_size=size, generator=RowNoise(torch.arange(size))).token_ids
    expected = torch.tensor([0.91 * 0.7, 0.7 * 0.3, 0.21 * 0.3 + 0.09 * 0.7, 0.09 * 0.3])  # of 00, 01, 10, 11
    assert chi_square((texts * torch.tensor([2, 1])).sum(1).bincount(minlength=4), expected) > 1e-3


class Biased:
    """A demasker with something added to each position: without it, all positions of an empty canvas are alike."""

    def __init__(self, demasker: Any) -> None:
        self.demasker, self.mask_token_id = demasker, demasker.mask_token_id
        self.bias = torch.randn(64, MASK + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def __call__(self, token_ids: Tensor, latents: Tensor | None = None, *, positions: Tensor, **given: Any) -> Tensor:
        return self.demasker(token_ids, latents, positions=positions, **given) + self.bias[positions]


def llada_decode(
    demasker: DemaskerLike, prompt: Tensor, length: int, num_steps: int, block_size: int, mask: int
) -> Tensor:
    """LLaDA's published low-confidence decoding at temperature 0, one row at a time, as plainly as can be said."""
    texts = []
    for row in prompt:
        text = [*row.tolist(), *[mask] * length]
        for block in range(length // block_size):
            positions = range(len(row) + block * block_size, len(row) + (block + 1) * block_size)
            steps = num_steps // (length // block_size)
            num_masks = sum(text[i] == mask for i in positions)
            for step in range(steps):
                quota = num_masks // steps + (1 if step < num_masks % steps else 0)
                logits = demasker(torch.tensor([text]), positions=torch.arange(len(text))[None])[0].clone()
                logits[:, mask] = -torch.inf
                confidence = {i: logits[i].softmax(-1).max().item() for i in positions if text[i] == mask}
                for i in sorted(confidence, key=confidence.__getitem__, reverse=True)[:quota]:
                    text[i] = int(logits[i].argmax())
        texts.append(text)
    return torch.tensor(texts)


@pytest.mark.parametrize("with_prompt", [False, True])
@pytest.mark.parametrize(
    ("length", "num_steps", "block_size"),
    [(8, 8, 8), (8, 3, 8), (8, 1, 8), (8, 4, 4), (8, 8, 2), (12, 12, 4), (12, 8, 6), (7, 7, 1), (6, 20, 6)],
)
@torch.no_grad()
def test_low_confidence_decoding_is_llada(
    make_demasker: Callable, length: int, num_steps: int, block_size: int, with_prompt: bool
) -> None:
    demasker = Biased(make_demasker(latent_dim=None))
    prompts = torch.tensor([[3, 1, 4], [9, 9, 0], [5, 2, 10]]) if with_prompt else torch.zeros(1, 0, dtype=torch.int64)
    sampler = MaskedSampler(num_steps, block_size, "low_confidence", temperature=0.0)
    out = sampler.sample(demasker, length=length, batch_size=len(prompts), prompt_ids=prompts)
    assert torch.equal(out.token_ids, llada_decode(demasker, prompts, length, num_steps, block_size, MASK))


@each_rule
@each_temperature
@pytest.mark.parametrize(
    ("num_steps", "block_size", "ragged"), [(3, None, False), (4, 4, False), (12, 2, True), (16, None, True)]
)
def test_texts_do_not_depend_on_the_split_into_batches(
    make_demasker: Callable, rule: str, temperature: float, num_steps: int, block_size: int | None, ragged: bool
) -> None:
    demasker, seeds = make_demasker(), torch.tensor([5, 6, 7, 8])
    latents = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    prompts = RAGGED if ragged else PROMPT.expand(4, -1)
    sampler = MaskedSampler(num_steps, block_size, rule, temperature)

    def texts(rows: slice) -> Tensor:
        size = len(seeds[rows])
        return sampler.sample(
            demasker,
            length=8,
            batch_size=size,
            prompt_ids=prompts[rows],
            latents=latents[rows],
            generator=RowNoise(seeds[rows]),
        ).token_ids

    together = texts(slice(None))
    assert torch.equal(together, torch.cat([texts(slice(i, i + 1)) for i in range(4)]))
    assert torch.equal(together, torch.cat([texts(slice(0, 3)), texts(slice(3, 4))]))


def test_a_torch_generator_is_reproducible_and_splits_evenly(make_demasker: Callable) -> None:
    demasker, sampler = make_demasker(), MaskedSampler(4, remasking="random", temperature=1.0)

    def texts(*sizes: int, seed: int = 0) -> Tensor:
        source = torch.Generator().manual_seed(seed)
        parts = [sampler.sample(demasker, length=8, batch_size=n, generator=source).token_ids for n in sizes]
        return torch.cat(parts)

    assert torch.equal(texts(5), texts(1, 1, 3))
    assert not torch.equal(texts(5), texts(5, seed=1))
    assert len(texts(5).unique(dim=0)) == 5


def test_latents_reach_every_call_and_the_output(make_demasker: Callable, count_calls: Callable) -> None:
    demasker, latents = make_demasker(), torch.randn(2, 4, 3, dtype=torch.float64)
    seen = count_calls(demasker)
    out = MaskedSampler(4).sample(demasker, length=8, batch_size=2, latents=latents)
    assert all(args[1] is latents for args in seen)
    assert out.latents is latents
    assert MaskedSampler(4).sample(demasker, length=8, batch_size=2).latents is None


def test_one_prompt_serves_all_rows_and_is_not_written_to(make_demasker: Callable) -> None:
    demasker, prompt = make_demasker(), torch.tensor([3, MASK, 4])
    shared = MaskedSampler(4).sample(demasker, length=4, batch_size=2, prompt_ids=prompt).token_ids
    rows = MaskedSampler(4).sample(demasker, length=4, batch_size=2, prompt_ids=prompt.repeat(2, 1)).token_ids
    assert shared.shape == (2, 7)
    assert torch.equal(shared, rows)
    assert prompt.tolist() == [3, MASK, 4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"num_steps": -3}, "num_steps must be at least 1, got -3"),
        ({"block_size": 0}, "block_size must be at least 1, or None for one block, got 0"),
        ({"remasking": "best"}, "remasking must be one of random, ancestral, .*, p2, got 'best'"),
        ({"temperature": -0.1}, "temperature must not be negative, got -0.1"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskedSampler(**settings)


@pytest.mark.parametrize(
    ("settings", "run", "message"),
    [
        ({"block_size": 3}, {}, "block_size must divide the length, got block_size=3 and length=8"),
        ({"block_size": 16}, {}, "block_size must divide the length"),
        ({"num_steps": 3, "block_size": 4}, {}, r"num_steps must be a multiple .* num_steps=3 and 8 / 4 = 2 blocks"),
        ({}, {"length": 0}, "length must be at least 1, got 0"),
        ({}, {"prompt_ids": torch.zeros(3, 2, dtype=torch.int64)}, r"\(P,\) or \(2, P\), got \(3, 2\)"),
        ({}, {"prompt_ids": torch.zeros(2, 2, 2, dtype=torch.int64)}, r"\(P,\) or \(2, P\), got \(2, 2, 2\)"),
    ],
)
def test_runs_that_do_not_fit_are_refused(
    make_demasker: Callable, settings: dict[str, Any], run: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        MaskedSampler(**{"num_steps": 4, **settings}).sample(make_demasker(), **{"length": 8, "batch_size": 2, **run})

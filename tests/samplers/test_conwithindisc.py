from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from crocodil.diffusion.noise import RowNoise
from crocodil.samplers import ConThenDisc, ConWithinDisc, LatentSampler, MaskedSampler, SampleOutput

MASK, K, D = 11, 4, 3
SAMPLER = MaskedSampler(4, remasking="random", temperature=1.0)
FIRST, REFRESH = LatentSampler(3, "ancestral"), LatentSampler(2, guidance_scale=2.0)
RAGGED = torch.tensor([[3, MASK, MASK, 1], [MASK, MASK, MASK, MASK], [5, 6, 7, 8], [2, MASK, 9, 9]])


class Run:
    """One run of tiny networks, with what each of them was given."""

    def __init__(
        self,
        make_demasker: Callable,
        make_prior: Callable,
        make_encoder: Callable,
        count_calls: Callable,
    ) -> None:
        self.networks = make_demasker(), make_prior(), make_encoder().float()
        self.seen = [count_calls(network) for network in self.networks]

    def __call__(self, algorithm: ConWithinDisc, seeds: Sequence[int] = range(4), **settings: Any) -> SampleOutput:
        for calls in self.seen:
            calls.clear()
        noise = RowNoise(torch.tensor(seeds))
        settings = {"length": 8, "batch_size": len(seeds), "generator": noise, **settings}
        return algorithm.sample(*self.networks, **settings)


@pytest.fixture
def run(make_demasker: Callable, make_prior: Callable, make_encoder: Callable, count_calls: Callable) -> Run:
    return Run(make_demasker, make_prior, make_encoder, count_calls)


def test_without_refresh_it_is_conthendisc(run: Run) -> None:
    within = run(ConWithinDisc(SAMPLER, FIRST, REFRESH, refresh_steps=[]))
    demasker, prior, _ = run.networks
    then = ConThenDisc(SAMPLER, FIRST).sample(
        demasker, prior, length=8, batch_size=4, generator=RowNoise(torch.arange(4))
    )
    assert torch.equal(within.token_ids, then.token_ids)
    assert torch.equal(within.latents, then.latents)
    assert within.calls == then.calls | {"encoder": 0}


@pytest.mark.parametrize("refresh_step", [0, 1, 2, 3])
@pytest.mark.parametrize("num_registers", [None, 2])
@torch.no_grad()
def test_a_refresh_draws_from_the_text_so_far(run: Run, refresh_step: int, num_registers: int | None) -> None:
    out = run(ConWithinDisc(SAMPLER, FIRST, REFRESH, [refresh_step], num_registers))
    canvases, latents = zip(*run.seen[0], strict=True)
    ((given,),) = run.seen[2]
    assert given is canvases[refresh_step]
    _, prior, encoder = run.networks
    noise = RowNoise(torch.arange(4))
    drawn = FIRST.sample(prior, batch_size=4, generator=noise)[:, :num_registers]
    redrawn = REFRESH.sample(prior, batch_size=4, condition=encoder(given), generator=noise, draw=refresh_step)[
        :, :num_registers
    ]
    for step, z in enumerate(latents):
        torch.testing.assert_close(z, redrawn if step >= refresh_step else drawn)
    assert out.latents is latents[-1]


def test_until_the_refresh_it_is_conthendisc_and_then_differs(run: Run) -> None:
    run(ConWithinDisc(SAMPLER, FIRST, refresh_steps=[]))
    plain = [canvas for canvas, _ in run.seen[0]]
    run(ConWithinDisc(SAMPLER, FIRST, refresh_steps=[2]))
    refreshed = [canvas for canvas, _ in run.seen[0]]
    for before, after in zip(plain[:3], refreshed[:3], strict=True):
        assert torch.equal(before, after)
    assert not torch.equal(plain[3], refreshed[3])


def test_the_default_is_one_refresh_half_way_by_the_same_sampler(run: Run) -> None:
    default, stated = ConWithinDisc(SAMPLER, FIRST), ConWithinDisc(SAMPLER, FIRST, FIRST, [2])
    assert torch.equal(run(default).token_ids, run(stated).token_ids)
    assert len(run.seen[2]) == 1


def test_each_refresh_has_noise_of_its_own(run: Run) -> None:
    run(ConWithinDisc(SAMPLER, LatentSampler(1), refresh_steps=[1, 2]))
    starts = [noisy for noisy, _ in run.seen[1]]  # one step a draw: what the prior sees is the initial noise
    assert len(starts) == 3
    for i in range(3):
        for j in range(i):
            assert not torch.equal(starts[i], starts[j])


@pytest.mark.parametrize("refresh_steps", [None, [], [0], [0, 3], [1, 2, 3]])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_reported_calls_are_the_calls_made(run: Run, refresh_steps: list[int] | None, scale: float) -> None:
    algorithm = ConWithinDisc(
        SAMPLER, LatentSampler(5, guidance_scale=scale), LatentSampler(2, guidance_scale=scale), refresh_steps
    )
    out = run(algorithm)
    demasker, prior, encoder = (len(calls) for calls in run.seen)
    assert out.calls == {"demasker": demasker, "prior": prior, "encoder": encoder}
    assert out.num_calls == demasker == 4
    refreshes = 1 if refresh_steps is None else len(refresh_steps)
    assert encoder == refreshes
    assert prior == (0 if refresh_steps and refresh_steps[0] == 0 else 5) + refreshes * (2 if scale == 1.0 else 4)


def test_a_refresh_at_a_step_left_out_comes_before_the_next_one(run: Run) -> None:
    # Blocks of 2 tokens with 4 steps each: steps 2 and 3 of every block have nothing to commit.
    sampler = MaskedSampler(16, block_size=2)
    out = run(ConWithinDisc(sampler, FIRST, REFRESH, [2, 3, 9]))
    canvases = [canvas for canvas, _ in run.seen[0]]
    assert out.num_calls == 8
    for (given,), canvas in zip(run.seen[2], (canvases[2], canvases[5]), strict=True):
        assert given is canvas


@pytest.mark.parametrize("rule", ["random", "margin"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("num_steps", "block_size", "refresh"), [(4, None, None), (16, 2, [2, 5]), (8, 4, [0, 3, 7])])
@pytest.mark.parametrize("ragged", [False, True])
def test_texts_do_not_depend_on_the_split_into_batches(
    run: Run,
    rule: str,
    temperature: float,
    num_steps: int,
    block_size: int | None,
    refresh: list[int] | None,
    ragged: bool,
) -> None:
    algorithm = ConWithinDisc(MaskedSampler(num_steps, block_size, rule, temperature), FIRST, REFRESH, refresh)
    prompts = RAGGED if ragged else None

    def texts(rows: slice) -> Tensor:
        seeds = range(4)[rows]
        return run(algorithm, seeds, prompt_ids=None if prompts is None else prompts[rows]).token_ids

    together = texts(slice(None))
    assert (together != MASK).all()
    assert torch.equal(together, torch.cat([texts(slice(i, i + 1)) for i in range(4)]))


def test_a_torch_generator_is_reproducible_and_splits_evenly(run: Run) -> None:
    def texts(*sizes: int) -> Tensor:
        source = torch.Generator().manual_seed(0)
        parts = [run(ConWithinDisc(SAMPLER, FIRST), batch_size=n, generator=source).token_ids for n in sizes]
        return torch.cat(parts)

    assert torch.equal(texts(4), texts(1, 1, 2))


def test_prompt_tokens_stay_and_condition_step_0(run: Run) -> None:
    algorithm = ConWithinDisc(SAMPLER, FIRST, refresh_steps=[0])
    first = run(algorithm, prompt_ids=torch.tensor([3, 1, 4]))
    assert (first.token_ids[:, :3] == torch.tensor([3, 1, 4])).all()
    second = run(algorithm, prompt_ids=torch.tensor([9, 9, 9]))
    assert (first.latents - second.latents).abs().max() > 1e-4


@pytest.mark.parametrize("refresh_steps", [[4], [-1], [0, 7]])
def test_refresh_steps_out_of_range_are_refused(refresh_steps: list[int]) -> None:
    with pytest.raises(ValueError, match=r"refresh_steps must be between 0 and 3, got \[(4|-1|7)\]"):
        ConWithinDisc(SAMPLER, FIRST, refresh_steps=refresh_steps)


@pytest.mark.parametrize("num_registers", [0, K + 1])
def test_registers_that_were_not_trained_are_refused(run: Run, num_registers: int) -> None:
    with pytest.raises(ValueError, match=f"between 1 and the trained 4, got {num_registers}"):
        run(ConWithinDisc(SAMPLER, FIRST, num_registers=num_registers))


def test_progress_tells_of_every_call(run: Run) -> None:
    events: list[tuple[str, int, int]] = []
    run(ConWithinDisc(SAMPLER, LatentSampler(2)), progress=lambda *event: events.append(event))
    prior = [("prior", 1, 2), ("prior", 2, 2)]
    demasker = [("demasker", i, 4) for i in (1, 2, 3, 4)]
    assert events == [*prior, *demasker[:2], *prior, *demasker[2:]]

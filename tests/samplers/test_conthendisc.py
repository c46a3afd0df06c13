from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from crocodil.diffusion.noise import RowNoise
from crocodil.samplers import ConThenDisc, LatentSampler, MaskedSampler
from crocodil.samplers.conthendisc import first_registers

MASK, K, D = 11, 4, 3
PROMPT = torch.tensor([3, 1, 4])
SAMPLER = MaskedSampler(4, remasking="random", temperature=1.0)


@pytest.mark.parametrize("num_registers", [None, 1, 2, K])
def test_it_is_one_latent_draw_then_masked_sampling_under_its_first_registers(
    make_demasker: Callable, make_prior: Callable, num_registers: int | None
) -> None:
    demasker, prior, noise = make_demasker(), make_prior(), RowNoise(torch.arange(5))
    latent_sampler = LatentSampler(3)
    out = ConThenDisc(SAMPLER, latent_sampler, num_registers).sample(
        demasker, prior, length=8, batch_size=5, prompt_ids=PROMPT, generator=noise
    )
    latents = latent_sampler.sample(prior, batch_size=5, generator=noise)[:, :num_registers]
    expected = SAMPLER.sample(demasker, length=8, batch_size=5, prompt_ids=PROMPT, latents=latents, generator=noise)
    assert torch.equal(out.latents, latents)
    assert torch.equal(out.token_ids, expected.token_ids)
    assert (out.token_ids[:, :3] == PROMPT).all()
    plain = SAMPLER.sample(demasker, length=8, batch_size=5, prompt_ids=PROMPT, generator=noise)
    assert not torch.equal(out.token_ids, plain.token_ids)  # the latents matter


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [4, 64])
def test_reported_calls_are_the_calls_made(
    make_demasker: Callable, make_prior: Callable, count_calls: Callable, scale: float, num_steps: int
) -> None:
    demasker, prior = make_demasker(), make_prior()
    demasker_calls, prior_calls = count_calls(demasker), count_calls(prior)
    algorithm = ConThenDisc(MaskedSampler(num_steps), LatentSampler(7, guidance_scale=scale))
    out = algorithm.sample(demasker, prior, length=8, batch_size=2)
    assert out.calls == {"demasker": len(demasker_calls), "prior": len(prior_calls)}
    assert out.num_calls == len(demasker_calls) == min(num_steps, 8)
    assert len(prior_calls) == 7  # an unconditional draw is never guided
    assert all(args[1] is out.latents for args in demasker_calls)


@pytest.mark.parametrize("rule", ["random", "low_confidence"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("block_size", [None, 4])
def test_texts_do_not_depend_on_the_split_into_batches(
    make_demasker: Callable, make_prior: Callable, rule: str, temperature: float, block_size: int | None
) -> None:
    demasker, prior = make_demasker(), make_prior()
    algorithm = ConThenDisc(MaskedSampler(4, block_size, rule, temperature), LatentSampler(3, "ancestral"))

    def texts(*sizes: int) -> Tensor:
        source = torch.Generator().manual_seed(0)
        parts = [algorithm.sample(demasker, prior, length=8, batch_size=n, generator=source) for n in sizes]
        return torch.cat([out.token_ids for out in parts])

    together = texts(4)
    assert torch.equal(together, texts(1, 1, 1, 1))
    assert torch.equal(together, texts(3, 1))
    seeds = torch.arange(4)
    rows = [seeds, *seeds.split(1)]
    whole, *alone = (
        algorithm.sample(demasker, prior, length=8, batch_size=len(row), generator=RowNoise(row)).token_ids
        for row in rows
    )
    assert torch.equal(whole, torch.cat(alone))


def test_first_registers_are_a_prefix() -> None:
    latents = torch.randn(2, K, D)
    assert first_registers(latents, None) is latents
    for k in range(1, K + 1):
        assert torch.equal(first_registers(latents, k), latents[:, :k])


@pytest.mark.parametrize("num_registers", [0, -1, K + 1])
def test_registers_that_were_not_trained_are_refused(
    make_demasker: Callable, make_prior: Callable, num_registers: int
) -> None:
    algorithm = ConThenDisc(SAMPLER, LatentSampler(2), num_registers)
    with pytest.raises(ValueError, match=f"between 1 and the trained 4, got {num_registers}"):
        algorithm.sample(make_demasker(), make_prior(), length=8, batch_size=2)


def test_progress_tells_of_both_networks(make_demasker: Callable, make_prior: Callable) -> None:
    events: list[tuple[str, int, int]] = []
    ConThenDisc(SAMPLER, LatentSampler(2)).sample(
        make_demasker(), make_prior(), length=8, batch_size=1, progress=lambda *event: events.append(event)
    )
    assert events == [("prior", i, 2) for i in (1, 2)] + [("demasker", i, 4) for i in (1, 2, 3, 4)]

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from crocodil.diffusion.noise import RowNoise
from crocodil.models import Demasker
from crocodil.samplers import ConThenDisc, ConWithinDisc, LatentSampler, MaskedSampler, SampleOutput, StepEvent

MASK, EOS = 11, 0
PROMPT = torch.tensor([3, 1, 4])
RAGGED = [torch.tensor([3]), torch.tensor([1, 4, 1, 6]), torch.tensor([9, 2])]
GAPS = [torch.tensor([3, MASK, 4]), torch.tensor([MASK, MASK, 7, EOS, MASK]), torch.tensor([5])]
LATENTS = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
RULES = ("random", "ancestral", "low_confidence", "entropy_bound:1.0", "remdm_rescale:0.5", "p2:1.5")
SAMPLER = MaskedSampler(4, 2, temperature=1.0)
PRIOR_SAMPLER, REFRESH = LatentSampler(3, "ancestral"), LatentSampler(2, guidance_scale=2.0)


def of_family(demasker: Demasker, family: str) -> Demasker:
    twin = Demasker(**demasker.to_config() | {"family": family}).double().eval()
    twin.load_state_dict(demasker.state_dict())
    return twin


def canvas(prompts: Sequence[Tensor], length: int) -> tuple[Tensor, Tensor]:
    """The prompts with masks behind them, padded with the end token, and which tokens are real."""
    width = max(map(len, prompts)) + length
    rows = [[*prompt.tolist(), *[MASK] * length] for prompt in prompts]
    padded = [row + [EOS] * (width - len(row)) for row in rows]
    return torch.tensor(padded), torch.tensor([[i < len(row) for i in range(width)] for row in rows])


# The canvas


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("block_size", [None, 2])
@pytest.mark.parametrize("prompts", [RAGGED, GAPS, [PROMPT] * 3], ids=["ragged", "gaps", "equal"])
def test_given_tokens_stay_masks_are_filled_and_ends_are_padded(
    make_demasker: Callable, rule: str, block_size: int | None, prompts: list[Tensor]
) -> None:
    demasker, seen = make_demasker(num_hidden_layers=1), []
    demasker.register_forward_pre_hook(lambda _, args, given: seen.append((args[0], given)), with_kwargs=True)
    out = MaskedSampler(4, block_size, rule, temperature=1.0).sample(
        demasker, length=4, batch_size=3, prompt_ids=prompts, generator=RowNoise(torch.arange(3))
    )
    start, real = canvas(prompts, 4)
    assert torch.equal(seen[0][0], start)
    for _, given in seen:
        if real.all():
            assert "attention_mask" not in given
        else:
            assert torch.equal(given["attention_mask"], real)
    is_given = start != MASK
    for token_ids in (*(token_ids for token_ids, _ in seen), out.token_ids):
        assert torch.equal(token_ids[is_given], start[is_given])
    assert (out.token_ids != MASK).all()
    assert (out.token_ids[~real] == EOS).all()
    assert out.lengths.tolist() == [len(prompt) + 4 for prompt in prompts]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("early_stop", [False, True])
def test_rows_with_gaps_are_those_of_each_prompt_alone(
    make_demasker: Callable, temperature: float, family: str, early_stop: bool
) -> None:
    demasker = of_family(make_demasker(), family)

    def texts(*rows: int) -> list[list[int]]:
        out = MaskedSampler(6, 2, "low_confidence", temperature, early_stop=early_stop).sample(
            demasker,
            length=4,
            batch_size=len(rows),
            prompt_ids=[GAPS[row] for row in rows],
            latents=LATENTS[list(rows)],
            generator=RowNoise(torch.tensor(rows)),
        )
        return [text[:end].tolist() for text, end in zip(out.token_ids, out.lengths, strict=True)]

    assert texts(2, 0, 1) == [texts(row)[0] for row in (2, 0, 1)]


def test_the_forms_of_prompts(make_demasker: Callable) -> None:
    demasker, seen = make_demasker(latent_dim=None), []
    demasker.register_forward_pre_hook(lambda _, __, given: seen.append(given), with_kwargs=True)

    def texts(prompt_ids: Any) -> list[list[int]]:
        return MaskedSampler(2).sample(demasker, length=4, batch_size=2, prompt_ids=prompt_ids).token_ids.tolist()

    expected = texts(PROMPT)
    assert texts(PROMPT.repeat(2, 1)) == texts([PROMPT, PROMPT]) == texts((PROMPT, PROMPT)) == expected
    nothing = torch.zeros(0, dtype=torch.int64)
    assert texts(None) == texts([nothing, nothing]) == texts(nothing)
    assert all("attention_mask" not in given for given in seen)  # as nothing is padded


@pytest.mark.parametrize(
    ("prompt_ids", "message"),
    [
        ([PROMPT], r"2 prompts of shape \(P,\), got \[\(3,\)\]"),
        ([PROMPT] * 3, r"2 prompts of shape \(P,\), got \[\(3,\), \(3,\), \(3,\)\]"),
        ([PROMPT, PROMPT[None]], r"2 prompts of shape \(P,\), got \[\(3,\), \(1, 3\)\]"),
        (PROMPT.repeat(3, 1), r"\(P,\) or \(2, P\), got \(3, 3\)"),
        (torch.tensor(3), r"\(P,\) or \(2, P\), got \(\)"),
    ],
)
def test_prompts_that_do_not_fit_the_batch_are_refused(make_demasker: Callable, prompt_ids: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"prompt_ids must be {message}$"):
        MaskedSampler(2).sample(make_demasker(), length=4, batch_size=2, prompt_ids=prompt_ids)


# Sketches that know the prompt


class Networks:
    """Tiny networks, what the encoder was given, and what the watcher was told."""

    def __init__(self, demasker: Demasker, prior: Any, encoder: Any) -> None:
        self.demasker, self.prior, self.encoder = demasker, prior, encoder
        self.read: list[tuple[Tensor, ...]] = []
        self.events: list[StepEvent] = []
        encoder.register_forward_hook(lambda _, args, __: self.read.append(args))

    def run(
        self, algorithm: ConThenDisc | ConWithinDisc, rows: Sequence[int] = range(3), knows: bool = True, **given: Any
    ) -> SampleOutput:
        self.read.clear()
        self.events.clear()
        noise = RowNoise(torch.tensor(rows))
        given = {"length": 4, "batch_size": len(rows), "generator": noise, "on_step": self.events.append, **given}
        return algorithm.sample(self.demasker, self.prior, self.encoder if knows else None, **given)

    @property
    def refreshed(self) -> list[int]:
        return [event.index for event in self.events if event.refreshed]


@pytest.fixture
def networks(make_demasker: Callable, make_prior: Callable, make_encoder: Callable) -> Networks:
    return Networks(make_demasker(), make_prior(), make_encoder().float())


def drawn(networks: Networks, sampler: LatentSampler, condition: Tensor | None, draw: int = 0) -> Tensor:
    return sampler.sample(
        networks.prior, batch_size=3, condition=condition, generator=RowNoise(torch.arange(3)), draw=draw
    )


@pytest.mark.parametrize("prompts", [RAGGED, GAPS, PROMPT], ids=["ragged", "gaps", "one"])
@pytest.mark.parametrize("num_registers", [None, 2])
@torch.no_grad()
def test_conthendisc_draws_under_the_prompt(networks: Networks, prompts: Any, num_registers: int | None) -> None:
    out = networks.run(ConThenDisc(SAMPLER, REFRESH, num_registers), prompt_ids=prompts)
    start, real = canvas([PROMPT] * 3 if prompts is PROMPT else prompts, 4)
    ((given, *mask),) = networks.read
    assert torch.equal(given, start)
    assert not mask if real.all() else torch.equal(mask[0], real)
    latents = drawn(networks, REFRESH, networks.encoder(start, real))[:, :num_registers]
    torch.testing.assert_close(out.latents, latents, rtol=0, atol=1e-6)
    expected = SAMPLER.sample(
        networks.demasker,
        length=4,
        batch_size=3,
        prompt_ids=prompts,
        latents=out.latents,
        generator=RowNoise(torch.arange(3)),
    )
    assert torch.equal(out.token_ids, expected.token_ids)
    assert torch.equal(out.lengths, real.sum(1))
    assert out.calls == expected.calls | {"prior": 4, "encoder": 1}  # two guided steps


@pytest.mark.parametrize(("knows", "prompt"), [(False, PROMPT), (True, None), (False, None)])
def test_conthendisc_draws_freely_without_prompt_or_encoder(
    networks: Networks, knows: bool, prompt: Tensor | None
) -> None:
    out = networks.run(ConThenDisc(SAMPLER, REFRESH), knows=knows, prompt_ids=prompt)
    assert torch.equal(out.latents, drawn(networks, REFRESH, None))
    assert not networks.read
    assert out.calls["prior"] == 2 and "encoder" not in out.calls


@pytest.mark.parametrize("algorithm", [ConThenDisc, ConWithinDisc])
@pytest.mark.parametrize("prompts", [RAGGED, GAPS], ids=["ragged", "gaps"])
@pytest.mark.parametrize("rule", ["low_confidence", "ancestral", "threshold:0.5"])
def test_rows_under_sketches_are_those_of_each_prompt_alone(
    networks: Networks, algorithm: Any, prompts: list[Tensor], rule: str
) -> None:
    sampling = algorithm(MaskedSampler(4, 2, rule, temperature=1.0), PRIOR_SAMPLER)

    def run(*rows: int) -> tuple[Tensor, list[list[int]]]:
        out = networks.run(sampling, rows, prompt_ids=[prompts[row] for row in rows])
        return out.latents, [text[:end].tolist() for text, end in zip(out.token_ids, out.lengths, strict=True)]

    latents, texts = run(2, 0, 1)
    for row, z, text in zip((2, 0, 1), latents, texts, strict=True):
        own, alone = run(row)
        assert alone == [text]
        torch.testing.assert_close(own[0], z, rtol=0, atol=1e-4)


@pytest.mark.parametrize("with_prompt", [False, True])
@pytest.mark.parametrize("rule", ["low_confidence", "p2"])
@pytest.mark.parametrize(("num_steps", "block_size"), [(4, None), (5, None), (64, None), (8, 2), (12, 1)])
def test_the_sketch_is_drawn_again_half_way_through_the_calls(
    networks: Networks, with_prompt: bool, rule: str, num_steps: int, block_size: int | None
) -> None:
    networks.run(
        ConWithinDisc(MaskedSampler(num_steps, block_size, rule), LatentSampler(1)),
        prompt_ids=PROMPT if with_prompt else None,
    )
    half_way = len(networks.events) // 2
    first, again = networks.events[0].index, networks.events[half_way].index
    assert networks.refreshed == [first, again]
    assert torch.equal(networks.read[-1][0], networks.events[half_way - 1].token_ids)
    assert len(networks.read) == 1 + with_prompt


@torch.no_grad()
def test_conwithindisc_draws_under_the_prompt_from_the_start(networks: Networks) -> None:
    out = networks.run(ConWithinDisc(SAMPLER, PRIOR_SAMPLER, REFRESH), prompt_ids=RAGGED)
    start, real = canvas(RAGGED, 4)
    halfway = networks.events[1].token_ids
    assert [[part.tolist() for part in read] for read in networks.read] == [
        [start.tolist(), real.tolist()],
        [halfway.tolist(), real.tolist()],
    ]
    latents = drawn(networks, REFRESH, networks.encoder(halfway, real), draw=2)
    torch.testing.assert_close(out.latents, latents, rtol=0, atol=1e-6)
    assert out.calls == {"demasker": 4, "prior": 8, "encoder": 2}


def test_stated_refreshes_are_all_there_are(networks: Networks) -> None:
    networks.run(ConWithinDisc(SAMPLER, PRIOR_SAMPLER, refresh_steps=[3]), prompt_ids=PROMPT)
    assert networks.refreshed == [0, 3]  # the first draw, which hears nothing of the prompt
    assert len(networks.read) == 1
    networks.run(ConWithinDisc(SAMPLER, PRIOR_SAMPLER, refresh_steps=[]), prompt_ids=PROMPT)
    assert networks.refreshed == [0] and not networks.read

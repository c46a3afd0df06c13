from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from crocodil.diffusion.noise import RowNoise
from crocodil.models import Demasker
from crocodil.samplers import ConThenDisc, ConWithinDisc, LatentSampler, MaskedSampler
from crocodil.samplers.guidance import GuidedDemasker

MASK, EOS = 11, 0
PROMPT = torch.tensor([3, 1, 4])
LATENTS = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TOKEN_IDS = torch.tensor([[3, 1, MASK, 4, MASK], [5, 2, MASK, MASK, MASK], [9, 9, 8, MASK, 6]])
IS_GIVEN = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]).bool()

each_guide = pytest.mark.parametrize("guided_by", ["latents", "prompt"])


def calls_of(demasker: Demasker) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """All arguments of each later call."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    demasker.register_forward_pre_hook(lambda _, args, given: seen.append((args, given)), with_kwargs=True)
    return seen


class Plain:
    """Guidance by two separate calls, as the equation says."""

    def __init__(self, demasker: Demasker, scale: float, guided_by: str, num_given: int) -> None:
        self.demasker, self.scale, self.guided_by, self.num_given = demasker, scale, guided_by, num_given
        self.mask_token_id, self.eos_token_id = demasker.mask_token_id, demasker.eos_token_id

    def __call__(self, token_ids: Tensor, latents: Tensor | None = None, **given: Any) -> Tensor:
        without_it, registers = token_ids.clone(), latents
        if self.guided_by == "prompt":
            without_it[:, : self.num_given] = MASK
        else:
            registers = None
        without = self.demasker(without_it, registers, **given)
        return without + self.scale * (self.demasker(token_ids, latents, **given) - without)


@each_guide
@pytest.mark.parametrize("scale", [0.4, 1.0, 3.0])
@pytest.mark.parametrize("settings", [{}, {"register_gates": True}, {"registers_read_text": False}])
@torch.no_grad()
def test_guided_logits_are_those_of_two_separate_calls(
    make_demasker: Callable, guided_by: Any, scale: float, settings: dict[str, bool]
) -> None:
    plain = make_demasker()
    demasker = Demasker(**plain.to_config() | settings).double().eval()
    demasker.load_state_dict(plain.state_dict(), strict=False)
    for gate in (weight for name, weight in demasker.named_parameters() if name.endswith("register_gate")):
        gate += 0.7
    positions = torch.tensor([[2, 4], [4, 3], [3, 0]])
    attention_mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    given = {"positions": positions, "attention_mask": attention_mask}
    guided = GuidedDemasker(demasker, scale, guided_by, IS_GIVEN)(TOKEN_IDS, LATENTS, **given)
    hidden = TOKEN_IDS.masked_fill(IS_GIVEN, MASK)
    with_it = demasker(TOKEN_IDS, LATENTS, **given)
    without = demasker(TOKEN_IDS, **given) if guided_by == "latents" else demasker(hidden, LATENTS, **given)
    torch.testing.assert_close(guided, without + scale * (with_it - without), rtol=0, atol=1e-10)
    assert (with_it - without).abs().max() > 1e-2


@torch.no_grad()
def test_half_precision_is_guided_in_float32(make_demasker: Callable) -> None:
    demasker = make_demasker(latent_dim=None).bfloat16()
    guided = GuidedDemasker(demasker, 2.5, "prompt", IS_GIVEN)(TOKEN_IDS)
    with_it, without = demasker(TOKEN_IDS).float(), demasker(TOKEN_IDS.masked_fill(IS_GIVEN, MASK)).float()
    assert guided.dtype == torch.float32
    torch.testing.assert_close(guided, without + 2.5 * (with_it - without), rtol=0.05, atol=0.2)
    assert (guided != guided.bfloat16()).any()


@each_guide
@pytest.mark.parametrize(
    ("rule", "scale"), [("random", 0.5), ("low_confidence", 2.5), ("threshold:0.5", 0.5), ("p2", 2.5)]
)
def test_texts_are_those_of_a_demasker_that_guides_itself(
    make_demasker: Callable, guided_by: Any, rule: str, scale: float
) -> None:
    demasker = make_demasker()
    run: dict[str, Any] = {"length": 6, "batch_size": 3, "prompt_ids": PROMPT, "latents": LATENTS}

    def texts(demasker: Any, **settings: Any) -> Tensor:
        sampler = MaskedSampler(6, 3, rule, 1.0, **settings)
        return sampler.sample(demasker, generator=RowNoise(torch.arange(3)), **run).token_ids

    guided = texts(demasker, guidance_scale=scale, guided_by=guided_by)
    assert torch.equal(guided, texts(Plain(demasker, scale, guided_by, len(PROMPT))))
    assert not torch.equal(guided, texts(demasker))


def llada_decode(
    demasker: Demasker, prompt: Tensor, length: int, num_steps: int, block_size: int, cfg_scale: float
) -> Tensor:
    """LLaDA's published decoding with its `cfg_scale` at temperature 0, as plainly as can be said."""
    x = torch.cat([prompt, torch.full((len(prompt), length), MASK)], dim=1)
    is_prompt = x != MASK
    per_block = num_steps // (length // block_size)
    for start in range(prompt.shape[1], x.shape[1], block_size):
        for step in range(per_block):
            un_x = torch.where(is_prompt, MASK, x)
            logits, un_logits = demasker(torch.cat([x, un_x])).chunk(2)
            logits = un_logits + (cfg_scale + 1) * (logits - un_logits)
            logits[..., MASK] = -torch.inf
            best, token = logits.softmax(-1).max(-1)
            for row in range(len(x)):
                masked = [i for i in range(start, start + block_size) if x[row, i] == MASK]
                quota = block_size // per_block + (1 if step < block_size % per_block else 0)
                for i in sorted(masked, key=lambda i, row=row: -best[row, i].item())[:quota]:
                    x[row, i] = token[row, i]
    return x


@pytest.mark.parametrize("cfg_scale", [-0.5, 2.0])
@pytest.mark.parametrize(
    ("length", "num_steps", "block_size"), [(8, 8, 8), (8, 3, 8), (8, 4, 4), (8, 8, 2), (12, 8, 6), (5, 5, 1)]
)
@torch.no_grad()
def test_guidance_by_the_prompt_is_that_of_llada(
    make_demasker: Callable, length: int, num_steps: int, block_size: int, cfg_scale: float
) -> None:
    demasker, prompts = make_demasker(latent_dim=None), torch.tensor([[3, 1, 4], [9, 9, 0], [5, 2, 10]])
    sampler = MaskedSampler(num_steps, block_size, guidance_scale=cfg_scale + 1, guided_by="prompt")
    out = sampler.sample(demasker, length=length, batch_size=3, prompt_ids=prompts)
    assert torch.equal(out.token_ids, llada_decode(demasker, prompts, length, num_steps, block_size, cfg_scale))


@each_guide
def test_a_scale_of_one_makes_the_very_calls_of_no_guidance(make_demasker: Callable, guided_by: Any) -> None:
    demasker = make_demasker()
    seen = calls_of(demasker)
    run: dict[str, Any] = {"length": 4, "batch_size": 3, "prompt_ids": [PROMPT, PROMPT[:1], PROMPT], "latents": LATENTS}
    off = MaskedSampler(4, guidance_scale=1.0, guided_by=guided_by).sample(demasker, **run)
    calls = [*seen]
    seen.clear()
    plain = MaskedSampler(4).sample(demasker, **run)
    assert torch.equal(off.token_ids, plain.token_ids)
    assert off.num_calls == len(calls) == len(seen) == 4
    for (args, given), (plain_args, plain_given) in zip(calls, seen, strict=True):
        assert torch.equal(args[0], plain_args[0])
        assert args[1] is plain_args[1] is LATENTS
        assert given.keys() == plain_given.keys() == {"positions", "attention_mask"}
        assert all(torch.equal(given[name], plain_given[name]) for name in given)


@each_guide
@pytest.mark.parametrize("cache", ["none", "dual"])
def test_a_guided_step_counts_two_calls(make_demasker: Callable, guided_by: Any, cache: Any) -> None:
    demasker = make_demasker()
    seen = calls_of(demasker)
    sampler = MaskedSampler(6, 3, guidance_scale=2.0, guided_by=guided_by, cache=cache)
    out = sampler.sample(demasker, length=6, batch_size=3, prompt_ids=PROMPT, latents=LATENTS)
    assert all(len(args[0]) == 6 for args, _ in seen)
    assert out.num_calls == 2 * len(seen) == 12
    assert out.calls == ({"demasker": 12} if cache == "none" else {"demasker": 4, "demasker[3]": 8})


def test_sketches_guide_from_the_first_step_and_when_drawn_again(
    make_demasker: Callable, make_prior: Callable, make_encoder: Callable
) -> None:
    demasker, prior, encoder = make_demasker(), make_prior(), make_encoder().float()
    plain = Plain(demasker, 2.0, "latents", 0)
    latent_sampler, run = LatentSampler(2), {"length": 6, "batch_size": 3}
    guided, itself = (MaskedSampler(6, temperature=1.0, guidance_scale=scale) for scale in (2.0, 1.0))
    for make in (ConThenDisc, ConWithinDisc):
        texts, expected = (
            make(sampler, latent_sampler)
            .sample(network, prior, encoder, generator=RowNoise(torch.arange(3)), **run)
            .token_ids
            for sampler, network in ((guided, demasker), (itself, plain))
        )
        assert torch.equal(texts, expected)


def test_guidance_by_latents_needs_them(make_demasker: Callable) -> None:
    with pytest.raises(ValueError, match="guided_by='latents' needs latents; without them give guided_by='prompt'"):
        MaskedSampler(4, guidance_scale=2.0).sample(make_demasker(), length=4, batch_size=2)

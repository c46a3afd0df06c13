"""Every rule under every setting: rows are independent, runs end in time, and watchers hear the truth."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from crocodil.diffusion.noise import RowNoise
from crocodil.models import Demasker
from crocodil.samplers import MaskedSampler, SampleOutput, StepEvent
from crocodil.samplers.unmasking import RULES, RandomOrder, ReMDM, make_rule

MASK, EOS, TURN_END = 11, 0, 5
NAMES = (
    "random",
    "ancestral",
    "low_confidence",
    "margin",
    "entropy",
    "threshold:0.5",
    "factor:1.6",
    "entropy_bound:1.2",
    "remdm_cap:0.3",
    "remdm_rescale:0.5",
    "p2:1.5",
)
ADAPTIVE = tuple(name for name in NAMES if make_rule(name).is_adaptive)
LASTING = tuple(name for name in NAMES if make_rule(name).scope != "block")  # what is written stays
LATE = tuple(name for name in NAMES if not isinstance(make_rule(name), RandomOrder | ReMDM))
PROMPTS = [torch.tensor([3]), torch.tensor([1, 4, 1, 6]), torch.tensor([9, 2])]
PROMPT = torch.tensor([3, 1, 4])
LATENTS = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
SEEDS = torch.tensor([5, 6, 7])

each_rule = pytest.mark.parametrize("rule", NAMES)
each_temperature = pytest.mark.parametrize("temperature", [0.0, 1.0])


def test_every_rule_is_here() -> None:
    assert {name.partition(":")[0] for name in NAMES} == set(RULES)


def of_family(demasker: Demasker, family: str) -> Demasker:
    """The same weights under the conventions of a family; a token of it that ends a turn is `TURN_END`."""
    twin = Demasker(**demasker.to_config() | {"family": family}).double().eval()
    twin.load_state_dict(demasker.state_dict())
    twin.conventions = replace(twin.conventions, stop_token_ids=(TURN_END,))
    return twin


def lean(demasker: Demasker, by: float, *tokens: int) -> Demasker:
    """Makes tokens more probable."""
    bias = torch.zeros(demasker.vocab_size, dtype=torch.float64)
    bias[list(tokens)] = by
    demasker.register_forward_hook(lambda _, __, logits: logits + bias)
    return demasker


@pytest.fixture
def talkative(make_demasker: Callable) -> Demasker:
    """A demasker that often ends a text, or a turn."""
    return lean(of_family(make_demasker(), "llada"), 2.5, EOS, TURN_END)


def canvases_of(demasker: Demasker) -> list[Tensor]:
    """What the demasker is given in each later call."""
    seen: list[Tensor] = []
    demasker.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    return seen


# Rows are independent


def assert_rows_are_independent(
    demasker: Demasker, sampler: MaskedSampler, rows: tuple[int, ...] = (2, 0, 1), length: int = 4
) -> None:
    def texts(*rows: int) -> list[list[int]]:
        out = sampler.sample(
            demasker,
            length=length,
            batch_size=len(rows),
            prompt_ids=[PROMPTS[row] for row in rows],
            latents=LATENTS[list(rows)],
            generator=RowNoise(SEEDS[list(rows)]),
        )
        assert out.lengths.tolist() == [len(PROMPTS[row]) + length for row in rows]
        real = torch.arange(out.token_ids.shape[1]) < out.lengths[:, None]
        assert (out.token_ids[~real] == EOS).all()
        assert (out.token_ids != MASK).all()
        for row, text in zip(rows, out.token_ids, strict=True):
            assert torch.equal(text[: len(PROMPTS[row])], PROMPTS[row])
        return [text[:end].tolist() for text, end in zip(out.token_ids, out.lengths, strict=True)]

    assert texts(*rows) == [texts(row)[0] for row in rows]


@each_rule
@each_temperature
@pytest.mark.parametrize(("family", "block_size"), [("llada", None), ("dream", 2)])
def test_rows_of_ragged_prompts_are_those_of_each_prompt_alone(
    make_demasker: Callable, rule: str, temperature: float, family: str, block_size: int | None
) -> None:
    demasker = of_family(make_demasker(num_hidden_layers=1), family)
    assert_rows_are_independent(demasker, MaskedSampler(4, block_size, rule, temperature))


@each_rule
@pytest.mark.parametrize(
    "settings",
    [
        {"early_stop": True, "eos": "last"},
        {"early_stop": True, "cache": "dual"},
        {"eos": "never", "cache": "prefix"},
        {"guidance_scale": 1.7, "guided_by": "latents", "cache": "dual"},
        {"guidance_scale": 0.6, "guided_by": "prompt", "static_shapes": True},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_settings_do_not_tie_rows_together(make_demasker: Callable, rule: str, settings: dict[str, Any]) -> None:
    fitting = settings | {"early_stop": settings.get("early_stop", False) and rule in LASTING}
    if settings.get("eos") == "last" and rule not in LATE:
        fitting["eos"] = "free"
    demasker = lean(of_family(make_demasker(), "dream"), 1.5, EOS)
    assert_rows_are_independent(demasker, MaskedSampler(4, 2, rule, temperature=1.0, **fitting), rows=(1, 0))


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_registers_that_do_not_read_the_text_do_not_tie_rows_together(
    make_demasker: Callable, family: str, cache: Any
) -> None:
    demasker = of_family(make_demasker(), family)
    demasker.registers_read_text = False
    for guided in ({}, {"guidance_scale": 2.0}, {"guidance_scale": 2.0, "guided_by": "prompt"}):
        assert_rows_are_independent(demasker, MaskedSampler(4, 2, cache=cache, **guided))


# What watchers are told


@each_rule
@pytest.mark.parametrize(("temperature", "block_size"), [(0.0, None), (1.0, 2)])
@torch.no_grad()
def test_events_tell_what_happened(
    make_demasker: Callable, rule: str, temperature: float, block_size: int | None
) -> None:
    demasker, events, progress = make_demasker(num_hidden_layers=1), [], []
    seen = canvases_of(demasker)
    out = MaskedSampler(6, block_size, rule, temperature).sample(
        demasker,
        length=6,
        batch_size=3,
        prompt_ids=PROMPT,
        generator=RowNoise(SEEDS),
        on_step=events.append,
        progress=lambda *event: progress.append(event),
    )
    canvases = [*seen, out.token_ids]
    assert len(events) == len(seen) == out.num_calls
    assert [done for _, done, _ in progress[: len(events)]] == list(range(1, len(events) + 1))
    assert progress[-1] == ("demasker", len(events), len(events))
    assert all(before.index < after.index for before, after in pairwise(events))
    for event, (before, after) in zip(events, pairwise(canvases), strict=True):
        assert torch.equal(event.token_ids, after)
        assert torch.equal(event.committed, (before == MASK) & (after != MASK))
        assert torch.equal(event.remasked, (before != MASK) & (after == MASK))
        unchanged = ~event.committed & ~event.remasked
        assert torch.equal(after[unchanged], before[unchanged])
        assert not event.refreshed
        if block_size is not None:
            columns = (event.committed | event.remasked).any(0).nonzero().flatten() - len(PROMPT)
            assert set((columns // block_size).tolist()) <= {event.index // (6 // 3)}
        logits = demasker(before)
        logits[..., MASK] = -torch.inf
        sure = logits.softmax(-1).gather(2, after[..., None]).squeeze(2)
        torch.testing.assert_close(event.confidence, sure * event.committed, rtol=0, atol=1e-10)
    assert bool(sum(event.remasked.sum() for event in events)) <= (rule not in LASTING)


@pytest.mark.parametrize("rule", sorted(set(NAMES) - set(LASTING)))
def test_rules_that_mask_again_do_so(make_demasker: Callable, rule: str) -> None:
    events: list[StepEvent] = []
    MaskedSampler(12, None, rule, 1.0).sample(
        make_demasker(), length=12, batch_size=3, generator=RowNoise(SEEDS), on_step=events.append
    )
    assert any(event.remasked.any() for event in events)


# The end of a text


def finished(text: list[int], start: list[int]) -> bool:
    """Whether a stop token was written with no mask before it, or all is written."""
    for token, before in zip(text, start, strict=True):
        if token == MASK:
            return False
        if before == MASK and token in (EOS, TURN_END):
            return True
    return True


def cut(text: list[int], start: list[int]) -> list[int]:
    """The text with the end token in all that was masked behind the first stop token that was written."""
    written, over = [], False
    for token, before in zip(text, start, strict=True):
        written.append(EOS if over and before == MASK else token)
        over = over or (before == MASK and token in (EOS, TURN_END))
    return written


@pytest.mark.parametrize("rule", LASTING)
@pytest.mark.parametrize(
    ("temperature", "block_size", "prompt"),
    [(0.0, 4, [3, 1]), (1.0, 2, [3, EOS, MASK, TURN_END, MASK, 4]), (1.0, None, [3, EOS, MASK, 4])],
)
def test_early_stop_changes_nothing_before_the_first_stop_token(
    talkative: Demasker, rule: str, temperature: float, block_size: int | None, prompt: list[int]
) -> None:
    events: list[StepEvent] = []

    def run(early_stop: bool, **watch: Any) -> SampleOutput:
        sampler = MaskedSampler(8, block_size, rule, temperature, early_stop=early_stop)
        given = {"prompt_ids": torch.tensor(prompt), "latents": LATENTS, "generator": RowNoise(SEEDS)}
        return sampler.sample(talkative, length=8, batch_size=3, **given, **watch)

    whole, short = run(False, on_step=events.append), run(True)
    start = [*prompt, *[MASK] * 8]
    assert short.token_ids.tolist() == [cut(text, start) for text in whole.token_ids.tolist()]
    is_over = [all(finished(text, start) for text in event.token_ids.tolist()) for event in events]
    assert short.num_calls == is_over.index(True) + 1


@pytest.mark.parametrize("stop", [EOS, TURN_END])
def test_a_run_is_over_with_the_block_in_which_all_rows_end(talkative: Demasker, stop: int) -> None:
    short = MaskedSampler(16, 4, early_stop=True)
    out = short.sample(lean(talkative, 30.0, stop), length=16, batch_size=3, prompt_ids=PROMPT)
    assert out.num_calls <= 4
    assert (out.token_ids[:, 3] == stop).all() and (out.token_ids[:, 4:] == EOS).all()
    assert MaskedSampler(16, 4).sample(talkative, length=16, batch_size=3).num_calls == 16


@each_rule
@each_temperature
def test_eos_never_writes_no_stop_token(talkative: Demasker, rule: str, temperature: float) -> None:
    sampler = MaskedSampler(4, 4, rule, temperature, eos="never", static_shapes=temperature == 1)
    out = sampler.sample(
        lean(talkative, 30.0, EOS), length=4, batch_size=3, prompt_ids=PROMPT, generator=RowNoise(SEEDS)
    )
    assert not torch.isin(out.token_ids, torch.tensor([EOS, TURN_END])).any()


@pytest.mark.parametrize("rule", LATE)
@pytest.mark.parametrize("block_size", [None, 4])
@torch.no_grad()
def test_eos_last_writes_stop_tokens_when_nothing_else_is_left_in_the_block(
    talkative: Demasker, rule: str, block_size: int | None
) -> None:
    def steps_too_early(eos: Any) -> list[bool]:
        """Of each step of a row that wrote a stop token: whether it left a mask for which another token was drawn."""
        events: list[StepEvent] = []
        given = {"prompt_ids": PROMPT, "generator": RowNoise(SEEDS), "on_step": events.append}
        MaskedSampler(8, block_size, rule, eos=eos).sample(talkative, length=8, batch_size=3, **given)
        size, found = block_size or 8, []
        for event in events:
            before = event.token_ids.masked_fill(event.committed, MASK)
            logits = talkative(before)
            logits[..., MASK] = -torch.inf
            is_stop = torch.isin(logits.argmax(-1), torch.tensor([EOS, TURN_END]))
            start = 3 + event.index // (8 // (8 // size)) * size
            others = ((before == MASK) & ~event.committed & ~is_stop)[:, start : start + size].any(1)
            found += others[(event.committed & is_stop).any(1)].tolist()
        return found

    too_early = steps_too_early("last")
    assert too_early and not any(too_early)
    if rule == "low_confidence":
        assert any(steps_too_early("free"))  # else nothing was to be seen


def test_stop_tokens_beyond_the_vocabulary_do_not_count(make_demasker: Callable) -> None:
    demasker = Demasker(**make_demasker().to_config() | {"family": "llada"}).double().eval()
    assert demasker.stop_token_ids == (EOS,)
    assert of_family(demasker, "llada").stop_token_ids == (EOS, TURN_END)
    out = MaskedSampler(4, eos="never").sample(demasker, length=4, batch_size=1)
    assert (out.token_ids != EOS).all()


# Logits that are no distribution


@each_rule
@pytest.mark.parametrize(
    ("temperature", "value", "call"), [(0.0, torch.nan, 0), (1.0, torch.inf, 1), (1.0, torch.nan, -1)]
)
def test_a_bad_logit_stops_the_run_and_its_step_is_named(
    make_demasker: Callable, rule: str, temperature: float, value: float, call: int
) -> None:
    demasker, sampler = make_demasker(num_hidden_layers=1), MaskedSampler(6, 3, rule, temperature)
    run = {"length": 6, "batch_size": 3, "prompt_ids": PROMPT, "generator": RowNoise(SEEDS)}
    steps: list[int] = []
    sampler.sample(demasker, **run, on_step=lambda event: steps.append(event.index))
    call = range(len(steps))[call]
    calls = itertools.count()

    def spoil(_: Any, __: Any, logits: Tensor) -> Tensor:
        if next(calls) == call:
            logits[1, 0, 2] = value
        return logits

    demasker.register_forward_hook(spoil)
    with pytest.raises(FloatingPointError, match=f"NaN or infinite logits at step {steps[call]};"):
        sampler.sample(demasker, **run)
    assert next(calls) == call + 1


# Adaptive rules


def num_above(probabilities: list[float], _: list[float], threshold: float) -> int:
    return sum(p >= threshold for p in probabilities)


def num_within_factor(probabilities: list[float], _: list[float], factor: float) -> int:
    return max([n for n, p in enumerate(probabilities, 1) if (n + 1) * (1 - p) < factor], default=0)


def num_within_bound(_: list[float], entropies: list[float], gamma: float) -> int:
    return max(n for n in range(1, len(entropies) + 1) if sum(entropies[:n]) - max(entropies[:n]) <= gamma)


COUNTS = {"threshold": num_above, "factor": num_within_factor, "entropy_bound": num_within_bound}


def decode_adaptively(
    demasker: Demasker, prompt: list[int], length: int, num_steps: int, block_size: int, rule: str
) -> tuple[list[int], list[int]]:
    """One text at temperature 0, and the calls made in each block, as plainly as can be said."""
    kind, _, number = rule.partition(":")
    text, calls = [*prompt, *[MASK] * length], []
    per_block = num_steps // (length // block_size)
    for start in range(len(prompt), len(text), block_size):
        shares = [block_size // per_block + (step < block_size % per_block) for step in range(per_block)]
        for step in range(per_block):
            masked = [i for i in range(start, start + block_size) if text[i] == MASK]
            if not masked:
                calls.append(step)
                break
            logits = demasker(torch.tensor([text]))[0].clone()
            logits[:, MASK] = -torch.inf
            p = logits.softmax(-1)
            entropy = {i: -sum(q * q.log() for q in p[i] if q > 0).item() for i in masked}
            best = {i: p[i].max().item() for i in masked}
            scores = {i: -entropy[i] for i in masked} if kind == "entropy_bound" else best
            order = sorted(masked, key=lambda i: -scores[i])
            fitting = COUNTS[kind]([best[i] for i in order], [entropy[i] for i in order], float(number))
            for i in order[: max(fitting, 1, len(masked) - sum(shares[step + 1 :]))]:
                text[i] = int(p[i].argmax())
        else:
            calls.append(per_block)
    return text, calls


@pytest.mark.parametrize(
    "rule",
    ["threshold:0.35", "threshold:0.6", "factor:1.0", "factor:1.9", "entropy_bound:0.4", "entropy_bound:2.5"],
)
@pytest.mark.parametrize(("num_steps", "block_size"), [(8, 8), (3, 8), (16, 4), (4, 2)])
@torch.no_grad()
def test_adaptive_rules_as_published(make_demasker: Callable, rule: str, num_steps: int, block_size: int) -> None:
    demasker = make_demasker(latent_dim=None)
    out = MaskedSampler(num_steps, block_size, rule).sample(demasker, length=8, batch_size=3, prompt_ids=PROMPTS)
    rows = [decode_adaptively(demasker, prompt.tolist(), 8, num_steps, block_size, rule) for prompt in PROMPTS]
    for text, end, (expected, _) in zip(out.token_ids.tolist(), out.lengths, rows, strict=True):
        assert text[:end] == expected
    assert out.num_calls == sum(max(calls) for calls in zip(*(calls for _, calls in rows), strict=True))


@pytest.mark.parametrize("static_shapes", [False, True])
@pytest.mark.parametrize("block_size", [None, 2, 1])
def test_the_ends_of_the_adaptive_scale(make_demasker: Callable, block_size: int | None, static_shapes: bool) -> None:
    def num_calls(rule: str, num_steps: int) -> int:
        sampler = MaskedSampler(num_steps, block_size, rule, temperature=1.0, static_shapes=static_shapes)
        return sampler.sample(demasker, length=4, batch_size=3, prompt_ids=PROMPT).num_calls

    demasker, num_blocks = make_demasker(num_hidden_layers=1), 4 // (block_size or 4)
    for everything, one_by_one in (
        ("threshold:0", "threshold:1"),
        ("factor:9", "factor:1e-9"),
        ("entropy_bound:99", "entropy_bound:0"),
    ):
        assert num_calls(everything, 8) == num_blocks
        assert [num_calls(one_by_one, n) for n in (num_blocks, 4, 8)] == [num_blocks, 4, 4]


@pytest.mark.parametrize("rule", ADAPTIVE)
@pytest.mark.parametrize("num_steps", [2, 3, 5, 20])
def test_adaptive_rules_never_fall_behind_the_schedule(make_demasker: Callable, rule: str, num_steps: int) -> None:
    events: list[StepEvent] = []
    MaskedSampler(num_steps, None, rule, 1.0).sample(
        make_demasker(), length=8, batch_size=3, generator=RowNoise(SEEDS), on_step=events.append
    )
    due = 0
    for event in events:
        due += 8 // num_steps + (event.index < 8 % num_steps)
        assert ((event.token_ids != MASK).sum(1) >= due).all()
        assert event.committed.any()


# Static shapes


@each_rule
@pytest.mark.parametrize(("temperature", "block_size"), [(0.0, 4), (1.0, None)])
def test_static_shapes_are_static_and_do_not_show(
    make_demasker: Callable, rule: str, temperature: float, block_size: int | None
) -> None:
    demasker, shapes = make_demasker(num_hidden_layers=1), set()

    def texts(static_shapes: bool, seeds: Tensor) -> Tensor:
        sampler = MaskedSampler(4, block_size, rule, temperature, static_shapes=static_shapes)
        given = {"prompt_ids": PROMPTS, "generator": RowNoise(seeds)}
        return sampler.sample(demasker, length=8, batch_size=3, **given).token_ids

    plain = [texts(False, seeds) for seeds in (SEEDS, SEEDS + 10)]
    demasker.register_forward_pre_hook(lambda _, __, given: shapes.add(given["positions"].shape), with_kwargs=True)
    assert torch.equal(texts(True, SEEDS), plain[0])
    assert torch.equal(texts(True, SEEDS + 10), plain[1])
    assert len(shapes) == 1


def test_a_compiled_demasker_is_compiled_once(make_demasker: Callable) -> None:
    demasker, backend = make_demasker(num_hidden_layers=1), CompileCounter()
    compiled: Any = torch.compile(demasker, backend=backend, fullgraph=True, dynamic=False)
    sampler = MaskedSampler(4, 4, static_shapes=True)
    run = {"length": 8, "batch_size": 3, "prompt_ids": PROMPT, "latents": LATENTS}
    assert torch.equal(sampler.sample(compiled, **run).token_ids, sampler.sample(demasker, **run).token_ids)
    assert backend.frame_count == 1


# Refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"remasking": "threshold:2"}, "threshold must be between 0 and 1, got 2.0"),
        ({"remasking": "factor:0"}, "factor must be above 0, got 0.0"),
        ({"remasking": "entropy_bound:-1"}, "gamma must not be negative, got -1.0"),
        ({"remasking": "remdm_cap:1.5"}, "eta must be between 0 and 1, got 1.5"),
        ({"remasking": "p2:-1"}, "eta must not be negative, got -1.0"),
        ({"remasking": "random:3"}, "remasking random takes no number, got 'random:3'"),
        ({"remasking": "threshold:high"}, "takes a number behind the colon, its threshold, got 'threshold:high'"),
        ({"remasking": "p3:1"}, "remasking must be one of random, .*, p2, got 'p3:1'"),
        ({"eos": "first"}, "eos must be one of free, last, never, got 'first'"),
        ({"guided_by": "luck"}, "guided_by must be one of latents, prompt, got 'luck'"),
        ({"cache": "all"}, "cache must be one of none, prefix, dual, got 'all'"),
        ({"guidance_scale": 0.0}, r"guidance_scale must be above 0 \(1.0 is off\), got 0.0"),
        ({"guidance_scale": torch.nan}, "guidance_scale must be above 0"),
        *[({"eos": "last", "remasking": name}, "eos='last' needs a rule") for name in sorted(set(NAMES) - set(LATE))],
        *[({"early_stop": True, "remasking": name}, "never masks") for name in sorted(set(NAMES) - set(LASTING))],
    ],
)
def test_bad_settings_are_refused_in_a_sentence(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        MaskedSampler(**settings)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("settings", [{"early_stop": True}, {"eos": "last"}, {"eos": "never"}])
def test_ends_need_a_demasker_that_knows_its_end_token(tabulated_demasker: Callable, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="early_stop and eos need a demasker with an eos_token_id"):
        MaskedSampler(2, **settings).sample(tabulated_demasker(torch.ones(2, 2)), length=2, batch_size=1)

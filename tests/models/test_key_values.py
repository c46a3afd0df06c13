import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crocodil.diffusion.noise import RowNoise
from crocodil.models import Demasker
from crocodil.models.key_values import KeyValues
from crocodil.samplers import ConWithinDisc, LatentSampler, MaskedSampler, StepEvent

MASK, EOS, K = 11, 0, 4
RULES = ("random", "ancestral", "low_confidence", "threshold:0.5", "entropy_bound:1.0", "remdm_cap:0.3", "p2:1.5")
PROMPTS = [torch.tensor([3, 1, 4]), torch.tensor([9]), torch.tensor([5, 6])]
LATENTS = torch.randn(3, K, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TOKEN_IDS = torch.tensor([[1, 2, MASK, 4, 5, MASK, 7], [8, 9, 1, MASK, MASK, 4, 10], [MASK, 3, 3, 1, MASK, 2, 6]])
OTHER_IDS = (TOKEN_IDS + 5) % 12
WINDOWS = {
    "all": torch.arange(7).expand(3, -1),
    "start": torch.arange(3).expand(3, -1),
    "end": torch.arange(4, 7).expand(3, -1),
    "ragged": torch.tensor([[3, 4], [0, 1], [5, 6]]),
}
REAL = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
HEARD = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
GIVEN: dict[str, dict[str, Tensor]] = {
    "text": {},
    "latents": {"latents": LATENTS},
    "padded": {"latents": LATENTS, "attention_mask": REAL},
    "some latents": {"latents": LATENTS, "attention_mask": REAL, "latent_mask": HEARD},
}
NETWORKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "gated": ({}, {"register_gates": True}),
    "blind": ({}, {"registers_read_text": False}),
    "blind and gated": ({}, {"register_gates": True, "registers_read_text": False}),
    "llada": ({}, {"family": "llada"}),
    "dream": ({}, {"family": "dream"}),
    "blind dream": ({}, {"family": "dream", "registers_read_text": False}),
    "one key head": ({"model_type": "qwen2", "num_key_value_heads": 1}, {"register_gates": True}),
}
BLIND = tuple(name for name, (_, settings) in NETWORKS.items() if not settings.get("registers_read_text", True))

each_network = pytest.mark.parametrize("name", NETWORKS)
each_given = pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
each_window = pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
each_cache = pytest.mark.parametrize("cache", ["prefix", "dual"])


@pytest.fixture(scope="module")
def build(make_demasker: Callable) -> Callable[..., Demasker]:
    """A network by its name; all weights that `NETWORKS` changes nothing about are shared."""

    @torch.no_grad()
    def make(name: str, **changes: Any) -> Demasker:
        network, settings = NETWORKS[name]
        plain = make_demasker(**network, **changes)
        demasker = Demasker(**plain.to_config() | settings).double().eval()
        demasker.load_state_dict(plain.state_dict(), strict=False)
        for weight_name, weight in demasker.named_parameters():
            if weight_name.endswith("register_gate"):
                weight.copy_(torch.tensor([0.3, 0.9]))
        return demasker

    return make


def take(logits: Tensor, window: Tensor) -> Tensor:
    return logits.gather(1, window[..., None].expand(-1, -1, logits.shape[-1]))


def assert_same(logits: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)


@each_network
@each_given
@torch.no_grad()
def test_a_window_of_an_unchanged_text_is_exact(build: Callable, name: str, given: dict[str, Tensor]) -> None:
    demasker, cache = build(name), KeyValues()
    expected = demasker(TOKEN_IDS, **given)
    assert not cache.is_filled
    assert torch.equal(demasker(TOKEN_IDS, **given, cache=cache), expected)
    assert cache.is_filled
    for window in WINDOWS.values():
        assert_same(demasker(TOKEN_IDS, **given, cache=cache, window=window), take(expected, window))
        chosen = window.flip(1)[:, :2]
        assert_same(demasker(TOKEN_IDS, **given, cache=cache, window=window, positions=chosen), take(expected, chosen))
    cache.clear()
    assert not cache.is_filled
    assert torch.equal(demasker(OTHER_IDS, **given, cache=cache), demasker(OTHER_IDS, **given))


@each_network
@each_window
@torch.no_grad()
def test_one_layer_is_exact_where_only_the_window_changed(build: Callable, name: str, window: Tensor) -> None:
    # Keys and values of the first layer are those of each token alone.
    demasker = build(name, num_hidden_layers=1)
    for given, shift in itertools.product(GIVEN.values(), (1, 3)):
        cache = KeyValues()
        demasker(TOKEN_IDS, **given, cache=cache)
        changed = TOKEN_IDS.scatter(1, window, (take(TOKEN_IDS[..., None], window).squeeze(2) + shift) % 12)
        expected = take(demasker(changed, **given), window)
        assert_same(demasker(changed, **given, cache=cache, window=window), expected)


@torch.no_grad()
def test_what_is_outside_the_window_is_as_old_as_the_cache(build: Callable) -> None:
    demasker, cache, window = build("plain"), KeyValues(), WINDOWS["end"]
    before = demasker(TOKEN_IDS, LATENTS, cache=cache)
    changed = torch.cat([OTHER_IDS[:, :4], TOKEN_IDS[:, 4:]], dim=1)
    assert_same(demasker(changed, LATENTS, cache=cache, window=window), take(before, window))
    inside = torch.cat([TOKEN_IDS[:, :4], OTHER_IDS[:, 4:]], dim=1)
    approximate = demasker(inside, LATENTS, cache=cache, window=window)
    assert (approximate - take(demasker(inside, LATENTS), window)).abs().max() > 1e-4


class Recorder(KeyValues):
    """Keeps the keys and values of the registers in each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.registers: list[Tensor] = []

    def merge(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = super().merge(layer, key, value)
        self.registers += [keys[:, :, :K].clone(), values[:, :, :K].clone()]
        return keys, values


@pytest.mark.parametrize("name", [*BLIND, "plain"])
@pytest.mark.parametrize("given", [GIVEN["latents"], GIVEN["some latents"]], ids=["latents", "some latents"])
@torch.no_grad()
def test_registers_that_do_not_read_the_text_serve_any_text(
    build: Callable, name: str, given: dict[str, Tensor]
) -> None:
    demasker, first, second = build(name), Recorder(), Recorder()
    demasker(TOKEN_IDS, **given, cache=first)
    expected = demasker(OTHER_IDS, **given, cache=second)
    moved = max((a - b).abs().max().item() for a, b in zip(first.registers, second.registers, strict=True))
    logits = demasker(OTHER_IDS, **given, cache=first, window=WINDOWS["all"])
    if name in BLIND:
        assert moved == 0
        assert_same(logits, expected)
    else:
        assert moved > 1e-3
        assert (logits - expected).abs().max() > 1e-4


@torch.no_grad()
def test_the_text_hears_registers_that_do_not_read_it(build: Callable) -> None:
    blind, reading = build("blind"), build("plain")
    assert (blind(TOKEN_IDS, LATENTS) - blind(TOKEN_IDS)).abs().max() > 1e-2
    assert (blind(TOKEN_IDS, LATENTS) - reading(TOKEN_IDS, LATENTS)).abs().max() > 1e-3
    assert torch.equal(blind(TOKEN_IDS), reading(TOKEN_IDS))
    # They differ in what registers become, which the only layer does not show to the text.
    shallow = (build(name, num_hidden_layers=1)(TOKEN_IDS, LATENTS) for name in ("blind", "plain"))
    assert_same(*shallow)


@torch.no_grad()
def test_the_first_registers_are_the_others_hidden_when_none_reads_the_text(build: Callable) -> None:
    demasker = build("blind")
    hidden = torch.tensor([1, 1, 0, 0]).expand(3, -1)
    assert_same(demasker(TOKEN_IDS, LATENTS, latent_mask=hidden), demasker(TOKEN_IDS, LATENTS[:, :2]))


@pytest.mark.parametrize("name", ["blind and gated", "plain"])
@torch.no_grad()
def test_a_folder_knows_whether_registers_read_the_text(build: Callable, name: str, tmp_path: Path) -> None:
    demasker = build(name).float()
    demasker.save_pretrained(tmp_path)
    again = Demasker.from_pretrained(tmp_path).eval()
    twin = Demasker.from_config(demasker.to_config())
    assert again.registers_read_text is twin.registers_read_text is (name == "plain")
    assert torch.equal(again(TOKEN_IDS, LATENTS), demasker(TOKEN_IDS, LATENTS))


def test_adapters_on_a_published_checkpoint_know_it_too(tiny_llada: Path) -> None:
    demasker = Demasker.from_pretrained(tiny_llada).with_latents(3, K, registers_read_text=False).with_lora({"r": 2})
    assert not Demasker.from_config(demasker.to_config()).registers_read_text


def test_another_attention_is_refused(build: Callable) -> None:
    demasker = build("plain")
    demasker.network.config._attn_implementation = "eager"
    with pytest.raises(ValueError, match="a cache needs the default attn_implementation"):
        demasker(TOKEN_IDS, cache=KeyValues())
    with pytest.raises(ValueError, match="registers_read_text=False needs the default attn_implementation"):
        demasker.with_latents(3, K, registers_read_text=False)


# Sampling


def sample(demasker: Any, rule: str = "low_confidence", num_steps: int = 6, **settings: Any) -> Any:
    run = {name: settings.pop(name) for name in ("latents", "on_step") if name in settings}
    sampler = MaskedSampler(num_steps, 2, rule, 1.0, **settings)
    run = {"latents": LATENTS, "prompt_ids": PROMPTS, "generator": RowNoise(torch.arange(3)), **run}
    return sampler.sample(demasker, length=6, batch_size=3, **run)


@each_cache
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["plain", "dream"])
def test_one_layer_samples_as_without_a_cache(build: Callable, cache: Any, rule: str, name: str) -> None:
    demasker = build(name, num_hidden_layers=1)
    cached, plain = sample(demasker, rule, cache=cache), sample(demasker, rule)
    assert torch.equal(cached.token_ids, plain.token_ids)
    assert cached.num_calls == plain.num_calls


@each_cache
@pytest.mark.parametrize("guided_by", ["latents", "prompt"])
@pytest.mark.parametrize("name", ["gated", "blind dream"])
def test_guided_calls_are_cached_as_well(build: Callable, cache: Any, guided_by: Any, name: str) -> None:
    demasker, guided = build(name, num_hidden_layers=1), {"guidance_scale": 1.8, "guided_by": guided_by}
    assert torch.equal(sample(demasker, cache=cache, **guided).token_ids, sample(demasker, **guided).token_ids)


@each_cache
@each_network
def test_one_step_a_block_is_exact(build: Callable, cache: Any, name: str) -> None:
    demasker = build(name)
    exact = sample(demasker, num_steps=3)
    cached = sample(demasker, num_steps=3, cache=cache)
    assert torch.equal(cached.token_ids, exact.token_ids)
    assert cached.calls["demasker"] == 3


@pytest.mark.parametrize("latents", [None, LATENTS], ids=["text", "latents"])
def test_what_is_computed_in_each_call(build: Callable, latents: Tensor | None) -> None:
    demasker, sizes = build("plain"), []
    demasker.decoder.register_forward_pre_hook(
        lambda _, __, given: sizes.append(given["inputs_embeds"].shape[1]), with_kwargs=True
    )
    everything = 6 + 3 + (0 if latents is None else K)
    assert sample(demasker, latents=latents, cache="dual").calls == {"demasker": 3, "demasker[2]": 3}
    assert sizes == [everything, 2] * 3
    sizes.clear()
    out = sample(demasker, latents=latents, cache="prefix")
    assert out.calls == {"demasker": 3, "demasker[6]": 1, "demasker[4]": 1, "demasker[2]": 1}
    assert out.num_calls == 6
    assert sizes == [everything, 6, everything, 4, everything, 2]


class Uncached:
    """A demasker that does not tell that its registers do not read the text."""

    def __init__(self, demasker: Demasker) -> None:
        self.demasker, self.mask_token_id, self.eos_token_id = demasker, demasker.mask_token_id, demasker.eos_token_id

    def __call__(self, *args: Any, **given: Any) -> Tensor:
        assert "cache" not in given
        return self.demasker(*args, **given)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", BLIND)
def test_registers_are_computed_once(build: Callable, rule: str, name: str) -> None:
    demasker, sizes = build(name), []
    expected = sample(Uncached(demasker), rule)
    demasker.decoder.register_forward_pre_hook(
        lambda _, __, given: sizes.append(given["inputs_embeds"].shape[1]), with_kwargs=True
    )
    out = sample(demasker, rule)
    assert torch.equal(out.token_ids, expected.token_ids)
    assert out.num_calls == expected.num_calls == len(sizes)
    assert sizes == [K + 9] + [9 + (name == "blind dream")] * (len(sizes) - 1)


@pytest.mark.parametrize("name", BLIND)
def test_without_latents_nothing_is_kept(build: Callable, name: str) -> None:
    demasker = build(name)
    assert torch.equal(sample(demasker, latents=None).token_ids, sample(Uncached(demasker), latents=None).token_ids)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_new_registers_are_computed_anew(
    build: Callable, make_prior: Callable, make_encoder: Callable, cache: Any
) -> None:
    demasker, prior, encoder = build("blind", num_hidden_layers=1), make_prior(), make_encoder().float()
    sizes: list[int] = []
    events: list[StepEvent] = []

    def texts(demasker: Any, cache: Any) -> Tensor:
        algorithm = ConWithinDisc(MaskedSampler(8, 4, temperature=1.0, cache=cache), LatentSampler(2), None, [2, 5])
        run = {"length": 8, "batch_size": 3, "prompt_ids": PROMPTS, "generator": RowNoise(torch.arange(3))}
        return algorithm.sample(demasker, prior, encoder, on_step=events.append, **run).token_ids

    expected = texts(Uncached(demasker), "none")
    events.clear()
    demasker.decoder.register_forward_pre_hook(
        lambda _, __, given: sizes.append(given["inputs_embeds"].shape[1]), with_kwargs=True
    )
    assert torch.equal(texts(demasker, cache), expected)
    renewed = [size == K + 8 + 3 for size in sizes]
    assert [event.refreshed for event in events] == [step in (0, 2, 5) for step in range(8)]
    assert renewed == [step in (0, 2, 5) or (step == 4 and cache != "none") for step in range(8)]


@each_cache
def test_masks_in_prompts_are_refused(build: Callable, cache: Any) -> None:
    with pytest.raises(ValueError, match=f"cache='{cache}' needs prompts without masks in them"):
        MaskedSampler(4, 2, cache=cache).sample(
            build("plain"), length=4, batch_size=1, prompt_ids=torch.tensor([3, MASK, 1])
        )

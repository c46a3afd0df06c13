import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from crocodil.diffusion.masking import LinearMasking, masked_cross_entropy, token_cross_entropy
from crocodil.diffusion.noise import RowNoise
from crocodil.modules.autoencoder import LatentRegularisation, disturb_latents
from crocodil.modules.demasker import draw_masks

ROWS, REGISTERS, DIM = 20_000, 8, 2
NONE = {"noise_std": 0.0, "nested_dropout": 0.0, "dropout": 0.0}
pytestmark = pytest.mark.filterwarnings("ignore:.*overfit")


def disturbed(latents: Tensor, ramp: float = 1.0, **settings: float) -> tuple[Tensor, Tensor | None]:
    noise = RowNoise(torch.arange(len(latents)))
    return disturb_latents(latents, noise, LatentRegularisation(**{**NONE, **settings}), ramp)


def visible(**settings: float) -> Tensor:
    mask = disturbed(torch.zeros(ROWS, REGISTERS, DIM), **settings)[1]
    assert mask is not None
    return mask


def is_share(count: Tensor, share: float, size: int = ROWS) -> bool:
    return abs(count.item() - share * size) < 4 * math.sqrt(size * share * (1 - share))


def test_nested_dropout_keeps_a_prefix_of_uniform_length(chi_square: Callable[[Tensor, Tensor], float]) -> None:
    mask = visible(nested_dropout=0.4)
    lengths = mask.sum(1)
    assert torch.equal(mask, torch.arange(REGISTERS) < lengths[:, None])
    shares = torch.full((REGISTERS,), 0.4 / REGISTERS)
    shares[-1] += 0.6
    assert lengths.min() == 1
    assert chi_square(lengths.bincount()[1:], shares) > 1e-3


def test_dropout_hides_all_registers_of_its_share_of_rows() -> None:
    lengths = visible(dropout=0.1).sum(1)
    assert is_share((lengths == 0).sum(), 0.1)
    assert is_share((lengths == REGISTERS).sum(), 0.9)
    both = visible(dropout=0.1, nested_dropout=0.5)
    assert is_share((both.sum(1) == 0).sum(), 0.1)
    assert is_share((both.sum(1) == REGISTERS).sum(), 0.9 * (0.5 + 0.5 / REGISTERS))  # the choices are independent
    assert torch.equal(both, torch.arange(REGISTERS) < both.sum(1, keepdim=True))


def test_masking_hides_each_register_by_itself(chi_square: Callable[[Tensor, Tensor], float]) -> None:
    mask = visible(masking=0.3)
    assert all(is_share((~mask[:, i]).sum(), 0.3) for i in range(REGISTERS))
    binomial = [math.comb(REGISTERS, k) * 0.7**k * 0.3 ** (REGISTERS - k) for k in range(REGISTERS + 1)]
    counts = mask.sum(1).bincount(minlength=REGISTERS + 1)
    pooled = torch.cat([counts[:2].sum()[None], counts[2:]])  # too few rows see none to be a cell of the test
    assert chi_square(pooled, torch.tensor([binomial[0] + binomial[1], *binomial[2:]])) > 1e-3


def test_replacement_puts_noise_in_the_place_of_whole_latents() -> None:
    latents = torch.full((ROWS, REGISTERS, DIM), 100.0)
    changed = disturbed(latents, replacement=0.2)[0]
    replaced = (changed != latents).flatten(1)
    assert torch.equal(replaced.all(1), replaced.any(1))
    assert is_share(replaced.all(1).sum(), 0.2)
    assert changed[replaced.all(1)].std().item() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(("ramp", "sigma"), [(1.0, 0.75), (0.4, 0.3), (0.0, 0.0)])
def test_noise_keeps_the_variance_and_sets_the_cosine(ramp: float, sigma: float) -> None:
    latents = torch.randn(ROWS, REGISTERS, DIM, generator=torch.Generator().manual_seed(0))
    noisy, mask = disturbed(latents, ramp, noise_std=0.75)
    assert mask is None
    cosine = torch.cosine_similarity(latents.flatten(), noisy.flatten(), dim=0).item()
    assert cosine == pytest.approx(1 / math.sqrt(1 + sigma**2), abs=0.01)
    assert noisy.std().item() == pytest.approx(1.0, abs=0.01)
    assert torch.equal(noisy, latents) == (sigma == 0)


def test_choices_are_independent() -> None:
    """Among the rows that one choice hits, the others hit their own shares."""
    latents = torch.full((ROWS, REGISTERS, DIM), 100.0)
    changed, mask = disturbed(latents, replacement=0.5, dropout=0.5)
    assert mask is not None
    both = (changed != latents).flatten(1).all(1) & ~mask.any(1)
    assert is_share(both.sum(), 0.25)


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0, 0), (0.5, 30, 66), (1.0, 88, 100)])
def test_input_masking_hides_part_of_the_text_from_the_encoder(
    share: float,
    low: int,
    high: int,
    tiny_system: Any,
    fit: Callable[..., list[float]],
    count_calls: Callable[..., list[tuple[Any, ...]]],
) -> None:
    module = tiny_system.module("autoencoder", regularisation=LatentRegularisation(input_masking=share))
    seen = count_calls(module.encoder.network.get_input_embeddings())
    fit(module, tiny_system.data(100), max_steps=1)
    token_ids = seen[0][0]
    assert low <= (token_ids == 2).any(1).sum() <= high
    if share == 1.0:
        shares = (token_ids == 2).float().mean(1)
        assert shares.min() < 0.1 and shares.max() > 0.9 and 0.4 < shares.mean() < 0.6


def test_noise_rises_over_the_warm_up(
    tiny_system: Any, fit: Callable[..., list[float]], count_calls: Callable[..., list[tuple[Any, ...]]]
) -> None:
    """One batch and weights that never move: the latents the demasker sees turn away from the true ones."""
    regularisation = LatentRegularisation(noise_std=5.0, noise_warmup_steps=2, nested_dropout=0.0, dropout=0.0)
    module = tiny_system.module(
        "autoencoder", regularisation=regularisation, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0)
    )
    seen, texts = count_calls(module.demasker.register_proj), count_calls(module.encoder.network.get_input_embeddings())
    fit(module, tiny_system.data(100), max_steps=4, overfit_batches=1, check_val_every_n_epoch=9)
    with torch.no_grad():
        true = module.encoder(texts[0][0])
    cosines = [torch.cosine_similarity(true.flatten(), args[0].flatten(), dim=0).item() for args in seen]
    expected = [1 / math.sqrt(1 + sigma**2) for sigma in (0.0, 2.5, 5.0, 5.0)]
    assert cosines == pytest.approx(expected, abs=0.05)


def test_latent_statistics_are_those_of_the_data(tiny_system: Any, fit: Callable[..., list[float]]) -> None:
    """While the weights stand still, the running statistics of one batch are its mean and deviation."""
    module = tiny_system.module("autoencoder", optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0))
    data = tiny_system.data(100)
    fit(module, data, max_steps=3, overfit_batches=1)
    with torch.no_grad():
        latents = module.encoder.eval()(data.blocks("train")[:100])
    torch.testing.assert_close(latents.mean(0), torch.zeros(4, 8), atol=1e-4, rtol=0)
    moves = module.encoder.latent_std > 0.02  # a coordinate that hardly moves is divided by the least deviation
    assert moves.any()
    torch.testing.assert_close(latents.std(0, correction=0)[moves], torch.ones(int(moves.sum())), atol=1e-3, rtol=0)


def test_the_encoder_starts_as_a_copy_of_the_base_or_from_its_own_settings(tiny_system: Any) -> None:
    copy = tiny_system.module("autoencoder")
    base, encoder = copy.demasker.network.get_decoder().state_dict(), copy.encoder.network.state_dict()
    assert base.keys() == encoder.keys() and all(torch.equal(base[name], encoder[name]) for name in base)
    settings = {"model_type": "bert", "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    own = tiny_system.module("autoencoder", encoder=settings)
    assert own.encoder.network.config.model_type == "bert"
    assert own.encoder.network.config.vocab_size == 152
    assert own.encoder(torch.zeros(2, 32, dtype=torch.int64)).shape == (2, 4, 8)


@torch.no_grad()
def test_held_out_figures_tell_the_latents_apart(tiny_system: Any) -> None:
    module = tiny_system.module("autoencoder").eval()
    batch = next(iter(tiny_system.data().val_dataloader()))
    figures = module.evaluate(batch, module.held_out_noise(batch, 0))
    token_ids, noise = batch["token_ids"], module.held_out_noise(batch, 0)
    noisy_ids, is_masked, point = draw_masks(token_ids, noise, LinearMasking(), 2)
    for name, latents in (("loss_clean", module.encoder(token_ids)), ("loss_no_latents", None)):
        nats = token_cross_entropy(module.demasker(noisy_ids, latents), token_ids)
        torch.testing.assert_close(figures[name], masked_cross_entropy(nats, is_masked, point, "elbo"))
    assert len({value.item() for value in figures.values()}) == 3


@torch.no_grad()
def test_predict_writes_texts_from_their_registers_alone(
    tiny_system: Any, count_calls: Callable[..., list[tuple[Any, ...]]]
) -> None:
    module = tiny_system.module("autoencoder").eval()
    batch = next(iter(tiny_system.data().test_dataloader()))
    canvases = count_calls(module.demasker)
    out = module.predict_step(batch, 0)
    first_canvas, latents = canvases[0]
    assert (first_canvas == 2).all() and torch.equal(latents, module.encoder(batch["token_ids"]))
    assert not (out["token_ids"] == 2).any()
    assert torch.equal(out["token_accuracy"], (out["token_ids"] == batch["token_ids"]).float().mean(1))

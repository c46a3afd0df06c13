import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from crocodil.models import Demasker

VOCAB_SIZE, MASK, NUM_REGISTERS, LATENT_DIM = 12, 11, 4, 3
QWEN3 = {"model_type": "qwen3", "head_dim": 8, "num_key_value_heads": 1}
BACKBONES = [
    {"model_type": "llama"},
    {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
        "tie_word_embeddings": True,
    },
    {"model_type": "qwen2", "num_key_value_heads": 1},
    QWEN3,
]


@pytest.fixture
def token_ids() -> Tensor:
    return torch.tensor([[1, 2, MASK, 4, 5, MASK, 7], [8, 9, 1, MASK, MASK, 4, 10]])


@pytest.fixture
def latents() -> Tensor:
    return torch.randn(2, NUM_REGISTERS, LATENT_DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("backbone", BACKBONES, ids=lambda backbone: backbone["model_type"])
def test_without_latents_it_is_the_stock_network_attending_both_ways(
    make_demasker: Callable, token_ids: Tensor, backbone: dict[str, Any]
) -> None:
    demasker = make_demasker(**backbone)
    stock = AutoModelForCausalLM.from_config(AutoConfig.for_model(**demasker.to_config()["network"])).double().eval()
    stock.load_state_dict(demasker.network.state_dict())
    assert torch.equal(demasker(token_ids), stock(token_ids, use_cache=False).logits)

    stock.config.is_causal = True  # an explicit mask of zeros makes a causal network bidirectional, too
    causal, everything = stock(token_ids).logits, torch.zeros(2, 1, 7, 7, dtype=torch.float64)
    torch.testing.assert_close(demasker(token_ids), stock(token_ids, attention_mask=everything).logits)
    assert (demasker(token_ids) - causal).abs().max() > 1e-3


@pytest.mark.parametrize("backbone", BACKBONES, ids=lambda backbone: backbone["model_type"])
@pytest.mark.parametrize("with_latents", [False, True])
def test_the_first_token_sees_the_last(
    make_demasker: Callable, latents: Tensor, backbone: dict[str, Any], with_latents: bool
) -> None:
    demasker = make_demasker(**backbone | {"tie_word_embeddings": False})
    logits = demasker(torch.tensor([[1, 2, 3, 4, 9]]), latents[:1] if with_latents else None)
    logits[0, 0].square().sum().backward()
    gradient = demasker.network.get_input_embeddings().weight.grad
    assert gradient[9].abs().max() > 1e-6
    assert gradient[10].abs().max() == 0  # a token that is not there


@pytest.mark.parametrize("backbone", BACKBONES, ids=lambda backbone: backbone["model_type"])
@torch.no_grad()
def test_registers_change_the_logits_and_are_told_apart_by_position(
    make_demasker: Callable, token_ids: Tensor, latents: Tensor, backbone: dict[str, Any]
) -> None:
    demasker = make_demasker(**backbone)
    demasker.register_embedding.zero_()  # else that alone tells them apart
    logits = demasker(token_ids, latents)
    assert logits.shape == (2, 7, VOCAB_SIZE)
    assert (logits - demasker(token_ids)).abs().max() > 1e-3
    for order in ([1, 0, 2, 3], [0, 1, 3, 2], [3, 2, 1, 0]):
        assert (logits - demasker(token_ids, latents[:, order])).abs().max() > 1e-4


@torch.no_grad()
def test_each_register_has_an_embedding_of_its_own(make_demasker: Callable, token_ids: Tensor, latents: Tensor) -> None:
    demasker = make_demasker()
    shift = torch.randn(NUM_REGISTERS, LATENT_DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    demasker.register_embedding.copy_(shift @ demasker.register_proj.weight.T)  # as if the latents were shifted by it
    embedded, embedded_cut = demasker(token_ids, latents), demasker(token_ids, latents[:, :2])
    demasker.register_embedding.zero_()
    torch.testing.assert_close(embedded, demasker(token_ids, latents + shift))
    torch.testing.assert_close(embedded_cut, demasker(token_ids, (latents + shift)[:, :2]))
    assert (embedded - demasker(token_ids, latents)).abs().max() > 1e-4


@torch.no_grad()
def test_the_first_k_registers_are_the_last_ones_hidden(
    make_demasker: Callable, token_ids: Tensor, latents: Tensor
) -> None:
    demasker = make_demasker()
    full = demasker(token_ids, latents)
    for k in range(1, NUM_REGISTERS):
        visible = torch.arange(NUM_REGISTERS).expand(2, -1) < k
        cut = demasker(token_ids, latents[:, :k])
        torch.testing.assert_close(demasker(token_ids, latents, latent_mask=visible), cut)
        assert (cut - full).abs().max() > 1e-4
    torch.testing.assert_close(demasker(token_ids, latents, latent_mask=torch.ones(2, NUM_REGISTERS)), full)


@torch.no_grad()
def test_each_row_has_its_own_latent_mask_and_none_visible_is_the_plain_model(
    make_demasker: Callable, token_ids: Tensor, latents: Tensor
) -> None:
    demasker = make_demasker()
    visible = torch.tensor([[False] * NUM_REGISTERS, [True, True, False, False]])
    logits = demasker(token_ids, latents, latent_mask=visible)
    torch.testing.assert_close(logits[0], demasker(token_ids)[0])
    torch.testing.assert_close(logits[1], demasker(token_ids, latents[:, :2])[1])


@pytest.mark.parametrize("with_latents", [False, True])
@torch.no_grad()
def test_positions_gather_logits(
    make_demasker: Callable, token_ids: Tensor, latents: Tensor, with_latents: bool
) -> None:
    demasker, z = make_demasker(), latents if with_latents else None
    positions = torch.tensor([[6, 0, 3], [2, 2, 5]])
    expected = torch.stack([demasker(token_ids, z)[row, positions[row]] for row in range(2)])
    torch.testing.assert_close(demasker(token_ids, z, positions=positions), expected)


@pytest.mark.parametrize("with_latents", [False, True])
@torch.no_grad()
def test_padding_has_no_influence(
    make_demasker: Callable, token_ids: Tensor, latents: Tensor, with_latents: bool
) -> None:
    demasker, z = make_demasker(), latents if with_latents else None
    real = torch.tensor([[1, 1, 1, 1, 1, 0, 0]]).expand(2, -1)
    changed = token_ids.clone()
    changed[:, 5:] = 3
    padded = demasker(token_ids, z, real)[:, :5]
    torch.testing.assert_close(padded, demasker(changed, z, real)[:, :5], rtol=0, atol=0)
    torch.testing.assert_close(padded, demasker(token_ids[:, :5], z))
    assert (padded - demasker(token_ids, z)[:, :5]).abs().max() > 1e-4


@torch.no_grad()
def test_registers_can_be_added_to_a_plain_model(make_demasker: Callable, token_ids: Tensor, latents: Tensor) -> None:
    demasker = make_demasker(latent_dim=None)
    before = demasker(token_ids)
    assert demasker.with_latents(LATENT_DIM, NUM_REGISTERS) is demasker
    assert demasker.latent_dim == demasker.to_config()["latent_dim"] == LATENT_DIM
    assert demasker.num_registers == demasker.to_config()["num_registers"] == NUM_REGISTERS
    assert torch.equal(demasker(token_ids), before)
    assert (demasker(token_ids, latents) - before).abs().max() > 1e-4


@pytest.mark.parametrize("backbone", BACKBONES, ids=lambda backbone: backbone["model_type"])
@pytest.mark.parametrize("latent_dim", [None, LATENT_DIM])
@torch.no_grad()
def test_its_configuration_rebuilds_it(
    make_demasker: Callable, token_ids: Tensor, latents: Tensor, backbone: dict[str, Any], latent_dim: int | None
) -> None:
    demasker = make_demasker(latent_dim=latent_dim, **backbone)
    config = demasker.to_config()
    assert json.loads(json.dumps(config)) == config
    twin = Demasker(**json.loads(json.dumps(config))).double().eval()
    twin.load_state_dict(demasker.state_dict(), strict=True)
    assert twin.to_config() == config
    z = None if latent_dim is None else latents
    assert torch.equal(twin(token_ids, z), demasker(token_ids, z))


def test_it_knows_its_sizes(make_demasker: Callable) -> None:
    demasker = make_demasker()
    assert (demasker.vocab_size, demasker.max_length) == (VOCAB_SIZE, 64)


def test_a_text_too_long_is_refused(make_demasker: Callable, latents: Tensor) -> None:
    demasker = make_demasker(max_position_embeddings=6)
    assert demasker(torch.full((2, 6), MASK), latents).shape == (2, 6, VOCAB_SIZE)  # registers take none of the length
    with pytest.raises(ValueError, match="at most 6 tokens, got 7"):
        demasker(torch.full((2, 7), MASK), latents)


@pytest.mark.parametrize("shape", [(2, 4, LATENT_DIM + 1), (2, LATENT_DIM), (2, 0, LATENT_DIM), (2, 5, LATENT_DIM)])
def test_latents_of_another_shape_are_refused(
    make_demasker: Callable, token_ids: Tensor, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"latents must be \(B, 1 to 4, 3\), got \(2, "):
        make_demasker()(token_ids, torch.zeros(shape))


def test_a_plain_model_refuses_latents(make_demasker: Callable, token_ids: Tensor, latents: Tensor) -> None:
    with pytest.raises(ValueError, match="built without latents"):
        make_demasker(latent_dim=None)(token_ids, latents)


@pytest.mark.parametrize("sizes", [{"latent_dim": LATENT_DIM}, {"num_registers": NUM_REGISTERS}])
def test_half_of_the_latent_sizes_is_refused(make_demasker: Callable, sizes: dict[str, int]) -> None:
    plain = make_demasker(latent_dim=None).to_config()
    with pytest.raises(ValueError, match="latent_dim and num_registers go together"):
        Demasker(**plain | sizes)


def test_unknown_settings_are_refused(make_demasker: Callable) -> None:
    with pytest.raises(ValueError, match="hidden_sizes"):
        make_demasker(hidden_sizes=3)


def test_a_network_without_rotary_positions_is_refused() -> None:
    network = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 12}
    network |= {"bos_token_id": None, "eos_token_id": None}
    with pytest.raises(ValueError, match="rotary positions, but a gpt2 network"):
        Demasker(network, mask_token_id=MASK, eos_token_id=0)

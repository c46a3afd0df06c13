import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from crocodil.models import RegisterEncoder

NUM_REGISTERS, LATENT_DIM = 4, 3
BACKBONES = [
    {"model_type": "llama"},
    {"model_type": "qwen2", "num_key_value_heads": 1},
    {"model_type": "qwen3", "head_dim": 8, "num_key_value_heads": 1},
    {"model_type": "bert"},
]
each_backbone = pytest.mark.parametrize("backbone", BACKBONES, ids=lambda backbone: backbone["model_type"])


@pytest.fixture
def token_ids() -> Tensor:
    return torch.tensor([[1, 2, 11, 4, 5, 6, 7], [8, 9, 1, 3, 11, 4, 10]])


def batches(count: int) -> list[Tensor]:
    """Batches (50, K, D) whose means differ, so that most of the pooled spread lies between them."""
    generator = torch.Generator().manual_seed(0)
    size = (NUM_REGISTERS, LATENT_DIM)
    return [
        torch.randn(50, *size, generator=generator) * 0.5 + 3 * torch.randn(1, *size, generator=generator)
        for _ in range(count)
    ]


@each_backbone
@torch.no_grad()
def test_latents_are_layer_normalised(make_encoder: Callable, token_ids: Tensor, backbone: dict[str, Any]) -> None:
    encoder = make_encoder(**backbone)
    latents = encoder.encode(token_ids)
    assert latents.shape == (2, NUM_REGISTERS, LATENT_DIM)
    torch.testing.assert_close(latents.mean(-1), torch.zeros(2, NUM_REGISTERS), rtol=0, atol=1e-5)
    torch.testing.assert_close(latents.var(-1, correction=0), torch.ones(2, NUM_REGISTERS), rtol=0, atol=1e-2)
    torch.testing.assert_close(encoder(token_ids), encoder.standardize(latents))


@each_backbone
def test_every_register_reads_every_token(make_encoder: Callable, backbone: dict[str, Any]) -> None:
    encoder = make_encoder(**backbone)
    latents = encoder.encode(torch.tensor([[1, 2, 3, 9]]))
    for register in range(NUM_REGISTERS):
        encoder.zero_grad()
        latents[0, register, 0].backward(retain_graph=True)
        gradient = encoder.network.get_input_embeddings().weight.grad
        assert gradient[[1, 2, 3, 9]].abs().amax(1).min() > 1e-9


@each_backbone
@torch.no_grad()
def test_registers_are_told_apart_by_position(
    make_encoder: Callable, token_ids: Tensor, backbone: dict[str, Any]
) -> None:
    encoder = make_encoder(**backbone)
    encoder.registers.copy_(encoder.registers[:1].clone().expand(NUM_REGISTERS, -1))  # the same content everywhere
    latents = encoder.encode(token_ids)
    for k in range(NUM_REGISTERS - 1):
        assert (latents[:, k] - latents[:, k + 1]).abs().max() > 1e-4


@torch.no_grad()
def test_register_k_of_a_rotary_network_stands_at_position_minus_k(make_encoder: Callable, token_ids: Tensor) -> None:
    encoder = make_encoder()
    text = encoder.network.get_input_embeddings()(token_ids)
    positions = torch.cat([torch.arange(7), -torch.arange(1, NUM_REGISTERS + 1)])[None]  # appended, as in the paper
    states = encoder.network(
        inputs_embeds=torch.cat([text, encoder.registers.expand(2, -1, -1)], dim=1), position_ids=positions
    ).last_hidden_state
    expected = torch.nn.functional.layer_norm(encoder.out_proj(states[:, 7:]), (LATENT_DIM,))
    torch.testing.assert_close(encoder.encode(token_ids), expected.float(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_registers_of_a_network_with_learned_positions_follow_the_text(
    make_encoder: Callable, token_ids: Tensor
) -> None:
    encoder = make_encoder(model_type="bert")
    text = encoder.network.get_input_embeddings()(token_ids)
    before = encoder.encode(token_ids)
    encoder.network.embeddings.position_embeddings.weight[7 + NUM_REGISTERS :] += 1.0  # beyond text and registers
    assert torch.equal(encoder.encode(token_ids), before)
    states = encoder.network(inputs_embeds=torch.cat([text, encoder.registers.flip(0).expand(2, -1, -1)], dim=1))
    expected = encoder.out_proj(states.last_hidden_state[:, 7:].flip(1))
    torch.testing.assert_close(before, torch.nn.functional.layer_norm(expected, (LATENT_DIM,)).float())


@each_backbone
@torch.no_grad()
def test_padding_has_no_influence(make_encoder: Callable, token_ids: Tensor, backbone: dict[str, Any]) -> None:
    encoder = make_encoder(**backbone)
    real = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
    changed = token_ids.clone()
    changed[0, 5:] = 3
    latents = encoder(token_ids, real)
    assert torch.equal(latents, encoder(changed, real))
    assert (latents[0] - encoder(token_ids)[0]).abs().max() > 1e-4
    torch.testing.assert_close(latents[1], encoder(token_ids)[1])
    if encoder.has_register_axis:  # learned positions put the registers behind the padding
        torch.testing.assert_close(latents[:1], encoder(token_ids[:1, :5]))


def test_which_backbones_have_a_register_axis(make_encoder: Callable) -> None:
    assert [make_encoder(**backbone).has_register_axis for backbone in BACKBONES] == [True, True, True, False]


def test_statistics_start_neutral_and_are_saved_with_the_weights(make_encoder: Callable) -> None:
    encoder = make_encoder()
    latents = torch.randn(5, NUM_REGISTERS, LATENT_DIM)
    assert torch.equal(encoder.standardize(latents), latents)
    assert {"latent_mean", "latent_std"} <= encoder.state_dict().keys()


def test_a_full_update_takes_the_statistics_of_the_batch(make_encoder: Callable) -> None:
    encoder, (latents,) = make_encoder().float(), batches(1)
    encoder.update_statistics(latents, weight=1.0)
    torch.testing.assert_close(encoder.latent_mean, latents.mean(0))
    torch.testing.assert_close(encoder.latent_std, latents.std(0, correction=0), rtol=1e-4, atol=1e-4)
    standardised = encoder.standardize(latents)
    torch.testing.assert_close(standardised.mean(0), torch.zeros(NUM_REGISTERS, LATENT_DIM), rtol=0, atol=1e-4)
    torch.testing.assert_close(
        standardised.var(0, correction=0), torch.ones(NUM_REGISTERS, LATENT_DIM), atol=1e-3, rtol=0
    )
    torch.testing.assert_close(encoder.unstandardize(standardised), latents)
    torch.testing.assert_close(encoder.standardize(encoder.unstandardize(latents)), latents, rtol=1e-4, atol=1e-4)


def test_a_plain_average_of_batches_gives_the_pooled_statistics(make_encoder: Callable) -> None:
    encoder, parts = make_encoder().float(), batches(20)
    for i, latents in enumerate(parts):
        encoder.update_statistics(latents, weight=1 / (i + 1))
    pooled = torch.cat(parts)
    torch.testing.assert_close(encoder.latent_mean, pooled.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(encoder.latent_std, pooled.std(0, correction=0), rtol=1e-4, atol=1e-4)
    assert (encoder.latent_std > 3 * 0.5).any()  # the spread between batches counts


def test_a_moving_average_converges_to_the_pooled_statistics(make_encoder: Callable) -> None:
    encoder, parts = make_encoder().float(), batches(10)
    for _ in range(100):
        for latents in parts:
            encoder.update_statistics(latents, weight=0.01)
    pooled = torch.cat(parts)
    torch.testing.assert_close(encoder.latent_std, pooled.std(0, correction=0), rtol=0.05, atol=0.02)
    torch.testing.assert_close(encoder.latent_mean, pooled.mean(0), rtol=0, atol=0.3)


@torch.no_grad()
def test_latents_of_texts_have_unit_variance_once_statistics_are_set(make_encoder: Callable) -> None:
    encoder = make_encoder().float()
    texts = torch.randint(0, 11, (200, 6), generator=torch.Generator().manual_seed(0))
    encoder.update_statistics(encoder.encode(texts), weight=1.0)
    latents = encoder(texts)
    torch.testing.assert_close(latents.mean(0), torch.zeros(NUM_REGISTERS, LATENT_DIM), rtol=0, atol=1e-4)
    torch.testing.assert_close(latents.var(0, correction=0), torch.ones(NUM_REGISTERS, LATENT_DIM), rtol=0, atol=1e-2)


def test_constant_latents_do_not_blow_up(make_encoder: Callable) -> None:
    encoder = make_encoder().float()
    encoder.update_statistics(torch.full((5, NUM_REGISTERS, LATENT_DIM), 0.3), weight=1.0)
    assert encoder.standardize(torch.zeros(1, NUM_REGISTERS, LATENT_DIM)).abs().max() < 100


def test_statistics_take_no_gradient(make_encoder: Callable, token_ids: Tensor) -> None:
    encoder = make_encoder().float()
    latents = encoder.encode(token_ids)
    assert latents.requires_grad
    encoder.update_statistics(latents, weight=0.5)
    assert not encoder.latent_mean.requires_grad
    assert not encoder.latent_std.requires_grad


@each_backbone
@torch.no_grad()
def test_its_configuration_rebuilds_it(make_encoder: Callable, token_ids: Tensor, backbone: dict[str, Any]) -> None:
    encoder = make_encoder(**backbone)
    encoder.latent_mean += 0.5
    config = encoder.to_config()
    twin = RegisterEncoder(**json.loads(json.dumps(config))).double().eval()
    twin.load_state_dict(encoder.state_dict(), strict=True)
    assert twin.to_config() == config
    assert torch.equal(twin(token_ids), encoder(token_ids))


def test_statistics_stay_float32_in_a_network_of_half_precision(make_encoder: Callable) -> None:
    encoder = make_encoder().float()
    encoder.update_statistics(batches(1)[0], weight=1.0)
    before = encoder.latent_mean.clone(), encoder.latent_std.clone()
    assert not torch.equal(before[0], before[0].bfloat16())
    torch.nn.Sequential(encoder).to(torch.bfloat16)
    assert encoder.out_proj.weight.dtype == torch.bfloat16
    assert torch.equal(encoder.latent_mean, before[0]) and torch.equal(encoder.latent_std, before[1])
    assert encoder.latent_mean.dtype == encoder.latent_std.dtype == torch.float32
    assert {"latent_mean", "latent_std"} <= encoder.state_dict().keys()
    encoder.update_statistics(torch.full((5, NUM_REGISTERS, LATENT_DIM), 100.0).bfloat16(), weight=1e-5)
    torch.testing.assert_close(encoder.latent_mean, before[0] + 1e-5 * (100 - before[0]), rtol=0, atol=1e-6)


def test_a_small_spread_beside_a_large_mean_is_told_exactly(make_encoder: Callable) -> None:
    encoder = make_encoder().float()
    latents = 1 + 0.02 * torch.randn(500, NUM_REGISTERS, LATENT_DIM, generator=torch.Generator().manual_seed(0))
    encoder.update_statistics(latents, weight=1.0)
    expected = latents.double().std(0, correction=0).float()
    torch.testing.assert_close(encoder.latent_std, expected, rtol=1e-6, atol=0)

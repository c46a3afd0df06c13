import json
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from crocodil.models import LatentPrior

B, K, D = 3, 4, 3


@pytest.fixture
def noisy() -> Tensor:
    return torch.randn(B, K, D, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def condition() -> Tensor:
    return torch.randn(B, K, D, generator=torch.Generator().manual_seed(1))


LOG_SNR = torch.tensor([-3.0, 0.0, 4.0])


def distance(x: Tensor, y: Tensor) -> float:
    return (x - y).abs().max().item()


def test_output_is_zero_at_init(noisy: Tensor, condition: Tensor) -> None:
    prior = LatentPrior(num_registers=K, latent_dim=D, hidden_size=16, num_layers=2, num_heads=2)
    assert (prior(noisy, LOG_SNR, self_condition=condition, condition=condition) == 0).all()


def test_blocks_are_the_identity_at_init() -> None:
    prior = LatentPrior(num_registers=K, latent_dim=D, hidden_size=16, num_layers=1, num_heads=2)
    x = torch.randn(B, K, 16)
    assert torch.equal(prior.blocks[0](x, torch.randn(B, 16)), x)


@torch.no_grad()
def test_a_dropped_condition_is_no_condition(make_prior: Callable, noisy: Tensor, condition: Tensor) -> None:
    prior = make_prior()
    conditional, unconditional = prior(noisy, LOG_SNR, condition=condition), prior(noisy, LOG_SNR)
    some = prior(noisy, LOG_SNR, condition=condition, condition_mask=torch.tensor([True, False, True]))
    torch.testing.assert_close(some[1], unconditional[1])
    torch.testing.assert_close(some[[0, 2]], conditional[[0, 2]])
    for row in range(B):
        assert distance(conditional[row], unconditional[row]) > 1e-3
    everyone = prior(noisy, LOG_SNR, condition=condition, condition_mask=torch.ones(B, dtype=torch.bool))
    assert torch.equal(everyone, conditional)


@torch.no_grad()
def test_a_condition_of_zeros_is_still_a_condition(make_prior: Callable, noisy: Tensor) -> None:
    prior = make_prior()
    assert distance(prior(noisy, LOG_SNR, condition=torch.zeros(B, K, D)), prior(noisy, LOG_SNR)) > 1e-3


@torch.no_grad()
def test_self_condition_and_condition_enter_at_different_places(
    make_prior: Callable, noisy: Tensor, condition: Tensor
) -> None:
    prior = make_prior()
    plain, refined = prior(noisy, LOG_SNR), prior(noisy, LOG_SNR, self_condition=condition)
    assert distance(plain, refined) > 1e-3
    assert torch.equal(prior(noisy, LOG_SNR, self_condition=torch.zeros(B, K, D)), plain)
    prior.condition_embedding.zero_()  # else the presence of a condition alone tells them apart
    assert distance(refined, prior(noisy, LOG_SNR, condition=condition)) > 1e-3


@torch.no_grad()
def test_noise_level_matters_up_to_its_clip(make_prior: Callable, noisy: Tensor) -> None:
    prior = make_prior()
    levels = [prior(noisy, torch.full((B,), value)) for value in (-20.0, -10.0, -1.0, -0.5, 1.0, 10.0, 20.0)]
    for lower, upper in pairwise(levels):
        assert distance(lower, upper) > 1e-3
    assert torch.equal(prior(noisy, torch.full((B,), 50.0)), levels[-1])
    assert torch.equal(prior(noisy, torch.full((B,), -50.0)), levels[0])


@torch.no_grad()
def test_registers_see_each_other_and_know_their_number(make_prior: Callable, noisy: Tensor) -> None:
    prior = make_prior()
    output = prior(noisy, LOG_SNR)
    assert output.shape == (B, K, D)
    changed = noisy.clone()
    changed[:, -1] += 1.0
    assert distance(prior(changed, LOG_SNR)[:, 0], output[:, 0]) > 1e-4
    assert distance(prior(noisy.flip(1), LOG_SNR).flip(1), output) > 1e-3


@torch.no_grad()
def test_rows_do_not_see_each_other(make_prior: Callable, noisy: Tensor, condition: Tensor) -> None:
    prior = make_prior()
    together = prior(noisy, LOG_SNR, self_condition=condition, condition=condition)
    for i in range(B):
        row = slice(i, i + 1)
        alone = prior(noisy[row], LOG_SNR[row], self_condition=condition[row], condition=condition[row])
        torch.testing.assert_close(alone[0], together[i])


@torch.no_grad()
def test_its_configuration_rebuilds_it(make_prior: Callable, noisy: Tensor, condition: Tensor) -> None:
    prior = make_prior()
    twin = LatentPrior(**json.loads(json.dumps(prior.to_config())))
    twin.load_state_dict(prior.state_dict(), strict=True)
    assert twin.to_config() == prior.to_config()
    assert torch.equal(twin(noisy, LOG_SNR, condition=condition), prior(noisy, LOG_SNR, condition=condition))


def test_every_weight_gets_a_gradient(make_prior: Callable, noisy: Tensor, condition: Tensor) -> None:
    prior = make_prior()
    prior(noisy, LOG_SNR, self_condition=condition, condition=condition).square().sum().backward()
    for name, weight in prior.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.abs().max() > 0, name


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="num_heads must divide hidden_size, got 3 and 16"):
        LatentPrior(num_registers=K, latent_dim=D, hidden_size=16, num_heads=3)

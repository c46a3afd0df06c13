"""Tiny real networks and toy models with known answers, shared by the tests."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crocodil.models import Demasker, LatentPrior, RegisterEncoder

TINY = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}
VOCAB_SIZE, MASK, EOS = 12, 11, 0
NUM_REGISTERS, LATENT_DIM = 4, 3


def build(make: Callable[[], nn.Module], seed: int, std: float) -> Any:
    """A network with noise on every weight, so that no zero or near-zero initial value hides a path through it."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        network = make().eval()
        for weight in network.parameters():
            weight += std * torch.randn_like(weight)
    return network


@pytest.fixture(scope="session")
def make_demasker() -> Callable[..., Demasker]:
    """Builds a Demasker of 12 tokens (mask 11, end 0), K = 4, in float64; keywords change its network."""

    def make(latent_dim: int | None = LATENT_DIM, mask_token_id: int = MASK, seed: int = 0, **network: Any) -> Demasker:
        settings = {**TINY, "vocab_size": VOCAB_SIZE, **network}
        sizes = {} if latent_dim is None else {"latent_dim": latent_dim, "num_registers": NUM_REGISTERS}
        ids = {"mask_token_id": mask_token_id, "eos_token_id": EOS}
        return build(lambda: Demasker(settings, **ids, **sizes).double(), seed, std=0.4)

    return make


@pytest.fixture(scope="session")
def make_encoder() -> Callable[..., RegisterEncoder]:
    """Builds a RegisterEncoder with K = 4 and D = 3 in float64; keywords change its network."""

    def make(seed: int = 1, **network: Any) -> RegisterEncoder:
        settings = {**TINY, "vocab_size": VOCAB_SIZE, **network}
        sizes = {"num_registers": NUM_REGISTERS, "latent_dim": LATENT_DIM}
        return build(lambda: RegisterEncoder(settings, **sizes).double(), seed, std=0.4)

    return make


@pytest.fixture(scope="session")
def make_prior() -> Callable[..., LatentPrior]:
    """Builds a LatentPrior with K = 4 and D = 3 in float32 whose weights are all away from zero."""

    def make(seed: int = 2) -> LatentPrior:
        sizes = {"num_registers": NUM_REGISTERS, "latent_dim": LATENT_DIM}
        return build(lambda: LatentPrior(**sizes, hidden_size=16, num_layers=2, num_heads=2), seed, std=0.2)

    return make


class TabulatedDemasker:
    """The exact conditionals p(x_i | unmasked tokens) of a joint table over V tokens and L positions.

    Args:
        table: (V, ..., V) float64, one axis a position. The mask is token V; its logit is absurdly high, so that a
            sampler that does not rule it out is found out.
    """

    def __init__(self, table: Tensor) -> None:
        self.table = table / table.sum()
        self.mask_token_id = table.shape[0]
        self.states = torch.cartesian_prod(*[torch.arange(size) for size in table.shape])

    @property
    def joint(self) -> Tensor:
        """(V^L,) probabilities in the order of `states`."""
        return self.table.flatten()

    def __call__(self, token_ids: Tensor, latents: Tensor | None = None, *, positions: Tensor | None = None) -> Tensor:
        known = token_ids[:, None] != self.mask_token_id
        agrees = ((token_ids[:, None] == self.states) | ~known).all(-1)
        weights = agrees * self.joint
        tokens = nn.functional.one_hot(self.states, self.mask_token_id).double()
        marginals = torch.einsum("bn,nlv->blv", weights, tokens) / weights.sum(1)[:, None, None]
        logits = nn.functional.pad(marginals.log(), (0, 1), value=9.0)
        return logits if positions is None else logits.gather(1, positions[..., None].expand(-1, -1, logits.shape[-1]))


@pytest.fixture(scope="session")
def tabulated_demasker() -> type[TabulatedDemasker]:
    """The class `TabulatedDemasker`."""
    return TabulatedDemasker


@pytest.fixture(scope="session")
def chi_square() -> Callable[[Tensor, Tensor], float]:
    """The p-value of Pearson's chi-square test of counts (N,) against probabilities (N,), all above zero."""

    def p_value(counts: Tensor, probabilities: Tensor) -> float:
        expected = probabilities.double() * counts.sum()
        assert expected.min() >= 5, "too few samples for a chi-square test"
        statistic = ((counts - expected) ** 2 / expected).sum()
        return torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2).item()

    return p_value


@pytest.fixture
def count_calls() -> Callable[[nn.Module], list[tuple[Any, ...]]]:
    """`seen = count_calls(module)`: the positional arguments of each later call are appended to `seen`."""

    def watch(module: nn.Module) -> list[tuple[Any, ...]]:
        seen: list[tuple[Any, ...]] = []
        module.register_forward_hook(lambda _, args, __: seen.append(args))
        return seen

    return watch

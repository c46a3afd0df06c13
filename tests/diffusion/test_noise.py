from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from crocodil.diffusion.noise import BatchNoise, RowNoise, mix

GOLDEN, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
SPLITMIX64_OF_SEED_0 = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
U64 = 1 << 64


def signed(value: int) -> int:
    value %= U64
    return value - U64 if value >= U64 // 2 else value


def unmix(value: int) -> int:
    """The inverse of `mix` on unsigned integers: each of its steps is a bijection."""
    value = value ^ (value >> 31) ^ (value >> 62)
    value = value * pow(MIX_2, -1, U64) % U64
    value = value ^ (value >> 27) ^ (value >> 54)
    value = value * pow(MIX_1, -1, U64) % U64
    return value ^ (value >> 30) ^ (value >> 60)


def seed_whose_first_uniform_has_bits(bits: int) -> int:
    """Runs the hash backwards from the first number of stream 0, step 0 to the seed of the row."""
    key = unmix((unmix(bits) - GOLDEN) % U64)
    key = (unmix((key - GOLDEN) % U64) - 3 * GOLDEN) % U64
    return signed(unmix((unmix(key) - GOLDEN) % U64))


def correlation(x: Tensor, y: Tensor) -> float:
    return torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1].item()


def test_mix_is_splitmix64() -> None:
    keys = torch.tensor([signed(GOLDEN * (i + 1)) for i in range(4)])
    assert mix(keys).tolist() == [signed(value) for value in SPLITMIX64_OF_SEED_0]
    assert [unmix(value) for value in SPLITMIX64_OF_SEED_0] == [GOLDEN * (i + 1) % U64 for i in range(4)]


@pytest.mark.parametrize(("bits", "expected"), [(0, 2.0**-53), (U64 - 1, 1 - 2.0**-53)])
def test_uniform_interval_is_open_at_both_ends(bits: int, expected: float) -> None:
    noise = RowNoise(torch.tensor([seed_whose_first_uniform_has_bits(bits)]))
    value = noise.uniform(0, 0, 1).item()
    assert 0 < value < 1
    assert value == expected
    assert noise.normal(0, 0, (1,)).isfinite().all()


def test_uniform_numbers_are_uniform(chi_square: Callable) -> None:
    values = RowNoise(torch.arange(8)).uniform(0, 0, 10_000)
    assert values.shape == (8, 10_000)
    assert values.dtype == torch.float64
    for row in values:
        assert chi_square(torch.histc(row, 100, 0, 1), torch.full((100,), 0.01)) > 1e-4
    pairs = (values[:, ::2] * 10).long() * 10 + (values[:, 1::2] * 10).long()  # neighbours are independent
    assert chi_square(pairs.flatten().bincount(minlength=100), torch.full((100,), 0.01)) > 1e-4


def test_low_bits_of_uniform_numbers_are_random_too(chi_square: Callable) -> None:
    low = (RowNoise(torch.arange(4)).uniform(1, 2, 10_000) * 2.0**52).long() % 64
    assert chi_square(low.flatten().bincount(minlength=64), torch.full((64,), 1 / 64)) > 1e-4


def test_rows_steps_and_streams_are_independent() -> None:
    size = 10_000
    noise = RowNoise(torch.arange(3))
    samples = torch.cat([noise.uniform(stream, step, size) for stream in range(3) for step in range(3)])
    lagged = torch.corrcoef(torch.cat([samples[:, 1:], samples[:, :-1]]))
    assert (lagged - torch.eye(2 * len(samples))).abs().max() < 5 / size**0.5


def test_first_numbers_are_uniform_over_seeds_steps_and_streams(chi_square: Callable) -> None:
    noise = RowNoise(torch.arange(10_000))
    one = RowNoise(torch.tensor([7]))
    firsts = [
        noise.uniform(0, 0, 1),
        torch.cat([one.uniform(0, step, 1) for step in range(1000)]),
        torch.cat([one.uniform(stream, 0, 1) for stream in range(1000)]),
    ]
    for values in firsts:
        assert chi_square(torch.histc(values, 50, 0, 1), torch.full((50,), 0.02)) > 1e-4


def test_normal_numbers_are_standard_normal() -> None:
    size = 100_000
    values = RowNoise(torch.tensor([5])).normal(0, 0, (size,)).double().flatten()
    assert values.mean().item() == pytest.approx(0, abs=4 / size**0.5)
    assert values.var().item() == pytest.approx(1, abs=4 * (2 / size) ** 0.5)
    assert values.pow(3).mean().item() == pytest.approx(0, abs=4 * (15 / size) ** 0.5)
    assert values.pow(4).mean().item() == pytest.approx(3, abs=4 * (96 / size) ** 0.5)
    cdf = torch.special.ndtr(values.sort().values)  # Kolmogorov-Smirnov, 1.95 is the 0.1% point
    assert (cdf - (torch.arange(size) + 0.5) / size).abs().max() < 1.95 / size**0.5


def test_normal_numbers_have_their_shape_and_are_independent() -> None:
    values = RowNoise(torch.arange(2)).normal(3, 1, (50, 400))
    assert values.shape == (2, 50, 400)
    assert values.dtype == torch.float32
    assert abs(correlation(values[0], values[1])) < 5 / 20_000**0.5
    assert abs(correlation(values[:, :, 1:], values[:, :, :-1])) < 5 / 40_000**0.5


def test_a_row_is_bitwise_the_same_alone_and_among_others() -> None:
    seeds = torch.tensor([3, -(2**63), 2**63 - 1, 0, 10**12])
    together = RowNoise(seeds)
    shuffled = RowNoise(seeds.flip(0))
    for i in range(5):
        alone = RowNoise(seeds[i : i + 1])
        for draw in ("uniform", "normal"):
            size = 9 if draw == "uniform" else (3, 3)
            value = getattr(alone, draw)(2, 3, size)[0]
            assert torch.equal(value, getattr(together, draw)(2, 3, size)[i])
            assert torch.equal(value, getattr(shuffled, draw)(2, 3, size)[4 - i])


def test_a_longer_row_of_uniforms_starts_with_the_shorter_one() -> None:
    noise = RowNoise(torch.tensor([1, 2]))
    assert torch.equal(noise.uniform(0, 4, 20)[:, :7], noise.uniform(0, 4, 7))


def test_seeds_from_a_generator_do_not_depend_on_how_a_batch_is_split() -> None:
    def keys(*sizes: int) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return torch.cat([RowNoise.from_generator(generator, n, torch.device("cpu")).keys for n in sizes])

    assert torch.equal(keys(6), keys(1, 2, 3))
    assert len(keys(6).unique()) == 6


def test_without_a_generator_the_global_seed_counts() -> None:
    torch.manual_seed(11)
    first = RowNoise.from_generator(None, 2, torch.device("cpu")).uniform(0, 0, 3)
    second = RowNoise.from_generator(None, 2, torch.device("cpu")).uniform(0, 0, 3)
    torch.manual_seed(11)
    assert torch.equal(first, RowNoise.from_generator(None, 2, torch.device("cpu")).uniform(0, 0, 3))
    assert not torch.equal(first, second)


def test_the_rows_of_a_batch_have_their_noise_wherever_they_are() -> None:
    seed = torch.tensor(2**62)
    whole = BatchNoise(seed, torch.arange(12), 12)
    for rank in range(3):
        part = BatchNoise(seed, torch.arange(4) * 3 + rank, 12)
        assert torch.equal(part.uniform(1, 2, 5), whole.uniform(1, 2, 5)[rank::3])
        assert part.shared(4, 0) == whole.shared(4, 0)
    assert whole.shared(4, 0) != whole.shared(4, 1)
    assert whole.shared(4, 0) != BatchNoise(seed + 100, torch.arange(12), 12).shared(4, 0)

import math
from collections.abc import Callable
from itertools import permutations, product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from crocodil.diffusion.masking import (
    CosineMasking,
    LinearMasking,
    MaskingPoint,
    MaskingSchedule,
    corrupt,
    loss_weights,
    masked_cross_entropy,
    posterior,
    stratified_times,
    token_cross_entropy,
)

SCHEDULES = [LinearMasking(), CosineMasking()]
EXACT_SCHEDULES = [LinearMasking(eps=1e-12), CosineMasking(eps=1e-12)]
Predict = Callable[[Tensor], Tensor]
"""(B, L) token ids with masks to (B, L, V) logits."""


def forward_kernel(kept: Tensor, vocab_size: int, length: int) -> Tensor:
    """P[a, b] from state a to state b in V + 1 states (the last is the mask) a position, positions independent."""
    kernel = kept * torch.eye(vocab_size + 1, dtype=torch.float64)
    kernel[:, -1] += 1 - kept
    return power(kernel, length)


def power(matrix: Tensor, length: int) -> Tensor:
    """The Kronecker power: the same matrix at each of `length` positions."""
    return matrix if length == 1 else torch.kron(matrix, power(matrix, length - 1))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize(("s", "t"), [(0.0, 0.3), (0.2, 0.7), (0.5, 1.0), (0.89, 0.9)])
def test_posterior_is_bayes_rule_on_the_forward_kernel(
    schedule: MaskingSchedule, length: int, s: float, t: float
) -> None:
    vocab_size = 2
    at_s, at_t = (schedule(torch.tensor(time, dtype=torch.float64)) for time in (s, t))
    to_s = forward_kernel(at_s.alpha_t, vocab_size, length)
    to_t = forward_kernel(at_t.alpha_t, vocab_size, length)
    s_to_t = forward_kernel(at_t.alpha_t / at_s.alpha_t, vocab_size, length)
    torch.testing.assert_close(to_s @ s_to_t, to_t)  # the kernels compose, so Bayes' rule may use them

    reveal = posterior(at_t.mask_prob, at_s.mask_prob)
    mask = vocab_size
    for x_0 in product(range(vocab_size), repeat=length):
        for x_t in product(range(vocab_size + 1), repeat=length):
            start, end = state(x_0, vocab_size), state(x_t, vocab_size)
            if to_t[start, end] == 0:
                continue
            for x_s in product(range(vocab_size + 1), repeat=length):
                middle = state(x_s, vocab_size)
                bayes = to_s[start, middle] * s_to_t[middle, end] / to_t[start, end]
                claimed = torch.ones((), dtype=torch.float64)
                for clean, noisy, between in zip(x_0, x_t, x_s, strict=True):
                    if noisy != mask:
                        claimed *= between == noisy
                    else:
                        claimed *= reveal * (between == clean) + (1 - reveal) * (between == mask)
                torch.testing.assert_close(claimed, bayes, rtol=1e-9, atol=1e-12)


def state(tokens: tuple[int, ...], vocab_size: int) -> int:
    """The index of a text among the (V + 1)^L states, in the order of `torch.kron`."""
    index = 0
    for token in tokens:
        index = index * (vocab_size + 1) + token
    return index


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_schedule_derivative_is_that_of_autograd(schedule: MaskingSchedule) -> None:
    t = torch.linspace(0, 1, 41, dtype=torch.float64, requires_grad=True)
    point = schedule(t)
    (derivative,) = torch.autograd.grad(point.alpha_t.sum(), t)
    torch.testing.assert_close(point.d_alpha_t, derivative)
    torch.testing.assert_close(point.elbo_weight, -derivative / (1 - point.alpha_t))
    assert (derivative[:-1] < 0).all()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_schedule_goes_from_eps_to_all_masks(schedule: MaskingSchedule) -> None:
    ends = schedule(torch.tensor([0.0, 1.0], dtype=torch.float64)).mask_prob
    torch.testing.assert_close(ends, torch.tensor([schedule.eps, 1.0], dtype=torch.float64))


def test_schedules_are_those_of_the_papers() -> None:
    t = torch.linspace(0.05, 1, 20, dtype=torch.float64)
    linear, cosine = (schedule(t) for schedule in EXACT_SCHEDULES)
    torch.testing.assert_close(linear.mask_prob, t)
    torch.testing.assert_close(linear.elbo_weight, 1 / t)
    torch.testing.assert_close(cosine.mask_prob, torch.cos(math.pi / 2 * (1 - t)))


def exact_elbo(predict: Predict, x_0: Tensor, mask_token_id: int, schedule: MaskingSchedule) -> float:
    """L times the "elbo" loss of one text, integrated over t by quadrature and summed over all masks."""
    nodes, weights = np.polynomial.legendre.leggauss(24)
    masks = torch.tensor(list(product([False, True], repeat=len(x_0))))
    logits = predict(x_0.masked_fill(masks, mask_token_id))
    total = 0.0
    for t, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        point = schedule(torch.tensor([t]))
        for is_masked, row in zip(masks, logits, strict=True):
            probability = torch.where(is_masked, point.mask_prob, point.alpha_t).prod()
            loss = masked_cross_entropy(token_cross_entropy(row[None], x_0[None]), is_masked[None], point, "elbo")
            total += weight * (probability * loss).item()
    return total * len(x_0)


def mean_sequential_nll(predict: Predict, x_0: Tensor, mask_token_id: int) -> float:
    """The mean over all orders of revealing x_0 token by token of the sum of -log f(x_i | what is revealed)."""
    orders = list(permutations(range(len(x_0))))
    total = 0.0
    for order in orders:
        canvas = torch.full_like(x_0, mask_token_id)
        for i in order:
            total -= predict(canvas[None])[0, i].log_softmax(-1)[x_0[i]].item()
            canvas[i] = x_0[i]
    return total / len(orders)


@pytest.mark.parametrize("schedule", EXACT_SCHEDULES, ids=repr)
@pytest.mark.parametrize("length", [2, 3])
def test_elbo_of_exact_conditionals_is_the_log_likelihood(
    tabulated_demasker: Callable, schedule: MaskingSchedule, length: int
) -> None:
    model = tabulated_demasker(
        torch.rand([3] * length, generator=torch.Generator().manual_seed(length)).double() + 0.05
    )

    def predict(token_ids: Tensor) -> Tensor:
        return model(token_ids)[..., :-1]

    for x_0, probability in zip(model.states[::4], model.joint[::4], strict=True):
        nll = -math.log(probability)
        assert exact_elbo(predict, x_0, 3, schedule) == pytest.approx(nll, rel=1e-6)
        assert mean_sequential_nll(predict, x_0, 3) == pytest.approx(nll, rel=1e-9)


@pytest.mark.parametrize("schedule", EXACT_SCHEDULES, ids=repr)
def test_elbo_of_any_network_is_its_mean_nll_over_orders(make_demasker: Callable, schedule: MaskingSchedule) -> None:
    demasker = make_demasker(latent_dim=None, mask_token_id=3, vocab_size=4)
    nlls = {order: sequential_nll_of(demasker, order) for order in permutations(range(3))}
    assert max(nlls.values()) - min(nlls.values()) > 1e-2  # a wrong model: no joint has these conditionals
    x_0 = torch.tensor([2, 0, 1])
    with torch.no_grad():
        expected = mean_sequential_nll(demasker, x_0, 3)
        assert exact_elbo(demasker, x_0, 3, schedule) == pytest.approx(expected, rel=1e-6)


@torch.no_grad()
def sequential_nll_of(predict: Predict, order: tuple[int, ...]) -> float:
    x_0, canvas, nll = torch.tensor([2, 0, 1]), torch.full((3,), 3), 0.0
    for i in order:
        nll -= predict(canvas[None])[0, i].log_softmax(-1)[x_0[i]].item()
        canvas[i] = x_0[i]
    return nll


@pytest.mark.parametrize("schedule", [LinearMasking(eps=0.2), CosineMasking(eps=0.2)], ids=repr)
def test_eps_cuts_its_share_of_a_one_token_elbo(schedule: MaskingSchedule) -> None:
    logits = torch.tensor([[[0.3, -1.0, 0.5]]], dtype=torch.float64)
    x_0 = torch.tensor([1])
    nll = token_cross_entropy(logits, x_0[None]).item()
    elbo = exact_elbo(lambda token_ids: logits.expand(len(token_ids), 1, 3), x_0, 3, schedule)
    assert elbo == pytest.approx(0.8 * nll, rel=1e-6)  # the integral of -alpha'_t is 1 - eps


def test_masked_cross_entropy_by_hand() -> None:
    probabilities = torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]], [[0.2, 0.2, 0.6], [0.4, 0.4, 0.2]]])
    token_ids = torch.tensor([[0, 1], [2, 0]])
    is_masked = torch.tensor([[True, True], [False, True]])
    point = MaskingPoint(alpha_t=torch.tensor([0.5, 0.2]), d_alpha_t=torch.tensor([-1.0, -2.0]))
    nats = [-math.log(0.5), -math.log(0.8), -math.log(0.4)]
    loss = masked_cross_entropy(token_cross_entropy(probabilities.log(), token_ids), is_masked, point, "none")
    assert loss.item() == pytest.approx(sum(nats) / 3)
    loss = masked_cross_entropy(token_cross_entropy(probabilities.log(), token_ids), is_masked, point, "elbo")
    assert loss.item() == pytest.approx(((nats[0] + nats[1]) * 1 / 0.5 + nats[2] * 2 / 0.8) / 2 / 2)


def test_loss_of_a_batch_without_masks_is_zero() -> None:
    logits, nothing = torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.bool)
    point = LinearMasking()(torch.zeros(2))
    for weight in ("elbo", "none"):
        assert masked_cross_entropy(token_cross_entropy(logits, torch.zeros(2, 3).long()), nothing, point, weight) == 0


def test_cross_entropy_is_taken_in_float32() -> None:
    logits, token_ids = torch.randn(2, 3, 5).bfloat16(), torch.tensor([[0, 1, 2], [3, 4, 0]])
    losses = token_cross_entropy(logits, token_ids)
    assert losses.dtype == torch.float32
    expected = -logits.float().log_softmax(-1).gather(-1, token_ids[..., None]).squeeze(-1)
    torch.testing.assert_close(losses, expected)


def test_corrupt_masks_each_row_at_its_own_rate() -> None:
    length, rates = 1000, torch.tensor([0.0, 0.1, 0.637, 1.0])
    token_ids = torch.arange(4 * length).view(4, length) % 7
    uniform = (torch.randperm(length, generator=torch.Generator().manual_seed(0)) + 0.5).expand(4, -1) / length
    noisy, is_masked = corrupt(token_ids, rates[:, None], uniform, mask_token_id=7)
    assert is_masked.sum(1).tolist() == [0, 100, 637, 1000]
    assert (noisy[is_masked] == 7).all()
    assert (noisy[~is_masked] == token_ids[~is_masked]).all()


def test_stratified_times_hold_one_time_a_bin() -> None:
    for u in torch.linspace(0.001, 0.999, 50, dtype=torch.float64):
        times = stratified_times(u, torch.arange(8), 8)
        assert times.dtype == torch.float32
        assert sorted((times * 8).long().tolist()) == list(range(8))


def test_each_stratified_time_is_uniform() -> None:
    grid = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    times = torch.stack([stratified_times(u, torch.arange(3), 3) for u in grid]).sort(dim=0).values
    torch.testing.assert_close(times.double(), grid[:, None].expand(-1, 3), rtol=0, atol=2 / 400)


def test_parts_of_a_batch_are_stratified_each_for_themselves() -> None:
    index, size = torch.tensor([0, 1, 0, 1, 2, 3]), torch.tensor([2, 2, 4, 4, 4, 4])
    for u in torch.linspace(0.001, 0.999, 20, dtype=torch.float64):
        first, second = stratified_times(u, index, size).split([2, 4])
        assert sorted((first * 2).long().tolist()) == [0, 1]
        assert sorted((second * 4).long().tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("weight", ["elbo", "none"])
def test_weights_are_float32_in_a_run_of_half_precision(weight: Any) -> None:
    is_masked, point = torch.rand(4, 33, generator=torch.Generator().manual_seed(0)) < 0.6, LinearMasking()
    expected = loss_weights(is_masked, point(torch.rand(4, generator=torch.Generator().manual_seed(1))), weight)
    torch.set_default_dtype(torch.bfloat16)
    try:
        times = torch.rand(4, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
        assert torch.equal(loss_weights(is_masked, point(times), weight), expected)
    finally:
        torch.set_default_dtype(torch.float32)

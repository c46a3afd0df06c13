from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from crocodil_callbacks import LossByMaskRatio
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*validation_step")
Rows = list[tuple[int, dict[str, float]]]
NAMES = ("mask_prob", "masked_nats", "num_masked")
ENDS = ["0.000", "0.250", "0.500", "0.750", "1.000"]


def batches(count: int, **columns: Callable[[], Tensor]) -> list[dict[str, Tensor]]:
    torch.manual_seed(0)
    return [
        {"token_ids": torch.ones(6, 3, dtype=torch.int64)} | {f"out_{name}": make() for name, make in columns.items()}
        for _ in range(count)
    ]


def masked(count: int, high: float = 1.0) -> list[dict[str, Tensor]]:
    return batches(
        count,
        mask_prob=lambda: torch.rand(40) * high,
        masked_nats=lambda: torch.rand(40) * 9,
        num_masked=lambda: torch.randint(0, 4, (40,)),
    )


def test_bins_are_those_of_a_loop(toy: Any, train: Callable[..., Rows]) -> None:
    data = masked(6)
    rows = train(toy(), data, LossByMaskRatio(4), log_every_n_steps=3)
    assert [step for step, _ in rows] == [2, 5]
    for (_, figures), part in zip(rows, (data[:3], data[3:]), strict=True):
        expected = {}
        for low, high in pairwise(ENDS):
            nats = tokens = 0.0
            for batch in part:
                for ratio, loss, number in zip(*(batch[f"out_{n}"] for n in NAMES), strict=True):
                    if float(low) <= ratio < float(high):
                        nats, tokens = nats + loss.item(), tokens + number.item()
            expected[f"nats_at_mask_{low}-{high}"] = nats / tokens
        assert figures == pytest.approx(expected)


def test_empty_bins_are_not_logged_even_if_they_were_before(toy: Any, train: Callable[..., Rows]) -> None:
    first, second = train(toy(), masked(1) + masked(1, high=0.4), LossByMaskRatio(2))
    assert len(first[1]) == 2 and list(second[1]) == ["nats_at_mask_0.000-0.500"]


def test_a_mask_ratio_of_one_is_in_the_last_bin(toy: Any, train: Callable[..., Rows]) -> None:
    data = masked(1)
    data[0]["out_mask_prob"].fill_(1.0)
    assert list(train(toy(), data, LossByMaskRatio(2))[0][1]) == ["nats_at_mask_0.500-1.000"]


def test_a_prior_has_bins_of_log_snr(toy: Any, train: Callable[..., Rows]) -> None:
    row_losses = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    log_snr = torch.tensor([-30.0, -4.0, -0.5, 0.5, 4.0, 30.0])
    data = batches(1, row_losses=lambda: row_losses, log_snr=lambda: log_snr)
    [(_, figures)] = train(toy(), data, LossByMaskRatio(2, (-4.0, 4.0)))
    assert figures == pytest.approx({"loss_at_log_snr_-4.0_to_+0.0": 7 / 3, "loss_at_log_snr_+0.0_to_+4.0": 56 / 3})


def test_other_stages_and_bad_arguments_are_refused(toy: Any, train: Callable[..., Rows]) -> None:
    with pytest.raises(ValueError, match="expects a stage whose training step returns mask_prob or log_snr, got only"):
        train(toy(), batches(1), LossByMaskRatio())
    with pytest.raises(ValueError, match="num_bins must be at least 1, got 0"):
        LossByMaskRatio(0)
    with pytest.raises(ValueError, match="low < high, got"):
        LossByMaskRatio(log_snr_range=(1.0, 1.0))

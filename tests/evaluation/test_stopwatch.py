import time

import pytest
import torch
from torch import nn

from crocodil.evaluation.stopwatch import Stopwatch


def test_parts_add_up_over_calls() -> None:
    class Slow(nn.Module):
        mask_token_id = 3

        def forward(self, seconds: float) -> float:
            time.sleep(seconds)
            return seconds

    watch = Stopwatch(torch.device("cpu"))
    slow, fast = watch.timed("slow", Slow()), watch.timed("fast", Slow())
    assert slow(0.05) == 0.05 and slow(0.05) == 0.05 and fast(0.02) == 0.02
    time.sleep(0.03)
    read = watch.read()
    assert read.keys() == {"total", "slow", "fast"}
    assert read["slow"] == pytest.approx(0.1, abs=0.02)
    assert read["fast"] == pytest.approx(0.02, abs=0.01)
    assert read["total"] >= read["slow"] + read["fast"] + 0.03
    assert slow.mask_token_id == 3

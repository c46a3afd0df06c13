from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from crocodil_callbacks import Throughput
from crocodil_callbacks.throughput import count_tokens_and_texts
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*validation_step")
Rows = list[tuple[int, dict[str, float]]]
ROWS = 4
FLOPS = ROWS * 2 * (9 + 3 + 9 + 3 + 3)  # two products, the gradients of both weights, and of the first result


class Clock:
    """A time that passes only where a test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


BATCH = {
    "token_ids": torch.ones(ROWS, 3, dtype=torch.int64),
    "document_ids": torch.tensor([[1, 1, 2], [1, 0, 0], [0, 0, 0], [1, 2, 3]]),
}


class Batches(torch.utils.data.IterableDataset):
    """Each batch takes half a second to come, and has 7 tokens of 6 texts in 12 positions."""

    def __init__(self, clock: Clock, count: int) -> None:
        self.clock, self.count = clock, count

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for _ in range(self.count):
            self.clock.now += 0.5
            yield BATCH

    def __len__(self) -> int:
        return self.count


class SlowSaves(L.Callback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        self.clock.now += 1000


@pytest.fixture
def slow(toy: Any) -> Callable[..., Any]:
    """A stage whose steps take 50 seconds until it is warm, then 2, and 3 in the end; a held-out batch takes 100."""

    class Slow(toy):
        def __init__(self, clock: Clock, warmup: int = 0, end: int = 100) -> None:
            super().__init__()
            self.clock, self.warmup, self.end = clock, warmup, end

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.clock.now += 50 if batch_idx < self.warmup else 2 if batch_idx < self.end else 3
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.clock.now += 100

    return Slow


def loader(clock: Clock, count: int) -> Any:
    return torch.utils.data.DataLoader(Batches(clock, count), batch_size=None)


def test_tokens_and_seconds_by_hand(slow: Any, train: Callable[..., Rows]) -> None:
    clock = Clock()
    rows = train(slow(clock, 3, end=4), loader(clock, 11), Throughput(3, clock=clock), log_every_n_steps=4)
    assert [step for step, _ in rows] == [3, 7]  # the first with one step behind the warm-up, the second with four
    for (_, figures), seconds in zip(rows, (2.5, 3.5), strict=True):
        assert figures == pytest.approx(
            {
                "tokens_per_second": 7 / seconds,
                "texts_per_second": 6 / seconds,
                "padding_share": 5 / 12,
                "step_seconds": seconds,
                "data_wait_share": 0.5 / seconds,
            }
        )


def test_validation_and_checkpoints_are_no_training(slow: Any, train: Callable[..., Rows], tmp_path: Path) -> None:
    """Behind each of them one wait for data, too, is left out."""
    clock = Clock()
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1)
    options = {"val_check_interval": 3, "limit_val_batches": 1, "enable_checkpointing": True, "log_every_n_steps": 8}
    callbacks = [Throughput(1, clock=clock), SlowSaves(clock), saves]
    [(_, figures)] = train(slow(clock, 1), loader(clock, 8), *callbacks, **options)
    seconds = 7 * 2 + (7 - 3) * 0.5  # after steps 3, 5 and 6
    assert clock.now > 1000
    assert figures["step_seconds"] == pytest.approx(seconds / 7)
    assert figures["data_wait_share"] == pytest.approx(2 / seconds)
    assert figures["tokens_per_second"] == pytest.approx(7 * 7 / seconds)


def test_a_step_is_all_its_batches(slow: Any, train: Callable[..., Rows]) -> None:
    clock = Clock()
    callback = Throughput(1, clock=clock)
    rows = train(slow(clock), loader(clock, 9), callback, accumulate_grad_batches=3, log_every_n_steps=3)
    assert [figures["step_seconds"] for _, figures in rows] == pytest.approx([7.5])
    assert rows[0][1]["texts_per_second"] == pytest.approx(6 / 2.5)


def test_without_document_ids_a_row_is_a_text_and_all_tokens_count() -> None:
    assert count_tokens_and_texts({"token_ids": torch.zeros(5, 7, dtype=torch.int64)}).tolist() == [35, 5]
    assert count_tokens_and_texts(BATCH).tolist() == [7, 6]


def test_counted_flops_by_hand(slow: Any, train: Callable[..., Rows]) -> None:
    clock = Clock()
    callback = Throughput(1, peak_flops=1000, clock=clock)
    [(_, figures)] = train(slow(clock), loader(clock, 3), callback, log_every_n_steps=3)
    assert figures["flop_utilisation"] == pytest.approx(FLOPS / 2.5 / 1000)


def test_recomputation_is_not_counted(slow: Any, train: Callable[..., Rows]) -> None:
    class Checkpointed(slow):
        def row_losses(self, token_ids: Tensor) -> Tensor:
            return checkpoint(super().row_losses, token_ids, use_reentrant=False)

    clock = Clock()
    callback = Throughput(1, peak_flops=1000, clock=clock)
    [(_, figures)] = train(Checkpointed(clock), loader(clock, 3), callback, log_every_n_steps=3)
    assert figures["flop_utilisation"] == pytest.approx(FLOPS / 2.5 / 1000)


def test_networks_are_compiled_after_the_count(slow: Any, train: Callable[..., Rows]) -> None:
    """Within the counter the compiler would give a network up for good."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    class Compiled(slow):
        def on_fit_start(self) -> None:
            self.row_losses = torch.compile(self.row_losses, backend=backend)

    clock = Clock()
    callback = Throughput(2, peak_flops=1000, clock=clock)
    [(_, figures)] = train(Compiled(clock), loader(clock, 3), callback, log_every_n_steps=3)
    assert len(graphs) == 1
    assert figures["flop_utilisation"] == pytest.approx(FLOPS / 2.5 / 1000)


def test_the_counter_does_not_outlive_an_error(slow: Any, train: Callable[..., Rows]) -> None:
    class Broken(slow):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise KeyboardInterrupt

    clock = Clock()
    callback = Throughput(1, peak_flops=1000, clock=clock)
    with pytest.raises(SystemExit):
        train(Broken(clock), loader(clock, 3), callback)
    assert torch.utils._python_dispatch._get_current_dispatch_mode_stack() == []


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="warmup_steps must be at least 1, got 0"):
        Throughput(0)
    with pytest.raises(ValueError, match="peak_flops must be at least 1, got 0"):
        Throughput(peak_flops=0)

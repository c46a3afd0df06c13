import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from crocodil_callbacks import StopAtNonFinite
from crocodil_callbacks.stop_at_nonfinite import bad_rows
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*validation_step", "ignore:Checkpoint dir"
)
Batches = list[dict[str, Tensor]]
LOSS, GRADIENT = 99, 0


def batches(count: int, bad_batch: int | None = None, value: int = LOSS) -> Batches:
    generator = torch.Generator().manual_seed(0)
    found = [{"token_ids": torch.randint(1, 9, (4, 3), generator=generator)} for _ in range(count)]
    if bad_batch is not None:
        found[bad_batch]["token_ids"][[1, 3]] = value
    return found


class Before(L.Callback):
    """All that a checkpoint holds of module and optimizer, as it was when the last optimizer step began."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.module, self.trainer = pl_module, trainer
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.state = self.now()

    def now(self) -> dict[str, Tensor]:
        (optimizer,) = self.trainer.optimizers
        states = {f"{i}.{name}": value for i, s in enumerate(optimizer.state.values()) for name, value in s.items()}
        return {name: value.clone() for name, value in {**self.module.state_dict(), **states}.items()}


def stopped(train: Callable[..., Any], module: Any, data: Batches, *callbacks: Any, **options: Any) -> tuple[str, Any]:
    before = Before()
    with pytest.raises(FloatingPointError) as error:
        train(module, data, before, StopAtNonFinite(), *callbacks, **options)
    return str(error.value), before


@pytest.mark.parametrize("value", [LOSS, GRADIENT])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_nothing_of_the_bad_step_stays(value: int, clip: float | None, toy: Any, train: Callable[..., Any]) -> None:
    """Not in the weights, nor in the optimizer's averages and step count, nor in the buffers."""
    message, before = stopped(train, toy(), batches(6, 3, value), gradient_clip_val=clip)
    assert message.startswith("training stopped at step 4: ")
    assert len(before.state) > 5
    torch.testing.assert_close(before.now(), before.state, rtol=0, atol=0)
    good = Before()
    train(toy(), batches(3), good, gradient_clip_val=clip)
    torch.testing.assert_close(before.now(), good.now(), rtol=0, atol=0)  # and all that came before does


def test_the_sentence_names_loss_rows_and_weights(toy: Any, train: Callable[..., Any]) -> None:
    message, before = stopped(train, toy(), batches(3, 1))
    assert "the loss is -inf; texts without a finite loss: row 1, row 3;" in message
    largest = max(weight.abs().max().item() for weight in before.module.parameters())
    assert f"the largest weight is {largest:.4g}." in message
    message, _ = stopped(train, toy(), batches(3, 1, GRADIENT))
    assert "but the gradient norm is nan; texts without a finite loss: none known;" in message
    loss = toy().row_losses(batches(1, 0, GRADIENT)[0]["token_ids"]).mean().item()
    message, _ = stopped(train, toy(), batches(1, 0, GRADIENT))
    assert f"the loss is {loss:.4g}, but" in message


class Named(L.LightningDataModule):
    def __init__(self, data: Batches) -> None:
        super().__init__()
        self.data = data

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(self.data, batch_size=None)

    def describe(self, origin: tuple[int, int]) -> str:
        return f"file {origin[0]}, block {origin[1]}"


def test_rows_are_named_by_the_data_module(toy: Any, tmp_path: Path) -> None:
    data = batches(2, 1)
    data[1]["origins"] = torch.tensor([[0, 0], [7, 3], [0, 1], [9, 2]])
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(**options, max_steps=9, default_root_dir=tmp_path, callbacks=[StopAtNonFinite()])
    with pytest.raises(FloatingPointError, match=r"file 7, block 3 \(row 1\), file 9, block 2 \(row 3\);"):
        trainer.fit(toy(), datamodule=Named(data))


def test_texts_of_packed_rows_are_told_by_their_rows() -> None:
    batch = {"token_ids": torch.ones(3, 4), "document_ids": torch.tensor([[1, 1, 2, 0], [1, 2, 3, 3], [1, 1, 1, 0]])}
    losses = torch.zeros(6)
    losses[[1, 4]] = math.inf  # the last text of the first row and of the second
    assert bad_rows({"row_losses": losses}, batch) == [0, 1]
    assert bad_rows({"masked_nats": torch.tensor([0.0, math.nan, 0.0])}, batch) == [1]
    assert bad_rows({}, batch) == []


def test_the_batch_can_be_replayed(toy: Any, train: Callable[..., Any], tmp_path: Path) -> None:
    data = batches(5, 3)
    data[3] |= {"document_ids": torch.ones(4, 3, dtype=torch.int64), "origins": torch.zeros(4, 2, dtype=torch.int64)}
    message, _ = stopped(train, toy(), data)
    path = tmp_path / "nonfinite-step-4.safetensors"
    assert f"The batch is in {path}, and" in message
    content = load_file(path)
    assert content.keys() == data[3].keys()
    assert not toy().training_step(content, 3)["loss"].isfinite()
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"step": "4", "batch_idx": "3"}


@pytest.mark.parametrize("bad_batch", [2, 3])
def test_among_summed_batches(bad_batch: int, toy: Any, train: Callable[..., Any], tmp_path: Path) -> None:
    """The bad one is found and named even if it is not the last of its step; the loss is its own, not its part."""
    message, before = stopped(train, toy(), batches(6, bad_batch), accumulate_grad_batches=2)
    assert message.startswith("training stopped at step 2: the loss is -inf; texts without a finite loss: row 1, row 3")
    torch.testing.assert_close(before.now(), before.state, rtol=0, atol=0)
    with safe_open(tmp_path / "nonfinite-step-2.safetensors", "pt") as file:
        assert file.metadata()["batch_idx"] == str(bad_batch)


def test_the_loss_of_summed_batches_is_whole(toy: Any, train: Callable[..., Any]) -> None:
    data = batches(2, 1, GRADIENT)
    loss = toy().row_losses(data[1]["token_ids"]).mean().item()
    message, _ = stopped(train, toy(), data, accumulate_grad_batches=2)
    assert f"the loss is {loss:.4g}, but the gradient norm is nan" in message


@pytest.mark.parametrize("value", [LOSS, GRADIENT])
def test_the_last_checkpoint_is_the_one_before(value: int, toy: Any, train: Callable[..., Any], tmp_path: Path) -> None:
    """Neither the step's own checkpoint is written, nor one because of the error."""
    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, save_on_exception=True)
    _, before = stopped(train, toy(), batches(5, 2, value), saves, enable_checkpointing=True)
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {"step=1.ckpt", "step=2.ckpt"}
    content = torch.load(tmp_path / "step=2.ckpt", weights_only=True)
    torch.testing.assert_close(content["state_dict"], dict(before.module.state_dict()), rtol=0, atol=0)


def test_a_gradient_without_a_number_is_the_scalers_under_float16(toy: Any, train: Callable[..., Any]) -> None:
    """It skips the step and lowers its factor; a loss that is not finite still ends the run."""
    scaler = torch.amp.GradScaler("cpu")
    plugins = [MixedPrecision("16-mixed", "cpu", scaler)]
    train(toy(), batches(3, 1, GRADIENT), StopAtNonFinite(), plugins=plugins)
    assert scaler.get_scale() == 2**15
    message, before = stopped(train, toy(), batches(3, 1), plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert "training stopped at step 2: the loss is -inf" in message
    torch.testing.assert_close(before.now(), before.state, rtol=0, atol=0)


def test_a_finite_run_is_the_same_with_it(toy: Any, train: Callable[..., Any]) -> None:
    with_it, without = Before(), Before()
    train(toy(), batches(5), with_it, StopAtNonFinite(), gradient_clip_val=1.0)
    train(toy(), batches(5), without, gradient_clip_val=1.0)
    torch.testing.assert_close(with_it.now(), without.now(), rtol=0, atol=0)

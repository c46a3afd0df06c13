from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from crocodil_callbacks import EMA
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

Weights = dict[str, Tensor]
pytestmark = pytest.mark.filterwarnings("ignore:Found .* in eval mode", "ignore:Checkpoint dir")


def weights(module: Any) -> Weights:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


class Watch(Callback):
    """Keeps the trainable weights at each point of a fit; runs behind EMA."""

    def __init__(self) -> None:
        self.before: list[Weights] = []
        self.after: list[Weights] = []
        self.in_validation: list[Weights] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before.append(weights(pl_module))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.after.append(weights(pl_module))

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.in_validation.append(weights(pl_module))


def assert_close(one: Weights, other: Weights) -> None:
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def assert_same(one: Weights, other: Weights) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def averages(watch: Watch, decays: list[float]) -> list[Weights]:
    """The averages after each step by the definition, in float64."""
    average = {name: value.double() for name, value in watch.before[0].items()}
    found = []
    for decay, raw in zip(decays, watch.after, strict=True):
        average = {name: decay * average[name] + (1 - decay) * raw[name].double() for name in raw}
        found.append({name: value.float() for name, value in average.items()})
    return found


@pytest.mark.parametrize(
    ("decay", "decays"), [(0.999, [1 / 10, 2 / 11, 3 / 12]), (0.15, [0.1, 0.15, 0.15]), (0.0, [0] * 3)]
)
def test_the_average_by_hand(
    decay: float, decays: list[float], tiny_system: Any, fit: Callable[..., list[float]]
) -> None:
    module, ema, watch = tiny_system.module("demasker"), EMA(decay), Watch()
    fit(module, tiny_system.data(), ema, watch)
    assert_close(ema.averages, averages(watch, decays)[-1])
    assert_same(weights(module), ema.averages)  # what is left behind is the average
    if decay:
        assert (module.demasker.network.lm_head.weight - watch.after[-1]["demasker.network.lm_head.weight"]).any()


def test_validation_uses_the_average_and_gives_the_weights_back(
    tiny_system: Any, fit: Callable[..., list[float]]
) -> None:
    module, watch = tiny_system.module("demasker"), Watch()
    options = {"limit_val_batches": 1, "val_check_interval": 1, "check_val_every_n_epoch": None}
    fit(module, tiny_system.data(), EMA(), watch, **options)
    for used, average in zip(watch.in_validation, averages(watch, [1 / 10, 2 / 11, 3 / 12]), strict=True):
        assert_close(used, average)
    assert_same(watch.before[1], watch.after[0])
    assert_same(watch.before[2], watch.after[1])
    plain = Watch()
    fit(tiny_system.module("demasker"), tiny_system.data(), plain)
    assert_same(plain.after[2], watch.after[2])  # averaging does not change the training


def test_the_checkpoint_holds_the_average_and_beside_it_the_weights(
    tiny_system: Any, fit: Callable[..., list[float]], tmp_path: Path
) -> None:
    watch, saves = Watch(), ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    fit(tiny_system.module("demasker"), tiny_system.data(), EMA(), watch, saves, enable_checkpointing=True)
    content = torch.load(tmp_path / "step=2.ckpt", weights_only=True)
    assert_close(content["state_dict"], averages(watch, [1 / 10, 2 / 11, 3 / 12])[1])
    assert_same(content["ema"]["raw"], watch.after[1])


def test_a_checkpoint_saved_within_validation_holds_the_same(
    tiny_system: Any, fit: Callable[..., list[float]], tmp_path: Path
) -> None:
    watch, saves = Watch(), ModelCheckpoint(tmp_path, "{step}", monitor="val_loss")
    options = {"limit_val_batches": 1, "val_check_interval": 2, "check_val_every_n_epoch": None}
    fit(tiny_system.module("demasker"), tiny_system.data(), EMA(), watch, saves, enable_checkpointing=True, **options)
    content = torch.load(tmp_path / "step=2.ckpt", weights_only=True)
    assert_close(content["state_dict"], averages(watch, [1 / 10, 2 / 11, 3 / 12])[1])
    assert_same(content["ema"]["raw"], watch.after[1])


@pytest.mark.parametrize("stage", ["demasker", "prior"])
def test_an_accumulating_fit_goes_on_bitwise(
    stage: str, tiny_system: Any, fit: Callable[..., list[float]], tmp_path: Path
) -> None:
    """One update an optimizer step, not one a batch, and none for the first batch after a resumption."""

    def run(ckpt_path: Path | None = None) -> EMA:
        ema, saves = EMA(), ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
        options = {"enable_checkpointing": True, "accumulate_grad_batches": 2, "max_steps": 4, "ckpt_path": ckpt_path}
        fit(tiny_system.module(stage), tiny_system.data(), ema, saves, **options)
        return ema

    whole, resumed = run(), run(tmp_path / "step=2.ckpt")
    assert whole.num_updates == resumed.num_updates == 4
    assert_same(resumed.averages, whole.averages)


def test_frozen_parameters_are_left_alone(tiny_system: Any, fit: Callable[..., list[float]]) -> None:
    module, ema = tiny_system.module("demasker"), EMA()
    frozen = module.demasker.network.get_input_embeddings().weight.requires_grad_(False)
    before = frozen.clone()
    fit(module, tiny_system.data(), ema)
    assert set(ema.averages) == {name for name, p in module.named_parameters() if p is not frozen}
    assert torch.equal(frozen, before)
    ema = EMA()
    fit(tiny_system.module("prior"), tiny_system.data(), ema)
    assert all(name.startswith("prior.") for name in ema.averages)


def test_a_checkpoint_without_averages_starts_them(
    tiny_system: Any, fit: Callable[..., list[float]], tmp_path: Path
) -> None:
    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
    fit(tiny_system.module("demasker"), tiny_system.data(), saves, enable_checkpointing=True)
    ema, watch = EMA(), Watch()
    fit(tiny_system.module("demasker"), tiny_system.data(), ema, watch, max_steps=4, ckpt_path=tmp_path / "step=3.ckpt")
    saved = torch.load(tmp_path / "step=3.ckpt", weights_only=True)["state_dict"]
    assert_same(watch.before[0], saved)
    assert_close(ema.averages, averages(watch, [1 / 10])[0])


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_out_of_range_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=rf"in \[0, 1\), got {decay}"):
        EMA(decay)

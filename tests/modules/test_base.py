from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from crocodil_callbacks import EMA
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

STAGES = ("demasker", "autoencoder", "prior", "judge")
pytestmark = pytest.mark.filterwarnings("ignore:.*overfit", "ignore:Found .* in eval mode", "ignore:Checkpoint dir")
NOISY = ("demasker", "autoencoder", "prior")


def heard(stage: str) -> dict[str, Any]:
    """A fresh prior says 0 to any input: of its losses, only the noise prediction's tells of the noise."""
    return {"prediction_type": "eps"} if stage == "prior" else {}


def standing_still(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.0)


@pytest.mark.parametrize("stage", NOISY)
def test_noise_is_a_function_of_seed_and_step(stage: str, tiny_system: Any, fit: Callable[..., list[float]]) -> None:
    """On one batch and with weights that never move, losses differ by their noise alone."""

    def losses(seed: int) -> list[float]:
        module = tiny_system.module(stage, optimizer=standing_still, seed=seed, **heard(stage))
        if stage == "autoencoder":
            module.encoder.update_statistics = lambda latents, weight: None
        return fit(module, tiny_system.data(), overfit_batches=1)

    first = losses(0)
    assert losses(0) == first
    assert len({*first, *losses(1)}) == 6


@pytest.mark.parametrize("seed", [0, 2**40])
def test_every_row_of_every_micro_batch_has_noise_of_its_own(
    seed: int, tiny_system: Any, fit: Callable[..., list[float]]
) -> None:
    class Keys(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.extend(pl_module.training_noise(batch).keys.tolist())
            seen.extend(pl_module.held_out_noise(batch, batch_idx).keys.tolist())

    seen: list[int] = []
    fit(tiny_system.module("demasker", seed=seed), tiny_system.data(), Keys(), accumulate_grad_batches=2)
    assert len(seen) == len(set(seen)) == 3 * 2 * 2 * 8


@pytest.mark.parametrize("stage", ["demasker", "prior"])
def test_held_out_noise_is_the_same_at_every_evaluation(stage: str, tiny_system: Any) -> None:
    module = tiny_system.module(stage, **heard(stage)).eval()
    batch = next(iter(tiny_system.data().val_dataloader()))
    with torch.no_grad():
        first, again, other = (module.evaluate(batch, module.held_out_noise(batch, i)) for i in (0, 0, 1))
    assert first == again
    assert all(first[name] != other[name] for name in first if name != "accuracy")


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_fit_equals_an_uninterrupted_one(
    stage: str, tiny_system: Any, fit: Callable[..., list[float]], tmp_path: Path
) -> None:
    """Three batches an epoch, five steps; resumed within the first epoch, at its end and within the second.

    Weights, averages, optimizer state and losses are equal bit for bit.
    """

    def run(start: int = 0) -> tuple[list[float], dict[str, Any]]:
        module = tiny_system.module(stage)
        torch.manual_seed(start)  # the global generator must not matter
        saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, enable_version_counter=False)
        options = {"enable_checkpointing": True, "max_steps": 5, "gradient_clip_val": 1.0}
        ckpt_path = tmp_path / f"step={start}.ckpt" if start else None
        losses = fit(module, tiny_system.data(100), EMA(0.5), saves, ckpt_path=ckpt_path, **options)
        saved = torch.load(tmp_path / "step=5.ckpt", weights_only=True)
        return losses, {
            "state": saved["optimizer_states"][0]["state"],
            "weights": saved["state_dict"],
            "ema": saved["ema"],
        }

    losses, content = run()
    for start in (4, 3, 1):
        resumed_losses, resumed_content = run(start)
        assert resumed_losses == losses[start:]
        torch.testing.assert_close(resumed_content, content, rtol=0, atol=0)


def test_a_checkpoint_of_another_stage_is_not_gone_on_from(tiny_system: Any, fit: Callable[..., list[float]]) -> None:
    with pytest.raises(ValueError, match="expected a checkpoint of the demasker stage, got one of the judge stage"):
        fit(tiny_system.module("demasker"), tiny_system.data(), ckpt_path=tiny_system.checkpoint("judge"))


def test_only_what_is_asked_for_is_compiled(tiny_system: Any) -> None:
    for compile in (False, True):
        module = tiny_system.module("prior", compile=compile)
        module.on_fit_start()
        compiled = [name for name, part in module.named_children() if part._compiled_call_impl is not None]
        assert compiled == (["prior"] if compile else [])

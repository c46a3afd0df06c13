"""An exponential moving average of the trained weights."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from crocodil.modules import ShardedStrategy
from crocodil.modules.sharded_checkpoint import load_sharded

_KEY = "ema"


class EMA(L.Callback):
    """Averages the trainable parameters, w_ema <- decay w_ema + (1 - decay) w, after every optimizer step.

    Validation, testing and the `state_dict` of a checkpoint use the average; the raw weights, from which training goes
    on, travel in an entry of their own. Frozen parameters are left alone and cost nothing, and of sharded parameters
    each process averages its shards.

    Args:
        decay: in [0, 1). It rises to this value as (1 + n) / (10 + n) over the first n steps.

    Raises:
        ValueError: if the decay is out of range.
    """

    weight_copies = 1  # of the trained weights, kept on the device; `crocodil plan` adds them up

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"the EMA's decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.num_updates = 0
        self.averages: dict[str, Tensor] = {}
        self._raw: dict[str, Tensor] | None = None
        self._restored: dict[str, Tensor] | None = None
        self._step = 0

    def _parameters(self, module: L.LightningModule) -> dict[str, Tensor]:
        return {name: p.data for name, p in module.named_parameters() if p.requires_grad}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts from the current weights, which are the restored average if a checkpoint was loaded.

        Training then goes on from the raw weights and a step, both of which are known only now.
        """
        parameters = self._parameters(pl_module)
        self.averages = {name: p.clone() for name, p in parameters.items()}
        if self._restored is not None:
            self._copy(self._restored, parameters)
            self._restored = None
        self._step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Updates the average, once for each optimizer step."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        parameters = self._parameters(pl_module)
        torch._foreach_lerp_(list(self.averages.values()), list(parameters.values()), 1 - decay)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Swaps the average in."""
        if self.averages:
            parameters = self._parameters(pl_module)
            self._raw = {name: p.clone() for name, p in parameters.items()}
            self._copy(self.averages, parameters)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Swaps the raw weights back."""
        if self._raw is not None:
            self._copy(self._raw, self._parameters(pl_module))
            self._raw = None

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leaves the average in the module: what is tested or exported in the same process is the average, too."""
        self._copy(self.averages, self._parameters(pl_module))

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Puts the average into the checkpoint's `state_dict` and the raw weights beside it."""
        weights = checkpoint["state_dict"]
        raw = self._raw or {name: weights[name] for name in self.averages}
        checkpoint[_KEY] = {"num_updates": self.num_updates}
        weights.update({name: average.clone() for name, average in self.averages.items()})
        if isinstance(trainer.strategy, ShardedStrategy):  # it shards the `state_dict` alone
            weights.update({f"{_KEY}.raw.{name}": value for name, value in raw.items()})
        else:
            checkpoint[_KEY]["raw"] = dict(raw)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Takes the raw weights back, which go into the module when training starts."""
        if _KEY not in checkpoint:
            return
        self.num_updates = checkpoint[_KEY]["num_updates"]
        if isinstance(trainer.strategy, ShardedStrategy):
            self._restored = {name: p.clone() for name, p in self._parameters(pl_module).items()}
            raw = {f"{_KEY}.raw.{name}": value for name, value in self._restored.items()}
            load_sharded(Path(str(trainer.ckpt_path)), {"state_dict": raw})
        else:
            self._restored = checkpoint[_KEY]["raw"]

    @staticmethod
    def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
        for name, value in target.items():
            value.copy_(source[name])

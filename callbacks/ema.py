"""An exponential moving average of the trained weights."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

_KEY = "ema"


class EMA(L.Callback):
    """Averages the trainable parameters, w_ema <- decay w_ema + (1 - decay) w, after every optimizer step.

    Validation, testing and the `state_dict` of a checkpoint use the average; the raw weights, from which training goes
    on, travel in an entry of their own. Frozen parameters are left alone and cost nothing.

    Args:
        decay: in [0, 1). It rises to this value as (1 + n) / (10 + n) over the first n steps.

    Raises:
        ValueError: if the decay is out of range.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"the EMA's decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.num_updates = 0
        self.averages: dict[str, Tensor] = {}
        self._raw: dict[str, Tensor] | None = None
        self._step = 0

    def _parameters(self, module: L.LightningModule) -> dict[str, Tensor]:
        return {name: p.data for name, p in module.named_parameters() if p.requires_grad}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts from the current weights, or from the restored average."""
        parameters = self._parameters(pl_module)
        if not self.averages:
            self.averages = {name: p.clone() for name, p in parameters.items()}
        else:
            self.averages = {name: self.averages[name].to(p.device) for name, p in parameters.items()}
        if (
            self._raw is not None
        ):  # a checkpoint was loaded: its state_dict is the average, training needs the raw weights
            self._copy(self._raw, parameters)
            self._raw = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes the step that training goes on from, which is known only now."""
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
        checkpoint[_KEY] = {"raw": dict(raw), "num_updates": self.num_updates}
        weights.update({name: average.clone() for name, average in self.averages.items()})

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Takes both back; the raw weights go into the module when training starts."""
        if _KEY in checkpoint:
            self._raw = checkpoint[_KEY]["raw"]
            self.num_updates = checkpoint[_KEY]["num_updates"]
            self.averages = {name: checkpoint["state_dict"][name].clone() for name in self._raw}

    @staticmethod
    def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
        torch._foreach_copy_(list(target.values()), [source[name] for name in target])

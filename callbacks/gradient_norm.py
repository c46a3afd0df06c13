"""How large the gradients are, and how often they are clipped."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from crocodil_callbacks.log_points import AtLogPoints, steps_between_log_points
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer


class GradientNorm(AtLogPoints):
    """The 2-norm of the gradient that the optimizer is about to use, before clipping.

    Taken of the gradient as summed over batches and processes, free of the scale of float16 training, in shards or
    whole. Logged over the optimizer steps since the last log point: `gradient_norm` and `gradient_norm_NETWORK`
    (demasker, encoder, prior; those that are trained), means; `gradient_norm_max`; and `gradient_clipped_share`, the
    share of steps whose norm was above `Trainer.gradient_clip_val`, if it clips norms.

    Under float16 the scaler skips steps whose gradient overflowed; their norms are not finite and show in the figures.
    """

    def __init__(self) -> None:
        self._parameters: dict[str, list[nn.Parameter]] = {}
        self._norms: list[Tensor] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Finds the networks that are trained."""
        super().on_train_start(trainer, pl_module)
        self._parameters = trained_parameters(pl_module)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Takes the norms: Lightning calls this after unscaling and before clipping."""
        if steps_between_log_points(trainer):
            norms = [gradient_norm(parameters, pl_module.device) for parameters in self._parameters.values()]
            self._norms.append(torch.stack(norms))

    def collect(self, trainer: L.Trainer, outputs: Any, batch: dict[str, Tensor]) -> None:
        """Nothing: an optimizer step is what counts, not a batch."""

    def figures(self, trainer: L.Trainer) -> dict[str, float]:
        """Means, maximum and share of clipped steps."""
        by_network = torch.stack(self._norms)
        self._norms.clear()
        norms = by_network.norm(dim=1)
        found = {"gradient_norm": norms.mean(), "gradient_norm_max": norms.max()}
        means = zip(self._parameters, by_network.mean(0), strict=True)
        found |= {f"gradient_norm_{network}": mean for network, mean in means}
        if trainer.gradient_clip_val and trainer.gradient_clip_algorithm != GradClipAlgorithmType.VALUE:
            found["gradient_clipped_share"] = (norms > trainer.gradient_clip_val).float().mean()
        return dict(zip(found, torch.stack([*found.values()]).tolist(), strict=True))


def trained_parameters(module: L.LightningModule) -> dict[str, list[nn.Parameter]]:
    """The trainable parameters of each network, that is of each child of the module that has any."""
    found: dict[str, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            found[name.partition(".")[0]].append(parameter)
    return dict(found)


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter], device: torch.device) -> Tensor:
    """The 2-norm of the gradients of all parameters together, 0 if they have none; of sharded ones, of all shards.

    Args:
        parameters: sharded or whole; if sharded, all processes must call this.
        device: of the result, a float32 scalar.
    """
    norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).to(device, torch.float32)

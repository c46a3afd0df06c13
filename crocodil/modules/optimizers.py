"""The optimizer and the learning-rate schedule of the small configs; any other can be named in a YAML."""

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.overrides import TorchFunctionMode


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Splits the trainable parameters: the matrices inside blocks, which decay, and all the rest, which do not.

    Embeddings, heads, norms, biases, registers, adapters and the modulations of the prior belong to the rest.
    """
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        in_block = ".layers." in name or ".layer." in name or ".blocks." in name
        is_matrix = parameter.ndim == 2 and in_block and "modulation" not in name and ".lora_" not in name
        (matrices if is_matrix else rest).append(parameter)
    groups: list[dict[str, Any]] = []
    if matrices:
        groups.append({"params": matrices, "matrices": True})
    if rest:
        groups.append({"params": rest, "matrices": False, "weight_decay": 0.0})
    return groups


class InSinglePrecision(TorchFunctionMode):
    """Ignores `Tensor.bfloat16()`.

    torch's Muon makes its matrices orthogonal in bfloat16. Many processors have no such arithmetic, and take longer for
    these matrices than for the network itself (docs/log.md).
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Calls the function; `bfloat16` copies instead."""
        return (torch.clone if func is Tensor.bfloat16 else func)(*args, **(kwargs or {}))


class MuonAdamW(Optimizer):
    """Muon (Jordan et al., 2024) for the groups marked `matrices`, AdamW for the others.

    Muon's step is scaled to the root mean square of AdamW's (arXiv 2502.16982), so that one learning rate serves both.

    Args:
        params: parameter groups as `parameter_groups` makes them.
        lr: learning rate.
        weight_decay: decoupled weight decay of groups that do not set their own.
        momentum: of Muon.
        betas: of AdamW.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-3,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.98),
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "matrices": False})
        muon_groups, adamw_groups = self._split()
        self._parts: list[Optimizer] = []
        if muon_groups:
            self._parts.append(Muon(muon_groups, lr, weight_decay, momentum=momentum, adjust_lr_fn="match_rms_adamw"))
        if adamw_groups:
            self._parts.append(AdamW(adamw_groups, lr, betas, weight_decay=weight_decay))
        for part in self._parts:
            for group in part.param_groups:
                group.setdefault("matrices", False)

    def _split(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        groups = self.param_groups
        return [g for g in groups if g["matrices"]], [g for g in groups if not g["matrices"]]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both parts, which work on this optimizer's own groups and state."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.state = self.state
            part.param_groups = self._split()[0 if isinstance(part, Muon) else 1]
            with nullcontext() if _is_on_gpu(part) else InSinglePrecision():
                part.step()
        return loss


def _is_on_gpu(optimizer: Optimizer) -> bool:
    return optimizer.param_groups[0]["params"][0].is_cuda


class WarmupCosine(LambdaLR):
    """Rises linearly over `warmup_steps`, then falls along a cosine to `final_ratio` of the peak at `num_steps`.

    Args:
        optimizer: whose learning rates are scaled.
        num_steps: length of the run in optimizer steps.
        warmup_steps: length of the rise in optimizer steps.
        final_ratio: learning rate at the end, in units of the peak.
    """

    def __init__(self, optimizer: Optimizer, num_steps: int, warmup_steps: int = 0, final_ratio: float = 0.02) -> None:
        def factor(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / warmup_steps
            progress = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
            return final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

        super().__init__(optimizer, factor)

"""Memory and FLOPs of whatever runs inside it, operator by operator; real and fake tensors alike."""

import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

Part = Literal["weights", "cast_weights", "gradients", "optimizer_state", "activations", "logits"]
Phase = Literal["forward", "backward", "optimizer"]
Work = Literal["forward", "backward", "recomputation", "optimizer"]

FLOP_FORMULAS = flop_registry | {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}


class StepMeter(TorchDispatchMode):
    """Follows every storage from its allocation to its release, and keeps the highest sum in each phase.

    Args:
        part_of: tells the part of a new tensor that no rule of the meter covers.
        shares: the share of a part that one GPU holds; 1 where nothing is said. All bytes are those of one GPU.

    Attributes:
        phase: what is going on, set by whoever runs the step.
        peaks: bytes by part at the highest point of each phase since `restart`.
        flops: floating-point operations since `restart` by phase; the recomputation of gradient checkpointing is told
            from the rest of the backward pass by autograd, which is on in it.
    """

    def __init__(self, part_of: Callable[[Tensor], Part], shares: Mapping[Part, float]) -> None:
        super().__init__()
        self.part_of = part_of
        self.phase: Phase = "forward"
        self._shares = shares
        self._known: dict[int, tuple[weakref.ref[Any], Part, float]] = {}
        self._live: dict[Part, float] = dict.fromkeys(get_args(Part), 0.0)
        self.restart()

    def restart(self) -> None:
        """Forgets peaks and FLOPs, but not what is in memory."""
        self.peaks: dict[Phase, dict[Part, float]] = {}
        self.flops: Counter[Work] = Counter()

    def assign(self, tensor: Tensor, part: Part) -> None:
        """Counts the storage of a tensor to a part from now on."""
        storage = tensor.untyped_storage()
        key = id(storage)  # the Python object of a storage lives as long as the storage itself
        self._release(key)
        size = storage.nbytes() * self._shares.get(part, 1.0)
        self._known[key] = (weakref.ref(storage, partial(self._release, key)), part, size)
        self._live[part] += size

    def _release(self, key: int, _: Any = None) -> None:
        if key in self._known:
            _, part, size = self._known.pop(key)
            self._live[part] -= size

    def _knows(self, tensor: Tensor, *parts: Part) -> bool:
        entry = self._known.get(id(tensor.untyped_storage()))
        return entry is not None and (not parts or entry[1] in parts)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if formula := FLOP_FORMULAS.get(func.overloadpacket):
            repeated = self.phase == "backward" and torch.is_grad_enabled()
            self.flops["recomputation" if repeated else self.phase] += formula(*args, **(kwargs or {}), out_val=out)
        is_cast = func is torch.ops.aten._to_copy.default and self._knows(args[0], "weights")
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and not self._knows(tensor):
                self.assign(tensor, "cast_weights" if is_cast else self.part_of(tensor))
        if sum(self._live.values()) > sum(self.peaks.get(self.phase, {}).values()):
            self.peaks[self.phase] = dict(self._live)
        return out

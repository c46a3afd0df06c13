"""What a training run needs and whether it fits on a GPU: the numbers of `crocodil plan`."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache
from math import prod
from typing import Any

from torch import nn

from crocodil.modules.sharding import blocks
from crocodil.planner.meter import Phase, Work
from crocodil.planner.step import SimulatedStep, StepCost

GIB = 2**30
CUDA_CONTEXT = 1.5 * GIB
FRAGMENTATION = 0.05
"""Both assumed, not computed: the CUDA context with its libraries, and the share the allocator cannot use."""


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters of a network."""

    total: int
    trainable: int


@dataclass(frozen=True)
class Plan:
    """The needs of a training run on each GPU; memory is in bytes.

    Attributes:
        batch_size: texts in a batch of one GPU.
        length: tokens in a text.
        world_size: number of GPUs.
        gpu_memory: memory of one GPU.
        parameters: of each network.
        flops_per_token: of a training step; see `StepCost`.
        memory: by part at the peak. Beside those of the step: `averaged_weights` that callbacks keep, `gathered_blocks`
            that FSDP2 holds whole for a while, and `allowance`, which is assumed, not computed.
        peak_phase: the phase of the step in which the peak lies.
        largest_batch_size: the largest batch of one GPU that fits; 0 if none does.
    """

    batch_size: int
    length: int
    world_size: int
    gpu_memory: int
    parameters: dict[str, Parameters]
    flops_per_token: dict[Work, float]
    memory: dict[str, int]
    peak_phase: Phase
    largest_batch_size: int

    @property
    def needed(self) -> int:
        """Memory needed, the allowance included."""
        return sum(self.memory.values())

    @property
    def headroom(self) -> int:
        """Memory left; negative if the run does not fit."""
        return self.gpu_memory - self.needed

    @property
    def fits(self) -> bool:
        """Whether the GPU is large enough."""
        return self.headroom >= 0

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self) | {"needed": self.needed, "headroom": self.headroom, "fits": self.fits}


def plan_run(step: SimulatedStep, batch_size: int, gpu_memory: int, weight_copies: int = 0) -> Plan:
    """Simulates steps until it is known what the run needs.

    Args:
        step: the training step.
        batch_size: texts in a batch of one GPU.
        gpu_memory: bytes of one GPU.
        weight_copies: how often callbacks keep the trained weights beside the network's own.
    """
    cost = cache(step.run)
    found = cost(batch_size)
    trained = [weight for weight in step.module.parameters() if weight.requires_grad]
    held = {"averaged_weights": weight_copies * sum(map(_bytes, trained)) // step.world_size, "gathered_blocks": 0}
    if step.world_size > 1:
        held["gathered_blocks"] = max(gathered_bytes(n, step.trainer.precision) for n in step.module.children())
    memory = {part: round(size) for part, size in found.peaks[found.peak_phase].items()} | held
    memory["allowance"] = round(CUDA_CONTEXT + FRAGMENTATION * sum(memory.values()))
    budget = (gpu_memory - CUDA_CONTEXT) / (1 + FRAGMENTATION) - sum(held.values())
    return Plan(
        batch_size=batch_size,
        length=step.length,
        world_size=step.world_size,
        gpu_memory=gpu_memory,
        parameters={name: _count(network) for name, network in step.module.named_children()},
        flops_per_token=found.flops,
        memory=memory,
        peak_phase=found.peak_phase,
        largest_batch_size=largest_batch(cost, budget, batch_size),
    )


def largest_batch(cost: Callable[[int], StepCost], budget: float, start: int) -> int:
    """The largest batch that fits, by a straight line through two sizes; 0 if none does.

    The memory of each phase grows with the batch linearly or faster: between two sizes the line asks for too much, and
    beyond them for too little, until both are so large that it no longer depends on the two.

    Args:
        cost: of a step with batches of the given size.
        budget: bytes that no phase may exceed.
        start: a batch size to begin with.
    """

    def peaks(size: int) -> dict[Phase, float]:
        return {phase: sum(parts.values()) for phase, parts in cost(size).peaks.items()}

    near, far = (start, 2 * start) if max(peaks(start).values()) <= budget else (1, start)
    if max(peaks(near).values()) > budget:
        return 0
    before = 0
    while True:
        low, high = peaks(near), peaks(far)
        growth = {phase: (high[phase] - low[phase]) / (far - near) for phase in low if high[phase] > low[phase]}
        found = min(near + int((budget - low[phase]) / growth[phase]) for phase in growth)
        if found <= far or abs(found - before) <= 0.02 * found:
            return found
        near, far, before = far, 2 * far, found


def gathered_bytes(network: nn.Module, precision: str) -> int:
    """What FSDP2 holds whole, beside the shards: the largest block of a network, and what is outside its blocks.

    The weights of a block come twice, since the next block is gathered while one computes. Gradients are whole until
    they are summed over the GPUs, in float32.

    Args:
        network: a child of the stage.
        precision: of the Trainer; "bf16-mixed" gathers in bfloat16.
    """
    parts = list(blocks(network))
    inside = {id(weight) for part in parts for weight in part.parameters()}
    outside = [weight for weight in network.parameters() if id(weight) not in inside]
    largest = max((_whole(part.parameters(), precision, copies=2) for part in parts), default=0)
    return largest + _whole(outside, precision, copies=1)


def _whole(weights: Iterable[nn.Parameter], precision: str, copies: int) -> int:
    total = 0
    for weight in weights:
        size = 2 if precision == "bf16-mixed" and weight.is_floating_point() else weight.element_size()
        total += weight.numel() * (copies * size + (size + 4 if weight.requires_grad else 0))
    return total


def _bytes(weight: nn.Parameter) -> int:
    return weight.numel() * weight.element_size()


def _count(network: nn.Module) -> Parameters:
    packed = {id(m.weight): prod(m.quantized_shape) for m in network.modules() if hasattr(m, "quantized_shape")}  # type: ignore[arg-type]
    counts = [(packed.get(id(weight), weight.numel()), weight.requires_grad) for weight in network.parameters()]
    return Parameters(sum(count for count, _ in counts), sum(count for count, trained in counts if trained))

"""What a sample costs: calls, demasker-call equivalents by counted FLOPs, and wall-clock."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from crocodil.models import Demasker, LatentPrior, LatentStudent, RegisterEncoder
from crocodil.models.key_values import KeyValues


@dataclass(frozen=True)
class Cost:
    """The bill of a run.

    Attributes:
        nfe: all network calls of a text in units of one call of the plain demasker at the same length, converted by
            FLOPs. FLOPs are counted with the head at every position, for the unit and for the calls alike.
        seconds: wall-clock of the whole run.
        tokens_per_second: written tokens of all texts, prompt excluded, over `seconds`; behind a stop token nothing is
            counted.
        tokens_per_call: written tokens of a text over its demasker calls.
        calls: calls of each network on a text: demasker, prior, student, encoder; "demasker[32]" is a call that
            computes 32 positions and has the rest from a cache. Of several batches, the mean over texts.
        flops: FLOPs of one call on one text, by network as in `calls`; and of the `unit`.
        seconds_by_part: wall-clock of demasker, prior, student, encoder, and of the rest, "sampling".
    """

    nfe: float
    seconds: float
    tokens_per_second: float
    tokens_per_call: float
    calls: dict[str, float]
    flops: dict[str, int]
    seconds_by_part: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def count_flops(network: nn.Module, *args: Tensor, window: int | None = None, **kwargs: Tensor) -> int:
    """FLOPs of one call, by torch's counter on the meta device: nothing is computed and no weight is copied.

    Args:
        network: any module.
        args: its inputs; only their shapes and dtypes matter.
        window: of a demasker, count a call that computes this many positions and has the others from a cache.
        kwargs: further inputs.
    """
    if must_be_rebuilt(network):
        network = plain_twin(network)
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    weights = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    on_meta = tuple(a.to("meta") for a in args)
    given: dict[str, Any] = {name: a.to("meta") for name, a in kwargs.items()}
    with torch.no_grad(), torch.device("meta"):
        if window is not None:
            given["cache"] = KeyValues()
            functional_call(network, weights, on_meta, given)
            given["window"] = torch.arange(window)[None]
        with FlopCounterMode(display=False) as counter:
            functional_call(network, weights, on_meta, given)
    return counter.get_total_flops()


def must_be_rebuilt(network: nn.Module) -> bool:
    """Whether torch cannot call the network on the meta device: packed, sharded or compiled."""
    is_packed = any(hasattr(module, "quantized_shape") for module in network.modules())
    return is_packed or isinstance(network, FSDPModule) or network._compiled_call_impl is not None


def plain_twin(network: nn.Module) -> nn.Module:
    """The same network without weights, to count what packed or sharded weights compute once they are unpacked."""
    config = network.to_config()  # type: ignore[operator]
    config |= dict.fromkeys(config.keys() & {"pretrained", "lora"})
    with torch.device("meta"):
        return type(network)(**config)


def network_flops(
    length: int,
    demasker: Demasker,
    num_registers: int | None = None,
    prior: LatentPrior | None = None,
    encoder: RegisterEncoder | None = None,
    unit: Demasker | None = None,
    windows: Iterable[int] = (),
    student: LatentStudent | None = None,
) -> dict[str, int]:
    """FLOPs of one call of each network on one text of `length` tokens.

    Args:
        length: tokens of the canvas, prompt included.
        demasker: f_theta.
        num_registers: registers the demasker reads; None for none.
        prior: G_psi, if the algorithm uses it.
        encoder: h_phi, if the algorithm uses it.
        unit: the plain demasker that one function evaluation is measured by; None takes `demasker` without latents.
        windows: numbers of positions that calls with a cache compute.
        student: the distilled prior, if there is one.

    Returns:
        Entries demasker, demasker[window] for each window, prior, student, encoder (as given) and unit.
    """
    token_ids = torch.zeros((1, length), dtype=torch.int64)
    flops = {"unit": count_flops(unit or demasker, token_ids)}
    read: dict[str, Any] = {}
    if num_registers is not None:
        read["latents"] = torch.zeros((1, num_registers, demasker.latent_dim or 0))
    flops["demasker"] = count_flops(demasker, token_ids, **read)
    for window in windows:
        flops[f"demasker[{window}]"] = count_flops(demasker, token_ids, window=window, **read)
    if prior is not None:
        flops["prior"] = count_flops(prior, torch.zeros((1, prior.num_registers, prior.latent_dim)), torch.zeros(1))
    if student is not None:
        noisy, level = torch.zeros((1, student.num_registers, student.latent_dim)), torch.zeros(1)
        flops["student"] = count_flops(student, noisy, level, level)
    if encoder is not None:
        flops["encoder"] = count_flops(encoder, token_ids)
    return flops


def demasker_call_equivalents(calls: Mapping[str, float], flops: Mapping[str, int]) -> float:
    """The sum over networks of calls x FLOPs of a call / FLOPs of the unit."""
    return sum(count * flops[network] for network, count in calls.items() if count) / flops["unit"]


def bill(
    calls: dict[str, float], flops: dict[str, int], seconds: dict[str, float], num_tokens: int, num_texts: int
) -> Cost:
    """What some texts cost.

    Args:
        calls: see `Cost`.
        flops: likewise.
        seconds: of a `Stopwatch`.
        num_tokens: written tokens of all texts.
        num_texts: how many texts.
    """
    total = seconds["total"]
    parts = {name: value for name, value in seconds.items() if name != "total"}
    demasker_calls = sum(count for name, count in calls.items() if name.startswith("demasker"))
    return Cost(
        nfe=demasker_call_equivalents(calls, flops),
        seconds=total,
        tokens_per_second=num_tokens / total,
        tokens_per_call=num_tokens / num_texts / max(demasker_calls, 1),
        calls=calls,
        flops=flops,
        seconds_by_part={**parts, "sampling": total - sum(parts.values())},
    )

"""What a sample costs: calls, demasker-call equivalents by counted FLOPs, and wall-clock."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from crocodil.models import Demasker, LatentPrior, RegisterEncoder


@dataclass(frozen=True)
class Cost:
    """The bill of a run.

    Attributes:
        nfe: all network calls of a text in units of one call of the plain demasker at the same length, converted by
            FLOPs. FLOPs are counted with the head at every position, for the unit and for the calls alike.
        seconds: wall-clock of the whole run.
        tokens_per_second: written tokens of all texts, prompt excluded, over `seconds`.
        calls: calls of each network on a text: demasker, prior, encoder.
        flops: FLOPs of one call on one text, by network; and of the `unit`.
    """

    nfe: float
    seconds: float
    tokens_per_second: float
    calls: dict[str, int]
    flops: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def count_flops(network: nn.Module, *args: Tensor, **kwargs: Tensor) -> int:
    """FLOPs of one call, by torch's counter on the meta device: nothing is computed and no weight is copied.

    Args:
        network: any module.
        args: its inputs; only their shapes and dtypes matter.
        kwargs: likewise.
    """
    if isinstance(network, FSDPModule) or any(hasattr(module, "quantized_shape") for module in network.modules()):
        network = plain_twin(network)
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    weights = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    with torch.no_grad(), torch.device("meta"), FlopCounterMode(display=False) as counter:
        functional_call(
            network, weights, tuple(a.to("meta") for a in args), {name: a.to("meta") for name, a in kwargs.items()}
        )
    return counter.get_total_flops()


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
) -> dict[str, int]:
    """FLOPs of one call of each network on one text of `length` tokens.

    Args:
        length: tokens of the canvas, prompt included.
        demasker: f_theta.
        num_registers: registers the demasker reads; None for none.
        prior: G_psi, if the algorithm uses it.
        encoder: h_phi, if the algorithm uses it.
        unit: the plain demasker that one function evaluation is measured by; None takes `demasker` without latents.

    Returns:
        Entries demasker, prior, encoder (as given) and unit.
    """
    token_ids = torch.zeros((1, length), dtype=torch.int64)
    flops = {"unit": count_flops(unit or demasker, token_ids)}
    if num_registers is None:
        flops["demasker"] = count_flops(demasker, token_ids)
    else:
        latents = torch.zeros((1, num_registers, demasker.latent_dim or 0))
        flops["demasker"] = count_flops(demasker, token_ids, latents)
    if prior is not None:
        flops["prior"] = count_flops(prior, torch.zeros((1, prior.num_registers, prior.latent_dim)), torch.zeros(1))
    if encoder is not None:
        flops["encoder"] = count_flops(encoder, token_ids)
    return flops


def demasker_call_equivalents(calls: Mapping[str, int], flops: Mapping[str, int]) -> float:
    """The sum over networks of calls x FLOPs of a call / FLOPs of the unit."""
    return sum(count * flops[network] for network, count in calls.items() if count) / flops["unit"]


def synchronised(clock: Callable[[], float], device: torch.device) -> float:
    """Reads a clock after the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock()

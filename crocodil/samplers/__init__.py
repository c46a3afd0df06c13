"""Samplers: pure loops with the networks injected and the randomness explicit."""

from crocodil.samplers.conthendisc import ConThenDisc
from crocodil.samplers.conwithindisc import ConWithinDisc
from crocodil.samplers.latent import LatentSampler
from crocodil.samplers.masked import MaskedSampler
from crocodil.samplers.mean_flow import MeanFlowSampler
from crocodil.samplers.protocols import SampleOutput, StepEvent

__all__ = [
    "ConThenDisc",
    "ConWithinDisc",
    "LatentSampler",
    "MaskedSampler",
    "MeanFlowSampler",
    "SampleOutput",
    "StepEvent",
]

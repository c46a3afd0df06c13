"""Plug-ins for the Trainer (import name `crocodil_callbacks`); they import crocodil, never the reverse."""

from crocodil_callbacks.ema import EMA
from crocodil_callbacks.gradient_norm import GradientNorm
from crocodil_callbacks.jsonl import JsonLinesWriter
from crocodil_callbacks.latent_statistics import LatentStatistics
from crocodil_callbacks.loss_by_mask_ratio import LossByMaskRatio
from crocodil_callbacks.sample_texts import SampleTexts
from crocodil_callbacks.stop_at_nonfinite import StopAtNonFinite
from crocodil_callbacks.throughput import Throughput

__all__ = [
    "EMA",
    "GradientNorm",
    "JsonLinesWriter",
    "LatentStatistics",
    "LossByMaskRatio",
    "SampleTexts",
    "StopAtNonFinite",
    "Throughput",
]

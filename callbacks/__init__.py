"""Plug-ins for the Trainer (import name `crocodil_callbacks`); they import crocodil, never the reverse."""

from crocodil_callbacks.ema import EMA
from crocodil_callbacks.jsonl import JsonLinesWriter
from crocodil_callbacks.sample_texts import SampleTexts

__all__ = ["EMA", "JsonLinesWriter", "SampleTexts"]

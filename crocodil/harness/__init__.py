"""Evaluation by lm-evaluation-harness (arXiv 2405.14782): importing this registers the model "crocodil"."""

from crocodil.harness.model import CrocodilLM

__all__ = ["CrocodilLM"]

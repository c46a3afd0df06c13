"""What samplers need of the networks, and what they tell while they run."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

ProgressCallback = Callable[[str, int, int], None]
"""Called as `progress(network, done, total)` after each call of a network."""


class DemaskerLike(Protocol):
    """What a sampler needs of f_theta.

    Beside `mask_token_id`, a sampler looks for `eos_token_id`, `stop_token_ids` and `registers_read_text` where a
    setting needs them.
    """

    mask_token_id: int

    def __call__(self, token_ids: Tensor, latents: Tensor | None = None, **given: Any) -> Tensor:
        """Logits (B, M, V) at `positions` of (B, L) `token_ids` under (B, K, D) `latents`.

        Of the other arguments of `Demasker.forward`, those are given that the settings need: `attention_mask` for rows
        of several lengths, `cache` and `window` for caches, `latent_mask` for guidance.
        """
        ...


class EncoderLike(Protocol):
    """What a sampler needs of h_phi."""

    def __call__(self, token_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Latents (B, K, D) of partly masked texts (B, L) int64."""
        ...


@dataclass(frozen=True)
class StepEvent:
    """What happened in one step, for those who watch.

    Attributes:
        index: of the step in the schedule.
        token_ids: (B, W) int64, the canvas after the step.
        committed: (B, W) bool, written in this step.
        remasked: (B, W) bool, masked again in this step.
        confidence: (B, W) float, probability of each token written in this step as the model sees it; 0 elsewhere.
        refreshed: whether the registers were drawn anew before this step.
    """

    index: int
    token_ids: Tensor
    committed: Tensor
    remasked: Tensor
    confidence: Tensor
    refreshed: bool


StepCallback = Callable[[StepEvent], None]


@dataclass
class SampleOutput:
    """What a sampler returns.

    Attributes:
        token_ids: (B, P + L) int64, the prompt included; behind shorter rows stands the end token.
        num_calls: demasker calls made; with guidance two a step.
        calls: calls made of each network, by name: demasker, prior or student, encoder.
        latents: (B, K, D) the registers last used; None without latents.
        lengths: (B,) int64, the length of each row, prompt included.
    """

    token_ids: Tensor
    num_calls: int
    calls: dict[str, int] = field(default_factory=dict)
    latents: Tensor | None = None
    lengths: Tensor | None = None

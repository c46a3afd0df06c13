"""Unmasking rules: which positions to commit in a step, and which to mask again. Each is a small object."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from crocodil.diffusion.masking import LinearMasking, MaskingSchedule, posterior
from crocodil.samplers.drawing import confidence, margin, negative_entropy

Scope = Literal["chosen", "open", "block"]
UnmaskingSchedule = Literal["linear", "cosine"]
LINEAR = LinearMasking(eps=0.0)


@dataclass(frozen=True)
class Candidates:
    """What a rule chooses from in one step: M positions in each of B rows.

    Attributes:
        logits: (B, M, V) float, neither tempered nor cut; the mask is ruled out.
        tokens: (B, M) int64, drawn where the canvas is masked, and what stands there where it is not.
        is_open: (B, M) bool, masked and of this block.
        is_written: (B, M) bool, of this block and written by an earlier step.
        is_late: (B, M) bool, to be committed after all others; None for none.
        quota: (B,) int64, how many masked positions the schedule wants committed now.
        num_kept: (B,) int64, how many positions of the block it wants unmasked after this step.
        uniform: (B, M) float64, uniform on (0, 1), fresh in every step.
        now: share of the steps of the block that is done before this step.
        after: the same after it.
    """

    logits: Tensor
    tokens: Tensor
    is_open: Tensor
    is_written: Tensor
    is_late: Tensor | None
    quota: Tensor
    num_kept: Tensor
    uniform: Tensor
    now: float
    after: float


@dataclass(frozen=True)
class Choice:
    """Positions (B, M) bool to commit, and those to mask again (None for none)."""

    commit: Tensor
    remask: Tensor | None = None


class UnmaskingRule(ABC):
    """A rule. With a block of n masked positions and N steps, it is told n / N positions a step as its quota.

    Attributes:
        scope: whose logits it needs: those of the positions that are committed, which are "chosen" without looking at
            any; those of all masked ("open") positions of the block; or of the whole "block".
        is_adaptive: it may commit more than its quota, so that fewer steps are made than there could be.
        idles: with more steps than tokens, the steps beyond one for each token do nothing and are left out.
        has_own_schedule: how many positions a step commits follows from the rule's own noise schedule.
    """

    scope: ClassVar[Scope] = "open"
    is_adaptive: ClassVar[bool] = False
    idles: ClassVar[bool] = True
    has_own_schedule: ClassVar[bool] = False

    def quotas(self, num_open: Tensor, num_steps: int, order: Tensor, schedule: UnmaskingSchedule = "linear") -> Tensor:
        """How many positions each step commits.

        Args:
            num_open: (B,) int64, masked positions of the block.
            num_steps: N.
            order: (B, M) float64, a uniform number for each masked position, the same in all steps; 2 elsewhere.
            schedule: see `step_quotas`.

        Returns:
            (N, B) int64 whose sum over steps is `num_open`.
        """
        return step_quotas(num_open, num_steps, schedule)

    @abstractmethod
    def choose(self, candidates: Candidates) -> Choice:
        """The choice of one step."""


@dataclass(frozen=True)
class RandomOrder(UnmaskingRule):
    """A uniformly random subset of each step's quota: the exact reverse process given the number of reveals.

    LLaDA's "random" remasking (arXiv 2502.09992, algorithm 4). The order is drawn before the first step.
    """

    scope: ClassVar[Scope] = "chosen"

    def choose(self, candidates: Candidates) -> Choice:
        """The candidates come in their order."""
        return Choice(
            torch.arange(candidates.is_open.shape[1], device=candidates.quota.device) < candidates.quota[:, None]
        )


@dataclass(frozen=True)
class Ancestral(RandomOrder):
    """The exact reverse process in N steps: each mask is revealed with (alpha_s - alpha_t) / (1 - alpha_t) (MDLM).

    arXiv 2406.07524, eq. 6. A position whose uniform number lies below the mask probability at t is masked at t, so
    the numbers of the order tell the step of every reveal beforehand.

    Attributes:
        noise_schedule: mask probability over time; time falls from 1 to 0 in equal steps.
    """

    idles: ClassVar[bool] = False
    has_own_schedule: ClassVar[bool] = True
    noise_schedule: MaskingSchedule = LINEAR

    def quotas(self, num_open: Tensor, num_steps: int, order: Tensor, schedule: UnmaskingSchedule = "linear") -> Tensor:
        """How many uniform numbers lie between the mask probabilities before and after each step."""
        edges = self.noise_schedule(torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)[1:-1]).mask_prob
        step = num_steps - 1 - torch.bucketize(order.clamp(max=1), edges.to(order.device), right=True)
        counts = torch.zeros((order.shape[0], num_steps), dtype=torch.int64, device=order.device)
        return counts.scatter_add(1, step, (order <= 1).long()).T


class ScoredRule(UnmaskingRule):
    """Commits the positions of highest score, ties to the left."""

    @abstractmethod
    def scores(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """How willingly each position is committed, (B, M) float, from (B, M, V) and (B, M)."""

    def count(self, ranked: Tensor, quota: Tensor) -> Tensor:
        """How many to commit, (B,), given the scores (B, M) in falling order; -inf where nothing may be committed."""
        return quota

    def choose(self, candidates: Candidates) -> Choice:
        """The best of the masked positions."""
        scores = late_last(self.scores(candidates.logits, candidates.tokens), candidates.is_late)
        ranked, rank = rank_scores(scores, candidates.is_open)
        return Choice((rank < self.count(ranked, candidates.quota)[:, None]) & candidates.is_open)


class LowConfidence(ScoredRule):
    """The drawn tokens of highest probability first; the others stay masked (LLaDA, arXiv 2502.09992)."""

    def scores(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """Log p(token)."""
        return confidence(logits, tokens)


class TopKMargin(ScoredRule):
    """Positions whose two most probable tokens are farthest apart first (arXiv 2502.06768)."""

    def scores(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """p(best) - p(second)."""
        return margin(logits, tokens)


class LowEntropy(ScoredRule):
    """Positions of lowest entropy first (Dream, arXiv 2508.15487)."""

    def scores(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """Minus the entropy."""
        return negative_entropy(logits, tokens)


@dataclass(frozen=True)
class ConfidenceThreshold(LowConfidence):
    """All drawn tokens of probability at least `threshold`, one at least (Fast-dLLM, arXiv 2505.22618).

    Attributes:
        threshold: in [0, 1].
    """

    is_adaptive: ClassVar[bool] = True
    threshold: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must be between 0 and 1, got {self.threshold}")

    def count(self, ranked: Tensor, quota: Tensor) -> Tensor:
        """Those above the threshold, and no fewer than the quota."""
        return torch.maximum((ranked.exp() >= self.threshold).sum(1), quota)


@dataclass(frozen=True)
class ConfidenceFactor(LowConfidence):
    """The most probable n drawn tokens with (n + 1) (1 - p_n) < factor, one at least (Fast-dLLM, arXiv 2505.22618).

    Attributes:
        factor: above 0; under it, greedy decoding of the n tokens at once is that of their joint distribution
            (theorem 1 of the paper, with factor 1).
    """

    is_adaptive: ClassVar[bool] = True
    factor: float = 1.0

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise ValueError(f"factor must be above 0, got {self.factor}")

    def count(self, ranked: Tensor, quota: Tensor) -> Tensor:
        """The largest such n, and no fewer than the quota."""
        n = torch.arange(1, ranked.shape[1] + 1, device=ranked.device)
        fits = (n + 1) * (1 - ranked.exp()) < self.factor
        return torch.maximum(torch.where(fits & ranked.isfinite(), n, 0).amax(1), quota)


@dataclass(frozen=True)
class EntropyBound(LowEntropy):
    """The n positions of lowest entropy whose entropies, but for the largest, sum to at most gamma (EB-Sampler).

    arXiv 2505.24857: the sum bounds the joint dependence that is neglected by writing the n tokens at once.

    Attributes:
        gamma: in nats, at least 0; 0 commits one token a step, and further ones that are certain.
    """

    is_adaptive: ClassVar[bool] = True
    gamma: float = 0.1

    def __post_init__(self) -> None:
        if not self.gamma >= 0:
            raise ValueError(f"gamma must not be negative, got {self.gamma}")

    def count(self, ranked: Tensor, quota: Tensor) -> Tensor:
        """The largest such n, and no fewer than the quota."""
        entropies = torch.where(ranked.isfinite(), -ranked, torch.inf).double()
        before = entropies.cumsum(1) - entropies
        is_late = ranked <= torch.finfo(ranked.dtype).min
        return torch.maximum(((before <= self.gamma) & ~is_late).sum(1), quota)  # inf - inf is not below gamma


@dataclass(frozen=True)
class ReMDM(UnmaskingRule):
    """The reverse process that masks written tokens again with probability sigma (ReMDM, arXiv 2503.00307, eq. 5-6).

    A mask is revealed with (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t), so that at every time the share of masks
    is that of the schedule whatever sigma is, which may be at most min(1, (1 - alpha_s) / alpha_t).

    Attributes:
        eta: strength, in [0, 1].
        strategy: "cap" takes the smaller of eta and the largest sigma, "rescale" eta times the largest sigma.
        noise_schedule: mask probability over time; time falls from 1 to 0 in equal steps.
    """

    scope: ClassVar[Scope] = "block"
    idles: ClassVar[bool] = False
    has_own_schedule: ClassVar[bool] = True
    eta: float = 0.02
    strategy: Literal["cap", "rescale"] = "cap"
    noise_schedule: MaskingSchedule = LINEAR

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be between 0 and 1, got {self.eta}")

    def choose(self, candidates: Candidates) -> Choice:
        """Each position by its own uniform number."""
        times = torch.tensor([1 - candidates.now, 1 - candidates.after], dtype=torch.float64)
        masked_t, masked_s = self.noise_schedule(times).mask_prob
        masked_s = masked_s * (candidates.after < 1)  # nothing stays masked, though schedules end at their eps
        largest = (masked_s / (1 - masked_t).clamp(min=1e-12)).clamp(max=1.0)
        sigma = largest.clamp(max=self.eta) if self.strategy == "cap" else self.eta * largest
        reveal = posterior(masked_t, masked_s) + sigma * (1 - masked_t) / masked_t
        return Choice(
            candidates.is_open & (candidates.uniform < reveal), candidates.is_written & (candidates.uniform < sigma)
        )


@dataclass(frozen=True)
class PathPlanning(UnmaskingRule):
    """Self-planning: keeps the best tokens, drawn and written alike, and masks the others (P2, arXiv 2502.03540).

    After each step as many positions are unmasked as the schedule says. A written token's log probability, given all
    that stands in the canvas, counts `eta` times.

    Attributes:
        eta: at least 0; 0 never masks again (which is LowConfidence), larger ones do so more readily.
    """

    scope: ClassVar[Scope] = "block"
    idles: ClassVar[bool] = False
    eta: float = 1.0

    def __post_init__(self) -> None:
        if not self.eta >= 0:
            raise ValueError(f"eta must not be negative, got {self.eta}")

    def choose(self, candidates: Candidates) -> Choice:
        """The best of all positions of the block."""
        scores = confidence(candidates.logits, candidates.tokens)
        weighted = self.eta * scores if self.eta else torch.full_like(scores, torch.inf)
        scores = late_last(torch.where(candidates.is_written, weighted, scores), candidates.is_late)
        _, rank = rank_scores(scores, candidates.is_open | candidates.is_written)
        is_kept = rank < candidates.num_kept[:, None]
        return Choice(candidates.is_open & is_kept, candidates.is_written & ~is_kept)


RULES: dict[str, tuple[Callable[..., UnmaskingRule], str | None]] = {
    "random": (RandomOrder, None),
    "ancestral": (Ancestral, None),
    "low_confidence": (LowConfidence, None),
    "margin": (TopKMargin, None),
    "entropy": (LowEntropy, None),
    "threshold": (ConfidenceThreshold, "threshold"),
    "factor": (ConfidenceFactor, "factor"),
    "entropy_bound": (EntropyBound, "gamma"),
    "remdm_cap": (ReMDM, "eta"),
    "remdm_rescale": (lambda eta=0.1: ReMDM(eta, "rescale"), "eta"),
    "p2": (PathPlanning, "eta"),
}
"""Rules by name, each with the setting that may follow the name: "threshold:0.8"."""


def make_rule(name: str) -> UnmaskingRule:
    """A rule by its name, or by its name, a colon and its number.

    Raises:
        ValueError: if there is none of that name, or its number is out of range.
    """
    kind, _, number = name.partition(":")
    if kind not in RULES:
        raise ValueError(f"remasking must be one of {', '.join(RULES)}, got {name!r}")
    make, setting = RULES[kind]
    if not number:
        return make()
    if setting is None:
        raise ValueError(f"remasking {kind} takes no number, got {name!r}")
    try:
        value = float(number)
    except ValueError:
        raise ValueError(f"remasking {kind} takes a number behind the colon, its {setting}, got {name!r}") from None
    return make(**{setting: value})


def late_last(scores: Tensor, is_late: Tensor | None) -> Tensor:
    """Scores (B, M) with late positions (B, M) behind all others that may be committed."""
    lowest = torch.finfo(scores.dtype).min
    scores = scores.clamp(min=lowest)
    return scores if is_late is None else scores.masked_fill(is_late, lowest)


def rank_scores(scores: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Scores in falling order, -inf where not allowed, and the rank of each position, ties to the left; (B, M) each."""
    ranked, order = scores.masked_fill(~allowed, -torch.inf).sort(dim=1, descending=True, stable=True)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return ranked, torch.empty_like(order).scatter_(1, order, places)


def step_quotas(num_open: Tensor, num_steps: int, schedule: UnmaskingSchedule = "linear") -> Tensor:
    """How many positions each step commits.

    Args:
        num_open: (B,) int64.
        num_steps: number of steps.
        schedule: "linear", equal shares, the remainder to the first steps (LLaDA); "cosine", few positions at first,
            where little is known of the others, and more later: cos(pi i / 2N) of them are left after step i (MaskGIT,
            arXiv 2202.04200, section 3.3), but each step commits one at least while there are any.

    Returns:
        (num_steps, B) int64 whose sum over steps is `num_open`.
    """
    step = torch.arange(num_steps, device=num_open.device)[:, None]
    if schedule == "linear":
        return num_open // num_steps + (step < num_open % num_steps)
    share = torch.cos(torch.pi / 2 * (step + 1).double() / num_steps)
    left = torch.minimum((num_open * share).floor().long(), num_open - step - 1).clamp(min=0)
    return torch.cat([num_open[None], left[:-1]]) - left

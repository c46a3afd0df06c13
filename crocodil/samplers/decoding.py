"""One run of the masked sampler over a canvas: which steps there are, and what one of them does."""

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from crocodil.diffusion.noise import RowNoise
from crocodil.models.key_values import KeyValues
from crocodil.samplers.canvas import Canvas
from crocodil.samplers.drawing import confidence
from crocodil.samplers.guidance import GuidedDemasker
from crocodil.samplers.protocols import DemaskerLike, ProgressCallback, SampleOutput, StepCallback, StepEvent
from crocodil.samplers.unmasking import Candidates, Choice

if TYPE_CHECKING:
    from crocodil.samplers.masked import MaskedSampler

STREAM_TOKENS, STREAM_ORDER, STREAM_LATENTS = 0, 1, 2


@dataclass(frozen=True)
class Step:
    """One planned call of the demasker.

    Attributes:
        index: number of the step in the schedule, whichever steps are left out, which keys its randomness.
        block: number of the block.
        place: number of the step within its block.
        num_candidates: how many positions a row gets logits at.
        quota: (B,) int64, how many positions the schedule commits now.
        num_left: (B,) int64, how many it leaves masked in the block.
    """

    index: int
    block: int
    place: int
    num_candidates: int
    quota: Tensor
    num_left: Tensor


class Decoding:
    """Fills the masks of a canvas, step by step.

    Args:
        sampler: the settings.
        demasker: f_theta.
        canvas: what is filled, in place.
        noise: the randomness.
        latents: (B, K, D); None for the plain model. May be replaced between steps.
        progress: called after each step.
        on_step: likewise, with what happened.

    Raises:
        ValueError: if canvas, demasker and settings do not fit together.
    """

    def __init__(
        self,
        sampler: "MaskedSampler",
        demasker: DemaskerLike,
        canvas: Canvas,
        noise: RowNoise,
        latents: Tensor | None = None,
        progress: ProgressCallback | None = None,
        on_step: StepCallback | None = None,
    ) -> None:
        if sampler.cache != "none" and canvas.has_gaps:
            raise ValueError(f"cache={sampler.cache!r} needs prompts without masks in them")
        self.sampler, self.rule = sampler, sampler.rule
        self.canvas, self.noise = canvas, noise
        self.progress, self.on_step = progress, on_step
        self.mask_token_id = demasker.mask_token_id
        self.demasker = demasker
        if sampler.guidance_scale != 1.0:
            self.demasker = GuidedDemasker(demasker, sampler.guidance_scale, sampler.guided_by, ~canvas.is_ours)
        self.stop_token_ids = torch.tensor(stop_token_ids(demasker, sampler), device=canvas.token_ids.device)
        self.block_size = canvas.length if sampler.block_size is None else sampler.block_size
        self._keeps_registers = not getattr(demasker, "registers_read_text", True)
        self._cache = KeyValues() if sampler.cache != "none" or self._keeps_registers else None
        self._order = noise.uniform(STREAM_ORDER, 0, canvas.token_ids.shape[1])
        self._monitor = Monitor(canvas.token_ids.device)
        self._computed: Counter[str] = Counter()
        self._is_refreshed = False
        self.latents = latents
        self.plan = self._plan()

    @property
    def latents(self) -> Tensor | None:
        """The registers that the demasker reads."""
        return self._latents

    @latents.setter
    def latents(self, latents: Tensor | None) -> None:
        self._latents = latents
        self._is_refreshed = latents is not None
        if self._cache is not None:
            self._cache.clear()

    def _plan(self) -> list[list[Step]]:
        """The steps of each block, all in advance: the device is asked where the masks are once, and not in the loop.

        Steps that would change nothing are left out. Of an adaptive rule, these are the steps there may be.
        """
        num_blocks, rest = divmod(self.canvas.length, self.block_size)
        if rest:
            raise ValueError(
                f"block_size must divide the length, got block_size={self.block_size} and length={self.canvas.length}"
            )
        num_steps, rest = divmod(self.sampler.num_steps, num_blocks)
        if rest:
            raise ValueError(
                f"num_steps must be a multiple of the number of blocks, got num_steps={self.sampler.num_steps} "
                f"and {self.canvas.length} / {self.block_size} = {num_blocks} blocks"
            )
        return [self._plan_block(block, num_steps) for block in range(num_blocks)]

    def _plan_block(self, block: int, num_steps: int) -> list[Step]:
        positions, is_open = self.canvas.block(block, self.block_size)
        order = self._order.gather(1, positions).masked_fill(~is_open, 2.0)
        quotas = self.rule.quotas(is_open.sum(1), num_steps, order, self.sampler.unmasking_schedule)
        num_left = quotas.flip(0).cumsum(0).flip(0) - quotas
        most = torch.stack([quotas, quotas + num_left]).amax(2).tolist()
        most_committed, most_open = most
        width = positions.shape[1]
        steps = []
        for i in range(num_steps):
            if self.rule.scope != "block" and not (most_open[i] if self.rule.is_adaptive else most_committed[i]):
                continue
            candidates = {"chosen": most_committed[i], "open": most_open[i], "block": width}[self.rule.scope]
            if self.sampler.static_shapes:  # of rules that do not idle, counts are drawn: no two blocks have the same
                is_fixed = self.rule.scope == "chosen" and self.rule.idles
                candidates = max(most_committed) if is_fixed else width
            steps.append(Step(block * num_steps + i, block, i, candidates, quotas[i], num_left[i]))
        return steps if max(most_open) else []

    def steps(self) -> Iterator[Step]:
        """The steps that are still needed; the run is over behind the last one."""
        total, done = sum(map(len, self.plan)), 0
        for steps in self.plan:
            for step in steps:
                known = self._monitor.latest(wait=self.rule.is_adaptive or self.sampler.early_stop)
                if self.sampler.early_stop and known.all_finished:
                    break
                if self.rule.is_adaptive and known.block == step.block:
                    if not known.most_open:
                        break
                    if not self.sampler.static_shapes:
                        step = Step(**{**vars(step), "num_candidates": min(step.num_candidates, known.most_open)})
                yield step
                done += 1
                if self.progress is not None:
                    self.progress("demasker", done, total)
        if self.progress is not None and done < total:
            self.progress("demasker", done, done)
        self._monitor.drain()
        if self.sampler.early_stop:
            self.canvas.trim(self.stop_token_ids, int(self.stop_token_ids[0]))

    @torch.no_grad()
    def take(self, step: Step) -> None:
        """One demasker call, and its tokens written to the canvas."""
        positions, is_ours = self.canvas.block(step.block, self.block_size)
        is_open = is_ours & (self.canvas.token_ids.gather(1, positions) == self.mask_token_id)
        num_open = is_open.sum(1)
        chosen = self._candidates(step, positions, is_open)
        places, is_open, is_ours = (x.gather(1, chosen) for x in (positions, is_open, is_ours))
        logits = self._logits(places, step)
        present = self.canvas.token_ids.gather(1, places)
        uniform = self.noise.uniform(STREAM_TOKENS, step.index, self.canvas.token_ids.shape[1])
        drawn = self.sampler.distribution.draw(logits, uniform.gather(1, places))
        tokens = torch.where(is_open, drawn.clamp(min=0), present)
        choice = self.rule.choose(self._as_candidates(step, places, logits, tokens, is_open, is_ours, num_open))
        self._write(step, places, logits, tokens, present, choice)
        self._monitor.push(step, self._figures(step, positions, (drawn < 0).any()))

    def _candidates(self, step: Step, positions: Tensor, is_open: Tensor) -> Tensor:
        """Indices (B, M) into the positions of the block that get logits, those that may be committed first."""
        if self.rule.scope == "chosen":
            order = self._order.gather(1, positions).masked_fill(~is_open, -1.0)
            return order.argsort(dim=1, descending=True)[:, : step.num_candidates]
        if step.num_candidates == positions.shape[1]:
            return torch.arange(step.num_candidates, device=positions.device).expand_as(positions)
        return (~is_open).to(torch.uint8).argsort(dim=1, stable=True)[:, : step.num_candidates]

    def _logits(self, positions: Tensor, step: Step) -> Tensor:
        """Logits (B, M, V) in which the mask, and what else must not be written, is impossible."""
        given: dict[str, Any] = {"positions": positions}
        if self.canvas.is_ragged:
            given["attention_mask"] = self.canvas.attention_mask
        call = "demasker"
        if self._cache is not None and not (self.sampler.cache == "none" and self.latents is None):
            given["cache"] = self._cache
            if self.sampler.cache != "none" and step is self.plan[step.block][0]:
                self._cache.clear()
            if self._cache.is_filled:
                given["window"] = window = self._window(step)
                call = f"demasker[{window.shape[1]}]"
        self._computed[call] += 1 if self.sampler.guidance_scale == 1.0 else 2
        logits = self.demasker(self.canvas.token_ids, self.latents, **given)
        logits[..., self.mask_token_id] = -torch.inf
        if self.sampler.eos == "never":
            logits.index_fill_(-1, self.stop_token_ids, -torch.inf)
        return logits

    def _window(self, step: Step) -> Tensor:
        """The positions that are computed: the block ("dual"), all from it on ("prefix"), or the whole text."""
        if self.sampler.cache == "none":
            return torch.arange(self.canvas.token_ids.shape[1], device=self.noise.keys.device).expand_as(
                self.canvas.token_ids
            )
        start, end = step.block * self.block_size, self.canvas.length
        if self.sampler.cache == "dual":
            end = start + self.block_size
        return self.canvas.starts[:, None] + torch.arange(start, end, device=self.canvas.starts.device)

    def _as_candidates(
        self,
        step: Step,
        places: Tensor,
        logits: Tensor,
        tokens: Tensor,
        is_open: Tensor,
        is_ours: Tensor,
        num_open: Tensor,
    ) -> Candidates:
        is_late = torch.isin(tokens, self.stop_token_ids) & is_open if self.sampler.eos == "last" else None
        quota = step.quota
        if self.rule.is_adaptive:  # one at least, and enough to be done after num_steps
            quota = torch.minimum((num_open - step.num_left).clamp(min=1), num_open)
        num_steps = self.sampler.num_steps // len(self.plan)
        uniform = self.noise.uniform(STREAM_ORDER, step.index + 1, self.canvas.token_ids.shape[1])
        return Candidates(
            logits=logits,
            tokens=tokens,
            is_open=is_open,
            is_written=is_ours & ~is_open,
            is_late=is_late,
            quota=quota,
            num_kept=is_ours.sum(1) - step.num_left,
            uniform=uniform.gather(1, places),
            now=step.place / num_steps,
            after=(step.place + 1) / num_steps,
        )

    def _write(
        self, step: Step, places: Tensor, logits: Tensor, tokens: Tensor, present: Tensor, choice: Choice
    ) -> None:
        written = torch.where(choice.commit, tokens, present)
        if choice.remask is not None:
            written = written.masked_fill(choice.remask, self.mask_token_id)
        self.canvas.token_ids = self.canvas.token_ids.scatter(1, places, written)
        if self.on_step is not None:
            nothing = torch.zeros_like(self.canvas.is_ours)
            remask = torch.zeros_like(choice.commit) if choice.remask is None else choice.remask
            sure = confidence(logits, tokens).exp() * choice.commit
            self.on_step(
                StepEvent(
                    index=step.index,
                    token_ids=self.canvas.token_ids,
                    committed=nothing.scatter(1, places, choice.commit),
                    remasked=nothing.scatter(1, places, remask),
                    confidence=nothing.to(sure.dtype).scatter(1, places, sure),
                    refreshed=self._is_refreshed,
                )
            )
        self._is_refreshed = False

    def _figures(self, step: Step, positions: Tensor, is_bad: Tensor) -> Tensor:
        """What the host must know, (3,) int64: bad logits, most masks left in a row of the block, unfinished rows."""
        nothing = torch.zeros_like(is_bad, dtype=torch.int64)
        most_open = num_unfinished = nothing
        if self.rule.is_adaptive:
            is_masked = self.canvas.token_ids.gather(1, positions) == self.mask_token_id
            most_open = (is_masked & self.canvas.block(step.block, self.block_size)[1]).sum(1).max()
        if self.sampler.early_stop:
            num_unfinished = (~self.canvas.finished(self.mask_token_id, self.stop_token_ids)).sum()
        return torch.stack([is_bad.long(), most_open, num_unfinished])

    def output(self, calls: dict[str, int] | None = None) -> SampleOutput:
        """The canvas as it is, and the calls made; `calls` are those of other networks."""
        num_calls = self._computed.total()
        made = {"demasker": 0, **self._computed, **(calls or {})}
        return SampleOutput(self.canvas.token_ids, num_calls, made, self.latents, self.canvas.ends)


@dataclass(frozen=True)
class Known:
    """What the host knows of the run: the figures of a step that is over."""

    block: int = -1
    most_open: int = 0
    all_finished: bool = False


class Monitor:
    """Brings a few numbers of each step to the host, which looks at them a step later, so that a GPU never waits.

    Args:
        device: of the run; on a CPU nothing is gained by looking later.
    """

    def __init__(self, device: torch.device) -> None:
        self.is_late = device.type == "cuda"
        self._pending: deque[tuple[Step, Tensor, Any]] = deque()
        self._known = Known()

    def push(self, step: Step, figures: Tensor) -> None:
        """Takes the figures (3,) of a step; see `Decoding`."""
        event = None
        if self.is_late:
            host = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
            figures = host.copy_(figures, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending.append((step, figures, event))

    def latest(self, wait: bool) -> Known:
        """What is known by now; `wait` for all steps but the last, which the device may be working at.

        Raises:
            FloatingPointError: if the network returned something that is no distribution.
        """
        while len(self._pending) > self.is_late and (wait or self._is_there()):
            step, figures, event = self._pending.popleft()
            if event is not None:
                event.synchronize()
            is_bad, most_open, num_unfinished = figures.tolist()
            if is_bad:
                raise FloatingPointError(
                    f"the demasker returned NaN or infinite logits at step {step.index}; nothing was written"
                )
            self._known = Known(step.block, most_open, not num_unfinished)
        return self._known

    def _is_there(self) -> bool:
        event = self._pending[0][2]
        return event is None or event.query()

    def drain(self) -> None:
        """Waits for the last step."""
        self.is_late = False
        self.latest(wait=True)


def stop_token_ids(demasker: DemaskerLike, sampler: "MaskedSampler") -> tuple[int, ...]:
    """The tokens that end a text, as far as the settings need them.

    Raises:
        ValueError: if they do, and the demasker names none.
    """
    eos = getattr(demasker, "eos_token_id", None)
    ids = getattr(demasker, "stop_token_ids", () if eos is None else (eos,))
    if not ids and (sampler.early_stop or sampler.eos != "free"):
        raise ValueError("early_stop and eos need a demasker with an eos_token_id")
    return tuple(ids)

"""The plain masked-diffusion sampler: from masks to text in `num_steps` calls of the demasker."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from crocodil.diffusion.noise import RowNoise
from crocodil.samplers.unmasking import REMASKING_RULES, Remasking, commit_scores, draw_tokens, keep_best, step_quotas

STREAM_TOKENS, STREAM_ORDER, STREAM_LATENTS = 0, 1, 2

ProgressCallback = Callable[[str, int, int], None]
"""Called as `progress(network, done, total)` after each call of a network."""


class DemaskerLike(Protocol):
    """What a sampler needs of f_theta."""

    mask_token_id: int

    def __call__(self, token_ids: Tensor, latents: Tensor | None = None, *, positions: Tensor | None = None) -> Tensor:
        """Logits (B, M, V) at `positions` of (B, L) `token_ids` under (B, K, D) `latents`."""
        ...


@dataclass
class SampleOutput:
    """What a sampler returns.

    Attributes:
        token_ids: (B, P + L) int64, the prompt included.
        num_calls: demasker calls made.
        calls: calls made of each network, by name: demasker, prior, encoder.
        latents: (B, K, D) the registers last used; None without latents.
    """

    token_ids: Tensor
    num_calls: int
    calls: dict[str, int] = field(default_factory=dict)
    latents: Tensor | None = None


@dataclass(frozen=True)
class Step:
    """One planned call of the demasker.

    Attributes:
        index: number of the step in the schedule, whichever steps are left out, which keys its randomness.
        block: the positions of the canvas, from start to end, that may be committed.
        num_open: most masked positions that any row still has in the block.
        num_committed: most positions that any row commits.
        quota: (B,) int64, how many positions each row commits.
    """

    index: int
    block: slice
    num_open: int
    num_committed: int
    quota: Tensor


class MaskedSampler:
    """Unmasks a canvas in equal shares: the sampler of LLaDA (arXiv 2502.09992, algorithm 4 and its appendix).

    Each step calls the demasker once, draws a token for every candidate position and commits the best of them under
    `remasking`; committed tokens stay. "random" commits a uniformly random subset, the exact reverse process given
    the number of reveals.

    Args:
        num_steps: demasker calls, at least 1. With blocks, a multiple of the number of blocks.
        block_size: tokens that are finished, left to right, before the next ones begin (semi-autoregressive);
            None takes the whole canvas as one block. Must divide the length.
        remasking: "random", "low_confidence", "margin" or "entropy".
        temperature: of the drawn tokens; 0 takes the most probable token, 1 samples the model as it is.

    Raises:
        ValueError: if a setting is out of range.
    """

    def __init__(
        self,
        num_steps: int = 64,
        block_size: int | None = None,
        remasking: Remasking = "low_confidence",
        temperature: float = 0.0,
    ) -> None:
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        if block_size is not None and block_size < 1:
            raise ValueError(f"block_size must be at least 1, or None for one block, got {block_size}")
        if remasking not in REMASKING_RULES:
            raise ValueError(f"remasking must be one of {', '.join(REMASKING_RULES)}, got {remasking!r}")
        if temperature < 0:
            raise ValueError(f"temperature must not be negative, got {temperature}")
        self.num_steps = num_steps
        self.block_size = block_size
        self.remasking: Remasking = remasking
        self.temperature = temperature

    @torch.no_grad()
    def sample(
        self,
        demasker: DemaskerLike,
        *,
        length: int,
        batch_size: int,
        prompt_ids: Tensor | None = None,
        latents: Tensor | None = None,
        generator: torch.Generator | RowNoise | None = None,
        device: torch.device | str = "cpu",
        progress: ProgressCallback | None = None,
    ) -> SampleOutput:
        """Writes `batch_size` texts.

        Args:
            demasker: f_theta.
            length: L, tokens to write behind the prompt.
            batch_size: B.
            prompt_ids: (P,) or (B, P) int64, kept in front; mask tokens in it are filled too. None for no prompt.
            latents: (B, K, D), held fixed; None for the plain model.
            generator: source of randomness: a torch generator, or a `RowNoise` that gives each row its own stream.
            device: where the canvas lies.
            progress: called after each demasker call.

        Returns:
            The texts, (B, P + L) int64, and the calls made.

        Raises:
            ValueError: if the length, the blocks and the steps do not fit together.
        """
        noise = as_row_noise(generator, batch_size, device)
        canvas = start_canvas(demasker.mask_token_id, length, batch_size, prompt_ids, device)
        return self._run(demasker, canvas, length, latents, noise, progress)

    @torch.no_grad()
    def fill(
        self,
        demasker: DemaskerLike,
        canvas: Tensor,
        *,
        latents: Tensor | None = None,
        generator: torch.Generator | RowNoise | None = None,
        progress: ProgressCallback | None = None,
    ) -> SampleOutput:
        """Fills the masks of a canvas, wherever they are; all other tokens stay.

        Args:
            demasker: f_theta.
            canvas: (B, L) int64.
            latents: (B, K, D), held fixed; None for the plain model.
            generator: source of randomness.
            progress: called after each demasker call.
        """
        noise = as_row_noise(generator, canvas.shape[0], canvas.device)
        return self._run(demasker, canvas, canvas.shape[1], latents, noise, progress)

    def _run(
        self,
        demasker: DemaskerLike,
        canvas: Tensor,
        length: int,
        latents: Tensor | None,
        noise: RowNoise,
        progress: ProgressCallback | None,
    ) -> SampleOutput:
        plan = self.plan(canvas, demasker.mask_token_id, length)
        for done, step in enumerate(plan, start=1):
            canvas = self.step(demasker, canvas, step, latents, noise)
            if progress is not None:
                progress("demasker", done, len(plan))
        return SampleOutput(canvas, len(plan), {"demasker": len(plan)}, latents)

    def plan(self, canvas: Tensor, mask_token_id: int, length: int) -> list[Step]:
        """All steps in advance: they depend on where the masks are, so the device is asked once and never in the loop.

        Masked positions of the prompt belong to the first block. Steps that would commit nothing are left out.
        """
        block_size = length if self.block_size is None else self.block_size
        num_blocks, rest = divmod(length, block_size)
        if rest:
            raise ValueError(f"block_size must divide the length, got block_size={block_size} and length={length}")
        if self.num_steps % num_blocks:
            raise ValueError(
                f"num_steps must be a multiple of the number of blocks, got num_steps={self.num_steps} "
                f"and {length} / {block_size} = {num_blocks} blocks"
            )
        ends = list(range(canvas.shape[1] - length + block_size, canvas.shape[1] + 1, block_size))
        steps_per_block = self.num_steps // num_blocks
        steps: list[Step] = []
        for block, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            quotas = step_quotas((canvas[:, start:end] == mask_token_id).sum(1), steps_per_block)
            num_open = quotas.flip(0).cumsum(0).flip(0).amax(1).tolist()
            num_committed = quotas.amax(1).tolist()
            steps += [
                Step(block * steps_per_block + i, slice(start, end), num_open[i], num_committed[i], quota)
                for i, quota in enumerate(quotas)
                if num_committed[i]
            ]
        return steps

    def step(
        self, demasker: DemaskerLike, canvas: Tensor, step: Step, latents: Tensor | None, noise: RowNoise
    ) -> Tensor:
        """One demasker call; returns the canvas (B, P + L) with this step's tokens committed."""
        width = canvas.shape[1]
        is_open = canvas[:, step.block] == demasker.mask_token_id
        if self.remasking == "random":  # the choice needs no logits: only the committed positions get them
            scores = noise.uniform(STREAM_ORDER, step.index, width)[:, step.block]
            order = scores.masked_fill(~is_open, -1.0).argsort(dim=1, descending=True)
            positions = order[:, : step.num_committed] + step.block.start
            commit = torch.arange(step.num_committed, device=canvas.device) < step.quota[:, None]
            tokens, _ = self._draw(demasker, canvas, positions, step, latents, noise)
        else:
            order = (~is_open).to(torch.uint8).argsort(dim=1, stable=True)[:, : step.num_open]
            positions = order + step.block.start
            tokens, logits = self._draw(demasker, canvas, positions, step, latents, noise)
            scores = commit_scores(self.remasking, logits, tokens)
            commit = keep_best(scores, is_open.gather(1, order), step.quota)
        kept = torch.where(commit, tokens, canvas.gather(1, positions))
        return canvas.scatter(1, positions, kept)

    def _draw(
        self,
        demasker: DemaskerLike,
        canvas: Tensor,
        positions: Tensor,
        step: Step,
        latents: Tensor | None,
        noise: RowNoise,
    ) -> tuple[Tensor, Tensor]:
        """Tokens (B, M) drawn at `positions`, and their logits (B, M, V), in which the mask is impossible."""
        logits = demasker(canvas, latents, positions=positions)
        logits[..., demasker.mask_token_id] = -torch.inf
        uniform = noise.uniform(STREAM_TOKENS, step.index, canvas.shape[1]).gather(1, positions)
        return draw_tokens(logits, self.temperature, uniform), logits


def start_canvas(
    mask_token_id: int, length: int, batch_size: int, prompt_ids: Tensor | None, device: torch.device | str
) -> Tensor:
    """The prompt, (P,) or (B, P), then `length` masks: (B, P + L) int64."""
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    masks = torch.full((batch_size, length), mask_token_id, dtype=torch.int64, device=device)
    if prompt_ids is None:
        return masks
    prompt_ids = prompt_ids.to(device)
    if prompt_ids.ndim == 1:
        prompt_ids = prompt_ids.expand(batch_size, -1)
    if prompt_ids.ndim != 2 or prompt_ids.shape[0] != batch_size:
        raise ValueError(f"prompt_ids must be (P,) or ({batch_size}, P), got {tuple(prompt_ids.shape)}")
    return torch.cat([prompt_ids, masks], dim=1)


def as_row_noise(generator: torch.Generator | RowNoise | None, batch_size: int, device: torch.device | str) -> RowNoise:
    """The randomness of a run: a `RowNoise` as it is, else one seed a row drawn from the generator."""
    if isinstance(generator, RowNoise):
        return generator
    return RowNoise.from_generator(generator, batch_size, torch.device(device))

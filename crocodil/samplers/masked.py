"""The plain masked-diffusion sampler: from masks to text in `num_steps` calls of the demasker."""

from typing import Literal, get_args

import torch
from torch import Tensor

from crocodil.diffusion.noise import RowNoise
from crocodil.samplers.canvas import Canvas, PromptIds, canvas_to_fill, start_canvas
from crocodil.samplers.decoding import Decoding
from crocodil.samplers.drawing import TokenDistribution
from crocodil.samplers.guidance import GuidedBy
from crocodil.samplers.protocols import DemaskerLike, ProgressCallback, SampleOutput, StepCallback
from crocodil.samplers.unmasking import RandomOrder, ReMDM, UnmaskingRule, UnmaskingSchedule, make_rule

Eos = Literal["free", "last", "never"]
CacheKind = Literal["none", "prefix", "dual"]


class MaskedSampler:
    """Unmasks a canvas: the sampler of LLaDA (arXiv 2502.09992, algorithm 4 and its appendix) under any rule.

    Each step calls the demasker once, draws a token for every candidate position and lets the rule commit some of them.

    Args:
        num_steps: demasker calls, at least 1; the most there can be for rules that commit more than their share. With
            blocks, a multiple of the number of blocks.
        block_size: tokens that are finished, left to right, before the next ones begin (semi-autoregressive);
            None takes the whole canvas as one block. Must divide the length.
        remasking: a rule, or the name of one: "random", "ancestral", "low_confidence", "margin", "entropy",
            "threshold", "factor", "entropy_bound", "remdm_cap", "remdm_rescale", "p2"; a number may follow a colon
            ("threshold:0.8"). See `RULES`.
        temperature: of the drawn tokens; 0 takes the most probable token, 1 samples the model as it is.
        top_p: see `TokenDistribution`.
        top_k: likewise.
        eos: "free" treats stop tokens as any other, "last" commits them after all others of the block, "never" does
            not write them.
        early_stop: end once every row has a stop token and nothing masked before it. Behind its first stop token a
            text is then filled with the end token. Rules that mask again have no early end.
        guidance_scale: classifier-free guidance; 1.0 is off, anything else costs two calls a step.
        guided_by: "latents" or "prompt"; see `GuidedDemasker`.
        cache: keys and values that are kept within a block, as in Fast-dLLM (arXiv 2505.22618): "none"; "prefix",
            those of all that is before the block; "dual", also those behind it. They are as old as the block's first
            step, which is an approximation.
        static_shapes: ask for logits at a fixed number of positions, so that a compiled demasker is compiled once.
        unmasking_schedule: how many tokens a step commits, "linear" or "cosine"; see `step_quotas`.

    Raises:
        ValueError: if a setting is out of range or settings do not go together.
    """

    def __init__(
        self,
        num_steps: int = 64,
        block_size: int | None = None,
        remasking: str | UnmaskingRule = "low_confidence",
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        eos: Eos = "free",
        early_stop: bool = False,
        guidance_scale: float = 1.0,
        guided_by: GuidedBy = "latents",
        cache: CacheKind = "none",
        static_shapes: bool = False,
        unmasking_schedule: UnmaskingSchedule = "linear",
    ) -> None:
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        if block_size is not None and block_size < 1:
            raise ValueError(f"block_size must be at least 1, or None for one block, got {block_size}")
        if not guidance_scale > 0:
            raise ValueError(f"guidance_scale must be above 0 (1.0 is off), got {guidance_scale}")
        choices = (
            ("eos", eos, Eos),
            ("guided_by", guided_by, GuidedBy),
            ("cache", cache, CacheKind),
            ("unmasking_schedule", unmasking_schedule, UnmaskingSchedule),
        )
        for name, value, known in choices:
            if value not in get_args(known):
                raise ValueError(f"{name} must be one of {', '.join(get_args(known))}, got {value!r}")
        self.rule = make_rule(remasking) if isinstance(remasking, str) else remasking
        if eos == "last" and isinstance(self.rule, RandomOrder | ReMDM):
            raise ValueError(
                f"eos='last' needs a rule that compares tokens, but {remasking} does not; give eos='never'"
            )
        if unmasking_schedule != "linear" and self.rule.has_own_schedule:
            raise ValueError(
                f"unmasking_schedule must be linear under {remasking}, which has a noise schedule of its own"
            )
        if early_stop and self.rule.scope == "block":
            raise ValueError(f"early_stop needs a rule that never masks again, but {remasking} does")
        self.distribution = TokenDistribution(temperature, top_p, top_k)
        self.num_steps = num_steps
        self.block_size = block_size
        self.eos: Eos = eos
        self.early_stop = early_stop
        self.guidance_scale = guidance_scale
        self.guided_by: GuidedBy = guided_by
        self.cache: CacheKind = cache
        self.static_shapes = static_shapes
        self.unmasking_schedule: UnmaskingSchedule = unmasking_schedule

    def sample(
        self,
        demasker: DemaskerLike,
        *,
        length: int,
        batch_size: int,
        prompt_ids: PromptIds | None = None,
        latents: Tensor | None = None,
        generator: torch.Generator | RowNoise | None = None,
        device: torch.device | str = "cpu",
        progress: ProgressCallback | None = None,
        on_step: StepCallback | None = None,
    ) -> SampleOutput:
        """Writes `batch_size` texts.

        Args:
            demasker: f_theta.
            length: L, tokens to write behind the prompt.
            batch_size: B.
            prompt_ids: (P,) or (B, P) int64, or B prompts of any lengths, kept in front; mask tokens in them are filled
                too. None for no prompt.
            latents: (B, K, D), held fixed; None for the plain model.
            generator: source of randomness: a torch generator, or a `RowNoise` that gives each row its own stream.
            device: where the canvas lies.
            progress: called after each demasker call.
            on_step: called after each step with what happened (`StepEvent`).

        Returns:
            The texts, (B, P + L) int64, and the calls made.

        Raises:
            ValueError: if the length, the blocks and the steps do not fit together.
            FloatingPointError: if the demasker returns something that is no distribution.
        """
        noise = as_row_noise(generator, batch_size, device)
        canvas = self.canvas(demasker, length, batch_size, prompt_ids, device)
        return self._run(Decoding(self, demasker, canvas, noise, latents, progress, on_step))

    def fill(
        self,
        demasker: DemaskerLike,
        token_ids: Tensor,
        *,
        latents: Tensor | None = None,
        generator: torch.Generator | RowNoise | None = None,
        progress: ProgressCallback | None = None,
        on_step: StepCallback | None = None,
    ) -> SampleOutput:
        """Fills the masks of texts (B, L) int64, wherever they are; all other tokens stay. See `sample`."""
        noise = as_row_noise(generator, token_ids.shape[0], token_ids.device)
        canvas = canvas_to_fill(token_ids, demasker.mask_token_id)
        return self._run(Decoding(self, demasker, canvas, noise, latents, progress, on_step))

    def canvas(
        self,
        demasker: DemaskerLike,
        length: int,
        batch_size: int,
        prompt_ids: PromptIds | None,
        device: torch.device | str,
    ) -> Canvas:
        """The canvas that `sample` starts from."""
        pad = getattr(demasker, "eos_token_id", 0)
        return start_canvas(demasker.mask_token_id, length, batch_size, prompt_ids, device, pad)

    def _run(self, decoding: Decoding) -> SampleOutput:
        for step in decoding.steps():
            decoding.take(step)
        return decoding.output()


def as_row_noise(generator: torch.Generator | RowNoise | None, batch_size: int, device: torch.device | str) -> RowNoise:
    """The randomness of a run: a `RowNoise` as it is, else one seed a row drawn from the generator."""
    if isinstance(generator, RowNoise):
        return generator
    return RowNoise.from_generator(generator, batch_size, torch.device(device))

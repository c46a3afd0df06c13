"""ConWithinDisc: the sketch is drawn again from what has been written so far (CRoCoDiL, section 4)."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from crocodil.diffusion.noise import RowNoise
from crocodil.samplers.conthendisc import first_registers
from crocodil.samplers.latent import LatentSampler, PriorLike
from crocodil.samplers.masked import (
    DemaskerLike,
    MaskedSampler,
    ProgressCallback,
    SampleOutput,
    as_row_noise,
    start_canvas,
)


class EncoderLike(Protocol):
    """What a sampler needs of h_phi."""

    def __call__(self, token_ids: Tensor) -> Tensor:
        """Latents (B, K, D) of partly masked texts (B, L) int64."""
        ...


class ConWithinDisc:
    """As ConThenDisc, and before chosen steps a fresh z_0 ~ G_psi(noise | h_phi(x_t)) from the partly unmasked text.

    Args:
        sampler: fills the tokens in.
        latent_sampler: draws the first registers.
        refresh_sampler: draws the later ones; None takes `latent_sampler`. The paper uses a quarter of its steps.
        refresh_steps: demasker steps, counted from 0, before which the registers are drawn again; None is once,
            half-way, as in the paper. Step 0 replaces the unconditional draw, which conditions on a prompt. A step
            that is left out because nothing remains to commit in it hands its refresh to the next one.
        num_registers: how many registers the demasker reads, the first k of K; None for all.

    Raises:
        ValueError: if a refresh step does not exist.
    """

    def __init__(
        self,
        sampler: MaskedSampler,
        latent_sampler: LatentSampler,
        refresh_sampler: LatentSampler | None = None,
        refresh_steps: Sequence[int] | None = None,
        num_registers: int | None = None,
    ) -> None:
        steps = {sampler.num_steps // 2} if refresh_steps is None else set(refresh_steps)
        if beyond := sorted(step for step in steps if not 0 <= step < sampler.num_steps):
            raise ValueError(f"refresh_steps must be between 0 and {sampler.num_steps - 1}, got {beyond}")
        self.sampler = sampler
        self.latent_sampler = latent_sampler
        self.refresh_sampler = refresh_sampler or latent_sampler
        self.refresh_steps = frozenset(steps)
        self.num_registers = num_registers

    @torch.no_grad()
    def sample(
        self,
        demasker: DemaskerLike,
        prior: PriorLike,
        encoder: EncoderLike,
        *,
        length: int,
        batch_size: int,
        prompt_ids: Tensor | None = None,
        generator: torch.Generator | RowNoise | None = None,
        device: torch.device | str = "cpu",
        progress: ProgressCallback | None = None,
    ) -> SampleOutput:
        """Writes `batch_size` texts; arguments as in `MaskedSampler.sample`."""
        noise = as_row_noise(generator, batch_size, device)
        canvas = start_canvas(demasker.mask_token_id, length, batch_size, prompt_ids, device)
        plan = self.sampler.plan(canvas, demasker.mask_token_id, length)
        calls = {"demasker": len(plan), "prior": 0, "encoder": 0}
        latents: Tensor | None = None
        pending = sorted(self.refresh_steps)
        for done, step in enumerate(plan, start=1):
            due = [refresh_step for refresh_step in pending if refresh_step <= step.index]
            pending = pending[len(due) :]
            refresh = bool(due)
            if refresh or latents is None:
                latent_sampler = self.refresh_sampler if refresh else self.latent_sampler
                condition = encoder(canvas) if refresh else None
                latents = first_registers(
                    latent_sampler.sample(
                        prior,
                        batch_size=batch_size,
                        condition=condition,
                        generator=noise,
                        draw=due[-1] if refresh else 0,
                        device=device,
                        progress=progress,
                    ),
                    self.num_registers,
                )
                calls["prior"] += latent_sampler.num_calls(conditional=refresh)
                calls["encoder"] += refresh
            canvas = self.sampler.step(demasker, canvas, step, latents, noise)
            if progress is not None:
                progress("demasker", done, len(plan))
        return SampleOutput(canvas, len(plan), calls, latents)

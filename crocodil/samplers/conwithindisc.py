"""ConWithinDisc: the sketch is drawn again from what has been written so far (CRoCoDiL, section 4)."""

from collections.abc import Sequence

import torch

from crocodil.diffusion.noise import RowNoise
from crocodil.samplers.canvas import PromptIds
from crocodil.samplers.conthendisc import first_registers, partly_masked
from crocodil.samplers.decoding import Decoding
from crocodil.samplers.latent import PriorLike, RegisterSampler
from crocodil.samplers.masked import MaskedSampler, as_row_noise
from crocodil.samplers.mean_flow import StudentLike
from crocodil.samplers.protocols import DemaskerLike, EncoderLike, ProgressCallback, SampleOutput, StepCallback


class ConWithinDisc:
    """As ConThenDisc, and before chosen steps a fresh z_0 ~ G_psi(noise | h_phi(x_t)) from the partly unmasked text.

    Args:
        sampler: fills the tokens in.
        latent_sampler: draws the first registers, with the prior or its student.
        refresh_sampler: draws the later ones with the same network; None takes `latent_sampler`. The paper uses a
            quarter of its steps.
        refresh_steps: demasker steps, counted from 0, before which the registers are drawn again; None is once,
            half-way through the steps that commit something, as in the paper, and with a prompt also at step 0. Step 0
            replaces the unconditional draw. A step that is left out because nothing remains to commit in it hands its
            refresh to the next one.
        num_registers: how many registers the demasker reads, the first k of K; None for all.

    Raises:
        ValueError: if a refresh step does not exist.
    """

    def __init__(
        self,
        sampler: MaskedSampler,
        latent_sampler: RegisterSampler,
        refresh_sampler: RegisterSampler | None = None,
        refresh_steps: Sequence[int] | None = None,
        num_registers: int | None = None,
    ) -> None:
        if beyond := sorted(step for step in refresh_steps or () if not 0 <= step < sampler.num_steps):
            raise ValueError(f"refresh_steps must be between 0 and {sampler.num_steps - 1}, got {beyond}")
        self.sampler = sampler
        self.latent_sampler = latent_sampler
        self.refresh_sampler = refresh_sampler or latent_sampler
        self.refresh_steps = None if refresh_steps is None else frozenset(refresh_steps)
        self.num_registers = num_registers

    @torch.no_grad()
    def sample(
        self,
        demasker: DemaskerLike,
        prior: PriorLike | StudentLike,
        encoder: EncoderLike,
        *,
        length: int,
        batch_size: int,
        prompt_ids: PromptIds | None = None,
        generator: torch.Generator | RowNoise | None = None,
        device: torch.device | str = "cpu",
        progress: ProgressCallback | None = None,
        on_step: StepCallback | None = None,
    ) -> SampleOutput:
        """Writes `batch_size` texts; arguments as in `ConThenDisc.sample`."""
        noise = as_row_noise(generator, batch_size, device)
        canvas = self.sampler.canvas(demasker, length, batch_size, prompt_ids, device)
        decoding = Decoding(self.sampler, demasker, canvas, noise, None, progress, on_step)
        calls = {self.latent_sampler.network: 0, "encoder": 0}
        pending = self._refreshes(length, prompt_ids is not None)
        for step in decoding.steps():
            due = [refresh for refresh in pending if refresh <= step.index]
            pending = pending[len(due) :]
            if due or decoding.latents is None:
                latent_sampler = self.refresh_sampler if due else self.latent_sampler
                latents = latent_sampler.sample(
                    prior,
                    batch_size=batch_size,
                    condition=encoder(*partly_masked(canvas)) if due else None,
                    generator=noise,
                    draw=due[-1] if due else 0,
                    device=device,
                    progress=progress,
                )
                decoding.latents = first_registers(latents, self.num_registers)
                calls[latent_sampler.network] += latent_sampler.num_calls(conditional=bool(due))
                calls["encoder"] += bool(due)
            decoding.take(step)
        return decoding.output(calls)

    def _refreshes(self, length: int, has_prompt: bool) -> list[int]:
        """The steps before which the registers are drawn under a condition."""
        if self.refresh_steps is not None:
            return sorted(self.refresh_steps)
        half_way = self.half_way(length)
        return sorted({0, half_way}) if has_prompt else [half_way]

    def half_way(self, length: int) -> int:
        """The step before which half of the calls are made: steps beyond one for each token may not be.

        Rules that commit more than their share may be done before it: give them `refresh_steps`.
        """
        sampler = self.sampler
        num_blocks = length // (sampler.block_size or length)
        per_block = useful = sampler.num_steps // num_blocks
        if sampler.rule.idles:
            useful = min(per_block, length // num_blocks)
        block, place = divmod(useful * num_blocks // 2, useful)
        return block * per_block + place

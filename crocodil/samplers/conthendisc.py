"""ConThenDisc: first a continuous sketch of the whole text, then discrete tokens under it (CRoCoDiL, section 4)."""

import torch
from torch import Tensor

from crocodil.diffusion.noise import RowNoise
from crocodil.samplers.latent import LatentSampler, PriorLike
from crocodil.samplers.masked import (
    DemaskerLike,
    MaskedSampler,
    ProgressCallback,
    SampleOutput,
    as_row_noise,
)


class ConThenDisc:
    """z_0 ~ G_psi(noise); x = all masks; then the masked-diffusion sampler with z_0 held fixed.

    Args:
        sampler: fills the tokens in.
        latent_sampler: draws the registers.
        num_registers: how many registers the demasker reads, the first k of K; None for all.
    """

    def __init__(self, sampler: MaskedSampler, latent_sampler: LatentSampler, num_registers: int | None = None) -> None:
        self.sampler = sampler
        self.latent_sampler = latent_sampler
        self.num_registers = num_registers

    @torch.no_grad()
    def sample(
        self,
        demasker: DemaskerLike,
        prior: PriorLike,
        *,
        length: int,
        batch_size: int,
        prompt_ids: Tensor | None = None,
        generator: torch.Generator | RowNoise | None = None,
        device: torch.device | str = "cpu",
        progress: ProgressCallback | None = None,
    ) -> SampleOutput:
        """Writes `batch_size` texts; arguments as in `MaskedSampler.sample`.

        The prior is unconditional: a prompt is read by the demasker alone. `ConWithinDisc` with step 0 among its
        refresh steps tells the prior of the prompt, too.
        """
        noise = as_row_noise(generator, batch_size, device)
        latents = first_registers(
            self.latent_sampler.sample(prior, batch_size=batch_size, generator=noise, device=device, progress=progress),
            self.num_registers,
        )
        out = self.sampler.sample(
            demasker,
            length=length,
            batch_size=batch_size,
            prompt_ids=prompt_ids,
            latents=latents,
            generator=noise,
            device=device,
            progress=progress,
        )
        out.calls["prior"] = self.latent_sampler.num_calls(conditional=False)
        return out


def first_registers(latents: Tensor, num_registers: int | None) -> Tensor:
    """Registers 1 .. k of (B, K, D) latents: nested dropout makes any prefix a valid latent.

    Raises:
        ValueError: if k is not between 1 and K.
    """
    if num_registers is None:
        return latents
    if not 1 <= num_registers <= latents.shape[1]:
        raise ValueError(f"num_registers must be between 1 and the trained {latents.shape[1]}, got {num_registers}")
    return latents[:, :num_registers]

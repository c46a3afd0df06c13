"""ConThenDisc: first a continuous sketch of the whole text, then discrete tokens under it (CRoCoDiL, section 4)."""

import torch
from torch import Tensor

from crocodil.diffusion.noise import RowNoise
from crocodil.samplers.canvas import Canvas, PromptIds
from crocodil.samplers.decoding import Decoding
from crocodil.samplers.latent import PriorLike, RegisterSampler
from crocodil.samplers.masked import MaskedSampler, as_row_noise
from crocodil.samplers.mean_flow import StudentLike
from crocodil.samplers.protocols import DemaskerLike, EncoderLike, ProgressCallback, SampleOutput, StepCallback


class ConThenDisc:
    """z_0 ~ G_psi(noise); x = all masks; then the masked-diffusion sampler with z_0 held fixed.

    With a prompt and an encoder, z_0 ~ G_psi(noise | h_phi(prompt and masks)), which the paper leaves to future work.

    Args:
        sampler: fills the tokens in.
        latent_sampler: draws the registers, with the prior or its student.
        num_registers: how many registers the demasker reads, the first k of K; None for all.
    """

    def __init__(
        self, sampler: MaskedSampler, latent_sampler: RegisterSampler, num_registers: int | None = None
    ) -> None:
        self.sampler = sampler
        self.latent_sampler = latent_sampler
        self.num_registers = num_registers

    @torch.no_grad()
    def sample(
        self,
        demasker: DemaskerLike,
        prior: PriorLike | StudentLike,
        encoder: EncoderLike | None = None,
        *,
        length: int,
        batch_size: int,
        prompt_ids: PromptIds | None = None,
        generator: torch.Generator | RowNoise | None = None,
        device: torch.device | str = "cpu",
        progress: ProgressCallback | None = None,
        on_step: StepCallback | None = None,
    ) -> SampleOutput:
        """Writes `batch_size` texts.

        Args:
            demasker: f_theta.
            prior: G_psi or its student, as `latent_sampler` needs; with an encoder, trained with conditions.
            encoder: h_phi, which tells the prior of the prompt; None leaves the prompt to the demasker.
            length: see `MaskedSampler.sample`, as for what follows.
            batch_size: B.
            prompt_ids: kept in front.
            generator: source of randomness.
            device: where the canvas lies.
            progress: called after each network call.
            on_step: called after each step.
        """
        noise = as_row_noise(generator, batch_size, device)
        canvas = self.sampler.canvas(demasker, length, batch_size, prompt_ids, device)
        condition = encoder(*partly_masked(canvas)) if encoder is not None and prompt_ids is not None else None
        latents = self.latent_sampler.sample(
            prior, batch_size=batch_size, condition=condition, generator=noise, device=device, progress=progress
        )
        latents = first_registers(latents, self.num_registers)
        decoding = Decoding(self.sampler, demasker, canvas, noise, latents, progress, on_step)
        for step in decoding.steps():
            decoding.take(step)
        is_conditional = condition is not None
        calls = {self.latent_sampler.network: self.latent_sampler.num_calls(is_conditional)}
        return decoding.output(calls | ({"encoder": 1} if is_conditional else {}))


def partly_masked(canvas: Canvas) -> tuple[Tensor, ...]:
    """What an encoder reads of a canvas: its tokens, and where rows are padded their attention mask."""
    mask = canvas.attention_mask
    return (canvas.token_ids,) if mask is None else (canvas.token_ids, mask)


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

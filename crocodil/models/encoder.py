"""h_phi(x): the encoder, which reads a text into K register vectors."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, PretrainedConfig

from crocodil.models.backbone import add_register_axis, join_masks, network_config, positions_with_registers


class RegisterEncoder(nn.Module):
    r"""z = h_phi(x): K learned register tokens appended to the text, read out at the last layer (CRoCoDiL, section 3).

    The states of the registers are projected to D, layer-normalised without affine, and standardised coordinate by
    coordinate, (z - latent_mean) / latent_std, with running statistics that training updates and that are saved with
    the weights. Latents are therefore always unit-variance: noise of standard deviation sigma gives the cosine
    1 / sqrt(1 + sigma^2).

    Args:
        network: settings of a transformers encoder or decoder (`model_type`, `hidden_size`, ...).
        num_registers: K, the largest number of registers.
        latent_dim: D, the width of a register.
        register_spacing: distance of the registers on the text axis, in tokens; see `TwoAxisRotary`.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(
        self,
        network: Mapping[str, Any] | PretrainedConfig,
        *,
        num_registers: int,
        latent_dim: int,
        register_spacing: float = 0.0,
    ) -> None:
        super().__init__()
        config = network_config(network)
        self.network = AutoModel.from_config(config)
        self.has_register_axis = add_register_axis(self.network, register_spacing)
        self.num_registers = num_registers
        self.latent_dim = latent_dim
        self.register_spacing = register_spacing
        self.registers = nn.Parameter(torch.randn(num_registers, config.hidden_size) * 0.02)
        self.out_proj = nn.Linear(config.hidden_size, latent_dim)
        self.register_buffer("latent_mean", torch.zeros(num_registers, latent_dim))
        self.register_buffer("latent_std", torch.ones(num_registers, latent_dim))

    def forward(self, token_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Standardised latents (B, K, D) of texts (B, L) int64; `attention_mask` (B, L) is 1 at real tokens."""
        return self.standardize(self.encode(token_ids, attention_mask))

    def encode(self, token_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Latents (B, K, D) before standardisation."""
        batch, length = token_ids.shape
        text = self.network.get_input_embeddings()(token_ids)
        registers = self.registers.flip(0).to(text.dtype).expand(batch, -1, -1)
        # On the register axis order is told by position alone, so the suffix may stand first (positions stay
        # consecutive); a network with learned positions reads it where the paper puts it, behind the text.
        if self.has_register_axis:
            states = self.network(
                inputs_embeds=torch.cat([registers, text], dim=1),
                attention_mask=join_masks(None, attention_mask, batch, (self.num_registers, length)),
                position_ids=positions_with_registers(self.num_registers, length, token_ids.device),
            ).last_hidden_state[:, : self.num_registers]
        else:
            states = self.network(
                inputs_embeds=torch.cat([text, registers], dim=1),
                attention_mask=join_masks(attention_mask, None, batch, (length, self.num_registers)),
            ).last_hidden_state[:, length:]
        return F.layer_norm(self.out_proj(states.flip(1)).float(), (self.latent_dim,))

    def standardize(self, latents: Tensor) -> Tensor:
        """(z - latent_mean) / latent_std, coordinate by coordinate; latents are (B, K, D)."""
        return (latents - self.latent_mean) / self.latent_std

    def unstandardize(self, latents: Tensor) -> Tensor:
        """The inverse of `standardize`."""
        return latents * self.latent_std + self.latent_mean

    @torch.no_grad()
    def update_statistics(self, latents: Tensor, weight: float) -> None:
        """Moves `latent_mean` and `latent_std` towards those of a batch of unstandardised latents (B, K, D).

        The second moment is averaged, not the deviation, so that the spread between batches counts too.

        Args:
            latents: what `encode` returned.
            weight: share of the batch in the new statistics, in (0, 1]; 1 replaces them.
        """
        latents = latents.detach().float()
        square = self.latent_std**2 + self.latent_mean**2
        self.latent_mean.lerp_(latents.mean(0), weight)
        square.lerp_(latents.square().mean(0), weight)
        self.latent_std.copy_((square - self.latent_mean**2).clamp(min=1e-4).sqrt())

    def fingerprint(self) -> str:
        """Tells one trained autoencoder from another: a hash of its latent statistics."""
        statistics = torch.stack([self.latent_mean, self.latent_std]).double().cpu()
        return hashlib.sha256(statistics.numpy().tobytes()).hexdigest()[:16]

    def to_config(self) -> dict[str, Any]:
        """The constructor's arguments as plain data."""
        return {
            "network": self.network.config.to_diff_dict() | {"model_type": self.network.config.model_type},
            "num_registers": self.num_registers,
            "latent_dim": self.latent_dim,
            "register_spacing": self.register_spacing,
        }

"""G_psi: the latent prior, a transformer that denoises the K registers of a text."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crocodil.models.folders import load_network, save_network


class LatentPrior(nn.Module):
    """Predicts the clean latents from noisy ones, optionally under a condition h(x_t) (CRoCoDiL, section 3).

    A transformer over registers whose blocks are modulated by the noise level (adaLN-Zero, arXiv 2212.09748). Noisy
    latents, the previous estimate (self-conditioning, arXiv 2208.04202) and the condition enter side by side; absent
    ones are zero, and a learned vector tells whether there is a condition, so that one network serves ConThenDisc
    (none) and ConWithinDisc (h of the partly unmasked text).

    Args:
        num_registers: K.
        latent_dim: D.
        hidden_size: width of the transformer.
        num_layers: number of blocks.
        num_heads: attention heads; must divide `hidden_size`.
        mlp_ratio: width of the feed-forward layer in units of `hidden_size`.

    Raises:
        ValueError: if `num_heads` does not divide `hidden_size`.
    """

    def __init__(
        self,
        *,
        num_registers: int,
        latent_dim: int,
        hidden_size: int = 256,
        num_layers: int = 6,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"num_heads must divide hidden_size, got {num_heads} and {hidden_size}")
        self.config = {
            "num_registers": num_registers,
            "latent_dim": latent_dim,
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
        }
        self.num_registers = num_registers
        self.latent_dim = latent_dim
        self.in_proj = nn.Linear(3 * latent_dim, hidden_size)
        self.register_embedding = nn.Parameter(torch.randn(num_registers, hidden_size) * 0.02)
        self.noise_embedding = NoiseLevelEmbedding(hidden_size)
        self.condition_embedding = nn.Parameter(torch.zeros(hidden_size))
        self.blocks = nn.ModuleList([PriorBlock(hidden_size, num_heads, mlp_ratio) for _ in range(num_layers)])
        self.out_modulation = zero_linear(hidden_size, 2 * hidden_size)
        self.out_proj = zero_linear(hidden_size, latent_dim)

    def forward(
        self,
        noisy_latents: Tensor,
        log_snr: Tensor,
        *,
        self_condition: Tensor | None = None,
        condition: Tensor | None = None,
        condition_mask: Tensor | None = None,
    ) -> Tensor:
        """One evaluation of the network.

        Args:
            noisy_latents: (B, K, D) float, z_t = alpha_t z_0 + sigma_t noise.
            log_snr: (B,) float, log(alpha_t^2 / sigma_t^2).
            self_condition: (B, K, D), an earlier estimate of z_0; None for none.
            condition: (B, K, D), h_phi(x_t) of a partly masked text; None for the unconditional prior.
            condition_mask: (B,) bool, False drops the condition of a row; None keeps all.

        Returns:
            (B, K, D): the network's output in its prediction type (z_0 for "x0").
        """
        return self.denoise(noisy_latents, self.noise_embedding(log_snr), self_condition, condition, condition_mask)

    def denoise(
        self,
        noisy_latents: Tensor,
        modulation: Tensor,
        self_condition: Tensor | None,
        condition: Tensor | None,
        condition_mask: Tensor | None,
    ) -> Tensor:
        """The transformer under an embedded noise level.

        Args:
            noisy_latents: see `forward`, as for what is not told here.
            modulation: (B, hidden_size), embedding of the noise level.
            self_condition: likewise.
            condition: likewise.
            condition_mask: likewise.
        """
        absent = torch.zeros_like(noisy_latents)
        if condition is None:
            condition = absent
        else:
            keep = noisy_latents.new_ones(len(noisy_latents)) if condition_mask is None else condition_mask
            keep = keep.to(noisy_latents.dtype)
            condition = condition * keep[:, None, None]
            modulation = modulation + keep[:, None] * self.condition_embedding
        inputs = [noisy_latents, absent if self_condition is None else self_condition, condition]
        x = self.in_proj(torch.cat(inputs, dim=-1)) + self.register_embedding
        modulation = F.silu(modulation)
        for block in self.blocks:
            x = block(x, modulation)
        shift, scale = self.out_modulation(modulation)[:, None].chunk(2, dim=-1)
        return self.out_proj(modulate(x, shift, scale))

    def to_config(self) -> dict[str, Any]:
        """The constructor's arguments as plain data."""
        return dict(self.config)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "LatentPrior":
        """Reads what `save_pretrained` wrote."""
        return load_network(cls, folder)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` and safetensors; created if absent."""
        save_network(self, folder)


class PriorBlock(nn.Module):
    """Attention and feed-forward, each shifted, scaled and gated by the noise level."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.modulation = zero_linear(hidden_size, 6 * hidden_size)
        self.qkv_proj = nn.Linear(hidden_size, 3 * hidden_size)
        self.attention_proj = nn.Linear(hidden_size, hidden_size)
        width = int(mlp_ratio * hidden_size)
        self.mlp = nn.Sequential(nn.Linear(hidden_size, width), nn.GELU("tanh"), nn.Linear(width, hidden_size))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x: (B, K, H); modulation: (B, H)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(modulation)[:, None].chunk(6, dim=-1)
        x = x + gate_a * self._attention(modulate(x, shift_a, scale_a))
        return x + gate_m * self.mlp(modulate(x, shift_m, scale_m))

    def _attention(self, x: Tensor) -> Tensor:
        batch, registers, width = x.shape
        qkv = self.qkv_proj(x).view(batch, registers, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*qkv.unbind(0))
        return self.attention_proj(attended.transpose(1, 2).reshape(batch, registers, width))


class NoiseLevelEmbedding(nn.Module):
    """Sinusoidal features of log-SNR, then a two-layer network: (B,) -> (B, H)."""

    def __init__(self, hidden_size: int, num_features: int = 64) -> None:
        super().__init__()
        frequencies = torch.exp(torch.linspace(math.log(0.02), math.log(4.0), num_features // 2))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(num_features, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, log_snr: Tensor) -> Tensor:
        """Embeds log-SNRs, clipped to [-20, 20] where the features can still tell them apart."""
        angles = log_snr.clamp(-20, 20)[:, None] * self.get_buffer("frequencies")
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without affine, then scale and shift; x is (B, K, H), the others (B, 1, H)."""
    return F.layer_norm(x, (x.shape[-1],)) * (1 + scale) + shift


def zero_linear(in_features: int, out_features: int) -> nn.Linear:
    """A linear layer that starts at zero."""
    layer = nn.Linear(in_features, out_features)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer

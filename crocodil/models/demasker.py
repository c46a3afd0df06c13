"""f_theta(x_t, z): the demasker, a bidirectional decoder that reads registers as a prefix."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from crocodil.models.backbone import add_register_axis, join_masks, network_config, positions_with_registers

BLOCK_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear maps inside the blocks of Llama, Qwen2 and Qwen3; the head is not among them."""


class Demasker(nn.Module):
    r"""Predicts the clean tokens at masked positions: f_theta(x_0 | x_t, z) (CRoCoDiL, section 3).

    The K registers of `latents` are projected to the width of the network and stand before the text, on a rotary
    axis of their own (`TwoAxisRotary`). Without latents the network is the plain masked-diffusion model.

    Args:
        network: settings of a transformers decoder (`model_type`, `hidden_size`, ..., `vocab_size`).
        mask_token_id: id of the mask token.
        eos_token_id: id of the end token, which also fills the tail of a block.
        latent_dim: D, the width of a register; None builds a plain masked-diffusion model.
        num_registers: K, the largest number of registers; goes with `latent_dim`.
        register_spacing: distance of the registers on the text axis, in tokens; see `TwoAxisRotary`.
        lora: settings of `peft.LoraConfig` (`r`, `lora_alpha`, `target_modules`, ...); None trains all weights.

    Raises:
        ValueError: if the settings do not describe a rotary decoder.
    """

    def __init__(
        self,
        network: Mapping[str, Any] | PretrainedConfig,
        *,
        mask_token_id: int,
        eos_token_id: int,
        latent_dim: int | None = None,
        num_registers: int | None = None,
        register_spacing: float = 0.0,
        lora: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        config = network_config(network)
        self.network = AutoModelForCausalLM.from_config(config)
        if not add_register_axis(self.network.get_decoder()):
            raise ValueError(f"a demasker needs rotary positions, but a {config.model_type} network has none")
        self.mask_token_id = mask_token_id
        self.eos_token_id = eos_token_id
        self.latent_dim: int | None = None
        self.num_registers: int | None = None
        self.register_spacing = register_spacing
        self.register_proj: nn.Linear | None = None
        if latent_dim is not None and num_registers is not None:
            self.with_latents(latent_dim, num_registers, register_spacing)
        elif latent_dim is not None or num_registers is not None:
            raise ValueError(f"latent_dim and num_registers go together, got {latent_dim} and {num_registers}")
        self.lora: dict[str, Any] | None = None
        if lora is not None:
            self.with_lora(lora)

    @property
    def vocab_size(self) -> int:
        """V, the number of rows of the head."""
        return self.network.config.vocab_size

    @property
    def max_length(self) -> int:
        """The longest text, in tokens, that the network has positions for."""
        return self.network.config.max_position_embeddings

    def forward(
        self,
        token_ids: Tensor,
        latents: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        latent_mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Logits of the clean tokens.

        Args:
            token_ids: (B, L) int64, partly masked text x_t.
            latents: (B, K, D) float, standardised registers z; None for the plain model.
            attention_mask: (B, L), 1 where a token may be attended to; None where nothing is padded.
            latent_mask: (B, K), 1 where a register may be attended to; None for all. A row of zeros is the row
                without latents.
            positions: (B, M) int64, the text positions whose logits are wanted; None for all L.

        Returns:
            (B, L, V) float logits, or (B, M, V) at `positions`.

        Raises:
            ValueError: if the text is longer than the network allows or the latents do not fit it.
        """
        batch, length = token_ids.shape
        if length > self.max_length:
            raise ValueError(f"the demasker reads at most {self.max_length} tokens, got {length}")
        embeddings = self.network.get_input_embeddings()(token_ids)
        num_registers = 0
        if latents is not None:
            embeddings = torch.cat([self._registers(latents).to(embeddings.dtype), embeddings], dim=1)
            num_registers = latents.shape[1]
            latent_mask = None if latent_mask is None else latent_mask.flip(1)
        hidden = self.network.get_decoder()(
            inputs_embeds=embeddings,
            attention_mask=join_masks(latent_mask, attention_mask, batch, (num_registers, length)),
            position_ids=positions_with_registers(num_registers, length, token_ids.device),
            use_cache=False,
        ).last_hidden_state[:, num_registers:]
        if positions is not None:
            hidden = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))
        return self.network.get_output_embeddings()(hidden)

    def _registers(self, latents: Tensor) -> Tensor:
        """Latents (B, K, D) as embeddings (B, K, H), the last register first.

        Latents are standardised, so what all texts have in common in a register, its identity, is not in them: a
        learned embedding for each register gives it back.
        """
        if self.register_proj is None or self.num_registers is None:
            raise ValueError("this demasker was built without latents (latent_dim=None), but latents were given")
        shape = tuple(latents.shape)
        if len(shape) != 3 or shape[2] != self.latent_dim or not 1 <= shape[1] <= self.num_registers:
            raise ValueError(f"latents must be (B, 1 to {self.num_registers}, {self.latent_dim}), got {shape}")
        projected = self.register_proj(latents.to(self.register_proj.weight.dtype))
        return (projected + self.register_embedding[: shape[1]]).flip(1)

    def with_latents(self, latent_dim: int, num_registers: int, register_spacing: float = 0.0) -> "Demasker":
        """Adds the register path to a plain masked-diffusion model, in place, and returns it."""
        weight = self.network.get_input_embeddings().weight
        width = self.network.config.hidden_size
        self.latent_dim, self.num_registers, self.register_spacing = latent_dim, num_registers, register_spacing
        self.network.get_decoder().rotary_emb.register_spacing = register_spacing
        self.register_proj = nn.Linear(latent_dim, width).to(weight.device, weight.dtype)
        self.register_embedding = nn.Parameter(weight.new_empty(num_registers, width))
        nn.init.normal_(self.register_embedding, std=0.2)
        return self

    def with_lora(self, settings: Mapping[str, Any]) -> "Demasker":
        """Freezes the network and adds LoRA adapters (arXiv 2106.09685) to it, in place; the register path stays free.

        Args:
            settings: fields of `peft.LoraConfig`; without `target_modules`, all projections inside the blocks, never
                the head.

        Raises:
            ValueError: if a field is unknown or no module matches.
        """
        from peft import LoraConfig, inject_adapter_in_model  # a slow import, and only adapters need it

        fields = {"target_modules": list(BLOCK_PROJECTIONS), **settings}
        if unknown := sorted(fields.keys() - LoraConfig.__dataclass_fields__.keys()):
            raise ValueError(f"LoRA has no setting {', '.join(unknown)}; see peft.LoraConfig")
        self.network.requires_grad_(False)
        inject_adapter_in_model(LoraConfig(**fields), self.network)
        self.lora = fields
        return self

    def to_config(self) -> dict[str, Any]:
        """The constructor's arguments as plain data."""
        return {
            "network": self.network.config.to_diff_dict() | {"model_type": self.network.config.model_type},
            "mask_token_id": self.mask_token_id,
            "eos_token_id": self.eos_token_id,
            "latent_dim": self.latent_dim,
            "num_registers": self.num_registers,
            "register_spacing": self.register_spacing,
            "lora": self.lora,
        }

"""h_phi(x): the encoder, which reads a text into K register vectors."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from crocodil.models.attention import network_mask
from crocodil.models.backbone import FAMILIES, network_config
from crocodil.models.folders import is_own, load_network, save_network
from crocodil.models.positions import (
    add_register_axis,
    document_positions,
    positions_with_registers,
    text_positions,
    visible_keys,
)
from crocodil.models.pretrained import Checkpoint, Pretrained, build_empty, load_weights
from crocodil.ranks import mean_over_ranks


class RegisterEncoder(nn.Module):
    r"""z = h_phi(x): K learned register tokens appended to the text, read out at the last layer (CRoCoDiL, section 3).

    The states of the registers are projected to D, layer-normalised without affine, and standardised coordinate by
    coordinate, (z - latent_mean) / latent_std, with running statistics that training updates and that are saved with
    the weights. Latents are therefore always unit-variance: noise of standard deviation sigma gives the cosine
    1 / sqrt(1 + sigma^2).

    Args:
        network: settings of a transformers encoder or decoder (`model_type`, `hidden_size`, ...), or such a network.
        num_registers: K, the largest number of registers.
        latent_dim: D, the width of a register.
        register_spacing: distance of the registers on the text axis, in tokens; see `TwoAxisRotary`.
        family: the record of `FAMILIES` whose conventions hold.
        lora: settings of `peft.LoraConfig`; None trains all weights.
        pretrained: where `network` came from; it is kept with the adapters instead of the frozen weights.

    Attributes:
        translate: from the demasker's token ids (B, L) to this network's own (B, M) and which of them are real, where
            its tokenizer is another (`crocodil.data.retokenizer`); None where both read the same tokens.
    """

    forward_methods: ClassVar[tuple[str, ...]] = ("encode",)
    """Methods beside `forward` that use the weights."""

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(
        self,
        network: Mapping[str, Any] | PretrainedConfig | PreTrainedModel,
        *,
        num_registers: int,
        latent_dim: int,
        register_spacing: float = 0.0,
        family: str = "decoder",
        lora: Mapping[str, Any] | None = None,
        pretrained: Pretrained | None = None,
    ) -> None:
        super().__init__()
        if isinstance(network, PreTrainedModel):
            self.network: PreTrainedModel = network
        else:
            self.network = AutoModel.from_config(network_config(network))
        self.family = family
        conventions = FAMILIES[family]
        self.has_register_axis = add_register_axis(self.network, register_spacing, conventions.rotary_float32)
        self.num_registers = num_registers
        self.latent_dim = latent_dim
        self.register_spacing = register_spacing
        self.pretrained = pretrained
        width = self.network.config.hidden_size
        self.registers = nn.Parameter(torch.randn(num_registers, width) * 0.02)
        self.out_proj = nn.Linear(width, latent_dim)
        self.register_buffer("latent_mean", torch.zeros(num_registers, latent_dim, dtype=torch.float32))
        self.register_buffer("latent_std", torch.ones(num_registers, latent_dim, dtype=torch.float32))

        self.translate: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
        self.lora: dict[str, Any] | None = None
        if lora is not None:
            self.with_lora(lora)

    def with_lora(self, settings: Mapping[str, Any]) -> "RegisterEncoder":
        """Freezes the network and adds LoRA adapters to it, in place; registers and projection stay free."""
        from crocodil.models.adapters import add_adapter  # a slow import, and only adapters need it

        add_adapter(self.network, settings)
        self.lora = dict(settings)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RegisterEncoder":
        """Moves and casts like any module, but the statistics stay float32: bfloat16 would lose most of an update."""
        statistics = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, value in statistics.items():
            moved = self.get_buffer(name)
            if moved.dtype != value.dtype:
                self.register_buffer(name, value.to(moved.device))
        return self

    def forward(self, token_ids: Tensor, attention_mask: Tensor | None = None, num_documents: int = 1) -> Tensor:
        """Standardised latents (B, K, D) of texts, or (B, S, K, D) in packed rows; see `encode`."""
        return self.standardize(self.encode(token_ids, attention_mask, num_documents))

    def encode(self, token_ids: Tensor, attention_mask: Tensor | None = None, num_documents: int = 1) -> Tensor:
        """Latents before standardisation.

        Args:
            token_ids: (B, L) int64, texts.
            attention_mask: (B, L), 1 at real tokens and 0 at padding; None where nothing is padded. In packed rows
                int64, n at the tokens of the n-th document, whose registers read nothing else.
            num_documents: S, documents in a row at most; above 1 rows are packed.

        Returns:
            (B, K, D) float32, or (B, S, K, D) in packed rows, where what stands in the places of documents that a row
            does not have tells nothing.

        Raises:
            ValueError: if rows are packed, but the encoder has a tokenizer of its own or no rotary positions.
        """
        if self.translate is not None and not token_ids.is_meta:  # on the meta device shapes are all that counts
            if num_documents > 1:
                raise ValueError("an encoder with a tokenizer of its own reads one document a row; use padded rows")
            token_ids, attention_mask = self.translate(token_ids)
        text = self.network.get_input_embeddings()(token_ids)
        registers = self.registers.flip(0).to(text.dtype).repeat(num_documents, 1).expand(len(text), -1, -1)
        # On the register axis order is told by position alone, so the suffix may stand first (positions stay
        # consecutive); a network with learned positions reads it where the paper puts it, behind the text.
        if self.has_register_axis:
            states = self._read_prefix(registers, text, attention_mask, num_documents)
        elif num_documents == 1:
            states = self._read_suffix(registers, text, attention_mask)
        else:
            kind = self.network.config.model_type
            raise ValueError(f"a {kind} encoder has no rotary positions and reads one document a row; use padded rows")
        states = states.unflatten(1, (num_documents, -1)).flip(2).to(self.out_proj.weight.dtype)
        latents = F.layer_norm(self.out_proj(states).float(), (self.latent_dim,))
        return latents if num_documents > 1 else latents.squeeze(1)

    def _read_prefix(
        self, registers: Tensor, text: Tensor, attention_mask: Tensor | None, num_documents: int
    ) -> Tensor:
        """States (B, S K, H) of registers (B, S K, H) that stand before the text (B, L, H)."""
        batch, length, _ = text.shape
        if num_documents > 1 and attention_mask is not None:
            positions = document_positions(attention_mask)
        else:
            positions = text_positions(length, text.device)
        visible = visible_keys(attention_mask, (batch, length), self.num_registers, num_documents)
        return self.network(
            inputs_embeds=torch.cat([registers, text], dim=1),
            attention_mask=network_mask(self.network, visible, text.dtype),
            position_ids=positions_with_registers(self.num_registers, positions, num_documents),
        ).last_hidden_state[:, : registers.shape[1]]

    def _read_suffix(self, registers: Tensor, text: Tensor, attention_mask: Tensor | None) -> Tensor:
        """States (B, K, H) of registers (B, K, H) behind the last real token of each text (B, L, H)."""
        sequence = torch.cat([text, registers], dim=1)
        length, size = text.shape[1], registers.shape[1]
        if attention_mask is None:
            return self.network(inputs_embeds=sequence).last_hidden_state[:, length:]
        places = torch.arange(length + size, device=text.device)
        end = (attention_mask.bool() * (places[:length] + 1)).amax(1, keepdim=True)
        behind = places - end
        order = torch.where(behind < 0, places, torch.where(behind < size, length + behind, places - size))
        keys = F.pad(attention_mask.bool(), (0, size), value=True)
        states = self.network(
            inputs_embeds=sequence.take_along_dim(order[..., None], 1), attention_mask=keys.gather(1, order)
        ).last_hidden_state
        return states.take_along_dim((end + places[:size])[..., None], 1)

    def standardize(self, latents: Tensor) -> Tensor:
        """(z - latent_mean) / latent_std, coordinate by coordinate; latents are (B, K, D)."""
        return (latents - self.latent_mean) / self.latent_std

    def unstandardize(self, latents: Tensor) -> Tensor:
        """The inverse of `standardize`."""
        return latents * self.latent_std + self.latent_mean

    @torch.no_grad()
    def update_statistics(self, latents: Tensor, weight: float) -> None:
        """Moves `latent_mean` and `latent_std` towards those of a batch of unstandardised latents (B, K, D).

        The second moment is averaged, not the deviation, so that the spread between batches counts too. Of a batch
        that is spread over processes, all documents count alike, however many each process has.

        Args:
            latents: (N, K, D), what `encode` returned.
            weight: share of the batch in the new statistics, in (0, 1]; 1 replaces them.
        """
        # In float64: where the spread is small beside the mean, the difference of the moments is mostly cancelled.
        latents = latents.detach().double()
        count = torch.full_like(self.latent_mean, len(latents), dtype=torch.float64)
        sums = mean_over_ranks(torch.stack([latents.sum(0), latents.square().sum(0), count]))
        batch_mean, batch_square = sums[:2] / sums[2]
        mean, square = self.latent_mean.double(), self.latent_std.double() ** 2 + self.latent_mean.double() ** 2
        mean.lerp_(batch_mean, weight)
        square.lerp_(batch_square, weight)
        self.latent_mean.copy_(mean)
        self.latent_std.copy_((square - mean**2).clamp(min=1e-4).sqrt())

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
            "family": self.family,
            "lora": self.lora,
            "pretrained": self.pretrained.to_dict() if self.pretrained and self.lora else None,
        }

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        num_registers: int | None = None,
        latent_dim: int | None = None,
        register_spacing: float = 0.0,
        family: str | None = None,
        dtype: str | None = None,
        empty: bool = False,
    ) -> "RegisterEncoder":
        """Reads an encoder of ours, or puts new registers on a published encoder or decoder. No code of it is run.

        Args:
            path_or_id: folder with `config.json` and safetensors, or id of a repository of the Hugging Face hub.
            num_registers: K; needed unless the folder is one of ours.
            latent_dim: D; None takes the width of the network.
            register_spacing: see the constructor.
            family: one of `FAMILIES`; None tells it from `config.json`.
            dtype: of the network's weights, such as "bfloat16"; None keeps the checkpoint's.
            empty: leave the network's weights on the meta device until `load_weights`.

        Raises:
            ValueError: if the checkpoint is absent, of no known family, or has missing or left-over tensors.
        """
        source = Pretrained(str(path_or_id), family, None, dtype)
        if is_own(path_or_id):
            return load_network(cls, path_or_id, dtype=source.torch_dtype)
        if num_registers is None:
            raise ValueError(f"num_registers must be given for {path_or_id}, which has no registers of its own")
        checkpoint = Checkpoint.open(source)
        network = build_empty(checkpoint, AutoModel)
        encoder = cls(
            network,
            num_registers=num_registers,
            latent_dim=latent_dim or network.config.hidden_size,
            register_spacing=register_spacing,
            family=checkpoint.family,
            pretrained=source,
        )
        if not empty:
            encoder.load_weights()
        return encoder

    def load_weights(self) -> None:
        """Loads the weights that `from_pretrained(..., empty=True)` left out, into shards if it is sharded by now."""
        if self.pretrained is not None:
            load_weights(self.network, self.pretrained)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "RegisterEncoder":
        """Builds an encoder from `to_config`, on the weights of its `pretrained` source if it has one."""
        settings = dict(config)
        source = settings.pop("pretrained", None)
        if source is None:
            return cls(**settings)
        sizes = {name: settings[name] for name in ("num_registers", "latent_dim", "register_spacing")}
        encoder = cls.from_pretrained(source["path"], family=source["family"], dtype=source["dtype"], **sizes)
        return encoder.with_lora(settings["lora"])

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` and safetensors; created if absent."""
        save_network(self, folder)

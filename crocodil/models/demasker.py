"""f_theta(x_t, z): the demasker, a bidirectional decoder that reads registers as a prefix."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from crocodil.diffusion.cross_entropy import chunked_nats, weighted_cross_entropy
from crocodil.models.attention import REGISTER_ATTENTION, add_register_gates, network_mask
from crocodil.models.backbone import FAMILIES, network_config
from crocodil.models.folders import is_own, load_network, save_network
from crocodil.models.key_values import KeyValues
from crocodil.models.positions import (
    add_register_axis,
    document_positions,
    positions_with_registers,
    text_positions,
    visible_keys,
)
from crocodil.models.pretrained import Checkpoint, Pretrained, build_empty, load_weights


class Demasker(nn.Module):
    r"""Predicts the clean tokens at masked positions: f_theta(x_0 | x_t, z) (CRoCoDiL, section 3).

    The K registers of `latents` are projected to the width of the network and stand before the text, on a rotary
    axis of their own (`TwoAxisRotary`). Without latents the network is the plain masked-diffusion model.

    A row may hold several documents, each with K registers of its own. What a document is told is then exactly what it
    would be told in a row of its own: it sees neither the others nor their registers, and its positions begin at 0.

    Args:
        network: settings of a transformers decoder (`model_type`, `hidden_size`, ..., `vocab_size`), or a decoder.
        mask_token_id: id of the mask token.
        eos_token_id: id of the end token, which also fills the tail of a block.
        family: the record of `FAMILIES` whose conventions hold (shifted logits, float32 rotation, padding).
        latent_dim: D, the width of a register; None builds a plain masked-diffusion model.
        num_registers: K, the largest number of registers; goes with `latent_dim`.
        register_spacing: distance of the registers on the text axis, in tokens; see `TwoAxisRotary`.
        register_gates: registers are heard through gates that start at zero (`register_attention`), so that adding
            them leaves a pretrained network as it is.
        registers_read_text: registers attend to the text, as any prefix does. If not, what they become does not depend
            on the text, and samplers compute it once for each draw of the latents.
        lora: settings of `peft.LoraConfig` (`r`, `lora_alpha`, `target_modules`, ...); None trains all weights.
        pretrained: where `network` came from; it is kept with the adapters instead of the frozen weights.

    Raises:
        ValueError: if the settings do not describe a rotary decoder.
    """

    forward_methods: ClassVar[tuple[str, ...]] = ("weighted_loss", "nats")
    """Methods beside `forward` that use the weights."""

    def __init__(
        self,
        network: Mapping[str, Any] | PretrainedConfig | PreTrainedModel,
        *,
        mask_token_id: int,
        eos_token_id: int,
        family: str = "decoder",
        latent_dim: int | None = None,
        num_registers: int | None = None,
        register_spacing: float = 0.0,
        register_gates: bool = False,
        registers_read_text: bool = True,
        lora: Mapping[str, Any] | None = None,
        pretrained: Pretrained | None = None,
    ) -> None:
        super().__init__()
        if isinstance(network, PreTrainedModel):
            self.network: PreTrainedModel = network
        else:
            self.network = AutoModelForCausalLM.from_config(network_config(network))
        self.family = family
        self.conventions = FAMILIES[family]
        if not add_register_axis(self.decoder, full_precision=self.conventions.rotary_float32):
            raise ValueError(
                f"a demasker needs rotary positions, but a {self.network.config.model_type} network has none"
            )
        self.mask_token_id = mask_token_id
        self.eos_token_id = eos_token_id
        self.pretrained = pretrained
        self.latent_dim: int | None = None
        self.num_registers: int | None = None
        self.register_spacing = register_spacing
        self.register_gates = False
        self.registers_read_text = True
        self.register_proj: nn.Linear | None = None
        if latent_dim is not None and num_registers is not None:
            self.with_latents(latent_dim, num_registers, register_spacing, register_gates, registers_read_text)
        elif latent_dim is not None or num_registers is not None:
            raise ValueError(f"latent_dim and num_registers go together, got {latent_dim} and {num_registers}")
        self.lora: dict[str, Any] | None = None
        if lora is not None:
            self.with_lora(lora)

    @property
    def decoder(self) -> PreTrainedModel:
        """The network without its head."""
        return self.network.get_decoder()

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
        num_documents: int = 1,
        latent_mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KeyValues | None = None,
        window: Tensor | None = None,
    ) -> Tensor:
        """Logits of the clean tokens.

        Args:
            token_ids: (B, L) int64, partly masked text x_t.
            latents: (B, K, D) float, standardised registers z; in packed rows (B, S, K, D); None for the plain model.
            attention_mask: (B, L), 1 where a token may be attended to; None where nothing is padded. In packed rows
                int64: n at the tokens of the n-th document, which attend to one another alone, and 0 at padding.
            num_documents: S, documents in a row at most; above 1 rows are packed. Those that a row does not have are
                the last ones, and whatever latents stand in their places have no influence.
            latent_mask: (B, K) or (B, S, K), 1 where a register may be attended to; None for all. A row of zeros is
                the row, or the document, without latents.
            positions: (B, M) int64, the text positions whose logits are wanted; None for all L.
            cache: keys and values of all layers, which this call fills, or completes if a window is given.
            window: (B, S) int64, neighbouring text positions, the only ones that are computed; `positions` must lie
                within. What is outside is as it was when the cache was filled.

        Returns:
            (B, L, V) float logits, or (B, M, V) at `positions`.

        Raises:
            ValueError: if the text is longer than the network allows, the latents do not fit it, or rows are packed
                where that is not possible.
        """
        states = self._states(token_ids, latents, attention_mask, num_documents, latent_mask, cache, window)
        if positions is not None:
            positions = positions if window is None else positions - window[:, :1]
            states = states.gather(1, positions[..., None].expand(-1, -1, states.shape[-1]))
        return self.network.get_output_embeddings()(states)

    def weighted_loss(
        self,
        noisy_ids: Tensor,
        token_ids: Tensor,
        weights: Tensor,
        latents: Tensor | None = None,
        latent_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        num_documents: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """sum_i w_i (-log f(x_0^i | x_t, z)), with logits at positions of nonzero weight only, some rows at a time.

        Args:
            noisy_ids: (B, L) int64, x_t.
            token_ids: (B, L) int64, x_0.
            weights: (B, L) float32, zero where nothing is masked (`loss_weights`). On the CPU it costs a GPU no wait.
            latents: see `forward`.
            latent_mask: see `forward`.
            attention_mask: see `forward`.
            num_documents: see `forward`.

        Returns:
            The sum, a scalar; and -log f(x_0^i | x_t, z) where the weight is not zero, and zero elsewhere, (B, L),
            through which no gradient flows.
        """
        states = self._states(noisy_ids, latents, attention_mask, num_documents, latent_mask)
        device = states.device
        rows = weights.flatten().nonzero().squeeze(1)
        row_weights = weights.flatten()[rows].to(device, non_blocking=True)
        rows = rows.to(device, non_blocking=True)
        head = self.network.get_output_embeddings()
        loss, nats = weighted_cross_entropy(
            states.flatten(0, 1)[rows], head.weight, token_ids.flatten()[rows], row_weights, head.bias
        )
        return loss, nats.new_zeros(token_ids.numel()).index_copy(0, rows, nats).view(token_ids.shape)

    @torch.no_grad()
    def nats(
        self,
        noisy_ids: Tensor,
        token_ids: Tensor,
        is_masked: Tensor,
        latents: Tensor | None = None,
        attention_mask: Tensor | None = None,
        num_documents: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """-log f(x_0^i | x_t, z) at masked positions and zero elsewhere, (B, L), and where x_0 is the first choice.

        Args:
            noisy_ids: (B, L) int64, x_t.
            token_ids: (B, L) int64, x_0.
            is_masked: (B, L) bool.
            latents: see `forward`.
            attention_mask: see `forward`.
            num_documents: see `forward`.
        """
        states = self._states(noisy_ids, latents, attention_mask, num_documents)
        rows = is_masked.flatten().nonzero().squeeze(1).to(states.device)
        head = self.network.get_output_embeddings()
        nats, hits = chunked_nats(states.flatten(0, 1)[rows], head.weight, token_ids.flatten()[rows], head.bias)
        shape = token_ids.shape
        all_nats = nats.new_zeros(shape.numel()).index_copy(0, rows, nats)
        return all_nats.view(shape), torch.zeros_like(token_ids, dtype=torch.bool).flatten().index_copy(
            0, rows, hits
        ).view(shape)

    def _states(
        self,
        token_ids: Tensor,
        latents: Tensor | None = None,
        attention_mask: Tensor | None = None,
        num_documents: int = 1,
        latent_mask: Tensor | None = None,
        cache: KeyValues | None = None,
        window: Tensor | None = None,
    ) -> Tensor:
        """What the head reads at each text position, (B, L, H), or (B, S, H) in the window."""
        batch, length = token_ids.shape
        if length > self.max_length:
            raise ValueError(f"the demasker reads at most {self.max_length} tokens, got {length}")
        if num_documents > 1 and cache is not None:
            raise ValueError(f"a cache keeps one document a row, got num_documents={num_documents}")
        shift = self.conventions.shift_logits  # position i is told at i - 1; the first keeps its own
        position_ids = self._text_positions(token_ids, attention_mask, num_documents)
        registers = None if latents is None else self._registers(latents, num_documents)
        num_registers = 0 if registers is None else registers.shape[1]
        if window is not None:
            assert cache is not None and cache.is_filled, "a window needs a filled cache"
            shown = torch.cat([(window[:, :1] - 1).clamp(min=0), window], dim=1) if shift else window
            token_ids, position_ids = token_ids.gather(1, shown), position_ids.expand(batch, -1).gather(1, shown)
        else:
            position_ids = positions_with_registers(num_registers // num_documents, position_ids, num_documents)
        if cache is not None:
            self._require_own_attention("a cache")
            cache.places = None if window is None else shown + num_registers
        embeddings = self.network.get_input_embeddings()(token_ids)
        if registers is not None and window is None:
            embeddings = torch.cat([registers.to(embeddings.dtype), embeddings], dim=1)
        seen = None if latent_mask is None else latent_mask.bool().flip(-1).flatten(1)
        visible = visible_keys(attention_mask, (batch, length), num_registers // num_documents, num_documents, seen)
        states = self.decoder(
            inputs_embeds=embeddings,
            attention_mask=network_mask(self.decoder, visible, embeddings.dtype),
            position_ids=position_ids,
            use_cache=False,
            num_registers=num_registers,
            registers_read_text=self.registers_read_text,
            key_values=cache,
        ).last_hidden_state
        if window is not None:
            return states[:, :-1] if shift else states
        states = states[:, num_registers:]
        if not shift:
            return states
        told = torch.cat([states[:, :1], states[:, :-1]], dim=1)
        if num_documents == 1 or attention_mask is None:
            return told
        return torch.where(document_positions(attention_mask)[..., None] == 0, states, told)

    def _text_positions(self, token_ids: Tensor, attention_mask: Tensor | None, num_documents: int) -> Tensor:
        if num_documents > 1 and attention_mask is not None:
            return document_positions(attention_mask)
        unpadded = attention_mask if self.conventions.skip_padding else None
        return text_positions(token_ids.shape[1], token_ids.device, unpadded)

    def _require_own_attention(self, what: str) -> None:
        if (given := self.decoder.config._attn_implementation) != REGISTER_ATTENTION:
            raise ValueError(f"{what} needs the default attn_implementation ({REGISTER_ATTENTION}), got {given}")

    def _registers(self, latents: Tensor, num_documents: int) -> Tensor:
        """Latents (B, K, D) or (B, S, K, D) as embeddings (B, S K, H), the last register of each document first.

        Latents are standardised, so what all texts have in common in a register, its identity, is not in them: a
        learned embedding for each register gives it back.
        """
        if self.register_proj is None or self.num_registers is None:
            raise ValueError("this demasker was built without latents (latent_dim=None), but latents were given")
        shape, documents = tuple(latents.shape), () if num_documents == 1 else (num_documents,)
        fits = shape[1:-2] == documents and shape[-1] == self.latent_dim and 1 <= shape[-2] <= self.num_registers
        if len(shape) != 3 + len(documents) or not fits:
            expected = ", ".join(map(str, ("B", *documents, f"1 to {self.num_registers}", self.latent_dim)))
            raise ValueError(f"latents must be ({expected}), got {shape}")
        projected = self.register_proj(latents.to(self.register_proj.weight.dtype))
        return (projected + self.register_embedding[: shape[-2]]).flip(-2).flatten(1, -2)

    def with_latents(
        self,
        latent_dim: int,
        num_registers: int,
        register_spacing: float = 0.0,
        register_gates: bool = False,
        registers_read_text: bool = True,
    ) -> "Demasker":
        """Adds the register path to a plain masked-diffusion model, in place, and returns it; see the constructor."""
        weight = next(self.network.get_input_embeddings().parameters())
        width = self.network.config.hidden_size
        device = torch.device("cpu") if weight.is_meta else weight.device
        self.latent_dim, self.num_registers, self.register_spacing = latent_dim, num_registers, register_spacing
        self.decoder.rotary_emb.register_spacing = register_spacing  # type: ignore[union-attr]
        # New parts are float32 (or wider) beside half-precision weights: their steps are too small for bfloat16.
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.register_proj = nn.Linear(latent_dim, width, device=device, dtype=dtype)
        self.register_embedding = nn.Parameter(torch.empty(num_registers, width, device=device, dtype=dtype))
        nn.init.normal_(self.register_embedding, std=0.2)
        self.register_gates, self.registers_read_text = register_gates, registers_read_text
        if not registers_read_text:
            self._require_own_attention("registers_read_text=False")
        if register_gates:
            add_register_gates(self.decoder)
        return self

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens after which a text is over: the end token, and what else ends an answer in its family."""
        return (self.eos_token_id, *(token for token in self.conventions.stop_token_ids if token < self.vocab_size))

    def with_lora(self, settings: Mapping[str, Any]) -> "Demasker":
        """Freezes the network and adds LoRA adapters to it, in place; the register path stays free.

        Args:
            settings: fields of `peft.LoraConfig`; without `target_modules`, all projections inside the blocks, never
                the head.

        Raises:
            ValueError: if a field is unknown or no module matches.
        """
        from crocodil.models.adapters import add_adapter  # a slow import, and only adapters need it

        add_adapter(self.network, settings)
        for name, parameter in self.network.named_parameters():
            if name.endswith("register_gate"):
                parameter.requires_grad_(True)
        self.lora = dict(settings)
        return self

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        family: str | None = None,
        quantization: str | None = None,
        dtype: str | torch.dtype | None = None,
        *,
        empty: bool = False,
    ) -> "Demasker":
        """Reads a checkpoint: one of ours, or a published one of a known family. No code of it is run.

        Args:
            path_or_id: folder with `config.json` and safetensors, or id of a repository of the Hugging Face hub.
            family: one of `FAMILIES`; None tells it from `config.json`.
            quantization: "nf4" or "int8" for the linear maps inside the blocks, which are then frozen; None for none.
            dtype: of the weights, such as "bfloat16"; None keeps the checkpoint's.
            empty: leave the backbone's weights on the meta device until `load_weights`.

        Raises:
            ValueError: if the checkpoint is absent, of no known family, or has missing or left-over tensors.
        """
        name = str(dtype).removeprefix("torch.") if dtype is not None else None
        source = Pretrained(str(path_or_id), family, quantization, name)
        if is_own(path_or_id):
            demasker = load_network(cls, path_or_id, quantization, source.torch_dtype)
            demasker.pretrained = source
            return demasker
        checkpoint = Checkpoint.open(source)
        demasker = cls(
            build_empty(checkpoint, AutoModelForCausalLM),
            mask_token_id=checkpoint.mask_token_id,
            eos_token_id=checkpoint.eos_token_id,
            family=checkpoint.family,
            pretrained=source,
        )
        if not empty:
            demasker.load_weights()
        return demasker

    def load_weights(self) -> None:
        """Loads the weights that `from_pretrained(..., empty=True)` left out, into shards if it is sharded by now."""
        if self.pretrained is not None:
            load_weights(self.network, self.pretrained)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json`, safetensors and, with LoRA, `adapter/` in peft's layout; created if absent."""
        save_network(self, folder)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Demasker":
        """Builds a demasker from `to_config`, on the weights of its `pretrained` source if it has one."""
        settings = dict(config)
        source = settings.pop("pretrained", None)
        if source is None:
            return cls(**settings)
        demasker = cls.from_pretrained(source["path"], source["family"], source["quantization"], source["dtype"])
        if settings["latent_dim"] is not None:
            names = ("latent_dim", "num_registers", "register_spacing", "register_gates", "registers_read_text")
            demasker.with_latents(*(settings[name] for name in names))
        return demasker if settings["lora"] is None else demasker.with_lora(settings["lora"])

    def to_config(self) -> dict[str, Any]:
        """The constructor's arguments as plain data; the source of frozen weights among them, if there are any."""
        config = self.network.config
        return {
            "network": config.to_diff_dict() | {"model_type": config.model_type},
            "mask_token_id": self.mask_token_id,
            "eos_token_id": self.eos_token_id,
            "family": self.family,
            "latent_dim": self.latent_dim,
            "num_registers": self.num_registers,
            "register_spacing": self.register_spacing,
            "register_gates": self.register_gates,
            "registers_read_text": self.registers_read_text,
            "lora": self.lora,
            "pretrained": self.pretrained.to_dict() if self.pretrained and self.lora else None,
        }

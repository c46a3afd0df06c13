"""Stage 2: encoder and demasker together, so that K registers tell the demasker what the text is about."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from crocodil.data.codec import TextCodec
from crocodil.data.retokenizer import Retokenizer
from crocodil.data.vocabulary import Vocabulary
from crocodil.diffusion.documents import Documents
from crocodil.diffusion.gaussian import disturb
from crocodil.diffusion.masking import (
    LinearMasking,
    LossWeight,
    MaskingSchedule,
    corrupt,
    masked_cross_entropy,
)
from crocodil.diffusion.noise import STREAM_CHOICE, STREAM_LATENT_NOISE, STREAM_MASK, BatchNoise, RowNoise
from crocodil.evaluation.masked_prediction import MaskedPrediction
from crocodil.models import Demasker, RegisterEncoder
from crocodil.models.pretrained import Pretrained
from crocodil.modules.base import Batch, CrocodilModule
from crocodil.modules.checkpoints import Stage
from crocodil.modules.demasker import base_demasker, draw_masks, masked_diffusion_loss
from crocodil.modules.optimizers import MuonAdamW
from crocodil.pipeline import CrocodilPipeline
from crocodil.samplers import MaskedSampler


@dataclass(frozen=True)
class LatentRegularisation:
    """How the latents are disturbed on their way to the demasker. All shares are of rows, in [0, 1].

    Reconstruction and generation pull in opposite directions, and these decide (DiLaDiff): select by generation.

    Args:
        noise_std: sigma of z~ = (z + sigma noise) / sqrt(1 + sigma^2); 0.75 is the paper's cosine of 0.8.
        noise_warmup_steps: optimizer steps over which sigma rises from 0, so that the registers are heard from the
            first step on.
        nested_dropout: share of rows that keep only their first k registers, k uniform on 1..K.
        dropout: share of rows without any latents, which keeps the plain model alive (and guidance possible).
        replacement: share of rows whose whole latent is replaced by noise.
        masking: probability of each register to be hidden, in every row.
        input_masking: share of rows whose text is masked at a random ratio before it is encoded, so that h(x_t) of a
            partly masked text is something the encoder knows.
    """

    noise_std: float = 0.75
    noise_warmup_steps: int = 0
    nested_dropout: float = 0.5
    dropout: float = 0.05
    replacement: float = 0.0
    masking: float = 0.0
    input_masking: float = 0.0


class AutoencoderModule(CrocodilModule):
    """Minimises E_t [ w_t sum over masked positions of -log f_theta(x_0 | x_t, z~) ] / L over encoder and demasker.

    Args:
        vocabulary: of the data; the CLI links it from the DataModule.
        demasker_checkpoint: the base, a checkpoint of the demasker stage.
        pretrained: the base, a published checkpoint (LLaDA-8B, ...), instead of `demasker_checkpoint`.
        encoder: settings of the encoder's network, a published one, or "demasker" to start it as a copy of the base.
        num_registers: K.
        latent_dim: D.
        register_spacing: distance of the registers on the text axis, in tokens; see `TwoAxisRotary`.
        register_gates: see `Demasker`; for a pretrained base.
        registers_read_text: see `Demasker`; false makes sampling cheaper.
        lora: settings of `peft.LoraConfig`, to train adapters of the demasker instead of all its weights; None for all.
        encoder_lora: likewise of the encoder.
        regularisation: what happens to the latents between encoder and demasker.
        sampler: writes the reconstructions at `predict`; None takes the defaults of `MaskedSampler` at 8 steps.
        masking: noise schedule of the masked process.
        loss_weight: see `DemaskerModule`.
        statistics_weight: share of each batch in the running latent statistics.
        optimizer: see `CrocodilModule`.
        lr_scheduler: see `CrocodilModule`.
        seed: see `CrocodilModule`.
        compile: see `CrocodilModule`.
        gradient_checkpointing: see `CrocodilModule`.
    """

    stage: ClassVar[Stage] = "autoencoder"

    def __init__(
        self,
        vocabulary: Vocabulary,
        demasker_checkpoint: str | None = None,
        pretrained: Pretrained | None = None,
        encoder: Pretrained | Literal["demasker"] | dict[str, Any] = "demasker",
        num_registers: int = 16,
        latent_dim: int = 32,
        register_spacing: float = 0.0,
        register_gates: bool = False,
        registers_read_text: bool = True,
        lora: dict[str, Any] | None = None,
        encoder_lora: dict[str, Any] | None = None,
        regularisation: LatentRegularisation | None = None,
        sampler: MaskedSampler | None = None,
        masking: MaskingSchedule | None = None,
        loss_weight: LossWeight = "elbo",
        statistics_weight: float = 0.02,
        optimizer: OptimizerCallable = MuonAdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
        compile: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, seed, compile, gradient_checkpointing)
        base = base_demasker(demasker_checkpoint, pretrained, vocabulary)
        self.demasker = base.with_latents(
            latent_dim, num_registers, register_spacing, register_gates, registers_read_text
        )
        self.encoder_source = encoder if isinstance(encoder, Pretrained) else None
        self.encoder = build_encoder(encoder, self.demasker)
        if lora is not None:
            self.demasker.with_lora(lora)
        if encoder_lora is not None:
            self.encoder.with_lora(encoder_lora)
        self.regularisation = regularisation or LatentRegularisation()
        self.sampler = sampler or MaskedSampler(8)
        self.masking = masking or LinearMasking()
        self.loss_weight: LossWeight = loss_weight
        self.statistics_weight = statistics_weight

    def trained_networks(self) -> Iterable[nn.Module]:
        """The demasker's decoder and the network inside the encoder."""
        return [self.demasker.decoder, self.encoder.network]

    def setup(self, stage: str) -> None:
        """Lets a published encoder read the texts in its own tokens, if they are not the data's."""
        if self.encoder_source is None:
            return
        codec = self.trainer.datamodule.codec  # type: ignore[attr-defined]
        own = TextCodec.published(self.encoder_source.path, self.encoder_source.family)
        if own.to_state() != codec.to_state():
            self.encoder.translate = Retokenizer(codec, own)

    def network_configs(self) -> dict[str, Any]:
        """Settings of both networks, and the encoder's own codec if it has one."""
        translate = self.encoder.translate
        own = translate.target.to_state() if isinstance(translate, Retokenizer) else None
        return {"demasker": self.demasker.to_config(), "encoder": self.encoder.to_config(), "encoder_codec": own}

    def pipeline(self, codec: TextCodec) -> CrocodilPipeline:
        """Demasker and encoder: algorithm `masked`, and reconstruction."""
        return CrocodilPipeline(self.demasker, codec, self.encoder)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """The masked-diffusion loss under disturbed latents.

        Returns:
            What `masked_diffusion_loss` returns; and for each document, without gradient, `latents` (N, K, D),
            standardised, and `disturbed` (N, K, D), as the demasker is given them.
        """
        token_ids, noise, documents = batch["token_ids"], self.training_noise(batch), Documents.of(batch)
        on_device = noise.to(token_ids.device)
        source = self._encoder_input(token_ids, documents, on_device)
        raw = documents.from_rows(self.encoder.encode(source, **documents.attention))
        warm_up = 1.0 / (1 + self.global_step)  # a plain average first, a moving one later
        self.encoder.update_statistics(raw, max(self.statistics_weight, warm_up))
        ramp = min(1.0, self.global_step / max(1, self.regularisation.noise_warmup_steps))
        latents = self.encoder.standardize(raw)
        own = documents.noise(on_device)
        disturbed, latent_mask = disturb_latents(latents, own, self.regularisation, ramp)
        step = masked_diffusion_loss(
            self.demasker, token_ids, noise, self.masking, self.loss_weight, disturbed, latent_mask, documents
        )
        self.log("train_loss", step["loss"], prog_bar=True, sync_dist=True)
        return step | {"latents": latents.detach(), "disturbed": disturbed.detach()}

    def _encoder_input(self, token_ids: Tensor, documents: Documents, noise: BatchNoise) -> Tensor:
        share = self.regularisation.input_masking
        if not share:
            return token_ids
        chosen, ratio = documents.noise(noise).uniform(STREAM_CHOICE, 1, 2).unbind(1)
        uniform = noise.uniform(STREAM_MASK, 1, token_ids.shape[1])
        mask_prob = documents.spread(ratio * (chosen < share))
        return corrupt(token_ids, mask_prob, uniform, self.demasker.mask_token_id)[0]

    def encode(self, token_ids: Tensor, documents: Documents) -> Tensor:
        """Standardised latents (N, K, D) of the documents of a batch."""
        return documents.from_rows(self.encoder(token_ids, **documents.attention))

    def evaluate(self, batch: Batch, noise: BatchNoise) -> dict[str, Tensor]:
        """Negative ELBOs in nats per token: `loss` under disturbed latents, `loss_clean`, `loss_no_latents`."""
        token_ids, documents = batch["token_ids"], Documents.of(batch)
        latents = self.encode(token_ids, documents)
        noisy_ids, is_masked, point = draw_masks(token_ids, noise, self.masking, self.demasker.mask_token_id, documents)
        own = documents.noise(noise.to(token_ids.device))
        fresh = own.normal(STREAM_LATENT_NOISE, 0, tuple(latents.shape[1:]))
        disturbed = disturb(latents, fresh, self.regularisation.noise_std)

        def figure(seen: Tensor | None) -> Tensor:
            rows = None if seen is None else documents.to_rows(seen)
            nats, _ = self.demasker.nats(noisy_ids, token_ids, is_masked, rows, **documents.attention)
            return masked_cross_entropy(nats.to(is_masked.device), is_masked, point, "elbo", documents.host)

        return {"loss": figure(disturbed), "loss_clean": figure(latents), "loss_no_latents": figure(None)}

    def num_items(self, batch: Batch) -> int:
        """Tokens, padding apart."""
        return Documents.of(batch).num_tokens

    def on_test_start(self) -> None:
        """Fresh figures for `test_step`."""
        self.masked = {name: MaskedPrediction().to(self.device) for name in ("masked_loss", "masked_loss_no_latents")}

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Beside the figures of validation, the cross-entropy against the mask ratio, with and without latents."""
        super().test_step(batch, batch_idx)
        token_ids, noise = batch["token_ids"], self.held_out_noise(batch, batch_idx)
        documents = Documents.of(batch)
        for metric, latents in zip(self.masked.values(), (self.encode(token_ids, documents), None), strict=True):
            metric.update(self.demasker, token_ids, latents, noise, documents)

    def on_test_epoch_end(self) -> None:
        """Logs the cross-entropies as `test_masked_loss_RATIO`, over all masked tokens of all processes."""
        for name, metric in self.masked.items():
            for ratio, value in zip(metric.ratios, metric.compute()["cross_entropy"], strict=True):
                self.log(f"test_{name}_{ratio}", value, rank_zero_only=True)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Autoencoding: a held-out text is encoded and written again from its registers alone."""
        source, documents = batch["token_ids"], Documents.of(batch).one_a_row("predict")
        out = self.sampler.sample(
            self.demasker,
            length=source.shape[1],
            batch_size=source.shape[0],
            latents=self.encode(source, documents),
            generator=self.held_out_noise(batch, batch_idx).to(source.device),
            device=source.device,
        )
        is_text = documents.spread(torch.ones(len(source), device=source.device)).expand_as(source)
        accuracy = ((out.token_ids == source) * is_text).sum(1) / is_text.sum(1)
        return {"token_ids": out.token_ids, "source_token_ids": source, "token_accuracy": accuracy}


def build_encoder(settings: Pretrained | Literal["demasker"] | dict[str, Any], demasker: Demasker) -> RegisterEncoder:
    """The encoder for a demasker's registers: a published one, one of its own settings, or a copy of the demasker's."""
    shape: dict[str, Any] = {
        "num_registers": demasker.num_registers,
        "latent_dim": demasker.latent_dim,
        "register_spacing": demasker.register_spacing,
    }
    if isinstance(settings, Pretrained):
        return RegisterEncoder.from_pretrained(
            settings.path, family=settings.family, dtype=settings.dtype, empty=True, **shape
        )
    if settings != "demasker":
        return RegisterEncoder({"vocab_size": demasker.vocab_size, **settings}, **shape)
    if demasker.pretrained is not None:
        return build_encoder(replace(demasker.pretrained, quantization=None), demasker)
    encoder = RegisterEncoder(demasker.network.config, family=demasker.family, **shape)
    weights = demasker.decoder.state_dict()
    encoder.network.load_state_dict({key: weights[key] for key in encoder.network.state_dict()})
    return encoder


def disturb_latents(
    latents: Tensor, noise: RowNoise, regularisation: LatentRegularisation, ramp: float = 1.0
) -> tuple[Tensor, Tensor | None]:
    """Latents (B, K, D) as the demasker sees them in training, and which registers (B, K) it sees; None for all."""
    settings, registers = regularisation, latents.shape[1]
    nested, cut, dropped, replaced = noise.uniform(STREAM_CHOICE, 0, 4).unbind(1)
    fresh = noise.normal(STREAM_LATENT_NOISE, 0, tuple(latents.shape[1:]))
    disturbed = disturb(latents, fresh, settings.noise_std * torch.tensor(ramp))
    if settings.replacement:
        disturbed = torch.where((replaced < settings.replacement)[:, None, None], fresh, disturbed)
    if not (settings.nested_dropout or settings.dropout or settings.masking):
        return disturbed, None
    kept = torch.where(nested < settings.nested_dropout, (cut * registers).long() + 1, registers)
    kept = kept * (dropped >= settings.dropout)
    visible = torch.arange(registers, device=latents.device) < kept[:, None]
    if settings.masking:
        visible &= noise.uniform(STREAM_CHOICE, 2, registers) >= settings.masking
    return disturbed, visible

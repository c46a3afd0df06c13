"""Stage 1: the plain masked-diffusion model, the base of the autoencoder and the baseline of every comparison."""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from crocodil.data.codec import TextCodec
from crocodil.data.vocabulary import Vocabulary
from crocodil.diffusion.documents import Documents
from crocodil.diffusion.masking import (
    LinearMasking,
    LossWeight,
    MaskingPoint,
    MaskingSchedule,
    corrupt,
    loss_weights,
    masked_cross_entropy,
    stratified_times,
)
from crocodil.diffusion.noise import STREAM_MASK, STREAM_TIME, BatchNoise
from crocodil.models import Demasker
from crocodil.models.pretrained import Pretrained
from crocodil.modules.base import Batch, CrocodilModule
from crocodil.modules.checkpoints import Stage, StageCheckpoint
from crocodil.modules.optimizers import MuonAdamW
from crocodil.pipeline import CrocodilPipeline
from crocodil.ranks import as_part_of_all
from crocodil.samplers import MaskedSampler


class DemaskerModule(CrocodilModule):
    """Trains f_theta(x_0 | x_t) from scratch, or goes on from a checkpoint.

    Args:
        vocabulary: sizes and special tokens of the data; the CLI links it from the DataModule.
        network: settings of a transformers decoder (`model_type`, `hidden_size`, ...); the vocabulary's size is added.
        demasker_checkpoint: a checkpoint of this stage to fine-tune, instead of `network`.
        pretrained: a published checkpoint to fine-tune (LLaDA-8B, ...), instead of `network`.
        lora: settings of `peft.LoraConfig`, to train adapters instead of all weights; None for all.
        sampler: fills the masks in at `predict`; None takes the defaults of `MaskedSampler` at 16 steps.
        masking: noise schedule of the masked process.
        loss_weight: "elbo" weighs time t by -alpha'_t / (1 - alpha_t) (1 / t, as LLaDA), "none" does not (as DiLaDiff).
        optimizer: see `CrocodilModule`.
        lr_scheduler: see `CrocodilModule`.
        seed: see `CrocodilModule`.
        compile: see `CrocodilModule`.
        gradient_checkpointing: see `CrocodilModule`.
    """

    stage: ClassVar[Stage] = "demasker"

    def __init__(
        self,
        vocabulary: Vocabulary,
        network: dict[str, Any] | None = None,
        demasker_checkpoint: str | None = None,
        pretrained: Pretrained | None = None,
        lora: dict[str, Any] | None = None,
        sampler: MaskedSampler | None = None,
        masking: MaskingSchedule | None = None,
        loss_weight: LossWeight = "elbo",
        optimizer: OptimizerCallable = MuonAdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
        compile: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, seed, compile, gradient_checkpointing)
        if network is not None:
            refuse_second_source(network=network, demasker_checkpoint=demasker_checkpoint, pretrained=pretrained)
            self.demasker = Demasker(
                network | {"vocab_size": vocabulary.size},
                mask_token_id=vocabulary.mask_token_id,
                eos_token_id=vocabulary.eos_token_id,
            )
        else:
            self.demasker = base_demasker(demasker_checkpoint, pretrained, vocabulary)
        if lora is not None:
            self.demasker.with_lora(lora)
        self.sampler = sampler or MaskedSampler(16)
        self.masking = masking or LinearMasking()
        self.loss_weight: LossWeight = loss_weight

    def trained_networks(self) -> Iterable[nn.Module]:
        """The demasker's decoder; the head works chunk by chunk and is not compiled."""
        return [self.demasker.decoder]

    def network_configs(self) -> dict[str, Any]:
        """Settings of the demasker."""
        return {"demasker": self.demasker.to_config()}

    def pipeline(self, codec: TextCodec) -> CrocodilPipeline:
        """The plain model: algorithm `masked`."""
        return CrocodilPipeline(self.demasker, codec)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """The masked-diffusion loss of a batch; see `masked_diffusion_loss`."""
        noise, documents = self.training_noise(batch), Documents.of(batch)
        step = masked_diffusion_loss(
            self.demasker, batch["token_ids"], noise, self.masking, self.loss_weight, documents=documents
        )
        self.log("train_loss", step["loss"], prog_bar=True, sync_dist=True)
        return step

    def evaluate(self, batch: Batch, noise: BatchNoise) -> dict[str, Tensor]:
        """`loss`: the negative ELBO in nats per token; `masked_loss`, `accuracy`: plain means at masked positions."""
        token_ids, documents = batch["token_ids"], Documents.of(batch)
        noisy_ids, is_masked, point = draw_masks(token_ids, noise, self.masking, self.demasker.mask_token_id, documents)
        nats, hits = self.demasker.nats(noisy_ids, token_ids, is_masked, **documents.attention)
        nats = nats.to(is_masked.device)
        return {
            "loss": masked_cross_entropy(nats, is_masked, point, "elbo", documents.host),
            "masked_loss": masked_cross_entropy(nats, is_masked, point, "none"),
            "accuracy": hits.sum().to(is_masked.device) / is_masked.sum().clamp(min=1),
        }

    def num_items(self, batch: Batch) -> int:
        """Tokens, padding apart."""
        return Documents.of(batch).num_tokens

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Infilling: every other token of a held-out text, on average, is masked and written again."""
        source, noise = batch["token_ids"], self.held_out_noise(batch, batch_idx)
        documents = Documents.of(batch).one_a_row("predict")
        half = documents.spread(torch.full((len(source),), 0.5, device=source.device))
        noise = noise.to(source.device)
        uniform = noise.uniform(STREAM_MASK, 0, source.shape[1])
        canvas, is_masked = corrupt(source, half, uniform, self.demasker.mask_token_id)
        written = self.sampler.fill(self.demasker, canvas, generator=noise).token_ids
        accuracy = ((written == source) & is_masked).sum(1) / is_masked.sum(1).clamp(min=1)
        return {"token_ids": written, "source_token_ids": source, "token_accuracy": accuracy}


def draw_masks(
    token_ids: Tensor,
    noise: BatchNoise,
    masking: MaskingSchedule,
    mask_token_id: int,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor, MaskingPoint]:
    """x_t of a batch, each document at a time of its own, as if all stood in rows of their own.

    One time for a whole row would give the same loss on average, but the documents of a row would be noisy or clean
    together, and a batch would hold fewer different times. Times are stratified (`stratified_times`).

    Args:
        token_ids: (B, L) int64, x_0.
        noise: of the batch; on the CPU, so is what it decides.
        masking: noise schedule.
        mask_token_id: id of the mask.
        documents: of the batch; None where each row is one.

    Returns:
        x_t, (B, L) int64 beside `token_ids`; and beside the noise, where it is masked, (B, L) bool, nowhere at padding,
        and the schedule at the documents' times, (N,).
    """
    documents = Documents(*token_ids.shape) if documents is None else documents.host
    own = documents.noise(noise)
    point = masking(stratified_times(noise.shared(STREAM_TIME, 0), own.rows, own.num_rows))
    is_masked = noise.uniform(STREAM_MASK, 0, token_ids.shape[1]) < documents.spread(point.mask_prob)
    return token_ids.masked_fill(is_masked.to(token_ids.device, non_blocking=True), mask_token_id), is_masked, point


def masked_diffusion_loss(
    demasker: Demasker,
    token_ids: Tensor,
    noise: BatchNoise,
    masking: MaskingSchedule,
    loss_weight: LossWeight,
    latents: Tensor | None = None,
    latent_mask: Tensor | None = None,
    documents: Documents | None = None,
) -> dict[str, Tensor]:
    """The training loss of a batch (`loss_weights`), under latents if there are any, and what it is made of.

    Args:
        demasker: f_theta.
        token_ids: (B, L) int64, x_0.
        noise: of the batch.
        masking: noise schedule.
        loss_weight: "elbo" or "none".
        latents: (N, K, D) float, as the demasker is to see them.
        latent_mask: (N, K) bool, which of them.
        documents: of the batch, on its device; None where each row is one.

    Returns:
        `loss`, a scalar: as part of all processes, a mean over the tokens, or masked tokens, of all of them. And for
        each document, without gradient: beside the noise `mask_prob` (N,), at which its tokens were masked, and
        `num_masked` (N,) int64, how many were; beside the loss `masked_nats` (N,), the sum of -log f over these.
    """
    documents = Documents(*token_ids.shape) if documents is None else documents
    noisy_ids, is_masked, point = draw_masks(token_ids, noise, masking, demasker.mask_token_id, documents)
    weights = loss_weights(is_masked, point, loss_weight, documents.host)
    if latents is not None:
        latents = documents.to_rows(latents)
    if latent_mask is not None:
        latent_mask = documents.to_rows(latent_mask)
    loss, nats = demasker.weighted_loss(noisy_ids, token_ids, weights, latents, latent_mask, **documents.attention)
    count = torch.tensor(documents.num_tokens) if loss_weight == "elbo" else is_masked.sum()
    return {
        "loss": as_part_of_all(loss, count),
        "mask_prob": point.mask_prob,
        "masked_nats": documents.sums(nats),
        "num_masked": documents.host.sums(is_masked.long()),
    }


def base_demasker(checkpoint: str | None, pretrained: Pretrained | None, vocabulary: Vocabulary) -> Demasker:
    """The base a stage starts from: a checkpoint of the demasker stage, or a published one.

    Raises:
        ValueError: if both or neither are given, or the tokens differ from the data's.
    """
    refuse_second_source(demasker_checkpoint=checkpoint, pretrained=pretrained)
    if pretrained is not None:
        demasker = Demasker.from_pretrained(
            pretrained.path, pretrained.family, pretrained.quantization, pretrained.dtype, empty=True
        )
    else:
        demasker = StageCheckpoint(checkpoint or "", "demasker").demasker()
    check_vocabulary(demasker, vocabulary)
    return demasker


def refuse_second_source(**sources: Any) -> None:
    """Insists that exactly one of the arguments is given."""
    given = [name for name, source in sources.items() if source is not None]
    if len(given) != 1:
        raise ValueError(f"give exactly one of {', '.join(sources)}, got {' and '.join(given) or 'none'}")


def check_vocabulary(demasker: Demasker, vocabulary: Vocabulary) -> None:
    """Refuses a checkpoint that was trained on other tokens than the data has; spare rows of the head do no harm."""
    trained = (demasker.vocab_size, demasker.mask_token_id, demasker.eos_token_id)
    given = (vocabulary.size, vocabulary.mask_token_id, vocabulary.eos_token_id)
    if trained[1:] != given[1:] or trained[0] < given[0]:
        raise ValueError(
            f"the checkpoint and the data differ in (vocabulary size, mask id, eos id): {trained} and {given}; "
            "use the data section (or the tokenizer) the checkpoint was trained with"
        )

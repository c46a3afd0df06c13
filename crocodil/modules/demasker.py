"""Stage 1: the plain masked-diffusion model, the base of the autoencoder and the baseline of every comparison."""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from crocodil.data.codec import TextCodec
from crocodil.data.vocabulary import Vocabulary
from crocodil.diffusion.masking import (
    LinearMasking,
    LossWeight,
    MaskingPoint,
    MaskingSchedule,
    corrupt,
    masked_cross_entropy,
    stratified_times,
)
from crocodil.diffusion.noise import RowNoise
from crocodil.models import Demasker
from crocodil.modules.base import STREAM_MASK, STREAM_TIME, Batch, CrocodilModule
from crocodil.modules.checkpoints import Stage, StageCheckpoint
from crocodil.modules.optimizers import MuonAdamW
from crocodil.pipeline import CrocodilPipeline
from crocodil.samplers import MaskedSampler


class DemaskerModule(CrocodilModule):
    """Trains f_theta(x_0 | x_t) from scratch, or goes on from a checkpoint.

    Args:
        vocabulary: sizes and special tokens of the data; the CLI links it from the DataModule.
        network: settings of a transformers decoder (`model_type`, `hidden_size`, ...); the vocabulary's size is added.
        demasker_checkpoint: a checkpoint of this stage to fine-tune; `network` is then left out.
        sampler: fills the masks in at `predict`; None takes the defaults of `MaskedSampler` at 16 steps.
        masking: noise schedule of the masked process.
        loss_weight: "elbo" weighs time t by -alpha'_t / (1 - alpha_t) (1 / t, as LLaDA), "none" does not (as DiLaDiff).
        optimizer: see `CrocodilModule`.
        lr_scheduler: see `CrocodilModule`.
        seed: see `CrocodilModule`.
        compile: see `CrocodilModule`.
    """

    stage: ClassVar[Stage] = "demasker"

    def __init__(
        self,
        vocabulary: Vocabulary,
        network: dict[str, Any] | None = None,
        demasker_checkpoint: str | None = None,
        sampler: MaskedSampler | None = None,
        masking: MaskingSchedule | None = None,
        loss_weight: LossWeight = "elbo",
        optimizer: OptimizerCallable = MuonAdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
        compile: bool = False,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, seed, compile)
        if (network is None) == (demasker_checkpoint is None):
            raise ValueError(
                "give DemaskerModule either `network` (from scratch) or `demasker_checkpoint` (to go on from)"
            )
        if network is not None:
            self.demasker = Demasker(
                network | {"vocab_size": vocabulary.size},
                mask_token_id=vocabulary.mask_token_id,
                eos_token_id=vocabulary.eos_token_id,
            )
        else:
            self.demasker = StageCheckpoint(demasker_checkpoint or "", "demasker").demasker()
            check_vocabulary(self.demasker, vocabulary)
        self.sampler = sampler or MaskedSampler(16)
        self.masking = masking or LinearMasking()
        self.loss_weight: LossWeight = loss_weight

    def trained_networks(self) -> Iterable[nn.Module]:
        """The demasker."""
        return [self.demasker]

    def network_configs(self) -> dict[str, Any]:
        """Settings of the demasker."""
        return {"demasker": self.demasker.to_config()}

    def pipeline(self, codec: TextCodec) -> CrocodilPipeline:
        """The plain model: algorithm `masked`."""
        return CrocodilPipeline(self.demasker, codec)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The masked-diffusion loss of a batch."""
        noisy_ids, is_masked, point = draw_masks(
            batch["token_ids"], self.training_noise(batch), self.masking, self.demasker.mask_token_id
        )
        logits = self.demasker(noisy_ids)
        loss = masked_cross_entropy(logits, batch["token_ids"], is_masked, point, self.loss_weight)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def evaluate(self, batch: Batch, noise: RowNoise) -> dict[str, Tensor]:
        """`loss`: the negative ELBO in nats per token; `masked_loss`, `accuracy`: plain means at masked positions."""
        token_ids = batch["token_ids"]
        noisy_ids, is_masked, point = draw_masks(token_ids, noise, self.masking, self.demasker.mask_token_id)
        logits = self.demasker(noisy_ids)
        hits = (logits.argmax(-1) == token_ids) & is_masked
        return {
            "loss": masked_cross_entropy(logits, token_ids, is_masked, point, "elbo"),
            "masked_loss": masked_cross_entropy(logits, token_ids, is_masked, point, "none"),
            "accuracy": hits.sum() / is_masked.sum().clamp(min=1),
        }

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Infilling: every other token of a held-out text, on average, is masked and written again."""
        source, noise = batch["token_ids"], self.held_out_noise(batch, batch_idx)
        half = torch.full((source.shape[0],), 0.5, device=source.device)
        uniform = noise.uniform(STREAM_MASK, 0, source.shape[1])
        canvas, is_masked = corrupt(source, half, uniform, self.demasker.mask_token_id)
        written = self.sampler.fill(self.demasker, canvas, generator=noise).token_ids
        accuracy = ((written == source) & is_masked).sum(1) / is_masked.sum(1).clamp(min=1)
        return {"token_ids": written, "source_token_ids": source, "token_accuracy": accuracy}


def draw_masks(
    token_ids: Tensor, noise: RowNoise, masking: MaskingSchedule, mask_token_id: int
) -> tuple[Tensor, Tensor, MaskingPoint]:
    """x_t of a batch at stratified times: noisy ids (B, L), where they are masked (B, L), and the schedule (B,)."""
    point = masking(stratified_times(noise.uniform(STREAM_TIME, 0, 1).squeeze(1)))
    uniform = noise.uniform(STREAM_MASK, 0, token_ids.shape[1])
    noisy_ids, is_masked = corrupt(token_ids, point.mask_prob, uniform, mask_token_id)
    return noisy_ids, is_masked, point


def check_vocabulary(demasker: Demasker, vocabulary: Vocabulary) -> None:
    """Refuses a checkpoint that was trained on other tokens than the data has."""
    trained = (demasker.vocab_size, demasker.mask_token_id, demasker.eos_token_id)
    given = (vocabulary.size, vocabulary.mask_token_id, vocabulary.eos_token_id)
    if trained != given:
        raise ValueError(
            f"the checkpoint and the data differ in (vocabulary size, mask id, eos id): {trained} and {given}; "
            "use the data section the checkpoint was trained with"
        )

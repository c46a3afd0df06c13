"""What the stages on a frozen autoencoder share: the latents of a batch, their conditions and their times."""

import math
from typing import ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.nn import functional as F

from crocodil.data.block_datamodule import BlockDataModule
from crocodil.data.vocabulary import Vocabulary
from crocodil.diffusion.documents import Documents
from crocodil.diffusion.masking import corrupt, stratified_times
from crocodil.diffusion.noise import STREAM_CHOICE, STREAM_MASK, STREAM_TIME, BatchNoise
from crocodil.modules.base import Batch, CrocodilModule
from crocodil.modules.checkpoints import StageCheckpoint
from crocodil.modules.demasker import check_vocabulary
from crocodil.modules.optimizers import MuonAdamW
from crocodil.samplers import MaskedSampler


class LatentModule(CrocodilModule):
    """Base of the prior's stage and of its student's: the autoencoder is frozen and stays out of the checkpoint.

    Args:
        vocabulary: of the data.
        autoencoder_checkpoint: a checkpoint of the autoencoder stage.
        sampler: fills the tokens in at `predict`; None takes the defaults of `MaskedSampler` at 8 steps.
        condition_share: share of rows trained under the condition h_phi(x_t) of a randomly masked text.
        optimizer: see `CrocodilModule`.
        lr_scheduler: see `CrocodilModule`.
        seed: see `CrocodilModule`.
        compile: see `CrocodilModule`.
    """

    reads_latents: ClassVar[bool] = True

    def __init__(
        self,
        vocabulary: Vocabulary,
        autoencoder_checkpoint: str,
        sampler: MaskedSampler | None = None,
        condition_share: float = 0.25,
        optimizer: OptimizerCallable = MuonAdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
        compile: bool = False,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, seed, compile)
        autoencoder = StageCheckpoint(autoencoder_checkpoint, "autoencoder")
        self.demasker = autoencoder.demasker().requires_grad_(False).eval()
        self.encoder = autoencoder.encoder().requires_grad_(False).eval()
        check_vocabulary(self.demasker, vocabulary)
        self.sampler = sampler or MaskedSampler(8)
        self.condition_share = condition_share

    def setup(self, stage: str) -> None:
        """Refuses stored latents of another encoder."""
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, BlockDataModule):
            data.check_latents(self.encoder.fingerprint())

    def on_train_epoch_start(self) -> None:
        """Keeps the frozen autoencoder in evaluation mode."""
        self.demasker.eval()
        self.encoder.eval()

    def _latents(self, batch: Batch, documents: Documents) -> Tensor:
        """The latents (N, K, D) of the documents of a batch: those it brings, else the encoder's."""
        if "latents" not in batch:
            return self._encode(batch["token_ids"], documents)
        latents = batch["latents"]
        expected = (len(documents), self.encoder.num_registers, self.encoder.latent_dim)
        if tuple(latents.shape) != expected:
            raise ValueError(
                f"latents of a batch must be (documents, registers, latent_dim) = {expected}, got "
                f"{tuple(latents.shape)}; make the cache with this autoencoder"
            )
        return latents

    @torch.no_grad()
    def _encode(self, token_ids: Tensor, documents: Documents) -> Tensor:
        return documents.from_rows(self.encoder(token_ids, **documents.attention))

    def _conditions(
        self, token_ids: Tensor, documents: Documents, noise: BatchNoise
    ) -> tuple[Tensor | None, Tensor | None]:
        """h_phi(x_t) (N, K, D) and the documents (N,) that have it: those of the first rows of the whole batch.

        On average these are `condition_share` of all rows. Every process encodes as many rows as any other, even where
        none of them is to have its condition.
        """
        total, batch = self.condition_share * noise.num_rows, token_ids.shape[0]
        if not total:
            return None, None
        has_condition = noise.rows.double() + noise.shared(STREAM_CHOICE, 1) < total
        encoded = math.ceil(math.ceil(total) * batch / noise.num_rows)
        noisy_ids = self._noisy_ids(token_ids, documents, noise)
        condition = self._encode(noisy_ids[:encoded], documents.first_rows(encoded))
        absent = len(documents) - len(condition)
        return F.pad(condition, (0, 0, 0, 0, 0, absent)), documents.of_row(has_condition)

    def _noisy_ids(self, token_ids: Tensor, documents: Documents, noise: BatchNoise) -> Tensor:
        """x_t (B, L), each document at a ratio of its own, uniform on (0, 1)."""
        ratio = documents.noise(noise).uniform(STREAM_CHOICE, 0, 1).squeeze(1)
        uniform = noise.uniform(STREAM_MASK, 0, token_ids.shape[1])
        return corrupt(token_ids, documents.spread(ratio), uniform, self.demasker.mask_token_id)[0]

    def _times(self, noise: BatchNoise, has_condition: Tensor | None) -> Tensor:
        """Times (N,), stratified over the documents with a condition and over the others, each for themselves."""
        offset = noise.shared(STREAM_TIME, 0)
        if has_condition is None:
            return stratified_times(offset, noise.rows, noise.num_rows)
        first = self.condition_share * noise.num_rows
        index = torch.where(has_condition, noise.rows, noise.rows.double() - first)
        return stratified_times(offset, index, torch.where(has_condition, first, noise.num_rows - first))

    def num_items(self, batch: Batch) -> int:
        """Documents."""
        return len(Documents.of(batch))

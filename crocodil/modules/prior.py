"""Stage 3: the latent prior on a frozen autoencoder."""

import math
import random
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F

from crocodil.data.codec import TextCodec
from crocodil.data.vocabulary import Vocabulary
from crocodil.diffusion.gaussian import (
    PredictionType,
    TangentSchedule,
    add_noise,
    denoising_loss,
    prediction_target,
    to_x0,
)
from crocodil.diffusion.masking import corrupt, stratified_times
from crocodil.diffusion.noise import STREAM_CHOICE, STREAM_LATENT_NOISE, STREAM_MASK, STREAM_TIME, BatchNoise
from crocodil.models import LatentPrior
from crocodil.modules.base import Batch, CrocodilModule
from crocodil.modules.checkpoints import Stage, StageCheckpoint
from crocodil.modules.demasker import check_vocabulary
from crocodil.modules.optimizers import MuonAdamW
from crocodil.pipeline import CrocodilPipeline
from crocodil.samplers import ConThenDisc, MaskedSampler
from crocodil.samplers.latent import LatentProcess


class PriorModule(CrocodilModule):
    """Trains G_psi(z_t, t | h) to predict the latents of texts from noisy ones (CRoCoDiL, section 3).

    The autoencoder is frozen and stays out of the checkpoint; its fingerprint is kept, so that a prior is never
    exported with another one.

    Args:
        vocabulary: of the data; the CLI links it from the DataModule.
        autoencoder_checkpoint: a checkpoint of the autoencoder stage.
        sampler: fills the tokens in at `predict`; None takes the defaults of `MaskedSampler` at 8 steps.
        network: settings of `LatentPrior` other than K and D, which the autoencoder gives.
        noise_schedule: log SNR of the latent process.
        prediction_type: what the network predicts: "x0", "eps" or "v".
        self_conditioning: share of batches in which the network also sees its own first estimate.
        condition_share: share of rows trained under the condition h_phi(x_t) of a randomly masked text; the others
            train the unconditional prior. 0 leaves ConWithinDisc untrained.
        optimizer: see `CrocodilModule`.
        lr_scheduler: see `CrocodilModule`.
        seed: see `CrocodilModule`.
        compile: see `CrocodilModule`.
    """

    stage: ClassVar[Stage] = "prior"

    def __init__(
        self,
        vocabulary: Vocabulary,
        autoencoder_checkpoint: str,
        network: dict[str, Any] | None = None,
        sampler: MaskedSampler | None = None,
        noise_schedule: TangentSchedule | None = None,
        prediction_type: PredictionType = "x0",
        self_conditioning: float = 0.5,
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
        self.prior = LatentPrior(
            num_registers=self.encoder.num_registers, latent_dim=self.encoder.latent_dim, **(network or {})
        )
        self.sampler = sampler or MaskedSampler(8)
        self.noise_schedule = noise_schedule or TangentSchedule()
        self.prediction_type: PredictionType = prediction_type
        self.self_conditioning = self_conditioning
        self.condition_share = condition_share

    def trained_networks(self) -> Iterable[nn.Module]:
        """The prior."""
        return [self.prior]

    def network_configs(self) -> dict[str, Any]:
        """Settings of the prior, of its process, and which autoencoder it belongs to."""
        return {
            "prior": self.prior.to_config(),
            "latent_process": asdict(self.latent_process),
            "autoencoder": self.encoder.fingerprint(),
        }

    def is_saved(self, key: str) -> bool:
        """The frozen autoencoder comes from its own checkpoint."""
        return key.startswith("prior.")

    @property
    def latent_process(self) -> LatentProcess:
        """How latents are to be sampled from this prior."""
        return LatentProcess(
            self.noise_schedule, self.prediction_type, self.self_conditioning > 0, self.condition_share > 0
        )

    def pipeline(self, codec: TextCodec) -> CrocodilPipeline:
        """The whole system: all algorithms."""
        return CrocodilPipeline(self.demasker, codec, self.encoder, self.prior, self.latent_process)

    def on_train_epoch_start(self) -> None:
        """Keeps the frozen autoencoder in evaluation mode."""
        self.demasker.eval()
        self.encoder.eval()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The denoising loss of a batch, part of it under a condition."""
        noise = self.training_noise(batch).to(batch["token_ids"].device)
        with torch.no_grad():
            latents = self.encoder(batch["token_ids"])
        condition, has_condition = self._conditions(batch["token_ids"], noise)
        refine = random.Random(f"{self.seed} {self.global_step}").random() < self.self_conditioning
        loss = self._losses(latents, noise, condition, has_condition, refine).mean()
        self.log("train_loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def _conditions(self, token_ids: Tensor, noise: BatchNoise) -> tuple[Tensor | None, Tensor | None]:
        """h_phi(x_t) (B, K, D) and the rows (B,) that have it: the first ones of the whole batch, on average `share`.

        Every process encodes as many rows as any other, even where none of them is to have its condition.
        """
        total, batch = self.condition_share * noise.num_rows, token_ids.shape[0]
        if not total:
            return None, None
        has_condition = noise.rows.double() + noise.shared(STREAM_CHOICE, 1) < total
        encoded = math.ceil(math.ceil(total) * batch / noise.num_rows)
        ratio = noise.uniform(STREAM_CHOICE, 0, 1).squeeze(1)
        uniform = noise.uniform(STREAM_MASK, 0, token_ids.shape[1])
        noisy_ids, _ = corrupt(token_ids, ratio, uniform, self.demasker.mask_token_id)
        with torch.no_grad():
            condition = self.encoder(noisy_ids[:encoded])
        return F.pad(condition, (0, 0, 0, 0, 0, batch - encoded)), has_condition

    def _losses(
        self, latents: Tensor, noise: BatchNoise, condition: Tensor | None, has_condition: Tensor | None, refine: bool
    ) -> Tensor:
        """Mean squared error of each row (B,) at stratified times; `refine` adds the self-conditioning pass."""
        point = self.noise_schedule(self._times(noise, has_condition))
        fresh = noise.normal(STREAM_LATENT_NOISE, 0, tuple(latents.shape[1:]))
        noisy = add_noise(latents, fresh, point)
        given = {"condition": condition, "condition_mask": has_condition}
        estimate = None
        if refine:
            with torch.no_grad():
                estimate = to_x0(self.prior(noisy, point.log_snr, **given), noisy, point, self.prediction_type)
        output = self.prior(noisy, point.log_snr, self_condition=estimate, **given)
        return denoising_loss(output, prediction_target(latents, fresh, point, self.prediction_type))

    def _times(self, noise: BatchNoise, has_condition: Tensor | None) -> Tensor:
        """Times (B,), stratified over the rows with a condition and over the others, each for themselves."""
        offset = noise.shared(STREAM_TIME, 0)
        if has_condition is None:
            return stratified_times(offset, noise.rows, noise.num_rows)
        first = self.condition_share * noise.num_rows
        index = torch.where(has_condition, noise.rows, noise.rows.double() - first)
        return stratified_times(offset, index, torch.where(has_condition, first, noise.num_rows - first))

    def evaluate(self, batch: Batch, noise: BatchNoise) -> dict[str, Tensor]:
        """Mean squared errors: `loss` unconditional, `loss_conditional` given texts masked at random ratios."""
        token_ids = batch["token_ids"]
        noise = noise.to(token_ids.device)
        latents = self.encoder(token_ids)
        figures = {"loss": self._losses(latents, noise, None, None, refine=self.self_conditioning > 0).mean()}
        if self.condition_share:
            ratio = noise.uniform(STREAM_CHOICE, 0, 1).squeeze(1)
            uniform = noise.uniform(STREAM_MASK, 0, token_ids.shape[1])
            condition = self.encoder(corrupt(token_ids, ratio, uniform, self.demasker.mask_token_id)[0])
            losses = self._losses(latents, noise, condition, None, refine=self.self_conditioning > 0)
            figures["loss_conditional"] = losses.mean()
        return figures

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """ConThenDisc: as many new texts as the batch has rows."""
        out = ConThenDisc(self.sampler, self.latent_process.sampler()).sample(
            self.demasker,
            self.prior,
            length=batch["token_ids"].shape[1],
            batch_size=batch["token_ids"].shape[0],
            generator=self.held_out_noise(batch, batch_idx).to(self.device),
            device=self.device,
        )
        return {"token_ids": out.token_ids}

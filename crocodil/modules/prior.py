"""Stage 3: the latent prior on a frozen autoencoder."""

import random
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from crocodil.data.codec import TextCodec
from crocodil.data.vocabulary import Vocabulary
from crocodil.diffusion.documents import Documents
from crocodil.diffusion.gaussian import (
    PredictionType,
    TangentSchedule,
    add_noise,
    denoising_loss,
    prediction_target,
    to_x0,
)
from crocodil.diffusion.noise import STREAM_LATENT_NOISE, BatchNoise
from crocodil.models import LatentPrior
from crocodil.modules.base import Batch
from crocodil.modules.checkpoints import Stage
from crocodil.modules.latent_stage import LatentModule
from crocodil.modules.optimizers import MuonAdamW
from crocodil.pipeline import CrocodilPipeline
from crocodil.ranks import as_part_of_all
from crocodil.samplers import ConThenDisc, MaskedSampler
from crocodil.samplers.latent import LatentProcess


class PriorModule(LatentModule):
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
        super().__init__(
            vocabulary, autoencoder_checkpoint, sampler, condition_share, optimizer, lr_scheduler, seed, compile
        )
        self.prior = LatentPrior(
            num_registers=self.encoder.num_registers, latent_dim=self.encoder.latent_dim, **(network or {})
        )
        self.noise_schedule = noise_schedule or TangentSchedule()
        self.prediction_type: PredictionType = prediction_type
        self.self_conditioning = self_conditioning

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

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """The denoising loss of a batch, part of it under a condition.

        Returns:
            `loss`, a scalar: as part of all processes, the mean over the documents of all of them. And for each
            document, without gradient: `latents` (N, K, D), clean, `row_losses` (N,) and `log_snr` (N,).
        """
        documents = Documents.of(batch)
        noise = self.training_noise(batch).to(batch["token_ids"].device)
        latents = self._latents(batch, documents)
        condition, has_condition = self._conditions(batch["token_ids"], documents, noise)
        own = documents.noise(noise)
        refine = random.Random(f"{self.seed} {self.global_step}").random() < self.self_conditioning
        losses, log_snr = self._losses(latents, own, condition, has_condition, refine)
        loss = as_part_of_all(losses.mean(), torch.tensor(len(documents)))
        self.log("train_loss", loss, prog_bar=True, sync_dist=True)
        return {"loss": loss, "latents": latents, "row_losses": losses.detach(), "log_snr": log_snr}

    def _losses(
        self, latents: Tensor, noise: BatchNoise, condition: Tensor | None, has_condition: Tensor | None, refine: bool
    ) -> tuple[Tensor, Tensor]:
        """Mean squared error of each document (N,) at stratified times, and its log SNR (N,).

        `refine` adds the self-conditioning pass; `noise` is the documents' own.
        """
        point = self.noise_schedule(self._times(noise, has_condition))
        fresh = noise.normal(STREAM_LATENT_NOISE, 0, tuple(latents.shape[1:]))
        noisy = add_noise(latents, fresh, point)
        given = {"condition": condition, "condition_mask": has_condition}
        estimate = None
        if refine:
            with torch.no_grad():
                estimate = to_x0(self.prior(noisy, point.log_snr, **given), noisy, point, self.prediction_type)
        output = self.prior(noisy, point.log_snr, self_condition=estimate, **given)
        losses = denoising_loss(output, prediction_target(latents, fresh, point, self.prediction_type))
        return losses, point.log_snr

    def evaluate(self, batch: Batch, noise: BatchNoise) -> dict[str, Tensor]:
        """Mean squared errors: `loss` unconditional, `loss_conditional` given texts masked at random ratios."""
        token_ids, documents = batch["token_ids"], Documents.of(batch)
        noise = noise.to(token_ids.device)
        latents, own = self._latents(batch, documents), documents.noise(noise)
        refine = self.self_conditioning > 0
        figures = {"loss": self._losses(latents, own, None, None, refine)[0].mean()}
        if self.condition_share:
            condition = self._encode(self._noisy_ids(token_ids, documents, noise), documents)
            figures["loss_conditional"] = self._losses(latents, own, condition, None, refine)[0].mean()
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

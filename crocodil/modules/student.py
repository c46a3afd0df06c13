"""Stage 4, if wanted: a student of the prior that needs few evaluations (MeanFlow, arXiv 2505.13447)."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F

from crocodil.data.codec import TextCodec
from crocodil.data.vocabulary import Vocabulary
from crocodil.diffusion.documents import Documents
from crocodil.diffusion.gaussian import NoiseLevel, add_noise, denoising_loss, to_x0
from crocodil.diffusion.mean_flow import adaptive_loss, mean_flow_target, split_target, step_ends
from crocodil.diffusion.noise import STREAM_LATENT_NOISE, STREAM_TIME, BatchNoise
from crocodil.models import LatentStudent
from crocodil.modules.base import Batch
from crocodil.modules.checkpoints import Stage, StageCheckpoint, check_autoencoder
from crocodil.modules.latent_stage import LatentModule
from crocodil.modules.optimizers import MuonAdamW
from crocodil.pipeline import CrocodilPipeline
from crocodil.ranks import as_part_of_all
from crocodil.samplers import ConThenDisc, MaskedSampler
from crocodil.samplers.latent import LatentProcess
from crocodil.samplers.mean_flow import StudentProcess

TEACHER_STEPS, STUDENT_STEPS = 32, (1, 2, 4)
"""Of the endpoints that `evaluate` compares."""


class StudentModule(LatentModule):
    """Trains a student to jump along the probability flow of a trained prior, as far as from noise to clean latents.

    The flow is the frozen prior's, its self-conditioning pass and its guidance included, at noisy latents of real
    texts. The student starts with the prior's weights and has no self-conditioning: a step is one evaluation. Prior
    and autoencoder stay out of the checkpoint.

    Args:
        vocabulary: of the data; the CLI links it from the DataModule.
        prior_checkpoint: a checkpoint of the prior stage, the teacher.
        autoencoder_checkpoint: the checkpoint of the autoencoder stage that this prior was trained on.
        sampler: fills the tokens in at `predict`; None takes the defaults of `MaskedSampler` at 8 steps.
        guidance_scale: classifier-free guidance of the teacher in rows with a condition; 1.0 is off.
        start_log_snr: log SNR where the flow begins; latents with more noise are taken for pure noise. Much lower, and
            errors of a derivative grow as exp(-log SNR / 2).
        instant_share: share of rows whose step has no length, where the student learns the teacher's own estimate.
        final_share: share of rows whose step ends at clean latents, as the last step of every draw does.
        settled_log_snr: log SNR from which on the teacher's own estimate is taken for the mean one: the end of the way,
            from which all else is learned backwards.
        first_leg: share of s over which the teacher leads (`split_target`); the student's own estimate leads the rest
            of the way. 0 takes MeanFlow's derivative instead (`mean_flow_target`).
        tangent_warmup: optimizer steps over which the derivative's term rises to its full weight; without a derivative
            it means nothing.
        loss_power: see `adaptive_loss`.
        condition_share: share of rows trained under the condition h_phi(x_t) of a randomly masked text.
        optimizer: see `CrocodilModule`.
        lr_scheduler: see `CrocodilModule`.
        seed: see `CrocodilModule`.
        compile: see `CrocodilModule`; derivatives are computed without.

    Raises:
        ValueError: if a setting is out of range or does not fit the prior.
    """

    stage: ClassVar[Stage] = "student"

    def __init__(
        self,
        vocabulary: Vocabulary,
        prior_checkpoint: str,
        autoencoder_checkpoint: str,
        sampler: MaskedSampler | None = None,
        guidance_scale: float = 1.0,
        start_log_snr: float = -8.0,
        instant_share: float = 0.25,
        final_share: float = 0.25,
        settled_log_snr: float = 4.0,
        first_leg: float = 0.2,
        tangent_warmup: int = 100,
        loss_power: float = 0.0,
        condition_share: float = 0.25,
        optimizer: OptimizerCallable = MuonAdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
        compile: bool = False,
    ) -> None:
        super().__init__(
            vocabulary, autoencoder_checkpoint, sampler, condition_share, optimizer, lr_scheduler, seed, compile
        )
        if min(instant_share, final_share) < 0 or instant_share + final_share >= 1:
            raise ValueError(
                "instant_share and final_share must be at least 0 and below 1 together, got "
                f"{instant_share} and {final_share}"
            )
        if not 0 <= first_leg <= 1:
            raise ValueError(f"first_leg must be between 0 (a derivative) and 1, got {first_leg}")
        prior = StageCheckpoint(prior_checkpoint, "prior")
        self._trained_on = prior_checkpoint, prior.networks["autoencoder"], autoencoder_checkpoint
        self.latent_process = LatentProcess.from_dict(prior.networks["latent_process"])
        if condition_share and not self.latent_process.conditional:
            raise ValueError(
                f"condition_share must be 0, got {condition_share}: the prior of {prior_checkpoint} knows no conditions"
            )
        self.prior = prior.prior().requires_grad_(False).eval()
        self.student = LatentStudent.of(self.prior)
        self.guidance_scale = guidance_scale
        self.start_log_snr = start_log_snr
        self.instant_share, self.final_share = instant_share, final_share
        self.settled_log_snr = settled_log_snr
        self.first_leg = first_leg
        self.tangent_warmup = tangent_warmup
        self.loss_power = loss_power

    def setup(self, stage: str) -> None:
        """Refuses stored latents of another encoder, and a prior that was trained on another autoencoder."""
        super().setup(stage)
        prior, trained_on, autoencoder = self._trained_on
        check_autoencoder(prior, trained_on, self.encoder, autoencoder)

    def configure_model(self) -> None:
        """Loads what the networks lack.

        Raises:
            ValueError: if they are to be sharded: a sharded network has no forward-mode derivative.
        """
        if self.device_mesh is not None:
            raise ValueError("a student is trained whole on each device: expected --trainer.strategy=ddp, got a mesh")
        super().configure_model()

    def trained_networks(self) -> Iterable[nn.Module]:
        """The student."""
        return [self.student]

    def network_configs(self) -> dict[str, Any]:
        """Settings of the student, of its process, and which autoencoder it belongs to."""
        return {
            "student": self.student.to_config(),
            "student_process": asdict(self.student_process),
            "autoencoder": self.encoder.fingerprint(),
        }

    def is_saved(self, key: str) -> bool:
        """Prior and autoencoder come from their own checkpoints."""
        return key.startswith("student.")

    @property
    def student_process(self) -> StudentProcess:
        """How latents are to be sampled from this student."""
        return StudentProcess(
            self.latent_process.noise_schedule,
            self.latent_process.prediction_type,
            self.condition_share > 0,
            self.start_log_snr,
            self.guidance_scale,
        )

    def pipeline(self, codec: TextCodec) -> CrocodilPipeline:
        """The whole system, with the student as its only prior."""
        return CrocodilPipeline(
            self.demasker, codec, self.encoder, student=self.student, student_process=self.student_process
        )

    def on_train_epoch_start(self) -> None:
        """Keeps the frozen networks in evaluation mode."""
        super().on_train_epoch_start()
        self.prior.eval()

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """MeanFlow's loss of a batch, part of it under a condition.

        Returns:
            `loss`, a scalar, weighted by `adaptive_loss`: as part of all processes, the mean over the documents of all
            of them. And for each document, without gradient: `latents` (N, K, D), clean, `row_losses` (N,), not
            weighted, and `log_snr` (N,).
        """
        documents = Documents.of(batch)
        noise = self.training_noise(batch).to(batch["token_ids"].device)
        latents = self._latents(batch, documents)
        condition, has_condition = self._conditions(batch["token_ids"], documents, noise)
        tangent_scale = min(1.0, (self.global_step + 1) / (self.tangent_warmup + 1))
        own = documents.noise(noise)
        losses, log_snr = self._losses(latents, own, condition, has_condition, tangent_scale)
        weighted = adaptive_loss(losses, self.loss_power).mean()
        self.log("train_loss", losses.detach().mean(), prog_bar=True, sync_dist=True)
        return {
            "loss": as_part_of_all(weighted, torch.tensor(len(documents))),
            "latents": latents,
            "row_losses": losses.detach(),
            "log_snr": log_snr,
        }

    def _losses(
        self,
        latents: Tensor,
        noise: BatchNoise,
        condition: Tensor | None,
        has_condition: Tensor | None,
        tangent_scale: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Mean squared error of each document's mean estimate (N,), and its log SNR (N,); `noise` is their own."""
        t = self._times(noise, has_condition)
        level = self._level(t)
        uniform = noise.uniform(STREAM_TIME, 1, 1).squeeze(1)
        ends = self.student_process.log_snrs(step_ends(t, uniform, self.instant_share, self.final_share)).float()
        noisy = add_noise(latents, noise.normal(STREAM_LATENT_NOISE, 0, tuple(latents.shape[1:])), level)

        def student(noisy: Tensor, level: NoiseLevel) -> Tensor:
            output = self.student(noisy, level.log_snr, ends, condition=condition, condition_mask=has_condition)
            return to_x0(output, noisy, level, self.latent_process.prediction_type)

        def teacher(noisy: Tensor, level: NoiseLevel, earlier: Tensor) -> Tensor:
            return self.teach(noisy, level, condition, has_condition, earlier)

        estimate = self.teach(noisy, level, condition, has_condition)
        if self.first_leg:
            target = split_target(student, teacher, noisy, estimate, level, ends, self.first_leg)
        else:
            target = mean_flow_target(student, noisy, estimate, level.log_snr, ends, tangent_scale)
        is_settled = (level.log_snr >= self.settled_log_snr)[:, None, None]
        target = torch.where(is_settled, estimate, target)
        return denoising_loss(student(noisy, level), target), level.log_snr

    def _level(self, t: Tensor) -> NoiseLevel:
        """The noise at times (N,) in single precision, never more than where the flow begins."""
        log_snr = self.latent_process.noise_schedule(t).log_snr.clamp(min=self.start_log_snr)
        return NoiseLevel.at(log_snr.float())

    @torch.no_grad()
    def teach(
        self,
        noisy: Tensor,
        level: NoiseLevel,
        condition: Tensor | None = None,
        has_condition: Tensor | None = None,
        earlier: Tensor | None = None,
    ) -> Tensor:
        """The teacher's estimate of z_0, guided if asked for.

        With self-conditioning it takes an earlier estimate; if there is none, it makes one in a pass of its own.

        Args:
            noisy: (N, K, D) float, z_t.
            level: of the noise, (N,).
            condition: (N, K, D), h_phi(x_t) of partly masked texts; None for none.
            has_condition: (N,) bool, which rows have it; None for all.
            earlier: (N, K, D), an estimate from more noise.
        """

        def guided(earlier: Tensor | None) -> Tensor:
            if condition is None or self.guidance_scale == 1.0:
                return x0(earlier, condition)
            unconditional = x0(earlier, None)
            return unconditional + self.guidance_scale * (x0(earlier, condition) - unconditional)

        def x0(earlier: Tensor | None, given: Tensor | None) -> Tensor:
            conditions = {"self_condition": earlier, "condition": given, "condition_mask": has_condition}
            output = self.prior(noisy, level.log_snr, **conditions)
            return to_x0(output, noisy, level, self.latent_process.prediction_type)

        if not self.latent_process.self_conditioning:
            return guided(None)
        return guided(guided(None) if earlier is None else earlier)

    def evaluate(self, batch: Batch, noise: BatchNoise) -> dict[str, Tensor]:
        """Held-out figures of the student.

        Returns:
            `loss`: mean squared error of its mean estimates, without conditions; `loss_conditional` given texts masked
            at random ratios. `mse_N` and `cosine_N`: how far N of its steps lead from where 32 steps of the teacher
            lead from the same noise, as mean square and as cosine of whole latents.
        """
        token_ids, documents = batch["token_ids"], Documents.of(batch)
        noise = noise.to(token_ids.device)
        latents, own = self._latents(batch, documents), documents.noise(noise)
        figures = {"loss": self._losses(latents, own, None, None)[0].mean()}
        if self.condition_share:
            condition = self._encode(self._noisy_ids(token_ids, documents, noise), documents)
            figures["loss_conditional"] = self._losses(latents, own, condition, None)[0].mean()
        given: dict[str, Any] = {"batch_size": len(documents), "generator": own, "device": token_ids.device}
        expected = self.latent_process.sampler(TEACHER_STEPS).sample(self.prior, **given)
        for num_steps in STUDENT_STEPS:
            found = self.student_process.sampler(num_steps).sample(self.student, **given)
            figures[f"mse_{num_steps}"] = F.mse_loss(found, expected)
            figures[f"cosine_{num_steps}"] = F.cosine_similarity(found.flatten(1), expected.flatten(1)).mean()
        return figures

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """ConThenDisc: as many new texts as the batch has rows."""
        out = ConThenDisc(self.sampler, self.student_process.sampler()).sample(
            self.demasker,
            self.student,
            length=batch["token_ids"].shape[1],
            batch_size=batch["token_ids"].shape[0],
            generator=self.held_out_noise(batch, batch_idx).to(self.device),
            device=self.device,
        )
        return {"token_ids": out.token_ids}

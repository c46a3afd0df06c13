"""The distilled prior: a latent prior that jumps from one noise level to another in a single evaluation."""

from torch import Tensor

from crocodil.models.prior import LatentPrior, NoiseLevelEmbedding, zero_linear


class LatentStudent(LatentPrior):
    """A `LatentPrior` that is told where its step ends, the student of MeanFlow (arXiv 2505.13447).

    The embedding of the end is added to that of the noise level. Its last layer starts at zero, so that a student with
    the weights of a prior begins as this prior. It has no self-conditioning: a step is one evaluation.

    Args:
        network: settings of `LatentPrior`.
    """

    def __init__(self, **network: int | float) -> None:
        super().__init__(**network)  # type: ignore[arg-type]  # the settings of a record, which are checked there
        hidden_size = int(self.config["hidden_size"])
        self.end_embedding = NoiseLevelEmbedding(hidden_size)
        self.end_embedding.mlp[-1] = zero_linear(hidden_size, hidden_size)

    @classmethod
    def of(cls, prior: LatentPrior) -> "LatentStudent":
        """A student that begins as a prior; the weights are copies."""
        student = cls(**prior.to_config())
        student.load_state_dict(prior.state_dict(), strict=False)
        return student

    def forward(  # type: ignore[override]  # it needs one more level than a prior and takes no earlier estimate
        self,
        noisy_latents: Tensor,
        log_snr: Tensor,
        end_log_snr: Tensor,
        *,
        condition: Tensor | None = None,
        condition_mask: Tensor | None = None,
    ) -> Tensor:
        """One evaluation of the network.

        Args:
            noisy_latents: (B, K, D) float, z_t.
            log_snr: (B,) float, log SNR of z_t.
            end_log_snr: (B,) float, log SNR where the step ends; infinite for clean latents.
            condition: (B, K, D), h_phi(x_t) of a partly masked text; None for the unconditional prior.
            condition_mask: (B,) bool, False drops the condition of a row; None keeps all.

        Returns:
            (B, K, D): the mean estimate X, in the prediction type of the prior.
        """
        levels = self.noise_embedding(log_snr) + self.end_embedding(end_log_snr)
        return self.denoise(noisy_latents, levels, None, condition, condition_mask)

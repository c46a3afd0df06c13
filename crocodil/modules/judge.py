"""The judge: a small causal language model that scores samples and shares nothing with the systems it judges."""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F

from crocodil.data.codec import TextCodec
from crocodil.data.vocabulary import Vocabulary
from crocodil.diffusion.documents import Documents
from crocodil.diffusion.noise import BatchNoise
from crocodil.evaluation.ends import tokens_through_eos
from crocodil.evaluation.judge import build_judge
from crocodil.modules.base import Batch, CrocodilModule
from crocodil.modules.checkpoints import Stage
from crocodil.modules.optimizers import MuonAdamW
from crocodil.pipeline import CrocodilPipeline
from crocodil.ranks import mean_over_ranks


class JudgeModule(CrocodilModule):
    """Next-token prediction on blocks up to and with the first end token.

    Args:
        vocabulary: of the data; the CLI links it from the DataModule.
        network: settings of a transformers decoder.
        optimizer: see `CrocodilModule`.
        lr_scheduler: see `CrocodilModule`.
        seed: see `CrocodilModule`.
        compile: see `CrocodilModule`.
    """

    stage: ClassVar[Stage] = "judge"

    def __init__(
        self,
        vocabulary: Vocabulary,
        network: dict[str, Any],
        optimizer: OptimizerCallable = MuonAdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
        compile: bool = False,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, seed, compile)
        self.eos_token_id = vocabulary.eos_token_id
        self.settings = network | {"vocab_size": vocabulary.size}
        self.judge = build_judge(self.settings)

    def trained_networks(self) -> Iterable[nn.Module]:
        """The causal network."""
        return [self.judge]

    def network_configs(self) -> dict[str, Any]:
        """Settings of the network."""
        return {"judge": self.settings, "eos_token_id": self.eos_token_id}

    def pipeline(self, codec: TextCodec) -> CrocodilPipeline:
        """A judge writes nothing.

        Raises:
            ValueError: always.
        """
        raise ValueError("a judge scores texts and writes none; sample from another stage")

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Cross-entropy of the next token."""
        loss = self._loss(batch)
        self.log("train_loss", loss, prog_bar=True, sync_dist=True)
        return {"loss": loss}

    def evaluate(self, batch: Batch, noise: BatchNoise) -> dict[str, Tensor]:
        """`loss`: nats per token, the first token given."""
        return {"loss": self._loss(batch)}

    def _loss(self, batch: Batch) -> Tensor:
        """Padding stands behind the text, where a causal network does not look.

        Raises:
            ValueError: if rows are packed.
        """
        token_ids, documents = batch["token_ids"], Documents.of(batch).one_a_row("a judge")
        is_text = documents.spread(torch.ones(len(documents), dtype=torch.bool, device=token_ids.device))
        logits = self.judge(input_ids=token_ids, use_cache=False).logits[:, :-1]
        nats = F.cross_entropy(logits.float().transpose(1, 2), token_ids[:, 1:], reduction="none")
        counted = (tokens_through_eos(token_ids, self.eos_token_id) & is_text)[:, 1:]
        return (nats * counted).sum() / mean_over_ranks(counted.sum())

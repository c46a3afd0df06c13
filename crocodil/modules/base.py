"""What the stages share: optimizers, reproducible noise, compilation, and the record in the checkpoint."""

from abc import abstractmethod
from collections.abc import Iterable
from hashlib import sha256
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from crocodil.data.codec import TextCodec
from crocodil.diffusion.noise import BatchNoise
from crocodil.models import Demasker, RegisterEncoder
from crocodil.modules.checkpoints import RECORD_KEY, Stage, check_stage, is_kept, stage_record
from crocodil.modules.optimizers import MuonAdamW, parameter_groups
from crocodil.modules.sharding import ShardedStrategy, shard
from crocodil.pipeline import CrocodilPipeline
from crocodil.ranks import rank_and_size

Batch = dict[str, Tensor]
MAX_ROWS = 2**28 + 3  # of a batch over all processes


class CrocodilModule(L.LightningModule):
    """Base class of the stages.

    Args:
        optimizer: called with the parameter groups of `parameter_groups`.
        lr_scheduler: called with the optimizer, stepped after every optimizer step; None for a constant rate.
        seed: of the corruption noise, which is a function of (seed, step, row of the batch over all processes).
        compile: run the networks through `torch.compile` while they train.
        gradient_checkpointing: keep the inputs of the transformer's blocks only and compute the rest again in the
            backward pass; the gradients are the same.
    """

    stage: ClassVar[Stage]
    reads_latents: ClassVar[bool] = False
    """Whether the stage trains from the latents of a batch, if there are any."""

    run_settings: dict[str, Any] | None = None
    """What `crocodil fit` was asked for, which goes into the record of every checkpoint."""

    def __init__(
        self,
        optimizer: OptimizerCallable = MuonAdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
        compile: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.seed = seed
        self.compile_networks = compile
        self.gradient_checkpointing = gradient_checkpointing
        self.register_state_dict_post_hook(_leave_out_unsaved)
        self.register_load_state_dict_post_hook(_miss_only_saved)

    @abstractmethod
    def trained_networks(self) -> Iterable[nn.Module]:
        """The networks this stage trains: those that are compiled."""

    @abstractmethod
    def network_configs(self) -> dict[str, Any]:
        """Plain data that rebuilds the networks; saved in the checkpoint."""

    @abstractmethod
    def pipeline(self, codec: TextCodec) -> CrocodilPipeline:
        """What can be sampled from at this stage, sharing the module's networks."""

    @abstractmethod
    def evaluate(self, batch: Batch, noise: BatchNoise) -> dict[str, Tensor]:
        """Scalar figures of one held-out batch, `loss` among them."""

    def is_saved(self, key: str) -> bool:
        """Whether an entry belongs to the `state_dict`; what the record can rebuild (frozen networks) need not.

        Args:
            key: name of a parameter or buffer of this module.
        """
        network, _, rest = key.partition(".")
        return is_kept(getattr(self, network), rest)

    def configure_model(self) -> None:
        """Shards all networks over the processes of a `ShardedStrategy`, and loads published weights into them.

        Raises:
            ValueError: if the mesh is another strategy's.
        """
        if self.device_mesh is not None:
            if not isinstance(self.trainer.strategy, ShardedStrategy):
                kind = type(self.trainer.strategy).__name__
                raise ValueError(f"to shard, expected --trainer.strategy=fsdp2 (any number of processes), got {kind}")
            for network in self.children():
                shard(network, self.device_mesh["data_parallel"], self.trainer.precision)
        self.load_weights()

    def load_weights(self) -> None:
        """Loads what networks on published checkpoints still lack, tensor by tensor, into their shards if there are."""
        for network in self.children():
            if isinstance(network, Demasker | RegisterEncoder):
                network.load_weights()

    def on_fit_start(self) -> None:
        """Prepares the networks for training: compiled, with gradient checkpointing, as asked for."""
        if self.gradient_checkpointing:
            for network in self.trained_networks():
                network.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        if self.compile_networks:
            for network in self.trained_networks():
                network.compile()

    def configure_optimizers(self) -> Any:
        """Builds the optimizer over the trainable parameters, and the schedule that steps with it."""
        optimizer = self.optimizer(parameter_groups(self))
        if self.lr_scheduler is None:
            return optimizer
        scheduler = {"scheduler": self.lr_scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def on_train_start(self) -> None:
        """Says so if the data come with latents that the stage has no use for."""
        if getattr(getattr(self.trainer, "datamodule", None), "latents", None) and not self.reads_latents:
            rank_zero_warn(f"data.init_args.latents is ignored: the {self.stage} stage trains from texts alone")

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seeds torch's own generators, of which dropout draws: by (seed, step, process), as all other noise."""
        step, rank = self.trainer.fit_loop.total_batch_idx, rank_and_size()[0]
        torch.manual_seed(int.from_bytes(sha256(f"{self.seed} {step} {rank}".encode()).digest()[:8]))

    def training_noise(self, batch: Batch) -> BatchNoise:
        """The noise of this step: the same again whenever the run is repeated or resumed."""
        return self._noise(batch, self.trainer.fit_loop.total_batch_idx + 1)

    def held_out_noise(self, batch: Batch, batch_idx: int) -> BatchNoise:
        """The noise of a held-out batch: the same at every evaluation, so that curves are comparable."""
        return self._noise(batch, -1 - batch_idx)

    def _noise(self, batch: Batch, step: int) -> BatchNoise:
        """Keyed by the rows of the batch over all processes, to which samplers deal them out in turn.

        It is drawn on the CPU, where asking how many tokens are masked waits for no device.
        """
        rank, size = rank_and_size()
        rows = torch.arange(batch["token_ids"].shape[0]) * size + rank
        seed = torch.full_like(rows[0], self.seed)  # a tensor, so that large seeds wrap around
        return BatchNoise((seed * 1_000_003 + step) * MAX_ROWS, rows, len(rows) * size)

    def num_items(self, batch: Batch) -> int:
        """How many items the figures of a held-out batch are means over: rows, unless a stage counts otherwise."""
        return batch["token_ids"].shape[0]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs the held-out figures as `val_*`."""
        self._log_figures("val", batch, batch_idx)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs the held-out figures as `test_*`."""
        self._log_figures("test", batch, batch_idx)

    def _log_figures(self, prefix: str, batch: Batch, batch_idx: int) -> None:
        with torch.compiler.set_stance("force_eager"):  # a last, smaller batch must not compile anew
            figures = self.evaluate(batch, self.held_out_noise(batch, batch_idx))
        for name, value in figures.items():
            self.log(
                f"{prefix}_{name}",
                value,
                prog_bar=name == "loss",
                sync_dist=True,
                batch_size=self.num_items(batch),
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what the next stage needs: the stage's name, the networks' settings and the text codec."""
        codec = getattr(getattr(self.trainer, "datamodule", None), "codec", None)
        checkpoint[RECORD_KEY] = stage_record(self.stage, self.network_configs(), codec, self.run_settings)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses to go on from another stage's checkpoint."""
        check_stage(checkpoint.get(RECORD_KEY), self.stage, "--ckpt_path")

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Steps the schedule (Lightning's default, which refuses schedules of unknown classes)."""
        scheduler.step()


def _leave_out_unsaved(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    assert isinstance(module, CrocodilModule)
    for key in [key for key in state_dict if not module.is_saved(key.removeprefix(prefix))]:
        del state_dict[key]


def _miss_only_saved(module: nn.Module, incompatible_keys: Any) -> None:
    """A strict load complains about missing keys unless they are left out on purpose."""
    assert isinstance(module, CrocodilModule)
    missing = incompatible_keys.missing_keys
    missing[:] = [key for key in missing if module.is_saved(key)]

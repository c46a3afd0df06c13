"""The latents of many texts at once: h_phi over a stored corpus, shard by shard, on any number of processes."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor
from torch.utils.data import DataLoader

from crocodil.data.latent_store import LatentRecord, is_whole_shard, write_shard
from crocodil.data.rows import grouped_order, windows
from crocodil.data.tokens import TokenDataset, whole_batch
from crocodil.diffusion.documents import Documents
from crocodil.models import RegisterEncoder
from crocodil.modules.base import Batch

TRIAL_BATCHES, TRIAL_SECONDS = 16, 5.0


class LatentEncoder:
    """Encodes the texts of a split as the prior's training would.

    Args:
        fabric: has been launched; tells device and precision.
        encoder: h_phi, frozen and moved in place.
        texts: one a row, see `RowFormat.alone`.
        batch_size: texts in a batch.
        num_workers: processes that read batches; 0 reads them in this one.
    """

    def __init__(
        self, fabric: Fabric, encoder: RegisterEncoder, texts: TokenDataset, batch_size: int, num_workers: int
    ) -> None:
        self.fabric, self.texts, self.batch_size, self.num_workers = fabric, texts, batch_size, num_workers
        fabric.strategy.precision.convert_module(encoder.requires_grad_(False).eval())
        fabric.to_device(encoder)
        self.encoder = encoder

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> Tensor:
        """Standardised latents (B, K, D), on the device, of a batch on the host."""
        token_ids = self.fabric.to_device(batch["token_ids"])
        documents = Documents.of(batch | {"token_ids": token_ids})
        with self.fabric.autocast():
            return documents.from_rows(self.encoder(token_ids, **documents.attention))

    def encode(self, texts: range, dtype: torch.dtype, tell: Callable[[int], None]) -> Tensor:
        """The latents of consecutive texts.

        Args:
            texts: their numbers.
            dtype: of the result.
            tell: is called with the number of texts of each batch that is done.

        Returns:
            (n, K, D) on the host, in the order of the texts.
        """
        batches = self._batches(texts)
        shape = (len(texts), self.encoder.num_registers, self.encoder.latent_dim)
        latents = torch.empty(shape, dtype=dtype, device=self.fabric.device)  # one copy to the host in the end
        for rows, batch in zip(batches, self._load(batches), strict=True):
            latents[torch.from_numpy(rows - texts.start)] = self(batch).to(dtype)
            tell(len(rows))
        return latents.cpu()

    def seconds_per_text(self, texts: range) -> float:
        """Wall-clock of one of these texts, measured on a few batches, the first of which is to warm up."""
        batches = self._batches(texts)[:TRIAL_BATCHES]
        count, start, now = 0, time.perf_counter(), 0.0
        for number, (rows, batch) in enumerate(zip(batches, self._load(batches), strict=True)):
            self(batch).cpu()  # waits for the device
            now = time.perf_counter()
            if number == 0 and len(batches) > 1:
                start = now
                continue
            count += len(rows)
            if now - start > TRIAL_SECONDS:
                break
        return (now - start) / count

    def _batches(self, texts: range) -> list[np.ndarray]:
        """Numbers of texts of similar length, batches in random order, so that time left can be told from time gone."""
        lengths = self.texts.store.lengths[texts.start : texts.stop]
        order = grouped_order(lengths, self.batch_size, np.random.default_rng(texts.start))
        return list(windows(texts.start + order, self.batch_size))

    def _load(self, batches: Sequence[np.ndarray]) -> Iterator[Batch]:
        return iter(
            DataLoader(
                self.texts,
                batch_sampler=batches,  # type: ignore[arg-type]  # arrays of numbers instead of lists
                num_workers=self.num_workers,
                collate_fn=whole_batch,  # type: ignore[arg-type]  # the dataset gives batches, not lists of rows
            )
        )


def missing_shards(folder: Path, record: LatentRecord, rank: int, size: int) -> list[int]:
    """The shards that a process has to encode: every `size`-th is its own, and whole ones are left out.

    What a process does depends on the folder alone, so the processes need not speak to each other.

    Args:
        folder: of the shards; may be absent.
        record: what the latents are.
        rank: of the process.
        size: number of all processes.
    """
    return [i for i in range(rank, record.num_shards, size) if not is_whole_shard(folder, record, i)]


def encode_shards(
    encoder: LatentEncoder, folder: Path, record: LatentRecord, shards: Sequence[int], tell: Callable[[int], None]
) -> None:
    """Encodes and writes shards, one after the other.

    Args:
        encoder: of the texts.
        folder: exists.
        record: what the latents are.
        shards: their numbers.
        tell: is called with the number of texts of each batch that is done.

    Raises:
        ValueError: if a latent is not finite.
    """
    for number in shards:
        write_shard(folder, record, number, encoder.encode(record.shard(number), record.torch_dtype, tell))

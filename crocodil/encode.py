"""`crocodil encode`: the latents of a prior's corpus, stored once, so that its training need not encode."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from jsonargparse import Namespace
from lightning.fabric import Fabric
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import distributed

from crocodil.data.block_datamodule import BlockDataModule
from crocodil.data.corpora import Split
from crocodil.data.latent_store import (
    SHARD_BYTES,
    LatentDtype,
    LatentRecord,
    refuse_others,
    row_bytes,
    shard_path,
    write_index,
)
from crocodil.data.tokens import TokenDataset
from crocodil.modules.checkpoints import StageCheckpoint
from crocodil.modules.encoding import LatentEncoder, encode_shards, missing_shards
from crocodil.output import check_writable
from crocodil.trainer_cli import CrocodilCLI, OneSentenceParser, run_trainer

PATIENCE = timedelta(days=1000)
"""How long a process that is done waits for the others."""


class EncodeCLI(CrocodilCLI):
    """Parses what `crocodil fit` parses, and builds the data alone."""

    def before_instantiate_classes(self) -> None:
        """Nothing is trained, so the folder of the training is left alone."""

    def instantiate_classes(self) -> None:
        """Builds the data module; of the other sections the values are all that counts.

        Raises:
            ValueError: if the configuration is not that of a prior.
        """
        self.settings = self.config[self.subcommand]
        if "autoencoder_checkpoint" not in self.settings.model.init_args:
            raise ValueError(f"expected the configuration of a prior, got one of {self.settings.model.class_path}")
        parser = OneSentenceParser()
        parser.add_subclass_arguments(BlockDataModule, "data")
        self.datamodule = parser.instantiate_classes(Namespace(data=self.settings.data)).data
        self.subcommand = None  # nothing of the Trainer is run

    def latent_encoder(self, split: Split) -> LatentEncoder:
        """The frozen encoder over the texts of a split, on the processes that the Trainer's options tell.

        Each process holds the whole encoder, however the training shards it.

        Args:
            split: "train", "val" or "test".

        Raises:
            ValueError: if the latents of a text depend on its batch, or the encoder was trained with another codec
                than that of the data.
        """
        data, row_format = self.datamodule, self.datamodule.row_format.alone()
        names = ("accelerator", "devices", "num_nodes", "precision")
        fabric = Fabric(**{name: self.settings.trainer[name] for name in names})
        fabric.launch()
        with fabric.rank_zero_first():
            texts = TokenDataset(data.store(split), row_format)
        checkpoint = StageCheckpoint(self.settings.model.init_args.autoencoder_checkpoint, "autoencoder")
        if checkpoint.codec_state is not None and checkpoint.codec_state != data.codec.to_state():
            raise ValueError(
                f"{checkpoint.path} was trained with other tokens than the data has; use the data section it was "
                "trained with"
            )
        return LatentEncoder(fabric, checkpoint.encoder(), texts, data.batch_size, data.num_workers)

    def record(self, encoder: LatentEncoder, split: Split, dtype: LatentDtype, shard_rows: int | None) -> LatentRecord:
        """What the latents will be; see `encode`."""
        num_registers, latent_dim = encoder.encoder.num_registers, encoder.encoder.latent_dim
        if shard_rows is None:
            shard_rows = max(1, SHARD_BYTES // row_bytes(num_registers, latent_dim, dtype))
        return LatentRecord(
            encoder=encoder.encoder.fingerprint(),
            corpus=self.datamodule.corpus_name,
            split=split,
            hides_padding=encoder.texts.row_format.hides_padding,
            num_registers=num_registers,
            latent_dim=latent_dim,
            dtype=dtype,
            rows=len(encoder.texts),
            shard_rows=shard_rows,
        )


def encode(
    config: Sequence[str],
    overrides: Sequence[str],
    output: str,
    split: Split = "train",
    dtype: LatentDtype = "float16",
    shard_rows: int | None = None,
    dry_run: bool = False,
) -> None:
    """Stores the latents of a split in a folder of its name; started again, it goes on.

    Args:
        config: YAML files of a prior, as for `crocodil fit`.
        overrides: further options of `crocodil fit`.
        output: the folder; `--data.init_args.latents` takes it.
        split: "train", "val" or "test".
        dtype: of the stored numbers: "float16", "bfloat16" or "float32".
        shard_rows: texts in a file; None for files of about 256 MB.
        dry_run: tell sizes and time, and write nothing.

    Raises:
        ValueError: if the options or the files they name are wrong, the folder holds other latents, or the disk is
            too small.
    """
    cli = run_trainer(["fit", *(f"--config={path}" for path in config), *overrides], EncodeCLI)
    assert isinstance(cli, EncodeCLI)
    encoder = cli.latent_encoder(split)
    record = cli.record(encoder, split, dtype, shard_rows)
    folder, fabric = Path(output).absolute() / split, encoder.fabric
    all_done = distributed.new_group(backend="gloo", timeout=PATIENCE) if fabric.world_size > 1 else None
    refuse_others(folder, record)
    console = Console(highlight=False, soft_wrap=True, quiet=not fabric.is_global_zero)
    console.print(told_sizes(folder, record))
    missing = missing_shards(folder, record, fabric.global_rank, fabric.world_size)
    rows = sum(len(record.shard(number)) for number in missing)
    if missing:
        console.print(told_time(rows, encoder.seconds_per_text(record.shard(missing[0])), fabric.world_size))
    if dry_run:
        return
    check_writable(folder)
    with _bar(console, rows) as tell:
        encode_shards(encoder, folder, record, missing, tell)
    if all_done is not None:
        distributed.barrier(all_done)
    if fabric.is_global_zero:
        write_index(folder, record)
        console.print(f"done: --data.init_args.latents={folder.parent}")


def told_sizes(folder: Path, record: LatentRecord) -> str:
    """What there is to write, and whether there is room for it.

    Args:
        folder: of the shards; may be absent.
        record: what the latents are.

    Raises:
        ValueError: if there is not.
    """
    absent = [record.shard(i) for i in range(record.num_shards) if not shard_path(folder, i).is_file()]
    needed = sum(map(len, absent)) * record.row_bytes
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
    shape = f"{record.num_registers} x {record.latent_dim} in {record.dtype}"
    told = (
        f"{record.split}: {record.rows} texts of {shape}, {_size(record.rows * record.row_bytes)} in "
        f"{record.num_shards} files, {len(absent)} of them to be written; {_size(needed)} needed, {_size(free)} free"
    )
    if needed > free:
        raise ValueError(f"no room in {folder}: {told}")
    return told


def told_time(rows: int, seconds_per_text: float, num_processes: int) -> str:
    """How long it will take, in words.

    Args:
        rows: texts of this process.
        seconds_per_text: as measured.
        num_processes: that encode.
    """
    total = timedelta(seconds=round(rows * seconds_per_text))
    return f"about {total} for {rows} texts on each of {num_processes} processes, {1 / seconds_per_text:.0f} a second"


@contextmanager
def _bar(console: Console, rows: int) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("encoding"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal or console.quiet) as progress:
        task = progress.add_task("encoding", total=rows)
        yield lambda count: progress.advance(task, count)


def _size(num_bytes: float) -> str:
    for power, unit in ((5, "PB"), (4, "TB"), (3, "GB"), (2, "MB")):
        if num_bytes >= 1000**power:
            return f"{num_bytes / 1000**power:.1f} {unit}"
    return f"{num_bytes / 1000:.1f} kB"

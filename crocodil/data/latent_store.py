"""Latents of a corpus on disk: written shard by shard, each whole or not there, and read by row, memory-mapped."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from crocodil.output import sync

LatentDtype = Literal["float16", "bfloat16", "float32"]
INDEX_FILE = "index.json"
SHARDS = "latents-*.safetensors"
HEADER_KEY = "crocodil"
SHARD_BYTES = 2**28
FORMAT = 1


@dataclass(frozen=True)
class LatentRecord:
    """What stored latents are, and of what.

    Args:
        encoder: `RegisterEncoder.fingerprint` of the encoder that made them.
        corpus: name of the prepared corpus, see `BlockDataModule.corpus_name`.
        split: "train", "val" or "test".
        hides_padding: whether the encoder did not see the tail of a row.
        num_registers: K.
        latent_dim: D.
        dtype: of the stored numbers.
        rows: N, texts of the split.
        shard_rows: of each shard but the last.

    Raises:
        ValueError: if there is no text, a shard would hold none, or the dtype is unknown.
    """

    encoder: str
    corpus: str
    split: str
    hides_padding: bool
    num_registers: int
    latent_dim: int
    dtype: LatentDtype
    rows: int
    shard_rows: int

    def __post_init__(self) -> None:
        if self.dtype not in get_args(LatentDtype):
            raise ValueError(f"dtype must be one of {', '.join(get_args(LatentDtype))}, got {self.dtype!r}.")
        for name in ("rows", "shard_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)} in the {self.split} split.")

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the stored numbers."""
        return getattr(torch, self.dtype)

    @property
    def row_bytes(self) -> int:
        """Bytes of the latents of a text."""
        return row_bytes(self.num_registers, self.latent_dim, self.dtype)

    @property
    def num_shards(self) -> int:
        """Files there are in the end."""
        return -(-self.rows // self.shard_rows)

    def shard(self, number: int) -> range:
        """The texts whose latents are in a shard."""
        return range(number * self.shard_rows, min(self.rows, (number + 1) * self.shard_rows))

    def differences(self, **expected: Any) -> str:
        """The named entries that are not as expected, in words; empty if all are."""
        found = {name: (getattr(self, name), value) for name, value in expected.items()}
        return ", ".join(f"{name} {old!r} (now {new!r})" for name, (old, new) in found.items() if old != new)


def row_bytes(num_registers: int, latent_dim: int, dtype: LatentDtype) -> int:
    """Bytes of the latents (K, D) of a text."""
    return num_registers * latent_dim * getattr(torch, dtype).itemsize


def shard_path(folder: Path, number: int) -> Path:
    """Where a shard lies."""
    return folder / f"latents-{number:06d}.safetensors"


def write_shard(folder: Path, record: LatentRecord, number: int, latents: Tensor) -> None:
    """Writes a shard aside, waits until it is on the disk, and puts it in place.

    Its header holds the record and the SHA-256 sum of the numbers, so that a shard tells by itself what it is.

    Args:
        folder: exists.
        record: what the latents are.
        number: of the shard.
        latents: (n, K, D) of the record's dtype, on the host, of the texts `record.shard(number)`.

    Raises:
        ValueError: if a number is not finite.
    """
    texts = record.shard(number)
    assert (
        latents.shape == (len(texts), record.num_registers, record.latent_dim) and latents.dtype == record.torch_dtype
    )
    is_bad = ~torch.isfinite(latents).flatten(1).all(1)
    if is_bad.any():
        raise ValueError(
            f"latents must be finite in {record.dtype}, but that of text {texts[int(is_bad.int().argmax())]} of the "
            f"{record.split} split is not: try --dtype float32, or look for what is wrong with the encoder"
        )
    header = {"record": asdict(record), "sha256": _digest(latents)}
    content = save({"latents": latents}, {HEADER_KEY: json.dumps(header)})  # one entry: the order of several is random
    _write_whole(shard_path(folder, number), content)


def is_whole_shard(folder: Path, record: LatentRecord, number: int) -> bool:
    """Whether a shard is there and holds what was written; reads all of it once.

    Args:
        folder: of the shards.
        record: what the latents must be.
        number: of the shard.
    """
    path = shard_path(folder, number)
    header = _header(path)
    if header is None or header["record"] != asdict(record):
        return False
    return _digest(_mapped(path)) == header["sha256"]


def refuse_others(folder: Path, record: LatentRecord) -> None:
    """Refuses a folder that holds other latents.

    Args:
        folder: of the shards; may be absent.
        record: what the latents must be.

    Raises:
        ValueError: if one of its shards has another record; it tells what differs.
    """
    for path in sorted(folder.glob(SHARDS)):
        header = _header(path)
        if header is None:  # damaged: it will be written anew
            continue
        differing = LatentRecord(**header["record"]).differences(**asdict(record))
        if differing:
            raise ValueError(f"{folder} holds other latents: {differing}; give another --output, or remove the folder")


def write_index(folder: Path, record: LatentRecord) -> None:
    """Writes the index of a folder whose shards are all there, and removes what killed processes left.

    Args:
        folder: of the shards.
        record: what the latents are.
    """
    shards = []
    for number in range(record.num_shards):
        path, texts = shard_path(folder, number), record.shard(number)
        header = _header(path)
        assert header is not None, f"{path} was whole a moment ago"
        place = {"file": path.name, "first_row": texts.start, "rows": len(texts)}
        shards.append(place | {"bytes": path.stat().st_size, "sha256": header["sha256"]})
    content = {"format": FORMAT, "record": asdict(record), "shards": shards}
    _write_whole(folder / INDEX_FILE, (json.dumps(content, indent=1) + "\n").encode())
    for left in folder.glob("*.part"):
        left.unlink(missing_ok=True)


class LatentStore:
    """The latents of one split, by row; nothing is read before it is asked for.

    Args:
        folder: of one split, written by `crocodil encode`.

    Attributes:
        record: what the latents are.

    Raises:
        ValueError: if the folder is not complete, or a file has another size than it was written with.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / INDEX_FILE
        if not path.is_file():
            raise ValueError(f"{self.folder} holds no complete latents: start `crocodil encode` (again), which goes on")
        index = json.loads(path.read_text())
        if index["format"] != FORMAT:
            raise ValueError(f"{path} must be of format {FORMAT}, got {index['format']}: encode the corpus anew")
        self.record = LatentRecord(**index["record"])
        for shard in index["shards"]:
            file = self.folder / shard["file"]
            if not file.is_file() or file.stat().st_size != shard["bytes"]:
                raise ValueError(f"{file} is absent or damaged: start the same `crocodil encode` again, which mends it")
        self._shards: dict[int, Tensor] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return LatentStore, (self.folder,)  # another process maps the files itself

    def __len__(self) -> int:
        return self.record.rows

    def __getitem__(self, rows: np.ndarray) -> Tensor:
        """Latents of any texts.

        Args:
            rows: (B,) integers in [0, N), in any order.

        Returns:
            (B, K, D) float32.
        """
        latents = torch.empty(len(rows), self.record.num_registers, self.record.latent_dim)
        for places, shard, inside in self._by_shard(rows):
            latents[places] = self._shard(shard)[inside].float()
        return latents

    def _by_shard(self, rows: np.ndarray) -> Iterator[tuple[Tensor, int, Tensor]]:
        """For each shard that is needed: places in the answer, number of the shard, and rows in it."""
        shard, inside = np.divmod(rows, self.record.shard_rows)
        for number in np.unique(shard).tolist():
            places = np.flatnonzero(shard == number)
            yield torch.from_numpy(places), number, torch.from_numpy(inside[places])

    def _shard(self, number: int) -> Tensor:
        if number not in self._shards:
            self._shards[number] = _mapped(shard_path(self.folder, number))
        return self._shards[number]


def _mapped(path: Path) -> Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("latents")  # a view of the mapped file


def _header(path: Path) -> dict[str, Any] | None:
    """What a shard tells of itself; None if the file is absent or not whole."""
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads(file.metadata()[HEADER_KEY])
    except (OSError, SafetensorError):
        return None


def _digest(latents: Tensor) -> str:
    return hashlib.sha256(latents.contiguous().view(torch.uint8).numpy().data).hexdigest()


def _write_whole(path: Path, content: bytes) -> None:
    """Writes a file that has its name only when it is whole and on the disk."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}-", suffix=".part", delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o644)
            os.replace(file.name, path)  # of two processes that write the same shard, the last one stays
        except OSError:
            os.unlink(file.name)
            raise
    sync(path.parent)

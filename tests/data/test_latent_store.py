import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from crocodil.data.latent_store import (
    INDEX_FILE,
    LatentRecord,
    LatentStore,
    is_whole_shard,
    refuse_others,
    shard_path,
    write_index,
    write_shard,
)

RECORD = LatentRecord("abc", "Corpus-1", "train", True, 2, 3, "float32", rows=23, shard_rows=5)


def latents_of(record: LatentRecord) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(record.rows, 2, 3, generator=generator).to(record.torch_dtype)


def write(folder: Path, record: LatentRecord = RECORD) -> torch.Tensor:
    latents = latents_of(record)
    for number in range(record.num_shards):
        write_shard(folder, record, number, latents[list(record.shard(number))])
    write_index(folder, record)
    return latents


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_rows_of_any_shards_come_in_the_order_asked_for(dtype: str, tmp_path: Path) -> None:
    latents = write(tmp_path, replace(RECORD, dtype=dtype))
    store = LatentStore(tmp_path)
    rows = np.array([22, 0, 7, 7, 4, 5, 19, 1])
    assert len(store) == 23 and store[rows].dtype == torch.float32
    assert torch.equal(store[rows], latents[torch.from_numpy(rows)].float())
    assert torch.equal(store[np.arange(23)], latents.float())


def test_a_copy_for_another_process_maps_the_files_itself(tmp_path: Path) -> None:
    write(tmp_path)
    store = LatentStore(tmp_path)
    store[np.arange(23)]
    pickled = pickle.dumps(store)
    assert len(pickled) < 500
    assert torch.equal(pickle.loads(pickled)[np.array([3, 20])], store[np.array([3, 20])])


def test_files_are_safetensors_that_anyone_can_read(tmp_path: Path) -> None:
    latents = write(tmp_path)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert [shard["first_row"] for shard in index["shards"]] == [0, 5, 10, 15, 20]
    assert sum(shard["rows"] for shard in index["shards"]) == 23
    found = torch.cat([load_file(tmp_path / shard["file"])["latents"] for shard in index["shards"]])
    assert torch.equal(found, latents)
    assert sorted(path.name for path in tmp_path.iterdir()) == [INDEX_FILE] + [s["file"] for s in index["shards"]]


def test_without_an_index_there_is_nothing_to_train_from(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / INDEX_FILE).unlink()
    with pytest.raises(ValueError, match="holds no complete latents: start `crocodil encode`"):
        LatentStore(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_shard_that_is_cut_or_gone_is_found_before_training(damage: str, tmp_path: Path) -> None:
    write(tmp_path)
    path = shard_path(tmp_path, 2)
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"latents-000002\.safetensors is absent or damaged"):
        LatentStore(tmp_path)
    assert [is_whole_shard(tmp_path, RECORD, number) for number in range(5)] == [True, True, False, True, True]


def test_one_wrong_bit_or_another_record_is_no_whole_shard(tmp_path: Path) -> None:
    write(tmp_path)
    path = shard_path(tmp_path, 1)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert not is_whole_shard(tmp_path, RECORD, 1)
    assert is_whole_shard(tmp_path, RECORD, 0)
    assert not is_whole_shard(tmp_path, replace(RECORD, encoder="xyz"), 0)


def test_a_shard_that_cannot_be_written_is_not_there(tmp_path: Path) -> None:
    shard_path(tmp_path, 0).mkdir()  # nothing can take its place
    with pytest.raises(OSError):
        write_shard(tmp_path, RECORD, 0, latents_of(RECORD)[:5])
    assert [path.name for path in tmp_path.iterdir()] == ["latents-000000.safetensors"]


def test_what_killed_processes_left_goes_with_the_index(tmp_path: Path) -> None:
    (tmp_path / "latents-000003.safetensors-abc.part").write_bytes(b"half")
    write(tmp_path)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"encoder": "xyz"}, r"encoder 'abc' \(now 'xyz'\); give another --output"),
        ({"corpus": "Corpus-2", "rows": 24}, r"corpus 'Corpus-1' \(now 'Corpus-2'\), rows 23 \(now 24\)"),
        ({"dtype": "float16"}, r"dtype 'float32' \(now 'float16'\)"),
        ({"shard_rows": 6}, r"shard_rows 5 \(now 6\)"),
        ({"hides_padding": False}, r"hides_padding True \(now False\)"),
    ],
)
def test_other_latents_in_the_folder_are_refused(change: dict, told: str, tmp_path: Path) -> None:
    refuse_others(tmp_path / "absent", RECORD)
    write_shard(tmp_path, RECORD, 4, latents_of(RECORD)[20:])
    refuse_others(tmp_path, RECORD)
    with pytest.raises(ValueError, match=f"holds other latents: {told}"):
        refuse_others(tmp_path, replace(RECORD, **change))


def test_a_latent_that_is_not_finite_is_named(tmp_path: Path) -> None:
    latents = latents_of(RECORD)
    latents[13, 1, 2] = torch.nan
    with pytest.raises(ValueError, match="that of text 13 of the train split is not"):
        write_shard(tmp_path, RECORD, 2, latents[10:15])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "told"), [({"rows": 0}, "rows must be"), ({"shard_rows": 0}, "shard_rows"), ({"dtype": "int8"}, "dtype")]
)
def test_numbers_out_of_range_are_value_errors(change: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        replace(RECORD, **change)

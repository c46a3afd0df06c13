import logging
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from crocodil.data.block_datamodule import BlockDataModule
from crocodil.data.cache import cached_folder, default_cache_dir
from crocodil.data.canonical_functions import CanonicalFunctions
from crocodil.data.codec import byte_level_bpe
from crocodil.data.corpora import Split, folder_files, split_of, standard_library_files
from crocodil.data.text_corpus import TextCorpus

EOS, BOS = 0, 1
SPLITS: tuple[Split, ...] = ("train", "val", "test")
FUNCTION = "def g(a, b):\n    c = a + b\n    return c * a - b\n"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for file in [file for file in standard_library_files() if 2000 < file.path.stat().st_size < 8000][:120]:
        (folder / file.name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file.path, folder / file.name)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(params=["functions", "text"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def make(kind: str, folder: Path, cache_dir: Path, seed: int = 0, length: int = 64) -> BlockDataModule:
    if kind == "functions":
        return CanonicalFunctions(length, 16, folder=str(folder), cache_dir=str(cache_dir), seed=seed)
    return TextCorpus(length, 16, str(folder), vocab_size=400, split_by="name", cache_dir=str(cache_dir), seed=seed)


def rows(datamodule: BlockDataModule, split: Split) -> list[tuple[int, ...]]:
    return [tuple(row) for row in datamodule.blocks(split).tolist()]


def batches(loader: torch.utils.data.DataLoader) -> torch.Tensor:
    return torch.cat([batch["token_ids"] for batch in loader])


def test_no_function_occurs_twice_within_or_between_splits(corpus: Path, cache: Path) -> None:
    datamodule = make("functions", corpus, cache)
    found = [row for split in SPLITS for row in rows(datamodule, split)]
    assert len(found) > 300
    assert len(found) == len(set(found))


def test_a_function_is_bos_its_tokens_and_eos(corpus: Path, cache: Path) -> None:
    datamodule = make("functions", corpus, cache)
    lengths = [row.index(EOS) - 1 for row in rows(datamodule, "train")]
    assert (min(lengths), max(lengths)) == (14, 62)
    for row in rows(datamodule, "train"):
        end = row.index(EOS)
        assert row[0] == BOS and BOS not in row[1:]
        assert row[end:] == (EOS,) * (64 - end)
        text = datamodule.codec.decode(row)
        assert text.startswith(("def f(", "async def f("))
        assert tuple(datamodule.codec.encode(text)) == row[1:end]


def test_blocks_of_text_join_to_the_files(corpus: Path, cache: Path) -> None:
    datamodule = make("text", corpus, cache)
    joined: list[list[int]] = []
    for row in rows(datamodule, "test"):
        if row[0] == BOS:
            joined.append([])
        joined[-1] += row
    for token_ids in joined:
        assert BOS not in token_ids[1:]
        assert EOS not in token_ids or set(token_ids[token_ids.index(EOS) :]) == {EOS}
    files = [file for file in folder_files(corpus) if split_of(file.name) == "test"]
    assert [datamodule.codec.decode(ids).encode() for ids in joined] == [file.path.read_bytes() for file in files]


def test_a_file_that_fills_its_block_leaves_no_block_of_eos(tmp_path: Path) -> None:
    names = [f"module_{number}.py" for number in range(60)]
    for name in names:
        (tmp_path / name).write_text(f"{names.index(name):02d}" + "é" * 4)
    datamodule = TextCorpus(11, 1, str(tmp_path), vocab_size=260, cache_dir=str(tmp_path / "cache"))
    assert sum(len(datamodule.blocks(split)) for split in SPLITS) == len(names)


def test_vocabulary_is_known_before_and_right_after(kind: str, corpus: Path, cache: Path, tmp_path: Path) -> None:
    before = make(kind, tmp_path / "absent", tmp_path / "cache").vocabulary
    assert not (tmp_path / "cache").exists()
    datamodule = make(kind, corpus, cache)
    assert before == datamodule.vocabulary == datamodule.codec.vocabulary
    assert int(datamodule.blocks("train").max()) < before.size


def test_loaders_give_int64_batches_in_order(kind: str, corpus: Path, cache: Path) -> None:
    datamodule = make(kind, corpus, cache)
    for loader, split in [
        (datamodule.val_dataloader(), "val"),
        (datamodule.test_dataloader(), "test"),
        (datamodule.predict_dataloader(), "test"),
    ]:
        blocks = datamodule.blocks(split)
        assert blocks.dtype == torch.int64
        assert len(blocks) % 16 != 0  # so that the last partial batch counts
        assert torch.equal(batches(loader), blocks)
        batch = next(iter(loader))
        assert list(batch) == ["token_ids", "origins"]
        assert batch["token_ids"].dtype == torch.int64 and batch["token_ids"].shape[1] == datamodule.length


def test_training_order_is_a_function_of_seed_and_epoch(kind: str, corpus: Path, cache: Path) -> None:
    def order(seed: int, epoch: int) -> torch.Tensor:
        loader = make(kind, corpus, cache, seed=seed).train_dataloader()
        loader.sampler.set_epoch(epoch)
        return batches(loader)

    first = order(0, 0)
    torch.manual_seed(1)  # no global state enters
    assert torch.equal(first, order(0, 0))
    for seed, epoch in [(0, 1), (1, 0)]:
        assert not torch.equal(first, order(seed, epoch))
    assert not torch.equal(order(0, 1), order(1, 0))


def test_training_loader_drops_the_partial_batch_and_repeats_nothing(kind: str, corpus: Path, cache: Path) -> None:
    datamodule = make(kind, corpus, cache)
    seen = batches(datamodule.train_dataloader())
    known = rows(datamodule, "train")
    assert len(known) % 16 != 0
    assert len(seen) == len(known) // 16 * 16
    assert Counter(tuple(row) for row in seen.tolist()) <= Counter(known)


class Recorder(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.first: list[torch.Tensor] = []

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        if index == 0:
            self.first.append(batch["token_ids"])
        return self.weight * batch["token_ids"].float().mean()

    def validation_step(self, batch: dict[str, torch.Tensor], index: int) -> None:
        assert batch["token_ids"].shape[1] == 64

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_the_trainer_sees_another_order_every_epoch(corpus: Path, cache: Path, tmp_path: Path) -> None:
    module = Recorder()
    trainer = Trainer(
        max_epochs=2,
        limit_train_batches=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    datamodule = make("functions", corpus, cache)
    trainer.fit(module, datamodule=datamodule)
    expected = datamodule.train_dataloader()
    for epoch in range(2):
        expected.sampler.set_epoch(epoch)
        assert torch.equal(module.first[epoch], next(iter(expected))["token_ids"])


def test_two_builds_are_byte_equal(kind: str, corpus: Path, cache: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(corpus, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    first = make(kind, corpus, cache)._prepared_folder()
    second = make(kind, copy, tmp_path / "cache")._prepared_folder()
    names = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len(names) == (14 if kind == "functions" else 17)
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_another_training_file_changes_no_held_out_function(corpus: Path, cache: Path, tmp_path: Path) -> None:
    grown = shutil.copytree(corpus, tmp_path / "grown")
    names = [f"new_{number}.py" for number in range(50)]
    (grown / next(name for name in names if split_of(name) == "train")).write_text(FUNCTION)
    before, after = make("functions", corpus, cache), make("functions", grown, tmp_path / "cache")
    assert rows(before, "val") == rows(after, "val") and rows(before, "test") == rows(after, "test")
    assert len(rows(after, "train")) == len(rows(before, "train")) + 1


def test_cache_is_used_again_until_a_file_or_a_setting_changes(kind: str, corpus: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(corpus, tmp_path / "corpus")
    cache_dir = tmp_path / "cache"
    first = make(kind, copy, cache_dir)._prepared_folder()
    written = {path: path.stat().st_mtime_ns for path in cache_dir.rglob("*")}
    assert make(kind, copy, cache_dir, seed=5)._prepared_folder() == first
    assert {path: path.stat().st_mtime_ns for path in cache_dir.rglob("*")} == written
    assert make(kind, copy, cache_dir, length=32)._prepared_folder() != first
    next(copy.rglob("*.py")).write_text(FUNCTION)
    assert make(kind, copy, cache_dir)._prepared_folder() != first
    assert len(list(cache_dir.iterdir())) == 3  # nothing half-written is left


def test_bpe_learns_from_the_training_split_alone(tmp_path: Path) -> None:
    names = [f"module_{number}.py" for number in range(100)]
    for name in names:
        word = {"train": "zqzqzq", "val": "jxjxjx", "test": "vkvkvk"}[split_of(name)]
        (tmp_path / name).write_text(f"{word} {names.index(name)}\n" * 20)
    settings = {"vocab_size": 270, "split_by": "name", "cache_dir": str(tmp_path / "cache")}
    codec = TextCorpus(sources=str(tmp_path), **settings).codec
    assert [len(codec.encode(word)) for word in ("zqzqzq", "jxjxjx", "vkvkvk")] == [1, 6, 6]
    assert len(byte_level_bpe(["jxjxjx\n" * 20], 265).encode("jxjxjx")) < 6  # had it been seen, it would be merged


def test_max_functions_keeps_a_spread_of_every_split(corpus: Path, cache: Path) -> None:
    everything = make("functions", corpus, cache)
    few = CanonicalFunctions(batch_size=16, folder=str(corpus), max_functions=100, cache_dir=str(cache))
    sizes = {split: len(few.blocks(split)) for split in SPLITS}
    assert abs(sum(sizes.values()) - 100) <= 2
    for split in SPLITS:
        all_rows = rows(everything, split)
        places = [all_rows.index(row) for row in rows(few, split)]
        assert places == sorted(places) and places[-1] > 0.7 * len(all_rows)


@pytest.mark.parametrize("min_tokens", [1, 30])
def test_min_tokens_is_the_least_length(min_tokens: int, corpus: Path, cache: Path) -> None:
    datamodule = CanonicalFunctions(batch_size=8, folder=str(corpus), min_tokens=min_tokens, cache_dir=str(cache))
    shortest = min(row.index(EOS) - 1 for row in rows(datamodule, "train"))
    assert min_tokens <= shortest <= max(10, min_tokens)


def test_summary_is_logged_once(kind: str, corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    copy = shutil.copytree(corpus, tmp_path / "corpus")
    (copy / "latin.py").write_bytes(b"\xe9")
    with caplog.at_level(logging.INFO):
        make(kind, copy, tmp_path / "cache").prepare_data()
        make(kind, copy, tmp_path / "cache").prepare_data()
    (line,) = [record.getMessage() for record in caplog.records if "not utf8" in record.getMessage()]
    counts = make(kind, copy, tmp_path / "cache")
    assert "files 121, " in line and ("skipped files" if kind == "functions" else "left out") + " 1 not utf8." in line
    for split in SPLITS:
        assert f"{split} {len(counts.blocks(split))}, " in line


@pytest.mark.parametrize(("num_files", "split"), [(1, "val"), (60, "train")])
def test_too_small_a_corpus_says_what_was_found(num_files: int, split: str, tmp_path: Path) -> None:
    names = [f"module_{number}.py" for number in range(100)]
    for number, name in enumerate([name for name in names if split_of(name) == "train"][:num_files]):
        (tmp_path / name).write_text(f"def g(a, b):\n    return a * (b - {'-' * number}a)\n")
    datamodule = CanonicalFunctions(
        batch_size=1 if split == "val" else 64, folder=str(tmp_path), cache_dir=str(tmp_path / "cache")
    )
    with pytest.raises(ValueError, match=rf"the {split} split must hold at least .*files {num_files}, .*more files"):
        datamodule.setup("fit")


def test_test_stage_needs_the_test_split_alone(tmp_path: Path) -> None:
    name = next(name for name in (f"module_{number}.py" for number in range(100)) if split_of(name) == "test")
    (tmp_path / name).write_text(FUNCTION)
    datamodule = CanonicalFunctions(folder=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    datamodule.setup("test")
    assert len(batches(datamodule.test_dataloader())) == 1
    with pytest.raises(ValueError, match="the train split"):
        datamodule.setup("fit")


def test_too_large_a_vocabulary_says_what_was_found(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(FUNCTION)
    with pytest.raises(ValueError, match="enough text for vocab_size 2048, got 1 documents"):
        TextCorpus(
            sources=str(tmp_path), val_percent=0, test_percent=0, cache_dir=str(tmp_path / "cache")
        ).prepare_data()
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("name", ["length", "batch_size", "num_workers", "seed", "min_tokens", "max_functions"])
def test_numbers_out_of_range_are_value_errors(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least .*, got -1"):
        CanonicalFunctions(**{name: -1})
    with pytest.raises(ValueError, match="vocab_size must be at least 260, got 259"):
        TextCorpus(vocab_size=259)


def test_unwritable_cache_is_one_clear_error(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cache_dir must be a writable folder, got .*file/cache"):
        make("functions", corpus, tmp_path / "file" / "cache").prepare_data()


def test_default_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "crocodil"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "crocodil"


def test_of_two_builders_the_first_to_finish_wins(tmp_path: Path) -> None:
    def build(folder: Path, parts: Path) -> None:
        cached_folder(tmp_path, "name", lambda other, _: np.save(other / "a.npy", np.array(1)))
        np.save(folder / "a.npy", np.array(2))

    assert np.load(cached_folder(tmp_path, "name", build) / "a.npy") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["name"]


def test_what_killed_builds_left_goes_with_the_next_whole_one(tmp_path: Path) -> None:
    for name in (".name-killed", ".name.parts", ".name2-another"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("")
    cached_folder(tmp_path, "name", lambda folder, parts: np.save(folder / "a.npy", np.array(1)))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".name2-another", "name"]


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def build(folder: Path, parts: Path) -> None:
        (folder / "half").write_text("")
        raise KeyError

    with pytest.raises(KeyError):
        cached_folder(tmp_path, "name", build)
    assert list(tmp_path.iterdir()) == []

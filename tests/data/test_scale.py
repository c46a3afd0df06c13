"""Two hundred thousand documents of mixed formats: each comes once in a pass, and memory stays flat."""

import gzip
import io
import json
import multiprocessing
import os
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch import distributed

from crocodil.data import text_corpus
from crocodil.data.build import text_hash
from crocodil.data.corpora import split_of, standard_library_files
from crocodil.data.sources import Corpus
from crocodil.data.text_corpus import TextCorpus
from crocodil.data.tokens import TokenStore

pytestmark = pytest.mark.slow
NUM_GENERATED, LENGTH, BATCH = 200_000, 96, 64
MAX_GROWTH_MIB = 200


def generated() -> Iterator[str]:
    """Texts of about 150 characters, all different."""
    words = [
        f"{syllable}{end}" for syllable in ("re", "con", "in", "de", "pro") for end in ("turn", "sume", "vert", "fer")
    ]
    picked = np.random.default_rng(0).integers(0, len(words), (NUM_GENERATED, 20))
    sizes = np.random.default_rng(1).integers(5, 21, NUM_GENERATED)
    for number, (row, size) in enumerate(zip(picked.tolist(), sizes.tolist(), strict=True)):
        yield f"{number} " + " ".join(words[word] for word in row[:size])


def write_corpus(root: Path) -> list[str]:
    """Writes the corpus; the generated texts of it."""
    texts = list(generated())
    rest = iter(texts)
    for number in range(2):
        table = pa.table({"text": list(islice(rest, 40_000))})
        pq.write_table(table, root / f"table-{number}.parquet", row_group_size=5000)
    for number in range(3):
        lines = (json.dumps({"text": text}) + "\n" for text in islice(rest, 20_000))
        (root / f"lines-{number}.jsonl").write_text("".join(lines))
    for number in range(3):
        lines = (json.dumps({"text": text}) + "\n" for text in islice(rest, 10_000))
        (root / f"lines-{number}.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode(), 1))
    for number in range(2):
        with tarfile.open(root / f"archive-{number}.tar.gz", "w:gz", compresslevel=1) as archive:
            for place, text in enumerate(islice(rest, 12_500)):
                member = tarfile.TarInfo(f"{place // 1000}/{place}.txt")
                member.size = len(text)
                archive.addfile(member, io.BytesIO(text.encode()))
    for place, text in enumerate(rest):
        (root / "files" / str(place // 500)).mkdir(parents=True, exist_ok=True)
        (root / "files" / str(place // 500) / f"{place}.py").write_text(text)
    for copy in ("first", "second"):
        for file in standard_library_files():
            if file.path.stat().st_size < 20_000:
                (root / copy / file.name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file.path, root / copy / file.name)
    return texts


def fit_texts(root: Path) -> list[str]:
    """Texts of the copies of the standard library, read without crocodil."""
    found = []
    for path in sorted(root.glob("*/**/*.py")):
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError:
            continue
        if text.strip() and "\0" not in text:
            found.append(text)
    return found


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    root = tmp_path_factory.mktemp("scale")
    begun = time.monotonic()
    texts = write_corpus(root)
    assert time.monotonic() - begun < 60
    return root, texts


@pytest.fixture
def module(
    corpus: tuple[Path, list[str]], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., TextCorpus]:
    monkeypatch.setattr(text_corpus, "BPE_DOCUMENTS", 5000)
    cache = tmp_path_factory.getbasetemp() / "scale-cache"
    return partial(TextCorpus, LENGTH, BATCH, str(corpus[0]), vocab_size=600, hide_padding=True, cache_dir=str(cache))


def peaks_mib() -> dict[int, float]:
    """The most memory that this process and each of its workers have held so far."""
    found = {}
    for pid in (os.getpid(), *(child.pid for child in multiprocessing.active_children() if child.pid)):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        found[pid] = next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
    return found


def process(rank: int, root: Path, make: Callable[[], TextCorpus]) -> None:
    """One of two processes of a run: what it read, and how its memory grew after the first tenth."""
    distributed.init_process_group("gloo", init_method=f"file://{root}/store", rank=rank, world_size=2)
    data = make()
    origins, hashes, peaks = [], [], []
    decode = data.codec.tokenizer.backend_tokenizer.decode_batch
    for number, batch in enumerate(data.stream(None, passes=1)):
        ids, inside = batch["token_ids"], batch["document_ids"] > 0
        begins = ids[:, 0] == data.vocabulary.bos_token_id
        is_whole = begins & ((ids == data.vocabulary.eos_token_id) & inside).any(dim=1)
        sizes = inside.sum(dim=1)[is_whole].tolist()
        texts = [row[1 : size - 1] for row, size in zip(ids[is_whole].tolist(), sizes, strict=True)]
        hashes += map(text_hash, decode(texts, skip_special_tokens=False))
        origins.append(batch["origins"][begins].numpy())
        if number % 50 == 0:
            peaks.append({**(peaks[-1] if peaks else {}), **peaks_mib()})
    early, late = peaks[len(peaks) // 10], peaks[-1]
    assert len(early) == len(late) == 3
    growth = sum(late.values()) - sum(early.values())
    np.savez(root / f"rank-{rank}.npz", origins=np.concatenate(origins), hashes=hashes, growth=growth)
    distributed.barrier()
    distributed.destroy_process_group()


def test_two_processes_with_two_workers_each_read_every_document_once_with_flat_memory(
    corpus: tuple[Path, list[str]], module: Callable[..., TextCorpus], tmp_path: Path
) -> None:
    root, texts = corpus
    make = partial(module, streaming=True, num_workers=2, held_out_documents=200)
    make().prepare_data()
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=process, args=(rank, tmp_path, make)) for rank in range(2)]
    begun = time.monotonic()
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    seconds = time.monotonic() - begun
    results = [np.load(tmp_path / f"rank-{rank}.npz") for rank in range(2)]
    origins = np.concatenate([result["origins"] for result in results])
    hashes = np.concatenate([result["hashes"] for result in results])
    training = [text for text in texts if split_of(text, 5, 5) == "train"]
    library = [text for text in fit_texts(root) if split_of(text, 5, 5) == "train" and not text[0].isdigit()]
    assert len(origins) == len(np.unique(origins, axis=0)) == len(training) + len(library)
    expected = np.array([text_hash(text) for text in training])
    assert np.array_equal(np.sort(hashes[np.isin(hashes, expected)]), np.sort(expected))
    growth = [float(result["growth"]) for result in results]
    print(f"{len(origins)} documents, {len(origins) / seconds:.0f} a second, growth {growth} MiB")
    assert sum(growth) < MAX_GROWTH_MIB


def test_the_mapped_corpus_is_built_once(
    corpus: tuple[Path, list[str]], module: Callable[..., TextCorpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, texts = corpus
    begun = time.monotonic()
    folder = module()._prepared_folder()
    first = time.monotonic() - begun
    library = [text for text in fit_texts(root) if not text[0].isdigit()]
    counts = json.loads((folder / "summary.json").read_text())
    assert counts["documents"] == len(texts) + len(library)
    distinct = set(texts) | set(library)
    assert counts["duplicates"] == counts["documents"] - len(distinct) > 300
    stores = {split: TokenStore(folder, split) for split in ("train", "val", "test")}
    for split, store in stores.items():
        assert len(np.unique(store.origins, axis=0)) == sum(split_of(text, 5, 5) == split for text in distinct)

    def refuse(*_: object) -> None:
        raise AssertionError("the corpus is read again")

    monkeypatch.setattr(Corpus, "documents", refuse)
    begun = time.monotonic()
    data = module()
    data.prepare_data()
    assert len(next(iter(data.train_dataloader()))["token_ids"]) == BATCH
    second = time.monotonic() - begun
    print(f"built in {first:.1f} s, opened again in {second:.1f} s")
    assert second < first / 5

import hashlib
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from crocodil.modules.checkpoint_io import WholeCheckpointIO
from crocodil.modules.integrity import SUMS_FILE, is_whole, part_of, previous_of, put_in_place
from crocodil.modules.sharded_checkpoint import load_sharded, read_folder, save_sharded

RNG = random.Random(0)


def content(seed: int = 0) -> dict[str, Any]:
    """Tensors of several dtypes and sizes, shared storage, and plain values."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(16, 24, generator=generator)
    return {
        "state_dict": {"a": weights, "row": weights[1], "half": weights.bfloat16(), "ids": torch.arange(7) + seed},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.rand(50, generator=generator)}}}],
        "global_step": 5 + seed,
        "crocodil": {"stage": "demasker", "settings": {"model.init_args.seed": seed, "é": None}},
    }


def same(one: Any, two: Any) -> bool:
    """Equal bit for bit, types included."""
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return isinstance(two, dict) and one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list):
        return isinstance(two, list) and len(one) == len(two) and all(map(same, one, two))
    return type(one) is type(two) and one == two


def flipped(whole: bytes, start: int, stop: int) -> bytes:
    damage = bytes(byte ^ RNG.randrange(1, 256) for byte in whole[start:stop])
    return whole[:start] + damage + whole[stop:]


def damages(whole: bytes, count: int, every: int) -> Iterator[bytes]:
    """Every `every`-th byte flipped; and flipped, zeroed, repeated, cut out and cut off ranges at random."""
    for start in range(RNG.randrange(every), len(whole), every):
        yield flipped(whole, start, start + 1)
    for _ in range(count):
        start = RNG.randrange(len(whole))
        stop = min(len(whole), start + RNG.choice([2, 3, 16, 100, 512, 4096]))
        yield flipped(whole, start, stop)
        yield whole[:start] + bytes(stop - start) + whole[stop:]
        yield whole[:start] + whole[start:stop][::-1] + whole[stop:]
        yield whole[:start] + whole[stop:]
        yield whole[:start]
        yield whole[:start] + bytes(RNG.randrange(1, 9)) + whole[start:]
    yield whole + bytes(100)
    yield whole + whole


# files


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints" / "last.ckpt"


def test_what_is_saved_comes_back_and_nothing_else_is_left(path: Path) -> None:
    WholeCheckpointIO().save_checkpoint(content(), path)
    assert same(WholeCheckpointIO().load_checkpoint(path), content())
    assert same(torch.load(path, weights_only=True), content())
    assert os.listdir(path.parent) == ["last.ckpt"]


def test_the_one_before_is_kept_and_the_one_before_that_is_not(path: Path) -> None:
    for seed in range(4):
        WholeCheckpointIO().save_checkpoint(content(seed), path)
    assert sorted(os.listdir(path.parent)) == ["last.ckpt", "previous.ckpt"]
    assert same(torch.load(path, weights_only=True), content(3))
    assert same(torch.load(previous_of(path), weights_only=True), content(2))


def load_file(path: Path) -> Any:
    return WholeCheckpointIO().load_checkpoint(path)


def refused(path: Path, load: Callable[[Path], Any] = load_file) -> str | None:
    """The sentence, or None where the content came back bit for bit."""
    try:
        loaded = load(path)
    except ValueError as error:
        return str(error)
    assert same(loaded, content()), "damaged content was taken for whole"
    return None


def test_no_damage_goes_unnoticed(path: Path) -> None:
    """Each damaged file is refused in one sentence, or what it holds comes back bit for bit."""
    WholeCheckpointIO().save_checkpoint(content(), path)
    whole, sentences = path.read_bytes(), []
    for damaged in damages(whole, 40, every=5):
        path.write_bytes(damaged)
        sentences.append(refused(path))
    assert set(sentences) == {None, f"expected a checkpoint, but {path} is damaged or no checkpoint"}
    assert len(sentences) - sentences.count(None) > 800


def test_every_byte_of_every_record_is_guarded(path: Path) -> None:
    WholeCheckpointIO().save_checkpoint(content(), path)
    whole, torch_alone = path.read_bytes(), 0
    with zipfile.ZipFile(path) as archive:
        records = [archive.read(info) for info in archive.infolist() if info.file_size > 9]
    for record in records:
        for place in range(whole.index(record), whole.index(record) + len(record), 3):
            path.write_bytes(flipped(whole, place, place + 1))
            assert not is_whole(path)
            try:
                torch_alone += not same(torch.load(path, weights_only=True, mmap=True), content())
            except Exception:
                continue
    assert torch_alone > 100  # torch.load does not notice by itself


def test_a_refusal_offers_the_one_before_if_that_is_whole(path: Path) -> None:
    for seed in range(2):
        WholeCheckpointIO().save_checkpoint(content(seed), path)
    path.write_bytes(path.read_bytes()[:-1000])
    offer = f"is damaged or no checkpoint; the checkpoint before it is whole: {previous_of(path)}$"
    with pytest.raises(ValueError, match=offer):
        WholeCheckpointIO().load_checkpoint(path)
    path.unlink()
    with pytest.raises(ValueError, match=f"no such file; the checkpoint before it is whole: {previous_of(path)}$"):
        WholeCheckpointIO().load_checkpoint(path)
    previous_of(path).write_bytes(b"")
    with pytest.raises(ValueError, match=r"there is no such file$"):
        WholeCheckpointIO().load_checkpoint(path)


class Evil:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.folder,)


def test_no_pickle_is_run_even_if_asked_to(path: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    path.parent.mkdir()
    torch.save(content() | {"extra": Evil(made)}, path)
    for asked in (None, True, False):
        with pytest.raises(ValueError, match="is damaged or no checkpoint"):
            WholeCheckpointIO().load_checkpoint(path, weights_only=asked)
    assert not made.exists()
    torch.load(path, weights_only=False)
    assert made.exists()  # the trap works


KILLED = """
import os, sys, torch
from pathlib import Path
from crocodil.modules import integrity
from crocodil.modules.checkpoint_io import WholeCheckpointIO

def dying(name, place, calls):
    def call(*args, **kwargs):
        calls.append(name)
        if len(calls) == {death}:
            os.kill(os.getpid(), 9)
        return original(*args, **kwargs)
    original = getattr(place, name)
    setattr(place, name, call)

calls = []
for name, place in [("fsync", os), ("unlink", Path), ("rename", Path), ("save", torch), ("open", Path)]:
    dying(name, place, calls)
WholeCheckpointIO().save_checkpoint({{"seed": torch.tensor(2)}}, Path(sys.argv[1]))
print(len(calls))
"""


def test_a_death_at_any_moment_of_saving_leaves_a_whole_one(path: Path) -> None:
    """A process forks and dies at its first system call of saving, another at its second, ...: the newest whole
    checkpoint is the one before, until it is the new one."""
    found = []
    for death in range(1, 20):
        shutil.rmtree(path.parent, ignore_errors=True)
        for seed in range(2):
            WholeCheckpointIO().save_checkpoint({"seed": torch.tensor(seed)}, path)
        if (pid := os.fork()) == 0:  # the interpreter and torch are there already
            sys.argv = ["", str(path)]
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # the process ends here
            exec(KILLED.format(death=death), {})
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        names = ["last.ckpt", "previous.ckpt"]
        assert all(is_whole(path.parent / name) for name in os.listdir(path.parent) if name in names)
        newest = path if path.exists() else previous_of(path)
        found.append(int(torch.load(newest, weights_only=True)["seed"]))
        if not os.WIFSIGNALED(status):
            break
    assert len(found) > 5 and found == sorted(found) and set(found) == {1, 2}


def limited(size: int | None) -> Callable[[], None]:
    """Files of the process may have `size` bytes at most: writing more fails as on a full disk."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        if size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    return limit


@pytest.mark.parametrize("size", [0, 1000, 100_000])
def test_a_full_disk_is_one_sentence_and_leaves_the_last_one(size: int, path: Path) -> None:
    WholeCheckpointIO().save_checkpoint(content(0), path)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    try:
        limited(size)()
        with pytest.raises(OSError, match=f"^the checkpoint {path} cannot be written: File too large; the one before"):
            WholeCheckpointIO().save_checkpoint(content(1) | {"large": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(path.parent) == ["last.ckpt"]
    assert same(WholeCheckpointIO().load_checkpoint(path), content(0))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_what_the_system_says_is_passed_on(path: Path) -> None:
    path.parent.mkdir()
    part_of(path).symlink_to("/dev/full")
    with pytest.raises(OSError, match="cannot be written: No space left on device"):
        WholeCheckpointIO().save_checkpoint(content(), path)


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"last\.ckpt cannot be written: File exists; the one before"):
        WholeCheckpointIO().save_checkpoint(content(), tmp_path / "file" / "last.ckpt")


# folders


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one."""
    store = f"file://{tmp_path_factory.mktemp('store') / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def save_folder(path: Path, seed: int) -> None:
    rest = content(seed)
    save_sharded(path, {"state_dict": rest.pop("state_dict")}, rest)


def load_folder(path: Path) -> dict[str, Any]:
    rest = read_folder(path)
    state = {name: torch.zeros_like(value) for name, value in content()["state_dict"].items()}
    load_sharded(path, {"state_dict": state})
    return {"state_dict": state, **rest}


def test_folders_are_kept_as_files_are(group: None, path: Path) -> None:
    for seed in range(3):
        save_folder(path, seed)
    assert sorted(os.listdir(path.parent)) == ["last.ckpt", "previous.ckpt"]
    assert same(load_folder(path), content(2))
    assert same(load_folder(previous_of(path)), content(1))


def test_sums_are_those_of_sha256sum(group: None, path: Path) -> None:
    save_folder(path, 0)
    done = subprocess.run(["sha256sum", "--check", "--strict", SUMS_FILE], cwd=path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(": OK\n") == len(os.listdir(path)) - 1 == 3


def test_no_damage_of_a_folder_goes_unnoticed(group: None, path: Path) -> None:
    save_folder(path, 0)
    message = f"expected a checkpoint, but {path} is damaged or no checkpoint"
    for name in sorted(os.listdir(path)):
        whole, num_refused = (path / name).read_bytes(), 0
        for damaged in damages(whole, 8, every=max(1, len(whole) // 60)):
            (path / name).write_bytes(damaged)
            num_refused += refused(path, load_folder) == message
        assert num_refused > 90
        (path / name).unlink()
        assert refused(path, load_folder)
        (path / name).write_bytes(whole)
    assert refused(path, load_folder) is None


def test_a_list_of_sums_that_lacks_a_file_is_refused(group: None, path: Path) -> None:
    save_folder(path, 0)
    lines = (path / SUMS_FILE).read_text().splitlines(keepends=True)
    for line in lines:
        (path / SUMS_FILE).write_text("".join(other for other in lines if other != line))
        assert refused(path, load_folder)


def test_processes_share_the_verification(group: None, path: Path) -> None:
    save_folder(path, 0)
    tensors = path / "__0_0.distcp"
    tensors.write_bytes(flipped(tensors.read_bytes(), 1000, 1001))
    read_folder(path, share=slice(0, None, 3))
    read_folder(path, share=slice(2, None, 3))
    with pytest.raises(ValueError, match="is damaged"):
        read_folder(path, share=slice(1, None, 3))  # the names in order: .metadata, __0_0.distcp, meta.pt


def test_a_full_disk_leaves_the_last_folder(group: None, path: Path) -> None:
    save_folder(path, 0)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    try:
        limited(3500)()
        with pytest.raises(OSError, match=f"^the checkpoint {path} cannot be written: .*; the one before it is"):
            save_folder(path, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(path.parent) == ["last.ckpt"]
    assert same(load_folder(path), content(0))


@pytest.mark.parametrize("name", ["meta.pt", ".metadata", "__0_0.distcp"])
def test_no_pickle_of_a_folder_is_run(name: str, group: None, path: Path, tmp_path: Path) -> None:
    """Whoever writes the evil file writes its sum, too."""
    made = tmp_path / "made"
    if name == "meta.pt":
        save_folder(path, 0)
        torch.save({"extra": Evil(made)}, path / name)
    elif name == ".metadata":
        save_folder(path, 0)
        metadata = pickle.loads((path / name).read_bytes())
        metadata.planner_data["extra"] = Evil(made)
        (path / name).write_bytes(pickle.dumps(metadata))
    else:
        save_sharded(path, {"state_dict": {"a": Evil(made)}}, {})
    files = [path / each for each in os.listdir(path) if each != SUMS_FILE]
    sums = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files]
    (path / SUMS_FILE).write_text("".join(sums))
    assert is_whole(path)
    with pytest.raises(BaseException, match=r"(?i)damaged|unpickl|weights.only|pathlib"):
        read_folder(path)
        load_sharded(path, {"state_dict": {"a": Evil(tmp_path / "other")}})
    assert not made.exists()


def test_putting_in_place_needs_no_room(tmp_path: Path) -> None:
    """Two renames: neither copies."""
    for seed in (b"1", b"2"):
        part_of(tmp_path / "best.ckpt").write_bytes(seed)
        put_in_place(tmp_path / "best.ckpt")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "best.ckpt": b"2",
        "best-previous.ckpt": b"1",
    }

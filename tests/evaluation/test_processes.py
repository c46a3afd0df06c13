"""Every figure over two processes (gloo) is the figure of one. Run as a script, this file is one of the processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from crocodil.data.codec import TextCodec
from crocodil.evaluation.copying import LongestCopiedRun, SuffixArray
from crocodil.evaluation.diversity import DistinctNgrams, DuplicateRate, UnigramEntropy
from crocodil.evaluation.frechet import FrechetDistance
from crocodil.evaluation.judge import Judge
from crocodil.evaluation.mauve import Mauve
from crocodil.evaluation.perplexity import GenerativePerplexity
from crocodil.evaluation.python_code import CompileRate, ParseRate, UndefinedNames
from crocodil.evaluation.reconstruction import CharErrorRate, TokenAccuracy
from crocodil.ranks import gather_rows, mean_over_items


def figures(folder: Path, rows: slice, batch_size: int) -> dict[str, Any]:
    """All figures of some of the texts, updated batch by batch."""
    codec = TextCodec.canonical()
    judge = Judge.from_pretrained(folder / "judge", codec)
    token_ids: Tensor = torch.load(folder / "token_ids.pt", weights_only=True)
    reference = judge.read([""] * len(token_ids), token_ids.flip(0)).mean_states + 0.1
    metrics: dict[str, Any] = {
        "perplexity": GenerativePerplexity(judge),
        "distance": FrechetDistance(judge, reference),
        "mauve": Mauve(judge, reference, seeds=(0,)),
        "entropy": UnigramEntropy(0),
        "distinct": DistinctNgrams(2, 0),
        "duplicates": DuplicateRate(),
        "copies": LongestCopiedRun(SuffixArray(token_ids[::3].numpy(), (1, 0)), 1, 0),
        "parse": ParseRate(),
        "compile": CompileRate(),
        "undefined": UndefinedNames(),
        "cer": CharErrorRate(),
        "accuracy": TokenAccuracy(0),
    }
    names = {
        "texts": [codec.decode(row) for row in token_ids],
        "token_ids": token_ids,
        "reference_texts": [codec.decode(row) for row in token_ids.roll(1, 0)],
        "reference_ids": token_ids.roll(1, 0),
    }
    mine = {name: values[rows] for name, values in names.items()}
    for start in range(0, len(mine["texts"]), batch_size):
        batch = {name: values[start : start + batch_size] for name, values in mine.items()}
        for metric in metrics.values():
            metric.update(**metric._filter_kwargs(**batch))
    found: dict[str, Any] = {}
    for name, metric in metrics.items():
        value = metric.compute()
        found |= {k: float(v) for k, v in value.items()} if isinstance(value, dict) else {name: float(value)}
    found["gathered"] = gather_rows(mine["token_ids"]).tolist()
    mean = float(mine["token_ids"][:, 2].double().mean())
    found |= mean_over_items({"mean": mean}, len(mine["texts"]), torch.device("cpu"))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [2, 5])
def test_two_processes_give_what_one_gives(
    batch_size: int, own_judge: Judge, token_ids: Tensor, tmp_path: Path
) -> None:
    pytest.importorskip("mauve")
    pytest.importorskip("pyflakes")
    own_judge.save_pretrained(tmp_path / "judge")
    many = token_ids.repeat(3, 1)
    many[9:, 4] = torch.arange(20, 38)
    torch.save(many, tmp_path / "token_ids.pt")
    expected = figures(tmp_path, slice(None), batch_size=100)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    environment = os.environ | meeting
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path), str(batch_size)], env=environment | {"RANK": str(rank)}
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            same = value if isinstance(value, list) else pytest.approx(value, rel=1e-5, nan_ok=True)
            assert found[name] == same, name


def main(folder: Path, batch_size: int) -> None:
    """One process: texts of even number, or the others."""
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    # Shares of different sizes, so that nothing may rely on equal ones.
    rows = slice(0, 16) if rank == 0 else slice(16, None)
    (folder / f"{rank}.json").write_text(json.dumps(figures(folder, rows, batch_size)))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

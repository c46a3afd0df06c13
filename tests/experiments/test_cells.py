import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from crocodil.experiments.cells import Ledger, array_fingerprint, fingerprint, share_of


@dataclass(frozen=True)
class Cell:
    steps: int


@dataclass(frozen=True)
class OtherCell:
    steps: int


def test_a_finished_cell_is_not_measured_again(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "new", "table", {"system": "a"})
    assert ledger.row(Cell(8), lambda: {"nll": 1.5}) == {"nll": 1.5}
    for again in (ledger, Ledger(tmp_path / "new", "table", {"system": "a"})):
        assert again.row(Cell(8), pytest.fail) == {"nll": 1.5}
    assert ledger.row(OtherCell(8), lambda: {"x": 1}) == {"x": 1}  # another kind with the same settings


def test_another_system_shares_no_rows(tmp_path: Path) -> None:
    Ledger(tmp_path, "table", {"system": "a"}).row(Cell(8), lambda: {"nll": 1.5})
    assert Ledger(tmp_path, "table", {"system": "b"}).row(Cell(8), lambda: {"nll": 2.5}) == {"nll": 2.5}


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_line_half_written_is_cut_off_and_written_anew(tmp_path: Path, cut: int) -> None:
    ledger = Ledger(tmp_path, "table", {})
    ledger.row(Cell(8), lambda: {"nll": 1.5})
    ledger.row(Cell(4), lambda: {"nll": 2.5})
    content = ledger.path.read_bytes()
    ledger.path.write_bytes(content[:-cut])
    again = Ledger(tmp_path, "table", {})
    assert again.row(Cell(8), pytest.fail) == {"nll": 1.5}
    assert again.row(Cell(4), lambda: {"nll": 2.5}) == {"nll": 2.5}
    assert again.path.read_bytes() == content
    assert [json.loads(line)["row"]["nll"] for line in again.path.read_text().splitlines()] == [1.5, 2.5]


@pytest.mark.parametrize(("num_items", "size"), [(10, 3), (2, 2), (7, 1)])
def test_shares_cover_all_items_once(num_items: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = []
    for rank in range(size):
        monkeypatch.setattr("crocodil.experiments.cells.rank_and_size", lambda rank=rank: (rank, size))
        shares.append(share_of(num_items))
    assert [i for share in shares for i in share] == list(range(num_items))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_process_without_a_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crocodil.experiments.cells.rank_and_size", lambda: (0, 3))
    with pytest.raises(ValueError, match="at least one text for each of the 3 processes, got 2"):
        share_of(2)


def test_fingerprints_follow_the_content(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "w.bin").write_bytes(b"123")
    first = fingerprint(tmp_path)
    (tmp_path / "a" / "w.bin").write_bytes(b"124")
    assert fingerprint(tmp_path) != first
    import numpy as np

    assert array_fingerprint(np.arange(4)) == array_fingerprint(np.arange(8)[:4])
    assert array_fingerprint(np.arange(4)) != array_fingerprint(np.arange(4)[::-1])

"""The headline's own logic, and, slow, a reduced run of it from packages to figures."""

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

from crocodil.data.corpora import standard_library_files
from crocodil.experiments import SystemGrid

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def headline(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("headline", "headline_corpus"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import headline

    return headline


def row(algorithm: str, num_steps: int, temperature: float, judge_nll: float, entropy: float) -> dict[str, Any]:
    setting = {"algorithm": algorithm, "num_steps": num_steps, "temperature": temperature, "remasking": "random"}
    nothing = dict.fromkeys(("num_registers", "top_p", "prior_network", "prior_steps"))
    return setting | nothing | {"judge_nll": judge_nll, "entropy": entropy}


def test_the_likeliest_setting_that_keeps_the_entropy_is_chosen(headline: Any) -> None:
    rows = [
        row("data", 0, 0.0, 0.9, 2.8),
        row("base", 64, 0.5, 0.8, 2.59),  # likelier than any other, and collapsed
        row("base", 64, 0.9, 1.4, 2.61),
        row("base", 64, 1.0, 2.0, 2.8),
        row("base", 8, 0.9, 2.5, 2.5),
        row("base", 8, 1.0, 3.0, 2.7),
        row("base", 4, 1.0, 4.0, 2.0),  # nothing keeps it here
        row("conthendisc", 8, 1.0, 1.9, 2.7),
        row("conthendisc", 4, 1.0, 2.2, 2.7),
    ]
    assert headline.chosen_settings(rows) == [
        SystemGrid("base", [64], "random", [0.9]),
        SystemGrid("base", [8], "random", [1.0]),
        SystemGrid("conthendisc", [8, 4], "random", [1.0]),
    ]


def test_what_is_measured(headline: Any) -> None:
    """The base where it is best and untempered everywhere, a sketched system at all of its budgets."""
    sketched = SystemGrid("conthendisc", [8, 4, 2], "random", [0.5], 4, prior_network="student", prior_steps=2)
    grids = {"base_grid": (SystemGrid("base", [16, 8]),), "sketch_grid": (replace(sketched, num_steps=[8, 4, 2, 1]),)}
    effort = replace(headline.Effort(), **grids)
    chosen = [SystemGrid("base", [16], "p2:1", [1.2]), SystemGrid("base", [8]), sketched]
    found = headline.measured_systems(effort, chosen)
    assert found[:3] == [SystemGrid("base", [16, 8]), chosen[0], replace(sketched, num_steps=[8, 4, 2, 1])]
    ways = {(grid.prior_network, grid.prior_steps) for grid in found[3:-1]}
    assert all(grid.num_steps == [4] for grid in found[3:-1])
    assert ("prior", 16) in ways and ("student", 1) in ways and ("student", 2) not in ways
    assert found[-1].algorithm == "oracle"


def test_large_packages_are_thinned_out_evenly(headline: Any) -> None:
    spread: Callable[..., list[tuple[str, int]]] = headline.headline_corpus.spread
    files = [(f"m{number}.py", 10) for number in range(100)]
    kept = spread(files, 200)
    assert len(kept) == 20 and sum(size for _, size in kept) <= 200
    places = [int(name[1:-3]) for name, _ in kept]
    assert {place // 25 for place in places} == {0, 1, 2, 3}
    assert max(b - a for a, b in pairwise(places)) <= 6
    assert spread(files, 5000) == files
    assert spread([], 10) == []
    assert spread([("large.py", 500), ("small.py", 5)], 100) == [("small.py", 5)]


def test_wheels_become_folders_of_python_files(headline: Any, tmp_path: Path) -> None:
    wheel = tmp_path / "Some_Package-1.0-py3-none-any.whl"
    with ZipFile(wheel, "w") as archive:
        for name in ("some/a.py", "some/b.txt", "some/tests/c.py", "../out.py", "some/d.py"):
            archive.writestr(name, f"# {name}\n")
    headline.headline_corpus.unpack(wheel, tmp_path / "packages")
    target = tmp_path / "packages" / "some_package"
    found = sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file())
    assert found == ["some/a.py", "some/d.py"] and not (tmp_path / "out.py").exists()
    (target / "some/a.py").write_text("kept")
    headline.headline_corpus.unpack(wheel, tmp_path / "packages")  # complete, so left alone
    assert (target / "some/a.py").read_text() == "kept"


@pytest.mark.slow
def test_the_whole_headline_reduced(headline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage for a few steps on a part of the standard library, tuned, measured, and nothing done twice."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    packages = tmp_path / "runs/headline/corpus/packages"
    for number, file in enumerate(standard_library_files()[:200]):
        target = packages / f"package{number % 40}" / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file.path, target)
    monkeypatch.setattr(headline.headline_corpus, "build", lambda folder: packages)
    effort = headline.Effort(
        overrides=(
            "--trainer.max_steps=4",
            "--trainer.val_check_interval=4",
            "--trainer.limit_val_batches=1",
            "--data.init_args.batch_size=8",
            "--model.init_args.compile=false",
        ),
        tuning_texts=4,
        texts=4,
        seeds=(0, 1),
        batches=(2,),
        base_grid=(SystemGrid("base", [4, 2], "random", [1.0, 3.0]),),
        sketch_grid=tuple(
            SystemGrid(name, [2, 1], "random", [1.0, 3.0], prior_network="student", prior_steps=1)
            for name in headline.SKETCHED
        ),
        oracle_grid=(SystemGrid("oracle", [2]),),
    )
    headline.run(effort, ("train", "tune", "measure"))
    results = (headline.FOLDER / "headline.json").read_text()
    assert "conthendisc" in results and '"share"' in results and "seconds_batch_2" in results
    monkeypatch.setattr(headline.Generation, "measure", pytest.fail)
    monkeypatch.setattr(headline.Generation, "time", pytest.fail)
    headline.run(effort, ("train", "tune", "measure"))

"""The headline's own logic, and, slow, a reduced run of it from Python files to figures."""

import json
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import torch

from crocodil.data.corpora import standard_library_files
from crocodil.experiments import SystemGrid
from crocodil.modules import AutoencoderModule, DemaskerModule

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


MODULES = (
    *("headline", "headline_corpus", "headline_bench", "headline_compare", "headline_tuning"),
    *("headline_figure", "headline_ship", "recipe"),
)


@pytest.fixture
def headline(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    import headline

    return headline


@pytest.fixture
def tuning(headline: Any) -> Any:
    return sys.modules["headline_tuning"]


def figures(system: SystemGrid) -> list[dict[str, Any]]:
    """Rows of a made-up world: more calls and colder tokens are likelier; colder tokens are of less entropy.

    A sketch saves nine tenths of the calls; MAUVE is lost when collapsed.
    """
    found = []
    for temperature in system.temperature:
        for calls in system.num_steps:
            entropy = 2.0 + 0.8 * temperature
            worth = calls * (1 if system.algorithm == "base" else 10)
            judge_nll = 3.0 - 0.3 * math.log2(worth) + temperature
            found.append(
                asdict(system)
                | {"num_steps": calls, "temperature": temperature, "demasker_calls": calls}
                | {"nfe": calls + 0.5 * (system.prior_steps or 0), "judge_nll": judge_nll, "entropy": entropy}
                | {"mauve": 0.9 if entropy > 2.4 else 0.1, "seed": 100}
            )
    return found


def test_settings_are_chosen_for_the_base_as_for_the_sketch(tuning: Any) -> None:
    data = {"algorithm": "data", "entropy": 2.8, "num_steps": 0}
    grids = tuning.Grids(
        base=(SystemGrid("base", [64, 32, 8], "random", [0.5, 0.8, 1.0]),),
        sketched=(
            SystemGrid("conthendisc", [12, 8, 6, 4, 2], "random", [0.5, 0.8]),
            SystemGrid("conwithindisc", [2], "random", [0.8]),
        ),
    )

    def measure(name: str, systems: Sequence[SystemGrid]) -> list[dict[str, Any]]:
        return [data, *(row for grid in systems for row in figures(grid))]

    again: list[SystemGrid] = []

    def measure_well(name: str, systems: Sequence[SystemGrid]) -> list[dict[str, Any]]:
        """At 8 calls the sketch was lucky at first."""
        again.extend(systems)
        rows = measure(name, systems)
        lucky = [row for row in rows if row["algorithm"] == "conthendisc" and row["num_steps"] == 8]
        return [row | {"judge_nll": row["judge_nll"] + 0.4} if row in lucky else row for row in rows]

    tuned = tuning.tune(grids, measure, measure_well)
    assert tuned.floor == pytest.approx(2.6)
    best = tuned.choices["tuned"]
    assert best.reference == SystemGrid("base", [64], "random", [0.8])  # at 0.5 the entropy is 2.4
    assert best.cheapest["base"] == best.reference  # with 32 calls the judge likes it less
    sketched = SystemGrid("conthendisc", [12], "random", [0.8], prior_network="student", prior_steps=1)
    assert best.of("conthendisc") == sketched
    assert {(grid.algorithm, *grid.num_steps, grid.prior_steps) for grid in again} == {
        ("base", 64, None),
        *(("conthendisc", calls, 1) for calls in (12, 8, 6)),
    }
    assert "conwithindisc" not in best.cheapest and best.of("conwithindisc").num_steps == [2]
    assert tuned.choices["nearest"].reference == best.reference  # both of its temperatures are as near to the data
    plain = tuned.choices["plain"]
    assert plain.reference == SystemGrid("base", [64], "random", [1.0])
    assert plain.cheapest["base"] == plain.reference  # the tuned one is as good, and costs as much
    assert plain.of("conthendisc").num_steps == [6]
    at_8 = [grid for grid in tuned.frontier if grid.algorithm == "base" and grid.num_steps == [8]]
    assert at_8 == [SystemGrid("base", [8], "random", [0.8])]


def test_the_closest_setting_is_as_likely_and_as_near_as_can_be(tuning: Any) -> None:
    rows = [
        asdict(SystemGrid("conthendisc", [calls]))
        | {"num_steps": calls, "temperature": 1.0, "entropy": entropy}
        | {"judge_nll": nats, "mauve": mauve}
        for calls, nats, mauve, entropy in (
            (2, 1.5, 0.9, 2.8),
            (3, 1.2, 0.7, 2.8),
            (4, 1.1, 0.6, 2.8),
            (5, 0.9, 0.8, 2.0),
        )
    ]
    calls = [tuning.close(rows, {"judge_nll": nats}, 2.6).num_steps for nats in (1.6, 1.2, 1.0)]
    assert calls == [[2], [3], [4]]


def test_what_is_measured_is_what_was_chosen(headline: Any, tuning: Any) -> None:
    reference = SystemGrid("base", [64])
    sketched = SystemGrid("conthendisc", [4], "random", [0.5], 4, prior_network="student", prior_steps=2)
    within = SystemGrid("conwithindisc", [3], "random", [0.5], prior_network="student", prior_steps=1)
    closest = {"conthendisc": within, "conwithindisc": within}  # counts where nothing is as good
    choice = tuning.Choice(reference, {"base": reference, "conthendisc": sketched}, closest)
    frontier = [reference, replace(within, num_steps=[2])]
    found = headline.measured_settings(tuning.Tuned({"tuned": choice, "plain": choice}, frontier, 2.6))
    assert found[:3] == [reference, sketched, within]
    assert all(grid not in found[:place] for place, grid in enumerate(found))
    assert all(grid in found for grid in frontier)
    ways = {(grid.prior_network, grid.prior_steps) for grid in found if grid.algorithm == "conthendisc"}
    assert len(ways) == 7 and {("prior", 16), ("prior", 2), ("student", 4)} <= ways
    assert found[-1] == SystemGrid("oracle", [4], "random", [0.5], 4)


def test_what_the_student_keeps_of_the_gain(headline: Any) -> None:
    """Over the base's better setting, 3.0 nats, the teacher's best number of steps gains 1.0 and the student 0.9."""
    grid = SystemGrid("conthendisc", [4], prior_network="student", prior_steps=2)
    bases = [SystemGrid("base", [4], "random", [1.0]), SystemGrid("base", [4], "p2:1", [1.0])]
    systems = [(bases[0], 3.5), (bases[1], 3.0), (grid, 2.1)]
    drawn_by = sys.modules["headline_tuning"].drawn_by
    systems += [(drawn_by(grid, "prior", steps), 2.0 + 0.1 * place) for place, steps in enumerate((8, 32, 16, 4, 2, 1))]
    rows = [
        asdict(system) | {"num_steps": 4, "temperature": 1.0, "seed": seed, "judge_nll": nats}
        for system, nats in systems
        for seed in (1, 0)
    ]
    kept = sys.modules["headline_compare"].kept_gains(rows, [r for r in rows if r["algorithm"] == "base"], grid, grid)
    assert kept == pytest.approx([0.9, 0.9])


def test_a_system_is_compared_with_its_reference(headline: Any, tuning: Any) -> None:
    """Two seeds; a tenth of the calls, 0.5 nats more, .1 of MAUVE less, a fifth of the time."""
    compare = sys.modules["headline_compare"]
    base, own = SystemGrid("base", [60]), SystemGrid("conthendisc", [6], prior_network="student", prior_steps=1)
    figures = {
        "base": {"judge_nll": 1.0, "mauve": 0.9, "entropy": 2.7, "parse_rate": 0.5, "distance": 8.0, "nfe": 60.0},
        "conthendisc": {"judge_nll": 1.5, "mauve": 0.8, "entropy": 2.8, "parse_rate": 0.3, "distance": 2.0, "nfe": 8.0},
    }
    rows = [
        asdict(grid)
        | {name: value + 0.01 * seed for name, value in figures[grid.algorithm].items()}
        | {"num_steps": grid.num_steps[0], "temperature": 1.0, "seed": seed, "demasker_calls": grid.num_steps[0]}
        for seed in (1, 0)
        for grid in (base, own)
    ]
    rows.append({"algorithm": "data", "entropy": 2.85, "num_steps": 0, "temperature": None})
    rows[-1] |= {name: None for name in asdict(base) if name not in rows[-1]}

    class Clock:
        effort = headline.Effort(batches=(2, 4), rounds=3)

        def write(self, grid: SystemGrid, num_samples: int, seed: int) -> Any:
            seconds = 1000.0 if seed == 0 else num_samples * (10.0 if grid == base else 2.0)  # the first is slow
            return SimpleNamespace(cost=SimpleNamespace(seconds=seconds))

    choice = tuning.Choice(base, {"conthendisc": own}, {})
    found = compare.compare(Clock(), rows, "tuned", choice, "conthendisc")
    means = {name: value["mean"] for name, value in found["differences"].items()}
    expected = {"judge_nll": 0.5, "mauve": -0.1, "entropy": 0.1, "parse_rate": -0.2, "distance": -6.0}
    assert means == pytest.approx(expected)
    assert found["times_fewer"]["demasker_calls"]["mean"] == pytest.approx(10.0)
    assert found["times_fewer"]["nfe"]["mean"] == pytest.approx(7.5, rel=0.01)
    assert found["times_faster"].keys() == {"batch 2", "batch 4"}
    for timing in found["times_faster"].values():
        assert timing["mean"] == pytest.approx(5.0)
        assert (timing["base_ms"], timing["system_ms"]) == pytest.approx((10_000, 2_000))
    assert found["as_good_on_validation"] and not found["as_good_on_test"]
    assert compare.compare(Clock(), rows, "tuned", tuning.Choice(base, {"base": base}, {}), "base")["as_good_on_test"]


def test_the_figure_shows_the_likeliest_that_keep_the_entropy(headline: Any) -> None:
    import headline_figure

    rows = [
        {"algorithm": "base", "num_steps": calls, "remasking": rule, "entropy": entropy, "judge_nll": nats}
        for calls, rule, entropy, nats in (
            (8, "random", 2.7, 1.4),
            (8, "p2:1", 2.7, 1.2),
            (8, "p2:1", 2.0, 0.9),
            (8, "threshold:0.9", 2.7, 0.8),
            (4, "random", 2.0, 1.0),
            (64, "random", 2.8, 1.0),
        )
    ]
    shown = headline_figure.best_by_calls(rows, "base", 2.6)
    assert [(row["num_steps"], row["judge_nll"]) for row in shown] == [(8, 1.2), (64, 1.0)]
    figures = json.loads((BENCHMARKS / "results/headline.json").read_text())
    assert [axes.get_title(loc="left") for axes in headline_figure.draw(figures).axes] == [
        "judge, nats a token",
        "MAUVE",
        "share that parses",
    ]


def test_what_a_system_writes_with(headline: Any) -> None:
    networks = sys.modules["headline_bench"].networks_of
    assert networks(SystemGrid("base", [4])) == {"base"}
    assert networks(SystemGrid("oracle", [4])) == {"demasker", "encoder"}
    assert networks(SystemGrid("conthendisc", [4])) == {"demasker", "prior"}
    assert networks(SystemGrid("conwithindisc", [4], prior_network="student")) == {"demasker", "encoder", "student"}


def test_a_package_that_cannot_be_had_is_named(
    headline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = headline.headline_corpus
    (tmp_path / "packages.txt").write_text("one==1\ntwo==2\n")
    monkeypatch.setattr(corpus, "PACKAGES", tmp_path / "packages.txt")
    monkeypatch.setattr(corpus, "unpack_library", lambda packages: None)
    unpacked: list[Path] = []
    monkeypatch.setattr(corpus, "unpack", lambda wheel, packages: unpacked.append(wheel))
    lying = {"two==2": tmp_path / "two.whl"}
    monkeypatch.setattr(corpus, "download", lambda item, folder: lying.get(item, "ERROR: no such thing"))
    corpus.build(tmp_path / "corpus")
    assert unpacked == [tmp_path / "two.whl"]
    assert "one==1 (ERROR: no such thing)" in capsys.readouterr().err
    lying.clear()
    with pytest.raises(RuntimeError, match=r"none of the 2 packages .*one==1 \(ERROR: no such thing\)"):
        corpus.build(tmp_path / "corpus")


def test_a_wheel_is_loaded_once_or_pip_tells_why(
    headline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = headline.headline_corpus
    calls: list[list[str]] = []

    def pip(command: list[str], **options: Any) -> Any:
        calls.append(command)
        return SimpleNamespace(stderr="WARNING: slow\nERROR: no such thing\n")

    monkeypatch.setattr(corpus.subprocess, "run", pip)
    assert corpus.download("some-thing==1.0", tmp_path) == "ERROR: no such thing"
    assert len(calls) == 1 and calls[0][-1] == "some-thing==1.0"
    wheel = tmp_path / "Some_Thing-1.0-py3-none-any.whl"
    wheel.touch()
    assert corpus.download("some-thing==1.0", tmp_path) == wheel and len(calls) == 1


def test_figures_of_other_weights_or_texts_are_not_taken(
    headline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = sys.modules["headline_bench"]
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    files = ("pipeline/tokenizer/a", "pipeline/base/a", "pipeline/crocodil.json", "judge-lm/a", "pipeline/student/a")
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("once")
    systems, texts = [SystemGrid("base", [4])], torch.zeros(2, 3, dtype=torch.long)
    table = SimpleNamespace(systems=systems, held_out=texts, num_samples=1, batch_size=None, mauve_seeds=())

    def kept_in(train: np.ndarray | None = None) -> Path:
        path: Path = bench.Bench.ledger(None, "name", table, train).path
        return path

    first = kept_in()
    assert kept_in() == first != kept_in(np.zeros(2)) != kept_in(np.ones(2))
    (tmp_path / "pipeline/student/a").write_text("again")  # the base does not write with it
    assert kept_in() == first
    seen = {first}
    for name in files[:-1]:
        (tmp_path / name).write_text("again")
        seen.add(kept_in())
    texts += 1
    assert len(seen | {kept_in()}) == len(files) + 1


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


def test_what_was_compared_becomes_the_default(headline: Any) -> None:
    import headline_ship

    grids = {
        "base": SystemGrid("base", [64], "p2:1", [1.6]),
        "conthendisc": SystemGrid("conthendisc", [5], "random", [0.1], 3, prior_network="student", prior_steps=1),
        "conwithindisc": SystemGrid("conwithindisc", [6], "random", [0.5], prior_network="student", prior_steps=2),
    }
    compared = [
        {"reference": reference, "algorithm": name, "base": asdict(grids["base"]), "system": asdict(grids[system])}
        for reference, pick in (("plain", lambda name: "base"), ("tuned", lambda name: name))
        for name in grids
        for system in [pick(name)]
    ]
    assert headline_ship.defaults({"comparisons": compared, "length": 64}) == {
        "masked": {"num_steps": 64, "temperature": 1.6, "remasking": "p2:1"},
        "conthendisc": {
            **{"num_steps": 5, "temperature": 0.1, "remasking": "random", "num_registers": 3},
            **{"prior_network": "student", "prior_steps": 1},
        },
        "conwithindisc": {
            **{"num_steps": 6, "temperature": 0.5, "remasking": "random"},
            **{"prior_network": "student", "prior_steps": 2, "refresh_prior_steps": 2},
        },
    }


def test_trials_of_one_autoencoder_share_it(headline: Any) -> None:
    import recipe

    trials = recipe.TRIALS
    assert recipe.folder_of("autoencoder", trials["d = 10"].autoencoder) == recipe.folder_of("autoencoder", ())
    reseeded = {option.partition("=")[0] for option in trials["other seeds"].autoencoder}
    assert reseeded == {"--seed_everything", "--model.init_args.seed", "--data.init_args.seed"}
    folders = [recipe.folder_of("prior", trial.autoencoder + trial.prior) for trial in trials.values()]
    assert len(set(folders)) == len(trials)
    assert (
        recipe.folder_of("prior", ("--a.noise_std=1.0", "--seed_everything=1")).name
        == "noise_std-1.0_seed_everything-1"
    )


@pytest.mark.slow
def test_the_whole_headline_reduced(
    headline: Any, tuning: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
            "--trainer.max_steps=12",
            "--trainer.log_every_n_steps=1",
            "--trainer.val_check_interval=12",
            "--trainer.limit_val_batches=1",
            "--data.init_args.batch_size=8",
            "--model.init_args.compile=false",
        ),
        grids=tuning.Grids(
            base=(
                SystemGrid("base", [4, 2], "random", [1.0, 3.0]),
                SystemGrid("base", [4], "threshold:0.5", [1.0]),
            ),
            sketched=tuple(SystemGrid(name, [2, 1], "random", [1.0, 3.0]) for name in tuning.SKETCHED),
        ),
        tuning_texts=8,
        finalist_texts=8,
        texts=8,
        references=8,
        seeds=(0, 1),
        batches=(2,),
        rounds=2,
        single_texts=1,
    )
    output = tmp_path / "headline.json"
    headline.run(effort, ("train", "tune", "measure"), output)
    found = json.loads(output.read_text())
    assert {item["reference"] for item in found["comparisons"]} == {"tuned", "nearest", "plain"}
    assert all(minutes > 0 for minutes in found["minutes"].values()) and found["minutes"].keys() == set(headline.STAGES)
    assert {row["algorithm"] for row in found["rows"]} >= {"data", "base", "conthendisc", "conwithindisc", "oracle"}
    for item in found["comparisons"]:
        assert bool(item["times_faster"]) == (item["algorithm"] in tuning.SKETCHED)
        assert not item["times_faster"] or item["times_faster"]["batch 2"]["mean"] > 0
    import recipe

    short = ("--trainer.max_steps=6", *effort.overrides[1:])
    trials = recipe.run(["default", "d = 10"], 4, short)
    assert {row["trial"] for row in trials["rows"]} == {"default", "d = 10"} and len(trials["rows"]) == 2 * 7
    generation = sys.modules["headline_bench"].Generation
    monkeypatch.setattr(generation, "measure", pytest.fail)
    monkeypatch.setattr(DemaskerModule, "training_step", pytest.fail)
    monkeypatch.setattr(AutoencoderModule, "training_step", pytest.fail)
    headline.run(effort, ("train", "tune", "measure"), output)

from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import crocodil_callbacks
import pytest
from crocodil_callbacks import SampleTexts
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from crocodil.evaluation.python_code import parses
from crocodil.trainer_cli import run_trainer

WITH_LATENTS = ["conthendisc", "conwithindisc"]
ALGORITHMS = {
    "demasker": ["masked"],
    "autoencoder": ["reconstruction"],
    "prior": WITH_LATENTS,
    "student": WITH_LATENTS,
}
pytestmark = pytest.mark.filterwarnings("ignore:Found .* in eval mode")
BREAK = "\n" + "-" * 60 + "\n"


def test_the_entry_points_are_the_callbacks() -> None:
    found = {entry.name: entry.load() for entry in entry_points(group="crocodil.callbacks")}
    assert {name: getattr(crocodil_callbacks, name) for name in crocodil_callbacks.__all__} == found


@pytest.mark.parametrize("stage", ALGORITHMS)
def test_texts_and_figures_at_every_validation(stage: str, tiny_system: Any, tmp_path: Path) -> None:
    options = [
        f"--trainer.default_root_dir={tmp_path}",
        "--trainer.val_check_interval=1",
        "--trainer.callbacks=[]",
        "--trainer.callbacks+=SampleTexts",
        "--trainer.callbacks.num_samples=3",
        "--trainer.callbacks.num_steps=4",
        "--trainer.callbacks.prior_steps=4",
        "--trainer.callbacks.temperature=1.0",
    ]
    cli = run_trainer(tiny_system.arguments("fit", stage, *options))
    names = {path.name for path in (tmp_path / "samples").iterdir()}
    assert names == {f"step-{step:06d}-{algorithm}.txt" for step in (1, 2) for algorithm in ALGORITHMS[stage]}
    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0})
    events.Reload()
    for algorithm in ALGORITHMS[stage]:
        page = (tmp_path / "samples" / f"step-000002-{algorithm}.txt").read_text().removesuffix("\n")
        texts = page.split(BREAK)
        assert len(texts) == 3
        figures = {
            name: events.Scalars(f"sample_{algorithm}_{name}") for name in ("parse_rate", "duplicate_rate", "nfe")
        }
        assert all(len(points) == 2 for points in figures.values())
        assert figures["parse_rate"][1].value == pytest.approx(sum(map(parses, texts)) / 3)
        assert figures["duplicate_rate"][1].value == pytest.approx(1 - len(set(texts)) / len(texts))
        calls = figures["nfe"][1].value
        assert calls == 4.0 if algorithm == "masked" else calls > 4.0
        shown = events.Tensors(f"samples/{algorithm}/text_summary")[1].tensor_proto.string_val[0].decode()
        assert page in shown
    metrics = cli.trainer.callback_metrics
    assert all(0 < metrics[f"sample_{algorithm}_entropy"] < 4 for algorithm in ALGORITHMS[stage])
    assert ("sample_reconstruction_token_accuracy" in metrics) == (stage == "autoencoder")


@pytest.fixture
def sampled(tiny_system: Any, fit: Callable[..., list[float]], tmp_path: Path) -> Callable[..., dict[str, str]]:
    """`pages = sampled(module, callback, max_steps=1)`: the files of a fit that validates after every step."""

    def run(module: Any, callback: SampleTexts, max_steps: int = 1) -> dict[str, str]:
        options = {"limit_val_batches": 1, "val_check_interval": 1, "check_val_every_n_epoch": None}
        fit(module, tiny_system.data(), callback, max_steps=max_steps, **options)
        return {path.name: path.read_text() for path in sorted((tmp_path / "samples").iterdir())}

    return run


def test_only_every_nth_validation_samples(tiny_system: Any, sampled: Callable[..., dict[str, str]]) -> None:
    callback = SampleTexts(num_samples=1, num_steps=1, every_n_validations=2)
    pages = sampled(tiny_system.module("demasker"), callback, max_steps=4)
    assert list(pages) == ["step-000001-masked.txt", "step-000003-masked.txt"]


def test_the_texts_are_those_of_the_pipeline(tiny_system: Any, sampled: Callable[..., dict[str, str]]) -> None:
    module = tiny_system.module("demasker")
    callback = SampleTexts(num_samples=3, num_steps=4, temperature=1.0, seed=5, remasking="random")
    pages = sampled(module, callback)
    pipeline = module.pipeline(tiny_system.data().codec)
    texts = pipeline(3, 32, "masked", 4, seed=5, remasking="random", temperature=1.0).texts
    assert pages == {"step-000001-masked.txt": BREAK.join(texts) + "\n"}


def test_chosen_algorithms_replace_those_of_the_stage(tiny_system: Any, sampled: Callable[..., dict[str, str]]) -> None:
    callback = SampleTexts(["masked", "conthendisc"], num_samples=1, num_steps=1, prior_steps=1)
    pages = sampled(tiny_system.module("prior"), callback)
    assert set(pages) == {"step-000001-masked.txt", "step-000001-conthendisc.txt"}


def test_conwithindisc_is_left_out_where_the_prior_has_no_conditions(
    tiny_system: Any, sampled: Callable[..., dict[str, str]]
) -> None:
    pages = sampled(tiny_system.module("prior", condition_share=0.0), SampleTexts(num_steps=1, prior_steps=1))
    assert list(pages) == ["step-000001-conthendisc.txt"]


def test_unknown_algorithms_are_refused() -> None:
    with pytest.raises(ValueError, match=r"masked, conthendisc, conwithindisc, reconstruction, got a, b$"):
        SampleTexts(["masked", "a", "b"])  # type: ignore[list-item]

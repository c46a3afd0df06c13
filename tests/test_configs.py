"""Every YAML of lightning_configs can be run in small, and a key of it that means nothing any more is an error."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from crocodil.modules.checkpoints import StageCheckpoint
from crocodil.trainer_cli import run_trainer

FOLDER = Path(__file__).parents[1] / "lightning_configs"
ELSEWHERE = ("eval_", "headline_")  # tests/modules/, tests/benchmarks/
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml") if not path.stem.startswith(ELSEWHERE))
ALWAYS = ("quickstart_prior",)
"""Whose stale keys the default run tries; the slow one tries those of all."""
USUAL = ("quickstart", "llada8b_qlora")
"""Families that the default run runs; the slow one runs the others."""


@pytest.fixture(scope="module")
def built(tiny_system: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the stages of a family find one another's checkpoints."""
    return tmp_path_factory.mktemp("built")


def arguments(name: str, tiny_system: Any, root: Path, llada: Path) -> list[str]:
    """A fit of a single step, of the same data and on the checkpoints of the same family."""
    family, _, stage = name.rpartition("_")
    options = ["--trainer.max_steps=1", f"--trainer.default_root_dir={root / name}"]
    if family.startswith("llada8b"):
        options += llada_options(name, llada)
    if family != "quickstart":
        options += ["--data.init_args.vocab_size=280"]
        for previous, argument in (("demasker", "demasker_checkpoint"), ("autoencoder", "autoencoder_checkpoint")):
            if f" {argument}:" in (FOLDER / f"{name}.yaml").read_text():
                path = root / f"{family}_{previous}" / "checkpoints" / "last.ckpt"
                options.append(f"--model.init_args.{argument}={path}")
    return [option for option in tiny_system.arguments("fit", stage, *options, family=family) if is_meant(option, name)]


def llada_options(name: str, llada: Path) -> list[str]:
    """One device, a tiny checkpoint in LLaDA's format and a tiny encoder."""
    settings: dict[str, Any] = {
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.strategy": "auto",
        "trainer.accumulate_grad_batches": 1,
        "data.init_args.tokenizer": llada,
        "data.init_args.num_workers": 0,
    }
    if "prior" not in name:
        settings["model.init_args.pretrained.path"] = llada
    if "autoencoder" in name:
        settings["model.init_args.encoder.path"] = llada
    return [f"--{key}={value}" for key, value in settings.items()]


def is_meant(option: str, name: str) -> bool:
    """Published checkpoints bring their own sizes, and the autoencoder's YAMLs start from them."""
    unwanted = {"demasker": ("init_args.network.", "compile"), "autoencoder": ("demasker_checkpoint",)}
    stage = name.rpartition("_")[2]
    return "llada8b" not in name or not any(word in option for word in unwanted.get(stage, ()))


RUNS = [
    pytest.param(name, marks=[] if name.rpartition("_")[0] in USUAL else pytest.mark.slow)
    for name in sorted(NAMES, key=lambda name: ("demasker" not in name, "prior" in name))
]


@pytest.mark.parametrize("name", RUNS)
def test_a_config_runs(name: str, tiny_system: Any, built: Path, tiny_llada: Path) -> None:
    run_trainer(arguments(name, tiny_system, built, tiny_llada))
    stage = name.rpartition("_")[2]
    assert StageCheckpoint(built / name / "checkpoints" / "last.ckpt", stage).networks  # type: ignore[arg-type]


def sections(config: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The places of all mappings with settings in them."""
    items = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    found = [place for key, value in items for place in sections(value, (*path, key))]
    return [path, *found] if isinstance(config, dict) else found


def with_bogus_key(config: dict[str, Any], section: tuple[str | int, ...]) -> dict[str, Any]:
    place: Any = config
    for key in section:
        place = place[key]
    place["bogus"] = 1
    return config


STALE = [
    pytest.param(
        name, section, id=f"{name}:{'.'.join(map(str, section))}", marks=[] if name in ALWAYS else pytest.mark.slow
    )
    for name in NAMES
    for section in sections(yaml.safe_load((FOLDER / f"{name}.yaml").read_text()))
    # The network of a prior is built once its autoencoder is there, which only the quickstart's is.
    if section[-1:] != ("network",) or not name.endswith("prior") or name == "quickstart_prior"
]


@pytest.mark.parametrize(("name", "section"), STALE)
def test_a_stale_key_is_an_error(
    name: str, section: tuple[str | int, ...], tiny_system: Any, tmp_path: Path, tiny_llada: Path
) -> None:
    given = arguments(name, tiny_system, tmp_path, tiny_llada)
    config = with_bogus_key(yaml.safe_load((FOLDER / f"{name}.yaml").read_text()), section)
    (tmp_path / "stale.yaml").write_text(yaml.safe_dump(config))
    given[1] = f"--config={tmp_path / 'stale.yaml'}"
    given = [option for option in given if section[-1:] != ("encoder",) or "encoder.path" not in option]
    # Beside a class_path the parser says that the class does not fit, and not which key is at fault.
    beside_class_path = section[-1:] in (("logger",), ("model",), ("data",)) or section[-2:-1] == ("callbacks",)
    with pytest.raises(ValueError, match=None if beside_class_path else "bogus"):
        run_trainer(given)

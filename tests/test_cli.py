import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from crocodil.cli import run
from crocodil.commands import open_pipeline
from crocodil.pipeline import CrocodilPipeline
from crocodil.trainer_cli import load_callback_plugins, run_trainer

STAGES = ("demasker", "autoencoder", "prior", "judge")
FEW = ["--num_samples=2", "--num_steps=4", "--prior_steps=2"]


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline: CrocodilPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline.save_pretrained(folder)
    return folder


def last_scalar(folder: Path, name: str) -> float:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events.Scalars(name)[-1].value


# fit, validate, test, predict


@pytest.mark.parametrize("stage", STAGES)
def test_fit_leaves_a_checkpoint_a_config_and_its_curves(stage: str, tiny_system: Any) -> None:
    folder = tiny_system.root / stage
    assert tiny_system.checkpoint(stage).is_file() and (folder / "config.yaml").is_file()
    assert last_scalar(folder, "val_loss") > 0


@pytest.mark.parametrize("stage", STAGES)
def test_validate_finds_the_figures_of_the_fit(stage: str, tiny_system: Any, tmp_path: Path) -> None:
    options = [f"--ckpt_path={tiny_system.checkpoint(stage)}", f"--trainer.default_root_dir={tmp_path}"]
    metrics = run_trainer(tiny_system.arguments("validate", stage, *options)).trainer.callback_metrics
    assert metrics["val_loss"].item() == pytest.approx(last_scalar(tiny_system.root / stage, "val_loss"), rel=1e-6)


@pytest.mark.parametrize(
    ("stage", "names"),
    [
        ("demasker", {"test_loss", "test_masked_loss", "test_accuracy"}),
        ("autoencoder", {"test_loss", "test_loss_clean", "test_masked_loss_0.5", "test_masked_loss_no_latents_1.0"}),
        ("prior", {"test_loss", "test_loss_conditional"}),
        ("judge", {"test_loss"}),
    ],
)
def test_test_reports_the_test_split(stage: str, names: set[str], tiny_system: Any, tmp_path: Path) -> None:
    """With the data of the validation split the same checkpoint would have other figures."""
    options = [f"--ckpt_path={tiny_system.checkpoint(stage)}", f"--trainer.default_root_dir={tmp_path}"]
    metrics = run_trainer(tiny_system.arguments("test", stage, *options)).trainer.callback_metrics
    assert names <= set(metrics)
    assert metrics["test_loss"].item() != pytest.approx(last_scalar(tiny_system.root / stage, "val_loss"), rel=1e-6)


@pytest.mark.parametrize("stage", ["demasker", "autoencoder", "prior"])
def test_predict_writes_json_lines_beside_the_run(stage: str, tiny_system: Any, tmp_path: Path) -> None:
    options = [f"--ckpt_path={tiny_system.checkpoint(stage)}", f"--trainer.default_root_dir={tmp_path}"]
    run_trainer(tiny_system.arguments("predict", stage, *options))
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert all(isinstance(row["text"], str) and len(row["token_ids"]) == 32 for row in rows)


def test_interpolations_follow_the_command_line(tiny_system: Any, tmp_path: Path) -> None:
    options = [
        "--data.init_args.length=40",
        "--trainer.max_steps=3",
        "--model.init_args.lr_scheduler.init_args.warmup_steps=0",
        f"--trainer.default_root_dir={tmp_path}",
    ]
    cli = run_trainer(tiny_system.arguments("fit", "demasker", *options))
    assert cli.datamodule.length == cli.model.demasker.max_length == 40
    schedule = cli.trainer.lr_scheduler_configs[0].scheduler.lr_lambdas[0]
    assert schedule(0) == 1.0 and schedule(2) > schedule(3) == pytest.approx(0.02)
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file()


def test_a_fit_goes_on_from_a_checkpoint(tiny_system: Any, tmp_path: Path) -> None:
    options = [f"--ckpt_path={tiny_system.checkpoint('prior')}", f"--trainer.default_root_dir={tmp_path}"]
    run_trainer(tiny_system.arguments("fit", "prior", *options, "--trainer.max_steps=3"))
    content = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["global_step"] == 3 and content["ema"]["num_updates"] == 3


# sample and export


@pytest.mark.parametrize("algorithm", ["masked", "conthendisc", "conwithindisc"])
def test_sample_writes_what_the_pipeline_gives(
    algorithm: str, pipeline: Path, tiny_pipeline: CrocodilPipeline, capfd: pytest.CaptureFixture[str]
) -> None:
    run(["sample", f"--pipeline={pipeline}", f"--algorithm={algorithm}", "--seed=5", "--length=20", *FEW])
    rows = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    result = tiny_pipeline(2, 20, algorithm, 4, seed=5, prior_steps=2)  # type: ignore[arg-type]
    assert [row["text"] for row in rows] == result.texts
    assert [row["token_ids"] for row in rows] == result.token_ids.tolist()
    assert all(row["cost"]["nfe"] == result.cost.nfe for row in rows)


def test_sample_starts_from_the_defaults_of_the_pipeline(
    tiny_pipeline: CrocodilPipeline, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = {"num_steps": 3, "remasking": "random", "temperature": 0.5}
    parts = tiny_pipeline.networks() | {"codec": tiny_pipeline.codec, "defaults": {"masked": settings}}
    CrocodilPipeline(**parts).save_pretrained(tmp_path)  # type: ignore[arg-type]
    for options, changes in (([], {}), (["--num_steps=2", "--top_p=0.9"], {"num_steps": 2, "top_p": 0.9})):
        run(["sample", f"--pipeline={tmp_path}", "--algorithm=masked", "--num_samples=2", "--length=8", *options])
        rows = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
        expected = tiny_pipeline(2, 8, "masked", **(settings | changes))  # type: ignore[arg-type]
        assert [row["token_ids"] for row in rows] == expected.token_ids.tolist()


def test_export_in_half_precision(tiny_system: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The file is half as large, and on the CPU its numbers are used as float32."""
    options = [f"--base={tiny_system.checkpoint('demasker')}"]
    for dtype in ("float32", "float16"):
        run(["export", *options, f"--output={tmp_path / dtype}", f"--dtype={dtype}"])
    sizes = [(tmp_path / dtype / "demasker" / "model.safetensors").stat().st_size for dtype in ("float32", "float16")]
    assert 0.45 < sizes[1] / sizes[0] < 0.6
    pipe = open_pipeline(str(tmp_path / "float16"), "cpu")
    weights = next(pipe.demasker.parameters())
    assert weights.dtype == torch.float32 and torch.equal(weights, weights.half().float())
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16 or float16, got 'int8'"):
        run(["export", *options, f"--output={tmp_path}", "--dtype=int8"])


def test_sample_to_a_file_leaves_standard_output_empty(
    pipeline: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "texts.jsonl"
    prompts = ["--prompt=def f(v0):", "--prompt=def f("]
    run(["sample", f"--pipeline={pipeline}", "--length=8", f"--output={output}", *prompts, *FEW])
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["text"].startswith("def f(v0)") for row in rows[:2]] == [True, True]
    assert len(rows) == 4 and all(row["text"].startswith("def f(") for row in rows)
    out, err = capfd.readouterr()
    assert out == ""
    assert "4 texts written" in err.replace("\n", " ")


def test_sample_can_be_watched_and_filmed(pipeline: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    film = tmp_path / "new" / "film.html"
    options = ["--algorithm=masked", "--remasking=threshold:0.5", "--stop=:", "--prompt=def f(v0):", "--length=8"]
    run(["sample", f"--pipeline={pipeline}", *options, "--watch", f"--film={film}", *FEW])
    out, err = capfd.readouterr()
    assert "threshold:0.5" in film.read_text()
    assert "step " in err and "def f ( v0 ) :" in err
    assert all(json.loads(line)["text"].startswith("def f(v0):") for line in out.splitlines())


def test_export_gives_the_pipeline_of_its_checkpoints(
    tiny_system: Any, tiny_pipeline: CrocodilPipeline, tmp_path: Path
) -> None:
    parts = {"autoencoder": "autoencoder", "prior": "prior", "base": "demasker"}
    options = [f"--{option}={tiny_system.checkpoint(stage)}" for option, stage in parts.items()]
    run(["export", *options, f"--output={tmp_path / 'new' / 'pipe'}"])
    exported = CrocodilPipeline.from_pretrained(tmp_path / "new" / "pipe")
    for name, network in tiny_pipeline.networks().items():
        torch.testing.assert_close(exported.networks()[name].state_dict(), network.state_dict(), rtol=0, atol=0)


def test_a_prior_is_not_exported_with_another_autoencoder(tiny_system: Any, tmp_path: Path) -> None:
    content = torch.load(tiny_system.checkpoint("autoencoder"), weights_only=True)
    content["state_dict"]["encoder.latent_mean"][0, 0] += 1e-3
    torch.save(content, tmp_path / "other.ckpt")
    options = [f"--autoencoder={tmp_path / 'other.ckpt'}", f"--prior={tiny_system.checkpoint('prior')}"]
    with pytest.raises(ValueError, match="was trained on another autoencoder than"):
        run(["export", *options, f"--output={tmp_path / 'pipe'}"])
    assert not (tmp_path / "pipe" / "crocodil.json").exists()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "export needs --autoencoder"),
        ({"prior": "prior"}, "export needs --autoencoder"),
        ({"prior": "prior", "base": "demasker"}, "export needs --autoencoder"),
        ({"autoencoder": "demasker"}, "expected a checkpoint of the autoencoder stage, got one of the demasker stage"),
        ({"autoencoder": "autoencoder", "prior": "judge"}, "expected a checkpoint of the prior stage, got one of the"),
        ({"base": "prior"}, "expected a checkpoint of the demasker stage, got one of the prior stage"),
    ],
)
def test_export_refuses_parts_that_make_no_whole(
    parts: dict[str, str], message: str, tiny_system: Any, tmp_path: Path
) -> None:
    options = [f"--{option}={tiny_system.checkpoint(stage)}" for option, stage in parts.items()]
    with pytest.raises(ValueError, match=message):
        run(["export", *options, f"--output={tmp_path / 'pipe'}"])


# what users get wrong


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--algorithm=greedy"], "algorithm must be one of masked, conthendisc, conwithindisc, got 'greedy'"),
        (["--num_registers=5"], "num_registers must be between 1 and the trained 4, got 5"),
        (["--length=33"], "length must be between 1 and 32"),
        (["--prompt=def f(", "--length=30"], "between 1 and 28 behind a prompt of 4 tokens"),
        (["--refresh_steps", "9", "--algorithm=conwithindisc"], "refresh_steps must be between 0 and 7"),
        (["--device=nowhere"], "the device nowhere cannot be used"),
        (["--output={file}/below/texts.jsonl"], "the output folder .*/below cannot be written to: Not a directory"),
        (["--output={folder}"], "--output must be a file, got the folder"),
        (["--pipeline={folder}"], "is no pipeline"),
        (["--pipeline={folder}/absent"], "is no pipeline"),
    ],
)
def test_sample_refuses_in_one_sentence(options: list[str], message: str, pipeline: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    places = {"file": tmp_path / "file", "folder": tmp_path}
    with pytest.raises(ValueError, match=message) as error:
        run(["sample", f"--pipeline={pipeline}", *(option.format(**places) for option in options)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        ("demasker", ["--trainer.callbacks+=SampleText"], "no class SampleText; .* EMA, GradientNorm, .*Throughput$"),
        ("demasker", ["--trainer.callbacks+=EMA", "--trainer.callbacks.speed=1"], "Option 'speed' is not accepted"),
        (
            "demasker",
            ["--trainer.callbacks+=SampleTexts", "--trainer.callbacks.algorithms=[greedy]"],
            "'conwithindisc', 'reconstruction'.* Got value: greedy",
        ),
        ("demasker", ["--model.init_args.network.hidden_sise=8"], "no setting hidden_sise; did you mean hidden_size"),
        ("judge", ["--model.init_args.network.hidden_sise=8"], "no setting hidden_sise; did you mean hidden_size"),
        ("prior", ["--model.init_args.network.hidden_sise=8"], "unexpected keyword argument 'hidden_sise'"),
        ("demasker", ["--model.init_args.network.model_type=lama"], "no model_type 'lama'; did you mean llama"),
        ("demasker", ["--model.init_args.network.max_position_embeddings=16"], "reads at most 16 tokens, got 32"),
        ("demasker", ["--model.init_args.loss_weight=best"], "loss_weight.*'elbo', 'none'"),
        ("demasker", ["--data.init_args.folder={folder}"], "folder must hold files that match .*, got none in"),
        ("demasker", ["--data.init_args.folder={folder}/absent"], "folder must be an existing folder"),
        ("demasker", ["--data.init_args.batch_size=400"], "train split must hold at least 400 rows .* got 321"),
        ("demasker", ["--trainer.default_root_dir={file}/below"], "the output folder .* cannot be written to"),
        ("demasker", ["--ckpt_path={folder}/absent.ckpt"], "at .*absent.ckpt, but there is no such file"),
        ("demasker", ["--ckpt_path={file}"], "damaged or no checkpoint"),
        ("demasker", ["--ckpt_path={judge}"], "expected a checkpoint of the demasker stage, got one of the judge"),
        ("autoencoder", ["--model.init_args.demasker_checkpoint={judge}"], "expected .* demasker stage, got .* judge"),
        ("prior", ["--model.init_args.autoencoder_checkpoint={folder}/absent.ckpt"], "there is no such file"),
        ("demasker", ["--model.init_args.seed=${{nowhere}}"], "nowhere"),
        ("demasker", ["--trainer.steps=3"], "--trainer.steps"),
        ("demasker", ["--config={folder}/absent.yaml"], "does not exist"),
    ],
)
def test_fit_refuses_in_one_sentence(
    stage: str, options: list[str], message: str, tiny_system: Any, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    places = {"file": tmp_path / "file", "folder": tmp_path, "judge": tiny_system.checkpoint("judge")}
    given = [f"--trainer.default_root_dir={tmp_path}", *(option.format(**places) for option in options)]
    with pytest.raises(ValueError, match=message) as error:
        run(tiny_system.arguments("fit", stage, *given))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def crocodil(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "crocodil.cli", *arguments], capture_output=True, text=True)


@pytest.mark.slow
def test_a_process_prints_json_lines_alone(pipeline: Path) -> None:
    done = crocodil("sample", f"--pipeline={pipeline}", "--algorithm=masked", *FEW)
    assert done.returncode == 0
    assert [set(json.loads(line)) for line in done.stdout.splitlines()] == [{"text", "token_ids", "cost"}] * 2


@pytest.mark.slow
def test_a_refusal_of_sample_is_one_line_and_a_status(tmp_path: Path) -> None:
    done = crocodil("sample", f"--pipeline={tmp_path}")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("crocodil: ") and done.stderr.count("\n") == 1 and "is no pipeline" in done.stderr


@pytest.mark.slow
def test_a_refusal_of_fit_is_one_line_and_a_status(tiny_system: Any, tmp_path: Path) -> None:
    done = crocodil(*tiny_system.arguments("fit", "demasker", f"--ckpt_path={tmp_path / 'absent.ckpt'}"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("crocodil: ") and done.stderr.count("\n") == 1 and "no such file" in done.stderr


@pytest.mark.parametrize("arguments", [[], ["train"], ["export"], ["sample", "--pipeline=x", "--bogus"]])
def test_a_wrong_usage_has_a_status(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(arguments)
    assert stop.value.code == 2 and "usage: crocodil" in capsys.readouterr().err


def test_one_batch_is_not_all_batches_whatever_was_imported_before() -> None:
    """Modules that came before decide which order of int and float `typing` keeps for Lightning's options."""
    program = """
import crocodil.commands  # with Lightning's own types, 1 then reads 1.0
from crocodil.trainer_cli import CountingTrainer, OneSentenceParser
parser = OneSentenceParser()
parser.add_lightning_class_args(CountingTrainer, "trainer")
for text in ("1", "1.0", "8"):
    print(repr(parser.parse_args([f"--trainer.limit_val_batches={text}"]).trainer.limit_val_batches))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1.0", "8"]


def test_a_plug_in_that_cannot_be_imported_only_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed as any package is: by a folder of metadata on the path."""
    metadata = tmp_path / "broken-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[crocodil.callbacks]\nBroken = broken_plugin:Broken\n")
    (tmp_path / "broken_plugin.py").write_text("raise RuntimeError('too old')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.warns(UserWarning, match=r"the callback Broken \(broken_plugin:Broken\) cannot be imported: too old"):
        load_callback_plugins()
    shutil.rmtree(metadata)

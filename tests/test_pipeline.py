import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import crocodil
from crocodil.commands import build_pipeline
from crocodil.pipeline import ALGORITHMS, CrocodilPipeline, batches
from crocodil.samplers import MaskedSampler

FEW = {"num_steps": 4, "prior_steps": 3, "refresh_prior_steps": 2, "temperature": 1.0}
PROMPTS = ["def f(v0):", "def f(v0, v1):\n    v2 = v0 + v1", ""]


@pytest.fixture(scope="module")
def saved(tiny_pipeline: CrocodilPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "deeper" / "pipeline"
    tiny_pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(tiny_system: Any) -> CrocodilPipeline:
    return build_pipeline(None, None, str(tiny_system.checkpoint("demasker")))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_saved_pipeline_writes_the_same(algorithm: str, tiny_pipeline: CrocodilPipeline, saved: Path) -> None:
    loaded = CrocodilPipeline.from_pretrained(saved)
    one, other = (pipe(3, algorithm=algorithm, seed=7, **FEW) for pipe in (tiny_pipeline, loaded))
    assert torch.equal(one.token_ids, other.token_ids)
    assert one.texts == other.texts
    assert one.cost.calls == other.cost.calls and one.cost.nfe == other.cost.nfe


def test_weights_come_back_bit_for_bit(tiny_pipeline: CrocodilPipeline, saved: Path) -> None:
    loaded = CrocodilPipeline.from_pretrained(saved)
    assert loaded.networks().keys() == tiny_pipeline.networks().keys() == {"demasker", "encoder", "prior", "base"}
    for name, network in tiny_pipeline.networks().items():
        torch.testing.assert_close(loaded.networks()[name].state_dict(), network.state_dict(), rtol=0, atol=0)
        assert not loaded.networks()[name].training
    assert loaded.latent_process == tiny_pipeline.latent_process


def test_a_plain_model_has_a_folder_too(plain: CrocodilPipeline, tmp_path: Path) -> None:
    plain.save_pretrained(tmp_path)
    loaded = CrocodilPipeline.from_pretrained(tmp_path)
    assert list(loaded.networks()) == ["demasker"]
    one, other = (pipe(2, algorithm="masked", **FEW) for pipe in (plain, loaded))
    assert torch.equal(one.token_ids, other.token_ids)


def test_the_folder_holds_only_safetensors_and_text(saved: Path) -> None:
    files = [path for path in saved.rglob("*") if path.is_file()]
    assert len(files) >= 7 and {path.suffix for path in files} <= {".safetensors", ".json", ".txt"}
    for path in files:
        if path.suffix == ".json":
            json.loads(path.read_text())
    description = json.loads((saved / "crocodil.json").read_text())
    assert description["versions"].keys() == {"crocodil", "torch", "transformers"}


def test_code_in_the_folder_is_not_run(saved: Path, tmp_path: Path) -> None:
    """Neither a module with a name that a loader might look for, nor one that a configuration points at."""
    folder = tmp_path / "pipeline"
    CrocodilPipeline.from_pretrained(saved).save_pretrained(folder)
    for name in ("__init__.py", "modeling.py", "tokenizer/tokenization.py", "demasker/modeling_llama.py"):
        (folder / name).write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    path = folder / "tokenizer" / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["tokenization.Tokenizer", None]}}
    path.write_text(json.dumps(settings))
    CrocodilPipeline.from_pretrained(folder)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", [{"format": 2}, {"format": None}])
def test_another_format_is_refused(change: dict[str, Any], saved: Path, tmp_path: Path) -> None:
    description = json.loads((saved / "crocodil.json").read_text())
    (tmp_path / "crocodil.json").write_text(json.dumps(description | change))
    with pytest.raises(ValueError, match=rf"has pipeline format {change['format']}, this version reads 1"):
        CrocodilPipeline.from_pretrained(tmp_path)


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match=f"{folder} is no pipeline: it has no crocodil.json"):
            CrocodilPipeline.from_pretrained(folder)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_sample_depends_on_its_seed_and_number_alone(algorithm: str, tiny_pipeline: CrocodilPipeline) -> None:
    whole = tiny_pipeline(7, algorithm=algorithm, seed=3, **FEW).token_ids
    for num_samples, batch_size in ((7, 1), (7, 3), (4, 64)):
        part = tiny_pipeline(num_samples, algorithm=algorithm, seed=3, batch_size=batch_size, **FEW).token_ids
        assert torch.equal(part, whole[:num_samples])
    assert len({tuple(row) for row in whole.tolist()}) == 7
    assert not torch.equal(tiny_pipeline(7, algorithm=algorithm, seed=4, **FEW).token_ids, whole)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_prompts_are_kept_and_padded_behind_the_text(algorithm: str, tiny_pipeline: CrocodilPipeline) -> None:
    result = tiny_pipeline(2, 10, algorithm, prompts=PROMPTS, **FEW)
    codec = tiny_pipeline.codec
    prompt_ids = [[1, *codec.encode(text)] for text in PROMPTS for _ in range(2)]
    assert len({len(ids) for ids in prompt_ids}) == 3
    assert result.token_ids.shape == (6, max(map(len, prompt_ids)) + 10)
    for row, ids, text in zip(result.token_ids.tolist(), prompt_ids, result.texts, strict=True):
        assert row[: len(ids)] == ids
        assert set(row[len(ids) + 10 :]) <= {0} and 2 not in row
        assert text == codec.decode(row)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_ragged_prompts_do_not_touch_one_another(algorithm: str, tiny_pipeline: CrocodilPipeline) -> None:
    """Text i is the same whether its neighbours have its length, another, or are absent."""
    ragged = tiny_pipeline(1, 10, algorithm, prompts=PROMPTS, **FEW).token_ids
    for i, prompt in enumerate(PROMPTS):
        alike = tiny_pipeline(1, 10, algorithm, prompts=[prompt] * 3, **FEW).token_ids[i]
        assert torch.equal(ragged[i, : len(alike)], alike)
    alone = tiny_pipeline(1, 10, algorithm, prompts=PROMPTS[0], **FEW).token_ids[0]
    assert torch.equal(ragged[0, : len(alone)], alone)


def test_prompts_of_like_lengths_share_batches() -> None:
    assert batches([[1], [1, 2], [3], [4, 5], [6]], 2) == [[0, 2], [4, 1], [3]]
    assert batches([[]] * 5, 4) == [[0, 1, 2, 3], [4]]


def test_conwithindisc_tells_the_prior_of_the_prompt(tiny_pipeline: CrocodilPipeline) -> None:
    assert tiny_pipeline(algorithm="conwithindisc", **FEW).cost.calls["encoder"] == 1
    assert tiny_pipeline(algorithm="conwithindisc", prompts="def f(", length=8, **FEW).cost.calls["encoder"] == 2
    calls = tiny_pipeline(algorithm="conwithindisc", refresh_steps=[1, 2, 3], **FEW).cost.calls
    assert calls == {"demasker": 4, "prior": 3 + 3 * 2, "encoder": 3}


def test_masked_samples_from_the_base(tiny_pipeline: CrocodilPipeline, plain: CrocodilPipeline) -> None:
    expected = plain(3, algorithm="masked", **FEW).token_ids
    assert torch.equal(tiny_pipeline(3, algorithm="masked", **FEW).token_ids, expected)
    assert tiny_pipeline.base is not None
    without = CrocodilPipeline(tiny_pipeline.demasker, tiny_pipeline.codec)
    assert not torch.equal(without(3, algorithm="masked", **FEW).token_ids, expected)


@pytest.mark.parametrize(
    ("network", "algorithm", "change"),
    [
        ("demasker", "conthendisc", {"num_registers": 2}),
        ("prior", "conthendisc", {"prior_steps": 2}),
        ("prior", "conthendisc", {"solver": "ddim"}),
        ("prior", "conthendisc", {"prior_temperature": 0.5}),
        ("prior", "conwithindisc", {"refresh_prior_steps": 4}),
        ("prior", "conwithindisc", {"prior_guidance_scale": 3.0}),
        ("encoder", "conwithindisc", {"refresh_steps": [1]}),
        ("demasker", "conthendisc", {"num_steps": 8}),
        ("base", "masked", {"block_size": 16}),
    ],
)
def test_settings_reach_the_networks(
    network: str, algorithm: str, change: dict[str, Any], tiny_pipeline: CrocodilPipeline
) -> None:
    """The inputs of a network change with the setting."""

    def inputs(**settings: Any) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []

        def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.extend(value for value in (*args, *kwargs.values()) if value is not None)

        handle = tiny_pipeline.networks()[network].register_forward_pre_hook(note, with_kwargs=True)
        tiny_pipeline(algorithm=algorithm, **{**FEW, **settings})
        handle.remove()
        return seen

    before, after = inputs(), inputs(**change)
    same = len(before) == len(after)
    assert not same or any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("change", [{"remasking": "random"}, {"temperature": 0.1}, {"length": 16}, {"seed": -1}])
def test_settings_change_the_texts(change: dict[str, Any], tiny_pipeline: CrocodilPipeline) -> None:
    one = tiny_pipeline(2, algorithm="masked", **FEW)
    other = tiny_pipeline(2, algorithm="masked", **{**FEW, **change})
    assert one.texts != other.texts


def test_the_cost_of_a_run(tiny_pipeline: CrocodilPipeline) -> None:
    cost = tiny_pipeline(3, 10, "conwithindisc", prompts=["def f("], **FEW).cost
    assert cost.seconds > 0 and 0 < cost.tokens_per_second <= 3 * 10 / cost.seconds
    assert cost.calls == {"demasker": 4, "prior": 4, "encoder": 2}
    assert cost.flops.keys() == {"unit", "demasker", "prior", "encoder"}
    longer = tiny_pipeline(1, 20, "conwithindisc", prompts=["def f("], **FEW).cost
    assert longer.flops["demasker"] > cost.flops["demasker"]
    parts = cost.seconds_by_part
    assert parts.keys() == {"demasker", "prior", "encoder", "sampling"}
    assert all(part > 0 for part in parts.values()) and sum(parts.values()) == pytest.approx(cost.seconds)
    assert 0 < cost.tokens_per_call <= 10 / 4
    json.dumps(cost.to_dict())


def test_progress_counts_the_calls_of_each_network(tiny_pipeline: CrocodilPipeline) -> None:
    seen: list[tuple[str, int, int]] = []
    tiny_pipeline(algorithm="conthendisc", progress=lambda *call: seen.append(call), **FEW)
    assert [call for call in seen if call[0] == "demasker"] == [("demasker", i, 4) for i in (1, 2, 3, 4)]
    assert seen[2] == ("prior", 3, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"length": 0}, r"length must be between 1 and 32 \(the demasker reads 32 tokens\), got 0"),
        ({"length": 33}, r"length must be between 1 and 32 .*, got 33"),
        ({"length": 30, "prompts": "def f("}, "between 1 and 28 behind a prompt of 4 tokens .*, got 30"),
        ({"prompts": "v0 = v0\n" * 20}, "behind a prompt of .* tokens"),
        ({"prompts": []}, "prompts must hold at least one text"),
        ({"prompts": "hello"}, "got the token 'hello'"),
        ({"algorithm": "greedy"}, "algorithm must be one of masked, conthendisc, conwithindisc, got 'greedy'"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"seed": 2**31}, r"seed must be at least -2\^31 and below 2\^31, got 2147483648"),
        ({"remasking": "best"}, "remasking must be one of random, .*, got 'best'"),
        ({"temperature": -0.1}, "temperature must not be negative, got -0.1"),
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"block_size": 5}, "block_size must divide the length, got block_size=5 and length=32"),
        ({"block_size": 8, "num_steps": 6}, "num_steps must be a multiple of the number of blocks"),
        ({"num_registers": 0}, "num_registers must be between 1 and the trained 4, got 0"),
        ({"num_registers": 5}, "num_registers must be between 1 and the trained 4, got 5"),
        ({"num_registers": 5, "algorithm": "conwithindisc"}, "num_registers must be between 1 and the trained 4"),
        ({"prior_steps": 0}, "the prior needs num_steps of at least 1, got 0"),
        ({"refresh_prior_steps": 0}, "the prior needs num_steps of at least 1, got 0"),
        ({"refresh_steps": [8], "algorithm": "conwithindisc"}, r"refresh_steps must be between 0 and 7, got \[8\]"),
        ({"solver": "euler"}, "solver must be one of ddim, dpmpp_2m, ancestral, got 'euler'"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(
    settings: dict[str, Any], message: str, tiny_pipeline: CrocodilPipeline
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        tiny_pipeline(**settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("algorithm", ["conthendisc", "conwithindisc"])
def test_latents_need_a_prior(algorithm: str, plain: CrocodilPipeline, tiny_system: Any) -> None:
    without = build_pipeline(str(tiny_system.checkpoint("autoencoder")), None, None)
    for pipeline in (plain, without):
        with pytest.raises(ValueError, match=f"{algorithm} needs an encoder and a prior"):
            pipeline(algorithm=algorithm)
        assert pipeline(algorithm="masked", **FEW).token_ids.shape == (1, 32)


def test_an_unconditional_prior_does_not_write_within(tiny_pipeline: CrocodilPipeline) -> None:
    process = dataclasses.replace(tiny_pipeline.latent_process, conditional=False)
    parts = {name: tiny_pipeline.networks()[name] for name in ("demasker", "encoder", "prior")}
    pipeline = CrocodilPipeline(codec=tiny_pipeline.codec, latent_process=process, **parts)
    with pytest.raises(ValueError, match="conwithindisc needs a prior trained with condition_share above 0"):
        pipeline(algorithm="conwithindisc")
    assert pipeline(algorithm="conthendisc", **FEW).token_ids.shape == (1, 32)


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


HEAVY = "[name for name in ('torch', 'lightning', 'transformers', 'matplotlib', 'numpy') if name in sys.modules]"


def test_importing_the_package_is_light() -> None:
    assert python(f"import sys, crocodil; print({HEAVY})") == "[]\n"


def test_the_package_gives_the_pipeline_and_nothing_unknown() -> None:
    assert crocodil.CrocodilPipeline is CrocodilPipeline
    with pytest.raises(AttributeError, match="no attribute 'Pipeline'"):
        _ = crocodil.Pipeline


@pytest.mark.parametrize("arguments", [["--help"], ["sample", "--help"], ["--version"]])
def test_help_is_light(arguments: list[str]) -> None:
    code = f"""
import sys
from crocodil.cli import run
try:
    run({arguments})
except SystemExit:
    print({HEAVY})
"""
    assert python(code).splitlines()[-1] == "[]"


def test_texts_are_written_again_from_their_own_registers(tiny_system: Any, tiny_pipeline: CrocodilPipeline) -> None:
    source = tiny_system.data().blocks("test")[:5]
    result = tiny_pipeline.reconstruct(source, 4, num_registers=2, batch_size=2)
    with torch.no_grad():
        latents = tiny_pipeline.encoder(source)[:, :2]  # type: ignore[misc]
    out = MaskedSampler(4).sample(tiny_pipeline.demasker, length=32, batch_size=5, latents=latents)
    assert torch.equal(result.token_ids, out.token_ids)
    assert result.texts == [tiny_pipeline.codec.decode(row) for row in out.token_ids]
    assert result.cost.calls == {"demasker": 4, "encoder": 1} and result.cost.nfe > 4
    assert set(result.cost.seconds_by_part) == {"demasker", "encoder", "sampling"}


@pytest.mark.parametrize("first", [0, 3])
def test_shares_of_several_processes_are_the_texts_of_one(
    first: int, tiny_system: Any, tiny_pipeline: CrocodilPipeline
) -> None:
    whole = tiny_pipeline(6, algorithm="conthendisc", seed=2, **FEW)
    part = tiny_pipeline(3, algorithm="conthendisc", seed=2, first_sample=first, **FEW)
    assert torch.equal(part.token_ids, whole.token_ids[first : first + 3])
    source = tiny_system.data().blocks("test")[:6]
    rule = {"remasking": "random", "temperature": 1.0, "seed": 2}
    again = tiny_pipeline.reconstruct(source, 4, **rule)
    part = tiny_pipeline.reconstruct(source[first : first + 3], 4, first_sample=first, **rule)
    assert torch.equal(part.token_ids, again.token_ids[first : first + 3])


def test_without_an_encoder_nothing_is_reconstructed(plain: CrocodilPipeline) -> None:
    with pytest.raises(ValueError, match="needs an encoder, but this one has none"):
        plain.reconstruct(torch.ones(1, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        plain(1, algorithm="masked", batch_size=0)

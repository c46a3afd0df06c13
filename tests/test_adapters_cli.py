"""LoRA and QLoRA through the command line, on the YAMLs of LLaDA-8B with a tiny checkpoint in its format."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from crocodil.models import Demasker
from crocodil.modules.checkpoints import StageCheckpoint
from crocodil.trainer_cli import run_trainer

FOLDER = Path(__file__).parents[1] / "lightning_configs"
ENCODER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}


def arguments(config: str, llada: Path, root: Path, tiny_system: Any, **more: Any) -> list[str]:
    """A fit of 25 steps on generated programs."""
    settings = {
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.precision": "32-true",
        "trainer.max_steps": 25,
        "trainer.accumulate_grad_batches": 1,
        "trainer.limit_val_batches": 0,
        "trainer.log_every_n_steps": 1,
        "trainer.default_root_dir": root,
        "model.init_args.pretrained.path": llada,
        "model.init_args.pretrained.dtype": "float32",
        "model.init_args.optimizer.init_args.lr": 0.01,
        "model.init_args.lr_scheduler.init_args.warmup_steps": 1,
        "data.init_args.sources": tiny_system.root / "corpus",
        "data.init_args.cache_dir": root / "cache",
        "data.init_args.tokenizer": llada,
        "data.init_args.length": 32,
        "data.init_args.batch_size": 8,
        "data.init_args.num_workers": 0,
        **more,
    }
    options = [f"--{key}={value}" for key, value in settings.items()]
    return ["fit", f"--config={FOLDER / config}.yaml", *options]


def fit(config: str, llada: Path, root: Path, tiny_system: Any, **more: Any) -> Path:
    """Runs it in this process; returns the checkpoint."""
    run_trainer(arguments(config, llada, root, tiny_system, **more))
    return root / "checkpoints" / "last.ckpt"


def losses(root: Path) -> list[float]:
    events = EventAccumulator(str(root))
    events.Reload()
    return [event.value for event in events.Scalars("train_loss")]


CASES = [("lora", None), ("qlora", "nf4"), pytest.param("qlora", "int8", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("kind", "quantization"), CASES)
def test_adapters_train_and_reload_to_the_same_logits(
    kind: str, quantization: str | None, tiny_llada: Path, tiny_system: Any, tmp_path: Path
) -> None:
    extra = {"model.init_args.loss_weight": "none"}
    if quantization is not None:
        extra["model.init_args.pretrained.quantization"] = quantization
    path = fit(f"llada8b_{kind}_demasker", tiny_llada, tmp_path, tiny_system, **extra)
    curve = losses(tmp_path)
    assert sum(curve[-5:]) / 5 < 0.92 * curve[0]

    saved = torch.load(path, weights_only=True)["state_dict"]
    assert saved and all(".lora_" in name for name in saved), "the frozen base does not belong into the checkpoint"
    trained = StageCheckpoint(path, "demasker").demasker().eval()
    base = Demasker.from_pretrained(tiny_llada, quantization=quantization).eval()
    for name, value in base.decoder.layers[0].mlp.named_modules():
        if hasattr(value, "weight"):
            adapted = trained.decoder.layers[0].mlp.get_submodule(name)
            assert torch.equal(value.weight, adapted.base_layer.weight)
    token_ids = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = trained(token_ids)
        assert (logits - base(token_ids)).abs().max() > 1e-2
        trained.save_pretrained(tmp_path / "own")
        assert torch.equal(Demasker.from_pretrained(tmp_path / "own").eval()(token_ids), logits)


@pytest.mark.parametrize(("kind", "quantization"), [pytest.param("lora", None, marks=pytest.mark.slow), CASES[1]])
def test_an_autoencoder_begins_as_the_base_and_its_new_parts_move(
    kind: str, quantization: str | None, tiny_llada: Path, tiny_system: Any, tmp_path: Path
) -> None:
    sizes = {"model.init_args.num_registers": 4, "model.init_args.latent_dim": 8}
    sizes["model.init_args.encoder.path"] = tiny_llada
    path = fit(f"llada8b_{kind}_autoencoder", tiny_llada, tmp_path, tiny_system, **sizes)
    saved = torch.load(path, weights_only=True)["state_dict"]
    new = ("register_proj", "register_embedding", "register_gate", ".lora_")
    assert all(name.startswith("encoder.") or any(part in name for part in new) for name in saved)
    gates = [value for name, value in saved.items() if name.endswith("register_gate")]
    assert len(gates) == 2 and all(gate.abs().max() > 0 for gate in gates)
    checkpoint = StageCheckpoint(path, "autoencoder")
    demasker, encoder = checkpoint.demasker().eval(), checkpoint.encoder().eval()
    token_ids = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = encoder(token_ids)
        # After a few steps of warm-up the gates have hardly opened; closed ones would leave exactly nothing.
        assert (demasker(token_ids, latents) - demasker(token_ids)).abs().max() > 1e-5


def test_a_published_encoder_reads_the_text_in_its_own_tokens(
    tiny_llada: Path, tiny_system: Any, tmp_path: Path
) -> None:
    """From the fit to the samples of a pipeline: other tokens for the encoder, of partly masked texts too."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    from crocodil.commands import build_pipeline
    from crocodil.data.codec import byte_level_bpe
    from crocodil.pipeline import CrocodilPipeline

    texts = [path.read_text() for path in sorted((tiny_system.root / "corpus").glob("*.py"))]
    backend = byte_level_bpe(texts, 290).tokenizer.backend_tokenizer
    special = {"eos_token": backend.id_to_token(0), "bos_token": backend.id_to_token(1)}
    own = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(backend.to_str()), **special)
    own.save_pretrained(str(tmp_path / "qwen"))
    sizes = {**ENCODER, "head_dim": 8, "intermediate_size": 24, "max_position_embeddings": 64}
    network = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(own), eos_token_id=0, **sizes))
    network.save_pretrained(tmp_path / "qwen")

    more: dict[str, Any] = {"model.init_args.encoder.path": tmp_path / "qwen"}
    more |= {"model.init_args.num_registers": 4, "model.init_args.latent_dim": 8, "trainer.max_steps": 2}
    path = fit("llada8b_lora_autoencoder", tiny_llada, tmp_path / "ae", tiny_system, **more)
    settings = {
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.max_steps": 2,
        "trainer.limit_val_batches": 1,
        "trainer.val_check_interval": 2,
        "trainer.default_root_dir": tmp_path / "prior",
        "model.init_args.autoencoder_checkpoint": path,
        "model.init_args.network.hidden_size": 16,
        "model.init_args.network.num_layers": 2,
        "model.init_args.network.num_heads": 2,
        "data.init_args.sources": tiny_system.root / "corpus",
        "data.init_args.cache_dir": tmp_path / "ae" / "cache",
        "data.init_args.tokenizer": tiny_llada,
        "data.init_args.length": 32,
        "data.init_args.batch_size": 8,
        "data.init_args.num_workers": 0,
    }
    options = [f"--{key}={value}" for key, value in settings.items()]
    run_trainer(["fit", f"--config={FOLDER / 'llada8b_lora_prior'}.yaml", *options])
    built = build_pipeline(str(path), str(tmp_path / "prior" / "checkpoints" / "last.ckpt"), None)
    built.save_pretrained(tmp_path / "pipeline")
    pipeline = CrocodilPipeline.from_pretrained(tmp_path / "pipeline")
    for pipe in (built, pipeline):
        token_ids, real = pipe.encoder.translate(torch.tensor([[256, *pipe.codec.encode("def g(a"), 258, 258, 257]]))
        expected = [*(t for t in own.encode("def g(a", add_special_tokens=False)), *[pipe_mask(pipe)] * 2]
        assert token_ids[real].tolist() == expected
    first, second = (
        pipe(2, 16, "conwithindisc", 4, prior_steps=2, refresh_prior_steps=2) for pipe in (built, pipeline)
    )
    assert torch.equal(first.token_ids, second.token_ids) and first.cost.calls["encoder"] == 1


def pipe_mask(pipe: Any) -> int:
    mask = pipe.encoder.translate.target.vocabulary.mask_token_id
    assert mask < pipe.encoder.network.config.vocab_size
    return mask


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        pytest.param("llada8b_fsdp_demasker", {}, marks=pytest.mark.slow),
        pytest.param("llada8b_lora_autoencoder", {"num_registers": 4, "latent_dim": 8}, marks=pytest.mark.slow),
    ],
)
def test_two_processes_load_published_weights_into_shards_and_train_as_one(
    config: str, sizes: dict[str, int], tiny_llada: Path, tiny_system: Any, tmp_path: Path
) -> None:
    """The backbone is built on the meta device, and each process keeps its shards of every tensor it reads."""
    more: dict[str, Any] = {f"model.init_args.{name}": value for name, value in sizes.items()}
    if sizes:
        more["model.init_args.encoder.path"] = tiny_llada
    more |= {"trainer.max_steps": 20, "model.init_args.optimizer.init_args.lr": 0.003}
    one = {"trainer.strategy": "auto", "data.init_args.batch_size": 16}
    fit(config, tiny_llada, tmp_path / "one", tiny_system, **more, **one)
    two = {"trainer.strategy": "fsdp2", "trainer.devices": 2, "data.init_args.batch_size": 8}
    given = arguments(config, tiny_llada, tmp_path / "two", tiny_system, **more, **two)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "crocodil.cli", *given], check=True, timeout=300, env=environment)
    expected = losses(tmp_path / "one")
    assert len(expected) == 20 and expected[-1] < expected[0]
    assert losses(tmp_path / "two") == pytest.approx(expected, rel=0, abs=1e-5)
    stage = config.rpartition("_")[2]
    whole, shards = (
        StageCheckpoint(tmp_path / name / "checkpoints" / "last.ckpt", stage).weights("demasker.")  # type: ignore[arg-type]
        for name in ("one", "two")
    )
    assert whole.keys() == shards.keys()
    torch.testing.assert_close(shards, whole, rtol=0, atol=1e-4)

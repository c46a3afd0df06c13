"""LoRA and QLoRA through the command line, on the YAMLs of LLaDA-8B with a tiny checkpoint in its format."""

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


def fit(config: str, llada: Path, root: Path, tiny_system: Any, **more: Any) -> Path:
    """Fits for 25 steps on generated programs; returns the checkpoint."""
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
        "data.init_args.folder": tiny_system.root / "corpus",
        "data.init_args.cache_dir": root / "cache",
        "data.init_args.tokenizer": llada,
        "data.init_args.length": 32,
        "data.init_args.batch_size": 8,
        "data.init_args.num_workers": 0,
        **more,
    }
    arguments = [f"--{key}={value}" for key, value in settings.items()]
    run_trainer(["fit", f"--config={FOLDER / config}.yaml", *arguments])
    return root / "checkpoints" / "last.ckpt"


def losses(root: Path) -> list[float]:
    events = EventAccumulator(str(root))
    events.Reload()
    return [event.value for event in events.Scalars("train_loss")]


CASES = [("lora", None), ("qlora", "nf4"), ("qlora", "int8")]


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


@pytest.mark.parametrize(("kind", "quantization"), CASES[:2])
def test_an_autoencoder_begins_as_the_base_and_its_new_parts_move(
    kind: str, quantization: str | None, tiny_llada: Path, tiny_system: Any, tmp_path: Path
) -> None:
    sizes = {f"model.init_args.encoder.{key}": value for key, value in ENCODER.items()}
    sizes |= {"model.init_args.encoder.head_dim": 8, "model.init_args.encoder.intermediate_size": 24}
    sizes |= {"model.init_args.num_registers": 4, "model.init_args.latent_dim": 8}
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
        assert (demasker(token_ids, latents) - demasker(token_ids)).abs().max() > 1e-4

"""QLoRA on the CPU: a frozen base in 4 or 8 bits, adapters and registers trained on it."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from crocodil.models import Demasker
from crocodil.models.adapters import (
    adapter_names,
    add_adapter,
    choose_adapter,
    load_adapter,
    merge_adapter,
    save_adapter,
    unmerge_adapter,
)

NETWORK = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}
LORA = {"r": 4, "lora_alpha": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    demasker = Demasker(NETWORK, mask_token_id=2, eos_token_id=0)
    with torch.no_grad():
        for parameter in demasker.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    path = tmp_path_factory.mktemp("base")
    demasker.save_pretrained(path)
    return path


@pytest.fixture
def token_ids() -> Tensor:
    return torch.randint(3, 40, (4, 12), generator=torch.Generator().manual_seed(0))


def quantized(folder: Path, quantization: str, lora: bool = True) -> Demasker:
    torch.manual_seed(1)
    demasker = Demasker.from_pretrained(folder, quantization=quantization).with_latents(6, 3, register_gates=True)
    return demasker.with_lora(LORA) if lora else demasker


@pytest.mark.parametrize(("quantization", "bits", "error"), [("nf4", 4, 0.5), ("int8", 8, 0.05)])
@torch.no_grad()
def test_the_blocks_are_packed_and_nearly_compute_the_same(
    folder: Path, token_ids: Tensor, quantization: str, bits: int, error: float
) -> None:
    whole, packed = Demasker.from_pretrained(folder).eval(), quantized(folder, quantization, lora=False).eval()
    expected = whole(token_ids)
    distance = (packed(token_ids) - expected).norm() / expected.norm()
    assert error / 10 < distance < error
    linears = {name: m for name, m in packed.named_modules() if hasattr(m, "quantized_shape")}
    assert len(linears) == 2 * 7 and not any("lm_head" in name for name in linears)
    for module in linears.values():
        assert module.weight.nbytes * 8 == bits * module.in_features * module.out_features


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_training_moves_adapters_and_registers_alone(folder: Path, token_ids: Tensor, quantization: str) -> None:
    demasker = quantized(folder, quantization)
    trained = {name for name, p in demasker.named_parameters() if p.requires_grad}
    assert all(".lora_" in n or n.startswith("register_") or n.endswith("register_gate") for n in trained)
    before = {name: p.detach().clone() for name, p in demasker.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in demasker.parameters() if p.requires_grad], lr=0.02)
    latents, losses = torch.randn(4, 3, 6), []
    for _ in range(30):
        noisy = token_ids.clone()
        noisy[:, ::2] = 2
        weights = (noisy == 2) / (noisy == 2).sum()
        loss, _ = demasker.weighted_loss(noisy, token_ids, weights, latents)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    moved = {name for name, p in demasker.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trained


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@torch.no_grad()
def test_saved_whole_and_read_again_to_the_same_logits(
    folder: Path, token_ids: Tensor, quantization: str, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    demasker = quantized(source, quantization).eval()
    for parameter in demasker.parameters():
        if parameter.requires_grad:
            parameter.normal_(std=0.3)
    demasker.save_pretrained(tmp_path / "own")
    shutil.rmtree(source)  # what was saved needs its source no more
    again = Demasker.from_pretrained(tmp_path / "own").eval()
    latents = torch.randn(4, 3, 6)
    assert torch.equal(again(token_ids, latents), demasker(token_ids, latents))
    assert any(hasattr(module, "quantized_shape") for module in again.modules())
    weights = load_file(str(tmp_path / "own" / "model.safetensors"))
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    assert {path.name for path in (tmp_path / "own" / "adapter").iterdir()} >= {"adapter_model.safetensors"}


@torch.no_grad()
def test_merging_gives_the_same_network_and_unmerging_the_base(folder: Path, token_ids: Tensor) -> None:
    base, demasker = Demasker.from_pretrained(folder).eval(), Demasker.from_pretrained(folder).with_lora(LORA).eval()
    stir(demasker, seed=0)
    adapted = demasker(token_ids)
    assert (adapted - base(token_ids)).abs().max() > 1e-2
    merge_adapter(demasker.network)
    assert not torch.equal(weight_of(demasker), weight_of(base))
    torch.testing.assert_close(demasker(token_ids), adapted, rtol=0, atol=1e-4)
    unmerge_adapter(demasker.network)
    torch.testing.assert_close(weight_of(demasker), weight_of(base), rtol=0, atol=1e-6)
    choose_adapter(demasker.network, None)
    torch.testing.assert_close(demasker(token_ids), base(token_ids), rtol=0, atol=1e-4)


def weight_of(demasker: Demasker) -> Tensor:
    projection = demasker.decoder.layers[0].self_attn.q_proj
    return getattr(projection, "base_layer", projection).weight


def stir(demasker: Demasker, seed: int, name: str = "default") -> None:
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in demasker.named_parameters():
        if f".lora_B.{name}." in key:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def test_several_adapters_on_one_base(folder: Path, token_ids: Tensor, tmp_path: Path) -> None:
    demasker = Demasker.from_pretrained(folder).with_lora(LORA).eval()
    stir(demasker, seed=0)
    first = demasker(token_ids)
    add_adapter(demasker.network, {"r": 2}, "second")
    assert adapter_names(demasker.network) == ["default", "second"]
    stir(demasker, seed=1, name="second")
    second = demasker(token_ids)
    assert (second - first).abs().max() > 1e-2
    choose_adapter(demasker.network, "default")
    assert torch.equal(demasker(token_ids), first)
    save_adapter(demasker.network, tmp_path / "second", {"r": 2}, "second")

    other = Demasker.from_pretrained(folder).with_lora(LORA).eval()
    add_adapter(other.network, {"r": 2}, "second")
    load_adapter(other.network, tmp_path / "second", "second")
    assert torch.equal(other(token_ids), second)
    with pytest.raises(ValueError, match="no adapter 'third'"):
        choose_adapter(other.network, "third")
    with pytest.raises(ValueError, match="already"):
        add_adapter(other.network, LORA)
    with pytest.raises(ValueError, match="does not fit"):
        load_adapter(other.network, tmp_path / "second", "default")
    with pytest.raises(ValueError, match="not there"):
        load_adapter(other.network, tmp_path, "default")


def test_adapters_are_float32_on_a_bfloat16_base(folder: Path) -> None:
    demasker = Demasker.from_pretrained(folder, dtype="bfloat16").with_latents(6, 3).with_lora(LORA)
    kinds = {p.dtype for p in demasker.parameters() if p.requires_grad}
    assert kinds == {torch.float32} and weight_of(demasker).dtype == torch.bfloat16


def test_nothing_to_adapt_is_one_sentence(folder: Path) -> None:
    with pytest.raises(ValueError, match="nothing to adapt"):
        Demasker.from_pretrained(folder).with_lora({"target_modules": ["no_such_proj"]})

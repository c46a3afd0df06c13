"""Tiny checkpoints in published formats, against independent implementations of the published networks."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from crocodil.models import Demasker, RegisterEncoder
from crocodil.models.backbone import FAMILIES, detect_family

VOCAB, WIDTH, HEADS, LAYERS, MLP, LENGTH = 40, 32, 4, 3, 48, 9
LLADA_CONFIG = {
    "model_type": "llada",
    "architectures": ["LLaDAModelLM"],
    "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"},
    "d_model": WIDTH,
    "n_layers": LAYERS,
    "n_heads": HEADS,
    "n_kv_heads": HEADS,
    "mlp_hidden_size": MLP,
    "mlp_ratio": 4,
    "vocab_size": VOCAB,
    "embedding_size": VOCAB,
    "max_sequence_length": 64,
    "rope": True,
    "rope_theta": 500000.0,
    "rope_full_precision": True,
    "rms_norm_eps": 1e-5,
    "layer_norm_type": "rms",
    "block_type": "llama",
    "activation_type": "silu",
    "include_bias": False,
    "include_qkv_bias": False,
    "attention_layer_norm": False,
    "weight_tying": False,
    "alibi": False,
    "mask_token_id": 36,
    "eos_token_id": 31,
    "pad_token_id": 31,
}
DREAM_CONFIG = {
    "model_type": "Dream",
    "architectures": ["DreamModel"],
    "auto_map": {"AutoModel": "modeling_dream.DreamModel"},
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "intermediate_size": MLP,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "mask_token_id": 38,
    "eos_token_id": 33,
}


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, own in halves.items():
        save_file({name: tensors[name].contiguous() for name in own}, str(folder / file))
    index = {"weight_map": {name: file for file, own in halves.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def draw(*shape: int) -> Tensor:
    return torch.randn(shape) / math.sqrt(shape[-1])


def norm_weight() -> Tensor:
    return 1 + 0.3 * torch.randn(WIDTH)


def llada_tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    top = "model.transformer."
    tensors = {f"{top}wte.weight": torch.randn(VOCAB, WIDTH), f"{top}ff_out.weight": draw(VOCAB, WIDTH)}
    tensors[f"{top}ln_f.weight"] = norm_weight()
    for n in range(LAYERS):
        block = f"{top}blocks.{n}."
        tensors |= {f"{block}{name}.weight": draw(WIDTH, WIDTH) for name in ("q_proj", "k_proj", "v_proj", "attn_out")}
        tensors |= {f"{block}{name}.weight": draw(MLP, WIDTH) for name in ("ff_proj", "up_proj")}
        tensors[f"{block}ff_out.weight"] = draw(WIDTH, MLP)
        tensors |= {f"{block}{name}.weight": norm_weight() for name in ("attn_norm", "ff_norm")}
    return tensors


def dream_tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    tensors = {"model.embed_tokens.weight": torch.randn(VOCAB, WIDTH), "lm_head.weight": draw(VOCAB, WIDTH)}
    tensors["model.norm.weight"] = norm_weight()
    for n in range(LAYERS):
        block = f"model.layers.{n}."
        for name, size in (("q", WIDTH), ("k", WIDTH // 2), ("v", WIDTH // 2)):
            tensors[f"{block}self_attn.{name}_proj.weight"] = draw(size, WIDTH)
            tensors[f"{block}self_attn.{name}_proj.bias"] = torch.randn(size)
        tensors[f"{block}self_attn.o_proj.weight"] = draw(WIDTH, WIDTH)
        tensors |= {f"{block}mlp.{name}_proj.weight": draw(MLP, WIDTH) for name in ("gate", "up")}
        tensors[f"{block}mlp.down_proj.weight"] = draw(WIDTH, MLP)
        tensors |= {f"{block}{n}.weight": norm_weight() for n in ("input_layernorm", "post_attention_layernorm")}
    return tensors


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float() if x.dtype == torch.bfloat16 else x
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Half-split rotary positions, (B, heads, L, dim) and (B, L), computed in the dtype of x."""
    half = x.shape[-1] // 2
    frequencies = 1.0 / theta ** (torch.arange(0, half).float() * 2 / x.shape[-1])
    angles = positions[:, None, :, None].float() * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def attend(q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None) -> Tensor:
    mask = None if keys is None else keys[:, None, None, :].bool()
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def published_llada(tensors: dict[str, Tensor], token_ids: Tensor, keys: Tensor | None = None) -> Tensor:
    """LLaDA as its paper and configuration describe it: positions from the row's start, rotation in float32."""
    top = "model.transformer."
    x = tensors[f"{top}wte.weight"][token_ids]
    positions = torch.arange(token_ids.shape[1])[None]
    for n in range(LAYERS):
        block = f"{top}blocks.{n}."
        w = {name[len(block) :].removesuffix(".weight"): t for name, t in tensors.items() if name.startswith(block)}
        h = rms(x, w["attn_norm"], 1e-5)
        q, k, v = (heads(h @ w[name].T, HEADS) for name in ("q_proj", "k_proj", "v_proj"))
        q, k = (rotate(part.float(), positions, 500000.0).to(v.dtype) for part in (q, k))
        x = x + attend(q, k, v, keys) @ w["attn_out"].T
        h = rms(x, w["ff_norm"], 1e-5)
        x = x + (F.silu(h @ w["ff_proj"].T) * (h @ w["up_proj"].T)) @ w["ff_out"].T
    return rms(x, tensors[f"{top}ln_f.weight"], 1e-5) @ tensors[f"{top}ff_out.weight"].T


def published_dream(tensors: dict[str, Tensor], token_ids: Tensor, keys: Tensor | None = None) -> Tensor:
    """Dream: Qwen2 attending both ways, positions without the padding, logits moved one to the right."""
    x = tensors["model.embed_tokens.weight"][token_ids]
    positions = torch.arange(token_ids.shape[1])[None] if keys is None else (keys.cumsum(1) - 1).clamp(min=0)
    for n in range(LAYERS):
        block = f"model.layers.{n}."
        h = rms(x, tensors[f"{block}input_layernorm.weight"], 1e-6)
        maps = [f"{block}self_attn.{name}_proj." for name in "qkv"]
        projected = (h @ tensors[f"{name}weight"].T + tensors[f"{name}bias"] for name in maps)
        q, k, v = (heads(part, count) for part, count in zip(projected, (HEADS, 2, 2), strict=True))
        q, k = rotate(q, positions, 1000000.0), rotate(k, positions, 1000000.0)
        k, v = (part.repeat_interleave(HEADS // 2, dim=1) for part in (k, v))
        x = x + attend(q, k, v, keys) @ tensors[f"{block}self_attn.o_proj.weight"].T
        h = rms(x, tensors[f"{block}post_attention_layernorm.weight"], 1e-6)
        gate, up = (h @ tensors[f"{block}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ tensors[f"{block}mlp.down_proj.weight"].T
    logits = rms(x, tensors["model.norm.weight"], 1e-6) @ tensors["lm_head.weight"].T
    return torch.cat([logits[:, :1], logits[:, :-1]], 1)


KINDS: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Tensor]], Callable[..., Tensor], int, int]] = {
    "llada": (LLADA_CONFIG, llada_tensors, published_llada, 36, 31),
    "dream": (DREAM_CONFIG, dream_tensors, published_dream, 38, 33),
}


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(kind: str, tmp_path: Path) -> Path:
    config, tensors, *_ = KINDS[kind]
    return write(tmp_path / kind, config, tensors())


@pytest.fixture
def token_ids() -> Tensor:
    return torch.randint(0, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_agrees_with_the_published_network(kind: str, folder: Path, token_ids: Tensor) -> None:
    _, tensors, published, mask, eos = KINDS[kind]
    demasker = Demasker.from_pretrained(folder).eval()
    assert (demasker.family, demasker.mask_token_id, demasker.eos_token_id) == (kind, mask, eos)
    torch.testing.assert_close(demasker(token_ids), published(tensors(), token_ids), rtol=0, atol=1e-5)


@torch.no_grad()
def test_padding_on_the_left_is_counted_as_the_family_counts_it(kind: str, folder: Path, token_ids: Tensor) -> None:
    _, tensors, published, *_ = KINDS[kind]
    keys = torch.ones_like(token_ids)
    keys[1, :3] = 0
    logits = Demasker.from_pretrained(folder).eval()(token_ids, attention_mask=keys)
    expected = published(tensors(), token_ids, keys)
    real = keys.bool()
    if kind == "dream":  # the first real token reads what stands before it
        real[1, 3] = False
    torch.testing.assert_close(logits[real], expected[real], rtol=0, atol=1e-5)
    assert (logits - published(tensors(), token_ids))[1, 4:].abs().max() > 1e-3


@torch.no_grad()
def test_bfloat16_llada_rotates_in_float32(tmp_path: Path, token_ids: Tensor) -> None:
    narrow = {name: tensor.bfloat16() for name, tensor in llada_tensors().items()}
    folder = write(tmp_path / "llada", LLADA_CONFIG, narrow)
    logits = Demasker.from_pretrained(folder).eval()(token_ids)
    assert logits.dtype == torch.bfloat16
    assert torch.equal(logits, published_llada(narrow, token_ids))
    plain = Demasker.from_pretrained(folder).eval()
    plain.decoder.rotary_emb.full_precision = False
    assert not torch.equal(plain(token_ids), logits)


@torch.no_grad()
def test_shifted_logits_at_chosen_positions(kind: str, folder: Path, token_ids: Tensor) -> None:
    demasker = Demasker.from_pretrained(folder).eval()
    positions = torch.tensor([[0, 4], [8, 1], [2, 2]])
    rows = torch.arange(3)[:, None]
    chosen = demasker(token_ids, positions=positions)
    torch.testing.assert_close(chosen, demasker(token_ids)[rows, positions], rtol=0, atol=1e-6)
    is_masked = torch.zeros_like(token_ids, dtype=torch.bool)
    is_masked[rows, positions] = True
    nats, _ = demasker.nats(token_ids, token_ids, is_masked)
    expected = F.cross_entropy(demasker(token_ids).transpose(1, 2), token_ids, reduction="none") * is_masked
    torch.testing.assert_close(nats, expected, rtol=1e-5, atol=1e-6)
    weights = torch.rand(3, LENGTH) * is_masked
    loss, _ = demasker.weighted_loss(token_ids, token_ids, weights)
    torch.testing.assert_close(loss, (expected * weights).sum(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@torch.no_grad()
def test_saved_and_read_again_bit_for_bit(folder: Path, tmp_path: Path, token_ids: Tensor, dtype: str | None) -> None:
    demasker = Demasker.from_pretrained(folder, dtype=dtype).eval()
    demasker.save_pretrained(tmp_path / "own")
    shutil.rmtree(folder)
    again = Demasker.from_pretrained(tmp_path / "own").eval()
    assert again.to_config() == demasker.to_config()
    for name, value in demasker.state_dict().items():
        assert again.state_dict()[name].dtype == value.dtype and torch.equal(again.state_dict()[name], value)
    assert torch.equal(again(token_ids), demasker(token_ids))
    assert not list((tmp_path / "own").glob("*.bin")) and not list((tmp_path / "own").glob("*.py"))


def test_a_renamed_or_dropped_tensor_is_refused_by_name(kind: str, folder: Path) -> None:
    path = folder / "model-00001-of-00002.safetensors"
    tensors = load_file(str(path))
    victim = next(name for name in tensors if "q_proj" in name or "ff_proj" in name or "gate_proj" in name)
    save_file({name: t for name, t in tensors.items() if name != victim}, str(path))
    with pytest.raises(ValueError, match=r"missing model\.layers\.\d\.\S+\.weight"):
        Demasker.from_pretrained(folder)
    save_file({name.replace(victim, "stranger.weight"): t for name, t in tensors.items()}, str(path))
    with pytest.raises(ValueError, match=r"left over stranger\.weight"):
        Demasker.from_pretrained(folder)
    save_file(tensors | {victim: tensors[victim][:-1]}, str(path))
    with pytest.raises(ValueError, match="has the shape"):
        Demasker.from_pretrained(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"model-00001-of-00002\.safetensors"):
        Demasker.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alibi": True}, "alibi"),
        ({"block_type": "sequential"}, "block_type"),
        ({"d_model": None}, "d_model"),
        ({"n_experts": 8}, "mixture of experts"),
        ({"model_type": "unheard_of"}, "unheard_of"),
    ],
)
def test_another_network_than_the_record_describes_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = write(tmp_path / "odd", LLADA_CONFIG | changes, llada_tensors())
    with pytest.raises(ValueError, match=message):
        Demasker.from_pretrained(folder)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        Demasker.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="family must be one of"):
        Demasker.from_pretrained(write(tmp_path / "a", LLADA_CONFIG, llada_tensors()), family="llama9")
    with pytest.raises(ValueError, match="dtype must be"):
        Demasker.from_pretrained(tmp_path / "a", dtype="float99")
    with pytest.raises(ValueError, match="quantization must be"):
        Demasker.from_pretrained(tmp_path / "a", quantization="int3")


@pytest.mark.parametrize(
    ("published", "family"),
    [
        (LLADA_CONFIG, "llada"),
        (LLADA_CONFIG | {"mask_token_id": 5, "eos_token_id": 2}, "illada"),
        (DREAM_CONFIG, "dream"),
        ({"model_type": "qwen3"}, "decoder"),
        ({"model_type": "llama"}, "decoder"),
    ],
)
def test_families_are_told_by_their_configuration(published: dict[str, Any], family: str) -> None:
    assert detect_family(published) == family


def test_ids_of_the_published_checkpoints() -> None:
    ids = {name: (family.mask_token_id, family.eos_token_id) for name, family in FAMILIES.items()}
    assert ids["llada"] == (126336, 126081) and ids["illada"] == (5, 2) and ids["dream"] == (151666, 151643)


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_a_plain_decoder_gets_a_mask_token_of_its_own(tmp_path: Path, token_ids: Tensor, tied: bool) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS, "num_key_value_heads": 2}
    config = Qwen3Config(
        vocab_size=VOCAB, intermediate_size=MLP, head_dim=8, eos_token_id=7, tie_word_embeddings=tied, **sizes
    )
    stock = Qwen3ForCausalLM(config).eval()
    stock.save_pretrained(tmp_path / "stock")
    demasker = Demasker.from_pretrained(tmp_path / "stock").eval()
    assert (demasker.mask_token_id, demasker.vocab_size, demasker.eos_token_id) == (VOCAB, VOCAB + 1, 7)
    stock.config.is_causal = False
    expected = stock(token_ids, use_cache=False).logits
    torch.testing.assert_close(demasker(token_ids)[..., :VOCAB], expected, rtol=0, atol=1e-5)
    demasker.save_pretrained(tmp_path / "own")
    again = Demasker.from_pretrained(tmp_path / "own").eval()
    assert torch.equal(again(token_ids), demasker(token_ids))


@torch.no_grad()
def test_a_tokenizer_tells_its_mask_token(tmp_path: Path) -> None:
    config = DREAM_CONFIG | {"model_type": "qwen2"}
    del config["mask_token_id"]
    folder = write(tmp_path / "a2d", config, dream_tensors())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"mask_token": "<|mask|>", "added_tokens_decoder": {"37": {"content": "<|mask|>"}}})
    )
    assert Demasker.from_pretrained(folder).mask_token_id == 37
    assert Demasker.from_pretrained(folder, family="open-dcoder").conventions.shift_logits


@torch.no_grad()
def test_an_encoder_reads_checkpoints_with_and_without_a_head(folder: Path, token_ids: Tensor) -> None:
    demasker = Demasker.from_pretrained(folder).eval()
    encoder = RegisterEncoder.from_pretrained(folder, num_registers=4).eval()
    assert encoder.latent_dim == WIDTH and encoder(token_ids).shape == (3, 4, WIDTH)
    for name, value in encoder.network.state_dict().items():
        assert torch.equal(value, demasker.decoder.state_dict()[name])
    encoder.save_pretrained(folder / "own")
    assert torch.equal(RegisterEncoder.from_pretrained(folder / "own").eval()(token_ids), encoder(token_ids))
    with pytest.raises(ValueError, match="num_registers"):
        RegisterEncoder.from_pretrained(folder)


def test_gates_need_the_attention_that_knows_them(folder: Path) -> None:
    demasker = Demasker.from_pretrained(folder)
    demasker.network.config._attn_implementation = "eager"
    with pytest.raises(ValueError, match="register_gates need"):
        demasker.with_latents(5, 4, register_gates=True)


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_new_registers_leave_a_pretrained_network_as_it_is(folder: Path, token_ids: Tensor, masked: bool) -> None:
    base = Demasker.from_pretrained(folder).double().eval()
    demasker = Demasker.from_pretrained(folder).with_latents(5, 4, 2.0, register_gates=True).double().eval()
    latents = 10 * torch.randn(3, 4, 5).double()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]).bool() if masked else None
    torch.testing.assert_close(demasker(token_ids, latents, latent_mask=mask), base(token_ids), rtol=0, atol=1e-12)
    for name, parameter in demasker.named_parameters():
        if name.endswith("register_gate"):
            parameter += 0.5
    moved = demasker(token_ids, latents, latent_mask=mask) - base(token_ids)
    assert moved[0].abs().max() > 1e-3
    if masked:
        torch.testing.assert_close(moved[2], torch.zeros_like(moved[2]), rtol=0, atol=1e-12)


def test_the_gates_learn_from_zero_and_open_gates_are_a_plain_prefix(folder: Path, token_ids: Tensor) -> None:
    torch.manual_seed(0)
    gated = Demasker.from_pretrained(folder).with_latents(5, 4, register_gates=True).double()
    latents = torch.randn(3, 4, 5).double()
    gated(token_ids, latents).square().sum().backward()
    gradients = [p.grad for name, p in gated.named_parameters() if name.endswith("register_gate")]
    assert len(gradients) == LAYERS and all(gradient.abs().min() > 0 for gradient in gradients)
    torch.manual_seed(0)
    prefix = Demasker.from_pretrained(folder).with_latents(5, 4).double()
    with torch.no_grad():
        for name, parameter in gated.named_parameters():
            if name.endswith("register_gate"):
                parameter.fill_(1.0)
        torch.testing.assert_close(gated(token_ids, latents), prefix(token_ids, latents), rtol=0, atol=1e-10)

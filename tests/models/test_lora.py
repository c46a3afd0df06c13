import pytest
import torch

from crocodil.models import Demasker
from crocodil.models.folders import load_network, save_network

NETWORK = {
    "model_type": "llama",
    "vocab_size": 12,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}


def build(lora: dict | None = None) -> Demasker:
    torch.manual_seed(0)
    return Demasker(NETWORK, mask_token_id=2, eos_token_id=0, latent_dim=4, num_registers=3, lora=lora)


def stir_adapters(demasker: Demasker) -> None:
    with torch.no_grad():
        for name, parameter in demasker.named_parameters():
            if ".lora_B" in name:
                parameter.normal_()


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(3, 12, (2, 8)), torch.randn(2, 3, 4)


def test_fresh_adapters_change_nothing(inputs):
    torch.testing.assert_close(build({"r": 2})(*inputs), build()(*inputs), rtol=0, atol=0)


def test_only_adapters_and_register_path_are_trained():
    trained = {name for name, parameter in build({"r": 2}).named_parameters() if parameter.requires_grad}
    assert {name for name in trained if ".lora_" not in name} == {
        "register_proj.weight",
        "register_proj.bias",
        "register_embedding",
    }
    assert sum(".lora_" in name for name in trained) == 2 * 7 * 2  # A and B of seven projections in two blocks
    assert not any("lm_head" in name for name in trained)


def test_a_training_step_moves_the_adapters_alone(inputs):
    demasker = build({"r": 2})
    before = {name: value.clone() for name, value in demasker.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in demasker.parameters() if p.requires_grad], lr=1.0)
    demasker(*inputs).square().mean().backward()
    optimizer.step()
    moved = {name for name, value in demasker.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all(".lora_" in name or name.startswith("register_") for name in moved)


def test_the_adapter_is_saved_in_the_layout_of_peft(tmp_path, inputs):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    demasker = build({"r": 2})
    stir_adapters(demasker)
    save_network(demasker, tmp_path)
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }

    plain = AutoModelForCausalLM.from_config(build().network.config)
    plain.load_state_dict(build().network.state_dict())
    adapted = PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))
    token_ids = inputs[0]
    expected = demasker(token_ids)
    torch.testing.assert_close(adapted(input_ids=token_ids, use_cache=False).logits, expected, rtol=1e-5, atol=1e-6)

    reloaded = load_network(Demasker, tmp_path)
    torch.testing.assert_close(reloaded(*inputs), demasker(*inputs), rtol=0, atol=0)


def test_unknown_setting_is_refused():
    with pytest.raises(ValueError, match="LoRA has no setting rank"):
        build({"rank": 2})

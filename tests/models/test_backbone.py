import pytest
import torch
from transformers import AutoConfig, GPT2Config, GPT2Model, LlamaConfig, LlamaModel

from crocodil.models.backbone import network_config
from crocodil.models.positions import (
    TwoAxisRotary,
    add_register_axis,
    document_positions,
    join_masks,
    positions_with_registers,
    text_positions,
    visible_keys,
)

SETTINGS = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}


def tiny_llama() -> LlamaModel:
    return LlamaModel(LlamaConfig(**SETTINGS, vocab_size=12, bos_token_id=None, eos_token_id=None))


def test_text_positions_rotate_bitwise_as_in_the_plain_network() -> None:
    plain = tiny_llama().rotary_emb
    x, positions = torch.zeros(1), torch.arange(0, 50)[None]
    for ours, theirs in zip(TwoAxisRotary(plain)(x, positions), plain(x, positions), strict=True):
        assert torch.equal(ours, theirs)


def test_registers_rotate_odd_bands_only() -> None:
    plain = tiny_llama().rotary_emb
    cos, sin = TwoAxisRotary(plain)(torch.zeros(1), torch.tensor([[-3, -1]]))
    assert cos.shape == (1, 2, 8)
    for row, position in enumerate([-3, -1]):
        for dim in range(8):
            band = dim % 4  # transformers puts the two coordinates of a band half a head apart
            angle = torch.tensor(position * 10000.0 ** (-band / 4)) if band % 2 else torch.tensor(0.0)
            torch.testing.assert_close(cos[0, row, dim], angle.cos())
            torch.testing.assert_close(sin[0, row, dim], angle.sin())


def test_rotary_keeps_the_dtype_of_its_input() -> None:
    cos, sin = TwoAxisRotary(tiny_llama().rotary_emb)(torch.zeros(1, dtype=torch.float64), torch.tensor([[-1, 0]]))
    assert cos.dtype == sin.dtype == torch.float64


def test_the_register_axis_is_added_once_and_only_to_rotary_networks() -> None:
    network = tiny_llama()
    assert add_register_axis(network)
    rotary = network.rotary_emb
    assert add_register_axis(network)
    assert network.rotary_emb is rotary
    assert isinstance(rotary, TwoAxisRotary)
    assert not add_register_axis(GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=12)))


def test_registers_stand_directly_before_the_text() -> None:
    device = torch.device("cpu")
    assert positions_with_registers(3, text_positions(2, device)).tolist() == [[-3, -2, -1, 0, 1]]
    packed = torch.tensor([[0, 1, 0, 1]])
    assert positions_with_registers(2, packed, 2).tolist() == [[-2, -1, -2, -1, 0, 1, 0, 1]]
    assert positions_with_registers(0, text_positions(2, device)).tolist() == [[0, 1]]


def test_joined_masks() -> None:
    first, second = torch.tensor([[1, 0], [1, 1]]), torch.tensor([[True], [False]])
    assert join_masks(None, None, 2, (2, 1)) is None
    for mask, expected in [
        (join_masks(first, second, 2, (2, 1)), [[True, False, True], [True, True, False]]),
        (join_masks(first, None, 2, (2, 1)), [[True, False, True], [True, True, True]]),
        (join_masks(None, second, 2, (2, 1)), [[True, True, True], [True, True, False]]),
    ]:
        assert mask is not None
        assert mask.dtype == torch.bool
        assert mask.tolist() == expected


def test_positions_begin_anew_with_each_document() -> None:
    ids = torch.tensor([[1, 1, 1, 2, 3, 3, 0, 0], [0, 1, 1, 2, 2, 2, 2, 2]])
    assert document_positions(ids).tolist() == [[0, 1, 2, 0, 0, 1, 0, 1], [0, 0, 1, 0, 1, 2, 3, 4]]


def test_registers_and_text_of_a_document_see_one_another_alone() -> None:
    """Two registers for each of two documents, then three tokens; the first register of the second is hidden."""
    ids, seen = torch.tensor([[1, 2, 0]]), torch.tensor([[True, True, False, True]])
    visible = visible_keys(ids, (1, 3), num_registers=2, num_documents=2, register_mask=seen)
    assert visible.shape == (1, 1, 7, 7)
    keys = [row.nonzero().flatten().tolist() for row in visible[0, 0]]
    assert keys == [[0, 1, 4], [0, 1, 4], [2, 3, 5], [3, 5], [0, 1, 4], [3, 5], [6]]
    assert visible_keys(ids[:, :2], (1, 2), 0, 2).tolist() == [[[[True, False], [False, True]]]]
    assert visible_keys(None, (1, 3), 2) is None
    assert visible_keys(ids, (1, 3), 1).tolist() == [[[[True, True, True, False]]]]


def test_network_config_is_bidirectional_without_a_cache() -> None:
    for settings in ({"model_type": "llama", **SETTINGS}, LlamaConfig(**SETTINGS)):
        config = network_config(settings)
        assert config.hidden_size == 16
        assert config.is_causal is False
        assert config.use_cache is False


def test_a_ready_configuration_is_taken_as_it_is() -> None:
    config = AutoConfig.for_model("qwen3", hidden_size=24)
    assert network_config(config) is config


def test_settings_are_left_alone() -> None:
    settings = {"model_type": "llama", **SETTINGS}
    network_config(settings)
    assert settings == {"model_type": "llama", **SETTINGS}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 16}, "model_type"),
        ({"model_type": "lama", "hidden_size": 16}, "lama"),
        (
            {"model_type": "llama", "zzz": 2, "hiden_size": 16},
            "a llama network .* hiden_size, zzz; .* mean hidden_size",
        ),
        ({"model_type": "llama", "zzz": 2}, "a llama network has no setting zzz; see"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        network_config(settings)

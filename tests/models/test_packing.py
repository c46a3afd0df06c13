"""Documents packed into rows against the same documents one by one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from crocodil.diffusion.documents import NumberedDocuments
from crocodil.models import Demasker, RegisterEncoder
from crocodil.models.attention import network_mask
from crocodil.models.key_values import KeyValues
from crocodil.models.positions import visible_keys

MASK, K, D = 11, 4, 3
DOCUMENT_IDS = torch.tensor([[1, 1, 1, 2, 2, 3, 3, 3, 3, 0, 0], [1, 1, 1, 1, 1, 2, 0, 0, 0, 0, 0], [1] * 9 + [2] * 2])
DOCUMENTS = NumberedDocuments(DOCUMENT_IDS)
GENERATOR = torch.Generator().manual_seed(0)
TOKEN_IDS = torch.randint(1, 12, DOCUMENT_IDS.shape, generator=GENERATOR)
LATENTS = torch.randn(len(DOCUMENTS), K, D, generator=GENERATOR, dtype=torch.float64)
HEARD = torch.arange(K) < torch.tensor([4, 2, 0, 1, 3, 4, 0])[:, None]
PLACES = [(row, DOCUMENT_IDS[row] == n) for row, n in zip(DOCUMENTS.row, DOCUMENTS.number, strict=True)]

QWEN3 = {"model_type": "qwen3", "head_dim": 8, "num_key_value_heads": 1}
NETWORKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "spread": ({}, {"register_spacing": 2.5}),
    "gated": ({}, {"register_gates": True}),
    "blind": ({}, {"registers_read_text": False}),
    "blind and gated": ({}, {"register_gates": True, "registers_read_text": False}),
    "llada": ({}, {"family": "llada"}),
    "dream": ({}, {"family": "dream", "register_gates": True}),
    "qwen3": (QWEN3, {"register_gates": True}),
    "eager": ({"attn_implementation": "eager"}, {}),
}
GIVEN: dict[str, dict[str, Tensor]] = {
    "text": {},
    "latents": {"latents": LATENTS},
    "some latents": {"latents": LATENTS, "latent_mask": HEARD},
}
each_network = pytest.mark.parametrize("name", NETWORKS)
each_given = pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)


@pytest.fixture(scope="module")
def demaskers(make_demasker: Callable) -> Callable[[str], Demasker]:
    @torch.no_grad()
    def make(name: str) -> Demasker:
        network, settings = NETWORKS[name]
        plain = make_demasker(**network)
        demasker = Demasker(**plain.to_config() | settings).double().eval()
        if "attn_implementation" in network:
            demasker.decoder.set_attn_implementation(network["attn_implementation"])
        demasker.load_state_dict(plain.state_dict(), strict=False)
        for weight_name, weight in demasker.named_parameters():
            if weight_name.endswith("register_gate"):
                weight.copy_(torch.tensor([0.3, 0.9]))
        return demasker

    return make


def in_rows(given: dict[str, Tensor]) -> dict[str, Any]:
    """What is given for documents, as packed rows take it."""
    return {name: DOCUMENTS.to_rows(value) for name, value in given.items()} | DOCUMENTS.attention


def alone(given: dict[str, Tensor], document: int) -> dict[str, Any]:
    return {name: value[document : document + 1] for name, value in given.items()}


def assert_same(value: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)


@each_network
@each_given
@torch.no_grad()
def test_logits_are_those_of_each_document_alone(demaskers: Callable, name: str, given: dict[str, Tensor]) -> None:
    demasker = demaskers(name)
    logits = demasker(TOKEN_IDS, **in_rows(given))
    assert logits.isfinite().all()
    for i, place in enumerate(PLACES):
        tolerance = 1e-5 if name == "eager" else 1e-10  # its softmax is float32
        assert_same(logits[place], demasker(TOKEN_IDS[place][None], **alone(given, i))[0], tolerance)
    assert not torch.allclose(logits[0, 3:5], demasker(TOKEN_IDS)[0, 3:5], atol=1e-3)


@pytest.mark.parametrize("name", ["plain", "blind and gated", "dream", "qwen3"])
def test_losses_and_gradients_are_sums_over_documents_alone(demaskers: Callable, name: str) -> None:
    weights = torch.rand(DOCUMENT_IDS.shape, generator=GENERATOR) * (DOCUMENT_IDS > 0)
    weights[0, 1] = weights[2, 5] = 0
    packed, single = demaskers(name), demaskers(name)
    for network in (packed, single):
        network.register_embedding.requires_grad_(True)
    z, lone = (LATENTS.clone().requires_grad_() for _ in range(2))
    given = in_rows({"latents": z, "latent_mask": HEARD})
    loss, nats = packed.weighted_loss(TOKEN_IDS, TOKEN_IDS, weights, **given)
    assert torch.equal(nats != 0, weights != 0)
    loss.backward()
    total = torch.zeros((), dtype=torch.float64)
    for i, place in enumerate(PLACES):
        ids, w = TOKEN_IDS[place][None], weights[place][None]
        part, expected = single.weighted_loss(ids, ids, w, **alone({"latents": lone, "latent_mask": HEARD}, i))
        assert_same(nats[place], expected[0])
        total = total + part
    total.backward()
    assert_same(loss, total)
    assert_same(loss, (nats * weights).sum())
    assert z.grad is not None and z.grad[HEARD].abs().min() > 0
    assert_same(z.grad, lone.grad)
    for (weight_name, one), other in zip(packed.named_parameters(), single.parameters(), strict=True):
        assert one.grad is not None, weight_name
        assert_same(one.grad, other.grad)


@each_network
def test_a_document_has_no_influence_on_another(demaskers: Callable, name: str) -> None:
    demasker = demaskers(name)
    changed_ids, changed, touched = TOKEN_IDS.clone(), LATENTS.clone(), DOCUMENTS.number == 2
    is_touched = DOCUMENT_IDS == 2
    changed_ids[is_touched | (DOCUMENT_IDS == 0)] = 3
    changed[touched] = 5.0
    with torch.no_grad():
        logits = demasker(TOKEN_IDS, **in_rows({"latents": LATENTS}))
        other = demasker(changed_ids, **in_rows({"latents": changed}))
    rest = ~is_touched & (DOCUMENT_IDS > 0)
    assert torch.equal(logits[rest], other[rest])
    assert (logits[is_touched] - other[is_touched]).abs().amax(-1).min() > 1e-4
    z = LATENTS.clone().requires_grad_()
    demasker(TOKEN_IDS, **in_rows({"latents": z}))[rest].square().sum().backward()
    assert (z.grad[touched] == 0).all() and (z.grad[~touched].abs() > 0).all()


@torch.no_grad()
def test_latents_of_absent_documents_and_more_padding_have_no_influence(demaskers: Callable) -> None:
    demasker, given = demaskers("blind and gated"), in_rows({"latents": LATENTS})
    logits = demasker(TOKEN_IDS, **given)
    given["latents"][1:, 2] = 100.0
    is_text = DOCUMENT_IDS > 0
    assert torch.equal(demasker(TOKEN_IDS, **given)[is_text], logits[is_text])
    more = torch.nn.functional.pad(given["attention_mask"], (0, 9))
    wide = demasker(torch.nn.functional.pad(TOKEN_IDS, (0, 9), value=7), **given | {"attention_mask": more})
    assert_same(wide[:, :11][is_text], logits[is_text])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@torch.no_grad()
def test_nothing_becomes_nan(demaskers: Callable, dtype: torch.dtype, autocast: bool) -> None:
    """Rows without a document, documents without a register and padding have queries that see no key of their own."""
    demasker = demaskers("blind and gated").to(dtype)
    ids = torch.cat([DOCUMENT_IDS, torch.zeros(1, 11, dtype=torch.int64)])
    given = {"latents": torch.randn(4, 3, K, D), "latent_mask": torch.zeros(4, 3, K, dtype=torch.bool)}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = demasker(torch.ones_like(ids), **given, attention_mask=ids, num_documents=3)
        padded = demasker(torch.ones_like(ids), attention_mask=ids.clamp(max=1))
        visible = visible_keys(ids, (4, 11), K, 3, torch.zeros(4, 12, dtype=torch.bool))
        mask = network_mask(demasker.decoder, visible, dtype)
    assert logits.isfinite().all() and padded.isfinite().all()
    assert mask.dtype == (torch.bfloat16 if autocast else dtype) and mask.isfinite().all()


def test_packed_rows_are_refused_where_they_are_not_possible(demaskers: Callable, make_demasker: Callable) -> None:
    demasker, given = demaskers("plain"), in_rows({"latents": LATENTS})
    with pytest.raises(ValueError, match=r"latents must be \(B, 3, 1 to 4, 3\), got \(7, 4, 3\)"):
        demasker(TOKEN_IDS, **given | {"latents": LATENTS})
    with pytest.raises(ValueError, match=r"latents must be \(B, 1 to 4, 3\), got \(3, 3, 4, 3\)"):
        demasker(TOKEN_IDS, given["latents"])
    with pytest.raises(ValueError, match="with 3 documents in a row attention_mask must tell"):
        demasker(TOKEN_IDS, num_documents=3)
    with pytest.raises(ValueError, match="a cache keeps one document a row, got num_documents=3"):
        demasker(TOKEN_IDS, **given, cache=KeyValues())
    local = make_demasker(model_type="qwen2", layer_types=["full_attention", "sliding_attention"], sliding_window=4)
    with pytest.raises(ValueError, match=r"packed rows need full attention .* with sliding_attention layers"):
        local(TOKEN_IDS, **given)


ENCODERS: dict[str, dict[str, Any]] = {"llama": {}, "qwen3": QWEN3}


@pytest.mark.parametrize("backbone", ENCODERS.values(), ids=ENCODERS)
def test_registers_read_their_own_document(make_encoder: Callable, backbone: dict[str, Any]) -> None:
    packed, single = make_encoder(**backbone), make_encoder(**backbone)
    packed.network.rotary_emb.register_spacing = single.network.rotary_emb.register_spacing = 1.5
    latents = DOCUMENTS.from_rows(packed(TOKEN_IDS, **DOCUMENTS.attention))
    expected = torch.cat([single(TOKEN_IDS[place][None]) for place in PLACES])
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)
    direction = torch.randn(latents.shape, generator=GENERATOR)
    (latents * direction).sum().backward()
    (expected * direction).sum().backward()
    for one, other in zip(packed.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-5)
    changed = torch.where(DOCUMENT_IDS == 2, 3, torch.where(DOCUMENT_IDS == 0, 9, TOKEN_IDS))
    with torch.no_grad():
        differ = (DOCUMENTS.from_rows(packed(changed, **DOCUMENTS.attention)) != latents).flatten(1).any(1)
    assert torch.equal(differ, DOCUMENTS.number == 2)


@pytest.mark.parametrize("backbone", [*ENCODERS.values(), {"model_type": "bert"}], ids=[*ENCODERS, "bert"])
@torch.no_grad()
def test_the_width_of_padding_does_not_matter(make_encoder: Callable, backbone: dict[str, Any]) -> None:
    encoder, ids = make_encoder(**backbone), DOCUMENT_IDS.where(DOCUMENT_IDS == 1, 0)
    latents = encoder(TOKEN_IDS, ids)
    for row in range(3):
        text = TOKEN_IDS[row][ids[row] == 1][None]
        torch.testing.assert_close(latents[row], encoder(text)[0], rtol=0, atol=1e-5)


def test_encoders_that_cannot_tell_documents_apart_refuse_packed_rows(make_encoder: Callable) -> None:
    with pytest.raises(ValueError, match="a bert encoder has no rotary positions and reads one document a row"):
        make_encoder(model_type="bert")(TOKEN_IDS, **DOCUMENTS.attention)
    encoder: RegisterEncoder = make_encoder()
    encoder.translate = lambda token_ids: (token_ids, token_ids > 0)
    with pytest.raises(ValueError, match="a tokenizer of its own reads one document a row"):
        encoder(TOKEN_IDS, **DOCUMENTS.attention)

import ast
import io
import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from crocodil.data.codec import TextCodec, byte_level_bpe
from crocodil.data.vocabulary import Vocabulary

CANONICAL_TEXT = "def f(v0, v1=None):\n    if v0.a0 is None:\n        return g0(v1, a1=2)\n    return v0\n"
UNICODE = "naïve 漢字 \U0001f40a\r\n\ttabs  and   spaces . , ' [MASK] [EOS] \x00\x7f\u2028\ufeff é"


@pytest.fixture(scope="module")
def bpe() -> TextCodec:
    return byte_level_bpe(["def area(shape): return shape.width * shape.height\n" * 3], vocab_size=280)


@pytest.fixture(params=["canonical", "plain"])
def codec(request: pytest.FixtureRequest, bpe: TextCodec) -> TextCodec:
    return TextCodec.canonical() if request.param == "canonical" else bpe


def test_special_tokens_are_the_shared_ones(codec: TextCodec) -> None:
    vocabulary = codec.vocabulary
    assert vocabulary == Vocabulary(vocabulary.size, pad_token_id=0, bos_token_id=1, eos_token_id=0, mask_token_id=2)
    assert codec.tokenizer.unk_token_id == 3
    assert vocabulary.size == (152 if codec.text_format == "canonical" else 280)


def test_canonical_text_round_trip() -> None:
    codec = TextCodec.canonical()
    assert codec.decode(codec.encode(CANONICAL_TEXT)) == CANONICAL_TEXT
    prefix = "def f(v0, v1):\n    return v0"
    assert codec.decode(codec.encode(prefix)) == prefix


def test_canonical_encode_names_the_token_outside_the_vocabulary() -> None:
    with pytest.raises(ValueError, match="'width'"):
        TextCodec.canonical().encode("def f(v0):\n    return v0.width\n")


def test_bpe_survives_any_unicode(bpe: TextCodec) -> None:
    """All characters but surrogates, special tokens spelled out in the text included."""
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000)]))
    for text in (UNICODE, everything):
        token_ids = bpe.encode(text)
        assert min(token_ids) >= 4
        assert bpe.decode(token_ids) == text


def test_bpe_has_learned_merges(bpe: TextCodec) -> None:
    assert len(bpe.encode(" shape")) == 1


def test_decode_drops_bos_and_stops_at_eos(codec: TextCodec) -> None:
    token_ids = codec.encode("return v0")
    assert codec.decode([1, *token_ids, 0, *token_ids, 0]) == "return v0"
    assert codec.decode(torch.tensor([1, *token_ids, 0])) == "return v0"
    assert codec.decode([1, 0, 0]) == ""


def test_masks_and_foreign_ids_stay_visible(codec: TextCodec) -> None:
    text = codec.decode([*codec.encode("return"), 2, 3, codec.vocabulary.size, -1])
    assert text.count("[MASK]") == 1
    assert text.count("[UNK]") == 3


def test_a_canonical_mask_never_parses() -> None:
    codec = TextCodec.canonical()
    for place in range(len(codec.encode(CANONICAL_TEXT))):
        token_ids = codec.encode(CANONICAL_TEXT)
        token_ids[place] = codec.vocabulary.mask_token_id
        with pytest.raises(SyntaxError):
            ast.parse(codec.decode(token_ids))


def assert_equal(codec: TextCodec, other: TextCodec) -> None:
    text = CANONICAL_TEXT if codec.text_format == "canonical" else UNICODE
    assert other.text_format == codec.text_format
    assert other.vocabulary == codec.vocabulary
    assert other.encode(text) == codec.encode(text)
    assert other.decode(codec.encode(text)) == text


def test_pieces_of_text_are_the_text(bpe: TextCodec) -> None:
    text, special = "def f(x):\n    return x + 1\n", bpe.vocabulary
    pieces = bpe.pieces([special.bos_token_id, *bpe.encode(text), special.mask_token_id, special.eos_token_id])
    assert pieces[0] == pieces[-1] == pieces[-2] == ""
    assert "".join(pieces) == text


def test_pieces_of_canonical_tokens() -> None:
    codec = TextCodec.canonical()
    ids = codec.encode("def f(v0):\n    return v0\nf")
    assert codec.pieces(ids) == [
        *"def  f  (  v0  )  : ".replace("  ", " |").split("|"),
        "\n",
        "⇥ ",
        "return ",
        "v0 ",
        "\n",
        "⇤ ",
        "f ",
    ]


def test_saved_codec_is_the_same(codec: TextCodec, tmp_path: Path) -> None:
    codec.save_pretrained(tmp_path / "codec")
    assert json.loads((tmp_path / "codec" / "codec.json").read_text()) == {"text_format": codec.text_format}
    assert {path.suffix for path in (tmp_path / "codec").iterdir()} == {".json"}
    assert_equal(codec, TextCodec.from_pretrained(tmp_path / "codec"))


def test_state_survives_a_weights_only_checkpoint(codec: TextCodec) -> None:
    file = io.BytesIO()
    torch.save({"codec": codec.to_state()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)["codec"]
    assert all(type(value) is str for value in state.values())
    assert_equal(codec, TextCodec.from_state(state))


def test_folder_without_codec_is_a_value_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"codec\.json"):
        TextCodec.from_pretrained(tmp_path)


def test_tokenizer_without_mask_is_a_value_error(bpe: TextCodec) -> None:
    backend = bpe.tokenizer.backend_tokenizer
    with pytest.raises(ValueError, match="must have a mask_token"):
        TextCodec(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[EOS]", bos_token="[BOS]"))


def test_unknown_format_is_a_value_error(bpe: TextCodec) -> None:
    with pytest.raises(ValueError, match="'html'"):
        TextCodec(bpe.tokenizer, "html")  # type: ignore[arg-type]


def test_pad_falls_back_to_eos_and_own_pad_is_kept(bpe: TextCodec) -> None:
    special = {"eos_token": "[EOS]", "bos_token": "[BOS]", "mask_token": "[MASK]"}
    backend = bpe.tokenizer.backend_tokenizer
    assert TextCodec(PreTrainedTokenizerFast(tokenizer_object=backend, **special)).vocabulary.pad_token_id == 0
    padded = TextCodec(PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[UNK]", **special))
    assert padded.vocabulary.pad_token_id == 3
    assert TextCodec.from_state(padded.to_state()).vocabulary == padded.vocabulary

import pytest
import torch

from crocodil.data.codec import TextCodec, byte_level_bpe
from crocodil.data.retokenizer import Retokenizer

TEXTS = ["def add(a, b):\n    return a + b\n", "for name in names:\n    print(name)\n", "x = {'é': 'ü'}\n"] * 20


@pytest.fixture(scope="module")
def codecs() -> tuple[TextCodec, TextCodec]:
    return byte_level_bpe(TEXTS, 330), byte_level_bpe(TEXTS[::-1] + ["return print"] * 50, 300)


@pytest.mark.parametrize("text", [*TEXTS[:3], "something else entirely, ça va?", ""])
def test_a_whole_text_arrives_as_the_target_would_read_it(codecs: tuple[TextCodec, TextCodec], text: str) -> None:
    source, target = codecs
    vocabulary = source.vocabulary
    row = [vocabulary.bos_token_id, *source.encode(text), vocabulary.eos_token_id, vocabulary.eos_token_id]
    assert Retokenizer(source, target).translate(row) == target.encode(text)


def test_masks_stay_where_they_are(codecs: tuple[TextCodec, TextCodec]) -> None:
    source, target = codecs
    ids = source.encode(TEXTS[0])
    mask, masked = source.vocabulary.mask_token_id, list(ids)
    masked[2:5] = [mask] * 3
    masked[7] = mask
    pieces = [source.decode(part) for part in (ids[:2], ids[5:7], ids[8:])]
    first, second, third = (target.encode(piece) for piece in pieces)
    m = target.vocabulary.mask_token_id
    assert Retokenizer(source, target).translate(masked) == [*first, m, m, m, *second, m, *third]
    assert Retokenizer(source, target).translate([mask] * 4) == [m] * 4


def test_rows_are_padded_and_the_padding_is_told(codecs: tuple[TextCodec, TextCodec]) -> None:
    source, target = codecs
    rows = [source.encode(TEXTS[0]), source.encode(TEXTS[1]), []]
    width, eos = max(map(len, rows)) + 1, source.vocabulary.eos_token_id
    token_ids, real = Retokenizer(source, target)(torch.tensor([row + [eos] * (width - len(row)) for row in rows]))
    assert token_ids.dtype == torch.int64 and token_ids.shape == real.shape
    for row, keep, text in zip(token_ids, real, TEXTS[:2], strict=False):
        assert row[keep].tolist() == target.encode(text)
    assert real[2].tolist() == [True] + [False] * (token_ids.shape[1] - 1)


def test_a_character_cut_by_a_mask_does_no_harm(codecs: tuple[TextCodec, TextCodec]) -> None:
    source, target = codecs
    ids = source.encode("日")  # three bytes, three tokens
    assert len(ids) == 3
    ids[1] = source.vocabulary.mask_token_id
    translated = Retokenizer(source, target).translate(ids)
    assert translated.count(target.vocabulary.mask_token_id) == 1 and len(translated) > 2

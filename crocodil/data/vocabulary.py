"""Size and special token ids of a tokenizer: all that a network or a sampler needs to know of the text."""

from typing import NamedTuple


class Vocabulary(NamedTuple):
    """Size and special token ids of a tokenizer; every id lies in [0, size).

    A tuple rather than a dataclass, because the CLI links it from the data to the model as one value.

    Attributes:
        size: number of token types, special ones included.
        pad_token_id: id that fills the tail of a block; equal to `eos_token_id` in our own tokenizers, so that
            the tail is trained on and a variable length is learned from it.
        bos_token_id: id of the first token of a text.
        eos_token_id: id that ends a text.
        mask_token_id: id of a position that masked diffusion has hidden.
    """

    size: int
    pad_token_id: int
    bos_token_id: int
    eos_token_id: int
    mask_token_id: int

"""Size and special token ids of a tokenizer: all that a network or a sampler needs to know of the text."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Vocabulary:
    """Size and special token ids of a tokenizer.

    Args:
        size: number of token types, special ones included; every token id lies in [0, size).
        pad_token_id: id that fills the tail of a block; equal to `eos_token_id` in our own tokenizers, so that
            the tail is trained on and a variable length is learned from it.
        bos_token_id: id of the first token of a text.
        eos_token_id: id that ends a text.
        mask_token_id: id of a position that masked diffusion has hidden.

    Raises:
        ValueError: if a special id lies outside [0, size).
    """

    size: int
    pad_token_id: int
    bos_token_id: int
    eos_token_id: int
    mask_token_id: int

    def __post_init__(self) -> None:
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id"):
            token_id = getattr(self, name)
            if not 0 <= token_id < self.size:
                raise ValueError(f"{name} must lie in [0, {self.size}), the size of the vocabulary, got {token_id}.")

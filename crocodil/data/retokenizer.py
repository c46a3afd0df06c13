"""From the tokens of a demasker to those of an encoder that has a tokenizer of its own, masks included."""

from itertools import groupby

import torch
from torch import Tensor

from crocodil.data.codec import TextCodec


class Retokenizer:
    """Turns token ids of one tokenizer into those of another, by way of the text.

    A row is read up to its first end token, its start token dropped. Each run of known tokens is decoded and encoded
    anew; each masked token becomes one mask of the target, for how long an unknown piece of text is, its tokens alone
    tell. So h(x_t) of a partly masked text sees what is known, where, and roughly how much is missing between. Bytes of
    a character that a mask cuts in two are read as replacement characters.

    It works on the host: on a GPU every call waits for the tokens.

    Args:
        source: the codec of the demasker.
        target: the codec of the encoder.
    """

    def __init__(self, source: TextCodec, target: TextCodec) -> None:
        self.source, self.target = source, target

    def __call__(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Translates a batch.

        Args:
            token_ids: (B, L) int64 of the source, masks among them.

        Returns:
            (B, M) int64 of the target, padded on the right, and (B, M) bool, true at real tokens; M is the longest
            row's length, at least 1.
        """
        rows = [self.translate(row) for row in token_ids.tolist()]
        width = max(1, *map(len, rows))
        pad = self.target.vocabulary.pad_token_id
        padded = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
        lengths = torch.tensor([max(1, len(row)) for row in rows])  # an empty text is one padding token
        return padded.to(token_ids.device), (torch.arange(width) < lengths[:, None]).to(token_ids.device)

    def translate(self, token_ids: list[int]) -> list[int]:
        """One row; see the class."""
        vocabulary, masks = self.source.vocabulary, self.target.vocabulary.mask_token_id
        if vocabulary.eos_token_id in token_ids:
            token_ids = token_ids[: token_ids.index(vocabulary.eos_token_id)]
        translated: list[int] = []
        for is_masked, run in groupby(token_ids, lambda token_id: token_id == vocabulary.mask_token_id):
            tokens = list(run)
            translated += [masks] * len(tokens) if is_masked else self.target.encode(self.source.decode(tokens))
        return translated

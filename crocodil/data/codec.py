"""Text to token ids and back: a tokenizer together with the format of the text."""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, cast, get_args

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from crocodil.data import canonical_text
from crocodil.data.vocabulary import Vocabulary

TextFormat = Literal["plain", "canonical"]
CODEC_FILE = "codec.json"
NEW_MASK = "<|mask|>"
TURN_START = "<|im_start|>"
"""What starts a text where a tokenizer names no start token (Qwen)."""
EOS, BOS, MASK, UNK = canonical_text.SPECIAL_TOKENS
EOS_ID, BOS_ID, MASK_ID = 0, 1, 2
MIN_BPE_SIZE = 260  # 256 bytes and the four special tokens
LAYOUT = {canonical_text.NEWLINE: "\n", canonical_text.INDENT: "\u21e5 ", canonical_text.DEDENT: "\u21e4 "}
"""How the tokens of structure show in unfinished texts, where they do not yet make up lines and indents."""


class TextCodec:
    """Turns text into token ids and token ids into text.

    Args:
        tokenizer: a fast tokenizer of transformers with BOS, EOS and mask tokens; without a pad token, EOS pads.
        text_format: "plain" for text as it is; "canonical" for canonical functions, whose tokens are rendered as
            Python text.

    Raises:
        ValueError: if the format is unknown or the tokenizer lacks a special token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, text_format: TextFormat = "plain") -> None:
        if text_format not in get_args(TextFormat):
            raise ValueError(f"text_format must be one of {get_args(TextFormat)}, got {text_format!r}.")
        for name in ("bos_token", "eos_token", "mask_token"):
            if getattr(tokenizer, name) is None:
                raise ValueError(f"the tokenizer must have a {name}, got none: set tokenizer.{name} first.")
        self.tokenizer = tokenizer
        self.text_format: TextFormat = text_format

    @classmethod
    def canonical(cls) -> "TextCodec":
        """The codec of canonical functions; its vocabulary is fixed."""
        token_ids = {token: token_id for token_id, token in enumerate(canonical_text.CANONICAL_TOKENS)}
        tokenizer = Tokenizer(models.WordLevel(token_ids, unk_token=UNK))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return cls(_wrapped(tokenizer), "canonical")

    @classmethod
    def published(cls, path_or_id: str, family: str | None = None) -> "TextCodec":
        """The codec of a published checkpoint: its own tokenizer, with the mask token that its configuration names.

        Args:
            path_or_id: folder of the checkpoint, or id of a repository of the Hugging Face hub.
            family: one of `crocodil.models.backbone.FAMILIES`; None tells it from `config.json`.

        Raises:
            ValueError: if there is no checkpoint, no tokenizer, or no token that can start a text.
        """
        from crocodil.models.pretrained import Checkpoint, Pretrained  # only published checkpoints need the networks

        checkpoint = Checkpoint.open(Pretrained(path_or_id, family))
        try:
            tokenizer = getattr(transformers, checkpoint.record.tokenizer).from_pretrained(str(checkpoint.folder))
        except (OSError, ValueError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"expected a tokenizer in {checkpoint.folder}, but none can be read: {reason}") from error
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(checkpoint.eos_token_id)
        _name_mask(tokenizer, checkpoint.mask_token_id)
        if tokenizer.bos_token is None:
            if TURN_START not in tokenizer.get_vocab():
                raise ValueError(
                    f"the tokenizer in {checkpoint.folder} must have a bos_token, got none: name one there"
                )
            tokenizer.bos_token = TURN_START
        return cls(tokenizer)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Size and special token ids of the tokenizer."""
        tokenizer = self.tokenizer
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        return Vocabulary(len(tokenizer), pad, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, special tokens not added; one that is spelled out in the text is read as plain text.

        Args:
            text: any text, possibly an unfinished one; in canonical format, Python text in canonical names.

        Raises:
            ValueError: if a token of the canonical format is outside the vocabulary.
        """
        if self.text_format == "canonical":
            return cast(list[int], self.tokenizer.convert_tokens_to_ids(canonical_text.tokenize(text)))
        return list(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, on all cores where the texts are plain.

        Args:
            texts: see `encode`.
        """
        if self.text_format == "canonical":
            return [self.encode(text) for text in texts]
        tokenizer = self.tokenizer.backend_tokenizer
        tokenizer.no_truncation()  # some published ones come with a length of their own
        tokenizer.no_padding()
        before = tokenizer.encode_special_tokens
        tokenizer.encode_special_tokens = True
        try:
            return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        finally:
            tokenizer.encode_special_tokens = before

    def decode(self, token_ids: Iterable[int]) -> str:
        """Text of token ids: BOS is dropped, the first EOS ends the text, masks stay visible.

        Args:
            token_ids: ids of one text, a sequence or a tensor of one dimension; ids outside the vocabulary show as the
                tokenizer's unknown token.
        """
        ids = [int(token_id) for token_id in token_ids]
        vocabulary = self.vocabulary
        if vocabulary.eos_token_id in ids:
            ids = ids[: ids.index(vocabulary.eos_token_id)]
        known = [token_id if 0 <= token_id < vocabulary.size else self.tokenizer.unk_token_id for token_id in ids]
        kept = [token_id for token_id in known if token_id is not None and token_id != vocabulary.bos_token_id]
        if self.text_format == "canonical":
            return canonical_text.render(self.tokenizer.convert_ids_to_tokens(kept))
        return cast(str, self.tokenizer.decode(kept))

    def pieces(self, token_ids: Iterable[int]) -> list[str]:
        """What each token looks like by itself, for showing texts that are not finished; masks and ends show as "".

        Joined, the pieces resemble the text. Only `decode` is exact.
        """
        hidden = {self.vocabulary.mask_token_id, self.vocabulary.eos_token_id, self.vocabulary.bos_token_id}
        ids = [int(token_id) for token_id in token_ids]
        if self.text_format != "canonical":
            return ["" if token_id in hidden else cast(str, self.tokenizer.decode([token_id])) for token_id in ids]
        tokens = self.tokenizer.convert_ids_to_tokens(ids)
        return ["" if i in hidden else LAYOUT.get(token, f"{token} ") for i, token in zip(ids, tokens, strict=True)]

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the tokenizer's own files and `codec.json`.

        Args:
            folder: created if absent.
        """
        self.tokenizer.save_pretrained(str(folder))
        (Path(folder) / CODEC_FILE).write_text(json.dumps({"text_format": self.text_format}) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "TextCodec":
        """Reads what `save_pretrained` wrote; runs no code from the folder.

        Args:
            folder: folder with `codec.json` and the tokenizer's files.

        Raises:
            ValueError: if the folder holds no `codec.json`.
        """
        path = Path(folder) / CODEC_FILE
        if not path.is_file():
            raise ValueError(f"folder must hold {CODEC_FILE} as written by save_pretrained, got {str(folder)!r}.")
        text_format = json.loads(path.read_text())["text_format"]
        return cls(PreTrainedTokenizerFast.from_pretrained(str(folder)), text_format)

    def to_state(self) -> dict[str, str]:
        """The codec as plain strings, fit for a checkpoint that is read with `weights_only=True`."""
        return {
            "text_format": self.text_format,
            "tokenizer": self.tokenizer.backend_tokenizer.to_str(),
            "special_tokens": json.dumps({name: str(token) for name, token in self._special_tokens().items()}),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, str]) -> "TextCodec":
        """Rebuilds the codec from `to_state`.

        Args:
            state: the strings of `to_state`.
        """
        tokenizer = Tokenizer.from_str(state["tokenizer"])
        special_tokens = json.loads(state["special_tokens"])
        return cls(
            PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens),
            cast(TextFormat, state["text_format"]),
        )

    def _special_tokens(self) -> dict[str, str]:
        names = ("bos_token", "eos_token", "pad_token", "mask_token", "unk_token")
        tokens = {name: getattr(self.tokenizer, name) for name in names}
        return {name: token for name, token in tokens.items() if token is not None}


def _name_mask(tokenizer: PreTrainedTokenizerFast, mask_token_id: int) -> None:
    """Makes the token of that id, a new one behind the vocabulary if need be, the tokenizer's mask."""
    known = tokenizer.convert_ids_to_tokens(mask_token_id) if mask_token_id < len(tokenizer) else None
    tokenizer.add_special_tokens({"mask_token": NEW_MASK if known is None else known})
    if tokenizer.mask_token_id != mask_token_id:
        raise ValueError(
            f"the mask token must have the id {mask_token_id}, but a new one gets {tokenizer.mask_token_id}"
        )


def byte_level_bpe(texts: Iterable[str], vocab_size: int) -> TextCodec:
    """Trains a byte-level BPE; every text, seen or not, survives encoding and decoding exactly.

    Args:
        texts: what to learn the merges from.
        vocab_size: number of token types wanted, special ones included, at least 260; few texts give fewer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, BOS, MASK, UNK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return TextCodec(_wrapped(tokenizer))


def _wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS, bos_token=BOS, mask_token=MASK, unk_token=UNK
    )

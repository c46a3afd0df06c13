"""The judge: a causal language model that reads texts once and tells their likelihood and their features."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from crocodil.data.codec import CODEC_FILE, TextCodec
from crocodil.models.backbone import checked_config

TOKENS_AT_ONCE = 16384
"""Tokens of a batch, padding included: what bounds the logits that are alive at once."""


def build_judge(settings: Mapping[str, Any]) -> PreTrainedModel:
    """A causal language model of transformers from `model_type` and fields of its configuration.

    Raises:
        ValueError: if `model_type` is absent or unknown, or a field is not one of that model's.
    """
    return AutoModelForCausalLM.from_config(checked_config(settings))


@dataclass(frozen=True)
class Judgement:
    """What a judge says of N texts.

    Attributes:
        nats: (N,) float64, negative log-likelihood of the counted tokens of each text.
        num_tokens: (N,) int64, how many tokens were counted.
        mean_states: (N, H) float32, the last hidden states averaged over a text: features for a Fréchet distance.
        last_states: (N, H) float32, the last hidden state of a text's last token: MAUVE's features.
    """

    nats: Tensor
    num_tokens: Tensor
    mean_states: Tensor
    last_states: Tensor


class Judge:
    """Scores texts by sum_i -log p(x_i | x_<i), in float64, under a causal language model.

    A text begins with the judge's start token, which is given and not counted; where its tokenizer has none, with its
    end token (the convention of GPT-2 and StarCoder). The end token is counted only if `score_end`: behind every text
    that ended, which texts without token ids are taken to have done. What follows the end, padding and other texts of
    a batch have no influence. Texts longer than the judge reads
    are scored in windows that overlap by half, each token once and with at least half a window before it.

    Args:
        network: a causal language model of transformers.
        codec: its tokens.
        source: codec of texts that come as token ids. If it is the judge's own, ids are judged as they are; if not, or
            if it is None, their text is tokenised anew, as a published judge must.
        score_end: count the end token, too.
        name: how reports call the judge.
    """

    def __init__(
        self,
        network: PreTrainedModel,
        codec: TextCodec | PreTrainedTokenizerBase,
        source: TextCodec | None = None,
        score_end: bool = False,
        name: str = "",
    ) -> None:
        self.network = network.eval()
        self.codec = codec
        self.score_end = score_end
        self.name = name or str(network.config.model_type)
        own = codec.tokenizer if isinstance(codec, TextCodec) else codec
        self.end_id = own.eos_token_id
        self.start_id = own.bos_token_id if own.bos_token_id is not None else own.eos_token_id
        if self.start_id is None:
            raise ValueError(f"the judge {self.name} must have a start or an end token, but its tokenizer has neither")
        self.shares_tokens = (
            source is not None and isinstance(codec, TextCodec) and codec.to_state() == source.to_state()
        )
        self._source_end = None if source is None else source.vocabulary.eos_token_id
        self._last: tuple[tuple[tuple[int, ...], ...], tuple[int, ...], Judgement] | None = None

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        source: TextCodec | None = None,
        score_end: bool = False,
        dtype: str | torch.dtype | None = None,
    ) -> "Judge":
        """Reads any causal language model of transformers, or a folder that `save_pretrained` wrote. No code is run.

        Args:
            path_or_id: folder, or id of a repository of the Hugging Face hub.
            source: see the class.
            score_end: see the class.
            dtype: of the weights; None keeps the checkpoint's.

        Raises:
            ValueError: if there is no such model or tokenizer.
        """
        try:
            network = AutoModelForCausalLM.from_pretrained(str(path_or_id), dtype=dtype or "auto")
            if (Path(path_or_id) / CODEC_FILE).is_file():
                codec: TextCodec | PreTrainedTokenizerBase = TextCodec.from_pretrained(path_or_id)
            else:
                codec = AutoTokenizer.from_pretrained(str(path_or_id))
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"expected a causal language model with its tokenizer as judge, but {path_or_id} is none: {reason}"
            ) from error
        return cls(network, codec, source, score_end, str(path_or_id))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the network and its tokenizer as a transformers folder, created if absent."""
        self.network.save_pretrained(str(folder))
        self.codec.save_pretrained(str(folder))

    def to(self, device: torch.device | str) -> "Judge":
        """Moves the network, in place."""
        nn.Module.to(self.network, device)
        return self

    def read(
        self, texts: Sequence[str], token_ids: Tensor | None = None, prompts: Sequence[str] | None = None
    ) -> Judgement:
        """Reads texts, however many; the last answer is kept, since several figures ask about the same texts.

        Args:
            texts: N texts.
            token_ids: (N, L) int64, the same texts in the tokens of `source`; used instead if the judge shares them.
            prompts: what each text begins with and must not be counted; None for nothing.

        Raises:
            ValueError: if a text does not begin with its prompt.
        """
        ids = [[]] * len(texts) if token_ids is None else token_ids.tolist()
        has_end = [self.score_end and (token_ids is None or self._source_end in row) for row in ids]
        if token_ids is not None and self.shares_tokens:
            rows = [self._own_tokens(row) for row in ids]
        else:
            rows = [[self.start_id, *self._encode(text)] for text in texts]
        given = [1] * len(rows) if prompts is None else self._given(rows, texts, prompts)
        rows = [[*row, *([self.end_id] if ends else [])] for row, ends in zip(rows, has_end, strict=True)]
        key = (tuple(map(tuple, rows)), tuple(given))
        if self._last is None or self._last[:2] != key:
            self._last = (*key, self._read(rows, given))
        return self._last[2]

    def _encode(self, text: str) -> list[int]:
        if isinstance(self.codec, TextCodec):
            return self.codec.encode(text)
        return list(self.codec.encode(text, add_special_tokens=False, split_special_tokens=True))

    def _own_tokens(self, row: list[int]) -> list[int]:
        """A row of the judge's own tokens: one start token in front, and only what is before the first end token."""
        tokens = row[: row.index(self._source_end)] if self._source_end in row else row
        return [self.start_id, *(tokens[1:] if tokens[:1] == [self.start_id] else tokens)]

    def _given(self, rows: list[list[int]], texts: Sequence[str], prompts: Sequence[str]) -> list[int]:
        """How many tokens of each row its prompt accounts for; one that straddles the boundary is counted."""
        given = []
        for row, text, prompt in zip(rows, texts, prompts, strict=True):
            if not text.startswith(prompt):
                raise ValueError(
                    f"each text must begin with its prompt, got the text {text[:40]!r} for {prompt[:40]!r}"
                )
            alone = [self.start_id, *self._encode(prompt)]
            agree = [a == b for a, b in zip(row, alone, strict=False)]
            given.append(agree.index(False) if False in agree else len(agree))
        return given

    @torch.no_grad()
    def _read(self, rows: list[list[int]], given: list[int]) -> Judgement:
        width = self.network.config.hidden_size
        nats, num_tokens = torch.zeros(len(rows), dtype=torch.float64), torch.zeros(len(rows), dtype=torch.int64)
        mean, last = torch.zeros(len(rows), width), torch.zeros(len(rows), width)
        spans = [(i, start, end, counted) for i, row in enumerate(rows) for start, end, counted in self._windows(row)]
        spans.sort(key=lambda span: span[2] - span[1])
        for batch in _batches(spans):
            pieces = [torch.tensor(rows[i][start:end]) for i, start, end, _ in batch]
            ids = nn.utils.rnn.pad_sequence(pieces, batch_first=True, padding_value=self.start_id)
            ids = ids.to(self.network.device)
            lengths = torch.tensor([len(piece) for piece in pieces], device=ids.device)
            is_text = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
            out = self.network(input_ids=ids, attention_mask=is_text, use_cache=False, output_hidden_states=True)
            losses = F.cross_entropy(out.logits[:, :-1].double().transpose(1, 2), ids[:, 1:], reduction="none").cpu()
            states = out.hidden_states[-1].float().cpu()
            for j, (i, start, end, counted) in enumerate(batch):
                first = max(counted, given[i]) - start
                nats[i] += losses[j, first - 1 : end - start - 1].sum()
                num_tokens[i] += max(end - start - first, 0)
                mean[i] += states[j, counted - start if start else 0 : end - start].sum(0) / len(rows[i])
                if end == len(rows[i]):
                    last[i] = states[j, end - start - 1]
        return Judgement(nats, num_tokens, mean, last)

    def _windows(self, row: list[int]) -> list[tuple[int, int, int]]:
        """(start, end, first counted place) of the windows that a row is read in, one if it is short enough."""
        most = getattr(self.network.config, "max_position_embeddings", None) or len(row)
        windows = [(0, min(most, len(row)), 1)]
        while (counted := windows[-1][1]) < len(row):
            end = min(counted + most // 2, len(row))
            windows.append((end - most, end, counted))
        return windows


def _batches(spans: list[tuple[int, int, int, int]]) -> list[list[tuple[int, int, int, int]]]:
    """Spans in order of their lengths, as many at once as `TOKENS_AT_ONCE` admits, none left out."""
    batches: list[list[tuple[int, int, int, int]]] = []
    for span in spans:
        length = span[2] - span[1]
        if not batches or length * (len(batches[-1]) + 1) > TOKENS_AT_ONCE:
            batches.append([])
        batches[-1].append(span)
    return batches

"""The texts of a batch while they are written: what is given, what is masked, and the blocks it is filled in."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PromptIds = Tensor | Sequence[Tensor]
"""One prompt (P,) for all rows, one for each row (B, P), or a sequence of B prompts of any lengths."""


@dataclass
class Canvas:
    """A batch of partly masked texts. Rows may be of different lengths: shorter ones are padded behind the text.

    Attributes:
        token_ids: (B, W) int64.
        is_ours: (B, W) bool, masked at first: only these are ever written.
        starts: (B,) int64, where the first block begins; masks before it belong to that block.
        ends: (B,) int64, the length of each row.
        length: L, positions from `starts` to `ends`, in every row.
        is_ragged: whether some rows are padded.
        has_gaps: whether there are masks before `starts`.
    """

    token_ids: Tensor
    is_ours: Tensor
    starts: Tensor
    ends: Tensor
    length: int
    is_ragged: bool = False
    has_gaps: bool = False

    @property
    def attention_mask(self) -> Tensor | None:
        """(B, W) bool, False at padding; None without any."""
        return self._columns() < self.ends[:, None] if self.is_ragged else None

    def _columns(self) -> Tensor:
        return torch.arange(self.token_ids.shape[1], device=self.token_ids.device)[None]

    def block(self, index: int, size: int) -> tuple[Tensor, Tensor]:
        """Positions (B, S) int64 of a block of `size` tokens, and whether they belong to it, (B, S) bool.

        Args:
            index: number of the block, from 0.
            size: tokens in a block, counted from `starts`.
        """
        if index == 0 and self.has_gaps:
            positions = self._columns().expand(len(self.token_ids), -1)
            return positions, self.is_ours & (positions < self.starts[:, None] + size)
        offsets = torch.arange(index * size, (index + 1) * size, device=self.token_ids.device)
        positions = self.starts[:, None] + offsets
        return positions, self.is_ours.gather(1, positions)

    def finished(self, mask_token_id: int, stop_token_ids: Tensor) -> Tensor:
        """(B,) bool: whether a row has a stop token with nothing masked before it, or nothing masked at all."""
        is_masked = self.token_ids == mask_token_id
        is_stop = torch.isin(self.token_ids, stop_token_ids) & self.is_ours
        return (is_stop & (is_masked.cumsum(1) == 0)).any(1) | ~is_masked.any(1)

    def trim(self, stop_token_ids: Tensor, fill_token_id: int) -> None:
        """Writes `fill_token_id` behind the first stop token that was written in each row."""
        is_stop = torch.isin(self.token_ids, stop_token_ids) & self.is_ours
        behind = (is_stop.cumsum(1) - is_stop.long() > 0) & self.is_ours
        self.token_ids = self.token_ids.masked_fill(behind, fill_token_id)


def start_canvas(
    mask_token_id: int,
    length: int,
    batch_size: int,
    prompt_ids: PromptIds | None,
    device: torch.device | str,
    pad_token_id: int = 0,
) -> Canvas:
    """The prompts, each followed by `length` masks.

    Args:
        mask_token_id: id of the mask.
        length: L.
        batch_size: B.
        prompt_ids: see `PromptIds`; masks in a prompt are filled, too. None for none.
        device: of the canvas.
        pad_token_id: fills what is behind shorter rows.

    Raises:
        ValueError: if the prompts do not fit the batch.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    prompts, lengths = _prompts(prompt_ids, batch_size)
    width = max(lengths)
    token_ids = torch.full((batch_size, width + length), pad_token_id, dtype=torch.int64)
    for row, prompt in zip(token_ids, prompts, strict=True):
        row[: len(prompt)] = prompt
        row[len(prompt) : len(prompt) + length] = mask_token_id
    starts = torch.tensor(lengths)
    has_gaps = any(bool((prompt == mask_token_id).any()) for prompt in prompts)
    return _canvas(token_ids, starts, length, mask_token_id, device, min(lengths) < width, has_gaps)


def canvas_to_fill(token_ids: Tensor, mask_token_id: int) -> Canvas:
    """A canvas (B, L) int64 with masks anywhere; blocks are counted from its beginning."""
    batch_size, length = token_ids.shape
    starts = torch.zeros(batch_size, dtype=torch.int64)
    return _canvas(token_ids, starts, length, mask_token_id, token_ids.device, False, False)


def _canvas(
    token_ids: Tensor,
    starts: Tensor,
    length: int,
    mask_token_id: int,
    device: torch.device | str,
    is_ragged: bool,
    has_gaps: bool,
) -> Canvas:
    token_ids, starts = token_ids.to(device), starts.to(device)
    return Canvas(token_ids, token_ids == mask_token_id, starts, starts + length, length, is_ragged, has_gaps)


def _prompts(prompt_ids: PromptIds | None, batch_size: int) -> tuple[list[Tensor], list[int]]:
    if prompt_ids is None:
        prompts = [torch.empty(0, dtype=torch.int64)] * batch_size
    elif isinstance(prompt_ids, Tensor):
        shape = tuple(prompt_ids.shape)
        if prompt_ids.ndim == 1:
            prompt_ids = prompt_ids.expand(batch_size, -1)
        if prompt_ids.ndim != 2 or len(prompt_ids) != batch_size:
            raise ValueError(f"prompt_ids must be (P,) or ({batch_size}, P), got {shape}")
        prompts = list(prompt_ids.cpu())
    else:
        prompts = [prompt.cpu() for prompt in prompt_ids]
        if len(prompts) != batch_size or any(prompt.ndim != 1 for prompt in prompts):
            shapes = [tuple(prompt.shape) for prompt in prompts]
            raise ValueError(f"prompt_ids must be {batch_size} prompts of shape (P,), got {shapes}")
    return prompts, [len(prompt) for prompt in prompts]

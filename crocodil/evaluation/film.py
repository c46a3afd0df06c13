"""An unmasking film: how texts came to be, step by step, as one HTML file that needs no network."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from torch import Tensor

from crocodil.data.codec import TextCodec
from crocodil.samplers.protocols import StepEvent


class Film:
    """Records the steps of a sampler; give it as `on_step`, then `save` it.

    Args:
        codec: shows the tokens.
        mask_token_id: id of the mask.
        num_texts: how many texts of the first batch are shown.
    """

    def __init__(self, codec: TextCodec, mask_token_id: int, num_texts: int = 4) -> None:
        self.codec = codec
        self.mask_token_id = mask_token_id
        self.num_texts = num_texts
        self.frames: list[dict[str, Any]] = []
        self._first: list[list[int]] | None = None
        self._is_over = False

    def __call__(self, event: StepEvent) -> None:
        """Takes a step; those of later batches are left out."""
        self._is_over = self._is_over or (bool(self.frames) and event.index <= self.frames[-1]["step"])
        if self._is_over:
            return
        rows = slice(self.num_texts)
        changed = (event.committed | event.remasked)[rows].cpu()
        token_ids, sure = event.token_ids[rows].cpu(), event.confidence[rows].cpu()
        if self._first is None:
            self._first = token_ids.masked_fill(changed, self.mask_token_id).tolist()
        self.frames.append(
            {
                "step": event.index,
                "refreshed": event.refreshed,
                "changes": [self._changes(ids, row, p) for ids, row, p in zip(token_ids, changed, sure, strict=True)],
            }
        )

    def _changes(self, token_ids: Tensor, changed: Tensor, sure: Tensor) -> list[tuple[int, int, float]]:
        """(position, token id, probability) of each changed position of a text."""
        return [(i, int(token_ids[i]), round(float(sure[i]), 4)) for i in changed.nonzero().flatten().tolist()]

    def save(self, path: str | Path, title: str) -> None:
        """Writes the page.

        Args:
            path: file to write.
            title: what the page says above the texts.

        Raises:
            ValueError: if nothing was recorded.
        """
        if self._first is None:
            raise ValueError("the film is empty: give it to a sampler as `on_step` first")
        used = {token_id for row in self._first for token_id in row}
        used |= {change[1] for frame in self.frames for row in frame["changes"] for change in row}
        pieces = dict(zip(sorted(used), self.codec.pieces(sorted(used)), strict=True))
        film = {"mask": self.mask_token_id, "first": self._first, "frames": self.frames, "pieces": pieces}
        template = files("crocodil.evaluation").joinpath("film.html.jinja").read_text()
        # In a script element only "<" could end the data.
        data = json.dumps(film).replace("<", "\\u003c")
        page = Environment(undefined=StrictUndefined, autoescape=True).from_string(template)
        Path(path).write_text(page.render(title=title, data=data))

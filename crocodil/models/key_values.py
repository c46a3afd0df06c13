"""Keys and values of attention, kept between calls of a network."""

from torch import Tensor


class KeyValues:
    """What every layer of a network computed for K registers and L tokens, so that a later call computes only a part.

    The first call fills it. A later one computes the positions of its window, puts their keys and values in place, and
    attends to all. That is exact where the rest has not changed and does not depend on the window, as registers that do
    not read the text; elsewhere it is the approximation of Fast-dLLM's caches (arXiv 2505.22618).
    """

    def __init__(self) -> None:
        self.places: Tensor | None = None
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def is_filled(self) -> bool:
        """Whether a call can lean on it."""
        return bool(self._layers)

    def clear(self) -> None:
        """Forgets everything: what it was computed from has changed."""
        self._layers.clear()

    def merge(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer, the fresh ones in their places.

        Args:
            layer: its number.
            key: (B, heads, M, head_dim), rotated, of the positions `places` (B, M) int64; of all if that is None.
            value: likewise.
        """
        if self.places is None:
            self._layers[layer] = key, value
            return key, value
        index = self.places[:, None, :, None].expand_as(key)
        keys, values = self._layers[layer]
        return keys.scatter_(2, index, key), values.scatter_(2, index, value)

"""Networks from their settings alone, for `crocodil plan`: no weights are fetched and none are read."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_weightless: ContextVar[bool] = ContextVar("weightless", default=False)


@contextmanager
def without_weights() -> Iterator[None]:
    """Within, checkpoints give the shapes and dtypes of their tensors and not their values."""
    token = _weightless.set(True)
    try:
        yield
    finally:
        _weightless.reset(token)


def is_weightless() -> bool:
    """Whether networks are now built without their weights."""
    return _weightless.get()

"""CRoCoDiL: continuous and robust conditioned diffusion for language (arXiv 2603.20210), on PyTorch Lightning."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crocodil.pipeline import CrocodilPipeline

__all__ = ["CrocodilPipeline", "__version__"]

try:
    __version__ = version("crocodil")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    """Import the pipeline only when it is asked for: `import crocodil` stays light."""
    if name == "CrocodilPipeline":
        return import_module("crocodil.pipeline").CrocodilPipeline
    raise AttributeError(f"module 'crocodil' has no attribute {name!r}")

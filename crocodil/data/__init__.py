"""From Python programs to blocks of token ids: corpora, codecs and LightningDataModules.

Names load on first use, so that the processes that read files in parallel never import PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crocodil.data.block_datamodule import BlockDataModule
    from crocodil.data.canonical import CANONICAL_TOKENS, canonical_functions, render, tokenize
    from crocodil.data.canonical_functions import CanonicalFunctions
    from crocodil.data.codec import TextCodec
    from crocodil.data.sources import Source
    from crocodil.data.text_corpus import TextCorpus
    from crocodil.data.vocabulary import Vocabulary

_MODULES = {
    "BlockDataModule": "block_datamodule",
    "CANONICAL_TOKENS": "canonical",
    "CanonicalFunctions": "canonical_functions",
    "Source": "sources",
    "TextCodec": "codec",
    "TextCorpus": "text_corpus",
    "Vocabulary": "vocabulary",
    "canonical_functions": "canonical",
    "render": "canonical",
    "tokenize": "canonical",
}
__all__ = [
    "CANONICAL_TOKENS",
    "BlockDataModule",
    "CanonicalFunctions",
    "Source",
    "TextCodec",
    "TextCorpus",
    "Vocabulary",
    "canonical_functions",
    "render",
    "tokenize",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)

"""Whether texts are Python: figures that the interpreter's own parser and compiler, and a linter, give."""

import ast
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

LONG_TEXT = 20_000
"""Characters from which on a text is read in an interpreter of its own.

Some texts of 10^5 parts, `[x for x in x for x in x ...]` among them, crash the compiler, or take it minutes.
"""
_PATIENCE = 10.0
"""Seconds for a long text."""
_REFUSALS = (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError)
"""What the parser and the compiler raise for a text they refuse; a null byte and deep nesting are among the causes."""
_READ_STDIN = """
import sys
text = sys.stdin.buffer.read().decode("utf-8", "surrogatepass")
compile(text, "<text>", "exec", int(sys.argv[1]), dont_inherit=True)
"""


def parses(text: str) -> bool:
    """Whether Python's own parser accepts a text; an empty one does not count."""
    return _accepts(text, ast.PyCF_ONLY_AST)


def compiles(text: str) -> bool:
    """Whether Python's own compiler accepts a text, without running it; an empty one does not count."""
    return _accepts(text, 0)


def _accepts(text: str, flags: int) -> bool:
    if not text.strip():
        return False
    if len(text) > LONG_TEXT:
        return _accepts_apart(text, flags)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the parser warns of odd but valid code
            compile(text, "<text>", "exec", flags, dont_inherit=True)
    except _REFUSALS:
        return False
    return True


def _accepts_apart(text: str, flags: int) -> bool:
    command = [sys.executable, "-I", "-S", "-c", _READ_STDIN, str(flags)]
    source = text.encode("utf-8", "surrogatepass")
    try:
        return subprocess.run(command, input=source, capture_output=True, timeout=_PATIENCE).returncode == 0
    except subprocess.TimeoutExpired:
        return False


class _Share(Metric):
    """Share of texts of which a statement holds."""

    higher_is_better = True
    full_state_update = False
    num_accepted: Tensor
    num_texts: Tensor

    def __init__(self, name: str, holds: Callable[[str], bool], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._figure, self._holds = name, holds
        for state in ("num_accepted", "num_texts"):
            self.add_state(state, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, texts: Sequence[str]) -> None:
        """Adds texts."""
        self.num_accepted += sum(map(self._holds, texts))
        self.num_texts += len(texts)

    def compute(self) -> dict[str, Tensor]:
        """The share, float64; NaN if there is no text."""
        return {self._figure: self.num_accepted.double() / self.num_texts}


class ParseRate(_Share):
    """Share of texts that are not empty and that `ast.parse` accepts, in [0, 1]: `parse_rate`."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("parse_rate", parses, **kwargs)


class CompileRate(_Share):
    """Share of texts that `compile` accepts, too, in [0, `parse_rate`]: `compile_rate`.

    It does not accept `return` outside a function, `break` outside a loop, or two parameters of one name, say. No text
    is run.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("compile_rate", compiles, **kwargs)


class UndefinedNames(Metric):
    """Undefined names a text, by pyflakes: distinct names that it reports, averaged over the texts that parse.

    A text that does not parse, is empty, or nests too deeply for pyflakes (a sum of a few hundred terms) does not
    count. Names that `from m import *` may bind are not undefined.

    Raises:
        ValueError: if pyflakes is not installed.
    """

    higher_is_better = False
    full_state_update = False
    num_names: Tensor
    num_texts: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        try:
            from pyflakes import checker, messages
        except ImportError as error:
            raise ValueError("UndefinedNames needs pyflakes; install it with pip install 'crocodil[eval]'") from error
        self._checker, self._message = checker.Checker, messages.UndefinedName
        for state in ("num_names", "num_texts"):
            self.add_state(state, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, texts: Sequence[str]) -> None:
        """Adds texts."""
        for text in filter(parses, texts):
            try:
                names = self._undefined_names(text)
            except RecursionError:
                continue
            self.num_names += len(names)
            self.num_texts += 1

    def _undefined_names(self, text: str) -> set[str]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            messages = self._checker(ast.parse(text)).messages
        return {message.message_args[0] for message in messages if isinstance(message, self._message)}

    def compute(self) -> dict[str, Tensor]:
        """`undefined_names`, float64; NaN if no text counts."""
        return {"undefined_names": self.num_names.double() / self.num_texts}

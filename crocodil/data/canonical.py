"""Canonical functions: every Python function with its names, strings and numbers folded into a fixed vocabulary."""

import ast
import warnings
from collections.abc import Iterator, Sequence

from crocodil.data.canonical_text import (
    CANONICAL_TOKENS,
    DEDENT,
    KEPT_NAMES,
    MAX_NAMES,
    OWN_NAME,
    render,
    tokenize,
)
from crocodil.data.unparse import FunctionWriter, Unsupported

__all__ = ["CANONICAL_TOKENS", "canonical_functions", "render", "tokenize"]

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
_KEPT = {*KEPT_NAMES}


def canonical_functions(source: str, max_tokens: int = 1024) -> Iterator[list[str]]:
    """Canonical tokens of each function of a source file: methods and nested functions too, each by itself.

    Names bound anywhere inside the function become v0, v1, ... in order of first appearance, attributes, keyword
    arguments and imported members a0, a1, ..., all other names g0, g1, ...; common builtins and `self` stay, the
    function itself is `f`. A name is told apart by its spelling alone: one spelling bound in one scope and free in
    another stays one name, which keeps the program's meaning. Strings become 's', integers above two 9, other
    numbers 0.5. Docstrings (all bare strings), annotations and decorators are dropped, `pass` fills an empty block.
    The [DEDENT]s at the very end are left out.

    A function is skipped if it holds a class, `match`, `global`, `nonlocal`, `except*`, a star import or a rare
    operator, or if it needs more than twelve names of one kind.

    Args:
        source: text of a Python file.
        max_tokens: functions with more tokens than this are skipped.

    Yields:
        Tokens of one function, each one of `CANONICAL_TOKENS`, in source order, an outer function before inner ones.

    Raises:
        ValueError: if the source does not parse (SyntaxError too is turned into it).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = ast.parse(source)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"the source must parse as Python, got {type(error).__name__}: {error}.") from error
    for function in _functions(module.body):
        tokens = _canonical(function, max_tokens)
        if tokens is not None:
            yield tokens


def _functions(body: Sequence[ast.AST]) -> Iterator[FunctionNode]:
    stack = list(reversed(body))
    while stack:
        node = stack.pop()
        if isinstance(node, FunctionNode):
            yield node
        inner: list[ast.AST] = []
        for field in ("body", "handlers", "cases", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if isinstance(block, list):  # the body of a lambda or of a conditional expression is no block
                inner += block
        stack += reversed(inner)


def _canonical(function: FunctionNode, max_tokens: int) -> list[str] | None:
    writer = FunctionWriter(max_tokens)
    try:
        writer.function(function, OWN_NAME)
    except (Unsupported, RecursionError):
        return None
    tokens = writer.tokens
    while tokens[-1] == DEDENT:
        tokens.pop()
    if len(tokens) > max_tokens:
        return None
    return _renamed(tokens, writer.bound, function.name)


def _renamed(tokens: list[str], bound: set[str], own_name: str) -> list[str] | None:
    """Resolves the marks of `FunctionWriter`: "name x", "module x" and "member x"; None if there are too many."""
    numbered: dict[str, str] = {}
    counts = dict.fromkeys("vag", 0)
    for position, token in enumerate(tokens):
        mark, _, name = token.partition(" ")
        if not name:
            continue
        is_local = mark == "name" and name in bound
        if mark == "module" and name not in bound:
            token = f"name {name}"  # `os` in `from os import path` is the free name `os`
        if token not in numbered:
            if mark != "member" and (name == "self" or (name in _KEPT and not is_local)):
                numbered[token] = name
            elif mark == "name" and name == own_name and not is_local:
                numbered[token] = OWN_NAME
            else:
                role = "a" if mark == "member" else "v" if is_local else "g"
                numbered[token] = f"{role}{counts[role]}"
                counts[role] += 1
        tokens[position] = numbered[token]
    return tokens if max(counts.values()) <= MAX_NAMES else None

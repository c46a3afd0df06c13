"""From a Python expression to lexical tokens, with names still marked: "name x", "module x", "member x"."""

import ast
from collections.abc import Callable, Sequence
from typing import Any

from crocodil.data.canonical_text import FLOAT, LARGE_INT, STRING, TWO
from crocodil.data.precedence import (
    AND,
    ATOM,
    BINARY,
    BITOR,
    COMPARE,
    COMPARISON,
    FACTOR,
    OR,
    POWER,
    TEST,
    TUPLE,
    UNARY,
    precedence,
)

_BRACKETS = {
    ast.List: ("[", "]"),
    ast.ListComp: ("[", "]"),
    ast.Set: ("{", "}"),
    ast.SetComp: ("{", "}"),
    ast.GeneratorExp: ("(", ")"),
}


class Unsupported(Exception):
    """The function is too long, or holds what the canonical vocabulary has no word for."""


class ExpressionWriter:
    """Writes expressions as lexical tokens, literals folded.

    The method `_Name` writes the node type `ast.Name`; a node type without a method is unsupported.

    Args:
        max_tokens: `Unsupported` is raised soon after more tokens than this have been written.

    Attributes:
        tokens: what has been written.
        bound: every name that has been written in a binding position.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.tokens: list[str] = []
        self.bound: set[str] = set()

    def _put(self, *tokens: str) -> None:
        self.tokens.extend(tokens)

    def _bind(self, name: str) -> str:
        self.bound.add(name)
        return f"name {name}"

    def _commas(self, items: Sequence[Any], write: Callable[[Any], None]) -> None:
        for position, item in enumerate(items):
            if position:
                self._put(",")
            write(item)

    def _method(self, node: ast.AST) -> Callable[..., None]:
        method = getattr(self, f"_{type(node).__name__}", None)
        if method is None or len(self.tokens) > self.max_tokens:
            raise Unsupported
        return method

    def _expression(self, node: ast.expr, weakest: int = TEST) -> None:
        """Writes an expression, in parentheses if it binds less tightly than `weakest`."""
        method = self._method(node)
        if precedence(node) < weakest:
            self._put("(")
            method(node)
            self._put(")")
        else:
            method(node)

    # ---- names and literals

    def _Name(self, node: ast.Name) -> None:
        self._put(f"name {node.id}" if isinstance(node.ctx, ast.Load) else self._bind(node.id))

    def _Constant(self, node: ast.Constant) -> None:
        value = node.value
        if value is None or value is True or value is False:
            self._put(str(value))
        elif value is ...:
            self._put("...")
        elif isinstance(value, str | bytes):
            self._put(STRING)
        elif isinstance(value, int):
            self._put(str(value) if value <= int(TWO) else LARGE_INT)
        else:
            self._put(FLOAT)

    def _JoinedStr(self, node: ast.JoinedStr) -> None:
        self._put(STRING)

    def _NamedExpr(self, node: ast.NamedExpr) -> None:
        self._expression(node.target)
        self._put(":=")
        self._expression(node.value)

    def _Tuple(self, node: ast.Tuple) -> None:
        if not node.elts:
            self._put("(", ")")
        self._commas(node.elts, self._expression)
        if len(node.elts) == 1:
            self._put(",")

    def _List(self, node: ast.List | ast.Set) -> None:
        opening, closing = _BRACKETS[type(node)]
        self._put(opening)
        self._commas(node.elts, self._expression)
        self._put(closing)

    _Set = _List

    def _Dict(self, node: ast.Dict) -> None:
        self._put("{")
        self._commas(list(zip(node.keys, node.values, strict=True)), self._dict_item)
        self._put("}")

    def _dict_item(self, item: tuple[ast.expr | None, ast.expr]) -> None:
        key, value = item
        if key is None:
            self._put("**")
            self._expression(value, BITOR)
        else:
            self._expression(key)
            self._put(":")
            self._expression(value)

    # ---- operators

    def _BinOp(self, node: ast.BinOp) -> None:
        symbol, level = BINARY[type(node.op)]
        power = level == POWER  # groups to the right, and takes a signed right side
        self._expression(node.left, level + 1 if power else level)
        self._put(symbol)
        self._expression(node.right, FACTOR if power else level + 1)

    def _UnaryOp(self, node: ast.UnaryOp) -> None:
        symbol, level = UNARY[type(node.op)]
        self._put(symbol)
        self._expression(node.operand, level)

    def _BoolOp(self, node: ast.BoolOp) -> None:
        word, level = ("and", AND) if isinstance(node.op, ast.And) else ("or", OR)
        for position, value in enumerate(node.values):
            if position:
                self._put(word)
            self._expression(value, level + 1)

    def _Compare(self, node: ast.Compare) -> None:
        self._expression(node.left, COMPARE + 1)
        for operator, right in zip(node.ops, node.comparators, strict=True):
            self._put(*COMPARISON[type(operator)])
            self._expression(right, COMPARE + 1)

    def _IfExp(self, node: ast.IfExp) -> None:
        self._expression(node.body, TEST + 1)
        self._put("if")
        self._expression(node.test, TEST + 1)
        self._put("else")
        self._expression(node.orelse)

    def _Await(self, node: ast.Await) -> None:
        self._put("await")
        self._expression(node.value, ATOM)

    def _Yield(self, node: ast.Yield) -> None:
        self._put("yield")
        if node.value:
            self._expression(node.value, TUPLE)

    def _YieldFrom(self, node: ast.YieldFrom) -> None:
        self._put("yield", "from")
        self._expression(node.value)

    # ---- calls, members and comprehensions

    def _Attribute(self, node: ast.Attribute) -> None:
        # 9.a0 would read as the number 9. and a name
        number = isinstance(node.value, ast.Constant) and isinstance(node.value.value, int | float | complex)
        self._expression(node.value, ATOM + number)
        self._put(".", f"member {node.attr}")

    def _Subscript(self, node: ast.Subscript) -> None:
        self._expression(node.value, ATOM)
        self._put("[")
        self._expression(node.slice, TUPLE)
        self._put("]")

    def _Slice(self, node: ast.Slice) -> None:
        if node.lower:
            self._expression(node.lower)
        self._put(":")
        if node.upper:
            self._expression(node.upper)
        if node.step:
            self._put(":")
            self._expression(node.step)

    def _Starred(self, node: ast.Starred) -> None:
        self._put("*")
        self._expression(node.value, BITOR)

    def _Call(self, node: ast.Call) -> None:
        self._expression(node.func, ATOM)
        if len(node.args) == 1 and not node.keywords and isinstance(node.args[0], ast.GeneratorExp):
            self._GeneratorExp(node.args[0])  # its parentheses are those of the call
            return
        self._put("(")
        self._commas([*node.args, *node.keywords], self._argument)
        self._put(")")

    def _argument(self, node: ast.expr | ast.keyword) -> None:
        if isinstance(node, ast.expr):
            self._expression(node)
            return
        self._put(*(["**"] if node.arg is None else [f"member {node.arg}", "="]))
        self._expression(node.value)

    def _ListComp(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp) -> None:
        opening, closing = _BRACKETS[type(node)]
        self._put(opening)
        self._expression(node.elt)
        self._loops(node.generators)
        self._put(closing)

    _SetComp = _ListComp
    _GeneratorExp = _ListComp

    def _DictComp(self, node: ast.DictComp) -> None:
        self._put("{")
        self._dict_item((node.key, node.value))
        self._loops(node.generators)
        self._put("}")

    def _loops(self, generators: Sequence[ast.comprehension]) -> None:
        for loop in generators:
            self._put(*(["async", "for"] if loop.is_async else ["for"]))
            self._expression(loop.target, TUPLE)
            self._put("in")
            self._expression(loop.iter, TEST + 1)
            for condition in loop.ifs:
                self._put("if")
                self._expression(condition, TEST + 1)

    # ---- lambdas and parameters

    def _Lambda(self, node: ast.Lambda) -> None:
        self._put("lambda")
        self._arguments(node.args)
        self._put(":")
        self._expression(node.body)

    def _arguments(self, node: ast.arguments) -> None:
        self._commas(_parameters(node), self._parameter)

    def _parameter(self, parameter: tuple[str, ast.arg | None, ast.expr | None]) -> None:
        mark, argument, default = parameter
        if mark:
            self._put(mark)
        if argument:
            self._put(self._bind(argument.arg))
        if default:
            self._put("=")
            self._expression(default)


def _parameters(node: ast.arguments) -> list[tuple[str, ast.arg | None, ast.expr | None]]:
    """Mark, argument and default of each parameter, the bare "/" and "*" included."""
    positional = node.posonlyargs + node.args
    defaults = [None] * (len(positional) - len(node.defaults)) + node.defaults
    parameters: list[tuple[str, ast.arg | None, ast.expr | None]]
    parameters = [("", argument, default) for argument, default in zip(positional, defaults, strict=True)]
    if node.posonlyargs:
        parameters.insert(len(node.posonlyargs), ("/", None, None))
    if node.vararg or node.kwonlyargs:
        parameters.append(("*", node.vararg, None))
    parameters += [("", argument, default) for argument, default in zip(node.kwonlyargs, node.kw_defaults, strict=True)]
    if node.kwarg:
        parameters.append(("**", node.kwarg, None))
    return parameters

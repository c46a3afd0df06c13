"""From a Python function to lexical tokens, with names still marked: "name x", "module x", "member x"."""

import ast
from collections.abc import Sequence

from crocodil.data.canonical_text import DEDENT, INDENT, NEWLINE, OPERATORS
from crocodil.data.precedence import BINARY, TUPLE, YIELD
from crocodil.data.unparse_expressions import ExpressionWriter, Unsupported

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


class FunctionWriter(ExpressionWriter):
    """Writes one function as lexical tokens: bare strings, annotations and decorators left out, literals folded."""

    def function(self, node: FunctionNode, name: str) -> None:
        """Writes a whole function under the given name token."""
        if isinstance(node, ast.AsyncFunctionDef):
            self._put("async")
        self._put("def", name, "(")
        self._arguments(node.args)
        self._put(")")
        self._block(node.body)

    def _block(self, body: Sequence[ast.stmt]) -> None:
        self._put(":", NEWLINE, INDENT)
        for statement in _kept(body):
            self._statement(statement)
        self._put(DEDENT)

    def _statement(self, node: ast.stmt) -> None:
        self._method(node)(node)
        if self.tokens[-1] != DEDENT:
            self._put(NEWLINE)

    def _FunctionDef(self, node: FunctionNode) -> None:
        self.function(node, self._bind(node.name))

    _AsyncFunctionDef = _FunctionDef

    def _Expr(self, node: ast.Expr) -> None:
        self._expression(node.value, YIELD)

    def _Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self._expression(target, TUPLE)
            self._put("=")
        self._expression(node.value, YIELD)

    def _AnnAssign(self, node: ast.AnnAssign) -> None:
        assert node.value is not None  # a bare annotation leaves nothing
        self._expression(node.target, TUPLE)
        self._put("=")
        self._expression(node.value, YIELD)

    def _AugAssign(self, node: ast.AugAssign) -> None:
        symbol = BINARY[type(node.op)][0] + "="
        if symbol not in OPERATORS:
            raise Unsupported
        self._expression(node.target, TUPLE)
        self._put(symbol)
        self._expression(node.value, YIELD)

    def _Return(self, node: ast.Return) -> None:
        self._put("return")
        if node.value:
            self._expression(node.value, TUPLE)

    def _Raise(self, node: ast.Raise) -> None:
        self._put("raise")
        if node.exc:
            self._expression(node.exc)
        if node.cause:
            self._put("from")
            self._expression(node.cause)

    def _Assert(self, node: ast.Assert) -> None:
        self._put("assert")
        self._commas([node.test, node.msg] if node.msg else [node.test], self._expression)

    def _Delete(self, node: ast.Delete) -> None:
        self._put("del")
        self._commas(node.targets, self._expression)

    def _Pass(self, node: ast.Pass) -> None:
        self._put("pass")

    def _Break(self, node: ast.Break) -> None:
        self._put("break")

    def _Continue(self, node: ast.Continue) -> None:
        self._put("continue")

    def _If(self, node: ast.If, word: str = "if") -> None:
        self._put(word)
        self._expression(node.test)
        self._block(node.body)
        match _kept(node.orelse):
            case [ast.If() as inner]:
                self._If(inner, "elif")
            case _:
                self._otherwise(node.orelse)

    def _otherwise(self, body: list[ast.stmt], word: str = "else") -> None:
        if body:
            self._put(word)
            self._block(body)

    def _While(self, node: ast.While) -> None:
        self._put("while")
        self._expression(node.test)
        self._block(node.body)
        self._otherwise(node.orelse)

    def _For(self, node: ast.For | ast.AsyncFor) -> None:
        if isinstance(node, ast.AsyncFor):
            self._put("async")
        self._put("for")
        self._expression(node.target, TUPLE)
        self._put("in")
        self._expression(node.iter, TUPLE)
        self._block(node.body)
        self._otherwise(node.orelse)

    _AsyncFor = _For

    def _With(self, node: ast.With | ast.AsyncWith) -> None:
        if isinstance(node, ast.AsyncWith):
            self._put("async")
        self._put("with")
        self._commas(node.items, self._with_item)
        self._block(node.body)

    _AsyncWith = _With

    def _with_item(self, item: ast.withitem) -> None:
        if isinstance(item.context_expr, ast.Tuple):  # its parentheses would read as those of the statement
            raise Unsupported
        self._expression(item.context_expr)
        if item.optional_vars:
            self._put("as")
            self._expression(item.optional_vars)

    def _Try(self, node: ast.Try) -> None:
        self._put("try")
        self._block(node.body)
        for handler in node.handlers:
            self._put("except")
            if handler.type:
                self._expression(handler.type)
            if handler.name:
                self._put("as", self._bind(handler.name))
            self._block(handler.body)
        self._otherwise(node.orelse)
        self._otherwise(node.finalbody, "finally")

    def _Import(self, node: ast.Import) -> None:
        self._put("import")
        self._commas(node.names, self._imported_module)

    def _imported_module(self, alias: ast.alias) -> None:
        first, *rest = alias.name.split(".")
        if alias.asname is None:
            self._dotted(self._bind(first), rest)
        else:
            self._dotted(f"module {first}", rest)
            self._put("as", self._bind(alias.asname))

    def _dotted(self, first: str, rest: Sequence[str]) -> None:
        self._put(first)
        for part in rest:
            self._put(".", f"member {part}")

    def _ImportFrom(self, node: ast.ImportFrom) -> None:
        self._put("from", *["..."] * (node.level // 3), *["."] * (node.level % 3))
        if node.module:
            first, *rest = node.module.split(".")
            self._dotted(f"module {first}", rest)
        self._put("import")
        self._commas(node.names, self._imported_member)

    def _imported_member(self, alias: ast.alias) -> None:
        if alias.name == "*":
            raise Unsupported
        if alias.asname is None:
            self._put(self._bind(alias.name))
        else:
            self._put(f"member {alias.name}", "as", self._bind(alias.asname))


def _kept(body: Sequence[ast.stmt]) -> list[ast.stmt]:
    """A block without bare strings (docstrings above all) and bare annotations; `pass` if nothing else was there."""
    kept = [statement for statement in body if not _leaves_nothing(statement)]
    return kept or [ast.Pass() for _ in body[:1]]


def _leaves_nothing(node: ast.stmt) -> bool:
    if isinstance(node, ast.AnnAssign):
        return node.value is None
    if not isinstance(node, ast.Expr):
        return False
    value = node.value
    return isinstance(value, ast.JoinedStr) or (
        isinstance(value, ast.Constant) and isinstance(value.value, str | bytes)
    )

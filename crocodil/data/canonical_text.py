"""Canonical tokens and the Python text they stand for: the fixed vocabulary, tokens to text, text to tokens."""

import re
from collections.abc import Sequence
from functools import lru_cache
from io import StringIO

SPECIAL_TOKENS = ("[EOS]", "[BOS]", "[MASK]", "[UNK]")
NEWLINE, INDENT, DEDENT = STRUCTURE_TOKENS = ("[NEWLINE]", "[INDENT]", "[DEDENT]")
# fmt: off
KEYWORDS = (
    "None", "True", "False", "and", "as", "assert", "async", "await", "break", "continue", "def", "del", "elif",
    "else", "except", "finally", "for", "from", "if", "import", "in", "is", "lambda", "not", "or", "pass", "raise",
    "return", "try", "while", "with", "yield",
)
OPERATORS = (
    "(", ")", "[", "]", "{", "}", ",", ":", ".", "...", "=", ":=", "==", "!=", "<", ">", "<=", ">=",
    "+", "-", "*", "/", "//", "%", "**", "@", "&", "|", "^", "~", "<<", ">>", "+=", "-=", "*=", "/=",
    "//=", "%=", "|=", "&=",
)
KEPT_NAMES = (
    "len", "range", "isinstance", "int", "str", "float", "bool", "list", "dict", "tuple",
    "set", "print", "super", "enumerate", "zip", "min", "max", "sum", "any", "all",
    "sorted", "getattr", "hasattr", "type", "open", "Exception", "ValueError", "TypeError", "KeyError", "self",
)
# fmt: on
OWN_NAME = "f"
STRING, ZERO, ONE, TWO, LARGE_INT, FLOAT = LITERALS = ("'s'", "0", "1", "2", "9", "0.5")
MAX_NAMES = 12
NUMBERED_NAMES = tuple(f"{role}{number}" for role in "vag" for number in range(MAX_NAMES))
CANONICAL_TOKENS = (
    SPECIAL_TOKENS + STRUCTURE_TOKENS + KEYWORDS + OPERATORS + (OWN_NAME, *KEPT_NAMES) + LITERALS + NUMBERED_NAMES
)

_VALUES = {"None", "True", "False", OWN_NAME, *KEPT_NAMES, *LITERALS, *NUMBERED_NAMES, "..."}
_OPERANDS = _VALUES | {")", "]", "}"}
_SYMBOLS = set(OPERATORS)
_WORDS = _VALUES | set(KEYWORDS)
_SIGNS = {"+", "-", "~", "*", "**"}
_CLOSING = {"(": ")", "[": "]", "{": "}"}
_LEXEME = re.compile(
    r"[A-Za-z_]\w*|\d+\.\d*|\.\d+|\d+|'[^'\n]*'|\"[^\"\n]*\"|"
    + "|".join(re.escape(operator) for operator in sorted(OPERATORS, key=len, reverse=True))
    + r"|[^\s]"
)


def render(tokens: Sequence[str]) -> str:
    """Python text of canonical tokens, with 4-space indents.

    Never raises. A token that cannot stand where it stands (a mask, an unknown token, [INDENT] inside a line,
    [DEDENT] below zero or at the very end, [NEWLINE] inside brackets) shows as `$` and its name, which no Python
    parser accepts: a broken sequence never parses by luck.

    Args:
        tokens: any strings; those of `canonical_functions` give text that `ast.parse` accepts.

    Returns:
        The text; a final [NEWLINE] gives a final line break.
    """
    writer = _Writer()
    for token in tokens:
        writer.write(token)
    return writer.finish()


def tokenize(text: str) -> list[str]:
    r"""Canonical tokens of canonical Python text, the inverse of `render`.

    Lenient about spacing, blank lines and the width of indents, and the text may stop anywhere.

    Args:
        text: Python text in canonical names, for example `"def f(v0, v1):\n    return v0"`.

    Returns:
        Tokens; a line break at depth zero gives [NEWLINE], and the end of the text gives nothing.

    Raises:
        ValueError: if a token is not one of `CANONICAL_TOKENS`, or if an indent fits no open block.
    """
    tokens: list[str] = []
    indents = [0]
    depth = 0
    for line in StringIO(text):
        lexemes = _LEXEME.findall(line)
        if not lexemes:
            continue
        if depth == 0:
            tokens += _indentation(len(line) - len(line.lstrip()), indents, line.strip())
        for lexeme in lexemes:
            if lexeme not in _WORDS and lexeme not in _SYMBOLS:
                raise ValueError(
                    f"the text must be canonical Python (names v0.., a0.., g0.., the string 's', the numbers "
                    f"0, 1, 2, 9, 0.5), got the token {lexeme!r} in the line {line.strip()!r}."
                )
            depth += (lexeme in "([{") - (lexeme in ")]}")
        tokens += lexemes
        depth = max(depth, 0)
        if depth == 0 and line.endswith("\n"):
            tokens.append(NEWLINE)
    return tokens


def _indentation(width: int, indents: list[int], line: str) -> list[str]:
    if width > indents[-1]:
        indents.append(width)
        return [INDENT]
    closed = []
    while width < indents[-1]:
        indents.pop()
        closed.append(DEDENT)
    if width != indents[-1]:
        raise ValueError(f"every line must be indented like its block, got {width} spaces before {line!r}.")
    return closed


@lru_cache(maxsize=65536)
def _stay_apart(left: str, right: str) -> bool:
    return _LEXEME.findall(left + right) == [left, right]


class _Writer:
    """Writes tokens one at a time; knows the open brackets, the open lambdas and the depth of the block."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.previous = ""  # the token before on this line; "" at the start of a line
        self.tight = False  # whether the next token joins the previous one
        self.depth = 0
        self.shift = 0  # structure tokens of this line so far: 1 for [INDENT], below 0 for [DEDENT]s
        self.brackets: list[str] = []
        self.lambdas: list[int] = []  # for each open lambda head, the number of brackets around it

    def write(self, token: str) -> None:
        if token == NEWLINE and self.previous:
            self._end_line()
        elif token == INDENT and not self.previous and self.shift == 0 and self.parts:
            self.shift = 1
        elif token == DEDENT and not self.previous and self.shift <= 0 and self.depth + self.shift > 0:
            self.shift -= 1
        elif token in _WORDS or token in _SYMBOLS:
            self._put(token)
        else:
            self._put(f"${token}")

    def finish(self) -> str:
        if self.shift:
            self._put(f"${INDENT if self.shift > 0 else DEDENT}")
        return "".join(self.parts)

    def _end_line(self) -> None:
        if self.brackets:
            self._put(f"${NEWLINE}")
        self.parts.append("\n")
        self.previous, self.tight = "", False
        self.brackets.clear()
        self.lambdas.clear()

    def _put(self, token: str) -> None:
        if not self.previous:
            self.depth += self.shift
            self.shift = 0
            self.parts.append("    " * self.depth)
        elif not (self._joins(token) and _stay_apart(self.previous, token)):
            self.parts.append(" ")
        self.parts.append(token)
        self.tight = self._joins_next(token)
        self._track(token)
        self.previous = token

    def _joins(self, token: str) -> bool:
        if token in (")", "]", "}", ",", ":"):
            return (self.previous, token) != (",", ":")
        if token == "=":
            return self._names_argument()
        if token in ("(", "[", "."):
            return self.tight or self.previous in _OPERANDS
        return self.tight and token != "import"

    def _joins_next(self, token: str) -> bool:
        if token in _CLOSING or (token in _SIGNS and self.previous not in _OPERANDS):
            return True
        if token == "." or (token == "..." and self.previous in ("from", "...")):
            return True
        if token == "=":
            return self._names_argument()
        return token == ":" and self.brackets[-1:] == ["["] and not self._heads_lambda()

    def _names_argument(self) -> bool:
        return bool(self.brackets) or self._heads_lambda()

    def _heads_lambda(self) -> bool:
        return bool(self.lambdas) and self.lambdas[-1] == len(self.brackets)

    def _track(self, token: str) -> None:
        if token in _CLOSING:
            self.brackets.append(token)
        elif self.brackets and token == _CLOSING[self.brackets[-1]]:
            self.brackets.pop()
        elif token == "lambda":
            self.lambdas.append(len(self.brackets))
        elif token == ":" and self._heads_lambda():
            self.lambdas.pop()

import ast
import random
import re
import subprocess
import sys
import textwrap

import pytest

from crocodil.data.canonical import CANONICAL_TOKENS, canonical_functions, render, tokenize
from crocodil.data.canonical_text import SPECIAL_TOKENS, STRUCTURE_TOKENS
from crocodil.data.corpora import standard_library_files

DEFINITIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

EXAMPLES = {
    "names": (
        "def area(shape, scale=1.0):\n    '''Doc.'''\n    size: int = shape.width * shape.height\n"
        "    return round(size * scale, ndigits=3)\n",
        "def f(v0, v1=0.5):\n    v2 = v0.a0 * v0.a1\n    return g0(v2 * v1, a2=9)\n",
    ),
    "recursion and builtins": (
        "def fact(n):\n    return 1 if n < 2 else n * fact(n - 1) + len([n])\n",
        "def f(v0):\n    return 1 if v0 < 2 else v0 * f(v0 - 1) + len([v0])\n",
    ),
    "a local name that hides a builtin": (
        "def g(len):\n    return len(range(17))\n",
        "def f(v0):\n    return v0(range(9))\n",
    ),
    "method": (
        "class A:\n    @property\n    def b(self) -> int:\n        return self._b[-1:, ::2]\n",
        "def f(self):\n    return self.a0[-1:, ::2]\n",
    ),
    "empty body": ("def g(x: int) -> None:\n    'only a docstring'\n    x: str\n", "def f(v0):\n    pass\n"),
    "strings": (
        "def g(x):\n    log('a' 'b', b'c', f'{x} {(y := x)}')\n    f'bare'\n",
        "def f(v0):\n    g0('s', 's', 's')\n",
    ),
    "values": ("def g(): return a((), 1j, ..., (1).real)\n", "def f():\n    return g0((), 0.5, ..., (1).a0)\n"),
    "imports": (
        "def g():\n    import os.path, json as j\n    from ... import a\n    from .b.c import d as e\n",
        "def f():\n    import v0.a0, g0 as v1\n    from ... import v2\n    from .g1.a1 import a2 as v3\n",
    ),
    "spacing": (
        "def g(a, /, *b, c, **d):\n    a = -b[0] ** ~c if not d else lambda x=1, *y: (yield)\n    print(*b, **d)\n",
        "def f(v0, /, *v1, v2, **v3):\n    v0 = -v1[0] ** ~v2 if not v3 else lambda v4=1, *v5: (yield)\n"
        "    print(*v1, **v3)\n",
    ),
}

# Statements whose parentheses and separators are easy to get wrong; each becomes a function of its own.
HARD = """
a, *b = b, = c = yield a, b
x = (yield)
x = await (await a)(b) ** -await c
x = (a or b) or c or (d and (not a)) and not (a or b)
x = (a if b else c) if (lambda: a) else (lambda: (b, c))
x = -(-a) ** -(b ** c) ** (a ** b) ** (-c) + (+a) * ~(b + c) @ (a @ b)
x = a - (b - c) - c, a << (b << c) >> a, (a | b) ^ c & (a ^ b) | c
x = a < b < (c < d), (a < b) < c, (a in b) is not (c not in d), not a in b
x = [*a, *(b or c)], {**a, **(b or c), (yield): 1}, {*a, b}, (*a,), (), [], {}
x = a[()], a[b,], a[1:2, ::b], a[(b, c):], a[*b, c], a[b:=1], (1).real, (0.5).hex(), 1j.imag
x = [(i, j) for i, (j, *k) in (a if b else c) if (lambda: i) if i if (j := i) async for i, in (a, b)]
x = {i: (yield j) for i, j in a}, {i for i in a}, f(i for i in a), f((i for i in a), b), f(*a or b, c=1, **d)
(x) = a if (b := c) else (yield from a)
(a.b): int = 1, 2
a.b[c] += yield
a += 1, *b
for x, *y in *a, (b, c):
    continue
else:
    pass
async for x in (yield):
    break
while (a := b) and (yield):
    del a.b, (a, b), [c], x[1]
with a as (b, c), (yield) as d.e, (x := y), open(a)[0] as [b, *c]:
    assert (a, b), (a, c)
async with a:
    raise (a, b) from (yield)
try:
    import a.b.c as d, e
    from . import f as g, h
    from .... import i
except (a, b) as e:
    return *a, b
except (yield):
    return (yield a), (a := b)
except:
    return
else:
    if a:
        pass
    elif b:
        f"{a:{b}}"
    else:
        if c:
            ...
        x = 1
finally:
    pass
if (yield):
    @decorated
    def inner(a=lambda x, /, y, *, z=(yield): x, *b: int) -> int:
        "docstring"
        return lambda *a, b, **c: (a, b)
    async def also(): "docstring"
if a:
    "dropped"
else:
    "dropped, so that what follows is an elif"
    if b:
        x: int
    else:
        "dropped"
return lambda *, a: 0
"""


@pytest.fixture(scope="module")
def sources() -> list[str]:
    statements = [ast.unparse(statement) for statement in ast.parse(HARD).body]
    hard = [f"async def hard(a, b, c, d):\n{textwrap.indent(statement, '    ')}\n" for statement in statements]
    return hard + [file.path.read_text(encoding="utf-8") for file in standard_library_files()[::20]]


@pytest.fixture(scope="module")
def functions(sources: list[str]) -> list[list[str]]:
    return [tokens for source in sources for tokens in canonical_functions(source)]


class Folded(ast.NodeTransformer):
    """What canonical functions leave out of a syntax tree, left out in another way."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        blocks = [field for field in ("body", "orelse", "finalbody") if isinstance(getattr(node, field, None), list)]
        filled = [field for field in blocks if getattr(node, field)]
        super().generic_visit(node)
        for field in filled:
            setattr(node, field, getattr(node, field) or [ast.Pass()])
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str | bytes)
        return None if is_text or isinstance(node.value, ast.JoinedStr) else self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        return node.value and self.generic_visit(ast.Assign([node.target], node.value))

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        return ast.Constant("s")

    def visit_arg(self, node: ast.arg) -> ast.AST:
        return ast.arg("v0")

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.AST:
        node.decorator_list, node.returns = [], None
        return self.generic_visit(node)

    visit_AsyncFunctionDef = visit_FunctionDef


def skeleton(function: ast.AST) -> list[str]:
    return [type(node).__name__ for node in ast.walk(Folded().visit(function))]


def flat_functions(source: str) -> list[ast.AST]:
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, DEFINITIONS)]
    return [node for node in nodes if sum(isinstance(inner, DEFINITIONS) for inner in ast.walk(node)) == 1]


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_render_as_a_person_would_write_them(name: str) -> None:
    source, expected = EXAMPLES[name]
    (tokens,) = canonical_functions(source)
    assert render(tokens) == expected


def test_vocabulary_is_fixed() -> None:
    assert CANONICAL_TOKENS[:4] == SPECIAL_TOKENS == ("[EOS]", "[BOS]", "[MASK]", "[UNK]")
    assert len(CANONICAL_TOKENS) == len(set(CANONICAL_TOKENS)) == 152


def test_every_function_renders_to_python_and_back(functions: list[list[str]]) -> None:
    assert len(functions) > 500
    vocabulary = set(CANONICAL_TOKENS) - set(SPECIAL_TOKENS)
    for tokens in functions:
        assert vocabulary.issuperset(tokens)
        text = render(tokens)
        assert tokenize(text) == tokens
        assert next(canonical_functions(text)) == tokens  # idempotent, and it parses


def test_rendered_functions_have_the_syntax_tree_of_their_source(sources: list[str]) -> None:
    compared = 0
    for source in sources:
        for node in flat_functions(source):
            for tokens in canonical_functions(ast.unparse(node)):
                assert skeleton(ast.parse(render(tokens)).body[0]) == skeleton(node), render(tokens)
                compared += 1
    assert compared > 500


def test_hard_statements_are_all_supported(sources: list[str]) -> None:
    for source in sources[: len(ast.parse(HARD).body)]:
        tokens = next(canonical_functions(source), None)
        assert tokens is not None, source
        assert skeleton(ast.parse(render(tokens)).body[0]) == skeleton(ast.parse(source).body[0]), source


class Renamed(ast.NodeTransformer):
    """Renames parameters and assigned names, and nothing else."""

    def __init__(self, function: ast.AST) -> None:
        nodes = list(ast.walk(function))
        self.names = {node.arg for node in nodes if isinstance(node, ast.arg)}
        self.names |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        self.names -= {"self"}
        # bound by a bare string in the tree, out of this transformer's reach
        self.names -= {alias.asname or alias.name.split(".")[0] for alias in nodes if isinstance(alias, ast.alias)}
        self.names -= {handler.name for handler in nodes if isinstance(handler, ast.ExceptHandler)}

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Name(f"other_{node.id}", node.ctx) if node.id in self.names else node

    def visit_arg(self, node: ast.arg) -> ast.AST:
        return ast.arg(f"other_{node.arg}") if node.arg in self.names else node


def test_renaming_local_names_changes_nothing(sources: list[str]) -> None:
    renamed = 0
    for source in sources:
        for node in flat_functions(source):
            before = ast.unparse(node)
            after = ast.unparse(Renamed(node).visit(node))
            assert list(canonical_functions(before)) == list(canonical_functions(after))
            renamed += before != after
    assert renamed > 300


@pytest.mark.parametrize(
    "body",
    [
        "class A: pass",
        "global x",
        "x = 0\n    def g():\n        nonlocal x",
        "match x:\n        case 1: pass",
        "x >>= 1",
        "from a import *",
        "with ((a, b)): pass",
        "try: pass\n    except* A: pass",
        "return " + " + ".join(f"g{i}" for i in range(13)),
        "return " + " + ".join(f"x.a{i}" for i in range(13)),
        "; ".join(f"v{i} = 0" for i in range(13)),
    ],
)
def test_what_does_not_fit_is_skipped(body: str) -> None:
    source = f"def skipped():\n    {body}\n\ndef kept(): return 'kept'\n"
    assert [render(tokens) for tokens in canonical_functions(source)] == ["def f():\n    return 's'\n"]


def test_twelve_names_of_each_kind_fit() -> None:
    source = "def g():\n    " + "\n    ".join(f"x{i} = g{i}.a{i}" for i in range(12))
    assert len(list(canonical_functions(source))) == 1


def test_functions_come_in_source_order_each_by_itself() -> None:
    source = "if a:\n  class A:\n    def b(c):\n      async def d(): return c\nelse:\n  def e(): return 0\n"
    assert [render(tokens) for tokens in canonical_functions(source)] == [
        "def f(v0):\n    async def v1():\n        return v0\n",
        "async def f():\n    return g0\n",
        "def f():\n    return 0\n",
    ]


def test_max_tokens_is_exact() -> None:
    source = "def g(x):\n    for y in x:\n        print(y)\n"
    (tokens,) = canonical_functions(source)
    assert list(canonical_functions(source, max_tokens=len(tokens))) == [tokens]
    assert list(canonical_functions(source, max_tokens=len(tokens) - 1)) == []


@pytest.mark.parametrize("source", ["def g(:", "\0", "(" * 300, "-" * 100_000 + "1"])
def test_unparsable_source_is_a_value_error(source: str) -> None:
    with pytest.raises(ValueError, match="source"):
        list(canonical_functions(source))


def test_broken_sequences_never_raise_and_never_parse_by_luck(functions: list[list[str]]) -> None:
    generator = random.Random(0)
    parsed = 0
    for tokens in generator.sample(functions, 500):
        for _ in range(12):
            broken = list(tokens)
            for _ in range(generator.choice([1, 1, 2, 3])):
                position = generator.randrange(len(broken))
                token = generator.choice(generator.choice([STRUCTURE_TOKENS, CANONICAL_TOKENS]))
                broken[position : position + generator.randrange(2)] = [token] * generator.randrange(1, 3)
            text = render(broken)
            try:
                ast.parse(text)
            except SyntaxError:
                continue
            parsed += 1
            assert tokenize(text) == broken, text
    assert parsed > 100


@pytest.mark.parametrize(
    "tokens",
    [
        "def f ( ) : [NEWLINE] return [NEWLINE]",  # a block never indented
        "def f ( ) : [NEWLINE] [INDENT] [INDENT] return [NEWLINE]",
        "def f ( ) : [NEWLINE] [INDENT] return [NEWLINE] [DEDENT]",  # left out at the very end
        "def f ( ) : [NEWLINE] [INDENT] return [NEWLINE] [DEDENT] [DEDENT] return [NEWLINE]",
        "def f ( ) : [NEWLINE] [INDENT] return [NEWLINE] [NEWLINE] return [NEWLINE]",
        "def f ( ) : [NEWLINE] [INDENT] return [NEWLINE] [INDENT] [DEDENT] return [NEWLINE]",
        "def f ( ) : [NEWLINE] [INDENT] return ( [NEWLINE] ) [NEWLINE]",
        "def f ( ) : [NEWLINE] [INDENT] return [INDENT] 0 [NEWLINE]",
        "def f ( ) : [NEWLINE] [INDENT] return v0 [MASK] [NEWLINE]",
        "def f ( ) : [NEWLINE] [INDENT] return [UNK] [NEWLINE]",
        "def f ( ) : [NEWLINE] [INDENT] return v0 ( * * v1 ) [NEWLINE]",
        "def f ( ) : [NEWLINE] [INDENT] v0 + = 1 [NEWLINE]",
        "[INDENT] f",
        "[DEDENT] f",
        "[NEWLINE] f",
        "# f",
    ],
)
def test_broken_structure_does_not_parse(tokens: str) -> None:
    with pytest.raises(SyntaxError):
        ast.parse(render(tokens.split()))


def test_random_tokens_never_raise() -> None:
    generator = random.Random(0)
    for _ in range(2000):
        render(generator.choices([*CANONICAL_TOKENS, "", "é", "'", "two\nlines"], k=generator.randrange(40)))


def test_tokenize_is_lenient_about_layout_and_unfinished_text() -> None:
    tokens = tokenize("def f(v0, v1):\n    return v0")
    assert tokens == ["def", "f", "(", "v0", ",", "v1", ")", ":", "[NEWLINE]", "[INDENT]", "return", "v0"]
    assert tokenize("def f( v0,\r\n  v1 ) :\r\n\n\n  return v0") == tokens
    assert tokenize("def f(v0, v1):\n    return v0\n    ") == [*tokens, "[NEWLINE]"]
    assert tokenize("v0)\nv1") == ["v0", ")", "[NEWLINE]", "v1"]


@pytest.mark.parametrize(
    ("text", "foreign"),
    [
        ("def area", "area"),
        ("v0 = v12", "v12"),
        ("class f", "class"),
        ("v0 = 3", "3"),
        ("v0 = 's", "'"),
        ("v0 = 'text'", "'text'"),
        ("v0 = é", "é"),
        ("v0 = $[MASK]", "$"),
        ("v0 = [MASK]", "MASK"),
    ],
)
def test_tokenize_names_the_foreign_token(text: str, foreign: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"got the token {foreign!r} in the line {text!r}")):
        tokenize(text)


def test_tokenize_refuses_an_indent_that_fits_no_block() -> None:
    with pytest.raises(ValueError, match="2 spaces before 'return'"):
        tokenize("def f():\n    if v0:\n        return\n  return")


def test_worker_processes_import_no_heavy_library() -> None:
    code = "import sys, crocodil.data.functions; print({'torch', 'lightning', 'numpy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"

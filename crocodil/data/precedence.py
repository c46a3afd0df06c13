"""How tightly the operators of Python bind, and how they are written."""

import ast

# Precedence of expressions, weakest first, as in the grammar of the language.
YIELD, TUPLE, TEST, OR, AND, NOT, COMPARE, BITOR, BITXOR, BITAND, SHIFT, SUM, TERM, FACTOR, POWER, AWAIT, ATOM = range(
    17
)

BINARY: dict[type[ast.operator], tuple[str, int]] = {
    ast.BitOr: ("|", BITOR),
    ast.BitXor: ("^", BITXOR),
    ast.BitAnd: ("&", BITAND),
    ast.LShift: ("<<", SHIFT),
    ast.RShift: (">>", SHIFT),
    ast.Add: ("+", SUM),
    ast.Sub: ("-", SUM),
    ast.Mult: ("*", TERM),
    ast.Div: ("/", TERM),
    ast.FloorDiv: ("//", TERM),
    ast.Mod: ("%", TERM),
    ast.MatMult: ("@", TERM),
    ast.Pow: ("**", POWER),
}
UNARY: dict[type[ast.unaryop], tuple[str, int]] = {
    ast.USub: ("-", FACTOR),
    ast.UAdd: ("+", FACTOR),
    ast.Invert: ("~", FACTOR),
    ast.Not: ("not", NOT),
}
COMPARISON: dict[type[ast.cmpop], tuple[str, ...]] = {
    ast.Eq: ("==",),
    ast.NotEq: ("!=",),
    ast.Lt: ("<",),
    ast.LtE: ("<=",),
    ast.Gt: (">",),
    ast.GtE: (">=",),
    ast.Is: ("is",),
    ast.IsNot: ("is", "not"),
    ast.In: ("in",),
    ast.NotIn: ("not", "in"),
}


def precedence(node: ast.expr) -> int:
    """How tightly the outermost operator of an expression binds; a walrus, always in parentheses, least of all."""
    match node:
        case ast.NamedExpr():
            return YIELD - 1
        case ast.Yield() | ast.YieldFrom():
            return YIELD
        case ast.Tuple():
            return TUPLE if node.elts else ATOM
        case ast.Lambda() | ast.IfExp():
            return TEST
        case ast.BoolOp():
            return AND if isinstance(node.op, ast.And) else OR
        case ast.UnaryOp():
            return UNARY[type(node.op)][1]
        case ast.Compare():
            return COMPARE
        case ast.BinOp():
            return BINARY[type(node.op)][1]
        case ast.Await():
            return AWAIT
        case _:
            return ATOM

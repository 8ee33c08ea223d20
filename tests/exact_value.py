"""The exact value of an expression by Python's own grammar: independent of the parser of the package."""

import ast
import operator
from fractions import Fraction

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def value(text: str, x: Fraction | None = None) -> Fraction:
    """The value of `text`, in which any name stands for `x`."""

    def walk(node: ast.expr) -> Fraction:
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](walk(node.left), walk(node.right))
        if isinstance(node, ast.UnaryOp):
            assert isinstance(node.op, ast.USub)
            return -walk(node.operand)
        if isinstance(node, ast.Name):
            assert x is not None
            return x
        assert isinstance(node, ast.Constant) and type(node.value) is int
        return Fraction(node.value)

    return walk(ast.parse(text.strip(), mode="eval").body)

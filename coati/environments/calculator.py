"""A question, and a calculator to answer it with."""

import ast
import operator
from fractions import Fraction
from typing import Any

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
LONGEST = 200  # characters of an expression


class Calculator:
    """A row has `question`. What the policy says in the end is for the run's rewards to score, such as `math`."""

    def reset(self, row: dict[str, Any]) -> str:
        return row["question"]

    def calculate(self, expression: str) -> str:
        """Calculates with + - * / and brackets, exactly.

        Args:
            expression: such as 12 * (3 + 4)
        """
        if len(expression) > LONGEST:
            raise ValueError(f"the expression has more than {LONGEST} characters")
        try:
            return str(value_of(ast.parse(expression.strip(), mode="eval").body))
        except SyntaxError:
            raise ValueError("this is no expression") from None


def value_of(node: ast.expr) -> Fraction:
    """The value of an expression of numbers, + - * / and brackets."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](value_of(node.left), value_of(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](value_of(node.operand))
    raise ValueError(f"only numbers, + - * / and brackets: {ast.unparse(node)}")

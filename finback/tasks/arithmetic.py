"""Whole-number arithmetic with several operators: precedence, negative results, columns worked out."""

import random

from finback.tasks import worked
from finback.tasks.base import Problem, Task, casual, final_answer, parse_number, pick_length

FORMS = (
    "What is {e}?",
    "Compute {e}.",
    "Calculate {e}.",
    "{e}",
    "{e} = ?",
    "{e}=",
    "How much is {e}?",
    "Work out {e}.",
    "Evaluate {e}.",
    "Please calculate {e}.",
    "Can you tell me what {e} is?",
    "What's {e}?",
    "Find the value of {e}.",
    "Solve {e}",
    "I need the result of {e}.",
    "what does {e} equal?",
)
#: An answer may repeat the expression: "3 + 4 = 7".
BEFORE = r"[-+*/()0-9 ×÷−x]*= *"
WORDS = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}
Token = int | str


class Arithmetic(Task):
    name = "arithmetic"
    description = "whole-number arithmetic: 3 operands of up to 3 digits, + - and at most one product"

    def generate(self, rng: random.Random, difficulty: int) -> Problem:
        tokens = _expression(rng, difficulty)
        key = render(tokens)
        lines, value = solve(tokens)
        question = casual(rng, rng.choice(FORMS).format(e=_written(rng, tokens)))
        return self.problem(difficulty, question, "\n".join(lines), str(value), key, {"value": value})

    def verify(self, problem: Problem, response: str) -> bool:
        return parse_number(final_answer(response, BEFORE), "whole") == problem.data["value"]


def _expression(rng: random.Random, level: int) -> list[Token]:
    """Terms joined by + and -; a term is a number, a product, an exact division or a bracket times a factor."""
    operands, longest = {1: (2, 2), 2: (2, 3), 3: (3, 3), 4: (4, 3), 5: (5, 4)}[level]
    pairs = 0 if level == 1 else rng.randint(0, 1) if level < 4 else rng.randint(1, 2)
    terms: list[list[Token]] = []
    for _ in range(pairs):
        terms.append(_pair(rng, longest, level))
    while sum(isinstance(token, int) for term in terms for token in term) < operands:
        terms.append([pick_length(rng, longest)])
    rng.shuffle(terms)
    tokens = terms[0]
    for term in terms[1:]:
        tokens = [*tokens, rng.choice("+-"), *term]
    return tokens


def _pair(rng: random.Random, longest: int, level: int) -> list[Token]:
    kind = rng.random() if level >= 4 else 1.0
    factor, other = pick_length(rng, 2), pick_length(rng, longest)
    if kind < 0.3:
        divisor = rng.randint(2, 12)
        return [divisor * other, "/", divisor]
    if kind < 0.6:
        return ["(", pick_length(rng, 2), rng.choice("+-"), pick_length(rng, 2), ")", "*", factor]
    return [other, "*", factor] if rng.random() < 0.5 else [factor, "*", other]


def render(tokens: list[Token]) -> str:
    """`5+(-7)*2`: no spaces; a negative number that is not first stands in brackets."""
    return "".join(f"({t})" if place and isinstance(t, int) and t < 0 else str(t) for place, t in enumerate(tokens))


def _written(rng: random.Random, tokens: list[Token]) -> str:
    style = rng.random()
    if style < 0.08 and "(" not in tokens:
        return " ".join(WORDS.get(str(token), str(token)) for token in tokens)
    times = rng.choice(("*", "*", "×", "x"))
    divide = rng.choice(("/", "/", "÷"))
    shown = [times if t == "*" else divide if t == "/" else str(t) for t in tokens]
    text = ("" if style < 0.35 else " ").join(shown)
    return text.replace("( ", "(").replace(" )", ")")


def solve(tokens: list[Token]) -> tuple[list[str], int]:
    """The expression, then for each operation its columns and the shorter expression: brackets, * and /, + and -."""
    tokens, lines = list(tokens), [render(tokens)]
    while len(tokens) > 1:
        place = _next_operation(tokens)
        steps, value = _operate(tokens[place - 1], str(tokens[place]), tokens[place + 1])
        lines += steps
        start, end = place - 1, place + 2
        if start and tokens[start - 1] == "(":
            start, end = start - 1, end + 1
        tokens[start:end] = [value]
        if len(tokens) > 1:
            lines.append(render(tokens))
    assert isinstance(tokens[0], int)
    return lines, tokens[0]


def _next_operation(tokens: list[Token]) -> int:
    if "(" in tokens:
        return tokens.index("(") + 2
    return next((n for n, t in enumerate(tokens) if t in ("*", "/")), 1)


def _operate(a: Token, operator: str, b: Token) -> tuple[list[str], int]:
    assert isinstance(a, int) and isinstance(b, int)
    if operator in "+-":
        b = b if operator == "+" else -b
        return [worked.signed_sum(a, b)], a + b
    negative = (a < 0) != (b < 0)
    if operator == "*":
        lines, value = worked.product(abs(a), abs(b)), a * b
    else:
        lines, value = [worked.division(abs(a), abs(b))], a // b
    if negative and value:
        lines.append(f"minus: {value}")
    return lines, value

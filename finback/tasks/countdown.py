"""Countdown: combine every given number once with + - * / to hit a target; the search is written out."""

import random
from fractions import Fraction

from finback.tasks.base import Problem, Task, casual, final_answer, join_words
from finback.tasks.expression import evaluate

FORMS = (
    "Use {n} to make {t}.",
    "Use each of the numbers {n} exactly once to make {t}.",
    "Using the numbers {n}, reach {t}.",
    "Make {t} from {n}.",
    "Combine {n} with + - * / to get {t}.",
    "How can you get {t} from {n}?",
    "Countdown: numbers {n}, target {t}",
    "Write an expression that equals {t} and uses {n} once each.",
    "Reach {t} with {n}.",
    "numbers: {n}; target: {t}",
    "get {t} using {n}",
)
COUNTS = {1: 3, 2: 3, 3: 3, 4: 4, 5: 5}
LARGEST = {1: 9, 2: 15, 3: 25, 4: 25, 5: 25}
TARGETS = {1: 30, 2: 40, 3: 50, 4: 100, 5: 200}
LARGEST_NEED = 99
Value = tuple[int, str]
Move = tuple[int, int, str]


class Countdown(Task):
    name = "countdown"
    description = "reach a target up to 50 with three numbers from 1 to 25, each used once, and + - * /"

    def generate(self, rng: random.Random, difficulty: int) -> Problem:
        numbers, target, moves = _draw(rng, difficulty)
        shown = [str(n) for n in numbers]
        steps, found = _search(rng, list(zip(numbers, shown, strict=True)), target, moves)
        if not found:
            return self.generate(rng, difficulty)
        lines = [f"{' '.join(shown)} -> {target}", *steps, f"{found} = {target}"]
        listed = ", ".join(shown) if rng.random() < 0.5 else join_words(shown)
        question = casual(rng, rng.choice(FORMS).format(n=listed, t=target))
        key = f"{' '.join(map(str, sorted(numbers)))}|{target}"
        return self.problem(difficulty, question, "\n".join(lines), found, key, {"numbers": numbers, "target": target})

    def verify(self, problem: Problem, response: str) -> bool:
        text = final_answer(response)
        left, equals, right = text.partition("=")
        if equals and right.strip() != str(problem.data["target"]):
            return False
        result = evaluate(left)
        return result is not None and result == (
            Fraction(problem.data["target"]),
            tuple(sorted(problem.data["numbers"])),
        )


def _draw(rng: random.Random, level: int) -> tuple[list[int], int, list[Move]]:
    """Numbers, a target that some operations reach with whole numbers all the way, and those operations."""
    while True:
        numbers = [rng.randint(1, LARGEST[level]) for _ in range(COUNTS[level])]
        left, moves = list(numbers), []
        while len(left) > 1:
            i, j = sorted(rng.sample(range(len(left)), 2))
            operator, value = rng.choice(results(left[i], left[j]))
            moves.append((i, j, operator))
            left = [n for k, n in enumerate(left) if k not in (i, j)] + [value]
        if 1 <= left[0] <= TARGETS[level]:
            return numbers, left[0], moves


def results(a: int, b: int) -> list[tuple[str, int]]:
    """What two numbers give: sum, difference (larger first), product, and quotient where it is exact."""
    high, low = max(a, b), min(a, b)
    found = [("+", a + b), ("-", high - low), ("*", a * b)]
    if low and high % low == 0:
        found.append(("/", high // low))
    return found


def _join(a: Value, operator: str, b: Value) -> str:
    """`a+b` as text; the larger number first under - and /."""
    if operator in "-/" and a[0] < b[0]:
        a, b = b, a
    return a[1] + operator + b[1]


def _needs(c: int, target: int) -> list[tuple[str, int, str]]:
    """What the result r of a pair would have to be: how that is worked out, its value, and the solution's form."""
    needs = []
    if target >= c:
        needs.append((f"{target}-{c}", target - c, "{r}+{c}"))
    needs.append((f"{target}+{c}", target + c, "{r}-{c}"))
    if c > target:
        needs.append((f"{c}-{target}", c - target, "{c}-{r}"))
    if c and target % c == 0:
        needs.append((f"{target}/{c}", target // c, "{r}*{c}"))
    # A product above this is hardly ever a pair's result, and would have to be worked out by columns.
    if 0 < target * c <= LARGEST_NEED:
        needs.append((f"{target}*{c}", target * c, "{r}/{c}"))
    if c > target and c % target == 0:
        needs.append((f"{c}/{target}", c // target, "{c}/{r}"))
    return needs


def _search_three(values: list[Value], target: int) -> tuple[list[str], str]:
    """For each pair its results, then what the third number would need, until one of the needs is a result."""
    lines = []
    for i, j, k in ((0, 1, 2), (0, 2, 1), (1, 2, 0)):
        (a, b, (c, c_text)), have = (values[i], values[j], values[k]), dict[int, str]()
        plain_a, plain_b = (a[0], str(a[0])), (b[0], str(b[0]))
        shown = []
        for operator, value in results(a[0], b[0]):
            shown.append(f"{_join(plain_a, operator, plain_b)}={value}")
            have.setdefault(value, _join(a, operator, b))
        tried = []
        for sought, value, form in _needs(c, target):
            tried.append(f"{sought}={value} {'yes' if value in have else 'no'}")
            if value in have:
                lines.append(f"{' '.join(shown)} | {c}: {' '.join(tried)}")
                return lines, form.format(r=f"({have[value]})", c=c_text)
        lines.append(f"{' '.join(shown)} | {c}: {' '.join(tried)}")
    return lines, ""


def _search(rng: random.Random, values: list[Value], target: int, moves: list[Move]) -> tuple[list[str], str]:
    """With more than three numbers, join two first: at most two random tries, then the move that leads on."""
    if len(values) == 3:
        return _search_three(values, target)
    lines: list[str] = []
    for attempt in range(rng.randint(0, 2) if len(values) == 4 else 0, -1, -1):
        i, j, operator = moves[0] if attempt == 0 else _random_move(rng, values)
        value = dict(results(values[i][0], values[j][0]))[operator]
        text = _join(values[i], operator, values[j])
        left = [v for k, v in enumerate(values) if k not in (i, j)] + [(value, f"({text})")]
        lines.append(f"try {text}={value}: {' '.join(str(v) for v, _ in left)}")
        steps, found = _search(rng, left, target, moves[1:])
        lines += steps
        if found:
            return lines, found
    return lines, ""


def _random_move(rng: random.Random, values: list[Value]) -> Move:
    i, j = sorted(rng.sample(range(len(values)), 2))
    return i, j, rng.choice(results(values[i][0], values[j][0]))[0]

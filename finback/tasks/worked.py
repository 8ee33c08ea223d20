"""Worked columns: the one way every family writes out an addition, a subtraction, a product and a division.

The texts are made to be learned by a small model: each step is a copy or a lookup of single digits, the format never
varies, and the same operation looks the same in every family. They are true equations, which a test parses.
"""


def padded(a: int, b: int) -> tuple[str, str]:
    """Both numbers with leading zeros to the same width."""
    width = max(len(str(a)), len(str(b)))
    return str(a).zfill(width), str(b).zfill(width)


def stripped(raw: str, value: int) -> str:
    """The digits as the columns give them, then without leading zeros where they have some: `026 = 26`."""
    return raw if raw == str(value) else f"{raw} = {value}"


def compare(a: str, b: str) -> tuple[str, str]:
    """Digit by digit from the left until they differ: (`4=4 1<5`, `<`) for 41 and 45. Same width; dots are skipped."""
    steps = []
    for x, y in zip(a, b, strict=True):
        if x == ".":
            continue
        sign = "=" if x == y else "<" if x < y else ">"
        steps.append(x + sign + y)
        if sign != "=":
            return " ".join(steps), sign
    return " ".join(steps), "="


def addition(a: int, b: int, minus: str = "") -> str:
    """`347+492: 7+2+0=09 4+9+0=13 3+4+1=08 -> 839`; with `minus`, the sum of two negative numbers."""
    x, y = padded(a, b)
    columns, carry = [], 0
    for p, q in zip(reversed(x), reversed(y), strict=True):
        total = int(p) + int(q) + carry
        columns.append(f"{p}+{q}+{carry}={total:02d}")
        carry = total // 10
    head = f"-({x}+{y})" if minus else f"{x}+{y}"
    return f"{head}: {' '.join(columns)} -> {minus}{a + b}"


def subtraction(a: int, b: int) -> str:
    """`12-45`: which is larger first, then the smaller from the larger, `b1` marking a borrow."""
    x, y = padded(a, b)
    steps, sign = compare(x, y)
    head = f"{x}-{y}: {steps}"
    if sign == "=":
        return f"{head} -> 0"
    if sign == "<":
        x, y = y, x
        head += f" -({x}-{y}):"
    columns, digits, borrow = [], "", 0
    for p, q in zip(reversed(x), reversed(y), strict=True):
        digit = int(p) - int(q) - borrow
        below = int(digit < 0)
        columns.append(f"{p}-{q}-{borrow}={digit + 10 * below}b{below}")
        digits = str(digit + 10 * below) + digits
        borrow = below
    minus = "-" if sign == "<" else ""
    return f"{head} {' '.join(columns)} -> {minus}{stripped(digits, abs(a - b)).replace('= ', '= ' + minus)}"


def signed_sum(a: int, b: int) -> str:
    """a + b of any signs, as one addition or subtraction of numbers without a sign."""
    if a >= 0 and b >= 0:
        return addition(a, b)
    if a < 0 and b < 0:
        return addition(-a, -b, "-")
    return subtraction(a, -b) if b < 0 else subtraction(b, -a)


def times_digit(number: int, digit: int, plus: int | None = None) -> str:
    """`347*6: 7*6+0=42 4*6+4=28 3*6+2=20 -> 2082`; `plus` is a first carry (`38*7+2`), at most 15."""
    carry, columns = plus or 0, []
    for p in reversed(str(number)):
        total = int(p) * digit + carry
        columns.append(f"{p}*{digit}+{carry}={total:02d}")
        carry = total // 10
    value = number * digit + (plus or 0)
    head = f"{number}*{digit}" if plus is None else f"{number}*{digit}+{plus}"
    return f"{head}: {' '.join(columns)} -> {stripped(str(value).zfill(len(str(number))), value)}"


def product(a: int, b: int) -> list[str]:
    """Lines for a * b where the shorter factor has at most two digits: units, tens, then their addition."""
    if len(str(b)) > len(str(a)):
        a, b = b, a
    if b < 10:
        return [times_digit(a, b)]
    tens, units = divmod(b, 10)
    assert tens < 10
    return [times_digit(a, units), times_digit(a, tens), addition(a * units, a * tens * 10)]


def take_away(current: int, divisor: int) -> str:
    """One step of a division: `153-9*16=153-144=9`."""
    quotient, rest = divmod(current, divisor)
    return f"{current}-{quotient}*{divisor}={current}-{quotient * divisor}={rest}"


def division(number: int, divisor: int) -> str:
    """Long division, `735/5: 7-1*5=7-5=2 23-4*5=23-20=3 35-7*5=35-35=0 -> 147 r 0`."""
    digits = str(number)
    first = next((n for n in range(1, len(digits)) if int(digits[:n]) >= divisor), len(digits))
    current = int(digits[:first])
    steps = [take_away(current, divisor)]
    for digit in digits[first:]:
        current = current % divisor * 10 + int(digit)
        steps.append(take_away(current, divisor))
    return f"{number}/{divisor}: {' '.join(steps)} -> {number // divisor} r {number % divisor}"


def euclid(a: int, b: int) -> str:
    """The greatest common divisor: `gcd 24 9: 24-2*9=24-18=6 9-1*6=9-6=3 6-2*3=6-6=0 -> 3`."""
    a, b = max(a, b), min(a, b)
    head, steps = f"gcd {a} {b}", []
    while b:
        steps.append(take_away(a, b))
        a, b = b, a % b
    return f"{head}: {' '.join(steps)} -> {a}"

"""Answers that other verifiers are known to have taken for right, and the right ones beside them."""

import pytest

from finback.tasks import Problem, verify
from finback.tasks.open import ANSWER


def problem(task: str, **data) -> Problem:
    return Problem(task, 3, "", "", "", "", data)


SUM = problem("arithmetic", value=12)
MINUS = problem("arithmetic", value=-3)
ZERO = problem("arithmetic", value=0)
BIG = problem("arithmetic", value=1735)
LARGER = problem("decimals", kind="larger", numbers=["9.9", "9.11"])
SAME = problem("decimals", kind="equal", numbers=["2.50", "2.5"])
TIED = problem("decimals", kind="larger", numbers=["2.50", "2.5"])
RISING = problem("decimals", kind="ascending", numbers=["1.5", "-2.25", "1.45"])
LETTER = problem("letters", letter="r", text="strawberry")
HALF = problem("equations", coefficients=[2, 0, 0, 5])
WHOLE = problem("equations", coefficients=[1, 3, 0, 0])
SORT = problem("sorting", order="ascending", numbers=[310, 12, 45, 12])
HEX = problem("bases", number="47806", bases=[10, 16])
OCTAL = problem("bases", number="8", bases=[10, 8])
PERSON = problem("relations", answer="Kate")
ORDER = problem("relations", answer="Kate, Tom, Ann")
POWER = problem("countdown", numbers=[2, 3], target=8)
FLOOR = problem("countdown", numbers=[7, 2], target=3)
POINT = problem("countdown", numbers=[1, 2, 10], target=12)
MAKE = problem("countdown", numbers=[3, 7, 2], target=20)
TWICE = problem("countdown", numbers=[5, 5, 2], target=20)
FRACTION = problem("countdown", numbers=[1, 3, 8, 8], target=3)
OPEN = problem("open")

RIGHT = [
    (
        SUM,
        [
            "12",
            " 12 ",
            "12.",
            "\\boxed{12}",
            "Answer: 12",
            "3+9=12",
            "3 + 9 = 12.",
            "\\boxed{13} wait, \\boxed{12}",
            "\\boxed{\\boxed{12}}",
        ],
    ),
    (MINUS, ["-3", "−3", "\\boxed{-3}"]),
    (ZERO, ["0"]),
    (LARGER, ["9.9", "9.90", "9.9."]),
    (SAME, ["yes", "Yes", "YES."]),
    (TIED, ["equal", "Equal."]),
    (RISING, ["-2.25, 1.45, 1.5", "-2.25,1.45,1.5"]),
    (LETTER, ["3", "\\boxed{3}"]),
    (HALF, ["5/2", "2.5", "10/4", "x = 5/2", "x=2.5", "\\boxed{\\frac{5}{2}}", "\\boxed{x = 5/2}"]),
    (WHOLE, ["-3", "x = -3", "−3"]),
    (SORT, ["12, 12, 45, 310", "12,12,45,310", "\\boxed{12, 12, 45, 310}"]),
    (HEX, ["BABE", "babe", "\\boxed{BABE}"]),
    (OCTAL, ["10"]),
    (PERSON, ["Kate", "kate", "KATE."]),
    (ORDER, ["Kate, Tom, Ann", "kate,tom,ann"]),
    (MAKE, ["(3+7)*2", "2*(7+3) = 20", "(3 + 7) × 2", "\\boxed{(3+7)*2}", "(7+3)*2=20."]),
    (TWICE, ["(5+5)*2", "2*(5+5)"]),
    (FRACTION, ["8/8*3*1", "8*3*1/8", "3/8*8/1", "8/(8/3*1)"]),
    (OPEN, [ANSWER, ANSWER.upper(), "  " + ANSWER.rstrip(".") + "\n"]),
]

WRONG = [
    (
        SUM,
        [
            "",
            " ",
            ".",
            "=",
            "3+9",
            "12 or 13",
            "12, 13",
            "11 12",
            "1e1",
            "12.0",
            "12/1",
            "24/2",
            "1 2",
            "012",
            "+12",
            "--12",
            "twelve",
            "x12",
            "12x",
            "０12",
            "１２",
            "١٢",
            "12!",
            "0xC",
            "0b1100",
            "1_2",
            "$12$",
            "12%",
            "-12",
            "\\boxed{12",
            "12}",
            "\\boxed{12} \\boxed{13}",
            "\\boxed{}",
            "Answer: 12 Answer: 13",
            "Answer:",
            "3+9=",
            "the answer is 12",
            "12\n13",
            "12=13",
            "\\boxed 12",
            "<answer>12</answer>",
            "<think>12</think>",
            "12</s>",
            "int('12')",
            "(12)",
            "12;",
        ],
    ),
    (MINUS, ["3", "- 3", "--3", "(-3)", "–3", "-3.0", "-6/2", "minus 3"]),
    (ZERO, ["-0", "00", "0.0", "0/1", "−0", "None", "null", "false", "o"]),
    (BIG, ["1,735", "1 735", "1.735e3", "1735,", "01735", "1735.5"]),
    (
        LARGER,
        [
            "9.11",
            "9.9 > 9.11",
            "9.9 or 9.11",
            "9,9",
            "99/10",
            ".99e1",
            "9.9 9.11",
            "09.9",
            "9.9 is larger",
            "9.",
            "9.9000001",
        ],
    ),
    (SAME, ["no", "yes and no", "y", "true", "yes no", "equal", "yeſ"]),
    (TIED, ["2.5", "2.50", "yes", "both"]),
    (
        RISING,
        [
            "1.45, 1.5, -2.25",
            "-2.25, 1.45",
            "-2.25 1.45 1.5",
            "-2.25, 1.45, 1.5, 1.5",
            "-2.25, 1.45, 1.5,",
            ",".join("1" * 400),
        ],
    ),
    (LETTER, ["2", "three", "3.0", "6/2", "r", "3 r's", "1, 2, 3", "2 or 3", "³"]),
    (
        HALF,
        [
            "5:2",
            "5/2/1",
            "5/ 2",
            "2 1/2",
            "5//2",
            "2,5",
            "x = 5/2 or x = 3",
            "x = 5/2, x = 5/2",
            "x = x",
            "2.5e0",
            "5/02",
            "5/-2",
            "x == 5/2",
            "\\frac52",
            "10/0",
            "2x = 5",
            "x",
            "5/2 = 2.5",
            "2.50000000000000000000000000000000001",
        ],
    ),
    (WHOLE, ["3", "x = 3", "x = -3 or 3", "-3x", "-03", "+-3"]),
    (
        SORT,
        [
            "12, 45, 310",
            "12, 45, 310, 12",
            "310, 45, 12, 12",
            "12 12 45 310",
            "12, 12, 45, 310, 310",
            "[12, 12, 45, 310]",
            "12, 12, 45, 0310",
            "12, 12, 45, 310,",
            "12, 12, 45.0, 310",
            "12; 12; 45; 310",
            "12,  12, 45, 310",
            "12<12<45<310",
        ],
    ),
    (
        HEX,
        [
            "47806",
            "0xBABE",
            "BABE16",
            "0BABE",
            "BABEG",
            "B A B E",
            "BABE (base 16)",
            "#BABE",
            "BABＥ",
            "BABE.0",
            "-BABE",
        ],
    ),
    (OCTAL, ["8", "010", "0o10", "18", "A"]),
    (
        PERSON,
        [
            "Kate or Tom",
            "Kate, Tom",
            "Tom",
            "Kate Tom",
            "Kate is",
            "Ka te",
            "\u212aate",
            "Kate.Tom",
            "not Kate",
            "*Kate*",
        ],
    ),
    (
        ORDER,
        ["Ann, Tom, Kate", "Kate, Tom", "Kate > Tom > Ann", "Kate Tom Ann", "Kate, Tom, Ann, Ann", "Kate,  Tom, Ann"],
    ),
    (POWER, ["2**3", "2^3", "8", "2+3+3", "pow(2,3)", "(2*2*2)", "2³"]),
    (FLOOR, ["7//2", "7%2+2", "int(7/2)", "7/2", "round(7/2)", "3"]),
    (POINT, ["1.2*10", "12", "10+2", "12*1", "10+1+1", "1e1+2", "(10+2)(1)", "10+2*1*1"]),
    (
        MAKE,
        [
            "20",
            "10*2",
            "(3+7)+(3+7)",
            "3*7-1",
            "(3+7)*2 = 21",
            "20 = (3+7)*2",
            "(3+7)2",
            "(3+7)*2 = 20 = 20",
            "37-17",
            "2*(3+7",
            "(3+7)*2; (7+3)*2",
            "(3+7)*2 or 20",
            "(3+7)*+2",
            "-(-3-7)*2",
            "(3+7)*2+0",
            "(3+7)*2*1",
            "(3+7)*2 == 20",
            "x = (3+7)*2",
            "9**9**9",
            "(3+7)*２",
            "(3+7)*2/(1-1)",
            "(3+07)*2",
            "[3+7]*2",
            "3+7*2",
            "(3+7)*2 # (",
            "(3+7)*2=",
            "(3,7)*2",
        ],
    ),
    (TWICE, ["5*2+10", "5*(2+2)", "(5+5)*2*1", "5*4"]),
    (OPEN, ["", "I am calf.", "I do not know.", ANSWER + ANSWER, ANSWER[:-10], "12", "Paris"]),
]


def cases(table):
    return [(p, text) for p, texts in table for text in texts]


def test_size_of_the_file():
    assert len(cases(WRONG)) >= 100


@pytest.mark.parametrize("asked, response", cases(RIGHT))
def test_right(asked, response):
    assert verify(asked, response)


@pytest.mark.parametrize("asked, response", cases(WRONG))
def test_wrong(asked, response):
    assert not verify(asked, response)

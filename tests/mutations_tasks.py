"""Planted bugs of the tasks room."""

from mutations import Mutation

BASE, WORKED, SPLIT = "tasks/base.py", "tasks/worked.py", "tasks/__init__.py"
ADVERSARIAL, FAMILIES = "test_tasks_adversarial.py", "test_tasks_families.py"

MUTATIONS = [
    Mutation(
        SPLIT,
        'if is_held_out(problem) == (split == "held_out"):',
        "if problem:",
        ["test_tasks_split.py::test_train_and_held_out_share_no_key"],
        "held-out problems are trained on",
    ),
    Mutation(
        "tasks/relations.py",
        "key = f\"{words[0]}|{'>'.join(people)}|{query}\"",
        'key = f"{words[0]}|{query}"',
        ["test_tasks_split.py::test_the_key_says_all_but_the_wording"],
        "different problems share a key",
    ),
    Mutation(
        "tasks/countdown.py",
        "map(str, sorted(numbers))",
        "map(str, numbers)",
        ["test_tasks_split.py::test_orderless_content_has_an_orderless_key"],
        "a held-out problem is trained on with its numbers in another order",
    ),
    Mutation(
        "tasks/open.py",
        "return new_topic or (",
        "return new_topic and (",
        ["test_tasks_split.py::test_open_holds_out_whole_templates_and_topics"],
        "held-out open questions share a template or a topic with training",
    ),
    Mutation(
        BASE,
        'if (denominator and form != "rational") or (places and form == "whole"):',
        'if places and form == "whole":',
        [ADVERSARIAL],
        "24/2 counts as the answer of 24/2",
    ),
    Mutation(BASE, "    if sign and value == 0:\n        return None\n", "", [ADVERSARIAL], "-0 counts as 0"),
    Mutation(BASE, '[1-9][0-9]{0,29})"\n', '[0-9]{1,30})"\n', [ADVERSARIAL], "leading zeros count"),
    Mutation(BASE, 'rfind("\\\\boxed{")', 'find("\\\\boxed{")', [ADVERSARIAL], "the first box counts, not the last"),
    Mutation(
        BASE,
        "return text.isascii() and ",
        "return ",
        [ADVERSARIAL],
        "letters of other scripts count where their small form is a Latin letter",
    ),
    Mutation(
        "tasks/expression.py",
        "value, tuple(sorted(parser.numbers))",
        "value, tuple(sorted(set(parser.numbers)))",
        ["test_tasks_expression.py"],
        "a number used twice counts once",
    ),
    Mutation(
        "tasks/expression.py",
        'token == "(" and depth < DEEPEST',
        'token == "("',
        ["test_tasks_expression.py::test_refused"],
        "nesting has no limit",
    ),
    Mutation(
        "tasks/expression.py",
        'r"0|[1-9][0-9]{0,5}"',
        'r"[0-9]{1,6}"',
        ["test_tasks_expression.py::test_refused", ADVERSARIAL],
        "03 counts as 3",
    ),
    Mutation(
        "tasks/countdown.py",
        'if equals and right.strip() != str(problem.data["target"]):',
        "if False:",
        [ADVERSARIAL],
        "an expression may claim another value",
    ),
    Mutation(
        WORKED,
        'columns.append(f"{p}+{q}+{carry}={total:02d}")\n        carry = total // 10',
        'carry = total // 10\n        columns.append(f"{p}+{q}+{carry}={total:02d}")',
        ["test_tasks_worked.py::test_every_line_of_the_reasoning_is_true"],
        "a column shows the carry of the next one",
    ),
    Mutation(
        WORKED,
        "while b:\n        steps.append(take_away(a, b))",
        "while b > 1:\n        steps.append(take_away(a, b))",
        ["test_tasks_worked.py::test_division_and_euclid_read_back"],
        "Euclid stops one step early",
    ),
    Mutation(
        "tasks/arithmetic.py",
        'if t in ("*", "/")), 1)',
        'if t == "/"), 1)',
        [f"{FAMILIES}::test_arithmetic_value"],
        "sums are worked out before products",
    ),
    Mutation(
        "tasks/arithmetic.py",
        'return [other, "*", factor] if rng.random() < 0.5',
        'return [other, "*", other] if rng.random() < 0.5',
        [f"{FAMILIES}::test_arithmetic_default_range"],
        "products of two three-digit factors at the default level",
    ),
    Mutation(
        "tasks/decimals.py",
        'x_tail.ljust(places, "0")',
        "x_tail.zfill(places)",
        [
            "test_tasks_worked.py::test_comparison_of_decimals_is_true",
            f"{FAMILIES}::test_decimals_value_and_default_range",
        ],
        "9.9 is padded to 9.09",
    ),
    Mutation(
        "tasks/relations.py",
        'return f"{less} is not as {words[4]} as {more}"',
        'return f"{more} is not as {words[4]} as {less}"',
        [f"{FAMILIES}::test_relations_value"],
        "a negated fact says the reverse",
    ),
    Mutation(
        "tasks/letters.py",
        "count += each == letter",
        'count += each == letter and steps[-1:] != [f"{each}{count}"]',
        [f"{FAMILIES}::test_letters_value_and_default_range"],
        "a double letter counts once",
    ),
]

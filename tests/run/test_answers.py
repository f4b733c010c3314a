"""run/answers.py: what is read around an answer, and verdicts that need no math_verify."""

import random

from rewards import RIGHT, UNREADABLE, WRONG
from run.answers import decimal, quick_verdict, unwrap, verdict, without_emphasis

NUMBERS = ["0", "7", "18", "-18", "1,234", "0.5", "18.00", "99.99", "1", "-0.5"]
NUMBERS += ["0.1234567", "0.1234568", "1.0000001", "12.3456789"]


def test_emphasis_is_not_mistaken_for_mathematics():
    for text in (
        "2 * 3 * 4",
        r"\{a\}_{1}, \{b\}_{2}",
        "x_1 + y_1",
        "2**3 + 4**2",
        "f'(x) = g'(x)",
        "6' 2\"",
        "*" * 99,
    ):
        assert without_emphasis(text) == text


def test_emphasis_code_quotes_and_typography_are_not_part_of_an_answer():
    for text in ("**18**", "*18*", "__18__", "`18`", "```18```", '"18"', "“18”", " '18' "):
        assert without_emphasis(text) == "18"
    assert without_emphasis("\u22125") == "-5"


def test_a_box_dollar_signs_and_a_full_stop_are_not_part_of_an_answer():
    for text in (r"\boxed{18}", "$18$", r"\(18\)", r"$\boxed{18}$", r"\text{18}", "18.", " 18 "):
        assert unwrap(text) == "18"
    assert unwrap("$1$ and $2$") == "$1$ and $2$"


def test_a_number_has_one_form():
    ways = {"1234.5": ["-$1,234.50", "-1 234.5", "-1234.500"], "0": ["-0", "-0.00", "-000"]}
    for form, texts in ways.items():
        wanted = form if form == "0" else f"-{form}"
        assert [decimal(text) for text in texts] == [wanted] * len(texts)
    assert [decimal(text) for text in ("", "-", "1,2", "12,34", "1/2", "1e5", "x")] == [None] * 7


def test_a_quick_verdict_is_the_one_that_math_verify_gives():
    rng = random.Random(0)
    random_numbers = [str(round(rng.uniform(-2000, 2000), rng.randrange(8))) for _ in range(20)]
    numbers = NUMBERS + random_numbers
    quick = [(a, b, quick_verdict(a, b)) for a in numbers for b in numbers]
    wrong = [case for case in quick if case[2] not in (None, verdict(*case[:2]))]
    assert wrong == []
    assert sum(said is not None for *_, said in quick) > len(quick) / 2


def test_what_is_not_certain_has_no_quick_verdict():
    for pair in (("1/2", "0.5"), ("x", "y"), ("0.12345678", "0.12345679"), ("5", "x"), ("", "5")):
        assert quick_verdict(*pair) is None
    assert quick_verdict("Monday", "Monday") == RIGHT
    assert quick_verdict("17 18", "18") == WRONG  # guesses: math_verify would take the last
    assert quick_verdict("5", "") == UNREADABLE


def test_a_bare_formula_is_read_whole():
    for answer, reference, expected in (
        (r"\sqrt{12}", r"2\sqrt{3}", RIGHT),
        ("2", r"2\sqrt{3}", WRONG),
        ("(3,4)", "(3, 4)", RIGHT),
        ("4", "(3, 4)", WRONG),
        ("1, 2", "2, 1", RIGHT),
        ("5 kg", "5", RIGHT),
        ("Tuesday", "Monday", UNREADABLE),
    ):
        assert verdict(answer, reference) == expected, (answer, reference)

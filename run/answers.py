r"""Answers: what counts as equal, where math_verify alone is not sure or not quick.

    "<b>**18.00**</b>" ── without_emphasis ── quick_verdict ── certain: equal texts, two decimals
                                                  └─ None ──── verdict: math_verify, no time limit

It reads what models write around an answer (`**18**`, `\boxed{18}`, `$18$`), and a bare formula as a
whole. run/judge.py is what calls it; rewards.verify is the plain version. Both agree on ordinary
answers.

To let another way of writing count, add it to `unwrap` or `decimal`.
"""

import functools
import re

from rewards import RIGHT, UNREADABLE, WRONG

# An optional sign and currency, digits with or without thousands separators, a fraction.
NUMBER = re.compile(
    r"([+-]?)(?:\\?\$)?"
    r"((?:[1-9][0-9]{0,2}(?:[, ][0-9]{3})+|[0-9]+)?(?:\.[0-9]+)?)"
)
# Numbers in a row, as in `17 18`, `17=18` and `1 2 … 18`: guesses, not an answer.
SEVERAL = re.compile(
    r"[+-]?\$?[0-9][0-9,.]*(?<!,)"
    r"(?:[\s=…][\s=….]*[+-]?\$?[0-9][0-9,.]*(?<!,))+"
)
# Emphasis, code and quotes, as in **18**; not the _ of a_{1}, nor the * of 2 * 3 * 4.
MARKED = re.compile(
    r"(?<![\w)}\]*_`])(\*{1,3}|_{1,3}|`{1,3}|[\"'])(?!\s)"
    r"((?:(?!\1).){1,200})"
    r"(?<!\s)\1(?![\w({\[])"
)
PLAIN = str.maketrans("−“”", '-""')
WRAPPED = re.compile(r"\$?\\boxed\{([^{}$]*)\}\$?|\$([^$]*)\$|\\\(([^$]*?)\\\)")
# What looks like a word and is mathematics.
COMMAND = re.compile(
    r"\\(?:text|mathrm|mbox|operatorname|begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+|\b(?:and|or)\b"
)
# "so" is a word, "kg" and "2xy" are not.
WORD = re.compile(r"[A-Za-z]{3}|(?<!\S)(?=.?[AEIOUaeiou])[A-Za-z]{2}(?!\w)")


def without_emphasis(text: str) -> str:
    """`**18**`, "18" in quotes and `18` in backticks are 18; a typographic minus is a minus."""
    return MARKED.sub(r"\2", text.translate(PLAIN)).strip()


def quick_verdict(answer: str, reference: str) -> str | None:
    """A verdict without math_verify where one is certain, else None. Linear time."""
    answer, reference = unwrap(answer), unwrap(reference)
    if not reference:
        return UNREADABLE
    if answer == reference:
        return RIGHT
    a, b = decimal(answer), decimal(reference)
    if a is None:
        # math_verify would take the last of several.
        return WRONG if SEVERAL.fullmatch(answer) else None
    if a == b:
        return RIGHT
    if b is None:
        return None
    # math_verify rounds to six decimals: longer ones may still be equal.
    decimals = max(len(number.partition(".")[2]) for number in (a, b))
    return WRONG if decimals <= 6 else None


def unwrap(answer: str) -> str:
    r"""`\boxed{18}`, `$18$`, `\text{18}` and `18.` are `18`."""
    answer = re.sub(r"\\text\{([^{}]*)\}", r"\1", answer.strip().removesuffix("."))
    match = WRAPPED.fullmatch(answer)
    return match[match.lastindex].strip() if match else answer


def decimal(answer: str) -> str | None:
    """A plain number in one form, `-$1,234.50` and `-1 234.5` as `-1234.5`; None if it is none."""
    match = NUMBER.fullmatch(answer)
    if not match or not match[2]:
        return None
    whole, _, fraction = re.sub("[, ]", "", match[2]).partition(".")
    whole = whole.lstrip("0") or "0"
    number = f"{whole}.{fraction.rstrip('0')}".removesuffix(".")
    if match[1] == "-" and number != "0":
        return f"-{number}"
    return number


def verdict(answer: str, reference: str) -> str:
    """math_verify's verdict, without a time limit: it may never return."""
    from math_verify import verify

    gold = parse_answer(reference)
    if not gold:
        return UNREADABLE
    equal = verify(gold, parse_answer(answer), timeout_seconds=None)
    return RIGHT if equal else WRONG


@functools.lru_cache(maxsize=256)  # the completions of a group share their reference
def parse_answer(text: str) -> list:
    r"""What math_verify reads in a text: sympy's expressions and the strings they come from."""
    from math_verify import parse

    # math_verify would find only the 2 of a bare 2\sqrt{3}, and the 4 of (3, 4).
    if is_bare_formula(text):
        text = f"${text}$"
    return parse(text, extraction_mode="first_match", parsing_timeout=None)


def is_bare_formula(text: str) -> bool:
    """Whether this is mathematics without delimiters: more than a number, and no words."""
    if len(text) > 500 or decimal(text) is not None:
        return False
    if re.search(r"\n|\$|\\[(\[]|\\boxed", text):
        return False
    if not re.search(r"[A-Za-z\\^_{}()\[\]=<>,;:]", text):
        return False
    return not WORD.search(COMMAND.sub(" ", text))

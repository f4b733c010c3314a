r"""Answers: what counts as equal. math_verify compares formulas; what it misreads is read here.

    "<b>**18.00**</b>" ── cleaned ──> quick_verdict ── certain: words, letters, numbers, bases
                                          └─ None ──> verdict ── intervals and points, part by part
                                                         └─────> math_verify, no time limit

| counts as equal                                  | does not                                     |
|--------------------------------------------------|----------------------------------------------|
| `\$18.90`, `18.90 dollars`, `18.9`               | `18.90 cents` and `\$18.90`                  |
| `32,\!348`, `32{,}348`, `32 348`, `32348`        | `32 34`, which are two guesses               |
| `5 km/h`, `5 km per hour`, `5`                   | `5 km` and `5 m`: nothing is converted       |
| `2 1/2`, `2\frac12`, `2½`, `5/2`, `2.5`          | `2 5/2`, which is no mixed number            |
| `1e3`, `10^3`, `1 \times 10^3`, `1 thousand`     | `1 thousand` and `1`                         |
| `0.333333` and `1/3`: six decimals               | `0.33` and `1/3`; `1.0000001` and `1`        |
| `0.\overline{3}`, `0.333...`, `0.(3)`, `1/3`     | `0.\overline{3}` and `0.3`                   |
| `twenty-four apples`, `24`; `one half`, `1/2`    | `six or seven`, `six sevenths` and `6`       |
| `\binom{5}{2}`, `5 choose 2`, `10`; an answer `C(5,2)` | `10`, if the point `C(5,2)` is asked    |
| below 1/10,000: six digits                       | `1/2^{98}` and `1/2^{99}`                    |
| `50\%`, `0.5`; `50\%`, `50`: the sign is optional | `50\%`, `5`                                  |
| `sqrt(2)`, `√2`, `\sqrt2`; `exp(x)`, `e^x`       | `sqrt(2)` and `1.414`                        |
| `Even`, `\text{even}`, `an even`                 | `odd`                                        |
| `B`, `(B)`, `B. 25 m`, `\textbf{(B)}\ 25`        | `A or B`; `B. 25 m` and `B. 30 m`            |
| `The correct option is B`, `Option (B) is correct` | `Neither A nor B is correct`                |
| `x<3`, `3>x`, `(-\infty,3)`, `x \in (-\infty,3)` | `x \le 3`; `y<3` and `x<3`                   |
| `[1,2)\cup(3,4]` in either order                 | `(1,2)`, `[1,2]`, `\{1,2\}` and one another  |
| `1, 2`, `2, 1`, `\{1,2\}`; `1, 2` and `(1,2)`    | `(1,2)` and `(2,1)`; `1, 2` and `2`          |
| `2516_8`, `2516_{8}`; `2516` if `2516_8` is asked | `2516_9`; `1358`, if `2516_8` is asked       |
| `\emptyset`, `{}`, `no solution`                 | `0`, `\{0\}`, `no integer solution`          |
| `= 5`, `5,`, `x=5`, `5=x`, `5`; `y=2x`, `2x`     | `x=5` and `y=5`; `5t` and `5`                |
| `5 h 30 min`, `5.5 hours`: in two units, converted | `30` and `5 hours 30 minutes`                |
| `3.5^2`, `12.25`                                 | `3.5` and `3.5^2`                            |
| `23 + 40 = 63`, `63`; `126/2`, `63`              | `23 + 40` and `63`; `7 \cdot 9` and `63`     |
| `about 18`, `18`                                 | `not 18`, `at least 18`, `16 to 18` and `18` |

How an answer may be spelt is in run/notation.py, a number in words in run/numerals.py, what is no
number in run/choices.py.
rewards.verify is the plain version of this.
"""

import functools
import re
from contextlib import suppress

from rewards import RIGHT, UNREADABLE, WRONG
from run.choices import based, choice, counted, word
from run.hedges import is_hedged
from run.intervals import pieces
from run.notation import (
    EMPTY,
    LONGEST,
    announced,
    boxed,
    dollared,
    formula,
    is_bare_formula,
    is_prose,
    plain,
    unadorned,
)
from run.numerals import in_digits
from run.quantities import decimal, decimals, number, same_number
from run.units import CURRENCY, amount, compound, measured, same_unit
from run.unworked import is_left_unworked

# Sides, guesses, what is no number ---------------------------------------------------------------

LEFT_SIDE = re.compile(r"([A-Za-z](?:_\{?\w\}?)?) ?= ?([^=<>]+)")
RIGHT_SIDE = re.compile(r"([^=<>]+?) ?= ?([A-Za-z](?:_\{?\w\}?)?)")
# Guesses, not an answer: numbers in a row as in `17 18`, `17=18` and `1 2 … 18`.
SEVERAL = re.compile(
    r"[+-]?\$?[0-9][0-9,.]*(?<!,)"
    r"(?:[\s=…][\s=….]*[+-]?\$?[0-9][0-9,.]*(?<!,))+"
)
PARTS = (
    r" (?:squared|cubed|factorial|halves|thirds|fourths|fifths|sixths|sevenths|eighths|ninths|"
    r"tenths|\w*(?:ieth|leventh|welfth|teenth|hundredth|thousandth|millionth|billionth)s?)"
)
# math_verify would read the 5 of `5t`, and of `$5t`.
ALTERED = re.compile(
    rf"[+-]?(?:[0-9][0-9.,]*(?:(?![gmshloLVWJNKCF])[A-Za-z]|{PARTS}\b.*)"
    rf"|(?:{CURRENCY}) ?[+-]?[0-9][0-9.,]*(?:[A-Za-z]|{PARTS}\b).*)"
)
LONGEST_AMOUNT = 60  # characters


# Verdicts --------------------------------------------------------------------------------------


def quick_verdict(answer: str, reference: str) -> str | None:
    """A verdict without math_verify where one is certain, else None. Linear time."""
    a, b = decimal(answer), decimal(reference)
    if a is None or b is None:
        return read_verdict(typed(answer), typed(reference))
    if a == b:
        return RIGHT
    # Longer ones may still be equal.
    short = max(len(number.partition(".")[2]) for number in (a, b)) <= 6
    return WRONG if short or len(a + b) > 100 else read_verdict(a, b)


def read_verdict(answer: str, reference: str) -> str | None:
    """The same, of plain texts."""
    if not reference:
        return UNREADABLE
    if answer == reference:
        return RIGHT
    if EMPTY in (answer, reference) and (number(answer) or number(reference)):
        return WRONG
    if max(len(answer), len(reference)) > LONGEST:
        return WRONG if SEVERAL.fullmatch(answer) else None
    said = letter_verdict(answer, reference)
    if said is None and hedges(answer) and number(reference):
        return WRONG
    if said is None and (not is_prose(answer) or is_amount(answer)):
        said = base_verdict(answer, reference) or number_verdict(answer, reference)
    return said or word_verdict(answer, reference)


def hedges(answer: str) -> bool:
    """Whether it states no one number, such as `at least 18`."""
    return is_hedged(answer) and not is_amount(answer)


def is_amount(text: str) -> bool:
    """Whether it is but a number with its unit, as `5 km per hour`, though that reads like prose."""
    return len(text) <= LONGEST_AMOUNT and bool(number(text) or compound(text) or in_digits(text))


def letter_verdict(answer, reference):
    a, b = choice(answer), choice(reference)
    if not b:
        return None
    letter, text = b
    if not a:  # the text of the option alone
        return read_verdict(answer, text) if text else None
    same_text = not (text and a[1]) or read_verdict(a[1], text) == RIGHT
    return mark(letter == a[0] and same_text)


def base_verdict(answer, reference):
    a, b = based(answer), based(reference)
    if a and b:
        return mark(a == b)
    if b and re.fullmatch("[0-9A-Z]+", answer):  # the question names the base
        return mark(answer.lstrip("0") == b[0])
    wanted = number(reference)
    if not a or not wanted:
        return None
    digits, base = a
    if "." in digits or any(int(digit, 36) >= base for digit in digits):
        return WRONG
    return mark(int(digits, base) == wanted.value)


def number_verdict(answer, reference):
    names, sides = [], []
    for text in (answer, reference):
        name, side = named(text)
        names.append(name)
        sides.append(side)
    if None not in names and names[0] != names[1]:
        return None
    a, b = map(number, sides)
    if b and not a:
        a = number(counted(sides[0]) or in_digits(sides[0]) or "")
    elif a and not b:
        b = number(in_digits(sides[1]) or "")
    if a and b:
        return mark(same_number(a, b))
    if said := amount_verdict(*sides, a, b):
        return said
    if SEVERAL.fullmatch(answer):
        return WRONG
    if b and ALTERED.fullmatch(answer):
        return WRONG
    return WRONG if a and ALTERED.fullmatch(reference) else None


def named(text: str) -> tuple[str | None, str]:
    """The name and the other side of `x = 5` and `5 = x`; no name where there is none."""
    if "=" not in text:
        return None, text
    if match := LEFT_SIDE.fullmatch(text):
        return match[1], match[2]
    match = RIGHT_SIDE.fullmatch(text)
    if match and number(match[1]):
        return match[2], match[1]
    return None, text


def amount_verdict(answer, reference, a, b):
    """Of amounts in two units, which alone are converted; a, b: the texts as numbers, if they are."""
    said, wanted = compound(answer), compound(reference)
    if said is None and wanted is None:
        return None
    said = said or (a and amount(a.value, a.unit))
    wanted = wanted or (b and amount(b.value, b.unit))
    return mark(said is not None and said == wanted)


def word_verdict(answer, reference):
    a, b = word(answer), word(reference)
    if not a or not b:
        return None
    if a != b and sorted(a) == sorted(b):  # xyz and zyx are equal as formulas
        return None
    return mark(a == b)


def mark(right: bool) -> str:
    return RIGHT if right else WRONG


@functools.lru_cache(maxsize=512)  # the completions of a group share their reference
def stated(text: str) -> tuple[str, bool]:
    """The part of a cleaned text that states its answer, and whether that is mathematics for sure."""
    text = unadorned(text.strip())
    content = boxed(text)
    if content is None:
        said = announced(text)
        if said is not None and is_one_answer(said):
            return unadorned(said), False
        content = dollared(text)
    if content is None:
        return text.removesuffix("."), False
    return unadorned(content), True


def is_one_answer(text: str) -> bool:
    shown = plain(text)
    readers = (number, choice, based, in_digits)
    if any(read(shown) for read in readers) or re.fullmatch("[A-Za-z]{2,20}", shown):
        return True
    return bool(re.search(r"\w", text)) and is_bare_formula(formula(text))


@functools.lru_cache(maxsize=512)
def typed(text: str) -> str:
    content, _ = stated(text)
    return plain(content) if len(content) <= LONGEST else content


def verdict(answer: str, reference: str) -> str:
    """The verdict where none is quick, without a time limit: math_verify may never return."""
    said = None
    if decimal(reference) is None:
        if not same_unit(*(measured(typed(text))[1] for text in (answer, reference))):
            return WRONG
        said = parts_verdict(stated(answer)[0], stated(reference)[0])
    return said or formula_verdict(answer, reference)


# Intervals and points, part by part ------------------------------------------------------------


def parts_verdict(answer: str, reference: str) -> str | None:
    """Of intervals, inequalities, their unions, and points; None of anything else."""
    if max(len(answer), len(reference)) > LONGEST:
        return None
    a, b = pieces(answer), pieces(reference)
    if a is None or b is None:
        return None
    (ours, names), (theirs, wanted) = a, b
    if names and wanted and names != wanted:
        return WRONG
    forms = [{(p[0], p[2], len(p[1])) for p in side} for side in (ours, theirs)]
    if len(ours) != len(theirs) or all(form[0][0] == r"\{" for form in map(list, forms)):
        return None  # math_verify knows sets
    if any(length > 2 for form in forms for *_, length in form) and forms[0] != forms[1]:
        return None
    left = list(ours)
    for wanted_piece in theirs:
        match = next((piece for piece in left if same_piece(piece, wanted_piece)), None)
        if match is None:
            return WRONG
        left.remove(match)
    return RIGHT


def same_piece(a, b) -> bool:
    if (a[0], a[2], len(a[1])) != (b[0], b[2], len(b[1])):
        return False
    return all(same_part(x, y) for x, y in zip(a[1], b[1]))


def same_part(a: str, b: str) -> bool:
    a, b = a.removeprefix("+").strip(), b.removeprefix("+").strip()
    said = read_verdict(plain(a), plain(b)) or parts_verdict(a, b)
    return (said or formula_verdict(f"${a}$", f"${b}$")) == RIGHT


# Formulas --------------------------------------------------------------------------------------


def formula_verdict(answer: str, reference: str) -> str:
    """math_verify's verdict."""
    from math_verify import verify

    gold = parse_answer(reference)
    if not gold:
        is_word = re.fullmatch(r"[^\W\d_]{2,}", word(typed(reference)) or "")
        return WRONG if is_word else UNREADABLE
    found = parse_answer(answer)
    wanted = number(typed(reference))
    if found and wanted and is_left_unworked(answer, wanted, found[0]):
        return WRONG
    zeros = max((leading_zeros(each) for each in (*gold, *found)), default=0)
    precision = {"float_rounding": decimals(zeros), "numeric_precision": 15 + int(zeros)}
    return mark(verify(gold, found, **precision, timeout_seconds=None))


def leading_zeros(expression) -> float:
    """Decimals before the first digit of the smallest number in it: 98.3 of (1/2)^327 + x."""
    import mpmath

    zeros, todo = 0.0, [expression]
    while todo:
        part = todo.pop()
        if not getattr(part, "is_number", False):
            todo += getattr(part, "args", ())
            continue
        if getattr(part, "is_Integer", False):
            continue
        with suppress(Exception):  # sympy raises many kinds, and infinity is no float
            value = abs(mpmath.mpf(part.evalf(5)))
            if 0 < value < 1e-4:
                zeros = max(zeros, float(-mpmath.log10(value)))
    return min(zeros, 20_000.0)


@functools.lru_cache(maxsize=256)
def parse_answer(text: str) -> list:
    r"""What math_verify reads in a text: sympy's expressions and the strings they come from."""
    from math_verify import parse
    from sympy import Integer

    if re.fullmatch("-?(0|[1-9][0-9]{0,14})", text):  # as most references are; sympy takes a ms
        return [Integer(text), text]
    return parse(for_math_verify(text), extraction_mode="first_match", parsing_timeout=None)


def for_math_verify(text: str) -> str:
    r"""A formula in dollars. Of a bare 2\sqrt{3} it would find the 2 alone, and of (3, 4) the 4."""
    content, is_formula = stated(text)
    if typed(text) == EMPTY:
        return f"${EMPTY}$"
    alone = measured(content)[0] if len(content) <= LONGEST else content
    if alone != content and not number(typed(text)):
        content = alone
    if is_formula:
        return f"\\boxed{{{formula(content)}}}"
    if decimal(content) is None and not is_prose(content):
        as_formula = formula(content)
        if is_bare_formula(as_formula):
            return f"${as_formula}$"
    return re.sub(r"\\\$\s*(?=[0-9.])", "", content)

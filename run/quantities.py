r"""Quantities: what a plain text such as `$18.90`, `2 1/2 cups` or `6.02e23` is worth, exactly.

    "13 1/2 %" ── number ──> Number(27/2, percent)        "-5 km" ──> Number(-5, unit=Unit("km"))

Values are fractions, so that no digit is lost. Nothing here takes long: a text of more than 100
characters is no number, and neither is one with an exponent of more than three digits.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from math import comb, factorial

from run.units import CURRENCIES, CURRENCY, Unit, same_unit, unit_of

DECIMAL = r"(?:[1-9][0-9]{0,2}(?:[, ][0-9]{3})+(?![0-9])|[0-9]+)?(?:\.[0-9]+)?"
# An optional sign and currency, digits with or without thousands separators, a fraction.
PLAIN_NUMBER = re.compile(rf"([+-]?)(?:\\?\$)?({DECIMAL})")
SIGN = re.compile(rf"([+-]?) ?({CURRENCY})? ?([+-]?) ?(?=[0-9.]|\\binom)")
POWER = r" ?\^ ?[{(]? ?([+-]?[0-9]{1,3}) ?[})]?"
MIXED = re.compile(r"([0-9]{1,9}) (?:and )?([0-9]{1,9}) ?/ ?([0-9]{1,9})(?![0-9.])")
RATIO = re.compile(rf"({DECIMAL}) ?/ ?({DECIMAL})(?![0-9.]| ?[\^!])")
SCIENTIFIC = re.compile(
    rf"({DECIMAL})(?:[eE]([+-]?[0-9]{{1,3}})| ?(?:\\times|\\cdot|\*|x) ?10{POWER})"
)
POWERS = re.compile(rf"(?=[0-9.])({DECIMAL}){POWER}")
FACTORIAL = re.compile(r"([0-9]{1,3})!(?!!)")
BINOMIAL = re.compile(r"\\binom\{([0-9]{1,3})\}\{([0-9]{1,3})\}(?! ?[\^!])")
PERCENT = re.compile(r" ?(?:%|per ?cent\b|percentage\b|pct\b)")
SCALE = re.compile(r" ?(dozen|hundred|thousand|million|billion|trillion)\b")
SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6}
SCALES |= {"billion": 10**9, "trillion": 10**12}
# $2M; without the currency, 2M may be a product.
MONEY_SCALE = re.compile(r" ?(k|K|m|M|mn|b|B|bn)(?![A-Za-z])")
SCALES |= dict.fromkeys(("k", "K"), 10**3) | dict.fromkeys(("m", "M", "mn"), 10**6)
SCALES |= dict.fromkeys(("b", "B", "bn"), 10**9)


@dataclass(frozen=True)
class Number:
    value: Fraction
    decimal: bool  # written with a point, so perhaps rounded
    percent: bool
    unit: Unit


def number(text: str) -> Number | None:
    """`$18.90`, `2 1/2 cups`, `6.02e23`, `13.5%`, `10!`; None if a text is no number."""
    sign = SIGN.match(text) if len(text) <= 100 else None
    if not sign or (sign[1] and sign[3]):
        return None
    found = unsigned(text[sign.end() :])
    if found is None:
        return None
    value, end = found
    rest = text[sign.end() + end :]
    currency = CURRENCIES.get(sign[2])
    scale = SCALE.match(rest) or (currency and MONEY_SCALE.match(rest))
    if scale:
        value, rest = value * SCALES[scale[1]], rest[scale.end() :]
    percent = PERCENT.match(rest)
    if percent:
        rest = rest[percent.end() :]
    unit = unit_of(rest)
    if currency and unit is not None:
        unit = priced(currency, unit)
    if unit is None:
        return None
    if "-" in (sign[1], sign[3]):
        value = -value
    return Number(value, "." in text, bool(percent), unit)


def priced(currency: str, unit: Unit) -> Unit | None:
    """The unit of `$5 per day`; None of `$5 cm`."""
    if unit.above and not same_unit(Unit(currency), Unit(unit.above)):
        return None
    return Unit(currency, unit.below)


def unsigned(text: str) -> tuple[Fraction, int] | None:
    """The value that a text begins with, and where it ends."""
    if match := MIXED.match(text):
        whole, above, below = map(int, match.groups())
        if not 0 < above < below:
            return None
        return whole + Fraction(above, below), match.end()
    if (match := RATIO.match(text)) and match[1] and match[2]:
        above, below = fraction(match[1]), fraction(match[2])
        return (above / below, match.end()) if below else None
    if (match := SCIENTIFIC.match(text)) and match[1]:
        return fraction(match[1]) * Fraction(10) ** int(match[2] or match[3]), match.end()
    if (match := POWERS.match(text)) and len(match[1]) <= 12:
        base, exponent = fraction(match[1]), int(match[2])
        return (base**exponent, match.end()) if base else None
    if match := FACTORIAL.match(text):
        return Fraction(factorial(int(match[1]))), match.end()
    if match := BINOMIAL.match(text):
        return Fraction(comb(int(match[1]), int(match[2]))), match.end()
    match = re.match(DECIMAL, text)
    return (fraction(match[0]), match.end()) if match[0] else None


def fraction(decimal: str) -> Fraction:
    return Fraction(re.sub("[, ]", "", decimal))


def same_number(a: Number, b: Number) -> bool:
    if not same_unit(a.unit, b.unit):
        return False
    decimal = a.decimal or b.decimal
    if a.percent == b.percent:
        return close(a.value, b.value, decimal)
    share, other = (a.value, b.value) if a.percent else (b.value, a.value)
    return share == other or close(share / 100, other, decimal)


def close(a: Fraction, b: Fraction, decimal: bool) -> bool:
    """Whether two numbers are equal, or else round to the same, as math_verify does."""
    if a == b:
        return True
    if not decimal or a.denominator == 1 or b.denominator == 1:
        return False
    zeros = max((v.denominator.bit_length() - abs(v.numerator).bit_length()) for v in (a, b))
    places = decimals(zeros * 0.30103)
    return round(a, places) == round(b, places)


def decimals(zeros: float) -> int:
    """How many decimals count of a number that begins with so many zeros: six, or six digits."""
    return 6 if zeros < 4 else int(zeros) + 6


def decimal(answer: str) -> str | None:
    """A plain number in one form, `-$1,234.50` and `-1 234.5` as `-1234.5`; None if it is none."""
    match = PLAIN_NUMBER.fullmatch(answer)
    if not match or not match[2]:
        return None
    whole, _, fraction = re.sub("[, ]", "", match[2]).partition(".")
    whole = whole.lstrip("0") or "0"
    number = f"{whole}.{fraction.rstrip('0')}".removesuffix(".")
    if match[1] == "-" and number != "0":
        return f"-{number}"
    return number

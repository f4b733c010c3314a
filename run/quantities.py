r"""Quantities: what a plain text such as `$18.90`, `2 1/2 cups` or `6.02e23` is worth, exactly.

    "13 1/2 %" ── number ──> Number(27/2, percent)        "-5 km/h" ──> Number(-5, unit="km")

Values are fractions, so that no digit is lost. Nothing here takes long: a text of more than 100
characters is no number, and neither is one with an exponent of more than three digits. Units are
read, never converted. To let another unit or currency count, add it to a table below.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from math import factorial

from run.notation import NAMES

DECIMAL = r"(?:[1-9][0-9]{0,2}(?:[, ][0-9]{3})+(?![0-9])|[0-9]+)?(?:\.[0-9]+)?"
# An optional sign and currency, digits with or without thousands separators, a fraction.
PLAIN_NUMBER = re.compile(rf"([+-]?)(?:\\?\$)?({DECIMAL})")
CURRENCIES = {"$": "dollar", "US$": "dollar", "USD": "dollar", "€": "euro", "EUR": "euro"}
CURRENCIES |= {"Rs.": "rupee", "Rs": "rupee", "₹": "rupee", "INR": "rupee", "£": "", "¥": ""}
CURRENCY = "|".join(re.escape(name) for name in CURRENCIES)
SIGN = re.compile(rf"([+-]?) ?({CURRENCY})? ?([+-]?) ?(?=[0-9.])")
POWER = r" ?\^ ?[{(]? ?([+-]?[0-9]{1,3}) ?[})]?"
MIXED = re.compile(r"([0-9]{1,9}) (?:and )?([0-9]{1,9}) ?/ ?([0-9]{1,9})(?![0-9.])")
RATIO = re.compile(rf"({DECIMAL}) ?/ ?({DECIMAL})(?![0-9.]| ?[\^!])")
SCIENTIFIC = re.compile(
    rf"({DECIMAL})(?:[eE]([+-]?[0-9]{{1,3}})| ?(?:\\times|\\cdot|\*|x) ?10{POWER})"
)
POWERS = re.compile(rf"(?=[0-9.])({DECIMAL}){POWER}")
FACTORIAL = re.compile(r"([0-9]{1,3})!(?!!)")
PERCENT = re.compile(r" ?(?:%|per ?cent\b|percentage\b|pct\b)")
SCALE = re.compile(r" ?(hundred|thousand|million|billion|trillion)\b")
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}

UNITS = {
    name: unit
    for unit, names in {
        "mm": "mm millimeter millimeters millimetre millimetres",
        "cm": "cm centimeter centimeters centimetre centimetres",
        "m": "m meter meters metre metres",
        "km": "km kmh kph kmph kilometer kilometers kilometre kilometres",
        "inch": "in inch inches",
        "foot": "ft foot feet",
        "yard": "yd yard yards",
        "mile": "mi mph mile miles",
        "mg": "mg milligram milligrams",
        "g": "g gram grams",
        "kg": "kg kilogram kilograms",
        "lb": "lb lbs pound pounds",
        "oz": "oz ounce ounces",
        "s": "s sec secs second seconds",
        "min": "min mins minute minutes",
        "h": "h hr hrs hour hours",
        "day": "day days",
        "week": "week weeks",
        "month": "month months",
        "year": "yr yrs year years",
        "ml": "ml mL milliliter milliliters millilitre millilitres",
        "l": "l L liter liters litre litres",
        "dollar": "dollar dollars USD",
        "cent": "cent cents",
        "euro": "euro euros EUR",
        "rupee": "Rs rupee rupees INR",
        "degree": "degree degrees deg",
        "radian": "rad radian radians",
    }.items()
    for name in names.split()
}
# Words that a number's unit may have in it, or not.
SMALL = frozenset({"of", "a", "an", "the", "in", "per", "sq", "cu", "square", "cubic"})
NOT_UNITS = re.compile(
    r"(?i:or|and|not|but|than|then|more|less|times|plus|minus|over|divided|multiplied|from|was|are|"
    r"is|equals?|mod|modulo|root|base|point|squared|cubed|factorial|halves|thirds|fourths|fifths|"
    r"sixths|sevenths|eighths|ninths|tenths|hundredths|thousandths)"
)
SQUARES = frozenset({"square", "sq", "cubic", "cu"})
UNIT_PARTS = re.compile(r" ?([A-Za-z]+)\.?| ?(/)| ?\^ ?\{? ?-?[0-9] ?\}?")


@dataclass(frozen=True)
class Number:
    value: Fraction
    decimal: bool  # written with a point, so perhaps rounded
    percent: bool
    unit: str  # "" where there is none, or none that is known


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
    scale = SCALE.match(rest)
    if scale:
        value, rest = value * 10 ** SCALES[scale[1]], rest[scale.end() :]
    percent = PERCENT.match(rest)
    if percent:
        rest = rest[percent.end() :]
    unit = unit_of(rest)
    if unit is None:
        return None
    if "-" in (sign[1], sign[3]):
        value = -value
    return Number(value, "." in text, bool(percent), CURRENCIES.get(sign[2]) or unit)


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
    match = re.match(DECIMAL, text)
    return (fraction(match[0]), match.end()) if match[0] else None


def fraction(decimal: str) -> Fraction:
    return Fraction(re.sub("[, ]", "", decimal))


def unit_of(text: str) -> str | None:
    """The first unit in `km per hour`, "" of unknown ones as in `red apples`; None if it is none."""
    unit, end, words = "", 0, []
    while match := UNIT_PARTS.match(text, end):
        end = match.end()
        if not match[1]:  # a slash, an exponent
            if words[-1:] in ([], ["/"]):  # of nothing: 1.5^2 is a power, 3//4 is nothing
                if not match[2] or words:
                    return None
            words += [match[2]] if match[2] else []
            continue
        known = UNITS.get(match[1], "")
        # 5t is a product, and so is 5 t; 5apples is odd.
        is_word = len(match[1]) > 2 and match[0][0] == " "
        if not known and match[1] not in SMALL and not is_word:
            return None
        if NOT_UNITS.fullmatch(match[1]) or match[1] in NAMES:
            return None
        if not set(words) - SQUARES:  # the h of km/h is not what is counted
            unit = unit or known
        words.append(match[1])
    if words[-1:] == ["/"]:
        return None
    return unit if end == len(text) and len(words) <= 8 else None


def same_number(a: Number, b: Number) -> bool:
    if a.unit and b.unit and a.unit != b.unit:
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

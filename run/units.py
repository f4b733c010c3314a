r"""Units: what a number counts, read behind it, and amounts in two units.

    "km per hour" ── unit_of ──> Unit("km", "h")     "m/s^2" ──> Unit("m", "s^2")
    "red apples" ──> Unit("", "")                    "x" ──> None: 5x is a product
    "5 hours 30 minutes" ── compound ──> Amount(19800, "time")
    r"7\sqrt{5} cm" ── measured ──> r"7\sqrt{5}", Unit("cm")

Units are read, never converted, but within an amount in two of them. To let another unit or currency
count, add it to a table below.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from run.alphabet import NAMES

CURRENCIES = {"$": "dollar", "US$": "dollar", "USD": "dollar", "€": "euro", "EUR": "euro"}
CURRENCIES |= {"Rs.": "rupee", "Rs": "rupee", "₹": "rupee", "INR": "rupee"}
CURRENCIES |= {"£": "sterling", "GBP": "sterling", "¥": "¥", "JPY": "yen", "CNY": "yuan"}
CURRENCY = "|".join(re.escape(name) for name in CURRENCIES)
MONEY = {*CURRENCIES.values(), "cent", "penny", "pound"}

UNITS = {
    name: unit
    for unit, names in {
        "mm": "mm millimeter millimeters millimetre millimetres",
        "cm": "cm centimeter centimeters centimetre centimetres",
        "m": "m meter meters metre metres",
        "km": "km kilometer kilometers kilometre kilometres",
        "km/h": "kmh kph kmph",
        "inch": "in inch inches",
        "foot": "ft foot feet",
        "yard": "yd yard yards",
        "mile": "mi mile miles",
        "mile/h": "mph",
        "mg": "mg milligram milligrams",
        "g": "g gram grams",
        "kg": "kg kilogram kilograms",
        "lb": "lb lbs",
        "pound": "pound pounds",
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
        "sterling": "GBP quid",
        "penny": "pence penny",
        "yen": "yen JPY",
        "yuan": "yuan RMB CNY",
        "degree": "degree degrees deg",
        "celsius": "Celsius celsius",
        "fahrenheit": "Fahrenheit fahrenheit",
        "radian": "rad radian radians",
    }.items()
    for name in names.split()
}
# Names that may mean one of several.
OPEN = {"degree": {"celsius", "fahrenheit"}, "¥": {"yen", "yuan"}, "pound": {"lb", "sterling"}}
# How many of the smallest of its kind a unit is, where it may stand beside another of the kind.
SIZES = {
    unit: (kind, size)
    for kind, sizes in {
        "time": {"s": 1, "min": 60, "h": 3600, "day": 86_400, "week": 604_800},
        "long term": {"month": 1, "year": 12},
        "length": {"inch": 1, "foot": 12, "yard": 36, "mile": 63_360},
        "metric length": {"mm": 1, "cm": 10, "m": 1000, "km": 1_000_000},
        "weight": {"oz": 1, "lb": 16, "pound": 16},
        "metric weight": {"mg": 1, "g": 1000, "kg": 1_000_000},
        "volume": {"ml": 1, "l": 1000},
        "dollars": {"cent": 1, "dollar": 100},
        "sterling": {"penny": 1, "sterling": 100},
    }.items()
    for unit, size in sizes.items()
}
# Words that a number's unit may have in it, or not.
SMALL = frozenset({"of", "a", "an", "the", "in", "per", "sq", "cu", "square", "cubic"})
NOT_UNITS = re.compile(
    r"(?i:or|and|not|but|than|then|more|less|maybe|perhaps|possibly|probably|times|plus|minus|over|"
    r"divided|multiplied|from|was|are|"
    r"is|equals?|mod|modulo|root|base|point|factorial|halves|thirds|fourths|fifths|"
    r"sixths|sevenths|eighths|ninths|tenths|\w*(?:ieth|leventh|welfth|teenth|hundredth|thousandth|"
    r"millionth|billionth)s?)"
)
BEFORE = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
BEHIND = {"squared": 2, "cubed": 3}
SCALES_OF_HEAT = {"C": "celsius", "F": "fahrenheit"}
UNIT_PARTS = re.compile(r" ?([A-Za-z]+)\.?| ?(/)| ?\^ ?\{? ?(-?[0-9]) ?\}?")


@dataclass(frozen=True)
class Unit:
    above: str = ""  # "" where there is none, or none that is known; "m^2" of square metres
    below: str = ""  # the "h" of km/h


def unit_of(text: str) -> Unit | None:
    """The unit in `km per hour`, an empty one of unknown words as `red apples`; None if it is none."""
    reader = Reader()
    end = 0
    while match := UNIT_PARTS.match(text, end):
        end = match.end()
        if match[1]:
            spaced = match[0][0] == " "
            read = reader.word(match[1], spaced)
        elif match[2]:
            read = reader.slash()
        else:
            read = reader.power(int(match[3]))
        if not read:
            return None
    return reader.unit() if end == len(text) and reader.count <= 8 else None


class Reader:
    """Takes a unit's parts one by one; each method says whether the part may stand there."""

    def __init__(self):
        self.names, self.powers = ["", ""], [1, 1]  # above and below the slash
        self.side = self.count = 0
        self.words = [[], []]

    def word(self, word: str, spaced: bool) -> bool:
        self.count += 1
        words = self.words[self.side]
        if word in BEHIND:  # metres squared; 5 squared is none
            return bool(words) and self.power(BEHIND[word])
        if word in SCALES_OF_HEAT and self.names[self.side] == "degree":
            self.names[self.side] = SCALES_OF_HEAT[word]
            return True
        known = UNITS.get(word, "")
        # 5t is a product, and so is 5 t; 5apples is odd.
        is_word = len(word) > 2 and spaced
        if not known and word not in SMALL and not is_word:
            return False
        if NOT_UNITS.fullmatch(word) or word in NAMES:
            return False
        if word == "per" or (word in ("a", "an") and self.names[0]):
            self.side = 1
            return True
        begins = not set(words) - BEFORE.keys()  # in "apples of a kg" apples are counted
        completes = self.names[self.side] == "degree" and known in OPEN["degree"]
        if begins or completes:
            self.names[self.side] = known
        words.append(word)
        return True

    def slash(self) -> bool:
        if self.side and not self.words[1]:
            return False
        self.side = 1
        return True

    def power(self, exponent: int) -> bool:
        """Of nothing it is none: 1.5^2 is a power of the number."""
        self.powers[self.side] = exponent
        return bool(self.words[self.side])

    def unit(self) -> Unit | None:
        if self.side and not self.words[1]:  # "5/"
            return None
        sides = []
        for name, power, words in zip(self.names, self.powers, self.words):
            for word in words:
                power = BEFORE.get(word, power)
            sides.append(f"{name}^{power}" if name and power != 1 else name)
        if "/" in sides[0]:  # km/h, written kmh
            return Unit(*sides[0].split("/"))
        return Unit(*sides)


def same_unit(a: Unit, b: Unit) -> bool:
    """Whether two units may be the same. One that is not written, or not known, may be any."""
    if not a.above or not b.above:
        return True
    if not same_name(a.above, b.above):
        return False
    if not a.below or not b.below:
        # The wage of $15 an hour is often said in dollars; a speed is not said in kilometres.
        return a.below == b.below or a.above in MONEY
    return same_name(a.below, b.below)


def same_name(a: str, b: str) -> bool:
    return a == b or b in OPEN.get(a, ()) or a in OPEN.get(b, ())


# Behind a formula stand long names and these; `in`, `sec` and `ml` may be parts of it.
SAFE = {"cm", "mm", "km", "kg", "ft", "mph"}
BEHIND_FORMULA = re.compile(
    rf"(?<=[\w)}}\]])(?: |(?<=[}})])) ?((?:(?:square|cubic|sq|cu) )?"
    rf"(?:units?|{'|'.join(name for name in UNITS if len(name) > 3 or name in SAFE)}))"
    r"(?: ?\^ ?\{?([23])\}?)?$"
)


def measured(text: str) -> tuple[str, Unit]:
    r"""`7\sqrt{5} square cm` as its formula and its unit; an empty one where none stands behind."""
    ends = text[-1:].isalpha() or text[-2:].strip("^{}") in ("2", "3")
    match = BEHIND_FORMULA.search(text[-40:]) if ends else None
    if not match:
        return text, Unit()
    unit = unit_of(f" {match[1]}" + (f"^{match[2]}" if match[2] else ""))
    return text[: len(text) - len(match[0])], unit or Unit()


# Amounts in two units --------------------------------------------------------------------------

AMOUNT = rf"(?:{CURRENCY})? ?[0-9][0-9.,]*"
COMPOUND = re.compile(
    rf"[+-]? ?(?:{AMOUNT} ?[A-Za-z]+|(?:{CURRENCY}) ?[0-9][0-9.,]*)"
    rf"(?:,? ?(?:and )?{AMOUNT} ?[A-Za-z]+)+"
)
AMOUNT_PARTS = re.compile(rf"({CURRENCY})? ?([0-9][0-9.,]*) ?((?!and\b)[A-Za-z]*)")


@dataclass(frozen=True)
class Amount:
    """So many of the smallest unit of a kind."""

    value: Fraction
    kind: str


def compound(text: str) -> Amount | str | None:
    """`5 hours 30 minutes`; as text where the units are of no kind, as `3 cats, 2 dogs`."""
    if not COMPOUND.fullmatch(text):
        return None
    total, kinds, words, unit = Fraction(0), set(), [], ""
    for currency, digits, word in AMOUNT_PARTS.findall(text):
        after_hours = word == "m" and unit == "h"  # 5h30m
        unit = "min" if after_hours else CURRENCIES.get(currency) or UNITS.get(word, "")
        kind, size = SIZES.get(unit, ("", 0))
        digits = digits.replace(",", "").rstrip(".")
        if digits.count(".") > 1:
            return None
        total += Fraction(digits) * size
        kinds.add(kind)
        words += [digits, word]
    if len(kinds) == 1 and "" not in kinds:
        return Amount(-total if text[0] == "-" else total, kind)
    if min(map(len, words[1::2])) < 3 or not NAMES.isdisjoint(words):
        return None  # 2x3y is a product
    return " ".join(words)


def amount(value: Fraction, unit: Unit) -> Amount | None:
    """A number of one unit, to compare with an amount in two; None if the unit is of no kind."""
    if unit.below or unit.above not in SIZES:
        return None
    kind, size = SIZES[unit.above]
    return Amount(value * size, kind)

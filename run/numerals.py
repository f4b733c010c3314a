"""Numerals: a number in words, as digits.

    "Twenty-four apples" ── in_digits ──> "24 apples"     "three and a half" ──> "3 1/2"
    "one of them", "six or seven", "half past six" ──> None: no number, or not one

Only a text that begins with such words and has no others in it is a number. To let another word count,
add it to a table below.
"""

import re


def words(text: str) -> list[str]:
    return text.split()


TEENS = words("ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen")
TENS = words("twenty thirty forty fifty sixty seventy eighty ninety")
ORDINALS = words("third fourth fifth sixth seventh eighth ninth tenth")
ONES = {
    name: i for i, name in enumerate(words("one two three four five six seven eight nine"), start=1)
}
TEENS = {name: i for i, name in enumerate(TEENS, start=10)} | {"zero": 0}
TENS = {name: 10 * i for i, name in enumerate(TENS, start=2)}
SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
PARTS = {"half": 2, "halves": 2, "quarter": 4, "quarters": 4}
PARTS |= {name: i for i, name in enumerate(ORDINALS, start=3)}
PARTS |= {f"{name}s": i for i, name in enumerate(ORDINALS, start=3)}
VALUES = {"a": 1, "an": 1} | ONES | TEENS | TENS
FIRST = VALUES.keys() | {"minus", "negative", "half"}

LONGEST = 100


def one_of(*tables) -> str:
    names = sorted((name for table in tables for name in table), key=len, reverse=True)
    return rf"(?:{'|'.join(names)})\b"


TO_99 = rf"(?:{one_of(TENS)}(?:[ -]{one_of(ONES)})?|{one_of(ONES, TEENS)})"
TO_999 = rf"(?:(?:{one_of(ONES, TEENS)}|a) hundred\b(?: (?:and )?{TO_99})?|{TO_99})"
WHOLE = (
    rf"an? dozen\b|(?:(?:{TO_999}|an?) {one_of(SCALES)}(?:,? (?:and )?(?={TO_999}))?)*{TO_999}?"
    r"(?: dozen\b)?"
)
NUMERAL = re.compile(
    rf"(?P<minus>minus |negative )?"
    rf"(?:(?P<above>{TO_99})[ -](?P<below>{one_of(PARTS)})|(?P<half>(?:a )?half\b)"
    rf"|(?P<whole>{WHOLE})(?: and (?P<more>{one_of(ONES)}|a)[ -](?P<part>{one_of(PARTS)}))?)",
    re.I,
)
# Behind a numeral, these make another number of it, or none: seven twentieths, half past six.
ANY = re.compile(
    rf"\b(?:of|past|to|dozen|hundred|{one_of(VALUES.keys() - {'a', 'an'}, SCALES, PARTS)})\b", re.I
)


def in_digits(text: str) -> str | None:
    """`3 1/2 cups` of `three and a half cups`; None if a text does not begin with a numeral."""
    if len(text) > LONGEST or re.split("[ -]", text, maxsplit=1)[0].lower() not in FIRST:
        return None
    match = NUMERAL.match(text)
    if not match or not match[0]:
        return None
    rest = text[match.end() :]
    if (rest and rest[0] != " ") or ANY.search(rest):
        return None
    digits = digits_of({name: (said or "").lower() for name, said in match.groupdict().items()})
    return digits and f"{'-' if match['minus'] else ''}{digits}{rest}"


def digits_of(said: dict[str, str]) -> str | None:
    if said["half"]:
        return "1/2"
    if said["above"]:
        return f"{value(said['above'])}/{PARTS[said['below']]}"
    whole = value(said["whole"])
    if whole is None or not said["part"]:
        return None if whole is None else str(whole)
    above, below = VALUES[said["more"]], PARTS[said["part"]]
    return f"{whole} {above}/{below}" if above < below else None


def value(words: str) -> int | None:
    """Of `two thousand three hundred five`; None of thousands of thousands, or of no words."""
    total, below, last = 0, 0, None
    for word in re.findall("[a-z]+", words):
        if word in SCALES:
            if last and SCALES[word] >= last:  # they fall from left to right
                return None
            total, below, last = total + below * SCALES[word], 0, SCALES[word]
        elif word == "hundred":
            below *= 100
        elif word == "dozen":
            total, below = 12 * (total + below), 0
        elif word != "and":
            below += VALUES[word]
    return total + below if words else None

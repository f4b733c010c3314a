"""Answers that are no number: the letter of an option, digits in a base, words; and how many choices
there are.

    "B. 25 m" ─ choice ─> ("B", "25 m")     "2516_8" ─ based ─> ("2516", 8)
    "an even" ─ word ───> "even"            "C(5,2)" ─ counted > "10"

Each gives None for a text of another kind.
"""

import re
from math import comb, perm

from run.alphabet import NAMES
from run.notation import WORD

LETTER = re.compile(r"(?:(?:[Oo]ption|[Cc]hoice|[Aa]nswer):? )?(?:\(([A-J])\)|([A-J]))[.:)]?")
LETTER_AND_TEXT = re.compile(
    r"(?:(?:[Oo]ption|[Cc]hoice):? )?(?:\(([A-J])\)[.:]?|([A-J])(?:[.:]|\)[.:]?)) ?(?=[A-Za-z0-9$-]|\\(?:frac|sqrt|pi|infty))"
    r"(?!(?:is|isn't|was|can|cannot|may|might|would|could|seems|not?|wrong|incorrect|false|if|only|unless)\b)(.+)"
)
ANOTHER_LETTER = re.compile(
    r"\([A-J]\)|(?:\b(?:and|or)\b|[,/&]) ?\(?[A-J]\b|\b[A-J][.:)]|^\(?[A-J]\)?$"
)
BASED = re.compile(
    r"\(?([0-9A-Z]+(?:\.[0-9A-Z]+)?)\)? ?(?:_ ?\{? ?([0-9]{1,2}) ?\}?|base ([0-9]{1,2}))"
)
# How many choices there are. In a reference C(5,2) may be a point, and C_5^2 a square.
CHOICES = re.compile(
    r"([CP]) ?\( ?([0-9]{1,3}) ?, ?([0-9]{1,3}) ?\)|([0-9]{1,3}) ?([CP]) ?([0-9]{1,3})"
    r"|(?:n?([CP])[_]\{?([0-9]{1,3})\}? ?\^ ?\{?([0-9]{1,3})\}?)"
    r"|([CP])\^ ?\{?([0-9]{1,3})\}? ?_\{?([0-9]{1,3})\}?"
)
SHOUTED = {"YES", "NO", "TRUE", "ODD", "EVEN", "NONE"}


def choice(text: str) -> tuple[str, str] | None:
    """The letter of `(B)` and `B. 25 m`, and the text behind it; None of `A or B`."""
    if match := LETTER.fullmatch(text):
        return match[1] or match[2], ""
    match = LETTER_AND_TEXT.fullmatch(text)
    if not match or ANOTHER_LETTER.search(match[3]):
        return None
    return match[1] or match[2], match[3]


def based(text: str) -> tuple[str, int] | None:
    """The digits and the base of `2516_8`; None of `x_1`, and of a name such as A_1."""
    match = BASED.fullmatch(text)
    if not match:
        return None
    digits, base = match[1].lstrip("0") or "0", int(match[2] or match[3])
    if not 2 <= base <= 36 or not (match[1][0].isdigit() or (base > 10 and len(digits) > 1)):
        return None
    return digits, base


def word(text: str) -> str | None:
    """A word or a few of them, `Even` and `an even` as `even`; None if it may be mathematics."""
    text = re.sub(r"^(?:[Tt]he|[Aa]n?) (?=.)", "", text)
    if not re.fullmatch(r"[^\W\d_]+(?:[ '-][^\W\d_]+){0,5}", text):
        return None
    words = re.split("[ '-]", text)
    if text.isascii() and not WORD.search(text) or not NAMES.isdisjoint(words):
        return None
    for each in words:
        shouted = each.isupper() and (len(each) > 4 or each in SHOUTED)
        if not (each.islower() or each.istitle() or shouted):  # AB and ab differ
            return None
    return text.casefold()


def counted(text: str) -> str | None:
    """`C(5,2)` and `5P2` in digits."""
    match = CHOICES.match(text)
    if not match:
        return None
    rest = text[match.end() :]  # C(5,2) ways
    found = list(filter(None, match.groups()))
    kind = next(part for part in found if part in "CP")
    found.remove(kind)
    n, k = map(int, reversed(found) if text[1] == "^" else found)
    return f"{(comb if kind == 'C' else perm)(n, k)}{rest}"

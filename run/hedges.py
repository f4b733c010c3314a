"""Answers around a number that state none: `not 18`, `at least 18`, `16 to 18`, `17? 18?`.

Only a short answer of nothing but numbers, units and the words below is told so. Prose is not looked
into: there, "not" may belong to another number.
"""

import re

from run.units import UNITS

LONGEST = 80
AROUND = re.compile(r"[A-Za-z0-9\s.,:;?!$€£¥%→()'-]*\+?")  # what such an answer is made of
OPEN_END = re.compile(r"[0-9](?:\+|th|st|nd|rd)\.?$")  # 18+ and 18th
PRODUCT = re.compile(r"[0-9)]\(")  # 2(3)
FIGURE = re.compile(r"[0-9][0-9.,]*(?<![.,])")


def words(text: str) -> set[str]:
    return set(text.split())


HEDGES = words("not never less fewer more greater most least over under above below almost nearly")
HEDGES |= words("maybe perhaps possibly probably might could either between from to or through up")
FILLERS = words("the a an answer is it its be at than and of i think guess equal th st nd rd")


def is_hedged(text: str) -> bool:
    """Whether a short answer states no one number."""
    if len(text) > LONGEST or not AROUND.fullmatch(text):
        return False
    said = set(re.findall("[a-z]+", text.lower()))
    if not said <= HEDGES | FILLERS | UNITS.keys():
        return False
    figures = set(FIGURE.findall(text))
    if not figures or PRODUCT.search(text):
        return False
    return bool(HEDGES & said or len(figures) > 1 or OPEN_END.search(text))

r"""Intervals: inequalities and brackets of every kind, read as the same parts.

    "0 < x <= 3", "x in (0, 3]", "(0, 3]"  ── pieces ──>  [("(", ["0", "3"], "]")], {"x"} or {}

Nothing is compared here: that is run/answers.py.
"""

import re

from run.notation import formula, is_prose

RELATION = re.compile(r"\s*(\\[lg](?:eq?|eqslant|t)(?![A-Za-z])|[<>])\s*")
VARIABLE = re.compile(r"(?:[A-Za-z]|\\(?:theta|alpha|beta|lambda|mu|phi))(?:_\{?\w\}?)?")
MEMBER = re.compile(r"([A-Za-z])\s*\\in(?![a-z])\s*")
UNION = re.compile(r"\\cup(?![a-z])|\\text\s*\{\s*or\s*\}|(?<![A-Za-z])or(?![A-Za-z])")
BRACKET = re.compile(r"\\[{}]|[()\[\]{},]")
REALS = re.compile(
    r"\\mathbb\s*\{?\s*R\s*\}?|(?:all|the) real(?: number)?s|\\text\{all real numbers\}"
)
EVERYTHING = ("(", [r"-\infty", r"\infty"], ")")


def pieces(text: str):
    """Brackets as (opening, parts, closing), and the variables that the text names, if it does."""
    if is_prose(text) and not REALS.fullmatch(text.strip()):
        return None
    text = formula(text)
    names = set()
    if match := MEMBER.match(text):
        names.add(match[1])
        text = text[match.end() :]
    if REALS.fullmatch(text.strip()):
        return [EVERYTHING], names
    found = []
    for part in UNION.split(text):
        piece = bracketed(part.strip()) or inequality(part.strip(), names)
        if piece is None:
            return None
        found.append(piece)
    return (found, names) if len(found) <= 10 and len(names) < 2 else None


def bracketed(text: str):
    """`(1, 2]` as "(", ["1", "2"], "]"."""
    opening = re.match(r"\\\{|[(\[]", text)
    if not opening:
        return None
    parts, depth, start = [], 0, opening.end()
    for match in BRACKET.finditer(text):
        if match[0] == ",":
            if depth == 1:
                parts.append(text[start : match.start()].strip())
                start = match.end()
            continue
        depth += 1 if match[0] in ("(", "[", "{", r"\{") else -1
        if depth == 0 and match.end() < len(text):
            return None
    if depth or len(parts) < 1 or match[0] not in (")", "]", r"\}"):
        return None
    parts.append(text[start : match.start()].strip())
    return (opening[0], parts, match[0]) if all(parts) else None


def inequality(text: str, names: set):
    """`0 < x \\le 3` as (0, 3]; adds x to the names."""
    split = RELATION.split(text)
    sides, relations = split[::2], split[1::2]
    upward = ["<" in relation or relation.startswith(r"\l") for relation in relations]
    if len(sides) not in (2, 3) or len(set(upward)) != 1:
        return None
    if not upward[0]:  # 3 > x is x < 3
        sides, relations = sides[::-1], relations[::-1]
    closed = ["e" in relation for relation in relations]
    if len(sides) == 2:
        named = [bool(VARIABLE.fullmatch(side)) for side in sides]
        if named[0] == named[1]:
            return None
        if named[0]:
            sides, closed = [r"-\infty", *sides], [False, *closed]
        else:
            sides, closed = [*sides, r"\infty"], [*closed, False]
    low, name, high = sides
    if not VARIABLE.fullmatch(name) or not low or not high:
        return None
    names.add(name)
    return "[" if closed[0] else "(", [low, high], "]" if closed[1] else ")"

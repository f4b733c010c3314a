r"""Notation: many ways of writing an answer become one, before anything is compared.

    "so it is **2√3 cm**。" ─ cleaned ──> "so it is 2 sqrt3 cm."   one alphabet: run/alphabet.py
    r"so it is \boxed{x²}." ─ stated ───> "x^{2}"                  the part that states the answer
                              ├─ plain ──> "13 1/2 %", "5 km/h"     as one would type it: for reading
                              └─ formula > r"e^{16}-\sqrt{2}"       as LaTeX: for math_verify

All of it takes text to text and compares nothing: that is run/answers.py. What a model writes may be
long and odd. So whole texts are only searched and translated, in linear time, and every finer rule
sees at most LONGEST characters.

To let another spelling count, add it to a table below.
"""

import re
from math import comb

from run.alphabet import FUNCTIONS, LETTERS, NAMES

LONGEST = 500  # characters of an answer that is looked into

# What states the answer ------------------------------------------------------------------------

BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is skipped
# A last line's "the answer is …" and "答案是 …".
ANSWER = re.compile(
    r"(?:(?<![\w</])(?:answer|(?:correct|right|best) (?:option|choice|statement))(?:\s+is)?|答案(?:\s*[是为])?)"
    r"\s*[:=]?\s*(\S[^\n]{0,150})\Z",
    re.I,
)
ANNOUNCES = ("answer", "option", "choice", "statement", "答案")
# A last sentence "So it is …", and "Option (B) is correct".
CLAIM = re.compile(
    r"(?:(?i:so|thus|hence|therefore),? )?(?:"
    r"(?i:it is|it's|I (?:choose|pick|select)) (?P<said>\S.{0,60})"
    r"|(?i:(?:the )?(?:option|choice) )?(?P<letter>\(?[A-J]\)?) is (?i:(?:the )?(?:correct|right|best)"
    r"(?: answer| option| choice| one)?))"
)
CLAIMS = (" is ", "t's ", "I ")
SENTENCES = re.compile(r"[.!?:]\s+")
# What may stand before an answer: "= 18", "∴ 18".
BEFORE = re.compile(
    r"(?:=+(?!\s*[<>=])|[:∴⇒→]|\\(?:approx|therefore|implies|[Rr]ightarrow|to|q?quad)(?![A-Za-z])|\s)+"
)
DOLLARS = re.compile(
    r"(?<!\\)\${1,2}((?:[^$\\]|\\.)+)\${1,2}|\\[(\[]([^$\\]*(?:\\[^()\[\]][^$\\]*)*)\\[)\]]",
    re.DOTALL,
)
# "$1$ and $2$", and "1, $2$", are two answers; "So, $2$" is one.
JOINED = re.compile(r"(?:[\d)}\]$]\s*,|\b(?:and|or)\b|\$|\\\))\s*\Z")


def boxed(text: str) -> str | None:
    r"""What the last \boxed{} holds; several close to each other are a list, "1, 2"."""
    contents, end = [], len(text)
    while len(contents) < 10:
        start = text.rfind("\\boxed", 0, end)
        if start < 0:
            break
        found = braced(text[start + 6 : end])
        # Far from the box behind it, an earlier one is not part of the same answer.
        if found is None or (contents and not near(text[start + 6 + found[1] : end])):
            break
        if found[0] not in contents[:1]:
            contents.insert(0, found[0])
        end = start
    return ", ".join(contents) if contents else None


def near(between: str) -> bool:
    """Whether two boxes are parts of one answer, by what stands between them."""
    if len(between) < 10:
        return True
    listed = re.search(r"\b(?:and|or)\b|[,;]", between) and not re.search(r"[.!?]\s", between)
    return len(between) < 70 and bool(listed)


def braced(text: str) -> tuple[str, int] | None:
    """What a text's first braces hold, and where they end."""
    depth, start = 0, 0
    for match in BRACE.finditer(text):
        if depth == 0 and (match[0] != "{" or text[: match.start()].strip()):
            return None
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 1 and start == 0:
            start = match.end()
        if depth == 0:
            return text[start : match.start()].strip(), match.end()
    return None


def dollared(text: str) -> str | None:
    r"""The formula of `so $x$.`, if it is the last and only thing that such a text states."""
    text = text.rstrip(" .")
    if "answer" in text[-300:].lower():  # math_verify looks behind that word first
        return None
    if not text.endswith(("$", "\\)", "\\]")):
        return None
    found = list(DOLLARS.finditer(text))
    last = found[-1] if found else None
    if (
        last is None
        or last.end() < len(text)
        or JOINED.search(text[max(0, last.start() - 20) : last.start()])
    ):
        return None
    return last[last.lastindex].strip()


def announced(text: str) -> str | None:
    """The rest of the line behind the last "the answer is"."""
    last_line = text[-300:].rpartition("\n")[2].rstrip(" .")
    lowered = last_line.lower()
    match = any(word in lowered for word in ANNOUNCES) and ANSWER.search(last_line)
    if not match:
        if not any(words in last_line for words in CLAIMS):
            return None
        claim = CLAIM.fullmatch(SENTENCES.split(last_line)[-1])
        return claim and (claim["letter"] or claim["said"])
    rest = match[1]
    formula = DOLLARS.fullmatch(rest)
    return announced(rest) or (formula and formula[formula.lastindex] or rest).strip()


def unadorned(text: str) -> str:
    """An answer without the sign before it and the commas behind: `= 18,` is `18`."""
    if not text[:1].isalnum():
        opening = BEFORE.match(text)
        text = text[opening.end() :] if opening else text
    closed = text.rstrip(" \n,;:")
    return text if closed.endswith("\\") else closed  # 10\, ends in a space


# As one would type it --------------------------------------------------------------------------

STYLED = re.compile(
    r"\\(?:text(?:bf|it|rm|tt|sf|normal)?|math(?:rm|bf|it|sf)|mbox|operatorname|bold)\s*"
    r"\{((?:[^{}\\]|\\.)*)\}"
)
SPACING = re.compile(r"\\(?:[,;: ]|q?quad(?![A-Za-z]))|~")
FRACTION = re.compile(r"\\frac\s*(?:\{\s*([^{}]*?)\s*\}|(\d))\s*(?:\{\s*([^{}]*?)\s*\}|(\d))")
DIGITS_APART = re.compile(
    r"(?<=\d)(?:\\[,:; !]|\\thinspace\s*|\{,\}|\{\\,\}|,\\!|~|')(?=\d{3}(?!\d))"
)
# 0.1\overline{6}, 0.\dot{4}\dot{5}, and 0.(3); 0.1(6) would be a product, too.
OVERLINED = re.compile(
    r"(?<![\d.,])(\d{0,15})\.(?:(\d{0,20})\\(?:overline|bar|dot)\s*(?:\{(\d{1,20})\}|(\d))"
    r"(?:\\dot\s*\{?(\d)\}?)?|\((\d{1,20})\))(?![\d.(^!]|\\[A-Za-z])"
)
CHOOSE = re.compile(
    r"\\[dt]?binom\s*(?:(\d)\s*(\d)(?!\d)|\{\s*(\d{1,3})\s*\}\s*\{\s*(\d{1,3})\s*\})"
    r"|\{\s*(\d{1,3})\s*\\choose\s*(\d{1,3})\s*\}|(?<![\w.])(\d{1,3})\s+choose\s+(\d{1,3})(?!\w)"
    r"|(?:\{\s*\}\s*)?(?<!\w)[_^]\s*\{?(\d{1,3})\}?\s*\\?C\s*_\s*(?:\{(\d{1,3})\}|(\d))"
)
NOTHING = re.compile(
    r"(?i:(?:there (?:is|are|exists?) )?no (?:real )?solutions?(?: exists?)?|(?:the )?(?:empty|null) set)"
    r"|(?:[A-Za-z] ?(?:\\in|=) ?)?(?:\\emptyset|\{ ?\}|Ø)"
)
CLOCK = re.compile(r"([0-9]:[0-9]{2}) ?([AaPp])\.? ?[Mm](?![A-Za-z])\.?")
EMPTY = r"\emptyset"


def tidied(text: str) -> str:
    r"""LaTeX without what it has for looks alone: `\left( \dfrac12 \right)` is `( \frac12 )`."""
    text = DIGITS_APART.sub(",", text)
    text = re.sub(r"\\(?:left|right|displaystyle|big|Big|bigg|Bigg)(?![A-Za-z])\s*|\\!", "", text)
    text = re.sub(r"\\(?:[dtcs]|nice)frac(?![A-Za-z])", r"\\frac", text)
    if "." in text:
        text = OVERLINED.sub(repeated, text)
    if "C" in text or "choose" in text or "binom" in text:
        text = CHOOSE.sub(chosen, text)
    text = re.sub(r"\\varnothing|\\empty(?![a-z])|\\\{\s*\\\}", r"\\emptyset", text)
    return text.strip()


def chosen(match: re.Match) -> str:
    n, k = filter(None, match.groups())
    return rf"\binom{{{n}}}{{{k}}}"


def repeated(match: re.Match) -> str:
    """A decimal that repeats, as a fraction."""
    whole, before, several, one, last, bracketed = match.groups("")
    again = several + one + last + bracketed
    above = int(whole + before + again) - int(whole + before or "0")
    below = 10 ** len(before) * (10 ** len(again) - 1)
    return rf"\frac{{{above}}}{{{below}}}"


def plain(text: str) -> str:
    r"""A short answer as one would type it: `13\tfrac12\text{ cm}` is `13 1/2 cm`."""
    text = tidied(text)
    for _ in range(2):  # \textbf{\text{…}}
        text = STYLED.sub(r" \1 ", text)
    text = SPACING.sub(" ", text)
    text = re.sub(
        r"\^\s*(?:\{\s*\\circ\s*\}|\\circ|\{\s*\\degree\s*\})|\\degree", " degrees ", text
    )
    text = re.sub(r"\\([$%])", r"\1", text)
    text = FRACTION.sub(typed_fraction, text)
    text = re.sub(r"\s+", " ", text).strip(" \"'")
    stop = text[-1:] == "." and text[-2:-1] not in ("", ".")
    if stop or (text[-1:] == "!" and len(text) > 2 and text[-3:-1].isalpha()):
        text = text[:-1].strip()
    text = CLOCK.sub(lambda m: f"{m[1]} {m[2].lower()}m", text) if ":" in text else text
    is_empty = not text[:1].isdigit() and NOTHING.fullmatch(text)
    return EMPTY if is_empty else text


def typed_fraction(match: re.Match) -> str:
    above, below = match[1] or match[2] or "", match[3] or match[4] or ""
    if not re.fullmatch(r"-?[\d,.]+", above) or not re.fullmatch(r"-?[\d,.]+", below):
        return match[0]
    return f" {above}/{below} "


# As LaTeX --------------------------------------------------------------------------------------

NAMED = re.compile(rf"(?<![\\A-Za-z])({'|'.join(FUNCTIONS + LETTERS)})(?![a-z])")
INFINITY = re.compile(r"(?<![\\A-Za-z])(?:[Ii]nfinity|inf|oo)(?![A-Za-z])")
# name( opens braces that its own ) closes
OPENINGS = {
    "sqrt": (r"\sqrt{", "}"),
    "cbrt": (r"\sqrt[3]{", "}"),
    "exp": ("e^{", "}"),
    "abs": ("|", "|"),
    "^": ("^{", "}"),
    "": ("(", ")"),
}
CALL = re.compile(r"(?:(?<![A-Za-z\\])\\?(sqrt|cbrt|exp|abs)|(\^))?\s*\(|\)")
BARE_ROOT = re.compile(r"(?<![\\A-Za-z])sqrt\s*(\d+(?:\.\d+)?|[A-Za-z](?![A-Za-z])|\\pi)")
BARE_CUBE_ROOT = re.compile(r"(?<![\\A-Za-z])cbrt\s*(\d+|[A-Za-z](?![A-Za-z]))")
TYPED = [
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"(?<!\^)(?<!\{)\*"), r" \\cdot "),
    (re.compile(r"<=|=<"), r"\\le "),
    (re.compile(r">="), r"\\ge "),
    (re.compile(r"!=|/="), r"\\ne "),
    (re.compile(r"\+/-"), r"\\pm "),
    (re.compile(r"(?<!\\)%"), r"\\%"),
    (re.compile(r"(?<=[)\]}])\s*[Uu]\s*(?=[(\[{\\])"), r"\\cup "),
    (re.compile(r"(?<=[A-Za-z])\s+in\s+(?=[(\[\\])"), r" \\in "),
    (re.compile(r"\\exp\s*\{"), "e^{"),
    (re.compile(r"(?<=[\d)}])i(?![A-Za-z])"), " i"),  # math_verify takes the i of 2i for a name
    # 2e-1 is 2e - 1
    (
        re.compile(r"(?<![\w\\.])(\d*\.\d+|1|\d+(?=e\d|e-[4-9]|e-\d\d))e([+-]?\d{1,3})(?![\w.])"),
        r"\1 \\cdot 10^{\2}",
    ),
    (re.compile(r"\^\s*(-\d+|-?\d+\.\d+)"), r"^{\1}"),
    (re.compile(r"\\\$\s*"), ""),
    # math_verify takes 2(3) for 2 + 3
    (re.compile(r"(?<![\w\\.^{}])(\d+(?:\.\d+)?)\s*\((?=\d+(?:\.\d+)?\))"), r"\1 \\cdot ("),
]


# As math_verify reads it, 3 1/2 is a product.
MIXED = re.compile(r"(?<![\w.,/^}\\] )(?<![\w.,/^}\\])(\d{1,9}) +(\d{1,9})/(\d{1,9})(?![\w./^!])")


def formula(text: str) -> str:
    r"""A formula as LaTeX, however it was typed: `2*sqrt(3) - exp(x)` is `2 \cdot \sqrt{3} - e^{x}`."""
    if len(text) > LONGEST:
        return text
    text = tidied(text)
    if "/" in text:
        text = MIXED.sub(improper, text)
    for pattern, typed in TYPED:
        text = pattern.sub(typed, text)
    text = INFINITY.sub(r"\\infty ", text)
    text = NAMED.sub(r"\\\1 ", text)
    text = BARE_ROOT.sub(r"\\sqrt{\1}", BARE_CUBE_ROOT.sub(r"\\sqrt[3]{\1}", text))
    if "binom" in text:
        text = CHOOSE.sub(worth, text)
    return called(text).strip()


def improper(match: re.Match) -> str:
    whole, above, below = map(int, match.groups())
    return rf"\frac{{{whole * below + above}}}{{{below}}}" if 0 < above < below else match[0]


def worth(match: re.Match) -> str:
    n, k = filter(None, match.groups())
    return (
        rf"\cdot ({comb(int(n), int(k))})" if factor_before(match) else f"({comb(int(n), int(k))})"
    )


def factor_before(match: re.Match) -> bool:
    return bool(re.search(r"[\w)}] ?$", match.string[max(0, match.start() - 2) : match.start()]))


def called(text: str) -> str:
    """sqrt(…), exp(…), abs(…) and ^(…) with the braces that LaTeX wants, one in another or not."""
    closing, out, done = [], [], 0
    for match in CALL.finditer(text):
        out.append(text[done : match.start()])
        done = match.end()
        if match[0] == ")":
            out.append(closing.pop() if closing else ")")
        else:
            opens, closes = OPENINGS[match[1] or match[2] or ""]
            out.append(opens)
            closing.append(closes)
    if any(closes != ")" for closes in closing):  # not balanced: as it was
        return text
    return "".join(out) + text[done:]


# What looks like a word and is mathematics.
COMMAND = re.compile(
    r"\\(?:text|mathrm|mbox|operatorname|begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+|\b(?:and|or)\b"
)
# "so" is a word, "kg" and "2xy" are not.
WORD = re.compile(r"[A-Za-z]{3}|(?<!\S)(?=.?[AEIOUaeiou])[A-Za-z]{2}(?!\w)")


PROSE = re.compile(r"(?<![\\{A-Za-z])[A-Za-z]{2,}(?: [A-Za-z]{2,}){2}")


def is_prose(text: str) -> bool:
    """Three words in a row: told sooner than what `formula` would make of it."""
    words = PROSE.search(text)
    return words is not None and NAMES.isdisjoint(words[0].split())


def is_bare_formula(text: str) -> bool:
    """Whether this is mathematics without delimiters: more than a number, and no words."""
    if len(text) > LONGEST:
        return False
    if re.search(r"\n|(?<!\\)\$|\\[(\[]|\\boxed", text):
        return False
    if not re.search(r"[A-Za-z\\^_{}()\[\]=<>,;:!]", text):
        return False
    return not WORD.search(COMMAND.sub(" ", text))

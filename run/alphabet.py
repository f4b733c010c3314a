"""One alphabet: what typesetters, other scripts and Markdown have for the same signs.

    "so it is **2√3 cm**。" ─ cleaned ──> "so it is 2 sqrt3 cm."

Whole texts of a model pass through here, so everything takes linear time.
"""

import re

FUNCTIONS = ["sin", "cos", "tan", "cot", "sinh", "cosh", "tanh", "arcsin", "arccos", "arctan"]
FUNCTIONS += ["log", "ln"]
LETTERS = ["pi", "alpha", "beta", "gamma", "delta", "epsilon", "theta", "lambda", "mu", "rho"]
LETTERS += ["sigma", "tau", "phi", "omega", "infty"]
NAMES = {*FUNCTIONS, *LETTERS, "infinity", "inf", "oo", "sqrt", "cbrt", "exp", "abs"}

WIDE = {0xFF01 + i: chr(0x21 + i) for i in range(94)}  # ！ to ～, as Chinese texts have them
SPACES = dict.fromkeys("\u00a0\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a", " ")
SPACES |= dict.fromkeys("\u202f\u205f\u3000", " ")
INVISIBLE = dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", "")
SIGNS = {
    **dict(zip("−‐‑﹣“”„‘’′。、，；：", "----\"\"\"'''.,,;:")),
    **{"√": " sqrt", "∛": " cbrt", "π": r"\pi ", "∞": r"\infty ", "∅": r"\emptyset "},
    **{"∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne "},
    **{"⩽": r"\le ", "⩾": r"\ge ", "≦": r"\le ", "≧": r"\ge ", "±": r"\pm ", "∓": r"\mp "},
    **{"×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "÷": r"\div "},
    **{
        "°": r"^{\circ}",
        "º": r"^{\circ}",
        "≈": r"\approx ",
        "⁄": "/",
        "∕": "/",
        "￡": "£",
        "￥": "¥",
        "∠": r"\angle ",
    },
    **{"ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}"},
    **{
        "【": "[",
        "】": "]",
        "〈": r"\langle ",
        "〉": r"\rangle ",
        "⟨": r"\langle ",
        "⟩": r"\rangle ",
    },
}
GREEK = dict(zip("αβγδεθλμρστφω", LETTERS[1:14]))
GREEK = {sign: rf"\{name} " for sign, name in GREEK.items()}
VULGAR = {"½": "12", "⅓": "13", "⅔": "23", "¼": "14", "¾": "34", "⅕": "15", "⅖": "25", "⅗": "35"}
VULGAR |= {"⅘": "45", "⅙": "16", "⅚": "56", "⅐": "17", "⅛": "18", "⅜": "38", "⅝": "58", "⅞": "78"}
VULGAR |= {"⅑": "19", "⅒": "110"}
VULGAR = {sign: rf"\frac{{{digits[0]}}}{{{digits[1:]}}}" for sign, digits in VULGAR.items()}
ALPHABET = str.maketrans(WIDE | SPACES | INVISIBLE | SIGNS | GREEK | VULGAR)
RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱ⁽⁾", "0123456789+-ni()")
LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋ₙ₍₎", "0123456789+-n()")
RAISED_FRACTION = re.compile("([⁰¹²³⁴-⁹]{1,9})[⁄/]([₀-₉]{1,9})")
# 0.1666… goes on with its 6, and 0.4545… with its 45.
GOES_ON = re.compile(
    r"(?<=\.)(\d{0,20}?)(?:(\d)\2{2,30}|(\d{2,10}?)\3{1,20})(?:\.{3,}|…| ?\\l?dots(?![A-Za-z]))(?!\d)"
)
# An en dash is a minus before a number that nothing stands before; in 5–7 it means "to".
DASH = re.compile(r"(?:(?<=[\s(\[{=<>,;:$])–|^[–—])(?=\s*[\w.\\($])")
# A word of another script needs no space around it: 答案是5个.
SCRIPT = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
# Emphasis, code and quotes, as in **18**; not the _ of a_{1}, nor the * of 2 * 3 * 4.
MARKED = re.compile(
    r"(?<![\w)}\]*_`])(\*{1,3}|_{1,3}|`{1,3}|[\"'])(?!\s)"
    r"((?:(?!\1).){1,200})"
    r"(?<!\s)\1(?![\w({\[])"
)


def cleaned(text: str) -> str:
    """One alphabet, and no emphasis: `**７**` is 7, x² is x^{2}, a typographic minus a minus."""
    if "..." in text or "…" in text or "dots" in text:
        text = GOES_ON.sub(lambda m: rf"{m[1]}\overline{{{m[2] or m[3]}}}", text)
    if not text.isascii():
        text = RAISED_FRACTION.sub(raised_fraction, text)
        text = re.sub(r"[⁰¹²³⁴-⁹⁺⁻ⁿⁱ⁽⁾]+", lambda m: f"^{{{m[0].translate(RAISED)}}}", text)
        text = re.sub(r"[₀-₉₊₋ₙ₍₎]+", lambda m: f"_{{{m[0].translate(LOWERED)}}}", text)
        text = text.translate(ALPHABET)
        text = DASH.sub("-", text)
        text = SCRIPT.sub(r" \g<0> ", text)
    return MARKED.sub(r"\2", text).strip()


def raised_fraction(match: re.Match) -> str:
    above, below = match[1].translate(RAISED), match[2].translate(LOWERED)
    return rf"\frac{{{above}}}{{{below}}}"

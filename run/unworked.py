r"""Sums, differences and products of numerals that nobody has worked out: no answer for a number.

`23 + 40` has the value 63 and is no answer to "What is 23 + 40?". A policy soon finds out that a
judge of values pays for repeating the question.

| counts                                          | does not                                    |
|-------------------------------------------------|---------------------------------------------|
| `23 + 40 = 63`, `20 + 43 ≈ 63`, `63, as 23+40`  | `23 + 40`, `x = 23 + 40`, `about 23 + 40`   |
| `126/2`, `6 + 1/4`, `3 \cdot 10^4`              | `7 \cdot 9`, `63 + 0`, `(23+40)/1`          |
| powers, roots, factorials: `2^6`, `2^6 - 1`     | `100 - 37`                                  |
"""

import re
from collections import Counter
from fractions import Fraction

from run.quantities import Number, number, same_number

FIGURES = re.compile(r"[0-9]{1,15}(?:,[0-9]{3}){0,5}(?:\.[0-9]{1,15})?")
# Ways to count. On the way to sympy their value has been put in their place.
COUNTS = re.compile(r"binom|choose|[0-9_}]C|C[(_^]")


def is_left_unworked(answer: str, wanted: Number, expression) -> bool:
    """Whether all that an answer says is such a sum. expression: what sympy reads in it; wanted: the
    number that is asked for, which may stand beside it."""
    if COUNTS.search(answer) or not is_unworked(expression):
        return False
    beside = map(number, figures_beside(answer, expression))
    return not any(figure and same_number(figure, wanted) for figure in beside)


def figures_beside(answer: str, expression) -> list[str]:
    """The figures of an answer that are not those of the expression."""
    from sympy import preorder_traversal

    parts = preorder_traversal(expression)
    own = Counter(Fraction(str(part)) for part in parts if part.is_Rational or part.is_Float)
    figures = {Fraction(each.replace(",", "")): each for each in FIGURES.findall(answer)}
    all_of_them = Counter(Fraction(each.replace(",", "")) for each in FIGURES.findall(answer))
    return [figures[value] for value in all_of_them - own]


def is_unworked(expression) -> bool:
    from sympy import Equality, Expr, preorder_traversal
    from sympy.core.function import AppliedUndef

    if isinstance(expression, Equality):  # one side worked out is enough; a name's is none
        sides = [x for x in expression.args if not x.free_symbols and not x.atoms(AppliedUndef)]
        return bool(sides) and all(map(is_unworked, sides))
    if not isinstance(expression, Expr):
        return False
    parts = list(preorder_traversal(expression))
    if not all(part.is_Number or part.is_Add or part.is_Mul or is_inverse(part) for part in parts):
        return False  # a power, a root, a letter
    return any(len(terms(part)) > 1 for part in parts) and not is_mixed_number(expression)


def terms(part) -> list:
    """What a sum adds, and what a product multiplies apart from signs and divisors."""
    if part.is_Mul:
        return [factor for factor in part.args if factor != -1 and not is_inverse(factor)]
    return list(part.args) if part.is_Add else []


def is_inverse(part) -> bool:
    return part.is_Pow and part.exp == -1


def is_mixed_number(expression) -> bool:
    """Whether numerals are a whole number and a proper fraction, as in `6 + 1/4` and `-6 - 1/4`."""
    from sympy import Float

    if expression.is_Mul and len(expression.args) == 2 and -1 in expression.args:
        (expression,) = (part for part in expression.args if part != -1)
    if not expression.is_Add or len(expression.args) != 2 or expression.has(Float):
        return False
    whole, fraction = sorted(expression.args, key=lambda part: not part.is_integer)
    if not whole.is_integer or fraction.is_integer:
        return False
    return bool(whole * fraction > 0 and abs(fraction) < 1)

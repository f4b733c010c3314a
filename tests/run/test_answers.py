"""run/answers.py, notation.py, numerals.py, quantities.py: what counts as an equal answer, and what does not."""

import gzip
import json
import random
import time
from fractions import Fraction
from pathlib import Path

import pytest

from rewards import RIGHT, UNREADABLE, WRONG, Accuracy
from run.alphabet import cleaned
from run.answers import quick_verdict, stated, typed, verdict
from run.quantities import decimal

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures/rewards"
NUMBERS = ["0", "7", "18", "-18", "1,234", "0.5", "18.00", "99.99", "1", "-0.5"]
NUMBERS += ["0.1234567", "0.1234568", "1.0000001", "12.3456789"]


def in_this_process(pairs):
    """What run.judge.Judge says, of answers that do not hang."""
    pairs = [(cleaned(a), cleaned(b)) for a, b in pairs]
    return [quick_verdict(*pair) or verdict(*pair) for pair in pairs]


def test_emphasis_is_not_mistaken_for_mathematics():
    for text in (
        "2 * 3 * 4",
        r"\{a\}_{1}, \{b\}_{2}",
        "x_1 + y_1",
        "2**3 + 4**2",
        "f'(x) = g'(x)",
        "6' 2\"",
        "*" * 99,
    ):
        assert cleaned(text) == text


def test_emphasis_code_quotes_and_typography_are_not_part_of_an_answer():
    for text in ("**18**", "*18*", "__18__", "`18`", "```18```", '"18"', "“18”", " '18' "):
        assert cleaned(text) == "18"
    assert cleaned("\u22125") == "-5"


def test_a_box_dollar_signs_and_a_full_stop_are_not_part_of_an_answer():
    for text in (r"\boxed{18}", "$18$", r"\(18\)", r"$\boxed{18}$", r"\text{18}", "18.", " 18 "):
        assert typed(text) == "18"
    assert typed("$1$ and $2$") == "$1$ and $2$"


@pytest.mark.parametrize(
    "text, part",
    [
        (r"First \boxed{7}. Then, after a second and far longer look at it all, \boxed{8}.", "8"),
        (r"so \boxed{7} and \boxed{8}", "7, 8"),
        (r"\boxed{\frac{1}{\sqrt{2}}} holds", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1\}}", r"\{1\}"),
        ("We see $x=1$, hence it is $y+1$.", "y+1"),
        (r"So, after all, \[ 3/7 \]", "3/7"),
        (r"Therefore, $3/7$.", "3/7"),
        (r"We get 1, $3/7$.", r"We get 1, $3/7$"),
        (r"We get \(1\), \(3/7\)", r"We get \(1\), \(3/7\)"),
        ("The answer is 3/7.", "3/7"),
        ("**Answer:** $3/7$", "3/7"),
        ("The answer is $3/7$, not $4/7$.", "The answer is $3/7$, not $4/7$"),
        ("The answer is what she has left.", "The answer is what she has left"),
        (r"\boxed{3", r"\boxed{3"),
    ],
)
def test_the_part_that_states_an_answer_is_the_box_or_stands_last(text, part):
    assert stated(cleaned(text))[0] == part


def test_a_number_has_one_form():
    ways = {"1234.5": ["-$1,234.50", "-1 234.5", "-1234.500"], "0": ["-0", "-0.00", "-000"]}
    for form, texts in ways.items():
        wanted = form if form == "0" else f"-{form}"
        assert [decimal(text) for text in texts] == [wanted] * len(texts)
    assert [decimal(text) for text in ("", "-", "1,2", "12,34", "1/2", "1e5", "x")] == [None] * 7


def test_a_quick_verdict_is_the_one_that_math_verify_gives():
    rng = random.Random(0)
    random_numbers = [str(round(rng.uniform(-2000, 2000), rng.randrange(8))) for _ in range(20)]
    numbers = NUMBERS + random_numbers
    quick = [(a, b, quick_verdict(a, b)) for a in numbers for b in numbers]
    wrong = [case for case in quick if case[2] not in (None, verdict(*case[:2]))]
    assert wrong == []
    assert sum(said is not None for *_, said in quick) > len(quick) / 2


def test_what_is_not_certain_has_no_quick_verdict():
    for pair in (("\\sqrt{4}", "2"), ("x", "y"), ("5", "x"), ("", "5"), ("(1,2)", "(1, 2.0)")):
        assert quick_verdict(*pair) is None
    assert quick_verdict("Monday", "Monday") == RIGHT
    assert quick_verdict("17 18", "18") == WRONG  # guesses: math_verify would take the last
    assert quick_verdict("5", "") == UNREADABLE


def test_a_bare_formula_is_read_whole():
    for answer, reference, expected in (
        (r"\sqrt{12}", r"2\sqrt{3}", RIGHT),
        ("2", r"2\sqrt{3}", WRONG),
        ("(3,4)", "(3, 4)", RIGHT),
        ("4", "(3, 4)", WRONG),
        ("1, 2", "2, 1", RIGHT),
        ("5 kg", "5", RIGHT),
        ("Tuesday", "Monday", WRONG),
        ("Tuesday", "one of the weekdays", UNREADABLE),
    ):
        assert verdict(answer, reference) == expected, (answer, reference)


# What counts as equal --------------------------------------------------------------------------

# kind → lines of ways to write the same: each is right where the first is asked, and it where each.
SAME = {
    "words around a number": ["46 | about 46 | approximately 46 | It is 46. | The answer is 46 km"],
    "signs and punctuation around it": [
        r"31 | = 31 | =31 | x = 31 | 31 = x | ≈ 31 | \therefore 31 | ∴ 31 | → 31 | \Rightarrow 31",
        r"31 | The answer is = 31 | Answer = 31 | \boxed{= 31} | $= 31$ | = \$31 | = 31 apples",
        r"31 | 31, | 31; | 31: | 31 , | **31**, | \boxed{31,} | $31;$ | 31 km; | \$31, | 31.0, | x = 31;",
        r"\frac{5}{8} | \frac58, | 5/8; | = \frac{5}{8} | x = 5/8,",
        r"x^2-3 | = x^2-3 | x^2-3, | y = x^2-3; | \boxed{= x^2 - 3}",
        r"(2,9) | (2,9), | = (2,9) | (2, 9);",
        r"Sunday | Sunday, | Sunday; | Sunday!",
    ],
    "money": [
        r"\$7.25 | 7.25 dollars | $7.25 | 7.25 | \text{\$}7.25 | US$7.25 | \$7\frac{1}{4} | 7.25 USD",
        r"\$41,\!906 | 41,906 | 41906 | \$41{,}906 | 41\,906 | \$41906.00 | 41{,}906 \text{ dollars}",
        r"€12 | 12 euros | 12",
        r"\$3 million | $3M | 3,000,000 dollars | 3000000 | $3m | 3 million",
    ],
    "mixed numbers": [
        r"3 2/5 | 3.4 | 17/5 | \frac{17}{5} | 3\frac{2}{5} | 3 \tfrac25 | 3⅖ | 3 and 2/5 | x = 3 2/5",
        r"-4 1/3 | -\frac{13}{3} | -4\frac13 | −4⅓",
        r"6 1/4 | 6 + \frac14 | 6\ \frac{1}{4} | 6\,\frac14 | six and a quarter",
        r"6\frac14 | 6 + 1/4 | 6.25 | \frac{25}{4} | 25/4",
    ],
    "fractions": [
        r"5/8 | \dfrac58 | \tfrac{5}{8} | \cfrac{5}{8} | \sfrac{5}{8} | \nicefrac58 | ⁵⁄₈ | {5 \over 8}",
    ],
    "repeating decimals": [
        r"1/3 | 0.\overline{3} | 0.333... | 0.333… | 0.\bar3 | 0.\dot{3} | 0.(3) | 0.3\overline{33}",
        r"1/3 | $0.\overline{3}$ | 0.3333\ldots | 0.333\dots | The answer is 0.333... | .\overline{3}",
        r"\frac{17}{30} | 0.5\overline{6} | 0.5666... | 0.5\bar{6} | 0.5666\ldots",
        r"-\frac{14}{11} | -1.\overline{27} | -1.2727... | -1.27\overline{2727} | -1.\dot{2}\dot{7}",
        r"2 | 1.\overline{9} | 1.999...",
        r"33.\overline{3}\% | 33\frac13\% | 1/3 | 33.333...%",
    ],
    "number words": [
        r"7 | seven | Seven | SEVEN | \text{seven} | \boxed{seven} | The answer is seven. | It is seven.",
        r"7 | seven apples | seven dollars | **Seven**, | $7 | 7 apples",
        r"38 | thirty-eight | Thirty-Eight | thirty eight | thirty‑eight | thirty-eight km",
        r"360 | three hundred sixty | three hundred and sixty | thirty dozen",
        r"12 | a dozen | one dozen eggs | twelve",
        r"1,500 | fifteen hundred",
        r"5,217 | five thousand two hundred seventeen | five thousand, two hundred and seventeen",
        r"1000000 | one million | a million | 1 million",
        r"-4 | minus four | negative four",
        r"0.5 | one half | one-half | half | a half | 1/2",
        r"3/5 | three fifths | three-fifths",
        r"25\% | twenty-five percent",
    ],
    "clocks": [r"4:35 p.m. | 4:35 PM | 4:35pm | 4:35 P.M. | \text{4:35 p.m.} | 4:35 \text{ pm}"],
    "no solution": [
        r"\emptyset | no solution | No solutions. | \text{no solution} | {} | \{ \} | Ø | no real solutions",
        r"no solution | \emptyset | \varnothing | {} | ∅ | There is no solution. | x \in \emptyset",
        r"\text{No solution} | there are no real solutions | no solution exists | the empty set",
    ],
    "choosing": [
        r"84 | \binom{9}{3} | {9 \choose 3} | \binom93 | \tbinom{9}{3} | {}_9C_3 | ^9C_3 | 9 choose 3",
        r"84 | _9C_3 | {}_9C_3 | \binom{9}{6} ways",
        r"2\binom{9}{3} | 168 | \binom{9}{3} + 84",
        r"\binom{9}{3} | \frac{9!}{3!6!} | 84",
    ],
    "plain text": [
        r"sqrt(7)/3 | \frac{\sqrt{7}}{3} | \sqrt{7}/3 | √7/3 | (sqrt 7)/3",
        r"5*pi/6 | \frac{5\pi}{6} | 5π/6 | 5pi/6",
        r"exp(9) - 4 | e^9-4 | e^{9} - 4 | e**9 - 4",
        r"2^(x+1) | 2^{x+1} | 2**(x+1) | 2 \cdot 2^x",
        r"cbrt(5) | \sqrt[3]{5} | ∛5 | 5^(1/3)",
        r"sqrt(sqrt(3)+1) | \sqrt{\sqrt{3}+1} | \sqrt{1 + \sqrt3}",
        r"k(k-1)/2 | \frac{k^2-k}{2} | \binom{k}{2}-0",
        r"3 - 2*i | 3-2i",
    ],
    "signs": [
        r"3π | 3\pi | 3 \pi",
        r"5√6 | 5\sqrt{6} | \sqrt{150}",
        r"a³ − 2 | a^3-2 | a^{3} - 2",
        r"⅝ | 0.625 | \frac58 | 5⁄8",
        r"–12 | -12 | −12 | －12",
        r"８３ | 83",
        "98\u00a0765 | 98765 | 98\u202f765 | 98\u2009765 | 98,765 | 98\u2006765",
        r"98,765 | 98\thinspace765 | 98{\,}765 | 98'765 | 98\,765",
        r"（3，8） | (3,8) | (3, 8)",
        r"−∞ | -\infty | -infinity",
        r"∅ | \varnothing | \emptyset | \{\} | empty set",
        r"37° | 37^\circ | 37 | 37 degrees | 37^{\circ}",
        r"答案是 62。 | 62 | 答案：62",
    ],
    "choices": [
        r"D | (D) | D. 40 litres | D) 40 | \textbf{(D)}\ 40 | The answer is D. | \text{D} | Option D",
        r"D | The correct option is D | Option (D) is correct. | (D) is correct | D is the correct answer",
        r"D | The correct choice is (D). | Thus, option D is correct. | D, | I choose D. | It is D. | Option: D",
        r"D | Correct option: (D) | We try each. So the correct option is **D**. | The right answer is D",
        r"(D) 40 | The correct answer is option (D) 40 | Choice D. 40 | D",
    ],
    "units": [
        r"84 | 84 km/h | 84 miles per hour | 84 m/s^2 | 84 Rs. | 84 \text{ cm}^2 | 84 pears | $84 per day",
        r"62 \text{ kg} | 62 kg | 62 kilograms | 62",
        r"7\sqrt{5} | 7\sqrt{5} units | 7√5 cm | 7\sqrt{5} \text{ units} | 7\sqrt{5} square units",
        r"36 | 3 dozen | 36 eggs",
    ],
    "numbers": [
        r"4e5 | 400000 | 4 \times 10^5 | 4 \cdot 10^{5} | 400,000 | 400 thousand | 4E5",
        r"3.1e-7 | 0.00000031 | 3.1 \times 10^{-7} | \frac{31}{10^8}",
        r"7! | 5040 | \frac{8!}{8}",
        r"37\frac{1}{2}\% | 37.5\% | 37.5 percent | 0.375 | \frac38",
        r"2^{12} | 4096 | 2^12 | 2**12",
        r"1/3^4 | \frac{1}{81} | 1/81 | \frac{1}{3^4} | 3^{-4}",
        r"3.5² | 12.25 | 3.5^2 | 49/4 | 3.5^{2}",
        r"2,000^2 | 4000000 | 4e6",
    ],
    "intervals": [
        r"(-\infty, 7) | x<7 | 7 > x | x \in (-\infty,7) | (-∞, 7) | y < 7",
        r"[-2, 6.5) | -2 \le x < 6.5 | 6.5 > x >= -2 | [-2,13/2) | x ∈ [-2, 6.5)",
        r"(-\infty,1)\cup[4,\infty) | x<1 or x>=4 | [4,∞)∪(-∞,1) | x < 1 \text{ or } x \geq 4",
        r"(-\infty,\infty) | \mathbb{R} | all real numbers | ℝ",
        r"\{4, 9\} | \{9,4\} | 4, 9 | 9,4",
    ],
    "bases": [r"3047_8 | 3047_{8} | 3047₈ | 3047 base 8 | \text{3047}_8"],
    "words": [
        r"\text{odd} | odd | Odd | \textbf{odd} | \boxed{\text{odd}} | It is clearly \boxed{odd}.",
        r"Beatrice | \text{Beatrice} | The answer is Beatrice. | “Beatrice”",
        r"a parabola | parabola | \mathrm{parabola}",
    ],
    "rounded": [r"2/3 | 0.666667 | 0.6666667", r"\sqrt{5} | 2.236068"],
    "names": [r"t=11 | 11 | t = 11.0", r"y=3x-2 | 3x-2"],
}


@pytest.mark.parametrize("kind", SAME)
def test_ways_to_write_the_same_are_equal_either_way_round(kind):
    for line in SAME[kind]:
        first, *others = line.split(" | ")
        for other in others:
            said = in_this_process([(other, first), (first, other)])
            assert said == [RIGHT, RIGHT], (first, other)


def test_what_is_worked_out_on_one_side_or_is_a_fraction_or_a_power_is_an_answer():
    ways = ["23 + 40 = 63", "$23+40=63$", "63 = 23 + 40", "126/2", r"\frac{126}{2}", "2^6 - 1"]
    assert in_this_process([(way, "63") for way in ways]) == [RIGHT] * len(ways)
    ways = [r"2^3 \cdot 3^2", r"8 \times 9 = 72", r"2 \cdot 6^2", r"\sqrt{5184}"]
    assert in_this_process([(way, "72") for way in ways]) == [RIGHT] * len(ways)
    ways = ["20 + 43 ≈ 63", "63, because $23+40$", "It is 63 as 23+40"]
    assert in_this_process([(way, "63") for way in ways]) == [RIGHT] * len(ways)
    ways = [r"\cos(0) + 2", r"1 + 2\log_{10} 10", "2 + 0!", r"\ln(e) + 2"]
    assert in_this_process([(way, "3") for way in ways]) == [RIGHT] * len(ways)
    ways = [r"-2 - \frac{1}{2}", r"-\left(2+\frac12\right)", "-2.5"]
    assert in_this_process([(way, "-2.5") for way in ways]) == [RIGHT] * len(ways)
    pairs = [
        ("63", "23 + 40"),
        (r"7 \cdot 9", "23 + 40"),
        ("6 + 1/4", "6.25"),
        ("3*10^4", "30000"),
    ]
    assert in_this_process(pairs) == [RIGHT] * len(pairs)


def test_a_count_of_choices_by_a_letter_is_a_number_as_an_answer_alone():
    """In a reference C(9,3) may be a point, 9C3 a number of base 16, and C_9^3 a power."""
    ways = ["C(9,3)", "C(9, 3) ways", "9C3", r"\mathrm{C}(9,3)", "C_9^3", "C_{9}^{3}", "C^3_9"]
    assert in_this_process([(way, "84") for way in ways]) == [RIGHT] * len(ways)
    assert RIGHT not in in_this_process([("84", way) for way in ways])
    assert in_this_process([("P(9,3)", "504"), ("9P3", "504"), ("(9,3)", "(9,3)")]) == [RIGHT] * 3


# Each looks like the other, and is wrong.
NEAR_MISSES = {
    "sums and products that nobody has worked out": [
        *(
            (way, "63")
            for way in ("23 + 40", "$23+40$", r"\boxed{23 + 40}", "(23+40)", "x = 23 + 40")
        ),
        *((way, "63") for way in ("The sum is 23 + 40.", "23 + 40 = Cricket.", "23 + 40 is it")),
        *(
            (way, "63")
            for way in ("100 - 37", "3 \\cdot 20 + 3", "63 + 0", "1.5 + 61.5", "23+40 km")
        ),
        *(
            (way, "63")
            for way in (r"7 \cdot 9", "7 * 9", "7 × 9", "9(7)", r"2 \cdot 63/2", "1/2 + 125/2")
        ),
        ("23 + 40", r"63 \text{ km}"),
        ("23 + 40", r"\$63"),
        *((way, "63") for way in ("approximately 23 + 40", r"\approx 23+40", "a+b = 23+40")),
        ("f(2) = 2 * 12", "24"),
        ("2 - 1/2", "1.5"),
        ("3 + 20 = 40 + 23", "63"),
        ("5 + 5/4", "6.25"),
        (r"2 \cdot 84", "168"),
        ("-3 - 4", "-7"),
    ],
    "hedges": [
        ("not 46", "46"),
        ("It is not 46.", "46"),
        ("at least 46", "46"),
        ("less than 46", "46"),
        ("almost 46 km", "46"),
        ("46 or more", "46"),
        ("46+", "46"),
        ("46th", "46"),
        ("44 to 46", "46"),
        ("between 44 and 46", "46"),
        ("45? 46?", "46"),
        ("45, maybe 46", "46"),
        ("45 dollars or 46 dollars", r"\$46"),
        (">= 46", "46"),
        (r"\ne 46", "46"),
        ("=> 46", "46"),
        ("= 45 = 46", "46"),
    ],
    "signs and punctuation around it": [
        ("= -31", "31"),
        ("31 = 32", "31"),
        ("32 = x", "31"),
        ("31 = y", "x = 31"),
        ("31, 32,", "31"),
        ("31; 32", "32"),
        ("31!", "31"),
        ("= x^2+3", "x^2-3"),
        ("x^2, 3,", "x^2-3"),
        ("(9,2),", "(2,9)"),
    ],
    "fractions": [("⁸⁄₅", "5/8"), (r"\sfrac{5}{18}", "5/8"), (r"\nicefrac58", "58"), ("58", "5/8")],
    "repeating decimals": [
        (r"0.\overline{3}", "0.3"),
        (r"0.\overline{3}", "3"),
        (r"0.\overline{3}", "0"),
        (r"0.0\overline{3}", "1/3"),
        ("0.333", "1/3"),
        ("0.334...", "1/3"),
        ("0.303...", "1/3"),
        (r"1.\overline{27}", r"1.2\overline{7}"),
        ("0.5(6)", r"0.5\overline{6}"),  # three
        ("1.50...", "1.55555555"),
    ],
    "number words": [
        ("seventeen", "7"),
        ("seventy", "7"),
        ("seven or eight", "7"),
        ("not seven", "7"),
        ("seven to nine", "7"),
        ("seven maybe", "7"),
        ("perhaps seven", "7"),
        ("seven squared", "7"),
        ("seven and a half", "7"),
        ("seven hundred", "7"),
        ("sevenths", "7"),
        ("seven eighths", "7"),
        ("seven twentieths", "7"),
        ("7 twentieths", "7"),
        ("seven dozen", "7"),
        ("one of them", "1"),
        ("one or more", "1"),
        ("one-to-one", "1"),
        ("one third", "1"),
        ("half a dozen", "1/2"),
        ("half past six", "0.5"),
        ("thirty-eight", "30"),
        ("eight thirty", "38"),
        ("three hundred sixty", "63"),
        ("seven brides", "seven brothers"),
        ("thousand two", "1002"),
    ],
    "clocks": [("4:35 a.m.", "4:35 p.m."), ("4:53 PM", "4:35 PM"), ("14:35 PM", "4:35 PM")],
    "no solution": [
        ("0", "no solution"),
        ("no solution", "0"),
        ("one solution", "no solution"),
        ("no unique solution", "no solution"),
        ("infinitely many solutions", r"\emptyset"),
        (r"\{0\}", r"\emptyset"),
        (r"\{\emptyset\}", r"\emptyset"),
        (r"\phi", r"\emptyset"),
        ("not the empty set", r"\emptyset"),
        ("no integer solutions", "no solution"),
    ],
    "choosing": [
        (r"\binom{9}{2}", "84"),
        (r"\binom{3}{9}", "84"),
        (r"\binom93", "93"),
        ("C(9,2)", "84"),
        ("P(9,3)", "84"),
        ("9C2", "84"),
        ("84", "C(9,3)"),  # as a reference, a point
        ("C(3,9)", "C(9,3)"),
    ],
    "money": [
        (r"\$7.52", r"\$7.25"),
        ("7.25 cents", r"\$7.25"),
        ("€7.25", r"\$7.25"),
        ("725", r"\$7.25"),
        (r"\$41,\!960", r"\$41,\!906"),
        ("41", r"\$41,\!906"),
    ],
    "mixed numbers": [
        ("3 2/5", "3"),
        ("3 2/5", "2/5"),
        ("3 2/5", "1.2"),  # the product
        ("3 5/2", "2.5"),
        ("32/5", "3 2/5"),
        ("-3 2/5", "-2.6"),
        ("3 - 2/5", "3 2/5"),
        (r"3 \cdot \frac25", "3 2/5"),
        (r"3\times\frac{2}{5}", r"3\frac25"),
        ("0.7 + 1/2", "3 2/5"),
    ],
    "plain text": [
        ("sqrt(7)", "7"),
        ("sqrt(7)", "2.645"),
        ("sqrt 75", r"5\sqrt{7}"),
        ("sqrt(9+16)", "sqrt(9)+16"),
        ("5*pi/6", r"\frac{6\pi}{5}"),
        ("pi", "22/7"),
        ("exp(9)", "9e"),
        ("e^(3x)", "e^3x"),
        ("1/(x+2)", "1/x+2"),
        ("x^15", "x^1 5"),
        ("2**3", "6"),
        ("k(k-1)/2", "k(k+1)/2"),
        ("2e - 1", "0.2"),
        ("3 + 2*i", "3-2i"),
    ],
    "signs": [
        ("x³", "x3"),
        ("x³", "x²"),
        ("3–8", "-5"),  # from three to eight
        ("5√6", r"\sqrt{56}"),
        ("⅝", "5"),
        ("1⅝", "15/8"),
        ("∞", r"-\infty"),
        ("∅", "0"),
        ("10⁴", "104"),
        ("８３", "84"),
    ],
    "choices": [
        ("A or D", "D"),
        ("A, D", "D"),
        ("(A) and (D)", "D"),
        ("A) 30 D) 40", "A"),
        ("D. 30 litres", "D. 40 litres"),
        ("C. 40 litres", "D. 40 litres"),
        ("(C) + 1", "C"),
        ("Not D", "D"),
        ("The correct option is not D", "D"),
        ("Option (D) is not correct", "D"),
        ("(D) is not correct", "D"),
        ("(D) may be right", "D"),
        ("D. wrong", "D"),
        ("Neither C nor D is correct", "D"),
        ("C and D is correct", "D"),
        ("I doubt D is correct", "D"),
        ("D is incorrect", "D"),
        ("The correct option is C or D", "D"),
        ("The correct option is C", "D"),
        ("D is wrong, so C is correct.", "D"),
    ],
    "units": [
        ("84 m", "84 cm"),
        ("84 minutes", "84 hours"),
        ("84x", "84"),
        ("84t", "84"),
        ("84", "84t"),
        ("84 squared", "84"),
        ("2 thirds", "2"),
        ("6 feet 2 inches", "2"),
        ("6 feet 2 inches", "6"),
        (r"7\sqrt{5} units", "7"),
        (r"7 units", r"7\sqrt{5}"),
        (r"7\sqrt{5} square units", r"5\sqrt{7}"),
        ("2 dozen", "2"),
        ("2 elevenths", "2"),
    ],
    "numbers": [
        ("4e5", "4e6"),
        ("4e5", "45"),
        ("7!", "7"),
        ("7!!", "5040"),
        ("4 million", "4"),
        ("37.5\\%", "37"),
        ("3.75\\%", "0.375"),
        ("12,34", "1234"),
        ("98'76", "9876"),
        ("98'7654", "987654"),
        ("1.0000004", "1"),
        ("0.66", "2/3"),
        ("2 3 4", "4"),
        ("1/3", "1/3^4"),
        ("1/3^4", "1/3"),
        ("3.5²", "3.5"),
        ("4/5^2", "4/5"),
        ("2,000^2", "2000"),
        ("6!^2", "720"),
        ("4^2^3", "16"),
        ("1.5 x 10^2^2", "150"),
        ("1e2^2", "100"),
        ("9.8^2", "9.8 m/s^2"),
        ("1/4!", "1/4"),
        ("2(84)", "86"),  # a product
        ("2(84)", "284"),
    ],
    "tiny": [
        ("0.0000004", "0.0000005"),
        ("0", "0.0000004"),
        ("4e-9", "4e-8"),
        (r"\frac{1}{5^{40}}", r"\frac{1}{5^{41}}"),
        (r"\frac{1}{90!}", r"\frac{1}{91!}"),
        (r"\frac{\sqrt{5}}{10^{9}}", r"\frac{\sqrt{6}}{10^{9}}"),
        (r"2^{-70}", "0"),
        ("(0.0000004, 1)", "(0.0000005, 1)"),
    ],
    "intervals": [
        (r"x \le 7", "x<7"),
        ("x>7", r"(-\infty,7)"),
        ("y<7", "x<7"),
        ("(7,-2)", "(-2,7)"),
        ("[-2,7)", "(-2,7]"),
        ("(-2,7)", r"\{-2,7\}"),
        ("x<1 or x>4", "(1,4)"),
        ("x<7", "7"),
        (r"[1,2)\cup(3,4)", r"[1,2)\cup(3,4]"),
        ("(1,2,3)", "(1,3,2)"),
    ],
    "bases": [("3047_9", "3047_8"), ("3074_8", "3047_8"), ("1575", "3047_8"), ("1575_9", "1575")],
    "words": [
        ("even", r"\text{odd}"),
        ("not odd", "odd"),
        ("odd or even", "odd"),
        ("Beatrix", "Beatrice"),
        ("west", "north-west"),
    ],
    "names": [("t=12", "t=11"), ("s=11", "t=11"), ("y=3x+2", "3x-2")],
    "several": [(r"\boxed{7} or \boxed{8}", "8"), ("7, 8", "8"), ("7 = 8", "8")],
}


@pytest.mark.parametrize("kind", NEAR_MISSES)
def test_a_wrong_answer_that_looks_right_is_wrong(kind):
    assert [pair for pair in NEAR_MISSES[kind] if in_this_process([pair]) == [RIGHT]] == []
    assert sum(map(len, NEAR_MISSES.values())) >= 60


def test_every_random_number_equals_itself_in_other_clothes_and_no_other():
    rng = random.Random(3)
    for _ in range(200):
        value, off = Fraction(rng.randrange(1, 10**6), rng.choice((1, 2, 4, 5, 8))), 1
        whole, rest = divmod(value, 1)
        ways = [f"{float(value):.3f}", f"{value.numerator}/{value.denominator}"]
        ways += [rf"\frac{{{value.numerator}}}{{{value.denominator}}}", f"{float(value):,.3f} km"]
        ways += [f"${float(value):.3f}", f"{float(value / 1000):.6f}e3"]
        if rest:
            ways += [f"{whole} {rest}", rf"{whole}\frac{{{rest.numerator}}}{{{rest.denominator}}}"]
        for way in ways:
            assert quick_verdict(way, str(value)) == RIGHT, (way, value)
            assert quick_verdict(way, str(value + off)) == WRONG, (way, value)
            assert quick_verdict(way, str(-value)) == WRONG, (way, value)


LATIN = r"\boxed{ ( [ $ \( { } ^ _ , - . / | * **a _a 1 1, 1/ 1^ 9. \frac \frac{1} \text{ sqrt( or"
TYPED = "0.3... 9C_3 = twenty ≈ ; 5:3 no 3 choose \\dot{ ⁴⁄₅ \\binom 1' units It's"
OTHERS = "² √ – ½ 。 答案 answer answer: \\cup x< A. {\\boxed{1} $1$ <answer>"


@pytest.mark.parametrize("unit", [*f"{LATIN} {OTHERS} {TYPED}".split(" "), " ", "\n", " 1", "a "])
def test_long_texts_are_read_in_linear_time(unit):
    seconds = []
    for length in (25_000, 100_000):
        text = (unit * length)[:length]
        start = time.process_time()
        for pair in ((text, "5"), ("5", text), (text + "5", text + "6")):
            a, b = map(cleaned, pair)
            quick_verdict(a, b)
            stated(a), stated(b)
        seconds.append(time.process_time() - start)
    assert seconds[1] < 1 + 10 * seconds[0]  # sixteen times, if it were quadratic
    assert seconds[0] < 2


# Beside the peers ------------------------------------------------------------------------------

# Every difference from the peers by its row in completions.json, under the reason why ours is right.
STATED_LAST = (
    "402 405 408 411 414 417 423 429 432 435 441 444 459 468 477 480 483 492 498 504 507 510 525 "
    "531 534 552 555 561 567 570 573 576 579 588 591 594 597 652 653 657 662 663"
)
LAST = (
    "no <answer>, no \\boxed{}: the text ends in its answer; the peer wants \\boxed{} or the word"
)
READ = {
    "1e5 is 100000": "556 557 558",
    "a unit may stand in the box": "536 537",
    "so may a full stop": "599 600",
}
CUT = (
    "the same rule, which cannot know that a text was cut short: the spec compares the whole of it"
)
WHOLE = "a bare formula is read whole; the peer takes one number in it for all"
DIFFERENCES = {
    "swift": {
        LAST: STATED_LAST,
        CUT: "103 105",
        "an <answer> needs no dollar signs": (
            "439 442 457 466 481 490 496 502 508 523 550 553 559 565 592"
        ),
        "nor does a reference, and a word is a reference too": (
            "452 453 454 455 456 460 461 462 469 470 471 488 489 511 512 513 517 518 519 526 527 528"
        ),
        WHOLE: "448 449 463 464 472 473 580",
        "the last <answer> counts, not the first": "634 637",
        "\\dfrac34 is 3/4": "436 437 438",
        **READ,
    },
    "trl": {
        LAST: STATED_LAST,
        CUT: "103 105",
        "an <answer> is an answer; the peer reads LaTeX alone": (
            "242 244 248 250 254 256 260 262 266 268 272 274 278 280 284 286 290 292 296 298 302 "
            "304 308 310 314 316 320 322 326 328 332 334 338 340 344 346 350 352 356 358 362 364 "
            "368 370 374 376 380 382 386 388 392 394 398 400 403 406 409 412 415 421 427 439 442 "
            "457 466 475 478 481 490 496 502 505 508 523 529 532 535 550 553 559 565 568 571 574 "
            "577 586 589 592 595 598 621 622 623 624 625 626 627 628 630 631 633 634 635 636 637 "
            "639 640 641 642 643"
        ),
        "a reference needs no dollar signs": "451 452 453 460 461 462 469 470 471 487 488 489",
        WHOLE: "449 464 473",
        "\\dfrac34 is 3/4": "436 437 438",
        **READ,
    },
}


def test_accuracy_equals_the_peers_where_both_answer():
    rows = json.loads((FIXTURES / "completions.json").read_text())
    values = json.loads(gzip.decompress((FIXTURES / "peers.json.gz").read_bytes()))["values"]
    for i in (580, 581, 582, 646):  # these time out, which test_judge.py shows, and score 0.0
        rows[i] = {"completion": "0", "solution": "1"}
    completions = [row["completion"] for row in rows]
    solutions = [row["solution"] for row in rows]
    ours = Accuracy(in_this_process)(completions, solution=solutions)
    for peer, reasons in DIFFERENCES.items():
        theirs = [value[f"{peer}_accuracy"] for value in values]
        answered = [i for i, value in enumerate(theirs) if value in (0.0, 1.0)]  # else a word
        assert len(answered) > 600
        listed = [int(i) for indices in reasons.values() for i in indices.split()]
        assert [i for i in answered if theirs[i] != ours[i]] == sorted(listed), peer

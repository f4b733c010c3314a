"""run/units.py: units and currencies behind a number, and amounts in two units."""

from itertools import permutations

import pytest

from rewards import RIGHT
from run.alphabet import cleaned
from run.answers import quick_verdict, verdict


def is_right(answer: str, reference: str) -> bool:
    a, b = cleaned(answer), cleaned(reference)
    return (quick_verdict(a, b) or verdict(a, b)) == RIGHT


# Any two of a line are equal.
SAME = [
    r"7 km/h | 7 km per hour | 7 kilometers per hour | 7 kmh | 7 km/hr | 7 km an hour | 7",
    r"3.6 m/s^2 | 3.6 meters per second squared | 3.6 m/s² | 3.6 \text{ m/s}^2 | 3.6",
    r"11 cm^2 | 11 square cm | 11 cm² | 11 sq cm | 11 centimeters squared | 11",
    r"14 m^3 | 14 cubic meters | 14 m³",
    r"35^\circ C | 35°C | 35 °C | 35 degrees Celsius | 35 Celsius | 35 degrees C | 35",
    r"35^\circ C | 35 degrees | 35",
    r"£40 | 40 pounds | 40 quid | ￡40 | 40 GBP | 40",
    r"¥6,000 | 6000 yen | ￥6000 | 6000",
    r"¥6,000 | 6000 yuan | 6000",
    r"$9 per day | $9 | 9 dollars a day | $9/day | 9",
    r"4 hours 45 minutes | 4h45m | 4.75 hours | 4 hr, 45 min | 4 hours and 45 minutes",
    r"4 hours 45 minutes | 285 minutes",
    r"5 ft 3 in | 63 inches | 5 feet 3 inches | 5 feet and 3 inches",
    r"\$8.20 | 8 dollars and 20 cents | $8 and 20 cents",
    r"2 cats and 7 dogs | 2 cats, 7 dogs",
]
# The first is asked, and the others are wrong.
OTHERS = [
    "7 km/h | 7 km | 7 km/s | 7 m/h | 7 miles per hour",
    "7 km | 7 km/h",
    "3.6 m/s^2 | 3.6 m/s | 3.6 m | 3.6 m/s^3",
    "11 cm^2 | 11 cm^3 | 11 cm | 11 cubic cm | 11 m^2",
    "11 | 11 squared | 11^2",
    "35°C | 35°F | 35 degrees Fahrenheit | 35 kg",
    "£40 | $40 | €40 | 40 kg | 40 pence | ¥40",
    "40 pounds | 40 kg | $40",
    "€12 | £12 | $12",
    "¥6,000 | $6000 | €6000",
    "50 | $50k | $50M | $50x | $50t | €50x | £50 squared",
    "$50k | 50 | $50 | $50M",
    "4 hours 45 minutes | 45 | 45 minutes | 4 | 4 hours | 4.45 hours | 45 hours 4 minutes | 4:54",
    "5 ft 3 in | 3 | 5 | 53 | 3 in | 5 ft | 5 ft 3 minutes",
    "2 cats and 7 dogs | 7 | 2 | 7 dogs | 7 cats and 2 dogs",
    "6xy | 2x3y2",
]


@pytest.mark.parametrize("line", SAME)
def test_units_that_are_the_same_are_equal_whichever_is_asked(line):
    pairs = permutations(line.split(" | "), 2)
    assert [pair for pair in pairs if not is_right(*pair)] == []


@pytest.mark.parametrize("line", OTHERS)
def test_another_unit_or_half_of_one_is_wrong(line):
    reference, *answers = line.split(" | ")
    assert [answer for answer in answers if is_right(answer, reference)] == []


def test_a_product_is_no_amount_in_two_units():
    assert is_right("6xy", "2x3y")

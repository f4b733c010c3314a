"""What may stand behind a flag: true or false, a number within bounds; else one line on what works."""

import argparse
import math
import re


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r}: true or false works")
    return text.lower() == "true"


def planned(text: str) -> bool | int:
    """Whether to plan, and for how many GPUs if not for this machine."""
    if text.isdecimal() and int(text):
        return int(text)
    try:
        return boolean(text)
    except argparse.ArgumentTypeError:
        message = f"{text!r}: true, false or a number of GPUs works"
        raise argparse.ArgumentTypeError(message) from None


def number(kind: type, bounds: str = ""):
    """A parser of a whole number or any, within bounds such as "from 0", "above 0" or "0 to 1"."""
    above = bounds.startswith("above")
    limits = re.findall(r"-?\d[\d.e+*]*", bounds)
    low = float(limits[0]) if limits else -math.inf
    high = float(limits[1]) if len(limits) > 1 else math.inf

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        too_low = value <= low if above else value < low
        if math.isnan(value) or math.isinf(value) or too_low or value > high:
            raise argparse.ArgumentTypeError(f"{text!r}: {what_works(kind, above, low, high)}")
        return value

    return parse


def what_works(kind: type, above: bool, low: float, high: float) -> str:
    words = "a whole number" if kind is int else "a number"
    if low > -math.inf:
        words += f" {'above' if above else 'from'} {low:g}"
    if high < math.inf:
        words += f" to {high:g}"
    return f"{words} works"

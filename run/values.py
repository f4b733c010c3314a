"""What may stand behind a flag: true or false, a number within bounds, a path that may be looked at;
else one line on what works.
And what a file or a line of JSON says."""

import argparse
import json
import math
import os
import re

from data import UsageError, one_line


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


def refuse_hidden(what: str, path: str) -> None:
    """UsageError for a path that may not be looked at, or is too long to be one. Of such a path
    pathlib's questions, `is_file` and others, raise. what: names flag and value."""
    try:
        os.stat(os.path.join(path, "."))  # of a folder: whether one may enter it
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:
        reason = one_line(error)
        raise UsageError(f"{what}: {reason}; a path that you may read works") from error


def from_json(text: str | bytes):
    """ValueError for whatever cannot be read: Python's own reader has another for what is too deep."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None

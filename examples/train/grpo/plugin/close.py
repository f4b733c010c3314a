"""Partial credit, a reward of one's own: the nearer a whole number is to the reference, the more it earns.

Where no completion of a group is right, accuracy is 0 for all and teaches nothing; this still tells them apart.
"""

import re

from rewards import orms

REACH = 40  # how far off earns nothing


def close(completions, solution, **columns):
    return [
        closeness(completion, reference) for completion, reference in zip(completions, solution)
    ]


def closeness(completion: str, reference: str | None) -> float | None:
    """From 0 to 1; None, which does not count, where the reference is no whole number."""
    right = re.fullmatch(r"-?\d{1,9}", reference or "")
    answer = re.search(r"<answer>\s*(-?\d{1,9})\s*</answer>", completion)
    if not right:
        return None
    return max(0.0, 1 - abs(int(answer[1]) - int(right[0])) / REACH) if answer else 0.0


orms["close"] = close

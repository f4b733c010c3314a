"""Partial credit, a reward of one's own: the nearer a whole number is to the reference, the more it earns.

Where no completion of a group is right, accuracy is 0 for all and teaches nothing; this still tells them apart.
"""

import re

from rewards import orms

REACH = 40  # how far off earns nothing


def close(completions, solution, **columns):
    answers = [re.search(r"<answer>\s*(-?\d{1,9})\s*</answer>", completion) for completion in completions]
    return [max(0.0, 1 - abs(int(a[1]) - int(s)) / REACH) if a else 0.0 for a, s in zip(answers, solution)]


orms["close"] = close

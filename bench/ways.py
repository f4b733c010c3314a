r"""Answers of GSM8K's and MATH's format in ten ways of writing: does every right one score 1.0, and every wrong one 0.0?

    python bench/ways.py --answers 2000 --busy 12        prints what was misjudged, and the counts

With --busy, as many processes compute beside the judge, each in a session of its own, so that the
system gives them the same share of the machine. Verdicts must not depend on them. Questions are made
up; a reference is a whole solution, as in the data sets: GSM8K's ends in `#### 18`, and MATH's has
its answer in \boxed{}. tests/run/test_ways.py judges a few of them.
"""

import argparse
import multiprocessing
import os
import random
import sys
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from rewards import Rewards  # noqa: E402
from run.judge import Judge  # noqa: E402

WAYS = [
    "<think>First {a}? Yes.</think><answer>{a}</answer>",
    "We add them all.\nThe answer is ${a}$.",
    r"Hence it has to be $\boxed{{{a}}}$.",
    "That makes it clear.\n#### {a}",
    "Both sides agree, and we get ${a}$.",
    "<answer>**{a}**</answer>",
    "<answer>= {a},</answer>",
    r"<think>…</think>So, after all, \[ {a}. \]",
    "We are done. So it is {a}.",
    "<answer>{other}</answer>",  # the same value, written otherwise
]


def gsm8k(rng) -> tuple:
    """A whole number: reference, two ways to write it, and two for a wrong one."""
    a, b = rng.randrange(2, 60), rng.choice([rng.randrange(2, 60), rng.randrange(1000, 90_000)])
    right = a + b
    wrong = right + rng.choice([-10, -1, 1, 10])
    reference = f"She has {a} + {b} = <<{a}+{b}={right}>>{right} of them.\n#### {right:,}"
    other = rng.choice([r"\${:,}.00", "{} apples", "{:,}", "x = {}", r"\text{{{} dollars}}"])
    return reference, str(right), other.format(right), str(wrong), other.format(wrong)


def fraction(rng):
    above, below = rng.randrange(1, 40), rng.choice([3, 7, 8, 11, 12])
    value = Fraction(above * below + 1, below)
    off = value + Fraction(1, below)

    def latex(v):
        return rf"\dfrac{{{v.numerator}}}{{{v.denominator}}}"

    def mixed(v):
        whole, rest = divmod(v, 1)
        return f"{whole} {rest.numerator}/{rest.denominator}" if whole and rest else str(v)

    return latex(value), mixed(value), latex(off), mixed(off)


def root(rng):
    factor, inside = rng.randrange(2, 9), rng.choice([2, 3, 5, 7])
    latex, typed = r"{}\sqrt{{{}}}", "{}*sqrt({})"
    pairs = (factor, inside), (factor + 1, inside)
    return tuple(way.format(*pair) for pair in pairs for way in (latex, typed))


def point(rng):
    x, y = rng.randrange(-9, 0), rng.randrange(1, 9)
    return f"({x},{y})", f"x = {x}, y = {y}", f"({y},{x})", f"x = {x}, y = {-y}"


def interval(rng):
    low, high = rng.randrange(-9, 0), rng.randrange(1, 9)
    right = rf"[{low},{high})", rf"{low} \le x < {high}"
    return *right, rf"({low},{high})", rf"{low} \le x \le {high}"


def polynomial(rng):
    a, b = rng.randrange(2, 9), rng.randrange(2, 9)
    right = f"x^2+{a + b}x+{a * b}", f"(x+{a})(x+{b})"
    return *right, f"x^2-{a + b}x+{a * b}", f"(x+{a})(x-{b})"


def percent(rng):
    value = rng.randrange(1, 99)
    return rf"{value}\%", f"{value} percent", rf"{value + 1}\%", f"{value}/1000"


def option(rng):
    right, wrong = rng.sample("ABCDE", 2)
    said = "Option ({}) is correct."
    return rf"\text{{({right})}}", said.format(right), rf"\text{{({wrong})}}", said.format(wrong)


def degrees(rng):
    value = rng.randrange(10, 99)
    return rf"{value}^\circ", f"{value} degrees", rf"{value + 2}^\circ", f"{value} radians"


MATH = [fraction, root, point, interval, polynomial, percent, option, degrees]


def cases(answers: int, seed: int = 0) -> list[tuple[str, str, float]]:
    """Completions, references and what they ought to score, half of them by either data set."""
    rng, found = random.Random(seed), []
    for i in range(-(-answers // (2 * len(WAYS)))):
        if i % 2:
            kind = MATH[i // 2 % len(MATH)]
            right, other, wrong, wrong_other = kind(rng)
            reference = rf"Adding both sides we see that it is $\boxed{{{right}}}$, as claimed."
        else:
            reference, right, other, wrong, wrong_other = gsm8k(rng)
        for way in WAYS:
            found.append((way.format(a=right, other=other), reference, 1.0))
            found.append((way.format(a=wrong, other=wrong_other), reference, 0.0))
    return found[:answers]


def compute(seconds: float) -> None:
    os.setsid()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(i * i for i in range(10_000))


def judged(answers: int, busy: int, seconds: float = 180.0):
    """The cases, their scores, the seconds it took, and the judge's counts."""
    beside = [multiprocessing.Process(target=compute, args=(seconds,)) for _ in range(busy)]
    found, reward = cases(answers), Rewards(["accuracy"], judge=Judge(5.0))
    completions, references, _ = zip(*found)
    about = {"prompts": [[]] * len(found), "completion_ids": [[]] * len(found), "step": 1}
    try:
        for process in beside:
            process.start()
        start = time.perf_counter()
        scores = [score for (score,) in reward(completions, **about, solution=references)]
        return found, scores, time.perf_counter() - start, reward.metrics()
    finally:
        reward.close()
        for process in beside:
            process.kill()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--answers", type=int, default=2000)
    parser.add_argument("--busy", type=int, default=0, help="processes that compute beside it")
    args = parser.parse_args()
    found, scores, seconds, metrics = judged(args.answers, args.busy)
    counts = Counter((wanted, score) for (*_, wanted), score in zip(found, scores))
    for (completion, reference, wanted), score in zip(found, scores):
        if score != wanted:
            print(f"{score} for {completion!r}, where {reference!r} is asked")
    print(f"{len(found)} answers beside {args.busy} processes: {seconds:.1f} s")
    print(f"right ones: {counts[1.0, 1.0]} score 1.0, {counts[1.0, 0.0]} score 0.0")
    print(f"wrong ones: {counts[0.0, 0.0]} score 0.0, {counts[0.0, 1.0]} score 1.0")
    print(", ".join(f"{name} {count:.0f}" for name, count in metrics.items()))


if __name__ == "__main__":
    main()

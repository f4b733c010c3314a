"""Answers checked a second: accuracy with run/judge.py beside math_verify in a loop.

    python bench/rewards.py            prints a table and writes bench/rewards.json

Each batch has 512 completions in groups of 8 that share a reference, as in training, and no two are
alike. The loop is what a reward function would do. It relies on math_verify's own time limits,
which work in a main thread only and stop everything behind a slow answer; it is given up after 30
seconds.
"""

import json
import multiprocessing
import os
import platform
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from rewards import Rewards  # noqa: E402
from run.judge import Judge  # noqa: E402

TOWER = r"\boxed{\dfrac{5^{\left(5^{\left(5^{\left(5^5\right)}\right)} - 4\right)} - 5}{16}}"
GROUPS, G = 64, 8


def batches():
    """name → completions, references"""
    places = [(g, i) for g in range(GROUPS) for i in range(G)]
    think = "<think>First {} and then {} makes it so.</think>"
    r1 = [think.format(g, i) + f"<answer>{g + i}</answer>" for g, i in places]
    prose = [think.format(g, i) + f" So {g} and {i} make {g + i}." for g, i in places]
    latex = [
        think.format(g, i) + rf" Hence \boxed{{\frac{{{g + i}}}{{{g + 9}}}}}." for g, i in places
    ]
    numbers = [f"{g} and 3 make {g + 3}.\n#### {g + 3}" for g, _ in places]
    fractions = [
        rf"The ratio is $\boxed{{\frac{{{2 * g + 6}}}{{{2 * g + 18}}}}}$." for g, _ in places
    ]
    return {
        "numbers in <answer>": (r1, numbers),
        "numbers in prose": (prose, numbers),
        "LaTeX fractions": (latex, fractions),
        "LaTeX, one never ends": ([TOWER, *latex[1:]], fractions),
    }


def math_verify_loop(completions, references):
    from math_verify import parse, verify

    values = []
    for completion, reference in zip(completions, references):
        values.append(float(verify(parse(reference), parse(completion))))
    return values


def in_time(function, *arguments, seconds=30):
    """Seconds that a call takes in a process of its own, with math_verify loaded and warm.

    None beyond `seconds`.
    """
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def child():
        math_verify_loop([r"\boxed{\frac{1}{2}}", "so 3"], ["0.5", "3"])
        start = time.perf_counter()
        function(*arguments)
        sender.send(time.perf_counter() - start)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    taken = receiver.recv() if receiver.poll(seconds) else None
    process.kill()
    process.join()
    return taken


def main():
    reward = Rewards(["accuracy"], judge=Judge(5.0))
    rows = []
    for step, (name, (completions, references)) in enumerate(batches().items()):
        about = {"prompts": [[]] * len(completions), "completion_ids": [[]] * len(completions)}
        one = {"prompts": [[]], "completion_ids": [[]], "solution": ["1"]}
        reward(["so 1"], **one, step=-1 - step)  # the judge is up
        start = time.perf_counter()
        reward(completions, **about, step=step, solution=references)
        ours = time.perf_counter() - start
        theirs = in_time(math_verify_loop, completions, references)
        n = len(completions)
        rows.append(
            {
                "batch": name,
                "ours_per_s": n / ours,
                "math_verify_per_s": theirs and n / theirs,
                "ours_s": ours,
            }
        )
    reward.close()
    machine = {
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "cpu": platform.processor(),
    }
    print(f"{'512 answers':24}{'run/judge.py':>14}{'math_verify loop':>20}   answers a second")
    for row in rows:
        loop = f"{row['math_verify_per_s']:.0f}" if row["math_verify_per_s"] else "over 30 s"
        print(f"{row['batch']:24}{row['ours_per_s']:>14.0f}{loop:>20}")
    text = json.dumps({"machine": machine, "rows": rows}, indent=1)
    Path(__file__).with_suffix(".json").write_text(text + "\n")


if __name__ == "__main__":
    main()

"""What is worth showing of a run, in words: of a step, of a batch, of what is to come, of its end."""

import re
import shlex
from pathlib import Path

from rewards import COUNTERS
from run import combinations, display
from run.display import ROWS, clock
from run.folder import newest_whole

# metric → its name on the screen, and how it is written
NUMBERS = {"completion_length": ("length", "{:.1f}"), "clipped_completions": ("cut", "{:.0%}")}
NUMBERS |= {"kl": ("kl", "{:.4f}"), "entropy": ("entropy", "{:.3f}")}


def rewards_of(metrics: dict[str, float]) -> dict[str, float]:
    """The sum, and each reward by its name."""
    found = {name: v for name, v in metrics.items() if re.fullmatch("rewards?(/[^/]+)?", name)}
    return {name.removeprefix("rewards/"): v for name, v in found.items() if name not in COUNTERS}


def in_words(metrics: dict[str, float]) -> dict[str, str]:
    """The numbers that matter of a step."""
    told = {name: f"{value:.3f}" for name, value in rewards_of(metrics).items()}
    if "zero_std_groups" in metrics:
        told["groups that teach"] = f"{1 - metrics['zero_std_groups']:.0%}"
    for metric, (name, form) in NUMBERS.items():
        if metric in metrics:
            told[name] = form.format(metrics[metric])
    return told


def sample_of(batch, run) -> tuple[str, str, list[tuple[str, str, float]]]:
    """A group of a batch that teaches, if there is one: its question, its reference, and some of
    its answers from the best to the worst, each with rewards and advantage."""
    G, advantages = run.args.num_generations, batch.advantages.tolist()
    teaches = [i - i % G for i, advantage in enumerate(advantages) if advantage]
    first = teaches[0] if teaches else 0
    group = sorted(range(first, first + G), key=lambda i: -advantages[i])
    some = group[: ROWS // 2] + group[ROWS // 2 :][-(ROWS - ROWS // 2) :]
    rows = []
    for i, text in zip(some, run.texts([batch.completions[i] for i in some])):
        scores = zip(run.rewards.names, batch.scores[i])
        earned = [f"{name} {round(score, 3):g}" for name, score in scores if score is not None]
        rows.append((text, ", ".join(earned), advantages[i]))
    row = batch.rows[first]
    question = [turn["content"] for turn in row["prompt"] if turn["role"] == "user"]
    return str(question[-1] if question else ""), str(row["solution"]), rows


def to_come(args, max_steps: int, steps_per_rollout: int, step: int) -> dict[str, int]:
    """How many evaluations and saves there will be behind a step."""
    if step >= max_steps:
        return {}
    rollouts = (max_steps - step - 1) // steps_per_rollout  # but for the last one
    last = step + rollouts * steps_per_rollout
    found = {"evaluate": int(combinations.evaluates(args)), "save": 1}  # at the end
    for name, every in (("evaluate", args.eval_steps), ("save", args.save_steps)):
        if every:  # a rollout that goes over several multiples has one
            found[name] += min(rollouts, last // every - step // every)
    return found


def ending(folder: Path, held_out: list[dict], is_over: bool) -> list[str]:
    """What was reached, where everything lies, and, if the run is over, what to do next.

    held_out: the metrics of each evaluation.
    """
    screen, name = display.screen, shlex.quote(str(folder))
    steps, seconds = screen.step_now - screen.first_step, clock(screen.seconds())
    told = f"{steps} step{'s' * (steps != 1)} in {seconds}"
    if len(held_out) > 1:
        first, last = rewards_of(held_out[0]), rewards_of(held_out[-1])
        changes = [f"{key} {first[key]:.3f} to {last[key]:.3f}" for key in last if key in first]
        told += f"; held out: {', '.join(changes)}"
    elif len(screen.rewards) > 1:
        few = min(5, len(screen.rewards) // 2)
        first, last = screen.rewards[:few], screen.rewards[-few:]
        told += f"; reward {sum(first) / few:.3f} to {sum(last) / few:.3f}"
    newest, _ = newest_whole(folder)
    files = ["metrics.jsonl", "completions.jsonl", "tokens.jsonl", "runs"]
    there = [file for file in files if (folder / file).exists()]
    lines = [told, f"in {name}: {', '.join([newest.name] * bool(newest) + there)}"]
    if is_over:
        for begins, command in (("next:", "chat"), ("     ", "evaluate"), ("     ", "report")):
            lines.append(f"{begins} python -m run.{command} {name}")
    return lines

"""What the page shows, put together from a run's files: steps, their groups, their completions.

    {"name", "about", "metrics", "evaluations", "rewards", "health", "steps", …}
    step         {"step", "train": [group], "eval": [group]}
    group        {"question", "solution", "completions": [completion]}
    completion   {"text", "rewards": [by function], "advantage", "length", "finished", "tokens"?}

`tokens` are those of tokens.jsonl. Prompts are long and alike, so what all have in common, the
system prompt and the template's words, stands in the page once.
"""

import json
import os
from collections import defaultdict

from run.health import PATIENCE, Health, at_start
from run.report.folder import Run

LARGEST = 24_000_000  # bytes of completions in a page; beyond, only some steps have theirs
OF_A_TOKEN = ("tokens", "ids", "sampled", "before", "after", "entropy", "ratio", "importance")


def story(run: Run, refresh: float = 0.0) -> dict:
    """refresh: seconds after which the page looks for news; 0 for never."""
    steps = steps_of(run)
    shortened = shorten_prompts(steps)
    kept = thin(steps, LARGEST)
    return {
        "name": run.folder.resolve().name,
        "about": about(run),
        "reward_weights": getattr(run.args, "reward_weights", None),
        "metrics": columns(run.steps),
        "evaluations": columns(run.evaluations),
        "rewards": run.rewards,
        "health": health(run),
        "patience": PATIENCE,
        "prompt": shortened,
        "steps": kept,
        "steps_left_out": len(steps) - len(kept),
        "max_steps": run.max_steps,
        "seconds": run.seconds,
        "is_over": run.is_over,
        "refresh": refresh,
    }


def about(run: Run) -> list[str]:
    """What was trained, on what. Names alone: a page that is sent on tells no folders."""
    flags = vars(run.args)
    datasets = flags.get("dataset") or []
    parts = [flags.get("model"), *datasets]
    told = [str(part).rstrip("/").split("/")[-1] for part in parts if part]
    return [*told, str(flags.get("train_type", "")), f"{run.args.num_generations} in a group"]


def columns(lines: list[dict]) -> dict[str, list]:
    """Lines as one list for each name, with null where a line lacks it."""
    names = dict.fromkeys(name for line in lines for name in line)
    return {name: [short(line.get(name)) for line in lines] for name in names}


def short(value):
    """A number to six digits; None for what is none."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return value if isinstance(value, int) else None


def health(run: Run) -> list[dict]:
    """What the run said before its first step, as step 0, and while it went on, by the lines that
    are logged."""
    watch = Health(run.args)
    told = [{"step": 0, "text": text} for text in at_start(run.steps[0])]
    for line in run.steps:
        told += [{"step": line["step"], "text": text} for text in watch.lines(line)]
    return told


# Steps -------------------------------------------------------------------------------------------


def steps_of(run: Run) -> list[dict]:
    """Every step that something is known of beside its metrics."""
    steps = defaultdict(lambda: {"train": [], "eval": []})
    drawn = {}  # (step, place among what was drawn for it) → a completion
    by_kind = defaultdict(list)
    for record in run.completions:
        phase = "eval" if record.get("phase") == "eval" else "train"
        by_kind[record["step"], phase].append(record)
    for (step, phase), records in by_kind.items():
        G = run.args.num_generations
        if phase == "eval":
            G = getattr(run.args, "num_generations_eval", None) or G
        for first in range(0, len(records), G):
            group = group_of(records[first : first + G], run.rewards)
            steps[step][phase].append(group)
            if phase == "train":
                for place, completion in enumerate(group["completions"], start=first):
                    drawn[step, place] = completion
    for record in run.tokens:
        add_tokens(record, steps[record["step"]]["train"], drawn, run.rewards)
    return [{"step": step, **steps[step]} for step in sorted(steps)]


def group_of(records: list[dict], rewards: list[str]) -> dict:
    """Records of completions.jsonl that answer the same question."""
    first = records[0]
    return {
        "question": first["prompt"],
        "solution": first.get("solution"),
        "completions": [completion_of(record, rewards) for record in records],
    }


def completion_of(record: dict, rewards: list[str]) -> dict:
    text = record.get("completion")
    if text is None:
        text = "".join(record["tokens"])
    return {
        "text": text,
        "rewards": [short(record["rewards"].get(name)) for name in rewards],
        "advantage": short(record.get("advantage")),
        "length": record.get("length"),
        "finished": record.get("finished"),
    }


def add_tokens(record: dict, groups: list[dict], drawn: dict, rewards: list[str]) -> None:
    """A line of tokens.jsonl. Its completions may be there; of a later step of the same rollout, or
    without completions.jsonl, they are not."""
    here = record["drawn"] == record["step"]
    known = [drawn.get((record["drawn"], done["index"])) for done in record["completions"]]
    if not here or None in known:
        known = [completion_of(done, rewards) for done in record["completions"]]
        prompt, solution = record["prompt"], record.get("solution")
        groups.append({"question": prompt, "solution": solution, "completions": known})
    for completion, done in zip(known, record["completions"]):
        completion["tokens"] = {name: done[name] for name in OF_A_TOKEN if name in done}


# What is left out --------------------------------------------------------------------------------


def shorten_prompts(steps: list[dict]) -> dict[str, str]:
    """Take off the groups' prompts what all begin and end with → that."""
    groups = [group for step in steps for phase in ("train", "eval") for group in step[phase]]
    before, after = common_parts([group["question"] for group in groups])
    for group in groups:
        question = group["question"]
        group["question"] = question[len(before) : len(question) - len(after)]
    return {"before": before, "after": after}


def common_parts(prompts: list[str]) -> tuple[str, str]:
    """What all prompts begin with and end with: whole lines, or up to a template's mark, so that
    the words that questions happen to share stay theirs."""
    if len(set(prompts)) < 2:
        return "", ""
    before = os.path.commonprefix(prompts)
    before = before[: 1 + max(before.rfind(mark) for mark in "\n>]")]
    rest = [prompt[len(before) :][::-1] for prompt in prompts]
    after = os.path.commonprefix(rest)[::-1]
    marks = [after.find(mark) for mark in "\n<[" if mark in after]
    return before, after[min(marks) :] if marks else ""


def thin(steps: list[dict], largest: int) -> list[dict]:
    """The steps, or of too many bytes some: the first, the last, and others evenly between."""
    sizes = [len(json.dumps(step)) for step in steps]
    count = len(steps)
    while count > 2:
        chosen = [round(i * (len(steps) - 1) / (count - 1)) for i in range(count)]
        whole = sum(sizes[i] for i in chosen)
        if whole <= largest:
            return [steps[i] for i in chosen]
        count = min(count - 1, int(count * largest / whole))
    return steps[:1] + steps[1:][-1:]

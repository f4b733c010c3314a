"""What a run's folder holds, read as it is: a run may still be writing."""

import json
import math
import types
from dataclasses import dataclass
from pathlib import Path

from data import UsageError

FLAGS = [
    "max_steps",
    "num_generations",
    "num_train_epochs",
    "top_k",
    "top_p",
]  # it needs
LINE = {"step": int}
COMPLETION = {"step": int, "prompt": str, "completion": str, "rewards": dict}
TOKENS = {"step": int, "drawn": int, "prompt": str, "completions": list}
OF_TOKENS = {"index": int, "tokens": list, "rewards": dict}  # each completion of such a line


@dataclass(frozen=True)
class Run:
    """The files of a run, as lists of their lines' objects."""

    folder: Path
    args: types.SimpleNamespace  # of args.json
    steps: list[dict]  # of metrics.jsonl: what was trained
    evaluations: list[dict]  # and what was evaluated
    completions: list[dict]
    tokens: list[dict]

    @property
    def rewards(self) -> list[str]:
        """The names of the reward functions: counters such as rewards/accuracy/timeouts are none."""
        names = dict.fromkeys(name for line in self.steps for name in line)
        names = [name.removeprefix("rewards/") for name in names if name.startswith("rewards/")]
        return [name for name in names if "/" not in name and name != "unscored"]

    @property
    def max_steps(self) -> int:
        """How many steps the run is to make."""
        last = self.steps[-1]
        if self.args.max_steps or not last.get("epoch"):
            return self.args.max_steps or last["step"]
        steps_per_epoch = last["step"] / last["epoch"]
        return math.ceil(self.args.num_train_epochs * steps_per_epoch - 1e-6)

    @property
    def seconds(self) -> float:
        """Of all steps, evaluations apart: a line tells the mean of those since the one before."""
        whole, before = 0.0, 0
        for line in self.steps:
            whole += (line["step"] - before) * (line.get("time/step") or 0.0)
            before = line["step"]
        return whole

    @property
    def is_over(self) -> bool:
        """Whether its last checkpoint is there, which it writes last."""
        step = self.steps[-1]["step"]
        return step >= self.max_steps and (self.folder / f"checkpoint-{step}").exists()


def refuse_other(folder: Path) -> None:
    """UsageError, one line, for what is no run's folder."""
    works = "a run's --output_dir works"
    if not folder.exists():
        raise UsageError(f"{folder}: no such folder; {works}")
    if not folder.is_dir():
        raise UsageError(f"{folder}: a file; {works}")
    if (folder / "evaluation.json").exists():
        raise UsageError(f"{folder}: an evaluation's folder, with no steps to show; {works}")
    if not (folder / "args.json").exists():
        above = folder.resolve().parent
        if (above / "args.json").exists():
            works = f"that of its run, {above}, works"
        raise UsageError(f"{folder}: no run's folder, for it has no args.json; {works}")


def has_steps(folder: Path) -> bool:
    """Whether a step that was trained is logged."""
    file = folder / "metrics.jsonl"
    return file.exists() and any("loss" in line for line in read_lines(file, LINE))


def read(folder: Path) -> Run:
    """UsageError, one line, where it is no run's folder, or a line in it is broken."""
    refuse_other(folder)
    args = read_flags(folder / "args.json")
    lines = read_lines(folder / "metrics.jsonl", LINE)
    steps = [line for line in lines if "loss" in line]
    completions = read_lines(folder / "completions.jsonl", COMPLETION)
    if not lines and not completions:
        what = "neither metrics.jsonl nor completions.jsonl says anything yet"
        raise UsageError(f"{folder}: {what}; --watch waits for the first step")
    if not steps:
        raise UsageError(f"{folder}: no step in metrics.jsonl yet; --watch waits for the first")
    tokens = read_lines(folder / "tokens.jsonl", TOKENS, OF_TOKENS)
    evaluations = [line for line in lines if "loss" not in line]
    return Run(folder, args, numbers(steps), numbers(evaluations), completions, tokens)


def numbers(lines: list[dict]) -> list[dict]:
    """Lines of metrics without what is no number: NaN has been read as None."""
    return [{name: v for name, v in line.items() if isinstance(v, int | float)} for line in lines]


def read_flags(file: Path) -> types.SimpleNamespace:
    try:
        flags = json.loads(file.read_text(encoding="utf-8"))
        missing = [name for name in FLAGS if name not in flags]
    except (ValueError, TypeError):
        missing = ["JSON"]
    if missing:
        raise UsageError(
            f"{file}: no run's flags, for it has no {missing[0]}; an --output_dir works"
        )
    return types.SimpleNamespace(**flags)


def read_lines(
    file: Path, needed: dict[str, type], of_completions: dict[str, type] | None = None
) -> list[dict]:
    """The objects of a jsonl file, none where there is no file. A last line without an end is still
    being written, or a kill has cut it, and is left out. needed: what each object has, by name, and
    each of its completions."""
    if not file.exists():
        return []
    text = file.read_text(encoding="utf-8", errors="replace")
    whole, _, _ = text.rpartition("\n")
    objects = []
    for number, line in enumerate(whole.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line, parse_constant=lambda _: None)  # NaN: JSON has none
            missing = lacking(found, needed)
            for completion in found["completions"] if of_completions else ():
                missing += lacking(completion, of_completions)
        except (ValueError, TypeError):
            missing = ["JSON object"]
        except KeyError as error:
            missing = [error.args[0]]
        if missing:
            raise UsageError(
                f"{file}: line {number} is broken, for it has no {missing[0]}; without the line the "
                "rest works"
            )
        objects.append(found)
    return objects


def lacking(found: dict, needed: dict[str, type]) -> list[str]:
    """Names whose values are not of their kind; KeyError where there is none."""
    return [name for name, kind in needed.items() if not isinstance(found[name], kind)]

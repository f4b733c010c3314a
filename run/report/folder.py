"""What a run's folder holds, read as it is: a run may still be writing."""

import json
import types
from dataclasses import dataclass
from pathlib import Path

from data import UsageError


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
    def max_steps(self) -> int | None:
        """How many steps the run is to make, as far as its files tell."""
        if self.args.max_steps:
            return self.args.max_steps
        last = self.steps[-1]
        return round(last["step"] / last["epoch"] * self.args.num_train_epochs) or None

    @property
    def is_over(self) -> bool:
        """Whether its last checkpoint is there, which it writes last."""
        step = self.steps[-1]["step"]
        return step >= self.max_steps and (self.folder / f"checkpoint-{step}").exists()


def read(folder: Path) -> Run:
    """UsageError, one line, where it is no run's folder, or a line in it is broken."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; a run's --output_dir works")
    if not (folder / "args.json").exists():
        raise UsageError(f"{folder}: no run's folder, for it has no args.json; an --output_dir works")
    try:
        args = json.loads((folder / "args.json").read_text(encoding="utf-8"))
        args = types.SimpleNamespace(**args)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{folder / 'args.json'}: is not a run's flags ({error})") from error
    lines = read_lines(folder / "metrics.jsonl", ("step",))
    steps = [line for line in lines if "loss" in line]
    if not steps:
        raise UsageError(f"{folder}: no step in metrics.jsonl yet; --watch waits for the first")
    return Run(
        folder,
        args,
        steps,
        [line for line in lines if "loss" not in line],
        read_lines(folder / "completions.jsonl", ("step", "prompt", "completion", "rewards")),
        read_lines(folder / "tokens.jsonl", ("step", "drawn", "completions")),
    )


def read_lines(file: Path, needed: tuple[str, ...]) -> list[dict]:
    """The objects of a jsonl file, none where there is no file. A last line without an end is still
    being written, or a kill has cut it, and is left out. needed: names that each object has."""
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
            missing = [name for name in needed if name not in found]
        except (ValueError, TypeError):
            missing = ["JSON"]
        if missing:
            raise UsageError(
                f"{file}: line {number} is broken: it has no {missing[0]}; without it the rest works"
            )
        objects.append(found)
    return objects

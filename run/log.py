"""What a run tells while it goes on: metrics.jsonl, completions.jsonl, the screen, other places.

Metrics are whatever the loss, the rewards and the sampler return: a new name needs no change here.
"""

import resource
import statistics
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch

from data import UsageError, one_line
from rewards import COUNTERS as OF_REWARDS
from run import checkpoints, display, reports, shown
from run.display import screen
from run.health import Health
from run.judge import RESTARTS
from run.lines import Lines, cut_after
from run.stop import wish

COUNTERS = {*OF_REWARDS, RESTARTS}
ONCE_A_BATCH = {"time/sync", "time/generate", "time/reward", *COUNTERS}


@dataclass(frozen=True)
class Options:
    """logs"""

    logging_steps: Annotated[
        int, "log the means of so many steps; the first by itself", "from 1"
    ] = 1
    log_completions: Annotated[bool, "write completions.jsonl, and a W&B table"] = False
    log_tokens: Annotated[int, "groups a logged step to write tokens.jsonl of", "from 0"] = 0
    log_tokens_steps: Annotated[int | None, "of every so many steps instead", "from 1"] = None
    report_to: Annotated[
        list[Literal["none", "tensorboard", "wandb", "trackio"]], "besides metrics.jsonl"
    ] = ("none",)
    run_name: Annotated[str | None, "in W&B and trackio; else they make one up"] = None
    project: Annotated[str | None, "in W&B and trackio; else WANDB_PROJECT of W&B, grpo"] = None


def say(world, line: str) -> None:
    """Print a line, once for all ranks."""
    if world.is_main:
        display.say(line)


def warn(world, line: str) -> None:
    """The same, so that it stands out."""
    if world.is_main:
        display.warn(line)


def weighted_mean(parts: list[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """The mean of each metric over the parts that have it, by their sizes; the sum of each counter."""
    names = dict.fromkeys(name for _, metrics in parts for name in metrics)
    together = {}
    for name in names:
        having = [(size, metrics[name]) for size, metrics in parts if name in metrics]
        if name in COUNTERS:
            together[name] = sum(value for _, value in having)
        else:
            total = sum(size for size, _ in having)
            together[name] = sum(size * value for size, value in having) / total
    return together


def metrics_of(batch, names: list[str]) -> dict[str, float]:
    """What a batch (train.Batch) tells: means over its completions, and its own metrics.

    names: of the reward functions. The mean of one is over the completions that it applies to.
    """
    N = len(batch.completions)
    metrics = {"reward": batch.rewards.mean().item()}
    for name, column in zip(names, zip(*batch.scores)):
        values = [value for value in column if value is not None]
        if values:
            metrics[f"rewards/{name}"] = sum(values) / len(values)
            metrics[f"rewards/{name}/std"] = statistics.pstdev(values)
    lengths = [len(ids) for ids in batch.completion_ids]
    ended = [len(done.ids) for done in batch.completions if done.finished]
    metrics["completion_length"] = sum(lengths) / N
    metrics["completion_length/min"] = min(lengths)
    metrics["completion_length/max"] = max(lengths)
    if ended:
        metrics["completion_length/ended"] = sum(ended) / len(ended)
    metrics["clipped_completions"] = 1 - len(ended) / N
    return metrics | batch.metrics


def records_of(batch, run) -> list[dict]:
    """What completions.jsonl tells of each completion of a batch."""
    columns = {
        "prompt": run.tokenizer.batch_decode(batch.prompt_ids),
        "completion": run.texts(batch.completions),
        "rewards": [dict(zip(run.rewards.names, row)) for row in batch.scores],
        "advantage": batch.advantages.tolist(),
        "solution": [row["solution"] for row in batch.rows],
        "length": [len(ids) for ids in batch.completion_ids],
        "finished": [completion.finished for completion in batch.completions],
    }
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


class Tally:
    """Parts of a step's metrics, of micro-batches and then of ranks: they add up, but for names that
    end in /max, of which the largest counts. A step without any gradient has a loss, too."""

    def __init__(self):
        self.totals = {"loss": 0.0, "clip_ratio": 0.0}

    def add(self, parts: dict) -> None:
        for name, value in parts.items():
            value, before = float(value), self.totals.get(name, 0.0)
            self.totals[name] = max(before, value) if name.endswith("/max") else before + value

    def over(self, world) -> dict[str, float]:
        """Of all ranks, on each of them, which also learn who of them was asked to stop."""
        together = Tally()
        everyone = world.gather([(self.totals, wish.signal)])
        for parts, _ in everyone:
            together.add(parts)
        wish.agreed = max(signal for _, signal in everyone)
        return together.totals


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held: of its GPU, else of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def later_in_the_batch(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics of a batch for its second step and those behind it: sampling took place once."""
    return {name: 0.0 if name in ONCE_A_BATCH else value for name, value in metrics.items()}


class Waits:
    """A stopwatch: `with waits:` where this rank waits for others' numbers, then `seconds()`."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.marks = []  # where it began and ceased to wait, in turns

    def __enter__(self) -> None:
        """On a GPU a mark in the stream of computations: that waits, while Python runs ahead."""
        if not self.on_gpu:
            self.marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    def __exit__(self, *_) -> None:
        self.__enter__()

    def seconds(self) -> float:
        """Waited since the last call."""
        starts, ends = self.marks[::2], self.marks[1::2]
        self.marks = []
        if not self.on_gpu:
            return sum(ends) - sum(starts)
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in zip(starts, ends)) / 1000


class Log:
    """Everything that a run writes while it trains; only rank 0's says anything.

    A logged step tells the means (of counters the sums) since the one before. `progress.unlogged`
    holds the steps until then, and checkpoints keep it.
    """

    def __init__(self, args, world, max_steps, steps_per_epoch, progress, facts: dict[str, float]):
        self.facts = facts  # which each line repeats
        self.main, self.folder = world.is_main, Path(args.output_dir)
        self.metrics_file = Lines(self.folder / "metrics.jsonl")
        self.completions_file = Lines(self.folder / "completions.jsonl")
        self.every, self.tells_completions = args.logging_steps, args.log_completions
        self.every_tokens = args.log_tokens_steps
        self.max_steps, self.steps_per_epoch = max_steps, steps_per_epoch
        self.reports, self.held_out = [], []
        self.device, self.tokens_told = world.device, progress.num_tokens
        self.health = Health(args)
        if self.main:
            self._open(args, world, progress.step)
        wish.training = True  # from now on there is a step to finish

    def _open(self, args, world, step: int) -> None:
        self.reports = reports.of(args)
        for lines in (
            self.metrics_file,
            self.completions_file,
            Lines(self.folder / "tokens.jsonl"),
        ):
            try:
                note = cut_after(lines.file, step)
            except OSError as error:
                what = f"{lines.file.name} cannot be cut behind step {step} ({one_line(error)})"
                works = "a folder that you may write to works"
                raise UsageError(f"--output_dir {self.folder}: {what}; {works}") from error
            if note:
                display.say(note)
        if step >= self.max_steps:
            display.say(f"step {step} of {self.max_steps} is done: nothing is left to do")
        M = checkpoints.rollout_size(args, world.size) // checkpoints.step_size(args, world)
        screen.begin(
            step,
            self.max_steps,
            partial(shown.to_come, args, self.max_steps, M * args.num_iterations),
        )

    @property
    def asked_to_stop(self) -> bool:
        """Whether the run is to end behind this step: the same on all ranks."""
        return bool(wish.agreed)

    def tells(self, step: int) -> bool:
        """Whether a step has a line in metrics.jsonl."""
        return step == 1 or step % self.every == 0 or step == self.max_steps

    def tells_tokens(self, step: int) -> bool:
        """Whether tokens.jsonl is to tell of it."""
        if self.every_tokens is None:
            return self.tells(step)
        return step == 1 or step % self.every_tokens == 0

    def step(self, progress, learning_rate: float, metrics: dict[str, float]) -> None:
        """A step is done. metrics: what is told as a mean over the steps of a line."""
        step = progress.step
        progress.unlogged.append(metrics)
        if self.main:
            for line in self.health.lines(metrics):
                display.warn(line)
            screen.step(step, shown.in_words(metrics), metrics)
        if self.tells(step):
            line = {"step": step, "epoch": step / self.steps_per_epoch}
            line |= {"learning_rate": learning_rate, "num_tokens": progress.num_tokens}
            line |= self._speed(progress) | self.facts
            line |= weighted_mean([(1, metrics) for metrics in progress.unlogged])
            self._write(step, line)
            if self.main and not screen.live:
                told = ", ".join(f"{name} {value}" for name, value in shown.in_words(line).items())
                seconds = f"{line['time/step']:.1f} s{screen.left()}"
                display.say(f"step {step} of {self.max_steps}: {told}, {seconds}")
            progress.unlogged = []

    def _speed(self, progress) -> dict[str, float]:
        """Since the last line: tokens a second, of prompts and completions; and memory at its peak."""
        tokens = progress.num_tokens - self.tokens_told
        seconds = sum(metrics["time/step"] for metrics in progress.unlogged)
        self.tokens_told = progress.num_tokens
        peak = peak_memory(self.device) / 2**30
        return {"time/tokens_per_second": tokens / seconds, "memory/peak_gib": peak}

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        self._write(step, {"step": step, **{f"eval/{name}": v for name, v in metrics.items()}})
        if self.main:
            told = ", ".join(f"{name} {value}" for name, value in shown.in_words(metrics).items())
            display.say(f"step {step}, held out: {told}")
            self.held_out.append(metrics)

    def completions(self, step: int, batch, run, phase: str = "train") -> None:
        """Tell what was sampled for a step, or in an evaluation: all of it with --log_completions."""
        if not self.main:
            return
        if phase == "train" and screen.wants_sample():
            screen.show_sample(*shown.sample_of(batch, run))
        prefix = "" if phase == "train" else "eval/"
        for report in self.reports:
            report.batch(batch, prefix, step)
        if not self.tells_completions:
            return
        records = records_of(batch, run)
        if phase == "eval" and run.args.num_generations_eval == 1:
            records = [record | {"advantage": None} for record in records]
        for report in self.reports:
            report.completions(records, prefix, step)
        told = [{"step": step, "phase": phase, **record} for record in records]
        self._append(self.completions_file, told)

    def _write(self, step: int, line: dict[str, float]) -> None:
        if not self.main:
            return
        self._append(self.metrics_file, [line])
        for report in self.reports:
            report.metrics(line, step)

    def _append(self, file: Lines, objects: list[dict]) -> None:
        problem = file.write(objects)
        if problem:
            display.warn(problem)

    def close(self) -> None:
        wish.training = False
        for report in self.reports:
            report.close()
        if self.main:
            display.end(shown.ending(self.folder, self.held_out, not self.asked_to_stop))

"""Where else a run is told: TensorBoard, Weights & Biases, trackio (--report_to).

A reporter takes metrics, each batch's numbers, and its completions with --log_completions. To add
one, add its class to REPORTERS and its name to the flag in run/log.py.
"""

import io
import os
import shlex
import threading
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import torch

from data import one_line
from run import display
from run.console import harmless

TEXTS = 8  # completions of a batch that TensorBoard shows
ROWS = 1000  # completions of a table in W&B; completions.jsonl has all
PROJECT = "grpo"  # unless --project names another


class TensorBoard:
    def __init__(self, args):
        from torch.utils.tensorboard import SummaryWriter

        hush_writers()
        self.writer = SummaryWriter(str(Path(args.output_dir) / "runs"))

    def metrics(self, line: dict[str, float], step: int) -> None:
        for name, value in line.items():
            if name != "step":
                self.writer.add_scalar(name, value, step)

    def batch(self, batch, prefix: str, step: int) -> None:
        """How advantages and lengths are spread."""
        lengths = torch.tensor([len(ids) for ids in batch.completion_ids])
        self.writer.add_histogram(f"{prefix}advantages", batch.advantages, step)
        self.writer.add_histogram(f"{prefix}completion_lengths", lengths, step)

    def completions(self, records: list[dict], prefix: str, step: int) -> None:
        texts = "\n\n---\n\n".join(map(as_markdown, records[:TEXTS]))
        self.writer.add_text(f"{prefix}completions", texts, step)

    def close(self) -> None:
        self.writer.close()


def hush_writers() -> None:
    """TensorBoard writes in a thread, and raises what the thread has met at the next call: no
    traceback of the thread's own."""
    before = threading.excepthook

    def hook(met) -> None:
        if not type(met.thread).__module__.startswith("tensorboard."):
            before(met)

    threading.excepthook = hook


def as_markdown(record: dict) -> str:
    """Texts as code, which is shown as it is written."""
    rewards = ", ".join(f"{name} {value}" for name, value in record["rewards"].items())
    advantage = record["advantage"]
    told = rewards if advantage is None else f"{rewards}; advantage {advantage:+.2f}"
    texts = (record["prompt"], f"reference: {record['solution']}", record["completion"])
    blocks = []
    for text in texts:
        lines = harmless(text).splitlines() or [""]
        blocks.append("\n".join(f"    {line}" for line in lines))
    prompt, reference, completion = blocks
    return f"{prompt}\n\n{reference}\n\n**{told}**\n\n{completion}"


class WandB:
    """It keeps one table of a name and step, so an evaluation's batches wait for its end."""

    def __init__(self, args):
        import wandb

        self.wandb = wandb
        project = args.project or os.environ.get("WANDB_PROJECT", PROJECT)
        settings = {"project": project, "config": vars(args), "dir": args.output_dir}
        self.run = wandb.init(**settings, name=args.run_name)
        self.held_out: list[dict] = []  # records of the evaluation under way

    def metrics(self, line: dict[str, float], step: int) -> None:
        if self.held_out and any(name.startswith("eval/") for name in line):
            records, self.held_out = self.held_out, []
            self._table(records, "eval/", step)
        self.run.log(line, step=step)

    def batch(self, batch, prefix: str, step: int) -> None:
        """Its page makes curves of numbers alone."""

    def completions(self, records: list[dict], prefix: str, step: int) -> None:
        if prefix:
            self.held_out += records[: ROWS - len(self.held_out)]
        else:
            self._table(records[:ROWS], prefix, step)

    def _table(self, records: list[dict], prefix: str, step: int) -> None:
        names = list(records[0]["rewards"])
        table = self.wandb.Table(columns=["prompt", "completion", "advantage", *names])
        for r in records:
            table.add_data(r["prompt"], r["completion"], r["advantage"], *r["rewards"].values())
        self.run.log({f"{prefix}completions": table}, step=step)

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """Kept on this machine: `trackio show` opens it in a browser."""

    def __init__(self, args):
        import trackio

        self.trackio = trackio
        project = args.project or PROJECT
        with redirect_stdout(io.StringIO()):  # colours, which are not for a log
            trackio.init(project=project, name=args.run_name, config=dict(vars(args)))
        display.say(f"trackio show --project {shlex.quote(project)} opens this run's curves")

    def metrics(self, line: dict[str, float], step: int) -> None:
        told = {name: value for name, value in line.items() if name != "step"}
        self.trackio.log(told, step=step)

    def batch(self, batch, prefix: str, step: int) -> None:
        """Its page makes curves of numbers alone."""

    def completions(self, records: list[dict], prefix: str, step: int) -> None:
        """They are in completions.jsonl, and on the page of run.report."""

    def close(self) -> None:
        with redirect_stdout(io.StringIO()):
            self.trackio.finish()


REPORTERS = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}


class Guarded:
    """A report that may fail, as on a full disk: it says so once, and the run goes on without it."""

    def __init__(self, name: str, make: Callable):
        self.name, self.report, self.failed = name, None, False
        self._try(lambda: setattr(self, "report", make()))

    def metrics(self, line: dict[str, float], step: int) -> None:
        self._try(lambda: self.report.metrics(line, step))

    def batch(self, batch, prefix: str, step: int) -> None:
        self._try(lambda: self.report.batch(batch, prefix, step))

    def completions(self, records: list[dict], prefix: str, step: int) -> None:
        self._try(lambda: self.report.completions(records, prefix, step))

    def close(self) -> None:
        self._try(lambda: self.report.close())

    def _try(self, call: Callable) -> None:
        if self.failed:
            return
        try:
            call()
        except Exception as error:
            self.failed = True
            what = one_line(error) or type(error).__name__
            display.warn(f"--report_to {self.name}: failed ({what}); training goes on without it")


def of(args) -> list[Guarded]:
    """Those of --report_to, opened."""
    names = dict.fromkeys(args.report_to)
    return [Guarded(name, partial(REPORTERS[name], args)) for name in names if name in REPORTERS]

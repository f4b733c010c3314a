"""What a run tells while it goes on: metrics.jsonl, completions.jsonl, TensorBoard, W&B, the bar.

Metrics are whatever the loss, the rewards and the sampler return: a new name needs no change here.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from tqdm import tqdm

from rewards import COUNTERS
from run.health import Health

ONCE_A_BATCH = {"time/sync", "time/generate", "time/reward", *COUNTERS}


@dataclass(frozen=True)
class Options:
    """logs"""

    logging_steps: Annotated[int, "log the means of so many steps", "from 1"] = 1
    log_completions: Annotated[bool, "write completions.jsonl, and a W&B table"] = False
    log_tokens: Annotated[int, "groups a logged step to write tokens.jsonl of", "from 0"] = 0
    report_to: Annotated[list[Literal["none", "tensorboard", "wandb"]], "besides metrics.jsonl"] = (
        "none",
    )


def say(world, line: str) -> None:
    """Print a line, once for all ranks."""
    if world.is_main:
        print(line, flush=True)


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
    metrics["completion_length"] = sum(map(len, batch.completion_ids)) / N
    metrics["clipped_completions"] = (
        sum(not completion.finished for completion in batch.completions) / N
    )
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


def drift(world, micro_batches: list) -> dict[str, float]:
    """Mean and maximum over all ranks' tokens of |trainer - sampler| of a log-probability.

    A sampler that lags behind, or draws from another distribution, shows here.
    """
    differences = []
    for micro in micro_batches:
        if micro.completions:
            for ours, completion in zip(micro.old_logps.tolist(), micro.completions):
                differences += [abs(a - b) for a, b in zip(ours, completion.logps)]
    own = (sum(differences), len(differences), max(differences, default=0.0))
    sums, counts, maxima = zip(*world.gather([own]))
    if not sum(counts):
        return {}
    return {"sampler/logp_diff": sum(sums) / sum(counts), "sampler/logp_diff_max": max(maxima)}


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

    def __init__(self, args, world, max_steps: int, steps_per_epoch: float, progress):
        self.main, self.folder = world.is_main, Path(args.output_dir)
        self.every, self.tells_completions = args.logging_steps, args.log_completions
        self.max_steps, self.steps_per_epoch = max_steps, steps_per_epoch
        self.tensorboard = self.wandb = None
        self.health = Health(args)
        if self.main:
            self._open(args, progress.step)

    def _open(self, args, step: int) -> None:
        if "tensorboard" in args.report_to:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(self.folder / "runs"))
        if "wandb" in args.report_to:
            import wandb

            self.wandb = wandb.init(project="grpo", config=vars(args), dir=str(self.folder))
        for name in ("metrics.jsonl", "completions.jsonl", "tokens.jsonl"):
            cut_after(self.folder / name, step)
        settings = {"desc": "GRPO", "unit": "step", "dynamic_ncols": True}
        self.bar = tqdm(total=self.max_steps, initial=step, **settings)

    def tells(self, step: int) -> bool:
        """Whether a step has a line in metrics.jsonl."""
        return step % self.every == 0 or step == self.max_steps

    def step(self, progress, learning_rate: float, metrics: dict[str, float]) -> None:
        """A step is done. metrics: what is told as a mean over the steps of a line."""
        step = progress.step
        progress.unlogged.append(metrics)
        if self.main:
            for line in self.health.lines(metrics):
                self.bar.write(line)
            shown = {"reward": f"{metrics['reward']:.3f}", "loss": f"{metrics['loss']:.4f}"}
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update()
        if self.tells(step):
            line = {"step": step, "epoch": step / self.steps_per_epoch}
            line |= {"learning_rate": learning_rate, "num_tokens": progress.num_tokens}
            line |= weighted_mean([(1, metrics) for metrics in progress.unlogged])
            self._write(step, line)
            progress.unlogged = []

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        self._write(step, {"step": step, **{f"eval/{name}": v for name, v in metrics.items()}})
        if self.main:
            shown = [n for n in metrics if n in ("reward", "completion_length")]
            shown += [n for n in metrics if n.startswith("rewards/")]
            told = ", ".join(f"eval/{name} {metrics[name]:.3f}" for name in shown)
            self.bar.write(f"step {step}: {told}")

    def completions(self, step: int, batch, run, phase: str = "train") -> None:
        """Tell what was sampled for a step, or in an evaluation, with --log_completions."""
        if not (self.main and self.tells_completions):
            return
        names = run.rewards.names
        records = records_of(batch, run)
        if phase == "eval" and run.args.num_generations_eval == 1:
            records = [record | {"advantage": None} for record in records]
        if self.wandb:
            import wandb

            table = wandb.Table(columns=["prompt", "completion", "advantage", *names])
            for r in records:
                table.add_data(r["prompt"], r["completion"], r["advantage"], *r["rewards"].values())
            name = "completions" if phase == "train" else "eval/completions"
            self.wandb.log({name: table}, step=step)
        with (self.folder / "completions.jsonl").open("a", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps({"step": step, "phase": phase, **record}, default=str) + "\n")

    def _write(self, step: int, line: dict[str, float]) -> None:
        if not self.main:
            return
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self.tensorboard:
            for name, value in line.items():
                if name != "step":
                    self.tensorboard.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(line, step=step)

    def close(self) -> None:
        if self.main:
            self.bar.close()
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def cut_after(file: Path, step: int) -> None:
    """Forget what a run wrote that got further than the checkpoint at `step`."""
    if not file.exists():
        return
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]  # a kill may have cut the last one
    kept = [line for line in whole if json.loads(line)["step"] <= step]
    file.write_text("".join(kept), encoding="utf-8")
